"""Finds modules that go on with values of old weights after new ones were loaded."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.modules.batchnorm import _NormBase

from ..batch import logits_of
from .kept_tensors import can_be_written, kept_as_before, kept_tensors
from .loaded_weights import LoadedWeights, same_logits
from .scope import fork_random_state
from .weight_noise import WeightNoise


def check_noise_reaches_logits(noise: WeightNoise, loaded: LoadedWeights, inputs: Mapping[str, Tensor]) -> None:
    """
    Refuses a model in which noise on a parameter is lost in evaluation mode, because a module keeps an old value.

    No forward pass can tell a kept value from a constant. A parameter is therefore refused only if all of this holds:
    a module around it keeps tensors that the logits depend on, training reaches the logits from the parameter, and
    noise on it does not change them in evaluation mode.

    Args:
        noise ([`WeightNoise`]): Noise of a model in evaluation mode.
        loaded ([`LoadedWeights`]): Of the same model, entered.
        inputs (`Mapping[str, torch.Tensor]`): Inputs of one batch, which the model has just run on.

    Raises:
        ValueError: If there is such a parameter.
    """
    keepers = _modules_that_keep_tensors(noise, loaded, inputs)
    if not keepers:
        return
    suspects = set().union(*keepers.values()) & _reached(noise, inputs, is_training=True)
    suspects -= _reached(noise, inputs, is_training=False)
    loaded.load(noise.weights)
    expected = _logits(noise, inputs)
    for name in sorted(suspects):
        weight = noise.weights[name]
        loaded.load(noise.weights | {name: weight + torch.randn_like(weight, memory_format=torch.preserve_format)})
        if same_logits(_logits(noise, inputs), expected):
            keeper = next(keeper for keeper, inside in keepers.items() if name in inside)
            raise ValueError(
                f"Noise on {name} changes no prediction, although training uses this parameter: "
                f"{keeper or type(noise.model).__name__} goes on with a value that it computed from other weights. "
                "Compute it in every forward pass, or drop it in the module's `train()`. If the parameter has no part "
                "in predictions, freeze it with `requires_grad_(False)`."
            )
    loaded.load(noise.weights)


def _logits(noise: WeightNoise, inputs: Mapping[str, Tensor]) -> Tensor:
    return logits_of(noise.model(**inputs)).clone()


def _modules_that_keep_tensors(
    noise: WeightNoise, loaded: LoadedWeights, inputs: Mapping[str, Tensor]
) -> dict[str, set[str]]:
    """Names the modules that keep tensors which act on the logits, with the noisy parameters inside of them."""
    names = {id(parameter): name for name, parameter in noise.model.named_parameters() if name in noise.weights}
    keepers = {
        path: inside
        for path, module in noise.model.named_modules()
        if kept_tensors(module)
        and (inside := {names[id(parameter)] for parameter in module.parameters() if id(parameter) in names})
    }
    if not keepers:
        return {}
    loaded.load(noise.weights)
    expected = _logits(noise, inputs)
    return {
        path: inside
        for path, inside in keepers.items()
        if _act_on_logits(kept_tensors(noise.model.get_submodule(path)), noise, inputs, expected)
    }


def _act_on_logits(kept: list[Tensor], noise: WeightNoise, inputs: Mapping[str, Tensor], expected: Tensor) -> bool:
    if not all(map(can_be_written, kept)):
        return True
    contents = [tensor.clone() for tensor in kept]
    for tensor in kept:
        tensor.add_(1)
    changed = _logits(noise, inputs)
    for tensor, content in zip(kept, contents, strict=True):
        tensor.copy_(content)
    return not same_logits(changed, expected)


def _reached(noise: WeightNoise, inputs: Mapping[str, Tensor], is_training: bool) -> set[str]:
    """Noisy parameters from which autograd has a path to the logits."""
    model = noise.model
    model.train()
    if not is_training:
        model.eval()
    for module in model.modules():
        if isinstance(module, _NormBase):
            module.eval()
    weights = {
        name: weight.clone().requires_grad_(weight.is_floating_point()) for name, weight in noise.weights.items()
    }
    # A training pass moves running statistics, and dropout the random state.
    with kept_as_before(model), fork_random_state(model), torch.enable_grad():
        logits = logits_of(functional_call(model, weights, kwargs=dict(inputs)))
        if not logits.requires_grad:
            return set()
        gradients = torch.autograd.grad(logits.float().sum(), list(weights.values()), allow_unused=True)
    return {name for name, gradient in zip(weights, gradients, strict=True) if gradient is not None}
