"""LoRA adapters in place of full fine-tuning."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .arguments import ModelArguments


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


def add_lora(model: PreTrainedModel, arguments: ModelArguments, task_type: str | None) -> Any:
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
    names: dict[str, set[str]] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | Conv1D) and path.partition(".")[0] not in head:
            names.setdefault(type(module).__name__, set()).add(path.rpartition(".")[2])
    return "; ".join(f"{kind}: {', '.join(sorted(found))}" for kind, found in names.items())


def save_merged(model: Any, processor: Any, output_dir: str) -> None:
    """
    Writes a model whose adapters are part of its weights, which it has from then on.

    The adapters name neither the classes nor the size of the head. A config beside them would not help: transformers
    then looks for the weights of the whole model there, too.
    """
    folder = Path(output_dir) / MERGED_FOLDER
    model.merge_and_unload().save_pretrained(folder)
    processor.save_pretrained(folder)
