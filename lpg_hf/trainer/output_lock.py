"""One training at a time writes the checkpoints of a folder: the second one is told before it begins."""

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger

from ..distributed import stack_processes


if sys.platform != "win32":
    import fcntl

logger = get_logger(__name__)

# Uploads to the Hub leave files out that begin with an underscore.
LOCK_FILE = "_lpg_training.lock"
# The folders of the trainings of this process, whose locks would not stop another training of the same process.
_own_folders: set[Path] = set()


@contextmanager
def sole_writer(folder: str | Path, accelerator: Accelerator) -> Iterator[None]:
    """
    Within it, no other training may write checkpoints into a folder. All processes must enter it.

    The lock belongs to the main process, and the operating system frees it when that process ends, however it ends. So
    a killed training never blocks the one that resumes it. On Windows nothing is locked.

    Args:
        folder (`str` or `Path`): The folder of the checkpoints.
        accelerator (`accelerate.Accelerator`): The accelerator of the training.

    Raises:
        RuntimeError: If another training is writing into the folder.
    """
    path = Path(folder).resolve() / LOCK_FILE
    is_taken, file = _lock(path) if accelerator.is_main_process else (False, None)
    if stack_processes(torch.tensor(is_taken, device=accelerator.device), accelerator=accelerator).any():
        raise RuntimeError(
            f"Another training writes its checkpoints to {folder}: {_owner(path)}. Two trainings would mix and delete "
            "each other's checkpoints. Give each its own `output_dir`, or end the other one."
        )
    try:
        yield
    finally:
        if file is not None:
            _own_folders.discard(path.parent)
            with suppress(OSError):
                path.unlink()  # before it is free: whoever opens the path from now on makes a new file
            file.close()


def _lock(path: Path) -> tuple[bool, IO[str] | None]:
    """Whether another process has locked the file, and the file if it is locked now."""
    if path.parent in _own_folders:
        return True, None
    if sys.platform == "win32":
        return False, None
    file: IO[str] | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            file = path.open("a+", encoding="utf-8")
            try:
                # A lock of the process: children that outlive it do not keep it, as they would with `flock`.
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):  # what systems raise if it is taken
                file.close()
                return True, None
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
            file.close()  # its owner has deleted it in between
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        _own_folders.add(path.parent)
        return False, file
    except OSError as error:
        if file is not None:
            file.close()
            with suppress(OSError):
                path.unlink()
        logger.warning(f"Whether another training writes checkpoints to {path.parent} is not known: {error}.")
        return False, None


def _owner(path: Path) -> str:
    if path.parent in _own_folders:  # reading the file would free it: POSIX locks end with any closing of the file
        return "it runs in this process"
    try:
        return path.read_text(encoding="utf-8") or "an unknown process"
    except OSError:
        return "an unknown process"
