"""
Find, look, fix, retrain on digits with wrong labels: how many of them the suggestions correct, and what it brings.

    PYTHONPATH=examples python tests/end_to_end/test_label_cleaning.py

prints the figures of `docs/label_cleaning.md`.
"""

import csv
import tempfile
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from digits import load_digits, small_resnet, to_pixels, training_arguments
from transformers import PrinterCallback, Trainer

from lpg_hf import LPGTrainer
from lpg_hf.data import add_label_noise, apply_fixes, make_long_tailed
from lpg_hf.trainer import export_issues


NOISE = 0.2


@dataclass
class Cleaning:
    """Shares and counts of one seed."""

    rows: int
    wrong_before: int
    wrong_after: int
    accuracy: dict[str, tuple[float, float]]  # before and after the fixes


def train_and_test(cls, train, test, folder, seed, epochs):
    trainer = cls(
        model=small_resnet(seed),
        args=training_arguments(str(folder), seed=seed, num_train_epochs=epochs, logging_strategy="no"),
        train_dataset=train.with_transform(to_pixels),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    predicted = trainer.predict(test.with_transform(to_pixels)).predictions.argmax(-1)
    return trainer, float((predicted == np.array(test["label"])).mean())


def accept(path, num_rows):
    """What a person does who trusts the first suggestions: copies them into the column `fix`."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        lines = list(csv.DictReader(file))
    for line in lines[:num_rows]:
        line["fix"] = line["suggested_label_name"]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(lines[0]), delimiter=";")
        writer.writeheader()
        writer.writerows(lines)


def clean(folder, seed, epochs, imbalance_ratio=1.0, trainers=(LPGTrainer, Trainer)):
    """Accepts as many suggestions as there are wrong labels."""
    digits = load_digits(seed)
    train = make_long_tailed(digits["train"], imbalance_ratio, seed=seed) if imbalance_ratio > 1 else digits["train"]
    noisy = add_label_noise(train, NOISE, seed=seed)
    truth = np.array(noisy["clean_label"])
    num_wrong = int((np.array(noisy["label"]) != truth).sum())

    before = {cls.__name__: train_and_test(cls, noisy, digits["test"], folder, seed, epochs) for cls in trainers}
    before["LPGTrainer"][0].report()
    export_issues(folder, folder / "issues.csv")
    accept(folder / "issues.csv", num_wrong)
    fixed = apply_fixes(noisy, folder / "issues.csv")
    after = {cls.__name__: train_and_test(cls, fixed, digits["test"], folder, seed, epochs) for cls in trainers}
    accuracy = {name: (before[name][1], after[name][1]) for name in before}
    return Cleaning(len(noisy), num_wrong, int((np.array(fixed["label"]) != truth).sum()), accuracy)


def test_the_first_suggestions_correct_most_wrong_labels(tmp_path):
    result = clean(tmp_path, seed=0, epochs=8, trainers=(LPGTrainer,))
    assert result.wrong_before > 200
    assert result.wrong_after < 0.1 * result.wrong_before  # 8 of 252
    before, after = result.accuracy["LPGTrainer"]
    assert after > before - 0.01 and after > 0.95


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_cleaning_brings_trainer_what_noise_took(seed, tmp_path):
    result = clean(tmp_path, seed, epochs=40)
    assert result.wrong_after < 0.06 * result.wrong_before
    before, after = result.accuracy["Trainer"]
    assert after > before + 0.05
    assert min(after, result.accuracy["LPGTrainer"][1]) > 0.97


def main():
    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    for ratio in (1.0, 20.0):
        results = []
        for seed in range(3):
            with tempfile.TemporaryDirectory() as folder:
                results.append(clean(Path(folder), seed, 40, ratio))
                print(ratio, seed, results[-1], flush=True)
        for name in ("Trainer", "LPGTrainer"):
            figures = 100 * np.array([result.accuracy[name] for result in results])
            means, errors = figures.mean(0), figures.std(0, ddof=1) / len(figures) ** 0.5
            print(f"{ratio:g} : 1, {name}: {means[0]:.1f} ± {errors[0]:.1f} -> {means[1]:.1f} ± {errors[1]:.1f}")


if __name__ == "__main__":
    main()
