"""Row numbers that travel with the training data, from the data set through any collator to the batch."""

import copy
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence, Sized
from typing import Any, NamedTuple

import datasets
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .data import LABEL_COLUMNS


#: The key under which a batch carries its row numbers. The collator adds it and the trainer takes it out again.
ROWS_KEY = "lpg_rows"


def has_rows(dataset: object) -> bool:
    """Whether a data set can be asked for its i-th row, which a stream cannot."""
    is_stream = isinstance(dataset, torch.utils.data.IterableDataset | datasets.IterableDataset)
    return isinstance(dataset, Sized) and hasattr(dataset, "__getitem__") and not is_stream


class IndexedItems(NamedTuple):
    """Items on their way to the collator, with their row numbers."""

    rows: Sequence[Any]
    items: object


class IndexedDataset(Dataset):
    """
    A data set that hands the loader its items together with their row numbers.

    Every other attribute is looked up on the data set inside.

    Args:
        dataset: A data set with `__len__`, and with `__getitem__` or `__getitems__`.

    Example:

    ```python
    >>> IndexedDataset(["a", "b"]).__getitems__([1, 0])
    [IndexedItems(rows=[1, 0], items=['b', 'a'])]

    ```
    """

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        return self.dataset[index]

    def __getitems__(self, indices: Sequence[Any]) -> list[IndexedItems]:
        # Data sets that read a batch at once (`datasets` among them) are much faster that way. Only the collator
        # looks into the result. The loader expects a list of items and gets a list of one.
        read_many = getattr(self.dataset, "__getitems__", None)
        items = read_many(indices) if callable(read_many) else [self.dataset[i] for i in indices]
        return [IndexedItems(indices, items)]

    def __getattr__(self, name: str) -> Any:
        # Forwards `set_epoch` and the like. Unpickling in a worker asks before `dataset` is set.
        if name == "dataset":
            raise AttributeError(name)
        return getattr(self.dataset, name)


class IndexedCollator:
    """
    Takes the row numbers off the items of [`IndexedDataset`], calls the collator inside and adds them to its batch.

    If the collator reorders its items, or changes their number or labels, the numbers no longer fit. Every sample of
    the batch then gets the number `num_rows`, which means "unknown". A batch without labels gets no numbers.

    Args:
        collator (`Callable`): Turns a list of items into a batch.
        num_rows (`int`): Number of rows of the data set.

    Example:

    ```python
    >>> from transformers import default_data_collator
    >>> collator = IndexedCollator(default_data_collator, num_rows=9)
    >>> collator([IndexedItems([7, 2], [{"label": 1}, {"label": 0}])])
    {'labels': tensor([1, 0]), 'lpg_rows': tensor([7, 2])}

    ```
    """

    def __init__(self, collator: Callable[[Any], Any], num_rows: int):
        self.collator = collator
        self.num_rows = num_rows

    def __call__(self, indexed: list[IndexedItems]) -> Any:
        ((indices, items),) = indexed
        labels_before = _integer_labels(items)
        batch = self.collator(items)
        labels = batch.get("labels") if isinstance(batch, MutableMapping) else None
        if not isinstance(labels, Tensor) or labels.ndim == 0:
            return batch
        try:
            rows = list(map(operator.index, indices))
        except TypeError:  # the user's sampler has keys of its own
            rows = []
        is_same = len(rows) == len(labels) and labels_before in (None, labels.flatten().tolist())
        batch = copy.copy(batch)  # the collator may hand out an object that it keeps
        batch[ROWS_KEY] = torch.tensor(rows) if is_same else torch.full((len(labels),), self.num_rows)
        return batch


class UnindexedLoader:
    """
    A loader of numbered batches for readers that do not expect the numbers.

    Every other attribute is looked up on the loader inside.

    Example:

    ```python
    >>> list(UnindexedLoader([{"labels": 1, "lpg_rows": 7}]))
    [{'labels': 1}]

    ```
    """

    def __init__(self, loader: Iterable[Any]):
        self.loader: Any = loader

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            if isinstance(batch, MutableMapping):
                batch.pop(ROWS_KEY, None)
            yield batch

    def __len__(self) -> int:
        return len(self.loader)

    def __getattr__(self, name: str) -> Any:
        if name == "loader":
            raise AttributeError(name)
        return getattr(self.loader, name)


def _integer_labels(items: object) -> list[int] | None:
    """Reads the labels before the collator does. `None` if the items do not show them."""
    if not (isinstance(items, list) and items and isinstance(items[0], Mapping)):
        return None
    column = next((name for name in LABEL_COLUMNS if name in items[0]), None)
    try:
        return list(map(operator.index, map(operator.itemgetter(column), items)))
    except (LookupError, TypeError):
        return None
