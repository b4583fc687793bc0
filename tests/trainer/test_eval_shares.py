"""The class shares that the model will meet: where LPGTrainer takes them from, and what it does with them."""

import json
import logging
import re

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import ClassLabel, Dataset
from hypothesis import given
from hypothesis import strategies as st
from text_cases import bert, plain_args, text_dataset
from tiny import NUM_LABELS, flat_parameters
from transformers import HfArgumentParser

from lpg_hf import LPGConfig, LPGLoss, LPGTrainer
from lpg_hf.share_texts import eval_shares_text, read_eval_shares
from lpg_hf.trainer.eval_shares import find_eval_shares


TRAIN = [0] * 4 + [1, 1, 2, 3]
EVALUATION = [0, 1, 1, 2, 2, 2, 3, 3, 3, 3]
# Every count plus one.
FOUND = [2 / 14, 3 / 14, 4 / 14, 5 / 14]


class Unreadable(torch.utils.data.Dataset):
    """Rows whose labels cannot be read without loading them."""

    def __init__(self, labels):
        self.rows = text_dataset(labels)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, row):
        return self.rows[row]


def make_trainer(path, labels=TRAIN, *, args=None, **kwargs):
    args = plain_args(path) if args is None else args
    return LPGTrainer(model=bert(), args=args, train_dataset=text_dataset(labels), **kwargs)


def start_line(trainer, caplog):
    with caplog.at_level(logging.INFO, logger="lpg_hf"):
        trainer.train()
    (line,) = (record.message for record in caplog.records if "Perturbations" in record.message)
    return line


def shares_of(trainer):
    """Of the evaluation, as the loss takes them; those of the training set where it takes none."""
    statistics = trainer.lpg_loss.statistics
    return (statistics.prior if statistics._eval_shares is None else statistics._eval_shares).tolist()


CASES = {
    "eval_dataset": ({"eval_dataset": text_dataset(EVALUATION)}, FOUND, "`eval_dataset`"),
    "another column": ({"eval_dataset": text_dataset(EVALUATION, column="labels")}, FOUND, "`eval_dataset`"),
    "rows in a list": ({"eval_dataset": list(text_dataset(EVALUATION))}, FOUND, "`eval_dataset`"),
    "the first of several": (
        {"eval_dataset": {"first": text_dataset(EVALUATION), "second": text_dataset([0] * 30)}},
        FOUND,
        "`eval_dataset`",
    ),
    "asked for": ({"eval_dataset": text_dataset(EVALUATION), "eval_shares": "eval_dataset"}, FOUND, "`eval_dataset`"),
    "none": ({}, [0.5, 0.25, 0.125, 0.125], "the training set, since there is no `eval_dataset`"),
    "unreadable": (
        {"eval_dataset": Unreadable(EVALUATION)},
        [0.5, 0.25, 0.125, 0.125],
        "the training set, since the labels of `eval_dataset` cannot be read",
    ),
    "a stream": (
        {"eval_dataset": text_dataset(EVALUATION).to_iterable_dataset()},
        [0.5, 0.25, 0.125, 0.125],
        "the training set, since the labels of `eval_dataset` cannot be read",
    ),
    "out of range": (
        {"eval_dataset": text_dataset([0, 7])},
        [0.5, 0.25, 0.125, 0.125],
        "the training set, since the labels of `eval_dataset` cannot be read",
    ),
    "no labels": (
        {"eval_dataset": Dataset.from_dict({"input_ids": [[1, 2, 3]] * 4})},
        [0.5, 0.25, 0.125, 0.125],
        "the training set, since the labels of `eval_dataset` cannot be read",
    ),
    "train": (
        {"eval_dataset": text_dataset(EVALUATION), "eval_shares": "train"},
        [0.5, 0.25, 0.125, 0.125],
        "the training set",
    ),
    "uniform": ({"eval_dataset": text_dataset(EVALUATION), "eval_shares": "uniform"}, [0.25] * 4, "all classes alike"),
    "counts": ({"eval_shares": [3, 1, 0, 4]}, [0.375, 0.125, 0.0, 0.5], "`eval_shares`"),
    "counts by index": ({"eval_shares": {3: 4, 0: 3, 2: 0, 1: 1}}, [0.375, 0.125, 0.0, 0.5], "`eval_shares`"),
    "counts by name": (
        {"eval_shares": {"LABEL_3": 4, "LABEL_0": 3, "LABEL_2": 0, "LABEL_1": 1}},
        [0.375, 0.125, 0.0, 0.5],
        "`eval_shares`",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_shares_are_taken_from_what_was_said_and_the_line_at_the_start_names_it(case, tmp_path, caplog):
    options, expected, source = CASES[case]
    trainer = make_trainer(tmp_path, **options)
    assert start_line(trainer, caplog).endswith(f". Evaluation shares from {source}.")
    assert shares_of(trainer) == pytest.approx(expected)
    assert trainer.lpg_loss.statistics.class_counts.tolist() == [4, 2, 1, 1]


def test_the_adjustment_goes_two_thirds_of_the_way_to_the_shares_of_the_evaluation(tmp_path):
    trainer = make_trainer(tmp_path, eval_shares=[1.0, 8.0, 8.0, 64.0])
    statistics, adjustment = trainer.lpg_loss.statistics, trainer.lpg_loss.perturbations[0]
    output_shares = (statistics.prior.log() + adjustment.log_correction(statistics)).softmax(-1)
    assert output_shares.tolist() == pytest.approx([1 / 25, 4 / 25, 4 / 25, 16 / 25])
    # Labels are judged at the shares of the evaluation themselves.
    judged_at = (output_shares.log() + statistics.judged_offset).softmax(-1)
    assert judged_at.tolist() == pytest.approx([1 / 81, 8 / 81, 8 / 81, 64 / 81])


def test_other_shares_train_another_model(tmp_path):
    def trained(eval_shares):
        trainer = make_trainer(tmp_path, eval_shares=eval_shares)
        trainer.train()
        return flat_parameters(trainer.model)

    train, uniform = trained("train"), trained("uniform")
    assert torch.equal(trained([4, 2, 1, 1]), train) and torch.equal(trained([1, 1, 1, 1]), uniform)
    assert (train - uniform).abs().max() > 1e-5


def test_shares_that_follow_the_samples_that_are_counted(tmp_path):
    """Where the labels of training cannot be read, those of the evaluation still can."""
    trainer = LPGTrainer(
        model=bert(),
        args=plain_args(tmp_path, max_steps=1),
        train_dataset=Unreadable(TRAIN),
        eval_dataset=text_dataset(EVALUATION),
    )
    trainer.train()
    assert trainer.lpg_loss.statistics.class_counts.tolist() == [4, 2, 1, 1]
    assert shares_of(trainer) == pytest.approx(FOUND)


@pytest.mark.parametrize(
    "eval_shares", [[0.5, 0.5], [0.0] * 4, [0.5, 0.5, 0.5, -0.5], [1.0, 1.0, 1.0, float("nan")]], ids=str
)
def test_shares_that_do_not_fit_raise_when_training_starts(eval_shares, tmp_path):
    trainer = make_trainer(tmp_path, eval_shares=eval_shares)
    with pytest.raises(ValueError, match=rf"`eval_shares` must be {NUM_LABELS} numbers, one per class"):
        trainer.train()


# By name

NAMES = ["a, b", "c=d", "ham", "spam"]


def named_trainer(path, **kwargs):
    """On data that call the classes by names; the model calls them LABEL_0 to LABEL_3."""
    rows = text_dataset(TRAIN).cast_column("label", ClassLabel(names=NAMES))
    return LPGTrainer(model=bert(), args=kwargs.pop("args", plain_args(path)), train_dataset=rows, **kwargs)


BY_NAME = {
    "a mapping": {"spam": 0.3, "a, b": 0.5, "ham": 0.1, "c=d": 0.1},
    "a string": '{"spam": 0.3, "a, b": 0.5, "ham": 0.1, "c=d": 0.1}',
    "names of the model": "LABEL_3=0.3,LABEL_0=0.5,LABEL_2=0.1,LABEL_1=0.1",
    "names of both": {"LABEL_0": 0.5, "c=d": 0.1, "LABEL_2": 0.1, "spam": 0.3},
}


@pytest.mark.parametrize("shares", BY_NAME.values(), ids=BY_NAME)
@pytest.mark.parametrize("is_in_config", [False, True])
def test_shares_by_name(shares, is_in_config, tmp_path):
    options = {"args": LPGConfig(str(tmp_path), eval_shares=shares)} if is_in_config else {"eval_shares": shares}
    assert shares_of(named_trainer(tmp_path, **options)) == pytest.approx([0.5, 0.1, 0.1, 0.3])


@given(st.permutations(range(NUM_LABELS)), st.lists(st.floats(0.01, 10), min_size=NUM_LABELS, max_size=NUM_LABELS))
def test_the_order_of_named_shares_does_not_matter(order, shares):
    named = {NAMES[index]: shares[index] for index in order}
    indices = {name: index for index, name in enumerate(NAMES)}
    assert find_eval_shares(named, None, NUM_LABELS, indices) == (shares, "`eval_shares`")
    assert read_eval_shares(json.dumps(named)) == named


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        (
            {"spma": 0.9, "a, b": 0.1, "c=d": 1, "ham": 1},
            "'spma' is no class (did you mean 'spam'?), and 'spam' has no share",
        ),
        ({"spam": 0.9, "a, b": 0.1}, "'c=d', 'ham' has no share"),
        ({"spam": 1, "a, b": 1, "c=d": 1, "ham": 1, 4: 1, -1: 1}, "4, -1 is no class"),
        ({"spam": 1, "a, b": 1, "c=d": 1, "ham": 1, 3: 1}, "a class has two names there"),
    ],
)
def test_names_that_are_not_those_of_all_classes(shares, message, tmp_path):
    trainer = named_trainer(tmp_path, eval_shares=shares)
    classes = "The classes are, in their order: 'a, b', 'c=d', 'ham', 'spam'."
    cure = "Give one share to each of them, by name or by index (0 to 3)."
    whole = re.escape(f"`eval_shares` must have each class once; {message}. {classes} {cure}")
    with pytest.raises(ValueError, match=f"^{whole}$"):
        trainer.train()


def test_the_message_about_many_long_names_stays_short():
    names = [f"Class {number} " + 1000 * "x" for number in range(1000)]
    indices = {name: index for index, name in enumerate(names)}
    shares = {name.upper() if number == 999 else name: 1.0 for number, name in enumerate(names)}
    with pytest.raises(ValueError, match=r"'CLASS 999 X+… is no class \(did you mean 'Class 999 x+…\?\)") as error:
        find_eval_shares(shares, None, 1000, indices)
    assert len(str(error.value)) < 2000 and "... (1000 in all)" in str(error.value)


# Of other types

FRACTIONS = [0.5, 0.125, 0.125, 0.25]
OF_OTHER_TYPES = {
    "an array": np.array(FRACTIONS, dtype=np.float32),
    "a tensor": torch.tensor(FRACTIONS),
    "tensors": [torch.tensor(share) for share in FRACTIONS],
    "a Series": pd.Series(FRACTIONS),
    "a Series by name": pd.Series(dict(sorted(zip(NAMES, FRACTIONS, strict=True), key=lambda pair: pair[1]))),
    "a Series by index": pd.Series({3: 0.25, 1: 0.125, 0: 0.5, 2: 0.125}),
    "indices": {3: 0.25, 1: 0.125, 0: 0.5, 2: 0.125},
    "indices of numpy": dict(zip(np.arange(4), FRACTIONS, strict=True)),
    "numbers of numpy by name": dict(zip(NAMES, np.array(FRACTIONS, dtype=np.float32), strict=True)),
    "tensors by name": dict(zip(NAMES, torch.tensor(FRACTIONS), strict=True)),
}


@pytest.mark.parametrize("shares", OF_OTHER_TYPES.values(), ids=OF_OTHER_TYPES)
@pytest.mark.parametrize("is_in_config", [False, True])
def test_shares_of_other_types(shares, is_in_config, tmp_path):
    options = {"args": LPGConfig(str(tmp_path), eval_shares=shares)} if is_in_config else {"eval_shares": shares}
    assert shares_of(named_trainer(tmp_path, **options)) == FRACTIONS
    if is_in_config:
        config = options["args"]
        saved = json.loads(config.to_json_string())["eval_shares"]
        assert saved == config.to_dict()["eval_shares"] == config.eval_shares
        (again,) = HfArgumentParser(LPGConfig).parse_dict({"output_dir": str(tmp_path), "eval_shares": saved})
        assert again.eval_shares == saved
        assert shares_of(named_trainer(tmp_path, args=again)) == FRACTIONS
        torch.save(config, tmp_path / "training_args.bin")
        assert torch.load(tmp_path / "training_args.bin", weights_only=False).eval_shares == saved


@given(st.lists(st.floats(0, 1e9) | st.integers(0, 10**9), min_size=1))
def test_a_text_holds_every_number_as_it_is(shares):
    assert read_eval_shares(eval_shares_text(shares)) == shares
    assert read_eval_shares(eval_shares_text(dict(enumerate(shares)))) == shares
    named = {f"{{a=, {index}": share for index, share in enumerate(shares)}
    assert read_eval_shares(eval_shares_text(named)) == named


@pytest.mark.parametrize(
    ("shares", "problem"),
    [
        ({True: 0.5, False: 0.5}, "has the key True.* A class that is called on, off, .* needs quotes in YAML"),
        ({0.5: 1}, r"has the key 0\.5"),
        ({"a": None, "b": 1}, "has the share None, which is no number"),
        (["a", 0.5], "has the share 'a', which is no number"),
        (np.array([[0.5], [0.5]]), r"has the share array\(\[0\.5\]\), which is no number"),
        ([[0.5], [0.5, 0.5]], r"has the share \[0\.5\], which is no number"),
        (np.array(0.5), "has no number per class"),
        (None, "has no number per class"),
        ({}, "has no number per class"),
        (pd.Series([0.5, 0.5, 0.1], ["a", "b", "a"]), "has a class twice"),
        ([None] * 10**6, r"has the share None.*"),
    ],
)
def test_what_is_no_shares_raises_early(shares, problem, tmp_path):
    with pytest.raises(ValueError, match=r"^`eval_shares` is .*, which " + problem) as error:
        LPGConfig(str(tmp_path), eval_shares=shares)
    assert "Use 'eval_dataset', 'train', 'uniform', or one number per class: [0.9, 0.1]" in str(error.value)
    assert len(str(error.value)) < 600
    if shares is not None:
        with pytest.raises(ValueError, match=re.escape(str(error.value))):
            make_trainer(tmp_path, eval_shares=shares)


def test_indices_in_a_config_that_are_not_those_of_all_classes(tmp_path):
    for shares in ({1: 0.5, 2: 0.5}, {"ham": 0.5, 0: 0.5}):
        with pytest.raises(ValueError, match=r"has not the class indices 0 to 1\..* by numbers, put these in quotes"):
            LPGConfig(str(tmp_path), eval_shares=shares)


@pytest.mark.parametrize("values", [pd.Series([1, 2, 2, 2]).value_counts(), pd.Series([3, 1], ["ham", "spam"])])
def test_counts_in_an_order_of_their_own_are_refused(values):
    """`value_counts` sorts by size: the counts would be those of other classes."""
    with pytest.raises(ValueError, match=r"^`class_counts` must be a list in the order.*Series.*counts\[label\] for"):
        LPGLoss(num_labels=2, class_counts=values)
    with pytest.raises(ValueError, match=r"^`eval_shares` must be a list in the order .*Series.*shares\[label\] for"):
        LPGLoss(num_labels=2, class_counts=[1, 3], eval_shares=values)
    counts = pd.Series([0, 1, 1, 1]).value_counts().sort_index()
    assert LPGLoss(num_labels=2, class_counts=counts).statistics.class_counts.tolist() == [1, 3]


# Configuration


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["0.5,0.1,0.1,0.3"], [0.5, 0.1, 0.1, 0.3]),
        (["0.5", "0.1", "0.1", "0.3"], [0.5, 0.1, 0.1, 0.3]),
        (["3, 1, 0, 4"], [0.375, 0.125, 0.0, 0.5]),
        (["LABEL_3=0.3", "LABEL_0=0.5", "LABEL_2=0.1", "LABEL_1=0.1"], [0.5, 0.1, 0.1, 0.3]),
        (["LABEL_3=0.3, LABEL_0=0.5, LABEL_2=0.1, LABEL_1=0.1"], [0.5, 0.1, 0.1, 0.3]),
        (["uniform"], [0.25] * 4),
        (["train"], [0.5, 0.25, 0.125, 0.125]),
        (["eval_dataset"], FOUND),
    ],
)
def test_config_from_the_command_line(words, expected, tmp_path):
    options = ["--output_dir", str(tmp_path), "--eval_shares", *words]
    (config,) = HfArgumentParser(LPGConfig).parse_args_into_dataclasses(options)
    trainer = make_trainer(tmp_path, args=config, eval_dataset=text_dataset(EVALUATION))
    assert shares_of(trainer) == pytest.approx(expected)


def test_config_survives_json(tmp_path):
    config = LPGConfig(str(tmp_path), eval_shares="0.5,0.1,0.1,0.3")
    values = {"output_dir": str(tmp_path), "eval_shares": config.to_dict()["eval_shares"]}
    (again,) = HfArgumentParser(LPGConfig).parse_dict(values)
    assert shares_of(make_trainer(tmp_path, args=again)) == pytest.approx([0.5, 0.1, 0.1, 0.3])


def test_argument_wins_over_config(tmp_path):
    config = LPGConfig(str(tmp_path), eval_shares="uniform")
    trainer = make_trainer(tmp_path, args=config, eval_shares=[0.5, 0.1, 0.1, 0.3])
    assert shares_of(trainer) == pytest.approx([0.5, 0.1, 0.1, 0.3])


@pytest.mark.parametrize(
    "text",
    [
        "halves",
        "0.5;0.5",
        "",
        "0.9,0.1,",
        "a=0.5,0.5",
        "a=0.5,a=0.5",
        "=0.5",
        "a=",
        "{",
        '{"a": 1, "a": 2}',
        '{"a": []}',
    ],
)
def test_a_word_that_nobody_knows_raises_early(text, tmp_path):
    match = "`eval_shares` is .* Use 'eval_dataset', 'train', 'uniform', or one number per class"
    with pytest.raises(ValueError, match=match):
        make_trainer(tmp_path, args=LPGConfig(str(tmp_path), eval_shares=text))
    with pytest.raises(ValueError, match=match):
        make_trainer(tmp_path, eval_shares=text)
