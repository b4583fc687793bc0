"""The section that LPGTrainer adds to a model card."""

import json
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import ModelCard
from transformers import TrainingArguments

from .config import LPGConfig
from .loss import LPGLoss
from .perturbations import Perturbation, method_card


if TYPE_CHECKING:
    from .trainer import LPGTrainer


TAGS = ["lpg_hf", "gradient-perturbation"]
CERTIFICATE_FILE = "certificate.json"
TITLE = "## Gradient perturbation"
#: Beyond it a class table is no longer read: half of it shows the largest classes, half the smallest.
MOST_CLASSES = 40


def add_section(path: Path, trainer: "LPGTrainer") -> None:
    """
    Adds the section, and the tags, to a model card that the Trainer has written.

    Args:
        path (`Path`): The card, `README.md`; a `certificate.json` beside it is part of the section.
        trainer ([`LPGTrainer`]): The trainer.
    """
    card = ModelCard.load(path)
    tags = list(card.data.tags or [])
    card.data.tags = tags + [tag for tag in TAGS if tag not in tags]
    card.text = f"{card.text.partition(TITLE)[0].rstrip()}\n\n{_section(trainer, path.parent / CERTIFICATE_FILE)}"
    card.save(path)


def _section(trainer: "LPGTrainer", certificate: Path) -> str:
    parts = [
        f"{TITLE}\n\nTrained with `LPGTrainer` of `lpg_hf`: every method below adds its delta to the gradient that "
        "the one before left.",
        _methods_table(trainer.methods_that_acted()),
    ]
    if isinstance(trainer.args, LPGConfig):
        settings = _changed_settings(trainer.args)
        if settings:
            parts.append("### Settings other than the defaults\n\n" + "\n".join(f"- {line}" for line in settings))
    if trainer.lpg_loss is not None and trainer.lpg_loss.statistics.steps > 0:
        names = trainer.class_names(trainer.lpg_loss.num_labels)
        parts.append("### Classes\n\n" + _class_table(trainer.lpg_loss, names))
    if certificate.is_file():
        parts.append("### Certificate\n\n" + _certificate_table(json.loads(certificate.read_text())))
    return "\n\n".join(parts) + "\n"


def _methods_table(methods: list[Perturbation]) -> str:
    # A method of the user's own need not have a card.
    formulas = [method_card(type(method)).get("Formula", "") for method in methods]
    lines = [[f"`{method!r}`", formula] for method, formula in zip(methods, formulas, strict=True)]
    return _table([["method", "what it adds"], *lines])


def _changed_settings(args: LPGConfig) -> list[str]:
    inherited = {field.name for field in fields(TrainingArguments)}
    own = [field for field in fields(args) if field.name not in inherited]
    defaults = [field.default if field.default_factory is MISSING else field.default_factory() for field in own]
    values = [getattr(args, field.name) for field in own]
    return [
        f"`{field.name}={value!r}`"
        for field, value, default in zip(own, values, defaults, strict=True)
        if value != default
    ]


def _class_table(loss: LPGLoss, names: list[str]) -> str:
    counts, accuracy = loss.statistics.class_counts.tolist(), loss.statistics.accuracy.tolist()
    order = sorted(range(len(names)), key=lambda label: -counts[label])
    half = MOST_CLASSES // 2
    left_out = max(len(order) - MOST_CLASSES, 0)
    shown = order[:half] + order[half + left_out :]
    lines = [["class", "training rows", "running training accuracy"]]
    lines += [[names[label], str(counts[label]), f"{accuracy[label]:.3f}"] for label in shown]
    if left_out:
        lines.insert(half + 1, [f"... {left_out} more classes ...", "", ""])
    return _table(lines)


def _certificate_table(certificate: dict) -> str:
    """The certificate's entries as they are, whatever it certifies; nested ones as JSON."""
    lines = [["", "value"]]
    for name, value in certificate.items():
        lines.append([name, value if isinstance(value, str) else json.dumps(value)])
    return _table(lines)


def _table(lines: list[list[str]]) -> str:
    # A bar or a line break would end the cell.
    cells = [[" ".join(cell.split()).replace("|", "\\|") for cell in line] for line in lines]
    rows = [cells[0], ["---"] * len(cells[0]), *cells[1:]]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
