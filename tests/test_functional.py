import dataclasses
import itertools
import math

import numpy as np
import pytest
import reference
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lpg_hf.functional import (
    clip_delta,
    dampening_compensation,
    dampening_gate,
    label_smoothing_delta,
    logit_adjustment_delta,
    logit_gradient,
    lpg_delta,
    relative_dampening_delta,
    relative_dampening_weight,
)


NORMS = ["l2", "linf"]
DIRECTIONS = ["class", "sample"]
SOLVERS = ["closed_form", "pgd"]
IGNORED = -100

every_norm = pytest.mark.parametrize("norm", NORMS)
every_direction = pytest.mark.parametrize("direction", DIRECTIONS)
every_solver = pytest.mark.parametrize("solver", SOLVERS)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
few_examples = settings(max_examples=20, deadline=None, derandomize=True)


@dataclasses.dataclass
class Batch:
    """A batch of logits with a perturbation for every class."""

    logits: torch.Tensor
    labels: torch.Tensor
    signs: torch.Tensor
    bounds: torch.Tensor

    @property
    def gradient(self):
        return torch.from_numpy(reference.logit_gradient(self.logits.numpy(), self.labels.tolist()))

    @property
    def num_classes(self):
        return self.logits.shape[1]

    def delta(self, **options):
        return lpg_delta(self.gradient, self.labels, self.signs, self.bounds, **options)

    def members(self):
        """Class and rows of every class in the batch."""
        return [(c, self.labels == c) for c in self.labels.unique().tolist() if c != IGNORED]


@st.composite
def batches(draw, min_classes=2, max_classes=7, max_samples=9, scales=(0.03, 1.0, 8.0), signs=(-1.0, 0.0, 1.0)):
    """Batches with absent classes, classes of one sample, ignored samples and bounds from 0 to more than any norm."""
    num_classes = draw(st.integers(min_classes, max_classes))
    labels = draw(st.lists(st.sampled_from([IGNORED, *range(num_classes)]), min_size=1, max_size=max_samples))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from(scales))
    bounds = st.sampled_from([0.0, 0.01, 0.1, 0.4, 2.0])
    return Batch(
        logits=scale * torch.randn(len(labels), num_classes, dtype=torch.float64, generator=generator),
        labels=torch.tensor(labels),
        signs=torch.tensor(
            draw(st.lists(st.sampled_from(signs), min_size=num_classes, max_size=num_classes))
        ).double(),
        bounds=torch.tensor(draw(st.lists(bounds, min_size=num_classes, max_size=num_classes)), dtype=torch.float64),
    )


def random_batch(num_samples=24, num_classes=5, scale=2.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (num_samples,), generator=generator)
    labels[::7] = IGNORED
    return Batch(
        logits=scale * torch.randn(num_samples, num_classes, dtype=torch.float64, generator=generator),
        labels=labels,
        signs=torch.tensor([1.0, -1.0]).double().repeat(num_classes)[:num_classes],
        bounds=torch.linspace(0.02, 0.6, num_classes, dtype=torch.float64),
    )


def assert_equal(actual, expected, tolerance):
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=0, atol=tolerance)


def assert_rows_close(actual, expected, relative, smallest=0.0):
    """Each row lies within `relative` of the length of the expected one."""
    expected = torch.as_tensor(expected)
    error = (actual.double() - expected).norm(dim=-1)
    assert (error <= relative * expected.norm(dim=-1) + smallest).all(), (error, expected.norm(dim=-1))


def squared_norm(gradient):
    return gradient.square().sum()


# The logit gradient.


@few_examples
@given(batches())
def test_logit_gradient_is_softmax_minus_onehot_and_sums_to_zero(batch):
    gradient = logit_gradient(batch.logits, batch.labels)
    assert_equal(gradient, reference.logit_gradient(batch.logits.numpy(), batch.labels.tolist()), 1e-14)
    assert_equal(gradient.sum(-1), torch.zeros(len(batch.labels)), 1e-12)


@few_examples
@given(batches())
def test_logit_gradient_is_that_of_summed_cross_entropy(batch):
    logits = batch.logits.clone().requires_grad_()
    F.cross_entropy(logits, batch.labels, ignore_index=IGNORED, reduction="sum").backward()
    assert_equal(logit_gradient(batch.logits, batch.labels), logits.grad, 1e-12)


@few_examples
@given(batches())
def test_norm_of_the_logit_gradient_lies_between_the_bounds_of_the_missing_probability(batch):
    missing = np.array(
        [1 - p[c] for p, c in zip(reference.softmax(batch.logits), batch.labels, strict=True) if c >= 0]
    )
    length = logit_gradient(batch.logits, batch.labels).norm(dim=-1)[batch.labels >= 0].numpy()
    assert (length <= math.sqrt(2) * missing + 1e-12).all()
    assert (length >= missing / math.sqrt(1 - 1 / batch.num_classes) - 1e-12).all()


@pytest.mark.parametrize("margin", [5.0, 20.0, 40.0, 80.0])
def test_float32_logit_gradient_keeps_the_label_entry_when_the_probability_rounds_to_one(margin):
    logits = torch.tensor([[0.0, margin, 0.5, -1.0]])
    labels = torch.tensor([1])
    expected = reference.logit_gradient(logits.double().numpy(), labels.tolist())
    assert_equal(logit_gradient(logits, labels).double() / torch.from_numpy(expected), torch.ones(1, 4), 1e-5)


def test_ignored_samples_have_no_gradient_whatever_their_logits():
    logits = torch.tensor([[math.nan, 0.0], [math.inf, -math.inf], [1e30, 5.0], [0.0, 0.0]])
    gradient = logit_gradient(logits, torch.tensor([IGNORED, IGNORED, IGNORED, 0]))
    assert gradient.tolist() == [[0, 0], [0, 0], [0, 0], [-0.5, 0.5]]


# LPG against the reference.


@every_norm
@every_direction
@pytest.mark.parametrize("max_dampening", [0.3, 1.0])
@few_examples
@given(batch=batches())
def test_lpg_delta_equals_the_reference(norm, direction, max_dampening, batch):
    options = {"norm": norm, "direction": direction, "max_dampening": max_dampening}
    expected = reference.lpg_delta(
        batch.gradient.numpy(), batch.labels.tolist(), batch.signs.tolist(), batch.bounds.tolist(), **options
    )
    assert_equal(batch.delta(**options), expected, 1e-12)


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
    assert torch.equal(batch.delta(), batch.delta(**explicit))


def test_default_pgd_takes_forty_steps_of_size_one():
    batch = random_batch()
    batch.signs.fill_(1)
    tiny = 1e-14 * batch.gradient  # too small to reach the bound
    delta = lpg_delta(tiny, batch.labels, batch.signs, batch.bounds, solver="pgd")
    for _, rows in batch.members():
        assert_equal(delta[rows][0] / ((2.0**40 - 1) * tiny[rows].mean(0)), torch.ones(5), 1e-9)


# LPG: what the delta must satisfy.


@every_norm
@every_direction
@every_solver
@few_examples
@given(batch=batches())
def test_delta_stays_in_the_ball_of_its_class(norm, direction, solver, batch):
    delta = batch.delta(norm=norm, direction=direction, solver=solver, pgd_steps=2)
    length = delta.norm(dim=-1) if norm == "l2" else delta.abs().max(-1).values
    for c, rows in batch.members():
        bound = batch.bounds[c] * batch.signs[c].abs()
        assert (length[rows] <= bound * (1 + 1e-12)).all()


@every_norm
@every_direction
@every_solver
@few_examples
@given(batch=batches())
def test_delta_sums_to_zero(norm, direction, solver, batch):
    delta = batch.delta(norm=norm, direction=direction, solver=solver, pgd_steps=2)
    assert_equal(delta.sum(-1), torch.zeros(len(delta)), 1e-12)


@few_examples
@given(batches())
def test_all_samples_of_a_class_get_the_same_delta_in_class_direction(batch):
    for norm in NORMS:
        delta = batch.delta(norm=norm)
        for _, rows in batch.members():
            assert (delta[rows] == delta[rows][0]).all()


@few_examples
@given(batches(signs=(1.0,)))
def test_amplifying_raises_the_squared_norms_by_exactly_the_closed_form(batch):
    gradient, delta = batch.gradient, batch.delta()
    for c, rows in batch.members():
        n, bound, length = rows.sum(), batch.bounds[c], gradient[rows].mean(0).norm()
        gain = squared_norm(gradient[rows] + delta[rows]) - squared_norm(gradient[rows])
        assert_equal(gain, n * (2 * bound * length + bound**2), 1e-10)


@few_examples
@given(batches(signs=(-1.0,)))
def test_dampening_lowers_the_squared_norms_by_exactly_the_closed_form_and_never_overshoots(batch):
    gradient, delta = batch.gradient, batch.delta()
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
@given(batch=batches())
def test_amplifying_never_lowers_and_dampening_never_raises_the_mean_squared_norm(
    norm, direction, max_dampening, batch
):
    gradient = batch.gradient
    perturbed = gradient + batch.delta(norm=norm, direction=direction, max_dampening=max_dampening)
    for c, rows in batch.members():
        gain = (squared_norm(perturbed[rows]) - squared_norm(gradient[rows])) * batch.signs[c]
        assert gain >= -1e-12


@few_examples
@given(batches())
def test_perturbed_gradient_descends_the_loss_in_logit_space(batch):
    gradient = batch.gradient
    perturbed = gradient + batch.delta()
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
@pytest.mark.parametrize("sign", [1.0, -1.0])
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
@given(batch=batches(signs=(-1.0,)), max_dampening=st.floats(0.05, 1.0))
def test_dampening_is_cross_entropy_with_the_class_mean_as_soft_target(batch, max_dampening):
    batch.bounds.fill_(2.0)
    probabilities = torch.from_numpy(reference.softmax(batch.logits.numpy()))
    perturbed = batch.gradient + batch.delta(max_dampening=max_dampening)
    for c, rows in batch.members():
        own = F.one_hot(torch.tensor(c), batch.num_classes).double()
        target = (1 - max_dampening) * own + max_dampening * probabilities[rows].mean(0)
        assert_equal(perturbed[rows], probabilities[rows] - target, 1e-14)


@few_examples
@given(batches(signs=(1.0,)))
def test_amplification_lies_within_45_degrees_of_negative_label_smoothing(batch):
    num_classes = batch.num_classes
    delta = batch.delta()
    for c, rows in batch.members():
        if batch.bounds[c] == 0:
            continue
        centred = torch.full((num_classes,), -1 / num_classes, dtype=torch.float64)
        centred[c] += 1
        cosine = F.cosine_similarity(-delta[rows][0], centred, dim=0)
        assert math.sqrt(num_classes / (2 * (num_classes - 1))) - 1e-10 <= cosine <= 1 + 1e-10


@few_examples
@given(batches(max_classes=2, signs=(-1.0, 1.0)))
def test_two_classes_amplified_or_dampened_without_truncation_are_label_smoothing(batch):
    gradient, delta = batch.gradient, batch.delta()
    for c, rows in batch.members():
        bound = batch.bounds[c]
        if batch.signs[c] > 0 or bound <= gradient[rows].mean(0).norm():
            alpha = -batch.signs[c] * bound / math.sqrt(1 / 2)
            smoothing = alpha * (F.one_hot(torch.tensor(c), 2).double() - 1 / 2)
            assert_equal(delta[rows], smoothing.expand(int(rows.sum()), 2), 1e-12)


@every_norm
@every_direction
@few_examples
@given(batch=batches(), seed=st.integers(0, 1000))
def test_permuting_the_batch_permutes_the_delta(norm, direction, batch, seed):
    order = torch.randperm(len(batch.labels), generator=torch.Generator().manual_seed(seed))
    permuted = dataclasses.replace(batch, logits=batch.logits[order], labels=batch.labels[order])
    options = {"norm": norm, "direction": direction}
    assert_equal(permuted.delta(**options), batch.delta(**options)[order], 1e-12)


@every_norm
@every_direction
@few_examples
@given(batch=batches(), seed=st.integers(0, 1000))
def test_renaming_the_classes_renames_the_columns_of_the_delta(norm, direction, batch, seed):
    old_name = torch.randperm(batch.num_classes, generator=torch.Generator().manual_seed(seed))
    labelled = batch.labels >= 0
    renamed = Batch(
        logits=batch.logits[:, old_name],
        labels=torch.where(labelled, old_name.argsort()[batch.labels.clamp(min=0)], IGNORED),
        signs=batch.signs[old_name],
        bounds=batch.bounds[old_name],
    )
    options = {"norm": norm, "direction": direction}
    assert_equal(renamed.delta(**options), batch.delta(**options)[:, old_name], 1e-12)


@every_norm
@every_direction
@few_examples
@given(batch=batches())
def test_signs_and_bounds_of_absent_classes_change_nothing(norm, direction, batch):
    present = torch.zeros(batch.num_classes, dtype=torch.bool)
    present[[c for c, _ in batch.members()]] = True
    other = dataclasses.replace(
        batch,
        signs=torch.where(present, batch.signs, -1.0),
        bounds=torch.where(present, batch.bounds, 1e9),
    )
    options = {"norm": norm, "direction": direction}
    assert torch.equal(other.delta(**options), batch.delta(**options))


@every_direction
@few_examples
@given(batch=batches())
def test_classes_without_probability_add_only_columns_of_zeros(direction, batch):
    wider = Batch(
        logits=F.pad(batch.logits, (0, 2), value=-1e9),
        labels=batch.labels,
        signs=F.pad(batch.signs, (0, 2), value=1.0),
        bounds=F.pad(batch.bounds, (0, 2), value=0.5),
    )
    expected = F.pad(batch.delta(direction=direction), (0, 2))
    assert_equal(wider.delta(direction=direction), expected, 1e-12)


@every_norm
@every_direction
@every_solver
def test_ignored_samples_get_no_delta_and_have_no_influence(norm, direction, solver):
    batch = random_batch(num_samples=20)
    options = {"norm": norm, "direction": direction, "solver": solver, "pgd_steps": 5}
    labelled = batch.labels >= 0
    alone = dataclasses.replace(batch, logits=batch.logits[labelled], labels=batch.labels[labelled])
    # Whatever gradient ignored samples bring along.
    gradient = torch.where(labelled[:, None], batch.gradient, 7.0)
    delta = lpg_delta(gradient, batch.labels, batch.signs, batch.bounds, **options)
    assert (~labelled).sum() == 3
    assert (delta[~labelled] == 0).all()
    assert_equal(delta[labelled], alone.delta(**options), 1e-15)


@every_norm
@every_direction
@every_solver
def test_sign_zero_and_bound_zero_leave_a_class_alone(norm, direction, solver):
    batch = random_batch()
    batch.signs[0], batch.bounds[1] = 0, 0
    delta = batch.delta(norm=norm, direction=direction, solver=solver, pgd_steps=5)
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
@pytest.mark.parametrize("sign", [1.0, -1.0])
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
    centred = F.one_hot(labels, num_classes) - 1 / num_classes
    cosine = F.cosine_similarity(-delta, centred, dim=-1)
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
    assert_equal(batch.delta(solver="pgd", **options), batch.delta(**options), 1e-6)


@every_norm
@few_examples
@given(batch=batches(signs=(-1.0,)), max_dampening=st.sampled_from([0.4, 1.0]))
def test_pgd_dampens_exactly_in_one_step_of_size_one(norm, batch, max_dampening):
    options = {"norm": norm, "max_dampening": max_dampening}
    assert_equal(batch.delta(solver="pgd", pgd_steps=1, pgd_step_size=1.0, **options), batch.delta(**options), 1e-12)


@every_norm
@few_examples
@given(
    batch=batches(signs=(-1.0,)), steps=st.integers(0, 12), step_size=st.sampled_from([0.1, 0.5, 0.9, 1.3, 1.7, 1.95])
)
def test_pgd_dampens_with_an_error_that_shrinks_geometrically(norm, batch, steps, step_size):
    closed_form = batch.delta(norm=norm)
    delta = batch.delta(norm=norm, solver="pgd", pgd_steps=steps, pgd_step_size=step_size)
    error, start = (delta - closed_form).norm(dim=-1), closed_form.norm(dim=-1)
    assert (error <= abs(1 - step_size) ** steps * start + 1e-12).all()


@few_examples
@given(batch=batches(signs=(1.0,), scales=(0.03, 1.0)), step_size=st.sampled_from([0.1, 0.5, 1.0, 2.0]))
def test_pgd_amplifies_exactly_after_the_predicted_number_of_steps_and_not_before(batch, step_size):
    closed_form = batch.delta()
    for c, rows in batch.members():
        exact = math.log1p(batch.bounds[c] / batch.gradient[rows].mean(0).norm()) / math.log1p(step_size)
        steps = math.ceil(exact)
        assume(batch.bounds[c] > 0 and abs(exact - round(exact)) > 1e-6)
        options = {"solver": "pgd", "pgd_step_size": step_size, "max_dampening": 0.3}  # which amplifying ignores
        assert_equal(batch.delta(pgd_steps=steps, **options)[rows], closed_form[rows], 1e-10)
        before = batch.delta(pgd_steps=steps - 1, **options)[rows]
        assert (before.norm(dim=-1) < batch.bounds[c] * (1 - 1e-9)).all()


@every_norm
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("steps", [0, 1, 2, 5])
@pytest.mark.parametrize("step_size", [0.3, 1.5])
def test_pgd_without_an_active_bound_multiplies_the_mean_gradient(norm, sign, steps, step_size):
    batch = random_batch()
    batch.signs.fill_(sign)
    batch.bounds.fill_(1e6)
    gradient = batch.gradient
    delta = batch.delta(norm=norm, solver="pgd", pgd_steps=steps, pgd_step_size=step_size)
    for _, rows in batch.members():
        mean = gradient[rows].mean(0)
        # In l_inf the multiplier of the sum is found by bisection from the width of the box: 1e6 2^-64.
        assert_equal(mean + delta[rows][0], (1 + sign * step_size) ** steps * mean, 1e-10)


# Clipping.


@few_examples
@given(batch=batches(), max_norm=st.sampled_from([0.001, 0.3, 0.9, 2.0]))
def test_clip_delta_equals_the_reference_and_has_the_excess_as_its_norm(batch, max_norm):
    gradient = batch.gradient
    delta = clip_delta(gradient, max_norm)
    assert_equal(delta, reference.clip_delta(gradient.numpy(), max_norm), 1e-12)
    assert_equal(delta.norm(dim=-1), (gradient.norm(dim=-1) - max_norm).clamp(min=0), 1e-10)
    assert ((gradient + delta).norm(dim=-1) <= max_norm * (1 + 1e-12)).all()


@few_examples
@given(batch=batches())
def test_clip_delta_agrees_with_torch(batch):
    for row in batch.gradient:
        parameter = torch.nn.Parameter(torch.zeros_like(row))
        parameter.grad = row.clone()
        torch.nn.utils.clip_grad_norm_([parameter], 0.3)
        # Torch divides by the norm + 1e-6.
        assert_equal(row + clip_delta(row[None], 0.3)[0], parameter.grad, 1e-6)


def test_float32_clip_delta_equals_the_reference():
    gradient = random_batch().gradient.float()
    assert_rows_close(clip_delta(gradient, 0.3), reference.clip_delta(gradient.numpy(), 0.3), 1e-5)


def test_clip_delta_takes_one_bound_per_sample_and_leaves_zero_gradients():
    gradient = torch.tensor([[3.0, -4.0], [3.0, -4.0], [0.0, 0.0]]).double()
    perturbed = gradient + clip_delta(gradient, torch.tensor([1.0, 10.0, 1.0]).double())
    assert_equal(perturbed, [[0.6, -0.8], [3, -4], [0, 0]], 1e-15)


# Logit adjustment.


def priors(num_classes, absent=()):
    shares = [0.0 if c in absent else 2.0 ** -(c + 1) for c in range(num_classes)]
    return torch.tensor([share / sum(shares) for share in shares], dtype=torch.float64)


@few_examples
@given(
    batch=batches(),
    tau=st.sampled_from([0.0, 0.5, 1.0, 2.5]),
    absent=st.sampled_from([(), (0,), (1,)]),
    share=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_logit_adjustment_delta_equals_the_reference(batch, tau, absent, share):
    prior = priors(batch.num_classes, absent)
    delta = logit_adjustment_delta(batch.logits, batch.labels, prior, tau, weight_share=share)
    expected = reference.logit_adjustment_delta(
        batch.logits.numpy(), batch.labels.tolist(), prior.tolist(), tau, share
    )
    assert_rows_close(delta, expected, 1e-11)
    assert_equal(delta.sum(-1), torch.zeros(len(delta)), 1e-11)
    tensors = torch.tensor(tau), torch.tensor(share)
    as_tensors = logit_adjustment_delta(batch.logits, batch.labels, prior, tensors[0], weight_share=tensors[1])
    assert_rows_close(as_tensors, expected, 1e-6)


@given(share=st.floats(0, 1), tau=st.floats(0, 2), seed=st.integers(0, 1000))
def test_no_share_of_weights_moves_the_logits_that_logit_adjustment_leads_to(share, tau, seed):
    """At `log p(y|x) - tau log pi_y` the expected gradient is zero."""
    generator = torch.Generator().manual_seed(seed)
    posterior = torch.rand(5, dtype=torch.float64, generator=generator).add(0.05)
    posterior, prior = posterior / posterior.sum(), priors(5)
    logits = (posterior.log() - tau * prior.log()).expand(5, 5)
    labels = torch.arange(5)
    delta = logit_adjustment_delta(logits, labels, prior, tau, weight_share=share)
    assert_equal(posterior @ (logit_gradient(logits, labels) + delta), torch.zeros(5), 1e-11)


@few_examples
@given(batches())
def test_logit_adjustment_gives_the_gradient_of_cross_entropy_on_shifted_logits(batch):
    prior = priors(batch.num_classes)
    logits = batch.logits.clone().requires_grad_()
    F.cross_entropy(logits + 1.5 * prior.log(), batch.labels, ignore_index=IGNORED, reduction="sum").backward()
    adjusted = batch.gradient + logit_adjustment_delta(batch.logits, batch.labels, prior, 1.5)
    assert_equal(adjusted, logits.grad, 1e-12)


@few_examples
@given(batch=batches(), tau=st.sampled_from([0.1, 1.0, 3.0]))
def test_logit_adjustment_delta_stays_below_its_bound(batch, tau):
    prior = priors(batch.num_classes)
    spread = tau * math.log(prior.max() / prior.min())
    delta = logit_adjustment_delta(batch.logits, batch.labels, prior, tau)
    assert (delta.norm(dim=-1) <= math.sqrt(2) * math.tanh(spread / 4) + 1e-9).all()


def test_logit_adjustment_is_exactly_zero_at_strength_zero_and_small_for_a_balanced_prior():
    batch = random_batch()
    assert (logit_adjustment_delta(batch.logits, batch.labels, priors(5), 0.0) == 0).all()
    assert_equal(
        logit_adjustment_delta(batch.logits, batch.labels, torch.full((5,), 0.2, dtype=torch.float64)), 0, 1e-15
    )


def test_float32_logit_adjustment_equals_the_reference_and_keeps_a_saturated_label_entry():
    batch = random_batch()
    batch.logits[1] = torch.tensor([40.0, 0, 0, 0, 0])
    batch.labels[1] = 0
    logits, prior = batch.logits.float(), priors(5).float()
    expected = reference.logit_adjustment_delta(
        logits.double().numpy(), batch.labels.tolist(), prior.double().tolist()
    )
    delta = logit_adjustment_delta(logits, batch.labels, prior)
    assert 0 < np.linalg.norm(expected[1]) < 1e-15
    assert_rows_close(delta, expected, 1e-5)


def test_logit_adjustment_ignores_samples_whatever_their_logits():
    logits = torch.tensor([[math.nan, 0.0, 0.0], [0.0, 1.0, 2.0]])
    delta = logit_adjustment_delta(logits, torch.tensor([IGNORED, 1]), priors(3).float())
    assert (delta[0] == 0).all()
    assert delta[1].isfinite().all()


# Class-relative dampening.


@dataclasses.dataclass
class ClassMeans:
    own_probability: torch.Tensor
    relative_confidence: torch.Tensor
    contradiction: torch.Tensor

    def as_lists(self):
        return {name: tensor.tolist() for name, tensor in vars(self).items()}


@st.composite
def class_means(draw, num_classes=7):
    """Means on both sides of the gates and inside them."""

    def column(values):
        drawn = draw(st.lists(st.sampled_from(values), min_size=num_classes, max_size=num_classes))
        return torch.tensor(drawn, dtype=torch.float64)

    return ClassMeans(
        own_probability=column([0.01, 0.1, 0.2, 0.3, 0.45, 0.5, 0.9]),
        relative_confidence=column([0.02, 0.3, 0.7, 1.0]),
        contradiction=column([0.0, 0.02, 0.03, 0.05, 0.07, 0.08, 0.4]),
    )


OPEN = ClassMeans(
    own_probability=torch.full((7,), 0.9, dtype=torch.float64),
    relative_confidence=torch.full((7,), 0.6, dtype=torch.float64),
    contradiction=torch.full((7,), 0.3, dtype=torch.float64),
)


@few_examples
@given(batch=batches(), means=class_means(), power=st.sampled_from([0.0, 1.0, 2.0, 3.5]))
def test_relative_dampening_equals_the_reference(batch, means, power):
    weight = relative_dampening_weight(batch.logits, batch.labels, **vars(means), power=power)
    expected = reference.dampening_weight(batch.logits.numpy(), batch.labels.tolist(), **means.as_lists(), power=power)
    assert_equal(weight, expected, 1e-12)
    delta = relative_dampening_delta(batch.gradient, batch.logits, batch.labels, **vars(means), power=power)
    assert_equal(delta, reference.dampening_delta(batch.gradient.numpy(), expected), 1e-12)


@few_examples
@given(batch=batches(), means=class_means())
def test_relative_dampening_with_other_gates_equals_the_reference(batch, means):
    options = {"power": 1.5, "learned": (0.0, 0.3), "contradicted": (0.04, 1.0)}
    arguments = batch.logits.numpy(), batch.labels.tolist()
    for compensated in (True, False):
        weight = relative_dampening_weight(
            batch.logits, batch.labels, **vars(means), **options, compensated=compensated
        )
        expected = reference.dampening_weight(*arguments, **means.as_lists(), **options, compensated=compensated)
        assert_equal(weight, expected, 1e-12)
    delta = relative_dampening_delta(batch.gradient, batch.logits, batch.labels, **vars(means), **options)
    assert_equal(delta, reference.dampening_delta(batch.gradient.numpy(), expected), 1e-12)


def test_float32_relative_dampening_equals_the_reference():
    batch = random_batch()
    means = {name: tensor.float() for name, tensor in vars(OPEN).items()}
    logits, gradient = batch.logits.float(), batch.gradient.float()
    weight = reference.dampening_weight(
        logits.numpy(), batch.labels.tolist(), **{name: tensor.tolist() for name, tensor in means.items()}
    )
    expected = torch.from_numpy(reference.dampening_delta(gradient.numpy(), weight))
    assert weight.min() < 0.5
    actual = relative_dampening_weight(logits, batch.labels, **means)
    np.testing.assert_allclose(actual.numpy(), weight, rtol=1e-5)
    delta = relative_dampening_delta(gradient, logits, batch.labels, **means)
    assert delta.dtype == torch.float32
    # The delta is `(w - 1) g`, and a weight has an error of its own size.
    assert_rows_close(delta, expected, 1e-5, smallest=1e-6)


@few_examples
@given(batch=batches(), means=class_means())
def test_dampening_weights_lie_in_0_1_and_are_1_at_or_above_the_mean_of_the_class(batch, means):
    weight = relative_dampening_weight(batch.logits, batch.labels, **vars(means))
    assert ((weight >= 0) & (weight <= 1)).all()
    probabilities = reference.softmax(batch.logits.numpy())
    for i, label in enumerate(batch.labels.tolist()):
        if label == IGNORED or probabilities[i, label] / probabilities[i].max() >= means.relative_confidence[label]:
            assert weight[i] == 1


@few_examples
@given(batch=batches(), means=class_means())
def test_a_closed_gate_switches_dampening_off_for_its_class(batch, means):
    weight = relative_dampening_weight(batch.logits, batch.labels, **vars(means))
    for c, rows in batch.members():
        if means.own_probability[c] <= 0.1 or means.contradiction[c] <= 0.02:
            assert (weight[rows] == 1).all()


def test_dampening_falls_with_confidence_and_with_power():
    logits = torch.linspace(0, 8, 30)[:, None] * torch.tensor([0.0, 1.0, 0.5, 0, 0, 0, 0])
    labels = torch.zeros(30, dtype=torch.int64)
    weights = torch.stack(
        [relative_dampening_weight(logits.double(), labels, **vars(OPEN), power=power) for power in (0.5, 1.0, 2.0)]
    )
    below = (-logits[:, 1]).exp() < 0.6
    assert below.sum() > 20
    assert (weights[:, below].diff(dim=1) < 0).all()
    assert (weights[:, below].diff(dim=0) < 0).all()


def test_default_power_squares_the_share_of_confidence_where_both_gates_are_open():
    # rho = exp(-log 10) = 0.1 against a class mean of 0.6.
    logits = torch.tensor([[0.0, math.log(10), 0, 0, 0, 0, 0]], dtype=torch.float64)
    assert_equal(relative_dampening_weight(logits, torch.tensor([0]), **vars(OPEN)), [(0.1 / 0.6) ** 2], 1e-12)


@given(k=st.floats(0, 1), gate=st.floats(0, 1))
def test_compensation_gives_the_rest_of_a_class_what_the_contradicted_share_loses(k, gate):
    """Where the gate takes a share `gate` of the weight of all that is contradicted, the mean weight is 1 again."""
    factor = dampening_compensation(torch.tensor([k], dtype=torch.float64), torch.tensor([gate], dtype=torch.float64))
    mean_weight = factor.item() * (k * (1 - gate) + (1 - k))
    assert 1 <= factor.item() <= 2
    assert math.isclose(mean_weight, 1.0 if k * gate <= 0.5 else 2 * (1 - k * gate), abs_tol=1e-12)


@few_examples
@given(batch=batches(), means=class_means())
def test_a_gate_that_is_known_already_changes_nothing(batch, means):
    gate = dampening_gate(means.own_probability, means.contradiction, (0.0, 0.3), (0.04, 1.0))
    known = relative_dampening_weight(batch.logits, batch.labels, **vars(means), gate=gate)
    options = {"learned": (0.0, 0.3), "contradicted": (0.04, 1.0)}
    assert torch.equal(known, relative_dampening_weight(batch.logits, batch.labels, **vars(means), **options))


@every_dtype
def test_relative_dampening_is_finite_for_unseen_classes_and_saturated_logits(dtype):
    unseen = {name: torch.zeros(3, dtype=dtype) for name in vars(OPEN)}
    seen = {name: tensor[:3].to(dtype) for name, tensor in vars(OPEN).items()}
    logits = torch.tensor([[0.0, 2000.0, 0.0], [80.0, 0.0, 0.0], [0.0, 80.0, 0.0]], dtype=dtype)
    labels = torch.tensor([0, 0, 0])
    assert relative_dampening_weight(logits, labels, **unseen).tolist() == [1, 1, 1]
    weight = relative_dampening_weight(logits, labels, **seen)
    assert weight[:2].tolist() == [0, 1]
    assert 0 <= weight[2] < 1e-30


def test_relative_dampening_ignores_samples_whatever_their_logits():
    logits = torch.tensor([[math.nan, 0.0], [math.inf, -math.inf], [0.0, 5.0]])
    labels = torch.tensor([IGNORED, IGNORED, 0])
    means = {name: tensor[:2].float() for name, tensor in vars(OPEN).items()}
    weight = relative_dampening_weight(logits, labels, **means)
    assert weight[:2].tolist() == [1, 1]
    assert weight[2] < 0.01
    assert (relative_dampening_delta(logit_gradient(logits, labels), logits, labels, **means)[:2] == 0).all()


# Every function: shapes, cost and devices.


def all_deltas(logits, labels):
    """Every formula of the module, one after the other."""
    num_classes = logits.shape[1]
    state = logits.new_ones(num_classes)
    gradient = logit_gradient(logits, labels)
    yield gradient
    for norm, direction, solver in itertools.product(NORMS, DIRECTIONS, SOLVERS):
        if norm == "linf" and num_classes > 1000 and (direction, solver) != ("class", "closed_form"):
            continue  # seconds, for the same operations again
        for sign in (1, -1):
            yield lpg_delta(gradient, labels, sign * state, 0.1 * state, 0.5, direction, norm, solver, pgd_steps=2)
    yield clip_delta(gradient, 0.3)
    yield logit_adjustment_delta(logits, labels, torch.full_like(state, 1 / num_classes))
    yield relative_dampening_delta(gradient, logits, labels, 0.5 * state, 0.5 * state, 0.05 * state)


@every_dtype
def test_an_empty_batch_gives_empty_deltas(dtype):
    logits, labels = torch.zeros(0, 3, dtype=dtype), torch.zeros(0, dtype=torch.int64)
    for delta in all_deltas(logits, labels):
        assert delta.shape == (0, 3)
        assert delta.dtype == dtype


def test_a_batch_of_ignored_samples_gives_zeros():
    for delta in all_deltas(torch.randn(4, 3), torch.full((4,), IGNORED)):
        assert (delta == 0).all()


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


def test_a_hundred_thousand_classes_need_no_tensor_larger_than_the_logits():
    num_samples, num_classes = 8, 100_000
    labels = torch.tensor([0, 0, 5, 99_999, 99_999, 99_999, 7, IGNORED])
    logits = torch.randn(num_samples, num_classes, generator=torch.Generator().manual_seed(0))
    with LargestTensor() as largest:
        deltas = list(all_deltas(logits, labels))
    assert largest.numel == num_samples * num_classes
    for delta in deltas:
        assert delta.shape == logits.shape
        assert delta.isfinite().all()
    # Gradient and amplification by a radius of 0.1, as for few classes.
    assert_equal(deltas[1].norm(dim=-1), [0.1] * 7 + [0.0], 1e-5)


def test_nothing_reads_a_value_back_from_the_device():
    # A meta tensor has no values: whatever depends on one (`item`, `unique`, a mask as an index) raises.
    logits, labels = torch.randn(6, 4, device="meta"), torch.zeros(6, dtype=torch.int64, device="meta")
    for delta in all_deltas(logits, labels):
        assert delta.shape == (6, 4)


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


@pytest.mark.parametrize("direction", ["class", "sample"])
def test_lpg_can_be_differentiated(direction):
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(5, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    labels, signs = torch.tensor([0, 1, 0, 2, 1]), torch.tensor([1, -1, -1])
    bounds = torch.tensor([0.3, 0.2, 9.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda g: lpg_delta(g, labels, signs, bounds, 0.5, direction), [gradient])


def test_smoothing_can_be_differentiated_and_mapped():
    labels = torch.tensor([[0, 2], [1, 1]])
    target = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64, requires_grad=True)
    gradient = torch.zeros(2, 2, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda t: label_smoothing_delta(gradient[0], labels[0], 0.3, t), [target])
    mapped = torch.func.vmap(lambda g, y: label_smoothing_delta(g, y, 0.3))(gradient, labels)
    assert_equal(
        mapped, [label_smoothing_delta(g, y, 0.3).tolist() for g, y in zip(gradient, labels, strict=True)], 1e-15
    )
