"""LabelIssuesMixin: numbers the training rows on their way, and ranks them by how likely their labels are wrong."""

from collections.abc import Iterator, MutableMapping
from functools import partial
from typing import Any

import datasets
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from torch import Tensor
from torch.utils.data import DataLoader

from ..data.training_labels import labels_or_none
from ..distributed import stack_processes
from ..perturbations import ClassRelativeDampening
from ..row_numbers import ROWS_KEY, UNKNOWN, has_rows, number_rows
from ..row_records import DynamicsBuffer, TrainingDynamics
from .row_file import load_rows, save_rows
from .step_watch import StepWatchMixin
from .summary import find_class_names


logger = get_logger(__name__)

# With fewer known samples than the rest, a ranking would say nothing of the training set.
MAX_UNKNOWN_SHARE = 0.9


class RowTracker:
    """
    Carries the row numbers of one training from its batches into [`TrainingDynamics`].

    Args:
        accelerator (`accelerate.Accelerator`): The accelerator of the training.

    Attributes:
        buffer ([`DynamicsBuffer`] or `None`): Receives the visits; `None` if the loader has no row numbers.
    """

    def __init__(self, accelerator: Accelerator):
        self.buffer: DynamicsBuffer | None = None
        self._accelerator = accelerator
        # The data set of the Trainer's loader: the training set, without the columns that the model does not take.
        self._dataset: object = None
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
        if loader.dataset is train_dataset or loader.dataset is self._dataset:
            records = TrainingDynamics(num_rows=len(train_dataset))
            self.buffer = DynamicsBuffer(records.to(self._accelerator.device))

    def numbered(self, loader: DataLoader) -> DataLoader:
        """The loader of an epoch, with row numbers if they are recorded: callbacks may change it between epochs."""
        if self.buffer is None:
            return loader
        numbered = self._persistent or number_rows(loader, self.buffer.records.num_rows)
        self._persistent = numbered if loader.persistent_workers else None
        return numbered

    def take_rows(self, batches: list) -> None:
        """Takes the row numbers out of the micro-batches of a step."""
        if self.buffer is not None:
            self._step = [
                (batch, batch.pop(ROWS_KEY), batch["labels"])
                for batch in batches
                if isinstance(batch, MutableMapping) and ROWS_KEY in batch
            ]

    def follow(self, inputs: object) -> None:
        """Says to which micro-batch of [`RowTracker.take_rows`] the next visit belongs."""
        self._present = next(((rows, labels) for batch, rows, labels in self._step if batch is inputs), None)

    @property
    def is_following(self) -> bool:
        """Whether the rows of the present micro-batch are known and have not been recorded."""
        return self._present is not None

    def record(self, logits: Tensor, labels: Tensor, weight: Tensor | None) -> None:
        """
        Records the present micro-batch once: SAM looks at it a second time.

        A micro-batch of another kind than the first one, as with soft labels, is left out.
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
            self.buffer.add(rows, logits.detach().clone(), labels, None if weight is None else weight.clone())

    def _checked_rows(self, rows: Tensor, own_labels: Tensor, labels: Tensor) -> Tensor:
        """The rows of a micro-batch; all unknown if an override has changed its labels."""
        assert self.buffer is not None
        unknown = torch.full((labels.numel(),), self.buffer.records.num_rows + UNKNOWN, device=labels.device)
        if own_labels.shape != labels.shape:
            return unknown
        is_same = (own_labels.to(labels.device) == labels).all()
        return torch.where(is_same, rows.to(labels.device), unknown)

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


class LabelIssuesMixin(StepWatchMixin):
    """Adds `label_issues` to a [`~transformers.Trainer`] that calls `_lpg_record_rows` for its training batches."""

    # `None` before training.
    _lpg_row_tracker: RowTracker | None = None

    def _lpg_num_labels(self) -> int | None:
        """The number of classes, if it is known."""
        raise NotImplementedError

    def _lpg_dampening(self) -> ClassRelativeDampening | None:
        """The class-relative dampening of the chain, if it acts."""
        raise NotImplementedError

    # Row numbers on their way

    def get_train_dataloader(self) -> DataLoader:
        """The loader of the training batches, as the Trainer makes it."""
        loader = super().get_train_dataloader()
        if self._lpg_row_tracker is not None:
            self._lpg_row_tracker.note(loader)
        return loader

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, *args: Any, **kwargs: Any) -> tuple:
        # Between the loader and the checkpoint, where no public hook comes. This hook exists since
        # https://github.com/huggingface/transformers/pull/44041, unchanged in 5.24.
        if self._lpg_row_tracker is not None:
            self._lpg_row_tracker.start(train_dataloader, self.train_dataset)
        return super()._prepare_for_training(max_steps, train_dataloader, *args, **kwargs)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        """Takes the micro-batches of a step from the loader, and the row numbers out of them."""
        batch_samples, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._lpg_row_tracker is not None:
            self._lpg_row_tracker.take_rows(batch_samples)
        return batch_samples, num_items_in_batch

    def _lpg_begin_micro_batch(self, inputs: Any) -> None:
        super()._lpg_begin_micro_batch(inputs)
        if self._lpg_row_tracker is not None:
            self._lpg_row_tracker.follow(inputs)

    def _lpg_record_rows(self, logits: Tensor, labels: Tensor) -> None:
        dampening = self._lpg_dampening()
        if self._lpg_row_tracker is not None:
            self._lpg_row_tracker.record(logits, labels, None if dampening is None else dampening.last_weight)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # The loop alone gets the row numbers: callbacks see the loader as the Trainer makes it. The hook exists since
        # https://github.com/huggingface/transformers/pull/44041, unchanged in 5.24. No public hook begins or ends an
        # epoch but those of callbacks, and a callback of ours would appear in the user's list.
        if self._lpg_row_tracker is not None:
            kwargs["train_dataloader"] = self._lpg_row_tracker.numbered(kwargs["train_dataloader"])
        super()._run_epoch(*args, **kwargs)
        if self._lpg_row_tracker is not None:
            self._lpg_row_tracker.end_epoch()

    # Checkpoints

    def _lpg_save_rows(self, output_dir: str) -> None:
        records = None if self._lpg_row_tracker is None else self._lpg_row_tracker.merged()
        if records is not None and records.has_visits and self.args.should_save:
            save_rows(output_dir, records, self.state.global_step)

    def _lpg_load_rows(self, checkpoint: str) -> None:
        saved = load_rows(checkpoint, self.state.global_step)
        if saved is None or self._lpg_row_tracker is None or self._lpg_row_tracker.buffer is None:
            return
        num_rows, records = TrainingDynamics.num_rows_of(saved), self._lpg_row_tracker.buffer.records
        if num_rows != records.num_rows:
            logger.warning(
                f"The checkpoint was written with a `train_dataset` of {num_rows} rows and this run has "
                f"{records.num_rows}. The records of the rows, which `label_issues` ranks, start anew."
            )
        elif self.accelerator.is_main_process:  # the saved sums are over all processes
            records.load_state_dict(saved)
            self._lpg_forget_relabeled(records)

    def _lpg_forget_relabeled(self, records: TrainingDynamics) -> None:
        # Labels that cannot be read are compared when their rows are visited.
        labels = labels_or_none(self.train_dataset)
        if labels is None:
            return
        is_relabeled = records.relabeled(torch.from_numpy(labels).to(records.device))
        num_relabeled = int(is_relabeled.sum())
        if num_relabeled > 0:
            records.forget(is_relabeled)
            logger.warning(
                f"{num_relabeled} rows of `train_dataset` have another label than when the checkpoint was written. "
                "Their records, which `label_issues` ranks, start anew."
            )

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

        Samples whose row is not known, because the collator drops or repeats items or the data set has grown, are left
        out with a warning.

        Raises:
            ValueError: Before training, for a stream (whose rows have no index), if the model is not a classifier, if
                a collator reorders its items, or if hardly any sample has a row that is known.

        Example:

        ```python
        >>> from tempfile import mkdtemp
        >>> from datasets import Dataset
        >>> from lpg_hf import LPGTrainer
        >>> from transformers import PrinterCallback, ResNetConfig, ResNetForImageClassification, TrainingArguments
        >>> from transformers import set_seed

        >>> set_seed(0)
        >>> images = [[[[float(label)] * 8] * 8] * 3 for label in [0, 1] * 10]
        >>> dataset = Dataset.from_dict({"pixel_values": images, "label": [1, 1] + [0, 1] * 9})  # row 0 is wrong
        >>> model = ResNetForImageClassification(ResNetConfig(num_labels=2, hidden_sizes=[8], depths=[1]))
        >>> settings = {"report_to": [], "use_cpu": True, "disable_tqdm": True}
        >>> args = TrainingArguments(mkdtemp(), **settings, num_train_epochs=10, learning_rate=1e-2)
        >>> trainer = LPGTrainer(model=model, args=args, train_dataset=dataset)
        >>> trainer.remove_callback(PrinterCallback)
        >>> _ = trainer.train()
        >>> trainer.label_issues()["row"][0]
        0

        ```
        """
        return self._lpg_ranked_rows()

    def _lpg_ranked_rows(self) -> datasets.Dataset:
        if not has_rows(self.train_dataset):
            raise ValueError(
                f"`train_dataset` is of the type {type(self.train_dataset).__name__}, whose rows have no index to "
                "rank them by. Use a map-style data set."
            )
        records = None if self._lpg_row_tracker is None else self._lpg_row_tracker.merged()
        if records is None:
            cause = (
                "there was no training yet: call `train()` first"
                if self._lpg_row_tracker is None
                else "`get_train_dataloader` is overridden and does not return a `DataLoader` of the rows of "
                "`train_dataset`, so the batches carry no row numbers: return `super().get_train_dataloader()`"
            )
            raise ValueError(f"Label issues come from what training records of its rows, but {cause}.")
        if not records.has_visits:
            raise ValueError(
                "Training recorded no row. Either the model is not a single-label classifier, or `compute_loss` or "
                "`training_step` are overridden without a call of LPGTrainer's, or they pass on another batch than "
                "they get."
            )
        self._lpg_check_known(records)
        num_labels = self._lpg_num_labels() or records.largest_label + 1
        names = find_class_names(num_labels, self.train_dataset, self.accelerator.unwrap_model(self.model))
        return records.ranked(names, with_weight=self._lpg_dampening() is not None)

    def _lpg_check_known(self, records: TrainingDynamics) -> None:
        known, unknown, reordered = records.num_samples
        if reordered > 0:
            raise ValueError(
                f"The rows of the samples are not known: `data_collator` hands out {reordered} of "
                f"{known + unknown + reordered} samples in another order than it gets them, or changes their labels. "
                "Let it keep its items as they come."
            )
        cause = (
            "`data_collator`, `training_step` or `compute_loss` drops or repeats items or changes their labels, the "
            "label of a row changes during the training, or the sampler draws other numbers than 0 to "
            f"{records.num_rows - 1}"
        )
        if unknown >= MAX_UNKNOWN_SHARE * (known + unknown):
            raise ValueError(
                f"The rows of {unknown} of {known + unknown} samples are not known: {cause}. Let `data_collator` keep "
                "its items as they come, and the data set its rows."
            )
        if unknown > 0:
            logger.warning(
                f"The rows of {unknown} of {known + unknown} samples are not known and are left out: {cause}."
            )
