"""Random numbers that are drawn on the side, without a trace in what is drawn afterwards."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


CPU = torch.device("cpu")


@contextmanager
def same_random_state(device: torch.device = CPU) -> Iterator[None]:
    """
    Within it, random numbers of Python, NumPy and PyTorch may be drawn, and are drawn again afterwards.

    Args:
        device (`torch.device`, *optional*): A device of CUDA whose generator counts as well.

    Example:

    ```python
    >>> with same_random_state():
    ...     first = torch.rand(1)
    >>> bool(first == torch.rand(1))
    True

    ```
    """
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
