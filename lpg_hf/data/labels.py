"""Finds the label column of a dataset; reads, checks and counts its labels."""

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..batch import IGNORE_INDEX


LABEL_COLUMNS = ("labels", "label", "label_ids")
CLEAN_LABEL_COLUMN = "clean_label"


def find_label_column(dataset: datasets.Dataset) -> str:
    """
    Names the column that holds the labels: the first of `labels`, `label` and `label_ids` that exists.

    These are the names that the collators of [`~transformers.Trainer`] understand.

    Args:
        dataset (`datasets.Dataset`):
            The dataset to look at.

    Returns:
        `str`: The name of the label column.

    Raises:
        ValueError: If the dataset has none of these columns.

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from lpg_hf.data import find_label_column

    >>> find_label_column(Dataset.from_dict({"text": ["good", "bad"], "label": [1, 0]}))
    'label'

    ```
    """
    _check_is_dataset(dataset)
    column = first_label_column(dataset)
    if column is not None:
        return column
    raise ValueError(
        f"dataset has no label column; looked for {', '.join(LABEL_COLUMNS)}, found the columns "
        f"{dataset.column_names}. Rename the column with `dataset.rename_column(..., 'labels')`, or pass its name as "
        "`label_column` where the function takes it."
    )


def class_counts(
    dataset: datasets.Dataset, num_labels: int | None = None, label_column: str | None = None
) -> list[int]:
    """
    Counts the rows of every class.

    Rows labeled -100 (ignored by the loss) are left out.

    Args:
        dataset (`datasets.Dataset`):
            The dataset to count, as seen through its `shuffle`, `select` and `filter`.
        num_labels (`int`, *optional*):
            The number of classes. Defaults to the number of names of a `ClassLabel` column, else to the largest
            label plus one.
        label_column (`str`, *optional*):
            The column of integer labels, stored as `[N]` or `[N, 1]`. Defaults to the result of [`find_label_column`].

    Returns:
        `list[int]`: `num_labels` counts, in the order of the class indices.

    Raises:
        ValueError: If the dataset is empty, or the labels are missing, not integers, or out of range.

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from lpg_hf.data import class_counts

    >>> class_counts(Dataset.from_dict({"label": [0, 2, 2, -100]}), num_labels=4)
    [1, 0, 2, 0]

    ```
    """
    column = resolve_label_column(dataset, label_column)
    labels = read_labels(dataset, column)
    if num_labels is None:
        num_labels = number_of_classes(dataset, column, labels)
    check_range(labels, num_labels, column)
    return count_labels(labels, num_labels)


def count_labels(labels: np.ndarray, num_labels: int) -> list[int]:
    """Counts the labels of each class, without the ignored ones."""
    return np.bincount(labels[labels != IGNORE_INDEX], minlength=num_labels).tolist()


def label_names(dataset: object) -> list[str]:
    """
    Reads the names of the classes from the label column, if it is a `ClassLabel`, or from one that it is a copy of.

    Args:
        dataset (`object`):
            Any training set.

    Returns:
        `list[str]`: The names in the order of the class indices; empty if `dataset` is not a `datasets.Dataset` or
        has no such column.

    Example:

    ```python
    >>> from datasets import ClassLabel, Dataset
    >>> from lpg_hf.data.labels import label_names

    >>> dataset = Dataset.from_dict({"label": [1, 0]})
    >>> label_names(dataset)
    []
    >>> label_names(dataset.cast_column("label", ClassLabel(names=["bad", "good"])))
    ['bad', 'good']

    ```
    """
    if not isinstance(dataset, datasets.Dataset):
        return []
    columns = [name for name in LABEL_COLUMNS if name in dataset.column_names]
    named = next((name for name in columns if isinstance(dataset.features[name], datasets.ClassLabel)), None)
    if named is None:
        return []
    if named != columns[0]:  # a data set may have several kinds of classes
        table = dataset.with_format("arrow").select_columns([columns[0], named])[:]
        labels, same = table.column(columns[0]), table.column(named)
        if labels.type != same.type or not labels.equals(same):
            return []
    return dataset.features[named].names


def first_label_column(dataset: datasets.Dataset) -> str | None:
    """The first of the usual names that a column has."""
    return next((name for name in LABEL_COLUMNS if name in dataset.column_names), None)


def _check_is_dataset(dataset: object) -> None:
    if not isinstance(dataset, datasets.Dataset):
        raise TypeError(
            f"dataset is a {type(dataset).__name__}, but must be a `datasets.Dataset`. Take one split of a "
            "`DatasetDict`, for instance `dataset['train']`; turn other data into one with `Dataset.from_dict` or "
            "`Dataset.from_generator`."
        )


def resolve_label_column(dataset: datasets.Dataset, label_column: str | None) -> str:
    """The column that the caller named, after a check, else the one that is found."""
    _check_is_dataset(dataset)
    if label_column is None:
        return find_label_column(dataset)
    if label_column not in dataset.column_names:
        raise ValueError(
            f"label_column is {label_column!r}, but the dataset has the columns {dataset.column_names}. Pass one of "
            "these."
        )
    return label_column


def label_feature(dataset: datasets.Dataset, column: str) -> object:
    """The feature type of a single label, of a column stored as `[N]` or `[N, 1]`."""
    feature = dataset.features[column]
    return feature.feature if isinstance(feature, datasets.List | datasets.LargeList) else feature


def number_of_classes(dataset: datasets.Dataset, column: str, labels: np.ndarray) -> int:
    """The number of names of a `ClassLabel`, else the largest label plus one."""
    feature = label_feature(dataset, column)
    return feature.num_classes if isinstance(feature, datasets.ClassLabel) else int(labels.max()) + 1


def read_labels(dataset: datasets.Dataset, column: str) -> np.ndarray:
    """The labels `[N]` as int64; raises unless they are integers, one per row, not all of them ignored."""
    if len(dataset) == 0:
        raise ValueError("dataset is empty (0 rows). Check how it was loaded or filtered.")
    # The arrow format replaces a transform that the user has set, and follows the indices of shuffle and select.
    values = dataset.with_format("arrow").select_columns([column])[:].column(column)
    values = _unnest_single_labels(values, column)
    _check_integer_labels(values, column)
    labels = values.to_numpy().astype(np.int64)
    if (labels == IGNORE_INDEX).all():
        raise ValueError(
            f"every label of column {column!r} is {IGNORE_INDEX}, which means ignored. At least one row needs a "
            "class. Check how the labels were made."
        )
    return labels


def is_list(arrow_type: pa.DataType) -> bool:
    """Whether an Arrow type is one of the list types that `datasets` stores `[N, 1]` labels in."""
    return (
        pa.types.is_list(arrow_type) or pa.types.is_large_list(arrow_type) or pa.types.is_fixed_size_list(arrow_type)
    )


def _unnest_single_labels(values: pa.ChunkedArray, column: str) -> pa.ChunkedArray:
    if not is_list(values.type):
        return values
    lengths = pc.fill_null(pc.list_value_length(values), 0)
    wrong_row = pc.index(pc.equal(lengths, 1), False).as_py()
    if wrong_row >= 0:
        raise ValueError(
            f"column {column!r} holds {lengths[wrong_row]} labels in row {wrong_row}, but one label per sample is "
            "needed: integers stored as [N] or [N, 1]. Multi-label and token-level data are not supported; pass "
            "`label_column` if another column holds the classes."
        )
    return pc.list_flatten(values)


def _check_integer_labels(values: pa.ChunkedArray, column: str) -> None:
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        raise ValueError(
            f"column {column!r} holds strings such as {values[0].as_py()!r}, but labels must be integers. Turn them "
            f"into class indices with `dataset.class_encode_column({column!r})`."
        )
    if not pa.types.is_integer(values.type):
        raise ValueError(
            f"column {column!r} holds values of type {values.type}, but labels must be integers. If they are class "
            f"indices, use `dataset.cast_column({column!r}, datasets.Value('int64'))`; regression targets have no "
            "classes."
        )
    if values.null_count:
        raise ValueError(
            f"column {column!r} has {values.null_count} missing labels (None). Filter these rows out, or set them to "
            f"{IGNORE_INDEX} (ignored)."
        )


def check_range(labels: np.ndarray, num_classes: int, column: str) -> None:
    """Raises if a label is neither a class nor ignored."""
    wrong = np.flatnonzero((labels != IGNORE_INDEX) & ((labels < 0) | (labels >= num_classes)))
    if len(wrong):
        raise ValueError(
            f"column {column!r} holds the label {labels[wrong[0]]} in row {wrong[0]}, but with {num_classes} classes "
            f"labels must lie in 0..{num_classes - 1}. Correct the label or the number of classes (`num_labels`, or "
            f"the names of the `ClassLabel`); a row without a label is marked {IGNORE_INDEX}."
        )


def check_two_classes(num_classes: int, column: str) -> None:
    """Raises if there are fewer than two classes."""
    if num_classes < 2:
        raise ValueError(
            f"column {column!r} has {num_classes} class, but at least 2 are needed. Check the labels, or declare all "
            f"classes with `dataset.cast_column({column!r}, datasets.ClassLabel(names=[...]))`."
        )
