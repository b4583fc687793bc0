"""Finds rows whose texts differ in case and spacing alone."""

import unicodedata
from collections.abc import Sequence
from typing import Any

from datasets import Dataset, Value

from ..data import CLEAN_LABEL_COLUMN, LABEL_COLUMNS
from .loading import MapStyleDataset


def find_near_copies(dataset: MapStyleDataset, prior_dataset: MapStyleDataset) -> tuple[list[str], list[int]]:
    """
    Finds rows whose texts occur in the prior's data, up to case, spacing, and the form of Unicode.

    A column is text if it holds strings in both data sets, and most of them are several words or not ASCII. Names and
    identifiers are not compared. A row is found if all of its texts are those of one row of the prior's data, and not
    all of them are empty. Other inputs beside the texts, such as images, are not compared.

    Args:
        dataset: The certificate set.
        prior_dataset: The rows that the prior was trained on.

    Returns:
        `tuple[list[str], list[int]]`: Names of the text columns, and numbers of the rows of `dataset`.
    """
    names = [name for name in _string_columns(dataset) if name in _string_columns(prior_dataset)]
    columns, rows = _normalized_texts(dataset, names)
    if not columns:
        return [], []
    prior_texts = _texts(prior_dataset, columns)
    known = set(zip(*(map(_normalize, prior_texts[name]) for name in columns), strict=True))
    return columns, [number for number, row in enumerate(rows) if row in known and any(row)]


def find_near_copies_within(dataset: MapStyleDataset) -> tuple[list[str], list[int]]:
    """
    Finds rows whose texts an earlier row of the same data set has, up to case, spacing, and the form of Unicode.

    Args:
        dataset: The certificate set.

    Returns:
        `tuple[list[str], list[int]]`: As for [`find_near_copies`], of all string columns.
    """
    columns, rows = _normalized_texts(dataset, _string_columns(dataset))
    seen: set[tuple[str | None, ...]] = set()
    found = []
    for number, row in enumerate(rows):
        if row in seen and any(row):
            found.append(number)
        seen.add(row)
    return columns, found


def _normalized_texts(
    dataset: MapStyleDataset, names: Sequence[str]
) -> tuple[list[str], list[tuple[str | None, ...]]]:
    texts = _texts(dataset, names)
    columns = [name for name in names if _is_text([value for value in texts[name] if value is not None])]
    return columns, list(zip(*(map(_normalize, texts[name]) for name in columns), strict=True))


def _string_columns(dataset: MapStyleDataset) -> list[str]:
    no_inputs = (*LABEL_COLUMNS, CLEAN_LABEL_COLUMN)
    if isinstance(dataset, Dataset):
        kinds = (Value("string"), Value("large_string"))
        return [name for name, kind in dataset.features.items() if kind in kinds and name not in no_inputs]
    if len(dataset) == 0:
        return []
    return [name for name, value in dataset[0].items() if isinstance(value, str) and name not in no_inputs]


def _texts(dataset: MapStyleDataset, names: Sequence[str]) -> dict[str, list[Any]]:
    if isinstance(dataset, Dataset):  # as it is stored, because a transform may leave the texts out
        stored = dataset.with_format(None)
        return {name: stored[name][:] for name in names}
    if not names:
        return {}
    rows = [dataset[row] for row in range(len(dataset))]
    return {name: [row[name] if isinstance(row.get(name), str) else None for row in rows] for name in names}


def _is_text(values: Sequence[str]) -> bool:
    return 2 * sum(len(value.split()) > 1 or not value.isascii() for value in values) > len(values)


def _normalize(value: str | None) -> str | None:
    return None if value is None else "".join(unicodedata.normalize("NFKC", value).casefold().split())
