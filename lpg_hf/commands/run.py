"""One run of `lpg-hf train`: from its arguments to a trained, evaluated and saved model."""

import logging
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import transformers
from accelerate import PartialState
from datasets import Dataset
from scipy.special import softmax
from transformers import Trainer, TrainerState, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, PredictionOutput

from ..safe_text import encodable, spreadsheet_cell
from ..trainer import LPGTrainer
from ..trainer.complete_checkpoints import is_complete, last_complete_checkpoint
from ..whole_files import read_json_object, replacing, write_json_object
from .arguments import Arguments
from .load_data import TEST, TRAIN, VALIDATION
from .lora import save_merged
from .run_files import LabelsCallback, check_same_labels, forget_command, save_command, save_issues
from .task import ClassificationTask, class_names, make_model, make_trainer, prepare


logger = logging.getLogger(__name__)


def set_up_logging() -> None:
    """What this library tells, and warnings of the others, on the first process; errors on the other processes."""
    is_main = PartialState().is_main_process
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    for name in (__package__, "lpg_hf.data", "lpg_hf.trainer"):
        logging.getLogger(name).setLevel("INFO" if is_main else "ERROR")
    for library in (datasets, transformers):
        library.utils.logging.set_verbosity_warning() if is_main else library.utils.logging.set_verbosity_error()


def checkpoint_to_resume(arguments: Arguments, train_dataset: Dataset) -> str | None:
    """
    The checkpoint that was asked for, else the newest complete one in the output folder; `None` without any.

    Raises:
        ValueError: If there is none that was asked for, or it comes from a training on other labels.
    """
    args = arguments.training
    asked = args.resume_from_checkpoint
    if arguments.folder_use.overwrite_output_dir and asked is None:
        return None
    if asked is not None:
        found = checkpoint_asked_for(arguments, asked)
        cure = (
            "Leave --resume_from_checkpoint out, and choose another --output_dir. To begin with the weights of the "
            f"checkpoint, pass --model_name_or_path {found}."
        )
        check_same_labels(found, train_dataset, cure)
        return found
    try:
        checkpoint = last_complete_checkpoint(arguments.output_dir)
    except ValueError:  # all are incomplete
        return None
    if checkpoint is None:
        return None
    check_same_labels(checkpoint, train_dataset, "Choose another --output_dir, or pass --overwrite_output_dir.")
    logger.info(f"Resuming from {checkpoint}. To start anew, choose another --output_dir, or remove its checkpoints.")
    return checkpoint


def checkpoint_asked_for(arguments: Arguments, asked: str) -> str:
    """
    The folder that `--resume_from_checkpoint` names, or with `true` the newest complete one.

    Raises:
        ValueError: If there is none.
    """
    if asked.lower() == "true":
        newest = last_complete_checkpoint(arguments.output_dir)
        if newest is None:
            raise ValueError(
                f"There is no complete checkpoint in {arguments.output_dir}. Train without `resume_from_checkpoint`."
            )
        return newest
    if not is_complete(asked):
        raise ValueError(
            f"`--resume_from_checkpoint` is {asked!r}, which is no checkpoint that was saved to its end. Pass "
            f"another {PREFIX_CHECKPOINT_DIR}-NUMBER folder, or `true` for the newest whole one in --output_dir."
        )
    return asked


def run(task: ClassificationTask, arguments: Arguments, argv: list[str]) -> dict[str, float]:
    """
    Does what `--do_train`, `--do_eval` and `--do_predict` ask for.

    Args:
        task ([`ClassificationTask`]): The kind of data.
        arguments ([`Arguments`]): What was asked for.
        argv (`list[str]`): The same as it was typed, which the output folder keeps.

    Returns:
        `dict[str, float]`: All metrics, which are also in `all_results.json` of the output folder.
    """
    args = arguments.training
    set_up_logging()
    prepared = prepare(task, arguments)
    checkpoint = checkpoint_to_resume(arguments, prepared.splits[TRAIN]) if args.do_train else None
    if args.do_train and (checkpoint is None or not is_within(checkpoint, arguments.output_dir)):
        forget_command(arguments.output_dir)
    set_seed(args.seed)
    trainer = make_trainer(task, arguments, prepared, model=make_model(task, arguments, prepared))

    results: dict[str, float] = {}
    if args.do_train:
        trainer.add_callback(LabelsCallback(prepared.splits[TRAIN]))
        results |= train(trainer, prepared.splits[TRAIN], checkpoint)
        save_command(trainer, task.kind, argv)
        save_issues(trainer)
    if args.do_eval:
        evaluation = trainer.evaluate() | {"eval_samples": len(prepared.splits[VALIDATION])}
        log_and_save(trainer, "eval", evaluation)
        results |= evaluation
    if args.do_predict:
        prediction = trainer.predict(prepared.splits[TEST], metric_key_prefix="predict")
        assert prediction.metrics is not None
        log_and_save(trainer, "predict", prediction.metrics)
        write_predictions(
            trainer, class_names(prepared.config), prediction, Path(arguments.output_dir, "predictions.csv")
        )
        results |= prediction.metrics

    if args.do_train:
        if arguments.report.report:
            logger.info(f"Report: {trainer.report()}")
        card: dict[str, Any] = {"finetuned_from": on_hub(arguments.model.model_name_or_path), "tasks": task.name}
        card["dataset"] = on_hub(arguments.data.dataset_name)
        trainer.push_to_hub(**card) if args.push_to_hub else trainer.create_model_card(**card)
        if arguments.model.use_lora and trainer.is_world_process_zero():
            # Last, since the model has no adapters after it.
            save_merged(trainer.model, prepared.processor, arguments.output_dir)
    return results


def is_within(checkpoint: str, folder: str) -> bool:
    return Path(checkpoint).resolve().parent == Path(folder).resolve()


def on_hub(name: str | None) -> str | None:
    """The name of a model or of a data set for the model card. The path of a folder means nothing on the hub."""
    return None if name is None or Path(name).exists() else name


def train(trainer: LPGTrainer, train_dataset: Dataset, checkpoint: str | None) -> dict[str, float]:
    """
    Trains, saves the model, and returns the metrics of the training.

    Those of a training that had come to its end before are kept: the loss and the speed of no steps say nothing.
    """
    earlier, first_step = read_train_results(str(trainer.args.output_dir)), step_of(checkpoint)
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    trainer.save_model()
    if trainer.state.global_step == first_step:
        logger.info(f"The training was finished already: {checkpoint} is at step {first_step}, and none is left.")
        if earlier.get("epoch") == metrics["epoch"]:
            return earlier
        # Killed after its last checkpoint, before it wrote them.
        metrics = {"epoch": metrics["epoch"]}
    metrics["train_samples"] = len(train_dataset)
    trainer.save_state()
    log_and_save(trainer, "train", metrics)
    return metrics


def read_train_results(folder: str) -> dict[str, float]:
    path = Path(folder, "train_results.json")
    return read_json_object(path, "Delete it.") if path.exists() else {}


def step_of(checkpoint: str | None) -> int | None:
    """The optimizer steps that it has behind it."""
    if checkpoint is None:
        return None
    return TrainerState.load_from_json(str(Path(checkpoint, TRAINER_STATE_NAME))).global_step


def log_and_save(trainer: Trainer, split: str, metrics: dict[str, float]) -> None:
    """As `save_metrics` of the Trainer, whose files a process that is killed leaves cut off."""
    trainer.log_metrics(split, metrics)
    if not trainer.is_world_process_zero():
        return
    folder = Path(str(trainer.args.output_dir))
    folder.mkdir(parents=True, exist_ok=True)
    write_json_object(folder / f"{split}_results.json", metrics, indent=4, sort_keys=True)
    path, earlier = folder / "all_results.json", {}
    if path.exists():
        try:
            earlier = read_json_object(path, "It is written anew, with the results of this command alone.")
        except ValueError as error:
            logger.warning(error)
    write_json_object(path, earlier | metrics, indent=4, sort_keys=True)


def write_predictions(trainer: LPGTrainer, names: list[str], prediction: PredictionOutput, path: Path) -> None:
    """One line per test row, in their order: its number, the name of its class, and the probability of that class."""
    if trainer.is_world_process_zero():
        # Some models return more than logits.
        is_tuple = isinstance(prediction.predictions, tuple)
        logits = np.asarray(prediction.predictions[0] if is_tuple else prediction.predictions, dtype=np.float64)
        cells = [spreadsheet_cell(encodable(name)) for name in names]
        # The first two columns are those of the examples of transformers.
        table = pd.DataFrame({"index": range(len(logits)), "prediction": [cells[i] for i in logits.argmax(-1)]})
        table["probability"] = softmax(logits, axis=-1).max(-1)
        with replacing(path) as new:
            table.to_csv(new, index=False, float_format="%.4f")
