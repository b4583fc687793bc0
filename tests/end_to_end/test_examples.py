"""The examples that are copied and edited, and the one that searches settings."""

import re
import subprocess
import sys
from pathlib import Path

import audio_classification
import hyperparameter_search
import image_classification
import make_tones
import numpy as np
import pytest
import text_classification
import video_classification
from command_data import QUIET, text_model, text_rows, words, write_csv
from transformers import (
    ASTFeatureExtractor,
    ASTForAudioClassification,
    AutoModelForVideoClassification,
    VideoMAEImageProcessor,
)

from lpg_hf.commands.parser import parse_arguments
from lpg_hf.commands.text import TextArguments


pytestmark = pytest.mark.usefixtures("fresh_datasets_cache")


EXAMPLES = Path(__file__).parents[2] / "examples"


def test_the_readme_names_every_script():
    table = (EXAMPLES / "README.md").read_text()
    runs = [path for path in EXAMPLES.glob("*.py") if "__main__" in path.read_text()]
    assert len(runs) > 10 and [path.name for path in runs if f"| `{path.name}` |" not in table] == []


def test_swap_is_one_word_apart(tmp_path, monkeypatch, capsys):
    """Here with three steps; the full run is a slow test."""
    monkeypatch.chdir(tmp_path)
    source = (EXAMPLES / "swap.py").read_text()
    assert source.count("num_train_epochs=20") == 1 and len(source.splitlines()) <= 36
    namespace = {}
    exec(
        compile(source.replace("num_train_epochs=20", "max_steps=3, disable_tqdm=True"), "swap.py", "exec"), namespace
    )
    printed = [line for line in capsys.readouterr().out.splitlines() if line.endswith("digits are right")]
    assert [line.split(":")[0] for line in printed] == ["Trainer", "LPGTrainer"]
    noisy = namespace["train"]
    assert np.mean(np.array(noisy["label"]) != np.array(noisy["clean_label"])) == pytest.approx(0.4, abs=0.01)


@pytest.mark.slow
def test_swap_wins_back_what_the_noise_took(tmp_path):
    command = [sys.executable, EXAMPLES / "swap.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    plain, ours = map(float, re.findall(r"Trainer: ([\d.]+)%", done.stdout))
    assert ours > plain + 10


@pytest.mark.parametrize(
    ("module", "argv", "accuracy"),
    [(text_classification, ["--num_train_epochs", 3], 0.95), (image_classification, ["--num_train_epochs", 2], 0.85)],
)
def test_an_example_learns_and_names_labels_that_are_wrong(module, argv, accuracy, tmp_path, capsys):
    """As it is run without arguments, but for the number of epochs."""
    argv = [*argv, "--label_noise", 0.1, "--use_cpu", "--disable_tqdm", "true", "--dataloader_pin_memory", "false"]
    metrics = module.main(words("--output_dir", tmp_path, *argv))
    assert metrics["eval_accuracy"] >= accuracy
    doubtful = [line for line in capsys.readouterr().out.splitlines() if line.startswith("row ")]
    assert len(doubtful) == 5
    if module is text_classification:
        word = {"account": "password login profile email", "delivery": "parcel courier tracking address"}
        word |= {"payment": "invoice refund card receipt", "product": "battery screen manual charger"}
        for line in doubtful:
            text, label, suggested = re.fullmatch(r"row \d+: '(.*)' is labeled '(.*)'; rather '(.*)'\?", line).groups()
            (topic,) = [topic for topic, names in word.items() if set(names.split()) & set(text.split())]
            assert label != topic == suggested


def test_texts_of_ones_own(tmp_path):
    train, test = write_csv(tmp_path / "a.csv", text_rows(36)), write_csv(tmp_path / "b.csv", text_rows(12, 1))
    argv = ["--model_name_or_path", text_model(tmp_path / "model"), "--train_file", train, "--label_noise", 0]
    argv += ["--learning_rate", 0.02, "--num_train_epochs", 20, "--use_cpu", "--disable_tqdm", "true"]
    argv += ["--dataloader_pin_memory", "false", "--output_dir", tmp_path / "out"]
    assert text_classification.main(words(*argv, "--test_file", test))["eval_accuracy"] == 1.0
    # Without test data a fifth of the rows is.
    assert text_classification.main(words(*argv))["eval_accuracy"] == 1.0


def test_recordings_as_the_saved_model_hears_them(tmp_path):
    make_tones.main(words("--output_dir", tmp_path, "--train_samples", 48, "--test_samples", 16))
    argv = ["--train_dir", tmp_path / "train", "--test_dir", tmp_path / "test", "--imbalance_ratio", 2, *QUIET]
    metrics = audio_classification.main(words(*argv, "--max_steps", 6, "--output_dir", tmp_path / "out"))
    model = ASTForAudioClassification.from_pretrained(tmp_path / "out").eval()
    extractor = ASTFeatureExtractor.from_pretrained(tmp_path / "out")
    right = []
    for path in sorted((tmp_path / "test").glob("*/*.wav")):
        inputs = extractor(audio_classification.read(str(path), 16_000), sampling_rate=16_000, return_tensors="pt")
        right.append(model.config.id2label[model(**inputs).logits.argmax().item()] == path.parent.name)
    assert metrics["eval_accuracy"] == pytest.approx(np.mean(right))


def test_videos_as_the_saved_model_sees_them(tmp_path):
    metrics = video_classification.main(words("--max_steps", 4, *QUIET, "--output_dir", tmp_path))
    model = AutoModelForVideoClassification.from_pretrained(tmp_path).eval()
    processor = VideoMAEImageProcessor.from_pretrained(tmp_path)
    right = []
    for path in sorted((tmp_path / "test").glob("*/*.gif")):
        frames = video_classification.read(str(path), 8)
        index = model(**processor(frames, return_tensors="pt")).logits.argmax().item()
        right.append(model.config.id2label[index] == path.parent.name)
    assert len(right) == 200 and metrics["eval_accuracy"] == pytest.approx(np.mean(right))


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_search_writes_a_config_and_compares_it_with_auto(tmp_path, capsys):
    import optuna

    model, rows = text_model(tmp_path / "model"), write_csv(tmp_path / "rows.csv", text_rows(12))
    test = write_csv(tmp_path / "test.csv", text_rows(9, seed=3))
    base = ["--model_name_or_path", model, "--train_file", rows, "--validation_file", rows, *QUIET, "--max_steps", 2]
    argv = words("text", *base, "--test_file", test, "--n_trials", 2, "--output_dir", tmp_path / "search")
    hyperparameter_search.main(argv)
    best = hyperparameter_search.main(argv)
    study = optuna.load_study(study_name="lpg", storage=f"sqlite:///{tmp_path / 'search' / 'study.db'}")
    assert len(study.trials) == 4
    assert len({trial.params["lpg_epsilon"] for trial in study.trials}) == 4
    top = max(trial.value for trial in study.trials)
    assert best.objective == top and best.hyperparameters in [t.params for t in study.trials if t.value == top]
    config = tmp_path / "search" / "best.yaml"
    arguments = parse_arguments(TextArguments, "", "", words(config, *base, "--output_dir", tmp_path / "out"))
    found = {name: getattr(arguments.training, name) for name in best.hyperparameters}
    assert found == best.hyperparameters and arguments.training.perturbations == ["lpg"]

    predictions = [path.read_text() for path in sorted((tmp_path / "search").glob("*/predictions.csv"))]
    assert len(predictions) == 6
    truth = np.array([row["label"] for row in text_rows(9, seed=3)])
    accuracies = [
        np.mean(
            [
                (np.array([line.split(",")[1] for line in text.split()[1:]]) == truth)[truth == name].mean()
                for name in set(truth)
            ]
        )
        for text in predictions
    ]
    printed = capsys.readouterr().out
    assert f"auto: {100 * np.mean(accuracies[:3]):5.1f} ±" in printed
    assert f"found: {100 * np.mean(accuracies[3:]):5.1f} ±" in printed


def test_search_needs_labels_to_compare_on(tmp_path):
    model, rows = text_model(tmp_path / "model"), write_csv(tmp_path / "rows.csv", text_rows(12))
    test = write_csv(tmp_path / "test.csv", [{"text": "a rose"}])
    argv = ["text", "--model_name_or_path", model, "--train_file", rows, "--validation_file", rows, *QUIET]
    with pytest.raises(ValueError, match=r"test data has no labels"):
        hyperparameter_search.main(words(*argv, "--test_file", test, "--output_dir", tmp_path / "search"))
