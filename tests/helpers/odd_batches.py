"""Batches of three kinds: hard labels, soft labels, and no labels. Also run as a script on two processes."""

import sys
from pathlib import Path

import torch
from clients import make_args
from leave import leave_together
from torch import nn
from torch.nn import functional as F
from transformers import Trainer

from lpg_hf import LPGTrainer


HARD, SOFT, NONE = "hard", "soft", "none"
NUM_LABELS = 3


class Consistent(nn.Module):
    """Without labels it pulls its logits together, as semi-supervised learning does."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(5, NUM_LABELS).double()

    def forward(self, values, labels=None):
        logits = self.head(values)
        loss = 0.1 * logits.pow(2).mean() if labels is None else F.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


def make_batches(kinds, size=4):
    """A batch of each kind, the same inputs and classes for every sequence of kinds."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for kind in kinds:
        values = torch.randn(size, 5, generator=generator, dtype=torch.float64)
        labels = torch.arange(size) % 2 + (torch.arange(size) == size - 1)
        batch = {"values": values, "labels": labels}
        if kind == SOFT:
            batch["labels"] = 0.7 * F.one_hot(labels, NUM_LABELS).double() + 0.1
        elif kind == NONE:
            del batch["labels"]
        batches.append(batch)
    return batches


def train(trainer_class, batches, path, *, state=None, accumulation=1, **kwargs) -> Trainer:
    """One epoch over ready-made batches, with SGD."""
    model = Consistent()
    if state is not None:
        model.load_state_dict(state)
    settings = {"per_device_train_batch_size": 1, "max_steps": -1, "num_train_epochs": 1, "learning_rate": 0.5}
    settings |= {"gradient_accumulation_steps": accumulation, "train_sampling_strategy": "sequential"}
    trainer = trainer_class(
        model=model,
        args=make_args(path, **settings, remove_unused_columns=False),
        train_dataset=batches,
        data_collator=lambda items: items[0],
        **kwargs,
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    kinds, output_dir = sys.argv[1].split(","), Path(sys.argv[2])
    trainer = train(LPGTrainer, make_batches(kinds), output_dir, perturbations=["logit_adjustment"])
    loss = trainer.lpg_loss
    seen = None if loss is None else loss.statistics.seen_counts
    if trainer.is_world_process_zero():
        torch.save({"seen": seen, "steps": trainer.state.global_step}, output_dir / "result.pt")
    leave_together()
