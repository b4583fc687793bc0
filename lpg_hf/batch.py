"""What the logits of a micro-batch say: computed once, and handed to the loss, the methods and the statistics."""

from collections.abc import Mapping, Sequence

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
        logits (`torch.Tensor` of shape `[N, C]`): Float32 or float64. The graph of the logits is not used.
        labels (`torch.Tensor` of shape `[N]`): Class indices, -100 for ignored samples.
        judged_offset (`torch.Tensor` of shape `[C]`, *optional*):
            Added to the logits where the labels are judged, see [`ClassStatistics.judged_offset`]. Left out, it is 0.
        fitted_offset (`torch.Tensor` of shape `[C]`, *optional*):
            Added to the logits for the fit excess, see [`ClassStatistics.fitted_offset`]. Left out, it is 0. If it is
            the same tensor as `judged_offset`, it is added once.

    Attributes:
        ignore_mask (`torch.Tensor` of shape `[N]`): Whether a sample has no label.
        valid_mask (`torch.Tensor` of shape `[N]`): Its opposite.
        classes (`torch.Tensor` of shape `[N]`): The labels, 0 for ignored samples.
        label_log_prob (`torch.Tensor` of shape `[N]`): `log p_y`, minus the cross-entropy; 0 for ignored samples.
        label_prob (`torch.Tensor` of shape `[N]`): `p_y`; 1 for ignored samples.
        is_correct (`torch.Tensor` of shape `[N]`):
            Whether no logit is larger than that of the label. Arbitrary for ignored samples.
        confidence_ratio (`torch.Tensor` of shape `[N]`):
            `q_y / max_j q_j` with `q = softmax(z + judged_offset)`, in [0, 1]; 1 for ignored samples.
        is_confident_error (`torch.Tensor` of shape `[N]`):
            Whether the model contradicts the label: a confidence ratio below 1/10.
        label_gradient (`torch.Tensor` of shape `[N, 1]`): The entries of the labels in `gradient`.
        gradient (`torch.Tensor` of shape `[N, C]`):
            Gradient of the summed cross-entropy at the logits, see [`logit_gradient`]. Read-only.
        gradient_norm (`torch.Tensor` of shape `[N]`): Norm of the gradient of each sample.
        fit_excess (`torch.Tensor` of shape `[N]`):
            `q_y - sum_j q_j^2` with `q = softmax(z + fitted_offset)`, in [-1, 1]; arbitrary for ignored samples. It is
            the probability of the label, less the one that the model itself expects. Its mean is 0 for a model that is
            calibrated on these labels, and above 0 for one that fits labels which it has seen before.
        scale (`torch.Tensor` of shape `[N]` or `None`):
            The factor on the gradient of each sample that another loss than cross-entropy and the methods in front
            have; `None` for 1. A method that moves the target takes it, too. The loss sets it.

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

    def __init__(
        self,
        logits: Tensor,
        labels: Tensor,
        judged_offset: Tensor | None = None,
        fitted_offset: Tensor | None = None,
    ):
        self.logits = logits = logits.detach()
        self.labels = labels
        self.scale: Tensor | None = None
        self.ignore_mask = labels == IGNORE_INDEX
        self.valid_mask = ~self.ignore_mask
        self.classes = labels.masked_fill(self.ignore_mask, 0)
        index = self.classes[:, None]
        # How far the label is from the largest entry: of the logits, and of those at which labels are judged.
        margin = judged = _label_entries(logits, index) - logits.amax(-1, keepdim=True)
        # One matrix serves for all: new memory costs more than arithmetic.
        matrix: Tensor | None = None
        if judged_offset is not None:
            matrix = logits + judged_offset.to(logits)
            judged = matrix.gather(-1, index) - matrix.amax(-1, keepdim=True)
        self._fit_excess: Tensor | None = None
        self._gradient_norm: Tensor | None = None
        if fitted_offset is not None:
            if matrix is None or fitted_offset is not judged_offset:
                matrix = torch.add(logits, fitted_offset.to(logits), out=matrix)
            torch.softmax(matrix, -1, out=matrix)
            norm = torch.linalg.vector_norm(matrix, dim=-1)
            self._fit_excess = torch.addcmul(matrix.gather(-1, index)[:, 0], norm, norm, value=-1)
        probabilities = torch.softmax(logits, -1, out=matrix)
        self.is_correct = margin[:, 0] == 0
        # The sum of exp(z_j - max z) is 1 / max_j p_j.
        label_log_prob = margin + probabilities.amax(-1, keepdim=True).log()
        logarithms = torch.stack([label_log_prob, judged])[..., 0].masked_fill_(self.ignore_mask, 0.0)
        self.label_log_prob = logarithms[0]
        self.label_prob, self.confidence_ratio = logarithms.exp()
        self.is_confident_error = self.confidence_ratio < CONFIDENT_ERROR
        self.gradient = zero_ignored_(probabilities, labels, self.valid_mask)
        self.label_gradient = balance_label_entry_(self.gradient, index)

    @property
    def fit_excess(self) -> Tensor:
        if self._fit_excess is None:
            # The squared norm of p - onehot is the sum of the squares less 2 p_y, plus 1.
            norm = self.gradient_norm
            self._fit_excess = -torch.addcmul(self.label_gradient[:, 0], norm, norm)
        return self._fit_excess

    @property
    def gradient_norm(self) -> Tensor:
        if self._gradient_norm is None:
            self._gradient_norm = torch.linalg.vector_norm(self.gradient, dim=-1)
        return self._gradient_norm


def relative_pull(gradient: Tensor, batch: LogitBatch) -> Tensor:
    """
    How much of the pull of cross-entropy at the label a gradient has, `max(g_y / (p_y - 1), 0)`.

    Source: ours.

    Args:
        gradient (`torch.Tensor` of shape `[N, C]`): A gradient at the logits, in per-sample units.
        batch ([`LogitBatch`]): The micro-batch.

    Returns:
        `torch.Tensor` of shape `[N]`: At least 0; 0 for ignored samples.

    Example:

    ```python
    >>> import torch
    >>> batch = LogitBatch(torch.zeros(1, 3), torch.tensor([1]))
    >>> relative_pull(batch.gradient / 10, batch)
    tensor([0.1000])

    ```
    """
    # The bounds keep it finite where cross-entropy pulls at nothing any more: so does the delta then.
    limits = torch.finfo(gradient.dtype)
    pull = gradient.gather(-1, batch.classes[:, None]) / batch.label_gradient.clamp(max=-limits.tiny)
    return pull[:, 0].clamp(0, limits.max**0.5)


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
    gradient = zero_ignored_(logits.softmax(-1), labels)
    balance_label_entry_(gradient, labels.clamp(min=0)[:, None])
    return gradient


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each sample, `[N]`, 0 for ignored ones, with its gradient left to autograd."""
    try:
        return F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="none")
    except IndexError as error:
        raise _label_error(logits, error) from error


def logits_of(outputs: Tensor | Mapping | tuple) -> Tensor:
    """The logits among the outputs of a model: the tensor itself, the entry `logits`, or the first item of a tuple."""
    if isinstance(outputs, Tensor):
        return outputs
    return outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]


def balance_label_entry_(matrix: Tensor, index: Tensor) -> Tensor:
    """Sets one entry of each row, in place, to minus the sum of the others. Returns these entries, `[N, 1]`."""
    entry = -matrix.scatter_(-1, index, 0.0).sum(-1, keepdim=True)
    matrix.scatter_(-1, index, entry)
    return entry


def zero_ignored_(matrix: Tensor, labels: Tensor, valid_mask: Tensor | None = None) -> Tensor:
    """
    Sets the rows of ignored samples to zero in place, NaN and infinity included.

    Args:
        matrix (`torch.Tensor` of shape `[N, C]`): Floating point.
        labels (`torch.Tensor` of shape `[N]`): Class indices, -100 for ignored samples.
        valid_mask (`torch.Tensor` of shape `[N]`, *optional*): [`LogitBatch.valid_mask`], if it is known.
    """
    if torch.compiler.is_compiling():
        return matrix.masked_fill_((labels < 0)[:, None], 0.0)
    valid_mask = labels >= 0 if valid_mask is None else valid_mask
    # As integers, where 0 times NaN is 0: on the CPU ten times as fast in float32 as `masked_fill_` by rows.
    matrix.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[matrix.element_size()]).mul_(valid_mask[:, None])
    return matrix


def stack_rows(rows: Sequence[Tensor], batch: LogitBatch) -> Tensor:
    """Rows of one number per sample as one tensor, `[k, N]`, zero for ignored samples."""
    # Filled and not multiplied: an ignored sample may have logits that are not finite.
    return torch.stack(list(rows)).masked_fill_(batch.ignore_mask, 0.0)


def _label_entries(logits: Tensor, index: Tensor) -> Tensor:
    try:
        return logits.gather(-1, index)
    except RuntimeError as error:
        if "out of bounds" not in str(error):
            raise
        raise _label_error(logits, error) from error


def _label_error(logits: Tensor, error: Exception) -> ValueError:
    return ValueError(
        f"`labels` must lie in [0, {logits.shape[-1]}) or be {IGNORE_INDEX}: {str(error).rstrip('.')}. Check "
        "`num_labels` of the model and the label column."
    )
