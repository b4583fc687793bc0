"""LabelIssuesMixin: numbers the training rows on their way, and ranks them by how likely their labels are wrong."""

from collections.abc import Iterator
from typing import Any

import datasets
import torch
from accelerate.logging import get_logger
from torch import Tensor
from torch.utils.data import DataLoader

from ..class_names import find_class_names
from ..config import LPGConfig
from ..data.training_labels import labels_or_none
from ..perturbations import ClassRelativeDampening
from ..row_numbers import has_rows
from ..row_records import TrainingDynamics
from .row_file import load_rows, save_rows
from .row_tracker import RowTracker
from .step_watch import StepWatchMixin


logger = get_logger(__name__)

# With fewer known samples than the rest, a ranking would say nothing of the training set.
MAX_UNKNOWN_SHARE = 0.9


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

    def _lpg_judged_offset(self) -> Tensor | None:
        """What is added to the logits where labels are judged, if anything."""
        raise NotImplementedError

    @property
    def _lpg_tracks_rows(self) -> bool:
        return not isinstance(self.args, LPGConfig) or self.args.track_rows

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
        if self._lpg_row_tracker is not None and self._lpg_tracks_rows:
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
        weight = None if dampening is None else dampening.last_weight
        if self._lpg_row_tracker is not None:
            self._lpg_row_tracker.record(logits, labels, weight, self._lpg_judged_offset())

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
        if self._lpg_row_tracker is None or self._lpg_row_tracker.buffer is None:
            return
        saved = load_rows(checkpoint, self.state.global_step)
        if saved is None:
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
        is_relabeled = records.relabeled(torch.from_numpy(labels))
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

        Where items do not show their labels before they are collated, the recorded labels are compared with those that
        data set and collator give to single rows.

        Raises:
            ValueError: Before training, for a stream (whose rows have no index), if the model is not a classifier, if
                a collator reorders its items, if hardly any sample has a row that is known, or without `track_rows`.

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
        if not self._lpg_tracks_rows:
            raise ValueError("Training records nothing of its rows: `track_rows` is False. Leave it at True.")
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
                "`train_dataset`, or one with an `__iter__` of its own, so the batches carry no row numbers: return "
                "`super().get_train_dataloader()`"
            )
            raise ValueError(f"Label issues come from what training records of its rows, but {cause}.")
        if not records.has_visits:
            raise ValueError(
                "Training recorded no row. Either the model is not a single-label classifier, or `compute_loss` or "
                "`training_step` are overridden without a call of LPGTrainer's, or they pass on another batch than "
                "they get."
            )
        self._lpg_check_dataset()
        self._lpg_check_known(records)
        self._lpg_check_order(records)
        num_labels = self._lpg_num_labels() or records.largest_label + 1
        if records.largest_label >= num_labels:
            raise ValueError(
                f"The records of the rows have the class {records.largest_label}, but the model has {num_labels} "
                "classes. Train again, without the checkpoint that they come from."
            )
        names = find_class_names(num_labels, self.train_dataset, self.accelerator.unwrap_model(self.model))
        return records.ranked(names, with_weight=self._lpg_dampening() is not None)

    def _lpg_check_dataset(self) -> None:
        assert self._lpg_row_tracker is not None
        if not self._lpg_row_tracker.has_numbered(self.train_dataset):
            logger.warning(
                "`train_dataset` is another object than in the training. The rows of `label_issues` are those of the "
                "one that was trained on. Set it again, or train anew, before you look rows up or write a report."
            )

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

    def _lpg_check_order(self, records: TrainingDynamics) -> None:
        assert self._lpg_row_tracker is not None
        num_wrong, num_compared = self._lpg_row_tracker.count_wrong_labels(records)
        if num_wrong > 0:
            raise ValueError(
                f"The rows of the samples are not known: {num_wrong} of {num_compared} rows that were compared have "
                "another label in the data set than in the training, so `data_collator` hands out its items in "
                "another order, or changes their labels. Let it keep its items as they come."
            )
        if num_compared == 0:
            logger.warning(
                "Whether `data_collator` keeps the order of its items cannot be told: they do not show their labels, "
                "and it makes no batch of a single one. If it sorts or shuffles them, these rows are the wrong ones. "
                "Name the label of an item `label`."
            )
