"""Certificates as JSON: `null` for `nan`, and every value checked against its type when a file is read."""

import dataclasses
import json
import math
import types
import typing
from pathlib import Path
from typing import Any

from ..whole_files import replacing


def write_json(content: dict[str, Any], path: str | Path) -> None:
    """Writes the fields of a dataclass."""
    text = json.dumps(_to_json(content), indent=2, allow_nan=False)
    with replacing(path) as new:
        new.write_text(text + "\n", encoding="utf-8")


def read_json(kind: type, path: str | Path) -> Any:
    """
    Reads a dataclass that [`write_json`] wrote.

    Args:
        kind (`type`): The dataclass. Its fields are numbers, strings, tuples and dataclasses, or `None`.
        path (`str` or `Path`): The file.

    Raises:
        OSError: If there is no such file.
        ValueError: If the file is no JSON, or an entry is missing, unknown, or of another type.
    """
    cure = "Write certificates with `Certificate.save`, and certify again if the file was changed."
    try:
        return _to_dataclass(kind, json.loads(Path(path).read_text(encoding="utf-8")), "the file")
    except (RecursionError, OverflowError) as error:
        raise ValueError(f"{path} holds no certificate: an entry is too deep or too large. {cure}") from error
    except ValueError as error:  # no JSON, no UTF-8, or of another form
        raise ValueError(f"{path} holds no certificate: {error}. {cure}") from error


def _to_json(value: object) -> object:
    if isinstance(value, dict):
        return {name: _to_json(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(entry) for entry in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _to_dataclass(kind: type, content: object, name: str) -> Any:
    if not isinstance(content, dict):
        raise ValueError(f"{name} must be an object with named entries; found {_shorten(content)}")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    unknown = sorted(content.keys() - fields.keys())
    if unknown:
        raise ValueError(f"{name} has the unknown entry {_shorten(unknown[0])}")
    missing = [key for key, field in fields.items() if key not in content and field.default is dataclasses.MISSING]
    if missing:
        raise ValueError(f"{name} lacks the entry `{missing[0]}`")
    kinds = typing.get_type_hints(kind)
    return kind(**{key: _to_value(kinds[key], value, f"`{key}`") for key, value in content.items()})


def _to_value(kind: Any, value: object, name: str) -> Any:
    if isinstance(kind, types.UnionType):  # with None
        return None if value is None else _to_value(typing.get_args(kind)[0], value, name)
    if dataclasses.is_dataclass(kind):
        return _to_dataclass(typing.cast(type, kind), value, name)
    if typing.get_origin(kind) is tuple and isinstance(value, list):
        return tuple(_to_value(typing.get_args(kind)[0], entry, name) for entry in value)
    if kind is float and value is None:
        return math.nan
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is float and is_number and math.isfinite(typing.cast(float, value)):
        return float(typing.cast(float, value))
    if kind in (int, str) and type(value) is kind:
        return value
    raise ValueError(f"{name} must be {kind.__name__ if isinstance(kind, type) else kind}; found {_shorten(value)}")


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
