"""The script that measures overhead: its arguments, and how it fits the growth of time."""

import math
import sys
from pathlib import Path

import pytest


sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "benchmarks"))
from overhead import OverheadArguments, growth


@pytest.mark.parametrize(
    ("argument", "known"), [("parts", "steps, memory, matrices"), ("models", "vit_tiny"), ("methods", "Trainer again")]
)
def test_unknown_names_are_refused(argument, known):
    with pytest.raises(ValueError, match=rf"`{argument}` has the unknown 'nothing'. The known ones are {known}"):
        OverheadArguments(**{argument: ["nothing"]})


def test_growth_is_the_exponent_without_what_is_lost_in_the_noise():
    sizes = [10, 100, 1000, 10_000]
    seconds = [3e-6 * size**0.7 for size in sizes]
    assert growth(sizes, seconds) == pytest.approx(0.7)
    seconds[1], seconds[3] = -1e-6, 0.0
    assert growth(sizes, seconds) == pytest.approx(0.7)
    assert math.isnan(growth(sizes[1:], seconds[1:]))
