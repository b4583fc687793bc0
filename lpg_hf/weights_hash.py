"""A hash of a model's weights, by which a certificate is tied to them."""

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


def weights_hash(model: nn.Module) -> str:
    """
    Hash of all parameters and of the buffers that a checkpoint holds, bit for bit.

    Names do not count, so that a wrapper around a model does not change its hash. The order, the shapes and the dtypes
    do.

    Args:
        model (`torch.nn.Module`): On any device. It is not modified.

    Returns:
        `str`: 32 hexadecimal digits.

    Example:

    ```python
    >>> layer = nn.Linear(2, 3)
    >>> weights_hash(layer) == weights_hash(nn.Sequential(layer))
    True
    >>> before = weights_hash(layer)
    >>> _ = nn.init.zeros_(layer.bias)
    >>> weights_hash(layer) == before
    False

    ```
    """
    digest = hashlib.blake2b(digest_size=16)
    for tensor in _checkpoint_tensors(model):
        digest.update(f"{tensor.dtype}{list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _checkpoint_tensors(model: nn.Module) -> Iterator[Tensor]:
    # Not by `state_dict`, for which all processes of a sharded model would have to meet.
    yield from model.parameters()
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield buffer
