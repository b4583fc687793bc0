"""Focal loss as a perturbation: well-fitted samples pull less."""

from torch import Tensor

from ..functional import focal_weight
from ..statistics import ClassStatistics
from .base import Rescaling, check_not_negative


class FocalLoss(Rescaling):
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

    def weight(self, gradient: Tensor, logits: Tensor, labels: Tensor, statistics: ClassStatistics) -> Tensor:
        log_p = statistics.batch(logits, labels).own_log_probability
        return focal_weight(logits, labels, self.gamma, log_p)
