"""ClassifierCheck: is this a single-label classifier that is trained with cross-entropy?"""

from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from typing import Any

import torch
from accelerate.logging import get_logger
from torch import Tensor, nn
from transformers import Trainer

from ..batch_labels import labels_of
from .batch_shapes import OddBatches, why_not_classifier, why_out_of_range
from .given_loss import why_not_of_classes
from .loss_scale import LossScale, can_tell_losses_apart, compare_with_cross_entropy
from .random_state import same_random_state


logger = get_logger(__name__)

# Losses of transformers that are the cross-entropy over `config.num_labels` classes if the labels are integers.
_SINGLE_LABEL_LOSS_TYPES = (
    "ForSequenceClassification",
    "ForImageClassification",
    "ForVideoClassification",
    "ForAudioClassification",
)

_CURE_OF_OWN_LOSS = (
    "If the loss weights classes, remove the weights: `auto` corrects the imbalance itself, and "
    "`perturbations=['class_weighting']` weights as such a loss does. To perturb another loss, pass it as "
    "`compute_loss_func`. "
)


class ClassifierCheck:
    """
    Decides whether the model of a trainer is a single-label classifier that is trained with cross-entropy.

    The first training batch decides, in the same way on every process. The next batches confirm it, until one of them
    could have shown class weights in the loss.

    Args:
        trainer ([`~transformers.Trainer`]): Its model, accelerator and loss settings are looked at.
        has_logit_methods (`bool`): Whether there are methods that need a classifier. Without them nothing is said.
        requested (`Sequence`, *optional*):
            The chain, if it names methods that need a classifier. A model that is not one then raises an error.

    Attributes:
        passed (`bool` or `None`): The decision; `None` before it.
        num_labels (`int`): Number of classes, once the model has passed.
        dtype (`torch.dtype`): Of the statistics: float64 if the logits are, else float32.
    """

    def __init__(self, trainer: Trainer, has_logit_methods: bool, requested: Sequence[object] | None):
        self.passed: bool | None = None
        self.num_labels = 0
        self.dtype = torch.float32
        self._trainer = trainer
        self._has_logit_methods = has_logit_methods
        self._requested = requested
        self._is_final = False
        # The scales that the model's own loss may have: one, as soon as a batch can tell.
        self._scales: list[LossScale] = []
        self._shapes_fit: bool | None = None
        self._odd_batches = OddBatches(trainer, has_logit_methods, requested is not None, self._loss_is_given)

    @property
    def _model(self) -> nn.Module:
        return self._trainer.accelerator.unwrap_model(self._trainer.model)

    @property
    def _is_whole_step(self) -> bool:
        """Whether a micro-batch is a step."""
        return self._trainer.args.gradient_accumulation_steps == self._trainer.accelerator.num_processes == 1

    @property
    def _loss_is_given(self) -> bool:
        """Whether the Trainer was told which loss to use. The model's own loss does not matter then."""
        return self._trainer.compute_loss_func is not None or self._trainer.label_smoother is not None

    def scale(
        self, outputs: Mapping | tuple, labels: Tensor, num_items_in_batch: Tensor | int | None, *, is_as_loaded: bool
    ) -> LossScale:
        """
        How a loss of the model weights the samples, once the model has passed.

        Args:
            outputs (`Mapping` or `tuple`): The outputs of the model.
            labels (`torch.Tensor`): The labels of the batch.
            num_items_in_batch (`torch.Tensor` or `int`, *optional*):
                What `compute_loss` got. Without it, the loss is the mean over the micro-batch.
            is_as_loaded (`bool`): Whether these are the labels that the loader gave the batch.
        """
        if num_items_in_batch is None:
            return LossScale(is_per_step=False)
        if not is_as_loaded and len(self._scales) > 1:
            self._scales = self._scales_of_given_loss(outputs, labels, num_items_in_batch)
        return self._scales[0]

    def declared_num_labels(self) -> int | None:
        """The number of classes, if the model's own loss takes it from its config."""
        model: Any = self._model
        if getattr(model, "loss_type", None) not in _SINGLE_LABEL_LOSS_TYPES:
            return None
        is_single_label = model.config.problem_type in (None, "single_label_classification")
        return model.config.num_labels if is_single_label and model.config.num_labels > 1 else None

    def update(
        self,
        loss: Tensor,
        outputs: Mapping | tuple,
        labels: Tensor | None,
        num_items: Tensor | int | None,
        num_items_in_batch: Tensor | int | None,
    ) -> bool:
        """
        Looks at a training batch, unless the decision is final. All processes must call it.

        Args:
            loss (`torch.Tensor`): The loss that the Trainer returned.
            outputs (`Mapping` or `tuple`): The outputs of the model.
            labels (`torch.Tensor`, *optional*): The labels of the batch.
            num_items (`torch.Tensor` or `int`, *optional*): Number of labeled samples in the whole step.
            num_items_in_batch (`torch.Tensor` or `int`, *optional*): The same as the Trainer counted it, if it did.

        Returns:
            `bool`: Whether this batch is the first one that the model passed.

        Raises:
            ValueError: If the model is not a classifier and the chain names methods that need one.
        """
        if self.passed is False or self._is_final:
            return False
        is_first = self.passed is None
        if is_first:
            self._scales = self._possible_scales(num_items_in_batch)
        is_odd = self._odd_batches.is_odd(loss, self.logits(outputs), labels, is_first)
        fitting, reason = self._fitting_scales(loss, outputs, labels, num_items)
        tells_apart = reason is not None or self._loss_is_given or labels is None or can_tell_losses_apart(labels)
        fits = [is_odd or scale in fitting for scale in self._scales]
        # An odd batch has nothing to say, so that the others decide.
        shown = None if is_odd or reason is not None else self.logits(outputs)
        sizes = [0, 0] if shown is None else [shown.shape[-1], int(shown.dtype == torch.float64)]
        ballot = [[*sizes, is_odd or reason is None, is_odd or not tells_apart, *fits]]
        votes = self._trainer.accelerator.gather(torch.tensor(ballot, device=self._trainer.args.device))
        num_labels, is_double = votes[:, :2].amax(0).tolist()
        passed, cannot_tell, *fits = votes[:, 2:].all(0).tolist()
        if not passed or not any(fits):
            if self._requested is None and self._odd_batches.is_announced(self.logits(outputs), labels):
                self.passed = False
            else:
                self.refuse(reason or "another process saw a batch that does not fit a classifier")
            return False
        if is_first and num_labels == 0:
            self._odd_batches.leave_undecided(reason or "its loss is not finite")
            return False
        self._scales = [scale for scale, fit in zip(self._scales, fits, strict=True) if fit]
        self._is_final = not cannot_tell and (self._is_whole_step or len(self._scales) == 1 or self._loss_is_given)
        if is_first:
            self.passed, self.num_labels = True, num_labels
            self.dtype = torch.float64 if is_double else torch.float32
        return is_first

    def take_over(self, num_labels: int, dtype: torch.dtype) -> None:
        """The model has passed in the training that is resumed: see [`ClassifierCheck`] for both."""
        self.passed, self.num_labels, self.dtype = True, num_labels, dtype

    def fits(self, outputs: Mapping | tuple, labels: object, *, reads_labels: bool) -> bool:
        """
        Whether a batch of a model that has passed can be perturbed: it may differ from the first one.

        Args:
            outputs (`Mapping` or `tuple`): The outputs of the model.
            labels: The labels of the batch, of any type.
            reads_labels (`bool`): Whether labels may be out of range, and are looked at.
        """
        return self._odd_batches.fits(self.logits(outputs), labels, self.num_labels, reads_labels=reads_labels)

    def refuse(self, reason: str) -> None:
        """
        Ends the check: the model is not a classifier, and its logits are not perturbed.

        Args:
            reason (`str`): Why it is not, as [`why_not_classifier`] says it.

        Raises:
            ValueError: If the chain names methods that need a classifier. Otherwise there is a warning.
        """
        if self._has_logit_methods:
            loss = "a loss of classes" if self._loss_is_given else "cross-entropy"
            cure = "" if self._loss_is_given else _CURE_OF_OWN_LOSS
            message = (
                f"{type(self._model).__name__} is not a single-label classifier trained with {loss}: {reason}. {cure}"
                "To train as `Trainer` does, pass `perturbations=[]`."
            )
            if self._requested is not None:
                raise ValueError(f"{message} Asked for: {self._requested!r}.")
            logger.warning(f"{message} Until then it trains exactly as with `Trainer`.")
        self.passed = False

    def refuse_override(self) -> None:
        """Ends the check, unless it has ended, because an override leaves out LPGTrainer's `compute_loss`."""
        if self.passed is None:
            self.refuse(
                "its loss comes from a `compute_loss` or `training_step` that does not call LPGTrainer's "
                "`compute_loss`"
            )

    def warn_unused(self) -> None:
        """Warns that nobody used the loss that was perturbed. An override may do so later, after a warm-up."""
        logger.warning(
            "No gradient came to the loss of LPGTrainer in an optimizer step: a `compute_loss` or `training_step` "
            "that calls LPGTrainer's takes another loss than the one that it gets. As long as it does, nothing is "
            "perturbed. Add to the loss that `super().compute_loss` returns, or pass yours as `compute_loss_func`."
        )

    def labels(self, inputs: object) -> Any:
        """The labels of a batch, of any type. A loss that is given gets only what is called `labels`."""
        labels = labels_of(inputs)
        if labels is None and not self._loss_is_given:
            labels = labels_of(inputs, self._trainer.args.label_names)
        return labels

    def logits(self, outputs: Mapping | tuple | Tensor) -> Any:
        """The logits among the outputs of the model, usually a tensor; `None` if there are none."""
        if isinstance(outputs, Mapping):
            return outputs.get("logits")
        if isinstance(outputs, Tensor) and self._loss_is_given:  # of a model that returns nothing else
            return outputs
        # The model's tuple begins with a loss, unless the Trainer took the labels out to compute it.
        position = 0 if self._loss_is_given else 1
        return outputs[position] if len(outputs) > position else None

    def shapes_fit(self, outputs: Mapping | tuple, labels: Tensor | None) -> bool:
        """Whether logits and labels look like a classifier's, whatever the loss is. The first ones that do decide."""
        # To unwrap the model would take longer than all else that a batch needs.
        if self._shapes_fit is None and why_not_classifier(self.logits(outputs), labels, problem_type=None) is None:
            self._shapes_fit = self._why_wrong_shape(outputs, labels) is None
        return bool(self._shapes_fit)

    def _why_wrong_shape(self, outputs: Mapping | tuple, labels: Tensor | None) -> str | None:
        model = self._model
        # Adapters, compilation and modules of the user's own wrap the model.
        if any(type(module).__name__.endswith("ForMultipleChoice") for module in model.modules()):
            return "its logits are scores of each sample's own choices, not of classes"
        problem_type = getattr(getattr(model, "config", None), "problem_type", None)
        return why_not_classifier(self.logits(outputs), labels, problem_type)

    def _fitting_scales(
        self, loss: Tensor, outputs: Mapping | tuple, labels: Tensor | None, num_items: Tensor | int | None
    ) -> tuple[list[LossScale], str | None]:
        reason = self._why_wrong_shape(outputs, labels)
        if reason is not None or labels is None:
            return self._scales, reason
        logits = self.logits(outputs)
        reason = why_out_of_range(labels, logits.shape[1])
        if loss.requires_grad and not logits.requires_grad:
            reason = "the `logits` of its outputs have no gradient, as after `detach()`. Return them as they are"
        if reason is None and self._trainer.compute_loss_func is not None:
            labels = labels.reshape(-1).long()
            reason = why_not_of_classes(loss.mean(), logits, labels, is_requested=self._requested is not None)
        if reason is not None:
            return self._scales, reason
        if self._loss_is_given:
            # Where the batch is the step, all scales divide by the same number: no need to call the user's loss again.
            divisors = {float(scale.divisor(labels, num_items)) for scale in self._scales}
            is_same = self._is_whole_step and len(divisors) == 1
            return self._scales if is_same else self._scales_of_given_loss(outputs, labels, num_items), None
        dtypes = {"no": None, "fp16": torch.float16}
        return compare_with_cross_entropy(
            loss.mean(),
            logits,
            labels.reshape(-1).long(),
            num_items,
            self._scales,
            dtypes.get(self._trainer.accelerator.mixed_precision, torch.bfloat16),
        )

    @torch.no_grad()
    def _scales_of_given_loss(
        self, outputs: Mapping | tuple, labels: Tensor | None, num_items: Tensor | int | None
    ) -> list[LossScale]:
        """Whether a `compute_loss_func` divides by the count that it is given: with twice the count, it is halved."""
        function = self._trainer.compute_loss_func
        if function is None or num_items is None or len(self._scales) < 2:
            return self._scales
        once, twice = (self._call(function, outputs, labels, n * num_items) for n in (1, 2))
        halves = torch.allclose(2 * twice, once, rtol=1e-2) and not torch.allclose(twice, once, rtol=1e-2)
        return [scale for scale in self._scales if scale.is_per_step == halves]

    def _call(
        self, function: Callable[..., Any], outputs: Mapping | tuple, labels: Tensor | None, num_items: Tensor | int
    ) -> Tensor:
        # Both calls draw the same random numbers, and the training draws what it would have drawn without them.
        with same_random_state(self._trainer.args.device):
            return function(outputs, labels, num_items_in_batch=num_items).mean()

    def _possible_scales(self, num_items_in_batch: Tensor | int | None) -> list[LossScale]:
        """By what the loss that the Trainer returns may be divided and multiplied."""
        trainer = self._trainer
        takes_count = trainer.model_accepts_loss_kwargs or trainer.compute_loss_func is not None
        if num_items_in_batch is None or not takes_count:
            return [LossScale(is_per_step=False)]
        factor = 1
        if trainer.args.average_tokens_across_devices:
            num_copies = trainer.accelerator.num_processes // trainer.get_tp_size()
            factor = trainer.args.n_gpu if trainer.args.n_gpu > 1 else num_copies
        # DataParallel takes the mean over replicas, which undoes the factor for sums. A model may ignore the count.
        per_step = LossScale(is_per_step=True, factor=1 if trainer.args.n_gpu > 1 else factor)
        smoother = trainer.label_smoother
        if smoother is not None and trainer.compute_loss_func is None:
            # It ignores the count in older transformers, 5.6 among them.
            uses_count = "num_items_in_batch" in signature(smoother.__call__).parameters
            return [per_step if uses_count else LossScale(is_per_step=False, factor=factor)]
        # Where batches fit both, as when one call repeats a micro-batch as often as a step has some, the mean counts.
        return [LossScale(is_per_step=False, factor=factor), per_step]
