"""Label noise: flips labels at random and keeps the true ones."""

from collections.abc import Sequence

import datasets
import numpy as np
from scipy.special import ndtr, ndtri

from ..batch import IGNORE_INDEX
from .label_column import with_labels
from .labels import (
    CLEAN_LABEL_COLUMN,
    check_range,
    check_two_classes,
    label_feature,
    number_of_classes,
    read_labels,
    resolve_label_column,
)
from .sample_vectors import as_vectors, sample_vectors


NOISE_KINDS = ("symmetric", "pairflip", "asymmetric", "instance")

_INSTANCE_RATE_STD = 0.1


def add_label_noise(
    dataset: datasets.Dataset,
    rate: float | None = None,
    kind: str = "symmetric",
    seed: int = 0,
    *,
    matrix: Sequence[Sequence[float]] | np.ndarray | None = None,
    features: Sequence[Sequence[float]] | np.ndarray | None = None,
    label_column: str | None = None,
) -> datasets.Dataset:
    """
    Flips labels at random, and keeps the true ones in a new column `clean_label`.

    Labels of -100 stay as they are. All feature types, the format and the transform of the dataset are kept. A
    shuffled or selected dataset is written out in its new order, as by `Dataset.add_column`.

    The kinds of noise:

    - `"symmetric"`: a label flips with probability `rate`, to one of the other classes, each equally likely.
    - `"pairflip"` (Han et al., 2018, https://huggingface.co/papers/1804.06872): class `c` flips with probability
      `rate` to class `(c + 1) % C`.
    - `"asymmetric"` (Patrini et al., 2017, https://huggingface.co/papers/1609.03683): class `c` becomes class `k`
      with probability `matrix[c][k]`.
    - `"instance"` (after Xia et al., 2020, https://huggingface.co/papers/2006.07836): every sample has its own flip
      probability, drawn from a normal distribution with mean `rate` and standard deviation 0.1; a flipped sample of
      class `c` goes to another class, drawn from the softmax of its features times a random matrix of class `c`, so
      that similar samples are mislabeled alike. Two details are ours. The normal is truncated symmetrically around
      `rate`, so the expected noise is `rate` exactly, small rates included. The features are centered and scaled to
      unit variance overall, so their unit does not matter.

    Args:
        dataset (`datasets.Dataset`):
            The dataset with the true labels.
        rate (`float`, *optional*):
            The expected share of wrong labels, in `[0, 1)`. All kinds need it but `"asymmetric"`, which takes its
            rates from `matrix`.
        kind (`str`, *optional*, defaults to `"symmetric"`):
            One of `"symmetric"`, `"pairflip"`, `"asymmetric"` and `"instance"`.
        seed (`int`, *optional*, defaults to 0):
            The same seed gives the same noise. NumPy's global random state is neither read nor changed.
        matrix (array-like of shape `[C, C]`, *optional*):
            The transition matrix of asymmetric noise; every row sums to 1.
        features (array-like of shape `[N, d]`, *optional*):
            For instance noise: one numeric vector per row of `dataset`, in its order. Defaults to the first image
            column (as 8 x 8 RGB thumbnails), else to the first column of numeric arrays of one shape.
        label_column (`str`, *optional*):
            The column of integer labels, stored as `[N]` or `[N, 1]`. Defaults to the result of [`find_label_column`].

    Returns:
        `datasets.Dataset`: A new dataset with the noisy labels in the label column and the true ones in
        `clean_label`, which is the last column and has the same feature type.

    Raises:
        ValueError: If an argument is missing, superfluous or out of range, if the dataset is empty, has fewer than
            two classes or a column `clean_label` already, or if its labels are not integers in range.

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from lpg_hf.data import add_label_noise

    >>> dataset = Dataset.from_dict({"label": [0, 1, 2] * 100})
    >>> noisy = add_label_noise(dataset, 0.3, kind="pairflip", seed=0)
    >>> noisy.column_names
    ['label', 'clean_label']
    >>> noisy["clean_label"][:] == dataset["label"][:]
    True
    >>> flipped = [row for row in noisy if row["label"] != row["clean_label"]]
    >>> all(row["label"] == (row["clean_label"] + 1) % 3 for row in flipped)
    True

    ```
    """
    _check_noise_arguments(rate, kind, matrix, features)
    column = resolve_label_column(dataset, label_column)
    if CLEAN_LABEL_COLUMN in dataset.column_names:
        raise ValueError(
            f"dataset already has a column {CLEAN_LABEL_COLUMN!r}, which an earlier call has added. A second round "
            "would lose the true labels. Start from the clean dataset, or rename or remove that column first."
        )
    labels = read_labels(dataset, column)
    num_classes = number_of_classes(dataset, column, labels)
    transition = None if matrix is None else _as_transition_matrix(matrix)
    if transition is not None:
        # A plain integer column does not say how many classes there are, so the matrix may know of unseen ones.
        if not isinstance(label_feature(dataset, column), datasets.ClassLabel):
            num_classes = max(num_classes, len(transition))
        if len(transition) != num_classes:
            raise ValueError(
                f"matrix has shape {transition.shape}, but the labels of column {column!r} need [{num_classes}, "
                f"{num_classes}]: one row and one column per class."
            )
    check_range(labels, num_classes, column)
    check_two_classes(num_classes, column)

    rng = np.random.default_rng(seed)
    valid_mask = labels != IGNORE_INDEX
    clean = labels[valid_mask]
    noisy_labels = labels.copy()
    if transition is not None:
        noisy_labels[valid_mask] = _flip_by_transition_matrix(clean, transition, rng)
    else:
        assert rate is not None  # checked above: only a transition matrix does without
        if kind == "symmetric":
            noisy_labels[valid_mask] = _flip_uniformly(clean, num_classes, rate, rng)
        elif kind == "pairflip":
            noisy_labels[valid_mask] = _flip_to_next_class(clean, num_classes, rate, rng)
        else:
            vectors = sample_vectors(dataset, column) if features is None else as_vectors(features, len(dataset))
            noisy_labels[valid_mask] = _flip_by_instance(clean, num_classes, rate, vectors[valid_mask], rng)
    return with_labels(dataset, column, noisy_labels, kept_as=CLEAN_LABEL_COLUMN)


def _flip_uniformly(labels: np.ndarray, num_classes: int, rate: float, rng: np.random.Generator) -> np.ndarray:
    flips = rng.random(len(labels)) < rate
    shift = rng.integers(1, num_classes, size=len(labels))
    return np.where(flips, (labels + shift) % num_classes, labels)


def _flip_to_next_class(labels: np.ndarray, num_classes: int, rate: float, rng: np.random.Generator) -> np.ndarray:
    flips = rng.random(len(labels)) < rate
    return np.where(flips, (labels + 1) % num_classes, labels)


def _flip_by_transition_matrix(labels: np.ndarray, matrix: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    uniform = rng.random(len(labels))
    noisy = np.empty_like(labels)
    for index in np.unique(labels):
        cumulative = np.cumsum(matrix[index])
        # Ending at 1 exactly keeps a draw close to 1 from falling past the last class that has a probability.
        cumulative /= cumulative[-1]
        rows = labels == index
        noisy[rows] = np.searchsorted(cumulative, uniform[rows], side="right")
    return noisy


def _flip_by_instance(
    labels: np.ndarray, num_classes: int, rate: float, vectors: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    flips = rng.random(len(labels)) < _instance_flip_rates(len(labels), rate, rng)
    centered = vectors - vectors.mean(axis=0)
    scale = centered.std()
    # Identical samples have no variance; they are zero after centering, and their targets uniform.
    standardized = centered / scale if scale > 0 else centered
    noisy = labels.copy()
    for index in np.unique(labels[flips]):
        rows = np.flatnonzero(flips & (labels == index))
        projection = rng.standard_normal((vectors.shape[1], num_classes))
        scores = standardized[rows] @ projection
        scores[:, index] = -np.inf
        # The largest of scores plus Gumbel noise is a draw from their softmax.
        noisy[rows] = np.argmax(scores + rng.gumbel(size=scores.shape), axis=1)
    return noisy


def _instance_flip_rates(size: int, rate: float, rng: np.random.Generator) -> np.ndarray:
    half_width = min(rate, 1 - rate)
    upper = ndtr(half_width / _INSTANCE_RATE_STD)
    return rate + _INSTANCE_RATE_STD * ndtri(rng.uniform(1 - upper, upper, size))


def _check_noise_arguments(rate: float | None, kind: str, matrix: object, features: object) -> None:
    if kind not in NOISE_KINDS:
        raise ValueError(f"kind is {kind!r}, but must be one of {', '.join(NOISE_KINDS)}.")
    if kind == "asymmetric":
        if matrix is None:
            raise ValueError("matrix is None, but kind='asymmetric' needs it: the [C, C] transition probabilities.")
        if rate is not None:
            raise ValueError(f"rate is {rate}, but kind='asymmetric' takes its rates from `matrix`. Leave `rate` out.")
    else:
        if matrix is not None:
            raise ValueError(f"matrix was passed with kind={kind!r}, which does not use it. Pass kind='asymmetric'.")
        if rate is None or not 0 <= rate < 1:
            raise ValueError(f"rate is {rate}, but must be a number in [0, 1): the expected share of wrong labels.")
    if features is not None and kind != "instance":
        raise ValueError(f"features was passed with kind={kind!r}, which does not use it. Pass kind='instance'.")


def _as_transition_matrix(matrix: Sequence[Sequence[float]] | np.ndarray) -> np.ndarray:
    matrix = np.asarray(matrix, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"matrix has shape {matrix.shape}, but must be [C, C]: one row and one column per class.")
    # Written so that NaN fails.
    valid = (matrix >= 0).all(axis=1) & (np.abs(matrix.sum(axis=1) - 1) <= 1e-6)
    if not valid.all():
        row = np.flatnonzero(~valid)[0]
        raise ValueError(
            f"matrix has the row {row} = {matrix[row].tolist()}, which sums to {matrix[row].sum()}, but every row "
            "must hold probabilities that sum to 1. Divide each row by its sum."
        )
    return matrix
