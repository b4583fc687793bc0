"""The metrics of an evaluation, and the one more that `--metric_name` asks for."""

from collections.abc import Callable, Sequence

import evaluate
import numpy as np
from sklearn.metrics import f1_score, matthews_corrcoef, precision_score, recall_score
from transformers import EvalPrediction

from ..metrics import make_compute_metrics
from .arguments import Arguments
from .load_data import explaining_what_is_missing


# Of class indices: predictions and labels, each of shape [N].
Metric = Callable[[np.ndarray, np.ndarray], dict[str, float]]

# As `evaluate` names them. These need no network.
AVERAGED = {"f1": f1_score, "precision": precision_score, "recall": recall_score}
CURE = "pass f1, precision, recall or matthews_correlation, or the folder of a metric."


def make_metrics(
    arguments: Arguments, class_counts: Sequence[int] | None, num_labels: int
) -> Callable[[EvalPrediction], dict[str, float]]:
    """
    The `compute_metrics` of a run.

    Args:
        arguments ([`Arguments`]): Names the metric.
        class_counts (`Sequence[int]`, *optional*): Training rows of each class.
        num_labels (`int`): Number of classes.

    Raises:
        OSError: If there is no metric of that name.
        ValueError: If it is not one of class indices. This is tried before the training.
    """
    name = arguments.data.metric_name
    standard = make_compute_metrics(class_counts)
    if name is None:
        return standard
    classes = np.arange(num_labels)
    known = standard(EvalPrediction(np.eye(num_labels), classes))
    if name in known:
        return standard
    metric = load_metric(name, num_labels, arguments.model.cache_dir)
    try:
        metric(classes, classes)
    except Exception as error:  # whatever the metric makes of it
        raise ValueError(
            f"`--metric_name` is {name!r}, which cannot be computed from the indices of {num_labels} classes "
            f"({error}). Pass another one, such as {', '.join(known)}, f1 or matthews_correlation."
        ) from error

    def compute_metrics(evaluation: EvalPrediction) -> dict[str, float]:
        predictions = evaluation.predictions
        logits = predictions[0] if isinstance(predictions, tuple) else predictions
        return standard(evaluation) | metric(logits.argmax(-1), np.asarray(evaluation.label_ids).reshape(-1))

    return compute_metrics


def load_metric(name: str, num_labels: int, cache_dir: str | None) -> Metric:
    """
    A metric by its name: the common ones are scikit-learn's, with the mean over the classes where there are more than
    two; all others come from `evaluate`.

    Example:

    ```python
    >>> round(load_metric("f1", 2, None)(np.array([1, 1, 0]), np.array([1, 0, 0]))["f1"], 3)
    0.667

    ```
    """
    if name in AVERAGED:
        average = "binary" if num_labels == 2 else "macro"
        score = AVERAGED[name]
        return lambda found, labels: {name: float(score(labels, found, average=average, zero_division=0))}
    if name == "matthews_correlation":
        return lambda found, labels: {name: float(matthews_corrcoef(labels, found))}
    with explaining_what_is_missing("metric", name, "--metric_name", CURE, "the script of a metric"):
        metric = evaluate.load(name, cache_dir=cache_dir)
    return lambda found, labels: metric.compute(predictions=found, references=labels)
