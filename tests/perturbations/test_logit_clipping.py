"""Logit-gradient clipping: a fixed bound, and the running quantile of each class."""

import copy
import math

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from logit_batches import (
    NUM_CLASSES,
    assert_close,
    assert_equal,
    assert_rows_close,
    assert_zero_sum_within,
    delta_of,
    drawn_batches,
    few_examples,
    make_batch,
    more_examples,
    random_batch,
    valid_batches,
)

from lpg_hf.batch import IGNORE_INDEX, LogitBatch
from lpg_hf.perturbations import LogitClipping
from lpg_hf.perturbations.logit_clipping import clip_weight
from lpg_hf.statistics import ClassStatistics


def clip_delta(gradient, max_norm):
    """The delta of the method with a fixed bound, which looks at the gradient alone."""
    batch = LogitBatch(torch.zeros_like(gradient), torch.zeros(len(gradient), dtype=torch.int64))
    return LogitClipping(max_norm).delta(gradient, batch, ClassStatistics(gradient.shape[1]))


# The fixed bound.


@few_examples
@given(batch=drawn_batches(), max_norm=st.sampled_from([0.001, 0.3, 0.9, 2.0]))
def test_clip_delta_equals_the_reference_and_has_the_excess_as_its_norm(batch, max_norm):
    gradient = batch.gradient
    delta = clip_delta(gradient, max_norm)
    assert_equal(delta, reference.clip_delta(gradient.numpy(), max_norm), 1e-12)
    assert_equal(delta.norm(dim=-1), (gradient.norm(dim=-1) - max_norm).clamp(min=0), 1e-10)
    assert ((gradient + delta).norm(dim=-1) <= max_norm * (1 + 1e-12)).all()


@few_examples
@given(batch=drawn_batches())
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


def test_clip_weight_takes_one_bound_per_sample_and_leaves_zero_gradients():
    gradient = torch.tensor([[3.0, -4.0], [3.0, -4.0], [0.0, 0.0]]).double()
    perturbed = gradient * clip_weight(gradient, torch.tensor([1.0, 10.0, 1.0]).double())[:, None]
    assert_equal(perturbed, [[0.6, -0.8], [3, -4], [0, 0]], 1e-15)


@pytest.mark.parametrize("options", [{}, {"max_norm": 0.05}, {"max_norm": 2.0}])
def test_logit_clipping_equals_the_reference(options):
    batch = make_batch()
    delta = delta_of(LogitClipping(**options), batch, ClassStatistics(NUM_CLASSES))
    assert_equal(delta, reference.clip_delta(batch.gradient.numpy(), options.get("max_norm", 0.3)), 1e-12)


def test_clipping_acts_on_the_gradient_left_before():
    batch = make_batch()
    gradient = 5 * batch.gradient
    delta = LogitClipping(0.3).delta(gradient, batch, ClassStatistics(NUM_CLASSES))
    assert_equal(delta, reference.clip_delta(gradient.numpy(), 0.3), 1e-12)


@more_examples
@given(drawn=valid_batches(), max_norm=st.floats(1e-3, 2))
def test_clipping_deltas_have_exactly_the_excess_as_norm(drawn, max_norm):
    gradient, delta = drawn.gradient, clip_delta(drawn.gradient, max_norm)
    excess = (gradient.norm(dim=-1) - max_norm).clamp(min=0)
    assert_zero_sum_within(delta, excess)
    assert_close(delta.norm(dim=-1), excess, 1e-12)


# The running quantile.


def class_norms(labels, generator):
    """Norms from a distribution of its own for each class: uniform on (0.1, 1.1), (0.5, 1), (0.02, 0.04)."""
    low, width = torch.tensor([0.1, 0.5, 0.02]), torch.tensor([1.0, 0.5, 0.02])
    return low[labels] + width[labels] * torch.rand(len(labels), generator=generator)


def stream(num_steps, num_samples=60, seed=0, norm_of_ignored=1e6):
    """Gradients with such norms, and their batches; a tenth of the samples is ignored."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num_steps):
        labels = torch.arange(num_samples) % 3
        norms = class_norms(labels, generator)
        labels[::10], norms[::10] = IGNORE_INDEX, norm_of_ignored
        gradient = torch.stack([norms, -norms, 0 * norms], dim=-1) / math.sqrt(2)
        yield gradient, LogitBatch(gradient, labels)


def rows_of(batch, rows):
    return LogitBatch(batch.logits[rows], batch.labels[rows])


def adaptive_clipping(quantile):
    method = LogitClipping(quantile=quantile)
    method.setup(3)
    return method


@pytest.mark.parametrize("quantile", [0.5, 0.9])
def test_adaptive_clipping_lets_the_quantile_of_every_class_pass_on_average(quantile):
    """Robbins and Monro's steps telescope: after T of them the mean share is off by at most `range / (T step)`."""
    method, num_steps, shares = adaptive_clipping(quantile), 2000, []
    for gradient, batch in stream(num_steps):
        clipped = gradient + method.delta(gradient, batch, ClassStatistics(3))
        passes = (clipped - gradient).norm(dim=-1) == 0
        shares.append(torch.stack([passes[batch.labels == c].double().mean() for c in range(3)]))
        method.update(gradient, batch)
        method.step(None)
    settled = torch.stack(shares[num_steps // 2 :]).mean(0)
    # 18 samples of a class in a step: a step length of 18 / (18 + 20); a third is to spare for bounds below sqrt(2).
    assert (settled - quantile).abs().max() < 1.3 * math.sqrt(2) / (num_steps / 2 * 18 / 38)


@pytest.mark.parametrize("quantile", [0.5, 0.9])
@pytest.mark.parametrize(("c", "low", "width"), [(0, 0.1, 1.0), (1, 0.5, 0.5), (2, 0.02, 0.02)])
def test_the_bound_of_adaptive_clipping_is_the_quantile_of_its_class(c, low, width, quantile):
    """Also in a well-fitted class, whose norms are small."""
    method, bounds = adaptive_clipping(quantile), []
    for gradient, batch in stream(600):
        method.update(gradient, batch)
        method.step(None)
        bounds.append(method.bounds[c].item())
    true_share = ((torch.tensor(bounds[300:]) - low) / width).clamp(0, 1)
    # With n samples, a step length a and a density f of the norms, the share of the stationary recursion is spread by
    # sqrt(a f q (1 - q) / n / (2 - a f)): here at most 0.11, for n = 18, a = 18 / 38 and f = 2.
    assert (true_share - quantile).square().mean().sqrt() < 0.2
    assert abs(true_share.mean() - quantile) < 0.1


@pytest.mark.parametrize("norm_of_ignored", [1e6, 0.0])
def test_adaptive_clipping_never_reads_ignored_samples(norm_of_ignored):
    with_ignored, without = adaptive_clipping(0.7), adaptive_clipping(0.7)
    for gradient, batch in stream(20, norm_of_ignored=norm_of_ignored):
        with_ignored.update(gradient, batch)
        without.update(gradient[batch.valid_mask], rows_of(batch, batch.valid_mask))
        with_ignored.step(None)
        without.step(None)
    assert torch.equal(with_ignored.bounds, without.bounds)
    assert with_ignored.bounds.unique().numel() == 3


def test_adaptive_clipping_never_silences_a_class_whose_samples_are_all_fitted():
    method = adaptive_clipping(0.5)
    for gradient, batch in stream(100):
        method.update(0 * gradient, batch)
        method.step(None)
    torch.testing.assert_close(method.bounds, torch.full((3,), 1e-3))


def test_adaptive_clipping_leaves_the_bound_of_a_class_that_does_not_occur():
    method = adaptive_clipping(0.7)
    for gradient, batch in stream(20):
        method.update(gradient, LogitBatch(gradient, batch.labels.where(batch.labels != 1, 0)))
        method.step(None)
    assert method.bounds[1] == pytest.approx(math.sqrt(2))
    assert method.bounds[0] < 1.3


@pytest.mark.parametrize("split", [20, 7])
def test_adaptive_clipping_learns_the_same_from_two_processes_and_two_micro_batches(split):
    """The reduced sums of two processes move both to the bounds of one process with the whole batch."""
    whole, one, two = adaptive_clipping(0.6), adaptive_clipping(0.6), adaptive_clipping(0.6)
    for gradient, batch in stream(20):
        whole.update(gradient, batch)
        whole.step(None)
        parts = [slice(split), slice(split, 40), slice(40, None)]
        for process, part in zip((one, two, two), parts, strict=True):
            process.update(gradient[part], rows_of(batch, part))
        sums = [sent_by(one), sent_by(two)]
        for process in (one, two):
            process.step(lambda _, sums=sums: sums[0] + sums[1])
    assert torch.equal(one.bounds, two.bounds)
    torch.testing.assert_close(one.bounds, whole.bounds, rtol=0, atol=1e-6)


def sent_by(method):
    """What a method hands to `reduce`."""
    sent = []

    def reduce(tensor):
        sent.append(tensor.clone())
        return tensor

    copy.deepcopy(method).step(reduce)
    assert len(sent) == 1
    return sent[0]


def test_adaptive_clipping_uses_the_bounds_of_the_step_before():
    method = adaptive_clipping(0.6)
    batches = list(stream(30))
    for gradient, batch in batches[:-1]:
        method.update(gradient, batch)
        method.step(None)
    gradient, batch = batches[-1]
    bounds = method.bounds.clone()
    method.update(gradient, batch)
    clipped = gradient + method.delta(gradient, batch, ClassStatistics(3))
    expected = torch.minimum(gradient.norm(dim=-1), bounds[batch.classes])
    torch.testing.assert_close(clipped.norm(dim=-1)[batch.valid_mask], expected[batch.valid_mask])


# Arguments.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_norm": 0.0}, r"`max_norm` must be positive; found 0\.0"),
        ({"max_norm": -1.0}, r"`max_norm` must be positive; found -1\.0"),
        ({"quantile": 0.0}, r"`quantile` must be in \(0, 1\); found 0\.0"),
        ({"quantile": 1.0}, r"`quantile` must be in \(0, 1\); found 1\.0"),
        ({"max_norm": 0.5, "quantile": 0.5}, r"`quantile` must be left out when `max_norm` is given"),
    ],
)
def test_arguments_out_of_range_are_refused_with_name_value_and_range(options, message):
    with pytest.raises(ValueError, match=message):
        LogitClipping(**options)
