"""What a method is: a delta, a name, and a `repr` that is also its form on the command line and in checkpoints."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Self, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import Parameter

from ..batch import LogitBatch, zero_ignored_
from ..statistics import ClassStatistics
from .checks import check_shape


DeltaFunction = TypeVar("DeltaFunction", bound=Callable[..., Tensor])


class Perturbation(nn.Module, ABC):
    """
    Base class of all methods.

    A subclass sets `name` and keeps every argument of its `__init__` under the same attribute. State that must survive
    a checkpoint is a buffer (or extra state that is a tensor). The docstring has a card: the lines `Level:`,
    `Formula:`, `Helps:`, `Hurts:`, `Cost:` and `Source:`.
    """

    name: str
    space: str
    #: Whether the delta depends on how a batch is split into micro-batches and processes.
    depends_on_split = False

    def __repr__(self) -> str:
        # A method without arguments may leave `__init__` to Module, which takes arguments of any name.
        has_own = type(self).__init__ is not nn.Module.__init__
        parameters = inspect.signature(type(self)).parameters if has_own else {}
        values = {name: _literal(getattr(self, name)) for name in parameters}
        options = [f"{name}={value!r}" for name, value in values.items() if value != parameters[name].default]
        return f"{self.name}({', '.join(options)})"


def returns_new_memory(delta: DeltaFunction) -> DeltaFunction:
    """
    Marks a `delta` whose result is memory of its own, zero for ignored samples: the sum may take its place.

    The mark belongs to the function, so a subclass that writes another `delta` does not inherit it.
    """
    delta.returns_new_memory = True  # type: ignore[attr-defined]
    return delta


class LogitPerturbation(Perturbation):
    """
    Base class of methods that add a delta to the logit gradient. A subclass writes `delta`.

    Gradients are in per-sample units, before any division by the batch size: a cross-entropy gradient has norm at most
    `sqrt(2)`, and a bound means the same at every batch size. A delta must not make the host wait for the device (no
    `item`, `unique` or masks as indices), and needs no `[C, C]` matrix.

    Example:

    ```python
    >>> class Halving(LogitPerturbation):
    ...     name = "halving"
    ...
    ...     def __init__(self, factor: float = 0.5):
    ...         super().__init__()
    ...         self.factor = factor
    ...
    ...     def delta(self, gradient, batch, statistics):
    ...         return (self.factor - 1) * gradient
    >>> Halving(factor=0.25)
    halving(factor=0.25)

    ```
    """

    space = "logit"

    def attach(self, statistics: ClassStatistics) -> None:
        """
        For methods that keep terms per class which change with the class shares, with an epoch or with a step alone:
        called once, with the statistics of the loss. Without it, these terms are computed for each batch.
        """

    def detach(self) -> None:
        """
        Undoes `attach`, for methods that override it. It is called before DataParallel makes a replica of the method:
        the statistics of a replica, and from then on those of the loss, call no followers.
        """

    def _replicate_for_data_parallel(self) -> Self:
        self.detach()
        return super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]

    def use_label_names(self, label_names: Mapping[str, int]) -> None:
        """For methods with arguments by label name: gives them the index of each name, before `setup`."""

    def setup(self, num_labels: int) -> None:
        """For methods with state per class: called once when the number of classes is known."""

    @abstractmethod
    def delta(self, gradient: Tensor, batch: LogitBatch, statistics: ClassStatistics) -> Tensor:
        """
        The delta of one micro-batch.

        Args:
            gradient (`torch.Tensor` of shape `[N, C]`):
                The gradient that the methods before left. Read-only, and overwritten after the call: a method that
                keeps it keeps a clone.
            batch ([`LogitBatch`]): Logits and labels of the micro-batch, and what follows from them. Read-only.
            statistics ([`ClassStatistics`]): Of the optimizer step before. Read-only.

        Returns:
            `torch.Tensor` of shape `[N, C]`: The delta.
        """

    def add_delta(
        self, gradient: Tensor, batch: LogitBatch, statistics: ClassStatistics, in_place: bool = False
    ) -> tuple[Tensor, Tensor]:
        """
        Adds the delta to a gradient. Only methods that need no matrix for their delta override it.

        Args:
            gradient, batch, statistics: As for [`LogitPerturbation.delta`].
            in_place (`bool`, *optional*, defaults to `False`):
                Whether the gradient may be overwritten and returned. Otherwise the result is new memory.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: The perturbed gradient, `[N, C]`, zero for ignored samples where the
            gradient is; and the norm of each sample's delta, `[N]`, arbitrary for ignored samples.
        """
        delta = self.delta(gradient, batch, statistics)
        check_shape(self, "delta", delta, gradient, gradient.shape)
        norm = delta.norm(dim=-1)
        if hasattr(type(self).delta, "returns_new_memory"):
            return delta.add_(gradient), norm
        perturbed = gradient.add_(delta) if in_place else gradient + delta
        return zero_ignored_(perturbed, batch.labels, batch.valid_mask), norm

    def log_correction(self, statistics: ClassStatistics) -> Tensor:
        """
        For methods that correct an imbalance: what they add to the logarithm of the class shares that the logits are
        trained for, `[C]`, up to a constant.
        """
        return torch.zeros_like(statistics.prior)

    def update(self, gradient: Tensor, batch: LogitBatch) -> None:
        """
        For methods that learn: adds up sums over each micro-batch. It is called before `delta`, with the same
        gradient, and `delta` must not depend on these sums before `step`.
        """

    def step(self, reduce: Callable[[Tensor], Tensor] | None = None) -> None:
        """For methods that learn: once per optimizer step, moves the state by the sums, reduced over processes."""


class SampleReweighting(LogitPerturbation):
    """
    Base class of methods that multiply the gradient of each sample with a weight. A subclass writes `weight` alone.

    Telemetry reports the mean weight, and the loss needs no matrix for the delta.

    Attributes:
        last_weight (`torch.Tensor` of shape `[N]` or `None`): The weights of the last micro-batch of a training.
        uncompensated_weight (`torch.Tensor` of shape `[N]` or `None`):
            While the loss runs, the same before a compensation that depends on their mean per class, which the
            statistics keep.

    Example:

    ```python
    >>> import torch
    >>> class Doubling(SampleReweighting):
    ...     name = "doubling"
    ...
    ...     def weight(self, gradient, batch, statistics):
    ...         return torch.full_like(batch.label_prob, 2.0)
    >>> batch = LogitBatch(torch.zeros(1, 2), torch.tensor([1]))
    >>> Doubling().delta(batch.gradient, batch, statistics=None)
    tensor([[ 0.5000, -0.5000]])

    ```
    """

    last_weight: Tensor | None = None
    uncompensated_weight: Tensor | None = None

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        for name, inherited in (("delta", SampleReweighting.delta), ("add_delta", LogitPerturbation.add_delta)):
            if getattr(cls, name) is not inherited:
                raise TypeError(
                    f"{cls.__name__} overrides `{name}`, which is never called for a `SampleReweighting`. Write "
                    "`weight`, or inherit from `LogitPerturbation`."
                )

    @abstractmethod
    def weight(self, gradient: Tensor, batch: LogitBatch, statistics: ClassStatistics) -> Tensor:
        """
        The weight of each sample.

        Args:
            gradient, batch, statistics: As for [`LogitPerturbation.delta`].

        Returns:
            `torch.Tensor` of shape `[N]`: The weights; anything for ignored samples, which get weight 0.
        """

    def delta(self, gradient: Tensor, batch: LogitBatch, statistics: ClassStatistics) -> Tensor:
        weight = self.weight(gradient, batch, statistics)
        return torch.where(batch.valid_mask, weight - 1, batch.is_valid)[:, None] * gradient


def uncompensated_weight(methods: Iterable[Perturbation]) -> Tensor | None:
    """The weights of the last micro-batch before their compensation, `[N]`; `None` if no method compensates."""
    weights = (method.uncompensated_weight for method in methods if isinstance(method, SampleReweighting))
    return next((weight for weight in weights if weight is not None), None)


class ParameterPerturbation(Perturbation):
    """Base class of methods that perturb the gradient of the parameters; [`LPGTrainer`] runs them after all others."""

    space = "parameter"


class GradientPerturbation(ParameterPerturbation):
    """Base class of parameter methods that act once per optimizer step on the finished gradient."""

    @abstractmethod
    def perturb_(self, parameters: list[Parameter], scale: float = 1.0) -> Tensor:
        """
        Adds the delta to the gradients in place.

        Args:
            parameters (`list[torch.nn.Parameter]`): The parameters that have a gradient.
            scale (`float`, *optional*, defaults to 1.0): Factor of the gradients (the loss scale of fp16).

        Returns:
            `torch.Tensor`: The norm of the delta, a scalar, without the scale.
        """


def gradients_of(parameters: Iterable[Parameter]) -> list[Tensor]:
    """The gradients that parameters have."""
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def _literal(value: object) -> object:
    """Numbers and lists of NumPy and torch as Python's own, whose `repr` is a literal."""
    if isinstance(value, Mapping):
        return {_literal(key): _literal(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_literal, value))
    return value.tolist() if isinstance(value, np.generic | np.ndarray | Tensor) else value
