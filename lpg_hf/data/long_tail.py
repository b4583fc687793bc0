"""Long tails: a subsample with class sizes that fall off exponentially."""

import datasets
import numpy as np

from .labels import check_range, check_two_classes, number_of_classes, read_labels, resolve_label_column


def make_long_tailed(
    dataset: datasets.Dataset, imbalance_ratio: float, seed: int = 0, *, label_column: str | None = None
) -> datasets.Dataset:
    """
    Takes a subsample whose class sizes fall off exponentially with the class index.

    The profile follows the long-tailed CIFAR of Cui et al., 2019 (https://huggingface.co/papers/1901.05555):
    `n_c = n_0 * imbalance_ratio ** (-c / (C - 1))`, rounded down. Class 0 is the largest, class `C - 1` the smallest.

    The choice of `n_0` is ours, since data need not be balanced. Let `m` be the largest `n_0` for which every class
    has enough rows. The last class gets `t = floor(m / imbalance_ratio)` rows and class 0 gets
    `n_0 = round(t * imbalance_ratio)`, so a whole ratio is met exactly and any other to within `0.5 / t`. If `m` is
    below the ratio, the last class keeps one row, class 0 gets `m`, and the ratio is as large as the data allow. With
    `imbalance_ratio=1` every class gets as many rows as the smallest class has.

    Args:
        dataset (`datasets.Dataset`):
            The dataset to subsample. Every class needs at least one row.
        imbalance_ratio (`float`):
            The size of the largest class divided by the size of the smallest; at least 1.
        seed (`int`, *optional*, defaults to 0):
            The same seed picks the same rows. NumPy's global random state is neither read nor changed.
        label_column (`str`, *optional*):
            The column of integer labels, stored as `[N]` or `[N, 1]`. Defaults to the result of [`find_label_column`].

    Returns:
        `datasets.Dataset`: The chosen rows in their old order, drawn without replacement. Rows labeled -100 belong
        to no class and are left out.

    Raises:
        ValueError: If `imbalance_ratio` is below 1 or not finite, if the dataset is empty, has fewer than two classes
            or a class without rows, or if its labels are not integers in range.

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from lpg_hf.data import class_counts, make_long_tailed

    >>> dataset = Dataset.from_dict({"label": [0, 1, 2] * 100})
    >>> class_counts(make_long_tailed(dataset, imbalance_ratio=25))
    [100, 20, 4]

    ```
    """
    if not 1 <= imbalance_ratio < np.inf:
        raise ValueError(
            f"imbalance_ratio is {imbalance_ratio}, but must be a finite number of at least 1, the size of the "
            "largest class divided by the size of the smallest. Pass 1 for classes of equal size."
        )
    column = resolve_label_column(dataset, label_column)
    labels = read_labels(dataset, column)
    num_classes = number_of_classes(dataset, column, labels)
    check_range(labels, num_classes, column)
    check_two_classes(num_classes, column)
    rows_by_class = [np.flatnonzero(labels == index) for index in range(num_classes)]
    available = np.array([len(rows) for rows in rows_by_class])
    if not available.all():
        raise ValueError(
            f"dataset has no row of class {np.argmin(available)} in column {column!r} (it has {num_classes} classes), "
            "so there is no long tail over all classes. Remove the class from the labels, or add rows of it."
        )

    rng = np.random.default_rng(seed)
    wanted = _long_tailed_profile(available, imbalance_ratio)
    chosen = [rng.choice(rows, size, replace=False) for rows, size in zip(rows_by_class, wanted, strict=True)]
    return dataset.select(np.sort(np.concatenate(chosen)))


def _long_tailed_profile(available: np.ndarray, imbalance_ratio: float) -> np.ndarray:
    num_classes = len(available)
    decay = imbalance_ratio ** (np.arange(num_classes) / (num_classes - 1))
    # The powers are inexact: without the slack a whole 1000 may be cut to 999.
    slack = 1 + 1e-9
    largest = int(np.min(available * decay) * slack)
    tail = max(1, int(largest / imbalance_ratio * slack))
    head = min(largest, round(tail * imbalance_ratio))
    return np.maximum(tail, (head / decay * slack).astype(np.int64))
