"""The records of the training rows in a checkpoint, in a file of their own because they do not depend on the chain."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from ..row_records import TrainingDynamics
from .checkpoint import check_step
from .state_files import damaged, find_misfit, read_tensors, write_tensors


ROWS_FILE = "lpg_rows.safetensors"
_CONTENTS = "the record of each row, which `label_issues` ranks,"


def save_rows(folder: str | Path, records: nn.Module, step: int) -> None:
    """
    Writes the records of the training rows.

    Args:
        folder (`str` or `Path`): The folder of the checkpoint.
        records (`torch.nn.Module`): The records of all processes.
        step (`int`): Optimizer steps before the checkpoint.
    """
    write_tensors(Path(folder) / ROWS_FILE, records.state_dict(), {"step": str(step)})


def load_rows(folder: str | Path, step: int) -> dict[str, Tensor] | None:
    """
    Reads the records that [`save_rows`] wrote.

    Args:
        folder (`str` or `Path`): The folder of the checkpoint.
        step (`int`): Optimizer steps before it.

    Returns:
        `dict[str, torch.Tensor]`: Their state; `None` if the checkpoint does not have any.

    Raises:
        ValueError: If the file is damaged, or belongs to another checkpoint.
    """
    path = Path(folder) / ROWS_FILE
    if not path.exists():
        return None
    tensors, entries = read_tensors(path, _CONTENTS)
    saved_step = entries.get("step", "")
    if not (saved_step.isascii() and saved_step.isdigit()):
        raise damaged(path, f"its metadata name no step but {saved_step!r}", _CONTENTS)
    check_step(path, int(saved_step), step, _CONTENTS)
    problem = _find_problem(tensors)
    if problem is not None:
        raise damaged(path, problem, _CONTENTS)
    return tensors


def _find_problem(tensors: Mapping[str, Tensor]) -> str | None:
    votes = tensors.get("_votes")
    num_rows = TrainingDynamics.num_rows_of(tensors) if votes is not None and votes.ndim == 1 else 0
    problem = find_misfit(tensors, TrainingDynamics(max(num_rows, 0)).state_dict())
    if problem is not None:
        return problem
    (visits, log_ratio, weight), labels = tensors["_sums"], tensors["_labels"]
    if not (tensors["_sums"].isfinite().all() and tensors["_votes"].isfinite().all()):
        return "it has values that are not finite"
    if (visits < 0).any() or (weight < 0).any() or (log_ratio > 0).any() or (tensors["_votes"] < 0).any():
        return "it has values out of their range"
    return "it has labels below -1" if (labels < -1).any() else None
