"""The numbers of the report, made from a summary: every figure and every CSV file shows these and no others."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset
from scipy.sparse import csr_array

from ..calibration import CalibrationBin, calibration_bins, calibration_error
from ..summary import Evaluation, TrainingSummary, Unavailable


@dataclass
class ReportTables:
    """
    The tables of a report. A table that cannot be made is `None` or empty, and `missing` says why.

    Attributes:
        summary (`dict[str, str]`): The tiles at the top of the page, by their caption.
        classes (`list[dict]`): One line per class.
        confusion (`scipy.sparse.csr_array` of shape `[C, C]`, *optional*):
            Evaluation rows by true class (first axis) and predicted class. Most pairs of many classes have none.
        calibration (`list[CalibrationBin]`): One entry per bin of confidence.
        norms (`list[dict]`): One line per log: the norms of the gradient and of the deltas.
        issues (`datasets.Dataset`, *optional*): The table of [`LPGTrainer.label_issues`].
        missing (`dict[str, str]`): Why a section is left out, by the name of the section.
    """

    summary: dict[str, str] = field(default_factory=dict)
    classes: list[dict[str, Any]] = field(default_factory=list)
    confusion: csr_array | None = None
    calibration: list[CalibrationBin] = field(default_factory=list)
    norms: list[dict[str, Any]] = field(default_factory=list)
    issues: Dataset | None = None
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return [line["name"] for line in self.classes]


def make_tables(summary: TrainingSummary) -> ReportTables:
    """
    Makes the tables of a report.

    Args:
        summary ([`TrainingSummary`]): The training.
    """
    tables = ReportTables()
    if isinstance(summary.label_issues, Unavailable):
        tables.missing["issues"] = summary.label_issues.reason
    else:
        tables.issues = summary.label_issues
    tables.norms = _norms(summary.norms)
    if not tables.norms:
        tables.missing["norms"] = (
            "No norms were measured. Set `log_perturbations=True` in `LPGConfig`, and use a chain with methods."
        )
    if isinstance(summary.evaluation, Unavailable):
        tables.missing["evaluation"] = summary.evaluation.reason
    else:
        tables.confusion = _confusion(summary.evaluation)
        tables.calibration = _calibration(summary.evaluation)
    if summary.class_names is None:
        tables.missing["classes"] = "The model is not a single-label classifier."
    else:
        tables.classes = _classes(summary.class_names, summary, tables)
    tables.summary = _tiles(summary, tables)
    return tables


def _norms(lines: Sequence[Mapping[str, float]]) -> list[dict[str, Any]]:
    """Lines with the same columns. A method that was not measured at a log has `None` there."""
    columns = list(dict.fromkeys(column for line in lines for column in line))
    return [{column: line.get(column) for column in columns} for line in lines]


def _confusion(evaluation: Evaluation) -> csr_array:
    num_labels = evaluation.probabilities.shape[1]
    rows = np.ones(len(evaluation.labels), dtype=np.int64)
    return csr_array((rows, (evaluation.labels, evaluation.probabilities.argmax(1))), shape=(num_labels, num_labels))


def _calibration(evaluation: Evaluation) -> list[CalibrationBin]:
    probabilities = evaluation.probabilities
    return calibration_bins(probabilities.max(1), probabilities.argmax(1) == evaluation.labels)


def _classes(names: list[str], summary: TrainingSummary, tables: ReportTables) -> list[dict[str, Any]]:
    """One line per class; notes in `tables.missing` which columns are left out."""
    num_labels, issues = len(names), tables.issues
    columns: dict[str, list] = {"label": list(range(num_labels)), "name": names}
    if summary.class_counts is not None and any(summary.class_counts):
        columns["train_rows"] = summary.class_counts
    elif issues is not None:
        columns["train_rows"] = np.bincount(_array(issues, "label"), minlength=num_labels).tolist()
    if summary.class_accuracy is not None:
        columns["train_accuracy"] = summary.class_accuracy
    if tables.confusion is not None:
        rows = tables.confusion.sum(1)
        columns["eval_rows"] = rows.tolist()
        columns["eval_accuracy"] = _means(tables.confusion.diagonal(), rows)
    if issues is not None and "weight" in issues.column_names:
        visits, labels = _array(issues, "visits"), _array(issues, "label")
        weights = np.bincount(labels, visits * _array(issues, "weight"), minlength=num_labels)
        columns["weight"] = _means(weights, np.bincount(labels, visits, minlength=num_labels))
        if all(weight is None or weight > 0.999 for weight in columns["weight"]):
            tables.missing["dampening"] = (
                "No row was dampened: no epoch gave evidence of wrong labels to the next ones."
            )
    else:
        tables.missing["dampening"] = "The chain has no class-relative dampening, or the rows are not known."
    if summary.class_signs is not None and summary.class_bounds is not None:
        columns |= {"sign": summary.class_signs, "bound": summary.class_bounds}
    else:
        tables.missing["signs"] = "Only LPG and LPL have signs and bounds per class. They are not in this chain."
    return [dict(zip(columns, line, strict=True)) for line in zip(*columns.values(), strict=True)]


def _array(issues: Dataset, column: str) -> np.ndarray:
    # A loop over the column would take minutes for millions of rows, and the format "numpy" rounds to float32.
    return issues.with_format("arrow")[:].column(column).to_numpy()


def _means(sums: np.ndarray, counts: np.ndarray) -> list[float | None]:
    """The mean of each class, `None` for a class without rows."""
    return [float(total / count) if count > 0 else None for total, count in zip(sums, counts, strict=True)]


def _tiles(summary: TrainingSummary, tables: ReportTables) -> dict[str, str]:
    """The tiles at the top of the page: caption and text."""
    methods = ", ".join(map(repr, summary.active_perturbations)) or "none"
    tiles = {"model": summary.model_name, "methods": methods, "steps": f"{summary.num_steps:,}"}
    counts = [line["train_rows"] for line in tables.classes if line.get("train_rows")]
    if counts:
        tiles["training rows"] = f"{sum(counts):,}"
        tiles["classes"] = f"{len(tables.classes):,}"
        tiles["largest : smallest class"] = f"{max(counts) / min(counts):.1f} : 1"
    if tables.confusion is not None and isinstance(summary.evaluation, Evaluation):
        accuracies = [line["eval_accuracy"] for line in tables.classes if line["eval_accuracy"] is not None]
        tiles["accuracy"] = f"{tables.confusion.trace() / tables.confusion.sum():.1%}"
        tiles["balanced accuracy"] = f"{np.mean(accuracies):.1%}"
        tiles["worst class"] = f"{min(accuracies):.1%}"
        tiles["calibration error"] = f"{calibration_error(tables.calibration):.1%}"
        tiles["evaluated on"] = f"{summary.evaluation.name}, {len(summary.evaluation.labels):,} rows"
    return tiles
