"""SAM and ASAM: the gradient is taken where the loss is worst nearby."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import get_total_norm

from .base import ParameterPerturbation
from .checks import check_count, check_not_negative


class SAM(ParameterPerturbation):
    r"""
    Sharpness-aware minimization: a first pass finds the steepest ascent, a second takes the gradient up there.

    In a chain SAM comes first among the parameter methods, and both passes see the logit perturbations, whose
    statistics learn from the first alone. The ascent is that of the micro-batch and process, as in the original.

    Level: batch.
    Formula: `delta = G(w + e) - G(w)` with `e = rho G / ||G||`, or `rho w^2 G / || |w| G ||` (adaptive).
    Helps: generalization of over-parameterized models; a little against label noise.
    Hurts: training time; models that don't fit their training data yet.
    Cost: a second forward and backward pass every `interval` steps, and a copy of the weights.
    Source: Foret et al., Sharpness-aware minimization (ICLR 2021); adaptive: Kwon et al., ASAM (ICML 2021).

    Args:
        rho (`float`, *optional*, defaults to 0.05): Radius of the ascent, at least 0.
        adaptive (`bool`, *optional*, defaults to `False`): Whether the ascent is relative to the size of each weight.
        interval (`int`, *optional*, defaults to 1): Only every `interval`-th optimizer step takes the second pass.

    Raises:
        ValueError: If `rho` is negative or infinite, or `interval` no whole number or below 1.

    Example:

    ```python
    >>> SAM(0.1, interval=5)
    sam(rho=0.1, interval=5)

    ```
    """

    name = "sam"
    depends_on_split = True

    def __init__(self, rho: float = 0.05, adaptive: bool = False, interval: int = 1):
        super().__init__()
        check_not_negative("rho", rho)
        check_count("interval", interval)
        self.rho = rho
        self.adaptive = adaptive
        self.interval = interval

    def ascent(self, parameters: Sequence[Parameter], gradients: Sequence[Tensor]) -> list[Tensor]:
        """The shift `e` of every parameter. A gradient of zero gives no shift."""
        if not self.adaptive:
            factor = self._factor(gradients)
            return [factor * gradient for gradient in gradients]
        scaled = [parameter.abs() * gradient for parameter, gradient in zip(parameters, gradients, strict=True)]
        factor = self._factor(scaled)
        return [factor * parameter.abs() * row for parameter, row in zip(parameters, scaled, strict=True)]

    def _factor(self, tensors: Sequence[Tensor]) -> Tensor:
        norm = get_total_norm(tensors)
        # In float16, 1e-12 is 0.
        return self.rho / norm.clamp(min=max(1e-12, torch.finfo(norm.dtype).tiny))

    @contextmanager
    def shifted(
        self, model: nn.Module, parameters: Sequence[Parameter], gradients: Sequence[Tensor | None]
    ) -> Iterator[None]:
        """
        Within it the parameters stand at `w + e`; afterwards, after an error too, they are the old ones bit for bit.

        The running statistics of BatchNorm are put back too: a batch must not count twice.

        Args:
            model (`nn.Module`): Whose BatchNorm statistics are to be kept.
            parameters (`Sequence[torch.nn.Parameter]`): What trains.
            gradients (`Sequence[torch.Tensor]`): At `w`, up to a factor; `None` for parameters that were not used.
        """
        used = [(p, g) for p, g in zip(parameters, gradients, strict=True) if g is not None]
        weights = [parameter.detach().clone() for parameter, _ in used]
        buffers = [
            buffer for module in model.modules() if isinstance(module, _BatchNorm) for buffer in module.buffers()
        ]
        kept = [buffer.clone() for buffer in buffers]
        try:
            with torch.no_grad():
                shifts = self.ascent([parameter for parameter, _ in used], [gradient for _, gradient in used])
                for (parameter, _), shift in zip(used, shifts, strict=True):
                    parameter.add_(shift)
            yield
        finally:
            with torch.no_grad():
                for (parameter, _), weight in zip(used, weights, strict=True):
                    parameter.copy_(weight)
                for buffer, value in zip(buffers, kept, strict=True):
                    buffer.copy_(value)
