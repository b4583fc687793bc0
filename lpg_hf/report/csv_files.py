"""The CSV files of the report. Class names in them are no formulas, and files of millions of rows take seconds."""

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from ..safe_text import spreadsheet_cell


# As many rows of the label issues are in memory at once.
CHUNK_ROWS = 100_000
NAMED_COLUMNS = ("label", "suggested_label")


def write_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Writes lines with the same columns. Without lines there is no file, and that of an earlier report is removed."""
    rows = (map(spreadsheet_cell, line.values()) for line in lines)
    _write(path, list(lines[0]) if lines else [], rows)


def write_issues(path: Path, issues: Dataset | None) -> None:
    """Writes the table of label issues, with the name of each class next to its number."""
    if issues is None or len(issues) == 0:
        _write(path, [], [])
        return
    others = [name for name in issues.column_names if name not in ("row", *NAMED_COLUMNS)]
    header = ["row", "label", "label_name", "suggested_label", "suggested_label_name", *others]
    _write(path, header, _issue_rows(issues, others))


def _issue_rows(issues: Dataset, others: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    # A loop over the data set makes a dict of each row, which takes a hundred times as long.
    names = [spreadsheet_cell(name) for name in issues.features["label"].names]
    tables = issues.with_format("arrow")
    for start in range(0, len(issues), CHUNK_ROWS):
        table = tables[start : start + CHUNK_ROWS]
        columns = {name: table.column(name).to_numpy().tolist() for name in table.column_names}
        named = [[columns[name], [names[label] for label in columns[name]]] for name in NAMED_COLUMNS]
        yield from zip(columns["row"], *named[0], *named[1], *(columns[name] for name in others), strict=True)


def _write(path: Path, header: Sequence[str], rows: Iterable[Iterable[Any]]) -> None:
    path.unlink(missing_ok=True)
    if not header:
        return
    # A lone surrogate has no bytes in UTF-8.
    with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.writer(file)
        writer.writerow(map(spreadsheet_cell, header))
        writer.writerows(rows)
