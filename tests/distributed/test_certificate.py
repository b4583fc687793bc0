"""Two processes that share the draws give the certificate and the path length of one process."""

import subprocess
import sys

import certify_exact
import certify_shards
import pytest
import torch
from certify_exact import run

from lpg_hf.pac_bayes import Certificate


WATCHDOG_SECONDS = 300


def run_on_two_processes(script, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", script.__file__]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=WATCHDOG_SECONDS)
    assert done.returncode == 0, done.stderr[-3000:]


def test_two_processes_certify_like_one(tmp_path):
    run_on_two_processes(certify_exact, ",".join(["8"] * 12), str(tmp_path))
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


def test_processes_with_rows_or_weights_of_their_own_are_refused(tmp_path):
    """Draws on the rows of another process would count no error in classes that only this one has."""
    run_on_two_processes(certify_shards, str(tmp_path))
    for rank in range(2):
        messages = (tmp_path / f"messages_{rank}").read_text().split("\n")
        assert len(messages) == 6 and messages[4:] == ["", ""]
        assert all("the whole data set, not its shard" in message for message in messages[:4])
