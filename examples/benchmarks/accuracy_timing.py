"""What a training step of each method costs, as a ratio to Trainer's, measured in turns."""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accuracy_data import load_source
from accuracy_methods import METHODS, REFERENCE
from accuracy_training import Run, Setting, cached_split, make_trainer
from transformers import TrainerCallback


STEPS = 40
WARMUP_STEPS = 5


class StepClock(TrainerCallback):
    """Seconds of every step: of the processor, or by the clock where a GPU does the work."""

    def __init__(self):
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = _now()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(_now() - self.start)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def measure_step_times(setting: Setting, names: Sequence[str], rounds: int, folder: Path) -> pd.DataFrame:
    """
    Trains every method for a few steps, in turns, and writes the ratios of the median step to `step_times.csv`.

    The regime is a long tail, where `auto` has all of its parts.

    Args:
        setting (`Setting`): Data and model.
        names (`Sequence[str]`): Methods.
        rounds (`int`): How often each one has its turn.
        folder (`Path`): Where the file goes.

    Returns:
        `pandas.DataFrame`: Columns `method` and `ratio`, the median over the rounds.
    """
    names = ["ce", *(name for name in names if name != "ce" and METHODS[name].role != REFERENCE)]
    regime = "long_tail_10"
    source = load_source(setting.spec)
    split = cached_split(setting.spec, regime, 0, setting.validation_share)
    medians = {name: [] for name in names}
    setting = replace(setting, recipe=replace(setting.recipe, epochs=1))
    for _ in range(rounds):
        for name in names:
            run = Run(setting, regime, name, METHODS[name].usual_value, 0)
            with tempfile.TemporaryDirectory() as output_dir:
                trainer = make_trainer(run, source, split, output_dir, max_steps=STEPS)
                clock = StepClock()
                trainer.add_callback(clock)
                trainer.train()
            medians[name].append(np.median(clock.seconds[WARMUP_STEPS:]))
    reference = np.array(medians["ce"])
    ratios = {name: float(np.median(np.array(values) / reference)) for name, values in medians.items()}
    path = folder / "step_times.csv"
    # What was measured before of methods that are not part of this run stays.
    before = dict(pd.read_csv(path).itertuples(index=False)) if path.exists() else {}
    frame = pd.DataFrame((before | ratios).items(), columns=["method", "ratio"])
    frame.to_csv(path, index=False, float_format="%.3f")
    return frame
