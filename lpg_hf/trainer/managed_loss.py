"""ManagedLoss: the LPGLoss of one training, which the trainer builds, calls and steps."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial

import torch
from accelerate.logging import get_logger
from torch import Tensor
from transformers import Trainer

from ..batch import IGNORE_INDEX
from ..data.training_labels import class_counts_or_none
from ..distributed import AsyncAllReduce, stack_processes
from ..loss import LPGLoss
from ..perturbations import ClassRelativeDampening, LogitPerturbation, Perturbation, build_chain
from ..perturbations.observers import PerturbationObserver, show_to
from .accumulation import StepItems
from .build_loss import build_loss, logit_methods
from .checkpoint import SavedState
from .eval_shares import EvalShares
from .imbalance_watch import ImbalanceWatch, describe_difference
from .label_messages import warn_of_correcting_loss, warn_of_counts
from .loss_scale import LossScale
from .loss_state import hand_on, load_into, state_of
from .parameter_methods import gradient_scale
from .skipped_steps import SkippedSteps
from .start_line import source_of_counts


logger = get_logger(__name__)


class ManagedLoss:
    """
    The perturbed loss of one training, fitted to the steps of the Trainer.

    A step may consist of several micro-batches on several processes. The loss is divided by the number of labeled
    samples in all of them, and the statistics move once per step.

    Args:
        trainer ([`~transformers.Trainer`]): The trainer whose model, accelerator and settings count.
        chain (`Sequence[str | Perturbation]`): The chain, from which the methods at the logits are taken.
        class_counts (`Sequence[int]`, *optional*): Number of training samples of each class, as the user gave it.
        eval_shares (`str`, `Sequence[float]` or `Mapping`): The class shares of the evaluation, as the user gave them.
        observers (`Sequence[PerturbationObserver]`): The observers that see the perturbations.

    Attributes:
        has_methods (`bool`): Whether the chain has methods at the logits.
        is_needed (`bool`): Whether this loss takes the place of the Trainer's.
        has_begun (`bool`): Whether a step is running.
        requested (`list[str]`): The methods at the logits as the user asked for them: `"auto"`, or a `repr`.
        items ([`StepItems`]): Number of labeled samples in the present step.
        disagreement (`ValueError` or `None`): Why labels or class counts do not fit the number of classes.
    """

    def __init__(
        self,
        trainer: Trainer,
        chain: Sequence[str | Perturbation],
        class_counts: Sequence[int] | None,
        eval_shares: EvalShares,
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
            for text in (["auto"] if entry == "auto" else map(repr, logit_methods(build_chain([entry]))))
        ]
        self._trainer = trainer
        self._chain = chain
        self._class_counts = class_counts
        self._eval_shares = eval_shares
        self._observers = observers
        self._loss: LPGLoss | None = None
        self.items = StepItems(trainer)
        self.has_begun = False
        self.disagreement: ValueError | None = None
        self.watch = ImbalanceWatch(None, False)
        self._skipped_steps = SkippedSteps(trainer)
        self._num_epochs = 0  # of which the statistics have been told
        self._start_line = ""
        # The class statistics of the last step, between its end and their first use.
        self._pending_statistics: AsyncAllReduce | None = None

    def build_early(self, num_labels: int) -> None:
        """
        Builds the loss for the number of classes that the model declares, if `class_counts` fits it.

        A model with a head of its own may declare another number than its head has: the first batch decides.
        """
        try:
            self.build(num_labels)
        except ValueError as error:
            self.disagreement = error

    def build(self, num_labels: int) -> None:
        """Builds the loss for a number of classes, with new statistics."""
        trainer, counts, counted = self._trainer, self._class_counts, None
        self.disagreement = None
        if counts is None and self.has_methods:
            try:
                counts = counted = class_counts_or_none(trainer.train_dataset, num_labels, trainer.args.label_names)
            except ValueError as error:  # a transform or a collator may put them right
                self.disagreement = error
        has_custom_loss = trainer.compute_loss_func is not None and counts is not None and "auto" in self._chain
        self.watch = ImbalanceWatch(counted, has_custom_loss)
        self._build(num_labels, counts)

    def _build(self, num_labels: int, counts: Sequence[int] | None) -> None:
        trainer, shares, watch = self._trainer, self._eval_shares, self.watch
        source = source_of_counts(trainer.train_dataset, self._class_counts is not None, watch.found is not None)
        built = build_loss(trainer, self._chain, num_labels, counts, source, shares, watch.loss_corrects)
        self._loss, self._start_line = built

    def begin(self, num_labels: int, dtype: torch.dtype, saved: SavedState | None) -> None:
        """
        Gets the loss ready, once the first batch has shown a classifier. All processes must call it.

        Args:
            num_labels (`int`): Number of classes.
            dtype (`torch.dtype`): Of the statistics, which are summed over processes.
            saved ([`SavedState`], *optional*): The state of a checkpoint.
        """
        if self._loss is None or self._loss.num_labels != num_labels:
            self.build(num_labels)
        if not self.has_methods:
            return
        # A process whose batches are odd does not reach the place where the loss takes after its logits.
        self.loss.to(device=self._trainer.args.device, dtype=dtype)
        self._num_epochs = int(self._trainer.state.epoch or 0)
        if saved is not None and saved.has("imbalance"):
            saved.restore(self.watch, "imbalance")
            # The chain and the counts follow from what the first run found.
            self._rebuild(self.watch.found or self._own_counts())
        loss = self.loss
        logger.info(self._start_line)
        if saved is not None:
            saved.check_chain("loss", self.methods, self._trainer.accelerator.num_processes, self.requested)
            saved.check_num_labels(loss.num_labels)
            saved.restore_loss(self, self.methods)
            self._num_epochs = int(loss.statistics.epochs)
            # The checkpoint may stand at the end of an epoch, and the first step has begun before it was loaded. A
            # training that had ended has no further step, and keeps what it had.
            if self._trainer.state.global_step < self._trainer.state.max_steps:
                self._end_epochs()
            if self.watch.begins_anew:  # the samples of the first run had other labels
                self.loss.statistics.seen_counts.zero_()
        self.watch.begin(self._trainer.state.global_step)
        warn_of_counts(self._own_counts(), self._trainer.train_dataset, loss.num_labels, self.disagreement)

    def state_dict(self) -> dict[str, Tensor]:
        """The state of the loss."""
        return state_of(self.loss)

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Loads what [`~ManagedLoss.state_dict`] returned, as far as it fits."""
        load_into(self.loss, tensors)

    def _own_counts(self) -> list[int] | None:
        statistics = self.loss.statistics
        return statistics.class_counts.tolist() if statistics.counts_are_given else None

    def _rebuild(self, counts: Sequence[int] | None) -> None:
        """Builds the loss for other class counts, or for another chain; what has been learned is kept."""
        before = self.loss
        self._build(before.num_labels, counts)
        hand_on(before, self.loss)

    def _watch_imbalance(self) -> None:
        """Looks after the first batches, and again after the first epoch. All processes must call it at every step."""
        trainer, watch = self._trainer, self.watch
        args, state = trainer.args, trainer.state
        step_size = args.train_batch_size * args.gradient_accumulation_steps * trainer.accelerator.num_processes
        if self._loss is None or not watch.is_due(state.global_step, step_size, state.epoch or 0.0):
            return
        if watch.watches_loss:
            if watch.judge_loss(trainer.accelerator):
                warn_of_correcting_loss()
            else:
                self._rebuild(self._own_counts())
        seen, had_met_others = self.loss.statistics.seen_counts.tolist(), watch.met_other_labels
        if watch.judge_labels(seen, is_epoch=(state.epoch or 0.0) >= 1) and watch.found is not None:
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
        return [] if loss is None else logit_methods(loss.perturbations)

    def dampening(self) -> ClassRelativeDampening | None:
        """The first class-relative dampening of the chain."""
        return next((method for method in self.methods if isinstance(method, ClassRelativeDampening)), None)

    def _end_epochs(self) -> None:
        """Tells the loss of the epochs that have ended since the last call."""
        # More than one where a checkpoint knows of none: the sums of a single step must not become means.
        while int(self._trainer.state.epoch or 0) > self._num_epochs:
            self._num_epochs += 1
            self.loss.end_epoch()

    def begin_step(self, batches: list, num_items_in_batch: Tensor | int | None, device: torch.device) -> None:
        """Begins a step of some micro-batches. All processes must call it."""
        self.has_begun = True
        if self.has_methods and self._loss is not None:
            self._end_epochs()
        self._watch_imbalance()
        self.items.begin(batches, num_items_in_batch, device)

    def perturbed(
        self,
        loss: Tensor,
        logits: Tensor,
        labels: Tensor,
        num_items: Tensor | float | None,
        scale: LossScale,
        divisor: int | None,
        learns: bool,
        is_observed: bool,
    ) -> Tensor:
        """
        Perturbs the loss of a micro-batch.

        Args:
            loss (`torch.Tensor`): The loss that the Trainer computed.
            logits (`torch.Tensor` of shape `[N, C]`): The logits of the model, with their graph.
            labels (`torch.Tensor` of shape `[N]` or `[N, 1]`): Class indices, -100 for ignored samples.
            num_items (`torch.Tensor` or `float`, *optional*): Number of labeled samples in the whole step.
            scale ([`LossScale`]): The scale of `loss`.
            divisor (`int`, *optional*):
                The number by which the Trainer will divide the loss. `None` if a user's `training_step` takes its
                place: the loss then keeps the scale that the Trainer's `compute_loss` gives it.
            learns (`bool`): Whether statistics and telemetry count these samples.
            is_observed (`bool`): Whether the observers may see the perturbation.

        Returns:
            `torch.Tensor`: A loss with the perturbed gradient. Divided, it has the scale of the step.
        """
        trainer, lpg_loss = self._trainer, self.loss
        with nullcontext() if learns else lpg_loss.frozen():
            if trainer.compute_loss_func is not None:
                return self._perturbed_custom(loss.mean(), logits, labels, num_items, scale, is_observed)
            num_copies = scale.factor
            if divisor is None and not scale.is_per_step:
                num_items = None
            elif divisor is not None:
                # The number counts all processes, and their gradients will be averaged.
                across = num_items is not None and trainer.args.average_tokens_across_devices
                num_copies = trainer.accelerator.num_processes // trainer.get_tp_size() if across else 1
            is_step_mean = num_items is not None
            items = (labels != IGNORE_INDEX).sum() if num_items is None else num_items
            is_alone = trainer.current_gradient_accumulation_steps == trainer.accelerator.num_processes == 1
            model_loss = None
            if trainer.label_smoother is None:
                model_loss = scale.to_step(loss.mean(), labels, items, is_whole_step=is_alone or divisor is None)
            observer = None
            if is_observed and self._observers:
                observer = self._observer(logits, torch.as_tensor(items).clamp(min=1) / num_copies)
            perturbed_loss = lpg_loss(logits, labels, items, model_loss, observer)
        # An override may add terms of its own to this loss, which the Trainer then divides as well.
        factor = num_copies * (divisor if divisor is not None and is_step_mean else 1)
        return perturbed_loss if factor == 1 else perturbed_loss * factor

    def _perturbed_custom(
        self,
        loss: Tensor,
        logits: Tensor,
        labels: Tensor,
        num_items: Tensor | float | None,
        scale: LossScale,
        is_observed: bool,
    ) -> Tensor:
        """Perturbs what a `compute_loss_func` returned, on the scale that it has."""
        lpg_loss = self.loss
        dtype = torch.promote_types(logits.dtype, torch.float32)
        batch = lpg_loss.batch_of(logits.detach().to(dtype), labels.reshape(-1).long())
        divisor = scale.divisor(batch.labels, num_items).to(dtype).clamp(min=1 / scale.factor)
        if self.watch.watches_loss and not lpg_loss.is_frozen:
            (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True, allow_unused=True)
            if gradient is not None:
                self.watch.add_pulls(batch, gradient, lpg_loss.statistics.prior_terms.log_rarity)
        observer = self._observer(logits, divisor) if is_observed else None
        return lpg_loss.perturb_loss(loss, logits, batch, divisor, observer)

    def _observer(self, logits: Tensor, divisor: Tensor) -> Callable[[Tensor], None] | None:
        return show_to(self._observers, logits, divisor, gradient_scale(self._trainer.accelerator))

    def end_step(self, learns: bool) -> None:
        """Ends an optimizer step. If the loss `learns`, it moves the statistics and the methods with state."""
        self.items.end()
        self.has_begun = False
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

    def telemetry(self, is_last: bool = False) -> dict[str, float]:
        """The means since the last call, or an error as [`SkippedSteps`] raises it. All processes must call it."""
        report: dict[str, float] = {}
        try:
            report = self.loss.telemetry(partial(stack_processes, accelerator=self._trainer.accelerator))
        except FloatingPointError as error:
            self._skipped_steps.add(error)
        self._skipped_steps.warn(is_last)
        return report
