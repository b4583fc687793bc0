"""Config, processor and model of a task."""

from typing import Any

from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel

from .arguments import ModelArguments
from .load_data import explaining_what_is_missing


MODEL_CURE = (
    "pass a folder with the model's files, such as one that `save_pretrained` wrote or `hf download NAME --local-dir "
    "FOLDER` on another machine."
)


def hub_arguments(arguments: ModelArguments) -> dict[str, Any]:
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


def check_head(arguments: ModelArguments, config: PretrainedConfig, auto_model: Any) -> None:
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


def load_processor(arguments: ModelArguments, auto_processor: Any, **settings: Any) -> Any:
    """The tokenizer, image processor or feature extractor, with these of its settings changed."""
    argument, name = "--processor_name", arguments.processor_name
    if name is None and arguments.model_name_or_path is not None:
        argument, name = "--model_name_or_path", arguments.model_name_or_path
    elif name is None:
        argument, name = "--config_name", arguments.config_name
    assert name is not None  # else there is no config
    is_tokenizer = auto_processor is AutoTokenizer
    must_hold = "tokenizer.json and tokenizer_config.json" if is_tokenizer else "preprocessor_config.json"
    with explaining_what_is_missing("processor", name, argument, MODEL_CURE, must_hold):
        processor = auto_processor.from_pretrained(name, **settings, **hub_arguments(arguments))
        # transformers 5.23 makes one without any words where the folder has no files of a tokenizer.
        if is_tokenizer and processor.get_vocab().keys() <= set(processor.all_special_tokens):
            raise OSError("the tokenizer found has no words")
    return processor


def load_model(arguments: ModelArguments, config: PretrainedConfig, auto_model: Any) -> PreTrainedModel:
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
