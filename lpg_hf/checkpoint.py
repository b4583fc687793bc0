"""The state of the perturbations beside the optimizer's: one safetensors file, no pickle."""

import json
from collections.abc import Mapping
from pathlib import Path

from accelerate.logging import get_logger
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


logger = get_logger(__name__)

STATE_FILE = "lpg_state.safetensors"


def save_state(folder: str | Path, modules: Mapping[str, nn.Module], chains: Mapping[str, list[str]]) -> None:
    """
    Writes the state of `modules` into a checkpoint folder.

    Args:
        folder (`str` or `Path`): The checkpoint.
        modules (`Mapping[str, nn.Module]`): By the prefix of their state.
        chains (`Mapping[str, list[str]]`): The methods' `repr` under the same prefix, which a resumed run must share.
    """
    state = nn.ModuleDict(modules).state_dict()
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in state.items()}
    save_file(tensors, Path(folder) / STATE_FILE, metadata={"perturbations": json.dumps(chains)})


def load_state(folder: str | Path, prefix: str, chain: list[str]) -> dict[str, Tensor] | None:
    """
    Reads the state saved under `prefix`.

    Returns:
        `dict[str, torch.Tensor]`: The state, or `None` if the checkpoint has none (it is the plain Trainer's).

    Raises:
        ValueError: If it was written by another chain of methods.
    """
    path = Path(folder) / STATE_FILE
    if not path.is_file():
        logger.warning(
            f"{folder} has no {STATE_FILE}, so it was not written by LPGTrainer with perturbations: their state "
            "(class statistics, counters) starts anew."
        )
        return None
    with safe_open(path, framework="pt") as file:
        saved_chain = json.loads(file.metadata()["perturbations"]).get(prefix, [])
    if saved_chain != chain:
        raise ValueError(
            f"{path} was written with perturbations {saved_chain}, but this run has {chain}. Resume with the same "
            "`perturbations`, or start a new run from the checkpoint's model."
        )
    state = load_file(path)
    return {name.removeprefix(f"{prefix}."): value for name, value in state.items() if name.startswith(f"{prefix}.")}
