"""Label smoothing: the formula, the method against a smoothed cross-entropy, and the norm of its delta."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from logit_batches import (
    COUNTS,
    NUM_CLASSES,
    assert_close,
    assert_equal,
    assert_zero_sum_within,
    delta_of,
    make_batch,
    more_examples,
    valid_batches,
)
from original_form import OriginalForm, cross_entropy, original_form_tests
from torch.nn import functional as F

from lpg_hf.perturbations import LabelSmoothing
from lpg_hf.perturbations.label_smoothing import smooth_labels
from lpg_hf.statistics import ClassStatistics


PRIOR = torch.tensor(COUNTS, dtype=torch.float64) / sum(COUNTS)


def smoothed(alpha):
    return lambda z, y: F.cross_entropy(z, y, label_smoothing=alpha, reduction="sum")


def smoothed_towards(alpha, distribution):
    """Where torch has no form: cross-entropy with targets `(1 - alpha) onehot + alpha distribution`, written out."""

    def loss(z, y):
        target = alpha * distribution + (1 - alpha) * F.one_hot(y, z.shape[1]).to(z.dtype)
        return -(target * z.log_softmax(-1)).sum()

    return loss


TestOriginalForm = original_form_tests(
    [
        *(OriginalForm(LabelSmoothing(alpha), smoothed(alpha)) for alpha in (0.1, 0.6)),
        OriginalForm(LabelSmoothing(-0.4), smoothed_towards(-0.4, torch.ones(5).double() / 5)),
        OriginalForm(LabelSmoothing(0.3, "prior"), smoothed_towards(0.3, PRIOR)),
        OriginalForm(LabelSmoothing(0.0), cross_entropy),
    ]
)


def test_smoothing_can_be_differentiated_and_mapped():
    labels = torch.tensor([[0, 2], [1, 1]])
    target = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64, requires_grad=True)
    gradient, share = torch.zeros(2, 2, 3, dtype=torch.float64), torch.full((2,), 0.3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda t: smooth_labels(gradient[0], labels[0], share, t), [target])
    mapped = torch.func.vmap(lambda g, y: smooth_labels(g, y, share))(gradient, labels)
    expected = [smooth_labels(g, y, share).tolist() for g, y in zip(gradient, labels, strict=True)]
    assert_equal(mapped, expected, 1e-15)


@pytest.mark.parametrize("counts", [[99_990, 10, 0, 0, 0], [10**7, 1, 1, 1, 1], [3, 3, 3, 3, 3], [1, 0, 0, 0, 0]])
def test_the_norm_of_smoothing_towards_extreme_shares_in_float32(counts):
    batch = make_batch(dtype=torch.float32)
    statistics = ClassStatistics(NUM_CLASSES, counts)
    _, norm = LabelSmoothing(0.3, target="prior").add_delta(torch.zeros_like(batch.logits), batch, statistics)
    shares = np.array(counts) / sum(counts)
    exact = [0.3 * np.linalg.norm(np.eye(NUM_CLASSES)[label] - shares) for label in batch.labels[batch.valid_mask]]
    np.testing.assert_allclose(norm[batch.valid_mask].numpy(), exact, rtol=1e-3, atol=1e-7)


@more_examples
@given(drawn=valid_batches(), alpha=st.floats(-0.99, 0.99))
def test_label_smoothing_deltas_have_exactly_their_norm(drawn, alpha):
    norm = abs(alpha) * math.sqrt(1 - 1 / drawn.num_classes)
    delta = delta_of(LabelSmoothing(alpha), drawn.batch, ClassStatistics(drawn.num_classes).double())
    assert_zero_sum_within(delta, norm)
    assert_close(delta.norm(dim=-1), torch.full((len(delta),), norm, dtype=torch.float64), 1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 1.0}, r"`alpha` must be in \(-1, 1\); found 1\.0"),
        ({"alpha": -1.0}, r"`alpha` must be in \(-1, 1\); found -1\.0"),
        ({"target": "unigram"}, r"`target` must be one of .*found 'unigram'"),
    ],
)
def test_arguments_out_of_range_are_refused_with_name_value_and_range(options, message):
    with pytest.raises(ValueError, match=message):
        LabelSmoothing(**options)
