"""Fingerprints of rows, equal for rows with equal values whatever container holds them."""

import hashlib
from collections.abc import Mapping, Sequence

import datasets
import numpy as np
import torch
from datasets import Dataset
from datasets.fingerprint import Hasher
from torch import Tensor


def row_fingerprint(row: Mapping[str, object]) -> str:
    """Fingerprint of the names and values of a row."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(row):
        digest.update(name.encode())
        digest.update(_value_fingerprint(row[name]))
    return digest.hexdigest()


def stored_fingerprints(dataset: Dataset, columns: Sequence[str]) -> list[str]:
    """
    Fingerprints of all rows as they are stored.

    Images and sounds are compared as files instead of being decoded. Transforms do not run.

    Args:
        dataset (`datasets.Dataset`): The rows.
        columns (`Sequence[str]`): Columns to compare.

    Returns:
        `list[str]`: One fingerprint per row.
    """
    stored = dataset.with_format(None).select_columns(list(columns))
    media = [name for name, kind in stored.features.items() if isinstance(kind, datasets.Image | datasets.Audio)]
    for name in media:
        stored = stored.cast_column(name, type(stored.features[name])(decode=False))
    return [row_fingerprint({n: _file_content(v) if n in media else v for n, v in row.items()}) for row in stored]


def _file_content(file: Mapping | None) -> bytes | None:
    """Content instead of name, because one picture may be stored under several names."""
    if file is None:
        return None
    if file["bytes"] is not None:
        return file["bytes"]
    with open(file["path"], "rb") as opened:
        return opened.read()


def _value_fingerprint(value: object) -> bytes:
    numbers = _as_numbers(value)
    if numbers is None:
        return Hasher.hash(value).encode()
    return f"{numbers.dtype}{numbers.shape}".encode() + numbers.tobytes()


def _as_numbers(value: object) -> np.ndarray | None:
    """Numbers in one dtype for all containers and precisions. `None` if the value is not an array of numbers."""
    if isinstance(value, Tensor):
        # NumPy has no bfloat16, and float32 holds every bfloat16 exactly.
        value = (value.float() if value.dtype == torch.bfloat16 else value).numpy(force=True)
    if not isinstance(value, np.ndarray | np.generic | list | tuple | int | float):
        return None
    try:
        array = np.asarray(value)
    except ValueError:  # nested lists of unequal length
        return None
    if array.dtype.kind == "f":
        return array.astype(np.float32)
    return array.astype(np.int64) if array.dtype.kind in "biu" else None
