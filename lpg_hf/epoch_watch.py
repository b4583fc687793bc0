"""When an epoch of a loss may have ended: the host counts rows, so that the device need not look at every step."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode


class EpochWatch:
    """
    Says at which steps an epoch may end.

    Only the device knows how many rows had a label that counts, so it decides whether an epoch has ended. Each row is
    one sample at most. The number of rows therefore says at which step the end may come at the earliest. Before that
    step nobody has to look. From then on the device looks, and the host asks how many samples were left after a look.
    It does not wait for the answer: the device looks at every step until it has arrived.

    In a CUDA graph, a compiled or a traced function the host does not see the steps, and the device always looks. A
    copy or a pickle knows nothing yet.
    """

    def __init__(self) -> None:
        # How many rows the epoch lacks at least, by the last answer; above 0 only where there was one.
        self._rows_left = 0
        self._rows_since_question = 0
        self._answer: Callable[[], int | None] | None = None
        # The sums whose steps are counted.
        self._sums: Tensor | None = None
        self._is_blind = False

    def __reduce__(self) -> tuple:
        return type(self), ()

    def forget(self) -> None:
        """Says that sums have changed otherwise than by steps of which the watch was told."""
        self._rows_left, self._rows_since_question, self._answer, self._sums = 0, 0, None, None

    def stop(self) -> None:
        """Says that from now on others may move the sums at any time: an epoch may end with every step."""
        # An answer that is on its way stays: its memory must not be freed during a capture.
        self._is_blind, self._sums = True, None

    def count_rows(self, sums: Tensor, num_rows: int) -> None:
        """
        Counts rows that a later step adds to the sums.

        Args:
            sums (`torch.Tensor`): The sums of the epoch.
            num_rows (`int`): The rows, ignored ones included.
        """
        if torch.compiler.is_compiling():
            self.forget()
        elif _may_be_replayed(sums):
            self.stop()
        else:
            self._rows_left -= num_rows
            self._rows_since_question += num_rows

    def count_step(self, sums: Tensor, is_seen: bool) -> bool:
        """
        Counts a step, and returns whether an epoch may end with it.

        Args:
            sums (`torch.Tensor`): The sums of the epoch, which this step has moved. Others than before begin anew.
            is_seen (`bool`): Whether the host sees every step.
        """
        if not is_seen or torch.compiler.is_compiling():
            self.forget()
            return True
        if self._is_blind or _may_be_replayed(sums):
            self.stop()
            return True
        if sums is not self._sums:
            self.forget()
            self._sums = sums
        samples_left = None if self._answer is None else self._answer()
        if samples_left is not None:
            self._answer = None
            self._rows_left = samples_left - self._rows_since_question
        return self._rows_left <= 0

    def ask(self, samples_left: Callable[[], Tensor]) -> None:
        """
        Asks after a look how many samples the epoch lacks.

        Args:
            samples_left (`Callable`): Returns them, a scalar of the device.
        """
        if self._sums is not None and self._answer is None:
            self._rows_since_question = 0
            self._answer = read_later(samples_left())


def _may_be_replayed(sums: Tensor) -> bool:
    """Whether the caller captures or traces a graph, whose replays do not pass here."""
    return get_proxy_mode() is not None or (sums.is_cuda and torch.cuda.is_current_stream_capturing())


def read_later(value: Tensor) -> Callable[[], int | None]:
    """
    Reads a number from the device without waiting for it.

    Args:
        value (`torch.Tensor`): A scalar.

    Returns:
        `Callable`: Returns the number, or `None` as long as it has not arrived. Other devices than CPU and CUDA never
        answer.
    """
    if value.device.type == "cpu":
        number = int(value)
        return lambda: number
    if value.device.type != "cuda":
        return lambda: None
    place = torch.empty_like(value, device="cpu", pin_memory=True).copy_(value, non_blocking=True)
    arrival = torch.cuda.Event()
    arrival.record(torch.cuda.current_stream(value.device))
    return lambda: int(place) if arrival.query() else None
