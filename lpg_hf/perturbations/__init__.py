"""The methods: each a delta that is added to a gradient."""

from .base import GradientPerturbation, LogitPerturbation, ParameterPerturbation, Perturbation, SampleReweighting
from .class_relative_dampening import ClassRelativeDampening
from .class_weighting import ClassWeighting
from .focal_loss import FocalLoss
from .generalized_cross_entropy import GeneralizedCrossEntropy
from .gradient_clipping import GradientClipping
from .gradient_noise import GradientNoise
from .label_smoothing import LabelSmoothing
from .logit_adjustment import LogitAdjustment
from .logit_clipping import LogitClipping
from .logit_noise import LogitNoise
from .lpg import LPG
from .lpl import LPL
from .registry import METHODS, build_chain, method_card, parse_perturbation
from .sam import SAM


__all__ = [
    "LPG",
    "LPL",
    "METHODS",
    "SAM",
    "ClassRelativeDampening",
    "ClassWeighting",
    "FocalLoss",
    "GeneralizedCrossEntropy",
    "GradientClipping",
    "GradientNoise",
    "GradientPerturbation",
    "LabelSmoothing",
    "LogitAdjustment",
    "LogitClipping",
    "LogitNoise",
    "LogitPerturbation",
    "ParameterPerturbation",
    "Perturbation",
    "SampleReweighting",
    "build_chain",
    "method_card",
    "parse_perturbation",
]
