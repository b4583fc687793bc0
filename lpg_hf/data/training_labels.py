"""Reads the labels of any training set where that is cheap, and never loads its items for them."""

from collections import UserDict
from collections.abc import Sequence

import datasets
import numpy as np
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset

from ..batch import IGNORE_INDEX
from ..batch_labels import only_name
from .labels import LABEL_COLUMNS, class_counts, count_labels, first_label_column, label_feature, read_labels


# Where data sets of torch, those of torchvision among them, keep all of their labels.
LABEL_ATTRIBUTES = ("labels", "targets")


def class_counts_or_none(
    dataset: object, num_labels: int, label_names: Sequence[str] | None = None
) -> list[int] | None:
    """
    Counts the rows of every class where [`labels_or_none`] finds the labels.

    Args:
        dataset (`object`):
            Any training set.
        num_labels (`int`):
            The number of classes.
        label_names (`Sequence[str]`, *optional*):
            The `label_names` of the `TrainingArguments`. A single one is the column of a `datasets.Dataset` that has
            no label column of a usual name.

    Returns:
        `list[int]` or `None`: As [`class_counts`]; `None` if there are no labels to read. Labels outside of a
        `datasets.Dataset` that are out of range count as none: `__getitem__` may change them.

    Raises:
        ValueError: If labels of a `datasets.Dataset` are missing or out of range.

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from lpg_hf.data.training_labels import class_counts_or_none

    >>> class_counts_or_none(Dataset.from_dict({"label": [0, 2, 2]}), num_labels=3)
    [1, 0, 2]
    >>> class_counts_or_none([{"label": 0}, {"label": 2}], num_labels=3)
    [1, 0, 1]

    ```
    """
    if isinstance(dataset, datasets.Dataset) and len(dataset) > 0:
        column = _integer_column(dataset, label_names)
        try:
            if column is not None:
                return class_counts(dataset, num_labels, column)
        except ValueError as error:
            raise ValueError(
                f"{error} If the labels are changed on their way to the model, pass `class_counts` to LPGTrainer."
            ) from error
    labels = labels_or_none(dataset)
    if labels is None:
        return None
    classes = labels[labels != IGNORE_INDEX]
    is_in_range = classes.size > 0 and classes.min() >= 0 and classes.max() < num_labels
    return count_labels(labels, num_labels) if is_in_range else None


def labels_or_none(dataset: object) -> np.ndarray | None:
    """
    Reads the labels of a training set without loading its items.

    They are found in the label column of a `datasets.Dataset` (integers or booleans), in an attribute `labels` or
    `targets` with one integer per row, under the label of a list of dicts, and in the parts of a `Subset` or
    `ConcatDataset` of such.

    Args:
        dataset (`object`):
            Any training set.

    Returns:
        `numpy.ndarray` of shape `[N]` or `None`: The label of each row as int64; `None` if there is none to read.

    Example:

    ```python
    >>> from torch.utils.data import Subset
    >>> from lpg_hf.data.training_labels import labels_or_none

    >>> labels_or_none(Subset([{"label": 0}, {"label": 1}, {"label": 2}], [2, 0]))
    array([2, 0])
    >>> labels_or_none(["a text", "and another"]) is None
    True

    ```
    """
    if isinstance(dataset, datasets.Dataset):
        if len(dataset) == 0:
            return None
        column = _integer_column(dataset)
        try:
            return _labels_of_bools(dataset) if column is None else read_labels(dataset, column)
        except ValueError:
            return None
    if isinstance(dataset, list | tuple):
        return _labels_of_items(dataset)
    labels = _labels_of_attribute(dataset)
    if labels is not None:
        return labels
    if isinstance(dataset, Subset):
        labels = labels_or_none(dataset.dataset)
        return None if labels is None else labels[np.asarray(dataset.indices, dtype=np.int64)]
    if isinstance(dataset, ConcatDataset):
        parts = [labels_or_none(part) for part in dataset.datasets]
        known = [part for part in parts if part is not None]
        return np.concatenate(known) if len(known) == len(parts) else None
    return None


def _integer_column(dataset: datasets.Dataset, label_names: Sequence[str] | None = None) -> str | None:
    """The label column, if it has one integer per row, stored as `[N]` or `[N, 1]`."""
    column = first_label_column(dataset)
    if column is None and only_name(label_names) in dataset.column_names:
        column = only_name(label_names)
    if column is None:
        return None
    feature = label_feature(dataset, column)
    is_class = isinstance(feature, datasets.ClassLabel)
    if not is_class and not (isinstance(feature, datasets.Value) and "int" in feature.dtype):
        return None
    if isinstance(dataset.features[column], datasets.List | datasets.LargeList):  # [N, 1], or several labels per row
        try:
            read_labels(dataset, column)
        except ValueError:
            return None
    return column


def _labels_of_bools(dataset: datasets.Dataset) -> np.ndarray | None:
    """The labels of a column of yes and no, which collators turn into 1 and 0."""
    column = first_label_column(dataset)
    if column is None or dataset.features[column] != datasets.Value("bool"):
        return None
    values = dataset.with_format("arrow").select_columns([column])[:].column(column)
    return None if values.null_count > 0 else values.to_numpy().astype(np.int64)


def _labels_of_items(items: Sequence[object]) -> np.ndarray | None:
    """The labels of dicts that are in memory already."""
    first = items[0] if items else None
    column = next((name for name in LABEL_COLUMNS if isinstance(first, dict | UserDict) and name in first), None)
    if column is None or not all(isinstance(item, dict | UserDict) and column in item for item in items):
        return None
    return _integers([item[column] for item in items], len(items))  # type: ignore[index]


def _labels_of_attribute(dataset: object) -> np.ndarray | None:
    # torchvision applies it to the labels that it hands out.
    if getattr(dataset, "target_transform", None) is not None or not hasattr(dataset, "__len__"):
        return None
    for name in LABEL_ATTRIBUTES:
        labels = _integers(getattr(dataset, name, None), len(dataset))
        if labels is not None:
            return labels
    return None


def _integers(values: object, length: int) -> np.ndarray | None:
    """One integer per row as int64, from any array, tensor or sequence of `[N]` or `[N, 1]`; `None` for all else."""
    if values is None or isinstance(values, str):
        return None
    try:
        array = values.cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    except (TypeError, ValueError, RuntimeError):  # sequences of different lengths, or tensors of several entries
        return None
    if array.ndim not in (1, 2) or len(array) != length or array.size != length or array.dtype.kind not in "iub":
        return None
    return array.reshape(-1).astype(np.int64)
