import copy
import inspect
import re

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lpg_hf.functional import logit_gradient
from lpg_hf.perturbations import (
    LPG,
    LPL,
    METHODS,
    SAM,
    ClassRelativeDampening,
    ClassWeighting,
    FocalLoss,
    GeneralizedCrossEntropy,
    GradientClipping,
    GradientNoise,
    LabelSmoothing,
    LogitAdjustment,
    LogitClipping,
    LogitNoise,
    LogitPerturbation,
    Rescaling,
    build_chain,
    parse_perturbation,
)
from lpg_hf.statistics import ClassStatistics


NUM_CLASSES = 5
COUNTS = [400, 90, 30, 11, 3]
WITH_ABSENT = [400, 0, 30, 0, 3]
IGNORED = -100
few_examples = settings(max_examples=50, deadline=None, derandomize=True)


def make_batch(num_samples=30, scale=2.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(NUM_CLASSES, (num_samples,), generator=generator)
    logits = scale * torch.randn(num_samples, NUM_CLASSES, dtype=torch.float64, generator=generator)
    labels[::9] = IGNORED
    return logits, labels


def make_statistics(class_counts=None, num_steps=6):
    """Statistics in float64 after some steps on batches whose labels the model often contradicts."""
    statistics = ClassStatistics(NUM_CLASSES, class_counts).double()
    for step in range(num_steps):
        logits, labels = make_batch(seed=100 + step)
        # Classes 0 to 2 are learned, more or less; class 4 is not.
        skill = torch.tensor([4.0, 3.0, 2.0, 1.0, -2.0]).double()
        logits[labels >= 0, labels[labels >= 0]] += skill[labels[labels >= 0]]
        statistics.update(logits, labels)
        statistics.fold()
    return statistics


def run(method, statistics, seed=0):
    """The delta of a method on a random batch, and the batch."""
    logits, labels = make_batch(seed=seed)
    gradient = logit_gradient(logits, labels)
    return method.delta(gradient, logits, labels, statistics), gradient, logits, labels


def assert_equal(actual, expected, tolerance):
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=0, atol=tolerance)


# LPG: strategies.


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
    statistics = make_statistics()
    statistics.prior_is_ready = False
    assert (run(LPG("frequency"), statistics)[0] == 0).all()
    statistics.prior_is_ready = True
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


@pytest.mark.parametrize(
    "method",
    [
        LPG("frequency", warmup_steps=2),
        LPG("accuracy", warmup_steps=2),
        LPG("fixed", signs=[1] * NUM_CLASSES, warmup_steps=2),
    ],
    ids=["frequency", "accuracy", "fixed"],
)
def test_the_first_warmup_steps_are_not_perturbed(method):
    for num_steps in (0, 1):
        assert (run(method, make_statistics(COUNTS, num_steps))[0] == 0).all()
    assert run(method, make_statistics(COUNTS, num_steps=2))[0].abs().max() > 0


@pytest.mark.parametrize("direction", ["class", "sample"])
@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("solver", ["closed_form", "pgd"])
@pytest.mark.parametrize("max_dampening", [0.2, 1.0])
def test_lpg_delta_equals_the_reference_for_every_option(direction, norm, solver, max_dampening):
    method = LPG(epsilon=0.6, max_dampening=max_dampening, direction=direction, norm=norm, solver=solver)
    delta, gradient, _, labels = run(method, make_statistics(COUNTS))
    signs, bounds = reference.frequency_signs_and_bounds([count / sum(COUNTS) for count in COUNTS], 0.6)
    expected = reference.lpg_delta(gradient.numpy(), labels.tolist(), signs, bounds, max_dampening, direction, norm)
    assert {-1, 1} <= set(signs)
    assert_equal(delta, expected, 1e-12 if solver == "closed_form" else 1e-6)


@pytest.mark.parametrize("options", [{}, {"epsilon": 2.0}], ids=["radius", "cap"])
def test_lpg_defaults(options):
    delta, gradient, _, labels = run(LPG(**options), make_statistics(COUNTS))
    prior = [count / sum(COUNTS) for count in COUNTS]
    signs, bounds = reference.frequency_signs_and_bounds(prior, options.get("epsilon", 0.1))
    expected = reference.lpg_delta(gradient.numpy(), labels.tolist(), signs, bounds, max_dampening=0.5)
    assert_equal(delta, expected, 1e-12)


def test_the_pgd_solver_iterates():
    gradient = torch.tensor([[-1e-14, 1e-14, 0, 0, 0]], dtype=torch.float64)
    method = LPG("fixed", signs=[1] * NUM_CLASSES, solver="pgd")
    # Doubled forty times it is still far from the radius of 0.1, where the closed form goes at once.
    delta = method.delta(gradient, gradient, torch.tensor([0]), ClassStatistics(NUM_CLASSES))
    assert_equal(delta / ((2.0**40 - 1) * 1e-14), [[-1, 1, 0, 0, 0]], 1e-9)


# Class-relative dampening.


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
    delta, gradient, logits, labels = run(method, statistics)
    expected = reference.dampening_weight(
        logits.numpy(),
        labels.tolist(),
        statistics.own_probability.tolist(),
        statistics.relative_confidence.tolist(),
        statistics.contradiction.tolist(),
        confident_error_share=statistics.confident_error_share.item(),
        **options,
    )
    weight = method.weight(logit_gradient(logits, labels), logits, labels, statistics)
    assert_equal(weight, expected, 1e-12)
    assert_equal(delta, reference.dampening_delta(gradient.numpy(), expected), 1e-12)
    assert expected.min() < 0.5 or options == {"power": 0.0}
    assert (expected.max() > 1) == options.get("compensated", False)


def test_where_errors_are_unsure_the_third_gate_leaves_everything_as_it_is():
    statistics = make_statistics()
    share = statistics.confident_error_share.item()
    assert 0 < share < 1 and run(ClassRelativeDampening(), statistics)[0].abs().max() > 0
    assert (run(ClassRelativeDampening(decided=(share + 1e-9, 1.0)), statistics)[0] == 0).all()


def test_the_power_rises_from_2_with_the_share_of_errors_that_are_decided():
    statistics = make_statistics()
    share = statistics.confident_error_share.item()
    for rising, power in (((share, 1.0), 2.0), ((0.0, share), 8.0), ((share / 2, 3 * share / 2), 5.0)):
        delta, *_ = run(ClassRelativeDampening(power=8.0, rising=rising), statistics)
        assert_equal(delta, run(ClassRelativeDampening(power=power), statistics)[0], 1e-12)


def test_class_relative_dampening_does_exactly_nothing_before_the_first_step():
    method, statistics = ClassRelativeDampening(), ClassStatistics(NUM_CLASSES)
    delta, _, logits, labels = run(method, statistics)
    assert (delta == 0).all()
    assert (method.weight(logit_gradient(logits, labels), logits, labels, statistics) == 1).all()


def test_class_relative_dampening_reads_the_model_and_scales_the_gradient_left_before():
    method, statistics = ClassRelativeDampening(), make_statistics()
    logits, labels = make_batch()
    gradient = torch.randn(len(labels), NUM_CLASSES, dtype=torch.float64)
    delta = method.delta(gradient, logits, labels, statistics)
    assert_equal(
        delta,
        (method.weight(logit_gradient(logits, labels), logits, labels, statistics) - 1)[:, None] * gradient,
        1e-15,
    )


# Logit adjustment and clipping.


@pytest.mark.parametrize("counts", [COUNTS, WITH_ABSENT, None])
@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0])
def test_logit_adjustment_equals_the_reference(counts, tau):
    statistics = make_statistics(counts)
    delta, _, logits, labels = run(LogitAdjustment(tau), statistics)
    prior = reference.running_prior(statistics.class_counts.tolist())
    if counts is not None:
        prior = [count / sum(counts) for count in counts]
    assert_equal(delta, reference.logit_adjustment_delta(logits.numpy(), labels.tolist(), prior, tau), 1e-12)
    assert_equal(delta[labels == IGNORED], 0, 0)


@pytest.mark.parametrize(
    ("counts", "min_imbalance", "acts"),
    [
        ([200, 100], 2.0, False),
        ([201, 100], 2.0, True),
        ([199, 100], 2.0, False),
        ([100, 100], 1.0, False),
        ([101, 100], 1.0, True),
        ([100, 0], 1.0, False),
        ([400, 0, 100], 4.0, False),
        ([401, 0, 100], 4.0, True),
    ],
)
def test_logit_adjustment_acts_only_above_min_imbalance_over_the_classes_present(counts, min_imbalance, acts):
    logits = torch.linspace(-1, 1, len(counts), dtype=torch.float64)[None]
    labels, statistics = torch.tensor([0]), ClassStatistics(len(counts), counts).double()
    method = LogitAdjustment(min_imbalance=min_imbalance)
    delta = method.delta(logit_gradient(logits, labels), logits, labels, statistics)
    prior = [count / sum(counts) for count in counts]
    expected = reference.logit_adjustment_delta(logits.numpy(), [0], prior) if acts else np.zeros((1, len(counts)))
    assert_equal(delta, expected, 1e-12)
    assert (delta != 0).any() == acts


@pytest.mark.parametrize("counts", [COUNTS, WITH_ABSENT])
@pytest.mark.parametrize(
    ("level", "learned", "share"), [(0.05, (0.1, 0.5), 1.0), (0.2, (0.1, 0.5), 0.75), (0.6, (0.1, 0.5), 0.0)]
)
def test_weights_give_way_as_the_classes_present_are_learned(counts, level, learned, share):
    statistics = make_statistics(counts)
    present = torch.tensor(counts) > 0
    spread = torch.linspace(-0.04, 0.04, int(present.sum()), dtype=torch.float64)
    # What is said of classes without rows does not count.
    statistics.own_probability[:] = 0.9
    statistics.own_probability[present] = level + spread
    method = LogitAdjustment(0.8, learned=learned)
    assert float(method.weight_share(statistics)) == pytest.approx(share, abs=1e-12)
    delta, _, logits, labels = run(method, statistics)
    prior = [count / sum(counts) for count in counts]
    expected = reference.logit_adjustment_delta(logits.numpy(), labels.tolist(), prior, 0.8, share)
    assert_equal(delta, expected, 1e-11)


def test_logit_adjustment_waits_for_a_running_prior_to_be_ready():
    statistics = make_statistics()
    statistics.prior_is_ready = False
    assert (run(LogitAdjustment(), statistics)[0] == 0).all()


@pytest.mark.parametrize("options", [{}, {"max_norm": 0.05}, {"max_norm": 2.0}])
def test_logit_clipping_equals_the_reference(options):
    delta, gradient, _, _ = run(LogitClipping(**options), ClassStatistics(NUM_CLASSES))
    assert_equal(delta, reference.clip_delta(gradient.numpy(), options.get("max_norm", 0.3)), 1e-12)


def test_clipping_acts_on_the_gradient_left_before():
    logits, labels = make_batch()
    gradient = 5 * logit_gradient(logits, labels)
    delta = LogitClipping(0.3).delta(gradient, logits, labels, ClassStatistics(NUM_CLASSES))
    assert_equal(delta, reference.clip_delta(gradient.numpy(), 0.3), 1e-12)


# Every method of the table.


#: One object of every method whose delta the tests below look at.
EXAMPLES = [
    LPG(
        "fixed",
        0.3,
        0.25,
        "sample",
        "linf",
        "pgd",
        3,
        signs=[1, 0, -1, 1, -1],
        bounds=[0.1, 0.2, 0.3, 0.4, 0.5],
        sync=True,
    ),
    ClassRelativeDampening(
        power=1.5,
        learned=(0.2, 0.6),
        contradicted=(0.01, 0.5),
        decided=(0.0, 0.4),
        rising=(0.1, 0.3),
        compensated=True,
    ),
    LogitAdjustment(tau=0.5, min_imbalance=3.0, learned=(0.1, 0.9)),
    LogitClipping(max_norm=0.7),
    LPL("fixed", 0.5, steps=3, warmup_steps=2, signs=[1, 0, -1, 1, -1], bounds=[0.1, 0.2, 0.3, 0.4, 0.5]),
    LogitNoise(sigma=0.3, seed=4),
    LabelSmoothing(alpha=0.3, target="prior"),
    ClassWeighting([0.5, 1.0, 2.0, 0.0, 3.0], beta=0.9),
    FocalLoss(gamma=1.5),
    GeneralizedCrossEntropy(q=0.4),
]
for example in EXAMPLES:
    example.setup(NUM_CLASSES)
#: More, so that every argument of every method is off its default in one of them.
REPRS = [
    *EXAMPLES,
    LogitClipping(quantile=0.9),
    SAM(rho=0.2, adaptive=True, interval=3),
    GradientClipping(max_norm=0.5),
    GradientClipping(max_value=0.5),
    GradientClipping(percentile=20),
    GradientNoise(eta=0.1, gamma=0.6, seed=5),
]
every_example = pytest.mark.parametrize("example", EXAMPLES, ids=lambda method: method.name)


def arguments(method):
    return {name: getattr(method, name) for name in inspect.signature(type(method)).parameters}


def test_every_argument_of_every_method_is_off_its_default_in_an_example():
    assert {method.name: type(method) for method in REPRS} == METHODS
    for name, method in METHODS.items():
        examples = [example for example in REPRS if example.name == name]
        for argument, parameter in inspect.signature(method).parameters.items():
            assert any(getattr(example, argument) != parameter.default for example in examples), f"{name}: {argument}"


@pytest.mark.parametrize("example", REPRS, ids=repr)
def test_a_method_is_read_back_from_its_repr(example):
    again = parse_perturbation(repr(example))
    assert type(again) is type(example)
    assert arguments(again) == arguments(example)
    assert repr(again) == repr(example)


@pytest.mark.parametrize("name", METHODS)
def test_a_bare_name_empty_brackets_and_blanks_mean_the_defaults(name):
    required = [p for p in inspect.signature(METHODS[name]).parameters.values() if p.default is p.empty]
    assert not required
    for text in (name, f"{name}()", f"  {name} ( ) "):
        method = parse_perturbation(text)
        assert type(method) is METHODS[name]
        assert arguments(method) == {p.name: p.default for p in inspect.signature(METHODS[name]).parameters.values()}
        assert repr(method) == f"{name}()"


def test_repr_shows_only_what_is_off_its_default():
    assert repr(LPG("accuracy", epsilon=0.1, warmup_steps=5)) == "lpg(strategy='accuracy', warmup_steps=5)"
    assert repr(LPG("frequency")) == "lpg()"


@few_examples
@given(
    epsilon=st.floats(0, 1e6),
    max_dampening=st.floats(0, 1, exclude_min=True),
    warmup_steps=st.integers(0, 10**9),
    signs=st.lists(st.sampled_from([-1, 0, 1]), min_size=1, max_size=4),
)
def test_any_numbers_survive_the_repr(epsilon, max_dampening, warmup_steps, signs):
    method = LPG("fixed", epsilon, max_dampening, warmup_steps=warmup_steps, signs=signs)
    assert arguments(parse_perturbation(repr(method))) == arguments(method)


@pytest.mark.parametrize(
    "method",
    [
        LPG(epsilon=np.float64(0.3)),
        LPG("fixed", signs=np.array([1, -1]), bounds=np.array([0.1, 0.2])),
        ClassRelativeDampening(learned=[0.2, 0.6]),
    ],
    ids=["scalar", "array", "list"],
)
def test_numpy_numbers_and_lists_survive_the_repr_too(method):
    assert arguments(parse_perturbation(repr(method))) == arguments(method)


@every_example
def test_a_method_gives_zero_to_ignored_samples_and_leaves_its_inputs_alone(example):
    logits, labels = make_batch()
    gradient, statistics = logit_gradient(logits, labels), make_statistics(COUNTS)
    before = [tensor.clone() for tensor in (gradient, logits, labels, *statistics.buffers())]
    delta = example.delta(gradient, logits, labels, statistics)
    assert (delta[labels == IGNORED] == 0).all()
    assert delta.abs().max() > 0
    after = [gradient, logits, labels, *statistics.buffers()]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))


@every_example
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_delta_has_the_shape_and_the_dtype_of_the_gradient(example, dtype):
    logits, labels = make_batch()
    logits = logits.to(dtype)
    gradient = logit_gradient(logits, labels)
    delta = example.delta(gradient, logits, labels, make_statistics(COUNTS).to(dtype))
    assert delta.shape == gradient.shape
    assert delta.dtype == dtype


@every_example
def test_rescaling_tells_whether_the_delta_is_a_multiple_of_the_gradient(example):
    delta, gradient, _, labels = run(example, make_statistics(COUNTS))
    delta, gradient = delta[labels >= 0], gradient[labels >= 0]
    share = (delta * gradient).sum(-1, keepdim=True) / gradient.square().sum(-1, keepdim=True)
    is_a_multiple = bool((delta - share * gradient).abs().max() < 1e-12)
    assert is_a_multiple == isinstance(example, Rescaling)


ADDED = [
    *(example for example in EXAMPLES if not isinstance(example, Rescaling)),
    LabelSmoothing(-0.2),
    LPG("accuracy"),
]


@pytest.mark.parametrize("counts", [COUNTS, WITH_ABSENT, None], ids=["counts", "absent", "counting"])
@pytest.mark.parametrize("is_first", [True, False], ids=["first", "later"])
@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "new"])
@pytest.mark.parametrize("method", ADDED, ids=repr)
def test_adding_a_delta_adds_that_delta_and_tells_its_norm(method, in_place, is_first, counts):
    logits, labels = make_batch()
    statistics = make_statistics(counts)
    statistics.share(statistics.batch(logits, labels))
    base = statistics.batch(logits, labels).gradient
    # What comes first gets the batch's own gradient, which nobody may change.
    gradient = base if is_first and not in_place else base * (1.0 if is_first else 0.7)
    before = gradient.clone()
    # A copy, as noise counts its draws.
    delta = copy.deepcopy(method).delta(gradient, logits, labels, statistics)
    expected = (before + delta) * (labels >= 0)[:, None]
    perturbed, norm = copy.deepcopy(method).add_delta(gradient, logits, labels, statistics, in_place)
    assert_equal(perturbed, expected, 1e-15)
    assert_equal(norm[labels >= 0], delta.norm(dim=-1)[labels >= 0], 1e-15)
    assert (perturbed is gradient) == in_place
    assert in_place or torch.equal(gradient, before)


@pytest.mark.parametrize("counts", [[99_990, 10, 0, 0, 0], [10**7, 1, 1, 1, 1], [3, 3, 3, 3, 3], [1, 0, 0, 0, 0]])
def test_the_norm_of_smoothing_towards_extreme_shares_in_float32(counts):
    logits, labels = make_batch()
    statistics = ClassStatistics(NUM_CLASSES, counts)
    gradient = torch.zeros_like(logits, dtype=torch.float32)
    _, norm = LabelSmoothing(0.3, target="prior").add_delta(gradient, logits.float(), labels, statistics)
    shares = np.array(counts) / sum(counts)
    exact = [0.3 * np.linalg.norm(np.eye(NUM_CLASSES)[label] - shares) for label in labels[labels >= 0]]
    np.testing.assert_allclose(norm[labels >= 0].numpy(), exact, rtol=1e-3, atol=1e-7)


def test_what_is_remembered_of_a_prior_follows_it_and_the_arguments():
    logits, labels = make_batch()
    methods = [LabelSmoothing(0.3, target="prior"), LogitAdjustment(0.5)]
    statistics = make_statistics(None)
    for step in range(4):
        for method in methods:
            fresh = parse_perturbation(repr(method))
            gradient = statistics.batch(logits, labels).gradient
            perturbed, norm = method.add_delta(gradient, logits, labels, statistics)
            delta = fresh.delta(gradient, logits, labels, statistics)
            assert_equal(perturbed, gradient + delta, 1e-15)
            assert_equal(norm[labels >= 0], delta.norm(dim=-1)[labels >= 0], 1e-15)
        if step == 1:
            methods[0].alpha, methods[1].tau = 0.6, 1.5
        statistics.update(logits, labels.clamp(max=1))
        statistics.fold()


@pytest.mark.parametrize("base", [LabelSmoothing, LogitAdjustment, LPG], ids=lambda base: base.name)
def test_a_delta_that_is_the_gradient_itself_leaves_it_alone(base):
    class Itself(base):
        def delta(self, gradient, logits, labels, statistics):
            return gradient

    logits, labels = make_batch()
    gradient = logit_gradient(logits, labels)
    before = gradient.clone()
    perturbed, _ = Itself().add_delta(gradient, logits, labels, make_statistics(COUNTS))
    assert torch.equal(gradient, before)
    assert torch.equal(perturbed, 2 * before)


@pytest.mark.parametrize("base", [LabelSmoothing, LogitAdjustment, LPG], ids=lambda base: base.name)
def test_a_delta_that_is_overridden_is_the_one_that_is_added(base):
    class Twice(base):
        def delta(self, gradient, logits, labels, statistics):
            return 2 * super().delta(gradient, logits, labels, statistics)

    class Named(Twice):
        name = "named"

    class Doubling:
        def delta(self, gradient, logits, labels, statistics):
            return 2 * super().delta(gradient, logits, labels, statistics)

    class Mixed(Doubling, base):
        pass

    statistics = make_statistics(COUNTS)
    delta, gradient, logits, labels = run(base(), statistics)
    for method in (Twice(), Named(), Mixed()):
        perturbed, norm = method.add_delta(gradient, logits, labels, statistics)
        assert_equal(perturbed, gradient + 2 * delta, 1e-15)
        assert_equal(norm[labels >= 0], 2 * delta.norm(dim=-1)[labels >= 0], 1e-15)


# Chains.


def reprs(*args, **options):
    chain = build_chain(*args, **options)
    assert isinstance(chain, list)
    assert all(isinstance(method, LogitPerturbation) for method in chain)
    return [repr(method) for method in chain]


AUTO_DAMPENING = (
    "class_relative_dampening(power=8.0, learned=(0.05, 0.3), contradicted=(0.01, 0.03), decided=(0.1, 0.13), "
    "compensated=True)"
)
BALANCED_CHAIN = [
    "label_smoothing()",
    AUTO_DAMPENING.replace("compensated", "rising=(0.5, 0.8), compensated"),
]
IMBALANCED_CHAIN = [
    "logit_adjustment(min_imbalance=2.0, learned=(0.05, 0.2))",
    "label_smoothing(target='prior')",
    AUTO_DAMPENING,
]


@pytest.mark.parametrize(
    ("class_counts", "expected"),
    [
        ([50, 50, 50], BALANCED_CHAIN),
        ([100, 50], BALANCED_CHAIN),
        ([100, 0, 50], BALANCED_CHAIN),
        ([101, 50], IMBALANCED_CHAIN),
        ([101, 0, 50], IMBALANCED_CHAIN),
        (torch.tensor([900, 100]), IMBALANCED_CHAIN),
        (np.array([100, 100]), BALANCED_CHAIN),
        (None, IMBALANCED_CHAIN),
    ],
)
def test_auto_adjusts_logits_where_classes_are_imbalanced_or_unknown(class_counts, expected):
    assert reprs("auto", class_counts) == expected
    assert reprs(["auto"], class_counts=class_counts) == expected


def test_auto_for_unknown_counts_adjusts_only_when_the_running_prior_is_imbalanced():
    adjustment, *_ = build_chain("auto")
    statistics = ClassStatistics(NUM_CLASSES).double()
    labels = torch.arange(NUM_CLASSES).repeat(100)
    statistics.update(torch.zeros(len(labels), NUM_CLASSES), labels)
    statistics.fold()
    assert (run(adjustment, statistics)[0] == 0).all()
    labels.fill_(2)
    statistics.update(torch.zeros(len(labels), NUM_CLASSES), labels)
    statistics.fold()
    assert run(adjustment, statistics)[0].abs().max() > 0.01


@pytest.mark.parametrize("nothing", ["none", ["none"], ("none",), [], ()])
def test_none_and_an_empty_sequence_are_an_empty_chain(nothing):
    assert reprs(nothing) == []


def test_strings_and_objects_keep_their_order_and_objects_their_identity():
    clipping = LogitClipping(0.5)
    chain = build_chain(["lpg(epsilon=0.3)", clipping, "logit_adjustment"])
    assert [repr(method) for method in chain] == [
        "lpg(epsilon=0.3)",
        "logit_clipping(max_norm=0.5)",
        "logit_adjustment()",
    ]
    assert chain[1] is clipping


def test_a_single_string_or_object_is_a_chain_of_one():
    clipping = LogitClipping()
    assert build_chain(clipping)[0] is clipping
    assert reprs(clipping) == reprs("logit_clipping") == ["logit_clipping()"]


def test_auto_expands_inside_a_longer_chain():
    chain = ["logit_clipping", "auto", LPG()]
    assert reprs(chain, [900, 100]) == ["logit_clipping()", *IMBALANCED_CHAIN, "lpg()"]
    assert reprs(chain, [100, 100]) == ["logit_clipping()", *BALANCED_CHAIN, "lpg()"]


@pytest.mark.parametrize(
    ("beside", "added", "added_to_balanced"),
    [
        # Corrected by another method, the prior is what to smooth towards, however small the imbalance.
        ("logit_adjustment()", IMBALANCED_CHAIN[1:], [IMBALANCED_CHAIN[1], BALANCED_CHAIN[1]]),
        ("class_weighting()", IMBALANCED_CHAIN[1:], [IMBALANCED_CHAIN[1], BALANCED_CHAIN[1]]),
        # Its own adjustment and a uniform target do not go together.
        (
            "label_smoothing(alpha=0.3)",
            [
                IMBALANCED_CHAIN[0],
                "label_smoothing(alpha=-0.3)",
                "label_smoothing(alpha=0.3, target='prior')",
                *IMBALANCED_CHAIN[1:],
            ],
            BALANCED_CHAIN,
        ),
        ("label_smoothing(target='prior')", IMBALANCED_CHAIN, BALANCED_CHAIN),
        ("class_relative_dampening()", IMBALANCED_CHAIN[:2], BALANCED_CHAIN[:1]),
        ("focal_loss()", IMBALANCED_CHAIN, BALANCED_CHAIN),
    ],
)
def test_auto_adds_what_the_rest_of_the_chain_leaves_to_it(beside, added, added_to_balanced):
    assert reprs([beside, "auto"], [900, 100]) == [beside, *added]
    assert reprs(["auto", beside], [900, 100]) == [*added, beside]
    assert reprs([beside, "auto"], [110, 100]) == [beside, *added_to_balanced]


@pytest.mark.parametrize("entry", [3, None, 0.5, LPG])
def test_entries_that_are_no_methods_are_refused(entry):
    message = f"`perturbations` takes methods .*strings .*found {re.escape(repr(entry))}"
    with pytest.raises(TypeError, match=message):
        build_chain(["lpg", entry])


# Errors.


@pytest.mark.parametrize("text", ["sma", "LPG", "lpgg(epsilon=0.1)", "print", "print('x')", "eval('1')", "auto()"])
def test_unknown_names_are_refused_with_the_known_ones(text):
    name = text.partition("(")[0]
    known = ", ".join(["auto", "none", *sorted(METHODS)])
    with pytest.raises(ValueError, match=f"Unknown perturbation '{name}': the known ones are {known}"):
        build_chain(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "   ",
        "lpg(",
        "lpg)",
        "lpg lpg",
        "lpg; lpg",
        "lpg, lpg",
        "lpg.delta",
        "lpg()()",
        "[lpg]",
        "3",
        "lpg = 3",
        "lpg(epsilon=epsilon)",
        "lpg(epsilon=0.1 if True else 0.2)",
        "lpg(epsilon=2 * 0.1)",
        "lpg(*['frequency'])",
        "lpg({[]: 1})",
    ],
)
def test_text_that_cannot_be_read_is_refused_with_an_example(text):
    message = f"Cannot read the perturbation {re.escape(repr(text))}: write a name, or a call with literal arguments"
    with pytest.raises(ValueError, match=message):
        parse_perturbation(text)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('{command}')",
        "lpg(epsilon=__import__('os').system('{command}'))",
        "lpg(__import__('os').system('{command}'))",
        "lpg(signs=[__import__('os').system('{command}')])",
        "lpg(**__import__('os').system('{command}'))",
        "(lambda: __import__('os').system('{command}'))()",
        "lpg(epsilon=(lambda: __import__('os').system('{command}'))())",
        "[__import__('os').system('{command}') for _ in [1]]",
        'lpg(strategy=f\'{{__import__("os").system("{command}")}}\')',
        "exec(\"__import__('os').system('{command}')\")",
    ],
)
def test_nothing_in_a_string_is_evaluated(text, tmp_path):
    trace = tmp_path / "trace"
    with pytest.raises(ValueError, match="perturbation"):
        build_chain([text.format(command=f"touch {trace}")])
    assert not trace.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "lpg(nope=1)",
            r"Cannot build the perturbation 'lpg\(nope=1\)': .*'nope'. Its arguments: strategy, epsilon,",
        ),
        ("logit_adjustment(1, 2, (0.1, 0.2), 4)", r"Cannot build the perturbation 'logit_adjustment.*positional"),
        ("lpg('frequency', strategy='fixed')", r"Cannot build the perturbation .*multiple values .*'strategy'"),
        ("lpg(epsilon='large')", r"Cannot build the perturbation \"lpg\(epsilon='large'\)\": .*'str'"),
        ("lpg(epsilon=-1)", r"`epsilon` must be at least 0; found -1"),
    ],
)
def test_arguments_that_are_not_the_methods_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_perturbation(text)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (LPG, {"strategy": "rare"}, r"`strategy` must be one of 'frequency', 'accuracy', 'fixed'; found 'rare'"),
        (LPG, {"epsilon": -0.1}, r"`epsilon` must be at least 0; found -0.1"),
        (LPG, {"epsilon": float("inf")}, r"`epsilon` must be finite; found inf"),
        (LPG, {"epsilon": float("nan")}, r"`epsilon` must be at least 0; found nan"),
        (LPG, {"max_dampening": 0.0}, r"`max_dampening` must be in \(0, 1\]; found 0.0"),
        (LPG, {"max_dampening": 1.1}, r"`max_dampening` must be in \(0, 1\]; found 1.1"),
        (LPG, {"direction": "row"}, r"`direction` must be one of 'class', 'sample'; found 'row'"),
        (LPG, {"norm": "l1"}, r"`norm` must be one of 'l2', 'linf'; found 'l1'"),
        (LPG, {"solver": "sgd"}, r"`solver` must be one of 'closed_form', 'pgd'; found 'sgd'"),
        (LPG, {"warmup_steps": -1}, r"`warmup_steps` must be at least 0; found -1"),
        (LPG, {"strategy": "fixed"}, r"`signs` must be given, one per class, with strategy='fixed'; found None"),
        (LPG, {"strategy": "fixed", "signs": [1, 2]}, r"`signs` must be -1, 0 or 1 for each class; found \[1, 2\]"),
        (
            LPG,
            {"strategy": "fixed", "signs": [1, 1], "bounds": [0.1, -0.1]},
            r"`bounds` must be at least 0 for each class; found \[0.1, -0.1\]",
        ),
        (
            LPG,
            {"strategy": "fixed", "signs": [1, 1], "bounds": [0.1]},
            r"`bounds` must be as long as `signs`, 2 entries; found \[0.1\]",
        ),
        (
            LPG,
            {"signs": [1, -1]},
            r"`signs` must be left out with strategy='frequency'; use strategy='fixed'; found \[1, -1\]",
        ),
        (
            LPG,
            {"strategy": "accuracy", "bounds": [0.1]},
            r"`bounds` must be left out with strategy='accuracy'; use strategy='fixed'; found \[0.1\]",
        ),
        (ClassRelativeDampening, {"power": -1.0}, r"`power` must be at least 0; found -1.0"),
        (
            ClassRelativeDampening,
            {"learned": (0.5, 0.1)},
            r"`learned` must be two increasing numbers in \[0, 1\]; found \(0.5, 0.1\)",
        ),
        (ClassRelativeDampening, {"learned": (0.5, 0.5)}, r"`learned` must be two increasing .*found \(0.5, 0.5\)"),
        (ClassRelativeDampening, {"learned": (-0.1, 0.5)}, r"`learned` must be two increasing .*found \(-0.1, 0.5\)"),
        (
            ClassRelativeDampening,
            {"contradicted": (0.1, 1.1)},
            r"`contradicted` must be two increasing numbers in \[0, 1\]; found \(0.1, 1.1\)",
        ),
        (ClassRelativeDampening, {"decided": (0.2, 0.1)}, r"`decided` must be two increasing .*found \(0.2, 0.1\)"),
        (ClassRelativeDampening, {"rising": (0.2, 0.1)}, r"`rising` must be two increasing .*found \(0.2, 0.1\)"),
        (LabelSmoothing, {"target": "unigram"}, r"`target` must be one of .*found 'unigram'"),
        (ClassRelativeDampening, {"contradicted": (0.1,)}, r"`contradicted` must be two increasing .*found \(0.1,\)"),
        (LogitAdjustment, {"tau": -0.5}, r"`tau` must be from 0 to 4; found -0.5"),
        (LogitAdjustment, {"tau": 6.0}, r"`tau` must be from 0 to 4; found 6.0"),
        (LogitAdjustment, {"learned": (0.3, 0.3)}, r"`learned` must be two increasing .*found \(0.3, 0.3\)"),
        (LogitAdjustment, {"min_imbalance": 0.9}, r"`min_imbalance` must be at least 1; found 0.9"),
        (LogitClipping, {"max_norm": 0.0}, r"`max_norm` must be positive; found 0.0"),
        (LogitClipping, {"max_norm": -1.0}, r"`max_norm` must be positive; found -1.0"),
    ],
)
def test_arguments_out_of_range_are_refused_with_name_value_and_range(method, options, message):
    with pytest.raises(ValueError, match=message):
        method(**options)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (LPG, {"epsilon": 0, "max_dampening": 1, "warmup_steps": 0}),
        (LPG, {"strategy": "fixed", "signs": [0], "bounds": [0]}),
        (ClassRelativeDampening, {"power": 0, "learned": (0, 1), "contradicted": (0, 1)}),
        (LogitAdjustment, {"tau": 0, "min_imbalance": 1}),
    ],
)
def test_the_ends_of_the_ranges_are_accepted(method, options):
    assert {name: arguments(method(**options))[name] for name in options} == options


def test_fixed_signs_for_another_number_of_classes_are_refused():
    method = LPG("fixed", signs=[1, -1])
    with pytest.raises(ValueError, match=r"`signs` has 2 entries, but there are 3 classes: pass one per class"):
        method.setup(3)
