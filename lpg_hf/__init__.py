"""Learning to Perturb Gradients: a drop-in Trainer for noisy and imbalanced labels."""

from importlib.metadata import version

from .config import LPGConfig
from .loss import LPGLoss
from .perturbations import LPG, ClassRelativeDampening, LogitAdjustment, LogitClipping
from .trainer import LPGTrainer


__version__ = version("lpg_hf")

__all__ = ["LPG", "ClassRelativeDampening", "LPGConfig", "LPGLoss", "LPGTrainer", "LogitAdjustment", "LogitClipping"]
