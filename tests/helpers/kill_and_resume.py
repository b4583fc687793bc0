"""
Kills a training with SIGKILL again and again, resumes it each time, and compares it with a training left alone.

Run as a script, because a process may be forked safely only before it has threads. Children begin with everything
imported, so a kill costs little more than the steps that are taken twice.
"""

import gc
import itertools
import json
import mmap
import os
import random
import signal
import sys
import threading
import time
import zlib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from load_training import make_load_trainer
from safetensors import safe_open
from transformers import TrainerCallback

from lpg_hf import LPGTrainer
from lpg_hf.trainer.checkpoint import STATE_FILE
from lpg_hf.trainer.complete_checkpoints import is_complete
from lpg_hf.trainer.row_file import ROWS_FILE


NUM_ROWS = 1000
# The first log after resuming is a mean over the steps since the checkpoint, the Trainer's own loss too. Where every
# checkpoint coincides with a log, the logs are equal as well.
INTERVALS = {"logging_steps": 5, "eval_steps": 20, "save_steps": 25}
LOADING, TRAINING, EVALUATING, SAVING = PHASES = ("loading", "training", "evaluating", "saving")
# Where the kills are aimed at, again and again.
AIMS = (TRAINING, SAVING, EVALUATING, TRAINING, SAVING, TRAINING, SAVING, LOADING)


class Aim(NamedTuple):
    """A kill at a random moment after `phase` is entered for the first time at `step` or later."""

    phase: str
    step: int
    delay: float


class Board:
    """What a training writes down in memory that outlives it."""

    def __init__(self, num_steps: int):
        def shared(size: int) -> np.ndarray:
            return np.frombuffer(mmap.mmap(-1, 8 * size), dtype=np.int64)

        # Index in `PHASES`, step after resuming (-1 before), newest step whose checkpoint was announced, number of
        # steps and of checkpoints that were compared, and of those that differed.
        self.phase, self.resumed, self.saved, self.compared, self.differed = (shared(1) for _ in range(5))
        self.steps, self.saves = shared(num_steps + 1), shared(num_steps + 1)
        # Microseconds and visits of each phase.
        self.durations, self.visits = shared(len(PHASES)), shared(len(PHASES))

    def compare(self, digests: np.ndarray, step: int, digest: int) -> None:
        """The first training writes its digests, and the others compare theirs."""
        if digests[step] == 0:
            digests[step] = digest
        else:
            self.compared += 1
            self.differed += digests[step] != digest


class Watch(TrainerCallback):
    """Writes down what a training does, and announces the phase that the kill is aimed at."""

    def __init__(self, board: Board, aim: Aim | None, pipe: int):
        self.board, self.aim, self.pipe, self.trainer = board, aim, pipe, None
        self.began, self.step = time.perf_counter(), 0
        board.phase[:] = 0

    def enter(self, phase: str) -> None:
        now, last = time.perf_counter(), self.board.phase[0]
        self.board.durations[last] += int(1e6 * (now - self.began))
        self.board.visits[last] += 1
        self.began = now
        self.board.phase[:] = PHASES.index(phase)
        if self.aim is not None and phase == self.aim.phase and self.step >= self.aim.step:
            os.write(self.pipe, b"!")
            self.aim = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.board.resumed[:] = state.global_step

    def on_step_begin(self, args, state, control, **kwargs):
        self.step = state.global_step
        self.enter(TRAINING)

    def on_step_end(self, args, state, control, model, **kwargs):
        self.step = state.global_step
        statistics = self.trainer.lpg_loss.statistics
        digest = 1
        for tensor in (*model.parameters(), statistics._running, statistics.seen_counts):
            digest = zlib.crc32(tensor.detach().numpy().tobytes(), digest)
        self.board.compare(self.board.steps, state.global_step, digest)

    def on_save(self, args, state, control, **kwargs):
        folder, digest = Path(args.output_dir) / f"checkpoint-{state.global_step}", 1
        for file in (STATE_FILE, ROWS_FILE):
            with safe_open(folder / file, framework="pt") as opened:
                digest = zlib.crc32(opened.metadata()["checksum"].encode(), digest)
        self.board.compare(self.board.saves, state.global_step, digest)
        self.board.saved[:] = max(self.board.saved[0], state.global_step)


class WatchedTrainer(LPGTrainer):
    watch: Watch

    def evaluate(self, *args, **kwargs):
        self.watch.enter(EVALUATING)
        metrics = super().evaluate(*args, **kwargs)
        self.watch.enter(TRAINING)
        return metrics

    def _save_checkpoint(self, *args, **kwargs):
        self.watch.enter(SAVING)
        super()._save_checkpoint(*args, **kwargs)
        self.watch.enter(TRAINING)


def results_of(trainer: LPGTrainer) -> dict:
    return {
        "parameters": torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()]),
        "loss": dict(trainer.lpg_loss.state_dict()),
        "issues": trainer.label_issues().to_dict(),
        "losses": [
            (log["step"], log[key]) for log in trainer.state.log_history for key in ("loss", "eval_loss") if key in log
        ],
        "steps": trainer.state.global_step,
    }


def live(path: Path, num_steps: int, resume: bool, board: Board, aim: Aim | None, pipe: int) -> None:
    """What a child does."""
    watch = Watch(board, aim, pipe)
    if aim is not None and aim.phase == LOADING:
        os.write(pipe, b"!")
        watch.aim = None

    def make() -> LPGTrainer:
        args = INTERVALS | {"max_steps": num_steps}
        trainer = make_load_trainer(WatchedTrainer, path, args, num_rows=NUM_ROWS, callbacks=[watch])
        trainer.watch, watch.trainer = watch, trainer
        return trainer

    trainer = make()
    try:
        trainer.train(resume_from_checkpoint=resume)
    except ValueError as error:
        if not (resume and "No valid checkpoint found" in str(error)):
            raise
        trainer = make()  # killed before the first checkpoint
        trainer.train()
    torch.save(results_of(trainer), f"{path}.pt")


def run_child(path: Path, num_steps: int, resume: bool, board: Board, aim: Aim | None = None) -> bool:
    """Whether a training was killed; it has ended well otherwise."""
    assert threading.active_count() == 1
    reading, writing = os.pipe()
    board.resumed[:] = -1
    child = os.fork()
    if child == 0:
        status = 1
        try:
            log = os.open(f"{path}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.close(reading)
            live(path, num_steps, resume, board, aim, writing)
            status = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    os.close(writing)
    if os.read(reading, 1):  # nothing if the child ends without having come to the aim
        time.sleep(aim.delay)
        os.kill(child, signal.SIGKILL)
    os.close(reading)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status not in (0, -signal.SIGKILL):
        raise RuntimeError(f"A training ended with {status}:\n{Path(f'{path}.log').read_text()[-3000:]}")
    return status != 0


def newest_files(path: Path) -> str:
    """How far the newest checkpoint came: its newest file."""
    folders = sorted(path.glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]))
    if not folders or not (files := list(folders[-1].iterdir())):
        return "no file"
    newest = max(files, key=lambda file: file.stat().st_mtime_ns)
    torn = " (empty)" if newest.stat().st_size == 0 else ""
    return "complete" if is_complete(folders[-1]) else f"after {newest.name}{torn}"


def main(folder: Path, num_steps: int, num_kills: int, seed: int) -> dict:
    gc.collect()
    gc.freeze()
    board, draw = Board(num_steps), random.Random(seed)
    began = time.perf_counter()
    assert not run_child(folder / "whole", num_steps, False, board)
    whole_seconds = time.perf_counter() - began
    usual = {
        phase: duration / visits / 1e6
        for phase, duration, visits in zip(PHASES, board.durations, board.visits, strict=True)
    }
    board.saved[:] = 0
    # In order, so that each training comes to its aim; the last ones leave time for the kill.
    steps = sorted(draw.randrange(num_steps - 2 * INTERVALS["save_steps"]) for _ in range(num_kills))
    struck, cut, num_anew, num_lost, resume = Counter(), Counter(), 0, 0, False
    began = time.perf_counter()
    for step, phase in zip(steps, itertools.cycle(AIMS), strict=False):
        newest = int(board.saved[0])
        aim = Aim(phase, step, draw.uniform(0, 1.1 * usual[phase]))
        if not run_child(folder / "killed", num_steps, resume, board, aim):
            raise RuntimeError(f"The training ended before it was killed at {aim}.")
        struck[PHASES[board.phase[0]]] += 1
        if PHASES[board.phase[0]] == SAVING:
            cut[newest_files(folder / "killed")] += 1
        num_anew += int(resume and board.resumed[0] == 0)
        num_lost += int(0 <= board.resumed[0] < newest)
        resume = True
    newest = int(board.saved[0])
    assert not run_child(folder / "killed", num_steps, True, board)
    num_lost += int(board.resumed[0] < newest)
    return {
        "kills": sum(struck.values()),
        "struck": dict(struck),
        "cut": dict(cut),
        "anew": num_anew,
        "lost": num_lost,
        "compared": int(board.compared[0]),
        "differed": int(board.differed[0]),
        "usual": usual,
        "whole_seconds": whole_seconds,
        "seconds": time.perf_counter() - began,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(main(Path(sys.argv[1]), *map(int, sys.argv[2:5]))))
