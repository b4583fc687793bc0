"""Generalized cross-entropy: the weight against the original loss, and its bounds."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from logit_batches import assert_zero_sum_within, delta_of, more_examples, valid_batches
from original_form import OriginalForm, cross_entropy, label_probability, original_form_tests
from torch.nn import functional as F

from lpg_hf.perturbations import GeneralizedCrossEntropy
from lpg_hf.statistics import ClassStatistics


def generalized_cross_entropy(q):
    return lambda z, y: ((1 - label_probability(z, y) ** q) / q).sum()


def mean_absolute_error(z, y):
    """Zhang and Sabuncu's `q = 1`: half the l1 distance of the probabilities to the label."""
    return (z.softmax(-1) - F.one_hot(y, z.shape[1])).abs().sum() / 2


TestOriginalForm = original_form_tests(
    [
        *(OriginalForm(GeneralizedCrossEntropy(q), generalized_cross_entropy(q)) for q in (0.1, 0.7)),
        OriginalForm(GeneralizedCrossEntropy(1.0), mean_absolute_error),
        OriginalForm(GeneralizedCrossEntropy(0.0), cross_entropy),
    ]
)


@more_examples
@given(drawn=valid_batches(), q=st.floats(0, 1))
def test_gce_deltas_are_bounded(drawn, q):
    p = drawn.label_prob
    delta = delta_of(GeneralizedCrossEntropy(q), drawn.batch, ClassStatistics(drawn.num_classes).double())
    assert_zero_sum_within(delta, math.sqrt(2) * (1 - p**q) * (1 - p))


@pytest.mark.parametrize("q", [-0.1, 1.1])
def test_arguments_out_of_range_are_refused_with_name_value_and_range(q):
    with pytest.raises(ValueError, match=rf"`q` must be in \[0, 1\]; found {q}"):
        GeneralizedCrossEntropy(q)
