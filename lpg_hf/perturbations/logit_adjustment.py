"""Logit adjustment: cross-entropy on logits shifted by the log prior, as a perturbation."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..batch import LogitBatch, balance_label_entry_
from ..statistics import ClassStatistics
from .base import LogitPerturbation, returns_new_memory
from .checks import check, check_interval
from .ops import ramp


# Power of the evaluation shares in the class shares that logits are trained for: 1 would be theirs, 0 all alike.
OUTPUT_EXPONENT = 2 / 3


def logit_adjustment_delta(
    batch: LogitBatch, offset: Tensor, shares: Tensor, weight_share: float | Tensor = 0.0
) -> Tensor:
    r"""
    Logit adjustment, `softmax(z + b) - softmax(z)`: classes with a small offset pull harder, the others less.

    With a `weight_share` a, weights take over this share of the offsets. The delta is then
    `w_y (softmax(z + (1 - a) b) - onehot(y)) - g`, with `w_c` proportional to `exp(-a b_c)` and 1 on average. The
    expected gradient is zero at the same logits for every a: at `log p(y|x) - b_y`.

    Source: Menon et al., Long-tail learning via logit adjustment (ICLR 2021), who also show which pairs of offsets and
    weights are consistent.

    Args:
        batch ([`LogitBatch`]): The micro-batch.
        offset (`torch.Tensor` of shape `[C]`): The offsets `b`, from -69 to 0, see [`relative_offset`].
        shares (`torch.Tensor` of shape `[C]`): Share of each class in the training set.
        weight_share (`float` or scalar `torch.Tensor`, *optional*, defaults to 0.0):
            Share of the offsets that weights take over, in [0, 1].

    Returns:
        `torch.Tensor` of shape `[N, C]`: The delta; rows sum to zero.
    """
    offset, shares = offset.to(batch.gradient), shares.to(batch.gradient)
    share = weight_share.to(offset) if isinstance(weight_share, Tensor) else weight_share
    return _delta(batch, adjustment_terms(exponent_ends(offset), shares, share))


def exponent_ends(offset: Tensor) -> Tensor:
    """Exponents `(1 - a) b` of factors and `-a b` of weights at the ends a = 0 and a = 1, `[2, 2, C]`."""
    none = torch.zeros_like(offset)
    return torch.stack([torch.stack([offset, none]), torch.stack([none, -offset])])


def adjustment_terms(ends: Tensor, shares: Tensor, weight_share: float | Tensor, out: Tensor | None = None) -> Tensor:
    """
    Factors on the probabilities, `exp((1 - a) b)`, and weights of the samples, `[2, C]`.

    Args:
        ends (`torch.Tensor` of shape `[2, 2, C]`): See [`exponent_ends`].
        shares (`torch.Tensor` of shape `[C]`): Share of each class in the training set.
        weight_share (`float` or scalar `torch.Tensor`): Share of the offsets that weights take over, in [0, 1].
        out (`torch.Tensor` of shape `[2, C]`, *optional*): Where to write them.
    """
    start, end = ends
    _, weights = terms = torch.lerp(start, end, weight_share, out=out).exp_()
    # Not `@`, which autocast would compute in half precision.
    weights.div_(torch.dot(weights, shares))
    return terms


def _delta(batch: LogitBatch, terms: Tensor) -> Tensor:
    """The delta for the factors and weights of each class, `[2, C]`."""
    base = batch.gradient
    terms = terms.to(base)
    factor, weight = terms[:, batch.classes, None]
    # softmax(z + b) is proportional to p exp(b), and off the label the gradient is p.
    p, own, adjusted = batch.label_prob[:, None], batch.label_gradient, base * terms[0]
    adjusted_own = balance_label_entry_(adjusted, batch.classes[:, None])
    # The sum of p is 1 up to rounding, which cancels like this where the offsets are 0.
    scale = weight * (own - p) / torch.addcmul(adjusted_own, p, factor, value=-1)
    return adjusted.mul_(scale).sub_(base)


def relative_offset(offset: Tensor) -> Tensor:
    """Offsets relative to the largest. The bound of -69 keeps sums of `p exp(b)` from underflow."""
    return (offset - offset.max()).clamp(min=-69.0)


class LogitAdjustment(LogitPerturbation):
    r"""
    Logit adjustment: cross-entropy on logits shifted by the log prior; the balanced softmax at `tau = 1`.

    Class weights do much for a model that has hardly learned the tail yet, and offsets do little. Later it is the
    other way round. With `learned`, weights make a share of the correction that falls from 1 to 0 on the way.

    The delta scales with the weights of the methods in front, and on another loss than cross-entropy with the pull of
    that loss at the label ([`relative_pull`]). A sample that pulls at nothing, such as one beyond the margin of a
    hinge loss, stays where it is.

    A class without samples gets the prior of the rarest class that has some (ours: with a prior of zero the model
    would never learn to leave that class out).

    Level: sample.
    Formula: `delta = s (softmax(z + b) - softmax(z))` with `b = tau (log pi - log pi_out)`. On cross-entropy without
    weights in front, s is 1.
    Helps: long tails, when rare classes matter.
    Hurts: accuracy on test data that is more imbalanced than `pi_out`.
    Cost: O(NC).
    Source: Menon et al., Long-tail learning via logit adjustment (ICLR 2021); `target="evaluation"` and `learned` are
    ours.

    Args:
        tau (`float`, *optional*, defaults to 1.0): Strength, from 0 to 4.
        learned (`tuple[float, float]`, *optional*):
            Running mean probability of the label, averaged over the classes: where weights begin to give way, and
            where they are gone. Left out, there are no weights.
        target (`str`, *optional*, defaults to `"uniform"`):
            The class shares `pi_out` that the logits are trained for: `"uniform"`, or `"evaluation"`, a third of
            the way from those of the evaluation to all classes alike: proportional to the former to the power of 2/3.

    Raises:
        ValueError: If `tau` is out of its range, `learned` not increasing within [0, 1], or `target` unknown.

    Example:

    ```python
    >>> LogitAdjustment(0.5)
    logit_adjustment(tau=0.5)

    ```
    """

    name = "logit_adjustment"
    # Both `None` without `attach`.
    _ends: Tensor
    _terms: Tensor

    def __init__(self, tau: float = 1.0, learned: Sequence[float] | None = None, target: str = "uniform"):
        super().__init__()
        check(0 <= tau <= 4, "tau", tau, "from 0 to 4")
        check(target in ("uniform", "evaluation"), "target", target, "'uniform' or 'evaluation'")
        if learned is not None:
            check_interval("learned", learned)
        self.tau = tau
        self.learned = None if learned is None else tuple(learned)
        self.target = target
        self.detach()

    def attach(self, statistics: ClassStatistics) -> None:
        self._ends = torch.zeros(2, 2, statistics.num_labels)
        self._terms = torch.zeros(2, statistics.num_labels)
        statistics.follow_prior(self._follow_prior)
        # Also without `learned`, which may be set later.
        statistics.follow_steps(self._follow_steps)

    def detach(self) -> None:
        self.register_buffer("_ends", None, persistent=False)
        self.register_buffer("_terms", None, persistent=False)

    # In place: a CUDA graph reads them.

    def _follow_prior(self, statistics: ClassStatistics) -> None:
        self._ends.copy_(exponent_ends(self._relative_offset(statistics)))

    def _follow_steps(self, statistics: ClassStatistics) -> None:
        # The statistics alone may have been moved to another dtype.
        share, prior = self.weight_share(statistics), statistics.prior.to(self._ends)
        share = share.to(prior) if isinstance(share, Tensor) else share
        adjustment_terms(self._ends, prior, share, out=self._terms)

    def _relative_offset(self, statistics: ClassStatistics) -> Tensor:
        return relative_offset(-self.log_correction(statistics))

    @returns_new_memory
    def delta(self, gradient: Tensor, batch: LogitBatch, statistics: ClassStatistics) -> Tensor:
        if self._terms is not None:
            delta = _delta(batch, self._terms)
        else:
            offset, share = self._relative_offset(statistics), self.weight_share(statistics)
            delta = logit_adjustment_delta(batch, offset, statistics.prior, share)
        return delta if batch.scale is None else delta.mul_(batch.scale[:, None])

    def log_correction(self, statistics: ClassStatistics) -> Tensor:
        prior = statistics.prior_terms
        is_uniform = self.target == "uniform"
        return self.tau * (prior.log_rarity if is_uniform else prior.log_rarity + OUTPUT_EXPONENT * prior.log_eval)

    def weight_share(self, statistics: ClassStatistics) -> Tensor | float:
        """Share of the correction that weights make, a scalar in [0, 1]."""
        if self.learned is None:
            return 0.0
        start, end = self.learned
        return ramp(torch.dot(statistics.label_prob, statistics.present_mean), end, start)
