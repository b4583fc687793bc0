"""Clipping of the gradient of the parameters, by norm, by value or by the history of the run."""

from typing import cast

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import clip_grad_value_, clip_grads_with_norm_, get_total_norm

from .base import GradientPerturbation, gradients_of
from .checks import check


class GradientClipping(GradientPerturbation):
    r"""
    Gradient clipping: bounds the gradient of a step, before Trainer's own `max_grad_norm`.

    Level: batch.
    Formula: `delta = (min(1, M / ||G||) - 1) G`; by value, every entry is clipped to [-M, M].
    Helps: rare steps with huge gradients; with `percentile` there is no bound to tune.
    Hurts: a bound below the usual norm is a smaller learning rate (and nothing at all under Adam).
    Cost: one pass over the gradients.
    Source: Pascanu et al. (ICML 2013); the percentile is AutoClip, Seetharaman et al. (2020).

    Args:
        max_norm (`float`, *optional*): Bound on the global norm, above 0; 1.0 when no argument is given.
        max_value (`float`, *optional*): Bound on every entry, above 0.
        percentile (`float`, *optional*):
            In (0, 100]: the bound is this percentile of the global norms of the run so far, including this step.

    Raises:
        ValueError: If an argument is out of its range or more than one is given.

    Example:

    ```python
    >>> GradientClipping(percentile=10)
    gradient_clipping(percentile=10)

    ```
    """

    name = "gradient_clipping"

    def __init__(self, max_norm: float | None = None, max_value: float | None = None, percentile: float | None = None):
        super().__init__()
        given = [value for value in (max_norm, max_value, percentile) if value is not None]
        check(len(given) <= 1, "max_norm, max_value, percentile", given, "given one at a time")
        check(max_norm is None or max_norm > 0, "max_norm", max_norm, "positive")
        check(max_value is None or max_value > 0, "max_value", max_value, "positive")
        check(percentile is None or 0 < percentile <= 100, "percentile", percentile, "in (0, 100]")
        self.max_norm = max_norm
        self.max_value = max_value
        self.percentile = percentile
        self._history = torch.zeros(0)

    @torch.no_grad()
    def perturb_(self, parameters: list[Parameter], scale: float = 1.0) -> Tensor:
        gradients = gradients_of(parameters)
        if self.max_value is not None:
            max_value = self.max_value * scale
            excess = get_total_norm([(gradient.abs() - max_value).clamp(min=0) for gradient in gradients])
            clip_grad_value_(parameters, max_value)
            return excess / scale

        norm = get_total_norm(gradients)
        bound = scale * self._bound(norm / scale)
        clip_grads_with_norm_(parameters, cast(float, bound), norm)  # takes a tensor, too, without a wait
        return (norm - bound).clamp(min=0) / scale

    def _bound(self, norm: Tensor) -> float | Tensor:
        if self.percentile is None:
            return 1.0 if self.max_norm is None else self.max_norm
        # A step that overflowed under fp16 is skipped by the scaler, and says nothing about the norms.
        seen = torch.where(norm.isfinite(), norm, torch.nan).to(torch.promote_types(norm.dtype, torch.float32))
        self._history = torch.cat([self._history.to(seen), seen[None]])
        return self._history.nanquantile(self.percentile / 100)

    def get_extra_state(self) -> Tensor:
        return self._history

    def set_extra_state(self, state: Tensor) -> None:
        self._history = state
