"""The quickstart runs, and what it promises holds (slow)."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from digits import load_digits, small_resnet, to_pixels, training_arguments
from transformers import Trainer

from lpg_hf import LPGTrainer
from lpg_hf.data import add_label_noise
from lpg_hf.metrics import make_compute_metrics


EXAMPLES = Path(__file__).parents[2] / "examples"


def quickstart(output_dir, *options):
    command = [sys.executable, str(EXAMPLES / "quickstart.py"), "--output_dir", str(output_dir), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_quickstart_leaves_plot_model_and_table(tmp_path):
    output = quickstart(tmp_path, "--seeds", "2", "--epochs", "2")
    assert (tmp_path / "quickstart.png").stat().st_size > 10_000
    assert (tmp_path / "model" / "model.safetensors").exists()
    loaded, before = re.search(r"is ([\d.]+)% when loaded and was ([\d.]+)% before saving", output).groups()
    assert loaded == before
    assert re.search(r"^LPGTrainer - Trainer, last epoch +[+-][\d.]+ ± [\d.]+ points$", output, re.MULTILINE)


@pytest.mark.slow
def test_quickstart_puts_lpg_trainer_ahead(tmp_path):
    output = quickstart(tmp_path, "--seeds", "10")
    lead, error = map(float, re.search(r"LPGTrainer - Trainer, last epoch +([+-][\d.]+) ± ([\d.]+)", output).groups())
    assert lead >= 4 and lead > 3 * error
    assert float(re.search(r"noisy validation ([+-][\d.]+) ±", output)[1]) > 0


def accuracy(trainer_class, label_noise, seed, output_dir):
    digits = load_digits(seed)
    train = digits["train"] if label_noise == 0 else add_label_noise(digits["train"], label_noise, seed=seed)
    trainer = trainer_class(
        model=small_resnet(seed),
        args=training_arguments(str(output_dir), seed=seed),
        train_dataset=train.with_transform(to_pixels),
        compute_metrics=make_compute_metrics(),
    )
    trainer.train()
    return trainer.predict(digits["test"].with_transform(to_pixels)).metrics["test_accuracy"]


@pytest.mark.slow
def test_auto_wins_back_what_label_noise_took(tmp_path):
    clean, noisy = ([accuracy(Trainer, noise, seed, tmp_path) for seed in range(5)] for noise in (0.0, 0.4))
    ours = [accuracy(LPGTrainer, 0.4, seed, tmp_path) for seed in range(5)]
    won_back = (np.mean(ours) - np.mean(noisy)) / (np.mean(clean) - np.mean(noisy))
    print(f"Trainer clean {np.mean(clean):.4f}, noisy {np.mean(noisy):.4f}; ours {np.mean(ours):.4f}: {won_back:.0%}")
    assert won_back >= 0.6


@pytest.mark.slow
def test_auto_costs_nothing_on_clean_balanced_data(tmp_path):
    pairs = [[accuracy(c, 0.0, seed, tmp_path) for c in (LPGTrainer, Trainer)] for seed in range(10)]
    differences = np.subtract(*np.transpose(pairs))
    error = differences.std(ddof=1) / 10**0.5
    print(f"LPGTrainer - Trainer: {100 * differences.mean():+.2f} ± {100 * error:.2f} points")
    assert differences.mean() >= -0.005
