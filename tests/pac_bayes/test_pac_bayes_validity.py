"""
Certificates hold as often as they say, by simulation with known true errors.

Also in the tight cases: no divergence, few samples, many scales or few draws, where a bound without its xi(n), without
the union over the scales or classes, or without the correction for the draws fails the same test.
"""

import math

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, norm
from torch import nn

from lpg_hf.pac_bayes import certify
from lpg_hf.pac_bayes.bounds import (
    balanced_error_bound,
    clean_error_bound,
    draws_upper_limit,
    error_bound,
    kl_inverse,
    log_xi,
)


def holds(violations, delta):
    """Whether that many violations are what a failure probability of at most delta explains."""
    violations = np.asarray(violations)
    return binomtest(int(violations.sum()), len(violations), delta, alternative="greater").pvalue > 1e-3


def fails(violations, delta):
    violations = np.asarray(violations)
    return binomtest(int(violations.sum()), len(violations), delta, alternative="greater").pvalue < 1e-9


# Whole certificates: lines through the origin of the plane, whose randomized error is known


class Line(nn.Module):
    """Two classes, one on each side of a line."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight, dtype=torch.float64))

    def forward(self, x, labels=None):
        score = x @ self.weight
        return {"logits": torch.stack([-score, score], dim=-1)}


def gibbs_disagreement(weight, sigma, truth):
    """
    Probability that a point of a rotationally symmetric distribution lies between the true line and one with weights
    `N(weight, sigma^2 I)`: the mean angle of a projected normal distribution, over pi.
    """
    strength = np.linalg.norm(weight) / sigma
    offset = math.atan2(weight[1], weight[0]) - math.atan2(truth[1], truth[0])
    angle = (np.arange(4000) + 0.5) / 4000 * 2 * math.pi - math.pi
    along = strength * np.cos(angle)
    density = norm.pdf(strength) / math.sqrt(2 * math.pi)
    density = density + along * norm.cdf(along) * norm.pdf(strength * np.sin(angle))
    # Angle to the true line, folded into [0, pi].
    between = np.abs((angle + offset + math.pi) % (2 * math.pi) - math.pi)
    return (density * between).sum() / density.sum() / math.pi


def test_the_known_error_is_the_one_of_many_draws():
    rng = np.random.default_rng(0)
    weight, truth = np.array([0.4, -0.3]), np.array([1.0, 0.5])
    drawn = weight + 0.3 * rng.standard_normal((400_000, 2))
    cosine = drawn @ truth / np.linalg.norm(drawn, axis=1) / np.linalg.norm(truth)
    assert gibbs_disagreement(weight, 0.3, truth) == pytest.approx(np.arccos(cosine).mean() / math.pi, abs=2e-3)


def test_certificates_of_trained_models_hold():
    """200 problems with noisy labels: overall, both classes, balanced and clean, from data to certificate."""
    delta, noise, num_samples = 0.2, 0.15, 40
    truth = np.array([1.0, 0.5])
    violations = {name: [] for name in ("overall", "class", "balanced", "clean", "any")}
    for seed in range(200):
        rng = np.random.default_rng(seed)
        x = rng.standard_normal((num_samples + 10, 2))
        y = (x @ truth > 0) ^ (rng.random(len(x)) < noise)
        # The prior from ten rows, the posterior fitted to all of them.
        prior, weight = (np.linalg.lstsq(x[rows], 2.0 * y[rows] - 1)[0] for rows in (slice(10), slice(None)))
        certificate = certify(
            Line(weight),
            [{"x": torch.tensor(row), "labels": int(label)} for row, label in zip(x[10:], y[10:], strict=True)],
            prior=Line(prior),
            sigma_grid=[0.1, 0.3, 1.0],
            delta=delta,
            num_draws=30,
            num_selection_draws=3,
            label_noise=noise,
            batch_size=64,
            seed=seed,
            disable_tqdm=True,
        )
        clean = gibbs_disagreement(weight, certificate.sigma, truth)
        # By symmetry the same for both classes, and so for their mean.
        noisy = noise + (1 - 2 * noise) * clean
        found = {
            "overall": noisy > certificate.overall.bound,
            "class": any(noisy > entry.bound for entry in certificate.per_class),
            "balanced": noisy > certificate.balanced.bound,
            "clean": clean > certificate.clean.bound,
        }
        for name, violated in found.items():
            violations[name].append(violated)
        violations["any"].append(any(found.values()))
    assert all(holds(entries, delta) for entries in violations.values()), violations


# Tight cases


DELTA = 0.05
NUM_PROBLEMS = 2000


def test_without_the_union_over_scales_the_bound_fails():
    """
    Posterior and prior coincide. 300 scales give classifiers that err independently, each with probability 0.4, on 10
    samples, and the scale is the one that looks best.
    """
    rng = np.random.default_rng(0)
    error, num_samples, num_scales = 0.4, 10, 300
    best = rng.binomial(num_samples, error, (NUM_PROBLEMS, num_scales)).min(axis=1) / num_samples
    with_union = error_bound(best, 0.0, num_samples, num_scales, DELTA)
    without = error_bound(best, 0.0, num_samples, 1, DELTA)
    assert holds(error > with_union, DELTA)
    assert fails(error > without, DELTA)


def test_without_the_correction_for_draws_the_bound_fails():
    """A draw is wrong everywhere or nowhere, half of them each, so that 20 draws say little of their mean."""
    rng = np.random.default_rng(1)
    error, num_samples, num_draws = 0.5, 5000, 20
    draws = (rng.random((NUM_PROBLEMS, num_draws)) < error).astype(float)
    limits = draws_upper_limit(draws, DELTA / 2)
    with_correction = error_bound(limits, 0.0, num_samples, 1, DELTA / 2)
    without = error_bound(draws.mean(axis=1), 0.0, num_samples, 1, DELTA)
    assert holds(error > with_correction, DELTA)
    assert fails(error > without, DELTA)


def test_without_the_union_over_classes_the_bounds_fail():
    rng = np.random.default_rng(2)
    error, num_samples, num_classes = 0.6, 6, 300
    lowest = rng.binomial(num_samples, error, (NUM_PROBLEMS, num_classes)).min(axis=1) / num_samples
    with_union = error_bound(lowest, 0.0, num_samples, num_classes, DELTA)
    without = error_bound(lowest, 0.0, num_samples, 1, DELTA)
    assert holds(error > with_union, DELTA)
    assert fails(error > without, DELTA)


def test_without_xi_the_balanced_bound_fails():
    """
    A hundred classes with one or two samples each, one classifier, no divergence: the classes' fluctuations add up,
    and xi(n_c) of every class is what pays for them. (No such case is known for the bound on one error: without
    divergence it is Chernoff's, which needs no xi(n).)
    """
    rng = np.random.default_rng(3)
    counts = rng.integers(1, 3, 100)
    errors = rng.uniform(0.3, 0.7, 100)
    with_xi, without = [], []
    for _ in range(400):
        seen = rng.binomial(counts, errors) / counts
        with_xi.append(balanced_error_bound(seen, counts, 0.0, 1, DELTA))
        # A divergence that is lower by what the bound adds for xi.
        without.append(balanced_error_bound(seen, counts, -sum(map(log_xi, counts)), 1, DELTA))
    assert holds(errors.mean() > np.array(with_xi), DELTA)
    assert fails(errors.mean() > np.array(without), DELTA)


@pytest.mark.parametrize("kl", [0.0, 3.0])
def test_soft_posteriors_over_many_classifiers_hold(kl):
    """
    A million classifiers that err independently; the posterior is the prior tilted towards those that err least on
    the sample, as far as its divergence allows, which is the worst that a posterior can do.
    """
    rng = np.random.default_rng(5)
    error, num_samples = 0.45, 12
    k = np.arange(num_samples + 1)
    violations = []
    for _ in range(300):
        share = rng.multinomial(1_000_000, _binomial(num_samples, error)) / 1_000_000
        tilts = np.linspace(-6, 0, 200)[:, None]
        posterior = share * np.exp(tilts * k)
        posterior /= posterior.sum(axis=1, keepdims=True)
        with np.errstate(divide="ignore", invalid="ignore"):
            divergence = np.where(posterior > 0, posterior * np.log(posterior / share), 0.0).sum(axis=1)
        chosen = np.abs(divergence - kl).argmin()
        seen = (posterior[chosen] * k).sum() / num_samples
        violations.append(error > error_bound(min(seen, 1.0), divergence[chosen], num_samples, 1, DELTA))
    assert holds(violations, DELTA)


def _binomial(n, p):
    return np.array([math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)])


def test_from_noisy_to_clean_in_a_tight_case():
    """Three classes, one fixed classifier; with a rate of noise that is too high the clean bound fails."""
    rng = np.random.default_rng(6)
    num_labels, noise, clean, num_samples = 3, 0.3, 0.2, 400
    noisy = noise + (1 - noise * num_labels / (num_labels - 1)) * clean
    seen = rng.binomial(num_samples, noisy, NUM_PROBLEMS) / num_samples
    bounds = error_bound(seen, 0.0, num_samples, 1, DELTA)
    assert holds([clean > clean_error_bound(bound, noise, num_labels) for bound in bounds], DELTA)
    assert fails([clean > clean_error_bound(bound, 0.45, num_labels) for bound in bounds], DELTA)


def test_chernoff_at_one_scale_is_what_remains_without_any_choice():
    """The bound is not vacuously loose: at no divergence xi(n) is all that lies between it and the binomial tail."""
    seen, num_samples = 0.1, 500
    chernoff = kl_inverse(seen, math.log(1 / DELTA) / num_samples)
    bound = error_bound(seen, 0.0, num_samples, 1, DELTA)
    assert chernoff < bound < chernoff + 0.02
