"""LPGTrainer: where in a training step the perturbations act, and what is logged."""

from collections.abc import Callable, Iterator, Sequence, Sized
from typing import Any, cast

import datasets
import torch
from accelerate.logging import get_logger
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset, IterableDataset
from transformers import EvalPrediction, PreTrainedModel, TrainerCallback, TrainingArguments
from transformers.data.data_collator import DataCollator
from transformers.feature_extraction_utils import FeatureExtractionMixin
from transformers.image_processing_utils import BaseImageProcessor
from transformers.processing_utils import ProcessorMixin
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.trainer_utils import TrainOutput

from ..config import LPGConfig
from ..loss import LPGLoss
from ..perturbations import ClassRelativeDampening, Perturbation, build_chain
from ..perturbations.observers import PerturbationObserver
from ..share_texts import EvalShares
from ..weak_proxy import WeakProxy
from .checkpoint_mixin import CheckpointMixin
from .class_shift import ClassShiftMixin
from .classifier import ClassifierCheck
from .label_issues import LabelIssuesMixin, RowTracker
from .label_messages import explain_label_errors, explain_label_names
from .managed_loss import ManagedLoss
from .parameter_methods import ParameterMethods
from .perturbation_log import PerturbationLog
from .reports import ReportsMixin
from .resumable import ResumableTrainer
from .sam_step import SAMStepMixin
from .settings import Settings, is_requested_at_logits
from .step_watch import StepWatch


logger = get_logger(__name__)

Processor = PreTrainedTokenizerBase | BaseImageProcessor | FeatureExtractionMixin | ProcessorMixin


class LPGTrainer(LabelIssuesMixin, SAMStepMixin, ReportsMixin, ClassShiftMixin, CheckpointMixin, ResumableTrainer):
    r"""
    A [`~transformers.Trainer`] that perturbs the gradient at the logits of a classification model.

    Data, optimizer, schedule, evaluation, checkpoints and `accelerate launch` work as in the Trainer. By default the
    preset `auto` is used, which looks at the class counts of `train_dataset` and needs no tuning. Evaluation and
    prediction are never perturbed, and the logged loss is the unperturbed one.

    A model counts as a classifier if it has one integer label per sample, logits `[N, C]` with C > 1, and a loss that
    contains the cross-entropy of its logits. The first training batch that can show this decides. For any other model
    `auto` warns and trains exactly as `Trainer` does, and logit perturbations that were asked for raise an error.
    Single batches with soft labels or without labels train as with `Trainer`, and one warning says so. Methods for the
    parameters do not need a classifier. SAM acts first among them.

    Subclasses may override `training_step` and `compute_loss`. Every loss that a training step takes from LPGTrainer's
    `compute_loss` is perturbed. SAM also needs LPGTrainer's `training_step`.

    Args:
        model ([`~transformers.PreTrainedModel`] or `torch.nn.Module`, *optional*):
            The model to train. Pass either this or `model_init`.
        args ([`~transformers.TrainingArguments`], *optional*):
            The arguments of the training. An [`LPGConfig`] also holds settings of the perturbations.
        data_collator (`DataCollator`, *optional*): Makes a batch of a list of items.
        train_dataset (`Dataset`, *optional*): The training set.
        eval_dataset (`Dataset` or `dict[str, Dataset]`, *optional*): The evaluation set, or several by name.
        processing_class (*optional*):
            The tokenizer, image processor, feature extractor or processor. It is saved along with the model.
        model_init (`Callable`, *optional*): Makes the model anew for each training, as `hyperparameter_search` needs.
        compute_loss_func (`Callable`, *optional*): A loss that replaces the model's own. It is perturbed as well.
        compute_metrics (`Callable`, *optional*): Computes the metrics of an evaluation.
        callbacks (`list[TrainerCallback]`, *optional*): Callbacks in addition to the default ones.
        optimizers (`tuple`, *optional*, defaults to `(None, None)`): The optimizer and the learning rate scheduler.
        optimizer_cls_and_kwargs (`tuple`, *optional*): The class of the optimizer and its arguments.
        preprocess_logits_for_metrics (`Callable`, *optional*): Changes the logits before an evaluation keeps them.
        perturbations (`str`, [`Perturbation`] or a sequence of them, *optional*):
            The chain of methods, as objects or strings. Defaults to the one of the config, or to `auto` for plain
            [`~transformers.TrainingArguments`]. `[]` trains exactly as `Trainer` does, except that under gradient
            accumulation a classifier gets the gradient of the whole batch, which `Trainer` does not give every model.
        class_counts (`Sequence[int]`, *optional*):
            Number of training samples of each class. Defaults to the counts of the labels of `train_dataset`: of its
            label column, its attribute `labels` or `targets`, or the dicts in a list. Where there are none to read,
            a warning says so, and the samples are counted until the first epoch or 1000 of them are over.
        eval_shares (`str`, `Sequence[float]` or `Mapping`, *optional*, defaults to `"eval_dataset"`):
            The class shares of the data that the model will meet: `"eval_dataset"` takes those of its labels, and
            those of the training set where there are none to read; `"train"`, `"uniform"`, or one number per class,
            as a list or array, or by label name or index (a mapping, or a Series of pandas).

    Raises:
        ValueError: If a perturbation is unknown or an argument is out of range. When the training starts, also if the
            training set is empty, if labels are out of range, or if perturbations were asked for and the model is not
            a classifier.

    Example:

    ```python
    >>> from tempfile import mkdtemp
    >>> from datasets import Dataset
    >>> from transformers import ResNetConfig, ResNetForImageClassification, TrainingArguments

    >>> images = [[[[0.0] * 8] * 8] * 3] * 6
    >>> dataset = Dataset.from_dict({"pixel_values": images, "label": [0, 0, 0, 0, 1, 2]})
    >>> model = ResNetForImageClassification(ResNetConfig(num_labels=3, hidden_sizes=[8], depths=[1]))
    >>> args = TrainingArguments(mkdtemp(), report_to=[], use_cpu=True, disable_tqdm=True, max_steps=1)
    >>> trainer = LPGTrainer(model=model, args=args, train_dataset=dataset)
    >>> [method.name for method in trainer.lpg_loss.perturbations]
    ['logit_adjustment', 'class_relative_dampening']

    ```
    """

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        args: TrainingArguments | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset[Any] | IterableDataset[Any] | datasets.Dataset | None = None,
        eval_dataset: Dataset[Any] | dict[str, Dataset[Any]] | datasets.Dataset | None = None,
        processing_class: Processor | None = None,
        model_init: Callable[..., PreTrainedModel] | None = None,
        compute_loss_func: Callable[..., Any] | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, Any]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Optimizer | None, LambdaLR | None] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
        *,
        perturbations: str | Perturbation | Sequence[str | Perturbation] | None = None,
        class_counts: Sequence[int] | None = None,
        eval_shares: EvalShares | None = None,
    ):
        self._lpg_settings = Settings(perturbations, class_counts, eval_shares)
        build_chain(self._lpg_settings.chain(args))
        # Another trainer may stand behind this one in the bases of a user's class, and know fewer arguments.
        rarely_known: dict[str, Any] = {
            "compute_loss_func": compute_loss_func,
            "optimizer_cls_and_kwargs": optimizer_cls_and_kwargs,
            "preprocess_logits_for_metrics": preprocess_logits_for_metrics,
        }
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            model_init=model_init,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            **{name: value for name, value in rarely_known.items() if value is not None},
        )
        self._lpg_prepare()

    # Set-up

    def _lpg_prepare(self) -> None:
        """Reads all settings anew: `hyperparameter_search` changes arguments and model between two trainings."""
        if isinstance(self.compute_loss_func, LPGLoss):
            raise ValueError(
                "`compute_loss_func` is an LPGLoss. Give its methods to `LPGTrainer(perturbations=...)`, or keep it "
                "and use the plain Trainer."
            )
        settings, args = self._lpg_settings, self.args
        chain = settings.chain(args)
        self._lpg_observers = [c for c in self.callback_handler.callbacks if isinstance(c, PerturbationObserver)]
        counts, shares = settings.class_counts, settings.shares(args)
        # Its parts know the trainer without keeping it. As with `Trainer`, `del trainer` frees model and optimizer and
        # ends the workers of its loaders at once. In a cycle of references they would wait for Python's collector.
        trainer: Any = WeakProxy(self)
        self._lpg_managed = ManagedLoss(trainer, chain, counts, shares, self._lpg_observers)
        requested = chain if any(is_requested_at_logits(entry) for entry in chain) else None
        self._lpg_classifier = ClassifierCheck(trainer, self._lpg_managed.has_methods, requested)
        self._lpg_parameter_methods = ParameterMethods(build_chain(chain), self.accelerator, args)
        for observer in self._lpg_observers:
            observer.start(self.accelerator)
        self._lpg_step_watch = StepWatch(args.label_names)
        self._lpg_row_tracker = self._lpg_shifted_shares = None
        self._lpg_perturbation_log = PerturbationLog(isinstance(args, LPGConfig) and args.log_perturbations)
        self._lpg_saved_state = None  # until there is a loss to load it into
        num_labels = self._lpg_classifier.declared_num_labels()
        if num_labels is not None:
            self._lpg_managed.build_early(num_labels)

    @property
    def lpg_loss(self) -> LPGLoss | None:
        """
        The perturbed loss with its class statistics. It is built anew whenever a training starts, and it is `None`
        before a training if only the first batch can tell the number of classes. With several processes it is brought
        up to date whenever it is looked up here, so do not keep it.
        """
        return self._lpg_built_loss()

    def _lpg_built_loss(self) -> LPGLoss | None:
        return self._lpg_managed.loss_or_none

    @property
    def _lpg_perturbs_logits(self) -> bool:
        return bool(self._lpg_classifier.passed) and self._lpg_managed.has_methods

    def _lpg_active_methods(self) -> list[Perturbation]:
        logit_methods = [] if self._lpg_classifier.passed is False else self._lpg_managed.methods
        return [*logit_methods, *self._lpg_parameter_methods.methods]

    def _lpg_norms(self) -> list[dict[str, float]]:
        return self._lpg_perturbation_log.norms

    # Training

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> TrainOutput:
        # Under `auto_find_batch_size`, `train` calls this hook anew for each batch size it tries. No public hook is
        # called then. https://github.com/huggingface/transformers/pull/44041, unchanged in 5.24
        if self._lpg_managed.has_methods and isinstance(self.train_dataset, Sized) and len(self.train_dataset) == 0:
            raise ValueError("`train_dataset` is empty: there is nothing to train on. Check its split and filters.")
        self._lpg_prepare()
        self._lpg_row_tracker = RowTracker(self.accelerator, self.args.label_names)
        with self._lpg_watched_steps():
            output = super()._inner_training_loop(*args, **kwargs)
        self._lpg_restore_without_a_step()
        return output

    def _lpg_restore_without_a_step(self) -> None:
        """Of a training that was finished, no batch comes to ask for the loss, but a report does."""
        saved = self._lpg_saved_state
        if saved is not None and saved.num_labels > 0 and saved.step == self.state.global_step:
            self._lpg_classifier.take_over(saved.num_labels, saved.dtype)
            self._lpg_managed.begin(saved.num_labels, saved.dtype, saved)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        """Takes the micro-batches of a step from the loader, and counts their labeled samples."""
        try:
            batch_samples, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        except ValueError as error:
            explain_label_names(error, self.train_dataset)
            raise
        if self._lpg_managed.is_needed:
            self._lpg_begin_step(batch_samples, num_items_in_batch)
        return batch_samples, num_items_in_batch

    def _lpg_begin_step(self, batches: list, num_items_in_batch: Tensor | int | None) -> None:
        if self._lpg_classifier.passed is not False:
            self._lpg_managed.begin_step(batches, num_items_in_batch, self.args.device)

    def _lpg_begin_micro_batch(self, inputs: Any) -> None:
        super()._lpg_begin_micro_batch(inputs)
        if self._lpg_managed.is_needed and not self._lpg_managed.has_begun:
            self._lpg_begin_step([], None)  # an override of `get_batch_samples` left ours out

    def _lpg_end_micro_batch(self) -> None:
        if not self._lpg_step_watch.is_reached and self._lpg_managed.has_methods:
            self._lpg_classifier.refuse_override()
        if self.accelerator.sync_gradients:
            if self._lpg_step_watch.is_newly_unused() and self._lpg_managed.has_methods:
                self._lpg_classifier.warn_unused()
            self._lpg_managed.end_step(learns=self._lpg_perturbs_logits)
            if not self._lpg_step_watch.was_own:
                self._lpg_parameter_methods.warn_without_sam(type(self))
            self._lpg_parameter_methods.perturb_(cast(nn.Module, self.model))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """Computes the loss of a micro-batch as the Trainer does. In a training step, its gradient is perturbed."""
        watch, managed = self._lpg_step_watch, self._lpg_managed
        is_training = watch.is_running and torch.is_grad_enabled()
        # Looked up first: the Trainer takes them out for a loss that is given.
        labels: Any = self._lpg_classifier.labels(inputs) if is_training else None
        # Whoever calls this without LPGTrainer's `training_step` gets a loss of Trainer's scale, and divides it alike.
        replaces_loss = is_training and (managed.has_methods or (managed.is_needed and watch.divisor is not None))
        if not replaces_loss:
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        else:
            with explain_label_errors(managed.disagreement):
                loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
                watch.is_reached = True
                num_items = num_items_in_batch if watch.divisor is None else managed.items.count(num_items_in_batch)
                logits = self._lpg_classifier.logits(outputs)
                has_passed = self._lpg_classifier.update(loss, outputs, labels, num_items, num_items_in_batch)
            if has_passed:
                managed.begin(self._lpg_classifier.num_labels, self._lpg_classifier.dtype, self._lpg_saved_state)
            # Where the label column has labels out of range, a loss that went well has ignored them.
            is_doubtful = managed.disagreement is not None
            if self._lpg_classifier.passed and self._lpg_classifier.fits(outputs, labels, reads_labels=is_doubtful):
                is_as_loaded = managed.items.has(watch.inputs, labels)
                scale = self._lpg_classifier.scale(outputs, labels, num_items_in_batch, is_as_loaded=is_as_loaded)
                learns = watch.is_first_look(labels)
                is_observed = not self._lpg_parameter_methods.is_ascending
                items = num_items if scale.is_per_step else managed.items.of_call(num_items, watch.inputs, labels)
                loss = managed.perturbed(loss, logits, labels, items, scale, watch.divisor, learns, is_observed)
                watch.follow_use(loss)
        is_followed = is_training and self._lpg_row_tracker is not None and self._lpg_row_tracker.is_following
        if is_followed and self._lpg_classifier.shapes_fit(outputs, labels):
            self._lpg_record_rows(self._lpg_classifier.logits(outputs), labels)
        return (loss, outputs) if return_outputs else loss

    def _lpg_num_labels(self) -> int | None:
        loss = self._lpg_built_loss()
        return None if loss is None else loss.num_labels

    def _lpg_dampening(self) -> ClassRelativeDampening | None:
        return self._lpg_managed.dampening() if self._lpg_classifier.passed else None

    def _lpg_judged_offset(self) -> Tensor | None:
        return self._lpg_managed.loss.statistics.judged_offset if self._lpg_perturbs_logits else None

    # Logging

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        # Gathers where the Trainer gathers its loss: `log` may be called by one process alone, and no public hook
        # comes before it. https://github.com/huggingface/transformers/issues/43599, open in 5.24
        if self.control.should_log and self.state.global_step > self._globalstep_last_logged:
            self._lpg_gather_telemetry()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> TrainOutput:
        # A run that ends between two logs must not hide bad values. `on_train_end` of callbacks would come after the
        # Trainer has loaded the best model. https://github.com/huggingface/transformers/pull/44041, unchanged in 5.24
        self._lpg_gather_telemetry(is_last=True)
        return super()._finalize_training(*args, **kwargs)

    def _lpg_gather_telemetry(self, is_last: bool = False) -> None:
        telemetry = self._lpg_managed.telemetry(is_last) if self._lpg_perturbs_logits else {}
        telemetry |= self._lpg_parameter_methods.telemetry()
        observed = {key: value for observer in self._lpg_observers for key, value in observer.report().items()}
        self._lpg_perturbation_log.prepare(telemetry, observed)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs as the Trainer does, with the telemetry of the perturbations next to each training loss."""
        if "loss" in logs:
            logs |= self._lpg_perturbation_log.take(self.state.global_step, self.state.epoch)
        super().log(logs, start_time)
