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
    drawn_batches,
    every_dtype,
    few_examples,
    make_batch,
    make_statistics,
    offsets_of,
    positive,
    prepared,
    random_batch,
)

from lpg_hf.batch import IGNORE_INDEX, LogitBatch
from lpg_hf.perturbations import ClassRelativeDampening
from lpg_hf.perturbations.class_relative_dampening import (
    LEAST_WEIGHT,
    dampening_compensation,
    dampening_gate,
    dampening_least,
    dampening_reference,
    dampening_sharpness,
    dampening_weight,
)
from lpg_hf.statistics import ClassStatistics


# Any means of the classes.


@dataclasses.dataclass
class ClassMeans:
    """Means per class, evidence of wrong labels and memorizing, in the order in which the reference takes them."""

    last_label_prob: torch.Tensor
    confidence_ratio: torch.Tensor
    decidedness: torch.Tensor
    noise_evidence: float = 3.0
    memorizing: float = 0.0

    def resized(self, num_classes):
        means = {name: getattr(self, name)[:num_classes] for name in PER_CLASS}
        return dataclasses.replace(self, **means)

    def as_arguments(self):
        return *(getattr(self, name).tolist() for name in PER_CLASS), self.noise_evidence, self.memorizing

    def as_statistics(self, dtype=torch.float64):
        statistics = ClassStatistics(len(self.last_label_prob)).to(dtype)
        for name in ("last_label_prob", "confidence_ratio"):
            getattr(statistics, name).copy_(getattr(self, name))
        mean = self.confidence_ratio
        statistics._epoch_means[1] = mean.square() + self.decidedness * mean * (1 - mean)
        statistics.noise_evidence.fill_(self.noise_evidence)
        statistics.memorizing.fill_(self.memorizing)
        return statistics


PER_CLASS = "last_label_prob", "confidence_ratio", "decidedness"


@st.composite
def class_means(draw, num_classes=7):
    """Means on both sides of the gates and inside them."""

    def column(values):
        drawn = draw(st.lists(st.sampled_from(values), min_size=num_classes, max_size=num_classes))
        return torch.tensor(drawn, dtype=torch.float64)

    ratio = column([0.02, 0.3, 0.7, 1.0])
    return ClassMeans(
        last_label_prob=column([0.01, 0.05, 0.1, 0.2, 0.3, 0.9]),
        confidence_ratio=ratio,
        # A mean of 1 leaves no variance.
        decidedness=torch.where(ratio < 1, column([0.0, 0.3, 0.9, 1.0]), 0.0),
        noise_evidence=draw(st.sampled_from([0.0, 0.4, 1.0, 1.3, 1.9, 2.0, 50.0])),
        memorizing=draw(st.sampled_from([0.0, 0.5, 1.0])),
    )


OPEN = ClassMeans(
    last_label_prob=torch.full((7,), 0.9, dtype=torch.float64),
    confidence_ratio=torch.full((7,), 0.6, dtype=torch.float64),
    decidedness=torch.zeros(7, dtype=torch.float64),
)
DECISIVE = dataclasses.replace(OPEN, decidedness=torch.ones(7, dtype=torch.float64))


def make_method(batch, **options):
    method = ClassRelativeDampening(**options)
    method.setup(batch.logits.shape[1])
    return method.to(batch.logits.dtype)


def weights(batch, means, **options):
    statistics = means.resized(batch.logits.shape[1]).as_statistics(batch.logits.dtype)
    return valid_weights(make_method(batch, **options), batch, statistics)


def valid_weights(method, batch, statistics):
    """The weights that a chain takes: a method may say anything about ignored samples, and they get 0."""
    weight = method.weight(batch.gradient, batch, statistics)
    return weight.where(batch.valid_mask, 0.0)


def deltas(batch, means, **options):
    statistics = means.resized(batch.logits.shape[1]).as_statistics(batch.logits.dtype)
    return make_method(batch, **options).delta(batch.gradient, batch, statistics)


def expected_weights(batch, means, **options):
    arguments = means.resized(batch.logits.shape[1]).as_arguments()
    weight = reference.dampening_weight(batch.logits.numpy(), batch.labels.tolist(), *arguments, **options)
    return np.where(batch.labels == IGNORE_INDEX, 0.0, weight)


@few_examples
@given(batch=drawn_batches(), means=class_means(), power=st.sampled_from([0.0, 1.0, 2.0, 3.5]))
def test_relative_dampening_equals_the_reference(batch, means, power):
    expected = expected_weights(batch, means, power=power)
    assert_equal(weights(batch.batch, means, power=power), expected, 1e-12)
    assert_equal(
        deltas(batch.batch, means, power=power), reference.dampening_delta(batch.gradient.numpy(), expected), 1e-12
    )


@few_examples
@given(batch=drawn_batches(), means=class_means())
def test_relative_dampening_with_other_gates_equals_the_reference(batch, means):
    options = {"power": 1.5, "learned": (0.0, 0.3), "evidence": (0.2, 1.5)}
    expected = expected_weights(batch, means, **options)
    assert_equal(weights(batch.batch, means, **options), expected, 1e-12)
    assert_equal(
        deltas(batch.batch, means, **options), reference.dampening_delta(batch.gradient.numpy(), expected), 1e-12
    )


def test_float32_relative_dampening_equals_the_reference():
    drawn = random_batch()
    batch = LogitBatch(drawn.logits.float(), drawn.labels)
    weight = expected_weights(batch, OPEN)
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
    """Or above its square, if the model has not decided which labels of the class it believes."""
    weight = weights(batch.batch, means)
    assert ((weight >= 0) & (weight <= 1)).all()
    assert (weight[batch.labels == IGNORE_INDEX] == 0).all()
    probabilities = reference.softmax(batch.logits.numpy())
    for i, label in enumerate(batch.labels.tolist()):
        if label != IGNORE_INDEX and probabilities[i, label] / probabilities[i].max() >= (
            means.confidence_ratio[label] ** (2 - means.decidedness[label]) + 1e-12
        ):
            assert weight[i] == 1


@few_examples
@given(batch=drawn_batches(), means=class_means())
def test_a_closed_gate_switches_dampening_off_for_its_class(batch, means):
    weight = weights(batch.batch, means)
    for c, rows in batch.members():
        if means.last_label_prob[c] <= 0.05 or means.noise_evidence <= 1:
            assert (weight[rows] == 1).all()


def test_dampening_falls_with_confidence_and_with_power():
    logits = torch.linspace(0, 8, 30)[:, None] * torch.tensor([0.0, 1.0, 0.5, 0, 0, 0, 0])
    batch = LogitBatch(logits.double(), torch.zeros(30, dtype=torch.int64))
    by_power = torch.stack([weights(batch, DECISIVE, power=power) for power in (0.5, 1.0, 2.0)])
    below = (-logits[:, 1]).exp() < 0.6
    assert below.sum() > 20
    assert (by_power[:, below].diff(dim=1) < 0).all()
    assert (by_power[:, below].diff(dim=0) < 0).all()


@pytest.mark.parametrize(
    ("evidence", "exponent"), [(0.99, 0), (1.0, 0), (1.25, 1.5), (1.5, 3), (2.0, 6), (9.0, 6)], ids=str
)
def test_evidence_from_1_to_2_opens_the_gate_of_all_classes_that_are_learned(evidence, exponent):
    # rho = 0.1 against a class mean of 0.6; the second class is half learned, the third is not.
    learned = torch.tensor([0.9, 0.175, 0.04, 0, 0, 0, 0], dtype=torch.float64)
    means = dataclasses.replace(DECISIVE, last_label_prob=learned, noise_evidence=evidence)
    labels = torch.arange(3)
    logits = torch.full((3, 7), math.log(10), dtype=torch.float64).scatter(1, labels[:, None], 0.0)
    assert_equal(weights(LogitBatch(logits, labels), means), [6**-exponent, 6 ** -(exponent / 2), 1], 1e-12)


@pytest.mark.parametrize(
    ("decided", "memorizing", "exponent", "least"),
    [
        (0.0, 0.0, 2, 0.2),
        (0.5, 0.0, 4, 0.05),
        (0.0, 0.5, 3, 0.1125),
        (0.5, 0.5, 4, 0.05),
        (0.0, 1.0, 4, 0.05),
        (1.0, 0.0, 6, 0.0),
        (1.0, 1.0, 6, 0.0),
    ],
)
def test_dampening_is_sharper_where_the_model_has_decided_or_memorizes(decided, memorizing, exponent, least):
    """Of 7 classes, the first asks a belief of `0.6^(2 - d)`. Its samples have 0.9 of it, half of it, and nothing."""
    decidedness = torch.full((7,), decided, dtype=torch.float64)
    means = dataclasses.replace(OPEN, decidedness=decidedness, memorizing=memorizing)
    logits = torch.zeros(3, 7, dtype=torch.float64)
    logits[:, 1] = -(0.6 ** (2 - decided) * torch.tensor([0.9, 0.5, 1e-20], dtype=torch.float64)).log()
    expected = [0.9**exponent, max(0.5**exponent, least), least]
    assert_equal(weights(LogitBatch(logits, torch.zeros(3, dtype=torch.int64)), means), expected, 1e-12)


@pytest.mark.parametrize(
    ("decided", "needed"), [(0.0, 0.36), (1.0, 0.6), (0.5, 0.6**1.5)], ids=["unsure", "decided", "between"]
)
def test_a_class_with_labels_that_are_told_apart_asks_more_of_a_sample(decided, needed):
    means = dataclasses.replace(OPEN, decidedness=torch.full((7,), decided, dtype=torch.float64))
    rho = torch.tensor([0.02, 0.2, 0.3, 0.37, 0.59, 0.61], dtype=torch.float64)
    logits = torch.zeros(6, 7, dtype=torch.float64)
    logits[:, 1] = -rho.log()
    weight = weights(LogitBatch(logits, torch.zeros(6, dtype=torch.int64)), means)
    expected = (rho / needed).clamp(max=1) ** (2 + 4 * decided)
    assert_equal(weight, expected.clamp(min=LEAST_WEIGHT * (1 - decided) ** 2), 1e-12)


@few_examples
@given(batch=drawn_batches(), means=class_means(), power=st.sampled_from([1.0, 2.0, 50.0]))
def test_no_sample_is_silenced_before_the_model_has_decided_which_labels_it_believes(batch, means, power):
    means = dataclasses.replace(means, noise_evidence=3.0)
    weight = weights(batch.batch, means, power=power)
    assert_equal(weight, expected_weights(batch, means, power=power), 1e-12)
    for c, rows in batch.members():
        least = LEAST_WEIGHT * (1 - max(means.decidedness[c], means.memorizing / 2)) ** 2
        assert (weight[rows] >= least - 1e-12).all()


@given(mean_weight=st.floats(0, 1))
def test_compensation_gives_the_rest_of_a_class_what_its_samples_lose(mean_weight):
    """The mean weight of the class is 1 again, unless more than half of it was lost."""
    factor = dampening_compensation(torch.tensor([mean_weight], dtype=torch.float64)).item()
    assert 1 <= factor <= 2
    assert math.isclose(factor * mean_weight, min(1.0, 2 * mean_weight), abs_tol=1e-12)


def test_the_weights_of_a_training_are_compensated_by_their_running_mean():
    """And the mean is that of the weights before the compensation."""
    statistics = OPEN.resized(3).as_statistics()
    statistics._running[0] = 1 - torch.tensor([0.2, 0.0, 0.7], dtype=torch.float64)
    batch = random_batch(num_classes=3).batch
    method = make_method(batch)
    weight = method.weight(batch.gradient, batch, statistics)
    plain = expected_weights(batch, OPEN)
    factor = [1 / 0.8, 1.0, 2.0]
    expected = [w * factor[c] for w, c in zip(plain, batch.classes.tolist(), strict=True)]
    assert_equal(weight, expected, 1e-12)
    assert_equal(method.uncompensated_weight[batch.valid_mask], plain[batch.valid_mask.numpy()], 1e-12)


def test_a_gate_that_was_open_does_not_close():
    """Evidence does not fall, but the probability of a label does, and a user may start anew with the statistics."""
    batch = random_batch(num_classes=3).batch
    method = make_method(batch)
    opened = method.weight(batch.gradient, batch, OPEN.resized(3).as_statistics())
    forgotten = dataclasses.replace(OPEN.resized(3), last_label_prob=torch.zeros(3, dtype=torch.float64))
    for closed in (forgotten, dataclasses.replace(OPEN.resized(3), noise_evidence=0.0)):
        assert (weights(batch, closed) == batch.is_valid).all()
        assert torch.equal(method.weight(batch.gradient, batch, closed.as_statistics()), opened)
        # It is part of a checkpoint.
        other = make_method(batch)
        other.load_state_dict(method.state_dict())
        assert torch.equal(other.weight(batch.gradient, batch, closed.as_statistics()), opened)
    assert opened.min() < 0.5


@few_examples
@given(batch=drawn_batches(), means=class_means(), seed=st.integers(0, 99))
def test_labels_are_judged_at_the_shares_of_the_evaluation(batch, means, seed):
    """With an offset of each logit, which the weight of a sample sees and its gradient does not."""
    offset = positive(batch.num_classes, seed).log()
    judged = LogitBatch(batch.logits, batch.labels, offsets_of(offset))
    assert_equal(weights(judged, means), expected_weights(batch, means, offset=offset.tolist()), 1e-12)
    assert_equal(judged.gradient, batch.gradient, 1e-12)


@few_examples
@given(batch=drawn_batches(), means=class_means())
def test_the_weight_is_the_formula_with_the_gate_of_the_arguments(batch, means):
    means = means.resized(batch.num_classes)
    options = {"learned": (0.0, 0.3), "evidence": (0.2, 1.5)}
    gate = dampening_gate(means.last_label_prob, means.noise_evidence, **options)
    classes, needed = batch.batch.classes, dampening_reference(means.confidence_ratio, means.decidedness)
    sharpness = dampening_sharpness(means.decidedness, means.memorizing)
    exponent, least = 2 * (1 + 2 * sharpness) * gate, dampening_least(sharpness)
    expected = dampening_weight(batch.batch.confidence_ratio, needed[classes], exponent[classes], least[classes])
    actual = weights(batch.batch, means, **options)
    # The formula says nothing about ignored samples.
    assert_equal(actual, torch.where(batch.batch.valid_mask, expected, 0.0), 1e-12)


@every_dtype
def test_relative_dampening_is_finite_for_unseen_classes_and_saturated_logits(dtype):
    unseen, seen = ClassMeans(*torch.zeros(3, 3)), DECISIVE.resized(3)
    logits = torch.tensor([[0.0, 2000.0, 0.0], [80.0, 0.0, 0.0], [0.0, 80.0, 0.0]], dtype=dtype)
    batch = LogitBatch(logits, torch.tensor([0, 0, 0]))
    assert weights(batch, unseen).tolist() == [1, 1, 1]
    weight = weights(batch, seen)
    assert weight[1] == 1
    assert ((weight[[0, 2]] >= 0) & (weight[[0, 2]] < 1e-30)).all()


def test_relative_dampening_ignores_samples_whatever_their_logits():
    logits = torch.tensor([[math.nan, 0.0], [math.inf, -math.inf], [0.0, 5.0]])
    batch = LogitBatch(logits, torch.tensor([IGNORE_INDEX, IGNORE_INDEX, 0]))
    weight = weights(batch, OPEN)
    assert weight[:2].tolist() == [0, 0]
    assert weight[2] == pytest.approx(LEAST_WEIGHT)
    assert (deltas(batch, OPEN)[:2] == 0).all()


# Statistics of a training.


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"power": 1.0},
        {"power": 2.0, "learned": (0.0, 0.9), "evidence": (0.0, 100.0)},
        {"power": 0.0},
    ],
)
def test_class_relative_dampening_equals_the_reference(options):
    statistics = make_statistics()
    statistics.end_epoch()
    method, batch = prepared(ClassRelativeDampening(**options)).double(), make_batch()
    expected = reference.dampening_weight(
        batch.logits.numpy(),
        batch.labels.tolist(),
        statistics.last_label_prob.tolist(),
        statistics.confidence_ratio.tolist(),
        statistics.decidedness.tolist(),
        statistics.noise_evidence.item(),
        statistics.memorizing.item(),
        **options,
    )
    weight = valid_weights(method, batch, statistics)
    assert_equal(weight, expected * batch.valid_mask.numpy(), 1e-12)
    delta = method.delta(batch.gradient, batch, statistics)
    assert_equal(delta, reference.dampening_delta(batch.gradient.numpy(), expected), 1e-12)
    assert expected.min() < 0.5 or options == {"power": 0.0}


def test_the_first_epoch_is_free():
    statistics, batch = make_statistics(), make_batch()
    method = prepared(ClassRelativeDampening(learned=(0.0, 0.01), evidence=(0.0, 0.001)))
    assert (valid_weights(method, batch, statistics) == batch.is_valid).all()
    statistics.end_epoch()
    assert method.weight(batch.gradient, batch, statistics)[batch.valid_mask].min() < 0.5


def test_class_relative_dampening_does_exactly_nothing_before_the_first_step():
    method, statistics = prepared(ClassRelativeDampening()), ClassStatistics(NUM_CLASSES)
    batch = make_batch()
    delta = method.delta(batch.gradient, batch, statistics)
    assert (delta == 0).all()
    assert (valid_weights(method, batch, statistics) == batch.is_valid).all()


def test_class_relative_dampening_reads_the_model_and_scales_the_gradient_left_before():
    method, statistics = prepared(ClassRelativeDampening()), make_statistics()
    statistics.end_epoch()
    batch = make_batch()
    gradient = torch.randn(len(batch.labels), NUM_CLASSES, dtype=torch.float64) * batch.is_valid[:, None]
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
        ({"learned": (0.1, 1.1)}, r"`learned` must be two increasing .*found \(0\.1, 1\.1\)"),
        (
            {"evidence": (1.0, 2e6)},
            r"`evidence` must be two increasing numbers in \[0, 1000000\.0\]; found \(1\.0, 2000000\.0\)",
        ),
        ({"evidence": (2.0, 1.0)}, r"`evidence` must be two increasing .*found \(2\.0, 1\.0\)"),
        ({"evidence": (1.0, math.inf)}, r"`evidence` must be two increasing .*found \(1\.0, inf\)"),
        ({"evidence": (1.0,)}, r"`evidence` must be two increasing .*found \(1\.0,\)"),
    ],
)
def test_arguments_out_of_range_are_refused_with_name_value_and_range(options, message):
    with pytest.raises(ValueError, match=message):
        ClassRelativeDampening(**options)


def test_the_ends_of_the_ranges_are_accepted():
    method = ClassRelativeDampening(power=0, learned=(0, 1), evidence=(0, 1e6))
    assert (method.power, method.learned, method.evidence) == (0, (0, 1), (0, 1e6))
