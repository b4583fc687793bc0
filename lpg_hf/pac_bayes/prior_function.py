"""Checks that a model is its prior with other weights, and nothing else."""

from collections.abc import Mapping

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from ..batch import logits_of
from .gibbs import evaluation_mode
from .loaded_weights import LoadedWeights
from .scope import device_of, fork_random_state, share_memory
from .weight_noise import EVALUATION, WeightNoise


# Noise relative to the size of each tensor: enough to show, and too little to make rounding count.
_RELATIVE_NOISE = 0.1


def check_prior_computes_the_same(
    noise: WeightNoise, loaded: LoadedWeights, prior: nn.Module, inputs: Mapping[str, Tensor]
) -> None:
    """
    Refuses a prior that predicts differently with the weights of the model, as they are and with noise.

    Comparing tensors by name misses what is not registered: a tensor in an attribute, a number, a hook. Noise shows
    what one of both has computed from other weights and kept in a place that no module holds, such as a global cache.

    Args:
        noise ([`WeightNoise`]): Noise of the model.
        loaded ([`LoadedWeights`]): Of the model, entered.
        prior (`torch.nn.Module`): It is not modified and stays on its device.
        inputs (`Mapping[str, torch.Tensor]`): Inputs of one batch.

    Raises:
        ValueError: If the logits differ by more than rounding.
    """
    device = device_of(prior)
    prior_inputs = send_to_device(inputs, device)
    moved, parameters = _parameters_that_move(noise), dict(prior.named_parameters())
    own = {name: parameters[name].detach().clone() for name in moved}
    with evaluation_mode(prior), LoadedWeights(prior, own) as loaded_prior:
        # With noise first, because a value that the prior keeps from now on is then another one than the model's.
        for weights in (_with_some_noise(noise), noise.weights):
            loaded.load(weights)
            expected = _logits(noise.model, inputs)
            loaded_prior.load({name: moved[name].detach().to(weight) for name, weight in own.items()})
            found = _logits(prior, prior_inputs).to(expected.device)
            difference = (expected.double() - found.double()).abs().max().item()
            if difference > _tolerance(expected, found):
                raise ValueError(
                    f"With the weights of `model`, `prior` has other logits than `model` (they differ by "
                    f"{difference:.3g}). They differ in something besides their parameters and buffers, such as a "
                    "setting or a tensor in an attribute, which may hold information about the certificate set. Or "
                    "one of them goes on with what it computed from other weights, as a number or in a global cache. "
                    "Register tensors as parameters or buffers, compute from weights in every forward pass, and use a "
                    "copy of `model` before its training as the prior."
                )


def _parameters_that_move(noise: WeightNoise) -> dict[str, nn.Parameter]:
    """Parameters of the model that get noise, and those that lie in the memory of one of these."""
    parameters = dict(noise.model.named_parameters())
    noisy = [parameters[name] for name in noise.weights]
    return {
        name: parameter
        for name, parameter in parameters.items()
        if name in noise.weights or any(share_memory(parameter, other) for other in noisy)
    }


def _with_some_noise(noise: WeightNoise) -> dict[str, Tensor]:
    z = noise.sample(EVALUATION, 0)
    return {
        name: (weight + _RELATIVE_NOISE * weight.double().square().mean().sqrt() * z[name]).to(weight.dtype)
        for name, weight in noise.weights.items()
    }


def _tolerance(expected: Tensor, found: Tensor) -> float:
    # Kernels and devices round differently, by less than the root of the precision.
    epsilon = max(torch.finfo(logits.dtype).eps for logits in (expected, found))
    return epsilon**0.5 * max(1.0, expected.double().abs().max().item())


def _logits(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    # Dropout that stays active in evaluation mode takes the same numbers for both models.
    with fork_random_state(model):
        return logits_of(model(**inputs)).clone()
