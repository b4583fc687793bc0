"""The preset `auto`: the methods that suit the class counts, less those that other methods of the chain do already."""

from collections.abc import Sequence

from .base import LogitPerturbation, Perturbation
from .class_relative_dampening import ClassRelativeDampening
from .class_weighting import ClassWeighting
from .label_smoothing import LabelSmoothing
from .logit_adjustment import LogitAdjustment


# Above this ratio of the largest to the smallest class, `auto` adjusts the logits.
MIN_IMBALANCE = 2.0


def auto_chain(class_counts: Sequence[int] | None, others: Sequence[Perturbation]) -> list[LogitPerturbation]:
    """
    Logit adjustment where classes are imbalanced, label smoothing, and class-relative dampening (ours).

    Args:
        class_counts (`Sequence[int]`, *optional*):
            Training samples of each class. While they are unknown, the adjustment stays in the chain and looks at the
            running prior itself.
        others (`Sequence[Perturbation]`): The other methods that act in the training.

    Returns:
        `list[LogitPerturbation]`: The methods that `auto` stands for.
    """
    chain: list[LogitPerturbation] = []
    is_nearly_balanced = _is_nearly_balanced(class_counts)
    is_corrected = any(isinstance(method, LogitAdjustment | ClassWeighting) for method in others)
    if not is_corrected and not is_nearly_balanced:
        is_corrected = True
        chain.append(LogitAdjustment(tau=1.0, min_imbalance=MIN_IMBALANCE, learned=(0.05, 0.2)))
        # After an adjustment of 100 : 1, 1 % of the target on a tail class would make it as likely as the head.
        for method in others:
            if isinstance(method, LabelSmoothing) and method.target == "uniform":
                chain += [LabelSmoothing(-method.alpha), LabelSmoothing(method.alpha, target="prior")]
    # The target is the prior for the same reason. Where nothing is corrected, the class shares may come from wrong
    # labels. A user's label smoothing does not replace this one: with both, more cells of the benchmark gain.
    chain.append(LabelSmoothing(alpha=0.1, target="prior" if is_corrected else "uniform"))
    if not any(isinstance(method, ClassRelativeDampening) for method in others):
        chain.append(
            ClassRelativeDampening(
                power=8.0,
                learned=(0.05, 0.3),
                contradicted=(0.01, 0.03),
                decided=(0.1, 0.13),
                # A long tail stays unsure for so long that wrong labels would be memorized.
                rising=(0.5, 0.8) if is_nearly_balanced else None,
                compensated=True,
            )
        )
    return chain


def _is_nearly_balanced(class_counts: Sequence[int] | None) -> bool:
    present = [] if class_counts is None else [count for count in class_counts if count > 0]
    return bool(present) and max(present) <= MIN_IMBALANCE * min(present)
