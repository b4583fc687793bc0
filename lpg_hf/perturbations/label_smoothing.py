"""Label smoothing as a perturbation: a constant pull away from the label."""

import math

import torch
from torch import Tensor

from ..batch import LogitBatch
from ..statistics import ClassStatistics
from .base import LogitPerturbation
from .checks import check, check_choice


def smooth_labels(
    gradient: Tensor, classes: Tensor, share: Tensor, target: Tensor | None = None, in_place: bool = False
) -> Tensor:
    r"""
    A gradient plus the delta of label smoothing, `alpha (onehot(y) - t)`, without a matrix for the delta.

    Source: Szegedy et al., Rethinking the Inception architecture (CVPR 2016). A `target` of class frequencies is the
    unigram smoothing of Pereyra et al., Regularizing neural networks by penalizing confident output distributions
    (2017); a negative `alpha` is the negative smoothing of Wei et al., To smooth or not? (ICML 2022).

    Args:
        gradient (`torch.Tensor` of shape `[N, C]`): The gradients that the methods before left.
        classes (`torch.Tensor` of shape `[N]`): The labels, 0 for ignored samples.
        share (`torch.Tensor` of shape `[N]`): `alpha`, 0 for ignored samples.
        target (`torch.Tensor` of shape `[C]`, *optional*): The distribution t with sum 1; uniform when left out.
        in_place (`bool`, *optional*, defaults to `False`): Whether the gradient is overwritten.

    Returns:
        `torch.Tensor` of shape `[N, C]`: The perturbed gradient.

    Example:

    ```python
    >>> import torch
    >>> smooth_labels(torch.zeros(1, 4), torch.tensor([0]), share=torch.tensor([0.4]))
    tensor([[ 0.3000, -0.1000, -0.1000, -0.1000]])

    ```
    """
    share = share[:, None]
    if target is None:
        smoothed = (gradient.sub_ if in_place else gradient.sub)(share / gradient.shape[-1])
    else:
        smoothed = (gradient.addcmul_ if in_place else gradient.addcmul)(share, target.to(gradient), value=-1)
    return smoothed.scatter_add_(-1, classes[:, None], share)


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
            `"uniform"`, or `"prior"`: the share of each class in the training set (Pereyra et al., 2017). Use the
            prior after logit adjustment, where a uniform target would push the tail up a second time.

    Raises:
        ValueError: If `alpha` is not in (-1, 1), or `target` is neither of the two.

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

    def delta(self, gradient: Tensor, batch: LogitBatch, statistics: ClassStatistics) -> Tensor:
        return self._smooth(torch.zeros_like(gradient), batch, statistics, in_place=True)

    def add_delta(
        self, gradient: Tensor, batch: LogitBatch, statistics: ClassStatistics, in_place: bool = False
    ) -> tuple[Tensor, Tensor]:
        if type(self).delta is not LabelSmoothing.delta:  # a subclass with another delta
            return super().add_delta(gradient, batch, statistics, in_place)
        if self.target == "prior":
            norm = abs(self.alpha) * statistics.prior_terms.onehot_distance.to(gradient)[batch.classes]
        else:
            norm = abs(self.alpha) * batch.is_valid.to(gradient) * math.sqrt(1 - 1 / gradient.shape[-1])
        return self._smooth(gradient, batch, statistics, in_place), norm

    def _smooth(self, gradient: Tensor, batch: LogitBatch, statistics: ClassStatistics, in_place: bool) -> Tensor:
        target = statistics.prior if self.target == "prior" else None
        return smooth_labels(gradient, batch.classes, self.alpha * batch.is_valid.to(gradient), target, in_place)
