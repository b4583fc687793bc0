"""StepWatch: knows whether a training step is running, and whether it is LPGTrainer's own or a user's."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_pt_utils import find_batch_size

from ..batch_labels import labels_of
from .compilation import begin_model_step, replays_graphs


class StepWatch:
    """
    Follows the training step of one micro-batch.

    A subclass may override `training_step` and call `compute_loss` itself, several times, and divide the loss itself.
    Callbacks may call `compute_loss` between two steps.

    Args:
        label_names (`Sequence[str]`, *optional*): The `label_names` of the `TrainingArguments`.

    Attributes:
        is_running (`bool`): Whether a micro-batch is being trained on.
        is_reached (`bool`): Whether LPGTrainer's `compute_loss` was called for this micro-batch.
        inputs: The micro-batch, as the loop has it.
        was_own (`bool`): Whether LPGTrainer's own `training_step` was called for this micro-batch.
        divisor (`int` or `None`):
            The number by which the Trainer will divide the loss. `None` if LPGTrainer's own `training_step` is not
            running, so that nobody knows what happens to the loss.
        is_used (`bool` or `None`): Whether a gradient came to the first losses; `None` before there are any.
    """

    def __init__(self, label_names: Sequence[str] | None = None) -> None:
        self._label_names = label_names
        self.is_running = self.is_reached = self.was_own = False
        self.divisor: int | None = None
        self.is_used: bool | None = None
        self.inputs: object = None
        self._num_seen = 0
        self._seen: list[Tensor] = []
        self._is_told = False

    def begin(self, inputs: object) -> None:
        """Begins the step of a micro-batch."""
        self.is_running, self.is_reached, self.was_own = True, False, False
        self.inputs, self._num_seen, self._seen = inputs, 0, []

    def end(self) -> None:
        """Ends the step, and lets go of its batch."""
        self.is_running, self.inputs, self._seen = False, None, []

    def follow_use(self, loss: Tensor) -> None:
        """Notes whether a gradient comes to the losses that are handed out: an override may leave them out."""
        if not self.is_used and loss.requires_grad:
            self.is_used = False
            loss.register_hook(self._note_use)

    def _note_use(self, gradient: Tensor) -> None:
        self.is_used = True

    def is_newly_unused(self) -> bool:
        """Whether no gradient has come to the losses so far; `True` once."""
        is_new = self.is_used is False and not self._is_told
        self._is_told = self._is_told or is_new
        return is_new

    def is_first_look(self, labels: Tensor) -> bool:
        """
        Whether these samples of the micro-batch are seen for the first time. Statistics count each sample once.

        SAM, R-Drop and adversarial training look at the whole micro-batch again. A step may also take it in pieces and
        look at each of them again, as `torch.utils.checkpoint` does in the backward pass.

        Args:
            labels (`torch.Tensor` of shape `[N]` or `[N, 1]`): The labels in this call of `compute_loss`.
        """
        # They are kept until the step ends: nothing else can lie in their memory.
        if any(labels.data_ptr() == seen.data_ptr() and labels.shape == seen.shape for seen in self._seen):
            return False
        is_first = not self._seen
        self._seen.append(labels)
        self._num_seen += len(labels)
        return is_first or self._num_seen <= self._num_samples()

    def _num_samples(self) -> int:
        labels = labels_of(self.inputs, self._label_names)
        if isinstance(labels, Tensor) and labels.ndim > 0:
            return len(labels)
        return find_batch_size(self.inputs) or 0


class StepWatchMixin(Trainer):
    """Knows of every training step of a [`~transformers.Trainer`], whoever wrote `training_step`."""

    _lpg_step_watch: StepWatch
    _lpg_replays_graphs = False

    def _lpg_end_micro_batch(self) -> None:
        """Called after every training step."""
        raise NotImplementedError

    def _lpg_begin_micro_batch(self, inputs: Any) -> None:
        """Called before every training step."""
        if self._lpg_replays_graphs:
            begin_model_step(self.accelerator)
        self._lpg_step_watch.begin(inputs)

    @contextmanager
    def _lpg_watched_steps(self) -> Iterator[None]:
        """Within it, the loop of the Trainer calls [`_lpg_watched_step`]."""
        self._lpg_replays_graphs = replays_graphs(self.accelerator)
        # The loop finds this attribute before the method of any subclass, which may not call ours. A public hook
        # around the training step does not exist in 5.24.
        attributes = vars(self)
        before = {name: attributes[name] for name in ["training_step"] if name in attributes}
        attributes["training_step"] = partial(self._lpg_watched_step, self.training_step)
        try:
            yield
        finally:
            del attributes["training_step"]
            attributes.update(before)

    def _lpg_watched_step(
        self, step: Callable[..., Tensor], model: nn.Module, inputs: Any, *args: Any, **kwargs: Any
    ) -> Tensor:
        if self._lpg_step_watch.is_running:
            return step(model, inputs, *args, **kwargs)
        self._lpg_begin_micro_batch(inputs)
        try:
            loss = step(model, inputs, *args, **kwargs)
        finally:
            self._lpg_step_watch.end()
        self._lpg_end_micro_batch()
        return loss
