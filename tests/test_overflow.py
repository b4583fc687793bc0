"""Gradients that are finite where they are made and infinite where they arrive are named, like other bad inputs."""

import logging

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import Trainer

from lpg_hf import LPGConfig, LPGLoss, LPGTrainer
from lpg_hf.batch import LogitBatch
from lpg_hf.perturbations import build_chain
from lpg_hf.trainer.batch_shapes import why_not_classifier
from lpg_hf.trainer.skipped_steps import SkippedSteps


RARE = [10**12, 1]


def overflowing(dtype=torch.float16, counts=RARE, **options):
    """One sample of a class that is very rare, with balanced weights."""
    loss_fn = LPGLoss(2, "class_weighting", counts, **options)
    logits = torch.zeros(1, 2, dtype=dtype, requires_grad=True)
    return loss_fn, logits, torch.tensor([1])


def test_a_gradient_that_half_precision_cannot_hold_is_named():
    loss_fn, logits, labels = overflowing()
    for _ in range(3):
        loss_fn(logits, labels).backward()
    assert logits.grad.isinf().all()
    with pytest.raises(
        FloatingPointError, match=r"gradient of step 1 is too large for logits in float16.*logit_clipping"
    ):
        loss_fn.telemetry()
    assert loss_fn.telemetry() == {}  # everything starts anew


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_other_precisions_hold_it(dtype):
    loss_fn, logits, labels = overflowing(dtype)
    loss_fn(logits, labels).backward()
    assert logits.grad.double().abs().max() == pytest.approx(2.5e11, rel=1e-2)
    assert loss_fn.telemetry()["lpg/gradient_norm"] == pytest.approx(0.5**0.5)


@given(st.integers(1, 10**7), st.integers(1, 60))
@settings(max_examples=60, deadline=None)
def test_it_is_named_if_and_only_if_it_overflows(count, num_samples):
    """Divided by the samples of the batch, as it arrives."""
    loss_fn = LPGLoss(2, "class_weighting", [count, 1])
    logits = torch.zeros(num_samples, 2, dtype=torch.float16, requires_grad=True)
    loss_fn(logits, torch.ones(num_samples, dtype=torch.int64)).backward()
    exact = (count + 1) / 4 / num_samples  # weight times 1 - p, divided
    if abs(exact - 65504) < 40:  # rounding decides
        return
    assert logits.grad.isinf().any() == (exact > 65504)
    if exact > 65504:
        with pytest.raises(FloatingPointError, match="too large for logits in float16"):
            loss_fn.telemetry()
    else:
        assert loss_fn.telemetry()["lpg/weight"] == pytest.approx((count + 1) / 2)


@pytest.mark.parametrize("way", ["base loss", "loss of the model", "any loss"])
def test_it_is_named_however_the_loss_comes(way):
    loss_fn, logits, labels = overflowing(
        base_loss=(lambda z, y: F.cross_entropy(z, y, reduction="none")) if way == "base loss" else None
    )
    if way == "any loss":
        batch = LogitBatch(logits.detach().float(), labels)
        loss = loss_fn.perturb_loss(F.cross_entropy(logits.float(), labels), logits, batch, 1.0)
    else:
        model_loss = F.cross_entropy(logits.float(), labels) if way == "loss of the model" else None
        loss = loss_fn(logits, labels, model_loss=model_loss)
    loss.backward()
    assert logits.grad.isinf().any()
    with pytest.raises(FloatingPointError, match="too large for logits in float16"):
        loss_fn.telemetry()


def test_values_that_were_never_finite_are_named_as_such():
    loss_fn, logits, labels = overflowing(counts=[1, 1])
    with torch.no_grad():
        logits[0, 0] = torch.nan
    loss_fn(logits, labels)
    with pytest.raises(FloatingPointError, match=r"The logits of step 1, or their gradient"):
        loss_fn.telemetry()


def test_an_empty_batch_overflows_nothing():
    loss_fn, _, _ = overflowing()
    logits = torch.zeros(0, 2, dtype=torch.float16, requires_grad=True)
    loss_fn(logits, torch.zeros(0, dtype=torch.int64)).backward()
    assert loss_fn.telemetry() == {}


class Scaler:
    def __init__(self, scale):
        self.scale = scale

    def get_scale(self):
        return self.scale


@pytest.mark.parametrize(("scale", "is_said"), [(65536.0, False), (1.0, False), (2.0**-20, True)])
def test_a_scaler_that_skips_step_after_step_is_named_once(scale, is_said, caplog):
    """Under autocast, logits are converted before the loss sees them."""
    trainer = object.__new__(Trainer)
    trainer.accelerator = Accelerator(cpu=True)
    trainer.accelerator.scaler = Scaler(scale)
    steps = SkippedSteps(trainer)
    with caplog.at_level(logging.WARNING, logger="lpg_hf"):
        for is_last in (False, False, True):
            steps.warn(is_last)
    assert caplog.text.count("The gradient scaler went down to 9.53674e-07") == int(is_said)


@pytest.mark.parametrize("chain", [["auto", "auto"], ["auto", "lpg", "auto"], ("auto", "auto", "auto")])
def test_auto_twice_is_refused(chain, tmp_path):
    for make in (
        build_chain,
        lambda chain: LPGLoss(2, chain),
        lambda chain: LPGConfig(str(tmp_path), perturbations=list(chain), use_cpu=True, report_to=[]),
        lambda chain: LPGTrainer(model=torch.nn.Linear(1, 2), perturbations=chain),
    ):
        with pytest.raises(ValueError, match=r"'auto' stands for a whole chain, which would act twice.* Keep one"):
            make(chain)
    assert len(build_chain("auto")) == len(build_chain(["auto"])) == len(build_chain(["lpg", "auto"])) - 1


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64])
@pytest.mark.parametrize("chain", [[], ["auto"]])
def test_logits_that_are_no_floating_point_are_refused(dtype, chain):
    with pytest.raises(ValueError, match=rf"`logits` must be of floating point.*found {dtype}. Pass the logits"):
        LPGLoss(2, chain)(torch.ones(3, 2).to(dtype), torch.zeros(3, dtype=torch.int64))
    assert "not one of floating point" in why_not_classifier(torch.ones(3, 2).to(dtype), torch.zeros(3).long(), None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_labels_that_are_no_classes_are_refused(dtype):
    with pytest.raises(ValueError, match=rf"`labels` must be integer class indices; found {dtype}"):
        LPGLoss(2)(torch.ones(3, 2, requires_grad=True), torch.zeros(3).to(dtype))


def test_boolean_labels_are_those_of_two_classes():
    logits, labels = torch.tensor([[0.0, 1.0], [2.0, 0.0]]), torch.tensor([True, False])
    found, expected = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    LPGLoss(2, ["lpg"], [3, 1])(found, labels).backward()
    LPGLoss(2, ["lpg"], [3, 1])(expected, labels.long()).backward()
    assert torch.equal(found.grad, expected.grad)


@pytest.mark.parametrize(("logits", "labels"), [([[0.0, 1.0]], torch.tensor([0])), (torch.zeros(1, 2), [0])])
def test_what_is_no_tensor_is_refused(logits, labels):
    with pytest.raises(ValueError, match="`logits` and `labels` must be tensors; found"):
        LPGLoss(2)({"logits": logits}, labels)
