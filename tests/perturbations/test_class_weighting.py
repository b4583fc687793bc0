"""Class weighting: weights from counts and by name, against a weighted cross-entropy."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from logit_batches import (
    COUNTS,
    NUM_CLASSES,
    assert_close,
    assert_zero_sum_within,
    delta_of,
    make_batch,
    more_examples,
    positive,
    valid_batches,
)
from original_form import (
    TOLERANCE,
    OriginalForm,
    cross_entropy,
    every_dtype,
    gradient_of,
    gradient_through_loss,
    original_form_tests,
    weighted,
)

from lpg_hf import LPGLoss
from lpg_hf.batch import LogitBatch
from lpg_hf.perturbations import ClassWeighting, parse_perturbation
from lpg_hf.statistics import ClassStatistics


NAMES = {"cat": 0, "dog": 1, "emu": 2, "fox": 3, "gnu": 4}
WEIGHTS = [0.3, 1.0, 1.7, 0.0, 33.3]

TestOriginalForm = original_form_tests(
    [
        OriginalForm(ClassWeighting(WEIGHTS), weighted(WEIGHTS)),
        OriginalForm(ClassWeighting({}), cross_entropy),
    ]
)


def counted_weights(rule, counts, beta=0.999):
    if rule == "balanced":
        return [sum(counts) / (len(counts) * count) for count in counts]
    # Exact sums of a geometric series: Cui et al.'s `(1 - beta^n) / (1 - beta)` without its cancellation.
    raw = [1 / math.fsum(beta**k for k in range(count)) for count in counts]
    return [len(counts) * weight / math.fsum(raw) for weight in raw]


@pytest.mark.parametrize("counts", [COUNTS, [5000, 1, 2, 900, 40]])
@pytest.mark.parametrize(
    ("rule", "beta"),
    [("balanced", 0.999), ("effective", 0.0), ("effective", 0.9), ("effective", 0.999), ("effective", 0.99999)],
)
@every_dtype
def test_weights_from_the_class_counts_are_those_of_a_weighted_cross_entropy(rule, beta, counts, dtype):
    batch = make_batch(40, 3.0, dtype=dtype)
    expected = gradient_of(weighted(counted_weights(rule, counts, beta)), batch)
    actual = gradient_through_loss(ClassWeighting(rule, beta), batch, counts)
    assert_close(actual, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("rule", ["balanced", "effective"])
def test_weights_from_the_class_counts_leave_absent_classes_out(rule):
    statistics = ClassStatistics(NUM_CLASSES, [400, 0, 30, 0, 3]).double()
    weights = ClassWeighting(rule, 0.9).class_weights(statistics)
    assert weights[[1, 3]].tolist() == [0, 0]
    torch.testing.assert_close(
        weights[[0, 2, 4]], torch.tensor(counted_weights(rule, [400, 30, 3], 0.9)).double(), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize(
    ("weights", "counts", "expected"),
    [
        ("balanced", [6, 4, 0], [1, 1, 1]),
        ([1.0, 3.0, 0.0], [6, 4, 0], [6, 12, 6]),
        ([1.0, 0.5, 0.0], [6, 4, 2], [6, 2, 2]),
        ({0: 0.0}, [6, 4, 2], [2, 4, 2]),
    ],
)
def test_a_class_without_weight_counts_as_the_rarest_of_the_others(weights, counts, expected):
    shares = LPGLoss(3, [ClassWeighting(weights)], counts).statistics.log_output_shares.softmax(0)
    torch.testing.assert_close(shares, torch.tensor(expected) / sum(expected))


def test_an_absent_class_is_no_evidence_of_wrong_labels():
    """Its weight is 0. Its logit is low, and must not be moved above those of all labels where these are judged."""
    labels = torch.tensor([0] * 60 + [1] * 40)
    logits = (4.0 * torch.eye(3)[labels] - torch.tensor([0.0, 0.0, 6.0])).requires_grad_()
    loss_fn = LPGLoss(3, ["class_weighting", "auto"], [60, 40, 0])
    loss_fn(logits, labels)
    assert loss_fn.statistics.epochs == 1 and loss_fn.statistics.noise_evidence == 0
    assert loss_fn.statistics.confidence_ratio.tolist() == [1, 1, 0]


@pytest.mark.parametrize("rule", ["balanced", "effective"])
def test_weights_from_counts_wait_until_a_prior_that_is_being_counted_is_ready(rule):
    statistics = ClassStatistics(NUM_CLASSES, waits_for_epoch=True).double()
    statistics.update(LogitBatch(torch.zeros(30, NUM_CLASSES), torch.arange(30) // 26))
    statistics.step()
    assert_close(ClassWeighting(rule, 0.9).class_weights(statistics), torch.ones(NUM_CLASSES), 1e-6)
    statistics.end_epoch()
    assert ClassWeighting(rule, 0.9).class_weights(statistics).std() > 0.1


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([0.5, 1, 2, 0, 3], [0.5, 1, 2, 0, 3]),
        ((0.5, 1, 2, 0, 3), [0.5, 1, 2, 0, 3]),
        ({4: 3.0, 0: 0.5}, [0.5, 1, 1, 1, 3]),
        ({"gnu": 3.0, "cat": 0.5}, [0.5, 1, 1, 1, 3]),
        ({"gnu": 3.0, 0: 0.5}, [0.5, 1, 1, 1, 3]),
    ],
    ids=["list", "tuple", "by index", "by name", "by both"],
)
def test_weights_by_position_index_and_name(weights, expected):
    batch = make_batch(40, 3.0)
    actual = gradient_through_loss(ClassWeighting(weights), batch, names=NAMES)
    assert_close(actual, gradient_of(weighted(expected), batch), 1e-10)


@pytest.mark.parametrize(
    "weights",
    [np.array([0.5, 2.0]), torch.tensor([0.5, 2.0]), [np.float64(0.5), 2.0], {0: np.float64(0.5), 1: 2.0}],
    ids=["array", "tensor", "list", "dict"],
)
def test_weights_of_numpy_and_torch_are_read_back_from_the_repr(weights):
    method = parse_perturbation(repr(ClassWeighting(weights)))
    method.setup(2)
    assert method.class_weights(ClassStatistics(2)).tolist() == [0.5, 2.0]


@more_examples
@given(drawn=valid_batches(), seed=st.integers(0, 99), scale=st.floats(0.1, 10))
def test_class_weighting_deltas_are_bounded(drawn, seed, scale):
    weights = scale * positive(drawn.num_classes, seed)
    bound = math.sqrt(2) * (weights[drawn.labels] - 1).abs() * (1 - drawn.label_prob)
    statistics = ClassStatistics(drawn.num_classes).double()
    assert_zero_sum_within(delta_of(ClassWeighting(weights.tolist()), drawn.batch, statistics), bound)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0, 2.0], r"`weights` must be one weight for each of 5 classes; found \[1\.0, 2\.0\]"),
        ([], r"`weights` must be one weight for each of 5 classes; found \[\]"),
        ([0.0] * 5, r"`weights` must be above 0 for one class at least; found \[0\.0, 0\.0"),
        (dict.fromkeys(NAMES, 0.0), r"`weights` must be above 0 for one class at least; found \{'cat': 0\.0"),
        (
            {"cow": 2.0},
            r"the key 'cow', which does not name a class\. .*Known names: 'cat', 'dog', 'emu', 'fox', 'gnu'",
        ),
        ({5: 2.0}, r"the key 5, which does not name a class\. Use an index in \[0, 5\) or a label name"),
        ({-1: 2.0}, r"the key -1, which does not name a class"),
        ({1.0: 2.0}, r"the key 1\.0, which does not name a class"),
    ],
)
def test_weights_that_do_not_fit_the_classes_are_refused(weights, message):
    method = ClassWeighting(weights)
    method.use_label_names(NAMES)
    with pytest.raises(ValueError, match=message):
        LPGLoss(NUM_CLASSES, [method])


def test_label_names_without_a_model_are_refused_with_a_hint():
    with pytest.raises(ValueError, match=r"the key 'cat'.*no names \(LPGTrainer takes them from data and model\)"):
        LPGLoss(NUM_CLASSES, [ClassWeighting({"cat": 2.0})])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sqrt"], r"`weights` must be 'balanced', 'effective', a list or a dict; found 'sqrt'"),
        ([[1.0, -1.0]], r"`weights` must be at least 0 for each class; found \[1\.0, -1\.0\]"),
        ([{"cat": -1.0}], r"`weights` must be at least 0 for each class"),
        ([[1.0, math.inf]], r"`weights` must be finite for each class; found \[1\.0, inf\]"),
        ([{"cat": math.inf}], r"`weights` must be finite for each class"),
        (["effective", 1.0], r"`beta` must be in \[0, 1\); found 1\.0"),
        (["effective", -0.1], r"`beta` must be in \[0, 1\); found -0\.1"),
    ],
)
def test_arguments_out_of_range_are_refused_with_name_value_and_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        ClassWeighting(*arguments)
