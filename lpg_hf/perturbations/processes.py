"""The other processes, as far as methods need them."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..batch import IGNORE_INDEX


def is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def process_index() -> int:
    return torch.distributed.get_rank() if is_distributed() else 0


def gather_samples(gradient: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, slice]:
    """
    The samples of all processes' micro-batches, in the same order everywhere.

    Micro-batches may differ in size; the shorter ones are filled up with ignored samples. Costs three collectives, one
    synchronization with the host, and P N (C + 1) numbers for P processes.

    Args:
        gradient (`torch.Tensor` of shape `[N, C]`): Of this process's samples.
        labels (`torch.Tensor` of shape `[N]`): Their class indices, -100 for ignored samples.

    Returns:
        `tuple[torch.Tensor, torch.Tensor, slice]`: All gradients, all labels, and where this process's rows are.
    """
    num_processes, size = torch.distributed.get_world_size(), len(labels)
    sizes = _all_gather(torch.tensor([size], device=labels.device), num_processes)
    largest = int(torch.cat(sizes).max())
    gradients = _all_gather(F.pad(gradient, (0, 0, 0, largest - size)), num_processes)
    all_labels = _all_gather(F.pad(labels, (0, largest - size), value=IGNORE_INDEX), num_processes)
    start = process_index() * largest
    return torch.cat(gradients), torch.cat(all_labels), slice(start, start + size)


def _all_gather(tensor: Tensor, num_processes: int) -> list[Tensor]:
    gathered = [torch.empty_like(tensor) for _ in range(num_processes)]
    torch.distributed.all_gather(gathered, tensor.contiguous())
    return gathered
