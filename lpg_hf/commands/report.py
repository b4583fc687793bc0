"""`lpg-hf report OUT`: writes the report of a finished training."""

import contextlib
from argparse import ArgumentParser
from pathlib import Path

from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from ..report import check_installed
from ..trainer.complete_checkpoints import last_complete_checkpoint
from .parser import parse_arguments
from .run import set_up_logging
from .run_files import read_command
from .task import make_model, make_trainer, prepare
from .train import load_task


def write_report(folder: str, report_folder: str | None = None) -> str:
    """
    Writes the report of a training from its last checkpoint and its data.

    Args:
        folder (`str`): The `--output_dir` of a training with `lpg-hf train`.
        report_folder (`str`, *optional*): Where the report goes. Defaults to `report` in `folder`.

    Returns:
        `str`: Path of the page.

    Raises:
        OSError: If the folder, or the data of the training, is not there.
        ValueError: If the training left no checkpoint of its end.
        ImportError: If a package for reports is not installed.
    """
    check_installed()
    command = read_command(folder)
    checkpoint = finished_checkpoint(folder)
    output_dir = str(Path(folder).resolve())
    report_dir = None if report_folder is None else Path(report_folder).resolve()
    task = load_task(command["kind"])
    argv = [*command["arguments"], "--output_dir", output_dir, "--do_predict", "false"]
    # Paths of the data are as they were typed.
    with contextlib.chdir(command["folder"]):
        (arguments,) = parse_arguments(task.data_class, "lpg-hf report", "", argv)
        set_up_logging()
        prepared = prepare(task, arguments)
        trainer = make_trainer(task, arguments, prepared, model=make_model(task, arguments, prepared))
        trainer.train(resume_from_checkpoint=checkpoint)  # no step is left: it loads what the training was
        return trainer.report(report_dir)


def finished_checkpoint(folder: str) -> str:
    """
    The checkpoint that a training left at its end.

    Raises:
        ValueError: If there is none.
    """
    cure = "Train again with --report, which writes the report at the end of the training."
    checkpoint = last_complete_checkpoint(folder)
    if checkpoint is None:
        raise ValueError(f"There are no checkpoints in {folder}, from which the training could be read. {cure}")
    state = TrainerState.load_from_json(str(Path(checkpoint, TRAINER_STATE_NAME)))
    if state.global_step < state.max_steps:
        raise ValueError(
            f"The training in {folder} is not finished: {checkpoint} is at step {state.global_step} of "
            f"{state.max_steps}. The command that started it resumes it. Or: {cure}"
        )
    return checkpoint


def main(argv: list[str]) -> None:
    parser = ArgumentParser(
        "lpg-hf report",
        description="Writes a page on a finished training: its most doubtful labels, how well each class is learned, "
        "calibration; and the numbers as CSV. The data of the training must be where it was.",
        allow_abbrev=False,
    )
    parser.add_argument("folder", metavar="OUT", help="--output_dir of a training with `lpg-hf train`")
    parser.add_argument("--report_dir", help="folder of the report (default: OUT/report)")
    arguments = parser.parse_args(argv)
    print(f"Report: {write_report(arguments.folder, arguments.report_dir)}")
