"""What counts as a classifier: one integer label per sample, logits [N, C], and cross-entropy between them."""

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from .functional import logit_gradient
from .loss import IGNORE_INDEX


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


def find_other_loss(
    loss: Tensor, logits: Tensor, labels: Tensor, num_items: Tensor | int | None = None, num_copies: int = 1
) -> str | None:
    """
    How a model's own loss differs from the cross-entropy of its logits, in value or, where it can be had, in gradient.

    Args:
        loss (`torch.Tensor`): The model's, a scalar.
        logits (`torch.Tensor` of shape `[N, C]`): The model's.
        labels (`torch.Tensor` of shape `[N]`): Class indices, -100 for ignored samples.
        num_items (`torch.Tensor` or `int`, *optional*): What the loss may have been divided by, other than N.
        num_copies (`int`, *optional*, defaults to 1): What it may have been multiplied with.

    Returns:
        `str`: The difference, `None` if there is none.
    """
    z = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
    labelled = (labels != IGNORE_INDEX).sum().to(z.dtype)
    if labelled == 0:
        return None
    total = F.cross_entropy(z, labels, ignore_index=IGNORE_INDEX, reduction="sum")
    weights = [1 / labelled]
    if num_items is not None:
        weights += [num_copies / labelled, num_copies / torch.as_tensor(num_items).to(z)]
    # The same logits go into both: what may differ is the order of a sum, and rounding (some models compute their loss
    # in the dtype of the logits, some in float32 whatever it is).
    dtypes = (torch.float32, logits.dtype, loss.dtype)
    rounding = max(256 * torch.finfo(torch.float32).eps, 4 * max(torch.finfo(dtype).eps for dtype in dtypes))
    is_close = partial(torch.allclose, rtol=rounding, atol=rounding)
    matching = [weight for weight in weights if is_close(loss.detach().to(z), total * weight)]
    if not matching:
        return f"its own loss on the first batch is {loss.item():.6g} where cross-entropy is {total / labelled:.6g}"
    # Equal losses do not mean equal gradients: with logits of zero, class weights leave the mean as it is.
    if not loss.requires_grad or not logits.requires_grad:
        return None
    (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True, allow_unused=True)
    if gradient is None:
        return None
    expected = logit_gradient(z, labels)
    if not any(is_close(gradient.to(z) / weight, expected) for weight in matching):
        return "the gradient of its own loss on the first batch is not that of cross-entropy"
    return None


def can_tell_losses_apart(labels: Tensor) -> bool:
    """
    Whether a batch shows class weights: with a mean weighted by class, all samples of one class weigh the same.

    A batch of one sample never does, and need not: there the weighted mean is cross-entropy.
    """
    labelled = labels[labels != IGNORE_INDEX]
    return len(labels) == 1 or labelled.unique().numel() > 1
