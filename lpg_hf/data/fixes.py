"""Corrects the labels of a dataset by the fixes that a person has written next to its label issues."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike

import datasets
import numpy as np

from .fix_checks import check_labels, check_rows, check_texts
from .fix_lines import FixLine, read_lines
from .label_column import with_labels
from .label_values import DROPPED, NO_CLASS, LabelValues
from .labels import resolve_label_column


logger = logging.getLogger(__name__)


def apply_fixes(
    dataset: datasets.Dataset,
    fixes: str | PathLike[str] | Iterable[Mapping[str, object]],
    label_column: str | None = None,
) -> datasets.Dataset:
    """
    Corrects labels, and removes rows, as a person has written it next to the label issues.

    Every line has the index of its row, the label that the row had, and a `fix`:

    - empty (in Python also `None` or NaN): the label is right;
    - the name of a class, or its number as `#3`: the right label. A plain number counts, too, unless classes are
      called by numbers. In Python an integer is the number of a class;
    - `drop`: the row is removed. If a class is called `drop`, `#drop` removes the row.

    All lines are compared with the data, those without a fix as well: labels, and texts where both have them. All rows
    and feature types are kept, and so are the format and the transform. Where labels change, a shuffled or selected
    dataset is written out in its order, as by `Dataset.add_column`.

    Args:
        dataset (`datasets.Dataset`):
            The training set that the issues were found in, with the same rows in the same order.
        fixes (`str`, `PathLike` or `Iterable[Mapping]`):
            A CSV file that [`write_issues`] or the report has written, with a filled column `fix`; or its lines: dicts
            with the keys `row`, `label` and `fix`. Spreadsheets may have changed delimiter, order and number of lines.
        label_column (`str`, *optional*):
            The column of the labels: of the type `ClassLabel`, integers (as `[N]` or `[N, 1]`), or strings. Defaults
            to the result of [`find_label_column`].

    Returns:
        `datasets.Dataset`: A new dataset with the corrected labels, without the rows that were dropped. How many these
        are is logged at the level INFO.

    Raises:
        ValueError: If a fix is no class, or may be more than one. If a row is out of range, or has two different
            fixes. If labels or texts are not those of the data, because it is other data, has lost or moved rows, or
            has these fixes already. If the file cannot be read, or no row would be left.
        FileNotFoundError: If there is no such file.
        TypeError: If `dataset` is no `datasets.Dataset`, or `fixes` neither a path nor lines.

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from lpg_hf.data import apply_fixes

    >>> dataset = Dataset.from_dict({"text": ["so good", "so bad", "???"], "label": ["bad", "bad", "good"]})
    >>> fixes = [{"row": 0, "label": "bad", "fix": "good"}, {"row": 2, "label": "good", "fix": "drop"}]
    >>> apply_fixes(dataset, fixes).to_dict()
    {'text': ['so good', 'so bad'], 'label': ['good', 'bad']}

    ```
    """
    column = resolve_label_column(dataset, label_column)
    lines = read_lines(fixes)
    check_rows(lines, len(dataset))
    values = LabelValues(dataset, column, _known_names(lines))
    positions = [_position(line, values) for line in lines]
    check_labels(lines, positions, values, column)
    check_texts(lines, dataset, column)

    new = _by_row(lines, positions)
    changed = {row: position for row, position in new.items() if position not in (DROPPED, values.classes[row])}
    dropped = [row for row, position in new.items() if position == DROPPED]
    _tell(len(lines), changed, dropped, values)
    if len(dropped) == len(dataset):
        raise ValueError(f"The fixes drop all {len(dataset)} rows of the dataset. Keep some.")
    result = with_labels(dataset, column, values.with_classes(changed)) if changed else dataset
    return result.select(np.setdiff1d(np.arange(len(dataset)), dropped))


def _known_names(lines: Sequence[FixLine]) -> dict[int, str]:
    """Names of classes by their number, from lines that have both."""
    names: dict[int, str] = {}
    for line in lines:
        own = [(line.label, line.label_name)] if line.label_name is not None and isinstance(line.label, int) else []
        for number, name in [*own, *([line.suggested] if line.suggested is not None else [])]:
            if names.setdefault(number, name) != name:
                raise ValueError(
                    f"{line.place}: class {number} is called {name!r}, but {names[number]!r} in a line before. "
                    "Write new labels into the column 'fix', and leave the other columns as they are."
                )
    return names


def _position(line: FixLine, values: LabelValues) -> int | None:
    """The position of the class that a fix means, `DROPPED`, or `None` to keep the label."""
    if line.fix is None:
        return None
    if isinstance(line.fix, int):
        position = values.cells.at_number(line.fix)
        if position is None:
            raise ValueError(
                f"{line.place}: the fix {line.fix} is no number of a class. {values.cells.what_there_is()}"
            )
        return position
    if values.cells.is_drop(line.fix):
        return DROPPED
    try:
        return values.cells.read(line.fix)
    except ValueError as error:
        raise ValueError(f"{line.place}: the fix {error}") from error


def _by_row(lines: Sequence[FixLine], positions: Sequence[int | None]) -> dict[int, int]:
    new: dict[int, int] = {}
    first: dict[int, FixLine] = {}
    for line, position in zip(lines, positions, strict=True):
        if position is None:
            continue
        if new.setdefault(line.row, position) != position:
            other = first[line.row]
            raise ValueError(
                f"{line.place}: row {line.row} gets the fix {line.fix!r}, but {other.fix!r} in {other.place}. Leave "
                "one."
            )
        first.setdefault(line.row, line)
    return new


def _tell(num_lines: int, changed: Mapping[int, int], dropped: Sequence[int], values: LabelValues) -> None:
    if not changed and not dropped:
        logger.warning(f"None of the {num_lines} lines changes a label or drops a row: is the column 'fix' empty?")
        return
    logger.info(f"{num_lines} lines of fixes: {len(changed)} labels changed, {len(dropped)} rows dropped.")
    after = values.classes.copy()
    after[list(changed)] = list(changed.values())
    lost = set(values.classes.tolist()) - set(np.delete(after, dropped).tolist()) - {NO_CLASS}
    if lost:
        names = ", ".join(repr(values.cells.names[position]) for position in sorted(lost))
        logger.warning(f"The fixes leave no row with the label {names}.")
