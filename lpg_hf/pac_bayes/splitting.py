"""`split_for_certificate`: a split of the training data into rows for the prior and rows for the certificate."""

from collections.abc import Hashable, Sequence

import numpy as np
from datasets import Dataset, DatasetDict
from transformers.utils import logging

from ..data import CLEAN_LABEL_COLUMN, LABEL_COLUMNS
from .fingerprints import stored_fingerprints


logger = logging.get_logger(__name__)


def split_for_certificate(
    dataset: Dataset, fraction: float = 0.5, seed: int = 0, *, columns: Sequence[str] | None = None
) -> DatasetDict:
    """
    Splits training data at random into a part for the prior and a part for the certificate.

    Train the prior on the first part only, train the posterior on both (on `dataset` itself), and certify on the
    second part. Everything that is fitted to data before the prior (normalizers, a vocabulary, hyperparameters) must
    not see the second part.

    Rows with equal inputs are copies, whatever their padding. Only the first of them is used, and a warning says how
    many were left out. A copy in both parts would show the prior a row of the certificate set, and two copies in one
    part are not independent.

    Args:
        dataset (`datasets.Dataset`): Training rows, independent of each other. A transform stays and does not run.
        fraction (`float`, *optional*, defaults to 0.5): Share of the rows that the prior gets, in (0, 1).
        seed (`int`, *optional*, defaults to 0): The same seed gives the same split.
        columns (`Sequence[str]`, *optional*):
            Columns that make up the input of a row. Defaults to all but `labels`, `label`, `label_ids` and
            `clean_label`. Name them if a column is unique to its row, such as an identifier.

    Returns:
        `datasets.DatasetDict`: The parts `prior` and `certificate`, which have no row in common.

    Raises:
        ValueError: If `fraction` is out of range, a column is unknown, or a part would be empty.

    Example:

    ```python
    >>> from datasets import Dataset
    >>> rows = Dataset.from_dict({"text": ["a", "b", "c", "d", "a"], "label": [0, 1, 0, 1, 0]})
    >>> parts = split_for_certificate(rows)
    >>> sorted(parts["prior"]["text"][:] + parts["certificate"]["text"][:])
    ['a', 'b', 'c', 'd']

    ```
    """
    if not 0 < fraction < 1:
        raise ValueError(f"`fraction` must lie strictly between 0 and 1; found {fraction}. Use 0.5 for an even split.")
    if columns is None:
        columns = [name for name in dataset.column_names if name not in (*LABEL_COLUMNS, CLEAN_LABEL_COLUMN)]
    unknown = [name for name in columns if name not in dataset.column_names]
    if unknown or not columns:
        raise ValueError(
            f"`columns` must name inputs among {dataset.column_names}; found {list(columns)}. Name the columns that "
            "the model reads, by which copies are found."
        )
    rows = _first_occurrences(stored_fingerprints(dataset, columns))
    if len(rows) < len(dataset):
        logger.warning(f"{len(dataset) - len(rows)} of {len(dataset)} rows repeat an earlier one and are left out.")
    size = round(fraction * len(rows))
    if not 0 < size < len(rows):
        raise ValueError(f"`fraction` {fraction} of {len(rows)} different rows leaves a part empty. Use more rows.")
    order = np.random.default_rng(seed).permutation(rows)
    return DatasetDict(prior=dataset.select(order[:size]), certificate=dataset.select(order[size:]))


def _first_occurrences(values: Sequence[Hashable]) -> list[int]:
    """Positions of the values that do not repeat an earlier one."""
    first: dict[Hashable, int] = {}
    for position, value in enumerate(values):
        first.setdefault(value, position)
    return list(first.values())
