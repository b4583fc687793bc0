"""What the logits of a micro-batch say, computed once for the loss, the methods and the statistics."""

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from .functional import balance_entry_, labelled_bits, zero_ignored_


IGNORE_INDEX = -100


class Batch:
    """
    Softmax and cross-entropy of a micro-batch in one pass over its logits, with a single matrix of their size.

    Args:
        logits (`torch.Tensor` of shape `[N, C]`): The model's own, detached, float32 or float64.
        labels (`torch.Tensor` of shape `[N]`): Class indices, -100 for ignored samples.

    Attributes:
        labelled (`torch.Tensor` of shape `[N]`): Whether a sample counts.
        ignored (`torch.Tensor` of shape `[N]`): Its opposite.
        labelled_bits (`torch.Tensor` of shape `[N, 1]`): The same as [`~functional.labelled_bits`].
        classes (`torch.Tensor` of shape `[N]`): The labels, 0 where there is none.
        own_log_probability (`torch.Tensor` of shape `[N]`): `log p_y`, minus the cross-entropy; 0 for ignored samples.
        own_probability (`torch.Tensor` of shape `[N]`): `p_y`; 1 for ignored samples.
        is_right (`torch.Tensor` of shape `[N]`):
            Whether no logit is larger than the label's; arbitrary for ignored samples, like the next two.
        relative_confidence (`torch.Tensor` of shape `[N]`): `p_y / max_j p_j`.
        is_contradicted (`torch.Tensor` of shape `[N]`):
            Whether the model contradicts the label confidently: `p_y < max_j p_j / 10` and `max_j p_j > 0.3`.
        gradient (`torch.Tensor` of shape `[N, C]`):
            Of the cross-entropy, as [`~functional.logit_gradient`] gives it; zero for ignored samples. Read-only.

    Raises:
        ValueError: If a label is neither -100 nor a class. (Where the labels are on a GPU, CUDA raises instead.)

    Example:

    ```python
    >>> import torch
    >>> batch = Batch(torch.tensor([[2.0, 0.0]]), torch.tensor([1]))
    >>> -batch.own_log_probability
    tensor([2.1269])
    >>> batch.gradient
    tensor([[ 0.8808, -0.8808]])

    ```
    """

    def __init__(self, logits: Tensor, labels: Tensor):
        self.logits = logits
        self.labels = labels
        self.labelled = labels != IGNORE_INDEX
        self.ignored = labels == IGNORE_INDEX
        self.labelled_bits = labelled_bits(logits, self.labelled)
        self.classes = labels.clamp(min=0)
        margin = _own_logit(logits, labels) - logits.amax(-1)
        self.is_right = margin == 0
        self.relative_confidence = margin.exp()
        probabilities = logits.softmax(-1)
        # The sum of exp(z_j - max z) is 1 / max_j p_j.
        largest = probabilities.amax(-1)
        self.own_log_probability = (margin + largest.log()).masked_fill(self.ignored, 0.0)
        self.own_probability = self.own_log_probability.exp()
        self.is_contradicted = (self.relative_confidence < 0.1) & (largest > 0.3)
        self.gradient = zero_ignored_(balance_entry_(probabilities, self.classes), labels, self.labelled_bits)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each sample, `[N]`, 0 for ignored ones, with its gradient left to autograd."""
    return _checked(F.cross_entropy, logits, labels)


def _own_logit(logits: Tensor, labels: Tensor) -> Tensor:
    return -_checked(F.nll_loss, logits, labels)


def _checked(loss: Callable[..., Tensor], logits: Tensor, labels: Tensor) -> Tensor:
    try:
        return loss(logits, labels, ignore_index=IGNORE_INDEX, reduction="none")
    except IndexError as error:
        raise ValueError(
            f"`labels` must lie in [0, {logits.shape[-1]}) or be {IGNORE_INDEX}: {error} Check `num_labels` of the "
            "model and the label column."
        ) from error
