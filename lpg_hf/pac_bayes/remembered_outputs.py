"""Remembers what a module returned, and returns it again for as long as the inputs stay the same."""

import copy
from collections.abc import Mapping
from types import TracebackType

import torch
from torch import Tensor, nn


# Only values of these types are compared with `==`. Other objects may change without being replaced.
_PLAIN = (bool, int, float, str, bytes, type(None), type, torch.dtype, torch.device)


class RememberedOutputs:
    """
    Context in which a module runs only if its inputs differ from those of the pass before.

    A pass is one forward of the whole model, in which the module may run several times. The n-th run of a pass is
    compared with the n-th run of the pass before. Inputs are compared by value, so the noise of everything in front of
    the module (a prompt, an embedding, a projection) reaches it whatever way it takes.

    Args:
        module (`torch.nn.Module`): Its output must follow from its inputs.
    """

    def __init__(self, module: nn.Module):
        self._module = module
        self._forward = module.forward
        self._was_replaced = "forward" in vars(module)
        self._runs: list[tuple[_Snapshot, object]] = []
        self._position = 0

    def __enter__(self) -> "RememberedOutputs":
        self._module.forward = self._remembering_forward
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._was_replaced:
            self._module.forward = self._forward
        else:
            del self._module.forward

    def begin_pass(self) -> None:
        """Call it before each forward of the whole model."""
        self._position = 0

    def _remembering_forward(self, *args: object, **kwargs: object) -> object:
        position, self._position = self._position, self._position + 1
        if position == len(self._runs) or not self._runs[position][0].equals((args, kwargs)):
            inputs = _Snapshot((args, kwargs))
            self._runs[position:] = [(inputs, self._forward(*args, **kwargs))]
        # A copy, because later layers may work in place.
        return copy.deepcopy(self._runs[position][1])


class _Snapshot:
    """Inputs as they were when they were seen. No tensor is copied: PyTorch counts how often one was written to."""

    def __init__(self, inputs: object):
        self._inputs = _frozen(inputs)
        self._versions = [tensor._version for tensor in tensors_in(self._inputs)]

    def equals(self, inputs: object) -> bool:
        is_untouched = self._versions == [tensor._version for tensor in tensors_in(self._inputs)]
        return is_untouched and _equal(self._inputs, _frozen(inputs))


def _frozen(value: object) -> object:
    """Nested dictionaries, lists and tuples as tuples, since a caller may put other entries into the same list."""
    if not isinstance(value, Mapping | list | tuple):
        return value
    entries = value.items() if isinstance(value, Mapping) else value
    return (type(value), *map(_frozen, entries))


def tensors_in(value: object) -> list[Tensor]:
    """All tensors in nested dictionaries, lists and tuples."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [tensor for entry in value for tensor in tensors_in(entry)] if isinstance(value, list | tuple) else []


def _equal(first: object, second: object) -> bool:
    if type(first) is not type(second):
        return False
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        is_alike = (first.dtype, first.device) == (second.dtype, second.device)
        return first is second or (is_alike and torch.equal(first, second))
    if isinstance(first, tuple) and isinstance(second, tuple):
        return len(first) == len(second) and all(map(_equal, first, second))
    return isinstance(first, _PLAIN) and first == second
