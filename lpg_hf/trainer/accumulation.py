"""How the Trainer divides a loss under gradient accumulation. Since transformers 5.19 it can be told not to."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor
from transformers import Trainer


# The switch that tells the Trainer whether a loss is scaled already.
# https://github.com/huggingface/transformers/issues/43595
HAS_SWITCH = hasattr(Trainer, "loss_is_scaled_for_ga")


def divides_loss(trainer: Trainer, num_items_in_batch: Tensor | int | None) -> bool:
    """Whether `Trainer.training_step` will divide the loss that it gets by the number of micro-batches."""
    if HAS_SWITCH and trainer.loss_is_scaled_for_ga is not None:
        return not trainer.loss_is_scaled_for_ga
    takes_count = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
    return not takes_count and trainer.compute_loss_func is None


def as_trainer_expects(
    trainer: Trainer, loss: Tensor, is_scaled: bool, num_items_in_batch: Tensor | int | None
) -> Tensor:
    """
    Gets the loss of a micro-batch ready for `Trainer.training_step`, so that a mean over the whole step is not divided
    again, and a mean over the micro-batch is divided. Call it within [`switch_kept`].

    Args:
        trainer ([`~transformers.Trainer`]): The trainer. Since transformers 5.19 its switch is set.
        loss (`torch.Tensor`): The loss of a micro-batch.
        is_scaled (`bool`): Whether the loss is divided by the number of samples in the whole step.
        num_items_in_batch (`torch.Tensor` or `int`, *optional*): The number of samples as the Trainer counted it.

    Returns:
        `torch.Tensor`: The loss. Before transformers 5.19 it has the factor that undoes the Trainer's division.
    """
    if HAS_SWITCH:
        trainer.loss_is_scaled_for_ga = is_scaled
        return loss
    divides = divides_loss(trainer, num_items_in_batch)
    if is_scaled and divides:
        return loss * trainer.current_gradient_accumulation_steps
    if not is_scaled and not divides:
        return loss / trainer.current_gradient_accumulation_steps
    return loss


@contextmanager
def switch_kept(trainer: Trainer) -> Iterator[None]:
    """Within it, [`as_trainer_expects`] may set the Trainer's switch. Afterwards the user's value is back."""
    if not HAS_SWITCH:
        yield
        return
    before = trainer.loss_is_scaled_for_ga
    try:
        yield
    finally:
        trainer.loss_is_scaled_for_ga = before
