"""Files that a process writes while it is killed, and files that somebody has cut off."""

import json
import os
import signal
import subprocess
import sys
import threading

import pytest

from lpg_hf.pac_bayes.certificate_json import write_json
from lpg_hf.whole_files import read_json_object, replacing, write_json_object


def test_a_process_that_is_killed_leaves_the_file_before_it(tmp_path):
    path = tmp_path / "results.json"
    write_json_object(path, {"accuracy": 0.5})
    before = path.read_bytes()
    code = """\
import os, signal, sys
from lpg_hf.whole_files import replacing
with replacing(sys.argv[1]) as new, new.open("w", encoding="utf-8") as file:
    file.write("half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""
    process = subprocess.run([sys.executable, "-c", code, str(path)], env=os.environ, check=False)
    assert process.returncode == -signal.SIGKILL
    assert path.read_bytes() == before
    # What it left begins with an underscore, which no upload takes, and is in nobody's way.
    assert {file.name for file in tmp_path.iterdir()} == {"results.json", "_results.json.new"}
    write_json_object(path, {"accuracy": 0.75})
    assert read_json_object(path, "") == {"accuracy": 0.75}
    assert {file.name for file in tmp_path.iterdir()} == {"results.json"}


@pytest.mark.parametrize("write", [write_json_object, lambda path, entries: write_json(entries, path)])
def test_an_error_leaves_nothing_new(write, tmp_path):
    path = tmp_path / "results.json"
    write(path, {"accuracy": 0.5})
    before = path.read_bytes()
    with pytest.raises(TypeError):
        write(path, {"accuracy": object()})
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_an_error_within_the_block_leaves_nothing_new(tmp_path):
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "a.txt") as new:
        new.write_text("half")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_links_are_followed_and_pipes_are_written(tmp_path):
    (tmp_path / "link.txt").symlink_to(tmp_path / "file.txt")
    with replacing(tmp_path / "link.txt") as new:
        new.write_text("a")
    assert (tmp_path / "link.txt").is_symlink() and (tmp_path / "file.txt").read_text() == "a"
    os.mkfifo(tmp_path / "pipe")
    read = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()))
    reader.start()
    with replacing(tmp_path / "pipe") as new:
        new.write_text("b")
    reader.join()
    assert read == ["b"] and (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b'{"accuracy": 0.', "is no whole JSON file: Expecting"),
        (b"", "is no whole JSON file: Expecting value"),
        (b"\xff", "is no whole JSON file: .*codec can't decode"),
        (b"[" * 10**5, "is no whole JSON file: .*recursion"),
        (b"[1]", "holds a list, but must hold named entries"),
    ],
)
def test_a_broken_file_is_named_with_its_cure(content, problem, tmp_path):
    path = tmp_path / "results.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{path} {problem}.* Delete it\.$"):
        read_json_object(path, "Delete it.")


def test_any_object_comes_back(tmp_path):
    entries = {"é": [1, None, 0.1, "\ud800"], "b": {"c": True}}
    write_json_object(tmp_path / "a.json", entries)
    assert read_json_object(tmp_path / "a.json", "") == json.loads((tmp_path / "a.json").read_text()) == entries
