"""Focal loss: the weight against the original loss, and its bounds."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from logit_batches import assert_zero_sum_within, delta_of, more_examples, valid_batches
from original_form import OriginalForm, cross_entropy, label_probability, original_form_tests

from lpg_hf.perturbations import FocalLoss
from lpg_hf.statistics import ClassStatistics


def focal(gamma):
    def loss(z, y):
        p = label_probability(z, y)
        return (-((1 - p) ** gamma) * p.log()).sum()

    return loss


TestOriginalForm = original_form_tests(
    [
        # At extreme logits the plain form is 0 * infinity in autograd.
        OriginalForm(FocalLoss(0.5), focal(0.5), is_finite=False),
        *(OriginalForm(FocalLoss(gamma), focal(gamma)) for gamma in (1.0, 2.0, 3.7)),
        OriginalForm(FocalLoss(0.0), cross_entropy),
    ]
)


@more_examples
@given(drawn=valid_batches(), gamma=st.floats(1, 5))
def test_focal_deltas_are_bounded(drawn, gamma):
    gradient, p = drawn.gradient, drawn.label_prob
    delta = delta_of(FocalLoss(gamma), drawn.batch, ClassStatistics(drawn.num_classes).double())
    assert_zero_sum_within(delta, math.sqrt(2) * max(1, gamma))
    largest_factor = (1 + gamma) * (1 - p) ** gamma
    assert ((gradient + delta).norm(dim=-1) <= largest_factor * gradient.norm(dim=-1) + 1e-9).all()


@pytest.mark.parametrize(
    ("gamma", "message"),
    [(-0.1, r"`gamma` must be at least 0; found -0\.1"), (math.inf, r"`gamma` must be finite; found inf")],
)
def test_arguments_out_of_range_are_refused_with_name_value_and_range(gamma, message):
    with pytest.raises(ValueError, match=message):
        FocalLoss(gamma)
