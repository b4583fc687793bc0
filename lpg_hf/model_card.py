"""The section that LPGTrainer adds to a model card."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from torch import nn

from .card_certificate import read_certificate
from .perturbations import Perturbation, method_card
from .safe_text import code_span, escape_markdown, shown
from .summary import TrainingSummary


TAGS = ["lpg_hf", "gradient-perturbation"]
CERTIFICATE_FILE = "certificate.json"
#: Entries that fill pages, and that only whoever checks the choice of the scale needs.
LEFT_OUT = ("sigma_grid", "selection")
TITLE = "## Gradient perturbation"
#: A longer table shows this many classes: one half are the largest, the other half the smallest.
MOST_CLASSES = 40


def add_section(summary: TrainingSummary, model: nn.Module) -> None:
    """
    Adds the section, and the tags, to the `README.md` that the Trainer has written to the output folder.

    Without perturbations the card stays as it is. A `certificate.json` in the same folder becomes part of the section
    if it belongs to the weights of the model.

    Args:
        summary ([`TrainingSummary`]): The training.
        model (`torch.nn.Module`): The model that was trained.
    """
    if not summary.active_perturbations:
        return
    path = Path(summary.output_dir) / "README.md"
    card = ModelCard.load(path)
    tags = list(card.data.tags or [])
    card.data.tags = tags + [tag for tag in TAGS if tag not in tags]
    certificate = read_certificate(path.parent / CERTIFICATE_FILE, model)
    before = card.text.partition(f"\n{TITLE}\n")[0].rstrip()
    card.text = f"{before}\n\n{_section(summary, certificate)}"
    card.save(path)


def _section(summary: TrainingSummary, certificate: dict[str, Any] | None) -> str:
    parts = [
        f"{TITLE}\n\nTrained with `LPGTrainer` of `lpg_hf`. Each method below adds its delta to the gradient that the "
        "previous one left.",
        _methods_table(summary.active_perturbations),
    ]
    if summary.changed_settings:
        settings = [f"- {code_span(f'{name}={value!r}')}" for name, value in summary.changed_settings.items()]
        parts.append("### Settings other than the defaults\n\n" + "\n".join(settings))
    if summary.class_names is not None and summary.class_counts is not None and summary.class_accuracy is not None:
        table = _class_table(summary.class_names, summary.class_counts, summary.class_accuracy)
        parts.append(f"### Classes\n\n{table}")
    if certificate is not None:
        parts.append("### Certificate\n\n" + _certificate_table(certificate))
    return "\n\n".join(parts) + "\n"


def _methods_table(methods: Sequence[Perturbation]) -> str:
    # A user's own method may have no card.
    formulas = [method_card(type(method)).get("Formula", "") for method in methods]
    # The author of a method writes its formula in Markdown. A bar would end the cell.
    cells = [[code_span(repr(method)), formula] for method, formula in zip(methods, formulas, strict=True)]
    return _markup_table([["method", "delta"], *([cell.replace("|", "\\|") for cell in line] for line in cells)])


def _class_table(names: Sequence[str], counts: Sequence[int], accuracy: Sequence[float]) -> str:
    order = sorted(range(len(names)), key=lambda label: -counts[label])
    half = MOST_CLASSES // 2
    left_out = max(len(order) - MOST_CLASSES, 0)
    listed = order[:half] + order[half + left_out :]
    lines = [["class", "training rows", "running training accuracy"]]
    lines += [[shown(names[label]), str(counts[label]), f"{accuracy[label]:.3f}"] for label in listed]
    if left_out:
        lines.insert(half + 1, [f"... {left_out} more classes ...", "", ""])
    return _table(lines)


def _certificate_table(certificate: dict[str, Any]) -> str:
    """The entries of the certificate, as they are, but for the scales that were tried. Nested ones are JSON."""
    lines = [["", "value"]]
    for name, value in certificate.items():
        if name in LEFT_OUT:
            continue
        lines.append([name, value if isinstance(value, str) else json.dumps(value)])
    return _table(lines)


def _table(lines: list[list[str]]) -> str:
    """A table of plain text."""
    return _markup_table([[escape_markdown(cell) for cell in line] for line in lines])


def _markup_table(lines: list[list[str]]) -> str:
    """A table of Markdown, without line breaks or bare bars in its cells."""
    rows = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
