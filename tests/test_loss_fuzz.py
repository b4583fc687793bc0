"""Ten thousand calls of the loss: each one is right, or says what is wrong."""

import itertools
from collections import Counter

import numpy as np
import pytest
from loss_fuzz import CHAINS, Case, all_cases, outcome

from lpg_hf.perturbations.label_smoothing import LabelSmoothing


def tally(cases) -> Counter:
    found: Counter = Counter()
    for case in cases:
        with np.errstate(all="ignore"):
            result = outcome(case)
        assert not result.startswith("silent"), (case, result)
        found[result] += 1
    return found


def test_a_ninth_of_the_calls():
    """9 has no divisor in common with the numbers of kinds, so all of them occur with all chains."""
    found = tally(itertools.islice(all_cases(), 0, None, 9))
    assert sum(found.values()) == 1096 and found["named"] < found["right"]


@pytest.mark.slow
def test_all_of_the_calls():
    found = tally(all_cases())
    print(dict(found))
    assert sum(found.values()) == 22 * 14 * 4 * 2 * 4 == 9856
    assert found["right"] > 6000


def test_the_formulas_notice_a_loss_that_is_wrong(monkeypatch):
    monkeypatch.setattr(LabelSmoothing, "name", "other", raising=False)
    smooth = LabelSmoothing._smooth

    def slightly_wrong(self, gradient, *args):
        return smooth(self, gradient, *args) * 1.001

    monkeypatch.setattr(LabelSmoothing, "_smooth", slightly_wrong)
    case = Case(("label_smoothing",), "normal", "long tail", (16, 7), "valid")
    assert list(case.chain) in CHAINS and outcome(case).startswith("silent")
