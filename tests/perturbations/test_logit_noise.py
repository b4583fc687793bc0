"""Logit noise: its moments, its draws, and its state."""

import math

import pytest
import torch
from logit_batches import NUM_CLASSES, delta_of, every_dtype, make_batch
from torch.nn import functional as F

from lpg_hf.batch import LogitBatch
from lpg_hf.perturbations import LogitNoise
from lpg_hf.statistics import ClassStatistics


def draw_noise(method, num_samples=20_000, dtype=torch.float64):
    batch = LogitBatch(torch.zeros(num_samples, NUM_CLASSES, dtype=dtype), torch.zeros(num_samples).long())
    return method.delta(batch.gradient, batch, ClassStatistics(NUM_CLASSES))


@pytest.mark.parametrize("sigma", [0.1, 2.0])
@every_dtype
def test_logit_noise_has_the_moments_of_a_gaussian_on_the_zero_sum_plane(sigma, dtype):
    noise = draw_noise(LogitNoise(sigma), dtype=dtype)
    num_samples = len(noise)
    assert noise.sum(-1).abs().max() < sigma * (1e-14 if dtype == torch.float64 else 1e-5)

    entry_variance = sigma**2 * (1 - 1 / NUM_CLASSES)
    assert (noise.mean(0).abs() < 5 * math.sqrt(entry_variance / num_samples)).all()
    # The squared norm is sigma^2 times a chi-squared variable with C - 1 degrees of freedom.
    expected, spread = (NUM_CLASSES - 1) * sigma**2, sigma**2 * math.sqrt(2 * (NUM_CLASSES - 1))
    squared = noise.double().square().sum(-1)
    assert abs(squared.mean() - expected) < 5 * spread / math.sqrt(num_samples)
    assert abs(squared.std() - spread) < 0.1 * spread
    covariance = noise.double().T @ noise.double() / num_samples
    projection = torch.eye(NUM_CLASSES) - 1 / NUM_CLASSES
    assert (covariance - sigma**2 * projection).abs().max() < 5 * sigma**2 * math.sqrt(2 / num_samples)


def test_logit_noise_is_fixed_by_seed_and_draw_and_new_for_every_draw():
    torch.manual_seed(1)
    first, again, other = LogitNoise(seed=3), LogitNoise(seed=3), LogitNoise(seed=4)
    draws = [draw_noise(first, 50) for _ in range(4)]
    before = torch.random.get_rng_state()
    torch.manual_seed(2)
    assert all(torch.equal(draw, draw_noise(again, 50)) for draw in draws)
    torch.manual_seed(1)
    assert torch.equal(torch.random.get_rng_state(), before)  # the global generator is left alone
    draws += [draw_noise(other, 50) for _ in range(4)]
    for i, draw in enumerate(draws):
        for later in draws[i + 1 :]:
            assert correlation(draw, later) < 5 / math.sqrt(draw.numel())


def correlation(a, b):
    return abs(F.cosine_similarity(a.flatten(), b.flatten(), dim=0).item())


def test_logit_noise_goes_on_from_its_state():
    method = LogitNoise(seed=3)
    for _ in range(3):
        draw_noise(method, 10)
    resumed = LogitNoise(seed=3)
    resumed.load_state_dict(method.state_dict())
    assert torch.equal(draw_noise(resumed, 10), draw_noise(method, 10))


def test_logit_noise_differs_between_processes(monkeypatch):
    draws = []
    for rank in range(3):
        monkeypatch.setattr("lpg_hf.perturbations.logit_noise.process_index", lambda rank=rank: rank)
        draws.append(draw_noise(LogitNoise(seed=3), 50))
    assert max(correlation(draws[i], draws[j]) for i, j in [(0, 1), (0, 2), (1, 2)]) < 5 / math.sqrt(250)


def test_logit_noise_leaves_ignored_samples_alone():
    batch = make_batch(40, 3.0)
    delta = delta_of(LogitNoise(1.0), batch, ClassStatistics(NUM_CLASSES))
    assert ((delta == 0).all(-1) == batch.ignore_mask).all()


@pytest.mark.parametrize(
    ("sigma", "message"),
    [
        (-0.1, r"`sigma` must be at least 0; found -0\.1"),
        (math.nan, r"`sigma` must be at least 0; found nan"),
        (math.inf, r"`sigma` must be finite; found inf"),
    ],
)
def test_arguments_out_of_range_are_refused_with_name_value_and_range(sigma, message):
    with pytest.raises(ValueError, match=message):
        LogitNoise(sigma)
