"""Rows of the prior are known in every form that they may come in, and rows that change are refused."""

import itertools

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import nn
from transformers import default_data_collator

from lpg_hf.pac_bayes import certify
from lpg_hf.pac_bayes.fingerprints import row_fingerprint
from lpg_hf.pac_bayes.near_copies import find_near_copies


SIZE = 3
FEW = {"sigma_grid": [0.1], "num_draws": 13, "disable_tqdm": True}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(SIZE, 2))

    def forward(self, x, labels=None):
        return {"logits": x.flatten(1)[:, :SIZE].float() @ self.weight}


def run(rows, prior_rows=None, **changes):
    model = Model()
    return certify(model, rows, prior=Model(), prior_dataset=prior_rows, **(FEW | changes))


def make_rows(seed=0, num_rows=20, scale=1.0):
    x = torch.randn(num_rows, SIZE, generator=torch.Generator().manual_seed(seed))
    return [{"x": scale * entry, "labels": number % 2} for number, entry in enumerate(x)]


# Copies in another form


FORMS = {
    "float64": lambda x: x.double(),
    "float16": lambda x: x.half(),
    "bfloat16": lambda x: x.bfloat16(),
    "half array": lambda x: x.numpy().astype(np.float16),
    "list": lambda x: x.tolist(),
    "array": lambda x: x.numpy(),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("is_certificate", [False, True])
def test_a_row_is_known_in_every_precision(form, is_certificate):
    rows, other = make_rows(), make_rows(seed=1)
    changed = [row | {"x": FORMS[form](row["x"])} for row in rows[3:6]]
    if is_certificate:
        rows, changed = [row | {"x": FORMS[form](row["x"])} for row in rows], rows[3:6]
    with pytest.raises(ValueError, match=r"3 rows of `prior_dataset` have the inputs of a row of `dataset`"):
        run(rows, other + changed)
    if form in ("float64", "list", "array"):
        assert run(rows, other).num_prior_rows == 20


@pytest.mark.parametrize("kind", [torch.int64, torch.int32, torch.uint8, torch.bool, torch.float64, torch.float16])
def test_whole_numbers_are_the_same_in_every_dtype(kind):
    bits = [[int(bit) for bit in f"{number:05b}"] for number in range(32)]
    rows = [{"x": torch.tensor(entry, dtype=torch.float32), "labels": 0} for entry in bits[:16]]
    new = [{"x": torch.tensor(entry, dtype=kind), "labels": 0} for entry in bits[16:]]
    old = [{"x": torch.tensor(entry, dtype=kind), "labels": 1} for entry in bits[4:6]]
    assert run(rows, new).num_prior_rows == 16
    with pytest.raises(ValueError, match=r"2 rows of `prior_dataset`"):
        run(rows, new + old)


@given(
    array=arrays.arrays(
        np.float64,
        arrays.array_shapes(min_dims=0, max_dims=3, max_side=3),
        elements=st.floats(width=16) | st.integers(-300, 300).map(float),
    )
)
@settings(deadline=None)
def test_a_fingerprint_depends_on_values_alone(array):
    tensor = torch.from_numpy(array)
    forms = [
        array,
        array.tolist(),
        tensor,
        tensor.float(),
        tensor.half(),
        array.astype(np.float16),
    ]
    if array.ndim > 1:
        forms += [np.asfortranarray(array), list(array), list(tensor), [list(part) for part in tensor.float()]]
    if array.size and (array == np.floor(array)).all() and np.isfinite(array).all():
        forms += [tensor.long(), array.astype(np.int32), tensor.long().tolist()]
    assert len({row_fingerprint({"x": form}) for form in forms}) == 1
    for precision in (torch.float16, torch.float32):
        assert row_fingerprint({"x": tensor}, precision) == row_fingerprint({"x": tensor.half()}, precision)


@given(first=arrays.arrays(np.float32, 3), second=arrays.arrays(np.float32, 3))
@settings(deadline=None)
def test_other_values_have_another_fingerprint(first, second):
    is_same = np.array_equal(first, second, equal_nan=True)
    assert (row_fingerprint({"x": first}) == row_fingerprint({"x": second})) == is_same


def test_nested_rows_of_unequal_length():
    ragged = [[1, 2], [3]]
    forms = [
        ragged,
        [torch.tensor([1, 2]), torch.tensor([3])],
        [np.array([1.0, 2.0]), [3.0]],
        np.array([np.array([1, 2]), np.array([3])], dtype=object),
    ]
    assert len({row_fingerprint({"x": form}) for form in forms}) == 1
    others = [[[1], [2, 3]], [[1, 2], [4]], [[1, 2, 3]], [1, 2, 3], ["12", "3"], [["1", "2"], ["3"]]]
    assert len({row_fingerprint({"x": form}) for form in [ragged, *others]}) == len(others) + 1


FORMS_OF_IDS = [list, np.array, torch.tensor, lambda ids: torch.tensor(ids, dtype=torch.int32)]


@given(
    ids=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    padding=st.tuples(st.lists(st.integers(0, 9), max_size=3), st.lists(st.integers(0, 9), max_size=3)),
    form=st.sampled_from(FORMS_OF_IDS),
    is_on_the_left=st.booleans(),
)
@settings(deadline=None)
def test_padding_does_not_count(ids, padding, form, is_on_the_left):
    def row(ids, pad):
        def padded(values, filler):
            return form([*filler, *values] if is_on_the_left else [*values, *filler])

        mask, boxes = padded([1] * len(ids), [0] * len(pad)), padded([[7, i] for i in ids], [[p, p] for p in pad])
        return {"input_ids": padded(ids, pad), "attention_mask": mask, "bbox": boxes, "size": 9}

    bare = row_fingerprint(
        {"input_ids": ids, "attention_mask": [1] * len(ids), "bbox": [[7, i] for i in ids], "size": 9}
    )
    assert {row_fingerprint(row(ids, pad)) for pad in padding} == {bare}
    assert row_fingerprint(row([*ids, 0], padding[0])) != bare
    assert row_fingerprint(row(ids, padding[0]) | {"size": 8}) != bare


def test_what_a_mask_hides_in_a_batch_does_count():
    """A collator that draws it at random changes what a model may see."""
    batch = {"input_ids": torch.tensor([[1, 2], [3, 4]]), "attention_mask": torch.tensor([[1, 1], [1, 0]])}
    other = batch | {"input_ids": torch.tensor([[1, 2], [3, 5]])}
    assert row_fingerprint(batch) != row_fingerprint(other)


def test_large_numbers_stay_apart():
    """Float32 would not tell these from each other."""
    values = [2**24, 2**24 + 1, 2**53, 2**53 + 1]
    assert len({row_fingerprint({"x": [value]}) for value in values}) == 4


# Rows that change


COUNTER = itertools.count()


class Changing(torch.utils.data.Dataset):
    def __init__(self, rows, change):
        self.rows, self.change = rows, change

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, row):
        return self.change(dict(self.rows[row]), row)


@pytest.mark.parametrize(
    "change",
    [
        lambda row, _: row | {"x": row["x"] + 0.01 * torch.randn(SIZE)},
        lambda row, number: row | {"x": row["x"].flip(0) if number == 5 and next(COUNTER) % 2 else row["x"]},
        lambda row, _: row | {"labels": int(torch.randint(2, ()))},
    ],
    ids=["noise", "flip of one row", "labels"],
)
def test_rows_of_the_prior_that_change(change):
    torch.manual_seed(3)
    rows, prior_rows = make_rows(), make_rows(seed=1)
    with pytest.raises(ValueError, match=r"of 20 rows of `prior_dataset` changed between two readings"):
        run(rows, Changing(prior_rows, change))


def test_a_stream_for_the_prior():
    stream = IterableDataset.from_generator(lambda: iter(make_rows(seed=1)))
    with pytest.raises(ValueError, match=r"`prior_dataset` must be map-style .*found IterableDataset"):
        run(make_rows(), stream)


def test_stored_rows_that_a_transform_shows_in_another_way():
    """The same pictures, always flipped: no row changes, and none looks like another."""
    stored = Dataset.from_dict({"image": [row["x"].tolist() for row in make_rows()], "label": [0, 1] * 10})
    other = Dataset.from_dict({"image": [row["x"].tolist() for row in make_rows(seed=1)], "label": [0, 1] * 10})

    def show(dataset, factor):
        return dataset.with_transform(
            lambda batch: {"x": [factor * torch.tensor(image) for image in batch["image"]], "labels": batch["label"]}
        )

    rows = show(stored, 1.0)
    assert run(rows, show(other, -1.0)).num_prior_rows == 20
    with pytest.raises(ValueError, match=r"20 rows of `prior_dataset`"):
        run(rows, show(stored, -1.0))
    with pytest.raises(ValueError, match=r"7 rows of `prior_dataset`"):
        run(rows, show(stored.select(range(7)), -1.0))


def test_a_collator_that_augments():
    def collator(rows):
        batch = default_data_collator(rows)
        return batch | {"x": batch["x"] + 0.01 * torch.randn_like(batch["x"])}

    for grid in ([0.1], [0.1, 0.2]):
        with pytest.raises(ValueError, match=r"`data_collator` made other batches of the same rows"):
            run(make_rows(), data_collator=collator, sigma_grid=grid)


# Near copies

# Letters as wide as Chinese ones, which Unicode has beside the others.
WIDE = {ord(letter): ord(letter) + 0xFEE0 for letter in "HOW"}


def with_texts(texts, seed):
    rows = make_rows(seed=seed, num_rows=len(texts))
    return [row | {"text": text} for row, text in zip(rows, texts, strict=True)]


@pytest.fixture
def warnings(monkeypatch):
    found = []
    monkeypatch.setattr("lpg_hf.pac_bayes.independence.logger.warning", found.append)
    return found


@pytest.mark.parametrize("is_dataset", [False, True])
def test_near_copies_are_counted_and_named(is_dataset, warnings):
    texts = [f"how are you today {number}" for number in range(20)]
    new = [f"what is the time {number}" for number in range(4)]
    near = ["How ARE you  today 3", "how are you to day 11\n", "HOW are you today 7".translate(WIDE)]
    rows, prior_rows = with_texts(texts, 0), with_texts(new + near, 1)
    if is_dataset:
        rows, prior_rows = (
            Dataset.from_list([row | {"x": row["x"].tolist()} for row in part]) for part in (rows, prior_rows)
        )
    certificate = run(rows, prior_rows)
    assert certificate.num_near_copies == 3
    assert "3 rows of the set are near copies of one of them" in str(certificate)
    (warning,) = warnings
    assert warning.startswith("3 rows of `dataset` have the texts of a row of `prior_dataset`, up to case and spacing")
    assert "by the columns text (rows 3, 7, 11)" in warning
    certificate = run(rows, prior_rows.select(range(4)) if is_dataset else prior_rows[:4])
    assert certificate.num_near_copies == 0 and "near copies" not in str(certificate) and len(warnings) == 1
    assert run(rows).num_near_copies is None


def test_rows_without_any_text_are_no_near_copies():
    texts = ["how are you", "what is the time", ""]
    data, prior = (Dataset.from_dict({"x": [[seed + row] for row in range(3)], "text": texts}) for seed in (0, 10))
    assert find_near_copies(data, prior) == (["text"], [0, 1])


def test_names_labels_and_identifiers_are_no_texts():
    def rows(first, texts):
        return [
            {"id": f"row-{first + number}", "language": "en", "label": "very good", "text": text, "x": number}
            for number, text in enumerate(texts)
        ]

    certificate, prior = rows(0, ["what a day", "not so good"]), rows(10, ["another one", "Not so  good"])
    assert find_near_copies(certificate, prior) == (["text"], [1])
    assert find_near_copies(certificate, rows(10, ["another one"])) == (["text"], [])
    incomplete = [{"text": "not so good"}, {"text": 3}, {}]
    assert find_near_copies(certificate, incomplete) == (["text"], [1])
    without = [{"id": "A", "x": 1}]
    assert find_near_copies(without, without) == ([], [])


def test_pairs_of_texts_are_near_copies_if_both_are():
    rows = [{"premise": "a man sleeps", "hypothesis": "he is awake"}, {"premise": "a man sleeps", "hypothesis": None}]
    prior = [
        {"premise": "A man sleeps", "hypothesis": "he is tired"},
        {"premise": "A man sleeps", "hypothesis": "He is awake"},
    ]
    assert find_near_copies(rows, prior[:1])[1] == []
    assert find_near_copies(rows, prior)[1] == [0]


def test_texts_without_spaces_between_words():
    assert find_near_copies([{"text": "今日は 良い天気"}], [{"text": "今日は良い天気"}]) == (["text"], [0])


def test_a_transform_that_drops_the_text():
    def show(texts, seed):
        rows = Dataset.from_list([row | {"x": row["x"].tolist()} for row in with_texts(texts, seed)])
        return rows.with_transform(lambda batch: {"x": batch["x"], "labels": batch["labels"]})

    texts = [f"how are you today {number}" for number in range(20)]
    assert run(show(texts, 0), show(["HOW are you today 5"], 1)).num_near_copies == 1
