"""Labels as class indices, with the same names in every split."""

import logging
from collections.abc import Iterable

from datasets import ClassLabel, Dataset, DatasetDict, List, Value

from ..data import LABEL_COLUMNS
from ..loss import IGNORE_INDEX
from .arguments import DataArguments
from .load_data import EMPTY_CELLS, TEST, TRAIN, VALIDATION, check_column, shorten


logger = logging.getLogger(__name__)


def encode_labels(
    splits: DatasetDict, data: DataArguments, known_names: Iterable[str] | None = None
) -> tuple[DatasetDict, list[str]]:
    """
    Gives every split a `ClassLabel` column `labels`, with the same names in the same order.

    Other columns that a collator would take for the labels are removed. Test data may have no labels.

    Args:
        splits (`DatasetDict`): As loaded.
        data ([`DataArguments`]): Names the columns.
        known_names (`Iterable[str]`, *optional*): Defaults to those of the training data.

    Returns:
        The splits, and the names of the classes.

    Raises:
        ValueError: If the column is missing, has no labels, or names that the training data has not.
    """
    names = None if known_names is None else list(known_names)
    source = "training data" if known_names is None else "model"
    encoded = DatasetDict()
    for split in (TRAIN, VALIDATION, TEST):
        if split not in splits:
            continue
        dataset = splits[split]
        column, argument = data.label_column_name, "label_column_name"
        if split != TRAIN and data.eval_label_column_name is not None:
            column, argument = data.eval_label_column_name, "eval_label_column_name"
        if split == TEST and not has_labels(dataset, column):
            encoded[split] = dataset.remove_columns([c for c in LABEL_COLUMNS if c in dataset.column_names])
            continue
        check_column(dataset, split, argument, column)
        values = label_values(dataset, split, column)
        found = label_names(dataset, column, values)
        if names is None:
            names = found
            warn_of_similar(names)
        elif unknown := [name for name in found if name not in names]:
            raise ValueError(
                f"The {split} data has labels in column {column!r} that the {source} has not: {shorten(unknown)}. The "
                f"{source} has: {shorten(names)}. Correct the names, or train on rows of these classes, too."
            )
        elif split == VALIDATION and len(found) < len(names):
            missing = [name for name in names if name not in found]
            logger.warning(f"The validation data has no labels {shorten(missing)}: they are not evaluated.")
        index = {name: position for position, name in enumerate(names)}
        dataset = dataset.remove_columns([c for c in {*LABEL_COLUMNS, column} if c in dataset.column_names])
        indices = [index[value] for value in values]
        encoded[split] = dataset.add_column("labels", indices, feature=ClassLabel(names=names))
    assert names is not None  # there is a split with labels
    if len(names) < 2:
        raise ValueError(f"The labels name one class alone, {names[0]!r}: there is nothing to tell apart.")
    return encoded, names


def warn_of_similar(names: list[str]) -> None:
    """Warns of classes that a person would take for one, as data that was put together by hand has them."""
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(" ".join(name.split()).casefold(), []).append(name)
    if groups := [" and ".join(map(repr, group)) for group in alike.values() if len(group) > 1]:
        logger.warning(
            f"Names of classes differ in capitals or blanks alone: {shorten(groups)}. Each is a class of its own. If "
            "they mean the same, write them alike."
        )


def has_labels(dataset: Dataset, column: str) -> bool:
    """Test sets of the hub have no label column, or one without a class (-1) in any row."""
    if column not in dataset.column_names:
        return False
    return any(value not in (None, IGNORE_INDEX, -1) and not is_blank(value) for value in dataset[column][:])


def is_blank(value: object) -> bool:
    return isinstance(value, str) and not value.strip()


def label_values(dataset: Dataset, split: str, column: str) -> list[str]:
    """The name of every row's class."""
    feature = dataset.features[column]
    values = dataset[column][:]
    no_label = (None, IGNORE_INDEX, -1) if isinstance(feature, ClassLabel) else (None, IGNORE_INDEX)
    if unlabelled := [row for row, value in enumerate(values) if value in no_label or is_blank(value)]:
        raise ValueError(
            f"Column {column!r} of the {split} data has no label in {len(unlabelled)} of {len(values)} rows (rows "
            f"{shorten(unlabelled)}). Remove these rows. {EMPTY_CELLS}"
        )
    if isinstance(feature, ClassLabel):
        return feature.int2str(values)
    if isinstance(feature, List):
        raise ValueError(
            f"Column {column!r} of the {split} data holds lists of labels, which is multi-label classification. This "
            "command trains one label per row: pass another --label_column_name, or keep one label of each row. For "
            "several labels per row use run_classification.py of transformers."
        )
    if isinstance(feature, Value) and feature.dtype.startswith(("float", "double")):
        raise ValueError(
            f"Column {column!r} of the {split} data holds {feature}, but labels must be names or integers: numbers "
            "with a fraction are regression. If they are classes, write them as integers or names. For regression use "
            "run_classification.py of transformers."
        )
    if not isinstance(feature, Value) or "binary" in feature.dtype:
        raise ValueError(
            f"Column {column!r} of the {split} data holds {feature}, but labels must be names or integers, one per "
            "row. Pass another --label_column_name, or write all labels as names."
        )
    return [str(value) for value in values]


def label_names(dataset: Dataset, column: str, values: list[str]) -> list[str]:
    feature = dataset.features[column]
    if isinstance(feature, ClassLabel):
        return feature.names
    is_integer = isinstance(feature, Value) and "int" in feature.dtype
    return sorted(set(values), key=int if is_integer else None)
