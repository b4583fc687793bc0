"""LPL: the method against projected gradient steps on the loss, and its bounds."""

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from logit_batches import (
    COUNTS,
    NUM_CLASSES,
    assert_close,
    assert_zero_sum_within,
    delta_of,
    make_batch,
    more_examples,
    positive,
    valid_batches,
)
from original_form import (
    OriginalForm,
    cross_entropy,
    gradient_of,
    gradient_through_loss,
    original_form_tests,
)
from torch.nn import functional as F

from lpg_hf.perturbations import LPL
from lpg_hf.perturbations.lpl import lpl_delta
from lpg_hf.statistics import ClassStatistics


SIGNS, BOUNDS = [1, -1, 0, 1, -1], [0.4, 1.1, 0.7, 2.3, 0.15]


def logit_perturbation(signs, bounds, steps):
    """A shift of the logits per class by projected gradient steps on the loss of the class, then cross-entropy."""

    def loss(z, y):
        shifts = torch.zeros_like(z)
        for c in y.unique().tolist():
            shifts[y == c] = best_shift(z.detach()[y == c], c, signs[c], bounds[c], steps)
        return F.cross_entropy(z + shifts, y, reduction="sum")

    return loss


def best_shift(z, c, sign, bound, steps):
    shift = torch.zeros(z.shape[1], dtype=z.dtype)
    for _ in range(steps):
        variable = shift.clone().requires_grad_()
        F.cross_entropy(z + variable, torch.full((len(z),), c), reduction="sum").backward()
        shift = shift + sign * 0.5 * bound * variable.grad / variable.grad.norm()
        if shift.norm() > bound:
            shift = shift * (bound / shift.norm())
    return shift


TestOriginalForm = original_form_tests(
    [
        OriginalForm(LPL("fixed", steps=steps, signs=SIGNS, bounds=BOUNDS), logit_perturbation(SIGNS, BOUNDS, steps))
        for steps in (1, 2, 5)
    ]
)


def test_lpl_raises_the_loss_of_amplified_classes_and_lowers_that_of_dampened_ones():
    """The inner problem: the further downhill, the smaller the gradient that is left of a class."""
    batch = make_batch(40, 3.0)
    plain = gradient_of(cross_entropy, batch)
    shifted = gradient_through_loss(LPL("fixed", signs=SIGNS, bounds=BOUNDS), batch)
    for c, sign in enumerate(SIGNS):
        growth = shifted[batch.labels == c].norm() - plain[batch.labels == c].norm()
        assert growth.sign() == sign or (sign == 0 and abs(growth) < 1e-12)


@pytest.mark.parametrize("strategy", ["frequency", "accuracy"])
def test_lpl_takes_signs_and_radii_from_its_strategy(strategy):
    batch = make_batch(40, 3.0)
    statistics = ClassStatistics(NUM_CLASSES, COUNTS).double()
    statistics.update(make_batch(40, 3.0, seed=7))
    statistics.step()
    prior = [count / sum(COUNTS) for count in COUNTS]
    signs, bounds = (
        reference.frequency_signs_and_bounds(prior, 0.8)
        if strategy == "frequency"
        else reference.accuracy_signs_and_bounds(prior, statistics.accuracy.tolist(), 0.8)
    )
    delta = delta_of(LPL(strategy, epsilon=0.8, steps=3), batch, statistics)
    expected = gradient_of(logit_perturbation(signs, bounds, 3), batch)
    assert {-1, 1} <= set(signs)
    assert_close(batch.gradient + delta, expected, 1e-10)


@more_examples
@given(drawn=valid_batches(), seed=st.integers(0, 99), sign=st.sampled_from([1.0, -1.0]), steps=st.integers(1, 5))
def test_lpl_deltas_are_at_most_half_their_radius(drawn, seed, sign, steps):
    bounds = 3 * positive(drawn.num_classes, seed)
    delta = lpl_delta(drawn.batch, sign * torch.ones_like(bounds), bounds, steps)
    assert_zero_sum_within(delta, bounds[drawn.labels] / 2)


@pytest.mark.parametrize(
    ("steps", "message"),
    [(2.5, r"`steps` must be a whole number; found 2\.5"), (0, r"`steps` must be at least 1; found 0")],
)
def test_arguments_out_of_range_are_refused_with_name_value_and_range(steps, message):
    with pytest.raises(ValueError, match=message):
        LPL(steps=steps)
