"""Logit adjustment: the formula and the method against the reference and the cross-entropy of shifted logits."""

import math

import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from logit_batches import (
    COUNTS,
    NUM_CLASSES,
    WITH_ABSENT,
    assert_equal,
    assert_rows_close,
    assert_zero_sum_within,
    delta_of,
    drawn_batches,
    extreme_batch,
    few_examples,
    make_batch,
    make_statistics,
    more_examples,
    positive,
    random_batch,
    valid_batches,
)
from original_form import OriginalForm, cross_entropy, original_form_tests
from torch.nn import functional as F

from lpg_hf import LPGLoss
from lpg_hf.batch import IGNORE_INDEX, LogitBatch, relative_pull
from lpg_hf.class_shares import prior_terms
from lpg_hf.perturbations import LogitAdjustment
from lpg_hf.perturbations.logit_adjustment import logit_adjustment_delta
from lpg_hf.statistics import ClassStatistics


# The formula.


def priors(num_classes, absent=()):
    shares = [0.0 if c in absent else 2.0 ** -(c + 1) for c in range(num_classes)]
    return torch.tensor([share / sum(shares) for share in shares], dtype=torch.float64)


def formula(batch, prior, tau=1.0, weight_share=0.0):
    """The formula for balanced classes as the target."""
    return logit_adjustment_delta(batch, -tau * prior_terms(prior).log_rarity, prior, weight_share)


@few_examples
@given(
    batch=drawn_batches(),
    tau=st.sampled_from([0.0, 0.5, 1.0, 2.5]),
    absent=st.sampled_from([(), (0,), (1,)]),
    share=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_logit_adjustment_delta_equals_the_reference(batch, tau, absent, share):
    prior = priors(batch.num_classes, absent)
    delta = formula(batch.batch, prior, tau, share)
    expected = reference.logit_adjustment_delta(
        batch.logits.numpy(), batch.labels.tolist(), prior.tolist(), tau, share
    )
    # The weights are 1 on average up to rounding.
    assert_rows_close(delta, expected, 1e-11, smallest=1e-13)
    assert_equal(delta.sum(-1), torch.zeros(len(delta)), 1e-11)
    assert_rows_close(formula(batch.batch, prior, tau, torch.tensor(share)), expected, 1e-6, smallest=1e-13)


@given(share=st.floats(0, 1), tau=st.floats(0, 2), seed=st.integers(0, 1000))
def test_no_share_of_weights_moves_the_logits_that_logit_adjustment_leads_to(share, tau, seed):
    """At `log p(y|x) - tau log pi_y` the expected gradient is zero."""
    generator = torch.Generator().manual_seed(seed)
    posterior = torch.rand(5, dtype=torch.float64, generator=generator).add(0.05)
    posterior, prior = posterior / posterior.sum(), priors(5)
    logits = (posterior.log() - tau * prior.log()).expand(5, 5)
    batch = LogitBatch(logits, torch.arange(5))
    delta = formula(batch, prior, tau, share)
    assert_equal(posterior @ (batch.gradient + delta), torch.zeros(5), 1e-11)


@few_examples
@given(drawn_batches())
def test_logit_adjustment_gives_the_gradient_of_cross_entropy_on_shifted_logits(batch):
    prior = priors(batch.num_classes)
    logits = batch.logits.clone().requires_grad_()
    F.cross_entropy(logits + 1.5 * prior.log(), batch.labels, ignore_index=IGNORE_INDEX, reduction="sum").backward()
    adjusted = batch.gradient + formula(batch.batch, prior, 1.5)
    assert_equal(adjusted, logits.grad, 1e-12)


@few_examples
@given(batch=drawn_batches(), tau=st.sampled_from([0.1, 1.0, 3.0]))
def test_logit_adjustment_delta_stays_below_its_bound(batch, tau):
    prior = priors(batch.num_classes)
    spread = tau * math.log(prior.max() / prior.min())
    delta = formula(batch.batch, prior, tau)
    assert (delta.norm(dim=-1) <= math.sqrt(2) * math.tanh(spread / 4) + 1e-9).all()


def test_logit_adjustment_is_exactly_zero_at_strength_zero_and_small_for_a_balanced_prior():
    batch = random_batch()
    assert (formula(batch.batch, priors(5), 0.0) == 0).all()
    balanced = torch.full((5,), 0.2, dtype=torch.float64)
    assert_equal(formula(batch.batch, balanced), 0, 1e-15)


def test_float32_logit_adjustment_equals_the_reference_and_keeps_a_saturated_label_entry():
    batch = random_batch()
    batch.logits[1] = torch.tensor([40.0, 0, 0, 0, 0])
    batch.labels[1] = 0
    logits, prior = batch.logits.float(), priors(5).float()
    expected = reference.logit_adjustment_delta(
        logits.double().numpy(), batch.labels.tolist(), prior.double().tolist()
    )
    delta = formula(LogitBatch(logits, batch.labels), prior)
    assert 0 < np.linalg.norm(expected[1]) < 1e-15
    assert_rows_close(delta, expected, 1e-5)


def test_logit_adjustment_ignores_samples_whatever_their_logits():
    logits = torch.tensor([[math.nan, 0.0, 0.0], [0.0, 1.0, 2.0]])
    batch = LogitBatch(logits, torch.tensor([IGNORE_INDEX, 1]))
    delta = formula(batch, priors(3).float())
    assert (delta[0] == 0).all()
    assert delta[1].isfinite().all()


@more_examples
@given(drawn=valid_batches(), seed=st.integers(0, 99), tau=st.floats(0, 3))
def test_logit_adjustment_deltas_are_bounded_by_the_imbalance(drawn, seed, tau):
    prior = positive(drawn.num_classes, seed)
    prior = prior / prior.sum()
    bound = math.sqrt(2) * math.tanh(tau * math.log(prior.max() / prior.min()) / 4)
    assert_zero_sum_within(formula(drawn.batch, prior, tau), bound)


# The method.


@pytest.mark.parametrize("num_rare", [10, 1])
def test_the_largest_strength_on_the_longest_tail_is_not_cut_short(num_rare):
    """Offsets of -46 and -55, with a sample at the border of the shifted classes."""
    counts = torch.tensor([10**6, num_rare], dtype=torch.float64)
    offset = 4 * (counts / counts.sum()).log()
    logits = torch.stack(
        [torch.zeros(4).double(), (offset[0] - offset[1]) + torch.tensor([-3.0, 0, 3, 6]).double()], 1
    )
    logits, again, labels = (
        logits.requires_grad_(),
        logits.clone().detach().requires_grad_(),
        torch.tensor([0, 1, 0, 1]),
    )
    LPGLoss(2, [LogitAdjustment(4.0)], counts.long().tolist())(logits, labels).backward()
    F.cross_entropy(again + offset, labels).backward()
    torch.testing.assert_close(logits.grad, again.grad, rtol=1e-4, atol=0)


@pytest.mark.parametrize("counts", [COUNTS, WITH_ABSENT, None])
@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0])
def test_logit_adjustment_equals_the_reference(counts, tau):
    statistics = make_statistics(counts)
    batch = make_batch()
    delta = delta_of(LogitAdjustment(tau), batch, statistics)
    prior = reference.running_prior(statistics.class_counts.tolist())
    if counts is not None:
        prior = [count / sum(counts) for count in counts]
    assert_equal(
        delta, reference.logit_adjustment_delta(batch.logits.numpy(), batch.labels.tolist(), prior, tau), 1e-12
    )
    assert_equal(delta[batch.ignore_mask], 0, 0)


@pytest.mark.parametrize("counts", [COUNTS, WITH_ABSENT])
@pytest.mark.parametrize("tau", [0.5, 1.0])
@pytest.mark.parametrize("level", [0.05, 0.2, 0.6])
def test_the_target_lies_between_the_evaluation_and_all_classes_alike(counts, tau, level):
    """Proportional to the shares to the power of 2/3; with weights and with offsets."""
    shares = [3.0, 1.0, 4.0, 1.0, 5.0]
    statistics = make_statistics(counts, eval_shares=shares)
    statistics.label_prob[:] = level
    method, batch = LogitAdjustment(tau, learned=(0.1, 0.5), target="evaluation"), make_batch()
    prior = [count / sum(counts) for count in counts]
    share = float(method.weight_share(statistics))
    expected = reference.logit_adjustment_delta(
        batch.logits.numpy(), batch.labels.tolist(), prior, tau, share, target=(np.array(shares) ** (2 / 3)).tolist()
    )
    np.testing.assert_allclose(delta_of(method, batch, statistics), expected, rtol=1e-6, atol=1e-6)


def test_where_training_and_target_agree_the_delta_is_zero():
    for counts, shares in (([100] * 5, [1.0] * 5), ([40, 10, 10, 10, 10], [8.0, 1, 1, 1, 1])):
        statistics = make_statistics(counts, eval_shares=shares)
        method = LogitAdjustment(learned=(0.1, 0.5), target="evaluation")
        assert_equal(delta_of(method, make_batch(), statistics), 0, 1e-7)


def test_by_default_the_evaluation_is_like_the_training():
    """So what remains is a third of the usual adjustment."""
    statistics, batch = make_statistics(COUNTS), make_batch()
    third = delta_of(LogitAdjustment(1 / 3), batch, statistics)
    assert_equal(delta_of(LogitAdjustment(target="evaluation"), batch, statistics), third, 1e-12)


@pytest.mark.parametrize("counts", [COUNTS, WITH_ABSENT])
@pytest.mark.parametrize(
    ("level", "learned", "share"), [(0.05, (0.1, 0.5), 1.0), (0.2, (0.1, 0.5), 0.75), (0.6, (0.1, 0.5), 0.0)]
)
def test_weights_give_way_as_the_classes_present_are_learned(counts, level, learned, share):
    statistics = make_statistics(counts)
    present = torch.tensor(counts) > 0
    spread = torch.linspace(-0.04, 0.04, int(present.sum()), dtype=torch.float64)
    # What is said of classes without rows does not count.
    statistics.label_prob[:] = 0.9
    statistics.label_prob[present] = level + spread
    method = LogitAdjustment(0.8, learned=learned)
    assert float(method.weight_share(statistics)) == pytest.approx(share, abs=1e-12)
    batch = make_batch()
    delta = delta_of(method, batch, statistics)
    prior = [count / sum(counts) for count in counts]
    expected = reference.logit_adjustment_delta(batch.logits.numpy(), batch.labels.tolist(), prior, 0.8, share)
    assert_equal(delta, expected, 1e-11)


@pytest.mark.parametrize("tau", [1.0, 4.0])
@pytest.mark.parametrize("learned", [(0.05, 0.2), (0.9, 0.901), (0.5, 0.50001)])
def test_float32_terms_are_exact_at_both_ends_of_a_narrow_interval(learned, tau):
    """There, the terms depend on no difference of the large numbers that a steep slope brings."""
    loss_fn = LPGLoss(NUM_CLASSES, LogitAdjustment(tau, learned=learned), COUNTS, managed=True)
    prior = np.array(COUNTS) / sum(COUNTS)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20, NUM_CLASSES, generator=generator).requires_grad_()
    labels = torch.arange(20) % NUM_CLASSES
    for level, share in ((0.0, 1.0), (1.0, 0.0)):
        loss_fn.statistics.label_prob.fill_(level)
        loss_fn.statistics._update_all()
        logits.grad = None
        loss_fn(logits, labels, num_items_in_batch=1).backward()
        z, y = logits.detach().double().numpy(), labels.tolist()
        expected = reference.logit_gradient(z, y) + reference.logit_adjustment_delta(z, y, prior, tau, share)
        # The delta joins the gradient, whose rounding stays.
        assert_rows_close(logits.grad, expected, 3e-6, smallest=2e-7)


def test_samples_of_a_class_without_counts_keep_their_gradient_where_denormal_numbers_are_zero():
    logits, labels = torch.zeros(2, 3, requires_grad=True), torch.tensor([0, 2])
    chain, counts = LogitAdjustment(learned=(0.1, 0.5)), [30, 10, 0]
    norms = []
    for flush in (False, True):
        assert torch.set_flush_denormal(flush) or not flush
        try:
            loss_fn = LPGLoss(3, chain, counts, managed=True)
            loss_fn.statistics.label_prob.fill_(1.0)
            loss_fn.statistics._update_all()
            logits.grad = None
            loss_fn(logits, labels, num_items_in_batch=1).backward()
            norms.append(logits.grad.norm(dim=-1))
        finally:
            torch.set_flush_denormal(False)
    assert norms[0].min() > 0.3
    torch.testing.assert_close(norms[1], norms[0], rtol=1e-5, atol=0)


# Behind another method, or on another loss


@pytest.mark.parametrize("counts", [COUNTS, WITH_ABSENT])
def test_the_pull_of_a_gradient_equals_the_reference(counts):
    batch = make_batch()
    gradient = torch.randn(batch.gradient.shape, generator=torch.Generator().manual_seed(3)).double()
    gradient[batch.ignore_mask] = 0
    pull = reference.relative_pull(gradient.numpy(), batch.logits.numpy(), batch.labels.tolist())
    assert 0 < (pull == 0).sum() < len(pull)
    assert_equal(relative_pull(gradient, batch)[:, None], pull, 1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_where_cross_entropy_pulls_at_nothing_any_more_the_delta_is_finite(dtype):
    for margin in (10.0, 60.0, 200.0, 1e4):
        batch = extreme_batch(margin, dtype)
        batch.scale = relative_pull(-torch.ones_like(batch.logits), batch)
        delta = LogitAdjustment().delta(batch.gradient, batch, ClassStatistics(5, COUNTS).to(dtype))
        assert delta.isfinite().all() and (margin < 1e4 or (delta[:5] == 0).all())


def gradient_of(chain, base_loss=None):
    batch = make_batch()
    logits = batch.logits.clone().requires_grad_()
    LPGLoss(5, chain, COUNTS, base_loss)(logits, batch.labels, num_items_in_batch=1).backward()
    return logits.grad


@pytest.mark.parametrize(
    "weighting", ["focal_loss", "generalized_cross_entropy", "class_weighting(weights='effective')"]
)
@pytest.mark.parametrize("adjustment", ["auto", "logit_adjustment"])
def test_weights_in_front_of_an_adjustment_are_weights_behind_it(weighting, adjustment):
    if (weighting, adjustment) != ("class_weighting(weights='effective')", "auto"):  # where `auto` adjusts nothing
        torch.testing.assert_close(
            gradient_of([weighting, adjustment]), gradient_of([adjustment, weighting]), rtol=0, atol=1e-12
        )


@pytest.mark.parametrize("additive", ["label_smoothing(alpha=0.2)", "logit_noise(sigma=0.3, seed=4)"])
@pytest.mark.parametrize("adjustment", ["auto", "logit_adjustment"])
def test_what_only_adds_to_the_gradient_does_not_scale_an_adjustment(additive, adjustment):
    """Label smoothing moves the target, and noise has no direction: neither says how much a sample pulls."""
    in_front, behind = gradient_of([additive, adjustment]), gradient_of([adjustment, additive])
    torch.testing.assert_close(in_front, behind, rtol=0, atol=1e-12)
    if adjustment == "logit_adjustment":
        added = gradient_of([additive]) - gradient_of([])
        torch.testing.assert_close(in_front - gradient_of([adjustment]), added, rtol=0, atol=1e-12)


def test_a_loss_in_other_units_is_adjusted_in_them():
    def hundredfold(logits, labels):
        return 100 * F.cross_entropy(logits, labels, reduction="none")

    for chain in (["logit_adjustment"], ["focal_loss", "logit_adjustment"]):
        torch.testing.assert_close(gradient_of(chain, hundredfold), 100 * gradient_of(chain), rtol=0, atol=1e-9)


OTHER_LOSSES = {
    "one against the rest": lambda logits, labels: F.binary_cross_entropy_with_logits(
        logits, F.one_hot(labels, 4).to(logits), reduction="none"
    ).mean(-1),
    "hinge": lambda logits, labels: F.multi_margin_loss(logits, labels, reduction="none"),
    "focal": lambda logits, labels: (
        (1 - torch.exp(-F.cross_entropy(logits, labels, reduction="none"))) ** 2
        * F.cross_entropy(logits, labels, reduction="none")
    ),
    "Brier": lambda logits, labels: (logits.softmax(-1) - F.one_hot(labels, 4)).square().sum(-1),
}


@pytest.mark.parametrize("chain", ["auto", "logit_adjustment"])
@pytest.mark.parametrize("base_loss", OTHER_LOSSES.values(), ids=OTHER_LOSSES)
def test_a_loss_that_is_not_cross_entropy_is_adjusted_and_not_spoiled(base_loss, chain):
    """With the delta of cross-entropy as it is, the head would be lost, and up to 50 points of balanced accuracy."""
    counts = [120, 40, 14, 5]
    generator = torch.Generator().manual_seed(0)
    centers = 1.2 * torch.randn(4, 8, generator=generator)

    def draw(counts):
        labels = torch.arange(4).repeat_interleave(torch.tensor(counts))
        return centers[labels] + torch.randn(len(labels), 8, generator=generator), labels

    (inputs, labels), (test_inputs, test_labels) = draw(counts), draw([250] * 4)

    def recall(perturbations):
        torch.manual_seed(0)
        model = torch.nn.Linear(8, 4)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
        loss_fn = LPGLoss(4, perturbations, counts, base_loss)
        for _ in range(400):
            optimizer.zero_grad()
            loss_fn(model(inputs), labels).backward()
            optimizer.step()
        hits = (model(test_inputs).argmax(-1) == test_labels).float()
        return hits.view(4, 250).mean(1)

    ours, plain = recall(chain), recall([])
    # `auto` goes a third of the way, which is within the chance of one run.
    assert ours.mean() > plain.mean() - (0.03 if chain == "auto" else 0)
    assert ours[0] > plain[0] - 0.1


def test_logit_adjustment_waits_for_a_running_prior_to_be_ready():
    statistics = make_statistics(waits_for_epoch=True)
    assert (delta_of(LogitAdjustment(), make_batch(), statistics) == 0).all()
    statistics.end_epoch()
    assert (delta_of(LogitAdjustment(), make_batch(), statistics) != 0).any()


# The original form.


def adjusted(tau, counts=COUNTS):
    """Cross-entropy on logits shifted by the log prior."""
    log_prior = torch.tensor([math.log(count / sum(counts)) for count in counts], dtype=torch.float64)
    return lambda z, y: F.cross_entropy(z + tau * log_prior, y, reduction="sum")


TestOriginalForm = original_form_tests(
    [
        *(OriginalForm(LogitAdjustment(tau), adjusted(tau)) for tau in (0.5, 1.0, 2.0)),
        OriginalForm(LogitAdjustment(0.0), cross_entropy),
    ]
)


# Arguments.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": -0.1}, r"`tau` must be from 0 to 4; found -0\.1"),
        ({"tau": -0.5}, r"`tau` must be from 0 to 4; found -0\.5"),
        ({"tau": 6.0}, r"`tau` must be from 0 to 4; found 6\.0"),
        ({"tau": math.inf}, r"`tau` must be from 0 to 4; found inf"),
        ({"learned": (0.3, 0.3)}, r"`learned` must be two increasing .*found \(0\.3, 0\.3\)"),
        ({"target": "eval"}, r"`target` must be 'uniform' or 'evaluation'; found 'eval'"),
    ],
)
def test_arguments_out_of_range_are_refused_with_name_value_and_range(options, message):
    with pytest.raises(ValueError, match=message):
        LogitAdjustment(**options)


def test_the_ends_of_the_ranges_are_accepted():
    assert repr(LogitAdjustment(tau=0, target="uniform")) == "logit_adjustment(tau=0)"
    assert LogitAdjustment(tau=4).tau == 4
