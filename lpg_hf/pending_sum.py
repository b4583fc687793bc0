"""Sums over processes that travel while the model computes."""

import torch
from accelerate import Accelerator
from torch import Tensor

from .perturbations.processes import is_distributed


class PendingSum:
    """
    The sum of a tensor over all processes: on its way from now on, waited for where it is needed.

    A collective: every process must make it at the same place. The tensor may change afterwards, the sum will not.

    Args:
        tensor (`torch.Tensor`): What this process adds, of the same shape everywhere.
        accelerator (`accelerate.Accelerator`): Of the training.

    Example:

    ```python
    >>> pending = PendingSum(torch.tensor([3, 1]), Accelerator(cpu=True))
    >>> pending.wait()  # one process
    tensor([3, 1])

    ```
    """

    def __init__(self, tensor: Tensor, accelerator: Accelerator):
        self._work = None
        if accelerator.num_processes > 1 and is_distributed():
            self._sum = tensor.clone()
            self._work = torch.distributed.all_reduce(self._sum, async_op=True)
        else:  # one process, or a backend whose collectives are part of its graph
            self._sum = accelerator.reduce(tensor, "sum")

    def wait(self) -> Tensor:
        """The sum, once it is there."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self._sum
