"""Logit adjustment: cross-entropy on logits shifted by the log prior, as a perturbation."""

from torch import Tensor

from ..functional import adjustment_delta_of_batch, ramp, relative_prior
from ..statistics import ClassStatistics
from .base import LogitPerturbation, check, check_interval


class LogitAdjustment(LogitPerturbation):
    r"""
    Logit adjustment: cross-entropy on logits shifted by the log prior; the balanced softmax at `tau = 1`.

    Offsets do little for a model that has hardly learned the tail yet, where class weights do much; later it is the
    other way round. With `learned`, weights make a share of the correction that falls from 1 to 0 on the way.

    Level: sample.
    Formula: `delta = softmax(z + tau log pi) - softmax(z)`, `pi` the class shares of the training set.
    Helps: long tails, when all classes matter alike.
    Hurts: accuracy on test data as imbalanced as the training data.
    Cost: O(NC).
    Source: Menon et al., Long-tail learning via logit adjustment (ICLR 2021); `min_imbalance` and `learned` are ours.

    Args:
        tau (`float`, *optional*, defaults to 1.0): Strength, from 0 to 4.
        min_imbalance (`float`, *optional*, defaults to 1.0):
            Acts only where the largest class is more than this many times as large as the smallest one present.
        learned (`tuple[float, float]`, *optional*):
            Mean over the classes of their running mean probability: where weights begin to give way, and are gone.
            There are no weights if not given.

    Raises:
        ValueError: If `tau` is out of its range, `min_imbalance` below 1, or `learned` not increasing within [0, 1].

    Example:

    ```python
    >>> LogitAdjustment(0.5)
    logit_adjustment(tau=0.5)

    ```
    """

    name = "logit_adjustment"
    owns_delta = True

    def __init__(self, tau: float = 1.0, min_imbalance: float = 1.0, learned: tuple[float, float] | None = None):
        super().__init__()
        check(0 <= tau <= 4, "tau", tau, "from 0 to 4")
        check(min_imbalance >= 1, "min_imbalance", min_imbalance, "at least 1")
        if learned is not None:
            check_interval("learned", learned)
        self.tau = tau
        self.min_imbalance = min_imbalance
        self.learned = None if learned is None else tuple(learned)
        self._prior: Tensor | None = None

    def delta(self, gradient: Tensor, logits: Tensor, labels: Tensor, statistics: ClassStatistics) -> Tensor:
        self._look_at(statistics.prior)
        batch = statistics.batch(logits, labels)
        return adjustment_delta_of_batch(
            batch.gradient,
            batch.classes,
            batch.own_probability,
            self._prior,
            self._log_rarity,
            self.tau * self._is_imbalanced,
            self.weight_share(statistics),
        )

    def weight_share(self, statistics: ClassStatistics) -> Tensor | float:
        """Share of the correction that is made by weights, a scalar in [0, 1]."""
        if self.learned is None:
            return 0.0
        self._look_at(statistics.prior)
        return 1 - ramp(statistics.own_probability @ self._share_of_present, *self.learned)

    def _look_at(self, prior: Tensor) -> None:
        """What follows from a prior alone, which seldom changes."""
        if prior is self._prior:
            return
        self._prior = prior
        relative = relative_prior(prior)
        self._log_rarity = -relative.log()
        self._is_imbalanced = (relative.min() * self.min_imbalance < 1).to(prior)
        present = (prior > 0).to(prior)
        self._share_of_present = present / present.sum()
