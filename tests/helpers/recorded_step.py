"""What a CUDA graph does, on the CPU: a call is recorded, and replayed at the same addresses with the same numbers."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lpg_hf import loss_graphs


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not function.is_view:
            self.operations.append((function, args, kwargs or {}, result))
        return result


class RecordedStep(loss_graphs.CapturedStep):
    """Takes the place of `CapturedStep`. It knows what was recorded, replayed, and where it must fail."""

    device_type = "cpu"
    possible = True
    fails = False
    # What a replay does wrong: it adds something to its results, or does nothing at all.
    error = 0.0
    is_empty = False
    num_captured = num_replays = 0

    @classmethod
    def reset(cls):
        cls.possible, cls.fails, cls.error, cls.is_empty = True, False, 0.0, False
        cls.num_captured = cls.num_replays = 0

    @staticmethod
    def is_possible(device):
        return RecordedStep.possible

    @staticmethod
    def new_pool():
        return object()

    def __init__(self, step, inputs, pool):
        self._inputs = [tensor.clone() for tensor in inputs]
        with torch.no_grad(), Recorder() as recorder:
            self._output, self._shapes = loss_graphs._pack(step(*self._inputs))
        if RecordedStep.fails:
            raise RuntimeError("no memory for a graph")
        self._operations = recorder.operations
        self._graph = self
        RecordedStep.num_captured += 1

    @torch.no_grad()
    def replay(self, *inputs):
        if inputs:
            RecordedStep.num_replays += 1
            return super().replay(*inputs)
        for function, args, kwargs, result in [] if RecordedStep.is_empty else self._operations:
            again = function(*args, **kwargs)
            for place, tensor in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(place, torch.Tensor) and place.data_ptr() != tensor.data_ptr():
                    place.copy_(tensor)
        if self._output is not None:
            self._output += RecordedStep.error
        return None
