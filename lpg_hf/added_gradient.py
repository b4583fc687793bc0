"""A scalar whose gradient at the logits is the one that was asked for."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def add_gradient(value: Tensor, logits: Tensor, gradient: Tensor, divisor: Tensor | float | None = None) -> Tensor:
    """A scalar worth `value`, with its gradient and a constant `gradient` at `logits` on top, all of it divided."""
    return _AddGradient.apply(logits, value, gradient, divisor)


class _AddGradient(torch.autograd.Function):
    # Half the time of the straight-through form `value + (g * (z - z.detach())).sum()` for [1024, 1000] and larger,
    # and free of its rounding error in the value.

    @staticmethod
    def forward(ctx: Any, logits: Tensor, value: Tensor, gradient: Tensor, divisor: Tensor | float | None) -> Tensor:
        ctx.save_for_backward(gradient, divisor if isinstance(divisor, Tensor) else None)
        ctx.logits_dtype, ctx.divisor = logits.dtype, None if isinstance(divisor, Tensor) else divisor
        return value.clone() if divisor is None else value / divisor

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, None, None]:
        gradient, divisor = ctx.saved_tensors
        divisor = ctx.divisor if divisor is None else divisor
        grad_value = grad_output if divisor is None else grad_output / divisor
        return (grad_value * gradient).to(ctx.logits_dtype), grad_value, None, None
