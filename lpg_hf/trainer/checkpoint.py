"""What a checkpoint holds of the perturbations, and whether it fits a run."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate.logging import get_logger
from torch import Tensor

from ..perturbations import Perturbation
from .state_files import damaged, find_bad_value, find_misfit, read_tensors, write_tensors


logger = get_logger(__name__)

STATE_FILE = "lpg_state.safetensors"
_CONTENTS = "the state of the perturbations (class statistics, counters, lengths)"


class Stateful(Protocol):
    """A part of a training that has state: a module, or an observer of the perturbations."""

    def state_dict(self) -> Mapping[str, Tensor]: ...

    def load_state_dict(self, tensors: Mapping[str, Tensor], /) -> object: ...


def save_state(
    folder: str | Path,
    parts: Mapping[str, Stateful],
    chains: Mapping[str, Sequence[Perturbation]],
    requested: Mapping[str, Sequence[str]],
    facts: Mapping[str, int],
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
        facts (`Mapping[str, int]`): The entries `num_processes`, `num_labels` (0 without a loss) and `step`.

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
    reprs = {prefix: list(map(repr, chain)) for prefix, chain in chains.items()}
    asked = reprs | {prefix: list(chain) for prefix, chain in requested.items()}
    metadata = {"perturbations": json.dumps(reprs), "requested": json.dumps(asked), "facts": json.dumps(dict(facts))}
    write_tensors(Path(folder) / STATE_FILE, state, metadata)


@dataclass
class SavedState:
    """
    The state that [`save_state`] wrote.

    Attributes:
        path (`Path`): The file, for messages.
        chains (`dict[str, list[str]]`): The `repr` of the methods by the prefix of their part.
        requested (`dict[str, list[str]]`): The same as the user asked for it, with `"auto"` as such.
        num_processes (`int`): Number of processes that trained.
        num_labels (`int`): Number of classes; 0 if there was no perturbed loss.
        step (`int`): Optimizer steps before the checkpoint.
        tensors (`dict[str, torch.Tensor]`): The state by prefix and name.
    """

    path: Path
    chains: dict[str, list[str]]
    requested: dict[str, list[str]]
    num_processes: int
    num_labels: int
    step: int
    tensors: dict[str, Tensor]

    @property
    def dtype(self) -> torch.dtype:
        """Of the class statistics."""
        statistics = [value for name, value in self.tensors.items() if name.startswith("loss.statistics.")]
        return torch.float64 if any(value.dtype == torch.float64 for value in statistics) else torch.float32

    def has(self, prefix: str) -> bool:
        """Whether there is state under a prefix."""
        return any(name.startswith(f"{prefix}.") for name in self.tensors)

    def restore(self, part: Stateful, prefix: str) -> None:
        """
        Loads the state under a prefix into a part of the training.

        Raises:
            ValueError: If the state does not fit the part.
        """
        start = f"{prefix}."
        state = {name.removeprefix(start): value for name, value in self.tensors.items() if name.startswith(start)}
        try:
            part.load_state_dict(state)
        except (LookupError, RuntimeError, TypeError, ValueError) as error:
            if not state and isinstance(error, ValueError):  # nothing was saved, as the part has said itself
                raise
            raise damaged(self.path, f"the state of {prefix!r} does not fit ({error})", _CONTENTS) from error

    def restore_loss(self, part: Stateful, methods: Sequence[Perturbation]) -> None:
        """
        Loads the state of the loss. Methods that the checkpoint does not have start anew.

        Args:
            part ([`Stateful`]): The loss.
            methods (`Sequence[Perturbation]`): The methods of this run.

        Raises:
            ValueError: If the state does not fit the loss.
        """
        state, expected = self._renumbered(methods), dict(part.state_dict())
        # Counts are there if they were counted, and are taken if this run counts as well.
        counts = "statistics.class_counts"
        # Where `auto` stands for other methods now, those of the same name may have other settings.
        is_same = self.chains.get("loss", []) == list(map(repr, methods))
        checked = {name for name in {*state, *expected} if is_same or name.startswith("statistics.")} - {counts}
        problem = find_misfit(
            {name: value for name, value in state.items() if name in checked},
            {name: value for name, value in expected.items() if name in checked},
        )
        if counts in state and (state[counts].is_floating_point() or state[counts].shape != (self.num_labels,)):
            problem = f"{counts} is not one integer per class"
        statistics = {name: value for name, value in state.items() if name.startswith("statistics.")}
        problem = problem or find_bad_value(statistics, may_be_negative=["statistics._epoch_sums"])  # by fit excesses
        if problem is not None:
            raise damaged(self.path, f"the state of 'loss' does not fit: {problem}", _CONTENTS)
        part.load_state_dict(state)

    def _renumbered(self, methods: Sequence[Perturbation]) -> dict[str, Tensor]:
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
            match = re.fullmatch(r"perturbations\.(\d{1,9})\.(.*)", name)
            if part != "loss":
                continue
            if match is None:
                state[name] = value
            elif int(match[1]) >= len(before):
                raise damaged(self.path, f"loss.{name} belongs to no method", _CONTENTS)
            elif before[int(match[1])] in places:
                state[f"perturbations.{places[before[int(match[1])]]}.{match[2]}"] = value
        return state

    def check_step(self, step: int) -> None:
        """
        Checks that the file belongs to the checkpoint that it lies in.

        Args:
            step (`int`): Optimizer steps before the checkpoint, as the Trainer's state has them.

        Raises:
            ValueError: If it was written at another step.
        """
        check_step(self.path, self.step, step, _CONTENTS)

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
        if self.num_labels != num_labels:
            raise ValueError(
                f"The checkpoint was written for {self.num_labels} classes, but this model has {num_labels}. Resume "
                "with the model of that run."
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
    if not path.exists():
        return None
    tensors, entries = read_tensors(path, _CONTENTS)
    try:
        chains, requested = (_read_chains(entries[name]) for name in ("perturbations", "requested"))
        facts = json.loads(entries["facts"])
        num_processes, num_labels, step = (int(facts[name]) for name in ("num_processes", "num_labels", "step"))
    except (LookupError, TypeError, ValueError, RecursionError) as error:
        raise damaged(path, f"its metadata are not those of a checkpoint ({error!r})", _CONTENTS) from error
    return SavedState(path, chains, requested, num_processes, num_labels, step, tensors)


def check_step(path: Path, saved: int, step: int, contents: str) -> None:
    """Raises if a file was written at another step than the checkpoint that it lies in."""
    if saved != step:
        raise damaged(path, f"it was written at step {saved}, but its checkpoint at step {step}", contents)


def _read_chains(text: str) -> dict[str, list[str]]:
    chains: Any = json.loads(text)
    if not isinstance(chains, dict) or not all(isinstance(chain, list) for chain in chains.values()):
        raise ValueError(f"found {text[:80]!r} instead of chains")
    return {prefix: list(map(str, chain)) for prefix, chain in chains.items()}


def _numbered(names: Sequence[str]) -> list[tuple[str, int]]:
    """Each name with the number of its occurrences before."""
    return [(name, names[:position].count(name)) for position, name in enumerate(names)]
