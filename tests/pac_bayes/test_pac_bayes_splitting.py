"""`split_for_certificate`: no row twice, the same split for the same seed, and refusals."""

import math

import pytest
from datasets import Dataset

from lpg_hf.pac_bayes import split_for_certificate


def test_a_split_has_every_different_row_once(caplog):
    texts = [f"text {number % 45}" for number in range(50)]
    dataset = Dataset.from_dict({"text": texts, "label": list(range(50)), "clean_label": list(range(50))})
    parts = split_for_certificate(dataset, 0.4, seed=1)
    assert len(parts["prior"]) == 18 and len(parts["certificate"]) == 27
    # The first of each copy stays.
    assert sorted(parts["prior"]["label"][:] + parts["certificate"]["label"][:]) == list(range(45))
    again, other = split_for_certificate(dataset, 0.4, seed=1), split_for_certificate(dataset, 0.4, seed=2)
    assert again["prior"]["label"][:] == parts["prior"]["label"][:] != other["prior"]["label"][:]


def test_copies_are_found_by_the_columns_that_count():
    dataset = Dataset.from_dict({"id": [1, 2, 3, 4], "text": ["a", "a", "b", "c"], "label": [0, 0, 1, 1]})
    assert sum(map(len, split_for_certificate(dataset).values())) == 4
    assert sum(map(len, split_for_certificate(dataset, columns=["text"]).values())) == 3


def test_copies_are_found_whatever_their_padding():
    ids, mask = [[5, 6, 0], [5, 6], [5, 6, 0], [6, 5]], [[1, 1, 0], [1, 1], [1, 1, 1], [1, 1]]
    dataset = Dataset.from_dict({"input_ids": ids, "attention_mask": mask, "label": [0, 0, 1, 1]})
    parts = split_for_certificate(dataset)
    rows = parts["prior"]["input_ids"][:] + parts["certificate"]["input_ids"][:]
    assert sorted(rows) == [[5, 6, 0], [5, 6, 0], [6, 5]]


def test_a_split_keeps_the_transform_and_does_not_run_it():
    def transform(batch):
        raise AssertionError

    dataset = Dataset.from_dict({"x": [1.0, 2.0, 3.0], "label": [0, 1, 0]}).with_transform(transform)
    parts = split_for_certificate(dataset)
    with pytest.raises(AssertionError):
        parts["prior"][0]


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5, math.nan])
def test_split_refuses_a_fraction_without_two_parts(fraction):
    with pytest.raises(ValueError, match=r"`fraction`"):
        split_for_certificate(Dataset.from_dict({"x": [1, 2], "label": [0, 1]}), fraction)


def test_split_refuses_what_leaves_a_part_empty():
    with pytest.raises(ValueError, match=r"leaves a part empty"):
        split_for_certificate(Dataset.from_dict({"x": [1, 1], "label": [0, 1]}))
    with pytest.raises(ValueError, match=r"`columns` must name"):
        split_for_certificate(Dataset.from_dict({"x": [1, 2], "label": [0, 1]}), columns=["y"])
