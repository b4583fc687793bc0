"""Every method at the logits against its original form: a loss and autograd in float64, never our formula."""

import copy
import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from lpg_hf import (
    LPG,
    LPL,
    ClassRelativeDampening,
    ClassWeighting,
    FocalLoss,
    GeneralizedCrossEntropy,
    LabelSmoothing,
    LogitAdjustment,
    LogitClipping,
    LogitNoise,
    LPGLoss,
)
from lpg_hf.functional import (
    class_weight_delta,
    clip_delta,
    focal_delta,
    gce_delta,
    label_smoothing_delta,
    logit_adjustment_delta,
    logit_gradient,
    lpg_delta,
    lpl_delta,
    noise_delta,
)
from lpg_hf.perturbations import METHODS, LogitPerturbation, parse_perturbation
from lpg_hf.statistics import ClassStatistics


IGNORED = -100
NUM_CLASSES = 5
COUNTS = [400, 90, 30, 11, 3]
NAMES = {"cat": 0, "dog": 1, "emu": 2, "fox": 3, "gnu": 4}
WEIGHTS = [0.3, 1.0, 1.7, 0.0, 33.3]
SIGNS, BOUNDS = [1, -1, 0, 1, -1], [0.4, 1.1, 0.7, 2.3, 0.15]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-6}

every_dtype = pytest.mark.parametrize("dtype", TOLERANCE)
few_examples = settings(max_examples=50, deadline=None, derandomize=True)


def make_batch(dtype=torch.float64, num_samples=40, scale=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(NUM_CLASSES, (num_samples,), generator=generator)
    logits = scale * torch.randn(num_samples, NUM_CLASSES, dtype=torch.float64, generator=generator)
    labels[::9] = IGNORED
    return logits.to(dtype), labels


def gradient_of(loss, logits, labels):
    """Of a summed loss, by autograd in float64; zero for ignored samples."""
    z = logits.detach().double().requires_grad_()
    loss(z[labels != IGNORED], labels[labels != IGNORED]).backward()
    return z.grad


def assert_equal(actual, expected, tolerance):
    """Up to the tolerance, which is absolute below 1 and relative above."""
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)


def gradient_through_loss(method, logits, labels, counts=COUNTS, names=None):
    """What `.backward()` of an LPGLoss leaves at the logits, in per-sample units."""
    z = logits.clone().requires_grad_()
    method = copy.deepcopy(method)
    method.use_label_names(names or {})
    LPGLoss(logits.shape[1], [method], counts)(z, labels).backward()
    return z.grad * (labels != IGNORED).sum()


# The original losses, summed over samples.


def own_probability(z, y):
    return z.softmax(-1).gather(-1, y[:, None])[:, 0]


def focal(gamma):
    def loss(z, y):
        p = own_probability(z, y)
        return (-((1 - p) ** gamma) * p.log()).sum()

    return loss


def generalized_cross_entropy(q):
    return lambda z, y: ((1 - own_probability(z, y) ** q) / q).sum()


def mean_absolute_error(z, y):
    """Zhang and Sabuncu's `q = 1`: half the l1 distance of the probabilities to the label."""
    return (z.softmax(-1) - F.one_hot(y, z.shape[1])).abs().sum() / 2


def adjusted(tau, counts):
    log_prior = torch.tensor([math.log(count / sum(counts)) for count in counts], dtype=torch.float64)
    return lambda z, y: F.cross_entropy(z + tau * log_prior, y, reduction="sum")


def smoothed(alpha):
    return lambda z, y: F.cross_entropy(z, y, label_smoothing=alpha, reduction="sum")


def smoothed_towards(alpha, distribution):
    """Where torch has no form: cross-entropy with targets `(1 - alpha) onehot + alpha distribution`, written out."""

    def loss(z, y):
        target = alpha * distribution + (1 - alpha) * F.one_hot(y, z.shape[1]).to(z.dtype)
        return -(target * z.log_softmax(-1)).sum()

    return loss


def weighted(weights):
    weight = torch.tensor(weights, dtype=torch.float64)
    return lambda z, y: F.cross_entropy(z, y, weight=weight, reduction="sum")


def cross_entropy(z, y):
    return F.cross_entropy(z, y, reduction="sum")


def logit_perturbation(signs, bounds, steps):
    """LPL: a shift of the logits per class by projected gradient steps on that class's loss, then cross-entropy."""

    def loss(z, y):
        shifts = torch.zeros_like(z)
        for c in y.unique().tolist():
            shifts[y == c] = best_shift(z.detach()[y == c], c, signs[c], bounds[c], steps)
        return F.cross_entropy(z + shifts, y, reduction="sum")

    return loss


def best_shift(z, c, sign, bound, steps):
    shift = torch.zeros(z.shape[1], dtype=z.dtype)
    for _ in range(steps):
        variable = shift.clone().requires_grad_()
        F.cross_entropy(z + variable, torch.full((len(z),), c), reduction="sum").backward()
        shift = shift + sign * 0.5 * bound * variable.grad / variable.grad.norm()
        if shift.norm() > bound:
            shift = shift * (bound / shift.norm())
    return shift


@dataclasses.dataclass
class Case:
    """A method, its delta as a pure function of gradient, logits and labels, and the loss that it stands for."""

    name: str
    method: LogitPerturbation
    delta: Callable
    loss: Callable


PRIOR = torch.tensor(COUNTS, dtype=torch.float64) / sum(COUNTS)
CASES = [
    *(
        Case(
            f"focal {gamma}", FocalLoss(gamma), lambda g, z, y, gamma=gamma: focal_delta(g, z, y, gamma), focal(gamma)
        )
        for gamma in (0.5, 1.0, 2.0, 3.7)
    ),
    *(
        Case(
            f"GCE {q}",
            GeneralizedCrossEntropy(q),
            lambda g, z, y, q=q: gce_delta(g, z, y, q),
            generalized_cross_entropy(q),
        )
        for q in (0.1, 0.7)
    ),
    Case("GCE 1", GeneralizedCrossEntropy(1.0), lambda g, z, y: gce_delta(g, z, y, 1.0), mean_absolute_error),
    *(
        Case(
            f"logit adjustment {tau}",
            LogitAdjustment(tau),
            lambda g, z, y, tau=tau: logit_adjustment_delta(z, y, PRIOR.to(z.dtype), tau),
            adjusted(tau, COUNTS),
        )
        for tau in (0.5, 1.0, 2.0)
    ),
    *(
        Case(
            f"label smoothing {alpha}",
            LabelSmoothing(alpha),
            lambda g, z, y, alpha=alpha: label_smoothing_delta(g, y, alpha),
            smoothed(alpha) if alpha > 0 else smoothed_towards(alpha, torch.ones(5).double() / 5),
        )
        for alpha in (0.1, 0.6, -0.4)
    ),
    Case(
        "label smoothing by frequency",
        LabelSmoothing(0.3, "prior"),
        lambda g, z, y: label_smoothing_delta(g, y, 0.3, PRIOR),
        smoothed_towards(0.3, PRIOR),
    ),
    Case(
        "class weights",
        ClassWeighting(WEIGHTS),
        lambda g, z, y: class_weight_delta(g, y, torch.tensor(WEIGHTS, dtype=torch.float64)),
        weighted(WEIGHTS),
    ),
    *(
        Case(
            f"LPL {steps}",
            LPL("fixed", steps=steps, signs=SIGNS, bounds=BOUNDS),
            lambda g, z, y, steps=steps: lpl_delta(z, y, *torch.tensor([SIGNS, BOUNDS], dtype=torch.float64), steps),
            logit_perturbation(SIGNS, BOUNDS, steps),
        )
        for steps in (1, 2, 5)
    ),
    *(
        Case(f"{method!r} is cross-entropy", method, delta, cross_entropy)
        for method, delta in [
            (FocalLoss(0.0), lambda g, z, y: focal_delta(g, z, y, 0.0)),
            (GeneralizedCrossEntropy(0.0), lambda g, z, y: gce_delta(g, z, y, 0.0)),
            (LogitAdjustment(0.0), lambda g, z, y: logit_adjustment_delta(z, y, PRIOR.to(z.dtype), 0.0)),
            (LabelSmoothing(0.0), lambda g, z, y: label_smoothing_delta(g, y, 0.0)),
            (ClassWeighting({}), lambda g, z, y: class_weight_delta(g, y, torch.ones(NUM_CLASSES))),
        ]
    ),
]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@every_case
@every_dtype
def test_gradient_plus_delta_is_the_gradient_of_the_original_loss(case, dtype):
    logits, labels = make_batch(dtype)
    gradient = logit_gradient(logits, labels)
    expected = gradient_of(case.loss, logits, labels)
    assert_equal(gradient + case.delta(gradient, logits, labels), expected, TOLERANCE[dtype])
    plain = gradient_of(cross_entropy, logits, labels)
    assert (expected - plain).norm() > 0.1 or case.loss is cross_entropy


@every_case
@every_dtype
def test_backward_through_the_loss_is_the_gradient_of_the_original_loss(case, dtype):
    logits, labels = make_batch(dtype, seed=1)
    expected = gradient_of(case.loss, logits, labels)
    assert_equal(gradient_through_loss(case.method, logits, labels), expected, TOLERANCE[dtype])


@every_case
@pytest.mark.parametrize("margin", [30.0, 80.0])
@every_dtype
def test_the_original_gradient_survives_extreme_logits(case, margin, dtype):
    """Samples fitted by a margin at which the probabilities round to 0 and 1, and as far on the wrong side."""
    logits, labels = extreme_batch(margin, dtype)
    actual = gradient_through_loss(case.method, logits, labels)
    assert actual.isfinite().all()
    if case.name != "focal 0.5":  # whose plain autograd form is 0 * infinity there
        assert_equal(actual, gradient_of(case.loss, logits, labels), TOLERANCE[dtype])


def extreme_batch(margin, dtype):
    labels = torch.arange(NUM_CLASSES).repeat(2)
    winners = torch.where(torch.arange(2 * NUM_CLASSES) < NUM_CLASSES, labels, (labels + 1) % NUM_CLASSES)
    return margin * F.one_hot(winners, NUM_CLASSES).to(dtype), labels


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.space == "logit"])
@pytest.mark.parametrize("margin", [30.0, 50.0, 80.0, 1e4])
@every_dtype
def test_every_method_stays_finite_for_extreme_logits(name, margin, dtype):
    logits, labels = extreme_batch(margin, dtype)
    loss_fn = LPGLoss(NUM_CLASSES, name, COUNTS)
    for _ in range(3):  # from the second step on the statistics are those of such logits
        z = logits.clone().requires_grad_()
        loss_fn(z, labels).backward()
        assert z.grad.isfinite().all()
        assert z.grad.norm() < 1e3


# Class weights from counts and by name.


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
    logits, labels = make_batch(dtype)
    expected = gradient_of(weighted(counted_weights(rule, counts, beta)), logits, labels)
    actual = gradient_through_loss(ClassWeighting(rule, beta), logits, labels, counts)
    assert_equal(actual, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("rule", ["balanced", "effective"])
def test_weights_from_the_class_counts_leave_absent_classes_out(rule):
    statistics = ClassStatistics(NUM_CLASSES, [400, 0, 30, 0, 3]).double()
    weights = ClassWeighting(rule, 0.9).class_weights(statistics)
    assert weights[[1, 3]].tolist() == [0, 0]
    torch.testing.assert_close(
        weights[[0, 2, 4]], torch.tensor(counted_weights(rule, [400, 30, 3], 0.9)).double(), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("rule", ["balanced", "effective"])
def test_weights_from_counts_wait_until_a_prior_that_is_being_counted_is_ready(rule):
    statistics = ClassStatistics(NUM_CLASSES).double()
    statistics.update(torch.zeros(30, NUM_CLASSES), torch.arange(30) // 26)
    statistics.fold()
    statistics.prior_is_ready = False
    assert_equal(ClassWeighting(rule, 0.9).class_weights(statistics), torch.ones(NUM_CLASSES), 1e-6)
    statistics.prior_is_ready = True
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
    logits, labels = make_batch()
    actual = gradient_through_loss(ClassWeighting(weights), logits, labels, names=NAMES)
    assert_equal(actual, gradient_of(weighted(expected), logits, labels), 1e-10)


@pytest.mark.parametrize(
    "weights",
    [np.array([0.5, 2.0]), torch.tensor([0.5, 2.0]), [np.float64(0.5), 2.0], {0: np.float64(0.5), 1: 2.0}],
    ids=["array", "tensor", "list", "dict"],
)
def test_weights_of_numpy_and_torch_are_read_back_from_the_repr(weights):
    method = parse_perturbation(repr(ClassWeighting(weights)))
    method.setup(2)
    assert method.class_weights(ClassStatistics(2)).tolist() == [0.5, 2.0]


# LPL beyond its original form.


def test_lpl_raises_the_loss_of_amplified_classes_and_lowers_that_of_dampened_ones():
    """The inner problem: the further downhill, the smaller the gradient that is left of a class."""
    logits, labels = make_batch()
    plain = gradient_of(cross_entropy, logits, labels)
    shifted = gradient_through_loss(LPL("fixed", signs=SIGNS, bounds=BOUNDS), logits, labels)
    for c, sign in enumerate(SIGNS):
        growth = shifted[labels == c].norm() - plain[labels == c].norm()
        assert growth.sign() == sign or (sign == 0 and abs(growth) < 1e-12)


@pytest.mark.parametrize("strategy", ["frequency", "accuracy"])
def test_lpl_takes_signs_and_radii_from_its_strategy(strategy):
    logits, labels = make_batch()
    statistics = ClassStatistics(NUM_CLASSES, COUNTS).double()
    statistics.update(*make_batch(seed=7))
    statistics.fold()
    prior = [count / sum(COUNTS) for count in COUNTS]
    signs, bounds = (
        reference.frequency_signs_and_bounds(prior, 0.8)
        if strategy == "frequency"
        else reference.accuracy_signs_and_bounds(prior, statistics.accuracy.tolist(), 0.8)
    )
    gradient = logit_gradient(logits, labels)
    delta = LPL(strategy, epsilon=0.8, steps=3).delta(gradient, logits, labels, statistics)
    expected = gradient_of(logit_perturbation(signs, bounds, 3), logits, labels)
    assert {-1, 1} <= set(signs)
    assert_equal(gradient + delta, expected, 1e-10)


# Noise.


def draw_noise(method, num_samples=20_000, dtype=torch.float64):
    gradient, labels = torch.zeros(num_samples, NUM_CLASSES, dtype=dtype), torch.zeros(num_samples).long()
    return method.delta(gradient, gradient, labels, ClassStatistics(NUM_CLASSES))


@pytest.mark.parametrize("sigma", [0.1, 2.0])
@every_dtype
def test_logit_noise_has_the_moments_of_a_gaussian_on_the_zero_sum_plane(sigma, dtype):
    noise = draw_noise(LogitNoise(sigma), dtype=dtype)
    num_samples = len(noise)
    assert noise.sum(-1).abs().max() < sigma * (1e-14 if dtype == torch.float64 else 1e-5)

    entry_variance = sigma**2 * (1 - 1 / NUM_CLASSES)
    assert (noise.mean(0).abs() < 5 * math.sqrt(entry_variance / num_samples)).all()
    # The squared norm is sigma^2 times a chi-squared variable with C - 1 degrees of freedom.
    expected, spread = (NUM_CLASSES - 1) * sigma**2, sigma**2 * math.sqrt(2 * (NUM_CLASSES - 1))
    squared = noise.double().square().sum(-1)
    assert abs(squared.mean() - expected) < 5 * spread / math.sqrt(num_samples)
    assert abs(squared.std() - spread) < 0.1 * spread
    covariance = noise.double().T @ noise.double() / num_samples
    projection = torch.eye(NUM_CLASSES) - 1 / NUM_CLASSES
    assert (covariance - sigma**2 * projection).abs().max() < 5 * sigma**2 * math.sqrt(2 / num_samples)


def test_logit_noise_is_fixed_by_seed_and_draw_and_new_for_every_draw():
    torch.manual_seed(1)
    first, again, other = LogitNoise(seed=3), LogitNoise(seed=3), LogitNoise(seed=4)
    draws = [draw_noise(first, 50) for _ in range(4)]
    before = torch.random.get_rng_state()
    torch.manual_seed(2)
    assert all(torch.equal(draw, draw_noise(again, 50)) for draw in draws)
    torch.manual_seed(1)
    assert torch.equal(torch.random.get_rng_state(), before)  # the global generator is left alone
    draws += [draw_noise(other, 50) for _ in range(4)]
    for i, draw in enumerate(draws):
        for later in draws[i + 1 :]:
            assert correlation(draw, later) < 5 / math.sqrt(draw.numel())


def correlation(a, b):
    return abs(F.cosine_similarity(a.flatten(), b.flatten(), dim=0).item())


def test_logit_noise_goes_on_from_its_state():
    method = LogitNoise(seed=3)
    for _ in range(3):
        draw_noise(method, 10)
    resumed = LogitNoise(seed=3)
    resumed.load_state_dict(method.state_dict())
    assert torch.equal(draw_noise(resumed, 10), draw_noise(method, 10))


def test_logit_noise_differs_between_processes(monkeypatch):
    draws = []
    for rank in range(3):
        monkeypatch.setattr("lpg_hf.perturbations.noise.process_index", lambda rank=rank: rank)
        draws.append(draw_noise(LogitNoise(seed=3), 50))
    assert max(correlation(draws[i], draws[j]) for i, j in [(0, 1), (0, 2), (1, 2)]) < 5 / math.sqrt(250)


def test_logit_noise_leaves_ignored_samples_alone():
    logits, labels = make_batch()
    delta = noise_delta(torch.randn_like(logits), labels, 1.0)
    assert ((delta == 0).all(-1) == (labels == IGNORED)).all()


# Adaptive clipping.


def class_norms(labels, generator):
    """Norms from a distribution of its own for each class: uniform on (0.1, 1.1), (0.5, 1), (0.02, 0.04)."""
    low, width = torch.tensor([0.1, 0.5, 0.02]), torch.tensor([1.0, 0.5, 0.02])
    return low[labels] + width[labels] * torch.rand(len(labels), generator=generator)


def stream(num_steps, num_samples=60, seed=0):
    """Batches of gradients with such norms; a tenth of the samples is ignored, with a huge gradient."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num_steps):
        labels = torch.arange(num_samples) % 3
        norms = class_norms(labels, generator)
        labels[::10], norms[::10] = IGNORED, 1e6
        yield torch.stack([norms, -norms, 0 * norms], dim=-1) / math.sqrt(2), labels


def adaptive_clipping(quantile):
    method = LogitClipping(quantile=quantile)
    method.setup(3)
    return method


@pytest.mark.parametrize("quantile", [0.5, 0.9])
def test_adaptive_clipping_lets_the_quantile_of_every_class_pass_on_average(quantile):
    """Robbins and Monro's steps telescope: after T of them the mean share is off by at most `range / (T step)`."""
    method, num_steps, shares = adaptive_clipping(quantile), 2000, []
    for gradient, labels in stream(num_steps):
        clipped = gradient + method.delta(gradient, gradient, labels, ClassStatistics(3))
        passes = (clipped - gradient).norm(dim=-1) == 0
        shares.append(torch.stack([passes[labels == c].double().mean() for c in range(3)]))
        method.update(gradient, labels)
        method.fold(None)
    settled = torch.stack(shares[num_steps // 2 :]).mean(0)
    # 18 samples of a class in a step: a step length of 18 / (18 + 20); a third is to spare for bounds below sqrt(2).
    assert (settled - quantile).abs().max() < 1.3 * math.sqrt(2) / (num_steps / 2 * 18 / 38)


@pytest.mark.parametrize("quantile", [0.5, 0.9])
@pytest.mark.parametrize(("c", "low", "width"), [(0, 0.1, 1.0), (1, 0.5, 0.5), (2, 0.02, 0.02)])
def test_the_bound_of_adaptive_clipping_is_the_quantile_of_its_class(c, low, width, quantile):
    """Also in a well-fitted class, whose norms are small."""
    method, bounds = adaptive_clipping(quantile), []
    for gradient, labels in stream(600):
        method.update(gradient, labels)
        method.fold(None)
        bounds.append(method.bounds[c].item())
    true_share = ((torch.tensor(bounds[300:]) - low) / width).clamp(0, 1)
    # With n samples, a step length a and a density f of the norms, the share of the stationary recursion is spread by
    # sqrt(a f q (1 - q) / n / (2 - a f)): here at most 0.11, for n = 18, a = 18 / 38 and f = 2.
    assert (true_share - quantile).square().mean().sqrt() < 0.2
    assert abs(true_share.mean() - quantile) < 0.1


def test_adaptive_clipping_never_reads_ignored_samples():
    with_ignored, without = adaptive_clipping(0.7), adaptive_clipping(0.7)
    for gradient, labels in stream(20):
        with_ignored.update(gradient, labels)
        without.update(gradient[labels != IGNORED], labels[labels != IGNORED])
        with_ignored.fold(None)
        without.fold(None)
    assert torch.equal(with_ignored.bounds, without.bounds)
    assert with_ignored.bounds.unique().numel() == 3


def test_adaptive_clipping_leaves_the_bound_of_a_class_that_does_not_occur():
    method = adaptive_clipping(0.7)
    for gradient, labels in stream(20):
        method.update(gradient, labels.where(labels != 1, 0))
        method.fold(None)
    assert method.bounds[1] == pytest.approx(math.sqrt(2))
    assert method.bounds[0] < 1.3


@pytest.mark.parametrize("split", [20, 7])
def test_adaptive_clipping_learns_the_same_from_two_processes_and_two_micro_batches(split):
    """The reduced sums of two processes move both to the bounds of one process with the whole batch."""
    whole, one, two = adaptive_clipping(0.6), adaptive_clipping(0.6), adaptive_clipping(0.6)
    for gradient, labels in stream(20):
        whole.update(gradient, labels)
        whole.fold(None)
        one.update(gradient[:split], labels[:split])
        two.update(gradient[split:40], labels[split:40])
        two.update(gradient[40:], labels[40:])
        sums = [sent_by(one), sent_by(two)]
        for process in (one, two):
            process.fold(lambda _, sums=sums: sums[0] + sums[1])
    assert torch.equal(one.bounds, two.bounds)
    torch.testing.assert_close(one.bounds, whole.bounds, rtol=0, atol=1e-6)


def sent_by(method):
    """What a method hands to `reduce`."""
    sent = []

    def reduce(tensor):
        sent.append(tensor.clone())
        return tensor

    copy.deepcopy(method).fold(reduce)
    assert len(sent) == 1
    return sent[0]


def test_adaptive_clipping_uses_the_bounds_of_the_step_before():
    method = adaptive_clipping(0.6)
    batches = list(stream(30))
    for gradient, labels in batches[:-1]:
        method.update(gradient, labels)
        method.fold(None)
    gradient, labels = batches[-1]
    bounds = method.bounds.clone()
    method.update(gradient, labels)
    clipped = gradient + method.delta(gradient, gradient, labels, ClassStatistics(3))
    labelled = labels != IGNORED
    expected = torch.minimum(gradient.norm(dim=-1), bounds[labels.clamp(min=0)])
    torch.testing.assert_close(clipped.norm(dim=-1)[labelled], expected[labelled])


@pytest.mark.parametrize("method", [LogitClipping(quantile=0.5), LogitClipping(0.5), LPG()], ids=repr)
def test_fold_needs_no_reduction(method):
    """As its base class declares it: one process has nothing to reduce."""
    method = copy.deepcopy(method)
    method.setup(3)
    method.fold()


# The bounds on the deltas, row by row of the table in the theory.


@st.composite
def batches(draw):
    num_classes = draw(st.integers(2, 6))
    labels = draw(st.lists(st.integers(0, num_classes - 1), min_size=1, max_size=6))
    logit = st.floats(-40, 40, width=32)
    rows = [draw(st.lists(logit, min_size=num_classes, max_size=num_classes)) for _ in labels]
    logits, labels = torch.tensor(rows, dtype=torch.float64), torch.tensor(labels)
    gradient = torch.from_numpy(reference.logit_gradient(logits.numpy(), labels.tolist()))
    probabilities = reference.softmax(logits.numpy())
    p = torch.tensor([probabilities[i, label] for i, label in enumerate(labels)])
    return logits, labels, gradient, p


def positive(num_classes, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(num_classes, dtype=torch.float64, generator=generator) + 1e-3


def assert_zero_sum_within(delta, bound):
    norms = delta.norm(dim=-1)
    assert (norms <= torch.as_tensor(bound, dtype=norms.dtype) * (1 + 1e-9) + 1e-12).all(), (norms, bound)
    assert delta.sum(-1).abs().max() < 1e-12


@few_examples
@given(batch=batches(), seed=st.integers(0, 99), sign=st.sampled_from([1.0, -1.0]))
def test_lpg_deltas_stay_within_their_radius(batch, seed, sign):
    _, labels, gradient, _ = batch
    bounds = positive(gradient.shape[1], seed)
    assert_zero_sum_within(lpg_delta(gradient, labels, sign * torch.ones_like(bounds), bounds), bounds[labels])


@few_examples
@given(batch=batches(), alpha=st.floats(-0.99, 0.99))
def test_label_smoothing_deltas_have_exactly_their_norm(batch, alpha):
    _, labels, gradient, _ = batch
    norm = abs(alpha) * math.sqrt(1 - 1 / gradient.shape[1])
    delta = label_smoothing_delta(gradient, labels, alpha)
    assert_zero_sum_within(delta, norm)
    assert_equal(delta.norm(dim=-1), torch.full((len(labels),), norm, dtype=torch.float64), 1e-12)


@few_examples
@given(batch=batches(), seed=st.integers(0, 99), scale=st.floats(0.1, 10))
def test_class_weighting_deltas_are_bounded(batch, seed, scale):
    _, labels, gradient, p = batch
    weights = scale * positive(gradient.shape[1], seed)
    bound = math.sqrt(2) * (weights[labels] - 1).abs() * (1 - p)
    assert_zero_sum_within(class_weight_delta(gradient, labels, weights), bound)


@few_examples
@given(batch=batches(), seed=st.integers(0, 99), tau=st.floats(0, 3))
def test_logit_adjustment_deltas_are_bounded_by_the_imbalance(batch, seed, tau):
    logits, labels, gradient, _ = batch
    prior = positive(gradient.shape[1], seed)
    prior = prior / prior.sum()
    bound = math.sqrt(2) * math.tanh(tau * math.log(prior.max() / prior.min()) / 4)
    assert_zero_sum_within(logit_adjustment_delta(logits, labels, prior, tau), bound)


@few_examples
@given(batch=batches(), seed=st.integers(0, 99), sign=st.sampled_from([1.0, -1.0]), steps=st.integers(1, 5))
def test_lpl_deltas_are_at_most_half_their_radius(batch, seed, sign, steps):
    logits, labels, gradient, _ = batch
    bounds = 3 * positive(gradient.shape[1], seed)
    delta = lpl_delta(logits, labels, sign * torch.ones_like(bounds), bounds, steps)
    assert_zero_sum_within(delta, bounds[labels] / 2)


@few_examples
@given(batch=batches(), gamma=st.floats(1, 5))
def test_focal_deltas_are_bounded(batch, gamma):
    logits, labels, gradient, p = batch
    delta = focal_delta(gradient, logits, labels, gamma)
    assert_zero_sum_within(delta, math.sqrt(2) * max(1, gamma))
    largest_factor = (1 + gamma) * (1 - p) ** gamma
    assert ((gradient + delta).norm(dim=-1) <= largest_factor * gradient.norm(dim=-1) + 1e-9).all()


@few_examples
@given(batch=batches(), q=st.floats(0, 1))
def test_gce_deltas_are_bounded(batch, q):
    logits, labels, gradient, p = batch
    assert_zero_sum_within(gce_delta(gradient, logits, labels, q), math.sqrt(2) * (1 - p**q) * (1 - p))


@few_examples
@given(batch=batches(), max_norm=st.floats(1e-3, 2))
def test_clipping_deltas_have_exactly_the_excess_as_norm(batch, max_norm):
    _, _, gradient, _ = batch
    delta = clip_delta(gradient, max_norm)
    excess = (gradient.norm(dim=-1) - max_norm).clamp(min=0)
    assert_zero_sum_within(delta, excess)
    assert_equal(delta.norm(dim=-1), excess, 1e-12)


# Bad input.


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: FocalLoss(-0.1), r"`gamma` must be at least 0; found -0\.1"),
        (lambda: FocalLoss(math.inf), r"`gamma` must be finite; found inf"),
        (lambda: GeneralizedCrossEntropy(-0.1), r"`q` must be in \[0, 1\]; found -0\.1"),
        (lambda: GeneralizedCrossEntropy(1.1), r"`q` must be in \[0, 1\]; found 1\.1"),
        (lambda: LogitAdjustment(-0.1), r"`tau` must be from 0 to 4; found -0\.1"),
        (lambda: LogitAdjustment(math.inf), r"`tau` must be from 0 to 4; found inf"),
        (lambda: LabelSmoothing(1.0), r"`alpha` must be in \(-1, 1\); found 1\.0"),
        (lambda: LabelSmoothing(-1.0), r"`alpha` must be in \(-1, 1\); found -1\.0"),
        (lambda: LogitNoise(-0.1), r"`sigma` must be at least 0; found -0\.1"),
        (lambda: LogitNoise(math.nan), r"`sigma` must be at least 0; found nan"),
        (lambda: LogitNoise(math.inf), r"`sigma` must be finite; found inf"),
        (lambda: LPL(steps=2.5), r"`steps` must be a whole number; found 2\.5"),
        (lambda: LPL(steps=0), r"`steps` must be at least 1; found 0"),
        (lambda: LPL(epsilon=-1.0), r"`epsilon` must be at least 0; found -1\.0"),
        (lambda: LPL("fixed"), r"`signs` must be given, one per class"),
        (lambda: LogitClipping(quantile=0.0), r"`quantile` must be in \(0, 1\); found 0\.0"),
        (lambda: LogitClipping(quantile=1.0), r"`quantile` must be in \(0, 1\); found 1\.0"),
        (lambda: LogitClipping(0.5, 0.5), r"`quantile` must be left out when `max_norm` is given"),
        (lambda: ClassWeighting("sqrt"), r"`weights` must be 'balanced', 'effective', a list or a dict; found 'sqrt'"),
        (lambda: ClassWeighting([1.0, -1.0]), r"`weights` must be at least 0 for each class; found \[1\.0, -1\.0\]"),
        (lambda: ClassWeighting({"cat": -1.0}), r"`weights` must be at least 0 for each class"),
        (lambda: ClassWeighting([1.0, math.inf]), r"`weights` must be finite for each class; found \[1\.0, inf\]"),
        (lambda: ClassWeighting({"cat": math.inf}), r"`weights` must be finite for each class"),
        (lambda: ClassWeighting("effective", 1.0), r"`beta` must be in \[0, 1\); found 1\.0"),
        (lambda: ClassWeighting("effective", -0.1), r"`beta` must be in \[0, 1\); found -0\.1"),
        (lambda: ClassRelativeDampening(math.inf), r"`power` must be finite; found inf"),
        (lambda: ClassRelativeDampening(-1.0), r"`power` must be at least 0; found -1\.0"),
    ],
)
def test_arguments_out_of_range_are_refused_with_name_value_and_range(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0, 2.0], r"`weights` must be one weight for each of 5 classes; found \[1\.0, 2\.0\]"),
        ([], r"`weights` must be one weight for each of 5 classes; found \[\]"),
        ({"cow": 2.0}, r"the key 'cow', which is no class: .*Known names: 'cat', 'dog', 'emu', 'fox', 'gnu'"),
        ({5: 2.0}, r"the key 5, which is no class: use an index in \[0, 5\) or a label name"),
        ({-1: 2.0}, r"the key -1, which is no class"),
        ({1.0: 2.0}, r"the key 1\.0, which is no class"),
    ],
)
def test_weights_that_do_not_fit_the_classes_are_refused(weights, message):
    method = ClassWeighting(weights)
    method.use_label_names(NAMES)
    with pytest.raises(ValueError, match=message):
        LPGLoss(NUM_CLASSES, [method])


def test_label_names_without_a_model_are_refused_with_a_hint():
    with pytest.raises(ValueError, match=r"the key 'cat'.*no names \(LPGTrainer takes them from the model's config\)"):
        LPGLoss(NUM_CLASSES, [ClassWeighting({"cat": 2.0})])
