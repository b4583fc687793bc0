"""The state of the perturbations beside the optimizer's (one safetensors file, no pickle), and whole checkpoints."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from accelerate.logging import get_logger
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_NAME


logger = get_logger(__name__)

STATE_FILE = "lpg_state.safetensors"
ROWS_FILE = "lpg_rows.safetensors"


def save_state(
    folder: str | Path, modules: Mapping[str, nn.Module], chains: Mapping[str, list[str]], num_processes: int
) -> None:
    """
    Writes the state of `modules` into a checkpoint folder.

    Args:
        folder (`str` or `Path`): The checkpoint.
        modules (`Mapping[str, nn.Module]`): By the prefix of their state.
        chains (`Mapping[str, list[str]]`): The methods' `repr` under the same prefix, which a resumed run must share.
        num_processes (`int`): How many processes train.
    """
    state = {
        f"{prefix}.{name}": value for prefix, module in modules.items() for name, value in module.state_dict().items()
    }
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"The state {name} is a {type(value).__name__}, and checkpoints keep tensors alone: let "
                "`get_extra_state` return one."
            )
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    metadata = {"perturbations": json.dumps(chains), "num_processes": str(num_processes)}
    save_file(tensors, Path(folder) / STATE_FILE, metadata=metadata)


@dataclass
class SavedState:
    """What [`save_state`] wrote."""

    chains: dict[str, list[str]]
    num_processes: int
    tensors: dict[str, Tensor]

    def restore(self, module: nn.Module, prefix: str) -> None:
        """Loads the part under `prefix` into a module."""
        start = f"{prefix}."
        module.load_state_dict(
            {name.removeprefix(start): value for name, value in self.tensors.items() if name.startswith(start)}
        )


def load_state(folder: str | Path) -> SavedState | None:
    """
    Reads what [`save_state`] wrote. `None` if the checkpoint has none.

    Raises:
        ValueError: If the file is damaged.
    """
    path = Path(folder) / STATE_FILE
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        return SavedState(json.loads(metadata["perturbations"]), int(metadata["num_processes"]), load_file(path))
    except (SafetensorError, TypeError, KeyError, ValueError) as error:
        raise _damaged(path, error) from error


def save_rows(folder: str | Path, records: nn.Module) -> None:
    """Writes what is known of each training row: a file of its own, since it depends on no chain of methods."""
    save_file(records.state_dict(), Path(folder) / ROWS_FILE)


def load_rows(folder: str | Path) -> dict[str, Tensor] | None:
    """
    Reads what [`save_rows`] wrote. `None` if the checkpoint has none.

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


def reload_renamed_weights(model: nn.Module, checkpoint: str | Path) -> None:
    """
    Loads the weights of a checkpoint by `from_pretrained` where the names in its file are not the model's.

    transformers 5.23 saves some models (ViT among them) under older names than it gives their parameters, and its
    Trainer, which looks for the parameters' names, goes on with fresh weights after a warning.
    """
    path = Path(checkpoint) / SAFE_WEIGHTS_NAME
    if not isinstance(model, PreTrainedModel) or not path.is_file():
        return
    with safe_open(path, framework="pt") as file:
        saved = set(file.keys())
    if not saved.issuperset(model.state_dict()):
        saved_model = type(model).from_pretrained(checkpoint, config=model.config, dtype=model.dtype)
        model.load_state_dict(saved_model.state_dict())


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
