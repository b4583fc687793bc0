"""Config, processor and model of a task, and adapters in place of full fine-tuning."""

from dataclasses import replace
from pathlib import Path

from torch import nn
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .arguments import ModelArguments
from .data import explaining_what_is_missing


MODEL_CURE = (
    "pass a folder with the model's files, such as one that `save_pretrained` wrote or `hf download NAME --local-dir "
    "FOLDER` on another machine."
)


ADAPTER_CONFIG = "adapter_config.json"
MERGED_FOLDER = "merged"


def with_merged_model(arguments: ModelArguments) -> ModelArguments:
    """
    The arguments, with the whole model in the place of the adapters where those of a run with `--use_lora` are named.

    Raises:
        ValueError: If there are only adapters in the folder.
    """
    folder = arguments.model_name_or_path
    if folder is None or not (Path(folder) / ADAPTER_CONFIG).exists():
        return arguments
    merged = Path(folder) / MERGED_FOLDER
    if not merged.exists():
        raise ValueError(
            f"`--model_name_or_path` is {folder!r}, which holds LoRA adapters alone. Pass the folder "
            f"{MERGED_FOLDER!r} that a finished training with --use_lora leaves in its output folder, or the model "
            "that was adapted."
        )
    return replace(arguments, model_name_or_path=str(merged))


def hub_arguments(arguments: ModelArguments) -> dict:
    return {
        "cache_dir": arguments.cache_dir,
        "revision": arguments.model_revision,
        "token": arguments.token,
        "trust_remote_code": arguments.trust_remote_code,
    }


def load_config(arguments: ModelArguments) -> PretrainedConfig:
    """
    The config of the model, or the one to make a model from.

    Raises:
        ValueError: If neither model nor config is named.
        OSError: If there is none of that name.
    """
    argument, name = config_source(arguments)
    if name is None:
        raise ValueError("Pass --model_name_or_path for a pretrained model, or --config_name for fresh weights.")
    with explaining_what_is_missing("config", name, argument, MODEL_CURE, "a config.json with a model_type"):
        return AutoConfig.from_pretrained(name, **hub_arguments(arguments))


def config_source(arguments: ModelArguments) -> tuple[str, str | None]:
    """The argument that names the config, and what it names."""
    if arguments.config_name:
        return "--config_name", arguments.config_name
    return "--model_name_or_path", arguments.model_name_or_path


def check_head(arguments: ModelArguments, config: PretrainedConfig, auto_model: type) -> None:
    """
    Raises:
        ValueError: If the architecture has no head for the task.
    """
    has_own_code = arguments.trust_remote_code and auto_model.__name__ in getattr(config, "auto_map", {})
    if type(config) in auto_model._model_mapping or has_own_code:
        return
    argument, name = config_source(arguments)
    architectures = ", ".join(config.architectures or ["unknown"])
    raise ValueError(
        f"`{argument}` is {name!r}, a {config.model_type!r} model (its files hold {architectures}), for which "
        f"transformers has no classification head of this kind ({auto_model.__name__}). Choose a model of one of "
        f"these types: {', '.join(sorted(known.model_type for known in auto_model._model_mapping))}."
    )


def load_processor(arguments: ModelArguments, auto_processor: type):
    """The tokenizer, image processor or feature extractor."""
    argument, name = "--processor_name", arguments.processor_name
    if name is None and arguments.model_name_or_path is not None:
        argument, name = "--model_name_or_path", arguments.model_name_or_path
    elif name is None:
        argument, name = "--config_name", arguments.config_name
    is_tokenizer = auto_processor is AutoTokenizer
    must_hold = "tokenizer.json and tokenizer_config.json" if is_tokenizer else "preprocessor_config.json"
    with explaining_what_is_missing("processor", name, argument, MODEL_CURE, must_hold):
        processor = auto_processor.from_pretrained(name, **hub_arguments(arguments))
        # transformers 5.23 makes one without any words where the folder has no files of a tokenizer.
        if is_tokenizer and processor.get_vocab().keys() <= set(processor.all_special_tokens):
            raise OSError("the tokenizer found has no words")
    return processor


def load_model(arguments: ModelArguments, config: PretrainedConfig, auto_model: type) -> PreTrainedModel:
    """
    The model with a head for the classes of `config`.

    Raises:
        ValueError: If its head is one for other classes.
        OSError: If there is none of that name.
    """
    name = arguments.model_name_or_path
    if name is None:
        return auto_model.from_config(config, trust_remote_code=arguments.trust_remote_code)
    try:
        with explaining_what_is_missing("model", name, "--model_name_or_path", MODEL_CURE, "model.safetensors"):
            return auto_model.from_pretrained(
                name,
                config=config,
                ignore_mismatched_sizes=arguments.ignore_mismatched_sizes,
                **hub_arguments(arguments),
            )
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise ValueError(
            f"{name} has a head for other classes than the {config.num_labels} of this data. Pass "
            "--ignore_mismatched_sizes to replace it by a fresh one."
        ) from error


def add_lora(model: PreTrainedModel, arguments: ModelArguments, task_type: str | None) -> PreTrainedModel:
    """
    Freezes the model but for its head, layers of batch normalization, and new adapters.

    Raises:
        ValueError: If the model has fresh weights or no layers of these names, or `peft` is not there.
    """
    if arguments.model_name_or_path is None:
        raise ValueError("`--use_lora` adapts a pretrained model: pass --model_name_or_path.")
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ValueError("`--use_lora` needs peft: pip install peft") from error
    # All that is not the backbone is new and must be trained in full: poolers, projections, the classifier.
    head = [
        name
        for name, module in model.named_children()
        if name != model.base_model_prefix and next(module.parameters(), None) is not None
    ]
    targets = arguments.lora_target_modules
    config = LoraConfig(
        task_type=task_type,
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        exclude_modules=rf"({'|'.join(head)})(\..*)?",
        modules_to_save=[*head, *batch_norms(model, head)],
    )
    # Of several names, peft passes over those that it does not find.
    if missing := [name for name in targets if targets != ["all-linear"] and not has_layer(model, name)]:
        raise ValueError(describe_missing_layers(missing, model, head))
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise ValueError(describe_missing_layers(targets, model, head)) from error


def has_layer(model: PreTrainedModel, name: str) -> bool:
    return any(f".{path}".endswith(f".{name}") for path, _ in model.named_modules())


def describe_missing_layers(names: list[str], model: PreTrainedModel, head: list[str]) -> str:
    return (
        f"`--lora_target_modules` has {', '.join(names)}, but this {model.config.model_type!r} model has no layers of "
        f"that name that can have adapters. It has {adaptable_layers(model, head)}. Pass some of these names."
    )


def batch_norms(model: PreTrainedModel, head: list[str]) -> list[str]:
    """Training moves their statistics, which only layers that are trained in full save with the adapters."""
    norms = [path for path, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    return [path for path in norms if path.partition(".")[0] not in head]


def adaptable_layers(model: PreTrainedModel, head: list[str]) -> str:
    """The names of its linear layers and convolutions, without where in the model they are."""
    names = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | Conv1D) and path.partition(".")[0] not in head:
            names.setdefault(type(module).__name__, set()).add(path.rpartition(".")[2])
    return "; ".join(f"{kind}: {', '.join(sorted(found))}" for kind, found in names.items())


def save_merged(model: PreTrainedModel, processor, output_dir: str) -> None:
    """
    Writes a model whose adapters are part of its weights, which it has from then on.

    The adapters name neither the classes nor the size of the head. A config beside them would not help: transformers
    then looks for the weights of the whole model there, too.
    """
    folder = Path(output_dir) / MERGED_FOLDER
    model.merge_and_unload().save_pretrained(folder)
    processor.save_pretrained(folder)
