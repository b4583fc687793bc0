"""What a checkpoint holds of the perturbations, when a checkpoint is complete, and what it fits."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from accelerate.logging import get_logger
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..perturbations import Perturbation


logger = get_logger(__name__)

STATE_FILE = "lpg_state.safetensors"
ROWS_FILE = "lpg_rows.safetensors"


class Stateful(Protocol):
    """A part of a training that has state: a module, or an observer of the perturbations."""

    def state_dict(self) -> Mapping[str, Tensor]: ...

    def load_state_dict(self, tensors: Mapping[str, Tensor], /) -> object: ...


def save_state(
    folder: str | Path,
    parts: Mapping[str, Stateful],
    chains: Mapping[str, Sequence[Perturbation]],
    requested: Mapping[str, Sequence[str]],
    num_processes: int,
) -> None:
    """
    Writes the state of the perturbations into a checkpoint, as one safetensors file.

    Args:
        folder (`str` or `Path`): The folder of the checkpoint.
        parts (`Mapping[str, Stateful]`): The parts of the training by the prefix of their state.
        chains (`Mapping[str, Sequence[Perturbation]]`):
            The methods of a part under the same prefix. A resumed run must have the same ones.
        requested (`Mapping[str, Sequence[str]]`):
            What the user asked for, under the same prefix, where `"auto"` has not been replaced by its methods.
        num_processes (`int`): Number of processes that train.

    Raises:
        TypeError: If a state is not a tensor.
    """
    state = {f"{prefix}.{name}": value for prefix, part in parts.items() for name, value in part.state_dict().items()}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"The state {name} is a {type(value).__name__}, but a checkpoint holds only tensors. Let "
                "`get_extra_state` return a tensor."
            )
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    reprs = {prefix: list(map(repr, chain)) for prefix, chain in chains.items()}
    asked = reprs | {prefix: list(chain) for prefix, chain in requested.items()}
    metadata = {
        "perturbations": json.dumps(reprs),
        "requested": json.dumps(asked),
        "num_processes": str(num_processes),
    }
    save_file(tensors, Path(folder) / STATE_FILE, metadata=metadata)


@dataclass
class SavedState:
    """
    The state that [`save_state`] wrote.

    Attributes:
        chains (`dict[str, list[str]]`): The `repr` of the methods by the prefix of their part.
        requested (`dict[str, list[str]]`): The same as the user asked for it, with `"auto"` as such.
        num_processes (`int`): Number of processes that trained.
        tensors (`dict[str, torch.Tensor]`): The state by prefix and name.
    """

    chains: dict[str, list[str]]
    requested: dict[str, list[str]]
    num_processes: int
    tensors: dict[str, Tensor]

    def has(self, prefix: str) -> bool:
        """Whether there is state under a prefix."""
        return any(name.startswith(f"{prefix}.") for name in self.tensors)

    def restore(self, part: Stateful, prefix: str) -> None:
        """Loads the state under a prefix into a part of the training."""
        start = f"{prefix}."
        part.load_state_dict(
            {name.removeprefix(start): value for name, value in self.tensors.items() if name.startswith(start)}
        )

    def renumbered(self, methods: Sequence[Perturbation]) -> dict[str, Tensor]:
        """
        The state of the loss by name, with the methods at their places in this run.

        Args:
            methods (`Sequence[Perturbation]`):
                The methods of this run. If they are not those of the checkpoint, the n-th of each name gets the state
                of the n-th of that name. State without such a method is left out.
        """
        places = {key: place for place, key in enumerate(_numbered([method.name for method in methods]))}
        before = _numbered([text.split("(")[0] for text in self.chains.get("loss", [])])
        state: dict[str, Tensor] = {}
        for name, value in self.tensors.items():
            part, _, name = name.partition(".")
            match = re.fullmatch(r"perturbations\.(\d+)\.(.*)", name)
            place = None if match is None else places.get(before[int(match[1])])
            if part == "loss" and (match is None or place is not None):
                state[name if match is None else f"perturbations.{place}.{match[2]}"] = value
        return state

    def check_chain(
        self,
        prefix: str,
        methods: Sequence[Perturbation],
        num_processes: int,
        requested: Sequence[str] | None = None,
    ) -> None:
        """
        Checks that this run fits the checkpoint, and warns if it does not continue exactly.

        Args:
            prefix (`str`): `"loss"` for the methods at the logits, `"parameters"` for the others.
            methods (`Sequence[Perturbation]`): The methods of this run.
            num_processes (`int`): Number of processes of this run.
            requested (`Sequence[str]`, *optional*):
                What the user asked for, where that is not the methods themselves. `auto` may stand for other methods
                than in the run of the checkpoint.

        Raises:
            ValueError: If the checkpoint was written with other methods.
        """
        before, now = self.chains.get(prefix, []), list(map(repr, methods))
        asked_before, asked_now = self.requested.get(prefix, []), now if requested is None else list(requested)
        if before != now and asked_before != asked_now:
            level = {"loss": "at the logits", "parameters": "for the parameters"}[prefix]
            raise ValueError(
                f"The checkpoint was written with perturbations {level} {asked_before}, but this run has {asked_now}. "
                "Resume with the same `perturbations`, or start a new run from the checkpoint's model."
            )
        if before != now:
            logger.warning(
                f"The data or the settings have changed since the checkpoint was written: {asked_now} stood for "
                f"{before}, and now stands for {now}. The methods in both continue, and the others start anew."
            )
        split = [method for method in methods if method.depends_on_split]
        if split and self.num_processes != num_processes:
            logger.warning(
                f"The checkpoint was written by {self.num_processes} processes and this run has {num_processes}. "
                f"{', '.join(map(repr, split))} depends on how a batch is split, so the training continues, but not "
                "exactly as it would have."
            )

    def check_num_labels(self, num_labels: int) -> None:
        """
        Checks that the checkpoint was written for this number of classes.

        Raises:
            ValueError: If it was written for another number.
        """
        saved = self.tensors["loss.statistics._running"].shape[-1]
        if saved != num_labels:
            raise ValueError(
                f"The checkpoint was written for {saved} classes, but this model has {num_labels}. Resume with the "
                "model of that run."
            )


def load_state(folder: str | Path) -> SavedState | None:
    """
    Reads the state that [`save_state`] wrote.

    Returns:
        [`SavedState`]: The state; `None` if the checkpoint does not have any.

    Raises:
        ValueError: If the file is damaged.
    """
    path = Path(folder) / STATE_FILE
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        chains = json.loads(metadata["perturbations"])
        requested = json.loads(metadata.get("requested", metadata["perturbations"]))
        return SavedState(chains, requested, int(metadata["num_processes"]), load_file(path))
    except (SafetensorError, TypeError, KeyError, ValueError) as error:
        raise _damaged(path, error) from error


def save_rows(folder: str | Path, records: nn.Module) -> None:
    """Writes the records of the training rows, in a file of their own because they do not depend on the chain."""
    save_file(records.state_dict(), Path(folder) / ROWS_FILE)


def load_rows(folder: str | Path) -> dict[str, Tensor] | None:
    """
    Reads the records that [`save_rows`] wrote.

    Returns:
        `dict[str, torch.Tensor]`: Their state; `None` if the checkpoint does not have any.

    Raises:
        ValueError: If the file is damaged.
    """
    path = Path(folder) / ROWS_FILE
    if not path.is_file():
        return None
    try:
        return load_file(path)
    except SafetensorError as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{path} cannot be read ({error}): it is truncated or was changed. Resume from an older checkpoint, or start "
        "a new run from the checkpoint's model."
    )


def is_complete(checkpoint: str | Path) -> bool:
    """
    Whether a checkpoint was saved completely.

    The state of the Trainer is written last, after all processes have saved their parts.

    Args:
        checkpoint (`str` or `Path`): The folder of the checkpoint.
    """
    try:
        json.loads((Path(checkpoint) / TRAINER_STATE_NAME).read_text())
    except (OSError, ValueError):
        return False
    return True


def is_damaged(checkpoint: str | Path) -> bool:
    """
    Whether a checkpoint has a state of the Trainer that cannot be read.

    Args:
        checkpoint (`str` or `Path`): The folder of the checkpoint.
    """
    return (Path(checkpoint) / TRAINER_STATE_NAME).is_file() and not is_complete(checkpoint)


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """
    Finds the newest complete checkpoint. Incomplete checkpoints are skipped, with a warning.

    Args:
        output_dir (`str` or `Path`): The folder that holds the checkpoints.

    Returns:
        `str` or `None`: The folder of the checkpoint; `None` if the folder holds no checkpoint at all.

    Raises:
        ValueError: If all checkpoints are incomplete.
    """
    checkpoints = {
        int(match[1]): path
        for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if path.is_dir() and (match := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name))
    }
    for step in sorted(checkpoints, reverse=True):
        if is_complete(checkpoints[step]):
            return str(checkpoints[step])
        logger.warning(f"{checkpoints[step]} is incomplete and is skipped.")
    if checkpoints:
        raise ValueError(
            f"No valid checkpoint found in output directory ({output_dir}): all {len(checkpoints)} are incomplete. "
            "Train without `resume_from_checkpoint`."
        )
    return None


def _numbered(names: Sequence[str]) -> list[tuple[str, int]]:
    """Each name with the number of its occurrences before."""
    return [(name, names[:position].count(name)) for position, name in enumerate(names)]
