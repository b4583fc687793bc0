"""Scope of a certificate: the parameters that get noise, and the base model that may stay without."""

from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel


SCOPES = ("trained", "head", "lora")

_LORA_NAMES = ("lora_", "modules_to_save.")


def parameters_in_scope(model: nn.Module, scope: str) -> list[str]:
    """
    Names the parameters that get noise.

    Args:
        model (`torch.nn.Module`): The classifier.
        scope (`str`): One of [`SCOPES`], explained at [`certify`].

    Returns:
        `list[str]`: Names as in `model.named_parameters()`, at least one.

    Raises:
        ValueError: If `scope` is unknown, or selects no parameter or a complex one, or parameters of the model are
            not here as a whole.
    """
    if scope not in SCOPES:
        raise ValueError(f"`scope` must be one of {', '.join(SCOPES)}; found {scope!r}. Use 'trained' if in doubt.")
    _check_whole(model)
    if scope == "trained":
        names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    elif scope == "lora":
        names = [name for name, _ in model.named_parameters() if any(part in name for part in _LORA_NAMES)]
    else:
        backbone = find_backbone(model)
        if backbone is None:
            raise ValueError(
                f"`scope` 'head' needs a model with a base model inside; found {type(model).__name__} without one. "
                "Freeze everything but the head with `requires_grad_(False)` before training, and use 'trained'."
            )
        in_backbone = {id(parameter) for parameter in backbone.parameters()}
        names = [name for name, parameter in model.named_parameters() if id(parameter) not in in_backbone]
    if not names:
        raise ValueError(
            f"`scope` {scope!r} selects no parameter of {type(model).__name__}. Use 'trained' for parameters that "
            "require a gradient, 'head' for parameters outside the base model, or 'lora' for adapters of peft and the "
            "modules saved with them."
        )
    parameters = dict(model.named_parameters())
    for name in names:
        if parameters[name].is_complex():
            raise ValueError(
                f"Noise on complex numbers is not defined here; found {name} of {parameters[name].dtype}. Make it a "
                "real parameter, of which the forward pass takes `torch.view_as_complex`."
            )
    return names


def _check_whole(model: nn.Module) -> None:
    """Refuses shards, whose noise and whose distance from the prior would be those of nothing."""
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor) or parameter.is_meta or parameter.numel() == 0:
            raise ValueError(
                f"The parameter {name} is not here as a whole (shape {list(parameter.shape)} on {parameter.device}), "
                "as with FSDP, DeepSpeed ZeRO-3 or offloading, so noise on it is not defined. Save the model, and "
                "load it with `from_pretrained` without sharding."
            )


def find_pretrained_model(model: nn.Module) -> nn.Module:
    """Finds the `transformers` model inside a wrapper such as peft's. Falls back on the model itself."""
    return next((module for module in model.modules() if isinstance(module, PreTrainedModel)), model)


def find_backbone(model: nn.Module) -> nn.Module | None:
    """Finds the base model of a `transformers` model with a head. `None` for every other model."""
    inner = find_pretrained_model(model)
    if not isinstance(inner, PreTrainedModel) or inner.base_model is inner:
        return None
    return inner.base_model


def share_memory(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors overlap in memory. Quantized tensors that have no memory of their own do not."""
    begins = first.data_ptr(), second.data_ptr()
    if first.device != second.device or 0 in begins:
        return False
    ends = (begin + tensor.nbytes for begin, tensor in zip(begins, (first, second), strict=True))
    return max(begins) < min(ends)


def device_of(model: nn.Module) -> torch.device:
    """The device of the first parameter, which is where the inputs go."""
    return next(model.parameters()).device


def fork_random_state(model: nn.Module) -> AbstractContextManager[None]:
    """Context that puts the random state of the CPU and of the model's device back at its end."""
    device = device_of(model)
    return torch.random.fork_rng([device] if device.type == "cuda" else [])
