"""
Four processes train together, and one of them is lost on the way.

As a script it imports once and forks the processes, without a launcher; under a launcher it is one of them. Each
process ends as a script of a user would, by the end of its interpreter.
"""

import gc
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from leave import leave_together
from load_training import make_load_trainer, stack_rows

from lpg_hf import LPGTrainer
from lpg_hf.loss import LPGLoss
from lpg_hf.trainer import label_issues
from lpg_hf.trainer.managed_loss import ManagedLoss


NUM_PROCESSES, NUM_STEPS, LOST_STEP = 4, 40, 25
# Far above the minute in which the others must have ended, so that a test can tell how long they took.
WATCHDOG_SECONDS = 150
WHOLE, RESUMED = "whole", "resumed"


def killed(trainer: LPGTrainer) -> None:
    Path(f"{trainer.args.output_dir}.lost").touch()
    os.kill(os.getpid(), signal.SIGKILL)


def full_disk(trainer: LPGTrainer) -> None:
    raise OSError(28, "No space left on device")


def own_error(trainer: LPGTrainer) -> None:
    raise RuntimeError("an error of one process alone")


def nothing(trainer: LPGTrainer) -> None:
    pass


def around(owner: object, name: str, before: Callable = nothing, after: Callable = nothing) -> Callable:
    """What happens before and after a call, once the step has come."""

    def arm(trainer: LPGTrainer) -> None:
        original = getattr(owner, name)

        def called(*args, **kwargs):
            is_due = trainer.state.global_step >= LOST_STEP
            if is_due:
                before(trainer)
            result = original(*args, **kwargs)
            if is_due:
                after(trainer)
            return result

        setattr(owner, name, called)

    return arm


def wrong_label(trainer: LPGTrainer) -> None:
    def collate(rows):
        batch = stack_rows(rows)
        if trainer.state.global_step >= LOST_STEP:
            batch["labels"][0] = 99
        return batch

    trainer.data_collator = collate


# Which process is lost, and what happens to it.
PLACES = {
    "killed in a step": (2, around(LPGLoss, "forward", before=killed)),
    "killed in a save": (0, around(label_issues, "save_rows", before=killed)),
    "an error in the loss": (2, around(LPGLoss, "forward", before=own_error)),
    "an error while the statistics travel": (2, around(ManagedLoss, "end_step", after=own_error)),
    "an error in a log": (2, around(LPGTrainer, "_lpg_gather_telemetry", before=own_error)),
    "a full disk in a save": (0, around(label_issues, "save_rows", before=full_disk)),
    "a label out of range": (2, wrong_label),
}


def train(path: Path, place: str, rank: int) -> None:
    args = {"max_steps": NUM_STEPS, "logging_steps": 5, "eval_steps": 20, "save_steps": 10}
    trainer = make_load_trainer(LPGTrainer, path, args, num_rows=1000, callbacks=[])
    if place in PLACES:
        lost_rank, arm = PLACES[place]
        if rank == lost_rank:
            arm(trainer)
    trainer.train(resume_from_checkpoint=place == RESUMED)
    assert trainer.accelerator.num_processes == NUM_PROCESSES
    parameters = torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])
    statistics, issues = trainer.lpg_loss.statistics, trainer.label_issues().to_dict()
    if rank == 0:
        torch.save({"parameters": parameters, "running": statistics._running, "issues": issues}, f"{path}.{place}.pt")
    leave_together()


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def launch(path: Path, place: str) -> dict | None:
    """How each process ended: status, seconds after the first one, and what it said. `None` in a process itself."""
    port, children = free_port(), {}
    for rank in range(NUM_PROCESSES):
        child = os.fork()
        if child == 0:
            log = os.open(f"{path}.{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.environ |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(NUM_PROCESSES),
                "LOCAL_WORLD_SIZE": str(NUM_PROCESSES),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            train(path, place, rank)
            return None
        children[child] = rank
    ended, began = {}, time.monotonic()
    while len(ended) < NUM_PROCESSES and time.monotonic() - began < WATCHDOG_SECONDS:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child == 0:
            time.sleep(0.01)
        else:
            ended[children.pop(child)] = os.waitstatus_to_exitcode(status), time.monotonic()
    hanging = sorted(children.values())
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    first = min((moment for _, moment in ended.values()), default=0.0)
    return {
        "status": {rank: status for rank, (status, _) in ended.items()},
        "seconds": {rank: moment - first for rank, (_, moment) in ended.items()},
        "hanging": hanging,
        "said": {rank: Path(f"{path}.{rank}.log").read_text()[-3000:] for rank in range(NUM_PROCESSES)},
    }


def main(folder: Path, places: list[str]) -> None:
    gc.collect()
    gc.freeze()
    results = {}
    for number, place in enumerate(places):
        # A resumed training goes on in the folder of the one before.
        path = folder / str(number - (place == RESUMED))
        results[place] = launch(path, place)
        if results[place] is None:
            return
    (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        train(Path(sys.argv[1]), sys.argv[2], int(os.environ["RANK"]))
    else:
        main(Path(sys.argv[1]), sys.argv[2:])
