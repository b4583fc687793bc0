"""ParameterMethods: the methods of a chain that perturb the gradient of the parameters, and their telemetry."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator, DistributedType
from accelerate.logging import get_logger
from torch import Tensor, nn
from transformers import TrainingArguments

from ..perturbations import SAM, GradientPerturbation, ParameterPerturbation, Perturbation
from ..telemetry import unique_names


logger = get_logger(__name__)


def gradient_scale(accelerator: Accelerator) -> float:
    """The factor by which a gradient scaler multiplies the gradients (fp16), else 1."""
    return 1.0 if accelerator.scaler is None else accelerator.scaler.get_scale()


class ParameterMethods(nn.ModuleList):
    """
    The parameter methods of a chain: SAM acts first, the others follow in the order of the chain.

    The methods are copies, so that counters and histories start anew with every training.

    Args:
        chain (`Iterable[Perturbation]`): The whole chain. Methods at the logits are left out.
        accelerator (`accelerate.Accelerator`): The accelerator of the training.
        args ([`~transformers.TrainingArguments`]): The arguments of the training.

    Attributes:
        is_ascending (`bool`): Whether SAM's first pass is under way.

    Raises:
        ValueError: If the model is sharded, if there is more than one SAM, or for SAM with reentrant checkpointing.
    """

    def __init__(self, chain: Iterable[Perturbation], accelerator: Accelerator, args: TrainingArguments):
        super().__init__([copy.deepcopy(method) for method in chain if isinstance(method, ParameterPerturbation)])
        self.is_ascending = False
        self._has_warned = False
        self._sams = [method for method in self if isinstance(method, SAM)]
        self._gradient_methods = [method for method in self if isinstance(method, GradientPerturbation)]
        self._accelerator = accelerator
        self._check(args)
        # For each method since the last log: the number of measured deltas, and the sum of their norms.
        self._norms = torch.zeros(len(self), 2, device=args.device)

    def _check(self, args: TrainingArguments) -> None:
        distributed_type = self._accelerator.distributed_type
        if len(self) > 0 and distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP):
            raise ValueError(
                f"{', '.join(map(repr, self))} needs whole gradients and parameters on every process, but "
                f"{distributed_type} shards them. Use DDP, or methods at the logits."
            )
        if len(self._sams) > 1:
            raise ValueError(f"`perturbations` has more than one SAM: {self._sams}. Keep one.")
        # transformers 5.23 renames the argument. The old name stays until version 6.
        for name in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
            if self._sams and (getattr(args, name, None) or {}).get("use_reentrant"):
                raise ValueError(
                    "SAM takes gradients with `torch.autograd.grad`, which reentrant checkpointing does not support; "
                    f"found `{name}` with use_reentrant=True. Set it to False."
                )

    @property
    def methods(self) -> list[ParameterPerturbation]:
        """The methods in the order of the chain."""
        return [method for method in self if isinstance(method, ParameterPerturbation)]

    def sam(self, step: int) -> SAM | None:
        """The chain's SAM, if there is one and it acts in an optimizer step."""
        return self._sams[0] if self._sams and step % self._sams[0].interval == 0 else None

    @contextmanager
    def ascending(self) -> Iterator[None]:
        """Marks SAM's first pass."""
        self.is_ascending = True
        try:
            yield
        finally:
            self.is_ascending = False

    def warn_without_sam(self, trainer_class: type) -> None:
        """Warns once that SAM cannot act, as the `training_step` of a trainer does not call LPGTrainer's."""
        if self._sams and not self._has_warned:
            self._has_warned = True
            logger.warning(
                f"{self._sams[0]!r} does not act: `{trainer_class.__name__}.training_step` does not call "
                "LPGTrainer's, which makes SAM's two passes. Call `super().training_step(model, inputs, "
                "num_items_in_batch)` in it, or leave SAM out of `perturbations`."
            )

    def perturb_(self, model: nn.Module) -> None:
        """Perturbs the finished gradients of an optimizer step in place."""
        if not self._gradient_methods:  # most chains: listing the parameters takes longer than this
            return
        parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
        for method in self._gradient_methods:
            self.record(method, method.perturb_(parameters, gradient_scale(self._accelerator)))

    def record(self, method: ParameterPerturbation, norm: Tensor) -> None:
        """Adds the norm of a delta, a scalar, to the telemetry."""
        row = self._norms[list(self).index(method)]
        row += torch.stack([torch.ones_like(norm), norm])

    def telemetry(self) -> dict[str, float]:
        """The mean norm of the deltas of each method since the last call."""
        rows = zip(unique_names(self.methods), self._norms.tolist(), strict=True)
        report = {f"lpg/{name}/delta_norm": norm / count for name, (count, norm) in rows if count > 0}
        self._norms.zero_()
        return report
