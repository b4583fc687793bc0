"""Makes a TrainingSummary of a trainer: what the training was, and what came out of it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, fields

import numpy as np
from accelerate.logging import get_logger
from datasets import Dataset
from scipy.special import softmax
from transformers import Trainer, TrainingArguments

from ..batch import IGNORE_INDEX
from ..class_names import find_class_names
from ..config import LPGConfig
from ..loss import LPGLoss
from ..perturbations import Perturbation
from ..perturbations.strategy import ClassLevelPerturbation
from ..summary import Evaluation, TrainingSummary, Unavailable


logger = get_logger(__name__)

NOT_COLLECTED = Unavailable("This summary was made without it.")


def summarize_training(
    trainer: Trainer,
    loss: LPGLoss | None,
    active_perturbations: Sequence[Perturbation],
    norms: Sequence[dict[str, float]],
    label_issues: Dataset | Unavailable = NOT_COLLECTED,
    evaluation: Evaluation | Unavailable = NOT_COLLECTED,
) -> TrainingSummary:
    """
    Summarizes a training. One process can do so alone.

    Args:
        trainer ([`~transformers.Trainer`]): The trainer.
        loss ([`LPGLoss`], *optional*): Its perturbed loss, if it has one.
        active_perturbations (`Sequence[Perturbation]`): The methods that act on its model.
        norms (`Sequence[dict[str, float]]`): The norms at each log, as [`TrainingSummary`] has them.
        label_issues (`datasets.Dataset` or [`Unavailable`], *optional*): The ranked training rows.
        evaluation ([`Evaluation`] or [`Unavailable`], *optional*): The result of [`evaluate_classifier`].

    Returns:
        [`TrainingSummary`]: The training up to now.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    num_labels = _num_labels(loss, label_issues, evaluation)
    counts: list[int] | None = None
    accuracy: list[float] | None = None
    signs: list[int] | None = None
    bounds: list[float] | None = None
    if loss is not None:
        counts = loss.statistics.class_counts.tolist()
        if loss.statistics.steps > 0:
            accuracy = loss.statistics.accuracy.tolist()
        methods = [method for method in loss.perturbations if isinstance(method, ClassLevelPerturbation)]
        if methods:
            sign, bound = methods[0].signs_and_bounds(loss.statistics)
            signs, bounds = sign.int().tolist(), bound.tolist()
    return TrainingSummary(
        model_name=type(model).__name__,
        output_dir=str(trainer.args.output_dir),
        num_steps=trainer.state.global_step,
        active_perturbations=tuple(active_perturbations),
        changed_settings=changed_settings(trainer.args),
        norms=list(norms),
        class_names=None if num_labels is None else find_class_names(num_labels, trainer.train_dataset, model),
        class_counts=counts,
        class_accuracy=accuracy,
        class_signs=signs,
        class_bounds=bounds,
        label_issues=label_issues,
        evaluation=evaluation,
    )


def summarize_for_report(
    trainer: Trainer,
    loss: LPGLoss | None,
    active_perturbations: Sequence[Perturbation],
    norms: Sequence[dict[str, float]],
    rank_rows: Callable[[], Dataset],
) -> TrainingSummary:
    """
    Summarizes a training together with its label issues and an evaluation. All processes must call it.

    Args:
        trainer, loss, active_perturbations and norms: As for [`summarize_training`].
        rank_rows (`Callable`): Makes the table of label issues, or raises a `ValueError` that says why it cannot.

    Returns:
        [`TrainingSummary`]: The training up to now.

    Raises:
        ValueError: Before training.
    """
    if trainer.state.global_step == 0:
        raise ValueError("There is nothing to report yet: call `train()` first.")
    label_issues: Dataset | Unavailable
    try:
        label_issues = rank_rows()
    except ValueError as error:
        label_issues = Unavailable(str(error))
    return summarize_training(trainer, loss, active_perturbations, norms, label_issues, evaluate_classifier(trainer))


def evaluate_classifier(trainer: Trainer) -> Evaluation | Unavailable:
    """
    Predicts the `eval_dataset` of a trainer, the first one of a dict. All processes must call it.

    Args:
        trainer ([`~transformers.Trainer`]): The trainer; its metrics are not computed.

    Returns:
        [`Evaluation`] or [`Unavailable`]: The latter without an evaluation set, if it cannot be predicted, if labels
            or logits do not fit a single-label classifier, or if they are not finite.
    """
    dataset, name = trainer.eval_dataset, "eval_dataset"
    if isinstance(dataset, dict):
        key, dataset = next(iter(dataset.items()), (None, None))
        name = f"eval_dataset[{key!r}]"
    if dataset is None:
        return Unavailable("There is no `eval_dataset`.")
    try:
        with _whole_predictions(trainer):
            output = trainer.predict(dataset)
    except Exception as error:  # data set and collator are the user's, and the rest of the report does not need them
        logger.warning(f"Predicting `{name}` for the report failed: {error!r}.", exc_info=True)
        return Unavailable(f"Predicting `{name}` failed: {error!r}.")
    logits = output.predictions[0] if isinstance(output.predictions, tuple) else output.predictions
    labels = None if output.label_ids is None else np.asarray(output.label_ids)
    if labels is None or not np.issubdtype(labels.dtype, np.integer) or labels.size != len(labels):
        return Unavailable(f"`{name}` does not have one integer label per row.")
    if np.ndim(logits) != 2 or logits.shape[1] < 2:
        return Unavailable("The model's logits do not have the shape [N, C] with C > 1.")
    return _evaluation(name, np.asarray(logits, dtype=np.float64), labels.reshape(-1))


@contextmanager
def _whole_predictions(trainer: Trainer) -> Iterator[None]:
    """Within it, `predict` returns the logits of all rows as one array, however the user's evaluations are set."""
    args = trainer.args
    # The user's metrics may expect something other than logits.
    metrics, preprocess = trainer.compute_metrics, trainer.preprocess_logits_for_metrics
    settings = args.prediction_loss_only, args.eval_do_concat_batches
    trainer.compute_metrics = trainer.preprocess_logits_for_metrics = None
    args.prediction_loss_only, args.eval_do_concat_batches = False, True
    try:
        yield
    finally:
        trainer.compute_metrics, trainer.preprocess_logits_for_metrics = metrics, preprocess
        args.prediction_loss_only, args.eval_do_concat_batches = settings


def _evaluation(name: str, logits: np.ndarray, labels: np.ndarray) -> Evaluation | Unavailable:
    """What the report shows of logits `[N, C]` and labels `[N]`, if they are whole."""
    is_labeled = labels != IGNORE_INDEX
    logits, labels = logits[is_labeled], labels[is_labeled]
    num_labels = logits.shape[1]
    if len(labels) == 0:
        return Unavailable(f"No row of `{name}` has a label.")
    is_out_of_range = (labels < 0) | (labels >= num_labels)
    if is_out_of_range.any():
        return Unavailable(
            f"{is_out_of_range.sum()} of {len(labels)} rows of `{name}` have labels outside of 0 to {num_labels - 1}, "
            f"{labels[is_out_of_range][0]} among them. Rows without a label are marked {IGNORE_INDEX}."
        )
    is_finite = np.isfinite(logits).all(1)
    if not is_finite.all():
        return Unavailable(
            f"The logits of {(~is_finite).sum()} of {len(labels)} rows of `{name}` are not finite (NaN or infinite)."
        )
    return Evaluation(name, labels, softmax(logits, axis=1))


def changed_settings(args: TrainingArguments) -> dict[str, object]:
    """
    The settings of the perturbations that differ from their defaults. Fields of `TrainingArguments` are left out.

    Example:

    ```python
    >>> changed_settings(LPGConfig("out", perturbations=["lpg"], lpg_epsilon=0.3))
    {'perturbations': ['lpg'], 'lpg_epsilon': 0.3}

    ```
    """
    if not isinstance(args, LPGConfig):
        return {}
    inherited = {field.name for field in fields(TrainingArguments)}
    own = [field for field in fields(args) if field.name not in inherited]
    defaults = {
        field.name: field.default if field.default_factory is MISSING else field.default_factory() for field in own
    }
    return {name: getattr(args, name) for name, default in defaults.items() if getattr(args, name) != default}


def _num_labels(
    loss: LPGLoss | None, label_issues: Dataset | Unavailable, evaluation: Evaluation | Unavailable
) -> int | None:
    if loss is not None:
        return loss.num_labels
    if isinstance(evaluation, Evaluation):
        return evaluation.probabilities.shape[1]
    if isinstance(label_issues, Dataset):
        return label_issues.features["label"].num_classes
    return None
