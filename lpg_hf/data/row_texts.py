"""What a table can show of training rows: their texts, the names of their files, or their decoded tokens."""

from collections.abc import Mapping, Sequence
from typing import Any

import datasets

from ..safe_text import encodable, snippet


TEXT, FILE, TOKENS = "text", "file", "tokens"


def is_text(feature: object) -> bool:
    """Whether a column, of which the feature may be unknown (`None`), can hold texts."""
    return feature is None or (isinstance(feature, datasets.Value) and "string" in feature.dtype)


def row_texts(dataset: object, rows: Sequence[int], tokenizer: Any = None) -> tuple[str, list[str]] | None:
    """
    The beginning of the text of some rows. No image or recording is decoded, and no transform runs.

    Args:
        dataset: The training set: a `datasets.Dataset`, or dicts in a list.
        rows (`Sequence[int]`): The indices of the rows.
        tokenizer (*optional*): Decodes rows that have nothing but `input_ids`, if it has a method `decode`.

    Returns:
        `tuple[str, list[str]]` or `None`: What the texts are, and one for each row: `"text"` (the longest of the
        row's strings, those of label columns among them), `"file"` (the path of its image or recording) or `"tokens"`.
        `None` if the rows have nothing of it.

    Example:

    ```python
    >>> row_texts(datasets.Dataset.from_dict({"text": ["one\\ntwo", "three"], "label": [0, 1]}), [1, 0])
    ('text', ['three', 'one two'])

    ```
    """
    if len(rows) == 0:
        return None
    texts = [snippet(max(strings, key=len, default="")) for strings in row_strings(dataset, rows)]
    if any(texts):
        return TEXT, list(map(encodable, texts))
    if not isinstance(dataset, datasets.Dataset):
        return None
    plain = dataset.with_format(None)
    for name, feature in plain.features.items():
        if isinstance(feature, datasets.Audio | datasets.Image):
            files = plain.select_columns([name]).cast_column(name, type(feature)(decode=False)).select(rows)[name]
            paths = [(file or {}).get("path") or "" for file in files]
            return (FILE, list(map(encodable, paths))) if any(paths) else None
    if hasattr(tokenizer, "decode") and "input_ids" in plain.column_names:
        tokens = plain.select_columns(["input_ids"]).select(rows)["input_ids"]
        return TOKENS, [encodable(snippet(tokenizer.decode(ids, skip_special_tokens=True))) for ids in tokens]
    return None


def row_strings(dataset: object, rows: Sequence[int]) -> list[list[str]]:
    """All strings of some rows, in the order of the rows."""
    if isinstance(dataset, datasets.Dataset):
        columns = [name for name, feature in dataset.features.items() if is_text(feature)]
        if not columns:
            return [[] for _ in rows]
        # One read of the arrow table for all rows.
        found = dataset.with_format(None).select_columns(columns).select(rows)[:]
        return [[text for text in line if text is not None] for line in zip(*found.values(), strict=True)]
    if isinstance(dataset, list | tuple):
        items = [dataset[row] for row in rows]
        return [_strings(item) for item in items]
    return [[] for _ in rows]


def _strings(item: object) -> list[str]:
    return [value for value in item.values() if isinstance(value, str)] if isinstance(item, Mapping) else []
