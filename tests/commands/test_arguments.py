"""Help, config files and bad input of `lpg-hf train`."""

import json
import os
import re
import shutil
from pathlib import Path

import datasets
import huggingface_hub.constants
import make_tones
import numpy as np
import PIL.Image
import pytest
import soundfile
import torch
import yaml
from command_data import QUIET, audio_model, image_model, text_model, text_rows, words, write_csv, write_images
from datasets import ClassLabel, Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lpg_hf.commands import audio, image
from lpg_hf.commands.arguments import OUR_HEADING, TRAINING_HEADING
from lpg_hf.commands.main import main
from lpg_hf.commands.parser import ESSENTIAL_HEADING, parse_arguments
from lpg_hf.commands.text import TextArguments
from lpg_hf.commands.train import train as run_train


pytestmark = pytest.mark.usefixtures("fresh_datasets_cache")


EXAMPLES = Path(__file__).parents[2] / "examples"
KINDS = ["text", "image", "audio", "video"]
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {
        "text": text_model(folder / "text"),
        "image": image_model(folder / "image"),
        "audio": audio_model(folder / "audio"),
    }


@pytest.fixture
def train_csv(tmp_path):
    return write_csv(tmp_path / "train.csv", text_rows(12))


def run_text(models, output_dir, *more, train, model="text"):
    base = ["--model_name_or_path", models[model], "--train_file", train, "--do_train", "--max_steps", 1, *QUIET]
    return run_train("text", words(*base, "--output_dir", output_dir / "out", *more))


def run_image(models, output_dir, *more):
    base = ["--model_name_or_path", models["image"], "--do_train", "--max_steps", 1, *QUIET]
    return run_train("image", words(*base, "--output_dir", output_dir / "out", *more))


def run_audio(models, output_dir, *more):
    base = ["--model_name_or_path", models["audio"], "--do_train", "--max_steps", 1, *QUIET]
    return run_train("audio", words(*base, "--output_dir", output_dir / "out", *more))


# Help and config files


def sections(text):
    """The options under each heading of a help text."""
    found = {}
    for line in text.splitlines():
        if re.match(r"^\S.*:$", line):
            heading = line[:-1]
        elif match := re.match(r"^  (--\w+)", line):
            found.setdefault(heading, []).append(match[1])
    return found


@every_kind
def test_no_arguments_print_a_short_help(kind, capsys):
    with pytest.raises(SystemExit) as exit_:
        run_train(kind, [])
    assert exit_.value.code == 2
    text = capsys.readouterr().out
    assert f"lpg-hf train {kind} --model_name_or_path" in text
    assert "--output_dir FOLDER" in text.splitlines()[0] and "Required" in text
    found = sections(text)
    assert list(found) == [ESSENTIAL_HEADING, "model", "data", OUR_HEADING]
    assert found[ESSENTIAL_HEADING][:4] == ["--output_dir", "--do_train", "--do_eval", "--do_predict"]
    assert "--learning_rate" in found[ESSENTIAL_HEADING]
    assert "--weight_decay" not in text, "not the hundred arguments of the Trainer"


@every_kind
def test_help_has_our_arguments_under_one_heading(kind, capsys):
    with pytest.raises(SystemExit) as exit_:
        run_train(kind, ["--help"])
    assert exit_.value.code == 0
    found = sections(capsys.readouterr().out)
    ours = [
        name
        for names in found.values()
        for name in names
        if re.search("lpg|perturbations|track_rows|eval_shares", name)
    ]
    assert found[OUR_HEADING] == ["--fixes", "--label_noise", "--imbalance_ratio", "--report", *ours]
    assert {"--learning_rate", "--output_dir", "--seed"} < set(found[TRAINING_HEADING])
    assert not {"--learning_rate", "--output_dir"} & set(found["model"] + found["data"])


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_a_config_file_is_the_command_line(suffix, tmp_path):
    config = {
        "model_name_or_path": "m",
        "text_column_names": ["a", "b"],
        "learning_rate": "1e-3",
        "use_lora": True,
        "disable_tqdm": True,
        "seed": None,
        "perturbations": ["logit_clipping(max_norm=0.5)", "lpg"],
        "lpg_epsilon": 0.3,
        "lr_scheduler_kwargs": {"num_cycles": 2},
        "output_dir": str(tmp_path),
        "report_to": "none",
    }
    path = tmp_path / f"config{suffix}"
    path.write_text(json.dumps(config) if suffix == ".json" else yaml.safe_dump(config))
    arguments = parse_arguments(TextArguments, "lpg-hf", "", [str(path), "--lpg_epsilon", "0.4"])
    assert (arguments.model.model_name_or_path, arguments.model.use_lora) == ("m", True)
    assert arguments.data.text_column_names == ["a", "b"]
    assert arguments.training.learning_rate == 1e-3 and arguments.training.seed == 42
    assert arguments.training.lr_scheduler_kwargs == {"num_cycles": 2}
    assert arguments.training.chain() == ["logit_clipping(max_norm=0.5)", "lpg(epsilon=0.4)"]


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("eval_shares: {ham: 0.9, 'a, b=c': 0.1}", '{"ham": 0.9, "a, b=c": 0.1}'),
        ("eval_shares: {1: 0.9, 2: 0.1}", '{"1": 0.9, "2": 0.1}'),
        ("eval_shares: {on: .5, off: 1.50, Yes: 2, true: 4}", '{"on": 0.5, "off": 1.5, "Yes": 2, "true": 4}'),
        ("eval_shares: {1.50: 1, ~: 2, 2026-01-01: 3}", '{"1.50": 1, "~": 2, "2026-01-01": 3}'),
        ("eval_shares: {<<: {on: 1, off: 2}, off: 3}", '{"on": 1, "off": 3}'),
        ("eval_shares: [0.9, 0.1]", "0.9,0.1"),
        ("eval_shares: uniform", "uniform"),
    ],
)
def test_a_config_file_may_hold_shares_as_a_mapping_or_a_list(lines, expected, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(f"output_dir: o\n{lines}\n")
    assert parse_arguments(TextArguments, "lpg-hf", "", [str(path)]).training.eval_shares == expected


def test_a_config_file_says_what_would_be_typed(tmp_path):
    """YAML would take these for a truth value, a number without its underscore, minutes, and an octal number."""
    path = tmp_path / "config.yaml"
    path.write_text(
        "output_dir: 2026_11\nlabel_column_name: on\ntext_column_names: [off, ~, 12:30]\nmax_seq_length: 1_0\n"
        "remove_columns: 010\nhub_model_id: null\nreport: off\nuse_cpu: On\n"
        "lr_scheduler_kwargs: {num_cycles: 1e+0, power: -2}\ntext_column_delimiter: -x-\n"
    )
    arguments = parse_arguments(TextArguments, "lpg-hf", "", [str(path)])
    assert arguments.output_dir == "2026_11" and arguments.training.hub_model_id is None
    data = arguments.data
    assert (data.label_column_name, data.text_column_names) == ("on", ["off", "12:30"])
    assert (data.max_seq_length, data.remove_columns, data.text_column_delimiter) == (10, "010", "-x-")
    assert (arguments.report.report, arguments.training.use_cpu) == (False, True)
    assert arguments.training.lr_scheduler_kwargs == {"num_cycles": "1e+0", "power": -2}


def test_an_empty_list_in_a_config_file_is_not_the_default(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("output_dir: o\nperturbations: []\n")
    with pytest.raises(SystemExit):
        parse_arguments(TextArguments, "lpg-hf", "", [str(tmp_path / "config.yaml")])
    assert "argument --perturbations: expected at least one argument" in capsys.readouterr().err


@pytest.mark.parametrize("line", ["seed: 2", "eval_shares: {a: 1, a: 2}"])
def test_a_config_file_that_says_something_twice(line, tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text(f"output_dir: o\nseed: 1\n{line}\n")
    with pytest.raises(SystemExit):
        parse_arguments(TextArguments, "lpg-hf", "", [str(path)])
    twice = "seed" if "seed" in line else "a"
    assert f"{path} cannot be used: {twice!r} is there twice. Leave one of them." in capsys.readouterr().err


def test_names_of_arguments_before_transformers_5():
    argv = ["--output_dir", "o", "--evaluation_strategy", "epoch", "--warmup_ratio", "0.1", "--no_cuda"]
    training = parse_arguments(TextArguments, "lpg-hf", "", argv).training
    assert (training.eval_strategy, training.warmup_steps, training.use_cpu) == ("epoch", 0.1, True)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--do_train"], "required: --output_dir"),
        (["--output_dir", "o", "--text_colum_name", "a"], "Did you mean --text_column_name"),
        (
            ["--output_dir", "o", "--model_name", "a"],
            "unknown argument --model_name. Did you mean --model_name_or_path",
        ),
        (["missing.yaml"], r"No such file .*missing\.yaml"),
    ],
)
def test_arguments_that_do_not_parse(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        run_train("text", argv)
    assert exit_.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_words_in_a_config_file_are_words(tmp_path):
    """YAML 1.1 reads some of them as truth values."""
    path = tmp_path / "é.yaml"
    lines = ["save_strategy: no", "disable_tqdm: no", "use_lora: yes", "do_train: on", "bf16: off", "fp16: FALSE"]
    path.write_text("\n".join([*lines, "label_column_name: ja é"]), encoding="utf-8")
    arguments = parse_arguments(TextArguments, "lpg-hf", "", [str(path), "--output_dir", str(tmp_path)])
    args = arguments.training
    assert args.save_strategy == "no" and args.do_train is True and arguments.model.use_lora is True
    assert (args.disable_tqdm, args.bf16, args.fp16) == (False, False, False)
    assert arguments.data.label_column_name == "ja é"


@pytest.mark.parametrize("content", ["- a\n- b\n", "a: [1\n"])
def test_config_files_that_are_none(content, capsys, tmp_path):
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(SystemExit):
        run_train("text", [str(tmp_path / "config.yaml")])
    assert "config.yaml" in capsys.readouterr().err


# Bad input


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--text_column_names", "txt"], r"`--text_column_names` is 'txt', but the train data has the columns text, "),
        (["--label_column_name", "lab"], r"`--label_column_name` is 'lab', but the train data has the columns text, "),
        (["--text_column_names", "text", "label", "x"], r"must be one column or two"),
        (["--dataset_name", "some/data"], r"'some/data' and local data as well"),
        (["--do_predict"], r"`--do_predict` needs test data, but there is only: train"),
        (["--validation_file", "a.xlsx"], r"ends with '\.xlsx'"),
        (["--max_seq_length", 0], r"`--max_seq_length` is 0, but must be at least 1: the tokenizer adds 0 tokens"),
        (["--do_eval", "--train_val_split", "2"], r"`--train_val_split` is 2\.0"),
        (
            ["--do_eval", "--train_val_split", "0.95"],
            r"is 0\.95, which leaves none of the 12 training rows to train on",
        ),
    ],
)
def test_arguments_that_do_not_fit_the_data(more, message, models, train_csv, tmp_path):
    with pytest.raises(ValueError, match=message):
        run_text(models, tmp_path, *more, train=train_csv)


def test_folders_that_cannot_be_written(models, train_csv, tmp_path, monkeypatch, capsys):
    (tmp_path / "out").touch()
    with pytest.raises(ValueError, match=r"`--output_dir` is '.*out', which is a file\. Pass a folder"):
        run_text(models, tmp_path, train=train_csv)
    argv = words("--model_name_or_path", models["text"], "--train_file", train_csv, "--do_train", *QUIET)
    with pytest.raises(ValueError, match=rf"`--output_dir` is '.*sub', but {tmp_path / 'out'} is a file\. Pass anoth"):
        run_train("text", [*argv, "--output_dir", str(tmp_path / "out" / "a" / "sub")])
    with pytest.raises(ValueError, match=r"`--output_dir` is '', which is no name\. Pass a folder"):
        run_train("text", [*argv, "--output_dir", ""])
    with pytest.raises(SystemExit, match=r"`--report_dir` is '.*out', which is a file\. Pass a folder"):
        main(["report", str(tmp_path), "--report_dir", str(tmp_path / "out")])
    # Whoever runs the tests may be allowed everything.
    monkeypatch.setattr(os, "access", lambda path, _: Path(path) != tmp_path)
    with pytest.raises(ValueError, match=rf"`--output_dir` is '.*sub', but nothing can be written into {tmp_path}\."):
        run_train("text", [*argv, "--output_dir", str(tmp_path / "new" / "sub")])
    with pytest.raises(SystemExit):
        main(["issues", str(tmp_path), "--export", str(tmp_path / "issues.csv")])
    assert f"issues.csv, but nothing can be written into {tmp_path}. Pass another folder" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"out", "train.csv"}


def test_a_best_metric_that_no_evaluation_has(models, train_csv, tmp_path):
    """The Trainer would say so at the first evaluation, perhaps after hours."""
    argv = ["--do_eval", "--eval_strategy", "epoch", "--save_strategy", "epoch", "--load_best_model_at_end"]
    argv += ["--num_train_epochs", 1, "--metric_for_best_model"]
    message = (
        r"`--metric_for_best_model` is 'eval_balanced_acc': unknown metric balanced_acc\. Did you mean "
        r"balanced_accuracy\? An evaluation has accuracy, .*loss"
    )
    with pytest.raises(ValueError, match=message):
        run_text(models, tmp_path, *argv, "eval_balanced_acc", train=train_csv)
    for name in ("eval_macro_f1", "loss", "f1"):
        more = ["--metric_name", "f1"] if name == "f1" else []
        run_text(models, tmp_path / name, *argv, name, *more, train=train_csv)


def test_a_config_file_that_does_not_come_first(tmp_path, capsys):
    (tmp_path / "a.yaml").write_text("seed: 1")
    with pytest.raises(SystemExit):
        run_train("text", words("--output_dir", tmp_path / "out", tmp_path / "a.yaml"))
    assert "a.yaml. A config file comes first, in front of all arguments" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("text;label", r"has the columns text;label\. Write the file with commas between its columns"),
        ("text\tlabel", r"has the columns 'text\\tlabel'\. Write the file with commas"),
        ("text , Label", r"has the columns 'text ', ' Label'\. Pass one of these"),
    ],
)
def test_names_of_columns_that_are_hard_to_see(header, message, models, tmp_path):
    (tmp_path / "train.csv").write_text(f"{header}\n" + header.replace("text", "a rose") + "\n")
    with pytest.raises(ValueError, match=rf"`--text_column_names` is 'text', but the train data {message}"):
        run_text(models, tmp_path, train=tmp_path / "train.csv")


def test_a_file_that_is_not_what_its_name_says(models, tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"`--train_file`: .*train\.parquet cannot be read as parquet \(.+\)\. Corr"):
        run_text(models, tmp_path, train=tmp_path / "train.parquet")


def test_more_validation_rows_than_training_rows(models, train_csv, tmp_path):
    """Of 12 rows, two are left: too few for one of each class."""
    run_text(models, tmp_path, "--do_eval", "--train_val_split", "0.8", "--save_strategy", "no", train=train_csv)
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert (results["train_samples"], results["eval_samples"]) == (2, 10)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--max_train_samples", 0], r"`--max_train_samples` is 0, but must be at least 1\. Leave it out"),
        (["--max_eval_samples", -1], r"`--max_eval_samples` is -1, but must be at least 1"),
        (["--use_lora", "--lora_r", 0], r"`--lora_r` is 0, but must be at least 1"),
        (["--use_lora", "--lora_dropout", 1], r"`--lora_dropout` is 1\.0, but must be in \[0, 1\)"),
        (["--label_noise", 1.5], r"`--label_noise` is 1\.5, but must be in \[0, 1\)"),
        (["--label_noise", "nan"], r"`--label_noise` is nan"),
        (["--imbalance_ratio", 0.5], r"`--imbalance_ratio` is 0\.5, but must be a finite number of at least 1"),
        (["--per_device_train_batch_size", 0], r"`--per_device_train_batch_size` is 0, but must be at least 1"),
        (["--per_device_eval_batch_size", -1], r"`--per_device_eval_batch_size` is -1, but must be at least 1"),
        (["--gradient_accumulation_steps", 0], r"`--gradient_accumulation_steps` is 0, but must be at least 1"),
        (["--seed", 2**32], r"`--seed` is 4294967296, but must be in 0 to 4294967295"),
        (["--data_seed", -1], r"`--data_seed` is -1, but must be in 0 to"),
        (["--learning_rate", "nan"], r"`--learning_rate` is nan, but must be a finite number of at least 0"),
        (["--learning_rate", "-0.001"], r"`--learning_rate` is -0\.001, but must be"),
        (["--report_to", "wandbb"], r"`--report_to`: wandbb is not supported.* Pass none to report to nothing"),
        (["--eval_shares", "a=x"], r"`eval_shares` is 'a=x'\. Use 'eval_dataset'"),
        (["--perturbations", "lgp"], r"Unknown perturbation 'lgp'"),
        (["--use_fast_tokenizer", "false"], r"transformers 5 has no slow ones"),
        (["--load_best_model_at_end", "--eval_strategy", "steps", "--save_strategy", "epoch"], r"strategy to match"),
    ],
)
def test_values_that_are_out_of_range(more, message, tmp_path, capsys):
    """Whether this library or transformers says so. What does not parse ends alike."""
    with pytest.raises(SystemExit) as exit_:
        run_train("text", words("--output_dir", tmp_path / "out", "--do_train", *more))
    assert exit_.value.code == 2
    assert re.search(rf"lpg-hf train text: error: .*{message}", capsys.readouterr().err, re.DOTALL)


def test_columns_of_images_and_recordings(models, tmp_path):
    write_images(tmp_path / "train", 6)
    with pytest.raises(ValueError, match=r"`--image_column_name` is 'img', but the train data has the columns image"):
        run_image(models, tmp_path, "--train_dir", tmp_path / "train", "--image_column_name", "img")


def test_nothing_to_do_and_nothing_to_read(models, train_csv, tmp_path):
    base = words("--model_name_or_path", models["text"], "--output_dir", tmp_path / "out", *QUIET)
    with pytest.raises(ValueError, match=r"pass --do_train, --do_eval or --do_predict"):
        run_train("text", [*base, "--train_file", str(train_csv)])
    with pytest.raises(ValueError, match=r"pass either --dataset_name, or --train_file and --validation_file\."):
        run_train("text", [*base, "--do_train"])
    with pytest.raises(ValueError, match=r"or --train_dir and --validation_dir"):
        run_image(models, tmp_path)


def test_a_report_of_no_training(models, train_csv, tmp_path):
    argv = ["--model_name_or_path", models["text"], "--validation_file", train_csv, "--do_eval", "--report", *QUIET]
    with pytest.raises(ValueError, match=r"`--report` is about a training, but there is none: pass --do_train"):
        run_train("text", words(*argv, "--output_dir", tmp_path / "out"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--do_predict", "--prediction_loss_only", "true"], r"leaves nothing for `--do_predict` to write"),
        (["--do_eval", "--eval_do_concat_batches", "false"], r"`--eval_do_concat_batches` is false, but the metrics"),
    ],
)
def test_evaluations_that_leave_nothing_to_evaluate(more, message, models, train_csv, tmp_path):
    with pytest.raises(ValueError, match=message):
        run_text(models, tmp_path, *more, "--test_file", train_csv, train=train_csv)
    assert not (tmp_path / "out").exists()


def test_a_tail_longer_than_the_data(models, train_csv, tmp_path, caplog):
    run_text(models, tmp_path / "2", "--imbalance_ratio", 2, train=train_csv)
    assert "--imbalance_ratio" not in caplog.text
    run_text(models, tmp_path / "100", "--imbalance_ratio", 100, train=train_csv)
    assert "`--imbalance_ratio` is 100, but there are too few training rows for it: 4 was reached" in caplog.text


def test_label_names_that_differ(models, train_csv, tmp_path):
    rows = [*text_rows(6), {"text": "a rose", "label": "pink"}]
    validation = write_csv(tmp_path / "validation.csv", rows)
    with pytest.raises(ValueError, match=r"validation data has labels .* that the training data has not: pink\. The"):
        run_text(models, tmp_path, "--validation_file", validation, "--do_eval", train=train_csv)


def test_label_names_in_another_order_are_mapped(models, tmp_path):
    """The integers of a `ClassLabel` mean names: here 0 is blue in one file and red in the other."""
    rows = text_rows(12)
    files = []
    for name, order in (("train", ["red", "green", "blue"]), ("validation", ["blue", "red", "green"])):
        path = tmp_path / f"{name}.parquet"
        Dataset.from_list(rows).cast_column("label", ClassLabel(names=order)).to_parquet(path)
        files += [f"--{name}_file", path]
    more = ["--do_eval", "--num_train_epochs", 30, "--max_steps", -1, "--learning_rate", 0.02, *files]
    results = run_text(models, tmp_path, *more, train="unused")
    assert results["eval_accuracy"] == 1.0


def test_minus_one_is_a_name_among_integers_and_no_label_in_a_class_label(models, tmp_path):
    rows = [{"text": row["text"], "label": -1 if row["label"] == "red" else 1} for row in text_rows(12)]
    Dataset.from_list(rows).to_parquet(tmp_path / "integers.parquet")
    run_text(models, tmp_path, "--ignore_mismatched_sizes", train=tmp_path / "integers.parquet")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["label2id"] == {"-1": 0, "1": 1}
    features = datasets.Features({"text": datasets.Value("string"), "label": ClassLabel(names=["no", "yes"])})
    Dataset.from_list(rows, features=features).to_parquet(tmp_path / "names.parquet")
    with pytest.raises(ValueError, match=r"no label in 4 of 12 rows \(rows 0, 3, 6, 9\)"):
        run_text(models, tmp_path, train=tmp_path / "names.parquet")


@pytest.mark.parametrize(
    ("label", "message"),
    [(None, r"no label in 1 of 13 rows \(rows 12\)"), (0.5, r"holds Value\('float64'\), but labels must be names")],
)
def test_labels_that_are_none(label, message, models, tmp_path):
    rows = text_rows(13)
    rows = [row | {"label": 1 if isinstance(label, float) else row["label"]} for row in rows[:12]]
    path = tmp_path / "train.parquet"
    Dataset.from_list([*rows, {"text": "a sky", "label": label}]).to_parquet(path)
    with pytest.raises(ValueError, match=message):
        run_text(models, tmp_path, train=path)


def test_one_class_alone(models, tmp_path):
    path = write_csv(tmp_path / "train.csv", [row | {"label": "red"} for row in text_rows(6)])
    with pytest.raises(ValueError, match=r"one class alone, 'red'"):
        run_text(models, tmp_path, train=path)


def test_empty_texts(models, tmp_path):
    rows = text_rows(12)
    rows[4]["text"], rows[7]["text"] = "", "  "
    path = write_csv(tmp_path / "train.csv", rows)
    with pytest.raises(ValueError, match=r"Column 'text' of the train data has 2 empty texts \(rows 4, 7, counted"):
        run_text(models, tmp_path, train=path)


def test_labels_that_are_blank_or_bytes(models, train_csv, tmp_path):
    for blank in ("", "  "):
        rows = [row | {"label": blank if row["label"] == "red" else row["label"]} for row in text_rows(12)]
        Dataset.from_list(rows).to_json(tmp_path / "train.jsonl")
        with pytest.raises(ValueError, match=r"no label in 4 of 12 rows \(rows 0, 3, 6, 9\)\. Remove these rows"):
            run_text(models, tmp_path, train=tmp_path / "train.jsonl")
    rows = [row | {"label": row["label"].encode()} for row in text_rows(12)]
    Dataset.from_list(rows).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"holds Value\('binary'\), but labels must be names or integers, one per"):
        run_text(models, tmp_path, train=tmp_path / "train.parquet")
    # Test data need no labels.
    Dataset.from_list([row | {"label": ""} for row in text_rows(3)]).to_json(tmp_path / "test.jsonl")
    run_text(models, tmp_path, "--do_predict", "--test_file", tmp_path / "test.jsonl", train=train_csv)
    assert len((tmp_path / "out" / "predictions.csv").read_text().splitlines()) == 1 + 3


def test_names_that_a_person_would_take_for_one(models, tmp_path, caplog):
    names = {"red": "red", "green": "Red ", "blue": "blue"}
    rows = [row | {"label": names[row["label"]]} for row in text_rows(12)]
    Dataset.from_list(rows).to_json(tmp_path / "train.jsonl")
    run_text(models, tmp_path, train=tmp_path / "train.jsonl")
    assert "differ in capitals or blanks alone: 'Red ' and 'red'. Each is a class of its own" in caplog.text
    assert set(json.loads((tmp_path / "out" / "config.json").read_text())["label2id"]) == set(names.values())


def test_a_class_whose_name_is_an_empty_cell(models, tmp_path):
    """In a CSV file. JSON lines have it."""
    rows = [row | {"label": "None" if row["label"] == "red" else row["label"]} for row in text_rows(12)]
    with pytest.raises(ValueError, match=r"no label in 4 of 12 rows .* cells with the words None, NA, null .*JSON"):
        run_text(models, tmp_path, train=write_csv(tmp_path / "train.csv", rows))
    lines = tmp_path / "train.jsonl"
    lines.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    run_text(models, tmp_path, "--save_strategy", "no", train=lines)
    assert set(json.loads((tmp_path / "out" / "config.json").read_text())["label2id"]) == {"None", "blue", "green"}


def test_paths_with_brackets_are_no_patterns(models, tmp_path):
    folder = tmp_path / "da[ta] ü *"
    folder.mkdir()
    path = write_csv(folder / "train[1].csv", text_rows(12))
    run_text(models, folder, "--save_strategy", "no", train=path)
    assert json.loads((folder / "out" / "train_results.json").read_text())["train_samples"] == 12
    run_image(models, tmp_path, "--train_dir", write_images(folder / "images", 6), "--save_strategy", "no")
    assert json.loads((tmp_path / "out" / "train_results.json").read_text())["train_samples"] == 6


def test_texts_that_are_numbers(models, tmp_path):
    path = write_csv(tmp_path / "train.csv", [{"text": row, "label": row % 2} for row in range(6)])
    with pytest.raises(ValueError, match=r"Column 'text' of the train data holds Value\('int64'\), not texts"):
        run_text(models, tmp_path, train=path)


def test_recordings_and_images_that_are_numbers(models, tmp_path):
    path = write_csv(tmp_path / "train.csv", [{"count": row, "label": row % 2} for row in range(6)])
    with pytest.raises(
        ValueError, match=r"`--audio_column_name` is 'count', .* Value\('int64'\)\. Pass a column of paths"
    ):
        run_audio(models, tmp_path, "--train_file", path, "--audio_column_name", "count")
    with pytest.raises(
        ValueError, match=r"`--image_column_name` is 'count', .* Value\('int64'\)\. Pass a column of paths"
    ):
        run_image(models, tmp_path, "--train_file", path, "--image_column_name", "count")


def test_labels_as_inputs(models, train_csv, tmp_path):
    with pytest.raises(ValueError, match=r"`--text_column_names` and `--label_column_name` are both 'label': a model"):
        run_text(models, tmp_path, "--text_column_names", "label", train=train_csv)
    for kind, run in (("image", run_image), ("audio", run_audio)):
        with pytest.raises(ValueError, match=rf"`--{kind}_column_name` and `--label_column_name` are both 'label'"):
            run(models, tmp_path, "--train_file", train_csv, f"--{kind}_column_name", "label")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"`--validation_file`: There is no file .*rows\.csv\. Check the path"),
        ("", r"`--validation_file`: .*rows\.csv has 0 bytes"),
        ("text,label\n", r"`--validation_file`: .*rows\.csv has no rows, only a line of column names"),
        ('text,label\na,"b\n', r"`--validation_file`: .*rows\.csv cannot be read as csv \(.*EOF.*\)"),
    ],
)
def test_files_without_rows(content, message, models, train_csv, tmp_path):
    path = tmp_path / "rows.csv"
    if content is not None:
        path.write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run_text(models, tmp_path, "--validation_file", path, "--do_eval", train=train_csv)


@pytest.mark.parametrize(("kind", "run"), [("images", run_image), ("recordings", run_audio)])
def test_folders_without_classes(kind, run, models, tmp_path):
    folder = tmp_path / "train"
    with pytest.raises(FileNotFoundError, match=r"`--train_dir`: There is no folder .*train\. Check the path"):
        run(models, tmp_path, "--train_dir", folder)
    (folder / "a").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"`--train_dir`: There are no files in .*train\. Make one folder per"):
        run(models, tmp_path, "--train_dir", folder)
    (folder / "a" / "notes.txt").touch()
    with pytest.raises(
        (ValueError, FileNotFoundError), match=rf"`--train_dir`: There are no {kind} in .*train.* Make"
    ):
        run(models, tmp_path, "--train_dir", folder)
    (folder / "metadata.csv").write_text("name,label\na.png,x\n")
    with pytest.raises(
        ValueError, match=r"`--train_dir`: .*metadata\.csv has the columns name, label, but needs file_na"
    ):
        run(models, tmp_path, "--train_dir", folder)


def test_folders_that_are_links(models, tmp_path):
    """Images are read by `datasets`, which does not follow them; recordings are."""
    write_images(tmp_path / "images", 6)
    (tmp_path / "linked").mkdir()
    for name in ("red", "blue"):
        (tmp_path / "linked" / name).symlink_to(tmp_path / "images" / name)
        with pytest.raises(ValueError, match=r"`--train_dir`: .*has links to folders, .*: (blue, )?red\. Put"):
            run_image(models, tmp_path, "--train_dir", tmp_path / "linked")
        shutil.copytree(tmp_path / "images" / "green", tmp_path / "linked" / "green", dirs_exist_ok=True)
    (tmp_path / "link").symlink_to(tmp_path / "images")
    assert run_image(models, tmp_path, "--train_dir", tmp_path / "link")["train_samples"] == 6
    for name in ("x", "y"):
        (tmp_path / "waves" / name).mkdir(parents=True)
        soundfile.write(tmp_path / "waves" / name / "a.wav", np.zeros(8000), 16000)
        (tmp_path / "sounds").mkdir(exist_ok=True)
        (tmp_path / "sounds" / name).symlink_to(tmp_path / "waves" / name)
    results = run_audio(models, tmp_path / "audio", "--train_dir", tmp_path / "sounds", "--ignore_mismatched_sizes")
    assert results["train_samples"] == 2


def test_images_in_one_folder(models, tmp_path):
    folder = write_images(tmp_path / "train", 6)
    for path in folder.glob("*/*.png"):
        path.rename(folder / path.name)
    with pytest.raises(
        ValueError, match=r"`--train_dir`: The files in .*train have no labels\. Make one folder per class"
    ):
        run_image(models, tmp_path, "--train_dir", folder)


def test_recordings_in_one_folder(models, tmp_path):
    """Enough to predict them."""
    (tmp_path / "flat").mkdir()
    for row in range(3):
        soundfile.write(tmp_path / "flat" / f"{row}.wav", np.zeros(4_000), 16_000)
    with pytest.raises(
        ValueError, match=r"`--train_dir`: The files in .*flat have no labels\. Make one folder per class"
    ):
        run_audio(models, tmp_path, "--train_dir", tmp_path / "flat")
    argv = ["--model_name_or_path", models["audio"], "--test_dir", tmp_path / "flat", "--do_predict", *QUIET]
    run_train("audio", words(*argv, "--output_dir", tmp_path / "out"))
    assert len((tmp_path / "out" / "predictions.csv").read_text().splitlines()) == 1 + 3


@pytest.mark.parametrize("damage", ["text", "truncated"])
def test_images_that_do_not_decode(damage, models, tmp_path):
    """Those of the validation data are found before the training."""
    folder = write_images(tmp_path / "validation", 9)
    victims = sorted(folder.glob("*/*.png"))[2:8]
    for victim in victims:
        victim.write_bytes(b"no image" if damage == "text" else victim.read_bytes()[:60])
    more = ["--train_dir", write_images(tmp_path / "train", 9), "--validation_dir", folder, "--do_eval"]
    message = r"^6 of 9 files of the validation data cannot be used: The image .*; and 1 more\. Repair them, or"
    with pytest.raises(ValueError, match=message) as error:
        run_image(models, tmp_path, *more)
    assert sum(f"{victim} cannot be decoded" in str(error.value) for victim in victims) == 5
    assert not (tmp_path / "out").exists()


def test_images_that_are_missing(models, tmp_path):
    rows = [{"image": path, "label": path.parent.name} for path in write_images(tmp_path / "a", 6).glob("*/*.png")]
    path = write_csv(tmp_path / "train.csv", [*rows, {"image": "gone.png", "label": "red"}, {"label": "red"}])
    with pytest.raises(
        ValueError, match=r"2 of 8 files .*gone\.png cannot be decoded \(.*No such file.*; A missing image"
    ):
        run_image(models, tmp_path, "--train_file", path)


def test_an_image_that_is_damaged_behind_its_header(tmp_path):
    PIL.Image.effect_noise((64, 64), 50).save(tmp_path / "a.jpg")
    (tmp_path / "a.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"The image .*a\.jpg cannot be decoded \(.*truncated"):
        image.decode({"path": str(tmp_path / "a.jpg"), "bytes": None})


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_images_of_16_bits_keep_their_brightness(suffix, tmp_path):
    """Half of the range is half of it with 8 bits, too, to within half a step."""
    pixels = np.linspace(0, 65_535, 64).round().astype(np.uint16).reshape(8, 8)
    file = {"path": str(tmp_path / f"a{suffix}"), "bytes": None}
    PIL.Image.fromarray(pixels).save(file["path"])
    assert image.find_damage(file) is None
    found = np.asarray(image.decode(file))
    assert found.shape == (8, 8, 3)
    assert np.abs(found / 255 - pixels[..., None] / 65_535).max() <= 0.5 / 255 + 1e-9


@pytest.mark.parametrize(
    ("pixels", "low", "high"),
    [(np.array([[0, 256]], np.int32), 0, 256), (np.array([[-1, 3]], np.int32), -1, 3)]
    + [(np.array([[0, high]], np.float32), 0, high) for high in (0.5, 1, 255.5)],
)
def test_images_whose_white_is_not_known(pixels, low, high, tmp_path):
    file = {"path": str(tmp_path / "a.tif"), "bytes": None}
    PIL.Image.fromarray(pixels).save(file["path"])
    message = rf"a\.tif cannot be decoded \(its pixels are numbers from {low} to {high} \(mode '[IF]'\)"
    assert re.search(message, image.find_damage(file))
    with pytest.raises(ValueError, match=message):
        image.decode(file)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_images_of_32_bits_that_are_like_8(dtype, tmp_path):
    """As `datasets` writes a list of gray pixels."""
    pixels = np.array([[0, 1, 128, 255]], dtype)
    file = {"path": str(tmp_path / "a.tif"), "bytes": None}
    PIL.Image.fromarray(pixels).save(file["path"])
    assert image.find_damage(file) is None
    assert np.asarray(image.decode(file))[..., 0].tolist() == [[0, 1, 128, 255]]


def test_recordings_that_do_not_decode(models, tmp_path):
    for folder in ("train", "validation"):
        for row in range(4):
            path = tmp_path / folder / "ab"[row % 2] / f"{row}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, np.zeros(4_000), 16_000)
    (tmp_path / "validation" / "a" / "0.wav").write_bytes(b"no recording")
    soundfile.write(tmp_path / "validation" / "a" / "2.wav", np.zeros(10), 8_000)
    message = (
        r"^2 of 4 files of the validation data cannot be used: The recording .*0\.wav cannot be decoded \(.*"
        r"The recording .*2\.wav is too short \(10 samples at 8000 per second, but 0\.025 s are needed"
    )
    more = ["--train_dir", tmp_path / "train", "--validation_dir", tmp_path / "validation", "--do_eval"]
    with pytest.raises(ValueError, match=message):
        run_audio(models, tmp_path, *more)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("seconds", ["0", "0.024", "nan", "inf"])
def test_parts_of_recordings_that_are_too_short(seconds, models, tmp_path):
    """A model has a window of 25 ms."""
    soundfile.write(tmp_path / "a.wav", np.zeros(4_000), 16_000)
    rows = [{"audio": tmp_path / "a.wav", "label": label} for label in "ab"]
    more = ["--train_file", write_csv(tmp_path / "train.csv", rows), "--max_length_seconds", seconds]
    with pytest.raises(ValueError, match=rf"`--max_length_seconds` is {float(seconds)}, .* of at least 0\.025"):
        run_audio(models, tmp_path, *more)


def test_recordings_that_are_left_out_are_named(tmp_path, caplog):
    for name in ("a/1.wav", "b/2.OPUS", "b/3.aif", "b/4.oga", "b/notes.txt", "b/.hidden", "c/deep/5.wav", "6.wav"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    rows = audio.AudioClassification().load_folder(str(tmp_path), None)
    assert [Path(path).name for path in rows["audio"][:]] == ["1.wav", "2.OPUS", "3.aif", "4.oga"]
    assert rows["label"][:] == ["a", "b", "b", "b"]
    assert f"3 files in {tmp_path} are not used: 6.wav, b/notes.txt, c/deep/5.wav. " in caplog.text


@pytest.mark.parametrize("is_file", [True, False])
def test_what_is_wrong_with_a_recording(is_file, tmp_path):
    def write(samples):
        path = tmp_path / "a.wav"
        soundfile.write(path, samples, 16_000, subtype="FLOAT")
        return {"path": str(path), "bytes": None} if is_file else {"path": None, "bytes": path.read_bytes()}

    name = r"The recording .*a\.wav" if is_file else r"The recording without a file name \(\d+ bytes\)"
    for samples in (0, 10, 399):
        recording = write(np.zeros(samples))
        assert re.match(rf"{name} is too short \({samples} samples", audio.find_damage(recording))
        with pytest.raises(ValueError, match=rf"{name} is too short \({samples} samples .*pad it with silence"):
            audio.decode(recording, 16_000)
    assert audio.find_damage(write(np.zeros(400))) is None
    for value in (np.nan, np.inf):
        with pytest.raises(ValueError, match=rf"{name} has samples that are NaN or infinite"):
            audio.decode(write(np.where(np.arange(800) == 7, value, 0.0)), 16_000)
    gone = {"path": str(tmp_path / "b.wav"), "bytes": None}
    assert audio.find_damage(gone) == f"The recording {tmp_path}/b.wav is not there"
    assert "missing" in audio.find_damage(None)


def test_a_model_without_such_a_head(models, train_csv, tmp_path):
    with pytest.raises(
        ValueError, match=r"`--model_name_or_path` is .*, a 'resnet' model .*no classification head .*bert"
    ):
        run_text(models, tmp_path, train=train_csv, model="image")
    for run in (run_image, run_audio):
        with pytest.raises(ValueError, match=r"`--model_name_or_path` is .*, a 'bert' model .*no classification head"):
            run({"image": models["text"], "audio": models["text"]}, tmp_path, "--train_file", train_csv)


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ("config.json", r"no config can be read .* must hold a config\.json"),
        (
            "tokenizer*.json",
            r"no processor can be read .* must hold tokenizer\.json and tokenizer_config\.json .*no words",
        ),
        ("model.safetensors", r"no model can be read .* must hold model\.safetensors"),
    ],
)
def test_a_folder_without_some_of_a_model(removed, message, train_csv, tmp_path):
    folder = text_model(tmp_path / "model")
    for path in folder.glob(removed):
        path.unlink()
    with pytest.raises(OSError, match=rf"`--model_name_or_path` is '{folder}', but {message}"):
        run_text({"text": folder}, tmp_path, train=train_csv)


def test_images_and_recordings_need_a_preprocessor(models, train_csv, tmp_path):
    for kind, run in (("image", run_image), ("audio", run_audio)):
        folder = Path(shutil.copytree(models[kind], tmp_path / kind))
        (folder / "preprocessor_config.json").unlink()
        with pytest.raises(OSError, match=r"no processor can be read .* must hold preprocessor_config\.json"):
            run({kind: folder}, tmp_path, "--train_file", train_csv)


def test_a_head_for_other_classes(models, tmp_path):
    path = write_csv(tmp_path / "train.csv", [row | {"label": row["label"][0]} for row in text_rows(12)][:2])
    with pytest.raises(ValueError, match=r"other classes than the 2 of this data\. Pass --ignore_mismatched_sizes"):
        run_text(models, tmp_path, train=path)
    run_text(models, tmp_path, "--ignore_mismatched_sizes", train=path)


def test_lora_on_fresh_weights(models, train_csv, tmp_path):
    argv = ["--config_name", models["text"], "--train_file", train_csv, "--do_train", "--use_lora", *QUIET]
    with pytest.raises(ValueError, match=r"`--use_lora` adapts a pretrained model"):
        run_train("text", words(*argv, "--output_dir", tmp_path / "out"))


def test_lora_on_layers_that_are_not_there(models, train_csv, tmp_path):
    message = r"`--lora_target_modules` has qkv, but this 'bert' model .* Linear: dense, key, query, value\. Pass some"
    for names in (["qkv"], ["query", "qkv"]):
        with pytest.raises(ValueError, match=message):
            run_text(models, tmp_path, "--use_lora", "--lora_target_modules", *names, train=train_csv)
    with pytest.raises(ValueError, match=r"has LayerNorm, but .* that can have adapters"):
        run_text(models, tmp_path, "--use_lora", "--lora_target_modules", "LayerNorm", train=train_csv)
    folder = write_images(tmp_path / "train", 6)
    message = r"`--lora_target_modules` has all-linear, .* 'resnet' model .* It has Conv2d: convolution\. Pass some"
    with pytest.raises(ValueError, match=message):
        run_image(models, tmp_path, "--use_lora", "--train_dir", folder)


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def test_a_model_of_the_hub_without_a_network(offline, models, train_csv, tmp_path):
    models = {"text": "some-organisation/some-model"}
    message = r"`--model_name_or_path` is 'some-organisation/some-model'.* no such folder .* hub .*pass a folder"
    with pytest.raises(OSError, match=message):
        run_text(models, tmp_path, train=train_csv)


def test_a_data_set_of_the_hub_without_a_network(offline, models, tmp_path):
    argv = ["--model_name_or_path", models["text"], "--dataset_name", "some-organisation/some-data", "--do_train"]
    with pytest.raises(OSError, match=r"`--dataset_name` is 'some-organisation/some-data'.* hub .*--train_file"):
        run_train("text", words(*argv, *QUIET, "--output_dir", tmp_path / "out"))


# Crops, resampling


@settings(max_examples=100, deadline=None)
@given(
    width=st.integers(1, 300),
    height=st.integers(1, 300),
    min_area=st.floats(0.01, 1),
    seed=st.integers(0, 2**31),
)
def test_random_boxes_lie_in_the_image(width, height, min_area, seed):
    torch.manual_seed(seed)
    left, top, right, bottom = image.random_box(width, height, min_area)
    assert 0 <= left < right <= width and 0 <= top < bottom <= height
    if min_area == 1:
        assert (left, top, right, bottom) == (0, 0, width, height)


def test_random_boxes_have_the_promised_distribution():
    """A square of 1,000: shares of up to 3 / 4 always fit, whatever the ratio of the sides."""
    torch.manual_seed(0)
    boxes = np.array([image.random_box(1000, 1000, 0.1) for _ in range(4000)])
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    shares, ratios = w * h / 1e6, np.log(w / h) / np.log(4 / 3)
    fits = shares < 0.75
    assert shares.min() > 0.099
    assert stats.kstest(shares[fits], stats.uniform(0.1, 0.65).cdf).pvalue > 1e-3
    assert stats.kstest(ratios[fits], stats.uniform(-1, 2).cdf).pvalue > 1e-3
    assert stats.kstest(boxes[fits, 0] / (1000 - w[fits]), stats.uniform.cdf).pvalue > 1e-3


@pytest.mark.parametrize("random_flip", [True, False])
def test_every_other_image_is_mirrored(random_flip):
    torch.manual_seed(0)
    pixels = np.arange(12, dtype=np.uint8).reshape(2, 6)
    data = image.ImageArguments(min_crop_area=1, random_flip=random_flip)
    found = [np.asarray(image.augment(PIL.Image.fromarray(pixels), data)) for _ in range(400)]
    mirrored = [(one == pixels[:, ::-1]).all() for one in found]
    assert all(is_mirrored or (one == pixels).all() for one, is_mirrored in zip(found, mirrored, strict=True))
    assert abs(sum(mirrored) - (200 if random_flip else 0)) <= (50 if random_flip else 0)  # five standard deviations


@pytest.mark.parametrize("rate", [8_000, 22_050, 16_000])
def test_recordings_are_resampled(rate, tmp_path):
    """A sine of 440 Hz on two channels of other loudness is their mean at the new rate, away from the ends."""

    def sine(per_second):
        return np.sin(2 * np.pi * 440 * np.arange(per_second // 2) / per_second)

    soundfile.write(tmp_path / "a.wav", np.stack([0.2 * sine(rate), 0.6 * sine(rate)], axis=1), rate, subtype="FLOAT")
    wave = audio.decode({"path": str(tmp_path / "a.wav"), "bytes": None}, 16_000)
    assert wave.dtype == np.float32 and len(wave) == 8_000
    np.testing.assert_allclose(wave[500:-500], 0.4 * sine(16_000)[500:-500], atol=1e-3)


def test_long_recordings_are_cut_at_random():
    torch.manual_seed(0)
    wave = np.arange(10, dtype=np.float32)
    starts = set()
    for _ in range(100):
        part = audio.random_part(wave, 8)
        assert (part == np.arange(part[0], part[0] + 8)).all()
        starts.add(part[0])
    assert starts == {0, 1, 2}
    assert (audio.random_part(wave, 20) == wave).all()


def test_tones_sound_as_they_are_labelled(tmp_path):
    make_tones.main(words("--output_dir", tmp_path, "--train_samples", 16, "--test_samples", 8))
    paths = sorted((tmp_path / "train").glob("*/*.wav"))
    assert len(paths) == 16 and len({path.parent.name for path in paths}) == 8
    loudness = {"steady": [], "trembling": []}
    for path in paths:
        wave, rate = soundfile.read(path)
        assert (len(wave), rate) == (8_000, 16_000)
        parts = np.abs(wave).reshape(40, 200).mean(axis=1)
        loudness[path.parent.name.split("_")[0]].append(parts.std() / parts.mean())
    assert max(loudness["steady"]) < min(loudness["trembling"])
