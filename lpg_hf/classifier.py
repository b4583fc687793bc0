"""What counts as a classifier: one integer label per sample, logits [N, C], and cross-entropy between them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional as F

from .batch import IGNORE_INDEX, logit_gradient


def find_obstacle(logits: Tensor | None, labels: Tensor | None, problem_type: str | None) -> str | None:
    """
    What keeps a batch from being one of a single-label classifier, in words that finish "it is none: ...".

    Args:
        logits (`torch.Tensor`, *optional*): The model's, if its outputs have any.
        labels (`torch.Tensor`, *optional*): Of the batch, if it has any.
        problem_type (`str`, *optional*): Of the model's config.

    Returns:
        `str`: The obstacle, `None` if there is none.

    Example:

    ```python
    >>> import torch
    >>> find_obstacle(torch.zeros(2, 3), torch.tensor([0, 2]), problem_type=None)
    >>> find_obstacle(torch.zeros(2, 1), torch.tensor([0, 2]), problem_type=None)
    'its logits have shape [2, 1], not [N, C] with C > 1'

    ```
    """
    if problem_type not in (None, "single_label_classification"):
        return f"its `config.problem_type` is {problem_type!r}"
    if not isinstance(labels, Tensor) or labels.ndim == 0:
        return "its batches have no tensor of `labels`, one for each sample"
    if labels.is_floating_point() or labels.ndim > 2 or labels.numel() != len(labels):
        return f"its labels have dtype {labels.dtype} and shape {list(labels.shape)}, not one integer per sample"
    if not isinstance(logits, Tensor):
        return "its outputs have no tensor of `logits`"
    if logits.ndim != 2 or len(logits) != len(labels) or logits.shape[1] < 2:
        return f"its logits have shape {list(logits.shape)}, not [N, C] with C > 1"
    return None


@dataclass(frozen=True)
class LossScale:
    """
    How a loss weights the cross-entropy of a sample.

    Attributes:
        is_per_step (`bool`): Whether it divides by the labeled samples of the whole step, not of the micro-batch.
        factor (`int`): What it is multiplied with.
    """

    is_per_step: bool
    factor: int = 1

    def divisor(self, labels: Tensor, num_items: Tensor | int | None) -> Tensor:
        """What the summed cross-entropy of a micro-batch was divided by, a scalar."""
        per_step = self.is_per_step and num_items is not None
        count = torch.as_tensor(num_items, device=labels.device) if per_step else (labels != IGNORE_INDEX).sum()
        return count / self.factor

    def to_step(self, loss: Tensor, labels: Tensor, num_items: Tensor | int, *, is_whole_step: bool) -> Tensor:
        """A loss of this scale with the scale of the step, `is_whole_step` where the micro-batch is all of it."""
        if not self.is_per_step and not is_whole_step:
            num_items = torch.as_tensor(num_items).to(loss).clamp(min=1)
            loss = loss * ((labels != IGNORE_INDEX).sum() / num_items)
        return loss if self.factor == 1 else loss / self.factor


def compare_with_cross_entropy(
    loss: Tensor,
    logits: Tensor,
    labels: Tensor,
    num_items: Tensor | int | None,
    scales: Sequence[LossScale],
    autocast_dtype: torch.dtype | None = None,
) -> tuple[list[LossScale], str | None]:
    """
    Compares a model's own loss with the cross-entropy of its logits, in value and in gradient.

    The tolerance is the rounding of the precision in which the model computed its loss. Under CUDA's autocast this is
    half precision although loss and logits arrive in float32: `cross_entropy` takes logarithms in the dtype of the
    logits, and averages in float32. The gradient is compared where autograd gives it.

    Args:
        loss (`torch.Tensor`): The model's, a scalar.
        logits (`torch.Tensor` of shape `[N, C]`): The model's.
        labels (`torch.Tensor` of shape `[N]`): Class indices, -100 for ignored samples.
        num_items (`torch.Tensor` or `int`, *optional*): The labeled samples of the whole step.
        scales (`Sequence[LossScale]`): The scales that the loss may have.
        autocast_dtype (`torch.dtype`, *optional*): Of mixed precision, if the model runs in it.

    Returns:
        `tuple[list[LossScale], str | None]`: The scales that fit, and the difference where none does.
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
        return [], f"its own loss on the first batch is {loss.item():.6g} where cross-entropy is {total / labeled:.6g}"
    if gradient is None:
        return fitting, None
    # Equal losses do not mean equal gradients: with logits of zero, class weights leave the mean as it is.
    expected = logit_gradient(z, labels)
    bound = gradient_tolerance * expected.norm() + floor * labeled.sqrt()
    fitting = [scale for scale in fitting if (gradient.to(z) * divisors[scale] - expected).norm() <= bound]
    return fitting, None if fitting else "the gradient of its own loss on the first batch is not that of cross-entropy"


def _gradient_at_logits(loss: Tensor, logits: Tensor) -> Tensor | None:
    """
    The gradient of a loss at the logits, or at the tensor that they are a converted copy of; `None` if there is none.

    Accelerate converts the outputs of a model under mixed precision to float32, after it has computed its loss.
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
    Whether a batch shows class weights: with a mean weighted by class, all samples of one class weigh the same.

    A batch of one sample never does, and need not: there the weighted mean is cross-entropy.
    """
    labelled = labels[labels != IGNORE_INDEX]
    return len(labels) == 1 or labelled.unique().numel() > 1
