"""What the tests on a GPU share. `LPG_TEST_DEVICE=cpu` runs those that make sense without one on the CPU."""

import copy
import os

import pytest
import torch
from tiny import flat_parameters, make_trainer
from torch import nn
from transformers import Trainer

from lpg_hf import LPGTrainer


# cuBLAS is deterministic only with this, which it reads when it starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

DEVICE = os.environ.get("LPG_TEST_DEVICE", "cuda")
HAS_CUDA = torch.cuda.is_available()
COUNTS = [55, 25, 15, 5]
# Two epochs, since dampening acts in the second one.
SGD = {"optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0.0, "num_train_epochs": 2}

needs_device = pytest.mark.skipif(
    DEVICE == "cuda" and not HAS_CUDA, reason="needs a CUDA device: `torch.cuda.is_available()` is False"
)
needs_cuda = pytest.mark.skipif(not HAS_CUDA, reason="a CPU has no streams, graphs, or fp16 autocast like a GPU's")
needs_two_cards = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


def train(model, batches, path, *, trainer_class=LPGTrainer, on_device=True, args=None, resume=None, **kwargs):
    """
    Trains a tiny model on ready-made micro-batches, on one card even if there are several. Returns the trainer.

    Args:
        model: It is copied, so that all trainings start at the same weights.
        on_device: Whether it trains on the device under test, or on the CPU.
        args: Training arguments other than SGD's.
        kwargs: Those of the trainer. `perturbations` is left out for the plain one.
    """
    trainer = trainer_for(copy.deepcopy(model), batches, path, trainer_class, on_device, args, **kwargs)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def trainer_for(model, batches, path, trainer_class=LPGTrainer, on_device=True, args=None, **kwargs):
    """The trainer of `train`, for this very model."""
    if trainer_class is Trainer:
        kwargs = {name: value for name, value in kwargs.items() if name != "perturbations"}
    else:
        kwargs = {"class_counts": COUNTS} | kwargs
    settings = SGD | {"use_cpu": not on_device or DEVICE == "cpu"} | (args or {})
    trainer = make_trainer(trainer_class, model, batches, path, args=settings, **kwargs)
    if trainer.args.n_gpu > 1:
        trainer.args._n_gpu = 1
    if trainer.accelerator.scaler is not None:
        # From its usual 65,536, the scaler could skip the first steps, and runs could no longer be compared.
        trainer.accelerator.scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**10)
    return trainer


def weights_of(trainer: Trainer) -> torch.Tensor:
    """The trained parameters, in float64 on the CPU."""
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    return flat_parameters(model).double().cpu()


def relative_distance(trainer: Trainer, other: Trainer, start: nn.Module) -> float:
    """The distance of two trainings over the way of the second one."""
    before = flat_parameters(start).double().cpu()
    ours, theirs = weights_of(trainer), weights_of(other)
    return ((ours - theirs).norm() / (theirs - before).norm()).item()


def losses_of(trainer: Trainer) -> list[float]:
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]
