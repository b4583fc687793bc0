"""What a batch says of its logits, and their gradient."""

import itertools
import math
from unittest import mock

import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from logit_batches import LargestTensor, assert_equal, drawn_batches, every_dtype, few_examples, offsets_of
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from lpg_hf.batch import IGNORE_INDEX, MAX_STACKED, LogitBatch, Offsets, logit_gradient, summed_cross_entropy


def gradient_of_batch(logits, labels):
    return LogitBatch(logits, labels).gradient


every_gradient = pytest.mark.parametrize("gradient_at", [logit_gradient, gradient_of_batch])


@every_gradient
@few_examples
@given(batch=drawn_batches())
def test_logit_gradient_is_softmax_minus_onehot_and_sums_to_zero(gradient_at, batch):
    gradient = gradient_at(batch.logits, batch.labels)
    assert_equal(gradient, reference.logit_gradient(batch.logits.numpy(), batch.labels.tolist()), 1e-14)
    assert_equal(gradient.sum(-1), torch.zeros(len(batch.labels)), 1e-12)


@every_gradient
@few_examples
@given(batch=drawn_batches())
def test_logit_gradient_is_the_gradient_of_summed_cross_entropy(gradient_at, batch):
    logits = batch.logits.clone().requires_grad_()
    F.cross_entropy(logits, batch.labels, ignore_index=IGNORE_INDEX, reduction="sum").backward()
    assert_equal(gradient_at(batch.logits, batch.labels), logits.grad, 1e-12)


@every_gradient
@few_examples
@given(batch=drawn_batches())
def test_norm_of_the_logit_gradient_lies_between_the_bounds_of_the_missing_probability(gradient_at, batch):
    missing = np.array(
        [1 - p[c] for p, c in zip(reference.softmax(batch.logits), batch.labels, strict=True) if c >= 0]
    )
    length = gradient_at(batch.logits, batch.labels).norm(dim=-1)[batch.labels >= 0].numpy()
    assert (length <= math.sqrt(2) * missing + 1e-12).all()
    assert (length >= missing / math.sqrt(1 - 1 / batch.num_classes) - 1e-12).all()


@every_gradient
@pytest.mark.parametrize("margin", [5.0, 20.0, 40.0, 80.0])
def test_float32_logit_gradient_keeps_the_label_entry_when_the_probability_rounds_to_one(gradient_at, margin):
    logits = torch.tensor([[0.0, margin, 0.5, -1.0]])
    labels = torch.tensor([1])
    expected = reference.logit_gradient(logits.double().numpy(), labels.tolist())
    assert_equal(gradient_at(logits, labels).double() / torch.from_numpy(expected), torch.ones(1, 4), 1e-5)


@every_gradient
def test_ignored_samples_have_no_gradient_whatever_their_logits(gradient_at):
    logits = torch.tensor([[math.nan, 0.0], [math.inf, -math.inf], [1e30, 5.0], [0.0, 0.0]])
    gradient = gradient_at(logits, torch.tensor([IGNORE_INDEX, IGNORE_INDEX, IGNORE_INDEX, 0]))
    assert gradient.tolist() == [[0, 0], [0, 0], [0, 0], [-0.5, 0.5]]


@every_gradient
@every_dtype
def test_an_empty_batch_has_an_empty_gradient(gradient_at, dtype):
    gradient = gradient_at(torch.zeros(0, 3, dtype=dtype), torch.zeros(0, dtype=torch.int64))
    assert gradient.shape == (0, 3)
    assert gradient.dtype == dtype


@every_gradient
def test_a_batch_of_ignored_samples_has_a_gradient_of_zero(gradient_at):
    assert (gradient_at(torch.randn(4, 3), torch.full((4,), IGNORE_INDEX)) == 0).all()


@every_gradient
def test_a_hundred_thousand_classes_need_no_tensor_larger_than_the_logits(gradient_at):
    labels = torch.tensor([0, 0, 5, 99_999, 99_999, 99_999, 7, IGNORE_INDEX])
    logits = torch.randn(8, 100_000, generator=torch.Generator().manual_seed(0))
    with LargestTensor() as largest:
        gradient = gradient_at(logits, labels)
    assert largest.numel == logits.numel()
    assert gradient.shape == logits.shape
    assert gradient.isfinite().all()


@every_gradient
def test_nothing_reads_a_value_back_from_the_device(gradient_at):
    # A meta tensor has no values: whatever depends on one (`item`, `unique`, a mask as an index) raises.
    labels = torch.zeros(6, dtype=torch.int64, device="meta")
    assert gradient_at(torch.randn(6, 4, device="meta"), labels).shape == (6, 4)


@few_examples
@given(drawn_batches())
def test_what_a_batch_says_of_its_samples_equals_the_reference(drawn):
    batch = drawn.batch
    assert torch.equal(batch.valid_mask, drawn.labels != IGNORE_INDEX)
    assert torch.equal(batch.ignore_mask, ~batch.valid_mask)
    valid = batch.valid_mask
    assert_equal(batch.label_prob[valid], drawn.label_prob[valid], 1e-12)
    assert_equal(batch.label_log_prob, drawn.label_prob.log(), 1e-10)
    for i, label in enumerate(drawn.labels.tolist()):
        if label != IGNORE_INDEX:
            p = reference.softmax(drawn.logits[i : i + 1].numpy())[0]
            assert batch.classes[i] == label
            assert math.isclose(batch.confidence_ratios[1, i], p[label] / p.max(), rel_tol=1e-9)
            assert math.isclose(batch.confidence_ratio[i], p[label] / p.max(), rel_tol=1e-9)
            assert batch.is_confident_error[i] == (p[label] < p.max() / 10)


@few_examples
@given(drawn_batches())
def test_an_offset_moves_the_judgment_and_nothing_else(drawn):
    offset = torch.linspace(-2, 1, drawn.num_classes, dtype=torch.float64)
    plain, moved = drawn.batch, LogitBatch(drawn.logits, drawn.labels, offsets_of(offset))
    judged = LogitBatch(drawn.logits + offset, drawn.labels)
    for name in ("confidence_ratio", "is_confident_error"):
        assert torch.equal(getattr(moved, name)[drawn.batch.valid_mask], getattr(judged, name)[drawn.batch.valid_mask])
    for name in ("label_prob", "label_log_prob", "gradient"):
        assert torch.equal(getattr(moved, name), getattr(plain, name))


@few_examples
@given(drawn_batches())
def test_one_offset_for_both_gives_what_two_equal_ones_give(drawn):
    offset = torch.linspace(-2, 1, drawn.num_classes, dtype=torch.float64)
    once = LogitBatch(drawn.logits, drawn.labels, Offsets(torch.stack([offset, 0 * offset]), plain=1))
    twice = LogitBatch(drawn.logits, drawn.labels, offsets_of(offset, offset))
    for name in ("confidence_ratio", "fit_excess", "label_log_prob", "gradient"):
        valid = drawn.batch.valid_mask
        assert torch.equal(getattr(once, name)[valid], getattr(twice, name)[valid])


@pytest.mark.parametrize("plain", [0, 1, 2])
@few_examples
@given(drawn=drawn_batches(), seed=st.integers(0, 99))
def test_a_large_batch_is_looked_at_in_turn_with_the_same_results(drawn, seed, plain):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(plain + 3, drawn.num_classes, dtype=torch.float64, generator=generator)
    rows[plain] = 0
    at_once, in_turn = (look_at(drawn, Offsets(rows, plain), limit) for limit in (MAX_STACKED, 0))
    for name in ("label_prob", "label_log_prob", "confidence_ratios", "gradient", "label_gradient", "gradient_norm"):
        assert_equal(getattr(in_turn, name), getattr(at_once, name), 1e-15)
    valid = drawn.labels != IGNORE_INDEX
    assert_equal(in_turn.fit_excess[valid], at_once.fit_excess[valid], 1e-15)
    for found, expected in zip(summed_cross_entropy(in_turn), summed_cross_entropy(at_once), strict=True):
        assert_equal(found, expected, 1e-12)
    for position in (0, 1):
        target = in_turn.take_target(position)
        assert_equal(target, at_once.take_target(position), 1e-15)
        logits = drawn.logits + rows[plain + 1 + position]
        assert_equal(target, reference.logit_gradient(logits.numpy(), drawn.labels.tolist()), 1e-14)
        assert in_turn.take_target(position) is None  # whoever takes it may overwrite it
    assert in_turn.take_target(2) is None


@pytest.mark.parametrize("limit", [MAX_STACKED, 0])
@every_dtype
def test_a_target_without_offset_is_the_gradient_and_ignored_samples_have_none(dtype, limit):
    generator = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(40, 7, dtype=torch.float64, generator=generator).to(dtype)
    labels = torch.randint(7, (40,), generator=generator)
    labels[:3] = IGNORE_INDEX
    logits[0], logits[1, 2] = math.nan, math.inf
    offset = torch.tensor([0.0, -69.0, -3.0, 0.0, -1.0, 0.0, -69.0], dtype=dtype)
    rows = torch.stack([torch.zeros_like(offset), torch.zeros_like(offset), offset])
    with mock.patch("lpg_hf.batch.MAX_STACKED", limit):
        batch = LogitBatch(logits, labels, Offsets(rows, plain=0))
    assert torch.equal(batch.take_target(0), batch.gradient)
    target = batch.take_target(1)
    assert (target[:3] == 0).all() and target.isfinite().all()
    expected = reference.logit_gradient((logits + offset)[3:].double().numpy(), labels[3:].tolist())
    assert_equal(target[3:], expected, 1e-5 if dtype == torch.float32 else 1e-13)


def look_at(drawn, offsets, limit):
    with mock.patch("lpg_hf.batch.MAX_STACKED", limit):
        return LogitBatch(drawn.logits, drawn.labels, offsets)


@few_examples
@given(drawn_batches())
def test_the_norm_of_the_gradient_is_that_of_its_rows(drawn):
    expected = [np.linalg.norm(row) for row in drawn.batch.gradient.numpy()]
    assert_equal(drawn.batch.gradient_norm, expected, 1e-12)


def test_batches_can_be_mapped():
    """Without offsets, which need their matrix in place."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 4, dtype=torch.float64, generator=generator)
    labels = torch.randint(4, (3, 5), generator=generator)
    labels[1, :2] = IGNORE_INDEX

    def of_batch(logits, labels):
        batch = LogitBatch(logits, labels)
        return batch.label_log_prob, batch.confidence_ratios, batch.gradient, batch.fit_excess

    for mapped, *parts in zip(torch.func.vmap(of_batch)(logits, labels), *map(of_batch, logits, labels), strict=True):
        assert torch.equal(mapped, torch.stack(parts))


# How far labels are fitted.


def expected_excess(logits, labels, offset=0.0):
    rows = logits.double().numpy() + np.asarray(offset, dtype=float)
    return [reference.fit_excess(row, label) for row, label in zip(rows, labels, strict=True)]


@few_examples
@given(drawn_batches())
def test_fit_excess_equals_the_reference_with_and_without_an_offset(drawn):
    valid = drawn.labels != IGNORE_INDEX
    logits, labels = drawn.logits[valid], drawn.labels[valid].tolist()
    offset = torch.linspace(-2, 1, drawn.num_classes, dtype=torch.float64)
    for shift in (None, torch.zeros_like(offset), offset):
        found = LogitBatch(drawn.logits, drawn.labels, offsets_of(fitted=shift)).fit_excess
        assert found.shape == drawn.labels.shape
        assert_equal(found[valid], expected_excess(logits, labels, 0.0 if shift is None else shift), 1e-12)


@few_examples
@given(drawn_batches())
def test_fit_excess_lies_within_1_and_leaves_all_else_as_it_is(drawn):
    offset = torch.linspace(-2, 1, drawn.num_classes, dtype=torch.float64)
    for judged, fitted in itertools.product((None, offset.flip(0)), (None, offset)):
        batch, plain = (
            LogitBatch(drawn.logits.clone(), drawn.labels, offsets_of(judged, shift)) for shift in (fitted, None)
        )
        assert (batch.fit_excess[batch.valid_mask].abs() <= 1 + 1e-12).all()
        for name in ("logits", "gradient", "label_prob", "confidence_ratio", "is_confident_error"):
            assert torch.equal(getattr(batch, name), getattr(plain, name))
    assert torch.equal(batch.logits, drawn.logits)
    assert torch.equal(offset, torch.linspace(-2, 1, drawn.num_classes, dtype=torch.float64))


def test_fit_excess_is_0_in_the_mean_over_labels_that_are_drawn_from_the_model():
    """Its expectation is `sum_c p_c (p_c - sum_j p_j^2) = 0`."""
    logits = torch.tensor([[1.0, 0.3, -0.7]], dtype=torch.float64)
    probabilities = torch.from_numpy(reference.softmax(logits.numpy())[0])
    excess = LogitBatch(logits.repeat(3, 1), torch.arange(3)).fit_excess
    assert_equal(torch.dot(excess, probabilities), 0, 1e-15)
    assert excess[0] > 0.1


@pytest.mark.parametrize("with_offset", [False, True])
@pytest.mark.parametrize("margin", [5.0, 20.0, 80.0, 2000.0])
def test_float32_fit_excess_of_saturated_logits(margin, with_offset):
    """Of a label that is believed, one that is not, and one of two that share the belief."""
    logits = torch.tensor([[0.0, margin, 0.5, -1.0], [0.0, margin, 0.5, -1.0], [margin, margin, 0.0, 0.0]])
    labels = torch.tensor([1, 0, 1])
    offset = torch.tensor([0.4, -0.2, 0.1, 0.0]) if with_offset else None
    found = LogitBatch(logits, labels, offsets_of(fitted=offset)).fit_excess
    assert found.dtype == torch.float32
    expected = expected_excess(logits, labels.tolist(), offset if with_offset else 0.0)
    # A logit that an offset was added to is rounded once more.
    assert_equal(found, expected, 5e-7 + torch.finfo(torch.float32).eps * margin * with_offset)


@pytest.mark.parametrize("with_offset", [False, True])
def test_fit_excess_of_a_class_that_the_model_rules_out(with_offset):
    """A logit of minus infinity, as masks of classes make it."""
    offset = torch.tensor([0.0, 0.0, 0.0]) if with_offset else None
    logits = torch.tensor([[0.0, 0.0, -math.inf], [0.0, 0.0, -math.inf]])
    found = LogitBatch(logits, torch.tensor([0, 2]), offsets_of(fitted=offset)).fit_excess
    assert_equal(found, [0.0, -0.5], 1e-6)


@pytest.mark.parametrize("with_offset", [False, True])
@every_dtype
def test_fit_excess_of_valid_samples_does_not_see_the_ignored_ones(dtype, with_offset):
    logits = torch.tensor([[math.nan, 0.0], [1.0, 0.0], [math.inf, -math.inf], [1e30, 5.0]], dtype=dtype)
    labels = torch.tensor([IGNORE_INDEX, 0, IGNORE_INDEX, IGNORE_INDEX])
    offset = torch.tensor([0.5, -0.5], dtype=dtype) if with_offset else None
    found = LogitBatch(logits, labels, offsets_of(fitted=offset)).fit_excess
    assert found.shape == (4,)
    expected = expected_excess(logits[1:2], [0], offset if with_offset else 0.0)
    assert_equal(found[1:2], expected, 1e-6 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("with_offset", [False, True])
@every_dtype
def test_fit_excess_of_an_empty_batch_is_empty(dtype, with_offset):
    logits, labels = torch.zeros(0, 3, dtype=dtype), torch.zeros(0, dtype=torch.int64)
    found = LogitBatch(logits, labels, offsets_of(torch.zeros(3, dtype=dtype) if with_offset else None)).fit_excess
    assert found.shape == (0,) and found.dtype == dtype


def test_fit_excess_needs_no_second_matrix_and_no_value_from_the_device():
    """The ways to look at a large batch share their memory."""
    num_classes = 1 + MAX_STACKED // 8
    logits, offset = torch.randn(8, num_classes, generator=torch.Generator().manual_seed(0)), torch.zeros(num_classes)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as measured:
        assert LogitBatch(logits, torch.arange(8), offsets_of(offset, offset)).fit_excess.isfinite().all()
    held = np.cumsum(
        [event.nbytes() for event in measured.profiler.kineto_results.events() if event.name() == "[memory]"]
    )
    assert logits.nbytes <= held.max() < 1.5 * logits.nbytes
    labels = torch.zeros(6, dtype=torch.int64, device="meta")
    for shift in (None, torch.zeros(4, device="meta")):
        assert LogitBatch(torch.randn(6, 4, device="meta"), labels, offsets_of(shift, shift)).fit_excess.shape == (6,)
