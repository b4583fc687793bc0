"""What a loss can be computed of: logits `[N, C]` of floating point, one integer label per sample, and a divisor."""

import torch
from torch import Tensor

from .batch import IGNORE_INDEX


def check_inputs(logits: object, labels: object, num_labels: int) -> tuple[Tensor, Tensor]:
    """
    Checks the inputs of a loss.

    Args:
        logits (`torch.Tensor` of shape `[N, C]`): The logits.
        labels (`torch.Tensor` of shape `[N]` or `[N, 1]`): Class indices; `False` is class 0 and `True` class 1.
        num_labels (`int`): Number of classes, C.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: The logits, and the labels as int64 of shape `[N]`.

    Raises:
        ValueError: If they are no tensors, or their shapes or types do not fit.
    """
    if not isinstance(logits, Tensor) or not isinstance(labels, Tensor):
        raise ValueError(
            f"`logits` and `labels` must be tensors; found {type(logits).__name__} and {type(labels).__name__}. "
            "Convert them with `torch.as_tensor`."
        )
    if logits.ndim != 2 or logits.shape[1] != num_labels or labels.numel() != len(logits):
        raise ValueError(
            f"`logits` must be [N, {num_labels}] and `labels` [N] or [N, 1]; found shapes {list(logits.shape)} and "
            f"{list(labels.shape)}. `num_labels` is the number of logits per sample."
        )
    if not logits.is_floating_point():
        raise ValueError(
            f"`logits` must be of floating point, as a model returns them; found {logits.dtype}. Pass the logits "
            "themselves, not the classes that they predict, or convert them with `.float()`."
        )
    if labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"`labels` must be integer class indices; found {labels.dtype}. Convert them to int64.")
    return logits, labels.reshape(-1).long()


def divisor_of(labels: Tensor, num_items: Tensor | float | None) -> Tensor | float:
    """
    The number that divides the summed loss. A step without a labeled sample has loss and gradient zero, and not 0 / 0.

    Args:
        labels (`torch.Tensor` of shape `[N]`): Class indices, -100 for ignored samples.
        num_items (`torch.Tensor` or `float`, *optional*):
            The number; the labeled samples of this micro-batch when left out. It may lie between 0 and 1, such as
            few samples divided by the number of processes.

    Returns:
        `torch.Tensor` (scalar) or `float`: The same, or 1 where it is 0.
    """
    count = (labels != IGNORE_INDEX).sum() if num_items is None else num_items
    if not isinstance(count, Tensor):
        return count if count > 0 else 1
    return torch.where(count > 0, count, 1.0) if count.is_floating_point() else count.clamp(min=1)
