"""How the processes of the scripts here end."""

import os
import sys
from typing import NoReturn

from accelerate import PartialState


def leave_together() -> NoReturn:
    """
    Waits for the other processes, and exits without a shutdown of the interpreter.

    A process that leaves early makes gloo abort the others, and one that shuts down aborts if a thread of gloo lets go
    of a gathered tensor by then (issue 190489 of PyTorch).
    """
    state = PartialState()
    state.wait_for_everyone()
    state.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
