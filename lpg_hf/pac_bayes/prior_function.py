"""Checks that a model is its prior with other weights, and nothing else."""

from collections.abc import Mapping

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from ..batch import logits_of
from .gibbs import evaluation_mode
from .loaded_weights import LoadedWeights
from .scope import device_of, fork_random_state
from .weight_noise import WeightNoise


_NUM_ROWS = 2


def check_prior_computes_the_same(
    noise: WeightNoise, loaded: LoadedWeights, prior: nn.Module, inputs: Mapping[str, Tensor]
) -> None:
    """
    Refuses a prior that predicts differently with the weights of the model.

    Comparing tensors by name misses what is not registered: a tensor in an attribute, a number, a hook.

    Args:
        noise ([`WeightNoise`]): Noise of the model.
        loaded ([`LoadedWeights`]): Of the model, entered.
        prior (`torch.nn.Module`): It is not modified and stays on its device.
        inputs (`Mapping[str, torch.Tensor]`): Inputs of one batch, of which two rows are compared.

    Raises:
        ValueError: If the logits differ by more than rounding.
    """
    rows = _few_rows(inputs)
    loaded.load(noise.weights)
    expected = _logits(noise.model, rows)
    device = device_of(prior)
    parameters = dict(prior.named_parameters())
    own = {name: parameters[name].detach().clone() for name in noise.weights}
    with evaluation_mode(prior), LoadedWeights(prior, own) as loaded_prior:
        loaded_prior.load({name: weight.to(own[name]) for name, weight in noise.weights.items()})
        found = _logits(prior, send_to_device(rows, device)).to(expected.device)
    epsilon = max(torch.finfo(logits.dtype).eps for logits in (expected, found))
    difference = (expected.double() - found.double()).abs().max().item()
    # Kernels and devices round differently, by less than the root of the precision.
    if difference > epsilon**0.5 * max(1.0, expected.double().abs().max().item()):
        raise ValueError(
            f"With the weights of `model`, `prior` has other logits than `model` (they differ by {difference:.3g}). "
            "They differ in something besides their parameters and buffers, such as a setting or a tensor in an "
            "attribute, which may hold information about the certificate set. Register tensors as parameters or "
            "buffers, and use a copy of `model` before its training as the prior."
        )


def _few_rows(inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    lengths = {len(value) if isinstance(value, Tensor) and value.ndim > 0 else None for value in inputs.values()}
    # Where the inputs do not all have one entry per row, all rows stay.
    return (
        inputs if len(lengths) != 1 or None in lengths else {name: value[:_NUM_ROWS] for name, value in inputs.items()}
    )


def _logits(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    # Dropout that stays active in evaluation mode takes the same numbers for both models.
    with fork_random_state(model):
        return logits_of(model(**inputs)).clone()
