"""SAMStepMixin: LPGTrainer's own training step, which is two passes over one micro-batch under SAM."""

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from ..perturbations import SAM
from .accumulation import loss_divisor
from .compilation import begin_model_step, kept
from .parameter_methods import ParameterMethods, gradient_scale
from .step_watch import StepWatchMixin


class SAMStepMixin(StepWatchMixin):
    """Adds SAM's second pass to the training step of a [`~transformers.Trainer`]."""

    _lpg_parameter_methods: ParameterMethods

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor | Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Trains on a micro-batch. Under SAM, the second pass makes the gradient, and the first the returned loss."""
        watch = self._lpg_step_watch
        if not watch.is_running:  # called by hand
            own = partial(SAMStepMixin.training_step, self)
            return self._lpg_watched_step(own, model, inputs, num_items_in_batch)
        watch.was_own, watch.divisor = True, loss_divisor(self, num_items_in_batch)
        try:
            sam = self._lpg_parameter_methods.sam(self.state.global_step)
            if sam is None:
                return super().training_step(model, inputs, num_items_in_batch)
            return self._lpg_sam_step(sam, model, inputs, num_items_in_batch)
        finally:
            watch.divisor = None

    def _lpg_sam_step(
        self, sam: SAM, model: nn.Module, inputs: dict[str, Tensor | Any], num_items_in_batch: Tensor | int | None
    ) -> Tensor:
        methods = self._lpg_parameter_methods
        loss, parameters, gradients = self._lpg_first_pass(model, inputs, num_items_in_batch)
        with sam.shifted(cast(nn.Module, self.model), parameters, gradients):
            begin_model_step(self.accelerator)
            super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.num_processes == 1 and self.args.gradient_accumulation_steps == 1:
            # Elsewhere this process lacks a part of the second gradient, and to get it would cost a reduction.
            methods.record(sam, _delta_norm(parameters, gradients) / gradient_scale(self.accelerator))
        return loss / loss_divisor(self, num_items_in_batch)

    def _lpg_first_pass(
        self, model: nn.Module, inputs: dict[str, Tensor | Any], num_items_in_batch: Tensor | int | None
    ) -> tuple[Tensor, list[nn.Parameter], list[Tensor | None]]:
        """Returns the loss, the parameters that train, and their gradients (`None` for unused parameters)."""
        model.train()
        # Schedule-free optimizers swap the weights here, which must not happen while the weights are shifted.
        switch_to_training = getattr(self.optimizer, "train", None)
        if callable(switch_to_training):
            switch_to_training()
        with (
            self.accelerator.no_sync(model),
            self.compute_loss_context_manager(),
            self._lpg_parameter_methods.ascending(),
        ):
            outcome = self.compute_loss(model, self._prepare_inputs(inputs), num_items_in_batch=num_items_in_batch)
        loss = cast(Tensor, outcome).mean()
        all_parameters = cast(nn.Module, self.model).parameters()
        parameters = [parameter for parameter in all_parameters if parameter.requires_grad]
        # SAM needs only the direction, but under fp16 the unscaled gradient would underflow.
        scaled = loss * gradient_scale(self.accelerator)
        gradients = torch.autograd.grad(scaled, parameters, allow_unused=True)
        # The second pass runs the model again.
        kept_loss, *kept_gradients = kept([loss.detach(), *gradients], self.accelerator)
        return cast(Tensor, kept_loss), parameters, kept_gradients


def _delta_norm(parameters: list[nn.Parameter], gradients: list[Tensor | None]) -> Tensor:
    """The norm of the difference between the gradients of both passes."""
    # A pass may leave a parameter out, as layer drop does.
    deltas: list[Tensor] = []
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if parameter.grad is not None:
            deltas.append(parameter.grad if gradient is None else parameter.grad - gradient)
        elif gradient is not None:
            deltas.append(gradient)
    return get_total_norm(deltas)
