"""CUDA graphs of a loss: after a few calls with the same shapes, the host launches one graph, not 80 kernels."""

import logging
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .perturbations import LPG, METHODS, LogitNoise, LogitPerturbation


logger = logging.getLogger(__name__)

#: Calls with the same shapes that run as they are before a graph is captured.
WARMUP_CALLS = 3
#: Graphs of one loss, for so many shapes. Calls with others run as they are.
MAX_GRAPHS = 4
#: Entries of the largest tensor that a graph takes. For larger ones the device, not the host, takes the time, and the
#: memory that a graph keeps (about three of them) is missed.
MAX_ENTRIES = 2**22

#: Takes tensors and returns tensors of one dtype. What else it changes are the tensors of the state, in place.
Step = Callable[..., Sequence[Tensor]]


class LossGraphs:
    """
    Runs functions that only launch kernels and change the state of a module, and replays them as CUDA graphs.

    A graph holds addresses and the numbers that Python passed to kernels. It is dropped when one of both has changed:
    when tensors of the state have moved, or when somebody has set an attribute of a method. What it cannot hold runs
    as it is: everything on a CPU, while compiling or while the caller captures a graph of its own, in a replica of
    DataParallel, and methods that draw or count on the host or talk to other processes.

    Args:
        is_enabled (`bool`, *optional*, defaults to `False`):
            Whether graphs are used; also an attribute. Off until they have run on a card: so far their tests record
            the calls on a CPU. A capture that failed sets it to `False`, and a line is logged. The same happens where
            the first replay of a graph gives other numbers than the function.
    """

    def __init__(self, is_enabled: bool = False) -> None:
        self.is_enabled = is_enabled
        self._owner: weakref.ref | None = None
        self._forget()

    def __reduce__(self) -> tuple:
        # A copy of the loss captures graphs of its own.
        return type(self), (self.is_enabled,)

    def _forget(self) -> None:
        self._state: list[Tensor] = []
        self._numbers: list[object] = []
        self._num_calls: dict[tuple, int] = {}
        self._captured: dict[tuple, CapturedStep] = {}
        self._pool: Any = None

    def __len__(self) -> int:
        return len(self._captured)

    def run(
        self,
        owner: nn.Module,
        step: Step,
        inputs: Sequence[Tensor],
        parts: Sequence[nn.Module],
        device: torch.device,
        rule: object = None,
    ) -> Sequence[Tensor]:
        """
        Calls a function, or replays it.

        Args:
            owner (`torch.nn.Module`): Whose function it is. A replica of it shares this object and must not use it.
            step (`Callable`): The function, the same object or a bound method at each call.
            inputs (`Sequence[torch.Tensor]`): Its arguments.
            parts (`Sequence[torch.nn.Module]`): The modules whose buffers are the state.
            device (`torch.device`): Where all of it is.
            rule (*optional*): What else decides which kernels run.

        Returns:
            `Sequence[torch.Tensor]`: What the function returned, in memory that no later call changes.
        """
        if torch.compiler.is_compiling() or device.type != CapturedStep.device_type or not self.is_enabled:
            return step(*inputs)
        self._owner = weakref.ref(owner) if self._owner is None else self._owner
        state = [buffer for part in parts for buffer in part._buffers.values() if buffer is not None]
        is_owner = self._owner() is owner
        if not is_owner or not all(map(_can_hold, parts)) or not _is_capturable([*inputs, *state], device):
            return step(*inputs)
        numbers = [rule, *map(_numbers_of, parts)]
        is_same = len(state) == len(self._state) and all(map(_is, state, self._state))
        if not is_same or numbers != self._numbers:
            self._forget()
            self._state, self._numbers = state, numbers
        key = (step, *((tensor.shape, tensor.dtype) for tensor in inputs), *_mode())
        captured = self._captured.get(key)
        if captured is None:
            self._num_calls[key] = self._num_calls.get(key, 0) + 1
            if self._num_calls[key] <= WARMUP_CALLS or len(self._captured) >= MAX_GRAPHS:
                return step(*inputs)
            try:
                captured = self._captured[key] = self._capture(step, inputs)
            except Exception as error:
                self.is_enabled = False
                self._forget()
                logger.warning(f"The loss runs without CUDA graphs, which takes longer: {error}")
                return step(*inputs)
        return captured.replay(inputs)

    def _capture(self, step: Step, inputs: Sequence[Tensor]) -> "CapturedStep":
        """A graph of the function, whose first replay was compared with the function. None of these calls counts."""
        before = [tensor.clone() for tensor in self._state]

        def restore() -> None:
            for tensor, value in zip(self._state, before, strict=True):
                tensor.copy_(value)

        self._pool = CapturedStep.new_pool() if self._pool is None else self._pool
        try:
            captured = CapturedStep(step, inputs, self._pool)
            restore()
            expected = [*step(*inputs), *(tensor.clone() for tensor in self._state)]
            restore()
            found = [*captured.replay(inputs), *self._state]
            is_same = all(map(_is_close, found, expected))
        finally:
            restore()
        if not is_same:
            raise RuntimeError("its first replay gives other numbers than the loss itself")
        return captured


class CapturedStep:
    """A function as a CUDA graph, with the places of its arguments and results."""

    device_type = "cuda"

    @staticmethod
    def is_possible(device: torch.device) -> bool:
        """Whether the present thread may capture and replay on a device, and does not capture already."""
        return device.index == torch.cuda.current_device() and not torch.cuda.is_current_stream_capturing()

    @staticmethod
    def new_pool() -> Any:
        """Memory that graphs may share if their results are copied at once."""
        return torch.cuda.graph_pool_handle()

    def __init__(self, step: Step, inputs: Sequence[Tensor], pool: Any):
        self._inputs = [tensor.clone() for tensor in inputs]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step(*self._inputs)  # libraries set themselves up in their first call
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        # Other threads may go on: loaders pin memory, and NCCL looks after its work.
        with torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            self._output, self._shapes = _pack(step(*self._inputs))

    def replay(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        for place, tensor in zip(self._inputs, inputs, strict=True):
            place.copy_(tensor)
        self._graph.replay()
        # The next replay writes to the same place, and gradients live until the backward pass.
        return [] if self._output is None else _unpack(self._output.clone(), self._shapes)


def _pack(tensors: Sequence[Tensor]) -> tuple[Tensor | None, list[torch.Size]]:
    """Some tensors in one, so that a single copy takes them all."""
    shapes = [tensor.shape for tensor in tensors]
    return (torch.cat([tensor.reshape(-1) for tensor in tensors]) if tensors else None), shapes


def _unpack(packed: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    pieces = packed.split([shape.numel() for shape in shapes])
    return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]


def _is_capturable(tensors: Sequence[Tensor], device: torch.device) -> bool:
    # A subclass stands for something else: shards, or values that nobody knows.
    is_plain = all(type(tensor) is Tensor and tensor.device == device for tensor in tensors)
    is_small = max(tensor.numel() for tensor in tensors) <= MAX_ENTRIES
    return is_plain and is_small and CapturedStep.is_possible(device)


def _can_hold(part: nn.Module) -> bool:
    if not isinstance(part, LogitPerturbation):
        return True
    # What others wrote may do anything on the host, which a replay would leave out.
    is_ours = METHODS.get(part.name) is type(part)
    return is_ours and not isinstance(part, LogitNoise) and not (isinstance(part, LPG) and part.sync)


def _numbers_of(part: nn.Module) -> dict[str, object]:
    """The attributes of a module that are no tensors: what a graph holds as numbers. Other objects have theirs."""
    return {
        name: value if isinstance(value, int | float | str) else id(value)
        for name, value in vars(part).items()
        if not name.startswith("_") and not isinstance(value, Tensor | nn.Module)
    }


def _mode() -> tuple:
    """What decides beside the arguments which kernels run."""
    is_autocast = torch.is_autocast_enabled("cuda")
    return (
        torch.get_autocast_dtype("cuda") if is_autocast else None,
        torch.are_deterministic_algorithms_enabled(),
    )


def _is_close(found: Tensor, expected: Tensor) -> bool:
    # Sums in any order differ by their rounding.
    return torch.allclose(found, expected, rtol=1e-3, atol=1e-6, equal_nan=True)


def _is(first: object, second: object) -> bool:
    return first is second
