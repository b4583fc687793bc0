"""Strategies: which classes are amplified or dampened, and how far."""

import pytest
import reference
from logit_batches import (
    COUNTS,
    NUM_CLASSES,
    WITH_ABSENT,
    assert_equal,
    delta_of,
    make_batch,
    make_statistics,
)

from lpg_hf.perturbations import LPG, LPL
from lpg_hf.statistics import ClassStatistics


every_method = pytest.mark.parametrize("method", [LPG, LPL], ids=lambda method: method.name)


@pytest.mark.parametrize("counts", [COUNTS, WITH_ABSENT, [1, 1, 1, 1, 2], [10**6, 10, 10, 10, 10]])
@pytest.mark.parametrize("epsilon", [0.1, 0.7])
def test_frequency_strategy_equals_the_reference(counts, epsilon):
    signs, bounds = LPG("frequency", epsilon=epsilon).signs_and_bounds(make_statistics(counts))
    prior = [count / sum(counts) for count in counts]
    expected_signs, expected_bounds = reference.frequency_signs_and_bounds(prior, epsilon)
    assert signs.tolist() == expected_signs.tolist()
    assert_equal(bounds, expected_bounds, 1e-12)
    assert bounds.max().item() == pytest.approx(epsilon, abs=1e-12)


def test_frequency_strategy_amplifies_the_tail_dampens_the_head_and_leaves_absent_classes_alone():
    signs, bounds = LPG("frequency").signs_and_bounds(ClassStatistics(4, [1000, 0, 100, 1]))
    assert signs.tolist() == [-1, 0, -1, 1]
    assert bounds[1] == 0
    assert 0 < bounds[2] < bounds[0] < bounds[3]


@pytest.mark.parametrize(("num_classes", "count"), [(2, 1), (3, 7), (10, 33_333), (1000, 7), (100_000, 3)])
def test_frequency_strategy_does_exactly_nothing_for_a_balanced_prior(num_classes, count):
    for counts in ([count] * num_classes, [0] + [count] * (num_classes - 1)):
        signs, bounds = LPG("frequency").signs_and_bounds(ClassStatistics(num_classes, counts))
        assert (signs == 0).all()
        assert (bounds == 0).all()


def test_frequency_strategy_follows_the_running_prior_once_it_is_ready():
    statistics = make_statistics(waits_for_epoch=True)
    assert (delta_of(LPG("frequency"), make_batch(), statistics) == 0).all()
    statistics.end_epoch()
    signs, bounds = LPG("frequency").signs_and_bounds(statistics)
    prior = reference.running_prior(statistics.class_counts.tolist())
    expected_signs, expected_bounds = reference.frequency_signs_and_bounds(prior, 0.1)
    assert signs.tolist() == expected_signs.tolist()
    assert_equal(bounds, expected_bounds, 1e-12)


@pytest.mark.parametrize("counts", [COUNTS, WITH_ABSENT, None])
@pytest.mark.parametrize("epsilon", [0.1, 0.7])
def test_accuracy_strategy_equals_the_reference(counts, epsilon):
    statistics = make_statistics(counts)
    signs, bounds = LPG("accuracy", epsilon=epsilon).signs_and_bounds(statistics)
    expected_signs, expected_bounds = reference.accuracy_signs_and_bounds(
        statistics.prior.tolist(), statistics.accuracy.tolist(), epsilon
    )
    assert signs.tolist() == expected_signs.tolist()
    assert {-1, 1} <= set(signs.tolist())
    assert_equal(bounds, expected_bounds, 1e-12)


def test_accuracy_strategy_amplifies_classes_below_the_mean_and_starts_with_nothing():
    statistics = make_statistics()
    signs, _ = LPG("accuracy").signs_and_bounds(statistics)
    assert (signs[0], signs[4]) == (-1, 1)
    assert statistics.accuracy[0] > statistics.accuracy[4]
    assert (LPG("accuracy").signs_and_bounds(ClassStatistics(3))[1] == 0).all()


def test_fixed_strategy_takes_signs_and_bounds_as_given_and_epsilon_without_bounds():
    statistics = ClassStatistics(3)
    signs, bounds = LPG("fixed", signs=[1, 0, -1], bounds=[0.1, 0.2, 0.3]).signs_and_bounds(statistics)
    assert signs.tolist() == [1, 0, -1]
    assert_equal(bounds, [0.1, 0.2, 0.3], 1e-12)
    signs, bounds = LPG("fixed", epsilon=0.25, signs=[1, 0, -1]).signs_and_bounds(statistics)
    assert signs.tolist() == [1, 0, -1]
    assert bounds.tolist() == [0.25] * 3


@every_method
@pytest.mark.parametrize("options", [{}, {"strategy": "accuracy"}, {"strategy": "fixed", "signs": [1] * NUM_CLASSES}])
def test_the_first_warmup_steps_are_not_perturbed(method, options):
    method = method(**options, warmup_steps=2)
    for num_steps in (0, 1):
        assert (delta_of(method, make_batch(), make_statistics(COUNTS, num_steps)) == 0).all()
    assert delta_of(method, make_batch(), make_statistics(COUNTS, num_steps=2)).abs().max() > 0


# Arguments.


@every_method
def test_fixed_signs_for_another_number_of_classes_are_refused(method):
    with pytest.raises(ValueError, match=r"`signs` has 2 entries, but there are 3 classes\. Pass one per class"):
        method("fixed", signs=[1, -1]).setup(3)


@every_method
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "rare"}, r"`strategy` must be one of 'frequency', 'accuracy', 'fixed'; found 'rare'"),
        ({"epsilon": -0.1}, r"`epsilon` must be at least 0; found -0\.1"),
        ({"epsilon": -1.0}, r"`epsilon` must be at least 0; found -1\.0"),
        ({"epsilon": float("inf")}, r"`epsilon` must be finite; found inf"),
        ({"epsilon": float("nan")}, r"`epsilon` must be at least 0; found nan"),
        ({"warmup_steps": -1}, r"`warmup_steps` must be at least 0; found -1"),
        ({"strategy": "fixed"}, r"`signs` must be given, one per class, with strategy='fixed'; found None"),
        ({"strategy": "fixed", "signs": [1, 2]}, r"`signs` must be -1, 0 or 1 for each class; found \[1, 2\]"),
        (
            {"strategy": "fixed", "signs": [1, 1], "bounds": [0.1, -0.1]},
            r"`bounds` must be at least 0 for each class; found \[0\.1, -0\.1\]",
        ),
        (
            {"strategy": "fixed", "signs": [1, 1], "bounds": [0.1]},
            r"`bounds` must be as long as `signs`, 2 entries; found \[0\.1\]",
        ),
        (
            {"signs": [1, -1]},
            r"`signs` must be left out with strategy='frequency'; use strategy='fixed'; found \[1, -1\]",
        ),
        (
            {"strategy": "accuracy", "bounds": [0.1]},
            r"`bounds` must be left out with strategy='accuracy'; use strategy='fixed'; found \[0\.1\]",
        ),
    ],
)
def test_arguments_out_of_range_are_refused_with_name_value_and_range(method, options, message):
    with pytest.raises(ValueError, match=message):
        method(**options)


@every_method
@pytest.mark.parametrize(
    "options", [{"epsilon": 0, "warmup_steps": 0}, {"strategy": "fixed", "signs": [0], "bounds": [0]}]
)
def test_the_ends_of_the_ranges_are_accepted(method, options):
    made = method(**options)
    assert {name: getattr(made, name) for name in options} == options
