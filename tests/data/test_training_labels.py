"""The labels of any training set are read where that is cheap, and no item is loaded for them."""

from collections import UserDict

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, List, Value
from label_data import dataset_of, never_called
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from lpg_hf.data.training_labels import class_counts_or_none, labels_or_none


class Images(torch.utils.data.Dataset):
    """A data set of torch that fails if an item is loaded."""

    def __init__(self, size=4, **attributes):
        self.size = size
        vars(self).update(attributes)

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        raise AssertionError("an image was loaded")


LABELS = [2, 0, -100, 2]


@pytest.mark.parametrize(
    "dataset",
    [
        Images(labels=LABELS),
        Images(targets=LABELS),
        Images(targets=tuple(LABELS)),
        Images(targets=np.array(LABELS, dtype=np.int16)),
        Images(targets=torch.tensor(LABELS)),
        Images(targets=torch.tensor(LABELS)[:, None]),
        Images(targets=[torch.tensor(label) for label in LABELS]),
        Images(labels=["cat", "ant", "?", "cat"], targets=LABELS),
        Images(labels=LABELS, target_transform=None),
        [{"label": label} for label in LABELS],
        tuple({"labels": torch.tensor(label), "image": "a path"} for label in LABELS),
        [UserDict(label_ids=[label]) for label in LABELS],
        Subset(Images(labels=[9, *LABELS, 9], size=6), [1, 2, 3, 4]),
        Subset(Images(labels=LABELS[::-1]), torch.tensor([3, 2, 1, 0])),
        Subset(dataset_of([1, *LABELS]), range(1, 5)),
        Subset(Subset([{"label": label} for label in [1, *LABELS]], [1, 2, 0, 3, 4]), [0, 1, 3, 4]),
        ConcatDataset([Images(size=2, targets=LABELS[:2]), Subset(Images(labels=LABELS), [2, 3])]),
        dataset_of(LABELS),
        dataset_of([[label] for label in LABELS], feature=List(Value("int64"))),
    ],
    ids=lambda dataset: type(dataset).__name__,
)
def test_labels_are_found_without_loading_an_item(dataset):
    assert labels_or_none(dataset).tolist() == LABELS
    assert class_counts_or_none(dataset, 4) == [1, 0, 2, 0]


@pytest.mark.parametrize(
    "dataset",
    [
        Images(),
        Images(labels=LABELS[:3]),
        Images(labels=[[1, 0]] * 4),
        Images(labels=[0.0, 1.0, 2.0, 0.0]),
        Images(labels="0120"),
        Images(labels=["0", "1", "2", "0"]),
        Images(labels=[[0], [1, 2], [0], [1]]),
        Images(labels=lambda: LABELS),
        Images(targets=LABELS, target_transform=lambda label: 2 - label),
        Subset(Images(), [1, 2]),
        ConcatDataset([Images(labels=LABELS), Images()]),
        TensorDataset(torch.zeros(3, 2), torch.tensor([0, 1, 2])),
        [],
    ],
    ids=lambda dataset: type(dataset).__name__,
)
def test_what_does_not_show_one_integer_per_row_has_no_labels(dataset):
    assert labels_or_none(dataset) is None
    assert class_counts_or_none(dataset, 4) is None


def test_labels_of_an_attribute_that_are_no_classes_of_the_model_are_not_counted():
    """`__getitem__` may begin to count at 0."""
    assert class_counts_or_none(Images(labels=[1, 2, 3, 3]), 3) is None
    assert class_counts_or_none(Images(labels=[-1, 0, 1, 1]), 3) is None
    assert class_counts_or_none(Images(labels=[-100] * 4), 3) is None


def test_class_counts_or_none_reads_a_column_of_integers():
    assert class_counts_or_none(dataset_of([0, 2, 2, -100]), 4) == [1, 0, 2, 0]
    assert class_counts_or_none(dataset_of([0, 2, 2], feature=Value("uint8")), 3) == [1, 0, 2]
    assert class_counts_or_none(dataset_of([0, 0, 1], feature=ClassLabel(names=["a", "b", "c"])), 3) == [2, 1, 0]
    assert class_counts_or_none(dataset_of([0, 1, 1]).select([0, 2]).with_transform(never_called), 2) == [1, 1]


@pytest.mark.parametrize(
    "feature", [List(Value("int64")), List(ClassLabel(names=["a", "b", "c"])), List(Value("int64"), length=1)]
)
def test_class_counts_or_none_reads_lists_of_one_label(feature):
    assert class_counts_or_none(dataset_of([[0], [2], [2]], feature=feature), 3) == [1, 0, 2]


def test_class_counts_or_none_prefers_the_columns_in_order():
    assert class_counts_or_none(Dataset.from_dict({"label": [1, 1], "labels": [0, 1]}), 2) == [1, 1]
    # The column that reaches the model decides, though another one could be counted.
    assert class_counts_or_none(Dataset.from_dict({"label": [1, 1], "labels": [0.5, 0.1]}), 2) is None


@pytest.mark.parametrize(
    "dataset",
    [
        None,
        [{"label": 0}, {"label": 0.5}],
        [{"label": 0}, {"text": "no label"}],
        ["a text", "another"],
        DatasetDict({"train": dataset_of([0, 1])}),
        dataset_of([0, 1]).to_iterable_dataset(),
        dataset_of([]),
        Dataset.from_dict({"text": ["a", "b"], "target": [0, 1]}),
        dataset_of(["cat", "dog"], feature=Value("string")),
        dataset_of([0.0, 1.0], feature=Value("float64")),
        dataset_of([[0], [0, 1]], feature=List(Value("int64"))),
        dataset_of([[0, 1], [1, 1]], feature=List(Value("int64"), length=2)),
    ],
    ids=lambda dataset: type(dataset).__name__,
)
def test_class_counts_or_none_leaves_other_data_to_training(dataset):
    assert class_counts_or_none(dataset, 2) is None


@pytest.mark.parametrize(
    ("labels", "problem"),
    [
        ([0, 3, 1], r"column 'label' holds the label 3 in row 1, but with 3 classes .* is marked -100\."),
        ([0, None, 1], r"column 'label' has 1 missing labels .*\(ignored\)\."),
        ([-100, -100], r"every label of column 'label' is -100.*were made\."),
    ],
)
def test_class_counts_or_none_says_how_to_pass_the_counts(labels, problem):
    cure = r" If the labels are changed on their way to the model, pass `class_counts` to LPGTrainer\.$"
    with pytest.raises(ValueError, match=problem + cure) as caught:
        class_counts_or_none(dataset_of(labels), 3)
    assert isinstance(caught.value.__cause__, ValueError)
