"""Data, models and comparisons for scripts that swap Trainer for LPGTrainer."""

import logging

import numpy as np
import torch
from datasets import ClassLabel, Dataset
from sklearn.datasets import load_digits
from text_cases import bert
from tiny import flat_parameters
from torch import nn
from torch.nn import functional as F
from transformers import PrinterCallback, Trainer, TrainingArguments


def token_rows(counts=(24, 10, 6, 4), *, seed=0, column="label"):
    """A row for each sample, in random order; token 5 + c occurs in class c alone."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    tokens = rng.integers(10, 30, (len(labels), 6))
    tokens[:, 2] = 5 + labels
    return Dataset.from_dict({"input_ids": tokens.tolist(), column: labels.tolist()})


def long_tailed_digits(seed=0, imbalance=20, noise=0.0):
    """Training and test set of scikit-learn's digits; only the training set has a long tail."""
    raw, rng = load_digits(), np.random.default_rng(seed)
    train, test = [], []
    for digit in range(10):
        rows = rng.permutation(np.flatnonzero(raw.target == digit))
        test += rows[:50].tolist()
        train += rows[50 : 50 + round(120 * imbalance ** (-digit / 9))].tolist()
    labels = raw.target.copy()
    for row in train:
        if rng.random() < noise:
            labels[row] = rng.integers(10)
    pixels = (raw.data / 8 - 1).astype(np.float32)
    names = ClassLabel(names=[str(digit) for digit in range(10)])
    return [
        Dataset.from_dict({"pixels": pixels[rows], "labels": labels[rows]})
        .cast_column("labels", names)
        .with_format("torch")
        for rows in (train, test)
    ]


class Perceptron(nn.Module):
    """A model of the user's own, without a config."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, pixels, labels=None):
        logits = self.layers(pixels)
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


def exact_bert(model_class=None, **config):
    """Float64 and without dropout: what should be equal is equal to rounding."""
    args = () if model_class is None else (model_class,)
    return bert(*args, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **config).double()


#: Dampening with gates that are open from the second epoch on.
OPEN_GATES = ["class_relative_dampening(learned=(0.0, 0.01), evidence=(0.0, 0.001))"]


def few_rows():
    """Three batches: six steps are two epochs, and in the second one dampening acts."""
    return token_rows((6, 3, 2, 1))


def confident_bert(model_class=None):
    """One that contradicts some labels from the start, so that dampening has something to do."""
    model = exact_bert(model_class)
    with torch.no_grad():
        model.classifier.weight.mul_(60)
    return model


def assert_dampened(trainer: Trainer) -> None:
    """That dampening has reweighted samples, so that a wrong statistic would show in the weights."""
    lost = trainer.lpg_loss.statistics.mean_weight
    assert lost.min() < 0.98, lost


def make_args(path, args_class=TrainingArguments, **kwargs):
    defaults = {
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "optim": "sgd",
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return args_class(str(path), **(defaults | kwargs))


def run(trainer_class, model, path, train_dataset=None, *, args=None, **kwargs):
    """Trains; `kwargs` are the trainer's."""
    train_dataset = token_rows() if train_dataset is None else train_dataset
    trainer = trainer_class(model=model, args=make_args(path, **(args or {})), train_dataset=train_dataset, **kwargs)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer


def weights_of(trainer: Trainer) -> torch.Tensor:
    return flat_parameters(trainer.accelerator.unwrap_model(trainer.model))


def distance(trainer: Trainer, other: Trainer) -> float:
    return (weights_of(trainer) - weights_of(other)).abs().max().item()


def losses_of(trainer: Trainer) -> list[float]:
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def warnings_of(caplog) -> list[str]:
    """What the library has warned of so far."""
    is_ours = [r for r in caplog.records if r.name.startswith("lpg_hf") and r.levelno >= logging.WARNING]
    return [record.message for record in is_ours]


def balanced_accuracy(trainer: Trainer, dataset: Dataset) -> float:
    output = trainer.predict(dataset)
    is_right, labels = output.predictions.argmax(-1) == output.label_ids, output.label_ids
    return float(np.mean([is_right[labels == label].mean() for label in np.unique(labels)]))
