"""The files of the report: tables as CSV, figures as PNG, and one HTML page with everything inside."""

import base64
import csv
import io
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from ..calibration import CalibrationBin
from .plots import FIGURES, make_figures, most_confused_classes
from .previews import preview
from .tables import ReportTables


SHOWN_ISSUES = 50
SHOWN_PAIRS = 15


def write_page(tables: ReportTables, train_dataset: object, tokenizer: object, folder: Path) -> Path:
    """
    Writes `report.html`, a PNG for each figure and a CSV for each table.

    Args:
        tables ([`ReportTables`]): The content of the report.
        train_dataset: The training set, which has the images and texts of the label issues.
        tokenizer: Decodes rows that have nothing but tokens; may be `None`.
        folder (`Path`): Where the files go. It is made if it does not exist.

    Returns:
        `Path`: The page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    issues = named_issues(tables)
    _write_csv(folder / "classes.csv", tables.classes)
    _write_csv(folder / "norms.csv", tables.norms)
    _write_csv(folder / "calibration.csv", [_calibration_line(each) for each in tables.calibration])
    _write_csv(folder / "confusion.csv", confused_pairs(tables))
    _write_csv(folder / "label_issues.csv", issues)

    figures = {}
    for name in FIGURES:  # an earlier report may have had more of them
        (folder / f"{name}.png").unlink(missing_ok=True)
    for name, figure in make_figures(tables).items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
        (folder / f"{name}.png").write_bytes(buffer.getvalue())
        figures[name] = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"

    environment = Environment(
        loader=PackageLoader("lpg_hf.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    page = environment.get_template("report.html.j2").render(
        tables=tables,
        figures=figures,
        issues=[line | {"preview": preview(train_dataset, line["row"], tokenizer)} for line in issues[:SHOWN_ISSUES]],
        num_issues=len(issues),
        classes=sorted(tables.classes, key=lambda line: -line.get("train_rows", 0)),
        pairs=[line for line in confused_pairs(tables) if line["label"] != line["predicted"]][:SHOWN_PAIRS],
        num_in_confusion=0 if tables.confusion is None else len(most_confused_classes(tables.confusion)),
    )
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def named_issues(tables: ReportTables) -> list[dict[str, Any]]:
    """The label issues, the most doubtful first, with the number and the name of each class."""
    if tables.issues is None:
        return []
    names = tables.issues.features["label"].names
    lines = []
    for line in tables.issues:
        label, suggested = line.pop("label"), line.pop("suggested_label")
        row = line.pop("row")
        lines.append(
            {
                "row": row,
                "label": label,
                "label_name": names[label],
                "suggested_label": suggested,
                "suggested_label_name": names[suggested],
            }
            | line
        )
    return lines


def confused_pairs(tables: ReportTables) -> list[dict[str, Any]]:
    """The pairs of true and predicted class that occur in the evaluation, the most frequent first."""
    if tables.confusion is None:
        return []
    names, counts = tables.names, tables.confusion
    pairs = sorted(np.argwhere(counts > 0).tolist(), key=lambda pair: (-counts[pair[0], pair[1]], pair))
    return [
        {
            "label": i,
            "label_name": names[i],
            "predicted": j,
            "predicted_name": names[j],
            "rows": int(counts[i, j]),
            "share": float(counts[i, j] / counts[i].sum()),
        }
        for i, j in pairs
    ]


def _calibration_line(each: CalibrationBin) -> dict[str, Any]:
    return {
        "from": each.lower,
        "to": each.upper,
        "rows": each.rows,
        "confidence": each.confidence,
        "accuracy": each.accuracy,
    }


def _write_csv(path: Path, lines: list[dict[str, Any]]) -> None:
    """Writes the lines. Without lines there is no file, and the file of an earlier report is removed."""
    path.unlink(missing_ok=True)
    if not lines:
        return
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
