"""Files that are there as a whole or not at all, and the message for one that is not what it should be."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """
    A file to write in the place of another, which it replaces at once when the block ends. A process that is killed in
    between leaves the other as it was.

    Args:
        path (`str` or `Path`): The file. A link is followed. What is no file, such as a pipe, is written as it is.

    Example:

    ```python
    >>> from tempfile import mkdtemp
    >>> path = Path(mkdtemp()) / "lines.txt"
    >>> with replacing(path) as new:
    ...     _ = new.write_text("a line", encoding="utf-8")
    ...     path.exists()
    False
    >>> path.read_text(encoding="utf-8")
    'a line'

    ```
    """
    target = Path(path).resolve()
    if target.exists() and not target.is_file():
        yield target
        return
    # Uploads to the Hub leave files out that begin with an underscore, as what a killed process has left.
    new = target.with_name(f"_{target.name}.new")
    try:
        yield new
        new.replace(target)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def write_json_object(path: str | Path, entries: Mapping[str, Any], indent: int = 2, sort_keys: bool = False) -> None:
    """Writes a JSON object in the place of what is there."""
    with replacing(path) as new:
        text = json.dumps(entries, indent=indent, sort_keys=sort_keys)
        new.write_text(text + "\n", encoding="utf-8")


def read_json_object(path: str | Path, cure: str) -> dict[str, Any]:
    """
    Reads a JSON object.

    Args:
        path (`str` or `Path`): The file.
        cure (`str`): A sentence that says what to do if it is none.

    Raises:
        OSError: If there is no such file.
        ValueError: If it is cut off, or something else.
    """
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, or one that never ends
        raise ValueError(f"{path} is no whole JSON file: {error}. {cure}") from error
    if not isinstance(entries, dict):
        raise ValueError(f"{path} holds a {type(entries).__name__}, but must hold named entries. {cure}")
    return entries
