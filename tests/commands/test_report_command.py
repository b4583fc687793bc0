"""`lpg-hf issues` and `lpg-hf report` of a training that has ended."""

import csv
import json
import re
import shutil

import pytest
from command_data import QUIET, text_model, text_rows, words, write_csv
from safetensors.torch import load_file
from transformers import Trainer

from lpg_hf.commands import issues, report, run
from lpg_hf.commands.main import main
from lpg_hf.commands.train import train
from lpg_hf.trainer import export_issues


pytestmark = pytest.mark.usefixtures("fresh_datasets_cache")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of a training that was started in it; a fifth of the labels is wrong."""
    root = tmp_path_factory.mktemp("training")
    text_model(root / "model")
    write_csv(root / "train.csv", text_rows(60))
    write_csv(root / "validation.csv", text_rows(12, 1))
    argv = [
        "--model_name_or_path",
        "model",
        "--train_file",
        "train.csv",
        "--validation_file",
        "validation.csv",
        *QUIET,
    ]
    argv += ["--do_train", "--do_eval", "--label_noise", 0.2, "--num_train_epochs", 6, "--learning_rate", 0.01]
    argv += ["--logging_steps", 10, "--output_dir", "out", "--token", "hf_secret"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        train("text", words(*argv))
    return root


def read(path):
    with open(path, newline="", encoding="utf-8-sig") as file:
        return list(csv.DictReader(file))


def test_issues_are_shown_and_exported(folder, tmp_path, capsys):
    main(["issues", str(folder / "out"), "--number", "3", "--export", str(tmp_path / "issues.csv")])
    rows = read(tmp_path / "issues.csv")
    assert sorted(int(row["row"]) for row in rows) == list(range(60))
    scores = [float(row["score"]) for row in rows]
    assert scores == sorted(scores, reverse=True)
    shown = capsys.readouterr().out.splitlines()[:4]
    assert shown[0].split()[:4] == ["row", "score", "label_name", "suggested_label_name"]
    for line, row in zip(shown[1:], rows, strict=False):
        names = [row["label_name"], row["suggested_label_name"]]
        assert line.split()[:4] == [row["row"], f"{float(row['score']):.3f}", *names]


def test_nothing_of_the_training_is_written_for_others(folder):
    command = json.loads((folder / "out" / "_lpg" / "command.json").read_text())
    assert "hf_secret" not in str(command) and command["kind"] == "text" and command["folder"] == str(folder)
    assert {path.name for path in (folder / "out" / "_lpg").iterdir()} == {"command.json", "label_issues.csv"}


def test_the_model_card_has_no_paths_of_this_machine(folder):
    card = (folder / "out" / "README.md").read_text(encoding="utf-8")
    assert "lpg_hf" in card
    assert "base_model" not in card and "fine-tuned version of" not in card and str(folder) not in card
    assert [run.on_hub(name) for name in (None, "org/name", str(folder / "model"))] == [None, "org/name", None]


def test_a_report_is_not_uploaded_with_the_model(folder, tmp_path, monkeypatch):
    """A push leaves out what begins with an underscore. To report later pushes nothing at all."""
    pushes = []
    monkeypatch.setattr(Trainer, "init_hf_repo", lambda trainer, **_: pushes.append("init"))
    monkeypatch.setattr(Trainer, "_push_from_checkpoint", lambda *_: pushes.append("checkpoint"))
    monkeypatch.setattr(Trainer, "push_to_hub", lambda *_, **__: pushes.append("end"))
    monkeypatch.chdir(folder)
    arguments = json.loads((folder / "out" / "_lpg" / "command.json").read_text())["arguments"]
    out = tmp_path / "out"
    argv = [*arguments, "--output_dir", str(out), "--num_train_epochs", "1", "--push_to_hub", "--report"]
    train("text", argv)
    assert pushes[0] == "init" and pushes[-1] == "end"
    assert (out / "_report" / "report.html").is_file() and not (out / "report").exists()
    assert export_issues(out, tmp_path / "issues.csv") == 60
    shutil.rmtree(out / "_report")
    pushes.clear()
    main(["report", str(out)])
    assert (out / "_report" / "report.html").is_file() and pushes == []


def test_the_report_is_that_of_the_training(folder, tmp_path, monkeypatch):
    """From another folder, where the paths of the data mean nothing; against `--report` of the same training."""
    before = {path: path.read_bytes() for path in (folder / "out").iterdir() if path.is_file()}
    monkeypatch.chdir(tmp_path)
    main(["report", str(folder / "out"), "--report_dir", "later"])
    assert before == {path: path.read_bytes() for path in before}
    monkeypatch.chdir(folder)
    arguments = json.loads((folder / "out" / "_lpg" / "command.json").read_text())["arguments"]
    train("text", [*arguments, "--output_dir", str(tmp_path / "again"), "--report"])
    for name in ("label_issues", "classes", "confusion", "calibration", "norms"):
        later, at_once = (read(tmp_path / where / f"{name}.csv") for where in ("later", "again/report"))
        assert later == at_once and len(later) > 0
    one, other = (load_file(where / "model.safetensors") for where in (folder / "out", tmp_path / "again"))
    assert all(one[name].equal(other[name]) for name in one)


def test_a_report_without_a_checkpoint_or_a_training(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no _lpg/command\.json in .*nowhere, which `lpg-hf train` writes"):
        report.write_report(str(tmp_path / "nowhere"))
    out = shutil.copytree(folder / "out", tmp_path / "out")
    shutil.rmtree(next(out.glob("checkpoint-*")))
    with pytest.raises(ValueError, match=r"no checkpoint of the end of the training in .*, step 48\. Train with"):
        report.write_report(str(out))
    (out / "trainer_state.json").unlink()
    with pytest.raises(ValueError, match=r"training in .*out is not finished\. The command that started it"):
        report.write_report(str(out))


def test_a_file_that_a_spreadsheet_has_written_anew(folder, tmp_path, capsys):
    """With semicolons, commas in numbers, columns in capitals, and an empty line."""
    main(["issues", str(folder / "out"), "--number", "3"])
    wanted = capsys.readouterr().out
    out = shutil.copytree(folder / "out", tmp_path / "out")
    (path,) = out.glob("_lpg/label_issues.csv")
    with path.open(newline="", encoding="utf-8-sig") as file:
        header, *lines = csv.reader(file)
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file, delimiter=";")
        writer.writerow(map(str.upper, header))
        writer.writerow([""] * len(header))
        writer.writerows([cell.replace(".", ",") for cell in line] for line in lines)
    main(["issues", str(out), "--number", "3"])
    assert capsys.readouterr().out == wanted and len(wanted.splitlines()) == 1 + 3


@pytest.mark.parametrize(("name", "wrong"), [("none/a.csv", r"no folder .*none"), ("folder", "which is a folder")])
def test_files_that_cannot_be_exported_to(name, wrong, folder, tmp_path, capsys):
    (tmp_path / "folder").mkdir()
    with pytest.raises(SystemExit) as exit_:
        main(["issues", str(folder / "out"), "--export", str(tmp_path / name)])
    assert exit_.value.code == 2 and re.search(wrong, capsys.readouterr().err)


def test_a_long_cell_is_cut():
    assert issues.cut("label_name", "x" * 30) == "x" * 23 + "…" and issues.cut("score", "0.12345") == "0.123"
    assert issues.cut("score", "97%") == "97%"


def test_a_training_without_label_issues(folder, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(folder)
    arguments = json.loads((folder / "out" / "_lpg" / "command.json").read_text())["arguments"]
    argv = [*arguments, "--output_dir", str(tmp_path / "out"), "--max_steps", "1", "--track_rows", "false"]
    train("text", argv)
    assert "There are no label issues of this training: Training records nothing of its rows" in caplog.text
    with pytest.raises(SystemExit, match=r"There are no label issues in .*out: neither"):
        main(["issues", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match=r"There is no folder .*nowhere"):
        main(["issues", str(tmp_path / "nowhere")])
