import itertools
import math
import pickle
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score
from transformers import EvalPrediction, PreTrainedConfig, PreTrainedModel, Trainer, TrainingArguments

from lpg_hf.metrics import (
    BalancedAccuracy,
    ExpectedCalibrationError,
    MacroF1,
    ShotAccuracy,
    WorstClassAccuracy,
    make_compute_metrics,
)


METRICS = [BalancedAccuracy, WorstClassAccuracy, MacroF1, ShotAccuracy, ExpectedCalibrationError]
few_examples = settings(max_examples=30, deadline=None)

NUM_CLASSES = 5
labels = st.integers(0, NUM_CLASSES - 1)
pairs = st.lists(st.tuples(labels, labels), min_size=1, max_size=40)


# References: loops that share no code with the library.


def recalls_by_loop(references, predictions):
    recalls = {}
    for label in set(references):
        hits = [p == label for r, p in zip(references, predictions, strict=True) if r == label]
        recalls[label] = sum(hits) / len(hits)
    return recalls


def macro_f1_by_loop(references, predictions):
    scores = []
    for label in set(references) | set(predictions):
        both = sum(r == p == label for r, p in zip(references, predictions, strict=True))
        scores.append(2 * both / (references.count(label) + predictions.count(label)))
    return sum(scores) / len(scores)


def calibration_error_by_loop(references, probabilities):
    edges = [k / 15 for k in range(16)]
    error = 0.0
    for lower, upper in itertools.pairwise(edges):
        members = [
            (row.index(max(row)) == reference, max(row))
            for reference, row in zip(references, probabilities, strict=True)
            if lower < max(row) <= upper
        ]
        if members:
            accuracy = sum(correct for correct, _ in members) / len(members)
            confidence = sum(confidence for _, confidence in members) / len(members)
            error += len(members) / len(references) * abs(accuracy - confidence)
    return error


def softmax_by_loop(row):
    exponentials = [math.exp(value - max(row)) for value in row]
    return [value / sum(exponentials) for value in exponentials]


def evaluation(logits, label_ids):
    return EvalPrediction(predictions=np.asarray(logits), label_ids=np.asarray(label_ids))


# The numbers


@few_examples
@given(pairs)
def test_label_metrics_equal_loops(pairs):
    references, predictions = [list(side) for side in zip(*pairs, strict=True)]
    recalls = recalls_by_loop(references, predictions)
    inputs = {"references": references, "predictions": predictions}
    expected = sum(recalls.values()) / len(recalls)
    assert BalancedAccuracy().compute(**inputs) == {"balanced_accuracy": pytest.approx(expected)}
    assert WorstClassAccuracy().compute(**inputs) == {"worst_class_accuracy": pytest.approx(min(recalls.values()))}
    assert MacroF1().compute(**inputs) == {"macro_f1": pytest.approx(macro_f1_by_loop(references, predictions))}


def test_balanced_accuracy_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    references, predictions = rng.integers(0, 6, size=(2, 200))
    expected = balanced_accuracy_score(references, predictions)
    found = BalancedAccuracy().compute(references=references, predictions=predictions)
    assert found["balanced_accuracy"] == pytest.approx(expected)
    assert type(found["balanced_accuracy"]) is float


@few_examples
@given(st.data())
def test_calibration_error_equals_a_loop(data):
    size = data.draw(st.integers(1, 60))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    probabilities = rng.dirichlet([0.3] * 4, size=size).tolist()
    references = rng.integers(0, 4, size=size).tolist()
    found = ExpectedCalibrationError().compute(predictions=probabilities, references=references)
    assert found == {"expected_calibration_error": pytest.approx(calibration_error_by_loop(references, probabilities))}


def test_calibration_error_by_hand():
    metric = ExpectedCalibrationError()
    sure = [[1.0, 0.0]] * 4
    assert metric.compute(predictions=sure, references=[0, 0, 0, 0]) == {"expected_calibration_error": 0.0}
    assert metric.compute(predictions=sure, references=[1, 1, 1, 1]) == {"expected_calibration_error": 1.0}
    # 0.61 and 0.65 share the bin (9/15, 10/15], where over- and underconfidence cancel; 0.61 and 0.69 do not.
    together = metric.compute(predictions=[[0.61, 0.39], [0.65, 0.35]], references=[0, 1])
    apart = metric.compute(predictions=[[0.61, 0.39], [0.69, 0.31]], references=[0, 1])
    assert together["expected_calibration_error"] == pytest.approx((0.61 + 0.65 - 1) / 2)
    assert apart["expected_calibration_error"] == pytest.approx((0.39 + 0.69) / 2)
    # An upper edge belongs to its bin: 9/15 shares it with 0.55.
    edge = metric.compute(predictions=[[9 / 15, 6 / 15], [0.55, 0.45]], references=[0, 1])
    assert edge["expected_calibration_error"] == pytest.approx((0.6 + 0.55 - 1) / 2)


@pytest.mark.parametrize(
    ("counts", "thresholds", "many", "medium", "few"),
    [
        ([9, 8, 7, 6, 5, 4, 3, 2, 1], None, [0, 1, 2], [3, 4, 5], [6, 7, 8]),
        ([1, 9, 5], None, [1], [2], [0]),
        ([4, 3, 2, 1], None, [0], [1, 2], [3]),
        ([9, 1], None, [0], [], [1]),
        ([7, 7, 7, 7], None, [], [0, 1, 2, 3], []),
        ([9, 5, 5, 5, 5, 1], None, [0], [1, 2, 3, 4], [5]),
        ([9, 9, 9, 1, 1, 1], None, [0, 1, 2], [], [3, 4, 5]),
        ([9, 9, 5, 5, 1, 0], None, [0, 1], [2, 3], [4, 5]),
        ([9, 8, 8, 5, 4, 1], None, [0], [1, 2, 3], [4, 5]),  # a tie right on the first border
        ([9, 8, 5, 4, 4, 1], None, [0, 1], [2, 3, 4], [5]),  # and on the second
        ([9, 1, 1, 1], None, [0], [], [1, 2, 3]),
        ([9, 9, 9, 9, 1], None, [0, 1, 2, 3], [], [4]),
        ([101, 100, 20, 19, 0], (100, 20), [0], [1, 2], [3, 4]),
        ([50, 40, 30], (100, 20), [], [0, 1, 2], []),
    ],
)
def test_classes_fall_into_shot_groups(counts, thresholds, many, medium, few):
    # Class c is right in c + 1 of 20 samples: each mean tells which classes it is over.
    references, predictions = [], []
    for label in range(len(counts)):
        references += [label] * 20
        predictions += [label] * (label + 1) + [(label + 1) % len(counts)] * (19 - label)
    expected = {
        f"{name}_shot_accuracy": pytest.approx(sum((label + 1) / 20 for label in group) / len(group))
        for name, group in {"many": many, "medium": medium, "few": few}.items()
        if group
    }
    found = ShotAccuracy().compute(
        references=references, predictions=predictions, train_class_counts=counts, shot_thresholds=thresholds
    )
    assert found == expected


@few_examples
@given(st.lists(st.integers(0, 6), min_size=2, max_size=12))
def test_shot_groups_are_ordered_and_ties_stay_together(counts):
    num_classes = len(counts)
    groups = make_compute_metrics(counts).keywords["groups"].tolist()
    for first in range(num_classes):
        for second in range(num_classes):
            if counts[first] == counts[second]:
                assert groups[first] == groups[second]
            if counts[first] > counts[second]:
                assert groups[first] <= groups[second]
    if len(set(counts)) > 1:
        assert groups[counts.index(max(counts))] == 0
        assert groups[counts.index(min(counts))] == 2
    if len(set(counts)) == num_classes > 2:
        sizes = [groups.count(group) for group in range(3)]
        assert sizes[0] == sizes[2]
        assert max(sizes) - min(sizes) <= 1


def test_shot_accuracy_leaves_out_a_group_without_references():
    found = ShotAccuracy().compute(references=[0, 1], predictions=[0, 0], train_class_counts=[9, 5, 1])
    assert found == {"many_shot_accuracy": 1.0, "medium_shot_accuracy": 0.0}


# compute_metrics


KEYS = {"accuracy", "balanced_accuracy", "worst_class_accuracy", "macro_f1", "expected_calibration_error"}
SHOT_KEYS = {"many_shot_accuracy", "medium_shot_accuracy", "few_shot_accuracy"}


@few_examples
@given(seed=st.integers(0, 2**32 - 1), size=st.integers(1, 50))
def test_compute_metrics_equals_loops(seed, size):
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=2, size=(size, NUM_CLASSES))
    references = rng.integers(0, NUM_CLASSES, size=size).tolist()
    predictions = [row.index(max(row)) for row in logits.tolist()]
    recalls = recalls_by_loop(references, predictions)
    probabilities = [softmax_by_loop(row) for row in logits.tolist()]
    expected = {
        "accuracy": sum(r == p for r, p in zip(references, predictions, strict=True)) / size,
        "balanced_accuracy": sum(recalls.values()) / len(recalls),
        "worst_class_accuracy": min(recalls.values()),
        "macro_f1": macro_f1_by_loop(references, predictions),
        "expected_calibration_error": calibration_error_by_loop(references, probabilities),
    }
    shots = {"many_shot_accuracy": [4], "medium_shot_accuracy": [0, 2], "few_shot_accuracy": [1, 3]}
    for name, group in shots.items():
        present = [recalls[label] for label in group if label in recalls]
        if present:
            expected[name] = sum(present) / len(present)
    found = make_compute_metrics([30, 2, 30, 1, 200], shot_thresholds=(100, 20))(evaluation(logits, references))
    assert found == pytest.approx(expected)
    assert {type(value) for value in found.values()} == {float}


@pytest.fixture
def sample():
    rng = np.random.default_rng(0)
    return rng.normal(size=(60, 3)).astype(np.float32), rng.integers(0, 3, size=60)


def test_compute_metrics_keys(sample):
    assert set(make_compute_metrics()(evaluation(*sample))) == KEYS
    assert set(make_compute_metrics([9, 5, 1])(evaluation(*sample))) == KEYS | SHOT_KEYS
    assert set(make_compute_metrics(np.array([9, 5, 1]))(evaluation(*sample))) == KEYS | SHOT_KEYS
    assert set(make_compute_metrics(torch.tensor([9, 5, 1]))(evaluation(*sample))) == KEYS | SHOT_KEYS


def test_compute_metrics_equals_the_modules(sample):
    logits, label_ids = sample
    found = make_compute_metrics([9, 5, 1])(evaluation(logits, label_ids))
    inputs = {"references": label_ids, "predictions": logits.argmax(axis=1)}
    modules = BalancedAccuracy().compute(**inputs) | WorstClassAccuracy().compute(**inputs)
    modules |= MacroF1().compute(**inputs) | ShotAccuracy().compute(**inputs, train_class_counts=[9, 5, 1])
    probabilities = torch.tensor(logits).double().softmax(-1).tolist()
    modules |= ExpectedCalibrationError().compute(predictions=probabilities, references=label_ids)
    assert modules == pytest.approx({name: found[name] for name in found if name != "accuracy"})


def test_compute_metrics_takes_the_forms_of_the_trainer(sample):
    logits, label_ids = sample
    compute_metrics = make_compute_metrics([9, 5, 1])
    expected = compute_metrics(evaluation(logits, label_ids))
    assert compute_metrics(evaluation(logits, label_ids[:, None])) == expected
    hidden_states = np.zeros((60, 7, 2))
    assert compute_metrics(EvalPrediction(predictions=(logits, hidden_states), label_ids=label_ids)) == expected
    ignored = evaluation(np.concatenate([logits, logits]), np.concatenate([label_ids, np.full(60, -100)]))
    assert compute_metrics(ignored) == expected
    half = logits.astype(np.float16)
    assert compute_metrics(evaluation(half, label_ids)) == compute_metrics(evaluation(half.astype(float), label_ids))
    assert pickle.loads(pickle.dumps(compute_metrics))(evaluation(logits, label_ids)) == expected


def test_compute_metrics_gives_nan_calibration_for_nan_logits(sample):
    logits, label_ids = sample
    for value in (np.nan, np.inf):
        broken = logits.copy()
        broken[3] = value
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = make_compute_metrics()(evaluation(broken, label_ids))
        assert math.isnan(found["expected_calibration_error"])
        assert 0 <= found["accuracy"] <= 1


def test_compute_metrics_in_a_trainer(tmp_path):
    class Table(PreTrainedModel):
        config_class = PreTrainedConfig

        def __init__(self, config):
            super().__init__(config)
            self.logits = torch.nn.Embedding.from_pretrained(torch.eye(3) * 2)

        def forward(self, sample, labels=None):
            logits = self.logits(sample)
            return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}

    rows = [{"sample": s, "labels": label} for s, label in [(0, 0), (1, 0), (1, 1), (2, 2), (0, 2)]]
    args = TrainingArguments(
        str(tmp_path), report_to=[], use_cpu=True, per_device_eval_batch_size=2, disable_tqdm=True
    )
    trainer = Trainer(
        model=Table(PreTrainedConfig()), args=args, compute_metrics=make_compute_metrics([9, 5, 1]), eval_dataset=rows
    )
    found = trainer.evaluate()
    assert found["eval_balanced_accuracy"] == pytest.approx(2 / 3)
    assert found["eval_worst_class_accuracy"] == found["eval_many_shot_accuracy"] == 0.5
    confidence = math.exp(2) / (math.exp(2) + 2)
    assert found["eval_expected_calibration_error"] == pytest.approx(abs(confidence - 0.6))


# Quiet, offline, and safe side by side


def inputs_of(metric_class):
    if metric_class is ExpectedCalibrationError:
        return {"references": [0, 1], "predictions": [[0.9, 0.1], [0.6, 0.4]]}
    inputs = {"references": [0, 1], "predictions": [0, 0]}
    return inputs | {"train_class_counts": [9, 1]} if metric_class is ShotAccuracy else inputs


@pytest.mark.parametrize("metric_class", METRICS)
def test_modules_write_no_files_and_print_nothing(metric_class, tmp_path, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metric_class(cache_dir=str(tmp_path)).compute(**inputs_of(metric_class))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("metric_class", METRICS)
def test_modules_describe_themselves(metric_class):
    metric = metric_class()
    assert metric.description
    assert "Args" not in metric.description
    for argument in inputs_of(metric_class):
        assert f"    {argument} (`" in metric.inputs_description
    assert metric.citation


def test_modules_of_one_cache_dir_do_not_mix(tmp_path):
    # Two processes of a cluster look like two instances of one cache directory and one experiment_id.
    right, wrong = BalancedAccuracy(cache_dir=str(tmp_path)), BalancedAccuracy(cache_dir=str(tmp_path))
    for label in range(3):
        right.add_batch(references=[label, label], predictions=[label, label])
        wrong.add(reference=label, prediction=(label + 1) % 3)
    assert (len(right), len(wrong)) == (6, 3)
    assert right.compute() == {"balanced_accuracy": 1.0}
    assert wrong.compute() == {"balanced_accuracy": 0.0}


@pytest.mark.parametrize("metric_class", METRICS)
def test_modules_leave_the_global_random_state(metric_class):
    state = np.random.get_state()[1].tolist()
    first = metric_class().compute(**inputs_of(metric_class))
    assert np.random.get_state()[1].tolist() == state
    assert metric_class().compute(**inputs_of(metric_class)) == first


def test_one_module_computes_again():
    metric = BalancedAccuracy()
    assert metric.compute(references=[0, 1], predictions=[0, 1]) == {"balanced_accuracy": 1.0}
    assert metric.compute(references=[0, 1], predictions=[0, 0]) == {"balanced_accuracy": 0.5}


def test_unusual_classes_raise_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # scikit-learn warns of predictions outside the references, of empty classes, and of many classes for few rows.
        found = make_compute_metrics()(evaluation(np.eye(40)[::-1], np.arange(40)))
        assert found["balanced_accuracy"] == 0.0
        found = make_compute_metrics()(evaluation(np.eye(40)[:3], np.zeros(3, dtype=int)))
        assert found["balanced_accuracy"] == pytest.approx(1 / 3)
        assert BalancedAccuracy().compute(references=[0], predictions=[1]) == {"balanced_accuracy": 0.0}


@pytest.mark.parametrize("metric_class", METRICS)
def test_modules_leave_out_ignored_labels(metric_class):
    inputs = inputs_of(metric_class)
    expected = metric_class().compute(**inputs)
    inputs["references"] = [*inputs["references"], -100]
    inputs["predictions"] = [*inputs["predictions"], inputs["predictions"][1]]
    assert metric_class().compute(**inputs) == expected


# Errors


@pytest.mark.parametrize("metric_class", METRICS)
def test_modules_refuse_references_without_classes(metric_class):
    with pytest.raises(ValueError, match=r"none of the 2 labels names a class \(-100 means ignored\)"):
        metric_class().compute(**inputs_of(metric_class) | {"references": [-100, -100]})


@pytest.mark.parametrize("counts", [[5], [[5, 1]], [5, -1], [0.5, 0.5], []])
def test_train_class_counts_must_be_counts(counts):
    with pytest.raises(ValueError, match=r"train_class_counts is \[.*\], but must be a list of at least 2 whole"):
        make_compute_metrics(counts)


def test_shot_thresholds_must_be_ordered_and_come_with_counts():
    with pytest.raises(ValueError, match=r"shot_thresholds is \(20, 100\).*\(100, 20\)"):
        make_compute_metrics([5, 1], shot_thresholds=(20, 100))
    with pytest.raises(ValueError, match=r"shot_thresholds is \(100, 20\), but train_class_counts is None"):
        make_compute_metrics(shot_thresholds=(100, 20))


def test_train_class_counts_must_fit_the_logits(sample):
    with pytest.raises(ValueError, match=r"train_class_counts has 2 entries, but the logits have 3 classes.*num_la"):
        make_compute_metrics([5, 1])(evaluation(*sample))


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 2, 3)])
def test_logits_of_no_classifier(shape):
    with pytest.raises(ValueError, match=r"predictions has shape \(4,.*logits \[N, C\].*single-label"):
        make_compute_metrics()(evaluation(np.zeros(shape), np.zeros(4, dtype=int)))


@pytest.mark.parametrize("label_ids", [np.zeros((4, 2), dtype=int), np.zeros(4)])
def test_labels_of_no_classifier(label_ids):
    with pytest.raises(ValueError, match=r"label_ids has shape \(4.*integers of shape \[N\] or \[N, 1\]"):
        make_compute_metrics()(evaluation(np.zeros((4, 3)), label_ids))


def test_labels_and_logits_must_match():
    compute_metrics = make_compute_metrics()
    with pytest.raises(ValueError, match="there are 4 predictions but 3 labels"):
        compute_metrics(evaluation(np.zeros((4, 2)), [0, 1, 0]))
    with pytest.raises(ValueError, match=r"the labels hold 2, but there are 2 classes \(the logits.*0\.\.1"):
        compute_metrics(evaluation(np.zeros((3, 2)), [0, 1, 2]))
    with pytest.raises(ValueError, match=r"the labels hold -1, but there are 2 classes"):
        compute_metrics(evaluation(np.zeros((3, 2)), [0, 1, -1]))
    with pytest.raises(ValueError, match=r"none of the 2 labels names a class"):
        compute_metrics(evaluation(np.zeros((2, 2)), [-100, -100]))


def test_modules_refuse_labels_beyond_the_classes():
    with pytest.raises(ValueError, match=r"the labels hold 2, but there are 2 classes \(train_class_counts"):
        ShotAccuracy().compute(references=[0, 2], predictions=[0, 1], train_class_counts=[3, 1])
    with pytest.raises(ValueError, match=r"the labels hold 2, but there are 2 classes \(predictions"):
        ExpectedCalibrationError().compute(references=[0, 2], predictions=[[0.5, 0.5], [0.1, 0.9]])


@pytest.mark.parametrize("row", [[2.0, -1.0], [0.9, 0.9], [float("nan"), 1.0]])
def test_calibration_needs_probabilities(row):
    with pytest.raises(ValueError, match=r"predictions holds values from .*Pass the softmax of the logits"):
        ExpectedCalibrationError().compute(references=[0, 1], predictions=[[0.5, 0.5], row])


def test_calibration_needs_two_classes():
    with pytest.raises(ValueError, match=r"predictions has shape \(2, 1\), but must be probabilities \[N, C\]"):
        ExpectedCalibrationError().compute(references=[0, 0], predictions=[[1.0], [1.0]])
