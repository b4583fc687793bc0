"""Is a `compute_loss_func` a loss of classes? Its value says nothing of that, but its gradient at the logits does."""

import torch
from torch import Tensor

from ..batch import IGNORE_INDEX


def why_not_of_classes(loss: Tensor, logits: Tensor, labels: Tensor, *, is_requested: bool) -> str | None:
    """
    Explains why a loss that a user gave cannot be perturbed.

    Embeddings in the place of logits, or the thresholds of an ordinal regression, have the shape of logits. A loss of
    classes stays the same when a number is added to all logits of a sample, as those of the softmax do, or it pulls
    up the logit of the label most, as the binary cross-entropy of each class does.

    Args:
        loss (`torch.Tensor`): The loss, a scalar.
        logits (`torch.Tensor` of shape `[N, C]`): The logits of the model.
        labels (`torch.Tensor` of shape `[N]`): Class indices, -100 for ignored samples.
        is_requested (`bool`): Whether methods were asked for by name: then the user knows what the logits are.

    Returns:
        `str`: The reason; `None` if it can be perturbed.

    Example:

    ```python
    >>> import torch
    >>> logits, labels = torch.zeros(2, 3, requires_grad=True), torch.tensor([0, 2])
    >>> why_not_of_classes(torch.nn.functional.cross_entropy(logits, labels), logits, labels, is_requested=False)
    >>> print(why_not_of_classes(-logits[:, 1].sum(), logits, labels, is_requested=False))
    at the logits, the gradient of its `compute_loss_func` is not that of a loss of classes

    ```
    """
    gradient = None
    if loss.requires_grad and logits.requires_grad:
        (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True, allow_unused=True)
    if gradient is None:
        return "its `compute_loss_func` does not depend on the `logits` of the outputs"
    if is_requested:
        return None
    # A sample that is fitted pulls at nothing, so that a penalty of the logits may be all that it has.
    label_prob = torch.softmax(logits.detach().float(), -1).gather(-1, labels.clamp(min=0)[:, None])[:, 0]
    is_judged = (labels != IGNORE_INDEX) & (label_prob < 0.5) & (gradient != 0).any(-1)
    gradient, labels = gradient[is_judged], labels[is_judged]
    tolerance = max(1e-3, 4 * torch.finfo(gradient.dtype).eps)
    ignores_shift = gradient.sum(-1).abs() <= tolerance * gradient.abs().sum(-1)
    pulls_label = gradient.argmin(-1) == labels
    if ignores_shift.all() or 2 * pulls_label.sum() >= len(labels):
        return None
    return "at the logits, the gradient of its `compute_loss_func` is not that of a loss of classes"
