"""From label issues to fixes: `lpg-hf issues OUT --export`, a filled column, `lpg-hf train --fixes`."""

import csv
import json

import pytest
from command_data import QUIET, text_model, text_rows, words, write_csv

from lpg_hf.commands import run, run_files
from lpg_hf.commands.main import main
from lpg_hf.commands.train import train
from lpg_hf.trainer import LPGTrainer


pytestmark = pytest.mark.usefixtures("fresh_datasets_cache")


ROWS = 60


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    """A training with a fifth of the labels wrong and without validation rows; its arguments and its label issues."""
    root = tmp_path_factory.mktemp("fixes")
    argv = ["--model_name_or_path", text_model(root / "model"), "--train_file"]
    argv += [write_csv(root / "train.csv", text_rows(ROWS)), "--label_noise", 0.2, "--do_train", "--do_eval", *QUIET]
    argv += ["--max_train_samples", 40, "--num_train_epochs", 3, "--save_strategy", "no"]
    train("text", words(*argv, "--output_dir", root / "out"))
    main(["issues", str(root / "out"), "--export", str(root / "issues.csv")])
    return words(*argv), root


@pytest.fixture
def prepared(monkeypatch):
    """What the next run trains on."""
    found, original = [], run.prepare
    monkeypatch.setattr(run, "prepare", lambda *args: found.append(original(*args)) or found[-1])
    return found


def read(path):
    with path.open(newline="", encoding="utf-8-sig") as file:
        return list(csv.DictReader(file))


def true_label(text):
    return {"rose": "red", "grass": "green", "sky": "blue"}[text.split()[1]]


def test_corrected_labels_are_trained_on(training, prepared, tmp_path, caplog):
    """The file shows text and label of each row. Wrong ones are corrected, and one row is dropped."""
    argv, root = training
    lines = read(root / "issues.csv")
    assert len(lines) == 40 and next(iter(lines[0])) == "fix"
    wrong = [line for line in lines if line["label_name"] != true_label(line["text"])]
    assert len(wrong) == 8  # a fifth
    for line in wrong:
        line["fix"] = true_label(line["text"])
    dropped = next(line for line in lines if not line["fix"])
    dropped["fix"] = "drop"
    fixes = write_csv(tmp_path / "fixes.csv", lines[::-1])
    with caplog.at_level("INFO"):
        results = train("text", [*argv, "--fixes", str(fixes), "--output_dir", str(tmp_path / "out")])
    rows = prepared[0].splits["train"]
    assert results["train_samples"] == len(rows) == 39
    names = rows.features["labels"].names
    assert [names[label] for label in rows["labels"]] == [true_label(text) for text in rows["text"]]
    assert "8 labels changed, 1 rows dropped" in caplog.text
    assert json.loads((tmp_path / "out" / "_lpg" / "command.json").read_text())["arguments"][-4] == "--fixes"
    main(["issues", str(tmp_path / "out"), "--export", str(tmp_path / "again.csv")])
    assert all(line["label_name"] == true_label(line["text"]) for line in read(tmp_path / "again.csv"))


def test_a_finished_training_is_not_taken_for_one_on_fixed_labels(training, tmp_path):
    """Its folder has a checkpoint of the end, so that no step would be left for the new labels."""
    argv, root = training
    argv = [*argv, "--save_strategy", "epoch", "--output_dir", str(tmp_path / "out")]
    results = train("text", argv)
    lines = read(root / "issues.csv")
    lines[0]["fix"] = lines[0]["suggested_label_name"]
    fixes = ["--fixes", str(write_csv(tmp_path / "fixes.csv", lines))]
    weights = (tmp_path / "out" / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"checkpoint-\d+ comes from a training on other labels.*--overwrite_out"):
        train("text", [*argv, *fixes])
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == weights
    assert train("text", argv)["train_loss"] == results["train_loss"]  # the same labels
    train("text", [*argv, *fixes, "--overwrite_output_dir"])
    assert (tmp_path / "out" / "model.safetensors").read_bytes() != weights
    train("text", [*argv, *fixes])  # whose labels are now those of the folder
    with pytest.raises(ValueError, match="comes from a training on other labels"):
        train("text", argv)


def test_a_training_that_begins_anew_is_not_taken_for_the_finished_one_before_it(training, tmp_path, monkeypatch):
    """Killed and called again, it must go on from its own checkpoints."""
    argv, _ = training
    argv = [*argv, "--output_dir", str(tmp_path / "out")]
    train("text", argv)
    assert (tmp_path / "out" / run_files.COMMAND_FILE).exists()

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        train("text", [*argv, "--label_noise", "0.2", "--overwrite_output_dir"])
    assert not (tmp_path / "out" / run_files.COMMAND_FILE).exists()


def test_a_checkpoint_that_is_asked_for_is_not_taken_for_other_labels(training, tmp_path, caplog):
    """Neither by its path nor as the newest, and not from another folder: no step would be left."""
    argv, root = training
    out = tmp_path / "out"
    argv = [*argv, "--save_strategy", "epoch", "--output_dir"]
    results = train("text", [*argv, str(out)])
    *_, last = sorted(out.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    lines = read(root / "issues.csv")
    lines[0]["fix"] = lines[0]["suggested_label_name"]
    fixes = ["--fixes", str(write_csv(tmp_path / "fixes.csv", lines))]
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    cure = rf"Leave --resume_from_checkpoint out, .* pass --model_name_or_path {last}\.$"
    for folder, checkpoint in ((out, str(last)), (out, "true"), (tmp_path / "other", str(last))):
        resume = [str(folder), "--resume_from_checkpoint", checkpoint]
        for more in ([], ["--overwrite_output_dir"]):
            with pytest.raises(ValueError, match=rf"^{last} comes from a training on other labels.* {cure}"):
                train("text", [*argv, *resume, *fixes, *more])
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    # The same labels, and the cure.
    assert (
        train("text", [*argv, str(out), "--resume_from_checkpoint", str(last)])["train_loss"] == results["train_loss"]
    )
    with caplog.at_level("INFO"):
        train("text", [*argv, str(tmp_path / "other"), *fixes, "--model_name_or_path", str(last)])
    assert "1 labels changed" in caplog.text


def test_an_abandoned_training_is_not_taken_for_the_one_that_overwrites_it(training, tmp_path, monkeypatch):
    """Its checkpoints lie where they were, with the highest numbers."""
    argv, root = training
    argv = [*argv, "--save_strategy", "epoch", "--output_dir", str(tmp_path / "out")]
    train("text", argv)
    lines = read(root / "issues.csv")
    lines[0]["fix"] = lines[0]["suggested_label_name"]
    fixes = ["--fixes", str(write_csv(tmp_path / "fixes.csv", lines))]

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LPGTrainer, "training_step", killed)
        train("text", [*argv, *fixes, "--overwrite_output_dir"])
    with pytest.raises(ValueError, match="comes from a training on other labels"):
        train("text", [*argv, *fixes])


def test_a_training_that_was_killed_does_not_go_on_with_other_labels(training, tmp_path, monkeypatch):
    """Some of its steps would have one half of the labels, and some the other."""
    argv, root = training
    argv = [*argv, "--save_strategy", "epoch", "--output_dir", str(tmp_path / "out")]
    lines = read(root / "issues.csv")
    lines[0]["fix"] = lines[0]["suggested_label_name"]
    fixes = ["--fixes", str(write_csv(tmp_path / "fixes.csv", lines))]
    step = LPGTrainer.training_step

    def killed_in_the_second_epoch(trainer, *args):
        if trainer.state.epoch >= 1:
            raise KeyboardInterrupt
        return step(trainer, *args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LPGTrainer, "training_step", killed_in_the_second_epoch)
        train("text", argv)
    assert len(list((tmp_path / "out").glob("checkpoint-*"))) == 1
    with pytest.raises(ValueError, match=r"checkpoint-\d+ comes from a training on other labels"):
        train("text", [*argv, *fixes])
    assert train("text", argv)["epoch"] == 3


def test_fixes_of_other_rows_are_refused(training, tmp_path):
    argv, root = training
    lines = read(root / "issues.csv")
    lines[0]["fix"] = lines[0]["suggested_label_name"]
    fixes = str(write_csv(tmp_path / "fixes.csv", lines))
    with pytest.raises(ValueError, match=r"^`--fixes`: \d+ of 40 lines have another (label|text)"):
        train("text", [*argv, "--fixes", fixes, "--seed", "7", "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("other", "problem"),
    [
        (["--do_eval", "false"], "have another (label|text) than the dataset"),
        (["--seed", "7"], "have another (label|text) than the dataset"),
        (["--max_train_samples", "20"], r"row \d+ is out of range, since the dataset has 20 rows, 0 to 19\."),
    ],
    ids=["no validation rows", "another seed", "another row limit"],
)
def test_the_error_names_the_arguments_that_choose_the_rows_and_the_column_of_the_user(
    other, problem, training, tmp_path
):
    argv, root = training
    rows = [{"text": row["text"], "color": row["label"]} for row in text_rows(ROWS)]
    argv = [str(write_csv(tmp_path / "train.csv", rows)) if word == str(root / "train.csv") else word for word in argv]
    argv += [
        "--label_column_name",
        "color",
        "--fixes",
        str(root / "issues.csv"),
        "--output_dir",
        str(tmp_path / "out"),
    ]
    with pytest.raises(ValueError, match=rf"^`--fixes`: .*{problem}") as error:
        train("text", [*argv, *other])
    message = str(error.value)
    assert all(cause in message for cause in ("--do_eval", "--seed", "--max_train_samples", "column 'color'"))
    assert "'labels'" not in message and "Pass the training set" not in message


def test_fixes_that_are_not_there_or_for_no_training(training, tmp_path):
    argv, root = training
    with pytest.raises(FileNotFoundError, match=r"^`--fixes`: .*none\.csv"):
        train("text", [*argv, "--fixes", str(tmp_path / "none.csv"), "--output_dir", str(tmp_path / "out")])
    more = ["--do_train", "false", "--fixes", str(root / "issues.csv"), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(ValueError, match=r"`--fixes` corrects the labels of a training, but there is none"):
        train("text", [*argv, *more])
    assert not (tmp_path / "out").exists()
