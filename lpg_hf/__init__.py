"""Learning to Perturb Gradients: a drop-in Trainer for noisy and imbalanced labels."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .versions import check_versions


if TYPE_CHECKING:
    from .config import LPGConfig
    from .loss import LPGLoss
    from .perturbations import (
        LPG,
        LPL,
        SAM,
        ClassRelativeDampening,
        ClassWeighting,
        FocalLoss,
        GeneralizedCrossEntropy,
        GradientClipping,
        GradientNoise,
        LabelSmoothing,
        LogitAdjustment,
        LogitClipping,
        LogitNoise,
    )
    from .trainer import LPGTrainer


check_versions()

# setuptools reads it from here, so that a checkout that is not installed has it, too.
__version__ = "0.1.0"

__all__ = [
    "LPG",
    "LPL",
    "SAM",
    "ClassRelativeDampening",
    "ClassWeighting",
    "FocalLoss",
    "GeneralizedCrossEntropy",
    "GradientClipping",
    "GradientNoise",
    "LPGConfig",
    "LPGLoss",
    "LPGTrainer",
    "LabelSmoothing",
    "LogitAdjustment",
    "LogitClipping",
    "LogitNoise",
]


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used: `LPGLoss` in a loop of one's own does not load the Trainer."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "LPGTrainer":
        module = import_module("lpg_hf.trainer")
    elif name == "LPGConfig":
        module = import_module("lpg_hf.config")
    elif name == "LPGLoss":
        module = import_module("lpg_hf.loss")
    else:
        module = import_module("lpg_hf.perturbations")
    value = globals()[name] = getattr(module, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
