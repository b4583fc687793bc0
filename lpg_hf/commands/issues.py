"""`lpg-hf issues OUT`: the rows of a training whose labels are most likely wrong."""

from argparse import ArgumentParser
from contextlib import suppress
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

from ..safe_text import one_line
from .writable import why_not_writable


# Columns of the file that a terminal has room for, those of them that it has, and how wide each may be.
SHOWN = {"row": 12, "score": 5, "label_name": 24, "suggested_label_name": 24, "text": 60, "file": 60, "tokens": 60}


def table(path: Path, number: int) -> str:
    """
    The first lines of a CSV file of label issues as a table of text. A spreadsheet may have written the file anew.

    Args:
        path (`Path`): The file.
        number (`int`): Of rows.
    """
    # A help shall not wait for torch, here and below.
    from ..data.issues_csv import read_table

    rows = list(islice(filter(None, read_table(path)), number))
    columns = [column for column in SHOWN if rows and column in rows[0]]
    lines = [columns, *([cut(column, row[column]) for column in columns] for row in rows)]
    widths = [max(len(line[position]) for line in lines) for position in range(len(columns))]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def cut(column: str, cell: str) -> str:
    text, widest = one_line(cell), SHOWN[column]
    if column == "score":
        with suppress(ValueError):  # spreadsheets of many countries write a comma, and may write percent
            text = f"{float(text.replace(',', '.')):.3f}"
    return text if len(text) <= widest else f"{text[: widest - 1]}…"


def main(argv: list[str]) -> None:
    parser = ArgumentParser(
        "lpg-hf issues",
        description="Shows the training rows whose labels are most likely wrong, the most doubtful first, with the "
        "label that the training believed more. Rows are counted from 0 in the data that it trained on.",
        allow_abbrev=False,
    )
    parser.add_argument("folder", metavar="OUT", help="--output_dir of a training")
    parser.add_argument("--number", type=int, default=20, help="rows that are shown (default: 20)")
    parser.add_argument("--export", type=Path, metavar="issues.csv", help="write all rows to this file")
    arguments = parser.parse_args(argv)
    if arguments.number < 0:
        parser.error(f"--number is {arguments.number}, but must be at least 0")
    path = arguments.export
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        wrong = "is a folder" if path.is_dir() else f"cannot be written: there is no folder {path.parent}"
        parser.error(f"--export is {path}, which {wrong}")
    if path is not None and (problem := why_not_writable(path.parent)):
        parser.error(f"--export is {path}, {problem}")
    from ..trainer import export_issues
    from .run_files import folder_of_issues

    source = folder_of_issues(arguments.folder)
    with TemporaryDirectory() as folder:
        copy = Path(folder, "issues.csv")
        export_issues(source, copy)
        print(table(copy, arguments.number))
    if path is not None:
        number = export_issues(source, path)
        print(
            f"\n{number} rows: {path}. Write the right label of a row, or `drop`, into its column `fix`. "
            f"Then train again with the same arguments and --fixes {path}. After a script of your own, "
            "give the file to lpg_hf.data.apply_fixes with the training set."
        )
