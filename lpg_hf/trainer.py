"""LPGTrainer: where in a training step the perturbations act, what is logged, and what a checkpoint holds."""

import copy
from collections.abc import Mapping, Sequence, Sized
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from accelerate import DistributedType
from accelerate.logging import get_logger
from datasets import ClassLabel, Dataset
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import get_total_norm
from transformers import Trainer, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from .checkpoint import is_whole, last_whole_checkpoint, load_state, save_state
from .classifier import find_obstacle, find_other_loss
from .config import LPGConfig
from .data import LABEL_COLUMNS
from .data import class_counts as count_classes
from .loss import IGNORE_INDEX, LPGLoss, logits_of, replace_gradient
from .perturbations import (
    SAM,
    GradientPerturbation,
    LogitPerturbation,
    ParameterPerturbation,
    Perturbation,
    build_chain,
)


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
    is the cross-entropy of its logits; this is looked at once, on the first training batch. For any other model `auto`
    warns and trains exactly as `Trainer`, while perturbations that were asked for raise an error.

    Args:
        model, args and all others: As for [`~transformers.Trainer`]. `args` may be an [`LPGConfig`].
        perturbations (`str`, [`Perturbation`] or a sequence of them, *optional*):
            The chain of methods, as objects or strings. Left out, it is what the config says (`auto` for plain
            [`~transformers.TrainingArguments`]); `[]` trains exactly as `Trainer`.
        class_counts (`Sequence[int]`, *optional*):
            Training samples of each class. Left out, they are read from the label column of `train_dataset`, or
            counted during the first epoch where there is none to read.

    Attributes:
        lpg_loss ([`LPGLoss`] or `None`):
            The perturbed loss with its class statistics; built anew whenever training starts, so look it up here
            rather than keep it. `None` before training where only the first batch can tell the number of classes.

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
    >>> list(trainer.lpg_loss.perturbations)  # the data is imbalanced
    [logit_adjustment(min_imbalance=2.0), class_relative_dampening()]

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
        self._perturbations = perturbations
        self._class_counts = class_counts
        chain = build_chain(self._chain(args))
        if sum(isinstance(method, SAM) for method in chain) > 1:
            raise ValueError(f"`perturbations` has more than one SAM: {chain}. Keep one.")
        super().__init__(model, args, *trainer_args, **trainer_kwargs)
        if isinstance(self.compute_loss_func, LPGLoss):
            raise ValueError(
                "`compute_loss_func` is an LPGLoss: give its methods to `LPGTrainer(perturbations=...)`, or keep it "
                "and use the plain Trainer."
            )
        self._prepare_perturbations()

    # Setup

    def _chain(self, args: TrainingArguments | None) -> str | Perturbation | Sequence[str | Perturbation]:
        if self._perturbations is not None:
            return self._perturbations
        return args.chain() if isinstance(args, LPGConfig) else ["auto"]

    def _asks_for_perturbations(self) -> bool:
        """Whether somebody named the methods, as opposed to getting the default."""
        return self._chain(self.args) not in ("auto", ["auto"])

    def _prepare_perturbations(self) -> None:
        """Reads settings anew: `hyperparameter_search` changes arguments and model between two trainings."""
        # Working copies: methods that learn start every training anew.
        methods = copy.deepcopy(build_chain(self._chain(self.args)))
        self._has_logit_methods = any(isinstance(method, LogitPerturbation) for method in methods)
        self._parameter_methods = nn.ModuleList(m for m in methods if isinstance(m, ParameterPerturbation))
        # Steps and the sum of each parameter method's delta norms since the last log.
        self._parameter_telemetry = torch.zeros(1 + len(self._parameter_methods), device=self.args.device)
        self._is_classifier = None
        self._checkpoint = None
        self.lpg_loss = None
        self.loss_is_scaled_for_ga = type(self).loss_is_scaled_for_ga
        num_labels = self._declared_num_labels()
        if num_labels is not None:
            self._build_loss(num_labels)

    def _check_parameter_methods(self) -> None:
        sharded = (DistributedType.DEEPSPEED, DistributedType.FSDP)
        if self._parameter_methods and self.accelerator.distributed_type in sharded:
            raise ValueError(
                f"{', '.join(map(repr, self._parameter_methods))} needs whole gradients and parameters on every "
                f"process, but {self.accelerator.distributed_type} shards them. Use DDP, or methods at the logits."
            )
        has_sam = any(isinstance(method, SAM) for method in self._parameter_methods)
        # transformers 5.23 renames the argument; the old name stays until version 6.
        for name in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
            if has_sam and (getattr(self.args, name, None) or {}).get("use_reentrant"):
                raise ValueError(
                    "SAM takes gradients with `torch.autograd.grad`, which reentrant checkpointing does not support; "
                    f"found `{name}` with use_reentrant=True. Set it to False."
                )

    def _declared_num_labels(self) -> int | None:
        """The number of classes, where the model's own loss takes it from its config; else the first batch tells."""
        model = self.accelerator.unwrap_model(self.model)
        if getattr(model, "loss_type", None) not in _SINGLE_LABEL_LOSS_TYPES:
            return None
        is_single_label = model.config.problem_type in (None, "single_label_classification")
        return model.config.num_labels if is_single_label and model.config.num_labels > 1 else None

    def _build_loss(self, num_labels: int) -> None:
        base_loss = None
        if self.label_smoother is not None:
            base_loss = partial(F.cross_entropy, reduction="none", label_smoothing=self.label_smoother.epsilon)
        counts = self._class_counts if self._class_counts is not None else self._read_class_counts(num_labels)
        methods = copy.deepcopy(build_chain(self._chain(self.args), counts))
        chain = [method for method in methods if isinstance(method, LogitPerturbation)]
        config = getattr(self.accelerator.unwrap_model(self.model), "config", None)
        for method in chain:
            method.use_label_names(getattr(config, "label2id", None) or {})
        self.lpg_loss = LPGLoss(num_labels, chain, counts, base_loss)
        self.lpg_loss.fold_every_call = False

    def _read_class_counts(self, num_labels: int) -> list[int] | None:
        """Counts of a map-style data set with a column of integer labels; `None` for any other."""
        if not isinstance(self.train_dataset, Dataset) or len(self.train_dataset) == 0:
            return None
        columns = [name for name in LABEL_COLUMNS if name in self.train_dataset.column_names]
        if not columns:
            return None
        feature = self.train_dataset.features[columns[0]]
        if not isinstance(feature, ClassLabel) and "int" not in feature.dtype:
            return None
        return count_classes(self.train_dataset, num_labels, columns[0])

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
        self._check_parameter_methods()
        return super()._inner_training_loop(*args, **kwargs)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | int | None:
        num_items = super()._get_num_items_in_batch(batch_samples, device)
        # The Trainer counts for models that take the count; the weights of our samples need it for all of them.
        if num_items is None and torch.is_grad_enabled() and batch_samples and "labels" in batch_samples[0]:
            num_items = sum((batch["labels"] != IGNORE_INDEX).sum() for batch in batch_samples).to(device)
            if self.args.average_tokens_across_devices:
                num_items = self.accelerator.reduce(num_items, "sum")
        return num_items

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        if self.lpg_loss is not None:
            # A prior that is being counted is biased by the order of the data until all of it has been seen.
            self.lpg_loss.statistics.prior_is_ready = self.state.epoch is not None and self.state.epoch >= 1
        sam = next((method for method in self._parameter_methods if isinstance(method, SAM)), None)
        if sam is not None and self.state.global_step % sam.interval == 0:
            loss = self._sam_step(sam, model, inputs, num_items_in_batch)
        else:
            loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            if self._is_classifier and self._has_logit_methods:
                self.lpg_loss.fold(partial(self.accelerator.reduce, reduction="sum"))
            self._perturb_gradients()
        return loss

    def _sam_step(
        self, sam: SAM, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Tensor | int | None
    ) -> Tensor:
        """Two passes; the gradient is that of the second, the loss that is logged that of the first."""
        model.train()
        with self.accelerator.no_sync(model), self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(inputs), num_items_in_batch=num_items_in_batch)
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        # Only the direction matters, but under fp16 the unscaled gradient would underflow.
        gradients = torch.autograd.grad(loss * self._loss_scale(), parameters, allow_unused=True)
        learns_nothing = self.lpg_loss.frozen() if self._is_classifier else nullcontext()
        with learns_nothing, sam.shifted(self.model, parameters, gradients):
            super().training_step(model, inputs, num_items_in_batch)
        if self._measures_sam():
            pairs = [(p.grad, g) for p, g in zip(parameters, gradients, strict=True) if g is not None]
            norm = get_total_norm([shifted - gradient for shifted, gradient in pairs]) / self._loss_scale()
            self._parameter_telemetry[1 + list(self._parameter_methods).index(sam)] += norm

        is_scaled = self.loss_is_scaled_for_ga
        if is_scaled is None:
            takes_count = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            is_scaled = takes_count or self.compute_loss_func is not None
        return loss.detach() if is_scaled else loss.detach() / self.current_gradient_accumulation_steps

    def _measures_sam(self) -> bool:
        """Whether both gradients are whole after a micro-batch; else their difference would cost a reduction."""
        return self.accelerator.num_processes == 1 and self.args.gradient_accumulation_steps == 1

    def _perturb_gradients(self) -> None:
        if not self._parameter_methods:
            return
        self._parameter_telemetry[0] += 1
        parameters = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        for row, method in enumerate(self._parameter_methods, start=1):
            if isinstance(method, GradientPerturbation):
                self._parameter_telemetry[row] += method.perturb_(parameters, self._loss_scale())

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
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if torch.is_grad_enabled() and self._replaces_loss():
            if self._is_classifier is None:
                self._is_classifier = self._examine(loss, outputs, labels, num_items_in_batch)
            if self._is_classifier:
                loss = self._perturbed_loss(loss, outputs, labels, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _replaces_loss(self) -> bool:
        """`perturbations=[]` is the Trainer's own loss, unless that is not the mean over the accumulated batch."""
        if self._has_logit_methods:
            return True
        return self.args.gradient_accumulation_steps > 1 and self.compute_loss_func is None

    def _perturbed_loss(
        self, loss: Tensor, outputs: Mapping | tuple, labels: Tensor, num_items_in_batch: Tensor | int | None
    ) -> Tensor:
        logits = self._logits(outputs)
        num_items, num_copies = num_items_in_batch, 1
        if self.args.n_gpu > 1:
            # DataParallel: the Trainer's count is one value per replica, while our loss sees the whole micro-batch.
            num_items = (labels != IGNORE_INDEX).sum() * self.current_gradient_accumulation_steps
        elif num_items is not None and self.args.average_tokens_across_devices:
            # The count is that of all processes, over which the gradients will be averaged.
            num_copies = self.accelerator.num_processes // self.get_tp_size()

        if self.compute_loss_func is None:
            return self.lpg_loss(logits, labels, num_items) * num_copies

        if num_items is None:
            num_items = (labels != IGNORE_INDEX).sum()
        (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True, allow_unused=True)
        if gradient is None:
            raise ValueError(
                "`compute_loss_func` does not depend on the logits that the model returned, so there is no gradient "
                "to perturb. Compute the loss from `outputs.logits`, or pass `perturbations=[]`."
            )
        gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        weight = num_copies / torch.as_tensor(num_items).to(gradient)
        gradient = gradient / weight
        labels = labels.reshape(-1).long()
        perturbed = self.lpg_loss.perturb(gradient, logits.detach().to(gradient.dtype), labels)
        return loss + replace_gradient(torch.zeros_like(loss), logits, (perturbed - gradient) * weight)

    # The classifier rule

    def _examine(
        self, loss: Tensor, outputs: Mapping | tuple, labels: Tensor | None, num_items_in_batch: Tensor | int | None
    ) -> bool:
        """Decides on the first training batch whether the model is a classifier, in the same way on every process."""
        obstacle = self._find_obstacle(loss, outputs, labels, num_items_in_batch)
        votes = self.accelerator.gather(torch.tensor([obstacle is not None], device=self.args.device))
        if votes.any():
            self._refuse(obstacle or "another process saw a model that is no classifier")
            return False

        num_labels = self._logits(outputs).shape[-1]
        if self.lpg_loss is None or self.lpg_loss.num_labels != num_labels:
            self._build_loss(num_labels)
        if self._checkpoint is not None and self._has_logit_methods:
            self._load_loss_state()
        self._warn_of_missing_classes()
        # Our loss is divided by the labelled samples of the whole accumulated batch.
        self.loss_is_scaled_for_ga = True
        return True

    def _find_obstacle(
        self, loss: Tensor, outputs: Mapping | tuple, labels: Tensor | None, num_items_in_batch: Tensor | int | None
    ) -> str | None:
        config = getattr(self.accelerator.unwrap_model(self.model), "config", None)
        logits = self._logits(outputs)
        obstacle = find_obstacle(logits, labels, getattr(config, "problem_type", None))
        # A loss that the Trainer was told to use is what the user wants, whatever it is.
        if obstacle is None and self.compute_loss_func is None and self.label_smoother is None:
            num_copies = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            obstacle = find_other_loss(loss, logits, labels.reshape(-1).long(), num_items_in_batch, num_copies)
        return obstacle

    def _refuse(self, found: str) -> None:
        if not self._has_logit_methods:
            return
        name = type(self.accelerator.unwrap_model(self.model)).__name__
        message = (
            f"{name} is not a single-label classifier trained with cross-entropy: {found}. If it should be perturbed "
            "all the same, give its loss as `compute_loss_func`; to train it as `Trainer`, pass `perturbations=[]`."
        )
        if self._asks_for_perturbations():
            raise ValueError(f"{message} Asked for: {self._chain(self.args)!r}.")
        logger.warning(f"{message} Until then it trains exactly as with `Trainer`.")

    def _warn_of_missing_classes(self) -> None:
        statistics = self.lpg_loss.statistics
        if not self._has_logit_methods or not statistics.counts_are_given:
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
        labels_were_passed = self.compute_loss_func is None and self.label_smoother is None
        return outputs[1] if labels_were_passed else logits_of(outputs)

    # Logging

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self._is_classifier and self._has_logit_methods and ("loss" in logs or "train_loss" in logs):
            telemetry = self.lpg_loss.telemetry(lambda tensor: self.accelerator.gather(tensor[None]))
            if "loss" in logs:
                logs |= telemetry
        if self._parameter_methods and "loss" in logs:
            steps, *norms = self._parameter_telemetry.tolist()
            self._parameter_telemetry.zero_()
            for method, norm in zip(self._parameter_methods, norms, strict=True):
                if not isinstance(method, SAM) or self._measures_sam():
                    logs[f"lpg/{method.name}/delta_norm"] = norm / steps
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
        modules = {}
        if self._is_classifier and self._has_logit_methods:
            modules["loss"] = self.lpg_loss
        if self._parameter_methods:
            modules["parameters"] = self._parameter_methods
        if modules and self.args.should_save:
            save_state(output_dir, modules, self._chains())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        # The loss's part waits for the first batch, which decides whether there is a loss to load it into.
        self._checkpoint = checkpoint
        if self._parameter_methods and checkpoint is not None:
            state = load_state(checkpoint, "parameters", self._chains()["parameters"])
            if state is not None:
                self._parameter_methods.load_state_dict(state)

    def _load_loss_state(self) -> None:
        state = load_state(self._checkpoint, "loss", self._chains()["loss"])
        if state is None:
            return
        num_labels = len(state["statistics.class_counts"])
        if num_labels != self.lpg_loss.num_labels:
            raise ValueError(
                f"{self._checkpoint} was written for {num_labels} classes, but this model has "
                f"{self.lpg_loss.num_labels}. Resume with the model of that run."
            )
        # The state is float64 where the logits were.
        self.lpg_loss.to(device=self.args.device, dtype=state["statistics._running"].dtype).load_state_dict(state)

    def _chains(self) -> dict[str, list[str]]:
        logit_methods = [] if self.lpg_loss is None else self.lpg_loss.perturbations
        return {"loss": list(map(repr, logit_methods)), "parameters": list(map(repr, self._parameter_methods))}
