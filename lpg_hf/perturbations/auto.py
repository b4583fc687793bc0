"""The preset `auto`: what suits most data, less what other methods of the chain do already."""

from collections.abc import Sequence

from .base import LogitPerturbation, Perturbation
from .class_relative_dampening import ClassRelativeDampening
from .class_weighting import ClassWeighting
from .label_smoothing import LabelSmoothing
from .logit_adjustment import LogitAdjustment


def auto_chain(others: Sequence[Perturbation]) -> list[LogitPerturbation]:
    """
    Logit adjustment toward the class shares of the evaluation, and class-relative dampening (ours).

    There is no threshold of imbalance: where the classes are alike in training and evaluation, the offsets are too.

    Args:
        others (`Sequence[Perturbation]`): The other methods that act in the training.

    Returns:
        `list[LogitPerturbation]`: The methods that `auto` stands for.
    """
    chain: list[LogitPerturbation] = []
    if not any(isinstance(method, LogitAdjustment | ClassWeighting) for method in others):
        chain.append(LogitAdjustment(learned=(0.05, 0.2), target="evaluation"))
        # After an adjustment of 100 : 1, 1 % of the target on a tail class would make it as likely as the head.
        for method in others:
            if isinstance(method, LabelSmoothing) and method.target == "uniform":
                chain += [LabelSmoothing(-method.alpha), LabelSmoothing(method.alpha, target="prior")]
    if not any(isinstance(method, ClassRelativeDampening) for method in others):
        chain.append(ClassRelativeDampening())
    return chain
