"""
A certificate for what LPGTrainer trained: how wrong it can be at most, beside how wrong it is.

    python examples/certificate.py

Scikit-learn's digits: a small network is trained on half of the training rows (the prior), then goes on with
LPGTrainer on all of them (the posterior), and the other half certifies it. Once with the labels as they are, once with
40 % of them wrong and the certificate on the error under the true labels. Ends with two tables and a picture of the
bound against the noise on the weights and against the size of the perturbations. A minute on two CPU cores.
"""

import copy
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import matplotlib.pyplot as plt
import torch
from datasets import Dataset
from digits import NUM_LABELS, training_arguments
from matplotlib.axes import Axes
from scipy.stats import beta
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import HfArgumentParser, PreTrainedConfig, PreTrainedModel, PrinterCallback, set_seed
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils import logging

from lpg_hf import LPG, LPGTrainer
from lpg_hf.data import add_label_noise
from lpg_hf.pac_bayes import (
    Certificate,
    GibbsError,
    PathLength,
    certify,
    clean_error_bound,
    gibbs_error,
    split_for_certificate,
)


NUM_PIXELS = 64
# All rows fit into one batch.
WHOLE = {"batch_size": 2048, "disable_tqdm": True}


@dataclass
class CertificateArguments:
    output_dir: str = field(default="certificate-output", metadata={"help": "Where certificates and picture go."})
    label_noise: float = field(default=0.4, metadata={"help": "Share of wrong labels in the second experiment."})
    fraction: float = field(default=0.5, metadata={"help": "Share of the training rows that the prior gets."})
    delta: float = field(default=0.05, metadata={"help": "Probability with which a certificate may fail."})
    num_draws: int = field(default=5000, metadata={"help": "Draws of the weights that certify."})
    prior_epochs: float = field(default=40, metadata={"help": "Epochs of the prior."})
    posterior_epochs: float = field(default=5, metadata={"help": "Epochs of the posterior, from the prior's weights."})
    seed: int = field(default=0, metadata={"help": "Of split, noise, weights and draws."})


class MLPConfig(PreTrainedConfig):
    model_type = "mlp"

    def __init__(self, num_pixels: int = NUM_PIXELS, hidden_size: int = 128, **kwargs):
        super().__init__(**kwargs)
        self.num_pixels, self.hidden_size = num_pixels, hidden_size


class MLPForImageClassification(PreTrainedModel):
    """Two layers without BatchNorm, whose running statistics would carry the certificate rows past the bound."""

    config_class = MLPConfig

    def __init__(self, config: MLPConfig):
        super().__init__(config)
        self.hidden = nn.Linear(config.num_pixels, config.hidden_size)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        logits = self.classifier(self.hidden(pixel_values).relu())
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        return ImageClassifierOutput(loss=loss, logits=logits)


def digits(seed: int) -> tuple[Dataset, Dataset]:
    """Training and test rows (1,437 and 360), drawn at random; pixels in [0, 1]."""
    raw = load_digits()
    features = datasets.Features(
        {
            "pixel_values": datasets.List(datasets.Value("float32")),
            "label": datasets.ClassLabel(names=[str(digit) for digit in range(NUM_LABELS)]),
        }
    )
    columns = {"pixel_values": raw.data / 16, "label": raw.target}
    train, test = Dataset.from_dict(columns, features=features).train_test_split(test_size=0.2, seed=seed).values()
    return train.flatten_indices().with_format("torch"), test.with_format("torch")


def train(model: nn.Module, dataset: Dataset, output_dir: str, callbacks: list | None = None, **kwargs) -> LPGTrainer:
    perturbations = kwargs.pop("perturbations", None)
    trainer = LPGTrainer(
        model=model,
        args=training_arguments(output_dir, remove_unused_columns=True, **kwargs),
        train_dataset=dataset,
        perturbations=perturbations,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer


def train_posterior(
    prior: nn.Module, dataset: Dataset, arguments: CertificateArguments, perturbations: list | None = None
) -> tuple[nn.Module, dict[str, float]]:
    """The model and the lengths of its path; by plain SGD, for which the theory of the path is."""
    path_length = PathLength(interval=1)
    trainer = train(
        copy.deepcopy(prior),
        dataset,
        arguments.output_dir,
        callbacks=[path_length],
        perturbations=perturbations,
        optim="sgd",
        learning_rate=0.02,
        num_train_epochs=arguments.posterior_epochs,
        seed=arguments.seed,
    )
    return trainer.model, path_length.report()


def holdout_bound(model: nn.Module, dataset: Dataset, delta: float) -> float:
    """What half of the rows is worth without PAC-Bayes: the binomial bound on a model that has not seen them."""
    errors = round(gibbs_error(model, dataset, sigma=0.0, num_draws=1, **WHOLE).overall * len(dataset))
    return float(beta.ppf(1 - delta, errors + 1, len(dataset) - errors))


@dataclass
class Experiment:
    label_noise: float | None
    prior: nn.Module
    train: Dataset
    parts: dict[str, Dataset]
    certificate: Certificate
    gibbs_test: GibbsError
    test_error: float
    prior_test_error: float
    holdout_bound: float


def run(arguments: CertificateArguments, label_noise: float | None, progress: tqdm) -> Experiment:
    train_rows, test = digits(arguments.seed)
    if label_noise is not None:
        train_rows = add_label_noise(train_rows, label_noise, seed=arguments.seed)
    parts = split_for_certificate(train_rows, arguments.fraction, arguments.seed)

    set_seed(arguments.seed)
    prior = MLPForImageClassification(MLPConfig(id2label={label: str(label) for label in range(NUM_LABELS)}))
    train(prior, parts["prior"], arguments.output_dir, num_train_epochs=arguments.prior_epochs, seed=arguments.seed)
    progress.update()
    posterior, _ = train_posterior(prior, train_rows, arguments)
    progress.update()
    certificate = certify(
        posterior,
        parts["certificate"],
        prior=prior,
        prior_dataset=parts["prior"],
        delta=arguments.delta,
        num_draws=arguments.num_draws,
        label_noise=label_noise,
        seed=arguments.seed,
        **WHOLE,
    )
    progress.update()

    # The same share of delta that the certificate's bound on the overall error has.
    holdout = holdout_bound(prior, parts["certificate"], arguments.delta / 3)
    return Experiment(
        label_noise=label_noise,
        prior=prior,
        train=train_rows,
        parts=parts,
        certificate=certificate,
        gibbs_test=gibbs_error(posterior, test, sigma=certificate.sigma, num_draws=1000, **WHOLE),
        test_error=gibbs_error(posterior, test, sigma=0.0, num_draws=1, **WHOLE).overall,
        prior_test_error=gibbs_error(prior, test, sigma=0.0, num_draws=1, **WHOLE).overall,
        holdout_bound=holdout if label_noise is None else clean_error_bound(holdout, label_noise, NUM_LABELS),
    )


def print_experiment(experiment: Experiment) -> None:
    labels = "as they are" if experiment.label_noise is None else f"{experiment.label_noise:.0%} of them wrong"
    print(f"\n== Training labels {labels}\n\n{experiment.certificate}\n")
    certificate = experiment.certificate
    certified = certificate.overall if certificate.clean is None else certificate.clean
    rows = [
        ("LPGTrainer, error: certified", certified.bound),
        ("LPGTrainer, test error: randomized, as certified", experiment.gibbs_test.overall),
        ("LPGTrainer, test error: without noise on the weights", experiment.test_error),
        ("LPGTrainer, balanced test error: randomized", experiment.gibbs_test.balanced),
        ("prior alone, error: hold-out bound on the same rows", experiment.holdout_bound),
        ("prior alone, test error", experiment.prior_test_error),
    ]
    print("\n".join(f"{name:54} {value:.4f}" for name, value in rows) + "\n(errors under the true labels)")


# Bound against eps


@dataclass
class EpsilonPoint:
    sign: int
    epsilon: float
    certificate: Certificate
    lengths: dict[str, float]


def sweep(arguments: CertificateArguments, experiment: Experiment, progress: tqdm) -> list[EpsilonPoint]:
    """Certificates of posteriors that differ in the radius of LPG alone; each is valid by itself."""
    points = []
    for sign in (-1, 1):
        for epsilon in (0.0, 0.1, 0.2, 0.4):
            method = LPG("fixed", epsilon=epsilon, signs=[sign] * NUM_LABELS, max_dampening=1.0)
            chain = [method] if epsilon > 0 else []
            posterior, lengths = train_posterior(experiment.prior, experiment.train, arguments, chain)
            certificate = certify(
                posterior,
                experiment.parts["certificate"],
                prior=experiment.prior,
                sigma_grid=experiment.certificate.sigma_grid,
                delta=arguments.delta,
                num_draws=arguments.num_draws,
                seed=arguments.seed,
                **WHOLE,
            )
            points.append(EpsilonPoint(sign, epsilon, certificate, lengths))
            progress.update()
    return points


def print_sweep(points: list[EpsilonPoint]) -> None:
    print("\n== Bound against the radius of LPG (labels as they are)\n")
    print(f"{'':8}{'eps':>6}{'bound':>9}{'error':>9}{'KL':>9}{'sigma':>9}{'|w-w0|':>9}{'path':>9}{'sum eta|b|':>12}")
    for point in points:
        c, lengths = point.certificate, point.lengths
        values = (c.overall.bound, c.overall.error, c.kl, c.sigma, c.distance, lengths["lpg/path_length"])
        print(
            f"{'amplify' if point.sign > 0 else 'dampen':8}{point.epsilon:6g}"
            + "".join(f"{value:9.4f}" for value in values)
            + f"{lengths['lpg/perturbation_path']:12.4f}"
        )


def plot(experiment: Experiment, points: list[EpsilonPoint], path: Path) -> None:
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    plot_scales(left, experiment)
    plot_epsilons(right, points)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_scales(axes: Axes, experiment: Experiment) -> None:
    certificate = experiment.certificate
    sigmas = [choice.sigma for choice in certificate.selection]
    for attribute, label, color in (
        ("bound", "bound", "tab:blue"),
        ("error", "error on the certificate rows", "tab:green"),
        ("complexity", "complexity term", "tab:orange"),
    ):
        values = [getattr(choice, attribute) for choice in certificate.selection]
        axes.plot(sigmas, values, color=color, marker=".", label=label)
    overall = certificate.overall.bound
    axes.scatter([certificate.sigma], [overall], color="black", zorder=3, label=f"certificate: {overall:.3f}")
    axes.axhline(experiment.gibbs_test.overall, color="0.6", linestyle=":", label="randomized test error")
    axes.set(xscale="log", title="Bound and its parts", xlabel="standard deviation of the noise", ylim=(0, 1))
    # Between the two flanks.
    axes.legend(loc="upper center", bbox_to_anchor=(0.56, 1), fontsize=8, handlelength=1.5)


def plot_epsilons(axes: Axes, points: list[EpsilonPoint]) -> None:
    for sign, label, color in ((-1, "dampen", "tab:blue"), (1, "amplify", "tab:red")):
        chosen = [point for point in points if point.sign == sign]
        epsilons = [point.epsilon for point in chosen]
        axes.plot(epsilons, [p.certificate.overall.bound for p in chosen], color=color, marker="o", label=label)
        errors = [p.certificate.overall.error for p in chosen]
        axes.plot(epsilons, errors, color=color, marker=".", linestyle=":", label=f"{label}: error on the rows")
    axes.set(title="What the perturbation costs", xlabel="radius of LPG", ylabel="bound")
    axes.set_ylim(0, 1.4 * max(point.certificate.overall.bound for point in points))
    axes.legend(loc="upper left")


def main() -> None:
    (arguments,) = HfArgumentParser(CertificateArguments).parse_args_into_dataclasses()
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    # More threads don't speed up so small a model.
    torch.set_num_threads(1)
    output_dir = Path(arguments.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)

    with tqdm(total=14, unit="step") as progress:
        clean = run(arguments, None, progress)
        noisy = run(arguments, arguments.label_noise, progress)
        points = sweep(arguments, clean, progress)
    for name, experiment in (("clean", clean), ("noisy", noisy)):
        experiment.certificate.save(output_dir / f"certificate_{name}.json")
        print_experiment(experiment)
    print_sweep(points)
    plot(clean, points, output_dir / "certificate.png")
    print(f"\nPicture and certificates: {output_dir}")


if __name__ == "__main__":
    main()
