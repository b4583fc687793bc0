"""Which losses of users are losses of classes."""

import random

import numpy as np
import pytest
import torch
from clients import distance, exact_bert, losses_of, run
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import Trainer

from lpg_hf import LPGLoss, LPGTrainer
from lpg_hf.trainer.given_loss import why_not_of_classes


def focal_loss(logits, labels):
    log_prob = F.cross_entropy(logits, labels, reduction="none")
    return ((1 - (-log_prob).exp()).square() * log_prob).mean()


def margin_loss(logits, labels):
    return F.multi_margin_loss(logits.float(), labels)


def one_vs_rest(logits, labels):
    return F.binary_cross_entropy_with_logits(logits, F.one_hot(labels, logits.shape[1]).to(logits))


OF_CLASSES = {
    "cross-entropy": F.cross_entropy,
    "smoothed": lambda logits, labels: F.cross_entropy(logits, labels, label_smoothing=0.3),
    "weighted": lambda logits, labels: F.cross_entropy(logits, labels, 1.0 + torch.arange(logits.shape[1]).to(logits)),
    "focal": focal_loss,
    "margin": margin_loss,
    "one versus the rest": one_vs_rest,
    "flooded": lambda logits, labels: (F.cross_entropy(logits, labels) - 1.5).abs() + 1.5,
    "with a penalty": lambda logits, labels: F.cross_entropy(logits, labels) + 0.01 * logits.square().mean(),
}


@pytest.mark.parametrize("name", OF_CLASSES)
@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    num_labels=st.integers(2, 50),
    size=st.integers(1, 16),
    scale=st.sampled_from([0.0, 0.1, 1.0, 5.0]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    learned=st.booleans(),
)
def test_losses_of_classes_are_taken_as_such(name, seed, num_labels, size, scale, dtype, learned):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_labels, (size,), generator=generator)
    logits = scale * torch.randn(size, num_labels, generator=generator)
    logits = (logits + 8 * learned * F.one_hot(labels, num_labels)).to(dtype).requires_grad_()
    loss = OF_CLASSES[name](logits, labels)
    assert why_not_of_classes(loss, logits, labels, is_requested=False) is None


def thresholds(logits, labels):
    is_above = (labels[:, None] > torch.arange(logits.shape[1])).to(logits)
    return F.binary_cross_entropy_with_logits(logits, is_above)


def cosine(logits, labels):
    generator = torch.Generator().manual_seed(1)
    centers = torch.randn(logits.shape[1], logits.shape[1], generator=generator)
    return F.cross_entropy(8 * F.normalize(logits, dim=-1) @ F.normalize(centers, dim=0), labels)


@pytest.mark.parametrize("loss", [thresholds, cosine])
@pytest.mark.parametrize("seed", range(5))
def test_other_losses_are_not(loss, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(8, (16,), generator=generator)
    logits = torch.randn(16, 8, generator=generator).requires_grad_()
    assert "not that of a loss of classes" in why_not_of_classes(
        loss(logits, labels), logits, labels, is_requested=False
    )
    assert why_not_of_classes(loss(logits, labels), logits, labels, is_requested=True) is None


def test_samples_without_a_label_have_no_say():
    logits = torch.zeros(4, 3, requires_grad=True)
    labels = torch.tensor([0, -100, -100, -100])
    loss = F.cross_entropy(logits, labels) + logits[1:, 0].sum()
    assert why_not_of_classes(loss, logits, labels, is_requested=False) is None


# How often a loss is called


CLIPPING = ["logit_clipping(max_norm=0.3)"]


class NoisyLoss:
    """Draws from all generators, and counts its calls."""

    def __init__(self, uses_count):
        self.uses_count, self.num_calls = uses_count, 0

    def __call__(self, outputs, labels, num_items_in_batch=None):
        self.num_calls += 1
        noise = torch.rand_like(outputs.logits) + random.random() + np.random.random()
        values = F.cross_entropy(outputs.logits + noise, labels, reduction="none")
        return values.sum() / num_items_in_batch if self.uses_count else values.mean()


def run_noisy(trainer_class, path, uses_count, accumulation=1, **kwargs):
    loss = NoisyLoss(uses_count)
    args = {"gradient_accumulation_steps": accumulation}
    return run(trainer_class, exact_bert(), path, args=args, compute_loss_func=loss, **kwargs), loss.num_calls


@pytest.mark.parametrize("uses_count", [True, False])
@pytest.mark.parametrize(("accumulation", "more_calls"), [(1, 0), (2, 2)])
def test_a_loss_is_called_as_often_as_by_trainer_and_draws_the_same(uses_count, accumulation, more_calls, tmp_path):
    """Under accumulation, two calls tell whether it divides by the count."""
    plain, num_plain = run_noisy(Trainer, tmp_path, uses_count, accumulation)
    ours, num_ours = run_noisy(
        LPGTrainer, tmp_path, uses_count, accumulation, perturbations=["logit_clipping(max_norm=100.0)"]
    )
    assert num_ours - num_plain == more_calls
    assert distance(ours, plain) < 1e-9
    assert losses_of(ours) == pytest.approx(losses_of(plain), abs=1e-6)
    clipped, _ = run_noisy(LPGTrainer, tmp_path, uses_count, accumulation, perturbations=CLIPPING)
    assert distance(clipped, plain) > 1e-3


@pytest.mark.parametrize("uses_count", [True, False])
def test_where_labels_are_left_out_the_delta_has_the_divisor_of_the_loss(uses_count, tmp_path):
    """Without accumulation, too, the count is then another one than that of the labels that are left."""

    class LeavesOut(LPGTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            return super().compute_loss(model, inputs | {"labels": masked(inputs["labels"])}, *args, **kwargs)

    def masked(labels):
        return labels.where(torch.arange(4) != 1, -100)

    def loss(outputs, labels, num_items_in_batch=None):
        total = F.cross_entropy(outputs.logits, labels, reduction="sum")
        return total / (num_items_in_batch if uses_count else (labels != -100).sum())

    loss_fn = LPGLoss(4, CLIPPING)

    def expected(outputs, labels, num_items_in_batch=None):
        return loss_fn(outputs, masked(labels), num_items_in_batch if uses_count else None)

    ours = run(LeavesOut, exact_bert(), tmp_path, perturbations=CLIPPING, compute_loss_func=loss)
    assert distance(ours, run(Trainer, exact_bert(), tmp_path, compute_loss_func=expected)) < 1e-9
    assert distance(ours, run(Trainer, exact_bert(), tmp_path)) > 1e-3


@pytest.mark.parametrize("uses_count", [True, False])
def test_where_the_count_is_the_users_own_the_delta_has_the_divisor_of_the_loss(uses_count, tmp_path):
    def loss(outputs, labels, num_items_in_batch=None):
        total = F.cross_entropy(outputs.logits, labels, reduction="sum")
        return total / (num_items_in_batch if uses_count else len(labels))

    def counting_anew(base):
        class CountsAnew(base):
            def get_batch_samples(self, *args, **kwargs):
                batches, count = super().get_batch_samples(*args, **kwargs)
                return batches, 3 * count

        return CountsAnew

    loss_fn = LPGLoss(4, CLIPPING)

    def expected(outputs, labels, num_items_in_batch=None):
        return loss_fn(outputs, labels, num_items_in_batch if uses_count else None)

    ours = run(counting_anew(LPGTrainer), exact_bert(), tmp_path, perturbations=CLIPPING, compute_loss_func=loss)
    plain = run(counting_anew(Trainer), exact_bert(), tmp_path, compute_loss_func=expected)
    assert distance(ours, plain) < 1e-9
