"""`lpg-hf train` from files to a saved model, against the same steps by hand."""

import json
import re
import subprocess
import sys
from pathlib import Path

import make_tones
import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from command_data import (
    EVAL_ROWS,
    NAMES,
    QUIET,
    TRAIN_ROWS,
    audio_model,
    image_model,
    text_model,
    text_rows,
    words,
    write_csv,
    write_images,
)
from datasets import ClassLabel, Dataset
from PIL import Image
from safetensors.torch import load_file
from scipy.signal import resample_poly
from tiny import WAV2VEC2
from transformers import (
    ASTFeatureExtractor,
    ASTForAudioClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    ResNetForImageClassification,
    Trainer,
    TrainingArguments,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForSequenceClassification,
    set_seed,
)

from lpg_hf.commands import run
from lpg_hf.commands.audio import SUFFIXES
from lpg_hf.commands.media_files import load_labeled_files
from lpg_hf.commands.train import train
from lpg_hf.data import add_label_noise, class_counts, make_long_tailed


pytestmark = pytest.mark.usefixtures("fresh_datasets_cache")


EXAMPLES = Path(__file__).parents[2] / "examples"
FAST = [*QUIET, "--per_device_train_batch_size", "12", "--learning_rate", "0.02", "--save_strategy", "no"]
DO = ["--do_train", "--do_eval"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    text_model(folder / "model")
    write_csv(folder / "train.csv", text_rows(TRAIN_ROWS))
    write_csv(folder / "validation.csv", text_rows(EVAL_ROWS, seed=1))
    write_csv(folder / "test.csv", [{"text": row["text"]} for row in text_rows(EVAL_ROWS, seed=2)])
    return folder


def text_arguments(texts, output_dir, *more):
    return words(
        *("--model_name_or_path", texts / "model", "--train_file", texts / "train.csv"),
        *("--validation_file", texts / "validation.csv", "--output_dir", output_dir, *FAST, *more),
    )


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    image_model(folder / "model")
    write_images(folder / "train", TRAIN_ROWS)
    write_images(folder / "validation", EVAL_ROWS)
    return folder


def image_arguments(images, output_dir, *more):
    return words(
        *("--model_name_or_path", images / "model", "--train_dir", images / "train"),
        *("--validation_dir", images / "validation", "--output_dir", output_dir, *FAST, *more),
    )


@pytest.fixture(scope="module")
def tones(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tones")
    audio_model(folder / "model")
    make_tones.main(words("--output_dir", folder, "--train_samples", 48, "--test_samples", 16))
    return folder


def audio_arguments(tones, output_dir, *more):
    return words(
        *("--model_name_or_path", tones / "model", "--train_dir", tones / "train"),
        *("--validation_dir", tones / "test", "--output_dir", output_dir, *FAST, *more),
    )


# From files to metrics


@torch.no_grad()
def predict_texts(model, tokenizer, rows):
    """One text at a time, without any padding."""
    return [
        model.config.id2label[model(**tokenizer(row["text"], return_tensors="pt")).logits.argmax().item()]
        for row in rows
    ]


def test_texts_from_csv_to_predictions(texts, tmp_path):
    more = ["--do_predict", "--test_file", texts / "test.csv", "--num_train_epochs", 20]
    results = train("text", text_arguments(texts, tmp_path, *DO, *more))
    model = BertForSequenceClassification.from_pretrained(tmp_path).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    rows = text_rows(EVAL_ROWS, seed=1)
    right = [name == row["label"] for name, row in zip(predict_texts(model, tokenizer, rows), rows, strict=True)]
    assert results["eval_accuracy"] == pytest.approx(np.mean(right)) == 1.0
    assert model.config.label2id == {name: index for index, name in enumerate(NAMES)}
    table = pd.read_csv(tmp_path / "predictions.csv")
    assert table["index"].tolist() == list(range(EVAL_ROWS))
    test_rows = text_rows(EVAL_ROWS, seed=2)
    assert table["prediction"].tolist() == predict_texts(model, tokenizer, test_rows)
    assert table.columns.tolist() == ["index", "prediction", "probability"]
    with torch.no_grad():
        logits = [model(**tokenizer(row["text"], return_tensors="pt")).logits[0].double() for row in test_rows]
    expected = [(1 / (values - values.max()).exp().sum()).item() for values in logits]
    np.testing.assert_allclose(table["probability"], expected, rtol=0, atol=6e-5)  # four digits
    assert re.fullmatch(r"0,\w+,[01]\.\d{4}", (tmp_path / "predictions.csv").read_text().splitlines()[1])
    assert json.loads((tmp_path / "all_results.json").read_text())["eval_accuracy"] == results["eval_accuracy"]
    assert (tmp_path / "README.md").exists()


def test_shares_by_name_are_those_in_the_order_that_is_shown(texts, tmp_path, caplog):
    def trained(*shares):
        output_dir = tmp_path / "_".join(shares)
        with caplog.at_level("INFO"):
            train("text", text_arguments(texts, output_dir, "--do_train", "--max_steps", 2, "--eval_shares", *shares))
        return load_file(output_dir / "model.safetensors")["classifier.weight"]

    by_name, in_order, reverse = trained("red=7", "green=2", "blue=1"), trained("1", "2", "7"), trained("7", "2", "1")
    assert "of each of 3 classes: blue, green, red." in caplog.text
    assert torch.equal(by_name, in_order) and not torch.equal(by_name, reverse)
    with pytest.raises(
        ValueError,
        match=r"'read' is no class \(did you mean 'red'\?\), and 'red' has no share.*: 'blue', 'green', 'red'\.",
    ):
        trained("read=7", "green=2", "blue=1")


def test_a_saved_model_keeps_its_classes_when_it_is_only_evaluated(texts, tmp_path):
    names = ["red", "green", "blue"]  # not in the order of the alphabet, in which a config is saved
    data = Dataset.from_list(text_rows(TRAIN_ROWS)).cast_column("label", ClassLabel(names=names))
    data.to_parquet(tmp_path / "train.parquet")
    more = ["--train_file", tmp_path / "train.parquet", "--num_train_epochs", 20]
    train("text", text_arguments(texts, tmp_path / "a", *DO, *more))
    # Two of the three classes: names taken from these rows would be other indices.
    rows = [row for row in text_rows(EVAL_ROWS) if row["label"] != "blue"]
    write_csv(tmp_path / "two.csv", rows)
    results = train(
        "text",
        words(
            *("--model_name_or_path", tmp_path / "a", "--validation_file", tmp_path / "two.csv", "--do_eval"),
            *("--output_dir", tmp_path / "b", *QUIET),
        ),
    )
    assert results["eval_accuracy"] == 1.0 and results["eval_samples"] == len(rows)
    more = ["--test_file", tmp_path / "two.csv", "--do_predict", "--output_dir", tmp_path / "c", *QUIET]
    train("text", words("--model_name_or_path", tmp_path / "a", *more))
    assert pd.read_csv(tmp_path / "c" / "predictions.csv")["prediction"].tolist() == [row["label"] for row in rows]


@pytest.mark.parametrize("kind", ["text", "image", "audio"])
def test_a_report_names_the_wrong_labels(kind, request, tmp_path):
    fixture, make_arguments = {
        "text": ("texts", text_arguments),
        "image": ("images", image_arguments),
        "audio": ("tones", audio_arguments),
    }[kind]
    more = ["--report", "--label_noise", 0.2, "--num_train_epochs", 2]
    argv = make_arguments(request.getfixturevalue(fixture), tmp_path, *DO, *more)
    results = train(kind, argv)
    issues = pd.read_csv(tmp_path / "report" / "label_issues.csv")
    assert sorted(issues["row"]) == list(range(results["train_samples"]))
    assert (tmp_path / "report" / "report.html").stat().st_size > 10_000


def test_without_perturbations_it_is_the_trainer(texts, tmp_path):
    """The same steps by hand: `ClassLabel`, tokenizer, model, Trainer."""
    argv = text_arguments(texts, tmp_path / "a", "--do_train", "--perturbations", "none", "--max_steps", 5)
    train("text", [*argv, "--seed", "3"])
    tokenizer = AutoTokenizer.from_pretrained(texts / "model")
    dataset = Dataset.from_list(text_rows(TRAIN_ROWS)).cast_column("label", ClassLabel(names=NAMES))
    dataset = dataset.map(lambda row: tokenizer(row["text"]))
    set_seed(3)
    args = TrainingArguments(
        tmp_path / "b",
        seed=3,
        max_steps=5,
        per_device_train_batch_size=12,
        learning_rate=0.02,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
    )
    model = BertForSequenceClassification.from_pretrained(texts / "model", num_labels=3)
    trainer = Trainer(model, args, train_dataset=dataset, processing_class=tokenizer)
    trainer.train()
    saved = load_file(tmp_path / "a" / "model.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in trainer.model.state_dict().items())


def test_a_decoder_without_a_padding_token(texts, tmp_path):
    """Its logits are those of the last token that is no padding, in a batch as alone."""
    tokenizer = AutoTokenizer.from_pretrained(texts / "model", pad_token=None, eos_token="[PAD]")
    assert tokenizer.pad_token is None
    tokenizer.save_pretrained(tmp_path / "model")
    set_seed(0)
    config = GPT2Config(vocab_size=9, n_embd=16, n_layer=1, n_head=2, n_positions=16, num_labels=3)
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path / "model")
    rows = [row | {"text": row["text"] + " a" * (number % 4)} for number, row in enumerate(text_rows(EVAL_ROWS))]
    write_csv(tmp_path / "validation.csv", rows)
    more = ["--model_name_or_path", tmp_path / "model", "--validation_file", tmp_path / "validation.csv"]
    results = train("text", text_arguments(texts, tmp_path / "out", *DO, *more, "--num_train_epochs", 8))
    model = GPT2ForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        losses = [
            model(**tokenizer(row["text"], return_tensors="pt"), labels=torch.tensor([NAMES.index(row["label"])])).loss
            for row in rows
        ]
    assert results["eval_loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)


def test_images_from_folders(images, tmp_path):
    results = train("image", image_arguments(images, tmp_path, *DO, "--num_train_epochs", 6))
    model = ResNetForImageClassification.from_pretrained(tmp_path).eval()
    right = []
    for path in sorted((images / "validation").glob("*/*.png")):
        small = Image.open(path).resize((16, 16), Image.Resampling.BILINEAR)
        pixels = torch.tensor(np.asarray(small), dtype=torch.float32).permute(2, 0, 1) / 127.5 - 1
        with torch.no_grad():
            index = model(pixel_values=pixels[None]).logits.argmax().item()
        right.append(model.config.id2label[index] == path.parent.name)
    assert results["eval_accuracy"] == pytest.approx(np.mean(right)) == 1.0


def test_images_from_paths_in_a_csv(images, tmp_path):
    rows = [{"image": str(path), "label": path.parent.name} for path in (images / "train").glob("*/*.png")]
    write_csv(tmp_path / "train.csv", rows)
    argv = words(
        *("--model_name_or_path", images / "model", "--train_file", tmp_path / "train.csv", "--max_steps", 1),
        *("--train_val_split", 0.25, *DO, *FAST, "--output_dir", tmp_path / "out"),
    )
    results = train("image", argv)
    assert (results["train_samples"], results["eval_samples"]) == (27, 9)


def test_images_as_lists_of_pixels(images, tmp_path):
    paths = sorted((images / "train").glob("*/*.png"))
    rows = [{"image": np.asarray(Image.open(path)).tolist(), "label": path.parent.name} for path in paths]
    Dataset.from_list(rows).to_parquet(tmp_path / "train.parquet")
    argv = ["--model_name_or_path", images / "model", "--train_file", tmp_path / "train.parquet", *FAST]
    results = train("image", words(*argv, "--do_train", "--max_steps", 1, "--output_dir", tmp_path / "a"))
    assert results["train_samples"] == TRAIN_ROWS


def test_recordings_from_folders(tones, tmp_path):
    results = train("audio", audio_arguments(tones, tmp_path, *DO, "--num_train_epochs", 20, "--learning_rate", 0.005))
    model = ASTForAudioClassification.from_pretrained(tmp_path).eval()
    extractor = ASTFeatureExtractor.from_pretrained(tmp_path)
    right = []
    for path in sorted((tones / "test").glob("*/*.wav")):
        wave, rate = soundfile.read(path, dtype="float32")
        with torch.no_grad():
            index = model(**extractor(wave, sampling_rate=rate, return_tensors="pt")).logits.argmax().item()
        right.append(model.config.id2label[index] == path.parent.name)
    assert results["eval_accuracy"] == pytest.approx(np.mean(right))
    assert results["eval_loss"] < 0.9 * np.log(8), "eight classes, of which it has learned something"


def test_recordings_from_paths_in_a_csv(tones, tmp_path):
    rows = [{"audio": path, "label": path.parent.name} for path in sorted((tones / "train").glob("*/*.wav"))]
    write_csv(tmp_path / "train.csv", rows)
    argv = words(
        *("--model_name_or_path", tones / "model", "--train_file", tmp_path / "train.csv", "--max_steps", 2),
        *("--do_train", *FAST, "--output_dir"),
    )
    train("audio", [*argv, str(tmp_path / "a")])
    train("audio", audio_arguments(tones, tmp_path / "b", "--do_train", "--max_steps", 2))
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_recordings_of_other_lengths_and_rates(tmp_path):
    """Padded and masked in batches, each has the loss that it has alone; convolutions of a pretrained model stay."""
    rng = np.random.default_rng(0)
    for row in range(8):
        path = tmp_path / "train" / "ab"[row % 2] / f"{row}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, rng.normal(0, 0.1 * (1 + row % 2), 1000 + 150 * row), 8_000)
    extractor = Wav2Vec2FeatureExtractor(return_attention_mask=True)
    extractor.save_pretrained(tmp_path / "model")
    set_seed(0)
    config = Wav2Vec2Config(**WAV2VEC2, feat_extract_norm="layer", num_labels=2, hidden_dropout=0.0, final_dropout=0.0)
    before = Wav2Vec2ForSequenceClassification(config)
    before.save_pretrained(tmp_path / "model")
    argv = ["--model_name_or_path", tmp_path / "model", "--train_dir", tmp_path / "train", *DO, *FAST]
    more = ["--validation_dir", tmp_path / "train", "--max_steps", 3, "--learning_rate", 0.005]
    results = train("audio", words(*argv, *more, "--output_dir", tmp_path / "out"))

    model = Wav2Vec2ForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    losses = []
    for path in sorted((tmp_path / "train").glob("*/*.wav")):
        wave, rate = soundfile.read(path, dtype="float32")
        inputs = extractor(resample_poly(wave, 2, 1), sampling_rate=2 * rate, return_tensors="pt")
        with torch.no_grad():
            losses.append(model(**inputs, labels=torch.tensor(["ab".index(path.parent.name)])).loss)
    assert results["eval_loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)
    after = model.state_dict()
    moved = {name for name, tensor in before.state_dict().items() if not torch.equal(tensor, after[name])}
    assert any("encoder.layers" in name for name in moved)
    assert not any("feature_extractor" in name for name in moved)


def test_recordings_from_a_metadata_file_and_from_parquet(tones, tmp_path):
    paths = sorted((tones / "train").glob("*/*.wav"))
    write_csv(
        tones / "train" / "metadata.csv",
        [{"file_name": p.relative_to(tones / "train"), "label": p.parent.name} for p in paths],
    )
    listed = load_labeled_files(str(tones / "train"), None, "audio", SUFFIXES, "recordings")
    (tones / "train" / "metadata.csv").unlink()
    found = load_labeled_files(str(tones / "train"), None, "audio", SUFFIXES, "recordings")
    assert listed["audio"][:] == found["audio"][:] == list(map(str, paths)) and listed["label"][:] == found["label"][:]

    recordings = [{"audio": {"bytes": path.read_bytes(), "path": None}, "label": path.parent.name} for path in paths]
    Dataset.from_list(recordings).to_parquet(tmp_path / "train.parquet")
    argv = words(
        *("--model_name_or_path", tones / "model", "--train_file", tmp_path / "train.parquet", "--max_steps", 2),
        *("--do_train", *FAST, "--output_dir"),
    )
    train("audio", [*argv, str(tmp_path / "a")])
    train("audio", audio_arguments(tones, tmp_path / "b", "--do_train", "--max_steps", 2))
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert all(torch.equal(one[name], other[name]) for name in one)


# Stress, LoRA, resume, processes


def test_noise_and_tail_change_the_training_rows_alone(texts, tmp_path, monkeypatch):
    seen = {}
    original = run.prepare

    def spy(*args):
        seen["prepared"] = original(*args)
        return seen["prepared"]

    monkeypatch.setattr(run, "prepare", spy)
    more = ["--label_noise", 0.4, "--imbalance_ratio", 6, "--seed", 5, "--max_steps", 1]
    train("text", text_arguments(texts, tmp_path, *DO, *more))
    prepared = seen["prepared"]
    rows = Dataset.from_list(text_rows(TRAIN_ROWS)).cast_column("label", ClassLabel(names=NAMES))
    expected = add_label_noise(make_long_tailed(rows, 6, seed=5), 0.4, seed=5)
    assert prepared.splits["train"]["labels"][:] == expected["label"][:] != expected["clean_label"][:]
    assert prepared.class_counts == class_counts(expected, label_column="clean_label") == [12, 4, 2]
    names = [NAMES[index] for index in prepared.splits["validation"]["labels"]]
    assert names == [row["label"] for row in text_rows(EVAL_ROWS, seed=1)]


def test_lora_trains_adapters_and_head_and_reloads(texts, tmp_path):
    from peft import AutoPeftModelForSequenceClassification

    argv = text_arguments(texts, tmp_path, *DO, "--use_lora", "--lora_r", 4, "--num_train_epochs", 20)
    results = train("text", argv)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {name.split(".")[-2] for name in saved} == {"lora_A", "lora_B", "classifier"}
    assert {name.split(".")[-3] for name in saved if "lora_A" in name} == {"query", "key", "value", "dense"}
    model = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3).eval()
    tokenizer, rows = AutoTokenizer.from_pretrained(tmp_path), text_rows(EVAL_ROWS, seed=1)
    with torch.no_grad():
        indices = [model(**tokenizer(row["text"], return_tensors="pt")).logits.argmax().item() for row in rows]
    right = [NAMES[index] == row["label"] for index, row in zip(indices, rows, strict=True)]
    assert results["eval_accuracy"] == pytest.approx(np.mean(right))
    assert results["eval_accuracy"] > 0.5


def test_lora_leaves_a_whole_model_with_its_classes(texts, tmp_path):
    """From a model with a head for other classes, and without the names of these."""
    text_model(tmp_path / "base", num_labels=5)
    more = ["--model_name_or_path", tmp_path / "base", "--ignore_mismatched_sizes", "--use_lora"]
    more += ["--do_predict", "--test_file", texts / "test.csv", "--num_train_epochs", 20]
    train("text", text_arguments(texts, tmp_path / "a", *DO, *more))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "a" / "merged")
    assert model.config.label2id == {name: index for index, name in enumerate(NAMES)}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a" / "merged")
    predictions = (tmp_path / "a" / "predictions.csv").read_text()
    assert predict_texts(model.eval(), tokenizer, text_rows(EVAL_ROWS, seed=2)) == (
        pd.read_csv(tmp_path / "a" / "predictions.csv")["prediction"].tolist()
    )
    argv = ["--do_predict", "--test_file", texts / "test.csv", *QUIET, "--output_dir", tmp_path / "b"]
    train("text", words("--model_name_or_path", tmp_path / "a", *argv))
    assert (tmp_path / "b" / "predictions.csv").read_text() == predictions
    (tmp_path / "a" / "merged").rename(tmp_path / "elsewhere")
    with pytest.raises(
        ValueError, match=r"`--model_name_or_path` is .*LoRA adapters alone\. Pass the folder 'merged'"
    ):
        train("text", words("--model_name_or_path", tmp_path / "a", *argv))


def test_lora_keeps_what_batch_normalization_has_seen(images, tmp_path):
    """Statistics are no parameters; without them what was saved is another model than what was evaluated."""
    more = ["--use_lora", "--lora_target_modules", "convolution", "--num_train_epochs", 6, "--save_strategy", "epoch"]
    argv = image_arguments(images, tmp_path / "a", *DO, *more)
    trained = train("image", argv)
    again = train("image", argv)
    argv = ["--validation_dir", images / "validation", "--do_eval", "--output_dir", tmp_path / "b", *QUIET]
    merged = train("image", words("--model_name_or_path", tmp_path / "a", *argv))
    assert again["eval_loss"] == trained["eval_loss"] == pytest.approx(merged["eval_loss"], rel=1e-4)


def test_a_second_run_resumes_where_the_first_was_killed(images, tmp_path, caplog):
    """With random crops and flips: the generator's state is part of the checkpoint. Three steps are an epoch."""
    argv = ["--do_train", "--max_steps", 9, "--save_strategy", "steps", "--save_steps", 3]
    train("image", image_arguments(images, tmp_path, *argv))
    whole = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    # Killed while it saved for the third time.
    (tmp_path / "checkpoint-9" / "trainer_state.json").unlink()
    with caplog.at_level("INFO"):
        train("image", image_arguments(images, tmp_path, *argv))
    assert f"Resuming from {tmp_path / 'checkpoint-6'}" in caplog.text
    # The third run finds that all is done.
    for _ in range(2):
        resumed = load_file(tmp_path / "model.safetensors")
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)
        results = train("image", image_arguments(images, tmp_path, *argv, "--do_eval"))
    assert results["epoch"] == 3 and results["eval_samples"] == EVAL_ROWS


def test_a_finished_training_keeps_its_results(texts, tmp_path, caplog):
    """Within an epoch, where the loop of transformers would take one step more."""
    argv = text_arguments(texts, tmp_path, "--do_train", "--max_steps", 4)
    argv += ["--save_strategy", "steps", "--save_steps", "2"]
    first = train("text", argv)
    kept = {name: (tmp_path / name).read_bytes() for name in ("train_results.json", "model.safetensors")}
    with caplog.at_level("INFO"):
        assert train("text", argv) == first
    assert "finished already" in caplog.text and first["train_loss"] > 0
    assert kept == {name: (tmp_path / name).read_bytes() for name in kept}
    # Without results, those of a shorter training are not mistaken for its own.
    (tmp_path / "train_results.json").write_text(json.dumps(first | {"epoch": 0.5}))
    assert train("text", argv) == {"epoch": first["epoch"], "train_samples": TRAIN_ROWS}
    more = [*argv, "--max_steps", "6"]
    caplog.clear()
    assert train("text", more)["train_loss"] > 0 and "finished already" not in caplog.text


@pytest.mark.parametrize("spelled", ["true", "True"])
def test_resuming_when_asked_for(spelled, texts, tmp_path, caplog):
    argv = text_arguments(texts, tmp_path, "--do_train", "--resume_from_checkpoint", spelled, "--max_steps", 2)
    argv += ["--save_strategy", "steps", "--save_steps", "1"]
    with pytest.raises(ValueError, match=r"no complete checkpoint in .* Train without `resume_from_checkpoint`"):
        train("text", argv)
    index = argv.index("--resume_from_checkpoint")
    train("text", argv[:index] + argv[index + 2 :])
    with caplog.at_level("INFO"):
        train("text", argv)
    assert f"finished already: {tmp_path / 'checkpoint-2'}" in caplog.text
    argv[index + 1] = str(tmp_path / "checkpoint-3")
    message = r"`--resume_from_checkpoint` is '.*checkpoint-3', which is no checkpoint .* or `true` for the newest"
    with pytest.raises(ValueError, match=message):
        train("text", argv)


@pytest.mark.parametrize(
    "kind", ["text", pytest.param("image", marks=pytest.mark.slow), pytest.param("audio", marks=pytest.mark.slow)]
)
def test_two_processes_train_like_one(kind, request, tmp_path):
    """With batches of half the size, and SGD, which does not blow up rounding as Adam does."""
    fixture = {"text": "texts", "image": "images", "audio": "tones"}[kind]
    make = {"text": text_arguments, "image": image_arguments, "audio": audio_arguments}[kind]
    data = request.getfixturevalue(fixture)
    same = [*DO, "--optim", "sgd", "--learning_rate", 0.1, "--max_steps", 4, "--perturbations", "logit_adjustment"]
    if kind == "image":
        same += ["--min_crop_area", 1, "--random_flip", "false"]
    alone = train(kind, make(data, tmp_path / "alone", *same))
    config = EXAMPLES / "accelerate" / "cpu_ddp.yaml"
    launcher = [sys.executable, "-m", "accelerate.commands.launch", f"--config_file={config}", "--main_process_port=0"]
    launcher += ["-m", "lpg_hf.commands", "train"]
    argv = make(data, tmp_path / "together", *same, "--per_device_train_batch_size", 6)
    done = subprocess.run([*launcher, kind, *argv], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("alone", "together"))
    if kind != "image":  # where BatchNorm sees half of a batch on each process
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=0, atol=1e-5)
    results = json.loads((tmp_path / "together" / "all_results.json").read_text())
    assert results["epoch"] == alone["epoch"] and results["eval_samples"] == alone["eval_samples"]
