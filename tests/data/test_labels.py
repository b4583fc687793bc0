import pyarrow as pa
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from label_data import dataset_of, never_called

from lpg_hf.data import LABEL_COLUMNS, add_label_noise, class_counts, find_label_column, make_long_tailed
from lpg_hf.data.labels import label_names


few_examples = settings(max_examples=25, deadline=None)


# Label columns


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (["label_ids", "label", "labels"], "labels"),
        (["label_ids", "label"], "label"),
        (["text", "label_ids"], "label_ids"),
    ],
)
def test_find_label_column_prefers_in_order(columns, expected):
    assert find_label_column(Dataset.from_dict({name: [0, 1] for name in columns})) == expected


def test_find_label_column_lists_what_there_is():
    with pytest.raises(ValueError, match=r"no label column.*\['text', 'target'\].*rename_column"):
        find_label_column(Dataset.from_dict({"text": ["a"], "target": [0]}))


@pytest.mark.parametrize("function", [find_label_column, class_counts])
def test_dataset_dict_is_refused_with_a_cure(function):
    splits = DatasetDict({"train": dataset_of([0, 1])})
    with pytest.raises(TypeError, match=r"is a DatasetDict.*dataset\['train'\]"):
        function(splits)


def all_functions():
    return [
        pytest.param(class_counts, id="class_counts"),
        pytest.param(lambda dataset, **kwargs: add_label_noise(dataset, 0.5, **kwargs), id="add_label_noise"),
        pytest.param(lambda dataset, **kwargs: make_long_tailed(dataset, 2, **kwargs), id="make_long_tailed"),
    ]


@pytest.mark.parametrize("function", all_functions())
class TestBadLabels:
    def test_unknown_label_column(self, function):
        with pytest.raises(ValueError, match=r"label_column is 'target'.*\['label', 'row'\]"):
            function(dataset_of([0, 1]), label_column="target")

    def test_empty_dataset(self, function):
        with pytest.raises(ValueError, match=r"dataset is empty \(0 rows\)"):
            function(dataset_of([]))

    def test_only_ignored_labels(self, function):
        with pytest.raises(ValueError, match=r"every label of column 'label' is -100"):
            function(dataset_of([-100, -100]))

    def test_string_labels(self, function):
        with pytest.raises(ValueError, match=r"strings such as 'cat'.*class_encode_column\('label'\)"):
            function(dataset_of(["cat", "dog"], feature=Value("string")))

    def test_float_labels(self, function):
        with pytest.raises(ValueError, match=r"column 'label' holds values of type double.*cast_column\('label'"):
            function(dataset_of([0.0, 1.0], feature=Value("float64")))

    def test_missing_labels(self, function):
        with pytest.raises(ValueError, match=r"column 'label' has 1 missing labels.*-100"):
            function(dataset_of([0, None, 1]))

    def test_several_labels_per_sample(self, function):
        with pytest.raises(ValueError, match=r"holds 2 labels in row 1.*\[N\] or \[N, 1\]"):
            function(dataset_of([[0], [1, 2], [1]], feature=List(Value("int64"))))

    def test_negative_label(self, function):
        labels = dataset_of([0, 1, -1], feature=ClassLabel(names=["a", "b"]))
        with pytest.raises(ValueError, match=r"column 'label' holds the label -1 in row 2.*2 classes.*0\.\.1.*-100"):
            function(labels)

    def test_label_beyond_the_class_names(self, function):
        table = pa.table({"label": pa.array([0, 5, 1])})
        labels = Dataset(table).cast_column("label", Value("int64"))
        labels.info.features["label"] = ClassLabel(names=["a", "b"])
        with pytest.raises(ValueError, match=r"the label 5 in row 1, but with 2 classes.*num_labels"):
            function(labels)


@pytest.mark.parametrize("function", all_functions()[1:])
def test_fewer_than_two_classes(function):
    with pytest.raises(ValueError, match=r"column 'label' has 1 class, but at least 2.*ClassLabel"):
        function(dataset_of([0, 0]))


# Class counts


@few_examples
@given(st.lists(st.integers(0, 6) | st.just(-100), min_size=1).filter(lambda labels: max(labels) >= 0))
def test_class_counts_equal_a_loop(labels):
    expected = [0] * 7
    for label in labels:
        if label != -100:
            expected[label] += 1
    assert class_counts(dataset_of(labels), num_labels=7) == expected
    assert class_counts(dataset_of(labels)) == expected[: max(labels) + 1]


def test_class_counts_takes_the_number_of_names():
    assert class_counts(dataset_of([0, 0, 1], feature=ClassLabel(names=["a", "b", "c"]))) == [2, 1, 0]


def test_class_counts_refuses_labels_beyond_num_labels():
    with pytest.raises(ValueError, match=r"column 'labels' holds the label 3 in row 2, but with 3 classes"):
        class_counts(dataset_of([0, 1, 3], column="labels"), num_labels=3)


def test_class_counts_sees_what_select_and_shuffle_leave():
    dataset = dataset_of([0, 1, 2, 2, 2, 1]).shuffle(seed=3)
    assert class_counts(dataset) == [1, 2, 3]
    assert class_counts(dataset_of([0, 1, 2, 2]).select([3, 3, 0])) == [1, 0, 2]


@pytest.mark.parametrize(
    "feature", [List(Value("int32")), List(ClassLabel(names=["a", "b", "c"])), List(Value("int64"), length=1)]
)
def test_class_counts_accepts_one_label_lists(feature):
    assert class_counts(dataset_of([[2], [0], [2]], feature=feature)) == [1, 0, 2]


def test_class_counts_runs_no_transform_and_opens_no_image(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"not an image")
    dataset = Dataset.from_dict({"image": [str(tmp_path / "broken.png")] * 3, "label": [0, 1, 1]})
    dataset = dataset.cast_column("image", Image())
    assert class_counts(dataset) == [1, 2]
    assert class_counts(dataset.with_transform(never_called)) == [1, 2]
    assert class_counts(dataset.with_format("torch", columns=["image"])) == [1, 2]


# Names


@pytest.mark.parametrize("column", LABEL_COLUMNS)
def test_label_names_are_those_of_the_class_label(column):
    dataset = dataset_of([0, 1], column=column, feature=ClassLabel(names=["cat", "dog", "owl"]))
    assert label_names(dataset) == ["cat", "dog", "owl"]
    assert label_names(dataset.with_transform(never_called)) == ["cat", "dog", "owl"]


def test_label_names_takes_the_first_column_that_has_names():
    names = {
        "label_ids": ClassLabel(names=["x", "y"]),
        "label": ClassLabel(names=["a", "b"]),
        "labels": Value("int64"),
    }
    dataset = Dataset.from_dict({name: [0, 1] for name in names}, features=Features(names))
    assert label_names(dataset) == ["a", "b"]
    assert label_names(dataset.shuffle(seed=0)) == ["a", "b"]


@pytest.mark.parametrize("labels", [[0, 0], [None, 1], [[0], [1]]])
def test_label_names_are_not_those_of_other_labels(labels):
    """Training takes `labels`. What it is not a copy of may be classes of another kind."""
    kind = List(Value("int64")) if isinstance(labels[0], list) else Value("int64")
    features = Features({"labels": kind, "label": ClassLabel(names=["a", "b"])})
    assert label_names(Dataset.from_dict({"labels": labels, "label": [0, 1]}, features=features)) == []


@pytest.mark.parametrize(
    "dataset",
    [
        None,
        [{"label": 0}],
        DatasetDict({"train": dataset_of([0, 1], feature=ClassLabel(names=["a", "b"]))}),
        dataset_of([0, 1]),
        dataset_of([[0], [1]], feature=List(ClassLabel(names=["a", "b"]))),
        dataset_of([0, 1], column="target", feature=ClassLabel(names=["a", "b"])),
    ],
    ids=["none", "list", "dict", "no names", "[N, 1]", "no label column"],
)
def test_label_names_is_empty_without_names(dataset):
    assert label_names(dataset) == []
