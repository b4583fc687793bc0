"""What would make a certificate untrue, refused before it is computed."""

import math
import operator
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.utils.data import Dataset

from .gibbs import FingerprintingCollator


def check_settings(
    sigma_grid: Sequence[float], delta: float, num_draws: int, num_selection_draws: int
) -> tuple[float, ...]:
    if not 0 < delta < 1:
        raise ValueError(f"`delta` is a probability of failure, strictly between 0 and 1; found {delta}.")
    grid = tuple(map(float, sigma_grid))
    if not grid or not all(0 < sigma < math.inf for sigma in grid) or len(set(grid)) < len(grid):
        raise ValueError(f"`sigma_grid` needs different standard deviations above 0; found {grid}.")
    for name, value in (("num_draws", num_draws), ("num_selection_draws", num_selection_draws)):
        if operator.index(value) < 1:
            raise ValueError(f"`{name}` must be at least 1; found {value}.")
    return grid


def check_draws_suffice(num_draws: int, num_labels: int, draw_level: float) -> None:
    # The limit for draws without a single error: 1 - (level / 2C)^(1/K).
    needed = max(2, math.ceil(math.log(2 * num_labels / draw_level) / math.log(2)))
    if num_draws < needed:
        raise ValueError(
            f"`num_draws` is {num_draws}, but with fewer than {needed} the correction for the draws alone lifts every "
            f"class above 0.5 ({num_labels} classes). A few hundred is a good number."
        )


def check_label_noise(label_noise: float | None, num_labels: int) -> None:
    highest = (num_labels - 1) / num_labels
    if label_noise is not None and not 0 <= label_noise < highest:
        raise ValueError(
            f"`label_noise` must be a rate in [0, {highest:.4g}), (C-1)/C for C = {num_labels}; found {label_noise}."
        )


def compare_with_prior(model: nn.Module, prior: nn.Module, names: Sequence[str]) -> float:
    """The squared distance over the noisy parameters; everything else must be the same."""
    _check_architecture(model, prior)
    _check_batch_norm(model)
    in_scope = set(names)
    theirs = dict(_tensors(prior))
    squared_distance, different = 0.0, []
    for name, tensor in _tensors(model):
        tensor, other = tensor.detach(), theirs[name].detach().to(tensor.device)
        if name in in_scope:
            squared_distance += (tensor.double() - other.double()).square().sum().item()
        elif not torch.equal(tensor, other):
            different.append(name)
    if not math.isfinite(squared_distance):
        raise ValueError("The weights of `model` or `prior` are not finite (NaN or infinite): there is no distance.")
    if different:
        shown = ", ".join(different[:3]) + (", ..." if len(different) > 3 else "")
        raise ValueError(
            f"{len(different)} tensors without noise differ from the prior's ({shown}), so they carry what was "
            "learned from the certificate set past the bound. Parameters: widen `scope`, or freeze them in training. "
            "Running statistics: keep BatchNorm in eval mode while the model is trained, or copy the prior's."
        )
    return squared_distance


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _check_architecture(model: nn.Module, prior: nn.Module) -> None:
    layouts = [
        {name: type(module).__name__ for name, module in network.named_modules()}
        | {f"{name} (tensor)": list(tensor.shape) for name, tensor in _tensors(network)}
        for network in (model, prior)
    ]
    ours, theirs = layouts
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise ValueError(
                f"`prior` has another architecture than `model`: {name or 'the model itself'} is {ours.get(name)} in "
                f"`model` and {theirs.get(name)} in `prior`. Take a copy of `model` before its training."
            )


def _check_batch_norm(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if not isinstance(module, _NormBase):
            continue
        if module.running_mean is None and isinstance(module, _BatchNorm):
            raise ValueError(
                f"{name} normalises by its own batch (`track_running_stats=False`), so answers depend on other rows "
                "and there is no bound on their errors. Use running statistics, or LayerNorm or GroupNorm."
            )
        if module.running_mean is not None and module.training:
            raise ValueError(
                f"{name} is in training mode: its running statistics have followed the training data, which would be "
                "learned without being paid for. Train with the BatchNorm layers in eval mode (frozen at the prior's "
                "statistics), or call `model.eval()` if that is how it was trained; they must equal the prior's."
            )


def check_independent_rows(collator: FingerprintingCollator, prior_dataset: Dataset | None) -> None:
    """Refuses copies among the rows that the collator has seen, and between them and those of the prior."""
    inputs = set(collator.inputs)
    repeated = len(collator.inputs) - len(inputs)
    if repeated:
        raise ValueError(
            f"{repeated} rows of `dataset` have the inputs of another one, so they are not independent. Remove them: "
            "`split_for_certificate(dataset, columns=[...])` with the columns that the model reads keeps one of each."
        )
    if prior_dataset is None or len(prior_dataset) == 0:
        return
    prior_columns = collator.input_columns(prior_dataset[0])
    if prior_columns != collator.seen_columns:
        raise ValueError(
            f"The rows of `prior_dataset` have the inputs {sorted(prior_columns)}, those of `dataset` "
            f"{sorted(collator.seen_columns)}, so it cannot be told whether they share a row. Pass both as they go "
            "into the model."
        )
    shared = sum(collator.fingerprint_inputs(prior_dataset[row]) in inputs for row in range(len(prior_dataset)))
    if shared:
        raise ValueError(
            f"{shared} rows of `prior_dataset` have the inputs of a row of `dataset`: the prior saw what it is tested "
            "on. Split with `split_for_certificate`, which leaves copies out."
        )


def check_same_rows(before: list[str], after: list[str]) -> None:
    changed = [row for row, (first, second) in enumerate(zip(before, after, strict=True)) if first != second]
    if changed:
        raise ValueError(
            f"{len(changed)} of {len(before)} rows of `dataset` changed between two readings, row {changed[0]} first: "
            "inputs are augmented or labels drawn anew. Certify on the rows as they are."
        )
