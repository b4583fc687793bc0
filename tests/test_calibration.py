import numpy as np
import pytest

from lpg_hf.calibration import calibration_bins, calibration_error


def test_calibration_bins_equal_a_loop():
    rng = np.random.default_rng(0)
    # No sample is less confident than 0.3, so the first four bins are empty; edges belong to the bin below them.
    confidence = np.concatenate([rng.uniform(0.3, 1, size=200), np.arange(5, 16) / 15])
    is_correct = rng.random(len(confidence)) < 0.6
    found = calibration_bins(confidence, is_correct)
    assert len(found) == 15
    for number, each in enumerate(found):
        lower, upper = number / 15, (number + 1) / 15
        members = [row for row, value in enumerate(confidence) if lower < value <= upper]
        assert (each.lower, each.upper) == (pytest.approx(lower), pytest.approx(upper))
        assert each.rows == len(members)
        if members:
            assert each.confidence == pytest.approx(sum(confidence[row] for row in members) / len(members))
            assert each.accuracy == pytest.approx(sum(is_correct[row] for row in members) / len(members))
            assert each.gap == abs(each.accuracy - each.confidence)
        else:
            assert (each.confidence, each.accuracy, each.gap) == (None, None, 0.0)
    assert [each.rows == 0 for each in found] == [number < 4 for number in range(15)]
    assert {type(value) for each in found if each.rows for value in each} == {float, int}
    expected = sum(each.rows / len(confidence) * abs(each.accuracy - each.confidence) for each in found if each.rows)
    assert calibration_error(found) == pytest.approx(expected)


def test_confidence_zero_and_one_belong_to_the_outer_bins():
    found = calibration_bins(np.array([0.0, 1.0]), np.array([False, True]))
    assert [each.rows for each in found] == [1] + [0] * 13 + [1]
    assert calibration_error(found) == 0.0
