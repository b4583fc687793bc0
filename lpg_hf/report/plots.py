"""The figures of the report. They stay readable with many classes."""

import io
import logging
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from scipy.sparse import csr_array

from ..safe_text import shown
from .tables import ReportTables


logger = logging.getLogger(__name__)

BLUE, ORANGE, GRAY, RED = "#2563eb", "#ea8a12", "#8a94a6", "#dc2626"
COLORS = [GRAY, BLUE, ORANGE, "#16a34a", "#9333ea", "#0891b2", "#be185d"]
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa3b2",
    "axes.labelcolor": "#39424e",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e8ebf0",
    "xtick.color": "#39424e",
    "ytick.color": "#39424e",
    "legend.frameon": False,
    # TeX would read class names as commands.
    "text.usetex": False,
}
#: A figure with more classes leaves their names out.
MOST_NAMED_CLASSES = 30
#: More classes are drawn as lines, since a rectangle for each would take seconds.
MOST_BARS = 300
#: A confusion matrix with more classes leaves the numbers out.
MOST_WRITTEN_CELLS = 12
LONGEST_NAME = 24
ACCURACY_LABELS = {
    "eval_accuracy": "accuracy on the evaluation rows",
    "train_accuracy": "running training accuracy",
}
FIGURES = ("class_accuracy", "calibration", "norms", "dampening", "signs", "confusion")


def draw_figures(tables: ReportTables) -> tuple[dict[str, bytes], dict[str, str]]:
    """
    Draws the figures for which there are numbers.

    Returns:
        `tuple[dict[str, bytes], dict[str, str]]`: The images as PNG, and why a figure could not be drawn, by its name.
    """
    images, failed = {}, {}
    with rc_context(STYLE), warnings.catch_warnings():
        # Scripts that the font does not have are drawn as boxes. The tables have the names.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        for name, draw in _figures(tables).items():
            buffer = io.BytesIO()
            try:
                draw().savefig(buffer, format="png")
            except Exception as error:  # whatever matplotlib makes of unusual names and numbers
                logger.warning(f"The figure {name!r} of the report could not be drawn: {error!r}.")
                failed[name] = f"The figure could not be drawn: {error!r}."
            else:
                images[name] = buffer.getvalue()
    return images, failed


def _figures(tables: ReportTables) -> dict[str, Callable[[], Figure]]:
    """What draws each figure, by its name."""
    columns = set(tables.classes[0]) if tables.classes else set()
    figures: dict[str, Callable[[], Figure]] = {}
    column = "eval_accuracy" if "eval_accuracy" in columns else "train_accuracy"
    if {"train_rows", column} <= columns:
        lines = [line for line in tables.classes if line[column] is not None and line["train_rows"] > 0]
        if lines:
            figures["class_accuracy"] = partial(_class_accuracy, lines, column)
    if tables.calibration:
        figures["calibration"] = partial(_calibration, tables)
    if tables.norms:
        figures["norms"] = partial(_norms, tables)
    if "weight" in columns and "dampening" not in tables.missing:
        figures["dampening"] = partial(_dampening, tables)
    if "sign" in columns:
        figures["signs"] = partial(_signs, tables)
    if tables.confusion is not None:
        figures["confusion"] = partial(_confusion, tables.confusion, tables.names)
    return figures


def _figure(width: float = 5.6, height: float = 3.5) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    return figure, figure.add_subplot()


def _class_accuracy(lines: list[dict[str, Any]], column: str) -> Figure:
    figure, axes = _figure()
    sizes, accuracy = [line["train_rows"] for line in lines], [line[column] for line in lines]
    many = len(lines) > MOST_NAMED_CLASSES
    axes.scatter(sizes, accuracy, s=12 if many else 30, color=BLUE, alpha=0.5 if many else 0.9, linewidth=0)
    if max(sizes) > 3 * min(sizes):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
    lowest = min(lines, key=lambda line: line[column])
    is_left = lowest["train_rows"] ** 2 < max(sizes) * min(sizes)
    axes.annotate(
        _short(lowest["name"]),
        (lowest["train_rows"], lowest[column]),
        xytext=(6 if is_left else -6, -9),
        textcoords="offset points",
        ha="left" if is_left else "right",
        fontsize=8,
        parse_math=False,  # a dollar is a dollar
    )
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set(xlabel="training rows of the class", ylabel=ACCURACY_LABELS[column], ylim=(-0.03, 1.03))
    return figure


def _calibration(tables: ReportTables) -> Figure:
    figure, axes = _figure()
    bins = [each for each in tables.calibration if each.rows]
    total = sum(each.rows for each in bins)
    middles = [(each.lower + each.upper) / 2 for each in bins]
    width = 0.9 / len(tables.calibration)
    axes.bar(middles, [each.rows / total for each in bins], width=width, color="#d5dbe6", label="share of the rows")
    axes.plot([0, 1], [0, 1], color=GRAY, linestyle="--", linewidth=1, label="perfectly calibrated")
    axes.plot(
        np.array([each.confidence for each in bins], dtype=float),
        np.array([each.accuracy for each in bins], dtype=float),
        color=BLUE,
        marker="o",
        markersize=4,
        label="accuracy",
    )
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set(xlabel="confidence of the prediction", xlim=(-0.01, 1.01), ylim=(-0.01, 1.03))
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncol=3, fontsize=8)
    return figure


def _norms(tables: ReportTables) -> Figure:
    figure, axes = _figure()
    names = [column for column in tables.norms[0] if column not in ("step", "epoch")]
    for name, color in zip(names, COLORS * len(names), strict=False):
        points = [(line["epoch"], line[name]) for line in tables.norms if line[name] is not None]
        parts = name.removeprefix("lpg/").split("/")
        label = "gradient of the loss" if parts == ["gradient_norm"] else f"delta of {parts[0].replace('_', ' ')}"
        marker = "o" if len(points) < 3 else None
        axes.plot(*zip(*points, strict=True), color=color, label=label, marker=marker, markersize=3)
    axes.set(xlabel="epoch", ylabel="mean norm", ylim=(0, None))
    axes.legend(loc="best", fontsize=8)
    return figure


def _dampening(tables: ReportTables) -> Figure:
    lines = [line for line in _by_size(tables) if line["weight"] is not None]
    figure, axes = _figure()
    _bars(axes, [line["name"] for line in lines], [1 - line["weight"] for line in lines], BLUE)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set(ylabel="mean share of the gradient removed", ylim=(0, None))
    return figure


def _signs(tables: ReportTables) -> Figure:
    lines = _by_size(tables)
    figure, axes = _figure(width=11.4, height=3.0)
    colors = [BLUE if line["sign"] > 0 else RED for line in lines]
    _bars(axes, [line["name"] for line in lines], [line["sign"] * line["bound"] for line in lines], colors)
    axes.axhline(0, color="#9aa3b2", linewidth=0.8)
    axes.set(ylabel="dampened      bound      amplified")
    return figure


def _bars(axes: Axes, names: list[str], heights: list[float], color: str | list[str]) -> None:
    """Draws one bar per class, the largest class first, and names the classes if there is room."""
    positions = np.arange(len(names))
    many = len(names) > MOST_NAMED_CLASSES
    if len(names) > MOST_BARS:
        axes.vlines(positions, 0, heights, colors=color, linewidth=0.8)
    else:
        axes.bar(positions, heights, color=color, width=1.0 if many else 0.75)
    axes.grid(axis="x", visible=False)
    if many:
        axes.set_xlabel("classes, largest first")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    else:
        names = [_short(name) for name in names]
        is_long = max(map(len, names)) > 4 and len(names) > 4
        axes.set_xticks(
            positions,
            names,
            parse_math=False,
            rotation=40 if is_long else 0,
            ha="right" if is_long else "center",
            fontsize=8 if len(names) <= 12 else 6.5,
        )
        axes.set_xlabel("largest class first")


def _confusion(confusion: csr_array, names: list[str]) -> Figure:
    shown = most_confused_classes(confusion)
    part = confusion[np.ix_(shown, shown)].toarray()
    share = part / np.maximum(confusion.sum(1)[shown, None], 1)
    names = [_short(names[label]) for label in shown]
    # The page gives a larger figure its whole width.
    figure, axes = _figure(6.2, 4.8) if len(names) <= MOST_WRITTEN_CELLS else _figure(11.4, 9.2)
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axes.grid(visible=False)
    fontsize = 8
    axes.set_xticks(range(len(names)), names, rotation=50, ha="right", fontsize=fontsize, parse_math=False)
    axes.set_yticks(range(len(names)), names, fontsize=fontsize, parse_math=False)
    axes.set(xlabel="predicted", ylabel="label")
    if len(names) <= MOST_WRITTEN_CELLS:
        for i, j in np.argwhere(part > 0):
            color = "white" if share[i, j] > 0.5 else "#39424e"
            axes.text(j, i, f"{part[i, j]:,}", ha="center", va="center", fontsize=7.5, color=color)
    figure.colorbar(image, ax=axes, format=PercentFormatter(1), shrink=0.8, label="share of the label's rows")
    return figure


def most_confused_classes(confusion: csr_array) -> np.ndarray:
    """All classes if the figure can name them, else the ones with the most wrong predictions; in their order."""
    num_labels = confusion.shape[0]
    if num_labels <= MOST_NAMED_CLASSES:
        return np.arange(num_labels)
    wrong = confusion.sum(1) - confusion.diagonal()
    return np.sort(np.argsort(-wrong, kind="stable")[:MOST_NAMED_CLASSES])


def _by_size(tables: ReportTables) -> list[dict[str, Any]]:
    return sorted(tables.classes, key=lambda line: -line.get("train_rows", 0))


def _short(name: str) -> str:
    return shown(name, LONGEST_NAME)
