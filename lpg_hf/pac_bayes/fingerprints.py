"""Fingerprints of rows, equal for rows with equal values whatever container and dtype hold them."""

import hashlib
from collections.abc import Mapping, Sequence

import datasets
import numpy as np
import torch
from datasets import Dataset
from datasets.fingerprint import Hasher
from torch import Tensor

from .remembered_outputs import tensors_in


#: From here on, float32 does not hold every integer.
_LARGEST_EXACT = 2**24


def row_fingerprint(row: Mapping[str, object], precision: torch.dtype = torch.float32) -> str:
    """
    Fingerprint of the names and values of a row.

    Numbers are compared by value: integers, booleans, and floats without a fraction are one kind. Other floats are
    rounded to `precision`. What an `attention_mask` hides is left out: a tokenizer pads the same text to the longest
    one beside it.

    Args:
        row (`Mapping[str, object]`): Names and values.
        precision (`torch.dtype`, *optional*, defaults to `torch.float32`): A half precision finds rows that were
            stored in it.
    """
    row = _without_padding(row)
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(row):
        digest.update(name.encode())
        digest.update(_value_fingerprint(row[name], precision))
    return digest.hexdigest()


def half_precisions(row: Mapping[str, object]) -> set[torch.dtype]:
    """Half precisions among the values of a row."""
    found = {tensor.dtype for tensor in tensors_in(row)} & {torch.float16, torch.bfloat16}
    arrays = [value for value in row.values() if isinstance(value, np.ndarray | np.generic)]
    return found | ({torch.float16} if any(array.dtype == np.float16 for array in arrays) else set())


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


def _without_padding(row: Mapping[str, object]) -> Mapping[str, object]:
    """The positions that the mask of a row shows, of every value that has one entry for each."""
    mask = as_array(row.get("attention_mask"))
    if mask is None or mask.ndim != 1 or mask.dtype.kind not in "fbiu" or mask.all():
        return row
    arrays = {name: as_array(value) for name, value in row.items()}
    is_shown = mask != 0
    return {
        name: array[is_shown] if array is not None and array.shape[:1] == is_shown.shape else row[name]
        for name, array in arrays.items()
    }


def _value_fingerprint(value: object, precision: torch.dtype) -> bytes:
    numbers = _as_numbers(value, precision)
    if numbers is not None:
        return f"{numbers.dtype}{numbers.shape}".encode() + numbers.tobytes()
    if isinstance(value, np.ndarray):  # of objects, such as arrays of unequal length
        value = value.tolist()
    if isinstance(value, list | tuple):
        # Lengths separate what the entries would run together.
        parts = [_value_fingerprint(entry, precision) for entry in value]
        return b"[" + b"".join(f"{len(part)}:".encode() + part for part in parts) + b"]"
    return Hasher.hash(value).encode()


def _as_numbers(value: object, precision: torch.dtype) -> np.ndarray | None:
    """Numbers as int64, or float32 if they have fractions. `None` if the value is not an array of numbers."""
    array = as_array(value)
    if array is None or array.dtype.kind not in "fbiu":
        return None
    if array.dtype.kind != "f":
        return array.astype(np.int64)
    with np.errstate(over="ignore"):
        floats = array.astype(np.float32)
    if precision != torch.float32:
        floats = torch.from_numpy(np.atleast_1d(floats)).to(precision).float().numpy().reshape(floats.shape)
    if ((floats == np.floor(floats)) & (np.abs(floats) <= _LARGEST_EXACT)).all():
        return floats.astype(np.int64)
    floats = floats + np.float32(0.0)  # no negative zero
    return np.where(np.isnan(floats), np.float32(np.nan), floats)


def as_array(value: object) -> np.ndarray | None:
    """Numbers as an array on the host. `None` if the value is something else."""
    if isinstance(value, Tensor):
        # NumPy has no bfloat16, and float32 holds every bfloat16 exactly.
        return (value.float() if value.dtype == torch.bfloat16 else value).numpy(force=True)
    if not isinstance(value, np.ndarray | np.generic | list | tuple | int | float):
        return None
    try:
        if isinstance(value, list | tuple) and value and isinstance(value[0], Tensor):
            arrays = [as_array(entry) for entry in value]
            return None if any(array is None for array in arrays) else np.stack(arrays)  # type: ignore[arg-type]
        return np.asarray(value)
    except ValueError:  # nested lists of unequal length
        return None
