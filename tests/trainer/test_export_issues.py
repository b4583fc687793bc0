"""The label issues of an output folder are those of its training."""

import csv
import os
import shutil

import pytest
from datasets import ClassLabel, Dataset
from tiny import make_model
from transformers import TrainingArguments

from lpg_hf import LPGTrainer
from lpg_hf.data import apply_fixes
from lpg_hf.trainer import export_issues


NAMES = ["ant", "bee", "cat", "dog"]
ROWS = 104
OPEN_GATES = "class_relative_dampening(learned=(0.0, 0.01), evidence=(0.0, 0.001))"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("out")
    true = [row % 4 for row in range(ROWS)]
    rows = {"input_ids": [[1 + label, row % 25] for row, label in enumerate(true)]}
    rows["label"] = [(label + (row < 10)) % 4 for row, label in enumerate(true)]
    rows["text"] = [f"the text of row {row}" for row in range(ROWS)]
    dataset = Dataset.from_dict(rows).cast_column("label", ClassLabel(names=NAMES))
    model = make_model("bert")
    model.config.id2label = dict(enumerate(NAMES))
    args = TrainingArguments(
        str(folder), report_to=[], use_cpu=True, disable_tqdm=True, max_steps=130, save_steps=65, learning_rate=1e-2
    )
    trainer = LPGTrainer(model=model, args=args, train_dataset=dataset, perturbations=[OPEN_GATES])
    trainer.train()
    return trainer, folder


@pytest.fixture
def out(trained, tmp_path):
    return shutil.copytree(trained[1], tmp_path / "out")


def lines_of(path):
    with path.open(newline="", encoding="utf-8-sig") as file:
        return list(csv.DictReader(file))


def check(path, trainer, columns):
    lines, issues = lines_of(path), trainer.label_issues()
    assert list(lines[0]) == columns
    assert [int(line["row"]) for line in lines] == issues["row"][:]
    assert [float(line["score"]) for line in lines] == pytest.approx(issues["score"][:])
    assert [float(line["weight"]) for line in lines] == pytest.approx(issues["weight"][:])
    for column in ("label", "suggested_label"):
        assert [int(line[column]) for line in lines] == issues[column][:]
        assert [line[f"{column}_name"] for line in lines] == [NAMES[label] for label in issues[column]]


FROM_CHECKPOINT = ["fix", "row", "score", "label_name", "suggested_label_name", "label", "suggested_label"]
FROM_CHECKPOINT += ["weight", "visits"]


def test_from_a_checkpoint(trained, out, tmp_path):
    path = tmp_path / "issues.csv"
    assert export_issues(out, path) == ROWS
    check(path, trained[0], FROM_CHECKPOINT)
    shutil.rmtree(out / "checkpoint-130")
    assert export_issues(out, path) == ROWS  # of the former half of the training
    assert {line["visits"] for line in lines_of(path)} == {"5"}


@pytest.mark.parametrize("folder", ["report", "."])
def test_from_what_was_written_last(folder, trained, out, tmp_path):
    path, trainer = tmp_path / "issues.csv", trained[0]
    trainer.report(out / folder)
    assert export_issues(str(out), str(path)) == ROWS
    check(path, trainer, [*FROM_CHECKPOINT[:5], "text", *FROM_CHECKPOINT[5:]])
    assert path.read_bytes() == (out / folder / "label_issues.csv").read_bytes()
    row = int(lines_of(path)[0]["row"])
    assert lines_of(path)[0]["text"] == trainer.train_dataset[row]["text"]
    os.utime(out / "checkpoint-130" / "lpg_rows.safetensors", (2**32, 2**32))
    export_issues(out, path)
    check(path, trainer, FROM_CHECKPOINT)


def test_what_is_exported_can_be_fixed(trained, out, tmp_path):
    path, dataset = tmp_path / "issues.csv", trained[0].train_dataset
    export_issues(out, path)
    first = lines_of(path)[0]
    text = path.read_text(encoding="utf-8-sig")
    path.write_text(text.replace("\n,", f"\n{first['suggested_label_name']},", 1))
    fixed, expected = apply_fixes(dataset, path)["label"][:], dataset["label"][:]
    expected[int(first["row"])] = int(first["suggested_label"])
    assert fixed == expected
    with pytest.raises(ValueError, match="has fixes that would be lost"):
        export_issues(out, path)


def test_a_report_keeps_the_fixes_in_the_file_of_an_earlier_one(trained, tmp_path, caplog):
    trainer = trained[0]
    trainer.report(tmp_path)
    path = tmp_path / "label_issues.csv"
    edited = path.read_text(encoding="utf-8-sig").replace("\n,", "\ndrop,", 1)
    path.write_text(edited)
    trainer.report(tmp_path)
    check(path, trainer, [*FROM_CHECKPOINT[:5], "text", *FROM_CHECKPOINT[5:]])
    assert (tmp_path / "label_issues.old1.csv").read_text() == edited
    path.write_text(edited.replace("drop", "ant"))
    trainer.report(tmp_path)
    assert (tmp_path / "label_issues.old1.csv").read_text() == edited
    assert (tmp_path / "label_issues.old2.csv").read_text() == edited.replace("drop", "ant")
    assert "label_issues.csv was not written by a report, or has fixes. It is kept as" in caplog.text


def test_a_folder_without_issues(out, tmp_path):
    for checkpoint in out.glob("checkpoint-*"):
        (checkpoint / "trainer_state.json").unlink()
    with pytest.raises(ValueError, match=r"no label issues in .*: neither report/label_issues\.csv nor _report/"):
        export_issues(out, tmp_path / "issues.csv")
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        export_issues(tmp_path / "none", tmp_path / "issues.csv")
