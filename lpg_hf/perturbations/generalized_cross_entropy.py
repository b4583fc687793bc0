"""Generalized cross-entropy as a perturbation: what the model does not believe pulls less."""

from torch import Tensor

from ..functional import gce_weight
from ..statistics import ClassStatistics
from .base import Rescaling, check


class GeneralizedCrossEntropy(Rescaling):
    r"""
    Generalized cross-entropy: between cross-entropy and the mean absolute error, which label noise hardly moves.

    Level: sample.
    Formula: `delta = (p^q - 1) g`, `p` the probability of the label.
    Helps: label noise with few classes.
    Hurts: many classes or rare ones, whose samples begin with a small p and are then never learned.
    Cost: O(NC).
    Source: Zhang and Sabuncu, Generalized cross entropy loss (NeurIPS 2018).

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

    def weight(self, gradient: Tensor, logits: Tensor, labels: Tensor, statistics: ClassStatistics) -> Tensor:
        log_p = statistics.batch(logits, labels).own_log_probability
        return gce_weight(logits, labels, self.q, log_p)
