"""Config, processor and model of a task, and adapters in place of full fine-tuning."""

from dataclasses import replace
from pathlib import Path

from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

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
    argument = "--config_name" if arguments.config_name else "--model_name_or_path"
    name = arguments.config_name or arguments.model_name_or_path
    if name is None:
        raise ValueError("Pass --model_name_or_path for a pretrained model, or --config_name for fresh weights.")
    with explaining_what_is_missing("config", name, argument, MODEL_CURE):
        return AutoConfig.from_pretrained(name, **hub_arguments(arguments))


def load_processor(arguments: ModelArguments, auto_processor: type):
    """The tokenizer, image processor or feature extractor."""
    name = arguments.processor_name or arguments.model_name_or_path or arguments.config_name
    argument = "--processor_name" if arguments.processor_name else "--model_name_or_path"
    with explaining_what_is_missing("processor", name, argument, MODEL_CURE):
        return auto_processor.from_pretrained(name, **hub_arguments(arguments))


def load_model(arguments: ModelArguments, config: PretrainedConfig, auto_model: type) -> PreTrainedModel:
    """
    The model with a head for the classes of `config`.

    Raises:
        ValueError: If its architecture has no such head, or one for other classes.
        OSError: If there is none of that name.
    """
    has_own_code = arguments.trust_remote_code and auto_model.__name__ in getattr(config, "auto_map", {})
    if type(config) not in auto_model._model_mapping and not has_own_code:
        architectures = ", ".join(config.architectures or ["unknown"])
        raise ValueError(
            f"{arguments.model_name_or_path or arguments.config_name} is a {config.model_type!r} model (its files "
            f"hold {architectures}), for which transformers has no classification head of this kind "
            f"({auto_model.__name__}). Choose a model of one of these types: "
            f"{', '.join(sorted(known.model_type for known in auto_model._model_mapping))}."
        )
    name = arguments.model_name_or_path
    if name is None:
        return auto_model.from_config(config, trust_remote_code=arguments.trust_remote_code)
    try:
        with explaining_what_is_missing("model", name, "--model_name_or_path", MODEL_CURE):
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
    Freezes the model but for its head and new adapters.

    Raises:
        ValueError: If the model has fresh weights, or `peft` is not there.
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
        modules_to_save=head,
    )
    return get_peft_model(model, config)


def save_merged(model: PreTrainedModel, processor, output_dir: str) -> None:
    """
    Writes a model whose adapters are part of its weights, which it has from then on.

    The adapters name neither the classes nor the size of the head. A config beside them would not help: transformers
    then looks for the weights of the whole model there, too.
    """
    folder = Path(output_dir) / MERGED_FOLDER
    model.merge_and_unload().save_pretrained(folder)
    processor.save_pretrained(folder)
