"""LPG: the formula against the reference, what its deltas must satisfy, and the method."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import reference
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from logit_batches import (
    COUNTS,
    NUM_CLASSES,
    DrawnBatch,
    LargestTensor,
    assert_equal,
    assert_rows_close,
    assert_zero_sum_within,
    delta_of,
    drawn_batches,
    every_dtype,
    few_examples,
    make_batch,
    make_statistics,
    more_examples,
    positive,
    random_batch,
    valid_batches,
)
from torch.nn import functional as F

from lpg_hf.batch import IGNORE_INDEX, LogitBatch, logit_gradient
from lpg_hf.perturbations import LPG
from lpg_hf.perturbations.lpg import lpg_delta
from lpg_hf.statistics import ClassStatistics


NORMS = ["l2", "linf"]
DIRECTIONS = ["class", "sample"]
SOLVERS = ["closed_form", "pgd"]

every_norm = pytest.mark.parametrize("norm", NORMS)
every_direction = pytest.mark.parametrize("direction", DIRECTIONS)
every_solver = pytest.mark.parametrize("solver", SOLVERS)
every_sign = pytest.mark.parametrize("sign", [1.0, -1.0])


def squared_norm(gradient):
    return gradient.square().sum()


# Against the reference.


@every_norm
@every_direction
@pytest.mark.parametrize("max_dampening", [0.3, 1.0])
@few_examples
@given(batch=drawn_batches())
def test_lpg_delta_equals_the_reference(norm, direction, max_dampening, batch):
    options = {"norm": norm, "direction": direction, "max_dampening": max_dampening}
    expected = reference.lpg_delta(
        batch.gradient.numpy(), batch.labels.tolist(), batch.signs.tolist(), batch.bounds.tolist(), **options
    )
    assert_equal(batch.lpg_delta(**options), expected, 1e-12)


@every_norm
@every_direction
@pytest.mark.parametrize("num_classes", [2, 3, 6, 11])
def test_lpg_delta_equals_the_reference_for_gradients_that_do_not_sum_to_zero(norm, direction, num_classes):
    batch = random_batch(num_classes=num_classes, seed=num_classes)
    gradient = torch.randn(batch.logits.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    delta = lpg_delta(gradient, batch.labels, batch.signs, batch.bounds, 0.7, direction, norm)
    expected = reference.lpg_delta(
        gradient.numpy(), batch.labels.tolist(), batch.signs.tolist(), batch.bounds.tolist(), 0.7, direction, norm
    )
    assert_equal(delta, expected, 1e-12)


@every_norm
@every_direction
@pytest.mark.parametrize("seed", range(5))
def test_float32_lpg_delta_equals_the_reference(norm, direction, seed):
    batch = random_batch(seed=seed)
    gradient = batch.gradient.float()
    delta = lpg_delta(gradient, batch.labels, batch.signs.float(), batch.bounds.float(), 0.5, direction, norm)
    expected = reference.lpg_delta(
        gradient.numpy(),
        batch.labels.tolist(),
        batch.signs.tolist(),
        batch.bounds.float().tolist(),
        0.5,
        direction,
        norm,
    )
    assert delta.dtype == torch.float32
    assert_rows_close(delta, expected, 1e-5)


def test_defaults_are_class_direction_l2_closed_form_without_cap():
    batch = random_batch()
    explicit = {"max_dampening": 1.0, "direction": "class", "norm": "l2", "solver": "closed_form"}
    assert torch.equal(batch.lpg_delta(), batch.lpg_delta(**explicit))


def test_default_pgd_takes_forty_steps_of_size_one():
    batch = random_batch()
    batch.signs.fill_(1)
    tiny = 1e-14 * batch.gradient  # too small to reach the bound
    delta = lpg_delta(tiny, batch.labels, batch.signs, batch.bounds, solver="pgd")
    for _, rows in batch.members():
        assert_equal(delta[rows][0] / ((2.0**40 - 1) * tiny[rows].mean(0)), torch.ones(5), 1e-9)


# What the delta must satisfy.


@every_norm
@every_direction
@every_solver
@few_examples
@given(batch=drawn_batches())
def test_delta_stays_in_the_ball_of_its_class(norm, direction, solver, batch):
    delta = batch.lpg_delta(norm=norm, direction=direction, solver=solver, pgd_steps=2)
    length = delta.norm(dim=-1) if norm == "l2" else delta.abs().max(-1).values
    for c, rows in batch.members():
        bound = batch.bounds[c] * batch.signs[c].abs()
        assert (length[rows] <= bound * (1 + 1e-12)).all()


@every_norm
@every_direction
@every_solver
@few_examples
@given(batch=drawn_batches())
def test_delta_sums_to_zero(norm, direction, solver, batch):
    delta = batch.lpg_delta(norm=norm, direction=direction, solver=solver, pgd_steps=2)
    assert_equal(delta.sum(-1), torch.zeros(len(delta)), 1e-12)


@few_examples
@given(drawn_batches())
def test_all_samples_of_a_class_get_the_same_delta_in_class_direction(batch):
    for norm in NORMS:
        delta = batch.lpg_delta(norm=norm)
        for _, rows in batch.members():
            assert (delta[rows] == delta[rows][0]).all()


@few_examples
@given(drawn_batches(signs=(1.0,)))
def test_amplifying_raises_the_squared_norms_by_exactly_the_closed_form(batch):
    gradient, delta = batch.gradient, batch.lpg_delta()
    for c, rows in batch.members():
        n, bound, length = rows.sum(), batch.bounds[c], gradient[rows].mean(0).norm()
        gain = squared_norm(gradient[rows] + delta[rows]) - squared_norm(gradient[rows])
        assert_equal(gain, n * (2 * bound * length + bound**2), 1e-10)


@few_examples
@given(drawn_batches(signs=(-1.0,)))
def test_dampening_lowers_the_squared_norms_by_exactly_the_closed_form_and_never_overshoots(batch):
    gradient, delta = batch.gradient, batch.lpg_delta()
    for c, rows in batch.members():
        n, bound, mean = rows.sum(), batch.bounds[c], gradient[rows].mean(0)
        change = squared_norm(gradient[rows] + delta[rows]) - squared_norm(gradient[rows])
        assert_equal(change, n * ((mean.norm() - bound).clamp(min=0) ** 2 - mean.norm() ** 2), 1e-10)
        assert (mean + delta[rows][0]) @ mean >= -1e-12
        if bound >= mean.norm():
            assert_equal((gradient[rows] + delta[rows]).mean(0), torch.zeros_like(mean), 1e-12)


@every_norm
@every_direction
@pytest.mark.parametrize("max_dampening", [0.4, 1.0])
@few_examples
@given(batch=drawn_batches())
def test_amplifying_never_lowers_and_dampening_never_raises_the_mean_squared_norm(
    norm, direction, max_dampening, batch
):
    gradient = batch.gradient
    perturbed = gradient + batch.lpg_delta(norm=norm, direction=direction, max_dampening=max_dampening)
    for c, rows in batch.members():
        gain = (squared_norm(perturbed[rows]) - squared_norm(gradient[rows])) * batch.signs[c]
        assert gain >= -1e-12


@few_examples
@given(drawn_batches())
def test_perturbed_gradient_descends_the_loss_in_logit_space(batch):
    gradient = batch.gradient
    perturbed = gradient + batch.lpg_delta()
    for c, rows in batch.members():
        own = squared_norm(gradient[rows])
        product = (gradient[rows] * perturbed[rows]).sum()
        if batch.signs[c] >= 0:
            assert product >= own - 1e-10
        else:
            mean = gradient[rows].mean(0)
            kappa = (batch.bounds[c] / mean.norm()).clamp(max=1)
            assert_equal(product, own - kappa * rows.sum() * squared_norm(mean), 1e-10)


@every_norm
@every_sign
@pytest.mark.parametrize("max_dampening", [0.5, 1.0])
@pytest.mark.parametrize("bound", [0.05, 0.3, 1.0])
def test_no_random_feasible_point_beats_the_closed_form(norm, sign, max_dampening, bound):
    num_classes = 6
    gradient = random_batch(num_samples=7, num_classes=num_classes, seed=5).gradient[1:]
    signs, bounds = (
        torch.full((num_classes,), sign, dtype=torch.float64),
        torch.full((num_classes,), bound, dtype=torch.float64),
    )
    labels = torch.zeros(len(gradient), dtype=torch.int64)
    best = lpg_delta(gradient, labels, signs, bounds, max_dampening, norm=norm)[0]

    points = np.random.default_rng(0).normal(size=(4000, num_classes))
    points -= points.mean(-1, keepdims=True)
    length = np.linalg.norm(points, axis=-1) if norm == "l2" else np.abs(points).max(-1)
    radius = bound * np.random.default_rng(1).uniform(size=(4000, 1)) ** 0.2
    points = torch.from_numpy(points / length[:, None] * radius)
    # Points next to the solution, too: the ball is convex.
    points = torch.cat([points, 0.99 * best + 0.01 * points, 0.9999 * best + 0.0001 * points])

    goal = gradient.mean(0) * (1.0 if sign > 0 else max_dampening)
    value, best_value = (goal + points).square().sum(-1), (goal + best).square().sum()
    assert (sign * (value - best_value) <= 1e-10).all()


@pytest.mark.parametrize("num_classes", [2, 3, 4, 5, 6])
def test_zero_sum_linf_amplification_reaches_the_best_vertex_of_the_box(num_classes):
    bound = 0.3
    for seed in range(5):
        gradient = random_batch(num_samples=3, num_classes=num_classes, seed=seed).gradient[1:2]
        bounds = torch.full((num_classes,), bound, dtype=torch.float64)
        delta = lpg_delta(gradient, torch.tensor([0]), torch.ones(num_classes), bounds, norm="linf")
        vertices = [np.array(v) * bound for v in itertools.product([-1, 0, 1], repeat=num_classes) if sum(v) == 0]
        best = max(np.square(gradient.numpy()[0] + vertex).sum() for vertex in vertices)
        assert_equal(squared_norm(gradient + delta), best, 1e-12)


@pytest.mark.parametrize("norm", NORMS)
def test_plain_linf_amplification_would_be_constant_for_hard_labels_and_the_zero_sum_form_is_not(norm):
    batch = random_batch(num_samples=60)
    gradient = batch.gradient[batch.labels == 0]
    assert len(gradient) > 5
    # Exactly one negative entry, that of the label: `bound sign(g)` is `bound (1 - 2 e_c)` for every sample.
    assert torch.equal(gradient.sign(), (1 - 2 * F.one_hot(torch.tensor(0), 5)).double().expand_as(gradient))
    labels = torch.zeros(len(gradient), dtype=torch.int64)
    delta = lpg_delta(gradient, labels, torch.ones(5), torch.full((5,), 0.1), direction="sample", norm=norm)
    assert (delta - delta[0]).abs().max() > 0.05


@few_examples
@given(batch=drawn_batches(signs=(-1.0,)), max_dampening=st.floats(0.05, 1.0))
def test_dampening_is_cross_entropy_with_the_class_mean_as_soft_target(batch, max_dampening):
    batch.bounds.fill_(2.0)
    probabilities = torch.from_numpy(reference.softmax(batch.logits.numpy()))
    perturbed = batch.gradient + batch.lpg_delta(max_dampening=max_dampening)
    for c, rows in batch.members():
        own = F.one_hot(torch.tensor(c), batch.num_classes).double()
        target = (1 - max_dampening) * own + max_dampening * probabilities[rows].mean(0)
        assert_equal(perturbed[rows], probabilities[rows] - target, 1e-14)


@few_examples
@given(drawn_batches(signs=(1.0,)))
def test_amplification_lies_within_45_degrees_of_negative_label_smoothing(batch):
    num_classes = batch.num_classes
    delta = batch.lpg_delta()
    for c, rows in batch.members():
        if batch.bounds[c] == 0:
            continue
        centered = torch.full((num_classes,), -1 / num_classes, dtype=torch.float64)
        centered[c] += 1
        cosine = F.cosine_similarity(-delta[rows][0], centered, dim=0)
        assert math.sqrt(num_classes / (2 * (num_classes - 1))) - 1e-10 <= cosine <= 1 + 1e-10


@few_examples
@given(drawn_batches(max_classes=2, signs=(-1.0, 1.0)))
def test_two_classes_amplified_or_dampened_without_truncation_are_label_smoothing(batch):
    gradient, delta = batch.gradient, batch.lpg_delta()
    for c, rows in batch.members():
        bound = batch.bounds[c]
        if batch.signs[c] > 0 or bound <= gradient[rows].mean(0).norm():
            alpha = -batch.signs[c] * bound / math.sqrt(1 / 2)
            smoothing = alpha * (F.one_hot(torch.tensor(c), 2).double() - 1 / 2)
            assert_equal(delta[rows], smoothing.expand(int(rows.sum()), 2), 1e-12)


@every_norm
@every_direction
@few_examples
@given(batch=drawn_batches(), seed=st.integers(0, 1000))
def test_permuting_the_batch_permutes_the_delta(norm, direction, batch, seed):
    order = torch.randperm(len(batch.labels), generator=torch.Generator().manual_seed(seed))
    permuted = dataclasses.replace(batch, logits=batch.logits[order], labels=batch.labels[order])
    options = {"norm": norm, "direction": direction}
    assert_equal(permuted.lpg_delta(**options), batch.lpg_delta(**options)[order], 1e-12)


@every_norm
@every_direction
@few_examples
@given(batch=drawn_batches(), seed=st.integers(0, 1000))
def test_renaming_the_classes_renames_the_columns_of_the_delta(norm, direction, batch, seed):
    old_name = torch.randperm(batch.num_classes, generator=torch.Generator().manual_seed(seed))
    valid = batch.labels >= 0
    renamed = DrawnBatch(
        logits=batch.logits[:, old_name],
        labels=torch.where(valid, old_name.argsort()[batch.labels.clamp(min=0)], IGNORE_INDEX),
        signs=batch.signs[old_name],
        bounds=batch.bounds[old_name],
    )
    options = {"norm": norm, "direction": direction}
    assert_equal(renamed.lpg_delta(**options), batch.lpg_delta(**options)[:, old_name], 1e-12)


@every_norm
@every_direction
@few_examples
@given(batch=drawn_batches())
def test_signs_and_bounds_of_absent_classes_change_nothing(norm, direction, batch):
    present = torch.zeros(batch.num_classes, dtype=torch.bool)
    present[[c for c, _ in batch.members()]] = True
    other = dataclasses.replace(
        batch,
        signs=torch.where(present, batch.signs, -1.0),
        bounds=torch.where(present, batch.bounds, 1e9),
    )
    options = {"norm": norm, "direction": direction}
    assert torch.equal(other.lpg_delta(**options), batch.lpg_delta(**options))


@every_direction
@few_examples
@given(batch=drawn_batches())
def test_classes_without_probability_add_only_columns_of_zeros(direction, batch):
    wider = DrawnBatch(
        logits=F.pad(batch.logits, (0, 2), value=-1e9),
        labels=batch.labels,
        signs=F.pad(batch.signs, (0, 2), value=1.0),
        bounds=F.pad(batch.bounds, (0, 2), value=0.5),
    )
    expected = F.pad(batch.lpg_delta(direction=direction), (0, 2))
    assert_equal(wider.lpg_delta(direction=direction), expected, 1e-12)


@every_norm
@every_direction
@every_solver
def test_ignored_samples_get_no_delta_and_have_no_influence(norm, direction, solver):
    batch = random_batch(num_samples=20)
    options = {"norm": norm, "direction": direction, "solver": solver, "pgd_steps": 5}
    valid = batch.labels >= 0
    alone = dataclasses.replace(batch, logits=batch.logits[valid], labels=batch.labels[valid])
    # Whatever gradient ignored samples bring along.
    gradient = torch.where(valid[:, None], batch.gradient, 7.0)
    delta = lpg_delta(gradient, batch.labels, batch.signs, batch.bounds, **options)
    assert (~valid).sum() == 3
    assert (delta[~valid] == 0).all()
    assert_equal(delta[valid], alone.lpg_delta(**options), 1e-15)


@every_norm
@every_direction
@every_solver
def test_sign_zero_and_bound_zero_leave_a_class_alone(norm, direction, solver):
    batch = random_batch()
    batch.signs[0], batch.bounds[1] = 0, 0
    delta = batch.lpg_delta(norm=norm, direction=direction, solver=solver, pgd_steps=5)
    untouched = batch.labels < 2
    # The bisection of projected gradient in l_inf leaves 2^-64 of the bound.
    assert_equal(delta[untouched], 0, 1e-18 if (norm, solver) == ("linf", "pgd") else 0)
    assert (delta[~untouched].abs().sum(-1) > 0).all()


def test_a_class_of_one_sample_is_rescaled_or_soft_thresholded():
    gradient = random_batch().gradient[1:4]
    length, bound = gradient.norm(dim=-1, keepdim=True), 0.5
    labels, bounds = torch.tensor([0, 1, 2]), torch.full((5,), bound, dtype=torch.float64)
    amplified = gradient + lpg_delta(gradient, labels, torch.ones(5).double(), bounds)
    assert_equal(amplified, (1 + bound / length) * gradient, 1e-12)
    dampened = gradient + lpg_delta(gradient, labels, -torch.ones(5).double(), bounds)
    assert_equal(dampened, (1 - bound / length).clamp(min=0) * gradient, 1e-12)
    assert_equal(
        lpg_delta(gradient, labels, -torch.ones(5).double(), bounds, direction="sample"), dampened - gradient, 1e-12
    )


@every_norm
@every_direction
@every_solver
@every_dtype
@every_sign
def test_a_gradient_without_direction_gets_a_delta_of_zero(norm, direction, solver, dtype, sign):
    labels, signs, bounds = torch.tensor([0, 0, 1]), torch.full((3,), sign), torch.full((3,), 0.3)
    options = {"norm": norm, "direction": direction, "solver": solver, "pgd_steps": 5}
    threshold = torch.finfo(dtype).eps
    shortest = torch.tensor([[1.0, -1.0, 0.0]], dtype=dtype) / math.sqrt(2) * threshold
    for gradient in (torch.zeros(3, 3, dtype=dtype), (0.9 * shortest).expand(3, 3)):
        assert (lpg_delta(gradient, labels, signs, bounds, **options) == 0).all()
    assert (lpg_delta((1.1 * shortest).expand(3, 3), labels, signs, bounds, **options) != 0).any()


@every_norm
@every_solver
def test_opposite_gradients_of_a_class_cancel_to_a_delta_of_zero(norm, solver):
    gradient = torch.tensor([[0.5, -0.5, 0.0], [-0.5, 0.5, 0.0]])
    delta = lpg_delta(gradient, torch.tensor([1, 1]), torch.ones(3), torch.ones(3), norm=norm, solver=solver)
    assert (delta == 0).all()


@every_norm
@every_direction
@pytest.mark.parametrize("half_precision", [False, True])
@pytest.mark.parametrize("margin", [20.0, 35.0, 50.0, 80.0])
def test_saturated_float32_logits_give_finite_zero_sum_deltas_in_the_cone_or_zero(
    norm, direction, half_precision, margin
):
    num_classes, bound = 6, 0.1
    labels = torch.arange(num_classes).repeat(2)
    logits = torch.randn(12, num_classes, generator=torch.Generator().manual_seed(0))
    logits += margin * F.one_hot(labels, num_classes)
    if half_precision:
        logits = logits.bfloat16().float()
    gradient = logit_gradient(logits, labels)
    assert (gradient != 0).all()
    # The threshold would cut all of them; scaled up they show that their direction is right.
    assert (lpg_delta(gradient, labels, torch.ones(6), torch.full((6,), bound), norm=norm) == 0).all()
    largest = gradient.abs().max(-1, keepdim=True).values
    delta = lpg_delta(gradient / largest, labels, torch.ones(6), torch.full((6,), bound), 1.0, direction, norm)
    assert delta.isfinite().all()
    assert_equal(delta.sum(-1), torch.zeros(12), 1e-7)
    centered = F.one_hot(labels, num_classes) - 1 / num_classes
    cosine = F.cosine_similarity(-delta, centered, dim=-1)
    lowest = math.sqrt(num_classes / (2 * (num_classes - 1))) if norm == "l2" else 0
    assert ((cosine >= lowest - 1e-5) & (cosine <= 1 + 1e-5)).all()


# Projected gradient.


@every_norm
@every_direction
@pytest.mark.parametrize("max_dampening", [0.5, 1.0])
@pytest.mark.parametrize("seed", range(2))
def test_pgd_reaches_the_closed_form(norm, direction, max_dampening, seed):
    batch = random_batch(seed=seed)
    assert set(batch.signs.tolist()) == {1.0, -1.0}
    options = {"norm": norm, "direction": direction, "max_dampening": max_dampening}
    assert_equal(batch.lpg_delta(solver="pgd", **options), batch.lpg_delta(**options), 1e-6)


@every_norm
@few_examples
@given(batch=drawn_batches(signs=(-1.0,)), max_dampening=st.sampled_from([0.4, 1.0]))
def test_pgd_dampens_exactly_in_one_step_of_size_one(norm, batch, max_dampening):
    options = {"norm": norm, "max_dampening": max_dampening}
    assert_equal(
        batch.lpg_delta(solver="pgd", pgd_steps=1, pgd_step_size=1.0, **options), batch.lpg_delta(**options), 1e-12
    )


@every_norm
@few_examples
@given(
    batch=drawn_batches(signs=(-1.0,)),
    steps=st.integers(0, 12),
    step_size=st.sampled_from([0.1, 0.5, 0.9, 1.3, 1.7, 1.95]),
)
def test_pgd_dampens_with_an_error_that_shrinks_geometrically(norm, batch, steps, step_size):
    closed_form = batch.lpg_delta(norm=norm)
    delta = batch.lpg_delta(norm=norm, solver="pgd", pgd_steps=steps, pgd_step_size=step_size)
    error, start = (delta - closed_form).norm(dim=-1), closed_form.norm(dim=-1)
    assert (error <= abs(1 - step_size) ** steps * start + 1e-12).all()


@few_examples
@given(batch=drawn_batches(signs=(1.0,), scales=(0.03, 1.0)), step_size=st.sampled_from([0.1, 0.5, 1.0, 2.0]))
def test_pgd_amplifies_exactly_after_the_predicted_number_of_steps_and_not_before(batch, step_size):
    closed_form = batch.lpg_delta()
    for c, rows in batch.members():
        exact = math.log1p(batch.bounds[c] / batch.gradient[rows].mean(0).norm()) / math.log1p(step_size)
        steps = math.ceil(exact)
        assume(batch.bounds[c] > 0 and abs(exact - round(exact)) > 1e-6)
        options = {"solver": "pgd", "pgd_step_size": step_size, "max_dampening": 0.3}  # which amplifying ignores
        assert_equal(batch.lpg_delta(pgd_steps=steps, **options)[rows], closed_form[rows], 1e-10)
        before = batch.lpg_delta(pgd_steps=steps - 1, **options)[rows]
        assert (before.norm(dim=-1) < batch.bounds[c] * (1 - 1e-9)).all()


@every_norm
@every_sign
@pytest.mark.parametrize("steps", [0, 1, 2, 5])
@pytest.mark.parametrize("step_size", [0.3, 1.5])
def test_pgd_without_an_active_bound_multiplies_the_mean_gradient(norm, sign, steps, step_size):
    batch = random_batch()
    batch.signs.fill_(sign)
    batch.bounds.fill_(1e6)
    gradient = batch.gradient
    delta = batch.lpg_delta(norm=norm, solver="pgd", pgd_steps=steps, pgd_step_size=step_size)
    for _, rows in batch.members():
        mean = gradient[rows].mean(0)
        # In l_inf the multiplier of the sum is found by bisection from the width of the box: 1e6 2^-64.
        assert_equal(mean + delta[rows][0], (1 + sign * step_size) ** steps * mean, 1e-10)


# Shapes, cost and devices, for every option of the formula.


def every_option(batch, num_classes):
    """The deltas of all options of the formula; two projected steps stand for forty."""
    state = batch.logits.new_ones(num_classes)
    for norm, direction, solver in itertools.product(NORMS, DIRECTIONS, SOLVERS):
        if norm == "linf" and num_classes > 1000 and (direction, solver) != ("class", "closed_form"):
            continue  # seconds, for the same operations again
        for sign in (1, -1):
            options = {"max_dampening": 0.5, "direction": direction, "norm": norm, "solver": solver, "pgd_steps": 2}
            yield lpg_delta(batch.gradient, batch.labels, sign * state, 0.1 * state, **options)


@every_dtype
def test_an_empty_batch_gives_empty_deltas(dtype):
    batch = LogitBatch(torch.zeros(0, 3, dtype=dtype), torch.zeros(0, dtype=torch.int64))
    for delta in every_option(batch, 3):
        assert delta.shape == (0, 3)
        assert delta.dtype == dtype


@every_dtype
def test_every_option_gives_a_delta_of_the_shape_and_the_dtype_of_the_gradient(dtype):
    batch = make_batch(dtype=dtype)
    for delta in every_option(batch, NUM_CLASSES):
        assert delta.shape == batch.gradient.shape
        assert delta.dtype == dtype


def test_a_batch_of_ignored_samples_gives_zeros():
    batch = LogitBatch(torch.randn(4, 3), torch.full((4,), IGNORE_INDEX))
    for delta in every_option(batch, 3):
        assert (delta == 0).all()


def test_a_hundred_thousand_classes_need_no_tensor_larger_than_the_logits():
    num_samples, num_classes = 8, 100_000
    labels = torch.tensor([0, 0, 5, 99_999, 99_999, 99_999, 7, IGNORE_INDEX])
    logits = torch.randn(num_samples, num_classes, generator=torch.Generator().manual_seed(0))
    with LargestTensor() as largest:
        deltas = list(every_option(LogitBatch(logits, labels), num_classes))
    assert largest.numel == num_samples * num_classes
    for delta in deltas:
        assert delta.shape == logits.shape
        assert delta.isfinite().all()
    # Amplification by a radius of 0.1, as for few classes.
    assert_equal(deltas[0].norm(dim=-1), [0.1] * 7 + [0.0], 1e-5)


def test_nothing_reads_a_value_back_from_the_device():
    batch = LogitBatch(torch.randn(6, 4, device="meta"), torch.zeros(6, dtype=torch.int64, device="meta"))
    for delta in every_option(batch, 4):
        assert delta.shape == (6, 4)


@pytest.mark.parametrize("direction", ["class", "sample"])
def test_lpg_can_be_differentiated(direction):
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(5, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    labels, signs = torch.tensor([0, 1, 0, 2, 1]), torch.tensor([1, -1, -1])
    bounds = torch.tensor([0.3, 0.2, 9.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda g: lpg_delta(g, labels, signs, bounds, 0.5, direction), [gradient])


# The method.


@pytest.mark.parametrize("direction", ["class", "sample"])
@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("solver", ["closed_form", "pgd"])
@pytest.mark.parametrize("max_dampening", [0.2, 1.0])
def test_lpg_delta_equals_the_reference_for_every_option(direction, norm, solver, max_dampening):
    method = LPG(epsilon=0.6, max_dampening=max_dampening, direction=direction, norm=norm, solver=solver)
    batch = make_batch()
    delta = delta_of(method, batch, make_statistics(COUNTS))
    signs, bounds = reference.frequency_signs_and_bounds([count / sum(COUNTS) for count in COUNTS], 0.6)
    expected = reference.lpg_delta(
        batch.gradient.numpy(), batch.labels.tolist(), signs, bounds, max_dampening, direction, norm
    )
    assert {-1, 1} <= set(signs)
    assert_equal(delta, expected, 1e-12 if solver == "closed_form" else 1e-6)


@pytest.mark.parametrize("options", [{}, {"epsilon": 2.0}], ids=["radius", "cap"])
def test_lpg_defaults(options):
    batch = make_batch()
    delta = delta_of(LPG(**options), batch, make_statistics(COUNTS))
    prior = [count / sum(COUNTS) for count in COUNTS]
    signs, bounds = reference.frequency_signs_and_bounds(prior, options.get("epsilon", 0.1))
    expected = reference.lpg_delta(batch.gradient.numpy(), batch.labels.tolist(), signs, bounds, max_dampening=0.5)
    assert_equal(delta, expected, 1e-12)


def test_the_pgd_solver_iterates():
    gradient = torch.tensor([[-1e-14, 1e-14, 0, 0, 0]], dtype=torch.float64)
    method = LPG("fixed", signs=[1] * NUM_CLASSES, solver="pgd")
    # Doubled forty times it is still far from the radius of 0.1, where the closed form goes at once.
    batch = LogitBatch(gradient, torch.tensor([0]))
    delta = method.delta(gradient, batch, ClassStatistics(NUM_CLASSES))
    assert_equal(delta / ((2.0**40 - 1) * 1e-14), [[-1, 1, 0, 0, 0]], 1e-9)


@more_examples
@given(drawn=valid_batches(), seed=st.integers(0, 99), sign=st.sampled_from([1.0, -1.0]))
def test_lpg_deltas_stay_within_their_radius(drawn, seed, sign):
    bounds = positive(drawn.num_classes, seed)
    delta = lpg_delta(drawn.gradient, drawn.labels, sign * torch.ones_like(bounds), bounds)
    assert_zero_sum_within(delta, bounds[drawn.labels])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_dampening": 0.0}, r"`max_dampening` must be in \(0, 1\]; found 0.0"),
        ({"max_dampening": 1.1}, r"`max_dampening` must be in \(0, 1\]; found 1.1"),
        ({"direction": "row"}, r"`direction` must be one of 'class', 'sample'; found 'row'"),
        ({"norm": "l1"}, r"`norm` must be one of 'l2', 'linf'; found 'l1'"),
        ({"solver": "sgd"}, r"`solver` must be one of 'closed_form', 'pgd'; found 'sgd'"),
    ],
)
def test_arguments_out_of_range_are_refused_with_name_value_and_range(options, message):
    with pytest.raises(ValueError, match=message):
        LPG(**options)


# The reference itself, where it is more than a formula.


@pytest.mark.parametrize("seed", range(10))
def test_the_reference_projection_is_feasible_and_satisfies_the_optimality_conditions(seed):
    point = np.random.default_rng(seed).normal(size=3 + seed % 4)
    bound = [0.1, 0.6, 5.0][seed % 3]
    delta = reference.project_zero_sum_box(point.tolist(), bound)
    assert abs(delta.sum()) < 1e-14
    assert np.abs(delta).max() <= bound
    # Nearest point of a convex set: `<point - delta, other - delta> <= 0` for every other point of the set.
    others = np.random.default_rng(seed + 100).normal(size=(500, len(point)))
    others -= others.mean(-1, keepdims=True)
    others *= bound / np.abs(others).max(-1, keepdims=True)
    assert ((others - delta) @ (point - delta) <= 1e-12).all()
