"""Two processes, of which one alone meets a batch of another kind: they decide together, and none waits for ever."""

import subprocess
import sys

import odd_batches
import pytest
import torch
from odd_batches import HARD, NONE, SOFT


WATCHDOG_SECONDS = 300


@pytest.mark.parametrize(
    ("kinds", "seen"),
    [
        # Each pair is a step. A step of odd batches alone leaves the decision open.
        ((SOFT, HARD, HARD, HARD, HARD, SOFT, HARD, NONE), 5),
        ((SOFT, SOFT, HARD, SOFT, HARD, HARD), 3),
        ((HARD, HARD, SOFT, NONE, HARD, HARD), 4),
    ],
)
def test_an_odd_batch_on_one_process(kinds, seen, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    done = subprocess.run(
        [*command, odd_batches.__file__, ",".join(kinds), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=WATCHDOG_SECONDS,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = torch.load(tmp_path / "result.pt")
    assert result["steps"] == len(kinds) // 2
    assert result["seen"].sum() == 4 * seen
