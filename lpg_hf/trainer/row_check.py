"""Compares the labels that training has recorded of its rows with those that the data set gives them."""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..batch_labels import labels_of
from .random_state import same_random_state


# Enough to find a collator that changes the order of one batch in a hundred.
CHECKED_ROWS = 256


def count_wrong_labels(
    dataset: Any, collator: Callable[[Any], Any], labels: Mapping[int, int], label_names: Sequence[str] | None = None
) -> tuple[int, int]:
    """
    Asks data set and collator for single rows, whose order nothing can change.

    Args:
        dataset: The data set of the training's loader.
        collator (`Callable`): The collator of the same loader.
        labels (`Mapping[int, int]`): The label that was recorded of each row.
        label_names (`Sequence[str]`, *optional*): The `label_names` of the `TrainingArguments`.

    Returns:
        `tuple[int, int]`: Number of rows that show another label, and of all rows that show one. At most
            `CHECKED_ROWS` are looked at, the same ones at every call.
    """
    rows = random.Random(0).sample(sorted(labels), min(CHECKED_ROWS, len(labels)))
    num_wrong = num_seen = 0
    with same_random_state():
        for row in rows:
            label = _label_of(dataset, collator, row, label_names)
            if label is not None:
                num_seen += 1
                num_wrong += label != labels[row]
    return num_wrong, num_seen


def _label_of(dataset: Any, collator: Callable[[Any], Any], row: int, label_names: Sequence[str] | None) -> int | None:
    try:
        read_many = getattr(dataset, "__getitems__", None)
        batch = collator(read_many([row]) if callable(read_many) else [dataset[row]])
        label = labels_of(batch, label_names)
    except Exception:  # a collator may need more items than one: this row shows nothing
        return None
    is_label = isinstance(label, Tensor) and label.numel() == 1 and not label.is_floating_point()
    return int(label) if is_label else None
