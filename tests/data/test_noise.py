import random
import re

import datasets
import numpy as np
import PIL.Image
import pytest
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from label_data import dataset_of, image_dataset, never_called, numpy_random_state

from lpg_hf.data import add_label_noise, make_long_tailed
from lpg_hf.data.noise import _flip_by_instance, _flip_by_transition_matrix, _instance_flip_rates


few_examples = settings(max_examples=25, deadline=None)
seeds = st.integers(min_value=0, max_value=2**32 - 1)


KINDS = ["symmetric", "pairflip", "asymmetric", "instance"]
MATRIX = np.array([[0.7, 0.3, 0.0, 0.0], [0.0, 0.5, 0.25, 0.25], [0.1, 0.1, 0.8, 0.0], [0.0, 0.0, 0.0, 1.0]])


def noise_of_kind(dataset, kind, rate=0.4, seed=0):
    if kind == "asymmetric":
        return add_label_noise(dataset, kind=kind, matrix=MATRIX, seed=seed)
    features = np.random.default_rng(1).normal(size=(len(dataset), 5)) if kind == "instance" else None
    return add_label_noise(dataset, rate, kind=kind, seed=seed, features=features)


def columns_of(dataset):
    return np.array(dataset["label"][:]), np.array(dataset["clean_label"][:])


@few_examples
@given(labels=st.lists(st.integers(0, 3) | st.just(-100), min_size=1, max_size=60), seed=seeds)
@pytest.mark.parametrize("kind", KINDS)
def test_noise_keeps_true_labels_and_is_reproducible(kind, labels, seed):
    dataset = dataset_of([*labels, 0, 1, 2, 3])
    state, python_state = numpy_random_state(), random.getstate()
    noisy = noise_of_kind(dataset, kind, seed=seed)
    assert (numpy_random_state(), random.getstate()) == (state, python_state)

    assert noisy["clean_label"][:] == dataset["label"][:]
    assert noisy["row"][:] == dataset["row"][:]
    assert dataset.column_names == ["label", "row"]
    label, clean = columns_of(noisy)
    assert (label[clean == -100] == -100).all()
    assert ((label >= 0) & (label < 4))[clean != -100].all()
    assert noise_of_kind(dataset, kind, seed=seed)["label"][:] == noisy["label"][:]


@pytest.mark.parametrize("kind", KINDS)
def test_another_seed_gives_other_noise(kind):
    dataset = dataset_of([0, 1, 2, 3] * 50)
    assert noise_of_kind(dataset, kind, seed=0)["label"][:] != noise_of_kind(dataset, kind, seed=1)["label"][:]


def test_same_seed_gives_the_same_fingerprint():
    dataset = dataset_of([0, 1, 2, 3] * 5)
    assert add_label_noise(dataset, 0.5)._fingerprint == add_label_noise(dataset, 0.5)._fingerprint
    assert add_label_noise(dataset, 0.5)._fingerprint != add_label_noise(dataset, 0.5, seed=1)._fingerprint


@few_examples
@given(rate=st.floats(0, 0.99), seed=seeds)
@pytest.mark.parametrize("kind", ["symmetric", "pairflip", "instance"])
def test_rate_is_met_within_five_standard_errors(kind, rate, seed):
    size = 2000
    label, clean = columns_of(noise_of_kind(dataset_of([0, 1, 2, 3] * (size // 4)), kind, rate=rate, seed=seed))
    # One flip of slack: at tiny rates the number of flips is far from normal.
    assert abs((label != clean).sum() - size * rate) <= 5 * np.sqrt(size * rate * (1 - rate)) + 1


@pytest.mark.parametrize("kind", ["symmetric", "pairflip", "instance"])
def test_rate_zero_flips_nothing(kind):
    label, clean = columns_of(noise_of_kind(dataset_of([0, 1, 2, 3] * 50), kind, rate=0.0))
    assert (label == clean).all()


@few_examples
@given(num_classes=st.integers(2, 7), seed=seeds)
def test_symmetric_noise_reaches_every_other_class_and_no_label_returns(num_classes, seed):
    # At a rate just below 1 every label flips, and flipping to the same class would be seen.
    dataset = dataset_of([0] * 3000 + [num_classes - 1])
    label, _ = columns_of(add_label_noise(dataset, 1 - 1e-12, seed=seed))
    targets = label[:3000]
    expected = 3000 / (num_classes - 1)
    allowed = 5 * np.sqrt(3000 * (1 / (num_classes - 1)) * (1 - 1 / (num_classes - 1)))
    assert (targets == 0).sum() == 0
    for target in range(1, num_classes):
        assert abs((targets == target).sum() - expected) <= allowed


def test_pairflip_goes_to_the_next_class():
    label, clean = columns_of(add_label_noise(dataset_of([0, 1, 2] * 100), 0.5, kind="pairflip"))
    pairs = set(zip(clean.tolist(), label.tolist(), strict=True))
    assert pairs == {(0, 0), (0, 1), (1, 1), (1, 2), (2, 2), (2, 0)}


def test_asymmetric_noise_follows_the_matrix():
    size = 4000
    label, clean = columns_of(noise_of_kind(dataset_of([0, 1, 2, 3] * size), "asymmetric"))
    for source in range(4):
        for target in range(4):
            probability = MATRIX[source, target]
            found = ((clean == source) & (label == target)).sum()
            assert abs(found - size * probability) <= 5 * np.sqrt(size * probability * (1 - probability))


class LargestDraw:
    """A NumPy generator whose uniform draws are the largest below 1."""

    def random(self, size):
        return np.full(size, np.nextafter(1.0, 0.0))


def test_asymmetric_noise_gives_the_remainder_of_rounding_to_no_impossible_class():
    almost_one = np.array([[0.5, 0.5 - 9e-7, 0.0], [0.0, 1.0, 0.0], [0.2, 0.3, 0.5 - 9e-7]])
    assert _flip_by_transition_matrix(np.arange(3), almost_one, LargestDraw()).tolist() == [1, 1, 2]


def test_asymmetric_matrix_may_know_of_unseen_classes():
    label, _ = columns_of(add_label_noise(dataset_of([0, 1] * 5), kind="asymmetric", matrix=np.eye(3)[[2, 1, 0]]))
    assert label.tolist() == [2, 1] * 5


def test_instance_flip_rates_have_the_mean_asked_for():
    for rate in (0.0, 0.05, 0.4, 0.97):
        rates = _instance_flip_rates(20000, rate, np.random.default_rng(0))
        assert rates.min() >= max(0, 2 * rate - 1) - 1e-9
        assert rates.max() <= min(1, 2 * rate) + 1e-9
        assert abs(rates.mean() - rate) < 5 * 0.1 / np.sqrt(20000)
    assert _instance_flip_rates(20000, 0.5, np.random.default_rng(0)).std() == pytest.approx(0.1, rel=0.05)


def test_instance_noise_mislabels_similar_samples_alike():
    rng = np.random.default_rng(0)
    clusters = rng.normal(size=(4, 60))
    cluster = rng.integers(0, 4, size=2000)
    features = clusters[cluster] + 0.01 * rng.normal(size=(2000, 60))
    dataset = dataset_of(rng.integers(0, 5, size=2000).tolist())
    label, clean = columns_of(add_label_noise(dataset, 0.5, kind="instance", features=features))
    shares, most_common = [], set()
    for source in range(5):
        for index in range(4):
            counts = np.bincount(label[(clean == source) & (cluster == index) & (label != clean)])
            shares.append(counts.max() / counts.sum())
            most_common.add((source, int(counts.argmax())))
    assert np.mean(shares) > 0.7  # about 0.35 if the features did not matter
    assert len(most_common) > 5  # the target depends on the cluster, not on the class alone


class KnownProjection:
    """A NumPy generator whose normal draws, the random projections of the classes, are given."""

    def __init__(self, projection):
        self.projection = projection
        self.rng = np.random.default_rng(0)
        self.random, self.uniform, self.gumbel = self.rng.random, self.rng.uniform, self.rng.gumbel

    def standard_normal(self, shape):
        assert shape == self.projection.shape
        return self.projection


def test_instance_noise_draws_from_the_softmax_without_the_own_class():
    points = np.array([[3.0, 1.0], [1.0, 0.0], [-1.0, 5.0]])
    projection = np.array([[0.5, -1.0, 0.2, 0.0], [0.3, 0.4, -0.6, 1.0]])
    which = np.tile(np.arange(3), 6000)
    labels = np.full(len(which), 1)
    noisy = _flip_by_instance(labels, 4, 0.5, points[which], KnownProjection(projection))
    mean = [sum(point[d] for point in points) / 3 for d in range(2)]
    scale = np.sqrt(sum((point[d] - mean[d]) ** 2 for point in points for d in range(2)) / 6)
    for index, point in enumerate(points):
        targets = noisy[(which == index) & (noisy != 1)]
        weights = {
            k: np.exp(sum((point[d] - mean[d]) / scale * projection[d, k] for d in range(2))) for k in (0, 2, 3)
        }
        for target, weight in weights.items():
            share = weight / sum(weights.values())
            allowed = 5 * np.sqrt(share * (1 - share) / len(targets))
            assert abs((targets == target).mean() - share) <= allowed


def test_instance_noise_does_not_depend_on_the_unit_of_the_features():
    dataset = dataset_of([0, 1, 2] * 100)
    features = np.random.default_rng(0).normal(size=(300, 6))
    noisy = add_label_noise(dataset, 0.5, kind="instance", features=features)
    scaled = add_label_noise(dataset, 0.5, kind="instance", features=1024 * features)
    assert scaled["label"][:] == noisy["label"][:]


def test_instance_noise_of_identical_samples_is_uniform():
    dataset = dataset_of([0, 1, 2] * 1000)
    label, clean = columns_of(add_label_noise(dataset, 0.5, kind="instance", features=np.ones((3000, 2))))
    flipped = label[(clean == 0) & (label != 0)]
    assert abs((flipped == 1).sum() - len(flipped) / 2) <= 5 * np.sqrt(len(flipped) / 4)


@pytest.mark.parametrize("decode", [True, False])
def test_instance_noise_looks_at_images(decode):
    dataset = image_dataset(60).cast_column("image", Image(decode=decode))
    thumbnails = [np.asarray(image.resize((8, 8))).reshape(-1) for image in image_dataset(60)["image"][:]]
    expected = add_label_noise(dataset, 0.5, kind="instance", features=thumbnails)
    found = add_label_noise(dataset.with_transform(never_called), 0.5, kind="instance").with_format(None)
    assert found["label"][:] == expected["label"][:]
    assert found["label"][:] != found["clean_label"][:]
    assert found.features == expected.features


@pytest.mark.parametrize("feature", [List(List(Value("float32"))), datasets.Array2D((2, 3), "float32")])
def test_instance_noise_looks_at_numeric_arrays(feature):
    arrays = np.random.default_rng(0).normal(size=(90, 2, 3)).astype(np.float32)
    features = Features({"text": Value("string"), "pixel_values": feature, "label": Value("int64")})
    columns = {"text": ["a"] * 90, "pixel_values": arrays.tolist(), "label": [0, 1, 2] * 30}
    dataset = Dataset.from_dict(columns, features=features)
    expected = add_label_noise(dataset, 0.5, kind="instance", features=arrays.reshape(90, 6))
    assert add_label_noise(dataset, 0.5, kind="instance")["label"][:] == expected["label"][:]


def test_instance_noise_without_features_names_the_cure():
    text = Dataset.from_dict({"text": ["a", "b"], "labels": [[0], [1]]})
    with pytest.raises(ValueError, match=r"none of the columns \['text', 'labels'\].*`features=`.*\[n, d\]"):
        add_label_noise(text, 0.5, kind="instance")
    ragged = Dataset.from_dict({"input_ids": [[1, 2], [3]], "label": [0, 1]})
    with pytest.raises(ValueError, match=r"column 'input_ids' holds arrays of different shapes.*`features=`"):
        add_label_noise(ragged, 0.5, kind="instance")


def test_instance_noise_sees_images_of_16_bits():
    """The same as of those with 8 bits, of which they are copies."""
    small = [np.full((8, 8), value, dtype=np.uint8) for value in range(0, 250, 4)]
    noisy = []
    for images in (small, [image.astype(np.uint16) * 257 for image in small]):
        columns = {"image": list(map(PIL.Image.fromarray, images)), "label": [row % 3 for row in range(len(images))]}
        dataset = Dataset.from_dict(columns, features=Features({"image": Image(), "label": Value("int64")}))
        noisy.append(add_label_noise(dataset, 0.5, kind="instance")["label"][:])
    assert noisy[0] == noisy[1] != [row % 3 for row in range(len(small))]


def test_instance_noise_names_the_missing_image():
    dataset = image_dataset(3)
    features = dataset.features
    dataset = Dataset.from_dict({"image": [None, *dataset["image"][1:]], "label": [0, 1, 2]}, features=features)
    with pytest.raises(ValueError, match=r"column 'image' has none in row 0.*`features=`"):
        add_label_noise(dataset, 0.5, kind="instance")


@pytest.mark.parametrize("shape", [(3, 2), (4,), (4, 0)])
def test_instance_features_of_wrong_shape(shape):
    with pytest.raises(ValueError, match=rf"features has shape {re.escape(str(shape))}.*\[n, d\] with n = 4"):
        add_label_noise(dataset_of([0, 1, 0, 1]), 0.5, kind="instance", features=np.ones(shape))


def test_instance_features_must_be_finite():
    with pytest.raises(ValueError, match="features holds NaN or infinite values"):
        add_label_noise(dataset_of([0, 1]), 0.5, kind="instance", features=[[0.0], [np.nan]])
    nan_column = Dataset.from_dict({"x": [[0.0, 1.0], [np.nan, 1.0]], "label": [0, 1]})
    with pytest.raises(ValueError, match="column 'x' holds NaN or infinite values"):
        add_label_noise(nan_column, 0.5, kind="instance")


@pytest.mark.parametrize(
    "feature",
    [Value("int32"), Value("uint8"), ClassLabel(names=["a", "b", "c"])],
)
def test_noise_keeps_features_and_column_order(feature):
    dataset = dataset_of([0, 1, 2] * 10, feature=feature)
    noisy = add_label_noise(dataset, 0.5)
    assert noisy.column_names == ["label", "row", "clean_label"]
    assert noisy.features == Features({"label": feature, "row": Value("int64"), "clean_label": feature})
    assert noisy["label"][:] != noisy["clean_label"][:]


@pytest.mark.parametrize("feature", [List(ClassLabel(names=["a", "b", "c"])), List(Value("int32"), length=1)])
def test_noise_keeps_one_label_lists(feature):
    dataset = dataset_of([[0], [1], [2]] * 10, feature=feature)
    noisy = add_label_noise(dataset, 0.5)
    flat = add_label_noise(dataset_of([0, 1, 2] * 10), 0.5)
    assert noisy.features["label"] == noisy.features["clean_label"] == feature
    assert noisy["label"][:] == [[label] for label in flat["label"][:]]
    assert noisy["clean_label"][:] == dataset["label"][:]


@pytest.mark.parametrize("shuffled", [False, True])
def test_noise_leaves_the_bytes_of_images_alone(shuffled):
    dataset = image_dataset()
    if shuffled:
        dataset = dataset.shuffle(seed=0).select(range(12))
    noisy = add_label_noise(dataset, 0.5)
    undecoded = Image(decode=False)
    assert noisy.cast_column("image", undecoded)["image"][:] == dataset.cast_column("image", undecoded)["image"][:]
    assert noisy.features["image"] == Image()
    assert noisy["clean_label"][:] == dataset["label"][:]


def test_noise_opens_no_image(tmp_path):
    path = tmp_path / "broken.png"
    path.write_bytes(b"not an image")
    dataset = Dataset.from_dict({"image": [str(path)] * 8, "label": [0, 1] * 4}).cast_column("image", Image())
    noisy = add_label_noise(dataset.shuffle(seed=0), 0.5)
    assert noisy.cast_column("image", Image(decode=False))["image"][:] == [{"bytes": None, "path": str(path)}] * 8


def test_noise_follows_shuffle_and_repeated_rows():
    dataset = dataset_of([0, 1, 2] * 10).shuffle(seed=1).select([5, 5, 5, 5, 5, 5, 5, 5, 0, 1, 2])
    noisy = add_label_noise(dataset, 0.5, label_column="label")
    assert noisy["row"][:] == dataset["row"][:]
    assert noisy["clean_label"][:] == dataset["label"][:]
    assert len(set(noisy["label"][:8])) > 1  # each copy of a row is noised by itself


def test_noise_keeps_the_transform():
    def transform(batch):
        return {"shifted": [label + 10 for label in batch["label"]], "clean": batch["clean_label"]}

    dataset = dataset_of([0, 1, 2] * 5)
    noisy = add_label_noise(dataset.with_transform(transform), 0.5)
    assert noisy.format["type"] == "custom"
    assert noisy.format["format_kwargs"]["transform"] is transform
    plain = add_label_noise(dataset, 0.5)
    assert noisy[:] == {"shifted": [label + 10 for label in plain["label"][:]], "clean": plain["clean_label"][:]}


def test_noise_keeps_the_format():
    dataset = dataset_of([0, 1, 2] * 5)
    noisy = add_label_noise(dataset.with_format("numpy"), 0.5)
    assert {name: type(column) for name, column in noisy[:].items()} == dict.fromkeys(
        ["label", "row", "clean_label"], np.ndarray
    )
    chosen = add_label_noise(dataset.with_format("numpy", columns=["row"], output_all_columns=True), 0.5)
    assert chosen.format["columns"] == ["row"]
    assert chosen.format["output_all_columns"] is True
    assert isinstance(chosen[:]["row"], np.ndarray)
    assert isinstance(chosen[:]["label"], list)


def test_second_noise_is_refused():
    noisy = add_label_noise(dataset_of([0, 1]), 0.1)
    with pytest.raises(ValueError, match=r"already has a column 'clean_label'.*rename or remove"):
        add_label_noise(noisy, 0.1)
    assert add_label_noise(noisy.remove_columns("clean_label"), 0.1).column_names == ["label", "row", "clean_label"]


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5, float("nan"), None])
@pytest.mark.parametrize("kind", ["symmetric", "pairflip", "instance"])
def test_rate_out_of_range(kind, rate):
    with pytest.raises(ValueError, match=rf"rate is {rate}, but must be a number in \[0, 1\)"):
        add_label_noise(dataset_of([0, 1]), rate, kind=kind)


def test_unknown_kind_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"kind is 'uniform'.*symmetric, pairflip, asymmetric, instance"):
        add_label_noise(dataset_of([0, 1]), 0.2, kind="uniform")


def test_arguments_that_do_not_belong_together():
    dataset = dataset_of([0, 1])
    with pytest.raises(ValueError, match=r"matrix is None.*\[C, C\]"):
        add_label_noise(dataset, kind="asymmetric")
    with pytest.raises(ValueError, match=r"rate is 0\.2, but kind='asymmetric'.*Leave `rate` out"):
        add_label_noise(dataset, 0.2, kind="asymmetric", matrix=np.eye(2))
    with pytest.raises(ValueError, match="matrix was passed with kind='symmetric'"):
        add_label_noise(dataset, 0.2, matrix=np.eye(2))
    with pytest.raises(ValueError, match="features was passed with kind='pairflip'"):
        add_label_noise(dataset, 0.2, kind="pairflip", features=np.eye(2))


@pytest.mark.parametrize("shape", [(3,), (2, 3)])
def test_matrix_must_be_square(shape):
    with pytest.raises(ValueError, match=rf"matrix has shape {re.escape(str(shape))}, but must be \[C, C\]"):
        add_label_noise(dataset_of([0, 1]), kind="asymmetric", matrix=np.ones(shape))


def test_matrix_must_fit_the_classes():
    with pytest.raises(ValueError, match=r"matrix has shape \(2, 2\).*column 'label' need \[3, 3\]"):
        add_label_noise(dataset_of([0, 1, 2]), kind="asymmetric", matrix=np.eye(2))
    named = dataset_of([0, 1, 1], feature=ClassLabel(names=["a", "b"]))
    with pytest.raises(ValueError, match=r"matrix has shape \(3, 3\).*need \[2, 2\]"):
        add_label_noise(named, kind="asymmetric", matrix=np.eye(3))


@pytest.mark.parametrize("row", [[0.5, 0.4], [1.5, -0.5], [float("nan"), 1.0]])
def test_matrix_rows_must_be_probabilities(row):
    with pytest.raises(ValueError, match=r"matrix has the row 1 = .*sum to 1. Divide each row by its sum"):
        add_label_noise(dataset_of([0, 1]), kind="asymmetric", matrix=[[1.0, 0.0], row])


def test_noise_after_a_cast_and_a_long_tail_shows_the_clean_labels():
    """A cast notes the formatted columns, and a selection sorts them: all of them are still all."""
    dataset = Dataset.from_dict({"text": list("abcd") * 6, "label": [0, 0, 1, 1] * 6})
    dataset = make_long_tailed(dataset.cast_column("label", ClassLabel(names=["x", "y"])), 3)
    noisy = add_label_noise(dataset, 0.3)
    assert noisy["clean_label"][:] == dataset["label"][:]
    assert set(noisy[0]) == {"text", "label", "clean_label"}
