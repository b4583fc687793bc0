"""A training of four processes that loses one ends soon and says so, and is resumed as if nothing had happened."""

import json
import subprocess
import sys
import time

import lost_process
import pytest
import torch
from lost_process import PLACES, RESUMED, WHOLE


pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks")
# What gloo says to the others.
LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
OWN_MESSAGES = {
    "killed in a step": "",
    "killed in a save": "",
    "an error in the loss": "RuntimeError: an error of one process alone",
    "an error while the statistics travel": "RuntimeError: an error of one process alone",
    "an error in a log": "RuntimeError: an error of one process alone",
    "a full disk in a save": "OSError: [Errno 28] No space left on device",
    "a label out of range": "ValueError: The loss failed with: Target 99 is out of bounds",
}


def run(path, *places):
    done = subprocess.run([sys.executable, lost_process.__file__, path, *places], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((path / "results.json").read_text())


def check(place, result):
    lost_rank = str(PLACES[place][0])
    assert result["hanging"] == []
    assert max(result["seconds"].values()) < 60  # a promise: nobody waits for the timeout of a collective
    assert result["status"][lost_rank] == (-9 if place.startswith("killed") else 1)
    assert OWN_MESSAGES[place] in result["said"][lost_rank]
    for rank in result["status"].keys() - {lost_rank}:
        assert result["status"][rank] != 0
        assert any(message in result["said"][rank] for message in LOST_PEER), result["said"][rank]


def test_a_training_that_lost_a_process_ends_and_is_resumed(tmp_path):
    results = run(tmp_path, WHOLE, "killed in a save", RESUMED)
    check("killed in a save", results["killed in a save"])
    for place in (WHOLE, RESUMED):
        assert set(results[place]["status"].values()) == {0}, results[place]["said"]
    whole, resumed = torch.load(tmp_path / f"0.{WHOLE}.pt"), torch.load(tmp_path / f"1.{RESUMED}.pt")
    assert torch.equal(resumed["parameters"], whole["parameters"])
    assert torch.equal(resumed["running"], whole["running"])
    assert resumed["issues"]["row"] and set(resumed["issues"]["row"]) == set(whole["issues"]["row"])


@pytest.mark.slow
def test_a_process_may_be_lost_anywhere(tmp_path):
    results = run(tmp_path, *PLACES)
    for place, result in results.items():
        print(place, result["status"], result["seconds"])
        check(place, result)


@pytest.mark.slow
def test_torchrun_ends_as_well(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=4", "--standalone"]
    done = subprocess.run(
        [*command, lost_process.__file__, tmp_path / "run", "killed in a step"], capture_output=True, text=True
    )
    seconds = time.time() - (tmp_path / "run.lost").stat().st_mtime
    print(seconds, done.stderr[-1000:])
    assert done.returncode != 0
    assert seconds < 60
    assert "Signal 9 (SIGKILL) received" in done.stderr
