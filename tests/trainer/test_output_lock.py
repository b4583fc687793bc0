"""Of two trainings with one output folder the second is told, and a training that was killed blocks nobody."""

import errno
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from accelerate import Accelerator
from tiny import make_batch, make_model, make_trainer, split

from lpg_hf import LPGTrainer
from lpg_hf.trainer.output_lock import LOCK_FILE, sole_writer


pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="nothing is locked on Windows")

HOLDER = """
import os, sys, time
from accelerate import Accelerator
from lpg_hf.trainer.output_lock import sole_writer
with sole_writer(sys.argv[1], Accelerator(cpu=True)):
    if len(sys.argv) > 2 and os.fork() == 0:  # a child that outlives its parent
        os.close(1)
        time.sleep(60)
    print("locked", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Starts processes that train into the folder, as far as its lock is concerned."""
    started = []

    def start(*args):
        command = [sys.executable, "-c", HOLDER, str(tmp_path / "run"), *args]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True))
        assert started[-1].stdout.readline() == "locked\n"
        return started[-1]

    yield start
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


def train(path, resume=None, **args):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4} | args
    trainer = make_trainer(LPGTrainer, make_model("bert"), split(make_batch("bert", 32), [8] * 4), path, args=settings)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_the_second_training_is_told_whose_the_folder_is(holder, tmp_path):
    process = holder()
    with pytest.raises(
        RuntimeError, match=rf"Another training writes .*run: process {process.pid} on .*own `output_dir`"
    ):
        train(tmp_path / "run")
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    train(tmp_path / "other")
    train(tmp_path / "run", save_strategy="no")  # it writes no checkpoints


@pytest.mark.parametrize("args", [(), ("with child",)], ids=["alone", "with a child that lives on"])
def test_a_training_that_was_killed_does_not_block_its_resumption(args, holder, tmp_path):
    train(tmp_path / "run", max_steps=2)
    process = holder(*args)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert (tmp_path / "run" / LOCK_FILE).exists()
    assert train(tmp_path / "run", resume=True).state.global_step == 4
    assert not (tmp_path / "run" / LOCK_FILE).exists()


def test_the_folder_is_free_after_a_training_however_it_ends(tmp_path, monkeypatch):
    def fails(self, *args):
        assert (tmp_path / LOCK_FILE).exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(LPGTrainer, "_save_rng_state", fails)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path)
    monkeypatch.undo()
    assert not (tmp_path / LOCK_FILE).exists()
    train(tmp_path)
    assert sorted(path.name for path in Path(tmp_path).iterdir()) == ["checkpoint-2", "checkpoint-4"]


def test_a_training_within_a_training_of_the_same_process_is_told_and_the_outer_one_keeps_the_folder(tmp_path):
    link = tmp_path / "link"
    (tmp_path / "run").mkdir()
    link.symlink_to(tmp_path / "run")
    with sole_writer(tmp_path / "run", Accelerator(cpu=True)):
        for folder in (tmp_path / "run", link):
            with (
                pytest.raises(RuntimeError, match="it runs in this process"),
                sole_writer(folder, Accelerator(cpu=True)),
            ):
                pass
        # Another process finds the folder locked still.
        command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
        other = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert other.returncode != 0 and f"process {os.getpid()} on" in other.stderr
    with sole_writer(link, Accelerator(cpu=True)):
        pass


def test_a_lock_that_the_file_system_lacks_is_a_warning_and_leaves_no_file(tmp_path, caplog, monkeypatch):
    def fails(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", fails)
    with caplog.at_level("WARNING", logger="lpg_hf"), sole_writer(tmp_path, Accelerator(cpu=True)):
        assert not (tmp_path / LOCK_FILE).exists()
    assert "No locks available" in caplog.text


def test_a_folder_that_cannot_be_locked_trains_with_a_warning(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with caplog.at_level("WARNING", logger="lpg_hf"), sole_writer(tmp_path / "file" / "run", Accelerator(cpu=True)):
        pass
    assert "Whether another training writes checkpoints to" in caplog.text
