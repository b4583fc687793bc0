"""The commands that README and docs/ show exist, and take the arguments that are shown."""

import re
import shlex

import pytest
from documents import DOCS, ROOT, blocks

from lpg_hf.commands.main import main


PAGES = [ROOT / "README.md", *DOCS]


def commands(page):
    """The commands of a page as lists of words, without comments."""
    text = "".join(blocks(page, "bash")).replace("\\\n", "")
    parts = [part for line in text.splitlines() for part in re.split(r"&&", line)]
    return [words for part in parts if (words := shlex.split(part, comments=True))]


def flags(words):
    return [word for word in words if word.startswith("--")]


def shown(begin):
    """The commands that begin with these words, with the page that shows them."""
    found = [(page, words) for page in PAGES for words in commands(page) if words[: len(begin)] == begin]
    return [pytest.param(words, id=f"{page.stem}-{number}") for number, (page, words) in enumerate(found)]


@pytest.mark.parametrize("words", shown(["lpg-hf"]))
def test_lpg_hf_has_the_arguments(words, capsys):
    end = 3 if words[1] == "train" else 2
    with pytest.raises(SystemExit) as exit_:
        main([*words[1:end], "--help"])
    known = re.findall(r"--\w+", capsys.readouterr().out)
    assert exit_.value.code == 0 and [flag for flag in flags(words) if flag not in known] == []


@pytest.mark.parametrize("words", shown(["python"]))
def test_scripts_have_the_arguments(words):
    text = (ROOT / words[1]).read_text()
    assert [flag for flag in flags(words) if not re.search(rf"\b{flag.removeprefix('--')}\b", text)] == []


def test_files_that_are_launched_and_targets_that_are_made_exist():
    makefile = (ROOT / "Makefile").read_text()
    seen = {"accelerate": 0, "make": 0}
    for page in PAGES:
        for words in commands(page):
            if words[:3] == ["accelerate", "launch", "--config_file"]:
                assert (ROOT / words[3]).is_file(), words
                seen["accelerate"] += 1
        for targets in re.findall(r"\bmake ((?:quality|style|test)[\w -]*)", page.read_text()):
            assert all(f"\n{target}:" in makefile for target in targets.split()), targets
            seen["make"] += 1
    assert all(seen.values())
