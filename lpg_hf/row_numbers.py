"""Row numbers that travel with the training data, from the data set through any collator to the batch."""

import copy
import operator
from collections.abc import Callable, Hashable, MutableMapping, Sequence, Sized
from typing import Any, NamedTuple, TypeVar

import datasets
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .batch_labels import labels_of
from .row_matching import ItemLabels, match_labels


#: The key under which a batch carries its row numbers. The collator adds it and the trainer takes it out again.
ROWS_KEY = "lpg_rows"
# Marks that stand in place of a row number; a data set of n rows adds n to them. The last one is for counting alone.
UNKNOWN, REORDERED, UNVERIFIED = 0, 1, 2
NUM_MARKS = 3

Copied = TypeVar("Copied")


def has_rows(dataset: object) -> bool:
    """Whether a data set can be asked for its i-th row, which a stream cannot."""
    is_stream = isinstance(dataset, torch.utils.data.IterableDataset | datasets.IterableDataset)
    return isinstance(dataset, Sized) and hasattr(dataset, "__getitem__") and not is_stream


class IndexedItems(NamedTuple):
    """Items on their way to the collator, with their row numbers; `None` for a key that is not a row number."""

    rows: Sequence[int | None]
    items: object


class IndexedDataset(Dataset):
    """
    A data set that hands the loader its items together with their row numbers.

    Every other attribute is looked up, and set, on the data set inside.

    Args:
        dataset: A data set with `__len__`, and with `__getitem__` or `__getitems__`.
        num_rows (`int`): Number of rows that have a number. The data set may have grown since.

    Example:

    ```python
    >>> IndexedDataset(["a", "b"], num_rows=2).__getitems__([1, -2])
    [IndexedItems(rows=[1, 0], items=['b', 'a'])]

    ```
    """

    dataset: Any
    _num_rows: int

    def __init__(self, dataset: Any, num_rows: int):
        vars(self).update(dataset=dataset, _num_rows=num_rows)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        return self.dataset[index]

    def __getitems__(self, indices: Sequence[Any]) -> list[IndexedItems]:
        # Data sets that read a batch at once (`datasets` among them) are much faster that way. Only the collator
        # looks into the result. The loader expects a list of items and gets a list of one.
        read_many = getattr(self.dataset, "__getitems__", None)
        items = read_many(indices) if callable(read_many) else [self.dataset[i] for i in indices]
        return [IndexedItems(self._row_numbers(indices), items)]

    def _row_numbers(self, indices: Sequence[Any]) -> Sequence[int | None]:
        try:
            rows = list(map(operator.index, indices))
        except TypeError:  # the user's sampler has keys of its own
            return [None] * len(indices)
        # As a rule, all are in range: a call per row would cost more than all else that a batch needs.
        if rows and min(rows) >= 0 and max(rows) < self._num_rows:
            return rows
        size = len(self.dataset)
        counted = [row + size if row < 0 else row for row in rows]
        return [row if 0 <= row < self._num_rows else None for row in counted]

    def __getattr__(self, name: str) -> Any:
        # Forwards `set_epoch` and the like. Unpickling in a worker asks before `dataset` is set.
        if name == "dataset":
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self.dataset, name, value)


class IndexedCollator:
    """
    Takes the row numbers off the items of [`IndexedDataset`], calls the collator inside and adds them to its batch.

    The labels of the items and of the batch tell which items the collator left out, repeated or replaced. A sample
    whose row they do not tell gets the number `num_rows`, which means "unknown". All samples of a batch in another
    order than its items get the number `num_rows + 1`. Where the items do not show their labels, a batch of as many
    samples as items counts as one in their order, and the numbers are those of [`mark_unverified`]. A batch without
    labels gets no numbers.

    Args:
        collator (`Callable`): Turns a list of items into a batch.
        num_rows (`int`): Number of rows that have a number.
        label_names (`Sequence[str]`, *optional*): The `label_names` of the `TrainingArguments`.

    Example:

    ```python
    >>> from transformers import default_data_collator
    >>> collator = IndexedCollator(default_data_collator, num_rows=9)
    >>> collator([IndexedItems([7, 2], [{"label": 1}, {"label": 0}])])
    {'labels': tensor([1, 0]), 'lpg_rows': tensor([7, 2])}

    ```
    """

    def __init__(self, collator: Callable[[Any], Any], num_rows: int, label_names: Sequence[str] | None = None):
        self.collator = collator
        self.num_rows = num_rows
        self.label_names = label_names
        # The columns that held the labels in all batches up to now.
        self._columns: list[Hashable] | None = None

    def __call__(self, indexed: list[IndexedItems]) -> Any:
        ((rows, items),) = indexed
        before = ItemLabels(items, self._columns)
        batch = self.collator(items)
        labels = labels_of(batch, self.label_names)
        is_dict = type(batch) is dict
        is_writable = is_dict or isinstance(batch, MutableMapping)
        if not isinstance(labels, Tensor) or labels.ndim == 0 or not is_writable:
            return batch
        if labels.numel() != labels.shape[0] or labels.is_floating_point() or labels.is_complex():
            # Segmentation masks, tokens or mixed labels: nothing to compare, and much to convert.
            numbers = torch.full((len(labels),), self.num_rows + UNKNOWN)
        else:
            numbers = torch.tensor(self._row_numbers(rows, before, labels.flatten().tolist()), dtype=torch.int64)
        # The collator may hand out an object that it keeps.
        batch = {**batch} if is_dict else copy.copy(batch)
        batch[ROWS_KEY] = numbers
        return batch

    def _row_numbers(self, rows: Sequence[int | None], before: ItemLabels, after: list[int]) -> Sequence[int]:
        if before.positions is not None:
            rows = [rows[position] for position in before.positions]
        same = [column for column, values in before.labels.items() if values == after]
        found: Sequence[int | None] | None = rows
        if same:
            self._columns = same
        elif before.usual is not None:
            items = match_labels(before.usual, after)
            found = None if items is None else [None if item is None else rows[item] for item in items]
        else:  # a column of integers may hold anything
            self._columns = None
            found = rows if len(after) == len(rows) else [None] * len(after)
        if found is None:
            return [self.num_rows + REORDERED] * len(after)
        marked = [self.num_rows + UNKNOWN if row is None else row for row in found]
        return marked if same or before.usual is not None else mark_unverified(marked)


def mark_unverified(rows: Sequence[int]) -> list[int]:
    """
    Marks row numbers whose order was not compared with anything, as `-1 - row`.

    Example:

    ```python
    >>> mark_unverified([0, 5]), mark_unverified(mark_unverified([0, 5]))
    ([-1, -6], [0, 5])

    ```
    """
    return [-1 - row for row in rows]


def number_rows(loader: DataLoader, num_rows: int, label_names: Sequence[str] | None = None) -> DataLoader:
    """
    Copies a loader so that its batches carry their row numbers.

    The copy shares the samplers with the loader, which stays as it is. Data set and collator are looked up now.

    Args:
        loader (`torch.utils.data.DataLoader`): A loader of batches, of torch or of accelerate.
        num_rows (`int`): Number of rows of the data set.
        label_names (`Sequence[str]`, *optional*): The `label_names` of the `TrainingArguments`.

    Returns:
        `torch.utils.data.DataLoader`: A loader of the same type.

    Example:

    ```python
    >>> from transformers import default_data_collator
    >>> loader = DataLoader([{"label": 1}, {"label": 0}], batch_size=2, collate_fn=default_data_collator)
    >>> list(number_rows(loader, num_rows=2))
    [{'labels': tensor([1, 0]), 'lpg_rows': tensor([0, 1])}]

    ```
    """
    numbered = inner = _shallow_copy(loader)
    base = vars(loader).get("base_dataloader")  # accelerate's loaders have one of torch inside
    if base is not None:
        inner = vars(numbered)["base_dataloader"] = _shallow_copy(base)
    # A loader of torch refuses another data set. Its workers, if there are any yet, belong to the original.
    collator = IndexedCollator(inner.collate_fn, num_rows, label_names)
    vars(inner).update(dataset=IndexedDataset(inner.dataset, num_rows), collate_fn=collator, _iterator=None)
    return numbered


def iterates_in_own_way(loader: DataLoader) -> bool:
    """
    Whether a loader has an `__iter__` that neither torch nor accelerate wrote.

    It sees the batches before the Trainer does. It may change all of their tensors alike, as a prefetcher does that
    converts them to half precision, so no row numbers may be among them.

    Example:

    ```python
    >>> class Halves(DataLoader):
    ...     def __iter__(self):
    ...         return ({name: values.half() for name, values in batch.items()} for batch in super().__iter__())

    >>> iterates_in_own_way(DataLoader([1])), iterates_in_own_way(Halves([1]))
    (False, True)

    ```
    """
    loaders = [loader, vars(loader).get("base_dataloader", loader)]
    writers = {type(each).__iter__.__module__.partition(".")[0] for each in loaders}
    return not writers <= {"torch", "torchdata", "accelerate"}


def _shallow_copy(original: Copied) -> Copied:
    # Not `copy.copy`: accelerate's loaders pass for another class, which confuses it.
    duplicate = object.__new__(type(original))
    vars(duplicate).update(vars(original))
    return duplicate
