"""
Which labels are wrong: average precision of three rankings of the training rows, and the time that each takes.

- `LPGTrainer.label_issues`: what one training run makes of its rows;
- loss: each row's loss under the plain `Trainer`'s model at the end of its training;
- cleanlab (`pip install cleanlab`, AGPL; left out where it is not installed): its label quality scores of
  out-of-fold probabilities, from five trainings of the plain `Trainer` on four fifths of the rows each.

All with the same small ResNet, fresh weights and arguments, on scikit-learn's digits and, where a folder is given, on
CIFAR-10:

    python examples/benchmarks/label_issues.py --cifar10_dir path/to/cifar10
"""

import importlib.util
import sys
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from tempfile import mkdtemp

import datasets
import numpy as np
import torch
from datasets import Dataset, load_dataset
from scipy.special import log_softmax
from sklearn.metrics import average_precision_score
from sklearn.model_selection import StratifiedKFold
from transformers import (
    HfArgumentParser,
    PrinterCallback,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    set_seed,
)
from transformers.utils import logging


sys.path.insert(0, str(Path(__file__).parents[1]))
from digits import load_digits, to_pixels, training_arguments

from lpg_hf import LPGTrainer
from lpg_hf.data import add_label_noise


FOLDS = 5
NUM_LABELS = 10


@dataclass
class BenchmarkArguments:
    cifar10_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder with train-*.parquet of CIFAR-10: columns image, label and human_worse (the labels of "
            "CIFAR-10N). Left out, only the digits are used."
        },
    )
    cifar10_rows: int = field(default=5000, metadata={"help": "Training images of CIFAR-10, drawn by the seed."})
    digits_epochs: int = field(default=40, metadata={"help": "Epochs on the digits."})
    cifar10_epochs: int = field(default=20, metadata={"help": "Epochs on CIFAR-10."})
    seeds: int = field(default=3, metadata={"help": "Repetitions, each with its own rows, noise and weights."})


@dataclass
class Task:
    """Rows with a given and a true label, and how to train on them."""

    name: str
    pixels: torch.Tensor
    given: np.ndarray
    true: np.ndarray
    width: int
    epochs: int
    batch_size: int

    def rows(self, indices: np.ndarray) -> list[dict]:
        return [{"pixel_values": self.pixels[index], "labels": int(self.given[index])} for index in indices]


def make_model(task: Task, seed: int) -> ResNetForImageClassification:
    set_seed(seed)
    width = task.width
    config = ResNetConfig(
        num_channels=task.pixels.shape[1],
        embedding_size=width,
        hidden_sizes=[width, 2 * width, 4 * width],
        depths=[1, 1, 1],
        layer_type="basic",
        num_labels=NUM_LABELS,
    )
    return ResNetForImageClassification(config)


def train(trainer_class: type[Trainer], task: Task, indices: np.ndarray, seed: int) -> Trainer:
    args = training_arguments(
        mkdtemp(),
        seed=seed,
        num_train_epochs=task.epochs,
        per_device_train_batch_size=task.batch_size,
        logging_strategy="no",
    )
    trainer = trainer_class(model=make_model(task, seed), args=args, train_dataset=task.rows(indices))
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer


def rank_by_label_issues(task: Task, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A score of each row, the higher the more doubtful, and the suggested labels."""
    issues = train(LPGTrainer, task, np.arange(len(task.given)), seed).label_issues().sort("row")
    return np.array(issues["score"]), np.array(issues["suggested_label"])


def rank_by_loss(task: Task, seed: int) -> np.ndarray:
    everything = np.arange(len(task.given))
    logits = train(Trainer, task, everything, seed).predict(task.rows(everything)).predictions
    return -log_softmax(logits, axis=-1)[everything, task.given]


def rank_by_cleanlab(task: Task, seed: int) -> np.ndarray:
    from cleanlab.rank import get_label_quality_scores

    log_probabilities = np.empty((len(task.given), NUM_LABELS))
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed).split(task.given, task.given)
    for fold, (rest, held_out) in enumerate(folds):
        trainer = train(Trainer, task, rest, seed=1000 * (fold + 1) + seed)
        log_probabilities[held_out] = log_softmax(trainer.predict(task.rows(held_out)).predictions, axis=-1)
    return -get_label_quality_scores(task.given, np.exp(log_probabilities))


def digits_task(noise: float, epochs: int, seed: int) -> Task:
    train_split = add_label_noise(load_digits(seed)["train"], noise, seed=seed)
    pixels = torch.stack(train_split.with_transform(to_pixels)[:]["pixel_values"])
    columns = {"given": np.array(train_split["label"]), "true": np.array(train_split["clean_label"])}
    return Task(f"digits, {noise:.0%} symmetric", pixels, **columns, width=16, epochs=epochs, batch_size=32)


def cifar10_task(rows: Dataset, noise: float | None, epochs: int, seed: int) -> Task:
    """`noise=None` for the labels of people."""
    true = np.array(rows["label"])
    if noise is None:
        name, given = "CIFAR-10N, human_worse", np.array(rows["human_worse"])
    else:
        name, given = f"CIFAR-10, {noise:.0%} symmetric", np.array(add_label_noise(rows, noise, seed=seed)["label"])
    pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1 for image in rows["image"]])
    return Task(name, pixels, given, true, width=32, epochs=epochs, batch_size=64)


def make_tasks(arguments: BenchmarkArguments, seed: int) -> list[Task]:
    tasks = [digits_task(noise, arguments.digits_epochs, seed) for noise in (0.2, 0.4)]
    if arguments.cifar10_dir is not None:
        rows = load_dataset("parquet", data_files=f"{arguments.cifar10_dir}/train-*.parquet", split="train")
        rows = rows.shuffle(seed=seed).select(range(arguments.cifar10_rows))
        tasks += [cifar10_task(rows, noise, arguments.cifar10_epochs, seed) for noise in (0.2, 0.4, None)]
    return tasks


def timed(function, *args) -> tuple[object, float]:
    """The result, and the processor time that it took in seconds."""
    start = time.process_time()
    return function(*args), time.process_time() - start


def run_task(task: Task, seed: int, has_cleanlab: bool) -> dict[str, float]:
    is_wrong = task.given != task.true
    (score, suggested), seconds = timed(rank_by_label_issues, task, seed)
    result = {
        "LPGTrainer": average_precision_score(is_wrong, score),
        "suggested right": (suggested == task.true)[is_wrong].mean(),
    }
    loss, seconds_of_loss = timed(rank_by_loss, task, seed)
    result |= {"loss": average_precision_score(is_wrong, loss), "time / loss": seconds / seconds_of_loss}
    if has_cleanlab:
        quality, seconds_of_cleanlab = timed(rank_by_cleanlab, task, seed)
        result |= {
            "cleanlab": average_precision_score(is_wrong, quality),
            "time / cleanlab": seconds / seconds_of_cleanlab,
            "time / (cleanlab + model)": seconds / (seconds_of_cleanlab + seconds_of_loss),
        }
    rounded = {name: round(float(value), 3) for name, value in result.items()}
    print(f"seed {seed}, {task.name}: {rounded}", flush=True)
    return result


def main() -> None:
    (arguments,) = HfArgumentParser(BenchmarkArguments).parse_args_into_dataclasses()
    datasets.disable_progress_bars()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    has_cleanlab = importlib.util.find_spec("cleanlab") is not None

    results: dict[str, list[dict]] = {}
    for seed in range(arguments.seeds):
        for task in make_tasks(arguments, seed):
            results.setdefault(task.name, []).append(run_task(task, seed, has_cleanlab))

    packages = ["torch", "transformers", "datasets", "scikit-learn"] + ["cleanlab"] * has_cleanlab
    print("\n" + ", ".join(f"{package} {version(package)}" for package in packages))
    print(f"Average precision, mean ± standard error over {arguments.seeds} seeds; ratios of processor time\n")
    columns = list(next(iter(results.values()))[0])
    print(f"| data | {' | '.join(columns)} |\n| --- |{' --- |' * len(columns)}")
    for name, runs in results.items():
        cells = [cell(column, np.array([run[column] for run in runs])) for column in columns]
        print(f"| {name} | {' | '.join(cells)} |")


def cell(column: str, values: np.ndarray) -> str:
    """One entry of the table: the mean over the seeds, for a precision with its standard error where there is one."""
    if column.startswith("time"):
        return f"{values.mean():.2f}"
    error = f" ± {values.std(ddof=1) / len(values) ** 0.5:.3f}" if len(values) > 1 else ""
    return f"{values.mean():.3f}{error}"


if __name__ == "__main__":
    main()
