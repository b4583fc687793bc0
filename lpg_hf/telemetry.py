"""Sums over the samples of a training, kept on the device and read when a log is due."""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from .perturbations import Perturbation, SampleReweighting
from .statistics import ClassStatistics


class Telemetry(nn.Module):
    """
    Norms and weights of a chain, summed since the last report.

    Args:
        num_methods (`int`): Methods in the chain, M.
    """

    _sums: Tensor

    def __init__(self, num_methods: int):
        super().__init__()
        # First row: samples and norm of the base gradient; for each method the norm of its delta and its weight; the
        # product of all weights. Second row: the number of steps before the last micro-batch that met a finite sum.
        # Last column, in the first row: the number of steps before the first one with a gradient that the precision of
        # the logits cannot hold.
        self.register_buffer("_sums", torch.zeros(2, 2 * num_methods + 4), persistent=False)
        self._clear()

    @property
    def dtype(self) -> torch.dtype:
        return self._sums.dtype

    @property
    def device(self) -> torch.device:
        return self._sums.device

    def record(self, rows: Tensor, steps: Tensor) -> None:
        """
        Adds a micro-batch.

        Args:
            rows (`torch.Tensor` of shape `[2 M + 3, N]`):
                The entries of each sample in the order of the sums, the first of which is 1; zero for ignored samples.
            steps (`torch.Tensor`, scalar): Optimizer steps before this one.
        """
        sums, last_steps = self._sums[:, :-1]
        # A sum that is not finite stays so. The micro-batch that made it so is the last one that met a finite sum.
        torch.where(sums < torch.inf, steps, last_steps, out=last_steps)
        # In place, which autocast leaves alone.
        rows = rows.to(sums.dtype)
        sums.addmv_(rows, rows[0])

    def note_overflow(self, gradient: Tensor, divisor: Tensor | float, steps: Tensor) -> None:
        """
        Notes a gradient that is finite here, and infinite in the float16 in which it reaches the model.

        Args:
            gradient (`torch.Tensor` of shape `[N, C]`): The perturbed gradient, in per-sample units.
            divisor (`torch.Tensor`, scalar, or `float`): The number by which it will be divided.
            steps (`torch.Tensor`, scalar): Optimizer steps before this one.
        """
        if gradient.numel() > 0:
            is_too_large = gradient.abs().amax() > torch.finfo(torch.float16).max * divisor
            self._sums[0, -1].clamp_(max=steps.to(self._sums.dtype).masked_fill(~is_too_large, torch.inf))

    def read(self, gather: Callable[[Tensor], Tensor] | None = None) -> list[float]:
        """
        The sums over all processes, without the last column. Everything starts anew.

        Args:
            gather (`Callable`, *optional*): Stacks a tensor of every process along a new leading axis.

        Raises:
            FloatingPointError: If a value was not finite, or is not in the precision of the logits; the message names
                the first step.
        """
        stacked = (self._sums[None] if gather is None else gather(self._sums)).tolist()
        self._clear()
        processes = [(sums[:-1], last_steps[:-1]) for sums, last_steps in stacked]
        overflow_step = min(sums[-1] for sums, _ in stacked)
        bad_steps = [step for each in processes for value, step in zip(*each, strict=True) if not math.isfinite(value)]
        bad_step = min(bad_steps, default=math.inf)
        if overflow_step < math.inf and overflow_step <= bad_step:
            raise FloatingPointError(
                f"The perturbed gradient of step {int(overflow_step) + 1} is too large for logits in float16, whose "
                "largest number is 65504: it arrives as infinity. A class that is very rare may have a very large "
                "weight. Bound the weights, add `logit_clipping`, or train in bfloat16 or float32."
            )
        if bad_step < math.inf:
            raise FloatingPointError(
                f"The logits of step {int(bad_step) + 1}, or their gradient after loss and methods, were not finite "
                "(NaN or infinite). Lower the learning rate, clip gradients, or look for bad values in the inputs of "
                "that step."
            )
        return [sum(values) for values in zip(*(sums for sums, _ in processes), strict=True)]

    def _clear(self) -> None:
        self._sums.zero_()[0, -1] = torch.inf


def mean_norms_and_weights(sums: Sequence[float], methods: Iterable[Perturbation]) -> dict[str, float]:
    """The entries of a log from what [`Telemetry.read`] returns; empty if there was no sample."""
    samples, norm, *of_methods, total_weight = sums
    if samples == 0:
        return {}
    methods = list(methods)
    delta_norms, weights = of_methods[::2], of_methods[1::2]
    total_norm = sum(delta_norms)
    # The norms are added: the norm of the summed deltas would cost another pass over `[N, C]`.
    report = {"lpg/delta_ratio": total_norm / norm if norm > 0 else 0.0, "lpg/gradient_norm": norm / samples}
    if any(isinstance(method, SampleReweighting) for method in methods):
        report["lpg/weight"] = total_weight / samples
    for name, method, delta_norm, weight in zip(unique_names(methods), methods, delta_norms, weights, strict=True):
        report[f"lpg/{name}/delta_norm"] = delta_norm / samples
        report[f"lpg/{name}/delta_ratio"] = delta_norm / norm if norm > 0 else 0.0
        if isinstance(method, SampleReweighting):
            report[f"lpg/{name}/weight"] = weight / samples
    return report


def head_and_tail_accuracy(statistics: ClassStatistics) -> dict[str, float]:
    """Running training accuracy of the larger and of the smaller third of the classes."""
    counts, accuracy = statistics.class_counts.tolist(), statistics.accuracy.tolist()
    present = sorted((label for label, count in enumerate(counts) if count > 0), key=lambda label: -counts[label])
    third = max(len(present) // 3, 1)
    groups = {"head": present[:third], "tail": present[-third:]}
    return {f"lpg/{name}_accuracy": sum(accuracy[c] for c in group) / third for name, group in groups.items()}


def unique_names(methods: Iterable[Perturbation]) -> list[str]:
    """A name for each method of a chain, with a number where one occurs again."""
    names = [method.name for method in methods]
    return [
        name if names.index(name) == position else f"{name}_{names[: position + 1].count(name)}"
        for position, name in enumerate(names)
    ]
