"""Command line and config files of the examples, with a help that puts what is ours under one heading."""

import difflib
import json
import math
import sys
from argparse import Action, ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser, TrainingArguments

from lpg_hf import LPGConfig
from lpg_hf.report import check_installed


OUR_HEADING = "noisy and imbalanced labels (lpg_hf)"
TRAINING_HEADING = "training (transformers.TrainingArguments)"
ESSENTIAL_HEADING = "what to do"
ESSENTIALS = (
    "--output_dir",
    "--do_train",
    "--do_eval",
    "--do_predict",
    "--num_train_epochs",
    "--learning_rate",
    "--per_device_train_batch_size",
)
# Where transformers tells what its Trainer makes of an argument, not what a script does.
OWN_HELP = {
    "output_dir": "Required: folder for the model and all results.",
    "do_train": "Whether to train, and to save the model.",
    "do_eval": "Whether to evaluate on the validation data.",
    "do_predict": "Whether to write predictions.csv for the test data.",
}
CONFIG_SUFFIXES = (".yaml", ".yml", ".json")


@dataclass
class ModelArguments:
    """Which model, and whether all of it is trained."""

    _argument_group_name = "model"

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Pretrained model: a folder, or its name on the hub."}
    )
    config_name: str | None = field(
        default=None,
        metadata={
            "help": "Config, where it is not the model's. Without --model_name_or_path a model with fresh weights is "
            "made from it."
        },
    )
    processor_name: str | None = field(
        default=None,
        metadata={
            "help": "Tokenizer, image processor or feature extractor, where it is not the model's.",
            "aliases": ["--tokenizer_name", "--image_processor_name", "--feature_extractor_name"],
        },
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads from the hub are kept."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model on the hub."})
    token: str | None = field(default=None, metadata={"help": "Token for private models and data on the hub."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Whether code that comes with the model may run on this machine."}
    )
    ignore_mismatched_sizes: bool = field(
        default=False,
        metadata={"help": "Whether a head that was trained for other classes is replaced by a fresh one."},
    )
    use_lora: bool = field(
        default=False, metadata={"help": "Whether to train LoRA adapters and the head alone (needs `peft`)."}
    )
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of the adapters, divided by their rank."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout in front of the adapters."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"],
        metadata={"help": "Names of the layers that get adapters; `all-linear` for every linear layer but the head."},
    )

    def __post_init__(self):
        if self.lora_r < 1:
            raise ValueError(f"`--lora_r` is {self.lora_r}, but must be at least 1. Common ranks are 8 to 64.")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"`--lora_dropout` is {self.lora_dropout}, but must be in [0, 1): a share of the inputs.")


@dataclass
class DataArguments:
    """Where rows come from, and how many are used. Give a data set of the hub, or local files."""

    _argument_group_name = "data"

    dataset_name: str | None = field(
        default=None, metadata={"help": "Data set: its name on the hub, or a folder that `load_dataset` understands."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of that data set."})
    train_split_name: str = field(default="train", metadata={"help": "Its split to train on."})
    validation_split_name: str = field(
        default="validation", metadata={"help": "Its split to evaluate on.", "aliases": ["--eval_split_name"]}
    )
    test_split_name: str = field(default="test", metadata={"help": "Its split for --do_predict."})
    train_file: str | None = field(
        default=None, metadata={"help": "CSV, JSON lines or Parquet to train on; may be a pattern in quotes."}
    )
    validation_file: str | None = field(
        default=None, metadata={"help": "The same to evaluate on.", "aliases": ["--eval_file"]}
    )
    test_file: str | None = field(default=None, metadata={"help": "The same for --do_predict; labels not needed."})
    label_column_name: str = field(default="label", metadata={"help": "Column of the labels: names or integers."})
    eval_label_column_name: str | None = field(
        default=None,
        metadata={"help": "Label column for evaluation, where it is another one, such as labels that were checked."},
    )
    train_val_split: float = field(
        default=0.15, metadata={"help": "Share of the training rows to evaluate on where there are no others."}
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on so many rows, drawn at random with --seed."}
    )
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on so many rows."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Predict so many rows."})

    def __post_init__(self):
        for name in ("max_train_samples", "max_eval_samples", "max_predict_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`--{name}` is {value}, but must be at least 1. Leave it out for all rows.")


@dataclass
class FolderArguments(DataArguments):
    """As well as files, folders with one folder per class, or with a `metadata.csv`."""

    train_dir: str | None = field(
        default=None, metadata={"help": "Folder to train on: one folder per class, or a metadata.csv with file_name."}
    )
    validation_dir: str | None = field(default=None, metadata={"help": "The same to evaluate on."})
    test_dir: str | None = field(default=None, metadata={"help": "The same for --do_predict."})


@dataclass
class StressArguments:
    """Makes clean training data noisy and imbalanced, to see what that costs. Evaluation data stays as it is."""

    _argument_group_name = OUR_HEADING

    label_noise: float = field(
        default=0.0, metadata={"help": "Share of training labels to replace by another class at random, in [0, 1)."}
    )
    imbalance_ratio: float = field(
        default=1.0,
        metadata={"help": "Cut the training data to a long tail: size of the largest class over the smallest."},
    )

    def __post_init__(self):
        if not 0 <= self.label_noise < 1:
            raise ValueError(
                f"`--label_noise` is {self.label_noise}, but must be in [0, 1): 0.4 gives 40 % of the rows "
                "a wrong label."
            )
        if not 1 <= self.imbalance_ratio < math.inf:
            raise ValueError(
                f"`--imbalance_ratio` is {self.imbalance_ratio}, but must be a finite number of at least 1: with 20 "
                "the largest class has 20 times the rows of the smallest."
            )


@dataclass
class ReportArguments:
    """What is written about the training."""

    _argument_group_name = OUR_HEADING

    report: bool = field(
        default=False,
        metadata={"help": "Write a report of the training, with the rows most likely labeled wrong, to output_dir."},
    )

    def __post_init__(self):
        if self.report:
            check_installed()


@dataclass
class Arguments:
    """All that was asked for. `data` also holds what only one kind of data has."""

    model: ModelArguments
    data: DataArguments
    stress: StressArguments
    report: ReportArguments
    training: LPGConfig


class HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """The description as it was written, one name of each argument, and its default where it has one."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=36, width=119)

    def _format_action_invocation(self, action: Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return ", ".join(action.option_strings)
        value = f"{{{','.join(map(str, action.choices))}}}" if action.choices else "VALUE"
        value = {"+": f"{value} ...", "?": "[true|false]"}.get(action.nargs, value)
        return f"{action.option_strings[0]} {value}"

    def _get_help_string(self, action: Action) -> str:
        return action.help if action.default is None or action.required else super()._get_help_string(action)


class ArgumentParser(HfArgumentParser):
    """
    An [`~transformers.HfArgumentParser`] whose help begins with what a newcomer needs.

    The fields of [`LPGConfig`] are listed in two groups, its own with the other arguments of this library. The output
    folder must be given: in a shared default, a run would resume another one's checkpoint.
    """

    def __init__(self, dataclasses: list[type], **kwargs):
        self._groups_by_heading = {}
        inherited = {f.name for f in fields(TrainingArguments)}
        self._headings = {f.name: TRAINING_HEADING if f.name in inherited else OUR_HEADING for f in fields(LPGConfig)}
        super().__init__(
            dataclasses,
            usage="%(prog)s [CONFIG.yaml] --output_dir FOLDER [--argument VALUE ...]",
            # Else what is misspelled may be another argument's beginning, and a new argument make it ambiguous.
            allow_abbrev=False,
            formatter_class=HelpFormatter,
            **kwargs,
        )

    def add_argument_group(self, *args, **kwargs):
        title = args[0] if args else kwargs.get("title")
        if title not in self._groups_by_heading:
            self._groups_by_heading[title] = super().add_argument_group(*args, **kwargs)
        return self._groups_by_heading[title]

    def add_argument(self, *flags, **settings):
        name = flags[0].removeprefix("--").removeprefix("no_")
        if name == "output_dir":
            settings = settings | {"required": True}
        if name in OWN_HELP:
            settings = settings | {"help": OWN_HELP[name]}
        if name in self._headings:
            return self.add_argument_group(self._headings[name]).add_argument(*flags, **settings)
        return super().add_argument(*flags, **settings)

    def format_short_help(self) -> str:
        """Of the arguments of the Trainer, which are more than a hundred, the few that every run needs."""
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, [], [])
        formatter.add_text(self.description)
        sections = {ESSENTIAL_HEADING: [self._option_string_actions[name] for name in ESSENTIALS]}
        sections |= {heading: group._group_actions for heading, group in self._groups_by_heading.items()}
        for heading, actions in sections.items():
            if heading not in ("options", TRAINING_HEADING):
                formatter.start_section(heading)
                formatter.add_arguments(actions)
                formatter.end_section()
        formatter.add_text("--help also lists the arguments of transformers.TrainingArguments.")
        return formatter.format_help()


def parse_arguments(
    data_class: type[DataArguments], description: str, argv: list[str] | None = None, *own_classes: type
) -> tuple[Any, ...]:
    """
    Reads the command line, or a config file and what overrides it.

    Args:
        data_class (`type`): [`DataArguments`] with the fields of one kind of data.
        description (`str`): What the script does, with a command that works.
        argv (`list[str]`, *optional*): Defaults to `sys.argv[1:]`; nothing at all prints a short help.
        own_classes (`type`): Dataclasses of arguments that one script alone has.

    Returns:
        An instance of each of `own_classes`, and [`Arguments`].

    Raises:
        SystemExit: With status 2 for unknown or missing arguments, and where there is none at all.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = ArgumentParser(
        [*own_classes, ModelArguments, data_class, StressArguments, ReportArguments, LPGConfig],
        description=description,
    )
    if not argv:
        print(parser.format_short_help())
        raise SystemExit(2)
    if argv[0].endswith(CONFIG_SUFFIXES):
        try:
            argv = [*read_config(argv[0]), *argv[1:]]
        except (OSError, ValueError) as error:
            parser.error(str(error))
    *parsed, unknown = parser.parse_args_into_dataclasses(
        argv, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        names = parser._option_string_actions
        longer = [name for name in names if name.startswith(unknown[0])]
        similar = longer[:3] or difflib.get_close_matches(unknown[0], names, n=3)
        hint = f" Did you mean {' or '.join(similar)}?" if similar else ""
        parser.error(f"unknown argument {unknown[0]}.{hint}")
    return *parsed[:-5], Arguments(*parsed[-5:])


def read_config(path: str) -> list[str]:
    """
    The command line that a YAML or JSON file of arguments stands for.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it does not hold names with values.
    """
    try:
        config = yaml.safe_load(Path(path).read_text())  # JSON is YAML
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML or JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}, but must hold arguments: lines of `name: value`.")
    argv = []
    for name, value in config.items():
        if value is None:
            continue
        values = value if isinstance(value, list) else [value]
        argv += [f"--{name}", *(json.dumps(v) if isinstance(v, dict) else str(v) for v in values)]
    return argv
