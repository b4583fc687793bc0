"""The steps of docs/label_cleaning.md run one after the other, and do what the text says."""

import csv
import re
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset
from tiny import make_model
from transformers import TrainingArguments

from lpg_hf.data.issues_csv import TEXT_ROWS
from lpg_hf.report.page import SHOWN_ISSUES


PAGE = (Path(__file__).parents[1] / "docs" / "label_cleaning.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
NAMES = ["ant", "bee", "cat", "dog"]
WRONG = range(8)


@pytest.fixture
def namespace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = {
        "input_ids": [[1 + row % 4, row % 25] for row in range(80)],
        "label": [(row + (row in WRONG)) % 4 for row in range(80)],
        "text": [f"the text of row {row}" for row in range(80)],
    }
    train = Dataset.from_dict(rows).cast_column("label", ClassLabel(names=NAMES))
    args = TrainingArguments(
        "out", report_to=[], num_train_epochs=10, learning_rate=1e-2, use_cpu=True, disable_tqdm=True, save_steps=50
    )
    return {"load_model": lambda: make_model("bert"), "args": args, "train": train, "test": train.select(range(8, 80))}


def fill(path, fixes):
    """What a person does with a spreadsheet."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        lines = list(csv.DictReader(file))
    for line in lines:
        line["fix"] = fixes.get(int(line["row"]), "")
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    return lines


def test_the_steps(namespace):
    find, look, write, fix, from_program, again, export = BLOCKS
    exec(find, namespace)
    assert set(namespace["issues"]["row"][:8]) == set(WRONG)
    exec(look, namespace)
    assert namespace["page"] == str(Path("out/report/report.html")) and Path(namespace["page"]).is_file()
    assert SHOWN_ISSUES == 100 and TEXT_ROWS == 1000  # as the text says
    exec(write, namespace)

    names = {row: NAMES[row % 4] for row in WRONG}
    lines = fill("issues.csv", names | {0: f"#{0 % 4}", 1: "drop"})
    assert len(lines) == 80 and lines[0]["text"] == f"the text of row {lines[0]['row']}"
    exec(fix, namespace)
    true = [row % 4 for row in range(80) if row != 1]
    assert namespace["fixed"]["label"][:] == true

    exec(from_program, namespace)
    expected, lines = namespace["train"]["label"][:], namespace["lines"]
    assert {line["row"] for line in lines} & set(WRONG)
    for line in lines:
        expected[line["row"]] = line["fix"]
    assert namespace["trusting"]["label"][:] == expected

    exec(again, namespace)
    assert namespace["again"].args.output_dir == "out-fixed" and namespace["args"].output_dir == "out"
    assert max(namespace["again"].label_issues()["row"]) == 78
    exec(export, namespace)
    with open("again.csv", newline="", encoding="utf-8-sig") as file:
        assert [int(line["row"]) for line in csv.DictReader(file)] == namespace["issues"]["row"][:]


def test_links_and_commands():
    for target in re.findall(r"\]\(([^)#:]+)\)", PAGE):
        assert (Path(__file__).parents[1] / "docs" / target).is_file(), target
    commands = re.search(r"^```bash\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)[1].replace("\\\n", "").splitlines()
    assert "lpg-hf issues out --export issues.csv" in commands
    assert commands[-1] == commands[0].replace(" out", " out-fixed") + " --fixes issues.csv"
