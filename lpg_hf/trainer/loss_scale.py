"""How a loss weights its samples, and whether it is the cross-entropy of the logits."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional as F

from ..batch import IGNORE_INDEX, logit_gradient


@dataclass(frozen=True)
class LossScale:
    """
    How a loss weights the cross-entropy of each sample.

    Attributes:
        is_per_step (`bool`): Whether it divides by the labeled samples of the whole step, not of the micro-batch.
        factor (`int`): Number that the loss is multiplied by.
    """

    is_per_step: bool
    factor: int = 1

    def divisor(self, labels: Tensor, num_items: Tensor | float | None) -> Tensor:
        """Divisor of the summed cross-entropy of a micro-batch, a scalar."""
        per_step = self.is_per_step and num_items is not None
        count = torch.as_tensor(num_items, device=labels.device) if per_step else (labels != IGNORE_INDEX).sum()
        return count / self.factor

    def to_step(self, loss: Tensor, labels: Tensor, num_items: Tensor | float, *, is_whole_step: bool) -> Tensor:
        """Converts a loss of this scale to the scale of the step, which may consist of this micro-batch alone."""
        if not self.is_per_step and not is_whole_step:
            num_items = torch.as_tensor(num_items).to(loss).clamp(min=1)
            loss = loss * ((labels != IGNORE_INDEX).sum() / num_items)
        return loss if self.factor == 1 else loss / self.factor


def compare_with_cross_entropy(
    loss: Tensor,
    logits: Tensor,
    labels: Tensor,
    num_items: Tensor | float | None,
    scales: Sequence[LossScale],
    autocast_dtype: torch.dtype | None = None,
) -> tuple[list[LossScale], str | None]:
    """
    Compares a model's own loss with the cross-entropy of its logits, in value and in gradient.

    The tolerance is the rounding of the precision in which the model computed its loss. Under CUDA's autocast this is
    half precision although loss and logits arrive in float32: `cross_entropy` takes logarithms in the dtype of the
    logits, and averages in float32. The gradient is compared if autograd gives it.

    Args:
        loss (`torch.Tensor`): The loss of the model, a scalar.
        logits (`torch.Tensor` of shape `[N, C]`): The logits of the model.
        labels (`torch.Tensor` of shape `[N]`): Class indices, -100 for ignored samples.
        num_items (`torch.Tensor` or `int`, *optional*): Number of labeled samples in the whole step.
        scales (`Sequence[LossScale]`): The scales that the loss may have.
        autocast_dtype (`torch.dtype`, *optional*): The dtype of mixed precision, if the model runs in it.

    Returns:
        `tuple[list[LossScale], str | None]`: The scales that fit, and the difference if there are none.
    """
    z = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
    labeled = (labels != IGNORE_INDEX).sum()
    if labeled == 0:
        return list(scales), None
    gradient = _gradient_at_logits(loss, logits)
    # The same logits go into both: the order of a sum and rounding are all that may differ.
    dtypes = [torch.float32, logits.dtype, loss.dtype, autocast_dtype, None if gradient is None else gradient.dtype]
    eps = max(torch.finfo(dtype).eps for dtype in dtypes if dtype is not None)
    if eps == torch.finfo(torch.float32).eps:
        value_tolerance = gradient_tolerance = 256 * eps
    else:
        # A rounded logarithm has a relative error of eps / 2, and a sum in half precision more. Where the gradient can
        # be compared, it decides: it is the exponential of a rounded logarithm.
        value_tolerance = eps if gradient is None else 4 * eps
        gradient_tolerance = 4 * eps

    total = F.cross_entropy(z, labels, ignore_index=IGNORE_INDEX, reduction="sum")
    divisors = {scale: scale.divisor(labels, num_items).to(z) for scale in scales}
    floor = 256 * torch.finfo(torch.float32).eps
    fitting = [
        scale
        for scale, divisor in divisors.items()
        if torch.allclose(loss.detach().to(z), total / divisor, rtol=value_tolerance, atol=floor)
    ]
    if not fitting:
        value = f"{loss.item():.6g} instead of {total / labeled:.6g}"
        return [], f"its own loss on the first batch differs from cross-entropy, {value}"
    if gradient is None:
        return fitting, None
    # Equal losses do not mean equal gradients: with logits of zero, class weights leave the mean as it is.
    expected = logit_gradient(z, labels)
    bound = gradient_tolerance * expected.norm() + floor * labeled.sqrt()
    fitting = [scale for scale in fitting if (gradient.to(z) * divisors[scale] - expected).norm() <= bound]
    return fitting, None if fitting else "on the first batch, the gradient of its own loss is not cross-entropy's"


def _gradient_at_logits(loss: Tensor, logits: Tensor) -> Tensor | None:
    """
    Takes the gradient of a loss at the logits, or at the tensor of which they are a converted copy.

    Under mixed precision, accelerate converts the outputs of a model to float32 after the model has computed its loss.
    Returns `None` if there is no gradient.
    """
    if not loss.requires_grad or not logits.requires_grad:
        return None
    edge = get_gradient_edge(logits)
    while True:
        (gradient,) = torch.autograd.grad(loss, [edge], retain_graph=True, allow_unused=True)
        if gradient is not None or edge.node.name() != "ToCopyBackward0":
            return gradient
        edge = GradientEdge(*edge.node.next_functions[0])


def can_tell_losses_apart(labels: Tensor) -> bool:
    """
    Whether a batch would show class weights in a loss.

    A mean that is weighted by class equals the plain mean if all samples have one class. In a batch of one sample the
    two are always equal, so there is nothing to show.

    Args:
        labels (`torch.Tensor` of shape `[N]` or `[N, 1]`): Class indices, -100 for ignored samples.

    Example:

    ```python
    >>> [can_tell_losses_apart(torch.tensor(labels)) for labels in ([0, 1], [2, 2], [2, -100], [2])]
    [True, False, False, True]

    ```
    """
    valid_labels = labels[labels != IGNORE_INDEX]
    return len(labels) == 1 or valid_labels.unique().numel() > 1
