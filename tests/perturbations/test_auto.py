"""The preset `auto`: which methods it stands for, alone and next to others."""

import numpy as np
import pytest
import torch
from logit_batches import NUM_CLASSES, delta_of, make_batch

from lpg_hf.batch import LogitBatch
from lpg_hf.perturbations import LPG, LogitPerturbation, build_chain
from lpg_hf.statistics import ClassStatistics


AUTO_DAMPENING = (
    "class_relative_dampening(power=8.0, learned=(0.05, 0.3), contradicted=(0.01, 0.03), decided=(0.1, 0.13), "
    "compensated=True)"
)
BALANCED_CHAIN = [
    "label_smoothing()",
    AUTO_DAMPENING.replace("compensated", "rising=(0.5, 0.8), compensated"),
]
IMBALANCED_CHAIN = [
    "logit_adjustment(min_imbalance=2.0, learned=(0.05, 0.2))",
    "label_smoothing(target='prior')",
    AUTO_DAMPENING,
]


def reprs(*args, **options):
    chain = build_chain(*args, **options)
    assert isinstance(chain, list)
    assert all(isinstance(method, LogitPerturbation) for method in chain)
    return [repr(method) for method in chain]


@pytest.mark.parametrize(
    ("class_counts", "expected"),
    [
        ([50, 50, 50], BALANCED_CHAIN),
        ([100, 50], BALANCED_CHAIN),
        ([100, 0, 50], BALANCED_CHAIN),
        ([101, 50], IMBALANCED_CHAIN),
        ([101, 0, 50], IMBALANCED_CHAIN),
        (torch.tensor([900, 100]), IMBALANCED_CHAIN),
        (np.array([100, 100]), BALANCED_CHAIN),
        (None, IMBALANCED_CHAIN),
    ],
)
def test_auto_adjusts_logits_where_classes_are_imbalanced_or_unknown(class_counts, expected):
    assert reprs("auto", class_counts) == expected
    assert reprs(["auto"], class_counts=class_counts) == expected


def test_auto_for_unknown_counts_adjusts_only_when_the_running_prior_is_imbalanced():
    adjustment, *_ = build_chain("auto")
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
    chain = ["logit_clipping", "auto", LPG()]
    assert reprs(chain, [900, 100]) == ["logit_clipping()", *IMBALANCED_CHAIN, "lpg()"]
    assert reprs(chain, [100, 100]) == ["logit_clipping()", *BALANCED_CHAIN, "lpg()"]


@pytest.mark.parametrize(
    ("beside", "added", "added_to_balanced"),
    [
        # Corrected by another method, the prior is what to smooth towards, however small the imbalance.
        ("logit_adjustment()", IMBALANCED_CHAIN[1:], [IMBALANCED_CHAIN[1], BALANCED_CHAIN[1]]),
        ("class_weighting()", IMBALANCED_CHAIN[1:], [IMBALANCED_CHAIN[1], BALANCED_CHAIN[1]]),
        # Its own adjustment and a uniform target do not go together.
        (
            "label_smoothing(alpha=0.3)",
            [
                IMBALANCED_CHAIN[0],
                "label_smoothing(alpha=-0.3)",
                "label_smoothing(alpha=0.3, target='prior')",
                *IMBALANCED_CHAIN[1:],
            ],
            BALANCED_CHAIN,
        ),
        ("label_smoothing(target='prior')", IMBALANCED_CHAIN, BALANCED_CHAIN),
        ("class_relative_dampening()", IMBALANCED_CHAIN[:2], BALANCED_CHAIN[:1]),
        ("focal_loss()", IMBALANCED_CHAIN, BALANCED_CHAIN),
    ],
)
def test_auto_adds_what_the_rest_of_the_chain_leaves_to_it(beside, added, added_to_balanced):
    assert reprs([beside, "auto"], [900, 100]) == [beside, *added]
    assert reprs(["auto", beside], [900, 100]) == [*added, beside]
    assert reprs([beside, "auto"], [110, 100]) == [beside, *added_to_balanced]
