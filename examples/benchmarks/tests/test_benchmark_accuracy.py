"""The benchmark of all methods: its data, its fairness, its bookkeeping and its statistics."""

import csv
import importlib
import os
import sys
from contextlib import ExitStack
from itertools import pairwise, product
from unittest.mock import patch

import accuracy
import accuracy_statistics as statistics
import accuracy_summary
import accuracy_training as training
import numpy as np
import pandas as pd
import pytest
import torch
from accuracy_claims import check_claims
from accuracy_data import DataSpec, Source, load_source, make_split, parse_regime
from accuracy_methods import ABLATIONS, BENCHMARK, METHODS, check_methods
from accuracy_models import Recipe
from accuracy_results import COLUMNS, KEY, VALUES, Results
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score
from transformers import Trainer

from lpg_hf import LPGLoss


def make_source(sizes, num_test=0, human=None, seed=0):
    """Labels of the given class sizes in random order, with random vectors."""
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))
    is_test = np.arange(len(labels)) < num_test
    vectors = np.random.default_rng(seed).standard_normal((len(labels), 5)).astype(np.float32)
    names = [f"class {number}" for number in range(len(sizes))]
    return Source({"features": torch.from_numpy(vectors)}, labels, names, human or {}, is_test, lambda: vectors)


# Data


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("balanced", (1.0, None, 0.0, None)),
        ("natural", (None, None, 0.0, None)),
        ("long_tail_50", (50.0, None, 0.0, None)),
        ("symmetric_20", (1.0, "symmetric", 0.2, None)),
        ("long_tail_20+pairflip_12.5", (20.0, "pairflip", 0.125, None)),
        ("human:worse", (None, "human", 0.0, "worse")),
        ("long_tail_10+human:worse", (10.0, "human", 0.0, "worse")),
    ],
)
def test_regimes_are_read(name, expected):
    regime = parse_regime(name)
    assert (regime.imbalance_ratio, regime.noise, pytest.approx(regime.rate), regime.column) == expected


@pytest.mark.parametrize(
    "name", ["", "noisy", "long_tail", "long_tail_1", "symmetric_100", "symmetric_20+pairflip_20", "human:"]
)
def test_unknown_regimes_list_the_known_ones(name):
    with pytest.raises(ValueError, match=r"Cannot read the regime .* known ones are balanced, natural, long_tail"):
        parse_regime(name)


def test_parts_do_not_overlap_and_test_labels_stay_clean():
    source = make_source([60, 50, 40])
    split = make_split(source, parse_regime("symmetric_40"), seed=1)
    parts = [set(rows) for rows in (split.train, split.validation, split.test)]
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]
    assert (split.noisy[split.test] == source.labels[split.test]).all()
    assert len(split.test) == 30  # a fifth
    assert split.noise_rate == np.mean(split.noisy[split.train] != source.labels[split.train])
    # Balanced: as many rows of each class as the smallest has, before the noise.
    assert np.bincount(source.labels[split.train]).tolist() == [26, 26, 26]


def test_own_test_split_is_the_test_set():
    source = make_source([80, 80], num_test=32)
    split = make_split(source, parse_regime("natural"), seed=0)
    assert sorted(split.test) == list(range(32))
    assert len(split.train) + len(split.validation) == 128


def test_validation_rows_have_the_imbalance_and_the_noise_of_the_training_rows():
    source = make_source([2000] * 4)
    split = make_split(source, parse_regime("long_tail_20+pairflip_30"), seed=0)
    for rows, head in ((split.train, 1280), (split.validation, 320)):
        expected = [int(head * 20 ** (-label / 3) * (1 + 1e-9)) for label in range(4)]
        assert np.bincount(source.labels[rows]).tolist() == expected
        is_flipped = split.noisy[rows] != source.labels[rows]
        assert abs(is_flipped.mean() - 0.3) < 0.06
        assert (split.noisy[rows][is_flipped] == (source.labels[rows][is_flipped] + 1) % 4).all()


@pytest.mark.parametrize("regime", ["natural", "human:worse", "long_tail_8", "long_tail_8+symmetric_20"])
def test_the_natural_test_set_has_the_shares_of_the_training_rows(regime):
    sizes, num_test = [400, 200, 120], 150
    labels = make_source(sizes).labels
    source = make_source(sizes, num_test, human={"worse": np.roll(labels, 1)})
    splits = [make_split(source, parse_regime(regime), seed) for seed in (0, 0, 1)]
    assert set(splits[0].natural_test) == set(splits[1].natural_test) != set(splits[2].natural_test)
    for split in splits:
        assert len(set(split.natural_test)) == len(split.natural_test)
        assert set(split.natural_test) <= set(split.test)
        train, test, natural = (np.bincount(labels[rows]) for rows in (split.train, split.test, split.natural_test))
        # As large as it can be: the class that the test rows are short of has all of them there.
        largest = min(test / train)
        assert np.abs(natural - largest * train).max() <= 0.5


def test_a_balanced_regime_has_one_test_set():
    split = make_split(make_source([60, 50, 40]), parse_regime("symmetric_40"), seed=1)
    assert (split.natural_test == split.test).all()


def test_a_class_that_the_test_rows_lack_shapes_no_natural_test_set():
    source = make_source([60, 40, 30])
    source.is_test = (np.arange(130) < 60) & (source.labels < 2)
    split = make_split(source, parse_regime("natural"), seed=0)
    natural, train = (np.bincount(source.labels[rows], minlength=3) for rows in (split.natural_test, split.train))
    assert natural[2] == 0 and natural[0] / natural[1] == pytest.approx(train[0] / train[1], rel=0.1)


def test_seeds_differ_and_repeat():
    source = make_source([100] * 3)
    first, again, other = (make_split(source, parse_regime("instance_20"), seed) for seed in (0, 0, 1))
    assert (first.noisy == again.noisy).all() and (first.train == again.train).all()
    assert set(first.train) != set(other.train)


def test_human_labels_come_from_their_column():
    labels = make_source([50, 50]).labels
    source = make_source([50, 50], human={"worse": 1 - labels})
    with pytest.raises(ValueError, match=r"loses 2 of 2 classes"):
        make_split(source, parse_regime("human:worse"), seed=0)
    partly = np.where(np.arange(100) % 4 == 0, 1 - labels, labels)
    split = make_split(make_source([50, 50], human={"worse": partly}), parse_regime("human:worse"), seed=0)
    assert (split.noisy[split.train] == partly[split.train]).all()
    with pytest.raises(ValueError, match=r"label column 'missing'.*could be human labels: worse"):
        make_split(source, parse_regime("human:missing"), seed=0)


def test_a_class_lost_by_the_long_tail_is_an_error():
    with pytest.raises(ValueError, match=r"'long_tail_100' would lose the class 'class 2'"):
        make_split(make_source([50, 50, 50]), parse_regime("long_tail_100"), seed=0)


def test_classes_are_numbered_by_size_and_columns_are_found(tmp_path):
    labels, votes = ["b"] * 10 + ["a"] * 30 + ["c"] * 20, [0] * 60
    frame = pd.DataFrame({"vote": votes, "text": [f"text {i}" for i in range(60)], "label": labels})
    frame.to_csv(tmp_path / "rows.csv", index=False)
    with pytest.raises(ValueError, match=r"are texts: pass a checkpoint as `encoder`"):
        load_source(DataSpec(str(tmp_path / "rows.csv"), "features"))
    with pytest.raises(ValueError, match=r"no column 'lable' .* found \['vote', 'text', 'label'\]"):
        load_source(DataSpec(str(tmp_path / "rows.csv"), "features", label_column="lable"))
    with pytest.raises(FileNotFoundError, match=r"rows.parquet', which does not exist"):
        load_source(DataSpec(str(tmp_path / "rows.parquet"), "features"))

    rows = {"vector": [[float(i), 1.0] for i in range(60)], "label": labels}
    pd.DataFrame(rows).to_parquet(tmp_path / "rows.parquet")
    source = load_source(DataSpec(str(tmp_path / "rows.parquet"), "features"))
    assert source.label_names == ["a", "c", "b"]
    assert np.bincount(source.labels).tolist() == [30, 20, 10]
    # Centred, and scaled by one number.
    column = np.arange(60) - 29.5
    expected = np.stack([column, np.zeros(60)], 1)
    scale = np.stack([column, np.zeros(60)]).std(ddof=1)
    np.testing.assert_allclose(source.inputs["features"].numpy(), expected / scale, rtol=1e-5)


def write_features(path, **changes):
    """An .npz file as those of the real sets: 40 training rows, 20 test rows, 3 classes, the smallest first."""
    rng = np.random.default_rng(0)
    clean, test = np.repeat([0, 1, 2], [6, 12, 22]), np.repeat([0, 1, 2], [3, 6, 11])
    arrays = {
        "X": rng.standard_normal((40, 4)).astype(np.float16) * 3 + 2,
        "Xt": rng.standard_normal((20, 4)).astype(np.float16),
        "y_clean": clean.astype(np.int16),
        "y_worse": np.where(np.arange(40) % 4 == 0, 2 - clean, clean).astype(np.int16),
        "yt": test.astype(np.int16),
    }
    arrays |= changes
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})
    return arrays


def test_arrays_of_features_are_read(tmp_path):
    arrays = write_features(tmp_path / "rows_features.npz")
    source = load_source(DataSpec(str(tmp_path / "rows_features.npz"), "features"))
    # Rows as they come, the training rows first; classes by size.
    assert source.label_names == ["2", "1", "0"]
    assert (source.labels == 2 - np.concatenate([arrays["y_clean"], arrays["yt"]])).all()
    assert source.is_test.tolist() == [False] * 40 + [True] * 20
    assert list(source.human) == ["worse"] and (source.human["worse"][:40] == 2 - arrays["y_worse"]).all()
    train, test = arrays["X"].astype(np.float64), arrays["Xt"].astype(np.float64)
    mean = train.mean(axis=0)
    expected = np.concatenate([train - mean, test - mean]) / (train - mean).std(ddof=1)
    np.testing.assert_allclose(source.inputs["features"].numpy(), expected, rtol=1e-4, atol=1e-5)

    split = make_split(source, parse_regime("human:worse"), seed=0)
    assert set(split.test) == set(range(40, 60))
    assert (split.noisy[split.train] == 2 - arrays["y_worse"][split.train]).all() and split.noise_rate > 0
    assert make_split(source, parse_regime("natural"), seed=0).noise_rate == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"yt": None}, r"no array 'yt'; found X, Xt, y_clean, y_worse"),
        ({"y_worse": np.zeros(39, dtype=int)}, r"40 rows in 'X', but 39 in 'y_worse'"),
    ],
)
def test_arrays_that_do_not_fit_are_named(tmp_path, changes, message):
    write_features(tmp_path / "rows.npz", **changes)
    with pytest.raises(ValueError, match=message):
        load_source(DataSpec(str(tmp_path / "rows.npz"), "features"))


def test_a_noisy_column_of_a_table_of_features(tmp_path):
    labels = np.repeat([0, 1], 30)
    noisy = np.where(np.arange(60) % 5 == 0, 1 - labels, labels)
    frame = pd.DataFrame({"vector": [[float(i), 1.0] for i in range(60)], "clean": labels, "votes": noisy})
    frame.to_parquet(tmp_path / "rows.parquet")
    source = load_source(DataSpec(str(tmp_path / "rows.parquet"), "features", label_column="clean"))
    split = make_split(source, parse_regime("human:votes"), seed=0)
    assert (split.noisy[split.train] == noisy[split.train]).all()


# Methods


def test_every_chain_can_be_built():
    for name in BENCHMARK + ABLATIONS:
        method = METHODS[name]
        for value in method.values(tune=True):
            chain = method.perturbations(value, [30, 20, 10])
            assert method.is_plain == (chain == [])
    assert all(str(method.usual_value) in method.values(tune=True) for method in METHODS.values())
    assert all(len(method.grid) <= 4 for method in METHODS.values())


def test_plug_ins_stand_behind_their_loss_but_for_the_factor_of_the_focal_one():
    auto = METHODS["auto"].perturbations("", [30, 3])
    names = [method.name for method in METHODS["auto_on_focal_loss"].perturbations("", [30, 3])]
    assert names == [*(method.name for method in auto), "focal_loss"]
    for name in ("class_weighting", "logit_adjustment"):
        base = METHODS[name].perturbations(METHODS[name].usual_value, [30, 3])
        chain = METHODS[f"auto_on_{name}"].perturbations("", [30, 3])
        expected = base + [method for method in auto if method.name != "logit_adjustment"]
        assert [type(method) for method in chain] == [type(method) for method in expected]
    (first, *rest) = METHODS["auto_on_label_smoothing"].perturbations("", [30, 30])
    assert repr(first) == "label_smoothing()"
    turned = ["label_smoothing(alpha=-0.1)", "label_smoothing(target='prior')"]
    adjustment, dampening = map(repr, METHODS["auto"].perturbations("", [30, 30]))
    assert list(map(repr, rest)) == [adjustment, *turned, dampening]


def test_variants_change_one_thing():
    def reprs(name, counts):
        return list(map(repr, METHODS[name].perturbations("", counts)))

    auto = reprs("auto", [30, 3])
    assert reprs("auto-adjustment", [30, 3]) == [text for text in auto if "adjustment" not in text]
    for name, index, argument in (
        ("power=4.0", 1, "power=4.0"),
        ("evidence=2.0..4.0", 1, "evidence=(2.0, 4.0)"),
        ("tau=0.5", 0, "tau=0.5"),
    ):
        (changed,) = [(old, new) for old, new in zip(auto, reprs(name, [30, 3]), strict=True) if old != new]
        assert changed[0] == auto[index] and argument in changed[1]
    assert reprs("target=uniform", [30, 3]) == ["logit_adjustment(learned=(0.05, 0.2))", auto[1]]
    assert all(reprs(name, [30, 3]) != auto for name in ABLATIONS if name != "auto" and not METHODS[name].constants)
    # The chain does not depend on the class counts.
    assert all(reprs(name, [30, 30]) == reprs(name, [30, 3]) for name in ABLATIONS)


@pytest.mark.parametrize("name", [name for name in ABLATIONS if METHODS[name].constants])
def test_a_variant_changes_a_constant_that_the_library_reads(name):
    """Not an imported copy of it: the training of the variant is another one."""
    (path, value), *others = METHODS[name].constants.items()
    assert not others
    module, _, constant = path.rpartition(".")
    module = importlib.import_module(f"lpg_hf.{module}")
    assert type(getattr(module, constant))(value) == value != getattr(module, constant)
    terms = []
    for constants in ({}, METHODS[name].constants):
        with ExitStack() as stack:
            for path, value in constants.items():
                stack.enter_context(patch(f"lpg_hf.{path}", value))
            loss = LPGLoss(2, METHODS[name].perturbations("", [30, 10]), [30, 10], managed=True)
            logits = torch.tensor([[3.0, 0.0], [0.0, 3.0]]).requires_grad_()
            loss(logits, torch.tensor([0, 1])).backward()
            loss.step()
            loss.end_epoch()
            statistics = loss.statistics
            _, dampening, *_ = loss.perturbations
            terms.append((statistics.label_prob, statistics.memorizing, statistics.fitted_offset, dampening._terms))
    assert any(not torch.equal(usual, changed) for usual, changed in zip(*terms, strict=True))


def test_unknown_methods_list_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown 'sma'. The known ones are ce, clean_labels, label_smoothing"):
        check_methods(["ce", "sma"])


# Training


@pytest.fixture(scope="module")
def setting():
    return training.Setting(
        "digits", "mlp", "sgd", "memorize", DataSpec("digits", "features"), "mlp", Recipe(0.1, 3, 128, 16)
    )


def test_all_methods_start_alike_and_see_the_same_batches(setting, tmp_path, monkeypatch):
    source = load_source(setting.spec)
    split = make_split(source, parse_regime("long_tail_10"), seed=3)
    seen = {}
    for name in ("ce", "auto", "sam", "logit_noise", "gradient_noise"):
        run = training.Run(setting, "long_tail_10", name, METHODS[name].usual_value, 3)
        trainer = training.make_trainer(run, source, split, str(tmp_path))
        weights = [parameter.detach().clone() for parameter in trainer.model.parameters()]
        batches, collator = [], trainer.data_collator
        trainer.data_collator = lambda batch, keep=batches, collator=collator: keep.append(batch) or collator(batch)
        trainer.train()
        seen[name] = (weights, batches, trainer.args.learning_rate, trainer.state.max_steps)
    assert len(seen["ce"][1]) == seen["ce"][3] > 3
    for weights, batches, *rest in seen.values():
        assert rest == list(seen["ce"][2:])
        assert all(torch.equal(a, b) for a, b in zip(weights, seen["ce"][0], strict=True))
        for batch, expected in zip(batches, seen["ce"][1], strict=True):
            assert torch.equal(batch["features"], expected["features"])
            assert torch.equal(batch["labels"], expected["labels"])


@pytest.mark.parametrize("regime", ["natural", "human:worse", "long_tail_10", "symmetric_40"])
def test_auto_is_told_the_class_shares_of_its_test_set(setting, regime):
    sizes = [400, 200, 120]
    labels = make_source(sizes).labels
    source = make_source(sizes, 150, human={"worse": np.roll(labels, 1)})
    split = make_split(source, parse_regime(regime), seed=0)
    told, untold = (
        training.lpg_options(training.Run(setting, regime, name, "", 0), source, split)["eval_shares"]
        for name in ("auto", "auto_without_eval")
    )
    assert untold == "train"
    if regime in ("natural", "human:worse"):
        assert told == (np.bincount(labels[split.natural_test]) + 1).tolist()
    else:
        assert told == "uniform"


@pytest.mark.parametrize("regime", ["symmetric_40", "long_tail_10"])
def test_a_run_scores_the_last_and_the_picked_epoch(setting, tmp_path, regime):
    run = training.Run(setting, regime, "ce", "", 0)
    values = training.train_run(run)
    assert tuple(values) == VALUES
    source = load_source(setting.spec)
    split = make_split(source, parse_regime(regime), seed=0)

    # The same training by hand: a plain Trainer stopped after each epoch in turn.
    scores = []
    for epochs in (1, 2, 3):
        trainer = training.make_trainer(run, source, split, str(tmp_path))
        assert type(trainer) is Trainer
        trainer.add_callback(StopAfter(epochs))
        trainer.train()
        logits = {
            part: trainer.model(source.inputs["features"][torch.from_numpy(rows)]).logits.detach()
            for part, rows in (("validation", split.validation), ("test", split.test), ("natural", split.natural_test))
        }
        validation = balanced_accuracy_score(split.noisy[split.validation], logits.pop("validation").argmax(-1))
        rows = {"test": split.test, "natural": split.natural_test}
        measured = {name: reference_metrics(logits[name], source.labels[rows[name]]) for name in rows}
        scores.append((validation, measured))
    picked = int(np.argmax([validation for validation, _ in scores]))
    assert [float(score) for score in values["validation_by_epoch"].split()] == pytest.approx(
        [validation for validation, _ in scores], abs=1e-4
    )
    assert int(values["picked_epoch"]) == picked + 1
    for test_set, metric in product(("test", "natural"), scores[-1][1]["test"]):
        for epoch, (_, measured) in (("picked", scores[picked]), ("last", scores[-1])):
            found = float(values[f"{test_set}_{metric}_{epoch}"])
            assert found == pytest.approx(measured[test_set][metric], abs=1e-6), (test_set, metric, epoch)
    assert float(values["noise_rate"]) == pytest.approx(split.noise_rate, abs=1e-4)


def reference_metrics(logits, labels):
    probabilities = logits.double().softmax(-1).numpy()
    confidence, predictions = probabilities.max(1), probabilities.argmax(1)
    bins = np.ceil(15 * confidence)
    gaps = [
        np.mean(bins == number) * abs(np.mean((predictions == labels)[bins == number] - confidence[bins == number]))
        for number in np.unique(bins)
    ]
    return {
        "accuracy": accuracy_score(labels, predictions),
        "balanced_accuracy": balanced_accuracy_score(labels, predictions),
        "macro_f1": f1_score(labels, predictions, average="macro"),
        "expected_calibration_error": sum(gaps),
    }


class StopAfter(training.TrainerCallback):
    def __init__(self, epochs):
        self.epochs = epochs

    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.epoch >= self.epochs


def test_the_references_learn_from_other_labels(setting, tmp_path):
    source = load_source(setting.spec)
    split = make_split(source, parse_regime("symmetric_40"), seed=0)

    def make_trainer(name):
        return training.make_trainer(training.Run(setting, "symmetric_40", name, "", 0), source, split, str(tmp_path))

    trainers = {name: make_trainer(name) for name in ("ce", "clean_labels", "right_labels", "believed_labels")}
    assert {type(trainer) for trainer in trainers.values()} == {Trainer}
    labels = {name: trainer.train_dataset.columns["labels"].numpy() for name, trainer in trainers.items()}
    assert (labels["clean_labels"] == source.labels[split.train]).all()
    assert np.mean(labels["clean_labels"] != labels["ce"]) == pytest.approx(split.noise_rate)
    is_right = labels["ce"] == labels["clean_labels"]
    assert (labels["right_labels"][is_right] == labels["ce"][is_right]).all()
    assert (labels["right_labels"][~is_right] == -100).all()

    first = make_trainer("auto")
    first.train()
    logits = first.model(source.inputs["features"][torch.from_numpy(split.train)]).logits.detach().double().numpy()
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    expected = np.where(odds[np.arange(len(odds)), labels["ce"]] < 0.1, -100, labels["ce"])
    assert (labels["believed_labels"] == expected).all()
    assert 0.02 < np.mean(expected == -100) < 0.5


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=40))
def test_balanced_accuracy(pairs):
    predictions, labels = np.array(pairs).T
    expected = np.mean([np.mean(predictions[labels == label] == label) for label in set(labels.tolist())])
    assert training.balanced_accuracy(predictions, labels) == pytest.approx(expected)


def test_crops_and_mirror_images():
    images = torch.arange(2 * 3 * 8 * 8.0).reshape(2, 3, 8, 8)
    crop = training.CropAndFlip(seed=1)({"pixel_values": images, "labels": torch.tensor([0, 1])})
    generator = torch.Generator().manual_seed(1)
    top, left = torch.randint(0, 3, (2, 2), generator=generator)
    flip = torch.rand(2, generator=generator) < 0.5
    assert flip.tolist() != [flip[0].item()] * 2  # both cases
    for number in range(2):
        padded = torch.nn.functional.pad(images[number], (1, 1, 1, 1))
        expected = padded[:, top[number] : top[number] + 8, left[number] : left[number] + 8]
        assert torch.equal(crop["pixel_values"][number], expected.flip(-1) if flip[number] else expected)


# The grid


def main(monkeypatch, output_dir, *options):
    command = ["accuracy.py", "--output_dir", str(output_dir), "--timing_rounds", "0", "--workers", "1"]
    grid = ["--optimizer", "sgd", "--pace", "slow", "--epochs", "1", "--seeds", "2", "--regimes", "balanced"]
    monkeypatch.setattr(sys, "argv", [*command, *grid, *options])
    # What these two change is the whole process's, and other tests run in it.
    monkeypatch.setattr(accuracy, "initialize_worker", lambda: None)
    monkeypatch.setattr(accuracy, "take_share_of_launcher", lambda: (0, 1))
    accuracy.main()


def fake_train_run(trained, fails=lambda run: False, interrupt_after=None):
    def train_run(run):
        if interrupt_after is not None and len(trained) == interrupt_after:
            raise KeyboardInterrupt
        if fails(run):
            raise RuntimeError("out of\nmemory")
        trained.append(run.key)
        values = dict.fromkeys(VALUES, "0.5")
        # The larger the value the better, on the validation rows.
        return values | {"validation_picked": run.value or "0", "diverged": "False", "chain": "x"}

    return train_run


def test_a_killed_benchmark_goes_on_where_it_was(monkeypatch, tmp_path):
    options = ("--methods", "ce", "auto", "focal_loss", "--tuning_seeds", "1")
    trained = []
    monkeypatch.setattr(accuracy, "train_run", fake_train_run(trained, interrupt_after=4))
    with pytest.raises(KeyboardInterrupt):
        main(monkeypatch, tmp_path, *options)
    assert len(Results(tmp_path).frame()) == 4

    # A kill in the middle of a write leaves half a row.
    with (tmp_path / "results.csv").open("a") as file:
        file.write("digits,mlp,sgd,slow,bal")
    monkeypatch.setattr(accuracy, "train_run", fake_train_run(trained))
    main(monkeypatch, tmp_path, *options)
    # Seed 0: the grid. Seed 1: the usual values, and the one that seed 0 chose.
    expected = [(name, "", seed) for name in ("ce", "auto") for seed in "01"]
    expected += [("focal_loss", value, "0") for value in ("0.5", "1", "2", "5")]
    expected += [("focal_loss", value, "1") for value in ("2", "5")]
    assert sorted((key[5], key[6], key[7]) for key in trained) == sorted(expected)

    main(monkeypatch, tmp_path, *options)
    assert len(trained) == len(expected)
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert sorted(tuple(row[name] for name in KEY) for row in rows) == sorted(trained)


def test_a_crash_is_recorded_and_stops_nothing(monkeypatch, tmp_path, capsys):
    trained = []
    monkeypatch.setattr(accuracy, "train_run", fake_train_run(trained, fails=lambda run: run.method == "sam"))
    main(monkeypatch, tmp_path, "--methods", "ce", "sam", "auto", "--no_tune")
    assert len(trained) == 4
    failures = Results(tmp_path).failures()
    assert failures["error"].tolist() == ["RuntimeError: out of memory"] * 2
    assert "2 runs crashed" in capsys.readouterr().out
    # Tried again, and no longer open once it works.
    monkeypatch.setattr(accuracy, "train_run", fake_train_run(trained))
    main(monkeypatch, tmp_path, "--methods", "ce", "sam", "auto", "--no_tune")
    assert len(trained) == 6 and Results(tmp_path).failures().empty


def test_results_of_another_grid_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(accuracy, "train_run", fake_train_run([]))
    main(monkeypatch, tmp_path, "--methods", "ce", "auto")
    with pytest.raises(ValueError, match=r"another grid: digits/mlp/sgd/slow was run with recipe = .*'epochs': 1"):
        main(monkeypatch, tmp_path, "--methods", "ce", "auto", "--epochs", "2")
    # More methods, regimes and seeds are welcome.
    main(monkeypatch, tmp_path, "--methods", "ce", "auto", "gce", "--seeds", "3", "--regimes", "symmetric_40")

    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "results.csv").write_text("seed,accuracy\n0,1.0\n")
    with pytest.raises(ValueError, match=r"not a results file of this benchmark.*'seed,accuracy'"):
        Results(tmp_path / "other")


def test_results_of_an_older_version_are_refused(tmp_path):
    columns = [name for name in COLUMNS if name not in ("natural_macro_f1_last", "seconds")]
    (tmp_path / "results.csv").write_text(",".join(columns) + "\n")
    with pytest.raises(ValueError, match=r"another version: .* it lacks natural_macro_f1_last, seconds. Pass another"):
        Results(tmp_path)


def test_a_calibration_error_of_a_diverged_run_is_read_as_none(tmp_path):
    results = Results(tmp_path)
    values = dict.fromkeys(VALUES, "0.5")
    for seed, error in (("0", "nan"), ("1", "0.25")):
        key = ("digits", "mlp", "sgd", "slow", "balanced", "ce", "", seed)
        results.append(key, values | {"test_expected_calibration_error_last": error})
    frame = results.frame()
    assert frame["test_expected_calibration_error_last"].tolist() == pytest.approx([np.nan, 0.25], nan_ok=True)
    assert frame["value"].tolist() == ["", ""]


def test_redone_methods_are_kept_aside(monkeypatch, tmp_path):
    trained = []
    monkeypatch.setattr(accuracy, "train_run", fake_train_run(trained))
    main(monkeypatch, tmp_path, "--methods", "ce", "auto")
    main(monkeypatch, tmp_path, "--methods", "ce", "auto", "--redo", "auto")
    assert [key[5] for key in trained].count("auto") == 4 and [key[5] for key in trained].count("ce") == 2
    assert pd.read_csv(tmp_path / "results-set-aside-1.csv")["method"].tolist() == ["auto", "auto"]
    assert len(Results(tmp_path).frame()) == 4


def test_processes_share_the_runs_without_tearing_a_tuning_apart():
    arguments = accuracy.BenchmarkArguments("unused", methods=["ce", "focal_loss", "gce"], seeds=4)
    runs = accuracy.make_runs(arguments, accuracy.make_settings(arguments))
    shares = [accuracy.share_of(runs, rank, 3) for rank in range(3)]
    assert sorted(run.key for share in shares for run in share) == sorted(run.key for run in runs)
    groups = [{run.key[:6] for run in share} for share in shares]
    assert all(not a & b for a, b in pairwise([*groups, groups[0]]))


def test_a_process_of_a_launcher_trains_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "a"}.items():
        monkeypatch.setenv(name, value)
    assert accuracy.take_share_of_launcher() == (5, 8)
    assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "CUDA_VISIBLE_DEVICES"} & os.environ.keys()
    assert accuracy.take_share_of_launcher() == (0, 1)
    for devices, expected in ((None, "1"), ("2,3", "3")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setenv("LOCAL_RANK", "1")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if devices is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", devices)
        accuracy.take_share_of_launcher()
        assert os.environ["CUDA_VISIBLE_DEVICES"] == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "autoo"], r"unknown 'autoo'. The known ones are ce"),
        (["--regimes", "noisy"], r"Cannot read the regime 'noisy'"),
        (["--optimizer", "adam"], r"`optimizer` has 'adam'; the known ones are sgd, adamw"),
        (["--data", "./nowhere.parquet"], r"does not exist"),
        (["--regimes", "long_tail_1000"], r"would lose the class"),
        (["--summary_only"], r"no run of Trainer"),
    ],
)
def test_bad_input_fails_before_any_training(monkeypatch, tmp_path, options, message):
    monkeypatch.setattr(accuracy, "train_run", lambda run: pytest.fail("trained"))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        main(monkeypatch, tmp_path, *options)


def test_two_data_sets_of_one_name_are_refused(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "rows.csv").touch()
    arguments = accuracy.BenchmarkArguments(
        "unused", data=[str(tmp_path / folder / "rows.csv") for folder in ("a", "b")]
    )
    with pytest.raises(ValueError, match=r"go by the name 'rows/mlp/sgd/memorize'"):
        accuracy.make_settings(arguments)


def test_arguments_from_a_file(tmp_path, monkeypatch):
    (tmp_path / "settings.yaml").write_text(f"output_dir: {tmp_path}\nmethods: [ce, autoo]\n")
    monkeypatch.setattr(sys, "argv", ["accuracy.py", str(tmp_path / "settings.yaml")])
    monkeypatch.setattr(accuracy, "initialize_worker", lambda: None)
    with pytest.raises(ValueError, match=r"unknown 'autoo'"):
        accuracy.main()


def test_every_role_reaches_the_summary(monkeypatch, tmp_path):
    main(
        monkeypatch,
        tmp_path,
        *("--methods", "ce", "clean_labels", "focal_loss", "class_relative_dampening", "auto", "auto_on_focal_loss"),
        *("power=4.0", "--no_tune", "--regimes", "balanced", "symmetric_40", "--timing_rounds", "1"),
    )
    text = (tmp_path / "summary.md").read_text()
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert len(headings) == 11
    runs = Results(tmp_path).frame()
    assert tuple(runs.columns) == COLUMNS and len(runs) == 2 * (2 * 6 + 1)
    assert (runs[runs["method"] == "auto"]["chain"].str.startswith("logit_adjustment(learned=")).all()
    assert (tmp_path / "regimes.png").stat().st_size > 10_000 and (tmp_path / "ablation.png").stat().st_size > 10_000
    times = pd.read_csv(tmp_path / "step_times.csv", index_col="method")["ratio"]
    assert times["ce"] == 1 and (times > 0).all()


# Statistics


def make_runs(scores, measure="test_balanced_accuracy"):
    """A row per (regime, method, value, seed): (validation, test of the picked epoch, test of the last)."""
    rows = [
        ["d", "m", "sgd", "slow", regime, method, value, str(seed), validation, picked, last]
        for (regime, method, value, seed), (validation, picked, last) in scores.items()
    ]
    return pd.DataFrame(rows, columns=[*KEY, "validation_picked", f"{measure}_picked", f"{measure}_last"])


def random_scores(seed=0):
    rng = np.random.default_rng(seed)
    methods = {"ce": [""], "clean_labels": [""], "auto": [""], "focal_loss": ["0.5", "2"], "gce": ["0.1", "0.7"]}
    methods["auto_on_focal_loss"] = [""]
    return {
        (regime, method, value, number): tuple(rng.uniform(0.3, 0.9, 3))
        for regime in ("balanced", "symmetric_40")
        for method, values in methods.items()
        for value in values
        for number in range(5)
        if (regime, method) != ("balanced", "clean_labels")
    }


def reference_score(scores, regime, method, seed, tuned=False):
    usual = {"focal_loss": "2", "gce": "0.7"}.get(method, "")
    if not tuned:
        return 100 * scores[regime, method, usual, seed][2]
    values = {key[2] for key in scores if key[:2] == (regime, method)}
    best = max(values, key=lambda value: sum(scores[regime, method, value, number][0] for number in range(5)))
    return 100 * scores[regime, method, best, seed][1]


def reference_test(differences):
    differences = np.array(differences)
    mean = differences.sum() / len(differences)
    error = np.sqrt(((differences - mean) ** 2).sum() / (len(differences) - 1) / len(differences))
    return mean, error, 2 * stats.t.sf(abs(mean / error), len(differences) - 1)


def test_differences_of_cells():
    scores = random_scores()
    table = statistics.cell_differences(statistics.scores(make_runs(scores)))
    table = table.set_index(["regime", "method", "choice"])
    for regime in ("balanced", "symmetric_40"):
        for method in ("auto", "focal_loss", "gce"):
            for choice in ("usual", "tuned"):
                pairs = [
                    reference_score(scores, regime, method, seed, choice == "tuned")
                    - reference_score(scores, regime, "ce", seed)
                    for seed in range(5)
                ]
                row = table.loc[(regime, method, choice)]
                assert (row["mean"], row["error"], row["p"]) == pytest.approx(reference_test(pairs))
                assert row["seeds"] == 5
    for method in ("auto", "gce"):
        small, large = sorted(table.xs((method, "usual"), level=(1, 2))["p"])
        holm = table.xs((method, "usual"), level=(1, 2))["holm"]
        assert sorted(holm) == pytest.approx(sorted([min(1, 2 * small), min(1, max(2 * small, large))]))


@pytest.mark.parametrize("measure", ["natural_accuracy", "test_expected_calibration_error"])
def test_the_main_table_of_a_measure(measure):
    scores = random_scores()
    scored = statistics.scores(make_runs(scores, measure), measure)
    table = accuracy_summary.main_table(scored, {}, measure)
    lines = [line for line in table.splitlines() if line.startswith("| **auto**")]
    means = [
        np.mean(
            [reference_score(scores, regime, "auto", n) - reference_score(scores, regime, "ce", n) for n in range(5)]
        )
        for regime in ("balanced", "symmetric_40")
    ]
    entries = [entry.strip() for entry in lines[0].strip("|").split("|")]
    assert [entry.split(" ")[0] for entry in entries[1:4]] == [f"{mean:+.1f}" for mean in (*means, np.mean(means))]
    is_error = measure.endswith("error")
    assert entries[5] == f"{np.mean([mean < 0 if is_error else mean > 0 for mean in means]):.0%}"
    assert ("Lower is better" in table) == is_error
    assert table.startswith(
        "## All settings: " + ("expected calibration error" if is_error else "accuracy, natural test set")
    )


def test_overall_counts_each_seed_once():
    scores = random_scores(1)
    table = statistics.overall(
        statistics.scores(make_runs(scores)), [("ce", "usual"), ("gce", "tuned")], "auto", "usual"
    )
    for _, row in table.iterrows():
        tuned = row["choice"] == "tuned"
        matrix = np.array(
            [
                [
                    reference_score(scores, regime, "auto", seed)
                    - reference_score(scores, regime, row["method"], seed, tuned)
                    for regime in ("balanced", "symmetric_40")
                ]
                for seed in range(5)
            ]
        )
        assert (row["mean"], row["error"], row["p"]) == pytest.approx(reference_test(matrix.mean(1)))
        assert row["won"] == np.mean(matrix.mean(0) > 0) and row["worst"] == pytest.approx(matrix.mean(0).min())


def test_best_rival_of_a_cell():
    scores = random_scores(2)
    runs = make_runs(scores)
    table = statistics.against_best_rival(statistics.scores(runs), runs).set_index("regime")
    for regime in ("balanced", "symmetric_40"):
        means = {
            method: np.mean([reference_score(scores, regime, method, seed, tuned=True) for seed in range(5)])
            for method in ("ce", "focal_loss", "gce")
        }
        ours = np.mean([reference_score(scores, regime, "auto", seed) for seed in range(5)])
        assert table.loc[regime, "best"] == max(means, key=means.get)
        assert table.loc[regime, "mean"] == pytest.approx(ours - max(means.values()))
        validation = {
            method: max(
                np.mean([scores[regime, method, value, seed][0] for seed in range(5)])
                for value in {key[2] for key in scores if key[:2] == (regime, method)}
            )
            for method in means
        }
        picked = max(validation, key=validation.get)
        assert table.loc[regime, "picked"] == picked
        assert table.loc[regime, "picked_mean"] == pytest.approx(ours - means[picked])


def test_share_won_back_and_plug_in_gain():
    scores = random_scores(3)
    scored = statistics.scores(make_runs(scores))
    mean = {
        method: np.mean([reference_score(scores, "symmetric_40", method, seed) for seed in range(5)])
        for method in ("ce", "clean_labels", "auto", "focal_loss", "auto_on_focal_loss")
    }
    back = statistics.won_back(scored)
    row = back[(back["method"] == "auto") & (back["choice"] == "usual")]
    assert row["regime"].tolist() == ["symmetric_40"]
    lost, gain = mean["clean_labels"] - mean["ce"], mean["auto"] - mean["ce"]
    assert (row["lost"].item(), row["gain"].item()) == pytest.approx((lost, gain))
    assert (row["share"].isna().item()) if lost < 1 else row["share"].item() == pytest.approx(gain / lost)
    gains = statistics.plug_in_gains(scored).set_index("regime")
    assert gains.loc["symmetric_40", "mean"] == pytest.approx(mean["auto_on_focal_loss"] - mean["focal_loss"])


@pytest.mark.parametrize("seed", range(4))
def test_won_back_beside_the_rival_that_is_best_in_the_cell(seed):
    scores = random_scores(seed)
    # Clean labels are better than all, so that there is something to win back.
    scores |= {key: (0.95, 0.95, 0.95) for key in scores if key[1] == "clean_labels"}
    noisy = np.mean([reference_score(scores, "symmetric_40", "ce", number) for number in range(5)])
    gains = {
        label: np.mean([reference_score(scores, "symmetric_40", method, n, tuned) - noisy for n in range(5)])
        for method, label, tuned in (
            ("focal_loss", "focal loss", False),
            ("focal_loss", "focal loss, tuned", True),
            ("gce", "generalized cross-entropy", False),
            ("gce", "generalized cross-entropy, tuned", True),
            ("auto", "auto", False),
        )
    }
    ours = gains.pop("auto")
    best = max(gains, key=gains.get)
    table = accuracy_summary.won_back_table(statistics.won_back(statistics.scores(make_runs(scores))))
    entries = [entry.strip() for entry in table.splitlines()[-1].strip("|").split("|")]
    lost = 95 - noisy
    assert entries[1:] == [
        "symmetric_40",
        f"{lost:.1f}",
        f"{ours:+.1f}",
        f"{ours / lost:.0%}",
        best,
        f"{gains[best] / lost:.0%}",
    ]


def test_won_back_beside_what_leaving_rows_out_wins():
    scores = random_scores(2)
    scores |= {
        ("symmetric_40", name, "", number): (0.5, 0.5, 0.6 + level + number / 100)
        for name, level in (("right_labels", 0.2), ("believed_labels", 0.1))
        for number in range(5)
    }
    # A cell that lacks a reference is no part of the means.
    others = {("pairflip_20", *key[1:]): (0.5, 0.5, 0.5) for key in scores if key[1] in ("ce", "clean_labels", "auto")}
    scores = {key: value for key, value in others.items() if key[0] == "pairflip_20"} | scores
    ours = np.mean([reference_score(scores, "symmetric_40", "auto", number) for number in range(5)])
    noisy = np.mean([reference_score(scores, "symmetric_40", "ce", number) for number in range(5)])
    table = accuracy_summary.won_back_table(statistics.won_back(statistics.scores(make_runs(scores))))
    assert table.splitlines()[4].endswith(
        "| Trainer without the wrong labels | Trainer without what auto contradicts |"
    )
    assert table.splitlines()[-1].endswith(f"| {82 - noisy:+.1f} | {72 - noisy:+.1f} |")
    assert (
        f"over the 1 cells with all of them: auto {ours - noisy:+.2f}, "
        f"Trainer without the wrong labels {82 - noisy:+.2f}, "
        f"Trainer without what auto contradicts {72 - noisy:+.2f}."
    ) in table


def test_won_back_without_a_rival():
    scores = {key: value for key, value in random_scores().items() if key[1] in ("ce", "clean_labels", "auto")}
    table = accuracy_summary.won_back_table(statistics.won_back(statistics.scores(make_runs(scores))))
    assert table.splitlines()[-1].endswith("|  |  |")


def test_claims_are_held_against_the_worst_cell():
    scores = random_scores(4)
    tail = {("long_tail_50", *key[1:]): value for key, value in random_scores(5).items() if key[1] != "clean_labels"}
    # What is as imbalanced as it came is not balanced.
    natural = {("natural", *key[1:]): (0, 0, 0) for key in scores if key[0] == "balanced"}
    runs = make_runs(scores | natural | {key: value for key, value in tail.items() if key[0] == "long_tail_50"})
    claims = check_claims(statistics.scores(runs), runs).set_index("claim")

    def difference(scores, regime, method, other):
        return np.mean(
            [
                reference_score(scores, regime, method, seed) - reference_score(scores, regime, other, seed)
                for seed in range(5)
            ]
        )

    expected = {
        "auto - Trainer, balanced": (difference(scores, "balanced", "auto", "ce"), -0.2),
        "auto - Trainer, long tail 50": (difference(tail, "long_tail_50", "auto", "ce"), 3.0),
        "auto on focal_loss - focal_loss, noisy or long-tailed": (
            min(
                difference(scores, "symmetric_40", "auto_on_focal_loss", "focal_loss"),
                difference(tail, "long_tail_50", "auto_on_focal_loss", "focal_loss"),
            ),
            0.0,
        ),
    }
    for claim, (found, bound) in expected.items():
        row = claims.loc[claim]
        assert row["found"] == pytest.approx(found) and row["met"] == (found >= bound)
    assert claims.loc["auto - Trainer, balanced", "cells"] == 1
    assert claims.loc["auto on focal_loss - focal_loss, noisy or long-tailed", "cells"] == 2
    # Without a cell there is no claim.
    assert "auto - Trainer, long tail with noise" not in claims.index
    assert "auto - logit adjustment, long tail 50" not in claims.index


def test_a_value_is_chosen_on_the_seeds_that_all_values_have():
    scores = {("balanced", "gce", value, seed): (0.5, 0.5, 0.5) for value in ("0.1", "0.7") for seed in range(2)}
    scores["balanced", "gce", "0.1", 0] = (0.6, 0.5, 0.5)
    # More seeds of the chosen value alone must not change the choice.
    scores |= {("balanced", "gce", "0.1", seed): (0.0, 0.5, 0.5) for seed in range(2, 5)}
    assert statistics.tuned_value(make_runs(scores)) == "0.1"


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm(p_values):
    corrected = statistics.holm(np.array(p_values))
    for p, adjusted in zip(p_values, corrected, strict=True):
        # The largest (m - rank) p over the p-values that are no larger.
        ordered = sorted(p_values)
        stepped = [(len(p_values) - rank) * value for rank, value in enumerate(ordered) if value <= p]
        assert adjusted == pytest.approx(min(1, max(stepped)))


def test_one_seed_and_equal_scores_have_no_test():
    assert statistics.mean_error_p([1.5])[::2] == (1.5, 1.0)
    assert statistics.mean_error_p([0.0, 0.0]) == (0.0, 0.0, 1.0)
    assert statistics.mean_error_p([2.0, 2.0]) == (2.0, 0.0, 0.0)
