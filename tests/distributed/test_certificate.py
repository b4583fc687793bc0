"""Two processes that share the draws give the certificate and the path length of one process."""

import subprocess
import sys

import certify_exact
import pytest
import torch
from certify_exact import run

from lpg_hf.pac_bayes import Certificate


SCRIPT = certify_exact.__file__
WATCHDOG_SECONDS = 300


def test_two_processes_certify_like_one(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", SCRIPT]
    done = subprocess.run(
        [*command, ",".join(["8"] * 12), str(tmp_path)], capture_output=True, text=True, timeout=WATCHDOG_SECONDS
    )
    assert done.returncode == 0, done.stderr[-3000:]
    expected, lengths = run([16] * 6, tmp_path / "alone")
    first, second = (Certificate.load(tmp_path / f"certificate_{rank}.json") for rank in range(2))
    assert first == second
    # Training differs in the last bits, and no draw is so close to another answer.
    assert first.kl == pytest.approx(expected.kl, rel=1e-9)
    for ours, theirs in zip((first.overall, *first.per_class), (expected.overall, *expected.per_class), strict=True):
        assert (ours.error, ours.error_limit) == (theirs.error, theirs.error_limit)
        assert ours.bound == pytest.approx(theirs.bound, abs=1e-9)
    assert [c.error for c in first.selection] == [c.error for c in expected.selection]
    assert torch.load(tmp_path / "lengths.pt") == pytest.approx(lengths, abs=1e-9)
