"""What a method is: a delta, a name, and a `repr` that is also how it is written on the command line."""

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral

import numpy as np
from torch import Tensor, nn
from torch.nn import Parameter

from ..functional import zero_ignored_
from ..statistics import ClassStatistics


class Perturbation(nn.Module, ABC):
    """
    What the methods of both spaces share.

    A subclass sets `name` and keeps every argument of its `__init__` under the same attribute. State that must survive
    a checkpoint is a buffer (or extra state that is a tensor). The docstring has a card: the lines `Level:`,
    `Formula:`, `Helps:`, `Hurts:`, `Cost:` and `Source:`.
    """

    name: str
    space: str
    #: Whether the delta depends on how a batch is split into micro-batches and processes.
    depends_on_split = False

    def __repr__(self) -> str:
        # A method without arguments may leave `__init__` to Module, whose own are of any name.
        has_own = type(self).__init__ is not nn.Module.__init__
        parameters = inspect.signature(type(self)).parameters if has_own else {}
        values = {name: _literal(getattr(self, name)) for name in parameters}
        options = [f"{name}={value!r}" for name, value in values.items() if value != parameters[name].default]
        return f"{self.name}({', '.join(options)})"


class LogitPerturbation(Perturbation):
    """
    Base class of methods that add a delta to the logit gradient: a subclass writes `delta`.

    Example:

    ```python
    >>> class Halving(LogitPerturbation):
    ...     name = "halving"
    ...
    ...     def __init__(self, factor: float = 0.5):
    ...         super().__init__()
    ...         self.factor = factor
    ...
    ...     def delta(self, gradient, logits, labels, statistics):
    ...         return (self.factor - 1) * gradient
    >>> Halving(factor=0.25)
    halving(factor=0.25)

    ```
    """

    space = "logit"
    #: Whether `delta` returns memory of its own, zero for ignored samples: the sum may then take its place.
    owns_delta = False

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)

        def distance(name: str) -> int:
            return next(position for position, base in enumerate(cls.__mro__) if name in vars(base))

        for shortcut in ("add_delta", "owns_delta"):
            if distance("delta") < distance(shortcut):
                # What it inherits is for another delta.
                setattr(cls, shortcut, getattr(LogitPerturbation, shortcut))

    def use_label_names(self, label_names: Mapping[str, int]) -> None:
        """For methods with arguments by label name: tells them the index of each name, before `setup`."""

    def setup(self, num_labels: int) -> None:
        """For methods with state per class: called once when the number of classes is known."""

    @abstractmethod
    def delta(self, gradient: Tensor, logits: Tensor, labels: Tensor, statistics: ClassStatistics) -> Tensor:
        """
        The delta of one micro-batch.

        Args:
            gradient (`torch.Tensor` of shape `[N, C]`):
                What the methods before left, in per-sample units. Read-only, and changed after the call: a method
                that keeps it keeps a clone.
            logits (`torch.Tensor` of shape `[N, C]`): The model's own logits, detached, float32 or float64.
            labels (`torch.Tensor` of shape `[N]`): Class indices, -100 for ignored samples.
            statistics ([`ClassStatistics`]): Of the optimizer step before; read-only.

        Returns:
            `torch.Tensor` of shape `[N, C]`: The delta.
        """

    def add_delta(
        self, gradient: Tensor, logits: Tensor, labels: Tensor, statistics: ClassStatistics, in_place: bool = False
    ) -> tuple[Tensor, Tensor]:
        """
        Adds the delta to a gradient. Only methods that can do so without a matrix for the delta override it.

        Args: those of [`LogitPerturbation.delta`], and
            in_place (`bool`, *optional*, defaults to `False`):
                Whether the gradient may be written to, and become the result; else the result is new memory.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: The perturbed gradient, `[N, C]`, zero for ignored samples where the
            gradient is; and the norm of each sample's delta, `[N]`, arbitrary for ignored samples.
        """
        delta = self.delta(gradient, logits, labels, statistics)
        check_shape(self, "delta", delta, gradient, gradient.shape)
        norm = delta.norm(dim=-1)
        if self.owns_delta and delta.dtype == gradient.dtype:
            return (gradient.add_(delta) if in_place else delta.add_(gradient)), norm
        perturbed = (gradient.add_ if in_place else gradient.add)(delta)
        return zero_ignored_(perturbed, labels, statistics.batch(logits, labels).labelled_bits), norm

    def update(self, gradient: Tensor, labels: Tensor) -> None:
        """
        For methods that learn: adds up sums over each micro-batch. It is called before `delta`, with the same
        gradient, and `delta` must not depend on these sums before `fold`.
        """

    def fold(self, reduce: Callable[[Tensor], Tensor] | None = None) -> None:
        """For methods that learn: once per optimizer step, moves the state by the sums, reduced over processes."""


class Rescaling(LogitPerturbation):
    """
    Base class of methods that make each sample's gradient longer or shorter: a subclass writes `weight` alone.

    Telemetry reports the mean weight, and the loss needs no matrix for the delta.

    Attributes:
        last_weight (`torch.Tensor` of shape `[N]` or `None`): The weights of the last micro-batch of a training.

    Example:

    ```python
    >>> import torch
    >>> class Doubling(Rescaling):
    ...     name = "doubling"
    ...
    ...     def weight(self, gradient, logits, labels, statistics):
    ...         return torch.where(labels >= 0, 2.0, 1.0)
    >>> Doubling().delta(torch.tensor([[0.3, -0.3]]), torch.zeros(1, 2), torch.tensor([1]), statistics=None)
    tensor([[ 0.3000, -0.3000]])

    ```
    """

    last_weight: Tensor | None = None

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        for name, inherited in (("delta", Rescaling.delta), ("add_delta", LogitPerturbation.add_delta)):
            if getattr(cls, name) is not inherited:
                raise TypeError(
                    f"{cls.__name__} overrides `{name}`, which nothing calls in a `Rescaling`: write `weight`, or "
                    "inherit from `LogitPerturbation`."
                )

    @abstractmethod
    def weight(self, gradient: Tensor, logits: Tensor, labels: Tensor, statistics: ClassStatistics) -> Tensor:
        """
        What each sample's gradient is multiplied with.

        Args: those of [`LogitPerturbation.delta`].

        Returns:
            `torch.Tensor` of shape `[N]`: The weights; 1 for ignored samples.
        """

    def delta(self, gradient: Tensor, logits: Tensor, labels: Tensor, statistics: ClassStatistics) -> Tensor:
        return (self.weight(gradient, logits, labels, statistics) - 1)[:, None] * gradient


class ParameterPerturbation(Perturbation):
    """Base class of methods that perturb the parameters' gradient; [`LPGTrainer`] runs them, after all others."""

    space = "parameter"


class GradientPerturbation(ParameterPerturbation):
    """Base class of parameter methods that act once per optimizer step on the finished gradient."""

    @abstractmethod
    def perturb_(self, parameters: list[Parameter], scale: float = 1.0) -> Tensor:
        """
        Adds the delta to the gradients in place.

        Args:
            parameters (`list[torch.nn.Parameter]`): Those with a gradient.
            scale (`float`, *optional*, defaults to 1.0): What the gradients are multiplied with (fp16's loss scale).

        Returns:
            `torch.Tensor`: The norm of the delta, a scalar, without the scale.
        """


def _literal(value: object) -> object:
    """Numbers and lists of NumPy and torch as Python's own, whose `repr` is a literal."""
    if isinstance(value, Mapping):
        return {_literal(key): _literal(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_literal, value))
    return value.tolist() if isinstance(value, np.generic | np.ndarray | Tensor) else value


def draw_seed(seed: int, draw: int, process: int = 0) -> int:
    """A seed of its own for every draw and process, so that a counter is all there is to save."""
    # Odd multipliers: distinct counters stay distinct modulo 2^63.
    return (seed * 0x9E3779B97F4A7C15 + draw * 0xBF58476D1CE4E5B9 + process * 0x94D049BB133111EB) % 2**63


def check_shape(method: Perturbation, kind: str, found: Tensor, gradient: Tensor, expected: Sequence[int]) -> None:
    """Raises a `ValueError` where a method returned a delta or a weight of another shape than expected."""
    if found.shape != expected:
        raise ValueError(
            f"`{method!r}` returned a {kind} of shape {list(found.shape)} for a gradient of shape "
            f"{list(gradient.shape)}: it must be {list(expected)}."
        )


def check(condition: bool, argument: str, value: object, expected: str) -> None:
    """Raises a `ValueError` that names the argument, the value found and what is expected."""
    if not condition:
        raise ValueError(f"`{argument}` must be {expected}; found {value!r}.")


def check_not_negative(argument: str, value: float) -> None:
    check(value >= 0, argument, value, "at least 0")
    check(value < math.inf, argument, value, "finite")


def check_count(argument: str, value: int) -> None:
    check(value >= 1, argument, value, "at least 1")
    check(isinstance(value, Integral), argument, value, "a whole number")


def check_interval(argument: str, value: tuple[float, float]) -> None:
    is_one = len(value) == 2 and 0 <= value[0] < value[1] <= 1
    check(is_one, argument, value, "two increasing numbers in [0, 1]")


def check_choice(argument: str, value: object, choices: tuple[str, ...]) -> None:
    check(value in choices, argument, value, f"one of {', '.join(map(repr, choices))}")
