"""What a training leaves in its output folder for the other commands: how it was started, and its label issues."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import datasets
from accelerate import PartialState
from accelerate.logging import get_logger

from ..data import write_issues
from ..data.labels import read_labels
from ..trainer import LPGTrainer


logger = get_logger(__name__)

# `push_to_hub` leaves out what begins with an underscore: texts and paths of the training data stay on this machine.
COMMAND_FILE = "_lpg/command.json"
ISSUES_FILE = "_lpg/label_issues.csv"


def save_command(trainer: LPGTrainer, kind: str, argv: list[str]) -> None:
    """Writes how a training was started, and where, without secrets."""
    if trainer.is_world_process_zero():
        command = {"kind": kind, "arguments": without_secrets(argv), "folder": os.getcwd()}
        command["labels"] = labels_digest(trainer.train_dataset)
        path = Path(str(trainer.args.output_dir), COMMAND_FILE)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(command, indent=2) + "\n", encoding="utf-8")


def forget_command(folder: str) -> None:
    """Removes what a finished training has left about itself, when another one begins in its place."""
    if PartialState().is_main_process:
        Path(folder, COMMAND_FILE).unlink(missing_ok=True)


def labels_digest(train: datasets.Dataset) -> str:
    """A hash of the labels of all training rows, in their order."""
    return hashlib.sha256(read_labels(train, "labels").tobytes()).hexdigest()


def check_finished_labels(folder: str, train: datasets.Dataset) -> None:
    """
    Compares the training labels with those of the training that has come to its end in a folder.

    Without this, new fixes would seem to act: no step would be left, and the old results would be shown again.

    Args:
        folder (`str`): The `--output_dir`.
        train ([`datasets.Dataset`]): The training rows.

    Raises:
        ValueError: If there is such a training, and its labels were others.
    """
    path = Path(folder, COMMAND_FILE)
    finished = json.loads(path.read_text(encoding="utf-8")).get("labels") if path.exists() else None
    if finished is not None and finished != labels_digest(train):
        raise ValueError(
            f"{folder} has a finished training on other labels (other rows, --fixes, --label_noise, --imbalance_ratio "
            "or --seed). This command would go on from it. Choose another --output_dir, or pass "
            "--overwrite_output_dir."
        )


def without_secrets(argv: list[str]) -> list[str]:
    """
    The arguments without tokens.

    Example:

    ```python
    >>> without_secrets(["--token", "hf_abc", "--hub_token=hf_abc", "--do_train"])
    ['--do_train']

    ```
    """
    kept: list[str] = []
    skip = False
    for argument in argv:
        name, equals, _ = argument.replace("-", "_").partition("=")
        is_secret = name in ("__token", "__hub_token")
        if not skip and not is_secret:
            kept.append(argument)
        skip = is_secret and not equals
    return kept


def read_command(folder: str | Path) -> dict[str, Any]:
    """
    How the training of an output folder was started: `kind`, `arguments`, and the `folder` where.

    Raises:
        OSError: If no training of `lpg-hf train` was.
    """
    path = Path(folder, COMMAND_FILE)
    if not path.exists():
        raise FileNotFoundError(
            f"There is no {COMMAND_FILE} in {folder}, which `lpg-hf train` writes. Pass the --output_dir of a "
            "training with it; in a script of your own call `trainer.report()`."
        )
    return json.loads(path.read_text(encoding="utf-8"))


def save_issues(trainer: LPGTrainer) -> None:
    """Writes the label issues of a training that has just ended. All processes must call it."""
    try:
        issues = trainer.label_issues()
        if trainer.is_world_process_zero():
            path = Path(str(trainer.args.output_dir), ISSUES_FILE)
            write_issues(issues, path, trainer.train_dataset, trainer.processing_class)
    except ValueError as error:
        logger.warning(f"There are no label issues of this training: {error}")


def folder_of_issues(folder: str | Path) -> Path:
    """Where [`~trainer.export_issues`] finds those of an output folder: of `lpg-hf train`, or of another script."""
    path = Path(folder, ISSUES_FILE)
    return path.parent if path.exists() else Path(folder)
