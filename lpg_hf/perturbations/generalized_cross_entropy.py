"""Generalized cross-entropy as a perturbation: samples that the model does not believe pull less."""

import torch
from torch import Tensor

from ..batch import LogitBatch
from ..statistics import ClassStatistics
from .base import SampleReweighting
from .checks import check


class GeneralizedCrossEntropy(SampleReweighting):
    r"""
    Generalized cross-entropy: between cross-entropy and the mean absolute error, which label noise hardly moves.

    Level: sample.
    Formula: `delta = (p^q - 1) g`, `p` the probability of the label.
    Helps: label noise with few classes.
    Hurts: many classes or rare ones: their samples begin with a small p and are never learned.
    Cost: O(NC).
    Source: Zhang and Sabuncu, Generalized cross entropy loss (NeurIPS 2018), whose loss is `(1 - p^q) / q`.

    Args:
        q (`float`, *optional*, defaults to 0.7): 0 is cross-entropy, 1 the mean absolute error; in [0, 1].

    Raises:
        ValueError: If `q` is not in [0, 1].

    Example:

    ```python
    >>> GeneralizedCrossEntropy(0.5)
    generalized_cross_entropy(q=0.5)

    ```
    """

    name = "generalized_cross_entropy"

    def __init__(self, q: float = 0.7):
        super().__init__()
        check(0 <= q <= 1, "q", q, "in [0, 1]")
        self.q = q

    def weight(self, gradient: Tensor, batch: LogitBatch, statistics: ClassStatistics) -> Tensor:
        # Of a label that a mask excludes, it is infinite, and p^0 is 1.
        log_p = batch.label_log_prob.clamp(min=torch.finfo(batch.label_log_prob.dtype).min)
        return (self.q * log_p).exp()
