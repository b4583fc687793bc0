"""Reductions over the processes of a training."""

import torch
from accelerate import Accelerator
from torch import Tensor

from .perturbations.processes import is_distributed


class AsyncAllReduce:
    """
    Sums a tensor over all processes while the model computes.

    The all-reduce starts at construction and is waited for where the sum is needed. It is a collective, so every
    process must construct it at the same place. The tensor may be changed afterwards without changing the sum.

    Args:
        tensor (`torch.Tensor`): The summand of this process, of the same shape on every process.
        accelerator (`accelerate.Accelerator`): The accelerator of the training.

    Example:

    ```python
    >>> total = AsyncAllReduce(torch.tensor([3, 1]), Accelerator(cpu=True))
    >>> total.wait()  # one process
    tensor([3, 1])

    ```
    """

    def __init__(self, tensor: Tensor, accelerator: Accelerator):
        self._work: torch.distributed.Work | None = None
        self._sum: Tensor
        if accelerator.num_processes > 1 and is_distributed():
            self._sum = tensor.clone()
            self._work = torch.distributed.all_reduce(self._sum, async_op=True)
        else:  # one process, or a backend whose collectives are part of its graph
            self._sum = accelerator.reduce(tensor, "sum")

    def wait(self) -> Tensor:
        """Returns the sum, and waits for it if it has not arrived yet."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self._sum


def stack_processes(tensor: Tensor, accelerator: Accelerator) -> Tensor:
    """Stacks a tensor of every process along a new leading axis. All processes must call it."""
    return accelerator.gather(tensor[None])
