"""What a training leaves in its output folder for the other commands: how it was started, labels, label issues."""

import hashlib
import os
from pathlib import Path
from typing import Any

import datasets
from accelerate import PartialState
from accelerate.logging import get_logger
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..data import write_issues
from ..data.labels import read_labels
from ..trainer import LPGTrainer
from ..whole_files import read_json_object, write_json_object


logger = get_logger(__name__)

REWRITTEN = "The command of this training writes it anew: run it again. Where it is finished, it trains nothing."

# `push_to_hub` leaves out what begins with an underscore: texts and paths of the training data stay on this machine.
COMMAND_FILE = "_lpg/command.json"
LABELS_FILE = "lpg_labels.json"
ISSUES_FILE = "_lpg/label_issues.csv"


def save_command(trainer: LPGTrainer, kind: str, argv: list[str]) -> None:
    """Writes how a training that has come to its end was started, and where, without secrets."""
    if trainer.is_world_process_zero():
        command = {"kind": kind, "arguments": without_secrets(argv), "folder": os.getcwd()}
        path = Path(str(trainer.args.output_dir), COMMAND_FILE)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json_object(path, command)


def forget_command(folder: str) -> None:
    """Removes what a finished training has left about itself, when another one begins in its place."""
    if PartialState().is_main_process:
        Path(folder, COMMAND_FILE).unlink(missing_ok=True)


class LabelsCallback(TrainerCallback):
    """
    Writes into each checkpoint which labels it was trained on.

    Args:
        train (`datasets.Dataset`): The training rows.
    """

    def __init__(self, train: datasets.Dataset) -> None:
        self.digest = labels_digest(train)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            folder = Path(str(args.output_dir), f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
            write_json_object(folder / LABELS_FILE, {"labels": self.digest})


def labels_digest(train: datasets.Dataset) -> str:
    """A hash of the labels of all training rows, in their order."""
    return hashlib.sha256(read_labels(train, "labels").tobytes()).hexdigest()


def check_same_labels(checkpoint: str, train: datasets.Dataset, cure: str) -> None:
    """
    Compares the training labels with those of a checkpoint, before it is resumed.

    Without this, new fixes would seem to act. Of a finished training no step would be left, and the old results would
    be shown again. Of another, some steps would have the labels before, and some those after the fixes.

    Args:
        checkpoint (`str`): Its folder. One of another script does not say its labels, and passes.
        train (`datasets.Dataset`): The training rows.
        cure (`str`): A sentence that says what to do if the labels are others.

    Raises:
        ValueError: If the checkpoint comes from a training on other labels.
    """
    path = Path(checkpoint, LABELS_FILE)
    if not path.exists():
        return
    entries = read_json_object(path, "Delete it to go on from this checkpoint all the same.")
    if entries.get("labels") != labels_digest(train):
        raise ValueError(
            f"{checkpoint} comes from a training on other labels (other rows, --fixes, --label_noise, "
            f"--imbalance_ratio or --seed). This command would go on from it. {cure}"
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
        ValueError: If the file is damaged.
    """
    path = Path(folder, COMMAND_FILE)
    if not path.exists():
        raise FileNotFoundError(
            f"There is no {COMMAND_FILE} in {folder}, which `lpg-hf train` writes. Pass the --output_dir of a "
            "training with it; in a script of your own call `trainer.report()`."
        )
    command = read_json_object(path, REWRITTEN)
    if missing := [name for name in ("kind", "arguments", "folder") if name not in command]:
        raise ValueError(f"{path} has no {missing[0]!r}. {REWRITTEN}")
    return command


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
