"""What `lpg-hf train text` makes of columns, and of arguments that other commands of transformers have."""

import json
import re

import numpy as np
import pytest
import torch
from command_data import QUIET, text_model, text_rows, words, write_csv
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from safetensors.torch import load_file
from transformers import AutoTokenizer

from lpg_hf.commands import rows as chosen
from lpg_hf.commands.arguments import Arguments
from lpg_hf.commands.class_labels import encode_labels
from lpg_hf.commands.parser import parse_arguments
from lpg_hf.commands.text import TextArguments, TextClassification
from lpg_hf.commands.train import train


pytestmark = pytest.mark.usefixtures("fresh_datasets_cache")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return text_model(tmp_path_factory.mktemp("model"))


def parse(*argv) -> Arguments:
    arguments = parse_arguments(TextArguments, "lpg-hf", "", words("--output_dir", "out", *argv))
    return arguments


def tokens(model, rows, *argv):
    """The input ids that rows get."""
    task, tokenizer, data = TextClassification(), AutoTokenizer.from_pretrained(model), parse(*argv).data
    splits = task.check(DatasetDict(train=Dataset.from_list(rows)), data)
    return tokenizer, task.prepare(splits["train"], "train", tokenizer, data)["input_ids"][:]


def test_commas_join_columns_to_one_text(model):
    rows = [{"title": "a rose", "body": "the sky", "label": 0}, {"title": None, "body": "grass", "label": 1}]
    tokenizer, joined = tokens(model, rows, "--text_column_names", "title,body")
    assert joined == [tokenizer("a rose the sky")["input_ids"], tokenizer("grass")["input_ids"]]
    tokenizer, joined = tokens(model, rows, "--text_column_name", "title,body", "--text_column_delimiter", " one ")
    assert joined[0] == tokenizer("a rose one the sky")["input_ids"]


def test_a_delimiter_may_be_a_new_line(model, monkeypatch):
    seen = []
    task, data = TextClassification(), parse("--text_column_names", "a,b", "--text_column_delimiter", r"\n").data
    tokenizer = AutoTokenizer.from_pretrained(model)
    monkeypatch.setattr(type(tokenizer), "__call__", lambda self, *texts, **_: seen.extend(texts) or {"x": [0]})
    task.prepare(Dataset.from_list([{"a": "one", "b": "two"}]), "train", tokenizer, data)
    assert seen == [["one\ntwo"]]


def test_two_names_are_pairs_and_each_may_be_joined(model):
    rows = [{"title": "a", "body": "rose", "question": "the sky", "label": 0}]
    tokenizer, pairs = tokens(model, rows, "--text_column_names", "title,body", "question")
    assert pairs == [tokenizer("a rose", "the sky")["input_ids"]]


def test_a_column_whose_name_has_a_comma(model):
    tokenizer, found = tokens(model, [{"a,b": "a rose", "label": 0}], "--text_column_names", "a,b")
    assert found == [tokenizer("a rose")["input_ids"]]


def test_sentence_is_the_column_where_there_is_no_text(model):
    tokenizer, found = tokens(model, [{"sentence": "a rose", "label": 0}])
    assert found == [tokenizer("a rose")["input_ids"]]
    with pytest.raises(ValueError, match=r"`--text_column_names` is 'text', but the train data has the columns words"):
        tokens(model, [{"words": "a rose", "label": 0}])


def test_rows_with_nothing_in_any_of_the_columns(model):
    rows = [{"a": "x", "b": None, "label": 0}, {"a": " ", "b": "", "label": 0}]
    with pytest.raises(ValueError, match=r"Column 'a,b' of the train data has 1 empty texts \(rows 1, counted"):
        tokens(model, rows, "--text_column_names", "a,b")


def test_shuffling_before_rows_are_chosen():
    rows = DatasetDict(train=Dataset.from_dict({"labels": [0, 1] * 20, "number": range(40)}))
    picked = {}
    for seed in (1, 2):
        arguments = parse("--shuffle_train_dataset", "--shuffle_seed", seed, "--max_train_samples", 10)
        picked[seed] = chosen.choose_rows(rows, arguments)["train"]["number"][:]
        expected = rows["train"].shuffle(seed=seed).shuffle(seed=42).select(range(10))["number"][:]
        assert picked[seed] == expected
    assert picked[1] != picked[2]


def test_rows_of_a_sorted_file_are_drawn_from_all_of_it():
    """Predictions keep the order of their file."""
    labels = [label for label in range(3) for _ in range(20)]
    rows = Dataset.from_dict({"labels": labels}).cast_column("labels", ClassLabel(names=["a", "b", "c"]))
    splits = DatasetDict(train=rows, validation=rows, test=rows)
    limits = [argument for split in ("train", "eval", "predict") for argument in (f"--max_{split}_samples", 15)]
    picked = chosen.choose_rows(splits, parse(*limits))
    for split in ("train", "validation"):
        assert len(picked[split]) == 15 and set(picked[split]["labels"][:]) == {0, 1, 2}
    assert picked["test"]["labels"][:] == [0] * 15


@pytest.mark.parametrize("label", [-1, None])
def test_test_data_without_labels(label):
    """The hub marks them so."""
    features = Features({"text": Value("string"), "label": ClassLabel(names=["a", "b"])})
    columns = [{"text": ["x", "y"], "label": labels} for labels in ([0, 1], [label, label])]
    train, test = (Dataset.from_dict(values, features=features) for values in columns)
    splits, _ = encode_labels(DatasetDict(train=train, test=test), parse().data)
    assert splits["train"]["labels"][:] == [0, 1] and splits["test"].column_names == ["text"]


@pytest.mark.parametrize("name", ["f1", "precision", "recall", "matthews_correlation", "accuracy"])
def test_one_more_metric(name, model, tmp_path):
    from sklearn import metrics

    train_file, test_file = (write_csv(tmp_path / f"{n}.csv", text_rows(24, n)) for n in (0, 1))
    argv = ["--model_name_or_path", model, "--train_file", train_file, "--validation_file", test_file, *QUIET]
    argv += ["--test_file", test_file, "--do_train", "--do_eval", "--do_predict", "--max_steps", 3]
    results = train("text", words(*argv, "--metric_name", name, "--output_dir", tmp_path / "out"))
    lines = (tmp_path / "out" / "predictions.csv").read_text().split()[1:]
    found, truth = [line.split(",")[1] for line in lines], [row["label"] for row in text_rows(24, 1)]
    expected = {
        "accuracy": np.mean(np.array(found) == np.array(truth)),
        "matthews_correlation": metrics.matthews_corrcoef(truth, found),
        "f1": metrics.f1_score(truth, found, average="macro"),
        "precision": metrics.precision_score(truth, found, average="macro", zero_division=0),
        "recall": metrics.recall_score(truth, found, average="macro", zero_division=0),
    }
    assert results[f"eval_{name}"] == pytest.approx(expected[name])
    assert {"eval_balanced_accuracy", "eval_macro_f1"} <= results.keys()


METRIC = """
import datasets
import evaluate


class Share(evaluate.Metric):
    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        CHECK
        return {"share": sum(p == 0 for p in predictions) / len(predictions)}
"""


@pytest.mark.parametrize("check", ["pass", "raise ValueError('two classes alone')"])
def test_a_metric_of_ones_own(check, model, tmp_path):
    (tmp_path / "share.py").write_text(METRIC.replace("CHECK", check))
    rows = write_csv(tmp_path / "rows.csv", text_rows(12))
    argv = ["--model_name_or_path", model, "--train_file", rows, "--validation_file", rows, *QUIET]
    argv += ["--do_train", "--do_eval", "--max_steps", 1, "--metric_name", tmp_path / "share.py"]
    if check == "pass":
        assert 0 <= train("text", words(*argv, "--output_dir", tmp_path / "out"))["eval_share"] <= 1
    else:
        with pytest.raises(ValueError, match=r"cannot be computed from the indices of 3 classes \(two classes"):
            train("text", words(*argv, "--output_dir", tmp_path / "out"))
        assert not (tmp_path / "out").exists()


def test_a_metric_that_is_not_there(model, tmp_path, monkeypatch):
    monkeypatch.setattr("evaluate.config.HF_EVALUATE_OFFLINE", True)
    rows = write_csv(tmp_path / "rows.csv", text_rows(12))
    argv = ["--model_name_or_path", model, "--train_file", rows, "--do_train", *QUIET, "--metric_name", "no_such"]
    with pytest.raises(OSError, match=r"`--metric_name` is 'no_such'.*could not be fetched .* pass f1, precision"):
        train("text", words(*argv, "--output_dir", tmp_path / "out"))


def test_regression_is_refused(model, tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse("--do_regression")
    assert re.search(r"`--do_regression` is true.*run_classification\.py", capsys.readouterr().err)
    assert parse("--do_regression", "false").data.do_regression is False
    Dataset.from_list([{"text": "a rose", "label": 0.5}]).to_parquet(tmp_path / "rows.parquet")
    argv = ["--model_name_or_path", model, "--train_file", tmp_path / "rows.parquet", "--do_train", *QUIET]
    with pytest.raises(ValueError, match=r"numbers with a fraction are regression\. If they are classes, write"):
        train("text", words(*argv, "--output_dir", tmp_path / "out"))


def test_older_names_of_arguments():
    args = parse(
        "--evaluation_strategy", "epoch", "--warmup_ratio", 0.25, "--push_to_hub_model_id", "me/model"
    ).training
    assert (args.eval_strategy, args.warmup_steps, args.hub_model_id) == ("epoch", 0.25, "me/model")
    assert parse("--use_fast_tokenizer").data.use_fast_tokenizer


def test_a_model_for_several_labels_gets_a_head_for_one(model, tmp_path):
    base = text_model(tmp_path / "model", problem_type="multi_label_classification")
    rows = write_csv(tmp_path / "rows.csv", text_rows(12))
    argv = ["--model_name_or_path", base, "--train_file", rows, "--validation_file", rows, "--do_train", "--do_eval"]
    results = train("text", words(*argv, *QUIET, "--max_steps", 1, "--output_dir", tmp_path / "out"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["problem_type"] == "single_label_classification" and results["eval_samples"] == 12


def test_splits_and_columns_that_are_removed(model, tmp_path, caplog):
    for split, number in (("train", 24), ("validation", 9), ("unused", 3)):
        rows = [row | {"labels": "x"} for row in text_rows(number)]
        (tmp_path / "data").mkdir(exist_ok=True)
        Dataset.from_list(rows).to_parquet(tmp_path / "data" / f"{split}.parquet")
    files = [{"split": split, "path": f"{split}.parquet"} for split in ("train", "validation", "unused")]
    configs = json.dumps([{"config_name": "a", "data_files": files}])
    (tmp_path / "data" / "README.md").write_text(f"---\nconfigs: {configs}\n---\n")
    argv = ["--model_name_or_path", model, "--dataset_name", tmp_path / "data", "--do_train", "--do_eval", *QUIET]
    argv += ["--max_steps", 1, "--remove_columns", "labels"]
    results = train("text", words(*argv, "--remove_splits", "unused", "--output_dir", tmp_path / "a"))
    assert (results["train_samples"], results["eval_samples"]) == (24, 9)
    with caplog.at_level("INFO"):
        results = train("text", words(*argv, "--remove_splits", "unused,validation", "--output_dir", tmp_path / "b"))
    assert (results["train_samples"], results["eval_samples"]) == (20, 4)
    assert "There are no validation rows: 4 training rows are set aside" in caplog.text
    with pytest.raises(ValueError, match=r"`--remove_splits` has 'dev', but .* has the splits train, validation"):
        train("text", words(*argv, "--remove_splits", "dev", "--output_dir", tmp_path / "c"))
    with pytest.raises(ValueError, match=r"`--remove_columns` is 'topic', but the train data has the columns text, "):
        train("text", words(*argv[:-1], "topic", "--output_dir", tmp_path / "c"))


def test_an_output_folder_that_is_overwritten(model, tmp_path):
    """The second training starts anew, as in another folder."""
    rows = write_csv(tmp_path / "rows.csv", text_rows(12))
    argv = ["--model_name_or_path", model, "--train_file", rows, "--do_train", *QUIET, "--max_steps", 3]
    train("text", words(*argv, "--output_dir", tmp_path / "out", "--learning_rate", 0.1))
    before = load_file(tmp_path / "out" / "model.safetensors")
    again = train("text", words(*argv, "--output_dir", tmp_path / "out", "--overwrite_output_dir"))
    train("text", words(*argv, "--output_dir", tmp_path / "other"))
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "other"))
    assert all(torch.equal(one[name], other[name]) for name in one) and again["train_loss"] > 0
    assert not all(torch.equal(one[name], before[name]) for name in one)
