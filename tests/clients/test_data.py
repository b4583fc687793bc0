"""Scripts that bring their own data: pandas with names of classes, and samplers that balance them."""

import logging

import numpy as np
import pandas as pd
import pytest
import torch
from clients import (
    Perceptron,
    balanced_accuracy,
    exact_bert,
    long_tailed_digits,
    losses_of,
    run,
    token_rows,
    warnings_of,
    weights_of,
)
from datasets import Dataset
from torch.nn import functional as F
from torch.utils.data import DataLoader, WeightedRandomSampler
from transformers import Trainer

from lpg_hf import LPGTrainer


# pandas


NAMES = ["spider", "ant", "bee", "wasp"]


@pytest.fixture
def frame():
    """A filtered frame, so that its index has gaps; the classes are names."""
    rows = token_rows((30, 12, 6, 4)).to_pandas()
    rows["animal"] = [NAMES[label] for label in rows.pop("label")]
    return rows[np.arange(len(rows)) % 7 != 0]


def encoded_by_codes(frame):
    """The codes are int8, and the index becomes a column."""
    frame = frame.assign(label=frame["animal"].astype("category").cat.codes).drop(columns="animal")
    return Dataset.from_pandas(frame)


def encoded_by_a_dictionary(frame):
    label2id = {name: label for label, name in enumerate(sorted(frame["animal"].unique()))}
    frame = frame.assign(labels=frame["animal"].map(label2id))
    return Dataset.from_pandas(frame, preserve_index=False)


def encoded_by_datasets(frame):
    return Dataset.from_pandas(frame).rename_column("animal", "label").class_encode_column("label")


@pytest.mark.parametrize("encode", [encoded_by_codes, encoded_by_a_dictionary, encoded_by_datasets])
def test_a_frame_with_names_of_classes(encode, frame, tmp_path, caplog):
    rows, args = encode(frame), {"num_train_epochs": 2, "max_steps": -1}
    plain = run(Trainer, exact_bert(), tmp_path, rows, args=args)
    none = run(LPGTrainer, exact_bert(), tmp_path, rows, args=args, perturbations=[])
    with caplog.at_level(logging.INFO, logger="lpg_hf"):
        ours = run(LPGTrainer, exact_bert(), tmp_path, rows, args=args)
    assert torch.equal(weights_of(none), weights_of(plain))
    counts = frame["animal"].value_counts()[sorted(NAMES)].tolist()
    assert ours.lpg_loss.statistics.class_counts.tolist() == counts
    column = "labels" if encode is encoded_by_a_dictionary else "label"
    assert f"from the label column '{column}': {counts}" in caplog.text and not warnings_of(caplog)
    # The rows of the table are positions in the frame, whatever its index.
    issues = ours.label_issues()
    named = frame.iloc[issues["row"][:]]["animal"].map(sorted(NAMES).index)
    assert named.tolist() == issues["label"][:] and set(issues["visits"][:]) == {2}


def test_names_of_classes_that_nobody_encoded_fail_as_with_trainer_and_with_a_cure(frame, tmp_path):
    rows = Dataset.from_pandas(frame).rename_column("animal", "label")
    errors = []
    for trainer_class in (Trainer, LPGTrainer):
        with pytest.raises(Exception) as error:
            run(trainer_class, exact_bert(), tmp_path, rows)
        errors.append(error.value)
    assert type(errors[0]) is type(errors[1]) and str(errors[1]).startswith(f"{errors[0]}. Column 'label' of ")
    assert "`dataset.class_encode_column('label')`" in str(errors[1])


def test_labels_in_an_object_column_of_whole_numbers(tmp_path):
    """What a frame holds after rows with missing labels have been dropped: whole numbers as floats."""
    frame = token_rows().to_pandas()
    frame.loc[::9, "label"] = None
    frame = frame.dropna()
    frame["label"] = frame["label"].astype(int)
    ours = run(LPGTrainer, exact_bert(), tmp_path, Dataset.from_pandas(frame))
    expected = pd.Series(frame["label"]).value_counts().sort_index().tolist()
    assert ours.lpg_loss.statistics.class_counts.tolist() == expected


# Samplers


def inverse_frequencies(dataset):
    labels = torch.as_tensor(np.asarray(dataset["labels"][:]))
    return (1 / labels.bincount(minlength=10))[labels]


def by_sampler(base):
    class BalancedTrainer(base):
        def _get_train_sampler(self, train_dataset=None):
            generator = torch.Generator().manual_seed(self.args.seed)
            return WeightedRandomSampler(
                inverse_frequencies(self.train_dataset), len(self.train_dataset), generator=generator
            )

    return BalancedTrainer


def by_loader(base):
    class BalancedTrainer(base):
        def get_train_dataloader(self):
            generator = torch.Generator().manual_seed(self.args.seed)
            sampler = WeightedRandomSampler(
                inverse_frequencies(self.train_dataset), len(self.train_dataset), generator=generator
            )
            loader = DataLoader(
                self.train_dataset,
                batch_size=self.args.train_batch_size,
                sampler=sampler,
                collate_fn=self.data_collator,
            )
            return self.accelerator.prepare(loader)

    return BalancedTrainer


LONG = {
    "per_device_train_batch_size": 32,
    "num_train_epochs": 12,
    "max_steps": -1,
    "optim": "adamw_torch",
    "learning_rate": 5e-3,
    "lr_scheduler_type": "linear",
    "logging_steps": 1000,
}
every_override = pytest.mark.parametrize("override", [by_sampler, by_loader])


@every_override
def test_a_balancing_sampler_without_perturbations_is_that_of_trainer(override, tmp_path):
    train, _ = long_tailed_digits()
    args = LONG | {"num_train_epochs": 2}
    plain, ours = (
        run(override(base), Perceptron(), tmp_path, train, args=args, **kwargs)
        for base, kwargs in ((Trainer, {}), (LPGTrainer, {"perturbations": []}))
    )
    assert torch.equal(weights_of(ours), weights_of(plain)) and losses_of(ours) == losses_of(plain)


@pytest.mark.parametrize(("override", "noise"), [(by_sampler, 0.2), (by_loader, 0.0)])
def test_a_balancing_sampler_is_not_balanced_a_second_time(override, noise, tmp_path, caplog):
    """Long tail of 20 : 1, three seeds: not below Trainer with the same sampler by more than a standard error."""
    differences = []
    for seed in range(3):
        train, test = long_tailed_digits(seed, noise=noise)
        caplog.clear()
        scores = [
            balanced_accuracy(run(override(base), Perceptron(seed), tmp_path, train, args=LONG | {"seed": seed}), test)
            for base in (LPGTrainer, Trainer)
        ]
        assert len(warnings_of(caplog)) <= 1
        differences.append(scores[0] - scores[1])
    error = np.std(differences, ddof=1) / 3**0.5
    assert np.mean(differences) > -max(error, 0.005)


def weighted_loss(counts):
    weights = torch.tensor(sum(counts) / (len(counts) * np.array(counts)), dtype=torch.float32)

    def compute(outputs, labels, num_items_in_batch=None):
        return F.cross_entropy(outputs["logits"], labels, weight=weights)

    return compute


def weighted_focal_loss(counts):
    weights = torch.tensor(sum(counts) / (len(counts) * np.array(counts)), dtype=torch.float32)

    def compute(outputs, labels, num_items_in_batch=None):
        log_prob = F.log_softmax(outputs["logits"], -1).gather(-1, labels[:, None]).squeeze(-1)
        return -(weights[labels] * (1 - log_prob.exp()) ** 2 * log_prob).mean()

    return compute


@pytest.mark.parametrize("loss", [weighted_loss, weighted_focal_loss])
def test_class_weights_in_a_loss_func_are_not_corrected_a_second_time(loss, tmp_path, caplog):
    """Long tail of 20 : 1, three seeds, 20 % noise: as for the samplers, and told once."""
    differences = []
    for seed in range(3):
        train, test = long_tailed_digits(seed, noise=0.2)
        func = loss(np.bincount(train["labels"][:], minlength=10))
        caplog.clear()
        options = {"args": LONG | {"seed": seed}, "compute_loss_func": func}
        scores = [
            balanced_accuracy(run(base, Perceptron(seed), tmp_path, train, **options), test)
            for base in (LPGTrainer, Trainer)
        ]
        assert len(warnings_of(caplog)) == 1
        differences.append(scores[0] - scores[1])
    error = np.std(differences, ddof=1) / 3**0.5
    assert np.mean(differences) > -max(error, 0.005)
