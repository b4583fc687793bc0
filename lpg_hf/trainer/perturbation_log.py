"""PerturbationLog: what a training logs of its perturbations, and the norms that it keeps for the report."""

import json
from collections.abc import Mapping

import torch
from torch import Tensor


#: What is logged by default, of all that the perturbations measure.
DEFAULT_KEYS = ("lpg/weight", "lpg/delta_ratio", "lpg/tail_accuracy")


class PerturbationLog:
    """
    Adds the telemetry of one training to the logs of its losses.

    Args:
        logs_all (`bool`): Whether everything is logged, and not only `DEFAULT_KEYS` and what observers report.

    Attributes:
        norms (`list[dict[str, float]]`):
            The mean norms at each log so far, with its `step` and `epoch`, whether they were logged or not.
    """

    def __init__(self, logs_all: bool):
        self.norms: list[dict[str, float]] = []
        self._logs_all = logs_all
        # Of the next log.
        self._telemetry: dict[str, float] = {}
        self._observed: dict[str, float] = {}

    def prepare(self, telemetry: dict[str, float], observed: dict[str, float]) -> None:
        """
        Takes the entries of the next log.

        Args:
            telemetry (`dict[str, float]`): What the loss and the parameter methods have measured.
            observed (`dict[str, float]`): What the observers report, which is always logged.
        """
        self._telemetry, self._observed = telemetry, observed

    def take(self, step: int, epoch: float | None) -> dict[str, float]:
        """The prepared entries for the log of a loss; empty if there are none."""
        telemetry, self._telemetry = self._telemetry, {}
        observed, self._observed = self._observed, {}
        norms = {key: value for key, value in telemetry.items() if key.endswith("_norm")}
        if norms:
            self.norms.append({"step": step, "epoch": epoch or 0.0} | norms)
        if not self._logs_all:
            telemetry = {key: telemetry[key] for key in DEFAULT_KEYS if key in telemetry}
        return telemetry | observed

    def state_dict(self) -> dict[str, Tensor]:
        """The norms, as the bytes of a JSON text: a checkpoint holds only tensors."""
        text = json.dumps(self.norms).encode()
        # Saving a tensor leaves some KiB behind for each size that was not saved before: safetensors 0.8 views it by
        # `ctypes`, which keeps a type for every length. Spaces at the end leave few sizes.
        padded = text.ljust(1 << (len(text) - 1).bit_length())
        # A list of the bytes would take eight times their memory, and seconds after 50,000 logs.
        return {"norms": torch.frombuffer(bytearray(padded), dtype=torch.uint8)}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """
        Restores the norms of a checkpoint. One that was written without them has no tensors.

        Raises:
            ValueError: If the state is not one of [`~PerturbationLog.state_dict`].
        """
        if tensors:
            norms = json.loads(bytes(tensors["norms"].tolist()))
            is_log = isinstance(norms, list) and all(
                isinstance(line, dict) and {"step", "epoch"} <= line.keys() for line in norms
            )
            if not is_log or not all(isinstance(value, int | float) for line in norms for value in line.values()):
                raise ValueError("its norms are no list of numbers by step and epoch")
            self.norms = norms
