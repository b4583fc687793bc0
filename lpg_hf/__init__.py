"""Learning to Perturb Gradients: a drop-in Trainer for noisy and imbalanced labels."""

from importlib.metadata import version

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


__version__ = version("lpg_hf")

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
