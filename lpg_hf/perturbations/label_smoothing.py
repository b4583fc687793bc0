"""Label smoothing as a perturbation: a constant pull away from the label."""

from torch import Tensor

from ..functional import label_smoothing_delta
from ..statistics import ClassStatistics
from .base import LogitPerturbation, check


class LabelSmoothing(LogitPerturbation):
    r"""
    Label smoothing: part of the target is spread over all classes.

    Level: sample.
    Formula: `delta = alpha (onehot(y) - 1/C)`.
    Helps: over-confident models, and a little under symmetric label noise.
    Hurts: where calibrated probabilities of 1 are right; it never switches itself off on well-fitted samples.
    Cost: O(NC).
    Source: Szegedy et al., Rethinking the Inception architecture (CVPR 2016).

    Args:
        alpha (`float`, *optional*, defaults to 0.1):
            Share of the target that is spread, in (-1, 1). A negative share sharpens instead (Wei et al., ICML 2022).

    Raises:
        ValueError: If `alpha` is not in (-1, 1).

    Example:

    ```python
    >>> LabelSmoothing(0.2)
    label_smoothing(alpha=0.2)

    ```
    """

    name = "label_smoothing"

    def __init__(self, alpha: float = 0.1):
        super().__init__()
        check(-1 < alpha < 1, "alpha", alpha, "in (-1, 1)")
        self.alpha = alpha

    def delta(self, gradient: Tensor, logits: Tensor, labels: Tensor, statistics: ClassStatistics) -> Tensor:
        return label_smoothing_delta(gradient, labels, self.alpha)
