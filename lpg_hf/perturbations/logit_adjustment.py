"""Logit adjustment: cross-entropy on logits shifted by the log prior, as a perturbation."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..batch import LogitBatch
from ..statistics import ClassStatistics, PriorTerms
from .base import LogitPerturbation, returns_new_memory
from .checks import check, check_interval
from .ops import ramp


def logit_adjustment_delta(
    batch: LogitBatch, prior: PriorTerms, tau: float | Tensor = 1.0, weight_share: float | Tensor = 0.0
) -> Tensor:
    r"""
    Logit adjustment, `softmax(z + tau log pi) - softmax(z)`: the tail pulls harder, the head less.

    With a `weight_share` a, weights take over this share of `tau`. The delta is then
    `w_y (softmax(z + (1 - a) tau log pi) - onehot(y)) - g`, with `w_c` proportional to `pi_c^(-a tau)` and 1 on
    average. The expected gradient is zero at the same logits for every a: at `log p(y|x) - tau log pi_y`.

    Source: Menon et al., Long-tail learning via logit adjustment (ICLR 2021), who also show which pairs of offsets and
    weights are consistent; at `tau = 1` the balanced softmax of Ren et al. (NeurIPS 2020). A class without samples
    gets the prior of the rarest class that has some (ours: with a prior of zero the model would never learn to leave
    that class out).

    Args:
        batch ([`LogitBatch`]): The micro-batch.
        prior ([`PriorTerms`]): The class shares, and what follows from them.
        tau (`float` or scalar `torch.Tensor`, *optional*, defaults to 1.0): Strength; 0 gives a delta of zero.
        weight_share (`float` or scalar `torch.Tensor`, *optional*, defaults to 0.0):
            Share of `tau` that weights take over from the offsets, in [0, 1].

    Returns:
        `torch.Tensor` of shape `[N, C]`: The delta; rows sum to zero. Where a class is rarer than the largest by more
        than a factor of `1e30 ** (1 / tau)`, the delta is the one for that factor.
    """
    base, index = batch.gradient, batch.classes[:, None]
    log_rarity = prior.log_rarity.to(base)
    given_to_weights = tau * weight_share
    # `exp`, since a compiler may repeat it for each sample. The bound keeps the sums below from underflow.
    factors = (log_rarity * (given_to_weights - tau)).exp().clamp(min=1e-30)
    weights = (log_rarity * given_to_weights).exp()
    weights = weights / (weights @ prior.shares.to(base))
    # softmax(z + tau log pi) is proportional to p pi^tau, and off the label the gradient is p.
    p = batch.label_prob[:, None]
    own, adjusted = base.gather(-1, index), (base * factors).scatter_(-1, index, 0.0)
    others = adjusted.sum(-1, keepdim=True)
    # The sum of p is 1 up to rounding, which cancels like this where tau is 0.
    scale = weights[index] * (p - own) / torch.addcmul(others, p, factors[index])
    return adjusted.mul_(scale).scatter_(-1, index, -scale * others).sub_(base)


class LogitAdjustment(LogitPerturbation):
    r"""
    Logit adjustment: cross-entropy on logits shifted by the log prior; the balanced softmax at `tau = 1`.

    Class weights do much for a model that has hardly learned the tail yet, and offsets do little. Later it is the
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
            Running mean probability of the label, averaged over the classes: where weights begin to give way, and
            where they are gone. Left out, there are no weights.

    Raises:
        ValueError: If `tau` is out of its range, `min_imbalance` below 1, or `learned` not increasing within [0, 1].

    Example:

    ```python
    >>> LogitAdjustment(0.5)
    logit_adjustment(tau=0.5)

    ```
    """

    name = "logit_adjustment"

    def __init__(self, tau: float = 1.0, min_imbalance: float = 1.0, learned: Sequence[float] | None = None):
        super().__init__()
        check(0 <= tau <= 4, "tau", tau, "from 0 to 4")
        check(min_imbalance >= 1, "min_imbalance", min_imbalance, "at least 1")
        if learned is not None:
            check_interval("learned", learned)
        self.tau = tau
        self.min_imbalance = min_imbalance
        self.learned = None if learned is None else tuple(learned)

    @returns_new_memory
    def delta(self, gradient: Tensor, batch: LogitBatch, statistics: ClassStatistics) -> Tensor:
        prior = statistics.prior_terms
        is_imbalanced = (prior.smallest_ratio * self.min_imbalance < 1).to(prior.shares)
        return logit_adjustment_delta(batch, prior, self.tau * is_imbalanced, self.weight_share(statistics))

    def weight_share(self, statistics: ClassStatistics) -> Tensor | float:
        """Share of the correction that weights make, a scalar in [0, 1]."""
        if self.learned is None:
            return 0.0
        return 1 - ramp(statistics.label_prob @ statistics.prior_terms.present_mean, *self.learned)
