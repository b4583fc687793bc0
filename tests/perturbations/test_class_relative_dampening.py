"""Class-relative dampening: the method and its formulas against the reference."""

import dataclasses
import math

import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from logit_batches import (
    NUM_CLASSES,
    assert_equal,
    assert_rows_close,
    delta_of,
    drawn_batches,
    every_dtype,
    few_examples,
    make_batch,
    make_statistics,
    random_batch,
)

from lpg_hf.batch import IGNORE_INDEX, LogitBatch
from lpg_hf.perturbations import ClassRelativeDampening
from lpg_hf.perturbations.class_relative_dampening import (
    dampening_compensation,
    dampening_gate,
    dampening_weight,
)
from lpg_hf.statistics import ClassStatistics


# Any means of the classes.


@dataclasses.dataclass
class ClassMeans:
    """Running means per class, in the order in which the reference takes them."""

    label_prob: torch.Tensor
    confidence_ratio: torch.Tensor
    confident_error_rate: torch.Tensor

    def as_lists(self):
        return [tensor.tolist() for tensor in vars(self).values()]

    def as_statistics(self, dtype=torch.float64):
        statistics = ClassStatistics(len(self.label_prob)).to(dtype)
        for name, tensor in vars(self).items():
            getattr(statistics, name).copy_(tensor)
        return statistics


@st.composite
def class_means(draw, num_classes=7):
    """Means on both sides of the gates and inside them."""

    def column(values):
        drawn = draw(st.lists(st.sampled_from(values), min_size=num_classes, max_size=num_classes))
        return torch.tensor(drawn, dtype=torch.float64)

    return ClassMeans(
        label_prob=column([0.01, 0.1, 0.2, 0.3, 0.45, 0.5, 0.9]),
        confidence_ratio=column([0.02, 0.3, 0.7, 1.0]),
        confident_error_rate=column([0.0, 0.02, 0.03, 0.05, 0.07, 0.08, 0.4]),
    )


OPEN = ClassMeans(
    label_prob=torch.full((7,), 0.9, dtype=torch.float64),
    confidence_ratio=torch.full((7,), 0.6, dtype=torch.float64),
    confident_error_rate=torch.full((7,), 0.3, dtype=torch.float64),
)


def weights(batch, means, **options):
    return ClassRelativeDampening(**options).weight(batch.gradient, batch, means.as_statistics(batch.logits.dtype))


def deltas(batch, means, **options):
    statistics = means.as_statistics(batch.logits.dtype)
    return ClassRelativeDampening(**options).delta(batch.gradient, batch, statistics)


@few_examples
@given(batch=drawn_batches(), means=class_means(), power=st.sampled_from([0.0, 1.0, 2.0, 3.5]))
def test_relative_dampening_equals_the_reference(batch, means, power):
    expected = reference.dampening_weight(batch.logits.numpy(), batch.labels.tolist(), *means.as_lists(), power=power)
    assert_equal(weights(batch.batch, means, power=power), expected, 1e-12)
    assert_equal(
        deltas(batch.batch, means, power=power), reference.dampening_delta(batch.gradient.numpy(), expected), 1e-12
    )


@few_examples
@given(batch=drawn_batches(), means=class_means())
def test_relative_dampening_with_other_gates_equals_the_reference(batch, means):
    options = {"power": 1.5, "learned": (0.0, 0.3), "contradicted": (0.04, 1.0)}
    arguments = batch.logits.numpy(), batch.labels.tolist()
    for compensated in (True, False):
        expected = reference.dampening_weight(*arguments, *means.as_lists(), **options, compensated=compensated)
        assert_equal(weights(batch.batch, means, **options, compensated=compensated), expected, 1e-12)
    assert_equal(
        deltas(batch.batch, means, **options), reference.dampening_delta(batch.gradient.numpy(), expected), 1e-12
    )


def test_float32_relative_dampening_equals_the_reference():
    drawn = random_batch()
    batch = LogitBatch(drawn.logits.float(), drawn.labels)
    means = [tensor.float().tolist() for tensor in vars(OPEN).values()]
    weight = reference.dampening_weight(batch.logits.numpy(), batch.labels.tolist(), *means)
    expected = torch.from_numpy(reference.dampening_delta(drawn.gradient.float().numpy(), weight))
    assert weight.min() < 0.5
    np.testing.assert_allclose(weights(batch, OPEN).numpy(), weight, rtol=1e-5)
    delta = deltas(batch, OPEN)
    assert delta.dtype == torch.float32
    # The delta is `(w - 1) g`, and a weight has an error of its own size.
    assert_rows_close(delta, expected, 1e-5, smallest=1e-6)


@few_examples
@given(batch=drawn_batches(), means=class_means())
def test_dampening_weights_lie_in_0_1_and_are_1_at_or_above_the_mean_of_the_class(batch, means):
    weight = weights(batch.batch, means)
    assert ((weight >= 0) & (weight <= 1)).all()
    probabilities = reference.softmax(batch.logits.numpy())
    for i, label in enumerate(batch.labels.tolist()):
        if label == IGNORE_INDEX or probabilities[i, label] / probabilities[i].max() >= means.confidence_ratio[label]:
            assert weight[i] == 1


@few_examples
@given(batch=drawn_batches(), means=class_means())
def test_a_closed_gate_switches_dampening_off_for_its_class(batch, means):
    weight = weights(batch.batch, means)
    for c, rows in batch.members():
        if means.label_prob[c] <= 0.1 or means.confident_error_rate[c] <= 0.02:
            assert (weight[rows] == 1).all()


def test_dampening_falls_with_confidence_and_with_power():
    logits = torch.linspace(0, 8, 30)[:, None] * torch.tensor([0.0, 1.0, 0.5, 0, 0, 0, 0])
    batch = LogitBatch(logits.double(), torch.zeros(30, dtype=torch.int64))
    by_power = torch.stack([weights(batch, OPEN, power=power) for power in (0.5, 1.0, 2.0)])
    below = (-logits[:, 1]).exp() < 0.6
    assert below.sum() > 20
    assert (by_power[:, below].diff(dim=1) < 0).all()
    assert (by_power[:, below].diff(dim=0) < 0).all()


def test_default_power_squares_the_share_of_confidence_where_both_gates_are_open():
    # rho = exp(-log 10) = 0.1 against a class mean of 0.6.
    logits = torch.tensor([[0.0, math.log(10), 0, 0, 0, 0, 0]], dtype=torch.float64)
    assert_equal(weights(LogitBatch(logits, torch.tensor([0])), OPEN), [(0.1 / 0.6) ** 2], 1e-12)


@given(k=st.floats(0, 1), gate=st.floats(0, 1))
def test_compensation_gives_the_rest_of_a_class_what_the_contradicted_share_loses(k, gate):
    """Where the gate takes a share `gate` of the weight of all that is contradicted, the mean weight is 1 again."""
    factor = dampening_compensation(torch.tensor([k], dtype=torch.float64), torch.tensor([gate], dtype=torch.float64))
    mean_weight = factor.item() * (k * (1 - gate) + (1 - k))
    assert 1 <= factor.item() <= 2
    assert math.isclose(mean_weight, 1.0 if k * gate <= 0.5 else 2 * (1 - k * gate), abs_tol=1e-12)


@few_examples
@given(batch=drawn_batches(), means=class_means())
def test_the_weight_is_the_formula_with_the_gate_of_the_arguments(batch, means):
    gate = dampening_gate(means.label_prob, means.confident_error_rate, (0.0, 0.3), (0.04, 1.0))
    expected = dampening_weight(batch.batch, means.confidence_ratio, gate)
    actual = weights(batch.batch, means, learned=(0.0, 0.3), contradicted=(0.04, 1.0))
    # The formula says nothing about ignored samples.
    assert torch.equal(actual, torch.where(batch.batch.valid_mask, expected, 1.0))


@every_dtype
def test_relative_dampening_is_finite_for_unseen_classes_and_saturated_logits(dtype):
    unseen, seen = ClassMeans(*torch.zeros(3, 3)), ClassMeans(*(tensor[:3] for tensor in vars(OPEN).values()))
    logits = torch.tensor([[0.0, 2000.0, 0.0], [80.0, 0.0, 0.0], [0.0, 80.0, 0.0]], dtype=dtype)
    batch = LogitBatch(logits, torch.tensor([0, 0, 0]))
    assert weights(batch, unseen).tolist() == [1, 1, 1]
    weight = weights(batch, seen)
    assert weight[:2].tolist() == [0, 1]
    assert 0 <= weight[2] < 1e-30


def test_relative_dampening_ignores_samples_whatever_their_logits():
    logits = torch.tensor([[math.nan, 0.0], [math.inf, -math.inf], [0.0, 5.0]])
    batch = LogitBatch(logits, torch.tensor([IGNORE_INDEX, IGNORE_INDEX, 0]))
    means = ClassMeans(*(tensor[:2] for tensor in vars(OPEN).values()))
    weight = weights(batch, means)
    assert weight[:2].tolist() == [1, 1]
    assert weight[2] < 0.01
    assert (deltas(batch, means)[:2] == 0).all()


# Statistics of a training.


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"power": 1.0},
        {"power": 4.0, "learned": (0.0, 0.9), "contradicted": (0.0, 0.5)},
        {"power": 0.0},
        {"power": 8.0, "decided": (0.0, 0.9)},
        {"compensated": True},
        {"power": 4.0, "learned": (0.0, 0.9), "contradicted": (0.0, 0.5), "compensated": True},
        {"power": 8.0, "decided": (0.0, 0.9), "compensated": True},
        {"power": 8.0, "rising": (0.0, 0.9)},
        {"power": 1.0, "rising": (0.0, 0.9)},
        {"power": 8.0, "decided": (0.0, 0.6), "rising": (0.1, 0.8), "compensated": True},
    ],
)
def test_class_relative_dampening_equals_the_reference(options):
    statistics = make_statistics()
    method = ClassRelativeDampening(**options)
    batch = make_batch()
    delta = delta_of(method, batch, statistics)
    expected = reference.dampening_weight(
        batch.logits.numpy(),
        batch.labels.tolist(),
        statistics.label_prob.tolist(),
        statistics.confidence_ratio.tolist(),
        statistics.confident_error_rate.tolist(),
        confident_error_share=statistics.confident_error_share.item(),
        **options,
    )
    weight = method.weight(batch.gradient, batch, statistics)
    assert_equal(weight, expected, 1e-12)
    assert_equal(delta, reference.dampening_delta(batch.gradient.numpy(), expected), 1e-12)
    assert expected.min() < 0.5 or options == {"power": 0.0}
    assert (expected.max() > 1) == options.get("compensated", False)


def test_where_errors_are_unsure_the_third_gate_leaves_everything_as_it_is():
    statistics = make_statistics()
    share = statistics.confident_error_share.item()
    assert 0 < share < 1 and delta_of(ClassRelativeDampening(), make_batch(), statistics).abs().max() > 0
    assert (delta_of(ClassRelativeDampening(decided=(share + 1e-9, 1.0)), make_batch(), statistics) == 0).all()


def test_the_power_rises_from_2_with_the_share_of_errors_that_are_decided():
    statistics = make_statistics()
    share = statistics.confident_error_share.item()
    for rising, power in (((share, 1.0), 2.0), ((0.0, share), 8.0), ((share / 2, 3 * share / 2), 5.0)):
        delta = delta_of(ClassRelativeDampening(power=8.0, rising=rising), make_batch(), statistics)
        assert_equal(delta, delta_of(ClassRelativeDampening(power=power), make_batch(), statistics), 1e-12)


def test_class_relative_dampening_does_exactly_nothing_before_the_first_step():
    method, statistics = ClassRelativeDampening(), ClassStatistics(NUM_CLASSES)
    batch = make_batch()
    delta = delta_of(method, batch, statistics)
    assert (delta == 0).all()
    assert (method.weight(batch.gradient, batch, statistics) == 1).all()


def test_class_relative_dampening_reads_the_model_and_scales_the_gradient_left_before():
    method, statistics = ClassRelativeDampening(), make_statistics()
    batch = make_batch()
    gradient = torch.randn(len(batch.labels), NUM_CLASSES, dtype=torch.float64)
    delta = method.delta(gradient, batch, statistics)
    assert_equal(delta, (method.weight(batch.gradient, batch, statistics) - 1)[:, None] * gradient, 1e-15)


# Arguments.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"power": -1.0}, r"`power` must be at least 0; found -1\.0"),
        ({"power": math.inf}, r"`power` must be finite; found inf"),
        ({"learned": (0.5, 0.1)}, r"`learned` must be two increasing numbers in \[0, 1\]; found \(0\.5, 0\.1\)"),
        ({"learned": (0.5, 0.5)}, r"`learned` must be two increasing .*found \(0\.5, 0\.5\)"),
        ({"learned": (-0.1, 0.5)}, r"`learned` must be two increasing .*found \(-0\.1, 0\.5\)"),
        (
            {"contradicted": (0.1, 1.1)},
            r"`contradicted` must be two increasing numbers in \[0, 1\]; found \(0\.1, 1\.1\)",
        ),
        ({"contradicted": (0.1,)}, r"`contradicted` must be two increasing .*found \(0\.1,\)"),
        ({"decided": (0.2, 0.1)}, r"`decided` must be two increasing .*found \(0\.2, 0\.1\)"),
        ({"rising": (0.2, 0.1)}, r"`rising` must be two increasing .*found \(0\.2, 0\.1\)"),
    ],
)
def test_arguments_out_of_range_are_refused_with_name_value_and_range(options, message):
    with pytest.raises(ValueError, match=message):
        ClassRelativeDampening(**options)


def test_the_ends_of_the_ranges_are_accepted():
    method = ClassRelativeDampening(power=0, learned=(0, 1), contradicted=(0, 1))
    assert (method.power, method.learned, method.contradicted) == (0, (0, 1), (0, 1))
