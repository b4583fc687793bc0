"""The notebook runs from top to bottom, shows what its text says, and is committed with its pictures."""

import json
import re
from copy import deepcopy
from pathlib import Path

import pytest
from notebook_cells import code_cells, run


PATH = Path(__file__).parents[2] / "examples" / "notebook.ipynb"
LARGEST_SIZE = 300_000  # bytes; a web page shows larger ones slowly


@pytest.fixture(scope="module")
def committed():
    return json.loads(PATH.read_text())


def kinds(notebook):
    """What each code cell shows."""
    return [[output["output_type"] for output in cell["outputs"]] for cell in code_cells(notebook)]


def printed(notebook):
    outputs = [output for cell in code_cells(notebook) for output in cell["outputs"]]
    return "".join(line for output in outputs if output["output_type"] == "stream" for line in output["text"])


def test_it_runs_and_shows_what_the_text_says(committed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    notebook = deepcopy(committed)
    namespace = run(notebook)
    assert kinds(notebook) == kinds(committed)
    ends = {name: values[-1] for name, values in namespace["accuracy"].items()}
    assert ends["LPGTrainer"] > ends["Trainer"] + 0.1  # 0.97 and 0.78
    best = max(namespace["accuracy"]["Trainer"])
    assert best > ends["Trainer"] + 0.05  # it was good, and then memorized wrong labels
    is_wrong = namespace["is_wrong"]
    assert is_wrong.mean() == pytest.approx(0.4, abs=0.02)
    assert is_wrong[namespace["first"]].mean() > 0.9
    assert namespace["left"] < 0.2 * is_wrong.sum()


def test_the_pictures_are_in_the_file(committed):
    assert PATH.stat().st_size < LARGEST_SIZE
    assert kinds(committed).count(["display_data"]) == 2 and ["stream", "display_data"] in kinds(committed)
    numbers = [float(number) for number in re.findall(r"([\d.]+)%", printed(committed))]
    assert numbers[0] + 10 < numbers[2]  # Trainer's and LPGTrainer's accuracy in the end


def test_it_is_a_notebook(committed):
    """What the format, version 4.5, asks of every cell."""
    assert (committed["nbformat"], committed["nbformat_minor"]) == (4, 5)
    names = [cell["id"] for cell in committed["cells"]]
    assert len(set(names)) == len(names) and all(re.fullmatch(r"[\w-]{1,64}", name) for name in names)
    for cell in committed["cells"]:
        assert cell.keys() >= {"cell_type", "id", "metadata", "source"}
        is_code = cell["cell_type"] == "code"
        assert is_code == ("outputs" in cell) == ("execution_count" in cell)
        assert is_code or cell["cell_type"] == "markdown"


def test_its_links_lead_somewhere(committed):
    text = "".join("".join(cell["source"]) for cell in committed["cells"] if cell["cell_type"] == "markdown")
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert links and [link for link in links if not (PATH.parent / link).exists()] == []
