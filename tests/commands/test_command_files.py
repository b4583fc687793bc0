"""What `lpg-hf train` leaves in its folder: cells that are no formulas, and what becomes of files that are cut off."""

import csv
import json
import shutil
from itertools import islice

import pytest
from command_data import QUIET, text_model, text_rows, words, write_csv

from lpg_hf.commands import run_files
from lpg_hf.commands.main import main
from lpg_hf.commands.train import train
from lpg_hf.data.issues_csv import IssueTable
from lpg_hf.safe_text import restored_cell


pytestmark = pytest.mark.usefixtures("fresh_datasets_cache")

NAMES = {"red": '=HYPERLINK("http://x.org")', "green": "-ve", "blue": "'tis"}


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    """A finished training on classes whose names a spreadsheet would evaluate, and its arguments."""
    root = tmp_path_factory.mktemp("files")
    rows = [row | {"label": NAMES[row["label"]]} for row in text_rows(36)]
    file = write_csv(root / "train.csv", rows)
    argv = ["--model_name_or_path", text_model(root / "model"), "--train_file", file, "--validation_file", file]
    argv += ["--test_file", file, "--do_train", "--do_eval", "--do_predict", *QUIET, "--learning_rate", 0.02]
    argv += ["--num_train_epochs", 6, "--save_strategy", "epoch"]
    argv = words(*argv)
    results = train("text", [*argv, "--output_dir", str(root / "out")])
    assert results["predict_accuracy"] == 1
    return argv, root / "out", [row["label"] for row in rows]


@pytest.fixture
def out(training, tmp_path):
    return shutil.copytree(training[1], tmp_path / "out")


def read(path):
    with path.open(newline="", encoding="utf-8-sig") as file:
        return list(csv.DictReader(file))


def test_predictions_are_no_formulas_and_come_back(training):
    _, out, labels = training
    cells = [line["prediction"] for line in read(out / "predictions.csv")]
    assert set(cells) == {"'" + name for name in NAMES.values()}
    assert list(map(restored_cell, cells)) == labels


def test_names_of_such_classes_are_fixes(training, tmp_path, caplog):
    argv, out, labels = training
    main(["issues", str(out), "--export", str(tmp_path / "issues.csv")])
    lines = read(tmp_path / "issues.csv")
    for line, wanted in zip(lines, [*NAMES.values()] * len(lines), strict=False):
        assert line["label_name"] == "'" + labels[int(line["row"])]
        line["fix"] = "'" + wanted if int(line["row"]) % 2 else wanted
    changed = sum(restored_cell(line["fix"]) != labels[int(line["row"])] for line in lines)
    assert 0 < changed < len(lines)
    fixes = ["--fixes", str(write_csv(tmp_path / "fixes.csv", lines)), "--max_steps", "1"]
    with caplog.at_level("INFO"):
        train("text", [*argv, *fixes, "--output_dir", str(tmp_path / "again")])
    assert f"{changed} labels changed" in caplog.text


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-9])
    return path


def test_a_command_that_is_cut_off(training, out, capsys):
    path = cut_off(out / run_files.COMMAND_FILE)
    with pytest.raises(SystemExit, match=rf"^lpg-hf: error: {path} is no whole JSON file: .* run it again\."):
        main(["report", str(out)])
    train("text", [*training[0], "--output_dir", str(out)])
    assert json.loads(path.read_text())["kind"] == "text"
    path.write_text('{"kind": "text"}')
    with pytest.raises(SystemExit, match=rf"^lpg-hf: error: {path} has no 'arguments'\. .* run it again\."):
        main(["report", str(out)])


def test_results_that_are_cut_off(training, out, caplog):
    path = cut_off(out / "eval_results.json")
    with pytest.raises(SystemExit, match=rf"^lpg-hf: error: {path} is no whole JSON file: .* run it again\."):
        main(["compare", str(out)])
    cut_off(out / "all_results.json")
    results = train("text", [*training[0], "--output_dir", str(out)])
    assert f"{out / 'all_results.json'} is no whole JSON file" in caplog.text
    assert json.loads(path.read_text())["eval_accuracy"] == 1
    # The training was finished, and wrote no results of its own.
    written = json.loads((out / "all_results.json").read_text())
    assert written == {name: value for name, value in results.items() if not name.startswith("train_")}

    path = cut_off(out / "train_results.json")
    with pytest.raises(SystemExit, match=rf"^lpg-hf: error: {path} is no whole JSON file: .* Delete it\."):
        main(["train", "text", *training[0], "--output_dir", str(out)])
    path.unlink()
    assert train("text", [*training[0], "--output_dir", str(out)])["epoch"] == 6


def test_labels_that_are_cut_off(training, out):
    *_, checkpoint = sorted(out.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    path = cut_off(checkpoint / run_files.LABELS_FILE)
    with pytest.raises(SystemExit, match=rf"^lpg-hf: error: {path} is no whole JSON file: .* Delete it to go on"):
        main(["train", "text", *training[0], "--output_dir", str(out)])


def test_a_state_that_is_cut_off(training, out):
    path = cut_off(out / "trainer_state.json")
    with pytest.raises(SystemExit, match=rf"^lpg-hf: error: {path} is no whole file\. The command that started it"):
        main(["report", str(out)])


def test_a_process_that_is_killed_leaves_the_label_issues_before(training, out, monkeypatch):
    issues, lines = out / run_files.ISSUES_FILE, IssueTable.lines
    whole = issues.read_bytes()

    def killed(table, *args):
        yield from islice(lines(table, *args), 20)
        raise KeyboardInterrupt

    monkeypatch.setattr(IssueTable, "lines", killed)
    with pytest.raises(KeyboardInterrupt):
        train("text", [*training[0], "--output_dir", str(out)])
    assert issues.read_bytes() == whole
