"""What a callback offers that wants to see the perturbations of a training."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from accelerate import Accelerator
from torch import Tensor


@runtime_checkable
class PerturbationObserver(Protocol):
    """
    A [`~transformers.TrainerCallback`] that [`LPGTrainer`] shows the deltas of a training.

    Attributes:
        is_due (`bool`): Whether the deltas of the present step are wanted.
    """

    is_due: bool

    def start(self, accelerator: Accelerator) -> None:
        """
        Forgets earlier trainings.

        Raises:
            ValueError: Where the observer cannot work (sharded or compiled models).
        """

    def add_perturbation(self, logits: Tensor, gradient: Tensor, loss_scale: float) -> None:
        """
        Sees the perturbation of a micro-batch.

        Args:
            logits (`torch.Tensor` of shape `[N, C]`): With their graph, which must be retained.
            gradient (`torch.Tensor` of shape `[N, C]`): The sum of all deltas, divided as the loss is.
            loss_scale (`float`): Factor of a gradient scaler.
        """

    def report(self) -> dict[str, float]:
        """Entries for the next log."""

    def state_dict(self) -> dict[str, Tensor]:
        """State for a checkpoint."""

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores the state of a checkpoint; an empty mapping stands for a checkpoint without this observer."""


def show_to(
    observers: Sequence[PerturbationObserver], logits: Tensor, divisor: Tensor | float, loss_scale: float
) -> Callable[[Tensor], None] | None:
    """
    Makes the function that shows the deltas of a micro-batch to the observers.

    Args:
        observers (`Sequence[PerturbationObserver]`): The observers. Only those that are due look.
        logits (`torch.Tensor` of shape `[N, C]`): The logits of the micro-batch, with their graph.
        divisor (`torch.Tensor`, scalar, or `float`): The number by which the loss of a sample is divided.
        loss_scale (`float`): Factor of a gradient scaler.

    Returns:
        `Callable`: Takes the sum of all deltas, `[N, C]` in per-sample units; `None` if nobody looks.
    """
    due = [observer for observer in observers if observer.is_due]
    if not due:
        return None

    def show(delta: Tensor) -> None:
        gradient = delta / torch.as_tensor(divisor).to(delta)
        for observer in due:
            observer.add_perturbation(logits, gradient, loss_scale)

    return show
