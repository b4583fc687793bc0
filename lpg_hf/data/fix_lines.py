"""Lines of label issues with their fixes, from a CSV file or from Python, before any dataset is looked at."""

import math
import numbers
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from os import PathLike

from .issues_csv import FIX, LABEL, LABEL_NAME, ROW, SUGGESTED, SUGGESTED_NAME, read_table
from .row_texts import TEXT


# Spreadsheets and data frames write whole numbers as 3.0. Longer fractions may be thousands.
_WHOLE = re.compile(r"([0-9]+)(?:[.,]0{1,2})?")


@dataclass(frozen=True)
class FixLine:
    """
    What a line says of its row.

    Attributes:
        place (`str`): Where it stands, for messages.
        row (`int`): The index of the row in the training set.
        fix (`int` or `str`, *optional*): The number of a class, or the text of a cell. `None` keeps the label.
        label (`int` or `str`): The label at the time of the issue: its number, or the text of a cell.
        label_name (`str`, *optional*): Its name next to its number.
        suggested (`tuple[int, str]`, *optional*): Number and name of the suggested class.
        text (`str`): The beginning of the text of the row; may be empty.
    """

    place: str
    row: int
    fix: int | str | None
    label: int | str
    label_name: str | None
    suggested: tuple[int, str] | None
    text: str


def read_lines(fixes: str | PathLike[str] | Iterable[Mapping[str, object]]) -> list[FixLine]:
    """
    Reads and checks the lines.

    Args:
        fixes (`str`, `PathLike` or `Iterable[Mapping]`): The path of a CSV file, or a mapping for each line.

    Raises:
        TypeError: If `fixes` is something else.
        ValueError: If a line has no row, no label or a fix that is neither text nor a whole number.
    """
    if isinstance(fixes, str | PathLike):
        table = enumerate(read_table(str(fixes)), start=2)  # as spreadsheets count, below the names of the columns
        return [_fix_line(f"{fixes}, line {number}", line) for number, line in table if line]
    lines = list(fixes) if isinstance(fixes, Iterable) else [fixes]
    if isinstance(fixes, Mapping) or not all(isinstance(line, Mapping) for line in lines):
        raise TypeError(
            f"fixes is a {type(fixes).__name__}, but must be the path of a CSV file, or dicts in a list. Of a data "
            "frame of pandas take `to_dict('records')`."
        )
    return [_fix_line(f"fixes[{number}]", line) for number, line in enumerate(lines)]


def _fix_line(place: str, line: Mapping[str, object]) -> FixLine:
    for column in (ROW, FIX):
        if column not in line:
            raise ValueError(f"{place} has no {column!r}, but only {', '.join(map(repr, line))}. Add it.")
    row = _whole(line[ROW])
    if row is None:
        raise ValueError(
            f"{place}: the row is {line[ROW]!r}, but must be a whole number, the index of a row of the training set."
        )
    name = line.get(LABEL_NAME)
    # Next to a name stands a number, also where it is read as text.
    label: int | str | None = None if name is None else _whole(line.get(LABEL))
    if label is None:
        label = _cell(line.get(LABEL) if name is None else name, place)
    if label is None:
        raise ValueError(
            f"{place} does not say the label of row {row}, without which nobody can tell whether it is the same row "
            f"of the same data. Keep the columns {LABEL!r} and {LABEL_NAME!r} of the issues."
        )
    suggested, suggested_name = _whole(line.get(SUGGESTED)), line.get(SUGGESTED_NAME)
    return FixLine(
        place,
        row,
        _cell(line[FIX], place),
        label,
        name if isinstance(name, str) else None,
        (suggested, suggested_name) if suggested is not None and isinstance(suggested_name, str) else None,
        text if isinstance(text := line.get(TEXT), str) else "",
    )


def _cell(value: object, place: str) -> int | str | None:
    """A number of a class or a text; `None` for an empty cell."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    if isinstance(value, float):  # a cell that a data frame has read
        return str(value)
    if isinstance(value, str):
        return value if value.strip() else None
    raise ValueError(
        f"{place} has the fix or label {value!r}, but it must be a text or a whole number: the name or the number "
        "of a class, 'drop', or nothing."
    )


def _whole(value: object) -> int | None:
    if isinstance(value, bool) or not isinstance(value, str | numbers.Real):
        return None
    match = _WHOLE.fullmatch(str(value).strip())
    return None if match is None else int(match[1])
