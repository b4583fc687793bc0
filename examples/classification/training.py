"""One run of an example: from its arguments to a trained, evaluated and saved model."""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import datasets
import pandas as pd
import transformers
from accelerate import PartialState
from datasets import Dataset, DatasetDict
from transformers import PretrainedConfig, PreTrainedModel, Trainer, TrainerState, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, PredictionOutput

from lpg_hf import LPGTrainer
from lpg_hf.data import CLEAN_LABEL_COLUMN, class_counts
from lpg_hf.metrics import make_compute_metrics
from lpg_hf.trainer.complete_checkpoints import is_complete, last_complete_checkpoint

from .arguments import Arguments, DataArguments, parse_arguments
from .data import TEST, TRAIN, VALIDATION, choose_rows, encode_labels, load_splits
from .model import add_lora, check_head, load_config, load_model, load_processor, save_merged, with_merged_model


logger = logging.getLogger(__name__)


class ClassificationTask:
    """
    What one kind of data needs of its own; each example script has its subclass.

    Attributes:
        name (`str`): Of the task on the hub.
        data_class (`type`): [`DataArguments`] with the fields of the task.
        auto_model, auto_processor (`type`): The classes of transformers that load model and processor.
        peft_task_type (`str`, *optional*): Of `peft`, where it knows the task.
        needs_all_columns (`bool`): Whether rows become inputs only when they are read, so that the Trainer must not
            remove the columns that the model does not take.
        load_folder (`Callable`, *optional*): Reads a folder, given it and the cache, where data comes in folders.
    """

    name: str
    data_class: type[DataArguments]
    auto_model: type
    auto_processor: type
    peft_task_type: str | None = None
    needs_all_columns = True
    load_folder: Callable[[str, str | None], Dataset] | None = None

    def check(self, splits: DatasetDict, data: DataArguments) -> DatasetDict:
        """The splits, with rows that cannot be used refused, and the column of the inputs as [`prepare`] needs it."""
        raise NotImplementedError

    def prepare(self, dataset: Dataset, split: str, processor, data: DataArguments) -> Dataset:
        """A split whose rows are what the model takes."""
        raise NotImplementedError

    def adapt(self, model: PreTrainedModel, arguments: Arguments, processor) -> None:
        """Changes a model that has just been loaded."""


@dataclass
class Prepared:
    """Data and processor of a run, and the config of its model."""

    splits: dict[str, Dataset]
    class_counts: list[int] | None
    processor: object
    config: PretrainedConfig


def prepare(task: ClassificationTask, arguments: Arguments) -> Prepared:
    """
    Loads, checks, cuts and stresses the data, and gives the config its classes.

    Raises:
        ValueError, OSError: For arguments that fit neither each other nor data nor model.
    """
    args = arguments.training
    check_what_to_do(arguments)
    arguments.model = with_merged_model(arguments.model)
    # The first process writes what `datasets` keeps, the others find it.
    with args.main_process_first(desc="preparing the data"):
        config = load_config(arguments.model)
        check_head(arguments.model, config, task.auto_model)
        processor = load_processor(arguments.model, task.auto_processor)
        splits = load_splits(arguments.data, arguments.model, task.load_folder)
        splits = task.check(needed_splits(splits, arguments), arguments.data)
        # A model that is only evaluated knows its classes.
        known_names = None if args.do_train else [config.id2label[index] for index in range(config.num_labels)]
        splits, label_names = encode_labels(splits, arguments.data, known_names)
        splits = choose_rows(splits, arguments)
        counts = count_classes(splits[TRAIN], arguments) if TRAIN in splits else None
        inputs = {split: task.prepare(rows, split, processor, arguments.data) for split, rows in splits.items()}
    config.id2label = dict(enumerate(label_names))
    config.label2id = {name: index for index, name in enumerate(label_names)}
    return Prepared(inputs, counts, processor, config)


def check_what_to_do(arguments: Arguments) -> None:
    """
    Raises:
        ValueError: If it is nothing, or a report of no training.
    """
    args = arguments.training
    if not (args.do_train or args.do_eval or args.do_predict):
        raise ValueError("There is nothing to do: pass --do_train, --do_eval or --do_predict.")
    if arguments.report.report and not args.do_train:
        raise ValueError(
            "`--report` is about a training, but there is none: pass --do_train as well. With the --output_dir of a "
            "finished training nothing is trained anew."
        )


def needed_splits(splits: DatasetDict, arguments: Arguments) -> DatasetDict:
    """
    Raises:
        ValueError: If one is not there.
    """
    args, there = arguments.training, ", ".join(splits)
    if args.do_train and TRAIN not in splits:
        raise ValueError(f"`--do_train` needs training data, but there is only: {there}. Pass --train_file.")
    if args.do_eval and TRAIN not in splits and VALIDATION not in splits:
        raise ValueError(f"`--do_eval` needs validation data, but there is only: {there}. Pass --validation_file.")
    if args.do_predict and TEST not in splits:
        raise ValueError(f"`--do_predict` needs test data, but there is only: {there}. Pass --test_file.")
    is_needed = {
        TRAIN: args.do_train or (args.do_eval and VALIDATION not in splits),
        VALIDATION: args.do_eval,
        TEST: args.do_predict,
    }
    return DatasetDict({split: dataset for split, dataset in splits.items() if is_needed[split]})


def count_classes(train: Dataset, arguments: Arguments) -> list[int]:
    """The true sizes where they are known: wrong labels must not decide which classes are few-shot."""
    counts = class_counts(train, label_column=CLEAN_LABEL_COLUMN if arguments.stress.label_noise else "labels")
    logger.info(f"{len(train)} training rows, {min(counts)} to {max(counts)} of each of {len(counts)} classes.")
    return counts


def make_model(task: ClassificationTask, arguments: Arguments, prepared: Prepared) -> PreTrainedModel:
    model = load_model(arguments.model, prepared.config, task.auto_model)
    task.adapt(model, arguments, prepared.processor)
    return add_lora(model, arguments.model, task.peft_task_type) if arguments.model.use_lora else model


def make_trainer(task: ClassificationTask, arguments: Arguments, prepared: Prepared, **kwargs) -> LPGTrainer:
    """A trainer on what was prepared; `kwargs` have the model or how to make it."""
    arguments.training.remove_unused_columns &= not task.needs_all_columns
    return LPGTrainer(
        args=arguments.training,
        train_dataset=prepared.splits.get(TRAIN),
        eval_dataset=prepared.splits.get(VALIDATION),
        processing_class=prepared.processor,
        compute_metrics=make_compute_metrics(prepared.class_counts),
        **kwargs,
    )


def set_up_logging() -> None:
    """What the scripts tell, and warnings of the libraries, on the first process; errors on the others."""
    is_main = PartialState().is_main_process
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger(__package__).setLevel("INFO" if is_main else "ERROR")
    for library in (datasets, transformers):
        library.utils.logging.set_verbosity_warning() if is_main else library.utils.logging.set_verbosity_error()


def checkpoint_to_resume(arguments: Arguments) -> str | None:
    """The checkpoint that was asked for, else the newest complete one in the output folder; `None` without any."""
    args = arguments.training
    asked = args.resume_from_checkpoint
    if str(asked).lower() == "true":
        checkpoint = last_complete_checkpoint(args.output_dir)
        if checkpoint is None:
            raise ValueError(
                f"There is no complete checkpoint in {args.output_dir}. Train without `resume_from_checkpoint`."
            )
        return checkpoint
    if asked is not None:
        if not is_complete(asked):
            raise ValueError(
                f"`--resume_from_checkpoint` is {asked!r}, which is no checkpoint that was saved to its end. Pass "
                f"another {PREFIX_CHECKPOINT_DIR}-NUMBER folder, or `true` for the newest whole one in --output_dir."
            )
        return asked
    if not any(Path(args.output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")):
        return None
    try:
        checkpoint = last_complete_checkpoint(args.output_dir)
    except ValueError:
        return None
    logger.info(f"Resuming from {checkpoint}. To start anew, choose another --output_dir, or remove its checkpoints.")
    return checkpoint


def run(task: ClassificationTask, description: str, argv: list[str] | None = None) -> dict[str, float]:
    """
    Does what `--do_train`, `--do_eval` and `--do_predict` ask for.

    Args:
        task ([`ClassificationTask`]): The kind of data.
        description (`str`): Of the script, for its help.
        argv (`list[str]`, *optional*): Defaults to `sys.argv[1:]`.

    Returns:
        `dict[str, float]`: All metrics, which are also in `all_results.json` of the output folder.
    """
    (arguments,) = parse_arguments(task.data_class, description, argv)
    args = arguments.training
    set_up_logging()
    prepared = prepare(task, arguments)
    set_seed(args.seed)
    trainer = make_trainer(task, arguments, prepared, model=make_model(task, arguments, prepared))

    results = {}
    if args.do_train:
        results |= train(trainer, checkpoint_to_resume(arguments))
    if args.do_eval:
        evaluation = trainer.evaluate() | {"eval_samples": len(trainer.eval_dataset)}
        log_and_save(trainer, "eval", evaluation)
        results |= evaluation
    if args.do_predict:
        prediction = trainer.predict(prepared.splits[TEST], metric_key_prefix="predict")
        log_and_save(trainer, "predict", prediction.metrics)
        write_predictions(trainer, prediction, Path(args.output_dir) / "predictions.csv")
        results |= prediction.metrics

    if args.do_train:
        if arguments.report.report:
            logger.info(f"Report: {trainer.report()}")
        card = {"finetuned_from": arguments.model.model_name_or_path, "tasks": task.name}
        card["dataset"] = arguments.data.dataset_name
        trainer.push_to_hub(**card) if args.push_to_hub else trainer.create_model_card(**card)
        if arguments.model.use_lora and trainer.is_world_process_zero():
            # Last, since the model has no adapters after it.
            save_merged(trainer.model, prepared.processor, args.output_dir)
    return results


def train(trainer: LPGTrainer, checkpoint: str | None) -> dict[str, float]:
    """
    Trains, saves the model, and returns the metrics of the training.

    Those of a training that had come to its end before are kept: the loss and the speed of no steps say nothing.
    """
    earlier, first_step = read_train_results(trainer.args.output_dir), step_of(checkpoint)
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    trainer.save_model()
    if trainer.state.global_step == first_step:
        logger.info(f"The training was finished already: {checkpoint} is at step {first_step}, and none is left.")
        if earlier.get("epoch") == metrics["epoch"]:
            return earlier
        # Killed after its last checkpoint, before it wrote them.
        metrics = {"epoch": metrics["epoch"]}
    metrics["train_samples"] = len(trainer.train_dataset)
    trainer.save_state()
    log_and_save(trainer, "train", metrics)
    return metrics


def read_train_results(folder: str) -> dict[str, float]:
    path = Path(folder) / "train_results.json"
    return json.loads(path.read_text()) if path.exists() else {}


def step_of(checkpoint: str | None) -> int | None:
    """The optimizer steps that it has behind it."""
    if checkpoint is None:
        return None
    return TrainerState.load_from_json(Path(checkpoint) / TRAINER_STATE_NAME).global_step


def log_and_save(trainer: Trainer, split: str, metrics: dict[str, float]) -> None:
    trainer.log_metrics(split, metrics)
    trainer.save_metrics(split, metrics)


def write_predictions(trainer: Trainer, prediction: PredictionOutput, path: Path) -> None:
    """One line per test row, in their order: its number and the name of the class."""
    if trainer.is_world_process_zero():
        # Some models return more than logits.
        is_tuple = isinstance(prediction.predictions, tuple)
        logits = prediction.predictions[0] if is_tuple else prediction.predictions
        names = [trainer.model.config.id2label[index] for index in logits.argmax(-1)]
        pd.DataFrame({"index": range(len(names)), "prediction": names}).to_csv(path, index=False)
