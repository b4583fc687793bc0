"""Gradient accumulation: how the Trainer divides a loss, and how many labeled samples a step has."""

from itertools import starmap, zip_longest
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import Trainer
from transformers.trainer_pt_utils import find_batch_size

from ..batch import IGNORE_INDEX
from ..batch_labels import labels_of
from ..distributed import AsyncAllReduce


# The attribute that tells the Trainer whether a loss is scaled already.
# https://github.com/huggingface/transformers/issues/43595
HAS_SWITCH = hasattr(Trainer, "loss_is_scaled_for_ga")


def loss_divisor(trainer: Trainer, num_items_in_batch: Tensor | int | None) -> int:
    """The number by which `Trainer.training_step` divides the loss that `compute_loss` returns."""
    is_scaled = trainer.loss_is_scaled_for_ga if HAS_SWITCH else None
    if is_scaled is None:
        takes_count = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
        is_scaled = takes_count or trainer.compute_loss_func is not None
    return 1 if is_scaled else trainer.current_gradient_accumulation_steps


class _MicroBatch(NamedTuple):
    """What the loader made, and the labels that it had then."""

    batch: object
    labels: Tensor | None
    version: int
    num_labeled: Tensor | None

    def has(self, labels: Tensor) -> bool:
        """Whether these are its labels as they were."""
        return labels is self.labels and not labels.is_inference() and labels._version == self.version


class StepItems:
    """
    Counts the labeled samples in all micro-batches of a step, on all processes.

    Args:
        trainer ([`~transformers.Trainer`]): Its settings and accelerator are used.
    """

    def __init__(self, trainer: Trainer):
        self._trainer = trainer
        self._count: AsyncAllReduce | Tensor | int | None = None
        self._batches: list[_MicroBatch] = []

    def begin(self, batches: list, num_items_in_batch: Tensor | int | None, device: torch.device) -> None:
        """Begins a step. All processes must call it."""
        args = self._trainer.args
        self._count = num_items_in_batch
        # The Trainer counts for some models and losses alone, and for DataParallel it counts a share.
        must_count = num_items_in_batch is None or args.n_gpu > 1
        has_parts = len(batches) > 1 or self._trainer.accelerator.num_processes > 1
        labels = [labels_of(batch, args.label_names) for batch in batches]
        labeled = list(map(count_labeled, batches, labels)) if must_count or has_parts else []
        self._batches = list(starmap(_micro_batch, zip_longest(batches, labels, labeled)))
        if labeled and must_count:
            count = torch.stack([count.to(labeled[0].device) for count in labeled]).sum().to(device)
            across = args.average_tokens_across_devices
            self._count = AsyncAllReduce(count, self._trainer.accelerator) if across else count

    def end(self) -> None:
        """Ends the step."""
        self._count, self._batches = None, []

    def count(self, num_items_in_batch: Tensor | int | None) -> Tensor | int | None:
        """Number of labeled samples in the present step; `num_items_in_batch` outside of one."""
        trainer = self._trainer
        if trainer.compute_loss_func is not None and trainer.args.n_gpu <= 1:
            return num_items_in_batch  # by which it divides, though an override may have counted anew
        if isinstance(self._count, AsyncAllReduce):
            self._count = self._count.wait()
        return num_items_in_batch if self._count is None else self._count

    def has(self, batch: object, labels: Tensor) -> bool:
        """Whether the labels of a call are those that the loader gave its micro-batch."""
        found = self._find(batch)
        return found is not None and found.has(labels)

    def _find(self, batch: object) -> _MicroBatch | None:
        return next((each for each in self._batches if each.batch is batch), None)

    def of_call(self, num_items: Tensor | int | None, batch: object, labels: Tensor) -> Tensor | int | None:
        """
        Number of samples in the step as a call of `compute_loss` sees it, whose loss is the mean over its samples.

        R-Drop repeats the micro-batch within one call, co-teaching ignores labels that look wrong, and other scripts
        pass on a part of it. The mean over what is left has the weight of the micro-batch all the same.

        Args:
            num_items (`torch.Tensor` or `int`, *optional*): Number of labeled samples in the step.
            batch (`object`): The micro-batch as the loader made it.
            labels (`torch.Tensor` of shape `[N]` or `[N, 1]`): The labels of the call.
        """
        found = self._find(batch)
        if num_items is None or found is None or found.has(labels):
            return num_items
        num_left = (labels != IGNORE_INDEX).sum()
        if found.num_labeled is None:  # the step has no other samples
            return num_left
        num_before = found.num_labeled.to(num_left.device)
        return torch.where(num_before > 0, num_items * num_left / num_before, num_items)


def _micro_batch(batch: object, labels: object, num_labeled: Tensor | None) -> _MicroBatch:
    labels = labels if isinstance(labels, Tensor) else None
    version = -1 if labels is None or labels.is_inference() else labels._version
    return _MicroBatch(batch, labels, version, num_labeled)


def is_one_per_sample(labels: Tensor) -> bool:
    """Whether labels are one integer for each sample."""
    return labels.ndim > 0 and labels.numel() == len(labels) and not labels.is_floating_point()


def count_labeled(batch: object, labels: object) -> Tensor:
    """The labeled samples of a micro-batch, a scalar. Without one integer label per sample, all of them count."""
    if isinstance(labels, Tensor) and is_one_per_sample(labels):
        return (labels != IGNORE_INDEX).sum()
    return torch.tensor(find_batch_size(batch) or 0)
