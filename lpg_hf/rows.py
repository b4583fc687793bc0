"""Row numbers that travel with the training data: from the data set through any collator to the batch."""

import copy
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence, Sized
from typing import NamedTuple

import datasets
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .data import LABEL_COLUMNS


#: The key under which a batch carries its row numbers from the collator to the trainer, which takes it out again.
ROWS_KEY = "lpg_rows"


def has_rows(dataset: object) -> bool:
    """Whether a data set can be asked for its i-th row, as opposed to a stream."""
    is_stream = isinstance(dataset, torch.utils.data.IterableDataset | datasets.IterableDataset)
    return isinstance(dataset, Sized) and hasattr(dataset, "__getitem__") and not is_stream


class NumberedItems(NamedTuple):
    """Items on their way to the collator, with their row numbers."""

    rows: Sequence
    items: object


class NumberedRows(Dataset):
    """
    A data set that hands the loader its items with their row numbers; everything else is asked of the data set inside.

    Args:
        dataset: A data set with `__len__`, and `__getitem__` or `__getitems__`.

    Example:

    ```python
    >>> NumberedRows(["a", "b"]).__getitems__([1, 0])
    [NumberedItems(rows=[1, 0], items=['b', 'a'])]

    ```
    """

    def __init__(self, dataset: Sized):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: object) -> object:
        return self.dataset[index]

    def __getitems__(self, indices: Sequence) -> list[NumberedItems]:
        # Data sets that read a batch at once, those of `datasets` among them, are much faster that way. What they
        # return is between them and the collator. The Trainer takes it for a list of items: here, of one.
        read_many = getattr(self.dataset, "__getitems__", None)
        items = read_many(indices) if callable(read_many) else [self.dataset[i] for i in indices]
        return [NumberedItems(indices, items)]

    def __getattr__(self, name: str) -> object:
        # `set_epoch` and the like. Unpickling, in a worker, asks before there is a `dataset`.
        if name == "dataset":
            raise AttributeError(name)
        return getattr(self.dataset, name)


class NumberedCollator:
    """
    Takes the row numbers off what [`NumberedRows`] hands out, calls the collator inside, and puts them on its batch.

    A collator that reorders items, or changes how many or which labels there are, makes numbers and labels part: its
    batches get the number `num_rows`, "not known", for every sample. A batch without labels gets none.

    Args:
        collator (`Callable`): Makes a batch of a list of items.
        num_rows (`int`): Rows of the data set.

    Example:

    ```python
    >>> from transformers import default_data_collator
    >>> collator = NumberedCollator(default_data_collator, num_rows=9)
    >>> collator([NumberedItems([7, 2], [{"label": 1}, {"label": 0}])])
    {'labels': tensor([1, 0]), 'lpg_rows': tensor([7, 2])}

    ```
    """

    def __init__(self, collator: Callable[[object], object], num_rows: int):
        self.collator = collator
        self.num_rows = num_rows

    def __call__(self, numbered: list[NumberedItems]) -> object:
        ((indices, items),) = numbered
        labels_before = _integer_labels(items)
        batch = self.collator(items)
        labels = batch.get("labels") if isinstance(batch, MutableMapping) else None
        if not isinstance(labels, Tensor) or labels.ndim == 0:
            return batch
        try:
            rows = list(map(operator.index, indices))
        except TypeError:  # a sampler of the user's, with keys of its own
            rows = []
        is_same = len(rows) == len(labels) and labels_before in (None, labels.flatten().tolist())
        batch = copy.copy(batch)  # the collator may hand out an object that is not its own
        batch[ROWS_KEY] = torch.tensor(rows) if is_same else torch.full((len(labels),), self.num_rows)
        return batch


class UnnumberedBatches:
    """
    A loader of numbered batches for those who don't expect the numbers; everything else is asked of the loader inside.

    Example:

    ```python
    >>> list(UnnumberedBatches([{"labels": 1, "lpg_rows": 7}]))
    [{'labels': 1}]

    ```
    """

    def __init__(self, loader: Iterable):
        self.loader = loader

    def __iter__(self) -> Iterator:
        for batch in self.loader:
            if isinstance(batch, MutableMapping):
                batch.pop(ROWS_KEY, None)
            yield batch

    def __len__(self) -> int:
        return len(self.loader)

    def __getattr__(self, name: str) -> object:
        if name == "loader":
            raise AttributeError(name)
        return getattr(self.loader, name)


def _integer_labels(items: object) -> list[int] | None:
    """The labels as they are before the collator, `None` where they cannot be told."""
    if not (isinstance(items, list) and items and isinstance(items[0], Mapping)):
        return None
    column = next((name for name in LABEL_COLUMNS if name in items[0]), None)
    try:
        return list(map(operator.index, map(operator.itemgetter(column), items)))
    except (LookupError, TypeError):
        return None
