"""
The CSV file of the label issues: written for a spreadsheet, where a person fills the column `fix`, and read again.

Class names and texts in it are no formulas, and files of millions of rows take seconds.
"""

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from ..safe_text import encodable, restored_cell, shown, spreadsheet_cell
from ..whole_files import replacing
from .class_cells import ClassCells
from .row_texts import row_texts


FIX, ROW, LABEL, LABEL_NAME = "fix", "row", "label", "label_name"
SUGGESTED, SUGGESTED_NAME = "suggested_label", "suggested_label_name"
# As many rows of the label issues are in memory at once.
CHUNK_ROWS = 100_000
# The most doubtful rows have their text next to them. Nobody reads more.
TEXT_ROWS = 1_000
# Spreadsheets of many countries write semicolons.
DELIMITERS = ",;\t"
# Without it, Excel does not read the file as UTF-8.
BYTE_ORDER_MARK = "\ufeff"


@dataclass(frozen=True)
class IssueTable:
    """
    Label issues as lines of a CSV file.

    Attributes:
        issues (`datasets.Dataset`): The table of [`LPGTrainer.label_issues`].
        texts (`tuple[str, list[str]]`, *optional*): What [`row_texts`] says of the first rows of `issues`.
    """

    issues: Dataset
    texts: tuple[str, list[str]] | None = None

    @property
    def _others(self) -> list[str]:
        known = (ROW, LABEL, SUGGESTED, "score")
        return [name for name in self.issues.column_names if name not in known]

    @property
    def header(self) -> list[str]:
        texts = [] if self.texts is None else [self.texts[0]]
        return [FIX, ROW, "score", LABEL_NAME, SUGGESTED_NAME, *texts, LABEL, SUGGESTED, *self._others]

    def lines(self, num_rows: int | None = None) -> Iterator[tuple[Any, ...]]:
        """
        The cells of each line, with an empty cell for the fix.

        Args:
            num_rows (`int`, *optional*): How many of the most doubtful rows. Defaults to all.
        """
        # A loop over the data set makes a dict of each row, which takes a hundred times as long.
        names = [spreadsheet_cell(encodable(name)) for name in self.issues.features[LABEL].names]
        texts = [] if self.texts is None else list(map(spreadsheet_cell, self.texts[1]))
        tables, stop = self.issues.with_format("arrow"), len(self.issues)
        stop = stop if num_rows is None else min(stop, num_rows)
        for start in range(0, stop, CHUNK_ROWS):
            size = min(CHUNK_ROWS, stop - start)
            table = tables[start : start + size]
            columns = {name: table.column(name).to_numpy().tolist() for name in table.column_names}
            labels, suggested = columns[LABEL], columns[SUGGESTED]
            cells: list[Iterable[Any]] = [[""] * size, columns[ROW], columns["score"]]
            cells += [[names[label] for label in labels], [names[label] for label in suggested]]
            if self.texts is not None:
                own = texts[start : start + size]
                cells.append(own + [""] * (size - len(own)))
            yield from zip(*cells, labels, suggested, *(columns[name] for name in self._others), strict=True)


def write_issues(issues: Dataset, path: str | Path, train_dataset: object = None, tokenizer: object = None) -> None:
    """
    Writes label issues to a CSV file in which a person corrects the labels.

    The first column, `fix`, is empty. In it the name of a class (or its number, `#3`) is the new label, the word
    `drop` removes the row, and an empty cell keeps the label. [`apply_fixes`] reads the file. Other columns may be
    left as they are, and lines may be sorted or removed.

    Args:
        issues (`datasets.Dataset`): The table of [`LPGTrainer.label_issues`], or some lines of it.
        path (`str` or `Path`): The file. One of label issues without a fix is replaced.
        train_dataset (*optional*):
            The training set. The first 1,000 lines then have the beginning of the row's text, or the path of its file.
        tokenizer (*optional*): Decodes rows that have nothing but tokens.

    Raises:
        ValueError: If there is a file with fixes, or one of something else, or `issues` has a column `fix`.

    Example:

    ```python
    >>> from pathlib import Path
    >>> from tempfile import mkdtemp
    >>> from datasets import ClassLabel, Dataset, Features, Value
    >>> from lpg_hf.data import write_issues

    >>> label = ClassLabel(names=["bad", "good"])
    >>> types = {"row": Value("int64"), "label": label, "suggested_label": label, "score": Value("float64")}
    >>> lines = {"row": [2], "label": [1], "suggested_label": [0], "score": [0.75]}
    >>> texts = [{"text": text} for text in ("fine", "nice", "=dull")]
    >>> path = Path(mkdtemp()) / "issues.csv"
    >>> write_issues(Dataset.from_dict(lines, features=Features(types)), path, texts)
    >>> print(path.read_text(encoding="utf-8-sig").strip())
    fix,row,score,label_name,suggested_label_name,text,label,suggested_label
    ,2,0.75,good,bad,'=dull,1,0

    ```
    """
    if FIX in issues.column_names:
        raise ValueError(f"issues has a column {FIX!r} already. Pass issues to `apply_fixes`, or remove the column.")
    check_replaceable(path)
    rows = issues[:TEXT_ROWS][ROW] if train_dataset is not None else []
    write_table(IssueTable(issues, row_texts(train_dataset, rows, tokenizer)), path)


def write_table(table: IssueTable, path: str | Path) -> None:
    """Writes the file of [`write_issues`]."""
    with replacing(path) as new, new.open("w", newline="", encoding="utf-8") as file:
        file.write(BYTE_ORDER_MARK)
        writer = csv.writer(file)
        writer.writerow(map(spreadsheet_cell, table.header))
        writer.writerows(table.lines())


def check_replaceable(path: str | Path) -> None:
    """
    Raises:
        ValueError: If there is a file, and it has fixes, or is none of label issues. If there is something else.
    """
    if not Path(path).exists():
        return
    if not Path(path).is_file():  # reading a pipe or a terminal would wait for somebody who writes
        raise ValueError(f"{path} is no file. Choose another path.")
    try:
        has_fixes = any(line.get(FIX, "").strip() for line in read_table(path))
    except ValueError as error:
        raise ValueError(f"{path} exists and holds no label issues. Choose another path.") from error
    if has_fixes:
        raise ValueError(f"{path} has fixes that would be lost. Choose another path.")


def table_texts(table: IssueTable, num_rows: int, by_number: bool) -> dict[str, Any]:
    """
    What a page needs to write the first lines of the file itself: it puts a fix in front of a line, and joins them.

    Args:
        table ([`IssueTable`]): The label issues.
        num_rows (`int`): How many of them the page has.
        by_number (`bool`): Whether fixes are numbers of classes, for data sets that do not know the names.

    Returns:
        `dict`: The text of the `header`, the text after the fix of each of the `lines`, the text of the fix for each
        of the `classes` and for `drop`, and the `names` of the classes for a person.
    """
    cells = ClassCells(table.issues.features[LABEL].names)
    names = [f"#{label}" if by_number else cells.write(label) for label in range(len(cells.names))]
    return {
        "header": BYTE_ORDER_MARK + _line(list(map(spreadsheet_cell, table.header))),
        "lines": [_line(line) for line in table.lines(num_rows)],
        "classes": [_line([spreadsheet_cell(name)]).removesuffix("\r\n") for name in names],
        "drop": cells.drop,
        "names": list(map(shown, cells.names)),
    }


def _line(cells: Sequence[Any]) -> str:
    buffer = io.StringIO(newline="")
    csv.writer(buffer).writerow(cells)
    return buffer.getvalue()


def read_table(path: str | Path) -> list[dict[str, str]]:
    """
    Reads a CSV file of label issues that a spreadsheet may have written anew.

    Args:
        path (`str` or `Path`): The file, in UTF-8, with commas, semicolons or tabs between the cells.

    Returns:
        `list[dict[str, str]]`: The cells of each line by their column. Empty lines are `{}`.

    Raises:
        ValueError: If it is no such file; if it has no column `row` or `fix`; if a line has more cells than columns.
        FileNotFoundError: If there is no file.
    """
    text = _decoded(path)
    for delimiter in DELIMITERS:
        # Strict: else a quotation mark that is never closed would swallow the rest of the file.
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        try:
            header = [cell.strip().casefold() for cell in next(reader, [])]
        except csv.Error:
            continue
        if {ROW, FIX} <= set(header):
            try:
                return [_named(path, number, header, record) for number, record in enumerate(reader, start=2)]
            except csv.Error as error:
                raise ValueError(
                    f"{path} cannot be read after line {reader.line_num}: {error}. Is there a quotation mark "
                    "without its partner?"
                ) from error
    first = text.partition("\n")[0][:200]
    raise ValueError(
        f"{path} has no columns {ROW!r} and {FIX!r} in its first line, which is {first!r}. Pass a file that "
        "`write_issues` or the report has written. If a spreadsheet shows all of a line in one cell, open the file "
        "with its import for texts, and choose the comma."
    )


def _named(path: str | Path, number: int, header: list[str], record: list[str]) -> dict[str, str]:
    if not any(cell.strip() for cell in record):
        return {}
    if any(cell.strip() for cell in record[len(header) :]):
        raise ValueError(
            f"{path}, line {number}: there are {len(record)} cells, but {len(header)} columns. A text with a "
            "delimiter in it needs quotes around it."
        )
    cells = record + [""] * (len(header) - len(record))
    return {name: restored_cell(cell) for name, cell in zip(header, cells, strict=False) if name}


def _decoded(path: str | Path) -> str:
    content = Path(path).read_bytes()
    cure = "Save it as `CSV UTF-8 (comma delimited)`, or as text CSV with the character set UTF-8."
    if content.startswith(b"PK"):
        raise ValueError(f"{path} is a workbook or another archive, not a CSV file. {cure}")
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError(f"{path} is encoded as UTF-16. {cure}")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not encoded as UTF-8: the byte {content[error.start]:#x} at position {error.start} has no "
            f"meaning in it. {cure}"
        ) from error
