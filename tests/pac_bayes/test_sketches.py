"""Rows that differ in rounding, padding or a little noise alone are found, and other rows are not."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import nn

from lpg_hf.pac_bayes import certify
from lpg_hf.pac_bayes.sketches import Sketch, Sketcher, find_close


def sketches_of(rows):
    sketcher = Sketcher()
    return [sketcher.sketch({"x": row}) for row in rows]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


CHANGES = {
    "rounding": lambda x: x.round(4),
    "scaled and back": lambda x: ((x.astype(np.float32) - 0.48) / np.float32(0.22)) * np.float32(0.22) + 0.48,
    "half precision": lambda x: x.astype(np.float16),
    "noise": lambda x: x + 0.01 * normal(*x.shape, seed=9),
    "padding": lambda x: np.concatenate([x, np.zeros((len(x), 40))], axis=1),
    "a list": lambda x: x.tolist(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_copies_are_found(change):
    rows = normal(40, 300)
    assert find_close(sketches_of(rows), sketches_of(normal(40, 300, seed=1))) == []
    others = [*normal(40, 300, seed=1), *CHANGES[change](rows[[3, 17]])]
    assert find_close(sketches_of(rows), sketches_of(others)) == [3, 17]
    assert find_close(sketches_of([*rows, *CHANGES[change](rows[[3, 17]])])) == [40, 41]


def test_rows_of_few_numbers_are_close_by_rounding_alone():
    rows = normal(40, 20)
    assert find_close(sketches_of([*rows, *(rows[:1] + 1e-5)])) == [40]
    assert find_close(sketches_of([*rows, *(rows[:1] + 0.01)])) == []
    assert sketches_of(normal(3, 15)) == [None, None, None]
    assert sketches_of(np.arange(64).reshape(2, 32)) == [None, None]  # whole numbers have no rounding


def test_what_is_no_fraction_must_be_the_same():
    sketcher, x = Sketcher(), normal(1, 300)[0]
    rows = [{"x": x + 1e-6 * number, "kind": number // 2} for number in range(4)]
    assert find_close([*map(sketcher.sketch, rows), *sketches_of(normal(9, 300, seed=1))]) == [1, 3]
    assert sketcher.sketch({"x": np.where(x > 1, np.nan, x)}) is None


def test_digits_have_no_near_copies():
    assert find_close(sketches_of(load_digits().data / 16)) == []


def test_distances_of_sketches_are_those_of_the_rows():
    rows = normal(2, 10_000) * 3
    distances = [
        np.linalg.norm(np.subtract(*(sketch.values for sketch in sketches_of(rows * scale)))) for scale in (1, 10)
    ]
    assert distances[0] == pytest.approx(np.linalg.norm(rows[0] - rows[1]), rel=0.5)
    assert distances[1] == pytest.approx(10 * distances[0], rel=1e-12)


@settings(deadline=None)
@given(seed=st.integers(0, 1000), num_rows=st.integers(1, 600), num_others=st.integers(0, 40), is_within=st.booleans())
def test_the_search_finds_what_all_pairs_say(seed, num_rows, num_others, is_within):
    generator = np.random.default_rng(seed)
    centers = generator.standard_normal((30, 16))
    points = centers[generator.integers(30, size=num_rows + num_others)]
    points = points + generator.choice([1e-4, 1e-2, 0.03], size=(len(points), 1)) * generator.standard_normal(
        points.shape
    )
    sketches = [
        Sketch("ab"[generator.integers(2)], point, int(generator.choice([20, 300])))
        if generator.random() < 0.9
        else None
        for point in points
    ]
    rows, others = sketches[:num_rows], sketches[num_rows:]
    pool = rows if is_within else sketches
    known = [sketch.values for sketch in pool if sketch is not None]
    spread = np.sqrt(2 * np.var(known, axis=0).sum()) if known else 0.0
    expected = [
        number
        for number, row in enumerate(rows)
        if row is not None
        and any(
            np.linalg.norm(row.values - other.values) < (0.02 if row.num_values >= 256 else 0.001) * spread
            for other in (rows[:number] if is_within else others)
            if other is not None and other.key == row.key
        )
    ]
    assert find_close(rows, None if is_within else others) == expected


class Sounds(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(2, 2)

    def forward(self, input_values, labels=None):
        return {"logits": self.head(torch.stack([input_values.sum(-1), input_values.square().sum(-1)], -1))}


def test_a_certificate_counts_and_names_them(monkeypatch):
    warnings = []
    monkeypatch.setattr("lpg_hf.pac_bayes.independence.logger.warning", warnings.append)

    def rows_of(x):
        return [{"input_values": torch.tensor(row, dtype=torch.float32), "labels": 0} for row in x]

    def run(rows, prior_rows):
        settings = {"sigma_grid": [0.1], "num_draws": 13, "disable_tqdm": True}
        return certify(Sounds(), rows_of(rows), prior=prior, prior_dataset=rows_of(prior_rows), **settings)

    torch.manual_seed(0)
    prior = Sounds()
    rows, others = normal(30, 300), normal(20, 300, seed=1)
    assert run(rows, others).num_near_copies == 0 and not warnings
    certificate = run(rows, [*others, rows[4].round(3), rows[9].round(3)])
    assert certificate.num_near_copies == 2
    assert "2 rows of the set are near copies of one of them" in str(certificate)
    (warning,) = warnings
    assert "2 rows of `dataset` have all but the same numbers as a row of `prior_dataset` (rows 4, 9)" in warning
    run([*rows, rows[0] + 1e-4], others)
    assert "1 rows of `dataset` have all but the same numbers as an earlier row (rows 30)" in warnings[1]
