"""LPGLoss: exact gradients at the logits and at the parameters, in every dtype, without synchronization."""

import copy
import itertools
import math

import numpy as np
import pytest
import reference
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn import functional as F
from transformers.modeling_outputs import SequenceClassifierOutput

from lpg_hf import LPG, ClassRelativeDampening, LabelSmoothing, LogitAdjustment, LogitClipping, LPGLoss
from lpg_hf.perturbations import LogitPerturbation, SampleReweighting


C = 5
COUNTS = [50, 20, 10, 5, 1]
SIGNS, BOUNDS = [1, -1, 0, 1, -1], [0.3, 0.2, 0.5, 0.1, 0.4]


def make_logits(n=12, dtype=torch.float64, seed=0, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(n, C, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, C, (n,), generator=generator)
    return logits.to(dtype).requires_grad_(), labels


@pytest.mark.parametrize(
    ("direction", "norm", "solver"),
    list(itertools.product(["class", "sample"], ["l2", "linf"], ["closed_form", "pgd"])),
)
@pytest.mark.parametrize("strategy", ["frequency", "accuracy", "fixed"])
def test_parameter_gradient_is_the_sum_over_samples_of_jacobians(strategy, direction, norm, solver):
    """Against loops over samples and logits with the oracle's deltas: `sum_i J_i^T (g_i + delta_i) / N`."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, C)).double()
    options = {"signs": SIGNS, "bounds": BOUNDS} if strategy == "fixed" else {"epsilon": 0.3}
    method = LPG(strategy, max_dampening=0.7, direction=direction, norm=norm, solver=solver, **options)
    loss_fn = LPGLoss(C, method, COUNTS)
    statistics = reference.RunningStatistics(C)
    prior = np.array(COUNTS) / sum(COUNTS)

    for step in range(2):  # the accuracy strategy has nothing to go by in the first step
        inputs = torch.randn(9, 4, dtype=torch.float64)
        labels = torch.randint(0, C, (9,), generator=torch.Generator().manual_seed(step))
        logits = model(inputs)
        z, y = logits.detach().numpy(), labels.numpy()
        if strategy == "fixed":
            signs, bounds = np.array(SIGNS), np.array(BOUNDS)
        elif strategy == "frequency":
            signs, bounds = reference.frequency_signs_and_bounds(prior, 0.3)
        else:
            signs, bounds = reference.accuracy_signs_and_bounds(prior, statistics.accuracy, 0.3)
        g = reference.logit_gradient(z, y)
        g = g + reference.lpg_delta(g, y, signs, bounds, max_dampening=0.7, direction=direction, norm=norm)
        statistics.update(z, y)

        expected = [torch.zeros_like(parameter) for parameter in model.parameters()]
        for i in range(9):
            for c in range(C):
                rows = torch.autograd.grad(logits[i, c], list(model.parameters()), retain_graph=True)
                for total, row in zip(expected, rows, strict=True):
                    total += g[i, c] * row / 9

        model.zero_grad()
        loss = loss_fn(logits, labels)
        loss.backward()
        tolerance = 1e-10 if solver == "closed_form" or norm == "l2" else 1e-6
        for parameter, total in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, total, rtol=0, atol=tolerance)
        assert loss.item() == pytest.approx(F.cross_entropy(logits, labels).item(), abs=1e-12)


def test_a_chain_hands_on_what_is_left_and_adds_up():
    logits, labels = make_logits()
    loss_fn = LPGLoss(C, [LogitAdjustment(1.0), LogitClipping(0.5), LPG("frequency", epsilon=0.2)], COUNTS)
    loss_fn(logits, labels).backward()
    z, y, prior = logits.detach().numpy(), labels.numpy(), np.array(COUNTS) / sum(COUNTS)
    g = reference.logit_gradient(z, y)
    g = g + reference.logit_adjustment_delta(z, y, prior, 1.0)
    g = g + reference.clip_delta(g, 0.5)
    signs, bounds = reference.frequency_signs_and_bounds(prior, 0.2)
    g = g + reference.lpg_delta(g, y, signs, bounds, max_dampening=0.5, direction="class", norm="l2")
    np.testing.assert_allclose(logits.grad.numpy(), g / 12, rtol=0, atol=1e-12)


def test_dampening_uses_the_means_of_the_epochs_before():
    """Of as many samples as the counts say. The labels are judged at the shares of the evaluation."""
    dampening = ClassRelativeDampening(learned=(0.0, 0.05), evidence=(0.0, 200.0))
    shares = [1.0, 2.0, 3.0, 4.0][:C] + [1.0] * max(C - 4, 0)
    counts = [10 * (c + 1) for c in range(C)]
    loss_fn = LPGLoss(C, dampening, counts, eval_shares=shares)
    statistics, gate = reference.RunningStatistics(C), np.zeros(C)
    log_prior = np.log(np.array(counts) / sum(counts))
    offset = np.log(np.array(shares) / sum(shares)) - log_prior
    seen, acted = 0, []
    for step in range(3 * sum(counts) // 20):
        logits, labels = make_logits(20, seed=step, scale=4.0)
        loss_fn(logits, labels).backward()
        z, y = logits.detach().numpy(), labels.numpy()
        options = {"learned": (0.0, 0.05), "evidence": (0.0, 200.0), "offset": offset, "gate": gate}
        plain = reference.dampening_weight(z, y, *statistics.dampening_terms, **options)
        factor = 1 / np.maximum(statistics.mean_weight, 0.5)
        weight = np.array([w * (factor[c] if c >= 0 else 1) for w, c in zip(plain, y, strict=True)])
        acted.append(bool(weight.min() < 0.9))
        expected = weight[:, None] * reference.logit_gradient(z, y) / max((y >= 0).sum(), 1)
        np.testing.assert_allclose(logits.grad.numpy(), expected, rtol=0, atol=1e-6)
        statistics.update(z, y, plain, offset)
        seen += (y >= 0).sum()
        if seen >= sum(counts):
            seen = 0
            statistics.end_epoch()
            for c in range(C):
                means = statistics.last_label_prob[c], statistics.noise_evidence
                gate[c] = max(gate[c], reference.dampening_gate(*means, (0.0, 0.05), (0.0, 200.0)))
    assert not acted[0] and acted[-1] and statistics.last_label_prob.min() > 0


def test_without_counts_the_user_says_when_an_epoch_has_ended():
    logits, labels = make_logits(40, scale=4.0)
    loss_fn = LPGLoss(C, ClassRelativeDampening(learned=(0.0, 0.05), evidence=(0.0, 0.01)))
    gradients = []
    for step in range(5):
        if step == 4:
            loss_fn.end_epoch()
        logits.grad = None
        loss_fn(logits, labels).backward()
        gradients.append(logits.grad.clone())
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients[:4])
    assert (gradients[4] != gradients[0]).any()


AUTO_WITHOUT_DAMPENING = "logit_adjustment(learned=(0.05, 0.2), target='evaluation')"


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    wrong=st.floats(0, 0.05),
    margin=st.sampled_from([1.0, 3.0, 9.0]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    eval_shares=st.sampled_from([None, [1.0] * C]),
)
def test_without_evidence_auto_trains_bit_for_bit_as_without_dampening(seed, wrong, margin, dtype, eval_shares):
    """Clean data with hard labels among them: `margin` is what the logits of right labels are ahead."""
    auto = LPGLoss(C, "auto", COUNTS, eval_shares=eval_shares)
    plain = LPGLoss(C, AUTO_WITHOUT_DAMPENING, COUNTS, eval_shares=eval_shares)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(12):  # more than three epochs
        labels = torch.randint(C, (28,), generator=generator)
        is_wrong = torch.rand(28, generator=generator) < wrong
        seen = torch.where(is_wrong, (labels + 1) % C, labels)
        logits = torch.randn(28, C, generator=generator) + margin * F.one_hot(seen, C)
        gradients = []
        for loss_fn in (auto, plain):
            given_logits = logits.to(dtype).requires_grad_()
            loss_fn(given_logits, labels).backward()
            gradients.append(given_logits.grad)
        # Evidence of an epoch acts in the next step.
        if auto.statistics.noise_evidence <= 1:
            assert torch.equal(*gradients)
        for name in ("noise_evidence", "memorizing"):
            assert torch.equal(getattr(auto.statistics, name), getattr(plain.statistics, name))
        assume(auto.statistics.noise_evidence <= 1)
    assert auto.statistics.epochs == 3 and (auto.perturbations[1]._gate == 0).all()


def noisy_batches(count=9, n=20):
    """Wrong labels that the model is sure of, as `auto` dampens them."""
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(C, (n,), generator=generator)
        seen = torch.where(torch.arange(n) % 5 == 0, (labels + 1) % C, labels)
        yield torch.randn(n, C, generator=generator, dtype=torch.float64) + 7 * F.one_hot(seen, C), labels


def train_in_parts(loss_fn, sizes, bad_steps=(), last=9):
    """A managed loss, with an epoch of three steps. Returns the gradients of whole steps."""
    gradients = []
    for step, (logits, labels) in enumerate(noisy_batches()):
        if step >= last:
            break
        if step in bad_steps:
            nothing = torch.full((6, C), math.nan, dtype=torch.float64, requires_grad=True)
            loss_fn(nothing, labels[:6]).backward()
            loss_fn.step()
        logits.requires_grad_()
        for part, part_labels in zip(logits.split(sizes), labels.split(sizes), strict=True):
            loss_fn(part, part_labels, num_items_in_batch=len(labels)).backward()
        loss_fn.step()
        gradients.append(logits.grad)
        if step % 3 == 2:
            loss_fn.end_epoch()
    return torch.stack(gradients)


def managed_auto():
    return LPGLoss(C, "auto", COUNTS, managed=True)


def test_auto_dampens_wrong_labels_the_same_in_any_micro_batches():
    whole, parts = managed_auto(), managed_auto()
    expected, found = train_in_parts(whole, [20]), train_in_parts(parts, [7, 1, 0, 12])
    # The buffers are in float64 from the first batch on.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    for name in ("noise_evidence", "memorizing"):
        torch.testing.assert_close(getattr(parts.statistics, name), getattr(whole.statistics, name))
    assert whole.statistics.noise_evidence > 2 and whole.perturbations[1].last_weight.min() < 0.5


def test_steps_whose_logits_are_not_finite_change_no_evidence_and_no_later_gradient():
    clean, with_bad = managed_auto(), managed_auto()
    expected, found = train_in_parts(clean, [20]), train_in_parts(with_bad, [20], bad_steps=(1, 5))
    assert torch.equal(found, expected)
    assert torch.equal(with_bad.statistics.noise_evidence, clean.statistics.noise_evidence)
    with pytest.raises(FloatingPointError):
        with_bad.telemetry()


@pytest.mark.parametrize("cut", [2, 3, 5])
def test_auto_resumes_within_and_after_the_epoch_that_gave_evidence(cut):
    unbroken, first, second = managed_auto(), managed_auto(), managed_auto().double()
    expected = train_in_parts(unbroken, [20])
    train_in_parts(first, [20], last=cut)
    second.load_state_dict(first.state_dict())
    gradients = []
    for step, (logits, labels) in enumerate(noisy_batches()):
        if step < cut:
            continue
        logits.requires_grad_()
        second(logits, labels, num_items_in_batch=20).backward()
        second.step()
        gradients.append(logits.grad)
        if step % 3 == 2:
            second.end_epoch()
    assert torch.equal(torch.stack(gradients), expected[cut:])
    assert torch.equal(second.statistics.noise_evidence, unbroken.statistics.noise_evidence)
    assert second.perturbations[1].last_weight.min() < 0.5


def gradient_of(loss_fn, seed=9, dtype=torch.float64):
    logits, labels = make_logits(seed=seed, dtype=dtype)
    loss_fn(logits, labels).backward()
    return logits.grad


def without_kept_terms(loss_fn):
    """A copy whose methods compute their terms for each batch."""
    loss_fn = copy.deepcopy(loss_fn)
    for method in loss_fn.perturbations:
        method.detach()
    loss_fn.statistics._prior_followers = loss_fn.statistics._epoch_followers = loss_fn.statistics._step_followers = []
    return loss_fn


@pytest.mark.parametrize("counts", [None, COUNTS], ids=["counting", "counts"])
@pytest.mark.parametrize("managed", [False, True])
def test_terms_that_are_kept_are_those_of_the_statistics(counts, managed):
    """At every step, and right after the end of an epoch, with which counted classes get a prior."""
    loss_fn = LPGLoss(C, "auto", counts, managed=managed).double()
    for seed in range(12):
        torch.testing.assert_close(gradient_of(without_kept_terms(loss_fn), seed), gradient_of(loss_fn, seed))
        if managed:
            loss_fn.step()
        if seed % 3 == 2:
            loss_fn.end_epoch()
    assert loss_fn.perturbations[0].weight_share(loss_fn.statistics) < 1


@pytest.mark.parametrize("counts", [None, COUNTS], ids=["counting", "counts"])
@pytest.mark.parametrize("before", [None, (0.9, 1.0)])
def test_learned_acts_from_the_next_step_on_if_it_is_set_later(before, counts):
    late, expected = (LPGLoss(C, LogitAdjustment(learned=learned), counts) for learned in (before, (0.0, 0.9)))
    gradient_of(late, 0), gradient_of(expected, 0)
    late.perturbations[0].learned = (0.0, 0.9)
    gradient_of(late, 1), gradient_of(expected, 1)
    assert torch.equal(gradient_of(late, 2), gradient_of(expected, 2))
    assert 0 < expected.perturbations[0].weight_share(expected.statistics) < 1


@pytest.mark.parametrize("counts", [None, COUNTS], ids=["counting", "counts"])
def test_the_statistics_alone_may_be_in_double_precision(counts):
    loss_fn, expected = (LPGLoss(C, "auto", counts) for _ in range(2))
    loss_fn.statistics.double()
    for seed in range(9):
        gradients = [gradient_of(each, seed, torch.float32) for each in (loss_fn, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)
    assert loss_fn.statistics.prior.dtype == torch.float64


class Shift(LogitPerturbation):
    name = "shift"

    def delta(self, gradient, batch, statistics):
        return 0.1 * batch.logits


class BySoftmax(SampleReweighting):
    name = "by_softmax"

    def weight(self, gradient, batch, statistics):
        return batch.logits.softmax(-1).amax(-1)


CHAINS = [
    [],
    ["logit_clipping"],
    ["auto"],
    ["label_smoothing(target='prior')", "logit_adjustment"],
    [Shift()],
    [LabelSmoothing(), Shift(), Shift()],
    [BySoftmax()],
    [Shift(), BySoftmax()],
]


@pytest.mark.parametrize("perturbations", CHAINS, ids=repr)
def test_ignored_labels_neither_count_nor_pull(perturbations):
    logits, labels = make_logits(8)
    padded = torch.cat([logits.detach(), torch.full((3, C), float("nan"), dtype=torch.float64)])
    # Every other row of the padding is plain, so that both kinds are seen.
    padded[9] = 1.0
    padded.requires_grad_()
    padded_labels = torch.cat([labels, torch.tensor([-100] * 3)])
    expected = LPGLoss(C, perturbations, COUNTS)(logits, labels)
    loss_fn = LPGLoss(C, perturbations, COUNTS)
    loss = loss_fn(padded, padded_labels)
    expected.backward()
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
    torch.testing.assert_close(padded.grad[:8], logits.grad, rtol=0, atol=1e-12)
    if perturbations:
        assert torch.equal(padded.grad[8:], torch.zeros(3, C, dtype=torch.float64))
        assert loss_fn.telemetry()["lpg/gradient_norm"] > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_logits_are_perturbed_in_float32(dtype):
    logits, labels = make_logits(dtype=dtype)
    loss_fn = LPGLoss(C, [LogitAdjustment(1.0), LPG("frequency", epsilon=0.3)], COUNTS)
    loss = loss_fn(logits, labels)
    loss.backward()
    exact = logits.detach().double().requires_grad_()
    LPGLoss(C, [LogitAdjustment(1.0), LPG("frequency", epsilon=0.3)], COUNTS)(exact, labels).backward()
    assert loss.dtype == torch.float32 and logits.grad.dtype == dtype
    error = (logits.grad.double() - exact.grad).norm() / exact.grad.norm()
    assert error < max(torch.finfo(dtype).eps, 1e-6)


def test_nothing_is_perturbed_or_counted_in_evaluation():
    logits, labels = make_logits()
    loss_fn = LPGLoss(C, [LogitClipping(0.1)], COUNTS)
    before = {name: tensor.clone() for name, tensor in loss_fn.state_dict().items()}
    loss_fn.eval()
    loss_fn(logits, labels).backward()
    plain = logits.detach().requires_grad_()
    F.cross_entropy(plain, labels).backward()
    torch.testing.assert_close(logits.grad, plain.grad, rtol=0, atol=1e-15)
    loss_fn.train()
    with torch.no_grad():
        assert loss_fn(logits, labels).item() == pytest.approx(F.cross_entropy(plain, labels).item())
    assert all(torch.equal(before[name], tensor) for name, tensor in loss_fn.state_dict().items())
    assert loss_fn.telemetry() == {}


def test_num_items_in_batch_divides_loss_and_gradient():
    logits, labels = make_logits(10)
    again = logits.detach().requires_grad_()
    loss = LPGLoss(C, "logit_clipping", COUNTS)(logits, labels)
    quarter = LPGLoss(C, "logit_clipping", COUNTS)(again, labels, num_items_in_batch=torch.tensor(40))
    loss.backward()
    quarter.backward()
    assert quarter.item() == pytest.approx(loss.item() / 4, abs=1e-12)
    torch.testing.assert_close(again.grad, logits.grad / 4, rtol=0, atol=1e-15)


@pytest.mark.parametrize("base_loss", [None, lambda logits, labels: F.cross_entropy(logits, labels, reduction="none")])
def test_a_second_gradient_is_refused_where_deltas_would_be_taken_for_constants(base_loss):
    logits, labels = make_logits(10)
    weight = torch.eye(C, dtype=logits.dtype, requires_grad=True)
    loss_fn = LPGLoss(C, "logit_clipping", COUNTS, base_loss)
    with pytest.raises(RuntimeError, match=r"no second one, which `create_graph=True` asks for.*Leave `create_graph`"):
        torch.autograd.grad(loss_fn(logits.detach() @ weight, labels), weight, create_graph=True)
    loss = loss_fn.eval()(logits.detach() @ weight, labels)
    (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
    assert gradient.square().sum().requires_grad


@pytest.mark.parametrize("kind", [float, torch.tensor], ids=["float", "tensor"])
@pytest.mark.parametrize(("num_items", "divisor"), [(2.5, 2.5), (0.25, 0.25), (1e-30, 1e-30), (0.0, 1.0)])
@pytest.mark.parametrize("chain", ["logit_clipping(max_norm=9.0)", []], ids=repr)
def test_a_number_of_samples_below_one_divides_as_well(num_items, divisor, kind, chain):
    logits, labels = make_logits(10)
    again = logits.detach().requires_grad_()
    (F.cross_entropy(logits, labels, reduction="sum") / divisor).backward()
    LPGLoss(C, chain, COUNTS)(again, labels, num_items_in_batch=kind(num_items)).backward()
    torch.testing.assert_close(again.grad, logits.grad, rtol=1e-6, atol=0)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 65536.0])
def test_the_scale_of_the_loss_scales_the_gradient_and_not_the_delta(scale):
    logits, labels = make_logits()
    again = logits.detach().requires_grad_()
    LPGLoss(C, LPG("frequency", epsilon=0.3), COUNTS)(logits, labels).backward()
    (scale * LPGLoss(C, LPG("frequency", epsilon=0.3), COUNTS)(again, labels)).backward()
    torch.testing.assert_close(again.grad, scale * logits.grad, rtol=1e-12, atol=0)


def test_a_loss_that_is_frozen_twice_stays_frozen_until_both_have_ended():
    loss_fn = LPGLoss(C, "logit_clipping", COUNTS)
    with loss_fn.frozen():
        with loss_fn.frozen():
            pass
        loss_fn(*make_logits())
        assert loss_fn.statistics.steps == 0
    loss_fn(*make_logits())
    assert loss_fn.statistics.steps == 1


def test_a_gradient_that_is_a_view_of_other_memory_is_left_alone():
    """The gradient of a sum of logits is one number, shown in all places."""
    logits, labels = make_logits(6)
    labels[2] = -100
    loss_fn = LPGLoss(C, "logit_clipping(max_norm=0.5)", base_loss=lambda logits, labels: logits.sum(-1))
    loss_fn(logits, labels).backward()
    expected = torch.full_like(logits, 0.5 / math.sqrt(C) / 5)
    expected[2] = 0
    torch.testing.assert_close(logits.grad, expected)


@pytest.mark.parametrize("perturbations", CHAINS, ids=repr)
def test_what_a_users_loss_over_the_whole_batch_says_of_ignored_samples_is_left_alone(perturbations):
    def centered(logits, labels):
        return F.cross_entropy(logits - logits.mean(0), labels, reduction="none")

    logits, labels = make_logits(8)
    labels[2] = -100
    LPGLoss(C, perturbations, COUNTS, base_loss=centered)(logits, labels).backward()
    plain = logits.detach().clone().requires_grad_()
    (centered(plain, labels.clamp(min=0)) * (labels >= 0)).sum().div(7).backward()
    torch.testing.assert_close(logits.grad[2], plain.grad[2])
    assert logits.grad[2].abs().max() > 0


def test_a_method_sees_the_same_gradient_in_update_and_delta():
    seen = []

    class Recording(LogitPerturbation):
        name = "recording"

        def update(self, gradient, batch):
            seen.append(gradient.clone())

        def delta(self, gradient, batch, statistics):
            seen.append(gradient.clone())
            return gradient

    class RecordingWeights(SampleReweighting):
        name = "recording_weights"
        update = Recording.update

        def weight(self, gradient, batch, statistics):
            seen.append(gradient.clone())
            return torch.full(batch.labels.shape, 0.5)

    logits, labels = make_logits()
    LPGLoss(C, [LabelSmoothing(), Recording(), RecordingWeights()], COUNTS)(logits, labels).backward()
    smoothed = reference.logit_gradient(logits.detach().numpy(), labels) + 0.1 * (np.eye(C)[labels] - 1 / C)
    for gradient, factor in zip(seen, (1, 1, 2, 2), strict=True):
        np.testing.assert_allclose(gradient.numpy(), factor * smoothed, rtol=0, atol=1e-12)


def test_a_norm_of_another_shape_is_refused():
    class Column(LogitPerturbation):
        name = "column"

        def delta(self, gradient, batch, statistics):
            return gradient

        def add_delta(self, gradient, batch, statistics, in_place=False):
            return 2 * gradient, gradient.norm(dim=-1, keepdim=True)

    with pytest.raises(ValueError, match=r"`column\(\)` returned a norm of shape \[12, 1\] .* must be \[12\]"):
        LPGLoss(C, Column())(*make_logits())


def test_a_users_base_loss_keeps_its_parameters_gradient():
    class Tempered(nn.Module):
        def __init__(self):
            super().__init__()
            self.log_temperature = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

        def forward(self, logits, labels):
            return F.cross_entropy(logits * self.log_temperature.exp(), labels, reduction="none")

    logits, labels = make_logits()
    tempered = Tempered()
    LPGLoss(C, LogitClipping(0.4), base_loss=tempered)(logits, labels).backward()
    plain, other = Tempered(), logits.detach().requires_grad_()
    values = plain(other, labels)
    (g,) = torch.autograd.grad(values.sum(), other, retain_graph=True)
    values.mean().backward()
    torch.testing.assert_close(tempered.log_temperature.grad, plain.log_temperature.grad)
    expected = (g.numpy() + reference.clip_delta(g.numpy(), 0.4)) / 12
    np.testing.assert_allclose(logits.grad.numpy(), expected, rtol=0, atol=1e-12)


def test_outputs_may_be_a_model_output_or_a_tuple():
    logits, labels = make_logits()
    losses = [
        LPGLoss(C, "logit_clipping")(outputs, labels[:, None]).item()
        for outputs in (logits, (logits, None), SequenceClassifierOutput(logits=logits), {"logits": logits})
    ]
    assert losses == [losses[0]] * 4


def test_state_dict_restores_training_exactly():
    chain = [LogitAdjustment(1.0), ClassRelativeDampening(learned=(0.0, 0.05), evidence=(0.0, 0.01))]
    first = LPGLoss(C, chain)
    for seed in range(3):
        first(*make_logits(seed=seed)).backward()
    second = LPGLoss(C, chain).double()
    second.load_state_dict(first.state_dict())
    a, labels = make_logits(seed=9)
    b = a.detach().requires_grad_()
    first(a, labels).backward()
    second(b, labels).backward()
    assert torch.equal(a.grad, b.grad)


def test_many_classes():
    num_labels = 100_000
    logits = torch.randn(4, num_labels, requires_grad=True)
    loss_fn = LPGLoss(num_labels, ["auto", "lpg"])
    loss_fn(logits, torch.tensor([0, 99_999, 5, 5])).backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("chain", ["auto", "lpg(direction='sample')", "lpg(norm='linf')", "lpg(solver='pgd')"])
def test_a_step_never_asks_the_device_for_a_value(chain):
    """Fake tensors have no values: `.item()`, `bool()`, `nonzero` and boolean masks raise on them."""
    loss_fn = LPGLoss(C, [chain, "logit_clipping"])
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for module in loss_fn.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = mode.from_tensor(buffer)
        logits = torch.randn(6, C, requires_grad=True)
        loss_fn(logits, torch.empty(6, dtype=torch.int64)).backward()
        with pytest.raises(DataDependentOutputException):
            loss_fn.telemetry()  # the one place that does
    assert logits.grad.shape == (6, C)


def test_errors_name_what_was_found():
    logits, labels = make_logits()
    loss_fn = LPGLoss(C, "logit_clipping")
    with pytest.raises(ValueError, match=r"`labels` must lie in \[0, 5\) or be -100: index 7 is out of bounds"):
        loss_fn(logits, torch.full((12,), 7))
    with pytest.raises(ValueError, match="index -1 is out of bounds"):
        loss_fn(logits, torch.full((12,), -1))
    with pytest.raises(ValueError, match=r"found shapes \[12, 5\] and \[3\]"):
        loss_fn(logits, labels[:3])
    with pytest.raises(ValueError, match=r"`logits` must be \[N, 4\]"):
        LPGLoss(4)(logits, labels)
    with pytest.raises(ValueError, match=r"integer class indices; found torch.float32"):
        loss_fn(logits, labels.float())
    with pytest.raises(ValueError, match="`num_labels` must be at least 2; found 1"):
        LPGLoss(1)
    with pytest.raises(ValueError, match=r"one loss per sample, shape \[12\]; found \[\]"):
        LPGLoss(C, "logit_clipping", base_loss=F.cross_entropy)(logits, labels)
    with pytest.raises(TypeError, match=r"takes methods .* and strings"):
        LPGLoss(C, [3])


def test_a_delta_of_the_wrong_shape_is_refused():
    class Broken(LabelSmoothing):
        def delta(self, gradient, batch, statistics):
            return gradient.sum(-1)

    with pytest.raises(
        ValueError, match=r"a delta of shape \[12\] for a gradient of shape \[12, 5\]; it must be \[12, 5\]"
    ):
        LPGLoss(C, Broken())(*make_logits())


def test_a_weight_of_the_wrong_shape_is_refused():
    class Broken(LogitClipping):
        def weight(self, gradient, batch, statistics):
            return gradient

    with pytest.raises(
        ValueError, match=r"a weight of shape \[12, 5\] for a gradient of shape \[12, 5\]; it must be \[12\]"
    ):
        LPGLoss(C, Broken())(*make_logits())


def test_values_that_are_not_finite_are_reported_with_their_step():
    loss_fn = LPGLoss(C, "logit_clipping")
    for step in range(4):
        logits, labels = make_logits()
        with torch.no_grad():
            logits[0, 0] = float("nan") if step >= 2 else 0.0
        loss_fn(logits, labels)
    with pytest.raises(FloatingPointError, match="logits of step 3, or"):
        loss_fn.telemetry()


class Custom(LogitPerturbation):
    """Hands everything to a function."""

    name = "custom"

    def __init__(self, function):
        super().__init__()
        self.function = function

    def delta(self, gradient, batch, statistics):
        return self.function(gradient, batch, statistics)


def test_a_method_that_returns_nan_is_reported_with_its_step():
    calls = []

    def late_nan(gradient, *_):
        calls.append(1)
        return gradient * (float("nan") if len(calls) > 2 else 1.0)

    loss_fn = LPGLoss(C, [Custom(late_nan), LabelSmoothing(0.1)])
    for _ in range(4):
        loss_fn(*make_logits())
    with pytest.raises(FloatingPointError, match=r"step 3, or their gradient after loss and methods"):
        loss_fn.telemetry()
    # The next interval starts anew.
    calls.clear()
    loss_fn(*make_logits())
    assert math.isfinite(loss_fn.telemetry()["lpg/custom/delta_norm"])


def test_the_norm_of_a_delta_that_makes_gradients_larger_is_no_negative_number():
    logits, labels = make_logits(10)
    loss_fn = LPGLoss(C, f"class_weighting(weights={[3.0] * C})")
    loss_fn(logits, labels)
    report = loss_fn.telemetry()
    assert report["lpg/class_weighting/delta_norm"] == pytest.approx(2 * report["lpg/gradient_norm"])
    assert report["lpg/delta_ratio"] == pytest.approx(2)


def test_telemetry_counts_dampened_samples_as_whole_ones():
    logits, labels = make_logits(40, scale=4.0)
    labels[::7] = -100
    loss_fn = LPGLoss(C, "class_relative_dampening(learned=[0.0, 0.01], evidence=[0.0, 0.01])", COUNTS, managed=True)
    for _ in range(4):
        loss_fn(logits, labels)
        loss_fn.step()
        loss_fn.end_epoch()
    loss_fn.telemetry()
    loss_fn(logits, labels)
    weight = loss_fn.perturbations[0].last_weight[labels >= 0]
    norms = np.linalg.norm(reference.logit_gradient(logits.detach().numpy(), labels.tolist()), axis=-1)
    report = loss_fn.telemetry()
    assert weight.min() < 0.3
    assert report["lpg/gradient_norm"] == pytest.approx(norms[labels >= 0].mean())
    assert report["lpg/weight"] == pytest.approx(weight.mean().item())


@pytest.mark.parametrize("chain", ["auto", "focal_loss"])
@pytest.mark.parametrize("limit", [0, 2**17])
def test_a_micro_batch_without_a_label_has_loss_and_gradient_0(chain, limit, monkeypatch):
    monkeypatch.setattr("lpg_hf.batch.MAX_STACKED", limit)
    logits, labels = make_logits()
    logits.data[0] = math.nan
    loss = LPGLoss(C, chain, COUNTS)(logits, torch.full_like(labels, -100))
    loss.backward()
    assert loss == 0 and (logits.grad == 0).all()


def test_telemetry_has_the_mean_norms_of_gradient_and_deltas():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(2, 6, C)), rng.integers(C, size=(2, 6))
    labels[0, 2] = labels[1, 4] = -100
    loss_fn = LPGLoss(C, ["label_smoothing(alpha=0.3)", "logit_clipping(max_norm=0.5)"])
    norms = []
    for z, y in zip(logits, labels, strict=True):
        loss_fn(torch.tensor(z, requires_grad=True), torch.tensor(y))
        for row, label in zip(z, y, strict=True):
            if label >= 0:
                onehot = np.eye(C)[label]
                gradient = np.exp(row) / np.exp(row).sum() - onehot
                smoothing = 0.3 * (onehot - 1 / C)
                left = np.linalg.norm(gradient + smoothing)
                weight = min(1, 0.5 / left)
                norms.append([np.linalg.norm(gradient), np.linalg.norm(smoothing), (1 - weight) * left, weight])
    gradient, smoothing, clipped, weight = np.mean(norms, axis=0)
    assert 0.01 < weight < 0.99
    report = loss_fn.telemetry()
    expected = {
        "lpg/gradient_norm": gradient,
        "lpg/label_smoothing/delta_norm": smoothing,
        "lpg/label_smoothing/delta_ratio": smoothing / gradient,
        "lpg/logit_clipping/delta_norm": clipped,
        "lpg/logit_clipping/delta_ratio": clipped / gradient,
        "lpg/logit_clipping/weight": weight,
    }
    assert {name: report[name] for name in expected} == pytest.approx(expected)
    assert "lpg/label_smoothing/weight" not in report


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("micro_batch", range(6))
def test_a_value_that_is_not_finite_is_of_the_step_of_its_micro_batch(micro_batch, value):
    """Two of them are a step, and a report has been read in the middle of the second one."""
    calls = []

    def bad(gradient, *_):
        calls.append(1)
        return gradient * (value if len(calls) == 4 + micro_batch else 1.0)

    loss_fn = LPGLoss(C, Custom(bad), managed=True)
    for call in range(9):
        loss_fn(*make_logits())
        if call == 2:
            loss_fn.telemetry()
        if call % 2 == 1:
            loss_fn.step()
    with pytest.raises(FloatingPointError, match=f"The logits of step {2 + (micro_batch + 1) // 2}, or"):
        loss_fn.telemetry()


def test_an_error_in_a_method_leaves_the_statistics_as_they_were():
    def fail(gradient, batch, statistics):
        assert statistics.prior.tolist() == pytest.approx([0.2] * C)
        raise KeyboardInterrupt

    loss_fn = LPGLoss(C, Custom(fail))
    logits, labels = make_logits()
    with pytest.raises(KeyboardInterrupt):
        loss_fn(logits, labels)
    assert loss_fn.statistics.steps == 0
    assert (loss_fn.statistics.pending == 0).all()
    loss_fn.perturbations[0].function = lambda gradient, *_: 0.0 * gradient
    loss_fn(logits, labels)
    counts = 10 + labels.bincount(minlength=C).double()
    assert loss_fn.statistics.prior.tolist() == pytest.approx((counts / counts.sum()).tolist())


@pytest.mark.parametrize("name", ["delta", "add_delta"])
@pytest.mark.parametrize("by_mixin", [False, True])
def test_a_delta_written_into_a_rescaling_method_is_refused(name, by_mixin):
    body = {name: lambda self, gradient, *_: -gradient / 2}
    bases = (type("Mixin", (), body), LogitClipping) if by_mixin else (LogitClipping,)
    with pytest.raises(TypeError, match=rf"Half overrides `{name}`, which is never called .* Write `weight`"):
        type("Half", bases, {} if by_mixin else body)


def test_a_weight_of_true_and_false_keeps_or_drops_samples():
    class Even(SampleReweighting):
        name = "even"

        def weight(self, gradient, batch, statistics):
            return (batch.labels % 2 == 0) | batch.ignore_mask

    logits, labels = make_logits()
    loss_fn = LPGLoss(C, Even())
    loss_fn(logits, labels).backward()
    plain = logits.detach().clone().requires_grad_()
    F.cross_entropy(plain, labels).backward()
    torch.testing.assert_close(logits.grad, plain.grad * (labels % 2 == 0)[:, None])
    assert loss_fn.telemetry()["lpg/even/weight"] == pytest.approx((labels % 2 == 0).double().mean().item())


def test_an_empty_micro_batch_with_a_base_loss():
    loss_fn = LPGLoss(C, "logit_clipping", base_loss=lambda z, y: F.cross_entropy(z, y, reduction="none"))
    logits = torch.zeros(0, C, requires_grad=True)
    loss_fn(logits, torch.zeros(0, dtype=torch.int64)).backward()
    assert logits.grad.shape == (0, C)
