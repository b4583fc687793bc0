"""`PathLength`: how far a training has moved its weights, and which part of the way is the perturbation's own."""

from collections.abc import Mapping

import torch
from accelerate.utils import reduce
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from transformers import TrainerCallback


class PathLength(TrainerCallback):
    r"""
    Logs how far [`LPGTrainer`] has moved the weights, since that is what a certificate pays for.

    With every loss it logs three lengths over the trained parameters, from the first step on:

    - `lpg/displacement`: `||w_t - w_0||`; with noise sigma the divergence of [`certify`] is its square over
      `2 sigma^2`, if `w_0` is the prior;
    - `lpg/path_length`: `sum_t ||w_{t+1} - w_t||`, at least the displacement;
    - `lpg/perturbation_path`: `sum_t eta_t ||b_t||`, with learning rate `eta_t` and `b_t = mean_i J_i^T delta_i`, the
      part of the parameters' gradient that comes from the perturbations at the logits.

    For SGD without momentum on a linear softmax model with `eta_t <= 2 / beta` (beta being half the largest squared
    norm of a sample's features), the last one bounds how far the perturbed run gets away from the plain run on the
    same batches, so that `sqrt(KL)` grows by at most that length over `sqrt(2) sigma`. For deep networks it says
    how much the perturbations pulled, and bounds nothing. Momentum mu multiplies each step's share by up to
    `1 / (1 - mu)`, as long as the learning rate does not rise; adaptive optimizers take steps that do not scale with
    their gradient, so there `eta_t ||b_t||` is to be compared with that of other runs only. Perturbations of the
    parameters' gradient (SAM, clipping, noise) are in the path and not in the last length.

    A measured step costs one extra vector-Jacobian product and a copy of the weights; `w_0` is kept throughout, and in
    the checkpoints, so that a resumed run goes on measuring.

    Args:
        interval (`int`, *optional*, defaults to 10):
            Every how many steps the path is measured, each measured step standing for `interval` of them; 1 is exact.
        prior (`torch.nn.Module`, *optional*):
            Where the displacement is measured from; the weights at the first step when left out.

    Raises:
        ValueError: If `interval` is below 1, or `prior` has not the model's trained parameters; when the trainer is
            made, for a model that it compiles or whose parameters are sharded.

    Example:

    ```python
    >>> PathLength(interval=100).interval
    100

    ```
    """

    def __init__(self, interval: int = 10, prior: nn.Module | None = None):
        if interval < 1:
            raise ValueError(f"`interval` must be at least 1; found {interval}.")
        self.interval = interval
        self.prior = prior
        self.reset()

    def reset(self) -> None:
        """Forgets everything, as at the start of a training."""
        self.is_due = False
        self._parameters: list[nn.Parameter] = []
        self._origin: list[Tensor] | None = None
        self._before: list[Tensor] = []
        self._perturbation: list[Tensor] = []
        # Lengths so far: of the path, and of the perturbations' part.
        self._lengths = torch.zeros(2)

    # Events

    def on_train_begin(self, args, state, control, model, **kwargs):
        names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        device = self._parameters[0].device
        if self._origin is None:
            origin = model if self.prior is None else self.prior
            theirs = dict(origin.named_parameters())
            for name, parameter in zip(names, self._parameters, strict=True):
                if name not in theirs or theirs[name].shape != parameter.shape:
                    raise ValueError(f"`prior` has no parameter {name} of shape {list(parameter.shape)}.")
            self._origin = [theirs[name].detach().to(device, copy=True) for name in names]
        self._origin = [tensor.to(device) for tensor in self._origin]
        self._lengths = self._lengths.to(device, torch.promote_types(self._parameters[0].dtype, torch.float32))

    def on_step_begin(self, args, state, control, **kwargs):
        self.is_due = state.global_step % self.interval == 0
        if self.is_due:
            self._before = [parameter.detach().clone() for parameter in self._parameters]
            self._perturbation = [torch.zeros_like(parameter) for parameter in self._parameters]

    def on_pre_optimizer_step(self, args, state, control, optimizer, **kwargs):
        if self.is_due:
            rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
            total = reduce(torch.cat([part.flatten() for part in self._perturbation]), "mean")
            parts = total.split([parameter.numel() for parameter in self._parameters])
            pairs = zip(self._parameters, parts, strict=True)
            self._lengths[1] += self.interval * _norm([rates[id(parameter)] * part for parameter, part in pairs])

    def on_step_end(self, args, state, control, **kwargs):
        if self.is_due:
            self._lengths[0] += self.interval * _distance(self._parameters, self._before)
            self.is_due, self._before, self._perturbation = False, [], []

    # What the trainer calls

    def add_perturbation(self, logits: Tensor, gradient: Tensor, loss_scale: float) -> None:
        """
        Adds the perturbation of a micro-batch to that of its step.

        Args:
            logits (`torch.Tensor` of shape `[N, C]`): With their graph, which is kept.
            gradient (`torch.Tensor` of shape `[N, C]`): What was added to their gradient, divided as the loss is.
            loss_scale (`float`): Of a gradient scaler, so that nothing underflows in half precision.
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
        return {"lengths": self._lengths} | {f"origin.{i}": tensor for i, tensor in enumerate(self._origin)}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        if not tensors:
            raise ValueError(
                "The checkpoint was written without PathLength, so where its training began is not known. Leave the "
                "callback out, or start a new run from the checkpoint's model."
            )
        self._lengths = tensors["lengths"]
        self._origin = [tensors[f"origin.{i}"] for i in range(len(tensors) - 1)]


def _norm(tensors: list[Tensor]) -> Tensor:
    return get_total_norm([tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors])


def _distance(tensors: list[Tensor], others: list[Tensor]) -> Tensor:
    return _norm([a.detach() - b for a, b in zip(tensors, others, strict=True)])
