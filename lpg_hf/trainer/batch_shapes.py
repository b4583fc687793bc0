"""Which batches look like a classifier's, and what becomes of the others."""

from typing import Any

import torch
from accelerate.logging import get_logger
from torch import Tensor
from torch.nn import functional as F
from transformers import Trainer

from ..batch import IGNORE_INDEX


logger = get_logger(__name__)

# Number of odd batches at the start of a training after which no other kind is expected.
MAX_FIRST_BATCHES = 16


def why_not_classifier(logits: object, labels: object, problem_type: str | None) -> str | None:
    """
    Explains why a batch does not come from a single-label classifier.

    Args:
        logits (`torch.Tensor`, *optional*): The logits of the model, if its outputs have any.
        labels (`torch.Tensor`, *optional*): The labels of the batch, if it has any.
        problem_type (`str`, *optional*): The `problem_type` in the model's config.

    Returns:
        `str`: The reason; `None` if the batch fits.

    Example:

    ```python
    >>> import torch
    >>> why_not_classifier(torch.zeros(2, 3), torch.tensor([0, 2]), problem_type=None)
    >>> why_not_classifier(torch.zeros(2, 1), torch.tensor([0, 2]), problem_type=None)
    'its logits have shape [2, 1], not [N, C] with C > 1'

    ```
    """
    if problem_type not in (None, "single_label_classification"):
        return f"its `config.problem_type` is {problem_type!r}"
    if labels is None:
        return (
            "its batches have no `labels` (where these have another name, pass it alone as `label_names` of the "
            "`TrainingArguments`, without label smoothing or `compute_loss_func`)"
        )
    if not isinstance(labels, Tensor) or labels.ndim == 0:
        return "its batches have no tensor of `labels`, one for each sample"
    if labels.is_floating_point() or labels.ndim > 2 or labels.numel() != len(labels):
        return f"its labels have dtype {labels.dtype} and shape {list(labels.shape)}, not one integer per sample"
    if not isinstance(logits, Tensor):
        return "its outputs have no tensor of `logits`"
    if logits.ndim != 2 or len(logits) != len(labels) or logits.shape[1] < 2:
        return f"its logits have shape {list(logits.shape)}, not [N, C] with C > 1"
    if not logits.is_floating_point():
        return f"its logits have dtype {logits.dtype}, not one of floating point"
    return None


def why_out_of_range(labels: Tensor, num_labels: int) -> str | None:
    """
    Explains why labels are no class indices, although a loss could be computed of them.

    The loss may ignore another label than -100, may shift the labels, or may take the logits for something else. On a
    GPU this waits for the labels.

    Args:
        labels (`torch.Tensor` of shape `[N]` or `[N, 1]`): The labels, -100 for ignored samples.
        num_labels (`int`): Number of classes.

    Returns:
        `str`: The reason; `None` if all labels are class indices.

    Example:

    ```python
    >>> import torch
    >>> why_out_of_range(torch.tensor([0, 3]), num_labels=3)
    'its labels reach up to 3, but its logits are for 3 classes'

    ```
    """
    classes = labels[labels != IGNORE_INDEX]
    lowest, highest = (classes.min().item(), classes.max().item()) if classes.numel() > 0 else (0, 0)
    if lowest < 0:
        return f"its labels reach down to {lowest}; a sample without a label is marked {IGNORE_INDEX}"
    if highest >= num_labels:
        return f"its labels reach up to {highest}, but its logits are for {num_labels} classes"
    return None


class OddBatches:
    """
    Tells the batches that can be perturbed from those that train as with the Trainer.

    MixUp makes soft labels for some batches, semi-supervised learning has batches without labels, and the heads of a
    model may have different numbers of classes. Such a batch says nothing about the others.

    Args:
        trainer ([`~transformers.Trainer`]): The trainer.
        is_said (`bool`): Whether there are methods that do not act, so that a warning is due.
        is_requested (`bool`): Whether these methods were asked for by name.
        loss_is_given (`bool`): Whether the loss is not the model's own.
    """

    def __init__(self, trainer: Trainer, is_said: bool, is_requested: bool, loss_is_given: bool):
        self._trainer = trainer
        self._is_said = is_said
        self._is_requested = is_requested
        self._loss_is_given = loss_is_given
        self._num_undecided = 0

    def fits(self, logits: Any, labels: Any, num_labels: int, *, reads_labels: bool) -> bool:
        """
        Whether a batch of a classifier can be perturbed. If not, there is one warning.

        Args:
            logits, labels: The logits and labels of the batch, of any type.
            num_labels (`int`): Number of classes of the classifier.
            reads_labels (`bool`): Whether labels may be out of range, and are looked at.
        """
        reason = why_not_classifier(logits, labels, problem_type=None)
        if reason is None and logits.shape[1] != num_labels:
            reason = f"its logits are for {logits.shape[1]} classes instead of {num_labels}"
        if reason is None and reads_labels:
            reason = why_out_of_range(labels, num_labels)
        if reason is not None:
            self._warn(reason, "")
        return reason is None

    def is_odd(self, loss: Tensor, logits: Any, labels: Any, is_first: bool) -> bool:
        """
        Whether a batch leaves open if the model is a classifier.

        Args:
            loss (`torch.Tensor`): The loss of the batch.
            logits, labels: The logits and labels of the batch, of any type.
            is_first (`bool`): Whether no batch has shown a classifier before. Other batches have nothing to show.
        """
        # A loss that has overflowed shows nothing, either.
        fits = why_not_classifier(logits, labels, problem_type=None) is None
        if fits and loss.detach().isfinite().all():
            return False
        if not is_first:
            return True
        if self._num_undecided >= MAX_FIRST_BATCHES:
            return False
        if fits:
            return True
        if labels is None:
            return not self._is_requested and isinstance(logits, Tensor) and logits.ndim == 2
        return is_soft(logits, labels) and (self._loss_is_given or is_cross_entropy(loss, logits, labels))

    def is_announced(self, logits: Any, labels: Any) -> bool:
        """Whether a warning has said what becomes of the training if this batch does not fit either."""
        return self._num_undecided >= MAX_FIRST_BATCHES and why_not_classifier(logits, labels, None) is not None

    def leave_undecided(self, reason: str) -> None:
        """Counts a batch at the start of the training that leaves the decision open, and warns once."""
        self._num_undecided += 1
        self._warn(
            reason, f" If the first {MAX_FIRST_BATCHES} batches are all like it, the whole training is Trainer's."
        )

    def _warn(self, reason: str, consequence: str) -> None:
        if self._is_said:
            self._is_said = False
            logger.warning(
                f"A batch of step {self._trainer.state.global_step + 1} cannot be perturbed: {reason}. It trains as "
                f"with `Trainer`, and so do all batches like it. The other batches are perturbed.{consequence}"
            )


def is_soft(logits: object, labels: object) -> bool:
    """Whether labels have the shape of class probabilities."""
    if not isinstance(logits, Tensor) or not isinstance(labels, Tensor) or logits.ndim != 2:
        return False
    return labels.is_floating_point() and labels.shape == logits.shape


def is_cross_entropy(loss: Tensor, logits: Tensor, labels: Tensor) -> bool:
    """Whether a loss is the cross-entropy of soft labels, up to half precision."""
    expected = F.cross_entropy(logits.detach().float(), labels.to(logits.device).float())
    return torch.allclose(loss.detach().mean().float(), expected, rtol=0.02)
