"""Class-relative dampening: fit less what the model believes far less than it believes the class as a whole."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..batch import LogitBatch
from ..statistics import ClassStatistics
from .base import SampleReweighting
from .checks import check_interval, check_not_negative
from .ops import ramp


# The power that `rising` begins with.
FIRST_POWER = 2.0


def dampening_weight(batch: LogitBatch, confidence_ratio: Tensor, gate: Tensor, power: float | Tensor = 2.0) -> Tensor:
    r"""
    Weight of each sample under class-relative dampening: `min(1, rho_i / rhobar_c) ^ (power gamma_c)`.

    `rho_i = p_{i,c} / max_j p_ij` says how far the model believes the label of sample i, `rhobar_c` how far it
    believes that class as a whole. A sample that reaches the mean of its class has weight 1, and so has every sample
    of a class with a closed gate.

    Source: ours.

    Args:
        batch ([`LogitBatch`]): The micro-batch.
        confidence_ratio (`torch.Tensor` of shape `[C]`): Running mean of `rho_i`, `rhobar_c`.
        gate (`torch.Tensor` of shape `[C]`): How far dampening acts on each class, `gamma_c` in [0, 1].
        power (`float` or scalar `torch.Tensor`, *optional*, defaults to 2.0): Strength, at least 0.

    Returns:
        `torch.Tensor` of shape `[N]`: In [0, 1]; arbitrary for ignored samples.
    """
    tiny = torch.finfo(batch.confidence_ratio.dtype).tiny
    class_confidence = confidence_ratio[batch.classes].clamp(min=tiny)
    return (batch.confidence_ratio / class_confidence).clamp(max=1) ** (power * gate[batch.classes])


def dampening_gate(
    label_prob: Tensor,
    confident_error_rate: Tensor,
    learned: Sequence[float] = (0.1, 0.5),
    contradicted: Sequence[float] = (0.02, 0.08),
) -> Tensor:
    """
    How far class-relative dampening acts on each class, `gamma_c`: on classes that have been learned, and of which the
    model confidently contradicts a share.

    Source: ours.

    Args:
        label_prob (`torch.Tensor` of shape `[C]`): Running mean of `p_{i,c}` over the samples of class c.
        confident_error_rate (`torch.Tensor` of shape `[C]`): Running share of samples that the model contradicts.
        learned (`tuple[float, float]`, *optional*, defaults to `(0.1, 0.5)`):
            Values of `label_prob` where the first gate starts to open, and where it is open.
        contradicted (`tuple[float, float]`, *optional*, defaults to `(0.02, 0.08)`):
            Values of `confident_error_rate` where the second gate starts to open, and where it is open.

    Returns:
        `torch.Tensor` of shape `[C]`: The product of the two gates, in [0, 1].
    """
    return ramp(label_prob, *learned) * ramp(confident_error_rate, *contradicted)


def dampening_compensation(confident_error_rate: Tensor, gate: Tensor) -> Tensor:
    """
    Factor on the weights of a class that restores its share of the gradient, `1 / max(1 - gamma_c k_c, 1/2)`.

    The rest of the class gets the part that its contradicted share `k_c` loses.

    Source: ours.

    Args:
        confident_error_rate (`torch.Tensor` of shape `[C]`):
            Running share of samples that the model contradicts, `k_c`.
        gate (`torch.Tensor` of shape `[C]`): How far dampening acts on the class, `gamma_c`.

    Returns:
        `torch.Tensor` of shape `[C]`: Factors in [1, 2]. A class that is contradicted as a whole is left dampened.

    Example:

    ```python
    >>> import torch
    >>> dampening_compensation(torch.tensor([0.0, 0.2, 0.9]), gate=torch.ones(3))
    tensor([1.0000, 1.2500, 2.0000])

    ```
    """
    return (1 - gate * confident_error_rate).clamp(min=0.5).reciprocal()


class ClassRelativeDampening(SampleReweighting):
    r"""
    Dampens the samples that the model believes far less than it believes their class, once that class is learned.

    It needs no noise rate, no clean data and no second network. A class that is hard as a whole keeps its gradient. A
    class that is not learned yet, or that the model never contradicts, is left alone. See
    [`dampening_gate`] for the two gates, whose product is `gamma_c`.

    Level: sample, by statistics of its class.
    Formula: `delta = (w - 1) g` with `w = min(1, rho / rhobar_c) ^ (power gamma_c)`, `rho = p_y / max_j p_j`.
    Helps: label noise, and label noise in long tails, once the model would begin to memorize.
    Hurts: clean data that is hard for the model, by some points, unless `decided` keeps it away from there.
    Cost: O(NC).
    Source: ours.

    Args:
        power (`float`, *optional*, defaults to 2.0): Strength, at least 0; 0 switches the method off.
        learned (`tuple[float, float]`, *optional*, defaults to `(0.1, 0.5)`):
            Running mean probability of a class at which its gate starts to open, and at which it is open.
        contradicted (`tuple[float, float]`, *optional*, defaults to `(0.02, 0.08)`):
            Share of a class that the model confidently contradicts: where the second gate starts to open, and is open.
        decided (`tuple[float, float]`, *optional*):
            Share of the errors on the training set that are confident contradictions: where a third gate starts to
            open, and is open. Left out, there is no third gate.
        rising (`tuple[float, float]`, *optional*):
            The same share, where the power begins to change from 2, and where it is `power`. A high power sets wrong
            labels apart, but would set hard samples aside while the model is unsure. Left out, it is always `power`.
        compensated (`bool`, *optional*, defaults to `False`):
            Whether the other samples of a class get the part that dampening takes from its contradicted share, so
            that the class keeps its share of the gradient; see [`dampening_compensation`].

    Raises:
        ValueError: If `power` is negative or infinite, or an interval is not increasing within [0, 1].

    Example:

    ```python
    >>> ClassRelativeDampening(power=1.0)
    class_relative_dampening(power=1.0)

    ```
    """

    name = "class_relative_dampening"

    def __init__(
        self,
        power: float = 2.0,
        learned: Sequence[float] = (0.1, 0.5),
        contradicted: Sequence[float] = (0.02, 0.08),
        decided: Sequence[float] | None = None,
        rising: Sequence[float] | None = None,
        compensated: bool = False,
    ):
        super().__init__()
        check_not_negative("power", power)
        intervals = {"learned": learned, "contradicted": contradicted, "decided": decided, "rising": rising}
        for argument, interval in intervals.items():
            if interval is not None:
                check_interval(argument, interval)
        self.power = power
        self.learned = tuple(learned)
        self.contradicted = tuple(contradicted)
        self.decided = None if decided is None else tuple(decided)
        self.rising = None if rising is None else tuple(rising)
        self.compensated = compensated

    def weight(self, gradient: Tensor, batch: LogitBatch, statistics: ClassStatistics) -> Tensor:
        error_rate = statistics.confident_error_rate
        gate = dampening_gate(statistics.label_prob, error_rate, self.learned, self.contradicted)
        power: float | Tensor = self.power
        if self.decided is not None or self.rising is not None:
            share = statistics.confident_error_share
            if self.decided is not None:
                gate = gate * ramp(share, *self.decided)
            if self.rising is not None:
                power = FIRST_POWER + (power - FIRST_POWER) * ramp(share, *self.rising)
        weight = dampening_weight(batch, statistics.confidence_ratio, gate, power)
        if self.compensated:
            weight = weight * dampening_compensation(error_rate, gate)[batch.classes]
        return weight.masked_fill(batch.ignore_mask, 1.0)
