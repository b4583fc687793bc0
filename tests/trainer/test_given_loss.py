"""Which losses of users are losses of classes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

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
