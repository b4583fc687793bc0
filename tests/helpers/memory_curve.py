"""Trains many steps and measures how much memory the process holds; run as a script, in a process of its own."""

import gc
import json
import re
import sys
from pathlib import Path

import torch
from load_training import make_load_trainer
from transformers import Trainer, TrainerCallback

from lpg_hf import LPGTrainer


TRAINERS = {"Trainer": Trainer, "LPGTrainer": LPGTrainer}


def resident_mib() -> float:
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) / 1024


class MemoryWatch(TrainerCallback):
    """Resident memory, in MiB, at equal distances."""

    def __init__(self, every: int, counts_tensors: bool):
        self.every, self.counts_tensors = every, counts_tensors
        self.curve: list[float] = []
        self.tensors: list[int] = []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every == 0:
            self.curve.append(resident_mib())
            if self.counts_tensors:
                gc.collect()
                self.tensors.append(sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()))


def measure(trainer_class: type[Trainer], path: Path, num_steps: int, every: int, counts_tensors: bool) -> dict:
    watch = MemoryWatch(every, counts_tensors)
    # What a training logs it keeps by design, about 1 KiB a log.
    args = {"max_steps": num_steps, "logging_steps": every // 5, "eval_steps": every // 2, "save_steps": every // 2}
    trainer = make_load_trainer(trainer_class, path, args, num_rows=4000, callbacks=[watch])
    trainer.train()
    return {"curve": watch.curve, "tensors": watch.tensors, "logs": len(trainer.state.log_history)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    name, path, num_steps, every, *counts = sys.argv[1:]
    print(json.dumps(measure(TRAINERS[name], Path(path), int(num_steps), int(every), counts == ["count"])))
