"""
Trainer against LPGTrainer where a fifth of the labels is wrong and the classes have a long tail.

    python examples/quickstart.py
    accelerate launch --config_file examples/accelerate/cpu_ddp.yaml examples/quickstart.py  # on two processes

Both train the same small ResNet on scikit-learn's digits, from the same weights, in the same order, with the same
arguments. Leaves a plot and a model in `quickstart-output` and ends with a table. About two minutes on two CPU cores.
"""

from dataclasses import dataclass, field
from pathlib import Path

import datasets
import matplotlib.pyplot as plt
import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset, DatasetDict
from digits import load_digits, small_resnet, to_pixels, training_arguments
from matplotlib.axes import Axes
from tqdm.auto import tqdm
from transformers import (
    AutoModelForImageClassification,
    HfArgumentParser,
    PrinterCallback,
    Trainer,
    TrainerCallback,
)
from transformers.utils import logging

from lpg_hf import ClassRelativeDampening, LPGConfig, LPGTrainer
from lpg_hf.data import add_label_noise, class_counts, make_long_tailed
from lpg_hf.metrics import make_compute_metrics


METRICS = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced",
    "few_shot_accuracy": "few-shot",
    "worst_class_accuracy": "worst class",
}
LAST, PICKED, LPG = "Trainer, last epoch", "Trainer, epoch picked on noisy validation", "LPGTrainer, last epoch"


@dataclass
class QuickstartArguments:
    output_dir: str = field(default="quickstart-output", metadata={"help": "Where plot and model go."})
    seeds: int = field(default=5, metadata={"help": "Repetitions, each with its own split, noise and weights."})
    epochs: int = field(default=40, metadata={"help": "Epochs of every training."})
    imbalance_ratio: float = field(default=20, metadata={"help": "Size of the largest class over the smallest."})
    label_noise: float = field(default=0.2, metadata={"help": "Share of wrong labels in training and validation."})


class ProgressCallback(TrainerCallback):
    """One bar for all trainings."""

    def __init__(self, progress: tqdm):
        self.progress = progress

    def on_epoch_end(self, args, state, control, **kwargs):
        self.progress.update()


class WeightCallback(TrainerCallback):
    """Notes after each epoch how much of their gradient clean and wrong labels keep, on average."""

    def __init__(self, train_dataset: Dataset):
        samples = train_dataset.with_transform(to_pixels)[:]
        self.pixels, self.labels = torch.stack(samples["pixel_values"]), torch.tensor(samples["labels"])
        self.is_wrong = self.labels != torch.tensor(train_dataset["clean_label"][:])
        self.trainer = None
        self.weights = []

    @torch.no_grad()
    def on_epoch_end(self, args, state, control, model, **kwargs):
        loss = self.trainer.lpg_loss
        (dampening,) = (method for method in loss.perturbations if isinstance(method, ClassRelativeDampening))
        model.eval()
        logits = model(pixel_values=self.pixels.to(args.device)).logits
        batch = loss.batch_of(logits, self.labels.to(args.device))
        weights = dampening.weight(batch.gradient, batch, loss.statistics).cpu()
        model.train()
        self.weights.append([weights[~self.is_wrong].mean().item(), weights[self.is_wrong].mean().item()])


def noisy_long_tailed_digits(imbalance_ratio: float, label_noise: float, seed: int) -> DatasetDict:
    """Digit 0 becomes the most frequent, digit 9 the rarest. Labels of the test split stay correct."""
    digits = load_digits(seed)
    train = make_long_tailed(digits["train"], imbalance_ratio, seed=seed)
    return DatasetDict(
        train=add_label_noise(train, label_noise, seed=seed),
        # As noisy as the training labels, since nobody has checked those either. It keeps its balance, which helps
        # the rival that picks its epoch there.
        validation=add_label_noise(digits["validation"], label_noise, seed=seed + 1000),
        test=digits["test"],
    )


def make_trainer(trainer_class: type[Trainer], digits: DatasetDict, seed: int, callbacks: list, **kwargs) -> Trainer:
    true_counts = class_counts(digits["train"], label_column="clean_label")
    trainer = trainer_class(
        model=small_resnet(seed),
        args=training_arguments(seed=seed, logging_strategy="epoch", **kwargs),
        train_dataset=digits["train"].with_transform(to_pixels),
        eval_dataset={name: digits[name].with_transform(to_pixels) for name in ("validation", "test")},
        compute_metrics=make_compute_metrics(true_counts),
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def run_seed(arguments: QuickstartArguments, seed: int, progress: tqdm) -> dict:
    digits = noisy_long_tailed_digits(arguments.imbalance_ratio, arguments.label_noise, seed)
    settings = {"output_dir": arguments.output_dir, "num_train_epochs": arguments.epochs}
    bar = ProgressCallback(progress)

    plain = make_trainer(Trainer, digits, seed, [bar], eval_strategy="epoch", **settings)
    plain.train()

    recorder = WeightCallback(digits["train"])
    # The plot needs the norms of every method.
    settings |= {"args_class": LPGConfig, "log_perturbations": True}
    lpg = make_trainer(LPGTrainer, digits, seed, [bar, recorder], **settings)
    recorder.trainer = lpg
    lpg.train()

    test = lpg.eval_dataset["test"]
    predictions = {LAST: plain.predict(test), LPG: lpg.predict(test)}
    metrics = {name: strip_prefix(output.metrics, "test_") for name, output in predictions.items()}
    return {
        "metrics": metrics | {PICKED: metrics_of_picked_epoch(plain.state.log_history)},
        "recalls": {name: recalls(output.predictions, output.label_ids) for name, output in predictions.items()},
        "class_counts": class_counts(digits["train"], label_column="clean_label"),
        "log_history": [entry for entry in lpg.state.log_history if "lpg/gradient_norm" in entry],
        "weights": recorder.weights,
        "trainer": lpg,
    }


def metrics_of_picked_epoch(log_history: list[dict]) -> dict[str, float]:
    """What early stopping gives: the noisy validation labels pick the epoch, the test labels play no part in it."""
    validation = [entry for entry in log_history if "eval_validation_balanced_accuracy" in entry]
    test = [entry for entry in log_history if "eval_test_balanced_accuracy" in entry]
    picked = max(range(len(validation)), key=lambda epoch: validation[epoch]["eval_validation_balanced_accuracy"])
    return strip_prefix(test[picked], "eval_test_")


def strip_prefix(metrics: dict[str, float], prefix: str) -> dict[str, float]:
    return {name.removeprefix(prefix): value for name, value in metrics.items()}


def recalls(logits: np.ndarray, labels: np.ndarray) -> list[float]:
    is_right = logits.argmax(-1) == labels
    return [is_right[labels == label].mean() for label in np.unique(labels)]


def mean_and_error(values: list) -> tuple[np.ndarray, np.ndarray]:
    """Mean over the seeds (first axis) and its standard error, in percent."""
    values = 100 * np.asarray(values)
    error = values.std(axis=0, ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.full(values.shape[1:], np.nan)
    return values.mean(axis=0), error


def print_table(runs: list[dict], arguments: QuickstartArguments) -> None:
    print(
        f"\nDigits, long tail {arguments.imbalance_ratio:g} : 1, {arguments.label_noise:.0%} wrong labels. Test in %, "
        f"mean ± standard error over {len(runs)} seeds\n"
    )
    width = len(PICKED)
    # Where all classes have the same size, none is few-shot.
    metrics = [metric for metric in METRICS if metric in runs[0]["metrics"][LPG]]
    print(" " * width + "".join(f"{METRICS[metric]:>15}" for metric in metrics))
    for name in (LAST, PICKED, LPG):
        cells = [mean_and_error([run["metrics"][name][metric] for run in runs]) for metric in metrics]
        print(f"{name:{width}}" + "".join(f"{f'{mean:.1f} ± {error:.1f}':>15}" for mean, error in cells))
    print("\nBalanced accuracy, difference of the pairs that share a seed")
    for rival in (LAST, PICKED):
        pairs = [[run["metrics"][name]["balanced_accuracy"] for name in (LPG, rival)] for run in runs]
        mean, error = mean_and_error([lpg - other for lpg, other in pairs])
        print(f"{f'LPGTrainer - {rival}':{width + 13}} {mean:+.1f} ± {error:.1f} points")


def plot(runs: list[dict], path: Path) -> None:
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    plot_class_accuracy(left, runs)
    plot_norms(middle, runs)
    plot_weights(right, runs)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_class_accuracy(axes: Axes, runs: list[dict]) -> None:
    sizes = runs[0]["class_counts"]
    for name, color, shift in ((LAST, "tab:gray", 0.98), (LPG, "tab:blue", 1.02)):
        mean, error = mean_and_error([run["recalls"][name] for run in runs])
        # Side by side, so that the error bars don't hide each other.
        axes.errorbar(shift * np.array(sizes), mean, error, color=color, marker="o", capsize=3, label=name)
    axes.set_xscale("log")
    axes.set_xticks(sizes, labels=map(str, sizes))
    axes.minorticks_off()
    axes.invert_xaxis()
    axes.set(title="Accuracy by class size", xlabel="training images of the class", ylabel="test accuracy (%)")
    axes.legend(loc="lower left")


def plot_norms(axes: Axes, runs: list[dict]) -> None:
    names = {
        "lpg/gradient_norm": ("gradient of cross-entropy", "tab:gray"),
        "lpg/logit_adjustment/delta_norm": ("delta of logit adjustment", "tab:orange"),
        "lpg/class_relative_dampening/delta_norm": ("delta of class-relative dampening", "tab:blue"),
    }
    epochs = [entry["epoch"] for entry in runs[0]["log_history"]]
    for key, (label, color) in names.items():
        norms = np.mean([[entry[key] for entry in run["log_history"]] for run in runs], axis=0)
        axes.plot(epochs, norms, color=color, label=label)
    axes.set(title="Size of the perturbations", xlabel="epoch", ylabel="mean norm per sample", ylim=(0, None))
    axes.legend()


def plot_weights(axes: Axes, runs: list[dict]) -> None:
    mean, error = mean_and_error([run["weights"] for run in runs])
    epochs = np.arange(1, len(mean) + 1)
    for column, (label, color) in enumerate((("correct labels", "tab:green"), ("wrong labels", "tab:red"))):
        low, high = mean[:, column] - error[:, column], mean[:, column] + error[:, column]
        axes.plot(epochs, mean[:, column], color=color, label=label)
        axes.fill_between(epochs, low, high, color=color, alpha=0.2, linewidth=0)
    axes.set(title="Weight of correct and wrong labels", xlabel="epoch", ylabel="mean weight (%)", ylim=(0, None))
    axes.legend()


@torch.no_grad()
def saved_model_accuracy(path: Path, test: Dataset) -> float:
    model = AutoModelForImageClassification.from_pretrained(path).eval()
    samples = test[:]
    predictions = model(pixel_values=torch.stack(samples["pixel_values"])).logits.argmax(-1)
    return (predictions == torch.tensor(samples["labels"])).float().mean().item()


def main() -> None:
    (arguments,) = HfArgumentParser(QuickstartArguments).parse_args_into_dataclasses()
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    # More threads don't speed up so small a model, and slow it down by far where other programs use the cores.
    torch.set_num_threads(1)
    is_main = PartialState(cpu=True).is_main_process

    runs = []
    with tqdm(total=2 * arguments.seeds * arguments.epochs, unit="epoch", disable=not is_main) as progress:
        for seed in range(arguments.seeds):
            progress.set_description(f"seed {seed}")
            runs.append(run_seed(arguments, seed, progress))

    model_path, plot_path = Path(arguments.output_dir) / "model", Path(arguments.output_dir) / "quickstart.png"
    trainer = runs[-1]["trainer"]
    trainer.save_model(str(model_path))
    if not is_main:
        return
    plot(runs, plot_path)
    accuracy = saved_model_accuracy(model_path, trainer.eval_dataset["test"])
    expected = runs[-1]["metrics"][LPG]["accuracy"]
    print(f"\nPlot: {plot_path}\nLPGTrainer model of the last seed: {model_path}")
    print(f"Its accuracy on the test split is {accuracy:.1%} when loaded and was {expected:.1%} before saving.")
    print_table(runs, arguments)


if __name__ == "__main__":
    main()
