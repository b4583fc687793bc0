"""The state of the perturbations beside the optimizer's (one safetensors file, no pickle), and whole checkpoints."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

from accelerate.logging import get_logger
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


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
    tensors = {
        f"{prefix}.{name}": tensor.contiguous()
        for prefix, module in modules.items()
        for name, tensor in module.state_dict().items()
    }
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
    try:
        with safe_open(path, framework="pt") as file:
            saved_chain = json.loads(file.metadata()["perturbations"]).get(prefix, [])
        state = load_file(path)
    except (SafetensorError, TypeError, KeyError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}): it is truncated or was changed. Resume from an older checkpoint, or "
            "start a new run from the checkpoint's model."
        ) from error
    if saved_chain != chain:
        raise ValueError(
            f"{path} was written with perturbations {saved_chain}, but this run has {chain}. Resume with the same "
            "`perturbations`, or start a new run from the checkpoint's model."
        )
    return {name.removeprefix(f"{prefix}."): value for name, value in state.items() if name.startswith(f"{prefix}.")}


def is_whole(checkpoint: str | Path) -> bool:
    """Whether saving got to the end: the state of the Trainer is written last, when every process is done."""
    try:
        json.loads((Path(checkpoint) / TRAINER_STATE_NAME).read_text())
    except (OSError, ValueError):
        return False
    return True


def last_whole_checkpoint(output_dir: str | Path) -> str:
    """
    The newest checkpoint that was saved to its end; newer ones that a kill cut short are named in a warning.

    Raises:
        ValueError: If there is none.
    """
    checkpoints = {
        int(match[1]): path
        for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if path.is_dir() and (match := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name))
    }
    for step in sorted(checkpoints, reverse=True):
        if is_whole(checkpoints[step]):
            return str(checkpoints[step])
        logger.warning(f"{checkpoints[step]} was not saved to its end and is passed over.")
    raise ValueError(f"There is no whole checkpoint in {output_dir}: train without `resume_from_checkpoint`.")
