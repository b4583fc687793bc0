"""The inequalities of a certificate, against high-precision arithmetic and generic solvers."""

import math

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize

from lpg_hf.pac_bayes.bounds import (
    _balanced_dual,
    balanced_error_bound,
    bernoulli_kl,
    clean_error_bound,
    draws_upper_limit,
    error_bound,
    kl_inverse,
    log_xi,
)


mpmath.mp.dps = 100

rates = st.floats(0, 1)
budgets = st.one_of(st.floats(0, 60), st.floats(-60, 2).map(lambda exponent: 10**exponent))
levels = st.floats(1e-4, 0.5)


def exact_kl(q, p):
    left = q * mpmath.log(q / p) if q > 0 else mpmath.mpf(0)
    return left + ((1 - q) * mpmath.log((1 - q) / (1 - p)) if q < 1 else mpmath.mpf(0))


def exact_kl_inverse(q, bound):
    """Both ends of a bracket 2^-250 wide."""
    q, bound = mpmath.mpf(q), mpmath.mpf(bound)
    if bound == 0:
        return q, q
    low, high = q, mpmath.mpf(1)
    for _ in range(250):
        middle = (low + high) / 2
        if middle < 1 and exact_kl(q, middle) <= bound:
            low = middle
        else:
            high = middle
    return low, high


def assert_is_inverse(q, bound):
    low, high = exact_kl_inverse(q, bound)
    value = mpmath.mpf(kl_inverse(q, bound))
    assert low <= value <= high + mpmath.mpf("1e-10"), (q, bound)


@pytest.mark.parametrize("q", [0.0, 5e-324, 1e-300, 1e-20, 1e-9, 0.1, 0.5, 0.9, 1 - 1e-9, 1 - 2**-53, 1.0])
@pytest.mark.parametrize("bound", [1e-40, 1e-25, 1e-17, 1e-12, 1e-6, 1e-3, 0.1, 1.0, 20.0, 700.0])
def test_kl_inverse_at_the_edges(q, bound):
    assert_is_inverse(q, bound)


@settings(max_examples=150, deadline=None)
@given(rates, budgets)
def test_kl_inverse_is_never_below_the_true_value_and_close_to_it(q, bound):
    assert_is_inverse(q, bound)


@given(rates, rates, budgets, budgets)
def test_kl_inverse_properties(q, other_q, bound, other_bound):
    value = kl_inverse(q, bound)
    assert q <= value <= min(1, q + math.sqrt(bound / 2) + 1e-9)
    assert kl_inverse(q, 0.0) == q
    assert kl_inverse(q, math.inf) == 1
    if value < 1:
        assert bernoulli_kl(q, value) >= bound - 1e-9
    slack = 1e-14
    assert kl_inverse(max(q, other_q), bound) >= kl_inverse(min(q, other_q), bound) - slack
    assert kl_inverse(q, max(bound, other_bound)) >= kl_inverse(q, min(bound, other_bound))


def test_kl_inverse_of_arrays_is_elementwise():
    q, bound = np.array([[0.0], [0.3], [1.0]]), np.array([0.0, 0.1, 2.0])
    expected = [[kl_inverse(row[0], entry) for entry in bound] for row in q]
    np.testing.assert_array_equal(kl_inverse(q, bound), expected)


@pytest.mark.parametrize(
    ("q", "bound", "match"), [(-0.1, 1, r"`q`"), (1.1, 1, r"`q`"), (math.nan, 1, r"`q`"), (0.5, -1, r"`bound`")]
)
def test_kl_inverse_refuses_what_is_out_of_range(q, bound, match):
    with pytest.raises(ValueError, match=match):
        kl_inverse(q, bound)


@settings(max_examples=100, deadline=None)
@given(rates, rates)
def test_bernoulli_kl_against_high_precision(q, p):
    q, p = min(q, p), max(q, p)
    if q < p < 1:
        exact = exact_kl(mpmath.mpf(q), mpmath.mpf(p))
        assert abs(bernoulli_kl(q, p) - exact) <= 1e-14 * (1 + exact)


@pytest.mark.parametrize("n", [1, 2, 3, 10, 57, 300, 1297])
def test_xi_is_its_definition(n):
    k_over_n = [mpmath.mpf(k) / n for k in range(n + 1)]
    terms = [mpmath.binomial(n, k) * r**k * (1 - r) ** (n - k) for k, r in enumerate(k_over_n)]
    assert log_xi(n) == pytest.approx(float(mpmath.log(mpmath.fsum(terms))), abs=1e-12)


def test_xi_lies_between_root_n_and_twice_that():
    for n in range(1, 3001):
        assert math.sqrt(n) <= math.exp(log_xi(n)) <= 2 * math.sqrt(n) * (1 + 1e-12)


@pytest.mark.parametrize("n", [3, 20, 100])
@pytest.mark.parametrize("rate", [0.05, 0.3, 0.5])
def test_xi_is_the_mean_of_the_exponential_divergence(n, rate):
    """The step of the proof that xi comes from: `E exp(n kl(R^ || R)) = xi(n)` for a binomial number of errors."""
    mean = mpmath.fsum(
        mpmath.binomial(n, k)
        * mpmath.mpf(rate) ** k
        * (1 - mpmath.mpf(rate)) ** (n - k)
        * mpmath.exp(n * exact_kl(mpmath.mpf(k) / n, mpmath.mpf(rate)))
        for k in range(n + 1)
    )
    assert log_xi(n) == pytest.approx(float(mpmath.log(mean)), abs=1e-12)


def test_the_limit_for_draws_is_the_better_of_two_at_half_the_level_each():
    rng = np.random.default_rng(0)
    for num_draws, spread in ((2, 1.0), (30, 0.5), (2000, 0.01)):
        errors = 0.3 + spread * (rng.random(num_draws) - 0.5) * 0.6
        log_term = math.log(2 / 0.005)
        bernstein = errors.mean() + math.sqrt(2 * np.var(errors, ddof=1) * log_term / num_draws)
        bernstein += 7 * log_term / (3 * (num_draws - 1))
        chernoff = float(exact_kl_inverse(errors.mean(), math.log(1 / 0.005) / num_draws)[1])
        assert draws_upper_limit(errors, 0.01) == pytest.approx(min(bernstein, chernoff), abs=1e-12)


def test_the_limit_for_draws_holds_and_chernoff_alone_is_looser():
    rng = np.random.default_rng(1)
    a, b = rng.uniform(0.2, 5, (4000, 1)), rng.uniform(0.2, 20, (4000, 1))
    limits = draws_upper_limit(rng.beta(a, b, (4000, 200)), 0.05)
    assert (limits < (a / (a + b))[:, 0]).mean() <= 0.05


@given(rates, rates, st.floats(0, 100), st.floats(0, 100), st.integers(1, 3000), st.integers(1, 100), levels, levels)
def test_a_certificate_moves_the_right_way(error, other_error, kl, other_kl, n, num_events, level, other_level):
    bound = error_bound(error, kl, n, num_events, level)
    slack = 1e-12
    assert error <= bound <= 1
    assert error_bound(max(error, other_error), kl, n, num_events, level) >= bound - slack
    assert error_bound(error, max(kl, other_kl), n, num_events, level) >= bound - slack
    assert error_bound(error, kl, n, num_events + 1, level) >= bound - slack
    assert error_bound(error, kl, n, num_events, min(level, other_level)) >= bound - slack
    assert error_bound(error, kl, n + 1, num_events, level) <= bound + slack


@given(st.lists(rates, min_size=2, max_size=20), st.integers(2, 5), levels)
def test_more_draws_of_the_same_kind_never_loosen_the_limit(errors, times, level):
    assert draws_upper_limit(errors * times, level) <= draws_upper_limit(errors, level) + 1e-12


def test_bound_of_a_worked_example():
    """Every input spelled out: error 0.1 on 500 samples, 10 nats, 31 scales, level 0.01."""
    xi = mpmath.fsum(
        mpmath.binomial(500, k) * (mpmath.mpf(k) / 500) ** k * (1 - mpmath.mpf(k) / 500) ** (500 - k)
        for k in range(501)
    )
    _, expected = exact_kl_inverse(0.1, (10 + mpmath.log(xi * 31 / mpmath.mpf("0.01"))) / 500)
    assert error_bound(0.1, 10.0, 500, 31, 0.01) == pytest.approx(float(expected), abs=1e-10)


@pytest.mark.parametrize("seed", range(6))
def test_balanced_bound_is_the_constrained_maximum(seed):
    rng = np.random.default_rng(seed)
    errors, counts, kl = rng.random(4) * 0.4, rng.integers(20, 300, 4), rng.random() * 20
    budget = kl + sum(map(log_xi, counts)) + math.log(7 / 0.05)

    def left(rates):
        return budget - counts @ bernoulli_kl(errors, np.maximum(rates, errors))

    best = 0.0
    for _ in range(4):
        found = optimize.minimize(
            lambda rates: -rates.mean(),
            np.clip(errors + rng.random(4) * 0.2, 1e-6, 0.999),
            bounds=[(error, 1 - 1e-9) for error in errors],
            constraints={"type": "ineq", "fun": left},
            method="SLSQP",
            options={"maxiter": 500, "ftol": 1e-12},
        )
        if found.success and left(found.x) > -1e-7:
            best = max(best, -found.fun)
    bound = balanced_error_bound(errors, counts, kl, 7, 0.05)
    assert bound == pytest.approx(best, abs=1e-5)
    assert bound >= best - 1e-7


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(rates, st.integers(1, 300)), min_size=2, max_size=6),
    st.lists(rates, min_size=6, max_size=6),
    st.floats(0, 50),
)
def test_nothing_that_the_constraint_allows_is_above_the_balanced_bound(classes, directions, kl):
    errors, counts = (np.array(column, dtype=float) for column in zip(*classes, strict=True))
    bound = balanced_error_bound(errors, counts.astype(int), kl, 1, 0.05)
    budget = kl + sum(map(log_xi, counts.astype(int))) + math.log(1 / 0.05)
    # As far as the budget goes from the observed errors in some direction.
    low, high = 0.0, 1.0
    target = np.maximum(errors, directions[: len(errors)])
    for _ in range(60):
        middle = (low + high) / 2
        point = np.minimum(errors + middle * (target - errors), 1 - 1e-12)
        point = np.maximum(point, errors)
        low, high = (middle, high) if counts @ bernoulli_kl(errors, point) <= budget else (low, middle)
    allowed = np.maximum(np.minimum(errors + low * (target - errors), 1 - 1e-12), errors)
    assert allowed.mean() <= bound + 1e-9


@given(
    st.lists(st.tuples(rates, st.integers(1, 300)), min_size=2, max_size=6),
    st.floats(0, 50),
    st.floats(-25, 9),
)
def test_every_multiplier_gives_a_bound_and_none_a_better_one(classes, kl, log_multiplier):
    errors, counts = (np.array(column, dtype=float) for column in zip(*classes, strict=True))
    bound = balanced_error_bound(errors, counts.astype(int), kl, 1, 0.05)
    budget = kl + sum(map(log_xi, counts.astype(int))) + math.log(1 / 0.05)
    at_multiplier = _balanced_dual(math.exp(log_multiplier), errors, counts, budget)
    # The minimizer is found to 1e-10 in the logarithm of the multiplier.
    assert min(1.0, at_multiplier) >= bound - 1e-8
    assert at_multiplier >= errors.mean() - 1e-9


@pytest.mark.parametrize("rest", [1e-6, 1e-10, 1e-13, 2**-53])
def test_balanced_bound_survives_a_class_that_is_all_but_lost(rest):
    """Its rate rounds to 1 in the dual, where the divergence would be infinite and the bound minus infinity."""
    low, high = (error_bound(error, 0.0, 100, 1, 0.05) for error in (0.5, 1.0))
    assert (0.5 + 1 - rest) / 2 <= balanced_error_bound([0.5, 1 - rest], [100, 100], 0.0, 1, 0.05)
    assert (low + high) / 2 - 0.05 <= balanced_error_bound([0.5, 1 - rest], [100, 100], 0.0, 1, 0.05) <= 1


def test_balanced_bound_counts_a_class_without_samples_as_lost():
    assert balanced_error_bound([0.0, math.nan], [10**7, 0], 0.0, 1, 0.05) == pytest.approx(0.5, abs=1e-5)
    assert balanced_error_bound([1.0, 1.0], [10, 20], 0.0, 1, 0.05) == 1
    assert balanced_error_bound([0.0, 0.0], [10**7, 10**7], 0.0, 1, 0.05) < 1e-5


@pytest.mark.parametrize("num_labels", [2, 3, 10])
@pytest.mark.parametrize("rate", [0.0, 0.1, 0.45])
def test_noisy_error_and_clean_error_are_one_line(num_labels, rate):
    """Sampled: wrong predictions and flips, each uniform over the others."""
    rng = np.random.default_rng(0)
    size = 400_000
    truth = rng.integers(num_labels, size=size)
    predicted = np.where(rng.random(size) < 0.2, (truth + rng.integers(1, num_labels, size)) % num_labels, truth)
    noisy = np.where(rng.random(size) < rate, (truth + rng.integers(1, num_labels, size)) % num_labels, truth)
    noisy_error, clean_error = (predicted != noisy).mean(), (predicted != truth).mean()
    factor = 1 - rate * num_labels / (num_labels - 1)
    assert abs(noisy_error - (rate + factor * clean_error)) <= 5 * 0.5 / math.sqrt(size)
    assert clean_error_bound(noisy_error, rate, num_labels) == pytest.approx(
        clean_error, abs=5 * 0.5 / size**0.5 / factor
    )


@given(rates, st.floats(0, 0.999), st.floats(0, 1), st.integers(2, 20))
def test_a_lower_limit_of_the_noise_rate_is_enough(bound, share, lower, num_labels):
    highest = (num_labels - 1) / num_labels
    rate = share * highest
    clean = clean_error_bound(bound, rate, num_labels)
    if not rate <= bound <= highest:
        assert math.isnan(clean)
    else:
        assert 0 <= clean <= bound + 1e-12
        assert clean_error_bound(bound, lower * rate, num_labels) >= clean - 1e-12
