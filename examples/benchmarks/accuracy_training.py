"""One run of the benchmark: a method on a cell with a seed, trained by LPGTrainer (or Trainer itself)."""

import gc
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from accuracy_data import DataSpec, Source, Split, load_source, make_split, parse_regime, trim
from accuracy_methods import METHODS
from accuracy_metrics import TEST_SETS, score
from accuracy_models import OPTIMIZERS, Recipe, build_model
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

import lpg_hf
from lpg_hf import LPGTrainer
from lpg_hf.batch import IGNORE_INDEX


@dataclass(frozen=True)
class Setting:
    """What all methods of a cell share beside the regime: data, model and the way it is trained."""

    data: str
    model: str
    optimizer: str
    pace: str
    spec: DataSpec
    model_name: str
    recipe: Recipe
    validation_share: float = 0.2
    augment: bool = False

    @property
    def name(self) -> str:
        return "/".join([self.data, self.model, self.optimizer, self.pace])


@dataclass(frozen=True)
class Run:
    """One row of the results."""

    setting: Setting
    regime: str
    method: str
    value: str
    seed: int

    @property
    def key(self) -> tuple[str, ...]:
        setting = self.setting
        names = (setting.data, setting.model, setting.optimizer, setting.pace, self.regime, self.method, self.value)
        return (*names, str(self.seed))


class InMemoryDataset(torch.utils.data.Dataset):
    """Rows of tensors; hands out a whole batch at a time, which saves most of a data loader's cost."""

    def __init__(self, inputs: dict[str, Tensor], rows: np.ndarray, labels: np.ndarray):
        rows = torch.from_numpy(rows)
        self.columns = {name: value[rows] for name, value in inputs.items()}
        self.columns["labels"] = torch.from_numpy(labels)

    def __len__(self) -> int:
        return len(self.columns["labels"])

    def __getitems__(self, rows: list[int]) -> dict[str, Tensor]:
        return {name: value[rows] for name, value in self.columns.items()}


class CropAndFlip:
    """The usual augmentation of small images: a crop after padding by an eighth, half of the time a mirror image."""

    def __init__(self, seed: int):
        # Its own, since dropout may draw more often for one method than for another.
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        images = batch["pixel_values"]
        count, _, height, width = images.shape
        padding = height // 8
        padded = nn.functional.pad(images, (padding,) * 4)
        top, left = torch.randint(0, 2 * padding + 1, (2, count, 1, 1), generator=self.generator)
        flip = torch.rand(count, 1, 1, generator=self.generator) < 0.5
        columns = torch.arange(width).expand(count, 1, width)
        columns = torch.where(flip, width - 1 - columns, columns) + left
        rows = torch.arange(height)[:, None] + top
        cropped = padded[torch.arange(count)[:, None, None], :, rows, columns].permute(0, 3, 1, 2)
        return batch | {"pixel_values": cropped}


class ValidationCallback(TrainerCallback):
    """Scores the (noisy) validation rows after each epoch, and keeps the weights of the best one."""

    def __init__(self, source: Source, split: Split, device: torch.device):
        self.inputs = {name: value[torch.from_numpy(split.validation)] for name, value in source.inputs.items()}
        self.labels = split.noisy[split.validation]
        self.device = device
        self.scores: list[float] = []
        self.best_weights: dict[str, Tensor] = {}

    def on_epoch_end(self, args, state, control, model, **kwargs):
        score = balanced_accuracy(predict(model, self.inputs, self.device), self.labels)
        if not self.scores or score > max(self.scores):
            self.best_weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
        self.scores.append(score)


def predict(model: nn.Module, inputs: dict[str, Tensor], device: torch.device) -> np.ndarray:
    """Predicted classes; the model is left in training mode."""
    return predict_logits(model, inputs, device).argmax(-1).numpy()


@torch.no_grad()
def predict_logits(model: nn.Module, inputs: dict[str, Tensor], device: torch.device) -> Tensor:
    """The same before the choice of a class, on the CPU."""
    model.eval()
    # Vectors in one batch; what has a length or a size costs memory.
    batch_size = 4096 if "features" in inputs else 256
    count = len(next(iter(inputs.values())))
    logits = []
    for start in range(0, count, batch_size):
        batch = trim({name: value[start : start + batch_size] for name, value in inputs.items()})
        logits.append(model(**{name: value.to(device) for name, value in batch.items()}).logits.float().cpu())
    model.train()
    return torch.cat(logits)


def balanced_accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Mean recall over the classes that occur in `labels`."""
    sizes = np.bincount(labels)
    hits = np.bincount(labels[predictions == labels], minlength=len(sizes))
    return float(np.mean(hits[sizes > 0] / sizes[sizes > 0]))


def score_test_rows(model: nn.Module, source: Source, split: Split, device: torch.device) -> dict[str, float]:
    """Every metric on the test rows, and on those of them that have the class shares of the training rows."""
    inputs = {name: value[torch.from_numpy(split.test)] for name, value in source.inputs.items()}
    logits = predict_logits(model, inputs, device)
    scores = {}
    for test_set, rows in zip(TEST_SETS, (split.test, split.natural_test), strict=True):
        is_in = np.isin(split.test, rows)
        values = score(logits[torch.from_numpy(is_in)], split.clean[split.test[is_in]])
        scores |= {f"{test_set}_{metric}": value for metric, value in values.items()}
    return scores


@lru_cache(maxsize=8)
def cached_split(spec: DataSpec, regime: str, seed: int, validation_share: float) -> Split:
    return make_split(load_source(spec), parse_regime(regime), seed, validation_share)


def prepare_process() -> None:
    """Once per process: one thread, since models are small, and nothing old for the garbage collector to look at."""
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    # Accelerate looks for this package twice a step, a sixth of a step of the small models; None says: not there.
    sys.modules.setdefault("lomo_optim", None)


def training_labels(run: Run, source: Source, split: Split, output_dir: str) -> np.ndarray:
    """The labels of the training rows that the method of a run learns from, -100 for those it leaves out."""
    kind, clean, noisy = METHODS[run.method].labels, split.clean[split.train], split.noisy[split.train]
    if kind == "clean":
        return clean
    if kind == "right":
        return np.where(noisy == clean, noisy, IGNORE_INDEX)
    if kind == "believed":
        trainer = make_trainer(replace(run, method="auto"), source, split, output_dir)
        with suppress(FloatingPointError):  # what is not finite contradicts nothing
            trainer.train()
        rows = {name: value[torch.from_numpy(split.train)] for name, value in source.inputs.items()}
        logits = predict_logits(trainer.model, rows, trainer.args.device)
        batch = trainer.lpg_loss.cpu().batch_of(logits, torch.from_numpy(noisy))
        return np.where(batch.is_confident_error, IGNORE_INDEX, noisy)
    return noisy


def lpg_options(run: Run, source: Source, split: Split) -> dict[str, Any]:
    """What a run passes to LPGTrainer beside what Trainer takes: all that the library is told of it."""
    counts = split.class_counts(source.num_labels)
    method = METHODS[run.method]
    return {
        "perturbations": method.perturbations(run.value, counts),
        "class_counts": counts,
        "eval_shares": told_shares(run, source, split) if method.is_told_shares else "train",
    }


def told_shares(run: Run, source: Source, split: Split) -> list[int] | str:
    """Class counts of the natural test set where rows are as they come. Balanced and cut rows have a balanced one."""
    if not run.regime.startswith(("natural", "human")):
        return "uniform"
    return (np.bincount(split.clean[split.natural_test], minlength=source.num_labels) + 1).tolist()


def make_trainer(run: Run, source: Source, split: Split, output_dir: str, **kwargs) -> Trainer:
    """The trainer of a run. What depends on the method is the chain alone (and, for the references, the labels)."""
    setting, method = run.setting, METHODS[run.method]
    train = InMemoryDataset(source.inputs, split.train, training_labels(run, source, split, output_dir))
    arguments = {
        "learning_rate": setting.recipe.learning_rate,
        "num_train_epochs": setting.recipe.epochs,
        "per_device_train_batch_size": setting.recipe.batch_size,
        "optim": OPTIMIZERS[setting.optimizer],
        "optim_args": "momentum=0.9" if setting.optimizer == "sgd" else None,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "seed": run.seed,
        "data_seed": run.seed,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
    }
    collator = CropAndFlip(run.seed) if setting.augment else trim
    common = {
        "model": build_model(setting.model_name, source, setting.recipe.hidden_size, run.seed),
        "args": TrainingArguments(output_dir, **(arguments | kwargs)),
        "train_dataset": train,
        "data_collator": collator,
    }
    trainer = Trainer(**common) if method.is_plain else LPGTrainer(**common, **lpg_options(run, source, split))
    trainer.remove_callback(PrinterCallback)
    return trainer


def train_run(run: Run) -> dict[str, str]:
    """
    Trains, and scores the last epoch and the one that the validation rows picked on the test rows.

    Returns:
        `dict[str, str]`: The columns of the results beside the key.
    """
    start = time.process_time()
    setting, method = run.setting, METHODS[run.method]
    source = load_source(setting.spec)
    split = cached_split(setting.spec, run.regime, run.seed, setting.validation_share)
    diverged = False
    with tempfile.TemporaryDirectory() as output_dir, ExitStack() as stack:
        for name, constant in method.constants.items():
            stack.enter_context(patch(f"lpg_hf.{name}", constant))
        trainer = make_trainer(run, source, split, output_dir)
        validation = ValidationCallback(source, split, trainer.args.device)
        trainer.add_callback(validation)
        try:
            trainer.train()
        except FloatingPointError:
            # A result, too: predictions from logits that are not finite.
            diverged = True

    model, device = trainer.model, trainer.args.device
    last = score_test_rows(model, source, split, device)
    picked_epoch = int(np.argmax(validation.scores))
    model.load_state_dict(validation.best_weights)
    picked = score_test_rows(model, source, split, device)
    chain = [] if method.is_plain else lpg_options(run, source, split)["perturbations"]
    columns = {
        **{f"{measure}_last": f"{value:.6f}" for measure, value in last.items()},
        **{f"{measure}_picked": f"{value:.6f}" for measure, value in picked.items()},
        "validation_last": f"{validation.scores[-1]:.6f}",
        "validation_picked": f"{validation.scores[picked_epoch]:.6f}",
        "picked_epoch": picked_epoch + 1,
        "validation_by_epoch": " ".join(f"{score:.4f}" for score in validation.scores),
        "epochs": len(validation.scores),
        "steps": trainer.state.global_step,
        "train_rows": len(split.train),
        "noise_rate": f"{split.noise_rate:.4f}",
        "diverged": diverged,
        "chain": " + ".join(map(repr, chain)),
        "version": lpg_hf.__version__,
        "seconds": f"{time.process_time() - start:.2f}",
    }
    return {name: str(value) for name, value in columns.items()}


def describe(setting: Setting) -> dict[str, object]:
    """What must be the same for two runs to be compared, paths aside; written beside the results."""
    source = load_source(setting.spec)
    return {
        "recipe": asdict(setting.recipe),
        "validation_share": setting.validation_share,
        "augment": setting.augment,
        "rows": len(source.labels),
        "classes": source.num_labels,
        "fingerprint": source.fingerprint(),
    }
