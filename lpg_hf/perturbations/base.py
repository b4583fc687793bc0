"""What a method is: a delta, a name, and a `repr` that is also how it is written on the command line."""

import inspect
from abc import ABC, abstractmethod

from torch import Tensor, nn

from ..statistics import ClassStatistics


class LogitPerturbation(nn.Module, ABC):
    """
    Base class of methods that add a delta to the logit gradient.

    A subclass sets `name`, keeps every argument of its `__init__` under the same attribute, and writes `delta`. State
    that must survive a checkpoint is a buffer.

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

    name: str
    #: Whether the delta only rescales each sample's gradient, so that telemetry can report one weight per sample.
    rescales = False

    @abstractmethod
    def delta(self, gradient: Tensor, logits: Tensor, labels: Tensor, statistics: ClassStatistics) -> Tensor:
        """
        The delta of one micro-batch.

        Args:
            gradient (`torch.Tensor` of shape `[N, C]`): What the methods before left, in per-sample units.
            logits (`torch.Tensor` of shape `[N, C]`): The model's own logits, detached, float32 or float64.
            labels (`torch.Tensor` of shape `[N]`): Class indices, -100 for ignored samples.
            statistics ([`ClassStatistics`]): Of the optimizer step before; read-only.

        Returns:
            `torch.Tensor` of shape `[N, C]`: The delta.
        """

    def __repr__(self) -> str:
        parameters = inspect.signature(type(self).__init__).parameters
        options = [
            f"{name}={getattr(self, name)!r}"
            for name, parameter in parameters.items()
            if name != "self" and getattr(self, name) != parameter.default
        ]
        return f"{self.name}({', '.join(options)})"


def check(condition: bool, argument: str, value: object, expected: str) -> None:
    """Raises a `ValueError` that names the argument, the value found and what is expected."""
    if not condition:
        raise ValueError(f"`{argument}` must be {expected}; found {value!r}.")


def check_choice(argument: str, value: object, choices: tuple[str, ...]) -> None:
    check(value in choices, argument, value, f"one of {', '.join(map(repr, choices))}")
