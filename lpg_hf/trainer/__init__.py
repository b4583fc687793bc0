"""LPGTrainer and its parts: where in a training step the perturbations act, what is logged, what is saved."""

from .export_issues import export_issues
from .lpg_trainer import LPGTrainer


__all__ = ["LPGTrainer", "export_issues"]
