"""Whether lines of fixes belong to a dataset: its rows, their labels, and their texts."""

from collections.abc import Sequence

import datasets

from ..safe_text import encodable, shown, snippet
from .fix_lines import FixLine
from .label_values import LabelValues, named
from .row_texts import row_strings


SHOWN_LINES = 3
# Shorter texts may be a number or a date that a spreadsheet writes in another way.
FEWEST_LETTERS = 6


class OtherRowsError(ValueError):
    """
    The rows of fixes are not those of the dataset.

    Attributes:
        problem (`str`): How that shows.
        otherwise (`str`): What to do if the rows are the right ones, or nothing.
    """

    def __init__(self, problem: str, otherwise: str = "", column: str | None = None):
        compared = "" if column is None else f" Labels were compared with column {column!r}."
        super().__init__(
            f"{problem}{compared} The fixes belong to other data, or rows were dropped, moved or relabeled since. "
            f"Pass the training set that the issues were found in. {otherwise}".rstrip()
        )
        self.problem = problem
        self.otherwise = otherwise


def check_rows(lines: Sequence[FixLine], num_rows: int) -> None:
    """
    Raises:
        OtherRowsError: If a row is not one of the dataset.
    """
    for line in lines:
        if line.row >= num_rows:
            raise OtherRowsError(
                f"{line.place}: row {line.row} is out of range, since the dataset has {num_rows} rows, 0 to "
                f"{num_rows - 1}."
            )


def check_labels(lines: Sequence[FixLine], positions: Sequence[int | None], values: LabelValues, column: str) -> None:
    """
    Compares the labels of all lines with those of the dataset.

    Args:
        lines (`Sequence[FixLine]`): The lines, with rows in range.
        positions (`Sequence[int | None]`): The class that each fix means; `None` without a fix.
        values ([`LabelValues`]): The labels of the dataset.
        column (`str`): Its label column.

    Raises:
        OtherRowsError: If they differ.
        ValueError: If they differ since the fixes are in the data already.
    """
    different = [(line, fix) for line, fix in zip(lines, positions, strict=True) if not _has_label(line, values)]
    if not different:
        return
    examples = "; ".join(
        f"{line.place}: row {line.row} was {_claim(line)}, and is {values.shown(line.row)}"
        for line, _ in different[:SHOWN_LINES]
    )
    problem = f"{len(different)} of {len(lines)} lines have another label than the dataset ({examples})."
    if all(fix == values.classes[line.row] for line, fix in different):
        raise ValueError(
            f"{problem} Their fixes are in the data already: pass the data as they were, or remove these lines."
        )
    raise OtherRowsError(problem, "If you have relabeled these rows yourself, remove their lines.", column)


def _has_label(line: FixLine, values: LabelValues) -> bool:
    """Whether the row has the label of its line. Where number and name are known, both must agree."""
    claims = []
    if isinstance(line.label, int):
        claims.append(values.cells.at_number(line.label))
    name = line.label if isinstance(line.label, str) else line.label_name
    if name is not None:
        try:
            claims.append(values.cells.read(name))
        except ValueError:  # a name that a spreadsheet has changed; its number tells
            claims.append(None)
    known = [claim for claim in claims if claim is not None]
    return bool(known) and all(claim == values.classes[line.row] for claim in known)


def _claim(line: FixLine) -> str:
    if line.label_name is None:
        return repr(line.label)
    return named(line.label_name, line.label if isinstance(line.label, int) else None)


def check_texts(lines: Sequence[FixLine], dataset: datasets.Dataset, label_column: str) -> None:
    """
    Compares the texts of all lines with those of the dataset, letter by letter.

    Args:
        lines (`Sequence[FixLine]`): The lines, with rows in range.
        dataset (`datasets.Dataset`): The dataset. Without texts there is nothing to compare.
        label_column (`str`): Its label column, which holds no texts.

    Raises:
        OtherRowsError: If they differ.
    """
    lines = [line for line in lines if len(_letters(line.text)) >= FEWEST_LETTERS]
    others = dataset.select_columns([name for name in dataset.column_names if name != label_column])
    found = row_strings(others, [line.row for line in lines])
    different = [
        (line, texts)
        for line, texts in zip(lines, found, strict=True)
        if texts and _letters(line.text) not in [_letters(encodable(snippet(text))) for text in texts]
    ]
    if different:
        line, texts = different[0]
        raise OtherRowsError(
            f"{len(different)} of {len(lines)} lines have another text than the dataset ({line.place}: row "
            f"{line.row} was {shown(line.text)!r}, and is {shown(max(texts, key=len))!r}).",
            "If you have changed the texts yourself, or a spreadsheet has lost their letters, remove the column "
            "'text'.",
        )


def _letters(text: str) -> str:
    """What a spreadsheet leaves as it is."""
    return "".join(filter(str.isalpha, text)).casefold()
