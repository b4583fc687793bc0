"""Label smoothing as a perturbation: a constant pull away from the label."""

import math

from torch import Tensor

from ..functional import label_smoothing_delta, smooth_labels
from ..statistics import ClassStatistics
from .base import LogitPerturbation, check, check_choice


class LabelSmoothing(LogitPerturbation):
    r"""
    Label smoothing: part of the target is spread over all classes, evenly or by their frequency.

    Level: sample.
    Formula: `delta = alpha (onehot(y) - t)`, `t = 1/C` or the class shares `pi`.
    Helps: over-confident models, and a little under symmetric label noise.
    Hurts: where calibrated probabilities of 1 are right; it never switches itself off on well-fitted samples.
    Cost: O(NC).
    Source: Szegedy et al., Rethinking the Inception architecture (CVPR 2016).

    Args:
        alpha (`float`, *optional*, defaults to 0.1):
            Share of the target that is spread, in (-1, 1). A negative share sharpens instead (Wei et al., ICML 2022).
        target (`str`, *optional*, defaults to `"uniform"`):
            `"uniform"`, or `"prior"`: the share of each class in the training set (Pereyra et al., 2017). After
            logit adjustment, which models `p(z) pi`, only the latter asks for nothing but uncertainty: the uniform
            one would push the tail up a second time.

    Raises:
        ValueError: If `alpha` is not in (-1, 1), or `target` is none of the two.

    Example:

    ```python
    >>> LabelSmoothing(0.2)
    label_smoothing(alpha=0.2)

    ```
    """

    name = "label_smoothing"

    def __init__(self, alpha: float = 0.1, target: str = "uniform"):
        super().__init__()
        check(-1 < alpha < 1, "alpha", alpha, "in (-1, 1)")
        check_choice("target", target, ("uniform", "prior"))
        self.alpha = alpha
        self.target = target
        self._prior: Tensor | None = None

    def delta(self, gradient: Tensor, logits: Tensor, labels: Tensor, statistics: ClassStatistics) -> Tensor:
        target = statistics.prior if self.target == "prior" else None
        return label_smoothing_delta(gradient, labels, self.alpha, target)

    def add_delta(
        self, gradient: Tensor, logits: Tensor, labels: Tensor, statistics: ClassStatistics, in_place: bool = False
    ) -> tuple[Tensor, Tensor]:
        batch = statistics.batch(logits, labels)
        share = self.alpha * batch.labelled.to(gradient)
        if self.target == "prior":
            self._look_at(statistics.prior)
            norm, target = abs(self.alpha) * self._distances.to(gradient)[batch.classes], self._prior
        else:
            norm, target = share.abs() * math.sqrt(1 - 1 / gradient.shape[-1]), None
        return smooth_labels(gradient, batch.classes, share, target, in_place), norm

    def _look_at(self, prior: Tensor) -> None:
        """`||onehot(c) - prior||` of each class, from a prior that seldom changes."""
        if prior is self._prior:
            return
        self._prior = prior
        squares = prior.square()
        # Where a share is nearly 1, the difference to the sum of all would leave nothing of the others.
        largest = squares.argmax(keepdim=True)
        others = (squares.sum() - squares).scatter(0, largest, squares.scatter(0, largest, 0.0).sum(0, keepdim=True))
        self._distances = ((1 - prior).square() + others).sqrt()
