"""ManagedLoss: the LPGLoss of one training, which the trainer builds, calls and steps."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import DynamoBackend
from torch import Tensor
from torch.nn import functional as F
from transformers import Trainer

from ..batch import IGNORE_INDEX, LogitBatch
from ..data.training_labels import class_counts_or_none
from ..distributed import AsyncAllReduce, stack_processes
from ..loss import LPGLoss
from ..perturbations import (
    ClassRelativeDampening,
    ClassWeighting,
    LabelSmoothing,
    LogitPerturbation,
    Perturbation,
    build_chain,
)
from ..perturbations.observers import PerturbationObserver
from .checkpoint import SavedState
from .imbalance_watch import ImbalanceWatch, describe_difference
from .label_messages import warn_of_missing_classes, warn_of_unknown_counts
from .loss_scale import LossScale
from .parameter_methods import gradient_scale
from .start_line import source_of_counts, start_line


logger = get_logger(__name__)

_COUNTS = "statistics.class_counts"


class ManagedLoss:
    """
    The perturbed loss of one training, fitted to the steps of the Trainer.

    A step may consist of several micro-batches on several processes. The loss is divided by the number of labeled
    samples in all of them, and the statistics move once per step.

    Args:
        trainer ([`~transformers.Trainer`]): The trainer whose model, accelerator and settings count.
        chain (`Sequence[str | Perturbation]`): The chain, from which the methods at the logits are taken.
        class_counts (`Sequence[int]`, *optional*): Number of training samples of each class, as the user gave it.
        observers (`Sequence[PerturbationObserver]`): The observers that see the perturbations.

    Attributes:
        has_methods (`bool`): Whether the chain has methods at the logits.
        is_needed (`bool`): Whether this loss takes the place of the Trainer's.
        requested (`list[str]`): The methods at the logits as the user asked for them: `"auto"`, or a `repr`.
    """

    def __init__(
        self,
        trainer: Trainer,
        chain: Sequence[str | Perturbation],
        class_counts: Sequence[int] | None,
        observers: Sequence[PerturbationObserver],
    ):
        self.has_methods = any(isinstance(method, LogitPerturbation) for method in build_chain(chain))
        # Without methods it is needed only under gradient accumulation, where the Trainer's loss is a mean over the
        # whole step for some models alone: https://github.com/huggingface/transformers/issues/37766, open in 5.24.
        accumulates = trainer.args.gradient_accumulation_steps > 1 and trainer.compute_loss_func is None
        self.is_needed = self.has_methods or accumulates
        self.requested = [
            text
            for entry in chain
            for text in (["auto"] if entry == "auto" else map(repr, _logit_methods(build_chain([entry]))))
        ]
        self._trainer = trainer
        self._chain = chain
        self._class_counts = class_counts
        self._observers = observers
        self._loss: LPGLoss | None = None
        self.watch = ImbalanceWatch(None, False)
        # The optimizer step at which it begins to look at labels.
        self._watch_start = 0
        self._start_line = ""
        # Number of labeled samples in the present step, if the Trainer did not count them.
        self._step_items: AsyncAllReduce | Tensor | int | None = None
        # The class statistics of the last step, between its end and their first use.
        self._pending_statistics: AsyncAllReduce | None = None

    def build(self, num_labels: int) -> None:
        """Builds the loss for a number of classes, with new statistics."""
        trainer, counts, counted = self._trainer, self._class_counts, None
        if counts is None and self.has_methods:
            counts = counted = class_counts_or_none(trainer.train_dataset, num_labels)
        has_custom_loss = trainer.compute_loss_func is not None and counts is not None and "auto" in self._chain
        self.watch = ImbalanceWatch(counted, has_custom_loss)
        self._build(num_labels, counts)

    def _build(self, num_labels: int, counts: Sequence[int] | None) -> None:
        trainer = self._trainer
        base_loss: Callable[[Tensor, Tensor], Tensor] | None = None
        outside: list[LogitPerturbation] = []
        if trainer.label_smoother is not None:
            epsilon = trainer.label_smoother.epsilon
            base_loss = partial(F.cross_entropy, reduction="none", label_smoothing=epsilon)
            # With a factor of 1 no label is left to learn, and `auto` has nothing to take into account.
            outside = [LabelSmoothing(epsilon)] if epsilon < 1 else []
        if self.watch.loss_corrects:
            outside.append(ClassWeighting())
        methods = build_chain(self._chain, counts, outside)
        chain = _logit_methods(methods)
        source = source_of_counts(trainer.train_dataset, self._class_counts is not None, self.watch.found is not None)
        self._start_line = start_line(self._chain, methods, counts, source)
        config = getattr(trainer.accelerator.unwrap_model(trainer.model), "config", None)
        for method in chain:
            method.use_label_names(getattr(config, "label2id", None) or {})
        self._loss = LPGLoss(num_labels, chain, counts, base_loss, managed=True)
        dynamo = trainer.accelerator.state.dynamo_plugin
        # Another base loss is differentiated by autograd on the way, which a compiled loss cannot do.
        if dynamo.backend != DynamoBackend.NO and base_loss is None:
            self._loss.compile(**dynamo.to_kwargs())

    def begin(self, num_labels: int, saved: SavedState | None) -> None:
        """Gets the loss ready, once the first batch has shown a classifier."""
        if self._loss is None or self._loss.num_labels != num_labels:
            self.build(num_labels)
        if not self.has_methods:
            return
        loss = self.loss
        if saved is not None and saved.has("imbalance"):
            saved.restore(self.watch, "imbalance")
            # The chain and the counts follow from what the first run found.
            self._rebuild(self.watch.found or self._own_counts())
            loss = self.loss
        logger.info(self._start_line)
        if saved is not None:
            saved.check_chain("loss", self.methods, self._trainer.accelerator.num_processes, self.requested)
            saved.check_num_labels(loss.num_labels)
            # The state is float64 if the logits were.
            loss.to(device=self._trainer.args.device, dtype=saved.tensors["loss.statistics._running"].dtype)
            self.load_state_dict(saved.renumbered(self.methods))
            if self.watch.begins_anew:  # the samples of the first run had other labels
                self.loss.statistics.seen_counts.zero_()
                self._watch_start = self._trainer.state.global_step
        if loss.statistics.counts_are_given:
            warn_of_missing_classes(loss.statistics.class_counts.tolist())
        else:
            warn_of_unknown_counts(self._trainer.train_dataset, loss.num_labels)

    def state_dict(self) -> dict[str, Tensor]:
        """The state of the loss. Counts that were given or read are not part of it: they belong to the data."""
        state = dict(self.loss.state_dict())
        if self.loss.statistics.counts_are_given:
            del state[_COUNTS]
        return state

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """
        Loads what [`~ManagedLoss.state_dict`] returned. What is missing, or has another shape, stays as it is.

        Samples that were counted count on only where this run counts as well: next to other counts, they would count
        twice.
        """
        state = self.loss.state_dict()
        keeps_counts = self.loss.statistics.counts_are_given
        for name, value in tensors.items():
            if name in state and state[name].shape == value.shape and not (keeps_counts and name == _COUNTS):
                state[name] = value
        self.loss.load_state_dict(state)

    def _own_counts(self) -> list[int] | None:
        statistics = self.loss.statistics
        return statistics.class_counts.tolist() if statistics.counts_are_given else None

    def _rebuild(self, counts: Sequence[int] | None) -> None:
        """Builds the loss for other class counts, or for another chain; what has been learned is kept."""
        before = self.loss
        self._build(before.num_labels, counts)
        loss = self.loss.to(before.statistics.accuracy)
        state = before.statistics.state_dict()
        loss.statistics.load_state_dict(state | {"class_counts": loss.statistics.class_counts})
        learned = {repr(method): method.state_dict() for method in before.perturbations}
        for method in loss.perturbations:
            if repr(method) in learned:
                method.load_state_dict(learned[repr(method)])

    def _watch_imbalance(self) -> None:
        """Looks after the first batches, and again after the first epoch. All processes must call it at every step."""
        trainer, watch = self._trainer, self.watch
        args, state = trainer.args, trainer.state
        step_size = args.train_batch_size * args.gradient_accumulation_steps * trainer.accelerator.num_processes
        epoch = state.epoch or 0.0
        if self._loss is None or not watch.is_due((state.global_step - self._watch_start) * step_size, epoch):
            return
        if watch.watches_loss:
            if watch.judge_loss(trainer.accelerator):
                logger.warning(
                    "`compute_loss_func` corrects the class imbalance already, as class weights do, so `auto` leaves "
                    "its own correction out. To let `auto` correct it, pass a loss without weights."
                )
            else:
                self._rebuild(self._own_counts())
        seen, had_met_others = self.loss.statistics.seen_counts.tolist(), watch.met_other_labels
        if watch.judge_labels(seen, is_epoch=epoch >= 1) and watch.found is not None:
            self._rebuild(watch.found)
            if not had_met_others and watch.counted is not None:
                logger.warning(describe_difference(seen, watch.counted))
        elif had_met_others and watch.counted is not None:  # the first batches were in an order
            self._rebuild(watch.counted)

    @property
    def loss_or_none(self) -> LPGLoss | None:
        """The loss with the statistics of all steps that have ended; `None` if it is not built yet."""
        if self._loss is not None and self._pending_statistics is not None:
            total, self._pending_statistics = self._pending_statistics.wait(), None
            self._loss.statistics.step(lambda _: total)
        return self._loss

    @property
    def loss(self) -> LPGLoss:
        """The loss with the statistics of all steps that have ended. It must be built."""
        loss = self.loss_or_none
        assert loss is not None
        return loss

    @property
    def methods(self) -> list[LogitPerturbation]:
        """The methods of the loss, in their order."""
        loss = self.loss_or_none
        return [] if loss is None else [m for m in loss.perturbations if isinstance(m, LogitPerturbation)]

    def dampening(self) -> ClassRelativeDampening | None:
        """The first class-relative dampening of the chain."""
        return next((method for method in self.methods if isinstance(method, ClassRelativeDampening)), None)

    def begin_step(self, batches: list, num_items_in_batch: Tensor | int | None, device: torch.device) -> None:
        """Counts the labeled samples in all micro-batches of a step. All processes must call it."""
        args = self._trainer.args
        self._watch_imbalance()
        self._step_items = num_items_in_batch
        # The Trainer counts for some models and losses alone, and for DataParallel it counts a share.
        if num_items_in_batch is None or args.n_gpu > 1:
            labels: list[Any] = [batch.get("labels") if isinstance(batch, Mapping) else None for batch in batches]
            self._step_items = None
            if labels and all(isinstance(label, Tensor) for label in labels):
                count = torch.stack([(label != IGNORE_INDEX).sum() for label in labels]).sum().to(device)
                across = args.average_tokens_across_devices
                self._step_items = AsyncAllReduce(count, self._trainer.accelerator) if across else count

    def num_items(self, num_items_in_batch: Tensor | int | None) -> Tensor | int | None:
        """Number of labeled samples in the present step; `num_items_in_batch` outside of one."""
        if isinstance(self._step_items, AsyncAllReduce):
            self._step_items = self._step_items.wait()
        return num_items_in_batch if self._step_items is None else self._step_items

    def perturbed(
        self,
        loss: Tensor,
        logits: Tensor,
        labels: Tensor,
        num_items: Tensor | int | None,
        scale: LossScale,
        is_observed: bool,
    ) -> Tensor:
        """
        Perturbs the loss of a micro-batch.

        Args:
            loss (`torch.Tensor`): The loss that the Trainer computed.
            logits (`torch.Tensor` of shape `[N, C]`): The logits of the model, with their graph.
            labels (`torch.Tensor` of shape `[N]` or `[N, 1]`): Class indices, -100 for ignored samples.
            num_items (`torch.Tensor` or `int`, *optional*): Number of labeled samples in the whole step.
            scale ([`LossScale`]): The scale of the model's own loss.
            is_observed (`bool`): Whether the observers may see the perturbation.

        Returns:
            `torch.Tensor`: A loss of the same value, scaled to the step, with the perturbed gradient.
        """
        trainer, lpg_loss = self._trainer, self.loss
        if trainer.state.epoch is not None and trainer.state.epoch >= 1:
            lpg_loss.end_epoch()
        num_copies = 1
        if num_items is None:
            num_items = (labels != IGNORE_INDEX).sum()
        elif trainer.args.average_tokens_across_devices:
            # The number counts all processes, and their gradients will be averaged.
            num_copies = trainer.accelerator.num_processes // trainer.get_tp_size()
        observer = self._observer(logits, num_items, num_copies) if is_observed else None
        if trainer.compute_loss_func is not None:
            dtype = torch.promote_types(logits.dtype, torch.float32)
            batch = LogitBatch(logits.detach().to(dtype), labels.reshape(-1).long())
            divisor = scale.divisor(batch.labels, num_items).to(dtype).clamp(min=1 / scale.factor)
            if self.watch.watches_loss and not lpg_loss.is_frozen:
                (gradient,) = torch.autograd.grad(loss.mean(), logits, retain_graph=True, allow_unused=True)
                if gradient is not None:
                    self.watch.add_pulls(batch, gradient, lpg_loss.statistics.prior_terms.log_rarity)
            return lpg_loss.perturb_loss(loss.mean(), logits, batch, divisor, observer)
        model_loss = None
        if trainer.label_smoother is None:
            accumulation_steps = trainer.current_gradient_accumulation_steps
            is_whole_step = accumulation_steps == 1 and trainer.accelerator.num_processes == 1
            model_loss = scale.to_step(loss.mean(), labels, num_items, is_whole_step=is_whole_step)
        perturbed_loss = lpg_loss(logits, labels, num_items, model_loss, observer)
        return perturbed_loss if num_copies == 1 else perturbed_loss * num_copies

    def _observer(self, logits: Tensor, num_items: Tensor | int, num_copies: int) -> Callable[[Tensor], None] | None:
        due = [observer for observer in self._observers if observer.is_due]
        if not due:
            return None

        def observe(delta: Tensor) -> None:
            gradient = num_copies / torch.as_tensor(num_items).to(delta).clamp(min=1) * delta
            for observer in due:
                observer.add_perturbation(logits, gradient, gradient_scale(self._trainer.accelerator))

        return observe

    def frozen(self) -> AbstractContextManager[None]:
        """Within it, the loss perturbs but does not learn, as for SAM's second look at a batch."""
        return nullcontext() if self._loss is None else self.loss.frozen()

    def end_step(self, learns: bool) -> None:
        """Ends an optimizer step. If the loss `learns`, it moves the statistics and the methods with state."""
        self._step_items = None
        if not learns:
            return
        # Looked up first: afterwards, it would wait for the statistics.
        loss, methods, accelerator = self.loss, self.methods, self._trainer.accelerator
        if accelerator.num_processes == 1:
            loss.step()
            return
        # The next forward pass needs the statistics, so they may travel while the optimizer takes its step.
        self._pending_statistics = AsyncAllReduce(loss.statistics.pending, accelerator)
        for method in methods:
            method.step(lambda tensor: AsyncAllReduce(tensor, accelerator).wait())

    def telemetry(self) -> dict[str, float]:
        """The means over the samples since the last call. All processes must call it."""
        return self.loss.telemetry(partial(stack_processes, accelerator=self._trainer.accelerator))


def _logit_methods(chain: Sequence[Perturbation]) -> list[LogitPerturbation]:
    return [method for method in chain if isinstance(method, LogitPerturbation)]
