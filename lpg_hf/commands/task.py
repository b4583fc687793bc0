"""What one kind of data needs of its own, and what a run makes of its arguments before it trains."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from datasets import Dataset, DatasetDict
from transformers import PretrainedConfig, PreTrainedModel

from ..data import CLEAN_LABEL_COLUMN, class_counts
from ..trainer import LPGTrainer
from .arguments import Arguments, DataArguments, ModelArguments
from .class_labels import encode_labels
from .extra_metric import make_metrics
from .load_data import TEST, TRAIN, VALIDATION, load_splits, shorten
from .lora import add_lora, with_merged_model
from .model import check_head, load_config, load_model, load_processor
from .rows import choose_rows
from .training_checks import check_best_metric
from .writable import check_writable


logger = logging.getLogger(__name__)


class ClassificationTask:
    """
    What one kind of data needs of its own; each kind has its subclass.

    Attributes:
        description (`str`): What the help says first, with commands that work.
        kind (`str`): What is typed after `lpg-hf train`.
        name (`str`): Of the task on the hub.
        data_class (`type`): [`DataArguments`] with the fields of the task.
        auto_model, auto_processor: The classes of transformers that load model and processor.
        default_model (`str`, *optional*): The model where none is named, as in the example of transformers.
        peft_task_type (`str`, *optional*): Of `peft`, where it knows the task.
        needs_all_columns (`bool`): Whether rows become inputs only when they are read, so that the Trainer must not
            remove the columns that the model does not take.
        load_folder (`Callable`, *optional*): Reads a folder, given it and the cache, where data comes in folders.
    """

    description: str
    kind: str
    name: str
    data_class: type[DataArguments]
    auto_model: Any
    auto_processor: Any
    default_model: str | None = None
    peft_task_type: str | None = None
    needs_all_columns = True
    load_folder: Callable[[str, str | None], Dataset] | None = None

    def processor_settings(self, data: Any) -> dict[str, Any]:
        """Settings of the processor that differ from those in its files."""
        return {}

    def complete(self, data: Any, config: PretrainedConfig) -> None:
        """Sets arguments that were left to the model."""

    def check(self, splits: DatasetDict, data: Any) -> DatasetDict:
        """The splits, with rows that cannot be used refused, and the column of the inputs as [`prepare`] needs it."""
        raise NotImplementedError

    def prepare(self, dataset: Dataset, split: str, processor: Any, data: Any) -> Dataset:
        """A split whose rows are what the model takes."""
        raise NotImplementedError

    def adapt(self, model: Any, arguments: Arguments, processor: Any) -> None:
        """Changes a model that has just been loaded."""


@dataclass
class Prepared:
    """Data and processor of a run, and the config of its model."""

    splits: dict[str, Dataset]
    class_counts: list[int] | None
    processor: Any
    config: PretrainedConfig


def prepare(task: ClassificationTask, arguments: Arguments) -> Prepared:
    """
    Loads, checks, cuts and stresses the data, and gives the config its classes.

    Raises:
        ValueError, OSError: For arguments that fit neither each other nor data nor model.
    """
    args = arguments.training
    check_what_to_do(arguments)
    arguments.model = with_default_model(with_merged_model(arguments.model), task.default_model)
    # The first process writes what `datasets` keeps, the others find it.
    with args.main_process_first(desc="preparing the data"):
        config = load_config(arguments.model)
        check_head(arguments.model, config, task.auto_model)
        task.complete(arguments.data, config)
        processor = load_processor(arguments.model, task.auto_processor, **task.processor_settings(arguments.data))
        splits = load_splits(arguments.data, arguments.model, task.load_folder)
        splits = task.check(needed_splits(splits, arguments), arguments.data)
        # A model that is only evaluated knows its classes.
        known_names = None if args.do_train else class_names(config)
        splits, label_names = encode_labels(splits, arguments.data, known_names)
        splits = choose_rows(splits, arguments)
        counts = count_classes(splits[TRAIN], arguments) if TRAIN in splits else None
        inputs = {split: task.prepare(rows, split, processor, arguments.data) for split, rows in splits.items()}
    set_class_names(config, label_names)
    return Prepared(inputs, counts, processor, config)


def class_names(config: Any) -> list[str]:
    """The classes of a trained model, in their order."""
    return [config.id2label[index] for index in range(config.num_labels)]


def set_class_names(config: PretrainedConfig, names: list[str]) -> None:
    config.id2label = dict(enumerate(names))
    config.label2id = {name: index for index, name in enumerate(names)}
    # The head of a model for several labels per row, or for numbers, has one label from here on.
    config.problem_type = "single_label_classification"


def with_default_model(arguments: ModelArguments, default: str | None) -> ModelArguments:
    """The arguments, with the default in the place of the model where neither model nor config is named."""
    if arguments.model_name_or_path is not None or arguments.config_name is not None or default is None:
        return arguments
    logger.info(f"No model is named: --model_name_or_path {default}")
    return replace(arguments, model_name_or_path=default)


def check_what_to_do(arguments: Arguments) -> None:
    """
    Raises:
        ValueError: If it is nothing, a report of no training, or what output folder or evaluation do not allow.
    """
    args = arguments.training
    check_writable("--output_dir", arguments.output_dir)
    if not (args.do_train or args.do_eval or args.do_predict):
        raise ValueError("There is nothing to do: pass --do_train, --do_eval or --do_predict.")
    if arguments.report.report and not args.do_train:
        raise ValueError(
            "`--report` is about a training, but there is none: pass --do_train as well. With the --output_dir of a "
            "finished training nothing is trained anew."
        )
    if arguments.fixes.fixes is not None and not args.do_train:
        raise ValueError("`--fixes` corrects the labels of a training, but there is none: pass --do_train as well.")
    if args.prediction_loss_only and args.do_predict:
        raise ValueError(
            "`--prediction_loss_only` is true, which leaves nothing for `--do_predict` to write. Leave one of them "
            "out."
        )
    if not args.eval_do_concat_batches:
        raise ValueError(
            "`--eval_do_concat_batches` is false, but the metrics are those of all batches together. Leave it out."
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
    names = shorten(train.features["labels"].names, num_shown=20)  # in their order, which shares without names have
    logger.info(
        f"{len(train)} training rows, {min(counts)} to {max(counts)} of each of {len(counts)} classes: {names}."
    )
    return counts


def make_model(task: ClassificationTask, arguments: Arguments, prepared: Prepared) -> PreTrainedModel:
    model: Any = load_model(arguments.model, prepared.config, task.auto_model)
    task.adapt(model, arguments, prepared.processor)
    return add_lora(model, arguments.model, task.peft_task_type) if arguments.model.use_lora else model


def make_trainer(task: ClassificationTask, arguments: Arguments, prepared: Prepared, **kwargs: Any) -> LPGTrainer:
    """A trainer on what was prepared; `kwargs` have the model, or `model_init` that makes it."""
    arguments.training.remove_unused_columns &= not task.needs_all_columns
    num_labels = len(class_names(prepared.config))
    compute_metrics = make_metrics(arguments, prepared.class_counts, num_labels)
    check_best_metric(arguments.training, compute_metrics, num_labels)
    return LPGTrainer(
        args=arguments.training,
        train_dataset=prepared.splits.get(TRAIN),
        eval_dataset=prepared.splits.get(VALIDATION),
        processing_class=prepared.processor,
        compute_metrics=compute_metrics,
        **kwargs,
    )
