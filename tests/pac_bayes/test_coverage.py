"""Certificates hold as often as they promise, whatever part of a model is trained."""

import pytest
from coverage_simulation import KINDS, PROMISED, SETTINGS, p_value, simulate

from lpg_hf.pac_bayes.weight_noise import WeightNoise


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
def test_with_a_prompt_that_is_drawn_only_once_the_bounds_fail(monkeypatch):
    """The simulation sees what it is for: all draws have the prompt of the first one."""
    sample = WeightNoise.sample
    monkeypatch.setattr(WeightNoise, "sample", lambda self, stream, draw: sample(self, stream, 0))
    counts = simulate("p-tuning", "tight", 40)
    assert p_value(counts["classes"], 40, PROMISED["classes"]) < 1e-9, counts
