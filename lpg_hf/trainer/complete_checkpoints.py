"""Which checkpoints of a folder are complete."""

import json
import re
from pathlib import Path

from accelerate.logging import get_logger
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


logger = get_logger(__name__)


def is_complete(checkpoint: str | Path) -> bool:
    """
    Whether a checkpoint was saved completely.

    The state of the Trainer is written last, after all processes have saved their parts.

    Args:
        checkpoint (`str` or `Path`): The folder of the checkpoint.
    """
    try:
        state = json.loads((Path(checkpoint) / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(state, dict) and isinstance(state.get("global_step"), int) and state["global_step"] >= 0


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
