"""Logit adjustment: cross-entropy on logits shifted by the log prior, as a perturbation."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..batch import LogitBatch, logit_gradient
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
    offset, shares = offset.to(batch.gradient), positive_shares(shares.to(batch.gradient))
    target = logit_gradient(batch.logits + (1 - weight_share) * offset, batch.labels)
    if not isinstance(weight_share, Tensor) and weight_share == 0:
        return target.sub_(batch.gradient)
    return _delta(batch, target, sample_weights(shares.log() - weight_share * offset, shares))


def positive_shares(shares: Tensor) -> Tensor:
    """Class shares whose logarithm is finite, and that are no denormal numbers once the largest weight has them."""
    return shares.clamp(min=torch.finfo(shares.dtype).tiny ** 0.75)


def sample_weights(log_weighted_shares: Tensor, shares: Tensor, out: Tensor | None = None) -> Tensor:
    """
    Weights of the samples of each class, 1 on average, `[C]`.

    Args:
        log_weighted_shares (`torch.Tensor` of shape `[C]`): Logarithm of shares times weights, up to a constant.
        shares (`torch.Tensor` of shape `[C]`): Share of each class in the training set, above 0.
        out (`torch.Tensor` of shape `[C]`, *optional*): Where to write them.
    """
    return torch.div(log_weighted_shares.softmax(-1), shares, out=out)


def _delta(batch: LogitBatch, target: Tensor, weights: Tensor) -> Tensor:
    """The delta that leads to the weighted gradient at the offset logits, in the memory of that gradient."""
    return target.mul_(weights.to(target)[batch.classes, None]).sub_(batch.gradient)


def relative_offset(offset: Tensor) -> Tensor:
    """Offsets relative to the largest. The bound of -69 keeps weights finite, and sums of `p exp(b)` above 0."""
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
    # All `None` without `attach`. The target has two rows in the statistics: its offset, and the logarithm of weighted
    # shares. Kept are their values at 0, how they change with what the model has learned, and their bounds.
    _line: Tensor
    _shares: Tensor
    _weights: Tensor

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
        self._position = statistics.add_target()
        self._line = torch.zeros(4, 2, statistics.num_labels)
        self._shares, self._weights = torch.zeros(statistics.num_labels), torch.zeros(statistics.num_labels)
        statistics.follow_prior(self._follow_prior)
        # Also without `learned`, which may be set later.
        statistics.follow_steps(self._follow_steps)

    def detach(self) -> None:
        self._position = -1
        for name in ("_line", "_shares", "_weights"):
            self.register_buffer(name, None, persistent=False)

    # In place: a CUDA graph reads them.

    def _follow_prior(self, statistics: ClassStatistics) -> None:
        offset = self._relative_offset(statistics)
        self._shares.copy_(positive_shares(statistics.prior))
        # Lines in what the model has learned, between two ends. The ends are bounds: rounding grows with the slope.
        none, log_shares = torch.zeros_like(offset), self._shares.log()
        lowest, highest = [offset, log_shares], [none, log_shares - offset]
        if self.learned is None:
            lines, slope, highest = lowest, none, lowest
        else:
            start, end = self.learned
            slope = offset / (end - start)
            shift = -start * slope
            lines = [shift, highest[1] + shift]
        torch.stack([*lines, slope, slope, *lowest, *highest], out=self._line.view(8, -1))
        self._line_learned = self.learned

    def _follow_steps(self, statistics: ClassStatistics) -> None:
        if self._line_learned != self.learned:
            self._follow_prior(statistics)
        rows = statistics.target_rows(self._position)
        start, slope, lowest, highest = self._line
        if self.learned is None:
            rows.copy_(start)
            self._weights.fill_(1.0)
        else:
            torch.clamp(torch.addcmul(start, _mean_label_prob(statistics), slope), lowest, highest, out=rows)
            sample_weights(rows[1], self._shares, out=self._weights)

    def _relative_offset(self, statistics: ClassStatistics) -> Tensor:
        return relative_offset(-self.log_correction(statistics))

    @returns_new_memory
    def delta(self, gradient: Tensor, batch: LogitBatch, statistics: ClassStatistics) -> Tensor:
        target = batch.take_target(self._position)
        if target is not None:
            delta = _delta(batch, target, self._weights)
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
        return ramp(_mean_label_prob(statistics), end, start)


def _mean_label_prob(statistics: ClassStatistics) -> Tensor:
    # Not `@`, which autocast would compute in half precision.
    return torch.dot(statistics.label_prob, statistics.present_mean)
