"""Class-relative dampening: fit less what the model believes far less than it believes the class as a whole."""

from torch import Tensor

from ..functional import dampening_gate, dampening_weight_of_batch, ramp
from ..statistics import ClassStatistics
from .base import Rescaling, check_interval, check_not_negative


# The power that `rising` begins with.
FIRST_POWER = 2.0


class ClassRelativeDampening(Rescaling):
    r"""
    Dampens the samples that the model believes far less than it believes their class, once that class is learned.

    It needs no noise rate, no clean data and no second network. A class that is hard as a whole keeps its gradient, a
    class that is not learned yet or that the model never contradicts is left alone. See
    [`~functional.dampening_gate`] for the two gates, whose product is `gamma_c`.

    Level: sample, by statistics of its class.
    Formula: `delta = (w - 1) g` with `w = min(1, rho / rhobar_c) ^ (power gamma_c)`, `rho = p_y / max_j p_j`.
    Helps: label noise, and label noise in long tails, once the model would begin to memorise.
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
            open, and is open. There is no third gate if not given.
        rising (`tuple[float, float]`, *optional*):
            The same share, where the power begins to change from 2, and is `power`: a high one sets apart what is
            wrong, and while the model is unsure it would set aside what is hard. Always `power` if not given.
        compensated (`bool`, *optional*, defaults to `False`):
            Whether the other samples of a class get what dampening takes from its contradicted share, so that the
            class keeps its share of the gradient; see [`~functional.dampening_compensation`].

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
        learned: tuple[float, float] = (0.1, 0.5),
        contradicted: tuple[float, float] = (0.02, 0.08),
        decided: tuple[float, float] | None = None,
        rising: tuple[float, float] | None = None,
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

    def weight(self, gradient: Tensor, logits: Tensor, labels: Tensor, statistics: ClassStatistics) -> Tensor:
        own_probability, contradiction = statistics.own_probability, statistics.contradiction
        gate = dampening_gate(own_probability, contradiction, self.learned, self.contradicted)
        power = self.power
        if self.decided is not None or self.rising is not None:
            share = statistics.confident_error_share
            if self.decided is not None:
                gate = gate * ramp(share, *self.decided)
            if self.rising is not None:
                power = FIRST_POWER + (power - FIRST_POWER) * ramp(share, *self.rising)
        batch = statistics.batch(logits, labels)
        weight = dampening_weight_of_batch(
            batch.relative_confidence,
            batch.classes,
            statistics.relative_confidence,
            contradiction,
            power,
            gate,
            self.compensated,
        )
        return weight.masked_fill(batch.ignored, 1.0)
