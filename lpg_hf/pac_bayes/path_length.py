"""`PathLength`: how far a training moves the weights, and how much of this way comes from the perturbations."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, DynamoBackend, reduce
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..perturbations.observers import PerturbationObserver


class PathLength(TrainerCallback, PerturbationObserver):
    r"""
    Logs how far [`LPGTrainer`] has moved the weights, which is the distance that a certificate pays for.

    With every loss it logs three lengths over the trained parameters, counted from the first step:

    - `lpg/displacement`: `||w_t - w_0||`. If `w_0` is the prior, the divergence of [`certify`] at noise sigma is the
      square of this length over `2 sigma^2`.
    - `lpg/path_length`: `sum_t ||w_{t+1} - w_t||`, at least the displacement.
    - `lpg/perturbation_path`: `sum_t eta_t ||b_t||`, with learning rate `eta_t` and `b_t = mean_i J_i^T delta_i`, the
      part of the parameters' gradient that comes from the perturbations at the logits.

    For SGD without momentum on a linear softmax model with `eta_t <= 2 / beta` (beta is half the largest squared norm
    of a sample's features), the perturbation path bounds the distance between the perturbed run and the plain run on
    the same batches. `sqrt(KL)` then grows by at most the perturbation path over `sqrt(2) sigma`. For deep networks
    the perturbation path measures how much the perturbations pulled, but it is not a bound. Momentum mu multiplies
    each step's share by up to `1 / (1 - mu)` if the learning rate does not rise. The steps of adaptive optimizers do
    not scale with the gradient, so the perturbation path can only be compared between runs. Perturbations of the
    parameters' gradient (SAM, clipping, noise) count in the path length, but not in the perturbation path.

    A measured step costs one extra vector-Jacobian product and a copy of the weights. `w_0` stays in memory, and in
    the checkpoints, so that a resumed run goes on measuring.

    Args:
        interval (`int`, *optional*, defaults to 10):
            Number of steps from one measured step to the next. A measured step counts `interval` times; 1 is exact.
        prior (`torch.nn.Module`, *optional*):
            Model that the displacement is measured from. Defaults to the weights at the first step.

    Raises:
        ValueError: If `interval` is below 1, or `prior` lacks a trained parameter of the model. The trainer raises it
            at its construction if it compiles the model or shards the parameters.

    Example:

    ```python
    >>> PathLength(interval=100).interval
    100

    ```
    """

    def __init__(self, interval: int = 10, prior: nn.Module | None = None):
        if interval < 1:
            raise ValueError(f"`interval` must be at least 1; found {interval}. Use 1 to measure every step.")
        self.interval = interval
        self.prior = prior
        self._reset()

    def _reset(self) -> None:
        self.is_due = False
        self._parameters: list[nn.Parameter] = []
        # Empty until the training begins.
        self._origin: list[Tensor] = []
        self._before: list[Tensor] = []
        self._perturbation: list[Tensor] = []
        # The path length and the perturbation path so far.
        self._lengths = torch.zeros(2)

    # Events of the Trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model: nn.Module = kwargs["model"]
        names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        device = self._parameters[0].device
        if not self._origin:
            origins = dict((model if self.prior is None else self.prior).named_parameters())
            for name, parameter in zip(names, self._parameters, strict=True):
                if name not in origins or origins[name].shape != parameter.shape:
                    raise ValueError(
                        f"`prior` has no parameter {name} of shape {list(parameter.shape)}. Pass a copy of the model "
                        "before its training."
                    )
            self._origin = [origins[name].detach().to(device, copy=True) for name in names]
        self._origin = [tensor.to(device) for tensor in self._origin]
        self._lengths = self._lengths.to(device, torch.promote_types(self._parameters[0].dtype, torch.float32))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.is_due = state.global_step % self.interval == 0
        if self.is_due:
            self._before = [parameter.detach().clone() for parameter in self._parameters]
            self._perturbation = [torch.zeros_like(parameter) for parameter in self._parameters]

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.is_due:
            rates = {id(p): group["lr"] for group in kwargs["optimizer"].param_groups for p in group["params"]}
            total = reduce(torch.cat([part.flatten() for part in self._perturbation]), "mean")
            parts = total.split([parameter.numel() for parameter in self._parameters])
            pairs = zip(self._parameters, parts, strict=True)
            # What the optimizer does not have does not move.
            moves = [rates.get(id(parameter), 0.0) * part for parameter, part in pairs]
            self._lengths[1] += self.interval * _norm(moves)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.is_due:
            self._lengths[0] += self.interval * _distance(self._parameters, self._before)
            self.is_due, self._before, self._perturbation = False, [], []

    # The protocol of an observer

    def start(self, accelerator: Accelerator) -> None:
        """
        Forgets earlier trainings.

        Args:
            accelerator (`accelerate.Accelerator`): The accelerator of the training.

        Raises:
            ValueError: If the training shards its parameters or compiles its model.
        """
        if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP):
            raise ValueError(
                f"PathLength needs whole parameters on every process, but {accelerator.distributed_type} shards them. "
                "Use DDP, or leave PathLength out."
            )
        # Set by `torch_compile`, or by `accelerate launch --dynamo_backend`.
        if accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
            raise ValueError(
                "PathLength takes two gradients of one forward pass, which a compiled model does not allow. Set "
                "`torch_compile=False`, or leave PathLength out."
            )
        self._reset()

    def add_perturbation(self, logits: Tensor, gradient: Tensor, loss_scale: float) -> None:
        """
        Adds the perturbation of a micro-batch to the perturbation of its step.

        Args:
            logits (`torch.Tensor` of shape `[N, C]`): Logits with their graph, which is retained.
            gradient (`torch.Tensor` of shape `[N, C]`): The sum of all deltas, divided as the loss is.
            loss_scale (`float`): Factor of a gradient scaler, which avoids underflow in half precision.
        """
        parts = torch.autograd.grad(
            logits, self._parameters, (loss_scale * gradient).to(logits.dtype), retain_graph=True, allow_unused=True
        )
        for total, part in zip(self._perturbation, parts, strict=True):
            if part is not None:
                total += part / loss_scale

    def report(self) -> dict[str, float]:
        """The three lengths so far."""
        path, perturbation = self._lengths.tolist()
        return {
            "lpg/displacement": _distance(self._parameters, self._origin).item(),
            "lpg/path_length": path,
            "lpg/perturbation_path": perturbation,
        }

    def state_dict(self) -> dict[str, Tensor]:
        """The lengths so far, and the weights that the displacement is measured from."""
        return {"lengths": self._lengths} | {f"origin.{i}": tensor for i, tensor in enumerate(self._origin)}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """
        Restores the state of a checkpoint.

        Raises:
            ValueError: If the checkpoint has no state of PathLength.
        """
        if not tensors:
            raise ValueError(
                "The checkpoint was written without PathLength, so the weights at the start of its training are "
                "unknown. Leave PathLength out, or start a new run from the checkpoint's model."
            )
        self._lengths = tensors["lengths"]
        self._origin = [tensors[f"origin.{i}"] for i in range(len(tensors) - 1)]


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    return get_total_norm([tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors])


def _distance(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    return _norm([a.detach() - b for a, b in zip(tensors, others, strict=True)])
