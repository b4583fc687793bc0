"""The preset `auto`: which methods it stands for, alone and next to others."""

import pytest
import torch
from logit_batches import NUM_CLASSES, delta_of, make_batch

from lpg_hf.batch import LogitBatch
from lpg_hf.perturbations import LPG, LogitPerturbation, build_chain
from lpg_hf.statistics import ClassStatistics


ADJUSTMENT = "logit_adjustment(learned=(0.05, 0.2), target='evaluation')"
DAMPENING = "class_relative_dampening()"


def reprs(*args, **options):
    chain = build_chain(*args, **options)
    assert isinstance(chain, list)
    assert all(isinstance(method, LogitPerturbation) for method in chain)
    return [repr(method) for method in chain]


def test_auto_adjusts_and_dampens():
    assert reprs("auto") == reprs(["auto"]) == [ADJUSTMENT, DAMPENING]


def test_auto_for_unknown_counts_adjusts_only_when_the_running_prior_is_imbalanced():
    adjustment, _ = build_chain("auto")
    statistics = ClassStatistics(NUM_CLASSES).double()
    labels = torch.arange(NUM_CLASSES).repeat(100)
    statistics.update(LogitBatch(torch.zeros(len(labels), NUM_CLASSES), labels))
    statistics.step()
    assert (delta_of(adjustment, make_batch(), statistics) == 0).all()
    labels.fill_(2)
    statistics.update(LogitBatch(torch.zeros(len(labels), NUM_CLASSES), labels))
    statistics.step()
    assert delta_of(adjustment, make_batch(), statistics).abs().max() > 0.01


def test_auto_expands_inside_a_longer_chain():
    assert reprs(["logit_clipping", "auto", LPG()]) == ["logit_clipping()", ADJUSTMENT, DAMPENING, "lpg()"]


@pytest.mark.parametrize(
    ("other", "added"),
    [
        ("logit_adjustment()", [DAMPENING]),
        ("class_weighting()", [DAMPENING]),
        # Its own adjustment and a uniform target do not go together.
        (
            "label_smoothing(alpha=0.3)",
            [ADJUSTMENT, "label_smoothing(alpha=-0.3)", "label_smoothing(alpha=0.3, target='prior')", DAMPENING],
        ),
        ("label_smoothing(target='prior')", [ADJUSTMENT, DAMPENING]),
        ("class_relative_dampening(power=3.5)", [ADJUSTMENT]),
        ("focal_loss()", [ADJUSTMENT, DAMPENING]),
    ],
)
def test_auto_adds_what_the_rest_of_the_chain_leaves_to_it(other, added):
    assert reprs([other, "auto"]) == [other, *added]
    assert reprs(["auto", other]) == [*added, other]
