"""Command line and config files of `lpg-hf train`, with a help that puts what is ours under one heading."""

import json
import re
from argparse import Action, ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter, _ArgumentGroup
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar

import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import string_to_bool

from ..config import LPGConfig
from .arguments import (
    OUR_HEADING,
    TRAINING_HEADING,
    Arguments,
    DataArguments,
    FixesArguments,
    FolderUseArguments,
    ModelArguments,
    ReportArguments,
    StressArguments,
)
from .closest import closest
from .training_checks import check_training_arguments


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
# Where transformers tells what its Trainer makes of an argument, not what a command does.
OWN_HELP = {
    "output_dir": "Required: folder for the model and all results.",
    "do_train": "Whether to train, and to save the model.",
    "do_eval": "Whether to evaluate on the validation data.",
    "do_predict": "Whether to write predictions.csv for the test data: index, prediction and probability.",
    "eval_shares": "Class shares of the data that the model will meet: eval_dataset, train, uniform, or one number "
    "per class: by name, as in ham=0.9 spam=0.1, or as in 0.9 0.1 in the order of the classes: that of the data set, "
    "else integers by size and names by the alphabet. A line at the start shows it.",
}
# Names in the published commands that TrainingArguments had before transformers 5. A ratio is a share of the steps.
OLDER_NAMES = {
    "eval_strategy": "--evaluation_strategy",
    "use_cpu": "--no_cuda",
    "warmup_steps": "--warmup_ratio",
    "hub_model_id": "--push_to_hub_model_id",
}
CONFIG_SUFFIXES = (".yaml", ".yml", ".json")
TRUTH_VALUE, TEXT, NOTHING = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:str", "tag:yaml.org,2002:null"


class ConfigLoader(yaml.SafeLoader):
    """Takes the names in a mapping as they are written: `on`, `off` and `1.50` may be the names of classes."""

    # In an argument that is a mapping, yes and no are words, as they are in `save_strategy: no`.
    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != TRUTH_VALUE]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        check_names(node)
        self.flatten_mapping(node)
        for name, _ in node.value:
            name.tag = TEXT
        return super().construct_mapping(node, deep)


ConfigLoader.add_implicit_resolver(TRUTH_VALUE, re.compile("(?i:true|false|on|off)$"), list("tTfFoO"))


def check_names(mapping: yaml.MappingNode) -> None:
    """
    Raises:
        ValueError: If a name is there twice, of which YAML would take the last.
    """
    counts = Counter(str(name.value) for name, _ in mapping.value)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise ValueError(f"{twice[0]!r} is there twice. Leave one of them.")


def truth_value(text: str) -> bool:
    """What transformers takes for yes or no, and the on and off of YAML."""
    return string_to_bool({"on": "true", "off": "false"}.get(text.lower(), text))


class HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """The description as it was written, one name of each argument, and its default where it has one."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=36, width=119)

    def _format_action_invocation(self, action: Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return ", ".join(action.option_strings)
        value = f"{{{','.join(map(str, action.choices))}}}" if action.choices else "VALUE"
        value = {"+": f"{value} ...", "?": "[true|false]"}.get(str(action.nargs), value)
        return f"{action.option_strings[0]} {value}"

    def _get_help_string(self, action: Action) -> str | None:
        return action.help if action.default is None or action.required else super()._get_help_string(action)


class ArgumentParser(HfArgumentParser):
    """
    An [`~transformers.HfArgumentParser`] whose help begins with what a newcomer needs.

    The fields of [`LPGConfig`] are listed in two groups, its own with the other arguments of this library. The output
    folder must be given: in a shared default, a run would resume another one's checkpoint.
    """

    def __init__(self, dataclasses: list[Any], **kwargs: Any) -> None:
        self._groups_by_heading: dict[str, _ArgumentGroup] = {}
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
        self.register("type", string_to_bool, truth_value)

    def add_argument_group(self, *args: Any, **kwargs: Any) -> _ArgumentGroup:
        title = args[0] if args else kwargs["title"]
        if title not in self._groups_by_heading:
            self._groups_by_heading[title] = super().add_argument_group(*args, **kwargs)
        return self._groups_by_heading[title]

    def add_argument(self, *flags: Any, **settings: Any) -> Action:
        name = flags[0].removeprefix("--").removeprefix("no_")
        if name in OLDER_NAMES:
            flags = (*flags, OLDER_NAMES[name])
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


def parse_arguments(data_class: type[DataArguments], prog: str, description: str, argv: list[str]) -> Arguments:
    """
    Reads the command line, or a config file and what overrides it.

    Args:
        data_class (`type`): [`DataArguments`] with the fields of one kind of data.
        prog (`str`): What is typed before the arguments.
        description (`str`): What the command does, with an example that works.
        argv (`list[str]`): The arguments; nothing at all prints a short help.

    Returns:
        [`Arguments`]: What was asked for.

    Raises:
        SystemExit: With status 2 for arguments that are unknown, missing or out of range, and where there is none.
    """
    shared = [FixesArguments, StressArguments, ReportArguments, FolderUseArguments, LPGConfig]
    parser = ArgumentParser([ModelArguments, data_class, *shared], prog=prog, description=description)
    if not argv:
        print(parser.format_short_help())
        raise SystemExit(2)
    try:
        argv = expand_config(argv)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    try:
        *parsed, unknown = parser.parse_args_into_dataclasses(
            argv, return_remaining_strings=True, look_for_args_file=False
        )
        arguments = Arguments(*parsed)
        check_training_arguments(arguments.training)
    except ValueError as error:  # of transformers, too, whose arguments must fit each other
        parser.error(str(error))
    if unknown and unknown[0].endswith(CONFIG_SUFFIXES):
        parser.error(f"unknown argument {unknown[0]}. A config file comes first, in front of all arguments")
    if unknown:
        # Each has a name with hyphens, too.
        names = [name for name in parser._option_string_actions if "-" not in name.removeprefix("--")]
        parser.error(closest("argument", unknown[0], names))
    return arguments


def expand_config(argv: list[str]) -> list[str]:
    """The arguments, with those of a config file in the place of its name where they begin with one."""
    return [*read_config(argv[0]), *argv[1:]] if argv and argv[0].endswith(CONFIG_SUFFIXES) else argv


def read_config(path: str) -> list[str]:
    """
    The command line that a YAML or JSON file of arguments stands for.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it does not hold names with values.
    """
    try:
        loader = ConfigLoader(Path(path).read_text(encoding="utf-8"))  # JSON is YAML
        config = loader.get_single_node()
        if not isinstance(config, yaml.MappingNode):
            found = "nothing" if config is None else f"a {config.id}"
            raise ValueError(f"it holds {found}, but must hold arguments: lines of `name: value`.")
        check_names(config)
        loader.flatten_mapping(config)
        argv: list[str] = []
        for name, value in config.value:
            if value.tag == NOTHING:
                continue
            values = value.value if isinstance(value, yaml.SequenceNode) else [value]
            typed = [as_typed(loader, each) for each in values if each.tag != NOTHING]
            if len(typed) == 1 and typed[0].startswith("-"):  # else it would be taken for an argument
                argv.append(f"--{name.value}={typed[0]}")
            else:
                argv += [f"--{name.value}", *typed]
        return argv
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML or JSON: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path} cannot be used: {error}") from error


def as_typed(loader: ConfigLoader, value: yaml.Node) -> str:
    """The value as it would be typed: what is written there, such as `2026_11`, and a mapping as JSON."""
    if isinstance(value, yaml.ScalarNode):
        return value.value
    return json.dumps(loader.construct_object(value, deep=True), default=str)
