"""Checks that the rows of a certificate set are independent of each other and of the prior."""

from collections.abc import Sequence, Sized

from datasets import Dataset
from transformers.utils import logging

from ..data import CLEAN_LABEL_COLUMN, LABEL_COLUMNS
from .fingerprints import half_precisions, stored_fingerprints
from .loading import FingerprintingCollator, MapStyleDataset, Reading
from .near_copies import find_near_copies, find_near_copies_within
from .sketches import Sketch, find_close


logger = logging.get_logger(__name__)

_SHOWN = 5


def check_independent_rows(
    collator: FingerprintingCollator, dataset: MapStyleDataset, prior_dataset: MapStyleDataset | None
) -> int | None:
    """
    Refuses copies within the certificate set, and rows that the certificate set shares with the prior's data.

    Args:
        collator ([`FingerprintingCollator`]): It has seen all rows of the certificate set once.
        dataset: The certificate set.
        prior_dataset (*optional*): The rows that the prior was trained on.

    Returns:
        `int`, *optional*: Number of rows that are near copies of one of the prior's, by their texts or numbers. `None`
            if there is no data set of the prior, or nothing to compare.

    Raises:
        ValueError: If there is a copy, the two data sets have different input columns, or the prior's rows change
            from one reading to the next.
    """
    inputs = set(collator.inputs)
    num_copies = len(collator.inputs) - len(inputs)
    if num_copies:
        raise ValueError(
            f"{num_copies} rows of `dataset` have the inputs of another row, so they are not independent. Use "
            "`split_for_certificate(dataset, columns=[...])` with the columns that the model reads, which keeps one "
            "row of each."
        )
    _warn_of_near_copies_within(collator, dataset)
    if prior_dataset is None:
        return None
    if not isinstance(prior_dataset, Sized):
        raise ValueError(
            "`prior_dataset` must be map-style (with a length, and rows by number), because it is read twice in the "
            f"same order; found {type(prior_dataset).__name__}. Load a stream into a `datasets.Dataset` first."
        )
    if len(prior_dataset) == 0:
        return 0
    prior_columns = collator.input_columns(prior_dataset[0])
    if prior_columns != collator.seen_columns:
        raise ValueError(
            f"The rows of `prior_dataset` have the inputs {sorted(prior_columns)}, but the rows of `dataset` have "
            f"{sorted(collator.seen_columns)}, so they cannot be compared. Preprocess both for the model."
        )
    num_shared, prior_sketches = _count_shared_rows(collator, inputs, dataset, prior_dataset)
    if num_shared:
        raise ValueError(
            f"{num_shared} rows of `prior_dataset` have the inputs of a row of `dataset`, so the prior has seen rows "
            "of the certificate set. Split with `split_for_certificate`, which leaves copies out."
        )
    return _count_near_copies(collator, prior_sketches, dataset, prior_dataset)


def check_same_reading(before: Reading, after: Reading) -> None:
    """Refuses a certificate set whose rows or batches changed from one reading to the next."""
    _check_same_rows(before.rows, after.rows, "dataset")
    if before.batches != after.batches:
        raise ValueError(
            "`data_collator` made other batches of the same rows of `dataset` when they were read again, because it "
            "augments or draws at random. Certify with a collator that does not."
        )


def _check_same_rows(before: Sequence[str], after: Sequence[str], name: str) -> None:
    changed = [row for row, (first, second) in enumerate(zip(before, after, strict=True)) if first != second]
    if changed:
        cure = (
            "Certify on a data set without a random transform."
            if name == "dataset"
            else "They cannot be compared with the rows of `dataset`. Pass the same rows without a random transform."
        )
        raise ValueError(
            f"{len(changed)} of {len(before)} rows of `{name}` changed between two readings (row {changed[0]} is the "
            f"first), because inputs are augmented or labels are drawn anew. {cure}"
        )


def _count_shared_rows(
    collator: FingerprintingCollator, inputs: set[str], dataset: MapStyleDataset, prior_dataset: MapStyleDataset
) -> tuple[int, list[Sketch | None]]:
    numbers = range(len(prior_dataset))
    halves = set(collator.half_precisions)
    first_reading, sketches = [], []
    for number in numbers:
        row = prior_dataset[number]
        first_reading.append(collator.fingerprint_row(row))
        sketches.append(collator.sketch_row(row))
        halves |= half_precisions({name: row[name] for name in collator.input_columns(row)})
    second_reading = [collator.fingerprint_row(prior_dataset[number]) for number in numbers]
    _check_same_rows([whole for _, whole in first_reading], [whole for _, whole in second_reading], "prior_dataset")
    num_shared = sum(fingerprint in inputs for fingerprint, _ in first_reading)
    # What was stored in half precision equals the other rows only after these are rounded as well.
    for precision in halves:
        rounded = {collator.fingerprint_inputs(dataset[number], precision) for number in range(len(dataset))}
        num_rounded = sum(
            collator.fingerprint_inputs(prior_dataset[number], precision) in rounded for number in numbers
        )
        num_shared = max(num_shared, num_rounded)
    return max(num_shared, _count_shared_below_transforms(dataset, prior_dataset)), sketches


def _count_shared_below_transforms(dataset: MapStyleDataset, prior_dataset: MapStyleDataset) -> int:
    """Counts the prior's rows that are stored as a row of the certificate set is, and only shown in another way."""
    if not isinstance(dataset, Dataset) or not isinstance(prior_dataset, Dataset):
        return 0
    if "custom" not in (dataset.format["type"], prior_dataset.format["type"]):
        return 0
    columns = [name for name in dataset.features if name not in (*LABEL_COLUMNS, CLEAN_LABEL_COLUMN)]
    other = [name for name in prior_dataset.features if name not in (*LABEL_COLUMNS, CLEAN_LABEL_COLUMN)]
    if not columns or sorted(columns) != sorted(other):
        return 0
    stored = set(stored_fingerprints(dataset, columns))
    return sum(fingerprint in stored for fingerprint in stored_fingerprints(prior_dataset, columns))


def _warn_of_near_copies_within(collator: FingerprintingCollator, dataset: MapStyleDataset) -> None:
    cure = "If they are the same samples, they are not independent, and count too often: leave them out."
    columns, rows = find_near_copies_within(dataset)
    if rows:
        logger.warning(
            f"{len(rows)} rows of `dataset` have the texts of an earlier row, up to case and spacing, by the columns "
            f"{', '.join(columns)} (rows {_shown(rows)}). {cure}"
        )
    rows = find_close(collator.sketches)
    if rows:
        logger.warning(
            f"{len(rows)} rows of `dataset` have all but the same numbers as an earlier row (rows {_shown(rows)}). "
            f"{cure}"
        )


def _count_near_copies(
    collator: FingerprintingCollator,
    prior_sketches: Sequence[Sketch | None],
    dataset: MapStyleDataset,
    prior_dataset: MapStyleDataset,
) -> int | None:
    cure = "If they are the same samples, the prior has seen them: leave them out."
    columns, rows = find_near_copies(dataset, prior_dataset)
    if rows:
        logger.warning(
            f"{len(rows)} rows of `dataset` have the texts of a row of `prior_dataset`, up to case and spacing, by "
            f"the columns {', '.join(columns)} (rows {_shown(rows)}). {cure}"
        )
    close = find_close(collator.sketches, prior_sketches)
    if close:
        logger.warning(
            f"{len(close)} rows of `dataset` have all but the same numbers as a row of `prior_dataset` (rows "
            f"{_shown(close)}). {cure}"
        )
    has_numbers = any(sketch is not None for sketch in collator.sketches)
    return len({*rows, *close}) if columns or has_numbers else None


def _shown(rows: Sequence[int]) -> str:
    return ", ".join(map(str, rows[:_SHOWN])) + (", ..." if len(rows) > _SHOWN else "")
