"""Checks of arguments and results that all methods share."""

import math
from collections.abc import Sequence
from numbers import Integral

from torch import Tensor


def check(condition: bool, argument: str, value: object, expected: str) -> None:
    """Raises a `ValueError` that names the argument, the value found and the value expected."""
    if not condition:
        raise ValueError(f"`{argument}` must be {expected}; found {value!r}.")


def check_not_negative(argument: str, value: float) -> None:
    check(value >= 0, argument, value, "at least 0")
    check(value < math.inf, argument, value, "finite")


def check_count(argument: str, value: int) -> None:
    check(value >= 1, argument, value, "at least 1")
    check(isinstance(value, Integral), argument, value, "a whole number")


def check_interval(argument: str, value: Sequence[float], end: float = 1) -> None:
    is_increasing = len(value) == 2 and 0 <= value[0] < value[1] <= end
    check(is_increasing, argument, value, f"two increasing numbers in [0, {end}]")


def check_choice(argument: str, value: object, choices: tuple[str, ...]) -> None:
    check(value in choices, argument, value, f"one of {', '.join(map(repr, choices))}")


def check_shape(method: object, kind: str, found: Tensor, gradient: Tensor, expected: Sequence[int]) -> None:
    """Raises a `ValueError` where a method returned a delta or a weight of another shape than expected."""
    if found.shape != expected:
        raise ValueError(
            f"`{method!r}` returned a {kind} of shape {list(found.shape)} for a gradient of shape "
            f"{list(gradient.shape)}; it must be {list(expected)}. Return one row or one weight per sample."
        )
