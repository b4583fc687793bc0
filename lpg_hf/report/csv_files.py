"""The CSV files of the report. Class names in them are no formulas."""

import csv
import itertools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data.issues_csv import IssueTable, check_replaceable, write_table
from ..safe_text import spreadsheet_cell


logger = logging.getLogger(__name__)


def write_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Writes lines with the same columns. Without lines there is no file, and that of an earlier report is removed."""
    path.unlink(missing_ok=True)
    if not lines:
        return
    # A lone surrogate has no bytes in UTF-8.
    with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.writer(file)
        writer.writerow(map(spreadsheet_cell, lines[0]))
        writer.writerows(map(spreadsheet_cell, line.values()) for line in lines)


def write_issues_of(table: IssueTable | None, path: Path) -> None:
    """
    Writes the label issues. Without any there is no file, and that of an earlier report is removed.

    If somebody has written fixes into that one, it is kept under another name.
    """
    try:
        check_replaceable(path)
        path.unlink(missing_ok=True)
    except ValueError:
        free = (path.with_suffix(f".old{number}.csv") for number in itertools.count(1))
        kept = next(name for name in free if not name.exists())
        path.replace(kept)
        logger.warning(f"{path} was not written by a report, or has fixes. It is kept as {kept}.")
    if table is not None:
        write_table(table, path)
