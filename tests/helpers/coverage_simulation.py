"""
How often certificates hold: simulated trainings whose true error is known.

    python tests/helpers/coverage_simulation.py --repetitions 300

Each repetition draws rows with noisy labels and unequal classes, trains from a prior, certifies, and compares every
bound with the error on the distribution itself. In the setting `tight` the posterior is the prior and there is one
scale, so that nothing but the rows and the draws lies between error and bound. In the setting `trained` the posterior
has seen the certificate rows, and the scale is chosen.
"""

import argparse
import copy
from dataclasses import dataclass
from functools import cache

import torch
from noisy_models import NUM_LABELS, SIZE, Classifier, Embedding, Full, LoRA, Prompt, PromptOfNetwork
from scipy.stats import binomtest
from torch import Tensor
from torch.nn import functional as F

from lpg_hf.pac_bayes import Certificate, certify


DELTA = 0.2
LABEL_NOISE = 0.1
NUM_PRIOR_ROWS = 20
#: Repetitions that share a prior, whose true error is computed once.
REPETITIONS_PER_PRIOR = 60
#: The shares of `DELTA` that the bounds have.
PROMISED = {"overall and clean": DELTA / 3, "classes": DELTA / 3, "balanced": DELTA / 3, "any": DELTA}
KINDS = {
    "prompt": (Prompt, "trained"),
    "p-tuning": (PromptOfNetwork, "trained"),
    "embedding": (Embedding, "trained"),
    "lora": (LoRA, "lora"),
    "head": (Classifier, "head"),
    "full": (Full, "trained"),
}


@dataclass(frozen=True)
class Setting:
    num_rows: int
    num_steps: int
    sigma_grid: tuple[float, ...]
    num_draws: int


SETTINGS = {"tight": Setting(400, 0, (1.0,), 150), "trained": Setting(100, 15, (0.1, 0.3, 1.0), 60)}


def draw_rows(num_rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Inputs `[N, 2, SIZE]` and their true labels `[N]`, of which the last class has about a tenth."""
    x = torch.randn(num_rows, 2, SIZE, generator=generator, dtype=torch.float64)
    first, second = x[:, 0, 0] + 0.5 * x[:, 1, 1], x[:, 1, 0]
    return x, torch.where(first > 1.3, 2, (second > 0).long())


def add_noise(labels: Tensor, generator: torch.Generator) -> Tensor:
    is_wrong = torch.rand(len(labels), generator=generator) < LABEL_NOISE
    shift = torch.randint(1, NUM_LABELS, labels.shape, generator=generator)
    return torch.where(is_wrong, (labels + shift) % NUM_LABELS, labels)


def train(model: Classifier, x: Tensor, labels: Tensor, num_steps: int) -> None:
    if num_steps == 0:
        return
    optimizer = torch.optim.Adam([weight for weight in model.parameters() if weight.requires_grad], lr=0.05)
    for _ in range(num_steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x)["logits"], labels).backward()
        optimizer.step()


@torch.no_grad()
def true_errors(model: Classifier, sigma: float, num_draws: int, num_rows: int, seed: int) -> dict[str, Tensor]:
    """Gibbs errors under the distribution of inputs and noisy labels, and of true labels for `clean`."""
    generator = torch.Generator().manual_seed(2**40 + seed)
    x, labels = draw_rows(num_rows, generator)
    noisy = torch.full((num_rows, NUM_LABELS), LABEL_NOISE / (NUM_LABELS - 1), dtype=torch.float64)
    noisy.scatter_(1, labels[:, None], 1 - LABEL_NOISE)
    drawn = copy.deepcopy(model).eval()
    weights = [(weight, weight.clone()) for weight in drawn.parameters() if weight.requires_grad]
    predicted = torch.zeros(num_rows, NUM_LABELS, dtype=torch.float64)
    for _ in range(num_draws):
        for weight, mean in weights:
            weight.copy_(mean + sigma * torch.randn(mean.shape, generator=generator, dtype=mean.dtype))
        predicted += F.one_hot(drawn(x)["logits"].argmax(-1), NUM_LABELS) / num_draws
    classes = 1 - (predicted * noisy).sum(0) / noisy.sum(0)
    return {
        "overall": 1 - (predicted * noisy).sum(1).mean(),
        "clean": 1 - predicted.gather(1, labels[:, None]).mean(),
        "classes": classes,
        "balanced": classes.mean(),
    }


def violations(certificate: Certificate, errors: dict[str, Tensor], slack: float = 0.0) -> dict[str, bool]:
    """Which bounds the errors are above of, or closer to than `slack`. A bound that does not exist cannot fail."""
    found = {
        "overall and clean": bool(
            errors["overall"] + slack > certificate.overall.bound or errors["clean"] + slack > certificate.clean.bound
        ),
        "classes": any(
            bool(error + slack > entry.bound)
            for error, entry in zip(errors["classes"], certificate.per_class, strict=True)
        ),
        "balanced": bool(errors["balanced"] + slack > certificate.balanced.bound),
    }
    return found | {"any": any(found.values())}


@cache
def trained_prior(kind: str, number: int) -> Classifier:
    """A prior, trained on rows of its own."""
    make, _ = KINDS[kind]
    generator = torch.Generator().manual_seed(2**41 + number)
    x, labels = draw_rows(NUM_PRIOR_ROWS, generator)
    prior = make()
    train(prior, x, add_noise(labels, generator), 15)
    return prior


@cache
def errors_of_prior(kind: str, number: int, sigma: float) -> dict[str, Tensor]:
    return true_errors(trained_prior(kind, number), sigma, num_draws=400, num_rows=4000, seed=number)


def repeat(kind: str, setting: Setting, seed: int) -> dict[str, bool]:
    """One training, its certificate, and which of its bounds fail."""
    _, scope = KINDS[kind]
    generator = torch.Generator().manual_seed(seed)
    x, labels = draw_rows(setting.num_rows, generator)
    labels = add_noise(labels, generator)
    number = seed // REPETITIONS_PER_PRIOR
    prior = trained_prior(kind, number)
    model = copy.deepcopy(prior)
    train(model, x, labels, setting.num_steps)
    certificate = certify(
        model,
        [{"x": row, "labels": label} for row, label in zip(x, labels, strict=True)],
        prior=prior,
        scope=scope,
        sigma_grid=setting.sigma_grid,
        delta=DELTA,
        num_draws=setting.num_draws,
        num_selection_draws=4,
        label_noise=LABEL_NOISE,
        batch_size=1000,
        seed=seed,
        disable_tqdm=True,
    )
    if setting.num_steps == 0:
        return violations(certificate, errors_of_prior(kind, number, certificate.sigma))
    # A rough estimate decides most cases. Where it does not, a better one does.
    rough = true_errors(model, certificate.sigma, 40, 1000, seed)
    if not violations(certificate, rough, slack=0.08)["any"]:
        return violations(certificate, rough)
    return violations(certificate, true_errors(model, certificate.sigma, 200, 3000, seed))


def simulate(kind: str, setting: str, num_repetitions: int) -> dict[str, int]:
    """Counts the repetitions in which a bound fails."""
    found = [repeat(kind, SETTINGS[setting], seed) for seed in range(num_repetitions)]
    return {name: sum(entry[name] for entry in found) for name in PROMISED}


def p_value(count: int, num_repetitions: int, promised: float) -> float:
    """Probability of so many failures or more if each had exactly the promised probability (binomial test)."""
    return binomtest(count, num_repetitions, promised, alternative="greater").pvalue


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=300)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS))
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| trained part | setting | repetitions | " + " | ".join(PROMISED) + " | smallest p-value |")
    print("| --- " * (len(PROMISED) + 4) + "|")
    print("| promised at most | | | " + " | ".join(f"{rate:.1%}" for rate in PROMISED.values()) + " | |")
    for setting in arguments.settings:
        for kind in arguments.kinds:
            counts = simulate(kind, setting, arguments.repetitions)
            lowest = min(p_value(counts[name], arguments.repetitions, rate) for name, rate in PROMISED.items())
            cells = [kind, setting, arguments.repetitions, *counts.values(), f"{lowest:.3g}"]
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
