"""Tensors that modules keep beside their parameters: in buffers, and in whatever their attributes hold."""

import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase


def kept_tensors(module: nn.Module) -> list[Tensor]:
    """
    Floating-point and complex tensors of a module itself that are no parameters, those of BatchNorm left out.

    Containers, objects, and the variables that functions have enclosed are looked through. Other modules are not.

    Args:
        module (`torch.nn.Module`): Its children are not looked at.

    Returns:
        `list[torch.Tensor]`: The tensors, each one once.

    Example:

    ```python
    >>> layer = nn.Linear(2, 2)
    >>> layer.cache = {"weight": torch.ones(3)}
    >>> kept_tensors(layer)
    [tensor([1., 1., 1.])]

    ```
    """
    if isinstance(module, _NormBase):
        return []
    waiting: list[object] = [value for name, value in vars(module).items() if name not in ("_parameters", "_modules")]
    seen: dict[int, object] = {}
    found = []
    while waiting:
        value = waiting.pop()
        if id(value) in seen or isinstance(value, nn.Module | type | types.ModuleType):
            continue
        seen[id(value)] = value  # for as long as it is alive, no other object has its id
        if isinstance(value, Tensor):
            found.append(value)
        else:
            waiting += _contents(value)
    return [
        tensor
        for tensor in found
        if (tensor.is_floating_point() or tensor.is_complex())
        and tensor.numel() > 0
        and not isinstance(tensor, nn.Parameter)
    ]


def _contents(value: object) -> list[object]:
    if isinstance(value, str | bytes | int | float | None):
        return []
    if isinstance(value, Mapping):
        return [*value.values(), *(vars(value).values() if hasattr(value, "__dict__") else ())]
    if isinstance(value, list | tuple | set | frozenset):
        return list(value)
    if isinstance(value, types.MethodType):
        return [value.__self__, value.__func__]
    contents = list(vars(value).values()) if hasattr(value, "__dict__") else []
    if isinstance(value, types.FunctionType):
        contents += [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
    return contents


def _is_filled(cell: types.CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


@contextmanager
def kept_as_before(model: nn.Module) -> Iterator[None]:
    """
    Context in which modules may move what they keep, such as running statistics. Afterwards it is as before.

    Args:
        model (`torch.nn.Module`): Its modules get their attributes, buffers, and the values of both back.
    """
    attributes = [(module, dict(vars(module)), dict(module._buffers)) for module in model.modules()]
    tensors = [*model.buffers(), *(tensor for module in model.modules() for tensor in kept_tensors(module))]
    values = [(tensor, tensor.detach().clone()) for tensor in tensors if can_be_written(tensor)]
    try:
        yield
    finally:
        for module, own, own_buffers in attributes:
            vars(module).clear()
            vars(module).update(own)
            module._buffers.clear()
            module._buffers.update(own_buffers)
        with torch.no_grad():
            for tensor, value in values:
                tensor.copy_(value)


def can_be_written(tensor: Tensor) -> bool:
    """Whether a tensor has one place for each entry, unlike an expanded one, and is not one of the inference mode."""
    return not tensor.is_inference() and 0 not in tensor.stride()
