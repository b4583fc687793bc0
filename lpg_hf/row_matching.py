"""Finds out which item of a batch each sample comes from, by the labels that the items had before the collator."""

import itertools
import operator
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence

from .batch import IGNORE_INDEX
from .data import LABEL_COLUMNS


class ItemLabels:
    """
    The labels of the items of a batch, read before the collator may change them.

    `None` marks an item without data, such as a damaged file, and is not part of `labels`. Every column of integers
    may be the one with the labels, whatever its name.

    Args:
        items: What the data set handed out for a batch.
        candidates (`Sequence[Hashable]`, *optional*): The columns to read; all that could hold labels if left out.

    Attributes:
        positions (`list[int]` or `None`):
            Positions of the items that are not `None`; `None` if all count, or if `items` is not a list.
        labels (`dict[Hashable, list[int]]`): The labels of these items, by their column.
        usual (`list[int]` or `None`): The first of them under a usual name.
    """

    def __init__(self, items: object, candidates: Sequence[Hashable] | None = None):
        self.positions: list[int] | None = None
        self.labels: dict[Hashable, list[int]] = {}
        self.usual: list[int] | None = None
        if not isinstance(items, list):
            return
        present = items
        # Without a call per item, like `_read_column`: this runs for every batch.
        if not all(map(operator.is_not, items, itertools.repeat(None))):
            self.positions = [position for position, item in enumerate(items) if item is not None]
            present = [items[position] for position in self.positions]
        for column in _label_columns(present) if candidates is None else candidates:
            labels = _read_column(present, column)
            if labels is not None:
                self.labels[column] = labels
        self.usual = next((self.labels[name] for name in LABEL_COLUMNS if name in self.labels), None)


def match_labels(before: Sequence[int], after: Sequence[int]) -> list[int | None] | None:
    """
    Finds the item of each sample, if a collator dropped items, repeated some, or inserted others, all in their order.

    Args:
        before (`Sequence[int]`): The labels of the items.
        after (`Sequence[int]`): The labels of the samples that the collator made of them.

    Returns:
        `list[int | None]` or `None`: For each sample the position of its item, `None` where more than one item may be
        meant or none is; `None` as a whole if the samples are in another order than the items.

    Example:

    ```python
    >>> match_labels([0, 1, 2, 2], [0, 2, 2])  # an item was dropped
    [0, 2, 3]
    >>> match_labels([0, 1, 1], [0, 1])  # which of the last two was it?
    [0, None]
    >>> match_labels([0, 1], [0, 1, 1])
    [0, None, None]
    >>> match_labels([0, 1], [1, 0]) is None
    True

    ```
    """
    if len(before) == len(after) and all(a in (b, IGNORE_INDEX) for b, a in zip(before, after, strict=True)):
        return list(range(len(after)))
    is_shorter = len(after) <= len(before)
    short, long = (after, before) if is_shorter else (before, after)
    first = _leftmost(short, long)
    if first is None:
        # The same labels (and others) in another order: the items were sorted, or shuffled.
        return None if Counter(short) <= Counter(long) else [None] * len(after)
    last = _leftmost(short[::-1], long[::-1]) or []
    last = [len(long) - 1 - position for position in reversed(last)]
    certain = [left if left == right else None for left, right in zip(first, last, strict=True)]
    if is_shorter:
        return certain
    items: list[int | None] = [None] * len(after)
    for item, position in enumerate(certain):
        if position is not None:
            items[position] = item
    return items


def _leftmost(short: Sequence[int], long: Sequence[int]) -> list[int] | None:
    """The first places at which `short` is found in `long`, in its order and with gaps; `None` if it is not."""
    places: Iterator[tuple[int, int]] = enumerate(long)
    found = [next((place for place, entry in places if entry == wanted), None) for wanted in short]
    positions = [place for place in found if place is not None]
    return positions if len(positions) == len(short) else None


def _label_columns(items: Sequence[object]) -> Sequence[Hashable]:
    if not items:
        return []
    first = items[0]
    if isinstance(first, Mapping):
        return list(first)
    return range(len(first)) if isinstance(first, list | tuple) else []


def _read_column(items: Sequence, column: Hashable) -> list[int] | None:
    try:
        values = list(map(operator.itemgetter(column), items))
        if values and isinstance(values[0], list | tuple):  # labels stored as [N, 1]
            values = [value for (value,) in values]
        return list(map(operator.index, values))
    except (LookupError, TypeError, ValueError):
        return None
