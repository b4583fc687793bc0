"""`lpg-hf`: which command was asked for, and what the shell sees of an error."""

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .. import __version__
from .closest import closest


HELP = """\
usage: lpg-hf COMMAND ...

Fine-tunes classifiers on labels that are noisy, imbalanced, or both.

commands:
  train {text,image,audio,video}   train a model; takes the arguments of the examples of transformers
  issues OUT                       the rows of a training whose labels are most likely wrong
  report OUT                       a page on a training: wrong labels, and how well each class is learned
  compare OUT1 OUT2 ...            the results of trainings as one table
  compare {text,...} --seeds ...   train with Trainer and with LPGTrainer, over seeds, as one table

`lpg-hf COMMAND --help` tells more of each. On several GPUs:
  accelerate launch -m lpg_hf.commands train text ...
"""
COMMANDS = ("train", "issues", "report", "compare")


def main(argv: list[str] | None = None) -> None:
    """
    Runs a command.

    Args:
        argv (`list[str]`, *optional*): Defaults to `sys.argv[1:]`.

    Raises:
        SystemExit: With status 2 for arguments that do not fit, 1 for another error that has a message.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP, end="")
        raise SystemExit(0 if argv else 2)
    if argv[0] == "--version":
        print(__version__)
        return
    if argv[0] not in COMMANDS:
        print(f"lpg-hf: error: {closest('command', argv[0], COMMANDS)}", file=sys.stderr)
        raise SystemExit(2)
    with messages_only():
        run_command(argv[0], argv[1:])


def run_command(name: str, argv: list[str]) -> None:
    # Each loads what it needs: a help shall not wait for torch.
    if name == "train":
        from .train import main as command
    elif name == "issues":
        from .issues import main as command
    elif name == "report":
        from .report import main as command
    else:
        from .compare import main as command
    command(argv)


@contextmanager
def messages_only() -> Iterator[None]:
    """
    Lets the shell see the message alone of an error that this library raises. Any other keeps its traceback.

    Raises:
        SystemExit: With the message.
    """
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
        if not raised_in.is_relative_to(Path(__file__).resolve().parents[1]):
            raise
        raise SystemExit(f"lpg-hf: error: {error}") from error
