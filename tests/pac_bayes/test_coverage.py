"""Certificates hold as often as they promise, whatever part of a model is trained."""

import pytest
from coverage_simulation import KINDS, PROMISED, SETTINGS, p_value, simulate


def check(kind, setting, num_repetitions):
    counts = simulate(kind, setting, num_repetitions)
    for name, promised in PROMISED.items():
        assert p_value(counts[name], num_repetitions, promised) > 1e-3, (name, counts)


@pytest.mark.parametrize("kind", KINDS)
def test_bounds_hold_in_a_few_trainings(kind):
    check(kind, "tight", 8)


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_bounds_hold_in_300_trainings(kind, setting):
    check(kind, setting, 300)


@pytest.mark.slow
def test_with_prompts_that_are_drawn_only_once_the_bounds_fail(monkeypatch):
    """The simulation sees what it is for: all draws have the backbone's output of the first one."""
    monkeypatch.setattr("lpg_hf.pac_bayes.remembered_outputs._equal", lambda *_: True)
    monkeypatch.setattr("lpg_hf.pac_bayes.drawn_logits.same_logits", lambda *_: True)
    counts = simulate("p-tuning", "tight", 40)
    assert p_value(counts["classes"], 40, PROMISED["classes"]) < 1e-9, counts
