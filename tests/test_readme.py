"""What the README shows is true: its code runs, its table is the one the code makes."""

import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tiny import NUM_LABELS, flat_parameters, make_model
from transformers import TrainingArguments

from lpg_hf.perturbations.__main__ import with_table


README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
DIFF = re.search(r"^```diff\n(.*?)^```", README, re.DOTALL | re.MULTILINE)[1]


@pytest.fixture
def namespace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = {
        "input_ids": [[1, 2 + label % 8, 3 + label // 8] for label in range(32)],
        "label": [label % NUM_LABELS for label in range(32)],
    }
    return {
        "model": make_model("bert"),
        "args": TrainingArguments("out", report_to=[], max_steps=1, use_cpu=True, disable_tqdm=True),
        "train": Dataset.from_dict(rows),
        "test": Dataset.from_dict(rows),
    }


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_code_blocks_run(block, namespace):
    exec(block, namespace)
    if "logits.grad" in block:
        assert namespace["logits"].grad.shape == (8, 3)


@pytest.mark.parametrize(("sign", "trainer_class"), [("-", "Trainer"), ("+", "LPGTrainer")])
def test_both_sides_of_the_diff_train(sign, trainer_class, namespace):
    lines = [line[1:] for line in DIFF.splitlines() if line[:1] in (sign, " ")]
    before = flat_parameters(namespace["model"]).clone()
    exec("\n".join(lines), namespace)
    assert type(namespace["trainer"]).__name__ == trainer_class
    assert not torch.equal(before, flat_parameters(namespace["model"]))


def test_the_table_of_methods_is_not_stale():
    assert with_table(README) == README, "run: python -m lpg_hf.perturbations README.md"
