"""Focal loss as a perturbation: well-fitted samples pull less."""

import torch
from torch import Tensor

from ..batch import LogitBatch
from ..statistics import ClassStatistics
from .base import SampleReweighting
from .checks import check_not_negative


def focal_weight(log_p: Tensor, gamma: float) -> Tensor:
    """
    The factor of focal loss on a sample's gradient, `(1 - p)^gamma - gamma (1 - p)^(gamma - 1) p log p`.

    Source: Lin et al., Focal loss for dense object detection (ICCV 2017); the form as a factor is ours.

    Args:
        log_p (`torch.Tensor` of shape `[N]`): Log-probability of the label.
        gamma (`float`): How fast well-fitted samples fade, at least 0.

    Returns:
        `torch.Tensor` of shape `[N]`: In [0, 1 + gamma].

    Example:

    ```python
    >>> import torch
    >>> focal_weight(torch.tensor([0.5, 0.9]).log(), gamma=2.0)
    tensor([0.5966, 0.0290])

    ```
    """
    # Of a label that a mask excludes, log p is infinite, and p log p is 0.
    log_p = log_p.clamp(min=torch.finfo(log_p.dtype).min)
    rest = -torch.expm1(log_p)
    # p log p / (1 - p) tends to -1 as p tends to 1.
    ratio = torch.where(rest > 0, log_p.exp() * log_p / torch.where(rest > 0, rest, 1.0), -1.0)
    return rest**gamma * (1 - gamma * ratio)


class FocalLoss(SampleReweighting):
    r"""
    Focal loss: samples that the model already fits fade out.

    Level: sample.
    Formula: `delta = (f - 1) g` with `f = (1 - p)^gamma - gamma (1 - p)^(gamma - 1) p log p`, `p` the probability of
    the label.
    Helps: many easy samples that drown the hard ones; calibration.
    Hurts: label noise, whose samples are the hardest of all.
    Cost: O(NC).
    Source: Lin et al., Focal loss for dense object detection (ICCV 2017).

    Args:
        gamma (`float`, *optional*, defaults to 2.0): How fast samples fade, at least 0; 0 switches the method off.

    Raises:
        ValueError: If `gamma` is negative or infinite.

    Example:

    ```python
    >>> FocalLoss(gamma=1.0)
    focal_loss(gamma=1.0)

    ```
    """

    name = "focal_loss"

    def __init__(self, gamma: float = 2.0):
        super().__init__()
        check_not_negative("gamma", gamma)
        self.gamma = gamma

    def weight(self, gradient: Tensor, batch: LogitBatch, statistics: ClassStatistics) -> Tensor:
        return focal_weight(batch.label_log_prob, self.gamma)
