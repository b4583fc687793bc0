"""What `torch_compile` means for what is kept of a compiled model."""

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend
from torch import Tensor


def is_compiled(accelerator: Accelerator) -> bool:
    """Whether models are compiled, by `torch_compile` or by `accelerate launch --dynamo_backend`."""
    return accelerator.state.dynamo_plugin.backend != DynamoBackend.NO


def replays_graphs(accelerator: Accelerator) -> bool:
    """Whether compiled models are CUDA graphs, whose outputs and gradients the next run of the model overwrites."""
    dynamo = accelerator.state.dynamo_plugin
    is_inductor = dynamo.backend == DynamoBackend.INDUCTOR and dynamo.mode in ("reduce-overhead", "max-autotune")
    return is_inductor or dynamo.backend == DynamoBackend.CUDAGRAPHS


def begin_model_step(accelerator: Accelerator) -> None:
    """Says that nothing of the runs of a model before is needed any more."""
    if replays_graphs(accelerator):
        torch.compiler.cudagraph_mark_step_begin()


def kept(tensors: Sequence[Tensor | None], accelerator: Accelerator) -> list[Tensor | None]:
    """Tensors that a model returned, in memory that its next run leaves alone."""
    if not replays_graphs(accelerator):
        return list(tensors)
    return [None if tensor is None else tensor.clone() for tensor in tensors]
