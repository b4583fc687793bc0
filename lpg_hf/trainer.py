"""LPGTrainer: where in a training step the perturbations act, what is logged, and what a checkpoint holds."""

import copy
from collections.abc import Iterator, Mapping, Sequence, Sized
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from accelerate import DistributedType
from accelerate.logging import get_logger
from accelerate.utils import DynamoBackend
from datasets import ClassLabel, Dataset, Value
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import get_total_norm
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from .batch import IGNORE_INDEX, LogitBatch
from .checkpoint import (
    STATE_FILE,
    SavedState,
    is_whole,
    last_whole_checkpoint,
    load_rows,
    load_state,
    reload_renamed_weights,
    save_rows,
    save_state,
)
from .classifier import LossScale, can_tell_losses_apart, compare_with_cross_entropy, find_obstacle
from .config import LPGConfig
from .data import LABEL_COLUMNS
from .data import class_counts as count_classes
from .label_issues import RowRecords, VisitQueue
from .loss import LPGLoss
from .model_card import add_section
from .pac_bayes import PathLength
from .pending_sum import PendingSum
from .perturbations import (
    SAM,
    ClassRelativeDampening,
    GradientPerturbation,
    LabelSmoothing,
    LogitPerturbation,
    ParameterPerturbation,
    Perturbation,
    build_chain,
)
from .rows import ROWS_KEY, NumberedCollator, NumberedRows, UnnumberedBatches, has_rows
from .summary import find_class_names, summarize_for_report, summarize_training
from .telemetry import unique_names


logger = get_logger(__name__)

# Losses of transformers that are cross-entropy over `config.num_labels` classes when the labels are integers.
_SINGLE_LABEL_LOSS_TYPES = (
    "ForSequenceClassification",
    "ForImageClassification",
    "ForVideoClassification",
    "ForAudioClassification",
)


class LPGTrainer(Trainer):
    r"""
    A [`~transformers.Trainer`] that perturbs the gradient at the logits of a classification model.

    Everything else is the Trainer's: data, optimizer, schedule, evaluation, checkpoints, `accelerate launch`. Without
    further arguments it uses the preset `auto`, which looks at the class counts of `train_dataset` and needs no
    tuning. Evaluation and prediction are never perturbed, and the loss that is logged is the unperturbed one.

    A model counts as a classifier if it has one integer label per sample, logits `[N, C]` with C > 1, and a loss that
    is the cross-entropy of its logits; this is looked at once, on the first training batch that can show it. For any
    other model `auto` warns and trains exactly as `Trainer`, while logit perturbations that were asked for raise an
    error. Methods for parameters need no classifier; SAM acts first among them, the others in the order of the chain.

    Args:
        model, args and all others: As for [`~transformers.Trainer`]. `args` may be an [`LPGConfig`].
        perturbations (`str`, [`Perturbation`] or a sequence of them, *optional*):
            The chain of methods, as objects or strings. Left out, it is what the config says (`auto` for plain
            [`~transformers.TrainingArguments`]); `[]` trains exactly as `Trainer`, except that under gradient
            accumulation a classifier gets the gradient of the whole batch, which `Trainer` does not give every model.
        class_counts (`Sequence[int]`, *optional*):
            Training samples of each class. Left out, they are read from the label column of `train_dataset`, or
            counted during the first epoch where there is none to read.

    Attributes:
        lpg_loss ([`LPGLoss`] or `None`):
            The perturbed loss with its class statistics; built anew whenever training starts, and on several processes
            up to date whenever it is looked up, so look it up here rather than keep it. `None` before training where
            only the first batch can tell the number of classes.

    Raises:
        ValueError: For unknown perturbations or arguments out of range; when training starts, for an empty training
            set, labels out of range, and for perturbations asked for on a model that is no classifier.

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
    >>> [method.name for method in trainer.lpg_loss.perturbations]  # the data is imbalanced
    ['logit_adjustment', 'label_smoothing', 'class_relative_dampening']

    ```
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        *trainer_args,
        perturbations: str | Perturbation | Sequence[str | Perturbation] | None = None,
        class_counts: Sequence[int] | None = None,
        **trainer_kwargs,
    ):
        self._perturbations = [perturbations] if isinstance(perturbations, str | Perturbation) else perturbations
        self._class_counts = class_counts
        build_chain(self._chain(args))
        super().__init__(model, args, *trainer_args, **trainer_kwargs)
        if isinstance(self.compute_loss_func, LPGLoss):
            raise ValueError(
                "`compute_loss_func` is an LPGLoss: give its methods to `LPGTrainer(perturbations=...)`, or keep it "
                "and use the plain Trainer."
            )
        self._prepare_perturbations()

    # Setup

    def _chain(self, args: TrainingArguments | None) -> Sequence[str | Perturbation]:
        if isinstance(args, LPGConfig):
            return args.chain(self._perturbations)
        return ["auto"] if self._perturbations is None else self._perturbations

    def _prepare_perturbations(self) -> None:
        """Reads settings anew: `hyperparameter_search` changes arguments and model between two trainings."""
        chain = self._chain(self.args)
        methods = build_chain(chain)
        named = build_chain([entry for entry in chain if entry != "auto"])
        self._has_logit_methods = any(isinstance(method, LogitPerturbation) for method in methods)
        self._asks_for_logit_methods = any(isinstance(method, LogitPerturbation) for method in named)
        # Copies: counters and histories start every training anew.
        self._parameter_methods = nn.ModuleList(
            copy.deepcopy(method) for method in methods if isinstance(method, ParameterPerturbation)
        )
        self._sam = self._check_parameter_methods()
        self._path_length = self._find_path_length()
        self._is_ascent = False
        # Of each parameter method, since the last log: how often its delta was measured, and the sum of the norms.
        self._parameter_telemetry = torch.zeros(len(self._parameter_methods), 2, device=self.args.device)
        self._telemetry: dict[str, float] = {}
        self._step_items = None
        self._is_classifier = None
        self._is_verified = False
        # What the model's own loss may be scaled by: one, as soon as a batch can tell.
        self._loss_scales: list[LossScale] = []
        self._saved_state = None
        self._visits: VisitQueue | None = None
        self._numbers_next_loader = False
        self._can_be_ranked = None
        # Row numbers of the micro-batches of a step, each beside the batch it was taken from, and of the present one.
        self._step_rows = []
        self._rows = None
        self._lpg_loss: LPGLoss | None = None
        # The class statistics of the last step, between its end and their first use.
        self._sum_of_statistics: PendingSum | None = None
        num_labels = self._declared_num_labels()
        if num_labels is not None:
            self._build_loss(num_labels)

    def _check_parameter_methods(self) -> SAM | None:
        """Refuses what cannot work, and returns the chain's SAM."""
        sharded = (DistributedType.DEEPSPEED, DistributedType.FSDP)
        if self._parameter_methods and self.accelerator.distributed_type in sharded:
            raise ValueError(
                f"{', '.join(map(repr, self._parameter_methods))} needs whole gradients and parameters on every "
                f"process, but {self.accelerator.distributed_type} shards them. Use DDP, or methods at the logits."
            )
        sams = [method for method in self._parameter_methods if isinstance(method, SAM)]
        if len(sams) > 1:
            raise ValueError(f"`perturbations` has more than one SAM: {sams}. Keep one.")
        # transformers 5.23 renames the argument; the old name stays until version 6.
        for name in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
            if sams and (getattr(self.args, name, None) or {}).get("use_reentrant"):
                raise ValueError(
                    "SAM takes gradients with `torch.autograd.grad`, which reentrant checkpointing does not support; "
                    f"found `{name}` with use_reentrant=True. Set it to False."
                )
        return sams[0] if sams else None

    def _find_path_length(self) -> PathLength | None:
        found = [callback for callback in self.callback_handler.callbacks if isinstance(callback, PathLength)]
        if not found:
            return None
        found[0].start(self.accelerator)
        return found[0]

    def _is_compiled(self) -> bool:
        """By `torch_compile`, or by `accelerate launch --dynamo_backend`."""
        return self.accelerator.state.dynamo_plugin.backend != DynamoBackend.NO

    def _declared_num_labels(self) -> int | None:
        """The number of classes, where the model's own loss takes it from its config; else the first batch tells."""
        model = self.accelerator.unwrap_model(self.model)
        if getattr(model, "loss_type", None) not in _SINGLE_LABEL_LOSS_TYPES:
            return None
        is_single_label = model.config.problem_type in (None, "single_label_classification")
        return model.config.num_labels if is_single_label and model.config.num_labels > 1 else None

    def _build_loss(self, num_labels: int) -> None:
        base_loss, beside = None, []
        if self.label_smoother is not None:
            epsilon = self.label_smoother.epsilon
            base_loss = partial(F.cross_entropy, reduction="none", label_smoothing=epsilon)
            # With a factor of 1 there is no label left to learn, and nothing to retarget.
            beside = [LabelSmoothing(epsilon)] if epsilon < 1 else []
        counts = self._class_counts
        if counts is None and self._has_logit_methods:
            counts = self._read_class_counts(num_labels)
        methods = build_chain(self._chain(self.args), counts, beside)
        chain = [method for method in methods if isinstance(method, LogitPerturbation)]
        config = getattr(self.accelerator.unwrap_model(self.model), "config", None)
        for method in chain:
            method.use_label_names(getattr(config, "label2id", None) or {})
        self._lpg_loss = LPGLoss(num_labels, chain, counts, base_loss, managed=True)
        if self._is_compiled() and base_loss is None:  # another loss is differentiated on the way
            self._lpg_loss.compile(**self.accelerator.state.dynamo_plugin.to_kwargs())

    def _read_class_counts(self, num_labels: int) -> list[int] | None:
        """Counts of a map-style data set with a column of integer labels; `None` for any other."""
        if not isinstance(self.train_dataset, Dataset) or len(self.train_dataset) == 0:
            return None
        columns = [name for name in LABEL_COLUMNS if name in self.train_dataset.column_names]
        if not columns:
            return None
        feature = self.train_dataset.features[columns[0]]
        is_integer = isinstance(feature, ClassLabel) or (isinstance(feature, Value) and "int" in feature.dtype)
        if not is_integer:
            return None
        try:
            return count_classes(self.train_dataset, num_labels, columns[0])
        except ValueError as error:
            raise ValueError(
                f"{error} If the labels are changed on their way to the model, pass `class_counts` to LPGTrainer."
            ) from error

    # Training

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs) -> TrainOutput:
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_whole_checkpoint(self.args.output_dir)
        elif resume_from_checkpoint and not is_whole(resume_from_checkpoint):
            raise ValueError(
                f"{resume_from_checkpoint} is no checkpoint that was saved to its end. Pass an older one, or "
                "`resume_from_checkpoint=True` for the newest whole one."
            )
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _inner_training_loop(self, *args, **kwargs):
        if self._has_logit_methods and isinstance(self.train_dataset, Sized) and len(self.train_dataset) == 0:
            raise ValueError("`train_dataset` is empty: there is nothing to train on. Check its split and filters.")
        self._prepare_perturbations()
        self._numbers_next_loader = True
        return super()._inner_training_loop(*args, **kwargs)

    def _get_dataloader(
        self, dataset: object, description: str, batch_size: int, sampler_fn=None, is_training: bool = False, **kwargs
    ) -> DataLoader:
        # Only the loop's own: whoever else asks for the training batches gets them as the Trainer makes them.
        if not (is_training and self._numbers_next_loader and has_rows(dataset)):
            return super()._get_dataloader(dataset, description, batch_size, sampler_fn, is_training, **kwargs)

        self._numbers_next_loader = False
        self._visits = VisitQueue(RowRecords(len(dataset)).to(self.args.device))
        # The Trainer's own treatment of columns comes first: below it finds no columns, and leaves all as it is.
        own_collator = collator = self.data_collator
        if isinstance(dataset, Dataset):
            dataset = self._remove_unused_columns(dataset, description=description)
        else:
            collator = self._get_collator_with_removed_columns(collator, description=description)
        self.data_collator = NumberedCollator(collator, len(dataset))
        try:
            return super()._get_dataloader(
                NumberedRows(dataset), description, batch_size, lambda _: sampler_fn(dataset), is_training, **kwargs
            )
        finally:
            self.data_collator = own_collator

    def _prepare_for_training(self, *args, **kwargs) -> tuple:
        prepared = super()._prepare_for_training(*args, **kwargs)
        if self._visits is not None:
            # Callbacks may look at the batches, too.
            self.callback_handler.train_dataloader = UnnumberedBatches(self.callback_handler.train_dataloader)
        return prepared

    def _run_epoch(self, *args, **kwargs) -> None:
        # The loop of transformers 5.23 looks whether it is done after a step alone: resumed where the training had
        # ended within an epoch, it would take one more.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)
        if self._visits is not None:
            self._visits.flush()

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        batch_samples, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._visits is not None:
            self._step_rows = [(b, b.pop(ROWS_KEY)) for b in batch_samples if isinstance(b, Mapping) and ROWS_KEY in b]
        if self._replaces_loss():
            self._step_items = self._count_labelled(batch_samples, num_items_in_batch, device)
        return batch_samples, num_items_in_batch

    def _count_labelled(
        self, batch_samples: list, num_items: Tensor | int | None, device: torch.device
    ) -> PendingSum | Tensor | int | None:
        """
        The labelled samples of the whole step, over all micro-batches and processes.

        The Trainer counts only for models and loss functions that take the count, and for DataParallel a share of it.
        """
        if num_items is not None and self.args.n_gpu <= 1:
            return num_items
        labels = [batch.get("labels") if isinstance(batch, Mapping) else None for batch in batch_samples]
        if not labels or not all(isinstance(label, Tensor) for label in labels):
            return None
        count = sum((label != IGNORE_INDEX).sum() for label in labels).to(device)
        return PendingSum(count, self.accelerator) if self.args.average_tokens_across_devices else count

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        loss_is_scaled = self.loss_is_scaled_for_ga
        self._rows = next((rows for batch, rows in self._step_rows if batch is inputs), None)
        try:
            if self._sam is not None and self.state.global_step % self._sam.interval == 0:
                loss = self._sam_step(self._sam, model, inputs, num_items_in_batch)
            else:
                loss = super().training_step(model, inputs, num_items_in_batch)
        finally:
            # `compute_loss` sets it for the losses that it replaces.
            self.loss_is_scaled_for_ga = loss_is_scaled
            self._rows = None
        if self._has_logit_methods and self._is_classifier is None:
            self._refuse("its loss comes from a `compute_loss` that does not call LPGTrainer's")
            self._is_classifier = False
        if self.accelerator.sync_gradients:
            self._step_items = None
            if self._is_classifier and self._has_logit_methods:
                self._fold()
            if self._parameter_methods:
                self._perturb_gradients()
        return loss

    @property
    def lpg_loss(self) -> LPGLoss | None:
        """The perturbed loss, with the statistics of all steps that have ended."""
        if self._sum_of_statistics is not None:
            total, self._sum_of_statistics = self._sum_of_statistics.wait(), None
            self._lpg_loss.statistics.step(lambda _: total)
        return self._lpg_loss

    def _fold(self) -> None:
        """Ends an optimizer step for what learns at the logits."""
        loss = self.lpg_loss
        if self.accelerator.num_processes == 1:
            loss.step()
            return
        # Nobody needs them before the next forward pass: they travel while the optimizer takes its step.
        self._sum_of_statistics = PendingSum(loss.statistics.pending, self.accelerator)
        for method in loss.perturbations:
            method.step(lambda tensor: PendingSum(tensor, self.accelerator).wait())

    def _sam_step(
        self, sam: SAM, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Tensor | int | None
    ) -> Tensor:
        """Two passes; the gradient is that of the second, the loss that is logged that of the first."""
        model.train()
        # Schedule-free optimizers swap the weights here, which must not happen while they are shifted.
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()
        with self.accelerator.no_sync(model), self.compute_loss_context_manager():
            self._is_ascent = True
            loss = self.compute_loss(model, self._prepare_inputs(inputs), num_items_in_batch=num_items_in_batch).mean()
            self._is_ascent = False
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        scale = self._loss_scale()
        # Only the direction matters, but under fp16 the unscaled gradient would underflow.
        gradients = torch.autograd.grad(loss * scale, parameters, allow_unused=True)
        learns_nothing = self.lpg_loss.frozen() if self._is_classifier else nullcontext()
        with learns_nothing, sam.shifted(self.model, parameters, gradients):
            super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.num_processes == 1 and self.args.gradient_accumulation_steps == 1:
            # Elsewhere the two gradients are not both whole here, and their difference would cost a reduction.
            # A pass may leave a parameter out, as layer drop does.
            deltas = [
                (0 if p.grad is None else p.grad) - (0 if g is None else g)
                for p, g in zip(parameters, gradients, strict=True)
                if p.grad is not None or g is not None
            ]
            self._record(sam, get_total_norm(deltas) / scale)

        is_scaled = self.loss_is_scaled_for_ga
        if is_scaled is None:
            takes_count = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            is_scaled = takes_count or self.compute_loss_func is not None
        return loss.detach() if is_scaled else loss.detach() / self.current_gradient_accumulation_steps

    def _perturb_gradients(self) -> None:
        parameters = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        for method in self._parameter_methods:
            if isinstance(method, GradientPerturbation):
                self._record(method, method.perturb_(parameters, self._loss_scale()))

    def _record(self, method: ParameterPerturbation, norm: Tensor) -> None:
        row = self._parameter_telemetry[list(self._parameter_methods).index(method)]
        row += torch.stack([torch.ones_like(norm), norm])

    def _loss_scale(self) -> float:
        return 1.0 if self.accelerator.scaler is None else self.accelerator.scaler.get_scale()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Mapping | tuple]:
        labels = inputs.get("labels")
        replaces_loss = model.training and torch.is_grad_enabled() and self._replaces_loss()
        try:
            loss, outputs = super().compute_loss(
                model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
            )
        except IndexError as error:
            if replaces_loss and "out of bounds" in str(error):
                raise ValueError(
                    f"The loss failed with: {error}. If a label is out of range, check the label column and the "
                    "`num_labels` of the model."
                ) from error
            raise
        if replaces_loss:
            num_items = self._items_of_step(num_items_in_batch)
            if self._is_classifier is None:
                self._loss_scales = self._possible_loss_scales(num_items_in_batch)
            if self._is_classifier is None or (self._is_classifier and not self._is_verified):
                self._is_classifier = self._examine(loss, outputs, labels, num_items)
            if self._is_classifier:
                loss = self._perturbed_loss(loss, outputs, labels, num_items)
                self.loss_is_scaled_for_ga = num_items is not None
        if self._rows is not None and model.training and torch.is_grad_enabled():
            self._record_rows(outputs, labels)
        return (loss, outputs) if return_outputs else loss

    def _items_of_step(self, num_items_in_batch: Tensor | int | None) -> Tensor | int | None:
        if isinstance(self._step_items, PendingSum):
            self._step_items = self._step_items.wait()
        return num_items_in_batch if self._step_items is None else self._step_items

    def _replaces_loss(self) -> bool:
        """`perturbations=[]` is the Trainer's own loss, unless that is not the mean over the accumulated batch."""
        if self._has_logit_methods:
            return True
        return self.args.gradient_accumulation_steps > 1 and self.compute_loss_func is None

    def _perturbed_loss(
        self, loss: Tensor, outputs: Mapping | tuple, labels: Tensor, num_items: Tensor | int | None
    ) -> Tensor:
        lpg_loss = self.lpg_loss
        if self.state.epoch is not None and self.state.epoch >= 1:
            lpg_loss.end_epoch()
        logits = self._logits(outputs)
        num_copies = 1
        if num_items is None:
            num_items = (labels != IGNORE_INDEX).sum()
        elif self.args.average_tokens_across_devices:
            # The count is that of all processes, over which the gradients will be averaged.
            num_copies = self.accelerator.num_processes // self.get_tp_size()
        observer = None
        if self._path_length is not None and self._path_length.is_due and not self._is_ascent:
            observer = partial(self._observe_delta, logits, num_items, num_copies)
        if self.compute_loss_func is None:
            model_loss = None
            if self.label_smoother is None:
                is_whole_step = self.current_gradient_accumulation_steps == 1 and self.accelerator.num_processes == 1
                model_loss = self._loss_scales[0].to_step(loss.mean(), labels, num_items, is_whole_step=is_whole_step)
            perturbed_loss = lpg_loss(logits, labels, num_items, model_loss, observer)
            return perturbed_loss if num_copies == 1 else perturbed_loss * num_copies

        dtype = torch.promote_types(logits.dtype, torch.float32)
        batch = LogitBatch(logits.detach().to(dtype), labels.reshape(-1).long())
        divisor = torch.as_tensor(num_items).to(dtype).clamp(min=1) / num_copies
        return lpg_loss.perturb_loss(loss.mean(), logits, batch, divisor, observer)

    def _observe_delta(self, logits: Tensor, num_items: Tensor | int, num_copies: int, delta: Tensor) -> None:
        weight = num_copies / torch.as_tensor(num_items).to(delta).clamp(min=1)
        self._path_length.add_perturbation(logits, weight * delta, self._loss_scale())

    def _record_rows(self, outputs: Mapping | tuple, labels: Tensor | None) -> None:
        # Once per micro-batch: SAM looks at it a second time.
        rows, self._rows = self._rows, None
        if self._can_be_ranked is None:  # looked at once: unwrapping the model takes longer than all the rest here
            self._can_be_ranked = self._find_wrong_shape(outputs, labels) is None
        if not self._can_be_ranked:
            return
        # What is compiled may write its next results into the memory of these.
        logits = self._logits(outputs).detach().clone()
        dampening = self._dampening()
        self._visits.add(rows, logits, labels, None if dampening is None else dampening.last_weight.clone())

    def _dampening(self) -> ClassRelativeDampening | None:
        """The chain's first class-relative dampening, if it acts."""
        methods = self.lpg_loss.perturbations if self._is_classifier else []
        return next((method for method in methods if isinstance(method, ClassRelativeDampening)), None)

    # The classifier rule

    def _examine(
        self, loss: Tensor, outputs: Mapping | tuple, labels: Tensor | None, num_items: Tensor | int | None
    ) -> bool:
        """
        Decides whether the model is a classifier, in the same way on every process.

        On the first training batch, and on the next ones until one could have told the losses apart.
        """
        fitting, obstacle = self._compare_loss(loss, outputs, labels, num_items)
        tells_apart = obstacle is not None or self._loss_is_given() or can_tell_losses_apart(labels)
        fits = [scale in fitting for scale in self._loss_scales]
        votes = torch.tensor([[obstacle is None, not tells_apart, *fits]], device=self.args.device)
        passed, cannot_tell, *fits = self.accelerator.gather(votes).all(0).tolist()
        if not passed or not any(fits):
            self._refuse(obstacle or "another process saw a batch that is none of a classifier")
            return False
        self._loss_scales = [scale for scale, fit in zip(self._loss_scales, fits, strict=True) if fit]
        is_step = self.args.gradient_accumulation_steps == 1 and self.accelerator.num_processes == 1
        self._is_verified = not cannot_tell and (is_step or len(self._loss_scales) == 1 or self._loss_is_given())
        if self._is_classifier:
            return True

        num_labels = self._logits(outputs).shape[-1]
        if self.lpg_loss is None or self.lpg_loss.num_labels != num_labels:
            self._build_loss(num_labels)
        if self._has_logit_methods:
            self._restore_loss()
            self._warn_of_missing_classes()
        return True

    def _possible_loss_scales(self, num_items_in_batch: Tensor | int | None) -> list[LossScale]:
        """What the loss that the Trainer returns may be divided by and multiplied with."""
        if num_items_in_batch is None or not self.model_accepts_loss_kwargs:
            return [LossScale(is_per_step=False)]
        factor = 1
        if self.args.average_tokens_across_devices:
            factor = self.args.n_gpu if self.args.n_gpu > 1 else self.accelerator.num_processes // self.get_tp_size()
        # DataParallel takes the mean over replicas, which undoes the factor for sums. A model may ignore the count.
        per_step = LossScale(is_per_step=True, factor=1 if self.args.n_gpu > 1 else factor)
        return [per_step, LossScale(is_per_step=False, factor=factor)]

    def _compare_loss(
        self, loss: Tensor, outputs: Mapping | tuple, labels: Tensor | None, num_items: Tensor | int | None
    ) -> tuple[list[LossScale], str | None]:
        obstacle = self._find_wrong_shape(outputs, labels)
        if obstacle is not None or self._loss_is_given():
            return self._loss_scales, obstacle
        dtypes = {"no": None, "fp16": torch.float16}
        return compare_with_cross_entropy(
            loss.mean(),
            self._logits(outputs),
            labels.reshape(-1).long(),
            num_items,
            self._loss_scales,
            dtypes.get(self.accelerator.mixed_precision, torch.bfloat16),
        )

    def _find_wrong_shape(self, outputs: Mapping | tuple, labels: Tensor | None) -> str | None:
        """What keeps logits and labels from being those of a classifier, whatever the loss is."""
        model = self.accelerator.unwrap_model(self.model)
        if type(model).__name__.endswith("ForMultipleChoice"):
            return "its logits are scores of each sample's own choices, not of classes"
        problem_type = getattr(getattr(model, "config", None), "problem_type", None)
        return find_obstacle(self._logits(outputs), labels, problem_type)

    def _loss_is_given(self) -> bool:
        """Whether the Trainer was told which loss to use: the model's own does not matter then."""
        return self.compute_loss_func is not None or self.label_smoother is not None

    def _refuse(self, found: str) -> None:
        if not self._has_logit_methods:
            return
        name = type(self.accelerator.unwrap_model(self.model)).__name__
        message = (
            f"{name} is not a single-label classifier trained with cross-entropy: {found}. If it should be perturbed "
            "all the same, give its loss as `compute_loss_func`; to train it as `Trainer`, pass `perturbations=[]`."
        )
        if self._asks_for_logit_methods:
            raise ValueError(f"{message} Asked for: {self._chain(self.args)!r}.")
        logger.warning(f"{message} Until then it trains exactly as with `Trainer`.")

    def _warn_of_missing_classes(self) -> None:
        statistics = self.lpg_loss.statistics
        if not statistics.counts_are_given:
            return
        counts = statistics.class_counts.tolist()
        missing = [label for label, count in enumerate(counts) if count == 0]
        if missing:
            shown = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
            left = "only one class is left to learn" if len(missing) == len(counts) - 1 else "they will not be learned"
            logger.warning(f"{len(missing)} of {len(counts)} classes have no training rows ({shown}): {left}.")

    def _logits(self, outputs: Mapping | tuple) -> Tensor | None:
        if isinstance(outputs, Mapping):
            return outputs.get("logits")
        # Where the Trainer took the labels out, the model's tuple does not begin with a loss.
        position = 0 if self._loss_is_given() else 1
        return outputs[position] if len(outputs) > position else None

    # Label issues

    def label_issues(self) -> Dataset:
        r"""
        Ranks the training rows by how likely their label is wrong, from what this one training run made of them.

        Nothing is computed for it beyond a few sums per row while training; see [`~label_issues.RowRecords`] for the
        score. On several processes all must call it, and all get the same.

        Returns:
            [`datasets.Dataset`]: One line per row that was trained on, the most doubtful first, with

            - `row`: its index in `train_dataset`;
            - `label`, and `suggested_label`: the class that the model believed most beside it;
            - `score`, in [0, 1]: one minus the geometric mean of the probability that the model gave to the label,
              over that of the class it found most likely;
            - `weight`, in [0, 1]: its mean weight under class-relative dampening, where the chain has that;
            - `visits`: how often training saw it.

        Raises:
            ValueError: Before training, for a stream (whose rows have no index), for a model that is no classifier,
                and where a collator reorders its items or changes labels, so that rows cannot be told apart.

        Example:

        ```python
        >>> from tempfile import mkdtemp
        >>> from datasets import Dataset
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

    def _ranked_rows(self) -> Dataset:
        if not has_rows(self.train_dataset):
            raise ValueError(
                f"`train_dataset` is of the type {type(self.train_dataset).__name__}, whose rows have no index to "
                "rank them by. Use a map-style data set."
            )
        if self._visits is None:
            cause = (
                "`get_train_dataloader` is overridden without a call of LPGTrainer's, so rows have no number on their "
                "way: call `super().get_train_dataloader()` in it"
                if self._numbers_next_loader
                else "there was no training yet: call `train()` first"
            )
            raise ValueError(f"Label issues are what training finds out about its rows, but {cause}.")
        records = self._merged_records()
        if not records.has_visits:
            raise ValueError(
                "Training recorded no row: the model is no single-label classifier, or `compute_loss` or "
                "`training_step` are overridden without a call of LPGTrainer's, or hand on another batch than theirs."
            )
        if records.num_unknown > 0:
            raise ValueError(
                f"The rows of {records.num_unknown} samples are not known: `data_collator` reordered its items, or "
                "changed their number or labels. Let it keep them as they come."
            )
        num_labels = records.largest_label + 1 if self.lpg_loss is None else self.lpg_loss.num_labels
        names = find_class_names(num_labels, self.train_dataset, self.accelerator.unwrap_model(self.model))
        return records.ranked(names, with_weight=self._dampening() is not None)

    def report(self, output_dir: str | Path | None = None) -> str:
        """
        Writes a report of the training: an HTML page with its figures inside, the figures as PNG and all numbers as
        CSV (`label_issues.csv`, `classes.csv`, `confusion.csv`, `calibration.csv`, `norms.csv`).

        The report predicts `eval_dataset` once (the first one of a dict). A section that cannot be made says why. With
        several processes all must call this method, and the main one writes.

        Args:
            output_dir (`str` or `Path`, *optional*, defaults to `report` in the trainer's `output_dir`):
                Where the files go.

        Returns:
            `str`: Path of the page, `report.html`.

        Raises:
            ImportError: If matplotlib or Jinja2 are not installed; `pip install lpg_hf[report]` installs both.
            ValueError: Before training.
        """
        # Imported here because the report needs optional packages.
        from .report import check_installed, write_report

        check_installed()
        summary = summarize_for_report(self, self.lpg_loss, self._active_perturbations(), self._ranked_rows)
        folder = Path(summary.output_dir) / "report" if output_dir is None else Path(output_dir)
        if self.is_world_process_zero():
            write_report(summary, folder, self.train_dataset, self.processing_class)
        return str(folder / "report.html")

    def _merged_records(self) -> RowRecords:
        self._visits.flush()
        return self._visits.records.merged(lambda tensor: self.accelerator.gather(tensor[None]))

    def _active_perturbations(self) -> list[Perturbation]:
        """The methods of the chain that act on this model, in their order."""
        logit_methods = [] if self.lpg_loss is None or self._is_classifier is False else self.lpg_loss.perturbations
        return [*logit_methods, *self._parameter_methods]

    # Model card

    def create_model_card(self, *args, **kwargs) -> None:
        """
        Writes the Trainer's model card, with tags and a section on the perturbations: methods, settings, classes, and
        the `certificate.json` in the output folder if there is one. Without perturbations it is the Trainer's card.
        """
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            add_section(summarize_training(self, self.lpg_loss, self._active_perturbations()))

    # Logging

    def _maybe_log_save_evaluate(self, *args, **kwargs) -> None:
        # Gathered where the Trainer gathers its loss: `log` itself may be called by one process alone.
        if self.control.should_log and self.state.global_step > self._globalstep_last_logged:
            self._telemetry = self._gather_telemetry()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _finalize_training(self, *args, **kwargs) -> TrainOutput:
        # A run that ends between two logs must not hide bad values.
        self._gather_telemetry()
        self._step_rows = []  # they hold the last batches
        return super()._finalize_training(*args, **kwargs)

    def _gather_telemetry(self) -> dict[str, float]:
        telemetry = {}
        if self._is_classifier and self._has_logit_methods:
            telemetry = self.lpg_loss.telemetry(lambda tensor: self.accelerator.gather(tensor[None]))
        names = unique_names(self._parameter_methods)
        for name, (count, norm) in zip(names, self._parameter_telemetry.tolist(), strict=True):
            if count > 0:
                telemetry[f"lpg/{name}/delta_norm"] = norm / count
        self._parameter_telemetry.zero_()
        if self._path_length is not None:
            telemetry |= self._path_length.report()
        return telemetry

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self._telemetry
            self._telemetry = {}
        super().log(logs, start_time)

    # Checkpoints

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        # The Trainer writes its state last, which makes that file the sign of a whole checkpoint: an old one must go.
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        modules, chains = {}, {}
        if self._is_classifier and self._has_logit_methods:
            modules["loss"], chains["loss"] = self.lpg_loss, self.lpg_loss.perturbations
        if self._parameter_methods:
            modules["parameters"] = chains["parameters"] = self._parameter_methods
        if self._path_length is not None:
            modules["path_length"] = self._path_length
        if modules and self.args.should_save:
            reprs = {prefix: list(map(repr, chain)) for prefix, chain in chains.items()}
            save_state(output_dir, modules, reprs, self.accelerator.num_processes)
        if self._visits is not None:
            records = self._merged_records()
            if records.has_visits and self.args.should_save:
                save_rows(output_dir, records)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._reload_renamed_weights(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._reload_renamed_weights(self.state.best_model_checkpoint)

    def _reload_renamed_weights(self, checkpoint: str) -> None:
        if not self.is_fsdp_enabled and not self.is_deepspeed_enabled:
            reload_renamed_weights(self.accelerator.unwrap_model(self.model), checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        self._load_rows(checkpoint)
        saved = load_state(checkpoint)
        if saved is None:
            if self._has_logit_methods or self._parameter_methods or self._path_length is not None:
                logger.warning(
                    f"{checkpoint} has no {STATE_FILE}, so it was not written by LPGTrainer with perturbations: their "
                    "state (class statistics, counters, lengths) starts anew."
                )
            return
        if self._path_length is not None:
            saved.restore(self._path_length, "path_length")
        self._check_chain(saved, "parameters", self._parameter_methods)
        saved.restore(self._parameter_methods, "parameters")
        if not self._has_logit_methods:
            self._check_chain(saved, "loss", [])
        # The loss's part waits for the first batch, which decides whether there is a loss to load it into.
        self._saved_state = saved

    def _load_rows(self, checkpoint: str) -> None:
        saved = load_rows(checkpoint)
        if saved is None or self._visits is None:
            return
        num_rows = RowRecords.num_rows_of(saved)
        records = self._visits.records
        if num_rows != records.num_rows:
            logger.warning(
                f"The checkpoint was written with a `train_dataset` of {num_rows} rows and this run has "
                f"{records.num_rows}: what is known of them for `label_issues` starts anew."
            )
        elif self.accelerator.is_main_process:  # the sums of all processes are one
            records.load_state_dict(saved)

    def _restore_loss(self) -> None:
        if self._saved_state is None:
            return
        tensors = self._saved_state.tensors
        self._check_chain(self._saved_state, "loss", self.lpg_loss.perturbations)
        num_labels = len(tensors["loss.statistics.class_counts"])
        if num_labels != self.lpg_loss.num_labels:
            raise ValueError(
                f"The checkpoint was written for {num_labels} classes, but this model has {self.lpg_loss.num_labels}. "
                "Resume with the model of that run."
            )
        # The state is float64 where the logits were.
        self.lpg_loss.to(device=self.args.device, dtype=tensors["loss.statistics._running"].dtype)
        self._saved_state.restore(self.lpg_loss, "loss")

    def _check_chain(self, saved: SavedState, prefix: str, methods: Sequence[Perturbation]) -> None:
        before, now = saved.chains.get(prefix, []), list(map(repr, methods))
        if before != now:
            which = {"loss": "at the logits", "parameters": "for the parameters"}[prefix]
            raise ValueError(
                f"The checkpoint was written with perturbations {which} {before}, but this run has {now}. Resume with "
                "the same `perturbations`, or start a new run from the checkpoint's model."
            )
        split = [method for method in methods if method.depends_on_split]
        if split and saved.num_processes != self.accelerator.num_processes:
            logger.warning(
                f"The checkpoint was written by {saved.num_processes} processes and this run has "
                f"{self.accelerator.num_processes}: {', '.join(map(repr, split))} depends on how a batch is split, so "
                "the training goes on, but not as it would have."
            )
