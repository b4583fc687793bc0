"""What the logits of a micro-batch say: computed once, and handed to the loss, the methods and the statistics."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F


IGNORE_INDEX = -100
# A label whose probability is below this share of the largest is contradicted by the model.
CONFIDENT_ERROR = 0.1


class LogitBatch:
    """
    Softmax and cross-entropy of a micro-batch in one pass over its logits, with a single matrix of their size.

    Args:
        logits (`torch.Tensor` of shape `[N, C]`): The logits of the model, detached, float32 or float64.
        labels (`torch.Tensor` of shape `[N]`): Class indices, -100 for ignored samples.
        judged_offset (`torch.Tensor` of shape `[C]`, *optional*):
            Added to the logits where the labels are judged, see [`ClassStatistics.judged_offset`]. Left out, it is 0.

    Attributes:
        valid_mask (`torch.Tensor` of shape `[N]`): Whether a sample has a label.
        ignore_mask (`torch.Tensor` of shape `[N]`): Its opposite.
        valid_bits (`torch.Tensor` of shape `[N, 1]`): All bits set where a sample has a label, for [`zero_ignored_`].
        classes (`torch.Tensor` of shape `[N]`): The labels, 0 for ignored samples.
        label_log_prob (`torch.Tensor` of shape `[N]`): `log p_y`, minus the cross-entropy; 0 for ignored samples.
        label_prob (`torch.Tensor` of shape `[N]`): `p_y`; 1 for ignored samples.
        is_correct (`torch.Tensor` of shape `[N]`):
            Whether no logit is larger than that of the label. Arbitrary for ignored samples, like the next two.
        confidence_ratio (`torch.Tensor` of shape `[N]`):
            `q_y / max_j q_j` with `q = softmax(z + judged_offset)`, in [0, 1].
        is_confident_error (`torch.Tensor` of shape `[N]`):
            Whether the model contradicts the label: a confidence ratio below 1/10.
        gradient (`torch.Tensor` of shape `[N, C]`):
            Gradient of the summed cross-entropy at the logits, see [`logit_gradient`]. Read-only.

    Raises:
        ValueError: If a label is neither -100 nor a class. On a GPU, CUDA raises its own error instead.

    Example:

    ```python
    >>> import torch
    >>> batch = LogitBatch(torch.tensor([[2.0, 0.0]]), torch.tensor([1]))
    >>> -batch.label_log_prob
    tensor([2.1269])
    >>> batch.gradient
    tensor([[ 0.8808, -0.8808]])

    ```
    """

    def __init__(self, logits: Tensor, labels: Tensor, judged_offset: Tensor | None = None):
        self.logits = logits
        self.labels = labels
        self.valid_mask = labels != IGNORE_INDEX
        self.ignore_mask = labels == IGNORE_INDEX
        self.valid_bits = _bits(logits, self.valid_mask)
        self.classes = labels.clamp(min=0)
        label_logit = -_checked(F.nll_loss, logits, labels)
        margin = label_logit - logits.amax(-1)
        self.is_correct = margin == 0
        if judged_offset is None:
            judged, probabilities = margin, logits.softmax(-1)
        else:
            offset = judged_offset.to(logits)
            shifted = logits + offset
            judged = label_logit + offset[self.classes] - shifted.amax(-1)
            probabilities = torch.softmax(logits, -1, out=shifted)  # no second matrix
        self.confidence_ratio = judged.exp()
        self.is_confident_error = self.confidence_ratio < CONFIDENT_ERROR
        # The sum of exp(z_j - max z) is 1 / max_j p_j.
        largest = probabilities.amax(-1)
        self.label_log_prob = (margin + largest.log()).masked_fill(self.ignore_mask, 0.0)
        self.label_prob = self.label_log_prob.exp()
        self.gradient = zero_ignored_(balance_label_entry_(probabilities, self.classes), labels, self.valid_bits)


def logit_gradient(logits: Tensor, labels: Tensor) -> Tensor:
    r"""
    Gradient of the summed cross-entropy at the logits, `softmax(z) - onehot(y)`.

    The entry of the label is minus the sum of the others. `p_y - 1` would lose it as soon as `p_y` rounds to 1 (at a
    margin of 17 in float32), and with it the direction of the gradient.

    Args:
        logits (`torch.Tensor` of shape `[N, C]`): The logits of the model.
        labels (`torch.Tensor` of shape `[N]`): Class indices, -100 for ignored samples.

    Returns:
        `torch.Tensor` of shape `[N, C]`: One gradient per sample. Rows sum to zero, those of ignored samples are zero.

    Example:

    ```python
    >>> import torch
    >>> logit_gradient(torch.zeros(1, 4), torch.tensor([2]))
    tensor([[ 0.2500,  0.2500, -0.7500,  0.2500]])

    ```
    """
    return zero_ignored_(balance_label_entry_(logits.softmax(-1), labels.clamp(min=0)), labels)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each sample, `[N]`, 0 for ignored ones, with its gradient left to autograd."""
    return _checked(F.cross_entropy, logits, labels)


def logits_of(outputs: Tensor | Mapping | tuple) -> Tensor:
    """The logits among the outputs of a model: the tensor itself, the entry `logits`, or the first item of a tuple."""
    if isinstance(outputs, Tensor):
        return outputs
    return outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]


def balance_label_entry_(matrix: Tensor, classes: Tensor) -> Tensor:
    """Sets the entry of each row's class, in place, to minus the sum of the others."""
    index = classes[:, None]
    matrix.scatter_(-1, index, 0.0)
    return matrix.scatter_(-1, index, -matrix.sum(-1, keepdim=True))


def zero_ignored_(matrix: Tensor, labels: Tensor, valid_bits: Tensor | None = None) -> Tensor:
    """
    Sets the rows of ignored samples to zero in place, NaN and infinity included.

    Args:
        matrix (`torch.Tensor` of shape `[N, C]`): Floating point.
        labels (`torch.Tensor` of shape `[N]`): Class indices, -100 for ignored samples.
        valid_bits (`torch.Tensor` of shape `[N, 1]`, *optional*): [`LogitBatch.valid_bits`], if it is known.
    """
    if torch.compiler.is_compiling():
        return matrix.masked_fill_((labels < 0)[:, None], 0.0)
    # By the bits: on the CPU four times as fast as `masked_fill_` with a mask of one entry per row.
    bits = _bits(matrix, labels >= 0) if valid_bits is None else valid_bits
    matrix.view(bits.dtype).bitwise_and_(bits)
    return matrix


def _bits(matrix: Tensor, valid_mask: Tensor) -> Tensor:
    """All bits set for valid samples and none for the others, `[N, 1]`, as wide as the entries of the matrix."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[matrix.element_size()]
    return -valid_mask.to(integer)[:, None]


def _checked(loss: Callable[..., Tensor], logits: Tensor, labels: Tensor) -> Tensor:
    try:
        return loss(logits, labels, ignore_index=IGNORE_INDEX, reduction="none")
    except IndexError as error:
        raise ValueError(
            f"`labels` must lie in [0, {logits.shape[-1]}) or be {IGNORE_INDEX}: {error} Check `num_labels` of the "
            "model and the label column."
        ) from error
