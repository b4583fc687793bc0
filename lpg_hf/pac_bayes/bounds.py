"""The inequalities behind a certificate, as functions of numbers: no model, no data. NumPy in float64 throughout."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import minimize_scalar


# Bisection halves [q, 1] until its ends are neighbours; the value it compares is right to 8 eps in p (see
# `kl_inverse`), so twice that on top of the upper end is never below the true value.
_BISECTIONS = 64
_ROUNDING = 16 * np.finfo(np.float64).eps
_SMALLEST_ERROR = 1e-300
_BELOW_ONE = np.nextafter(1.0, 0.0)


def bernoulli_kl(q: ArrayLike, p: ArrayLike) -> np.ndarray:
    """
    `kl(q || p) = q ln(q/p) + (1-q) ln((1-q)/(1-p))` in nats, for `0 <= q <= p <= 1`; elementwise.

    Written with `log1p` in `p - q`, which keeps it accurate where the two are close.
    """
    q, p = np.asarray(q, dtype=np.float64), np.asarray(p, dtype=np.float64)
    return _kl_of_step(q, p - q, 1 - p)


def _kl_of_step(q: np.ndarray, step: np.ndarray, rest: np.ndarray) -> np.ndarray:
    """`kl(q || q + step)`, `rest` being what is left of 1; infinite where nothing is and q is not 1."""
    q = np.maximum(q, _SMALLEST_ERROR)
    with np.errstate(divide="ignore", invalid="ignore"):
        right = np.where(q < 1, (1 - q) * np.log1p(step / rest), 0.0)
    return np.maximum(right - q * np.log1p(step / q), 0.0)


def kl_inverse(q: ArrayLike, bound: ArrayLike) -> float | np.ndarray:
    r"""
    The largest error rate that a divergence from an observed one allows: `sup {p >= q : kl(q || p) <= bound}`.

    Found by bisection and rounded upwards: at most 1e-10 above the true value and never below it, since an upper
    bound that is rounded down bounds nothing.

    Args:
        q (`float` or array): Observed error rate, in [0, 1].
        bound (`float` or array, broadcast against `q`): Bound on the divergence in nats, at least 0; may be infinite.

    Returns:
        `float`, or `np.ndarray` of the common shape: In [q, 1]; `q` itself where `bound` is 0.

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
        raise ValueError(f"`q` is an error rate, in [0, 1]; found {q}.")
    if not (bound >= 0).all():
        raise ValueError(f"`bound` must be at least 0; found {bound}.")
    # In steps from q, not in p: the divergence of two close rates is lost in the rounding of p.
    low, high = np.zeros_like(q), 1 - q
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        is_allowed = _kl_of_step(q, middle, (1 - q) - middle) <= bound
        low, high = np.where(is_allowed, middle, low), np.where(is_allowed, high, middle)
    upper = np.where(bound == 0, q, np.minimum(q + high + _ROUNDING, 1.0))
    return float(upper) if upper.ndim == 0 else upper


def log_xi(num_samples: int) -> float:
    """
    `ln xi(n)` with `xi(n) = sum_k binom(n, k) (k/n)^k (1 - k/n)^(n-k)`, the price of not knowing the true error rate
    (Maurer, 2004). It lies between `sqrt(n)` and `2 sqrt(n)`; the exact value saves up to 0.47 nats over the latter.

    Summed in the equal form `sum_k n (n-1) ... (n-k+1) / n^k`, whose terms are at most 1.
    """
    if num_samples == 0:
        return 0.0
    terms = np.cumprod(1 - np.arange(num_samples) / num_samples)
    return math.log1p(terms.sum())


def draws_upper_limit(errors: ArrayLike, level: float) -> float | np.ndarray:
    """
    Upper confidence limit of the Gibbs error on the certificate set, from the errors of independent draws.

    The better of two limits, each at half the level: the Chernoff bound in its kl form (Langford and Caruana, 2001),
    and the empirical Bernstein bound (Maurer and Pontil, 2009), which is the tighter one where the draws hardly vary.

    Args:
        errors (array of shape `[..., K]`, K at least 2): Error of every draw, in [0, 1].
        level (`float`): Probability, over the draws, with which the limit may fail.

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


def error_bound(
    error: ArrayLike, kl: ArrayLike, num_samples: int, num_events: int, level: float
) -> float | np.ndarray:
    """
    PAC-Bayes-kl bound on the true Gibbs error (Maurer, 2004).

    Args:
        error (`float` or array): (Upper limit of the) Gibbs error on the certificate set.
        kl (`float` or array): Divergence of posterior from prior, in nats.
        num_samples (`int`): Samples that the error was taken on.
        num_events (`int`): Bounds that must hold at once: scales in the grid, times classes where there are several.
        level (`float`): Probability, over the certificate set, with which any of them may fail.

    Returns:
        `float` or array: The bound, in [`error`, 1].
    """
    return kl_inverse(error, (kl + log_xi(num_samples) + math.log(num_events / level)) / num_samples)


def balanced_error_bound(
    errors: Sequence[float], class_counts: Sequence[int], kl: float, num_events: int, level: float
) -> float:
    """
    Bound on the mean of the classes' true Gibbs errors, the divergence paid once for all of them.

    With `sum_c n_c kl(error_c || r_c) <= budget` for the true `r_c`, the mean of `r_c` is at most its maximum under
    that constraint. The Lagrange dual bounds the maximum at every multiplier, so an inexact minimiser costs tightness
    and never validity. A class without samples counts with an error of 1.

    Args:
        errors (`Sequence[float]` of length C): (Upper limits of the) Gibbs errors; ignored for empty classes.
        class_counts (`Sequence[int]` of length C): Samples of each class.
        kl, num_events, level: As in [`error_bound`].

    Returns:
        `float`: The bound, at most 1.
    """
    counts = np.asarray(class_counts, dtype=np.float64)
    errors = np.where(counts > 0, np.asarray(errors, dtype=np.float64), 0.0)
    budget = kl + sum(map(log_xi, class_counts)) + math.log(num_events / level)
    best = minimize_scalar(
        lambda log_multiplier: _balanced_dual(math.exp(log_multiplier), errors, counts, budget),
        bounds=(-30.0, 10.0),
        method="bounded",
        options={"xatol": 1e-10},
    )
    return min(1.0, float(best.fun + _ROUNDING))


def _balanced_dual(multiplier: float, errors: np.ndarray, counts: np.ndarray, budget: float) -> float:
    # The maximiser solves r (1 - r) = a (r - error); both forms of the root are needed, each cancels on one side of 1.
    a = multiplier * counts * len(counts)
    root = np.sqrt((1 - a) ** 2 + 4 * a * errors)
    with np.errstate(divide="ignore", invalid="ignore"):
        rates = np.where(a < 1, ((1 - a) + root) / 2, 2 * a * errors / ((a - 1) + root))
    # Where the form is 0 / 0 no error was seen and the multiplier is too dear. Where a rate below 1 rounds to 1 its
    # divergence would be infinite, and the dual far below its true value.
    rates = np.maximum(errors, np.minimum(np.nan_to_num(rates), _BELOW_ONE))
    divergence = np.where(counts > 0, bernoulli_kl(errors, rates), 0.0)
    return rates.mean() - multiplier * (counts @ divergence - budget)


def clean_error_bound(noisy_bound: float, label_noise: float, num_labels: int) -> float:
    """
    Bound on the error under the true labels, from one under labels with symmetric noise.

    Under noise of rate r every classifier has the noisy error `r + lambda R` with `lambda = 1 - r C / (C-1)`, so
    `R <= (bound - r) / lambda`. For bounds up to (C-1)/C that falls in r: a lower limit of the rate is enough, and
    with 0 the noisy bound itself bounds the clean error. Above (C-1)/C nothing follows, which is `nan` here.

    Args:
        noisy_bound (`float`): Bound on the error under the noisy labels.
        label_noise (`float`): The rate r, in [0, (C-1)/C), at which a label is replaced by one of the C-1 others,
            each equally likely; or a lower limit of it.
        num_labels (`int`): C.

    Returns:
        `float`: The bound, or `nan` where `noisy_bound` is above (C-1)/C, or below r, which contradicts the rate.
    """
    if not label_noise <= noisy_bound <= (num_labels - 1) / num_labels:
        return math.nan
    return (noisy_bound - label_noise) / (1 - label_noise * num_labels / (num_labels - 1))
