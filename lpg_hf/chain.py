"""Runs a chain of methods on the logit gradient of a micro-batch."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .batch import LogitBatch, relative_pull
from .perturbations import LogitPerturbation, SampleReweighting
from .perturbations.checks import check_shape
from .statistics import ClassStatistics


def run_chain(
    methods: Sequence[LogitPerturbation],
    unperturbed: Tensor,
    batch: LogitBatch,
    statistics: ClassStatistics,
    learns: bool,
    is_cross_entropy: bool = True,
) -> tuple[Tensor, list[Tensor]]:
    """
    Hands a gradient from method to method.

    Args:
        methods (`Sequence[LogitPerturbation]`): The chain, with one method at least.
        unperturbed (`torch.Tensor` of shape `[N, C]`): The gradient in per-sample units. It stays as it is.
        batch ([`LogitBatch`]): The micro-batch.
        statistics ([`ClassStatistics`]): Of the optimizer step before.
        learns (`bool`): Whether methods with a state learn from these samples.
        is_cross_entropy (`bool`, *optional*, defaults to `True`):
            Whether the gradient is that of cross-entropy, be it with smoothed labels.

    Returns:
        `tuple[torch.Tensor, list[torch.Tensor]]`: The perturbed gradient in new memory, and the rows `[N]` that
        [`Telemetry`] sums up, but for the first.
    """
    gradient = unperturbed
    base_norm = batch.gradient_norm if gradient is batch.gradient else gradient.norm(dim=-1)
    norm: Tensor | None = base_norm
    rows = [base_norm]
    total_weight: Tensor | None = None
    pull = None if is_cross_entropy else relative_pull(unperturbed, batch)
    batch.scale = pull
    for method in methods:
        if learns:
            method.update(gradient, batch)
        # The first gradient belongs to the caller, those after it do not: new memory costs more than arithmetic.
        in_place = gradient is not unperturbed
        if isinstance(method, SampleReweighting):
            weight = method.weight(gradient, batch, statistics)
            check_shape(method, "weight", weight, gradient, base_norm.shape)
            # The gradient of ignored samples stays zero, whatever their weight.
            weight = method.last_weight = torch.where(batch.valid_mask, weight.to(base_norm), batch.is_valid)
            norm = gradient.norm(dim=-1) if norm is None else norm
            rows += [torch.addcmul(norm, norm, weight, value=-1).abs_(), weight]
            total_weight = weight if total_weight is None else total_weight * weight
            batch.scale = total_weight if pull is None else pull * total_weight
            gradient = (gradient.mul_ if in_place else gradient.mul)(weight[:, None])
        else:
            gradient, delta_norm = method.add_delta(gradient, batch, statistics, in_place)
            check_shape(method, "norm", delta_norm, gradient, base_norm.shape)
            # The second is only read where it is a weight.
            rows += [delta_norm] * 2
        norm = None
    # Only read if there is a weight.
    return gradient, [*rows, base_norm if total_weight is None else total_weight]


def reweighting_methods(methods: Iterable[LogitPerturbation]) -> list[SampleReweighting]:
    """The methods of a chain that weight samples."""
    return [method for method in methods if isinstance(method, SampleReweighting)]


def last_weights(methods: Iterable[LogitPerturbation]) -> list[Tensor]:
    """The weights of the last micro-batch, `[N]` for each method that weights samples."""
    weights = (method.last_weight for method in reweighting_methods(methods))
    return [weight for weight in weights if weight is not None]
