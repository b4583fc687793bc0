"""The numbers of the report, collected from a trainer: every figure and every CSV shows these and no others."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from datasets import Dataset
from scipy.special import softmax

from ..perturbations.strategy import ClassLevelPerturbation


if TYPE_CHECKING:
    from ..trainer import LPGTrainer


CALIBRATION_BINS = 15
IGNORED_LABEL = -100


@dataclass
class ReportTables:
    """
    What there is to show; a table that could not be made is `None` or empty, and `missing` says why.

    Attributes:
        summary: What is said at the top, by its caption.
        classes: One line per class.
        confusion: Evaluation rows by true (first axis) and predicted class, `[C, C]`.
        calibration: One line per bin of confidence.
        norms: One line per log, of the norms of gradient and deltas.
        issues: As of [`LPGTrainer.label_issues`].
        missing: Why a section is left out, by its name.
    """

    summary: dict[str, str] = field(default_factory=dict)
    classes: list[dict] = field(default_factory=list)
    confusion: np.ndarray | None = None
    calibration: list[dict] = field(default_factory=list)
    norms: list[dict] = field(default_factory=list)
    issues: Dataset | None = None
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return [line["name"] for line in self.classes]


def collect_tables(trainer: "LPGTrainer") -> ReportTables:
    """
    Collects the tables; all processes must call it.

    Raises:
        ValueError: Before training.
    """
    if trainer.state.global_step == 0:
        raise ValueError("There is nothing to report yet: call `train()` first.")
    tables = ReportTables()
    try:
        tables.issues = trainer.label_issues()
    except ValueError as error:
        tables.missing["issues"] = str(error)
    tables.norms = _norms(trainer.state.log_history)
    if not tables.norms:
        tables.missing["norms"] = "No norms were logged: the chain has no methods, or logging is off."
    labels, probabilities = _evaluate(trainer, tables)
    if labels is not None:
        num_labels = probabilities.shape[1]
        tables.confusion = np.zeros((num_labels, num_labels), dtype=np.int64)
        np.add.at(tables.confusion, (labels, probabilities.argmax(1)), 1)
        tables.calibration = _calibration(labels, probabilities)
    _describe_classes(trainer, tables)
    _summarise(trainer, tables)
    return tables


def _norms(log_history: list[dict]) -> list[dict]:
    """The logs that have norms; a method that was not measured at one of them has no entry there."""
    lines = []
    for log in log_history:
        norms = {key: value for key, value in log.items() if key.startswith("lpg/") and key.endswith("_norm")}
        if norms:
            lines.append({"step": log["step"], "epoch": log["epoch"]} | norms)
    columns = list(dict.fromkeys(column for line in lines for column in line))
    return [{column: line.get(column) for column in columns} for line in lines]


def _evaluate(trainer: "LPGTrainer", tables: ReportTables) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Labels `[N]` and probabilities `[N, C]` of the evaluation rows, or `None` and a word why not."""
    dataset, name = trainer.eval_dataset, "eval_dataset"
    if isinstance(dataset, dict):
        key = next(iter(dataset), None)
        dataset, name = dataset.get(key), f"eval_dataset[{key!r}]"
    if dataset is None:
        tables.missing["evaluation"] = "There is no `eval_dataset`."
        return None, None
    # The user's metrics may want something else than logits.
    metrics, preprocess = trainer.compute_metrics, trainer.preprocess_logits_for_metrics
    trainer.compute_metrics = trainer.preprocess_logits_for_metrics = None
    try:
        output = trainer.predict(dataset)
    finally:
        trainer.compute_metrics, trainer.preprocess_logits_for_metrics = metrics, preprocess
    logits = output.predictions[0] if isinstance(output.predictions, tuple) else output.predictions
    labels = None if output.label_ids is None else np.asarray(output.label_ids)
    if labels is None or not np.issubdtype(labels.dtype, np.integer) or labels.size != len(labels):
        tables.missing["evaluation"] = f"`{name}` has not one integer label per row."
        return None, None
    if np.ndim(logits) != 2 or logits.shape[1] < 2:
        tables.missing["evaluation"] = "The model's logits are not of shape [N, C] with C > 1."
        return None, None
    labels = labels.reshape(-1)
    labelled = labels != IGNORED_LABEL
    if not labelled.any():
        tables.missing["evaluation"] = f"No row of `{name}` has a label."
        return None, None
    tables.summary["evaluated on"] = f"{name}, {labelled.sum():,} rows"
    return labels[labelled], softmax(np.asarray(logits, dtype=np.float64)[labelled], axis=1)


def _calibration(labels: np.ndarray, probabilities: np.ndarray) -> list[dict]:
    """Rows, mean confidence and accuracy of each bin of confidence, as for the expected calibration error."""
    confidence, is_right = probabilities.max(1), probabilities.argmax(1) == labels
    edges = np.linspace(0, 1, CALIBRATION_BINS + 1)
    bins = np.searchsorted(edges[1:-1], confidence, side="left")
    return [
        {
            "from": edges[number],
            "to": edges[number + 1],
            "rows": int((bins == number).sum()),
            "confidence": float(confidence[bins == number].mean()) if (bins == number).any() else None,
            "accuracy": float(is_right[bins == number].mean()) if (bins == number).any() else None,
        }
        for number in range(CALIBRATION_BINS)
    ]


def _describe_classes(trainer: "LPGTrainer", tables: ReportTables) -> None:
    loss = trainer.lpg_loss
    if loss is not None:
        num_labels = loss.num_labels
    elif tables.confusion is not None:
        num_labels = len(tables.confusion)
    elif tables.issues is not None:
        num_labels = tables.issues.features["label"].num_classes
    else:
        tables.missing["classes"] = "The model is no single-label classifier."
        return
    names = trainer.class_names(num_labels)
    columns: dict[str, list] = {"label": list(range(num_labels)), "name": names}

    if loss is not None and loss.statistics.class_counts.any():
        columns["train_rows"] = loss.statistics.class_counts.tolist()
    elif tables.issues is not None:
        columns["train_rows"] = np.bincount(tables.issues["label"], minlength=num_labels).tolist()
    if loss is not None and loss.statistics.steps > 0:
        columns["train_accuracy"] = loss.statistics.accuracy.tolist()
    if tables.confusion is not None:
        rows = tables.confusion.sum(1)
        columns["eval_rows"] = rows.tolist()
        accuracy = tables.confusion.diagonal() / np.maximum(rows, 1)
        columns["eval_accuracy"] = [float(a) if n > 0 else None for a, n in zip(accuracy, rows, strict=True)]
    if tables.issues is not None and "weight" in tables.issues.column_names:
        visits, labels = np.array(tables.issues["visits"]), np.array(tables.issues["label"])
        total = np.bincount(labels, visits, minlength=num_labels)
        weight = np.bincount(labels, visits * np.array(tables.issues["weight"]), minlength=num_labels)
        columns["weight"] = [float(w / n) if n > 0 else None for w, n in zip(weight, total, strict=True)]
    else:
        tables.missing["dampening"] = "The chain has no class-relative dampening, or its rows are not known."
    methods = [] if loss is None else [m for m in loss.perturbations if isinstance(m, ClassLevelPerturbation)]
    if methods:
        signs, bounds = methods[0].signs_and_bounds(loss.statistics)
        columns |= {"sign": [int(sign) for sign in signs], "bound": bounds.tolist()}
    else:
        tables.missing["signs"] = "The chain has no method with a sign and a bound per class (LPG, LPL)."
    tables.classes = [dict(zip(columns, line, strict=True)) for line in zip(*columns.values(), strict=True)]


def _summarise(trainer: "LPGTrainer", tables: ReportTables) -> None:
    model = trainer.accelerator.unwrap_model(trainer.model)
    summary = {"model": type(model).__name__, "methods": ", ".join(map(repr, trainer.methods_that_acted())) or "none"}
    summary["steps"] = f"{trainer.state.global_step:,}"
    counts = [line["train_rows"] for line in tables.classes if line.get("train_rows")]
    if counts:
        summary["training rows"] = f"{sum(counts):,}"
        summary["classes"] = f"{len(tables.classes):,}"
        summary["largest : smallest class"] = f"{max(counts) / min(counts):.1f} : 1"
    if tables.confusion is not None:
        accuracies = [line["eval_accuracy"] for line in tables.classes if line["eval_accuracy"] is not None]
        rows = tables.confusion.sum()
        gaps = [
            line["rows"] * abs(line["accuracy"] - line["confidence"]) for line in tables.calibration if line["rows"]
        ]
        summary["accuracy"] = f"{tables.confusion.trace() / rows:.1%}"
        summary["balanced accuracy"] = f"{np.mean(accuracies):.1%}"
        summary["worst class"] = f"{min(accuracies):.1%}"
        summary["calibration error"] = f"{sum(gaps) / rows:.1%}"
    tables.summary = summary | tables.summary
