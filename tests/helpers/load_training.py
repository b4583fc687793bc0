"""A training whose steps cost as little as the Trainer lets them, for the tests of many steps and of many kills."""

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback

from lpg_hf import LPGConfig


NUM_LABELS, NUM_FEATURES, BATCH_SIZE = 4, 8, 8
CLASS_SHARES = [0.55, 0.25, 0.15, 0.05]


class SmallClassifier(nn.Module):
    """Dropout makes it depend on the random state, which a checkpoint must hold."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(NUM_FEATURES, 16), nn.ReLU(), nn.Dropout(0.1))
        self.head = nn.Linear(16, NUM_LABELS)

    def forward(self, values, labels=None):
        logits = self.head(self.body(values))
        return {"loss": None if labels is None else F.cross_entropy(logits, labels), "logits": logits}


def make_rows(size: int) -> list[dict]:
    """Rows with imbalanced labels that the values show. The first label is wrong."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.multinomial(torch.tensor(CLASS_SHARES), size, replacement=True, generator=generator)
    values = torch.randn(size, NUM_FEATURES, generator=generator) + 2 * F.one_hot(labels, NUM_FEATURES)
    labels[0] = (labels[0] + 1) % NUM_LABELS
    return [{"values": value, "labels": label} for value, label in zip(values, labels.tolist(), strict=True)]


def stack_rows(rows: list[dict]) -> dict[str, torch.Tensor]:
    return {
        "values": torch.stack([row["values"] for row in rows]),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }


def make_load_trainer(
    trainer_class: type[Trainer], path: Path, args: dict, *, num_rows: int, callbacks: list[TrainerCallback]
) -> Trainer:
    """A trainer with the default chain, which logs, evaluates, and keeps two checkpoints."""
    settings = {
        "per_device_train_batch_size": BATCH_SIZE,
        "per_device_eval_batch_size": 16,
        "learning_rate": 1e-3,
        "logging_strategy": "steps",
        "eval_strategy": "steps",
        "save_strategy": "steps",
        "save_total_limit": 2,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
    }
    rows = make_rows(num_rows)
    return trainer_class(
        model=SmallClassifier(),
        args=LPGConfig(str(path), **(settings | args)),
        train_dataset=rows,
        eval_dataset=rows[:256],
        data_collator=stack_rows,
        callbacks=callbacks,
    )
