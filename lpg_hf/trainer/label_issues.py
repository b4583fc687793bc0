"""LabelIssuesMixin: numbers the training rows on their way, and ranks them by how likely their labels are wrong."""

from collections.abc import Callable, Iterator, MutableMapping
from functools import partial
from typing import Any

import datasets
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer

from ..distributed import stack_processes
from ..perturbations import ClassRelativeDampening
from ..row_numbers import ROWS_KEY, IndexedCollator, IndexedDataset, UnindexedLoader, has_rows
from ..row_records import DynamicsBuffer, TrainingDynamics
from .checkpoint import load_rows, save_rows
from .summary import find_class_names


logger = get_logger(__name__)


class RowTracker:
    """
    Carries the row numbers of one training from its batches into [`TrainingDynamics`].

    Args:
        accelerator (`accelerate.Accelerator`): The accelerator of the training.

    Attributes:
        buffer ([`DynamicsBuffer`] or `None`): Receives the visits; `None` until the training has made its loader.
    """

    def __init__(self, accelerator: Accelerator):
        self.buffer: DynamicsBuffer | None = None
        self._accelerator = accelerator
        # The micro-batches of the present step with their rows, and the rows of the present micro-batch.
        self._step: list[tuple[MutableMapping, Tensor]] = []
        self._rows: Tensor | None = None

    def start(self, num_rows: int) -> None:
        """Begins to record, for a data set of `num_rows` rows."""
        self.buffer = DynamicsBuffer(TrainingDynamics(num_rows).to(self._accelerator.device))

    def take_rows(self, batches: list) -> None:
        """Takes the row numbers out of the micro-batches of a step."""
        if self.buffer is not None:
            self._step = [(b, b.pop(ROWS_KEY)) for b in batches if isinstance(b, MutableMapping) and ROWS_KEY in b]

    def follow(self, inputs: object | None) -> None:
        """Says to which micro-batch of [`RowTracker.take_rows`] the next visit belongs; `None` if to none of them."""
        self._rows = next((rows for batch, rows in self._step if batch is inputs), None)

    @property
    def is_following(self) -> bool:
        """Whether the rows of the present micro-batch are known and have not been recorded."""
        return self._rows is not None

    def record(self, logits: Tensor, labels: Tensor, weight: Tensor | None) -> None:
        """Records the present micro-batch once: SAM looks at it a second time."""
        rows, self._rows = self._rows, None
        if rows is not None and self.buffer is not None:
            # Copies, because a compiled model may write its next results into the same memory.
            self.buffer.add(rows, logits.detach().clone(), labels, None if weight is None else weight.clone())

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
        return self.buffer.records.merged(partial(stack_processes, accelerator=self._accelerator))


class LabelIssuesMixin(Trainer):
    """Adds `label_issues` to a [`~transformers.Trainer`] that calls `_record_rows` for its training batches."""

    # `None` before training.
    _row_tracker: RowTracker | None = None

    def _num_classes(self) -> int | None:
        """The number of classes, if it is known."""
        raise NotImplementedError

    def _dampening(self) -> ClassRelativeDampening | None:
        """The class-relative dampening of the chain, if it acts."""
        raise NotImplementedError

    # Row numbers on their way

    def _get_dataloader(
        self,
        dataset: Any,
        description: str,
        batch_size: int,
        sampler_fn: Callable[[Any], Sampler] | None = None,
        is_training: bool = False,
        dataloader_key: str | None = None,
    ) -> DataLoader:
        # The public `get_train_dataloader` makes sampler, collator and loader in one go. This hook, which exists since
        # https://github.com/huggingface/transformers/pull/38090 (unchanged in 5.24), is the only place between them.
        tracker = self._row_tracker
        # Only the loop's own loader: other readers of the training batches get them as the Trainer makes them.
        is_loop = is_training and tracker is not None and tracker.buffer is None
        if tracker is None or not is_loop or not has_rows(dataset):
            return super()._get_dataloader(dataset, description, batch_size, sampler_fn, is_training, dataloader_key)

        tracker.start(len(dataset))
        # The Trainer treats columns here, and then finds none to treat below.
        own_collator = collator = self.data_collator
        if isinstance(dataset, datasets.Dataset):
            dataset = self._remove_unused_columns(dataset, description=description)
        else:
            collator = self._get_collator_with_removed_columns(collator, description=description)
        self.data_collator = IndexedCollator(collator, len(dataset))
        sampler_of_rows = None if sampler_fn is None else lambda _: sampler_fn(dataset)
        try:
            return super()._get_dataloader(
                IndexedDataset(dataset), description, batch_size, sampler_of_rows, is_training, dataloader_key
            )
        finally:
            self.data_collator = own_collator

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> tuple:
        # Here the Trainer sets the loader that callbacks see, and no public hook comes after it. The hook exists since
        # https://github.com/huggingface/transformers/pull/44041, unchanged in 5.24.
        prepared = super()._prepare_for_training(*args, **kwargs)
        if self._row_tracker is not None and self._row_tracker.buffer is not None:
            self.callback_handler.train_dataloader = UnindexedLoader(self.callback_handler.train_dataloader)
        return prepared

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        """Takes the micro-batches of a step from the loader, and the row numbers out of them."""
        batch_samples, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._row_tracker is not None:
            self._row_tracker.take_rows(batch_samples)
        return batch_samples, num_items_in_batch

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor | Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Trains on a micro-batch whose rows are followed."""
        if self._row_tracker is None:
            return super().training_step(model, inputs, num_items_in_batch)
        self._row_tracker.follow(inputs)
        try:
            return super().training_step(model, inputs, num_items_in_batch)
        finally:
            self._row_tracker.follow(None)

    def _record_rows(self, logits: Tensor, labels: Tensor) -> None:
        dampening = self._dampening()
        if self._row_tracker is not None:
            self._row_tracker.record(logits, labels, None if dampening is None else dampening.last_weight)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # Only callbacks are told of the end of an epoch, and a callback of ours would appear in the user's list. The
        # hook exists since https://github.com/huggingface/transformers/pull/44041, unchanged in 5.24.
        super()._run_epoch(*args, **kwargs)
        if self._row_tracker is not None:
            self._row_tracker.end_epoch()

    # Checkpoints

    def _save_rows(self, output_dir: str) -> None:
        records = None if self._row_tracker is None else self._row_tracker.merged()
        if records is not None and records.has_visits and self.args.should_save:
            save_rows(output_dir, records)

    def _load_rows(self, checkpoint: str) -> None:
        saved = load_rows(checkpoint)
        if saved is None or self._row_tracker is None or self._row_tracker.buffer is None:
            return
        num_rows, records = TrainingDynamics.num_rows_of(saved), self._row_tracker.buffer.records
        if num_rows != records.num_rows:
            logger.warning(
                f"The checkpoint was written with a `train_dataset` of {num_rows} rows and this run has "
                f"{records.num_rows}. The records of the rows, which `label_issues` ranks, start anew."
            )
        elif self.accelerator.is_main_process:  # the saved sums are over all processes
            records.load_state_dict(saved)

    # Results

    def label_issues(self) -> datasets.Dataset:
        r"""
        Ranks the training rows by how likely their labels are wrong, judged by this one training run.

        The training only adds up a few sums per row for it; [`~row_records.TrainingDynamics`] explains the score. With
        several processes, all must call this method, and all get the same table.

        Returns:
            [`datasets.Dataset`]: One line for each row that was trained on, beginning with the most doubtful:

            - `row`: its index in `train_dataset`;
            - `label`, and `suggested_label`: the other class that the model believed most;
            - `score`, in [0, 1]: one minus the geometric mean, over the visits, of the probability that the model gave
              to the label divided by its largest probability;
            - `weight`, in [0, 1]: its mean weight under class-relative dampening, if that is in the chain;
            - `visits`: how often the training saw it.

        Raises:
            ValueError: Before training, for a stream (whose rows have no index), if the model is not a classifier, or
                if a collator reorders its items or changes labels, so that rows cannot be told apart.

        Example:

        ```python
        >>> from tempfile import mkdtemp
        >>> from datasets import Dataset
        >>> from lpg_hf import LPGTrainer
        >>> from transformers import PrinterCallback, ResNetConfig, ResNetForImageClassification, TrainingArguments

        >>> images = [[[[float(label)] * 8] * 8] * 3 for label in [0, 1] * 10]
        >>> dataset = Dataset.from_dict({"pixel_values": images, "label": [1, 1] + [0, 1] * 9})  # row 0 is wrong
        >>> model = ResNetForImageClassification(ResNetConfig(num_labels=2, hidden_sizes=[8], depths=[1]))
        >>> args = TrainingArguments(mkdtemp(), report_to=[], use_cpu=True, disable_tqdm=True, learning_rate=1e-2)
        >>> trainer = LPGTrainer(model=model, args=args, train_dataset=dataset)
        >>> trainer.remove_callback(PrinterCallback)
        >>> _ = trainer.train()
        >>> trainer.label_issues()["row"][0]
        0

        ```
        """
        return self._ranked_rows()

    def _ranked_rows(self) -> datasets.Dataset:
        if not has_rows(self.train_dataset):
            raise ValueError(
                f"`train_dataset` is of the type {type(self.train_dataset).__name__}, whose rows have no index to "
                "rank them by. Use a map-style data set."
            )
        records = None if self._row_tracker is None else self._row_tracker.merged()
        if records is None:
            cause = (
                "there was no training yet: call `train()` first"
                if self._row_tracker is None
                else "`get_train_dataloader` is overridden without a call of LPGTrainer's, so the batches carry no "
                "row numbers: call `super().get_train_dataloader()` in it"
            )
            raise ValueError(f"Label issues come from what training records of its rows, but {cause}.")
        if not records.has_visits:
            raise ValueError(
                "Training recorded no row. Either the model is not a single-label classifier, or `compute_loss` or "
                "`training_step` are overridden without a call of LPGTrainer's, or they pass on another batch than "
                "they get."
            )
        if records.num_unknown > 0:
            raise ValueError(
                f"The rows of {records.num_unknown} samples are not known: `data_collator` reordered its items, or "
                "changed their number or labels. Let it keep them as they come."
            )
        num_labels = self._num_classes() or records.largest_label + 1
        names = find_class_names(num_labels, self.train_dataset, self.accelerator.unwrap_model(self.model))
        return records.ranked(names, with_weight=self._dampening() is not None)
