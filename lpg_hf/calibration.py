"""Calibration: whether predictions made with 90% confidence are right in 90% of the cases."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np


_NUM_BINS = 15


class CalibrationBin(NamedTuple):
    """
    The samples whose confidence lies in `(lower, upper]`; a confidence of 0 belongs to the first bin.

    Attributes:
        lower (`float`): Lower edge of the bin.
        upper (`float`): Upper edge of the bin.
        rows (`int`): Number of samples.
        confidence (`float` or `None`): Mean confidence of the samples; `None` in an empty bin.
        accuracy (`float` or `None`): Share of the samples that are classified correctly; `None` in an empty bin.
    """

    lower: float
    upper: float
    rows: int
    confidence: float | None
    accuracy: float | None

    @property
    def gap(self) -> float:
        """Distance between mean confidence and accuracy; 0 in an empty bin."""
        if self.confidence is None or self.accuracy is None:
            return 0.0
        return abs(self.accuracy - self.confidence)


def calibration_bins(confidence: np.ndarray, is_correct: np.ndarray) -> list[CalibrationBin]:
    """
    Compares confidence and accuracy in 15 bins of equal width (Guo et al., 2017,
    https://huggingface.co/papers/1706.04599).

    Args:
        confidence (`np.ndarray` of shape `[N]`): The probability of the predicted class of each sample.
        is_correct (`np.ndarray` of shape `[N]`): Whether the predicted class is the true one.

    Returns:
        `list[CalibrationBin]`: The bins from low to high confidence, the empty ones included.

    Example:

    ```python
    >>> import numpy as np

    >>> last = calibration_bins(np.array([1.0, 0.95]), np.array([True, False]))[-1]
    >>> last.rows, last.confidence, last.accuracy
    (2, 0.975, 0.5)

    ```
    """
    edges = np.linspace(0, 1, _NUM_BINS + 1)
    numbers = np.searchsorted(edges[1:-1], confidence, side="left")
    bins = []
    for number, (lower, upper) in enumerate(pairwise(edges.tolist())):
        members = numbers == number
        rows = int(members.sum())
        means = (float(confidence[members].mean()), float(is_correct[members].mean())) if rows else (None, None)
        bins.append(CalibrationBin(lower, upper, rows, *means))
    return bins


def calibration_error(bins: Sequence[CalibrationBin]) -> float:
    """
    The expected calibration error: the mean gap of the bins, each weighted by its share of the samples.

    Args:
        bins (`Sequence[CalibrationBin]`): As [`calibration_bins`] returns them.

    Returns:
        `float`: Between 0 (accurate confidence) and 1.

    Example:

    ```python
    >>> import numpy as np

    >>> calibration_error(calibration_bins(np.array([0.75, 0.75]), np.array([True, False])))
    0.25

    ```
    """
    return sum(each.rows * each.gap for each in bins) / sum(each.rows for each in bins)


def expected_calibration_error(references: np.ndarray, probabilities: np.ndarray) -> float:
    """The calibration error of true classes `[N]` and class probabilities `[N, C]`."""
    return calibration_error(calibration_bins(probabilities.max(axis=1), probabilities.argmax(axis=1) == references))


def check_probabilities(probabilities: np.ndarray) -> None:
    """Raises unless the rows are probabilities `[N, C]` of at least two classes."""
    if probabilities.ndim != 2 or probabilities.shape[1] < 2:
        raise ValueError(
            f"predictions has shape {probabilities.shape}, but must be probabilities [N, C] of at least 2 classes. "
            "Pass one column per class."
        )
    # Written so that NaN fails; the slack is what half precision needs.
    if not ((probabilities >= 0).all() and (np.abs(probabilities.sum(axis=1) - 1) <= 1e-2).all()):
        raise ValueError(
            f"predictions holds values from {probabilities.min()} to {probabilities.max()} and rows that are not "
            "probabilities (at least 0, with sum 1). Pass the softmax of the logits."
        )
