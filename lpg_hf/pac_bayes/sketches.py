"""Sketches of rows of numbers, by which rows are found that differ in rounding or a little noise alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .fingerprints import as_array, row_fingerprint


#: Length of a sketch. The distance of two sketches is that of their rows to about a sixth.
_SIZE = 16
#: Random numbers come in blocks, so that sounds of any length need no matrix of their own.
_BLOCK = 4096
_BLOCKS_PER_COLUMN = 2**20

# A row of few numbers has close neighbors by chance. Below the smallest number, rows are not compared.
_FEWEST_NUMBERS, _MANY_NUMBERS = 16, 256
# Distances, relative to that of two rows at random.
_CLOSE, _CLOSE_AMONG_MANY = 1e-3, 2e-2

_CHUNK = 256


@dataclass(frozen=True)
class Sketch:
    """
    Random projections of the fractional numbers of a row.

    Attributes:
        key (`str`): Fingerprint of everything else in the row. Rows are compared if they have the same.
        values (`np.ndarray` of shape `[16]`): The projections.
        num_values (`int`): Numbers that were projected.
    """

    key: str
    values: np.ndarray
    num_values: int


class Sketcher:
    """Makes sketches. The projections are those of standard normal directions, the same in every run."""

    def __init__(self) -> None:
        self._blocks: dict[int, np.ndarray] = {}

    def sketch(self, row: Mapping[str, object]) -> Sketch | None:
        """
        The sketch of a row, from its columns of floating-point numbers.

        Zeros at the end do not count, since sounds are padded with them.

        Args:
            row (`Mapping[str, object]`): Inputs of the model.

        Returns:
            [`Sketch`], *optional*: `None` for a row of fewer than 16 such numbers, or of numbers that are not finite.
        """
        arrays = {name: as_array(value) for name, value in row.items()}
        floats = {name: array for name, array in arrays.items() if array is not None and array.dtype.kind == "f"}
        num_values = sum(array.size for array in floats.values())
        if num_values < _FEWEST_NUMBERS:
            return None
        values = np.zeros(_SIZE)
        for column, name in enumerate(sorted(floats)):
            numbers = floats[name].astype(np.float64).ravel()
            for start in range(0, len(numbers), _BLOCK):
                part = numbers[start : start + _BLOCK]
                values += part @ self._block(column * _BLOCKS_PER_COLUMN + start // _BLOCK)[: len(part)]
        if not np.isfinite(values).all():
            return None
        key = row_fingerprint({name: value for name, value in row.items() if name not in floats})
        return Sketch(key, values / _SIZE**0.5, num_values)

    def _block(self, number: int) -> np.ndarray:
        if number not in self._blocks:
            self._blocks[number] = np.random.default_rng(number).standard_normal((_BLOCK, _SIZE))
        return self._blocks[number]


def find_close(sketches: Sequence[Sketch | None], others: Sequence[Sketch | None] | None = None) -> list[int]:
    """
    Finds rows that are all but equal to another one.

    Their distance is at most 2 % of that of two rows at random, or 0.1 % for rows of fewer than 256 numbers.

    Args:
        sketches (`Sequence[Sketch | None]`): Of the rows to look at.
        others (`Sequence[Sketch | None]`, *optional*): Of the rows to compare them with. Defaults to the earlier rows.

    Returns:
        `list[int]`: Numbers of rows, in their order.

    Example:

    ```python
    >>> rows = np.random.default_rng(0).standard_normal((30, 300))
    >>> rows[20] = rows[5] + 0.01
    >>> sketcher = Sketcher()
    >>> find_close([sketcher.sketch({"pixel_values": row}) for row in rows])
    [20]

    ```
    """
    groups: dict[str, list[int]] = {}
    for number, sketch in enumerate(sketches):
        if sketch is not None:
            groups.setdefault(sketch.key, []).append(number)
    spread = _distance_at_random([*sketches, *(others or ())])
    found = []
    for key, numbers in groups.items():
        own = [sketch for number in numbers if (sketch := sketches[number]) is not None]
        known = own if others is None else [sketch for sketch in others if sketch is not None and sketch.key == key]
        limits = torch.tensor([_CLOSE_AMONG_MANY if s.num_values >= _MANY_NUMBERS else _CLOSE for s in own]) * spread
        is_close = _has_neighbor(_stack(own), _stack(known), limits, is_same=others is None)
        found += [number for number, close in zip(numbers, is_close.tolist(), strict=True) if close]
    return sorted(found)


def _has_neighbor(points: Tensor, others: Tensor, limits: Tensor, is_same: bool) -> Tensor:
    """Whether one of the others, or of the earlier points, is nearer than the limit of a point."""
    found = torch.zeros(len(points), dtype=torch.bool)
    order, order_of_others = points[:, 0].argsort(), others[:, 0].argsort()
    others = others[order_of_others]
    first = others[:, 0].contiguous()
    reach = limits.max().item()
    for start in range(0, len(points), _CHUNK):
        rows = order[start : start + _CHUNK]
        part = points[rows]
        # Whatever is near is near by the first coordinate, too.
        low = int(torch.searchsorted(first, part[0, 0] - reach))
        high = int(torch.searchsorted(first, part[-1, 0] + reach, right=True))
        is_near = torch.cdist(part, others[low:high]) < limits[rows, None]
        if is_same:
            is_near &= order_of_others[low:high] < rows[:, None]
        found[rows] = is_near.any(1)
    return found


def _distance_at_random(sketches: Sequence[Sketch | None]) -> float:
    values = [sketch.values for sketch in sketches if sketch is not None]
    return float(np.sqrt(2 * np.var(values, axis=0).sum())) if values else 0.0


def _stack(sketches: Sequence[Sketch]) -> Tensor:
    return torch.from_numpy(np.array([sketch.values for sketch in sketches]).reshape(-1, _SIZE))
