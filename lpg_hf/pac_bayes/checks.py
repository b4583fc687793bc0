"""Checks of everything that would make a certificate untrue, before it is computed."""

import hashlib
import math
import operator
from collections.abc import Sequence

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from .scope import share_memory


def check_settings(
    sigma_grid: Sequence[float], delta: float, num_draws: int, num_selection_draws: int
) -> tuple[float, ...]:
    """Checks the numbers that [`certify`] takes, and returns the grid as a tuple of floats."""
    if not 0 < delta < 1:
        raise ValueError(
            f"`delta` is a probability of failure, strictly between 0 and 1; found {delta}. Use 0.05 for a confidence "
            "of 95 %."
        )
    grid = tuple(map(float, sigma_grid))
    if not grid or not all(0 < sigma < math.inf for sigma in grid) or len(set(grid)) < len(grid):
        raise ValueError(
            f"`sigma_grid` needs different, finite standard deviations above 0; found {grid}. Leave it out for the "
            "default grid."
        )
    for name, value in (("num_draws", num_draws), ("num_selection_draws", num_selection_draws)):
        if operator.index(value) < 1:
            raise ValueError(f"`{name}` must be at least 1; found {value}. Leave it out for the default.")
    return grid


def check_draws_suffice(num_draws: int, num_labels: int, draw_level: float) -> None:
    """Refuses so few draws that the limit for a class is above one half even if no draw makes an error."""
    # Without a single error, the limit is 1 - (level / 2C)^(1/K).
    needed = max(2, math.ceil(math.log(2 * num_labels / draw_level) / math.log(2)))
    if num_draws < needed:
        raise ValueError(
            f"`num_draws` is {num_draws}, but with fewer than {needed} the correction for the draws alone lifts every "
            f"class above 0.5 ({num_labels} classes). Use a few hundred."
        )


def check_label_noise(label_noise: float | None, num_labels: int) -> None:
    """Refuses a rate of label noise at which the labels say nothing about the true ones."""
    highest = (num_labels - 1) / num_labels
    if label_noise is not None and not 0 <= label_noise < highest:
        raise ValueError(
            f"`label_noise` must be a rate in [0, {highest:.4g}), which is (C-1)/C for C = {num_labels}; found "
            f"{label_noise}. Use a lower limit of the rate if it is not known."
        )


def check_processes_agree(*values: object) -> None:
    """
    Refuses processes that share draws, but not what these are drawn for.

    Args:
        *values (`object`): Weights, rows and settings by their hashes, or by what `repr` shows. Every process must
            call it.

    Raises:
        ValueError: On every process, if they differ.
    """
    identities = gather_object([hashlib.blake2b(repr(values).encode(), digest_size=16).hexdigest()])
    if len(set(identities)) > 1:
        raise ValueError(
            f"The {len(identities)} processes share the draws, so they must have the same weights, rows and settings; "
            "found others. Give every process the whole data set, not its shard, and the model that all trained."
        )


def squared_distance_to_prior(model: nn.Module, prior: nn.Module, names: Sequence[str]) -> float:
    """
    Checks that a posterior and its prior differ only in the noisy parameters, and measures their distance.

    Args:
        model (`torch.nn.Module`): The posterior's mean.
        prior (`torch.nn.Module`): The prior's mean.
        names (`Sequence[str]`): Parameters that get noise.

    Returns:
        `float`: Squared Euclidean distance over the noisy parameters.

    Raises:
        ValueError: If the architectures differ, a noisy parameter has one memory in both, a tensor without noise
            differs, BatchNorm uses or follows its batches, or the distance is not finite.
    """
    _check_architecture(model, prior)
    _check_own_memory(model, prior, names)
    _check_batch_norm(model)
    in_scope = set(names)
    prior_tensors = dict(_named_tensors(prior))
    squared_distance, different = 0.0, []
    for name, tensor in _named_tensors(model):
        tensor, other = tensor.detach(), prior_tensors[name].detach().to(tensor.device)
        if name in in_scope:
            squared_distance += (tensor.double() - other.double()).square().sum().item()
        elif not torch.equal(tensor, other):
            different.append(name)
    if not math.isfinite(squared_distance):
        raise ValueError(
            "The weights of `model` or `prior` are not finite (NaN or infinite), so the distance between them is not "
            "defined. Certify a training that did not diverge."
        )
    if different:
        shown = ", ".join(different[:3]) + (", ..." if len(different) > 3 else "")
        raise ValueError(
            f"{len(different)} tensors without noise differ from the prior's ({shown}). They may hold information "
            "about the certificate set that the bound does not pay for. For parameters, widen `scope`, or freeze them "
            "in training. For running statistics, keep BatchNorm in eval mode while the model is trained, or copy the "
            "prior's."
        )
    return squared_distance


def _named_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _check_architecture(model: nn.Module, prior: nn.Module) -> None:
    layout, prior_layout = (
        {name: type(module).__name__ for name, module in network.named_modules()}
        | {f"{name} (tensor)": str(list(tensor.shape)) for name, tensor in _named_tensors(network)}
        for network in (model, prior)
    )
    for name in sorted(layout.keys() | prior_layout.keys()):
        if layout.get(name) != prior_layout.get(name):
            raise ValueError(
                f"`prior` has another architecture than `model`; {name or 'the model itself'} is {layout.get(name)} "
                f"in `model` and {prior_layout.get(name)} in `prior`. Use a copy of `model` before its training."
            )


def _check_own_memory(model: nn.Module, prior: nn.Module, names: Sequence[str]) -> None:
    parameters, prior_parameters = dict(model.named_parameters()), dict(prior.named_parameters())
    shared = [name for name in names if share_memory(parameters[name], prior_parameters[name])]
    if shared:
        shown = ", ".join(shared[:3]) + (", ..." if len(shared) > 3 else "")
        raise ValueError(
            f"{len(shared)} parameters of `prior` lie in the memory of those of `model` ({shown}), so training has "
            "moved the prior, too, and the distance between them says nothing. Take `copy.deepcopy(model)` before "
            "`model` is trained. For a model that has never seen the rows of `dataset`, a deep copy made now will do."
        )


def _check_batch_norm(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if not isinstance(module, _NormBase):
            continue
        if module.running_mean is None and isinstance(module, _BatchNorm):
            raise ValueError(
                f"{name} normalizes by its own batch (`track_running_stats=False`), so a prediction depends on other "
                "rows, and its error cannot be bounded. Use running statistics, or LayerNorm or GroupNorm."
            )
        if module.running_mean is not None and module.training:
            raise ValueError(
                f"{name} is in training mode, so its running statistics have followed the training data, which the "
                "bound does not pay for. Train with the BatchNorm layers in eval mode (frozen at the prior's "
                "statistics). If the model was trained this way, call `model.eval()`. The statistics must equal the "
                "prior's."
            )
