"""Metrics for noisy and imbalanced labels: `evaluate` modules, and a `compute_metrics` for the Trainer.

The modules are plain classes, instantiated directly; nothing is downloaded. They keep their inputs in memory, so
processes that evaluate at the same time share no cache file and wait for no lock.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import datasets
import evaluate
import numpy as np
from numpy.typing import ArrayLike
from scipy.special import softmax
from scipy.stats import rankdata
from sklearn.metrics import f1_score
from transformers import EvalPrediction

from .batch import IGNORE_INDEX
from .calibration import check_probabilities, expected_calibration_error


_SHOT_METRICS = ("many_shot_accuracy", "medium_shot_accuracy", "few_shot_accuracy")


class _InMemoryMetric(evaluate.Metric):
    """An `evaluate.Metric` that writes no cache files and is described by the docstring of its class."""

    _citation = "Pedregosa et al., Scikit-learn: Machine Learning in Python, JMLR 2011."
    _predictions: object = datasets.Value("int64")

    def __init__(self, config_name: str | None = None, keep_in_memory: bool = True, **kwargs: Any):
        super().__init__(config_name=config_name, keep_in_memory=keep_in_memory, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        description, args, usage = (inspect.getdoc(type(self)) or "").partition("Args:")
        return evaluate.MetricInfo(
            description=description.strip(),
            citation=self._citation,
            inputs_description=f"\n{args}{usage}\n",
            features=datasets.Features({"predictions": self._predictions, "references": datasets.Value("int64")}),
        )


class BalancedAccuracy(_InMemoryMetric):
    """
    Mean recall over the classes that occur in the references, as scikit-learn's `balanced_accuracy_score`.

    Args:
        predictions (`list[int]`): The predicted class of each sample.
        references (`list[int]`): The true class of each sample; samples with -100 are left out.

    Example:

    ```python
    >>> BalancedAccuracy().compute(predictions=[0, 0, 0, 1], references=[0, 0, 1, 1])
    {'balanced_accuracy': 0.75}

    ```
    """

    def _compute(self, predictions: ArrayLike, references: ArrayLike) -> dict[str, float]:
        return {"balanced_accuracy": _balanced_accuracy(*_drop_ignored(references, predictions))}


class WorstClassAccuracy(_InMemoryMetric):
    """
    The smallest recall of any class that occurs in the references.

    Args:
        predictions (`list[int]`): The predicted class of each sample.
        references (`list[int]`): The true class of each sample; samples with -100 are left out.

    Example:

    ```python
    >>> WorstClassAccuracy().compute(predictions=[0, 0, 0, 1], references=[0, 0, 1, 1])
    {'worst_class_accuracy': 0.5}

    ```
    """

    def _compute(self, predictions: ArrayLike, references: ArrayLike) -> dict[str, float]:
        return {"worst_class_accuracy": _worst_class_accuracy(*_drop_ignored(references, predictions))}


class MacroF1(_InMemoryMetric):
    """
    Mean F1 score over the classes that occur in the references or the predictions, as scikit-learn's macro `f1_score`.

    Args:
        predictions (`list[int]`): The predicted class of each sample.
        references (`list[int]`): The true class of each sample; samples with -100 are left out.

    Example:

    ```python
    >>> MacroF1().compute(predictions=[0, 0, 1, 1], references=[0, 1, 0, 1])
    {'macro_f1': 0.5}

    ```
    """

    def _compute(self, predictions: ArrayLike, references: ArrayLike) -> dict[str, float]:
        return {"macro_f1": _macro_f1(*_drop_ignored(references, predictions))}


class ShotAccuracy(_InMemoryMetric):
    """
    Accuracy on the classes with many, a medium number and few training samples (Liu et al., 2019,
    https://huggingface.co/papers/1904.05160): the mean recall over the classes of each group.

    By default the groups are thirds of the classes, ranked by their training counts (ours, since a small dataset may
    have no class of 100 samples). Classes of equal count share their mean rank, so they are in one group. The largest
    classes are always many-shot and the smallest few-shot; if all counts are equal, all classes are medium-shot.
    `shot_thresholds=(100, 20)` gives the paper's groups: more than 100 samples, 20 to 100, and fewer than 20. A group
    with no class in the references has no accuracy, and no key in the result.

    Args:
        predictions (`list[int]`): The predicted class of each sample.
        references (`list[int]`): The true class of each sample; samples with -100 are left out.
        train_class_counts (`list[int]`): The number of training samples of each class.
        shot_thresholds (`tuple[int, int]`, *optional*): Classes with more training samples than the first number are
            many-shot, classes with fewer than the second few-shot. Defaults to thirds of the classes.

    Example:

    ```python
    >>> ShotAccuracy().compute(predictions=[0, 1, 0, 0], references=[0, 1, 1, 2], train_class_counts=[50, 9, 3])
    {'many_shot_accuracy': 1.0, 'medium_shot_accuracy': 0.5, 'few_shot_accuracy': 0.0}

    ```
    """

    _citation = "Liu et al., Large-Scale Long-Tailed Recognition in an Open World, CVPR 2019."

    def _compute(
        self,
        predictions: ArrayLike,
        references: ArrayLike,
        train_class_counts: Sequence[int],
        shot_thresholds: tuple[int, int] | None = None,
    ) -> dict[str, float]:
        labels, classes = _drop_ignored(references, predictions)
        groups = _group_classes_by_shots(train_class_counts, shot_thresholds)
        _check_references(labels, len(groups), "train_class_counts has one entry for each")
        return _shot_accuracies(labels, classes, groups)


class ExpectedCalibrationError(_InMemoryMetric):
    """
    How far the confidence in the top class is from its accuracy (Guo et al., 2017,
    https://huggingface.co/papers/1706.04599), over 15 bins of equal width, each weighted by its share of the samples.

    Args:
        predictions (`list[list[float]]`): The class probabilities of each sample, `[N, C]`.
        references (`list[int]`): The true class of each sample; samples with -100 are left out.

    Example:

    ```python
    >>> ExpectedCalibrationError().compute(predictions=[[0.75, 0.25], [0.75, 0.25]], references=[0, 1])
    {'expected_calibration_error': 0.25}

    ```
    """

    _citation = "Guo et al., On Calibration of Modern Neural Networks, ICML 2017."
    _predictions = datasets.List(datasets.Value("float64"))

    def _compute(self, predictions: ArrayLike, references: ArrayLike) -> dict[str, float]:
        labels, probabilities = _drop_ignored(references, predictions)
        check_probabilities(probabilities)
        _check_references(labels, probabilities.shape[1], "predictions has one column for each")
        return {"expected_calibration_error": expected_calibration_error(labels, probabilities)}


def make_compute_metrics(
    train_class_counts: Sequence[int] | None = None, shot_thresholds: tuple[int, int] | None = None
) -> Callable[[EvalPrediction], dict[str, float]]:
    """
    Makes the function to hand to [`~transformers.Trainer`] as `compute_metrics`.

    It returns `accuracy`, `balanced_accuracy`, `worst_class_accuracy`, `macro_f1` and `expected_calibration_error`;
    with `train_class_counts` also `many_shot_accuracy`, `medium_shot_accuracy` and `few_shot_accuracy`, each if the
    evaluation set has a class of its group (see [`ShotAccuracy`]). Predictions are logits of shape `[N, C]`, or a
    tuple that begins with them; labels have shape `[N]` or `[N, 1]`, and -100 is left out. Logits of NaN give a
    calibration error of NaN rather than end the training.

    Args:
        train_class_counts (`Sequence[int]`, *optional*):
            The number of training samples of each class, as from [`~lpg_hf.data.class_counts`].
        shot_thresholds (`tuple[int, int]`, *optional*):
            Classes with more training samples than the first number are many-shot, classes with fewer than the second
            few-shot; the literature has `(100, 20)`. Defaults to thirds of the classes.

    Returns:
        `Callable[[EvalPrediction], dict[str, float]]`: The function for `Trainer(compute_metrics=...)`.

    Raises:
        ValueError: If the counts or the thresholds are invalid; when called, if the logits or labels are invalid.

    Example:

    ```python
    >>> import numpy as np
    >>> from transformers import EvalPrediction

    >>> compute_metrics = make_compute_metrics(train_class_counts=[90, 10])
    >>> logits = np.array([[2.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 3.0]])
    >>> metrics = compute_metrics(EvalPrediction(predictions=logits, label_ids=np.array([0, 0, 1, 1])))
    >>> metrics["balanced_accuracy"], metrics["few_shot_accuracy"]
    (0.75, 0.5)

    ```
    """
    if train_class_counts is not None:
        return partial(_compute_metrics, groups=_group_classes_by_shots(train_class_counts, shot_thresholds))
    if shot_thresholds is not None:
        raise ValueError(
            f"shot_thresholds is {shot_thresholds}, but train_class_counts is None. Pass the training counts too, "
            "for instance from `lpg_hf.data.class_counts(train_dataset)`."
        )
    return partial(_compute_metrics, groups=None)


def _compute_metrics(evaluation: EvalPrediction, groups: np.ndarray | None) -> dict[str, float]:
    references, logits = _drop_ignored(_label_vector(evaluation.label_ids), _logit_matrix(evaluation.predictions))
    num_classes = logits.shape[1]
    _check_references(references, num_classes, "the logits have one column for each")
    if groups is not None and len(groups) != num_classes:
        raise ValueError(
            f"train_class_counts has {len(groups)} entries, but the logits have {num_classes} classes. Pass one count "
            f"per class, for instance from `lpg_hf.data.class_counts(train_dataset, num_labels={num_classes})`."
        )
    predictions = logits.argmax(axis=1)
    # Infinite logits have no softmax. The NaN that comes out says so; a warning at every evaluation would add nothing.
    with np.errstate(invalid="ignore"):
        probabilities = softmax(logits.astype(np.float64), axis=1)
    metrics = {
        "accuracy": float((references == predictions).mean()),
        "balanced_accuracy": _balanced_accuracy(references, predictions),
        "worst_class_accuracy": _worst_class_accuracy(references, predictions),
        "macro_f1": _macro_f1(references, predictions),
        "expected_calibration_error": expected_calibration_error(references, probabilities),
    }
    return metrics if groups is None else metrics | _shot_accuracies(references, predictions, groups)


def _recall_by_class(references: np.ndarray, predictions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The classes that occur in the references, in ascending order, and their recalls."""
    classes, numbers, rows = np.unique(references, return_inverse=True, return_counts=True)
    return classes, np.bincount(numbers, weights=predictions == references) / rows


def _balanced_accuracy(references: np.ndarray, predictions: np.ndarray) -> float:
    return float(_recall_by_class(references, predictions)[1].mean())


def _worst_class_accuracy(references: np.ndarray, predictions: np.ndarray) -> float:
    return float(_recall_by_class(references, predictions)[1].min())


def _macro_f1(references: np.ndarray, predictions: np.ndarray) -> float:
    return float(f1_score(references, predictions, average="macro", zero_division=0))


def _group_classes_by_shots(train_class_counts: Sequence[int], shot_thresholds: tuple[int, int] | None) -> np.ndarray:
    """Gives every class the index of its group in `_SHOT_METRICS`."""
    counts = np.asarray(train_class_counts)
    if counts.ndim != 1 or len(counts) < 2 or not np.issubdtype(counts.dtype, np.integer) or counts.min() < 0:
        raise ValueError(
            f"train_class_counts is {train_class_counts}, but must be a list of at least 2 whole numbers, none "
            "negative. Pass the training samples of each class, as from `lpg_hf.data.class_counts(train_dataset)`."
        )
    if shot_thresholds is None:
        # Twice the mid-rank, from 1 (largest class) to 2C - 1: whole numbers, so the thirds have no rounding.
        position = 2 * rankdata(-counts, method="average") - 1
        uneven = counts.min() < counts.max()
        many = (3 * position < 2 * len(counts)) | (uneven & (counts == counts.max()))
        few = (3 * position > 4 * len(counts)) | (uneven & (counts == counts.min()))
    else:
        many_above, few_below = shot_thresholds
        if many_above < few_below:
            raise ValueError(
                f"shot_thresholds is {shot_thresholds}, but the first number (many-shot above it) must not be smaller "
                "than the second (few-shot below it). Pass for instance (100, 20)."
            )
        many, few = counts > many_above, counts < few_below
    return np.where(many, 0, np.where(few, 2, 1))


def _shot_accuracies(references: np.ndarray, predictions: np.ndarray, groups: np.ndarray) -> dict[str, float]:
    classes, recalls = _recall_by_class(references, predictions)
    group_of_recall = groups[classes]
    return {
        name: float(recalls[group_of_recall == index].mean())
        for index, name in enumerate(_SHOT_METRICS)
        if (group_of_recall == index).any()
    }


def _drop_ignored(references: ArrayLike, predictions: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    references, predictions = np.asarray(references), np.asarray(predictions)
    if len(references) != len(predictions):
        raise ValueError(
            f"there are {len(predictions)} predictions but {len(references)} labels. Pass one label per prediction."
        )
    valid_mask = references != IGNORE_INDEX
    if not valid_mask.any():
        raise ValueError(
            f"none of the {len(references)} labels names a class ({IGNORE_INDEX} means ignored). Evaluate on a "
            "dataset with labels."
        )
    return references[valid_mask], predictions[valid_mask]


def _logit_matrix(predictions: np.ndarray | tuple[np.ndarray, ...]) -> np.ndarray:
    logits = np.asarray(predictions[0] if isinstance(predictions, tuple) else predictions)
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(
            f"predictions has shape {logits.shape}, but must be logits [N, C] of at least 2 classes, or a tuple that "
            "begins with them. These metrics are for single-label classification."
        )
    return logits


def _label_vector(label_ids: np.ndarray | tuple[np.ndarray, ...]) -> np.ndarray:
    labels = np.asarray(label_ids)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"label_ids has shape {labels.shape} and type {labels.dtype}, but must be integers of shape [N] or "
            "[N, 1]. These metrics are for single-label classification."
        )
    return labels


def _check_references(references: np.ndarray, num_classes: int, reason: str) -> None:
    wrong = references[(references < 0) | (references >= num_classes)]
    if len(wrong):
        raise ValueError(
            f"the labels hold {wrong[0]}, but there are {num_classes} classes ({reason}), so they must lie in "
            f"0..{num_classes - 1}. Check that both come from the same label set."
        )
