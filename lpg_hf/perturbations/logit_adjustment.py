"""Logit adjustment: cross-entropy on logits shifted by the log prior, as a perturbation."""

import torch
from torch import Tensor

from ..functional import logit_adjustment_delta
from ..statistics import ClassStatistics
from .base import LogitPerturbation, check


class LogitAdjustment(LogitPerturbation):
    r"""
    Logit adjustment: cross-entropy on logits shifted by the log prior; the balanced softmax at `tau = 1`.

    Level: sample.
    Formula: `delta = softmax(z + tau log pi) - softmax(z)`, `pi` the class shares of the training set.
    Helps: long tails, when all classes matter alike.
    Hurts: accuracy on test data as imbalanced as the training data.
    Cost: O(NC).
    Source: Menon et al., Long-tail learning via logit adjustment (ICLR 2021); `min_imbalance` is ours.

    Args:
        tau (`float`, *optional*, defaults to 1.0): Strength, from 0 to 4.
        min_imbalance (`float`, *optional*, defaults to 1.0):
            Acts only where the largest class is more than this many times as large as the smallest one present.

    Raises:
        ValueError: If `tau` is out of its range, or `min_imbalance` below 1.

    Example:

    ```python
    >>> LogitAdjustment(0.5)
    logit_adjustment(tau=0.5)

    ```
    """

    name = "logit_adjustment"

    def __init__(self, tau: float = 1.0, min_imbalance: float = 1.0):
        super().__init__()
        check(0 <= tau <= 4, "tau", tau, "from 0 to 4")
        check(min_imbalance >= 1, "min_imbalance", min_imbalance, "at least 1")
        self.tau = tau
        self.min_imbalance = min_imbalance

    def delta(self, gradient: Tensor, logits: Tensor, labels: Tensor, statistics: ClassStatistics) -> Tensor:
        prior = statistics.prior
        smallest = torch.where(prior > 0, prior, torch.inf).min()
        tau = self.tau * (prior.max() > self.min_imbalance * smallest)
        batch = statistics.batch(logits, labels)
        return logit_adjustment_delta(logits, labels, prior, tau, batch.gradient, batch.own_log_probability)
