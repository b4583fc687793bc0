"""
Which labels are wrong: average precision of three rankings of the training rows, and the time that each takes.

- `LPGTrainer.label_issues`: what one training run makes of its rows;
- loss: each row's loss under the plain `Trainer`'s model at the end of its training;
- cleanlab (`pip install cleanlab`, AGPL; left out where it is not installed): its label quality scores of
  out-of-fold probabilities, from five trainings of the plain `Trainer` on four fifths of the rows each.

All with the same model, fresh weights and arguments: a small ResNet on scikit-learn's digits and, where a folder is
given, on CIFAR-10; an MLP on features that were computed before, whose noisy labels come from people and rules.

    python examples/benchmarks/label_issues.py --cifar10_dir path/to/cifar10
    python examples/benchmarks/label_issues.py --features davidson_votes_features.npz cifar10n_features.npz
"""

import importlib.util
import sys
import time
from collections.abc import Callable
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
    PreTrainedModel,
    PrinterCallback,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    set_seed,
)
from transformers.utils import logging


sys.path.insert(0, str(Path(__file__).parents[1]))
from accuracy_models import MLPConfig, MLPForSequenceClassification
from digits import load_digits, to_pixels, training_arguments

from lpg_hf import LPGTrainer
from lpg_hf.data import add_label_noise


FOLDS = 5


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
    features: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Files like those of `accuracy.py --data NAME.npz`, in place of images. Each of their columns of "
            "noisy labels is a task."
        },
    )
    features_rows: int = field(default=8000, metadata={"help": "Training rows of each file, drawn by the seed."})
    features_epochs: int = field(default=8, metadata={"help": "Epochs on features."})
    digits_epochs: int = field(default=40, metadata={"help": "Epochs on the digits."})
    cifar10_epochs: int = field(default=20, metadata={"help": "Epochs on CIFAR-10."})
    seeds: int = field(default=3, metadata={"help": "Repetitions, each with its own rows, noise and weights."})


@dataclass
class Task:
    """
    Rows with a given and a true label, and how to train on them. `eval_rows` tell `LPGTrainer` the class shares that
    the model will meet.
    """

    name: str
    inputs: torch.Tensor
    given: np.ndarray
    true: np.ndarray
    make_model: Callable[[], PreTrainedModel]
    arguments: dict[str, object]
    eval_rows: list[dict] | None = None

    @property
    def num_labels(self) -> int:
        return int(self.true.max()) + 1

    def rows(self, indices: np.ndarray) -> list[dict]:
        return rows_of(self.inputs[indices], self.given[indices])


def rows_of(inputs: torch.Tensor, labels: np.ndarray) -> list[dict]:
    name = "pixel_values" if inputs.dim() == 4 else "features"
    return [{name: row, "labels": int(label)} for row, label in zip(inputs, labels, strict=True)]


def make_resnet(num_channels: int, width: int) -> ResNetForImageClassification:
    config = ResNetConfig(
        num_channels=num_channels,
        embedding_size=width,
        hidden_sizes=[width, 2 * width, 4 * width],
        depths=[1, 1, 1],
        layer_type="basic",
        num_labels=10,
    )
    return ResNetForImageClassification(config)


def train(trainer_class: type[Trainer], task: Task, indices: np.ndarray, seed: int) -> Trainer:
    args = training_arguments(mkdtemp(), seed=seed, logging_strategy="no", **task.arguments)
    set_seed(seed)
    rows = {"train_dataset": task.rows(indices), "eval_dataset": task.eval_rows}
    trainer = trainer_class(model=task.make_model(), args=args, **rows)
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

    log_probabilities = np.empty((len(task.given), task.num_labels))
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed).split(task.given, task.given)
    for fold, (rest, held_out) in enumerate(folds):
        trainer = train(Trainer, task, rest, seed=1000 * (fold + 1) + seed)
        log_probabilities[held_out] = log_softmax(trainer.predict(task.rows(held_out)).predictions, axis=-1)
    return -get_label_quality_scores(task.given, np.exp(log_probabilities))


def digits_task(noise: float, epochs: int, seed: int) -> Task:
    train_split = add_label_noise(load_digits(seed)["train"], noise, seed=seed)
    pixels = torch.stack(train_split.with_transform(to_pixels)[:]["pixel_values"])
    columns = {"given": np.array(train_split["label"]), "true": np.array(train_split["clean_label"])}
    arguments = {"num_train_epochs": epochs, "per_device_train_batch_size": 32}
    return Task(
        f"digits, {noise:.0%} symmetric", pixels, **columns, make_model=lambda: make_resnet(1, 16), arguments=arguments
    )


def cifar10_task(rows: Dataset, noise: float | None, epochs: int, seed: int) -> Task:
    """`noise=None` for the labels of people."""
    true = np.array(rows["label"])
    if noise is None:
        name, given = "CIFAR-10N, human_worse", np.array(rows["human_worse"])
    else:
        name, given = f"CIFAR-10, {noise:.0%} symmetric", np.array(add_label_noise(rows, noise, seed=seed)["label"])
    pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1 for image in rows["image"]])
    arguments = {"num_train_epochs": epochs, "per_device_train_batch_size": 64}
    return Task(name, pixels, given, true, lambda: make_resnet(3, 32), arguments)


def features_tasks(path: str, num_rows: int, epochs: int, seed: int) -> list[Task]:
    arrays = np.load(path)
    chosen = np.random.default_rng(seed).permutation(len(arrays["X"]))[:num_rows]
    train, test = arrays["X"][chosen].astype(np.float32), arrays["Xt"].astype(np.float32)
    mean, deviation = train.mean(0), train.std()
    inputs, test_inputs = (torch.from_numpy((rows - mean) / deviation) for rows in (train, test))
    true, test_labels = arrays["y_clean"][chosen].astype(int), arrays["yt"].astype(int)
    config = MLPConfig(input_size=train.shape[1], num_labels=int(true.max()) + 1)
    arguments = {"num_train_epochs": epochs, "per_device_train_batch_size": 64, "optim": "sgd", "learning_rate": 0.02}
    arguments |= {"optim_args": "momentum=0.9", "lr_scheduler_type": "cosine"}
    return [
        Task(
            f"{Path(path).stem.removesuffix('_features')}, {column}",
            inputs,
            arrays[f"y_{column}"][chosen].astype(int),
            true,
            lambda: MLPForSequenceClassification(config),
            arguments,
            rows_of(test_inputs, test_labels),
        )
        for column in sorted(name.removeprefix("y_") for name in arrays.files if name.startswith("y_"))
        if column != "clean"
    ]


def make_tasks(arguments: BenchmarkArguments, seed: int) -> list[Task]:
    if arguments.features:
        options = arguments.features_rows, arguments.features_epochs, seed
        return [task for path in arguments.features for task in features_tasks(path, *options)]
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
