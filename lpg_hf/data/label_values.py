"""The labels of a dataset as classes with names, however its column stores them."""

from collections.abc import Mapping
from contextlib import suppress

import datasets
import numpy as np

from ..batch import IGNORE_INDEX
from .class_cells import ClassCells
from .labels import label_feature, read_labels


# In the place of the position of a class: the row has none, or goes.
NO_CLASS, DROPPED = -1, -2


class LabelValues:
    """
    The classes of a label column, and the class of each row.

    A `ClassLabel` says its classes. Plain integers and strings have the classes that occur, and those of
    `known_names`.

    Args:
        dataset (`datasets.Dataset`): The dataset.
        column (`str`): Its label column.
        known_names (`Mapping[int, str]`): Names of classes by their number, for a column of integers or strings.

    Attributes:
        cells ([`ClassCells`]): Reads and writes the classes.
        classes (`np.ndarray` of shape `[N]`): The position in `cells` of each row's class, -1 without one.
    """

    def __init__(self, dataset: datasets.Dataset, column: str, known_names: Mapping[int, str]) -> None:
        feature = label_feature(dataset, column)
        self._stored: list
        numbers: list[int | None]
        if isinstance(feature, datasets.Value) and "string" in feature.dtype:
            values = _read_strings(dataset, column)
            names, numbers = _classes_of(sorted({value for value in values if value is not None}), known_names)
            self._stored = names
        else:
            values = read_labels(dataset, column)
            if isinstance(feature, datasets.ClassLabel):
                self._stored, names = list(range(feature.num_classes)), feature.names
            else:
                found = set(np.unique(values[values != IGNORE_INDEX]).tolist())
                self._stored = sorted(found | set(known_names))
                unnamed = "class {}" if known_names else "{}"
                names = [known_names.get(number, unnamed.format(number)) for number in self._stored]
            numbers = list(self._stored)
        self.cells = ClassCells(names, numbers)
        position = {value: index for index, value in enumerate(self._stored)}
        self._values = values
        self.classes = np.array([position.get(value, NO_CLASS) for value in list(values)], dtype=np.int64)

    def with_classes(self, positions: Mapping[int, int]) -> np.ndarray:
        """
        The labels as the column stores them, after a change.

        Args:
            positions (`Mapping[int, int]`): The position in `cells` of the new class, by row.
        """
        values = self._values.copy()
        for row, position in positions.items():
            values[row] = self._stored[position]
        return values

    def shown(self, row: int) -> str:
        """The class of a row for messages: its name, and its number if it has one."""
        position = int(self.classes[row])
        if position == NO_CLASS:
            return repr(self._values[row])
        return named(self.cells.names[position], self.cells.number_of(position))


def named(name: str, number: int | None) -> str:
    """A class as a message shows it."""
    return repr(name) if number is None else f"{name!r} (number {number})"


def _read_strings(dataset: datasets.Dataset, column: str) -> np.ndarray:
    values = dataset.with_format(None).select_columns([column])[:][column]
    if values and isinstance(values[0], list):
        raise ValueError(
            f"column {column!r} holds lists of strings, but one label per sample is needed. Pass `label_column` if "
            "another column holds the classes."
        )
    if not any(value is not None for value in values):
        raise ValueError(f"column {column!r} has no label in any of {len(values)} rows. Check how they were loaded.")
    return np.array(values, dtype=object)


def _classes_of(names: list[str], known_names: Mapping[int, str]) -> tuple[list[str], list[int | None]]:
    """The classes of a column of strings, with their numbers: those known, or else `class_encode_column`'s."""
    cells = ClassCells(names, [None] * len(names))
    numbers: dict[str, int] = {}
    for number, name in known_names.items():
        if name not in names:
            # A spreadsheet may have changed it. Else it is a class that has no row.
            with suppress(ValueError):
                name = names[cells.read(name)]
        numbers[name] = number
    all_names = [*names, *(name for name in numbers if name not in names)]
    if all(all_names.index(name) == number for name, number in numbers.items()):
        return all_names, list(range(len(all_names)))
    return all_names, [numbers.get(name) for name in all_names]
