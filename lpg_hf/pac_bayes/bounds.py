"""The inequalities behind a certificate, as functions of numbers. NumPy in float64 throughout."""

import math
from collections.abc import Sequence
from typing import overload

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import minimize_scalar


# Bisection halves [q, 1] until its ends are neighbors. The divergence it compares has an error of at most 8 eps in p,
# so 16 eps on top of the upper end is never below the true value.
_BISECTIONS = 64
_ROUNDING = 16 * np.finfo(np.float64).eps
_SMALLEST_ERROR = 1e-300
_BELOW_ONE = np.nextafter(1.0, 0.0)


def bernoulli_kl(q: ArrayLike, p: ArrayLike) -> np.ndarray:
    """
    Computes `kl(q || p) = q ln(q/p) + (1-q) ln((1-q)/(1-p))` in nats, elementwise, for `0 <= q <= p <= 1`.

    It uses `log1p` of `p - q`, which is accurate where q and p are close.
    """
    q, p = np.asarray(q, dtype=np.float64), np.asarray(p, dtype=np.float64)
    return _kl_of_step(q, p - q, 1 - p)


def _kl_of_step(q: np.ndarray, step: np.ndarray, rest: np.ndarray) -> np.ndarray:
    """Computes `kl(q || q + step)` with `rest = 1 - q - step`; infinite where `rest` is 0 and q is below 1."""
    q = np.maximum(q, _SMALLEST_ERROR)
    with np.errstate(divide="ignore", invalid="ignore"):
        right = np.where(q < 1, (1 - q) * np.log1p(step / rest), 0.0)
    return np.maximum(right - q * np.log1p(step / q), 0.0)


@overload
def kl_inverse(q: float, bound: float) -> float: ...


@overload
def kl_inverse(q: ArrayLike, bound: ArrayLike) -> float | np.ndarray: ...


def kl_inverse(q: ArrayLike, bound: ArrayLike) -> float | np.ndarray:
    r"""
    Inverts the binary divergence: `sup {p >= q : kl(q || p) <= bound}`, the largest error rate that the bound allows.

    The value is found by bisection and rounded up. It is at most 1e-10 above the true value, and never below, because
    an upper bound must not be rounded down.

    Args:
        q (`float` or array): Observed error rate, in [0, 1].
        bound (`float` or array, broadcast against `q`): Bound on the divergence in nats, at least 0; may be infinite.

    Returns:
        `float`, or `np.ndarray` of the common shape: The rate, in [q, 1]; `q` itself where `bound` is 0.

    Raises:
        ValueError: If an argument is out of its range.

    Example:

    ```python
    >>> round(kl_inverse(0.0, 0.1), 6)  # 1 - exp(-0.1)
    0.095163
    >>> round(kl_inverse(0.1, 0.05), 6)
    0.220079

    ```
    """
    q, bound = np.broadcast_arrays(np.asarray(q, dtype=np.float64), np.asarray(bound, dtype=np.float64))
    if not ((q >= 0) & (q <= 1)).all():
        raise ValueError(f"`q` must be an error rate in [0, 1]; found {q}. Pass a share of errors, not their number.")
    if not (bound >= 0).all():
        raise ValueError(f"`bound` must be at least 0; found {bound}. Pass a divergence in nats.")
    # Bisects p - q instead of p, because rounding p loses the divergence of two close rates.
    low, high = np.zeros_like(q), 1 - q
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        is_allowed = _kl_of_step(q, middle, (1 - q) - middle) <= bound
        low, high = np.where(is_allowed, middle, low), np.where(is_allowed, high, middle)
    upper = np.where(bound == 0, q, np.minimum(q + high + _ROUNDING, 1.0))
    return float(upper) if upper.ndim == 0 else upper


def log_xi(num_samples: int) -> float:
    """
    Computes `ln xi(n)` with `xi(n) = sum_k binom(n, k) (k/n)^k (1 - k/n)^(n-k)` (Maurer, 2004).

    `xi(n)` is the price of not knowing the true error rate. It lies between `sqrt(n)` and `2 sqrt(n)`, and the exact
    value saves up to 0.47 nats over `2 sqrt(n)`. The sum is computed in the equal form
    `sum_k n (n-1) ... (n-k+1) / n^k`, whose terms are at most 1.
    """
    if num_samples == 0:
        return 0.0
    terms = np.cumprod(1 - np.arange(num_samples) / num_samples)
    return math.log1p(terms.sum())


def draws_upper_limit(errors: ArrayLike, level: float) -> float | np.ndarray:
    """
    Computes an upper confidence limit of the Gibbs error on the certificate set, from the errors of independent draws.

    The limit is the smaller of two, each at half the level: the Chernoff bound in its kl form (Langford and Caruana,
    2001), and the empirical Bernstein bound (Maurer and Pontil, 2009), which is tighter where the draws hardly vary.

    Args:
        errors (array of shape `[..., K]`, K at least 2): Error of every draw, in [0, 1].
        level (`float`): Probability over the draws with which the limit may fail.

    Returns:
        `float`, or array of shape `[...]`: The limit, in [0, 1].
    """
    errors = np.asarray(errors, dtype=np.float64)
    num_draws, mean = errors.shape[-1], np.minimum(errors.mean(-1), 1.0)
    chernoff = kl_inverse(mean, math.log(2 / level) / num_draws)
    log_term = math.log(4 / level)
    deviation = np.sqrt(2 * errors.var(-1, ddof=1) * log_term / num_draws) + 7 * log_term / (3 * (num_draws - 1))
    limit = np.minimum(chernoff, mean + deviation)
    return float(limit) if limit.ndim == 0 else limit


@overload
def error_bound(error: float, kl: float, num_samples: int, num_events: int, level: float) -> float: ...


@overload
def error_bound(
    error: ArrayLike, kl: float | np.ndarray, num_samples: int, num_events: int, level: float
) -> float | np.ndarray: ...


def error_bound(
    error: ArrayLike, kl: float | np.ndarray, num_samples: int, num_events: int, level: float
) -> float | np.ndarray:
    """
    Computes the PAC-Bayes-kl bound on the true Gibbs error (Maurer, 2004).

    Args:
        error (`float` or array): Gibbs error on the certificate set, or an upper limit of it.
        kl (`float` or array): Divergence of posterior from prior, in nats.
        num_samples (`int`): Samples that the error was measured on.
        num_events (`int`): Number of bounds that must hold at once, one for each scale of the grid and each class.
        level (`float`): Probability over the certificate set with which any of them may fail.

    Returns:
        `float` or array: The bound, in [`error`, 1].
    """
    return kl_inverse(error, (kl + log_xi(num_samples) + math.log(num_events / level)) / num_samples)


def balanced_error_bound(
    errors: Sequence[float], class_counts: Sequence[int], kl: float, num_events: int, level: float
) -> float:
    """
    Bounds the mean of the classes' true Gibbs errors, paying the divergence once for all of them.

    The true errors `r_c` satisfy `sum_c n_c kl(error_c || r_c) <= budget`, so their mean is at most its maximum under
    this constraint. The Lagrange dual bounds the maximum at every multiplier, so an inexact minimizer loosens the
    bound and never invalidates it. A class without samples counts with an error of 1.

    Args:
        errors (`Sequence[float]` of length C): Gibbs errors, or upper limits of them; ignored for empty classes.
        class_counts (`Sequence[int]` of length C): Samples of each class.
        kl (`float`): Divergence of posterior from prior, in nats.
        num_events (`int`): Number of bounds that must hold at once, one for each scale of the grid.
        level (`float`): Probability over the certificate set with which any of them may fail.

    Returns:
        `float`: The bound, at most 1.
    """
    counts = np.asarray(class_counts, dtype=np.float64)
    seen_errors = np.where(counts > 0, np.asarray(errors, dtype=np.float64), 0.0)
    budget = kl + sum(map(log_xi, class_counts)) + math.log(num_events / level)
    best = minimize_scalar(
        lambda log_multiplier: _balanced_dual(math.exp(log_multiplier), seen_errors, counts, budget),
        bounds=(-30.0, 10.0),
        method="bounded",
        options={"xatol": 1e-10},
    )
    return min(1.0, float(best.fun + _ROUNDING))


def _balanced_dual(multiplier: float, errors: np.ndarray, counts: np.ndarray, budget: float) -> float:
    # The maximizer solves r (1 - r) = a (r - error). Both forms of the root are needed, because each loses digits on
    # one side of a = 1.
    a = multiplier * counts * len(counts)
    root = np.sqrt((1 - a) ** 2 + 4 * a * errors)
    with np.errstate(divide="ignore", invalid="ignore"):
        rates = np.where(a < 1, ((1 - a) + root) / 2, 2 * a * errors / ((a - 1) + root))
    # Where the root is 0 / 0, no error was seen and the best rate is 0. A rate below 1 must not round to 1, where its
    # divergence would be infinite and the dual far below its true value.
    rates = np.maximum(errors, np.minimum(np.nan_to_num(rates), _BELOW_ONE))
    divergence = np.where(counts > 0, bernoulli_kl(errors, rates), 0.0)
    return rates.mean() - multiplier * (counts @ divergence - budget)


def clean_error_bound(noisy_bound: float, label_noise: float, num_labels: int) -> float:
    """
    Bounds the error under the true labels by a bound on the error under labels with symmetric noise.

    Under noise of rate r, a classifier with clean error R has the noisy error `r + lambda R` with
    `lambda = 1 - r C / (C-1)`, so `R <= (bound - r) / lambda`. For bounds up to (C-1)/C, this value falls in r, so a
    lower limit of the rate is enough. With r = 0, the noisy bound itself bounds the clean error. A noisy bound above
    (C-1)/C says nothing about the clean error.

    Args:
        noisy_bound (`float`): Bound on the error under the noisy labels.
        label_noise (`float`): Rate r in [0, (C-1)/C) at which a label is replaced by one of the C-1 others, each
            equally likely; or a lower limit of the rate.
        num_labels (`int`): Number of classes C.

    Returns:
        `float`: The bound; `nan` if `noisy_bound` is above (C-1)/C, or below r, which contradicts the rate.
    """
    if not label_noise <= noisy_bound <= (num_labels - 1) / num_labels:
        return math.nan
    return (noisy_bound - label_noise) / (1 - label_noise * num_labels / (num_labels - 1))
