"""Metrics for noisy and imbalanced labels: `evaluate` modules, and a `compute_metrics` for the Trainer.

The modules are plain classes, instantiated directly; nothing is downloaded. They keep their inputs in memory, so
processes that evaluate side by side share no cache file and wait for no lock.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import datasets
import evaluate
import numpy as np
from scipy.special import softmax
from scipy.stats import rankdata
from sklearn.metrics import accuracy_score, f1_score, recall_score
from transformers import EvalPrediction


_IGNORED_LABEL = -100
_CALIBRATION_BINS = 15
_SHOT_METRICS = ("many_shot_accuracy", "medium_shot_accuracy", "few_shot_accuracy")

_INPUTS = """
Args:
    predictions (`list[int]`): The predicted class of each sample.
    references (`list[int]`): The true class of each sample; samples with -100 are left out.
"""
_PROBABILITY_INPUTS = """
Args:
    predictions (`list[list[float]]`): The class probabilities of each sample, [N, C].
    references (`list[int]`): The true class of each sample; samples with -100 are left out.
"""
_SHOT_INPUTS = (
    _INPUTS
    + """    train_class_counts (`list[int]`): The number of training samples of each class.
    shot_thresholds (`tuple[int, int]`, *optional*): Classes with more training samples than the first number are
        many-shot, those with fewer than the second few-shot. Defaults to thirds of the classes.
"""
)

_SCIKIT_LEARN_CITATION = """\
@article{scikit-learn,
  title={Scikit-learn: Machine Learning in Python},
  author={Pedregosa, F. and Varoquaux, G. and Gramfort, A. and Michel, V. and others},
  journal={Journal of Machine Learning Research},
  year={2011}
}"""
_OLTR_CITATION = """\
@inproceedings{liu2019large,
  title={Large-Scale Long-Tailed Recognition in an Open World},
  author={Liu, Ziwei and Miao, Zhongqi and Zhan, Xiaohang and Wang, Jiayun and Gong, Boqing and Yu, Stella X.},
  booktitle={CVPR},
  year={2019}
}"""
_CALIBRATION_CITATION = """\
@inproceedings{guo2017calibration,
  title={On Calibration of Modern Neural Networks},
  author={Guo, Chuan and Pleiss, Geoff and Sun, Yu and Weinberger, Kilian Q.},
  booktitle={ICML},
  year={2017}
}"""


class _InMemoryMetric(evaluate.Metric):
    """An `evaluate.Metric` that writes no cache files, drops the labels of -100 and gives NumPy arrays to `_score`."""

    def __init__(self, config_name: str | None = None, keep_in_memory: bool = True, **kwargs):
        super().__init__(config_name=config_name, keep_in_memory=keep_in_memory, **kwargs)

    def _compute(self, predictions, references, **kwargs) -> dict[str, float]:
        references, predictions = _drop_ignored(np.asarray(references), np.asarray(predictions))
        return self._score(predictions, references, **kwargs)

    def _score(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        raise NotImplementedError


class BalancedAccuracy(_InMemoryMetric):
    """
    Mean recall over the classes that occur in the references, as scikit-learn's `balanced_accuracy_score`.

    Example:

    ```python
    >>> from lpg_hf.metrics import BalancedAccuracy

    >>> BalancedAccuracy().compute(predictions=[0, 0, 0, 1], references=[0, 0, 1, 1])
    {'balanced_accuracy': 0.75}

    ```
    """

    def _info(self):
        return _class_metric_info("Mean recall over the classes that occur in the references.")

    def _score(self, predictions, references):
        _, recalls = _recall_by_class(references, predictions)
        return {"balanced_accuracy": float(recalls.mean())}


class WorstClassAccuracy(_InMemoryMetric):
    """
    The smallest recall of any class that occurs in the references.

    Example:

    ```python
    >>> from lpg_hf.metrics import WorstClassAccuracy

    >>> WorstClassAccuracy().compute(predictions=[0, 0, 0, 1], references=[0, 0, 1, 1])
    {'worst_class_accuracy': 0.5}

    ```
    """

    def _info(self):
        return _class_metric_info("The smallest recall of any class that occurs in the references.")

    def _score(self, predictions, references):
        _, recalls = _recall_by_class(references, predictions)
        return {"worst_class_accuracy": float(recalls.min())}


class MacroF1(_InMemoryMetric):
    """
    Mean F1 score over the classes that occur in the references or the predictions, as scikit-learn's macro `f1_score`.

    Example:

    ```python
    >>> from lpg_hf.metrics import MacroF1

    >>> MacroF1().compute(predictions=[0, 0, 1, 1], references=[0, 1, 0, 1])
    {'macro_f1': 0.5}

    ```
    """

    def _info(self):
        return _class_metric_info("Mean F1 score over the classes that occur in the references or the predictions.")

    def _score(self, predictions, references):
        return {"macro_f1": _macro_f1(references, predictions)}


class ShotAccuracy(_InMemoryMetric):
    """
    Accuracy on the classes with many, a medium number and few training samples (Liu et al., 2019,
    https://huggingface.co/papers/1904.05160): the mean recall over the classes of each group.

    By default the groups are thirds of the classes, ranked by their training counts (ours: a small dataset may have
    no class of 100 samples). Classes of equal count share their mean rank, so they are never torn apart. The classes
    of the largest count are always many-shot and those of the smallest few-shot; if all counts are equal, all are
    medium-shot. The paper's groups are those of `shot_thresholds=(100, 20)`: more than 100 samples, 20 to 100, and
    fewer than 20.

    A group with no class in the references has no accuracy, and no key in the result.

    Example:

    ```python
    >>> from lpg_hf.metrics import ShotAccuracy

    >>> metric = ShotAccuracy()
    >>> metric.compute(predictions=[0, 1, 0, 0], references=[0, 1, 1, 2], train_class_counts=[50, 9, 3])
    {'many_shot_accuracy': 1.0, 'medium_shot_accuracy': 0.5, 'few_shot_accuracy': 0.0}

    ```
    """

    def _info(self):
        return _class_metric_info(
            "Mean recall over the classes with many, a medium number and few training samples.",
            citation=_OLTR_CITATION,
            inputs_description=_SHOT_INPUTS,
        )

    def _score(
        self,
        predictions: np.ndarray,
        references: np.ndarray,
        train_class_counts: Sequence[int],
        shot_thresholds: tuple[int, int] | None = None,
    ) -> dict[str, float]:
        groups = _group_classes_by_shots(train_class_counts, shot_thresholds)
        _check_references(references, len(groups), "train_class_counts has one entry for each")
        return _shot_accuracies(*_recall_by_class(references, predictions), groups)


class ExpectedCalibrationError(_InMemoryMetric):
    """
    How far the confidence in the top class is from its accuracy (Guo et al., 2017,
    https://huggingface.co/papers/1706.04599), over 15 bins of equal width, each weighted by its share of the samples.

    The predictions are probabilities of shape [N, C].

    Example:

    ```python
    >>> from lpg_hf.metrics import ExpectedCalibrationError

    >>> metric = ExpectedCalibrationError()
    >>> metric.compute(predictions=[[0.75, 0.25], [0.75, 0.25]], references=[0, 1])
    {'expected_calibration_error': 0.25}

    ```
    """

    def _info(self):
        return evaluate.MetricInfo(
            description="Distance between the confidence in the top class and its accuracy, over 15 bins.",
            citation=_CALIBRATION_CITATION,
            inputs_description=_PROBABILITY_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.List(datasets.Value("float64")), "references": datasets.Value("int64")}
            ),
        )

    def _score(self, predictions, references):
        _check_probabilities(predictions)
        _check_references(references, predictions.shape[1], "predictions has one column for each")
        return {"expected_calibration_error": _expected_calibration_error(references, predictions)}


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
    >>> from lpg_hf.metrics import calibration_bins

    >>> last = calibration_bins(np.array([1.0, 0.95]), np.array([True, False]))[-1]
    >>> last.rows, last.confidence, last.accuracy
    (2, 0.975, 0.5)

    ```
    """
    edges = np.linspace(0, 1, _CALIBRATION_BINS + 1)
    numbers = np.searchsorted(edges[1:-1], confidence, side="left")
    bins = []
    for number, (lower, upper) in enumerate(pairwise(edges.tolist())):
        members = numbers == number
        rows = int(members.sum())
        means = (float(confidence[members].mean()), float(is_correct[members].mean())) if rows else (None, None)
        bins.append(CalibrationBin(lower, upper, rows, *means))
    return bins


def calibration_error(bins: Sequence[CalibrationBin]) -> float:
    """The gaps between confidence and accuracy, each weighted by the share of the samples in its bin."""
    return sum(each.rows * each.gap for each in bins) / sum(each.rows for each in bins)


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
            Classes with more training samples than the first number are many-shot, those with fewer than the second
            few-shot; the literature has `(100, 20)`. Defaults to thirds of the classes.

    Returns:
        `Callable[[EvalPrediction], dict[str, float]]`: The function for `Trainer(compute_metrics=...)`.

    Raises:
        ValueError: If the counts or the thresholds make no sense; when called, if logits and labels are not those of
            a classifier.

    Example:

    ```python
    >>> import numpy as np
    >>> from transformers import EvalPrediction
    >>> from lpg_hf.metrics import make_compute_metrics

    >>> compute_metrics = make_compute_metrics(train_class_counts=[90, 10])
    >>> logits = np.array([[2.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 3.0]])
    >>> metrics = compute_metrics(EvalPrediction(predictions=logits, label_ids=np.array([0, 0, 1, 1])))
    >>> metrics["balanced_accuracy"], metrics["few_shot_accuracy"]
    (0.75, 0.5)

    ```
    """
    if train_class_counts is None:
        if shot_thresholds is not None:
            raise ValueError(
                f"shot_thresholds is {shot_thresholds}, but train_class_counts is None. Pass the training counts too, "
                "for instance those of `lpg_hf.data.class_counts(train_dataset)`."
            )
        groups = None
    else:
        groups = _group_classes_by_shots(train_class_counts, shot_thresholds)
    return partial(_compute_metrics, groups=groups)


def _compute_metrics(evaluation: EvalPrediction, groups: np.ndarray | None) -> dict[str, float]:
    references, logits = _drop_ignored(_label_vector(evaluation.label_ids), _logit_matrix(evaluation.predictions))
    _check_references(references, logits.shape[1], "the logits have one column for each")
    if groups is not None and len(groups) != logits.shape[1]:
        raise ValueError(
            f"train_class_counts has {len(groups)} entries, but the logits have {logits.shape[1]} classes. Pass one "
            "count per class, for instance `lpg_hf.data.class_counts(train_dataset, num_labels="
            f"{logits.shape[1]})`."
        )
    predictions = logits.argmax(axis=1)
    classes, recalls = _recall_by_class(references, predictions)
    # Infinite logits have no softmax; the NaN that comes out says so, a warning at every evaluation would add nothing.
    with np.errstate(invalid="ignore"):
        probabilities = softmax(logits.astype(np.float64), axis=1)
    metrics = {
        "accuracy": float(accuracy_score(references, predictions)),
        "balanced_accuracy": float(recalls.mean()),
        "worst_class_accuracy": float(recalls.min()),
        "macro_f1": _macro_f1(references, predictions),
        "expected_calibration_error": _expected_calibration_error(references, probabilities),
    }
    if groups is not None:
        metrics |= _shot_accuracies(classes, recalls, groups)
    return metrics


def _class_metric_info(
    description: str, citation: str = _SCIKIT_LEARN_CITATION, inputs_description: str = _INPUTS
) -> evaluate.MetricInfo:
    return evaluate.MetricInfo(
        description=description,
        citation=citation,
        inputs_description=inputs_description,
        features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        format="numpy",
    )


def _recall_by_class(references: np.ndarray, predictions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    # Over the classes of the references alone: balanced_accuracy_score itself warns of every other predicted class.
    classes = np.unique(references)
    return classes, recall_score(references, predictions, labels=classes, average=None, zero_division=0)


def _macro_f1(references: np.ndarray, predictions: np.ndarray) -> float:
    return float(f1_score(references, predictions, average="macro", zero_division=0))


def _expected_calibration_error(references: np.ndarray, probabilities: np.ndarray) -> float:
    bins = calibration_bins(probabilities.max(axis=1), probabilities.argmax(axis=1) == references)
    return calibration_error(bins)


def _group_classes_by_shots(train_class_counts: Sequence[int], shot_thresholds: tuple[int, int] | None) -> np.ndarray:
    """Gives every class the index of its group in `_SHOT_METRICS`."""
    counts = np.asarray(train_class_counts)
    if counts.ndim != 1 or len(counts) < 2 or not np.issubdtype(counts.dtype, np.integer) or counts.min() < 0:
        raise ValueError(
            f"train_class_counts is {train_class_counts}, but must be a list of at least 2 whole numbers, none "
            "negative: the training samples of each class, as `lpg_hf.data.class_counts(train_dataset)` gives them."
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


def _shot_accuracies(classes: np.ndarray, recalls: np.ndarray, groups: np.ndarray) -> dict[str, float]:
    group_of_recall = groups[classes]
    return {
        name: float(recalls[group_of_recall == index].mean())
        for index, name in enumerate(_SHOT_METRICS)
        if (group_of_recall == index).any()
    }


def _drop_ignored(references: np.ndarray, predictions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if len(references) != len(predictions):
        raise ValueError(
            f"there are {len(predictions)} predictions but {len(references)} labels. Pass one label per prediction."
        )
    labelled = references != _IGNORED_LABEL
    if not labelled.any():
        raise ValueError(
            f"none of the {len(references)} labels names a class ({_IGNORED_LABEL} means ignored). Evaluate on a "
            "dataset with labels."
        )
    return references[labelled], predictions[labelled]


def _logit_matrix(predictions: np.ndarray | tuple) -> np.ndarray:
    logits = np.asarray(predictions[0] if isinstance(predictions, tuple) else predictions)
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(
            f"predictions has shape {logits.shape}, but must be logits [N, C] of at least 2 classes, or a tuple that "
            "begins with them. These metrics are for single-label classification."
        )
    return logits


def _label_vector(label_ids: np.ndarray) -> np.ndarray:
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


def _check_probabilities(probabilities: np.ndarray) -> None:
    if probabilities.ndim != 2 or probabilities.shape[1] < 2:
        raise ValueError(
            f"predictions has shape {probabilities.shape}, but must be probabilities [N, C] of at least 2 classes."
        )
    # Written so that NaN fails; the slack is what half precision needs.
    if not ((probabilities >= 0).all() and (np.abs(probabilities.sum(axis=1) - 1) <= 1e-2).all()):
        raise ValueError(
            f"predictions holds values from {probabilities.min()} to {probabilities.max()} and rows that are no "
            "probabilities (at least 0, with sum 1). Pass the softmax of the logits."
        )
