"""Which rows are used: validation rows set aside, splits cut to a size, and the training rows stressed."""

import logging
import math

from datasets import Dataset, DatasetDict

from ..data import add_label_noise, apply_fixes, class_counts, make_long_tailed
from ..data.fix_checks import OtherRowsError
from .arguments import Arguments
from .load_data import TEST, TRAIN, VALIDATION, naming


logger = logging.getLogger(__name__)


def choose_rows(splits: DatasetDict, arguments: Arguments) -> DatasetDict:
    """
    Splits off validation rows where there are none, cuts every split to its largest size, and then stresses the
    training rows: first the long tail, then the noise, which so is the same share of every class. Fixes come last:
    their rows are those that a training with the same arguments has seen.
    """
    data, stress, seed = arguments.data, arguments.stress, arguments.training.seed
    splits = DatasetDict(splits)
    if TRAIN in splits and VALIDATION not in splits and arguments.training.do_eval:
        splits |= split_off_validation(splits[TRAIN], data.train_val_split, seed)
        logger.info(
            f"There are no validation rows: {len(splits[VALIDATION])} training rows are set aside. To evaluate on "
            "others, pass --validation_file or --validation_split_name."
        )
    if TRAIN in splits and data.shuffle_train_dataset:
        splits[TRAIN] = splits[TRAIN].shuffle(seed=data.shuffle_seed)
    limits = {TRAIN: data.max_train_samples, VALIDATION: data.max_eval_samples, TEST: data.max_predict_samples}
    for split, limit in limits.items():
        if split in splits and limit is not None and limit < len(splits[split]):
            # Files are often sorted by class. Predictions keep the order of their file.
            rows = splits[split] if split == TEST else splits[split].shuffle(seed=seed)
            splits[split] = rows.select(range(limit))
    if TRAIN in splits and stress.imbalance_ratio != 1:
        splits[TRAIN] = make_long_tailed(splits[TRAIN], stress.imbalance_ratio, seed=seed)
        check_imbalance(splits[TRAIN], stress.imbalance_ratio)
    if TRAIN in splits and stress.label_noise != 0:
        splits[TRAIN] = add_label_noise(splits[TRAIN], stress.label_noise, seed=seed)
    if TRAIN in splits and arguments.fixes.fixes is not None:
        splits[TRAIN] = apply_fixes_of_command(splits[TRAIN], arguments.fixes.fixes, data.label_column_name)
    return splits


def apply_fixes_of_command(train: Dataset, fixes: str, label_column: str) -> Dataset:
    """
    The training rows with fixes applied.

    Args:
        train (`datasets.Dataset`): The rows, with their labels in the column `labels`.
        fixes (`str`): The file.
        label_column (`str`): What the user calls this column.

    Raises:
        ValueError: If the fixes cannot be applied; says which arguments choose the rows.
        FileNotFoundError: If there is no such file.
    """
    with naming("--fixes"):
        try:
            return apply_fixes(train, fixes, label_column="labels")
        except OtherRowsError as error:
            raise ValueError(
                f"{error.problem} The training rows, with their labels in column {label_column!r}, are not those that "
                "the issues were found in. Pass the same data and the arguments that chose these rows: --do_eval (it "
                "sets validation rows aside where there are none), --train_val_split, --seed, --max_train_samples, "
                "--shuffle_train_dataset, --label_noise, --imbalance_ratio and --label_column_name. "
                f"{error.otherwise}".rstrip()
            ) from error


def check_imbalance(train: Dataset, wanted: float) -> None:
    counts = class_counts(train)
    largest, smallest = max(counts), min(counts)
    # A ratio that is no whole number is met to within half a row of the largest class.
    if largest / smallest < wanted - 0.5:
        logger.warning(
            f"`--imbalance_ratio` is {wanted:g}, but there are too few training rows for it: {largest / smallest:g} "
            f"was reached, with {largest} rows of the largest class and {smallest} of the smallest."
        )


def split_off_validation(train: Dataset, share: float, seed: int) -> dict[str, Dataset]:
    """The same share of every class, unless one is too small for that."""
    if not 0 < share < 1:
        raise ValueError(f"`--train_val_split` is {share}, but must be a share of the training rows, in (0, 1).")
    num_left = len(train) - math.ceil(share * len(train))  # as `datasets` rounds
    if num_left == 0:
        raise ValueError(
            f"`--train_val_split` is {share}, which leaves none of the {len(train)} training rows to train on. Pass "
            "less of them, or --validation_file."
        )
    counts = class_counts(train)
    is_large = share * len(train) >= len(counts) and num_left >= len(counts)
    can_stratify = is_large and min(count for count in counts if count) >= 2
    parts = train.train_test_split(share, seed=seed, stratify_by_column="labels" if can_stratify else None)
    return {TRAIN: parts["train"], VALIDATION: parts["test"]}
