"""Logit-gradient clipping: no sample pulls harder than a bound, fixed or learned per class."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..batch import LogitBatch
from ..class_means import INERTIA
from ..statistics import ClassStatistics
from .base import SampleReweighting
from .checks import check


def clip_weight(gradient: Tensor, max_norm: float | Tensor) -> Tensor:
    """
    The factor `min(1, M / ||g_i||)` that bounds the norm of each sample's gradient.

    Args:
        gradient (`torch.Tensor` of shape `[N, C]`): The gradients that the methods before left.
        max_norm (`float` or `torch.Tensor` of shape `[N]`): The largest l2 norm M of a sample's gradient.

    Returns:
        `torch.Tensor` of shape `[N]`: In (0, 1]; 1 for a gradient of zero.

    Example:

    ```python
    >>> import torch
    >>> clip_weight(torch.tensor([[3.0, -4.0], [0.3, -0.4]]), 1.0)
    tensor([0.2000, 1.0000])

    ```
    """
    return (max_norm / gradient.norm(dim=-1)).clamp(max=1)


class LogitClipping(SampleReweighting):
    r"""
    Logit-gradient clipping: bounds the pull of every sample, also of samples with wrong labels.

    The bound is fixed, or with `quantile` a running quantile of the gradient norms of each class. A quantile clips
    only the hardest samples of a class, however hard the class is.

    Level: sample, or sample by statistics of its class.
    Formula: `delta = (min(1, M / ||g||) - 1) g`.
    Helps: label noise, most with SGD.
    Hurts: hard classes, which a fixed bound slows down; Adam undoes a uniform scaling.
    Cost: O(NC).
    Source: Menon et al., Can gradient clipping mitigate label noise? (ICLR 2020), at the logits; the quantile is ours.

    Args:
        max_norm (`float`, *optional*):
            The bound M, above 0, in units of a sample's logit gradient (whose norm is at most `sqrt(2)`); 0.3 when
            neither argument is given.
        quantile (`float`, *optional*): In (0, 1): the bound of class c is this running quantile of its norms.

    Raises:
        ValueError: If an argument is out of its range or both are given.

    Example:

    ```python
    >>> LogitClipping(0.5), LogitClipping(quantile=0.9)
    (logit_clipping(max_norm=0.5), logit_clipping(quantile=0.9))

    ```
    """

    name = "logit_clipping"
    bounds: Tensor
    _pending: Tensor

    def __init__(self, max_norm: float | None = None, quantile: float | None = None):
        super().__init__()
        check(max_norm is None or max_norm > 0, "max_norm", max_norm, "positive")
        check(quantile is None or 0 < quantile < 1, "quantile", quantile, "in (0, 1)")
        check(max_norm is None or quantile is None, "quantile", quantile, "left out when `max_norm` is given")
        self.max_norm = max_norm
        self.quantile = quantile

    def setup(self, num_labels: int) -> None:
        if self.quantile is not None:
            self.register_buffer("bounds", torch.full((num_labels,), math.sqrt(2)))
            # Samples of each class, and those of them within the bound, since the last step.
            self.register_buffer("_pending", torch.zeros(2, num_labels), persistent=False)

    def weight(self, gradient: Tensor, batch: LogitBatch, statistics: ClassStatistics) -> Tensor:
        if self.quantile is None:
            return clip_weight(gradient, 0.3 if self.max_norm is None else self.max_norm)
        return clip_weight(gradient, self.bounds[batch.classes])

    def update(self, gradient: Tensor, batch: LogitBatch) -> None:
        if self.quantile is not None:
            within = gradient.norm(dim=-1) <= self.bounds[batch.classes]
            rows = torch.stack([batch.valid_mask, within & batch.valid_mask])
            self._pending.index_add_(1, batch.classes, rows.to(self._pending.dtype))

    def step(self, reduce: Callable[[Tensor], Tensor] | None = None) -> None:
        """Robbins and Monro on the log scale: a bound goes up while too few norms lie within it, else down."""
        if self.quantile is not None:
            counts, within = self._pending if reduce is None else reduce(self._pending)
            share = within / counts.clamp(min=1)
            step = counts / (counts + INERTIA) * (self.quantile - share)
            self.bounds.mul_(step.exp()).clamp_(1e-3, math.sqrt(2))
            self._pending.zero_()
