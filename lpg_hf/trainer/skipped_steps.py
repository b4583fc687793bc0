"""SkippedSteps: what is said of steps whose gradient was not finite."""

from typing import cast

import torch
from accelerate.logging import get_logger
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import Trainer

from ..distributed import stack_processes


logger = get_logger(__name__)

# A scaler begins far above 1 and goes down as gradients overflow. Below it, they do so at their own size.
SMALLEST_SCALE = 1.0


class SkippedSteps:
    """
    Tells steps that did no harm from those that destroyed the weights.

    A gradient scaler skips steps whose gradient is not finite, and so do some optimizers. There is one warning of such
    steps. Under a scaler it waits for the end of the training, because a scaler skips steps by design.

    Args:
        trainer ([`~transformers.Trainer`]): Its model and accelerator are looked at.
    """

    def __init__(self, trainer: Trainer):
        self._trainer = trainer
        # What was wrong in the first of them.
        self._message = ""
        self._has_warned = self._has_warned_of_scale = False

    def add(self, error: FloatingPointError) -> None:
        """
        Notes that values were not finite. All processes must call it.

        Args:
            error (`FloatingPointError`): What [`Telemetry.read`] raised, on all processes alike.

        Raises:
            FloatingPointError: The same error, if the weights are not finite.
        """
        if not self._weights_are_finite():
            raise error
        self._message = self._message or str(error)

    def warn(self, is_last: bool) -> None:
        """
        Warns if there were skipped steps, and it is time to say so; also if a scaler had to go below 1.

        Args:
            is_last (`bool`): Whether the training ends.
        """
        scaler = self._trainer.accelerator.scaler
        if scaler is not None and not self._has_warned_of_scale and scaler.get_scale() < SMALLEST_SCALE:
            self._has_warned_of_scale = True
            logger.warning(
                f"The gradient scaler went down to {scaler.get_scale():g}, because gradients are too large for "
                "float16, and it skips the steps in which they are. A class that is very rare may have a very large "
                "weight. Bound the weights, add `logit_clipping`, or train in bfloat16."
            )
        if self._message and not self._has_warned and (is_last or self._trainer.accelerator.scaler is None):
            self._has_warned = True
            logger.warning(
                f"{self._message} The weights are finite, so the optimizer or the gradient scaler skipped the step. "
                "Training goes on, and the class statistics leave such values out."
            )

    def _weights_are_finite(self) -> bool:
        model = cast(nn.Module, self._trainer.model)
        tensors = [parameter.detach() for parameter in model.parameters()]
        local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
        is_finite = torch.stack([tensor.isfinite().all().to(self._trainer.args.device) for tensor in local]).all()
        return bool(stack_processes(is_finite, accelerator=self._trainer.accelerator).all())
