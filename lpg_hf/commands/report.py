"""`lpg-hf report OUT`: writes the report of a finished training."""

import contextlib
from argparse import ArgumentParser
from pathlib import Path

from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..report import check_installed
from ..trainer.complete_checkpoints import is_complete
from ..trainer.reports import report_folder
from .parser import parse_arguments
from .run import set_up_logging
from .run_files import read_command
from .task import make_model, make_trainer, prepare
from .train import load_task
from .writable import check_writable


def write_report(folder: str, report_dir: str | None = None) -> str:
    """
    Writes the report of a training from its last checkpoint and its data.

    Args:
        folder (`str`): The `--output_dir` of a training with `lpg-hf train`.
        report_dir (`str`, *optional*): Where the report goes. Defaults to where that training puts it.

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
    path = None if report_dir is None else Path(report_dir).resolve()
    task = load_task(command["kind"])
    argv = [*command["arguments"], "--output_dir", output_dir, "--do_predict", "false", "--report_to", "none"]
    # Paths of the data are as they were typed.
    with contextlib.chdir(command["folder"]):
        arguments = parse_arguments(task.data_class, "lpg-hf report", "", argv)
        path = path or report_folder(arguments.training)
        arguments.training.push_to_hub = False  # there is nothing new
        set_up_logging()
        prepared = prepare(task, arguments)
        trainer = make_trainer(task, arguments, prepared, model=make_model(task, arguments, prepared))
        trainer.train(resume_from_checkpoint=checkpoint)  # no step is left: it loads what the training was
        return trainer.report(path)


def finished_checkpoint(folder: str) -> str:
    """
    The checkpoint that a training left at its end.

    Raises:
        ValueError: If it has not come to its end, or left none.
    """
    state = Path(folder, TRAINER_STATE_NAME)
    if not is_complete(folder):
        problem = f"{state} is no whole file." if state.exists() else f"The training in {folder} is not finished."
        raise ValueError(f"{problem} The command that started it resumes it.")
    step = TrainerState.load_from_json(str(state)).global_step
    checkpoint = Path(folder, f"{PREFIX_CHECKPOINT_DIR}-{step}")
    if not is_complete(checkpoint):
        raise ValueError(
            f"There is no checkpoint of the end of the training in {folder}, step {step}. Train with --save_strategy "
            "epoch or steps; or with --report, which writes the report at the end of the training."
        )
    return str(checkpoint)


def main(argv: list[str]) -> None:
    parser = ArgumentParser(
        "lpg-hf report",
        description="Writes a page on a finished training: its most doubtful labels, how well each class is learned, "
        "calibration; and the numbers as CSV. The data of the training must be where it was.",
        allow_abbrev=False,
    )
    parser.add_argument("folder", metavar="OUT", help="--output_dir of a training with `lpg-hf train`")
    parser.add_argument(
        "--report_dir", help="folder of the report (default: OUT/report, or OUT/_report with --push_to_hub)"
    )
    arguments = parser.parse_args(argv)
    if arguments.report_dir is not None:
        check_writable("--report_dir", arguments.report_dir)
    print(f"Report: {write_report(arguments.folder, arguments.report_dir)}")
