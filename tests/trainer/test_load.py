"""Many steps and many kills: memory stays flat, and a training that is killed again and again loses nothing."""

import json
import os
import subprocess
import sys
from statistics import median

import kill_and_resume
import memory_curve
import pytest
import torch


needs_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc, and forks")


def run(script, *args):
    done = subprocess.run(
        [sys.executable, script.__file__, *map(str, args)],
        capture_output=True,
        text=True,
        # A library that starts threads when it is imported could not be forked.
        env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def check_kills(path, num_steps, num_kills, seed):
    result = run(kill_and_resume, path, num_steps, num_kills, seed)
    whole, killed = (torch.load(path / f"{name}.pt") for name in ("whole", "killed"))
    assert result["kills"] == num_kills
    assert killed["steps"] == whole["steps"] == num_steps
    # Every step of every training between two kills, and every checkpoint, not only the end.
    assert result["compared"] > num_steps
    assert result["differed"] == 0
    # No resume begins before the newest checkpoint that was announced.
    assert result["lost"] == 0
    assert torch.equal(killed["parameters"], whole["parameters"])
    assert killed["loss"].keys() == whole["loss"].keys()
    for name, value in whole["loss"].items():
        assert torch.equal(killed["loss"][name], value), name
    assert killed["issues"] == whole["issues"]
    assert len(whole["issues"]["row"]) == kill_and_resume.NUM_ROWS
    assert killed["losses"] == whole["losses"]
    return result


@needs_linux
def test_three_kills_lose_nothing(tmp_path):
    check_kills(tmp_path, num_steps=300, num_kills=3, seed=0)


@needs_linux
@pytest.mark.slow
def test_two_hundred_kills_lose_nothing(tmp_path):
    result = check_kills(tmp_path, num_steps=6000, num_kills=200, seed=2026)
    print(result)
    assert result["struck"].keys() == set(kill_and_resume.PHASES)
    assert result["struck"][kill_and_resume.SAVING] > 20
    assert len(result["cut"]) > 3


@needs_linux
def test_no_tensor_outlives_its_step(tmp_path):
    """Counted in the same place of every round of logs, evaluations, checkpoints and waiting row records."""
    tensors = run(memory_curve, "LPGTrainer", tmp_path, 300, 10, "count")["tensors"]
    assert max(tensors[5:15]) == max(tensors[-10:])


@needs_linux
@pytest.mark.slow
@pytest.mark.parametrize("trainer", memory_curve.TRAINERS)
def test_memory_is_flat_over_fifty_thousand_steps(trainer, tmp_path):
    """The plain Trainer as well, next to which the numbers can be read. A tenth of the steps is the warm-up."""
    result = run(memory_curve, trainer, tmp_path, 50_000, 500)
    curve = result["curve"]
    print({step: round(curve[step], 2) for step in range(0, len(curve), 10)}, curve[-1])
    assert median(curve[-10:]) < 1.01 * median(curve[10:20])
