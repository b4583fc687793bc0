"""What the logits of a micro-batch say: computed once, and handed to the loss, the methods and the statistics."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


IGNORE_INDEX = -100
# A label whose probability is below this share of the largest is contradicted by the model.
CONFIDENT_ERROR = 0.1
# From this share on it is the largest, but for the rounding of a division.
CORRECT = 1 - 1e-6
# Up to this many numbers a batch is looked at in all ways at once. Beyond, memory costs more than starting operations,
# which takes longer on a GPU.
MAX_STACKED, MAX_STACKED_ON_GPU = 2**17, 2**22
# The reduction of `nll_loss_forward` that sums.
_SUM = 2


class Offsets(NamedTuple):
    """
    What is added to the logits of a batch, so that it is looked at in several ways at once.

    Args:
        rows (`torch.Tensor` of shape `[k, C]`):
            In this order: the offset at which labels are judged ([`ClassStatistics.judged_offset`]), that of the fit
            excess ([`ClassStatistics.fitted_offset`]), zeros, and the offsets of targets. The second is left out where
            it is the first, and both where they are 0.
        plain (`int`): Position of the zeros.
    """

    rows: Tensor
    plain: int


class Look(NamedTuple):
    """What softmax says of a micro-batch in k ways, `[k, N]` each but for the last."""

    label_prob: Tensor
    largest_prob: Tensor
    confidence_ratio: Tensor
    expected: Tensor  # less the square of the norm, it is the fit excess
    norm: Tensor
    label_gradient: Tensor  # [k, N, 1]


class LogitBatch:
    """
    Softmax and cross-entropy of a micro-batch.

    Args:
        logits (`torch.Tensor` of shape `[N, C]`): Float32 or float64. The graph of the logits is not used.
        labels (`torch.Tensor` of shape `[N]`): Class indices, -100 for ignored samples.
        offsets ([`Offsets`], *optional*): What is added to the logits to look at them otherwise. Left out, nothing is.

    Attributes:
        valid_mask (`torch.Tensor` of shape `[N]`): Whether a sample has a label.
        ignore_mask (`torch.Tensor` of shape `[N]`): Its opposite.
        is_valid (`torch.Tensor` of shape `[N]`): The `valid_mask` as 1 and 0, in the dtype of the logits.
        classes (`torch.Tensor` of shape `[N]`): The labels, 0 for ignored samples.
        label_log_prob (`torch.Tensor` of shape `[N]`): `log p_y`, minus the cross-entropy; 0 for ignored samples.
        label_prob (`torch.Tensor` of shape `[N]`): `p_y`. Arbitrary for ignored samples, as the next four.
        confidence_ratio (`torch.Tensor` of shape `[N]`):
            `q_y / max_j q_j` with `q = softmax(z + judged_offset)`, in [0, 1].
        confidence_ratios (`torch.Tensor` of shape `[2, N]`): The same, and below it that of the logits as they are.
        is_confident_error (`torch.Tensor` of shape `[N]`):
            Whether the model contradicts the label: a confidence ratio below 1/10.
        fit_excess (`torch.Tensor` of shape `[N]`):
            `q_y - sum_j q_j^2` with `q = softmax(z + fitted_offset)`, in [-1, 1]. It is the probability of
            the label, less the one that the model itself expects. Its mean is 0 for a model that is
            calibrated on these labels, and above 0 for one that fits labels which it has seen before.
        gradient (`torch.Tensor` of shape `[N, C]`):
            Gradient of the summed cross-entropy at the logits, see [`logit_gradient`]. Read-only.
        label_gradient (`torch.Tensor` of shape `[N, 1]`): The entries of the labels in `gradient`.
        gradient_norm (`torch.Tensor` of shape `[N]`): Norm of the gradient of each sample.
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

    def __init__(self, logits: Tensor, labels: Tensor, offsets: Offsets | None = None):
        self.logits = logits = logits.detach()
        self.labels = labels
        self.scale: Tensor | None = None
        self._label_log_prob: Tensor | None = None
        self.valid_mask = labels != IGNORE_INDEX
        self.is_valid = self.valid_mask.to(logits)
        self.classes = labels * self.valid_mask
        rows, plain = (None, 0) if offsets is None else (offsets.rows.to(logits), offsets.plain)
        limit = MAX_STACKED if logits.device.type == "cpu" else MAX_STACKED_ON_GPU
        self.is_small = (1 if rows is None else len(rows)) * logits.numel() <= limit
        # Gradients, or offsets for which they are still to be computed.
        self._targets: list[Tensor | None]
        if rows is None:
            look, (self.gradient,) = self._look(logits[None])
            self._targets = []
        elif self.is_small:
            matrices = logits + rows[:, None]
            look, matrices = self._look(matrices, out=matrices)
            self.gradient, self._targets = matrices[plain], [*matrices[plain + 1 :]]
        else:
            look, self.gradient = self._look_in_turn(rows[:plain])
            self._targets = [*rows[plain + 1 :]]
        fitted = max(plain - 1, 0)
        self.fit_excess = torch.addcmul(look.expected[fitted], look.norm[fitted], look.norm[fitted], value=-1)
        self.label_prob, self._largest_prob = look.label_prob[plain], look.largest_prob[plain]
        self.gradient_norm, self.label_gradient = look.norm[plain], look.label_gradient[plain]
        # Judged logits come first, and the plain ones behind both offsets, behind a shared one, or alone.
        self.confidence_ratios = look.confidence_ratio[: plain + 1 : max(plain, 1)].expand(2, -1)

    def _look(self, logits: Tensor, out: Tensor | None = None, has_gradient: bool = True) -> tuple[Look, Tensor]:
        """Looks at logits `[k, N, C]`. The second result holds the gradients, or else the probabilities."""
        matrices = torch.softmax(logits, -1, out=out)
        index = self.classes[:, None].expand(len(matrices), -1, 1)
        label_prob, largest_prob = _label_entries(matrices, index), matrices.amax(-1, keepdim=True)
        # With r the sum of the others, `p_y - |p|^2` is `r - |g|^2`.
        entry = expected = label_prob
        if has_gradient:
            zero_ignored_(matrices, self.labels, self.valid_mask)
            expected = matrices.scatter_(-1, index, 0.0).sum(-1, keepdim=True)
            # The entry of the label is minus the sum of the others, see `logit_gradient`.
            entry = -expected
            matrices.scatter_(-1, index, entry)
        look = Look(
            label_prob[..., 0],
            largest_prob[..., 0],
            confidence_ratio=(label_prob / largest_prob)[..., 0],
            expected=expected[..., 0],
            norm=torch.linalg.vector_norm(matrices, dim=-1),
            label_gradient=entry,
        )
        return look, matrices

    def _look_in_turn(self, offsets: Tensor) -> tuple[Look, Tensor]:
        """Looks at the logits with each offset and without, in the memory of one matrix. The last has the gradient."""
        matrix: Tensor | None = None
        looks = []
        for offset in offsets:
            matrix = torch.add(self.logits[None], offset, out=matrix)
            looks.append(self._look(matrix, out=matrix, has_gradient=False)[0])
        look, gradient = self._look(self.logits[None], out=matrix)
        return Look(*map(torch.cat, zip(*looks, look, strict=True))), gradient[0]

    def take_target(self, position: int) -> Tensor | None:
        """
        The gradient of cross-entropy at the logits plus the offset of a target, `[N, C]`, for the caller to overwrite.

        Args:
            position (`int`): Which of the offsets behind the zeros; -1 for none.

        Returns:
            `torch.Tensor`, or `None` if there is no such offset or the gradient was taken before.
        """
        if not 0 <= position < len(self._targets):
            return None
        target, self._targets[position] = self._targets[position], None
        return target if self.is_small or target is None else self._moved_gradient(target)

    def _moved_gradient(self, offset: Tensor) -> Tensor:
        """The gradient at the logits plus an offset of -69 to 0, `[C]`, from the gradient without it."""
        # softmax(z + b) is proportional to p exp(b), and off the label the gradient is p. One exponential per class is
        # a third of the time of another softmax.
        factor, index = offset.exp(), self.classes[:, None]
        matrix = self.gradient * factor
        own = torch.where(self.valid_mask, self.label_prob, 1.0)[:, None]
        entry = balance_label_entry_(matrix, index)
        # The sum of p is 1 up to rounding, which cancels like this where the offset is 0.
        return matrix.mul_((self.label_gradient - own) / torch.addcmul(entry, own, factor[index], value=-1))

    @property
    def ignore_mask(self) -> Tensor:
        return ~self.valid_mask

    @property
    def label_log_prob(self) -> Tensor:
        if self._label_log_prob is None:
            # The sum of exp(z_j - max z) is 1 / max_j p_j.
            label_logit = self.logits.gather(-1, self.classes[:, None])[:, 0]
            log_prob = label_logit - self.logits.amax(-1) + self._largest_prob.log()
            self._label_log_prob = log_prob.masked_fill(self.ignore_mask, 0.0)
        return self._label_log_prob

    @property
    def confidence_ratio(self) -> Tensor:
        return self.confidence_ratios[0]

    @property
    def is_confident_error(self) -> Tensor:
        return self.confidence_ratio < CONFIDENT_ERROR


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


def summed_cross_entropy(batch: LogitBatch) -> tuple[Tensor, Tensor]:
    """The sum of the cross-entropy of all samples, and its divisor: the number of those that have a label, or 1."""
    if batch.is_small and batch._label_log_prob is None:
        # The function behind `cross_entropy`, which keeps the number to itself.
        log_prob = batch.logits.log_softmax(-1)
        total, count = torch.ops.aten.nll_loss_forward(log_prob, batch.labels, None, _SUM, IGNORE_INDEX)
    else:  # in less passes over the matrix
        total, count = -batch.label_log_prob.sum(), batch.is_valid.sum()
    return total, count.clamp(min=1)


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
    table = torch.stack(list(rows))
    zero_ignored_(table.T, batch.labels, batch.valid_mask)
    return table


def _label_entries(logits: Tensor, index: Tensor) -> Tensor:
    try:
        return logits.gather(-1, index)
    except RuntimeError as error:
        if "out of bounds" not in str(error):
            raise
        raise _label_error(logits, error) from error


def _label_error(logits: Tensor, error: Exception) -> ValueError:
    found = str(error).partition(" for dimension")[0].rstrip(".")
    return ValueError(
        f"`labels` must lie in [0, {logits.shape[-1]}) or be {IGNORE_INDEX}: {found}. Check "
        "`num_labels` of the model and the label column."
    )
