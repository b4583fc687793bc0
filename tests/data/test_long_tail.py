import numpy as np
import pytest
from datasets import ClassLabel
from hypothesis import given, settings
from hypothesis import strategies as st
from label_data import dataset_of, image_dataset, never_called, numpy_random_state

from lpg_hf.data import class_counts, make_long_tailed


few_examples = settings(max_examples=25, deadline=None)
seeds = st.integers(min_value=0, max_value=2**32 - 1)


def test_long_tail_is_the_cifar_profile():
    # The class sizes of CIFAR-10-LT at ratio 100, as published.
    dataset = dataset_of(np.repeat(np.arange(10), 5000).tolist())
    assert class_counts(make_long_tailed(dataset, 100)) == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]


@pytest.mark.parametrize(
    ("available", "ratio", "expected"),
    [
        ([40, 40, 40], 4, [40, 20, 10]),
        ([1000, 1000, 10], 100, [1000, 100, 10]),
        ([178, 178, 178], 100, [100, 10, 1]),  # 178 : 2 would be 89, 178 : 1 would be 178
        ([50, 40, 2], 10, [20, 6, 2]),  # the last class limits the first
        ([50, 2, 40], 4, [4, 2, 1]),  # so does one in the middle
        ([7, 9, 8], 1, [7, 7, 7]),
        ([7, 7], 2.5, [5, 2]),
        ([8, 4, 2, 1], 8, [8, 4, 2, 1]),  # exact powers, which floating point puts just below
        ([33, 33], 1.1, [33, 30]),
        ([6, 6], 1000, [6, 1]),
        ([1, 1, 1], 10, [1, 1, 1]),
    ],
)
def test_long_tail_by_hand(available, ratio, expected):
    labels = np.repeat(np.arange(len(available)), available)
    labels = np.random.default_rng(0).permutation(labels).tolist()
    assert class_counts(make_long_tailed(dataset_of(labels), ratio)) == expected


@few_examples
@given(
    available=st.lists(st.integers(1, 60), min_size=2, max_size=6),
    ratio=st.floats(1, 50) | st.integers(1, 50),
    seed=seeds,
)
def test_long_tail_holds_what_it_says(available, ratio, seed):
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(available)), available)).tolist()
    dataset = dataset_of([*labels, -100])
    tailed = make_long_tailed(dataset, ratio, seed=seed)

    rows = tailed["row"][:]
    assert rows == sorted(set(rows))
    assert tailed["label"][:] == [labels[row] for row in rows]

    counts = class_counts(tailed, num_labels=len(available))
    steps = range(len(available))
    assert all(1 <= counts[step] <= available[step] for step in steps)
    assert counts == sorted(counts, reverse=True)
    # As a loop over whole numbers: the largest class 0 for which no class runs out of rows.
    exponents = [step / (len(available) - 1) for step in steps]
    largest = 0
    while all((largest + 1) / ratio**e <= n + 1e-6 for e, n in zip(exponents, available, strict=True)):
        largest += 1
    if largest >= ratio:
        best = min(abs(head / counts[-1] - ratio) for head in range(1, largest + 1))
        assert abs(counts[0] / counts[-1] - ratio) == pytest.approx(best, abs=1e-9)
        assert counts[-1] == int(largest / ratio + 1e-6)
    else:
        assert (counts[0], counts[-1]) == (max(largest, 1), 1)
    for step in steps:
        assert abs(counts[step] - counts[0] / ratio ** exponents[step]) <= 1 + 1e-6

    assert make_long_tailed(dataset, ratio, seed=seed)["row"][:] == rows


def test_long_tail_draws_other_rows_for_another_seed_and_leaves_global_state():
    dataset = dataset_of([0, 1] * 100)
    state = numpy_random_state()
    assert make_long_tailed(dataset, 10, seed=0)["row"][:] != make_long_tailed(dataset, 10, seed=1)["row"][:]
    assert numpy_random_state() == state


def test_long_tail_keeps_images_format_and_features():
    dataset = image_dataset(30).shuffle(seed=0).with_transform(never_called)
    tailed = make_long_tailed(dataset, 5)
    assert tailed.format == dataset.format
    assert tailed.features == dataset.features
    assert class_counts(tailed) == [10, 4, 2]


@pytest.mark.parametrize("ratio", [0.99, 0, -2, float("nan"), float("inf")])
def test_imbalance_ratio_out_of_range(ratio):
    with pytest.raises(ValueError, match=rf"imbalance_ratio is {ratio}, but must be a finite number of at least 1"):
        make_long_tailed(dataset_of([0, 1]), ratio)


def test_long_tail_refuses_an_empty_class():
    dataset = dataset_of([0, 0, 2], feature=ClassLabel(names=["a", "b", "c"]))
    with pytest.raises(ValueError, match=r"no row of class 1 in column 'label' \(it has 3 classes\)"):
        make_long_tailed(dataset, 2)
