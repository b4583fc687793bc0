"""Which rows a certificate may use: a split without copies, and fingerprints that show what was read."""

import hashlib
from collections.abc import Hashable, Mapping, Sequence

import datasets
import numpy as np
import torch
from datasets import Dataset, DatasetDict
from datasets.fingerprint import Hasher
from torch import Tensor
from transformers.utils import logging

from ..data import CLEAN_LABEL_COLUMN, LABEL_COLUMNS


logger = logging.get_logger(__name__)


def split_for_certificate(
    dataset: Dataset, fraction: float = 0.5, seed: int = 0, *, columns: Sequence[str] | None = None
) -> DatasetDict:
    """
    Splits training data at random into a part for the prior and a part for the certificate.

    Train the prior on the first part only, the posterior on both (on `dataset` itself), and certify on the second.
    Whatever is fitted to data before the prior (normalisers, vocabulary, hyper-parameters) must not see the second.

    Rows with equal inputs are copies: only the first of them is used, and the log says how many were left out. A copy
    in both parts would show the prior what it is tested on, and two in one part are not independent.

    Args:
        dataset (`datasets.Dataset`): Training rows, independent of each other. A transform is kept, and not run.
        fraction (`float`, *optional*, defaults to 0.5): Share of the rows that the prior gets, in (0, 1).
        seed (`int`, *optional*, defaults to 0): The same seed gives the same split.
        columns (`Sequence[str]`, *optional*):
            Columns that make up the input of a row. Defaults to all but `labels`, `label`, `label_ids` and
            `clean_label`. Name them where a column is unique to its row, as an identifier is.

    Returns:
        `datasets.DatasetDict`: The parts `prior` and `certificate`, without a row in common.

    Raises:
        ValueError: If `fraction` is out of range, a column is unknown, or a part would be empty.

    Example:

    ```python
    >>> from datasets import Dataset
    >>> rows = Dataset.from_dict({"text": ["a", "b", "c", "d", "a"], "label": [0, 1, 0, 1, 0]})
    >>> parts = split_for_certificate(rows)
    >>> sorted(parts["prior"]["text"][:] + parts["certificate"]["text"][:])
    ['a', 'b', 'c', 'd']

    ```
    """
    if not 0 < fraction < 1:
        raise ValueError(f"`fraction` must lie strictly between 0 and 1; found {fraction}.")
    if columns is None:
        columns = [name for name in dataset.column_names if name not in (*LABEL_COLUMNS, CLEAN_LABEL_COLUMN)]
    unknown = [name for name in columns if name not in dataset.column_names]
    if unknown or not columns:
        raise ValueError(
            f"`columns` must name the inputs among {dataset.column_names}; found {list(columns)}. A split needs them "
            "to find copies."
        )
    rows = first_of_each(_stored_rows(dataset, columns))
    if len(rows) < len(dataset):
        logger.warning(f"{len(dataset) - len(rows)} of {len(dataset)} rows repeat an earlier one and are left out.")
    size = round(fraction * len(rows))
    if not 0 < size < len(rows):
        raise ValueError(f"`fraction` {fraction} of {len(rows)} different rows leaves a part empty. Use more rows.")
    order = np.random.default_rng(seed).permutation(rows)
    return DatasetDict(prior=dataset.select(order[:size]), certificate=dataset.select(order[size:]))


def first_of_each(values: Sequence[Hashable]) -> list[int]:
    """Positions of the values that do not repeat an earlier one."""
    first = {}
    for position, value in enumerate(values):
        first.setdefault(value, position)
    return list(first.values())


def _stored_rows(dataset: Dataset, columns: Sequence[str]) -> list[str]:
    """A fingerprint of every row as it is stored: images and sounds are compared as files, not decoded."""
    stored = dataset.with_format(None).select_columns(list(columns))
    media = [name for name, kind in stored.features.items() if isinstance(kind, datasets.Image | datasets.Audio)]
    for name in media:
        stored = stored.cast_column(name, type(stored.features[name])(decode=False))
    return [row_fingerprint({n: _content(v) if n in media else v for n, v in row.items()}) for row in stored]


def _content(file: dict | None) -> bytes | str | None:
    """The same picture may lie under several names."""
    if file is None:
        return None
    if file["bytes"] is not None:
        return file["bytes"]
    with open(file["path"], "rb") as opened:
        return opened.read()


def row_fingerprint(row: Mapping[str, object]) -> str:
    """A fingerprint of the values of a row, equal for equal rows."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(row):
        digest.update(name.encode())
        digest.update(_value_fingerprint(row[name]))
    return digest.hexdigest()


def _value_fingerprint(value: object) -> bytes:
    numbers = _as_numbers(value)
    if numbers is None:
        return Hasher.hash(value).encode()
    return f"{numbers.dtype}{numbers.shape}".encode() + numbers.tobytes()


def _as_numbers(value: object) -> np.ndarray | None:
    """Numbers in one type for all containers and precisions they may come in, `None` for what is no array of them."""
    if isinstance(value, Tensor):
        # NumPy has no bfloat16, and every bfloat16 is a float32.
        value = (value.float() if value.dtype == torch.bfloat16 else value).numpy(force=True)
    if not isinstance(value, np.ndarray | np.generic | list | tuple | int | float):
        return None
    try:
        array = np.asarray(value)
    except ValueError:  # rows of unequal length
        return None
    if array.dtype.kind == "f":
        return array.astype(np.float32)
    return array.astype(np.int64) if array.dtype.kind in "biu" else None
