"""Class-relative dampening: fit less what the model believes far less than it believes the class as a whole."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..batch import LogitBatch
from ..statistics import ClassStatistics
from .base import SampleReweighting
from .checks import check_interval, check_not_negative
from .ops import ramp


def dampening_reference(confidence_ratio: Tensor, decidedness: Tensor) -> Tensor:
    """
    The belief that a sample needs for its full weight, `rhobar_c ^ (2 - d_c)`.

    A class with wrong labels that the model tells apart has `d_c` near 1: its right labels are believed more than the
    mean, and the mean is asked for. A class that is hard as a whole has `d_c` near 0. There the square asks little: a
    class that is believed by 0.45 asks 0.2 of a sample.

    Source: ours.

    Args:
        confidence_ratio (`torch.Tensor` of shape `[C]`): Mean of `rho_i` over class c, `rhobar_c`.
        decidedness (`torch.Tensor` of shape `[C]`): See [`ClassStatistics.decidedness`], `d_c` in [0, 1].

    Returns:
        `torch.Tensor` of shape `[C]`: In [0, 1].

    Example:

    ```python
    >>> import torch
    >>> dampening_reference(torch.tensor([0.6, 0.6]), decidedness=torch.tensor([1.0, 0.0]))
    tensor([0.6000, 0.3600])

    ```
    """
    return confidence_ratio ** (2 - decidedness)


def dampening_sharpness(decidedness: Tensor, memorizing: Tensor | float = 0.0) -> Tensor:
    """
    How sharply dampening tells labels apart, `s_c = max(d_c, m / 2)`.

    A model that still learns believes many right labels little. One that has decided which labels it believes rarely
    errs. One that memorizes must be dampened before it has decided.

    Source: ours.

    Args:
        decidedness (`torch.Tensor` of shape `[C]`): See [`ClassStatistics.decidedness`], `d_c` in [0, 1].
        memorizing (`float` or scalar `torch.Tensor`, *optional*, defaults to 0.0):
            See [`ClassStatistics.memorizing`], `m` in [0, 1].

    Returns:
        `torch.Tensor` of shape `[C]`: In [0, 1].

    Example:

    ```python
    >>> import torch
    >>> dampening_sharpness(torch.tensor([0.0, 0.5]), memorizing=0.4)
    tensor([0.2000, 0.5000])

    ```
    """
    return decidedness.clamp(min=memorizing / 2)


#: The least weight of a sample at sharpness 0.
LEAST_WEIGHT = 0.2


def dampening_least(sharpness: Tensor) -> Tensor:
    """
    The least weight of the samples of each class, `0.2 (1 - s_c)^2`.

    A model that learns from scratch would soon believe only itself if it silenced what it does not believe yet. Later
    next to nothing may be left: right labels have lost their gradient by then, and wrong ones keep theirs.

    Source: ours.

    Args:
        sharpness (`torch.Tensor` of shape `[C]`): See [`dampening_sharpness`], `s_c` in [0, 1].

    Returns:
        `torch.Tensor` of shape `[C]`: In [0, 0.2].

    Example:

    ```python
    >>> import torch
    >>> dampening_least(torch.tensor([0.0, 0.5]))
    tensor([0.2000, 0.0500])

    ```
    """
    return LEAST_WEIGHT * (1 - sharpness).square()


def dampening_weight(
    confidence_ratio: Tensor,
    reference: Tensor,
    exponent: Tensor,
    least: Tensor | float = 0.0,
    largest: Tensor | float = 1.0,
) -> Tensor:
    r"""
    Weight of each sample under class-relative dampening: `max(l_c, min(1, rho_i / r_c) ^ a_c)`.

    `rho_i` says how far the model believes the label of sample i ([`LogitBatch.confidence_ratio`]). Every sample of a
    class with a closed gate has weight 1.

    Source: ours.

    Args:
        confidence_ratio (`torch.Tensor` of shape `[N]`): `rho_i`, in [0, 1].
        reference (`torch.Tensor` of shape `[N]`):
            The belief that a sample of its class needs for its full weight, `r_c`, above 0.
        exponent (`torch.Tensor` of shape `[N]`):
            How far dampening acts on its class, `a_c` at least 0; 0 where the gate of its class is closed.
        least (`float` or `torch.Tensor` of shape `[N]`, *optional*, defaults to 0.0):
            The least weight of its class, `l_c` in [0, 1].
        largest (`float` or `torch.Tensor` of shape `[N]`, *optional*, defaults to 1.0):
            The largest weight, as `least` a number or a tensor. 0 silences a sample.

    Returns:
        `torch.Tensor` of shape `[N]`: In [0, 1].

    Example:

    ```python
    >>> import torch
    >>> dampening_weight(torch.tensor([0.9, 0.2]), torch.tensor([0.4, 0.4]), exponent=torch.tensor([2.0, 2.0]))
    tensor([1.0000, 0.2500])

    ```
    """
    power = (confidence_ratio / reference) ** exponent
    bounds = (torch.as_tensor(bound).to(power) for bound in (least, largest))
    return torch.clamp(power, *bounds)


def dampening_gate(
    label_prob: Tensor,
    noise_evidence: Tensor | float,
    learned: Sequence[float] = (0.05, 0.3),
    evidence: Sequence[float] = (1.0, 2.0),
) -> Tensor:
    """
    How far class-relative dampening acts on each class: on classes that have been learned, once labels look wrong.

    Source: ours.

    Args:
        label_prob (`torch.Tensor` of shape `[C]`): Mean of `p_{i,c}` over the samples of class c.
        noise_evidence (`float` or scalar `torch.Tensor`): See [`ClassStatistics.noise_evidence`].
        learned (`tuple[float, float]`, *optional*, defaults to `(0.05, 0.3)`):
            Values of `label_prob` where the gate of a class starts to open, and where it is open.
        evidence (`tuple[float, float]`, *optional*, defaults to `(1.0, 2.0)`):
            Values of `noise_evidence` where the gate of all classes starts to open, and where it is open.

    Returns:
        `torch.Tensor` of shape `[C]`: The product of both gates, in [0, 1].

    Example:

    ```python
    >>> import torch
    >>> dampening_gate(torch.tensor([0.04, 0.175, 0.8]), noise_evidence=3.0)
    tensor([0.0000, 0.5000, 1.0000])

    ```
    """
    noise_evidence = torch.as_tensor(noise_evidence, dtype=label_prob.dtype)
    return ramp(label_prob, *learned) * ramp(noise_evidence, *evidence)


#: The least mean weight of a class that is compensated in full.
LEAST_MEAN = 0.5


def dampening_compensation(mean_weight: Tensor) -> Tensor:
    """
    Factor on the weights of a class that restores its share of the gradient, `1 / max(mean weight, 1/2)`.

    Source: ours.

    Args:
        mean_weight (`torch.Tensor` of shape `[C]`): Running mean of the weights of each class, in [0, 1].

    Returns:
        `torch.Tensor` of shape `[C]`: Factors in [1, 2]. A class that is contradicted as a whole is left dampened.

    Example:

    ```python
    >>> import torch
    >>> dampening_compensation(torch.tensor([1.0, 0.8, 0.1]))
    tensor([1.0000, 1.2500, 2.0000])

    ```
    """
    return mean_weight.clamp(min=LEAST_MEAN).reciprocal()


class ClassRelativeDampening(SampleReweighting):
    r"""
    Dampens the samples that the model believes far less than it believes their class, once labels look wrong.

    It needs no noise rate, no clean data and no second network. A class that is hard as a whole keeps its gradient:
    [`dampening_reference`] explains `r_c`. Five things keep it from doing harm:

    - In the first epoch it does not act. Nothing can be memorized before a second visit.
    - Its gate `gamma_c` opens when an epoch has given evidence that labels are wrong, and not only hard
      ([`ClassStatistics.noise_evidence`]). Until then training is that of the other methods.
    - An open gate never closes again. A model that has memorized its wrong labels contradicts none of them any more.
    - No sample is silenced before the model has decided which labels it believes, see [`dampening_least`].
    - The other samples of a class get the part that its contradicted samples lose, see [`dampening_compensation`].

    Once the model has decided, dampening acts three times as much, and up to twice as much where it had only begun to
    memorize ([`ClassStatistics.memorizing`]), see [`dampening_sharpness`]. Labels are judged at the class shares of
    the evaluation ([`ClassStatistics.judged_offset`]).

    Level: sample, by statistics of its class.
    Formula: `delta = (w - 1) g` with `w = max(l_c, min(1, rho / r_c) ^ (power (1 + 2 s_c) gamma_c))`,
    `rho = q_y / max_j q_j`.
    Helps: label noise, and label noise in long tails, once the model would begin to memorize.
    Hurts: data where a few labels are wrong and many are hard, a little.
    Cost: O(NC).
    Source: ours.

    Args:
        power (`float`, *optional*, defaults to 2.0): Strength, at least 0; 0 switches the method off.
        learned (`tuple[float, float]`, *optional*, defaults to `(0.05, 0.3)`):
            Running mean probability of a class at which its gate starts to open, and at which it is open.
        evidence (`tuple[float, float]`, *optional*, defaults to `(1.0, 2.0)`):
            Evidence of wrong labels at which the gate of all classes starts to open, and at which it is open.
            `(0.0, 0.1)` waits for next to none: for labels that are known to be wrong.

    Raises:
        ValueError: If `power` is negative or infinite, `learned` is not increasing within [0, 1], or `evidence`
            within [0, 1e6].

    Example:

    ```python
    >>> ClassRelativeDampening(power=1.0)
    class_relative_dampening(power=1.0)

    ```
    """

    name = "class_relative_dampening"
    _gate: Tensor
    _terms: Tensor  # `None` without `attach`

    def __init__(
        self,
        power: float = 2.0,
        learned: Sequence[float] = (0.05, 0.3),
        evidence: Sequence[float] = (1.0, 2.0),
    ):
        super().__init__()
        check_not_negative("power", power)
        check_interval("learned", learned)
        self.power = power
        check_interval("evidence", evidence, end=1e6)
        self.learned = tuple(learned)
        self.evidence = tuple(evidence)
        self.detach()

    def setup(self, num_labels: int) -> None:
        self.register_buffer("_gate", torch.zeros(num_labels))

    def attach(self, statistics: ClassStatistics) -> None:
        self._terms = torch.zeros(4, statistics.num_labels)
        statistics.follow_epochs(self._follow_epochs)
        statistics.follow_steps(self._follow_steps)

    def detach(self) -> None:
        self.register_buffer("_terms", None, persistent=False)

    # In place: a CUDA graph reads them.

    def _follow_epochs(self, statistics: ClassStatistics) -> None:
        torch.stack(self._class_terms(statistics), out=self._terms[:3])

    def _follow_steps(self, statistics: ClassStatistics) -> None:
        # The statistics alone may have been moved to another dtype.
        torch.clamp(statistics.mean_weight.to(self._terms), min=LEAST_MEAN, out=self._terms[3])

    def _class_terms(self, statistics: ClassStatistics) -> tuple[Tensor, Tensor, Tensor]:
        """The arguments of [`dampening_weight`] for each class. The means of an epoch give the same at each step."""
        gate = dampening_gate(statistics.last_label_prob, statistics.noise_evidence, self.learned, self.evidence)
        self._gate.copy_(torch.maximum(self._gate, gate))
        reference = dampening_reference(statistics.confidence_ratio, statistics.decidedness)
        reference = reference.clamp(min=torch.finfo(reference.dtype).tiny)
        sharpness = dampening_sharpness(statistics.decidedness, statistics.memorizing)
        return reference, self.power * (1 + 2 * sharpness) * self._gate, dampening_least(sharpness)

    def weight(self, gradient: Tensor, batch: LogitBatch, statistics: ClassStatistics) -> Tensor:
        terms = self._terms
        if terms is None:
            terms = torch.stack([*self._class_terms(statistics), statistics.mean_weight.clamp(min=LEAST_MEAN)])
        reference, exponent, least, mean = terms[:, batch.classes].unbind()
        weight = dampening_weight(batch.confidence_ratio, reference, exponent, least, batch.is_valid)
        self.uncompensated_weight = weight
        return weight / mean
