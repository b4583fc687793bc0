"""RowTracker: carries the numbers of the training rows from the batches into the records of their visits."""

from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader

from ..batch import IGNORE_INDEX
from ..batch_labels import labels_of
from ..distributed import stack_processes
from ..row_numbers import ROWS_KEY, UNKNOWN, has_rows, iterates_in_own_way, number_rows
from ..row_records import DynamicsBuffer, TrainingDynamics
from .row_check import count_wrong_labels


class RowTracker:
    """
    Carries the row numbers of one training from its batches into [`TrainingDynamics`].

    Args:
        accelerator (`accelerate.Accelerator`): The accelerator of the training.
        label_names (`Sequence[str]`, *optional*): The `label_names` of the `TrainingArguments`.

    Attributes:
        buffer ([`DynamicsBuffer`] or `None`): Receives the visits; `None` if the loader has no row numbers.
    """

    def __init__(self, accelerator: Accelerator, label_names: Sequence[str] | None = None):
        self.buffer: DynamicsBuffer | None = None
        self._accelerator = accelerator
        self._label_names = label_names
        # The data set of the Trainer's loader: the training set, without the columns that the model does not take.
        self._dataset: object = None
        # The training set whose rows are numbered.
        self._train_dataset: object = None
        # Data set and collator of the last epoch.
        self._source: tuple[Any, Any] | None = None
        # The loader whose workers outlive an epoch.
        self._persistent: DataLoader | None = None
        # Shapes and types of logits and labels that are recorded.
        self._kind: tuple | None = None
        # The micro-batches of the present step with their rows and labels; rows and labels of the present one.
        self._step: list[tuple[MutableMapping, Tensor, Tensor]] = []
        self._present: tuple[Tensor, Tensor] | None = None

    def note(self, loader: DataLoader) -> None:
        """Notes that the loader reads the rows of the training set, which the Trainer made it for."""
        if self._dataset is None:
            self._dataset = loader.dataset

    def start(self, loader: object, train_dataset: Any) -> None:
        """Begins to record if the rows that the loader reads are those of the training set."""
        if not isinstance(loader, DataLoader) or loader.batch_sampler is None or not has_rows(train_dataset):
            return
        if iterates_in_own_way(loader):
            return
        if loader.dataset is train_dataset or loader.dataset is self._dataset:
            self.buffer = DynamicsBuffer(TrainingDynamics(num_rows=len(train_dataset)))
            self._source, self._train_dataset = (loader.dataset, loader.collate_fn), train_dataset

    def numbered(self, loader: DataLoader) -> DataLoader:
        """The loader of an epoch, with row numbers if they are recorded: callbacks may change it between epochs."""
        if self.buffer is None:
            return loader
        self._source = loader.dataset, loader.collate_fn
        numbered = self._persistent or number_rows(loader, self.buffer.records.num_rows, self._label_names)
        self._persistent = numbered if loader.persistent_workers else None
        return numbered

    def take_rows(self, batches: list) -> None:
        """Takes the row numbers out of the micro-batches of a step."""
        if self.buffer is not None:
            self._step = [
                (batch, batch.pop(ROWS_KEY), labels_of(batch, self._label_names))
                for batch in batches
                if (type(batch) is dict or isinstance(batch, MutableMapping)) and ROWS_KEY in batch
            ]

    def follow(self, inputs: object) -> None:
        """Says to which micro-batch of [`RowTracker.take_rows`] the next visit belongs."""
        self._present = next(((rows, labels) for batch, rows, labels in self._step if batch is inputs), None)
        if self._present is None and isinstance(inputs, MutableMapping) and ROWS_KEY in inputs:
            self.take_rows([inputs])  # an override of `get_batch_samples` left ours out
            self._present = self._step[0][1:]

    @property
    def is_following(self) -> bool:
        """Whether the rows of the present micro-batch are known and have not been recorded."""
        return self._present is not None

    def record(self, logits: Tensor, labels: Tensor, weight: Tensor | None, offset: Tensor | None) -> None:
        """
        Records the present micro-batch once: SAM looks at it a second time.

        A micro-batch of another kind than the first one, as with soft labels, is left out.

        Args:
            logits (`torch.Tensor` of shape `[N, C]`): The logits of the model.
            labels (`torch.Tensor` of shape `[N]` or `[N, 1]`): The labels that it was given.
            weight (`torch.Tensor` of shape `[N]`, *optional*): Weight of each sample under class-relative dampening.
            offset (`torch.Tensor` of shape `[C]`, *optional*): Added to the logits where labels are judged.
        """
        present, self._present = self._present, None
        if present is None or self.buffer is None or not (isinstance(logits, Tensor) and isinstance(labels, Tensor)):
            return
        kind = (logits.shape[1:], labels.shape[1:], labels.dtype, labels.shape[0] - logits.shape[0])
        self._kind = self._kind or kind
        if kind == self._kind:
            rows, own_labels = present
            if labels is not own_labels:
                rows = self._checked_rows(rows, own_labels, labels)
            # Copies, because a compiled model may write its next results into the same memory.
            judged = logits.detach().clone() if offset is None else logits.detach() + offset
            self.buffer.add(rows, judged, labels, None if weight is None else weight.clone())

    def _checked_rows(self, rows: Tensor, own_labels: Tensor, labels: Tensor) -> Tensor:
        """
        The rows of a micro-batch whose labels an override has replaced.

        It may leave labels out, or give some to samples that had none. If it changes a label, the samples may be in
        another order, and all rows are unknown.
        """
        assert self.buffer is not None
        unknown = torch.full((labels.numel(),), self.buffer.records.num_rows + UNKNOWN, device=labels.device)
        if own_labels.shape != labels.shape:
            return unknown
        own_labels, labels = own_labels.to(labels.device).flatten(), labels.flatten()
        is_same = own_labels == labels
        has_order = (is_same | (own_labels == IGNORE_INDEX) | (labels == IGNORE_INDEX)).all()
        return torch.where(is_same & has_order, rows.to(labels.device), unknown)

    def has_numbered(self, train_dataset: object) -> bool:
        """Whether the rows are those of this training set."""
        return train_dataset is self._train_dataset

    def end_epoch(self) -> None:
        """Adds up all visits and lets go of the last batches."""
        self._step = []
        if self.buffer is not None:
            self.buffer.flush()

    def merged(self) -> TrainingDynamics | None:
        """The records of all processes; `None` if there was no loader. All processes must call it."""
        if self.buffer is None:
            return None
        self.buffer.flush()
        return self.buffer.records.merged(self._stack)

    def _stack(self, tensor: Tensor) -> Tensor:
        # Processes on GPUs exchange nothing but tensors on them.
        on_device = tensor.to(self._accelerator.device).contiguous()
        return stack_processes(on_device, accelerator=self._accelerator)

    def count_wrong_labels(self, records: TrainingDynamics) -> tuple[int, int]:
        """
        Compares records with the data set, if their rows are known only because the collator should keep their order.

        Args:
            records ([`TrainingDynamics`]): The merged records.

        Returns:
            `tuple[int, int]`: Number of rows whose recorded label is not theirs, and of all rows that were compared.
                Both are -1 if there was nothing to compare, because the labels were compared in training.
        """
        if not records.has_unverified or self._source is None:
            return -1, -1
        return count_wrong_labels(*self._source, records.labels_of_visited(), self._label_names)
