"""The files of the report: tables as CSV, figures as PNG, and one HTML page with everything inside."""

import base64
import logging
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from ..calibration import CalibrationBin
from ..data.issues_csv import TEXT_ROWS, IssueTable, table_texts
from ..data.labels import label_names
from ..data.row_texts import row_texts
from ..safe_text import shown
from .csv_files import write_issues_of, write_lines
from .plots import FIGURES, draw_figures, most_confused_classes
from .previews import preview
from .tables import ReportTables


logger = logging.getLogger(__name__)

SHOWN_ISSUES = 100
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
    pairs = confused_pairs(tables)
    write_lines(folder / "classes.csv", tables.classes)
    write_lines(folder / "norms.csv", tables.norms)
    write_lines(folder / "calibration.csv", [_calibration_line(each) for each in tables.calibration])
    write_lines(folder / "confusion.csv", pairs)
    table = _issue_table(tables, train_dataset, tokenizer)
    write_issues_of(table, folder / "label_issues.csv")

    for name in FIGURES:  # an earlier report may have had more of them
        (folder / f"{name}.png").unlink(missing_ok=True)
    drawn, failed = draw_figures(tables)
    figures = {}
    for name, image in drawn.items():
        (folder / f"{name}.png").write_bytes(image)
        figures[name] = f"data:image/png;base64,{base64.b64encode(image).decode()}"

    environment = Environment(
        loader=PackageLoader("lpg_hf.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["shown"] = shown
    issues = most_doubtful(tables)
    previews = _previews(train_dataset, [line["row"] for line in issues], tokenizer)
    page = environment.get_template("report.html.j2").render(
        tables=tables,
        figures=figures,
        failed=failed,
        issues=[line | {"preview": shown_row} for line, shown_row in zip(issues, previews, strict=True)],
        num_issues=0 if tables.issues is None else len(tables.issues),
        lines=None if table is None else table_texts(table, len(issues), not _knows_names(train_dataset, table)),
        classes=sorted(tables.classes, key=lambda line: -line.get("train_rows", 0)),
        pairs=[line for line in pairs if line["label"] != line["predicted"]][:SHOWN_PAIRS],
        num_in_confusion=0 if tables.confusion is None else len(most_confused_classes(tables.confusion)),
    )
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8", errors="backslashreplace")
    return path


def most_doubtful(tables: ReportTables) -> list[dict[str, Any]]:
    """The label issues that the page shows, the most doubtful first, with the name of each class."""
    if tables.issues is None:
        return []
    names = tables.issues.features["label"].names
    return [
        line | {"label_name": names[line["label"]], "suggested_label_name": names[line["suggested_label"]]}
        for line in tables.issues.select(range(min(SHOWN_ISSUES, len(tables.issues))))
    ]


def _issue_table(tables: ReportTables, train_dataset: object, tokenizer: object) -> IssueTable | None:
    """All label issues, with the texts of the most doubtful rows; without texts where reading them fails."""
    if tables.issues is None or len(tables.issues) == 0:
        return None
    texts = None
    try:
        texts = row_texts(train_dataset, tables.issues[:TEXT_ROWS]["row"], tokenizer)
    except Exception as error:  # data set and tokenizer are the user's, and may raise anything
        logger.warning(f"The file label_issues.csv has no texts: {error!r}.")
    return IssueTable(tables.issues, texts)


def _knows_names(train_dataset: object, table: IssueTable) -> bool:
    """Whether the names of the classes are the data set's own. Else they are the model's."""
    names = table.issues.features["label"].names
    return label_names(train_dataset)[: len(names)] == names


def _previews(train_dataset: object, rows: list[int], tokenizer: object) -> list[dict[str, str]]:
    """What [`preview`] shows of each row; nothing where it fails."""
    previews, errors = [], []
    for row in rows:
        try:
            previews.append(preview(train_dataset, row, tokenizer))
        except Exception as error:  # data set and tokenizer are the user's, and may raise anything
            previews.append({})
            errors.append(f"row {row} raised {error!r}")
    if errors:
        logger.warning(f"{len(errors)} of {len(rows)} rows in the report have no preview: {errors[0]}.")
    return previews


def confused_pairs(tables: ReportTables) -> list[dict[str, Any]]:
    """The pairs of true and predicted class that occur in the evaluation, the most frequent first."""
    if tables.confusion is None:
        return []
    names, counts = tables.names, tables.confusion.tocoo()
    sums = tables.confusion.sum(1).tolist()
    pairs = zip(counts.data.tolist(), counts.row.tolist(), counts.col.tolist(), strict=True)
    return [
        {
            "label": i,
            "label_name": names[i],
            "predicted": j,
            "predicted_name": names[j],
            "rows": rows,
            "share": rows / sums[i],
        }
        for rows, i, j in sorted(pairs, key=lambda pair: (-pair[0], *pair[1:]))
    ]


def _calibration_line(each: CalibrationBin) -> dict[str, Any]:
    return {
        "from": each.lower,
        "to": each.upper,
        "rows": each.rows,
        "confidence": each.confidence,
        "accuracy": each.accuracy,
    }
