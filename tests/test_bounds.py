"""Clopper-Pearson, the top-class test and theorem 5.

Against exact arithmetic, scipy, statsmodels and simulation.
"""

from decimal import Decimal, localcontext
from fractions import Fraction
from math import comb

import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import beta, binom, binomtest
from statsmodels.stats.proportion import proportion_confint

from lib.bounds import (
    certified_accuracy_lower,
    clopper_pearson_lower,
    clopper_pearson_upper,
    top_class_pvalue,
)

ALPHAS = [1e-9, 0.001, 0.05, 0.5, 0.9, 0.999]
levels = st.one_of(st.sampled_from(ALPHAS), st.floats(1e-12, 0.999))


def exact_tail(k, n, p):
    """P(X >= k) for X ~ Binomial(n, p), p a Fraction: exact."""
    return sum(comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k, n + 1))


def at_most(k, n, p):
    """P(X <= k) for X ~ Binomial(n, p), p a Decimal, without any library's beta function.

    The terms are added in 40-digit decimals.
    """
    with localcontext() as context:
        context.prec = 40
        if p <= 0:
            return Decimal(1)
        odds, term, total = p / (1 - p), (1 - p) ** int(n), Decimal(0)
        for j in range(int(k) + 1):
            total += term
            term *= odds * (int(n) - j) / (j + 1)
        return total


def long_tail(misses, n, p):
    """P(X >= n - misses) for X ~ Binomial(n, p): the probability of at most so many misses."""
    return at_most(misses, n, 1 - Decimal(float(p)))


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("n", [1, 2, 3, 7, 20, 45])
def test_lower_is_never_too_high_in_exact_arithmetic(n, alpha):
    """As fractions, the double returned has a tail of at most alpha.

    One part in 1e6 above it the tail is more.
    """
    for k, bound in enumerate(clopper_pearson_lower(np.arange(n + 1), n, alpha)):
        if k == 0:
            assert bound == 0
            continue
        assert exact_tail(k, n, Fraction(bound)) <= Fraction(alpha)
        above = min(Fraction(bound) * (1 + Fraction(1, 10**6)), Fraction(1))
        assert exact_tail(k, n, above) > Fraction(alpha)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("n", [1, 2, 3, 7, 20, 45])
def test_upper_is_never_too_low_in_exact_arithmetic(n, alpha):
    for k, bound in enumerate(clopper_pearson_upper(np.arange(n + 1), n, alpha)):
        if k == n:
            assert bound == 1
            continue
        assert 1 - exact_tail(k + 1, n, Fraction(bound)) <= Fraction(alpha)
        assert 1 - exact_tail(k + 1, n, Fraction(bound) - Fraction(1, 10**6)) > Fraction(alpha)


@given(st.integers(1, 10_000_000), st.integers(0, 400), levels)
def test_lower_is_never_too_high_at_many_draws(n, misses, alpha):
    misses = min(misses, n - 1)
    bound = clopper_pearson_lower(n - misses, n, alpha)
    tail = long_tail(misses, n, bound)
    assert Decimal(alpha) * (1 - Decimal("2e-6")) <= tail <= Decimal(alpha)


@given(st.integers(1, 10_000_000), st.integers(1, 400), levels)
def test_upper_is_never_too_low_at_many_draws(n, misses, alpha):
    """Few hits: their complement has few misses.

    Absolute errors of 1e-13 are allowed, on the safe side.
    """
    hits = min(misses, n - 1)
    bound = clopper_pearson_upper(hits, n, alpha)
    below = Decimal(bound * (1 - 1e-6) - 1e-12)
    assert at_most(hits, n, Decimal(float(bound))) <= Decimal(alpha) < at_most(hits, n, below)


def test_the_case_that_scipy_gets_wrong():
    """betaincinv, and with it statsmodels, gives .93743 (scipy 1.17.1).

    The tail in decimals shows that this is wrong.
    """
    bound = clopper_pearson_lower(42_291, 43_290, 0.001)
    assert bound == pytest.approx(0.974607, abs=5e-7)
    assert Decimal("0.000999999") < long_tail(999, 43_290, bound) <= Decimal("0.001")
    assert long_tail(999, 43_290, 0.93743) < Decimal("1e-100")


def test_scan_of_999_misses():
    """scipy's quantile is wrong at many of these n.

    True bounds rise with n. Each solves its equation, some of them checked in decimals.
    """
    n = np.unique(np.geomspace(1000, 2_000_000, 30_000).astype(int))
    bound = clopper_pearson_lower(n - 999, n, 0.001)
    assert len(n) > 20_000
    assert (np.diff(bound) > 0).all()
    tail = binom.sf(n - 1000, n, bound)
    assert (tail <= 0.001).all()
    np.testing.assert_allclose(tail, 0.001, rtol=1e-5)
    for i in range(0, len(n), 500):
        assert Decimal("0.000999998") < long_tail(999, n[i], bound[i]) <= Decimal("0.001")


@pytest.mark.parametrize("misses", [0, 1, 9, 99, 499, 500, 1000, 1999, 2000])
def test_scan_of_other_misses(misses):
    n = np.unique(np.geomspace(misses + 1, 2_000_000, 3000).astype(int))
    for alpha in (1e-6, 0.001, 0.05):
        bound = clopper_pearson_lower(n - misses, n, alpha)
        assert (np.diff(bound) > 0).all()
        np.testing.assert_allclose(binom.sf(n - misses - 1, n, bound), alpha, rtol=2e-6)


@pytest.mark.parametrize(
    "n", [1, 2, 5, 10, 100, 999, 1000, 1001, 2000, 10_000, 43_290, 100_000, 1_000_000]
)
@pytest.mark.parametrize("alpha", [1e-4, 0.001, 0.05, 0.3])
def test_interval_against_statsmodels(n, alpha):
    """proportion_confint at 2 alpha gives the same interval to 1e-8.

    Where it does not, the tail in decimals must be on our side.
    """
    ends, between = np.arange(min(n, 30) + 1), np.linspace(0, n, 60).astype(int)
    k = np.unique(np.concatenate([ends, n - ends, between, [max(0, n - 999)]]))
    low, up = proportion_confint(k, n, alpha=2 * alpha, method="beta")
    ours = clopper_pearson_lower(k, n, alpha)
    for i in np.flatnonzero(~np.isclose(ours, low, rtol=1e-8, atol=0)):
        assert k[i] == n - 999
        tail = long_tail(n - k[i], n, ours[i])
        assert Decimal(alpha) * (1 - Decimal("1e-5")) < tail <= Decimal(alpha) < 1
        assert abs(long_tail(n - k[i], n, low[i]) / Decimal(alpha) - 1) > Decimal("1e-6")
    same = k != 999
    upper = clopper_pearson_upper(k, n, alpha)
    np.testing.assert_allclose(upper[same], up[same], rtol=1e-8, atol=2e-13)


@given(st.integers(1, 5000), st.floats(0, 1), st.sampled_from([0.0005, 0.001, 0.01, 0.05, 0.2]))
def test_interval_against_scipys_exact_interval(n, part, alpha):
    """binomtest inverts the tail by root finding, not by a quantile function."""
    k = round(part * n)
    exact = binomtest(k, n).proportion_ci(1 - 2 * alpha, method="exact")
    if k not in (999, n - 999):
        assert clopper_pearson_lower(k, n, alpha) == pytest.approx(exact.low, rel=1e-7)
        assert clopper_pearson_upper(k, n, alpha) == pytest.approx(exact.high, rel=1e-7)
    else:
        tail = binom.sf(k - 1, n, clopper_pearson_lower(k, n, alpha))
        assert tail == pytest.approx(alpha, rel=1e-5)


@pytest.mark.parametrize(
    ("k", "n", "alpha"),
    [(2.5, 7, 0.001), (0.3, 4, 0.05), (99.5, 100, 0.001), (950.25, 1000, 0.01), (6.999, 7, 0.2)],
)
def test_real_counts_solve_the_beta_integral(k, n, alpha):
    """For real k the equation is I_bound(k, n - k + 1) = alpha.

    The density of Beta(k, n - k + 1) is integrated by quadrature.
    """
    bound = clopper_pearson_lower(k, n, alpha)
    tail = quad(beta(k, n - k + 1).pdf, 0, bound, epsabs=0, epsrel=1e-9)[0]
    assert tail == pytest.approx(alpha, rel=1e-7)


def test_extremes_by_hand():
    """All hits: alpha^(1/n). No hits: 0. One of two: P(X >= 1) = 1 - (1 - p)^2 = alpha."""
    unanimous = clopper_pearson_lower(100_000, 100_000, 0.001)
    assert unanimous == pytest.approx(0.001 ** (1 / 100_000), rel=1e-14)
    assert clopper_pearson_lower(0, 100_000, 0.001) == 0
    assert clopper_pearson_lower(1, 2, 0.19) == pytest.approx(0.1, rel=1e-9)
    assert clopper_pearson_upper(0, 1000, 0.001) == pytest.approx(1 - 0.001**0.001, rel=1e-12)
    assert clopper_pearson_upper(1000, 1000, 0.001) == 1


def test_never_nan_and_always_a_probability():
    """Corners: one draw and a billion, hits next to 0 and to n, levels from 1e-200 to almost 1."""
    for n in (1, 2, 1000, 10**6, 10**9):
        few, many = [0, 1e-300, 1e-9, 0.001, 0.5, 1, 1.5, 2], [2, 1, 0.5, 1e-9, 0]
        k = np.unique(np.clip([*few, n / 3, n / 2, *(n - m for m in many)], 0, n))
        for alpha in (1e-200, 1e-30, 0.001, 0.5, 0.999, 1 - 1e-12):
            low, up = clopper_pearson_lower(k, n, alpha), clopper_pearson_upper(k, n, alpha)
            for bound in (low, up):
                assert np.isfinite(bound).all()
                assert ((bound >= 0) & (bound <= 1)).all()
                assert (np.diff(bound) >= -1e-12).all()
            assert low[0] == 0
            assert up[-1] == 1
            assert (low < 1).all()


def test_a_level_above_one_half_where_the_quantile_fails():
    """At alpha = .999 the bound lies above k / n = 4.6e-5.

    The exact tail is 1 - (1 - p)^n - n p (1 - p)^(n - 1).
    """
    p = clopper_pearson_lower(2, 43_290, 0.999)
    assert p > 2 / 43_290
    tail = 1 - at_most(1, 43_290, Decimal(float(p)))
    assert tail == pytest.approx(Decimal("0.999"), rel=Decimal("1e-8"))


@given(st.integers(2, 2_000_000), st.floats(0, 1), st.floats(1e-6, 0.4), st.integers(1, 1000))
def test_lower_is_monotone_in_each_argument(n, part, alpha, step):
    k = int(part * (n - 1))
    here = clopper_pearson_lower(k, n, alpha)
    assert clopper_pearson_lower(k + 1, n, alpha) > here
    assert here <= k / n <= clopper_pearson_upper(k, n, alpha)
    if k > 0:
        assert clopper_pearson_lower(k, n + step, alpha) < here
        assert clopper_pearson_lower(k, n, 1.1 * alpha) > here
        assert clopper_pearson_lower(k + step, n + step, alpha) > here
        assert clopper_pearson_lower(k - 0.5, n, alpha) < here


def test_arrays_broadcast_and_agree_with_scalars():
    k, n = np.array([[0, 5, 9], [10, 50, 991]]), np.array([[10], [1990]])
    table = clopper_pearson_lower(k, n, 0.01)
    assert table.shape == (2, 3)
    assert table.dtype == np.float64
    for i, j in np.ndindex(2, 3):
        one = clopper_pearson_lower(int(k[i, j]), int(n[i, 0]), 0.01)
        assert isinstance(one, float)
        assert one == table[i, j]
    assert clopper_pearson_lower(np.zeros((2, 0)), 10, 0.01).shape == (2, 0)


def test_repeated_counts_are_each_given_their_own_bound():
    """Equal pairs are solved once, whether n is one number or differs.

    Shuffled repeats agree with one call per value.
    """
    rng = np.random.default_rng(0)
    k, n = rng.integers(0, 20, (40, 5)), rng.integers(20, 23, (40, 5))
    for draws in (n, np.full_like(n, 20)):
        pairs = zip(k.flat, draws.flat, strict=True)
        expected = [clopper_pearson_lower(a, b, 0.01) for a, b in pairs]
        np.testing.assert_array_equal(clopper_pearson_lower(k, draws, 0.01).ravel(), expected)


NARROW = [
    np.float16(0.001),
    np.float32(0.001),
    np.float64(0.001),
    np.longdouble("0.001"),
    Fraction(1, 1000),
]


@pytest.mark.parametrize("alpha", NARROW, ids=lambda alpha: type(alpha).__name__)
def test_levels_of_any_type_are_computed_in_double_precision(alpha):
    """The value of the level counts, not its type; a Fraction is meant exactly."""
    k, n = np.array([0, 1, 15, 19, 20]), 20
    exact = alpha if isinstance(alpha, Fraction) else Fraction(float(alpha))
    for bound in (clopper_pearson_lower, clopper_pearson_upper):
        np.testing.assert_array_equal(bound(k, n, alpha), bound(k, n, float(alpha)))
    for hits, low in zip(k[1:], clopper_pearson_lower(k, n, alpha)[1:], strict=True):
        assert exact_tail(int(hits), n, Fraction(low)) <= exact
    for levels in ((alpha, 0.001), (0.001, alpha)):
        assert certified_accuracy_lower(400, 500, *levels) == certified_accuracy_lower(
            400, 500, *map(float, levels)
        )


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int32, np.uint64, np.float32])
def test_counts_of_any_type_give_the_same_bound(dtype):
    k, n = np.array([0, 3, 99, 100], dtype=dtype), dtype(100)
    for bound in (clopper_pearson_lower, clopper_pearson_upper):
        expected = bound(np.array([0, 3, 99, 100]), 100, 0.001)
        np.testing.assert_array_equal(bound(k, n, 0.001), expected)
    assert top_class_pvalue(dtype(100), dtype(90)) == top_class_pvalue(100, 90)
    assert certified_accuracy_lower(dtype(90), dtype(100), 0.001, 0.01) == certified_accuracy_lower(
        90, 100, 0.001, 0.01
    )


@pytest.mark.parametrize("n", [10**8, 10**9, 10**10])
@pytest.mark.parametrize("alpha", [1e-9, 0.001, 0.3])
def test_lower_is_never_too_high_up_to_1e10_draws(n, alpha):
    """Few misses by the sum of their terms; everywhere else by a continued fraction of mpmath's."""
    for misses in (0, 1, 7, 60, 400):
        bound = clopper_pearson_lower(n - misses, n, alpha)
        assert long_tail(misses, n, bound) <= Decimal(alpha)
    for part in (1e-6, 0.3, 0.5, 0.5001, 0.9, 0.999):
        k = int(n * part)
        bound = clopper_pearson_lower(k, n, alpha)
        with mpmath.workdps(40):
            tail = beta_tail(mpmath.mpf(k), mpmath.mpf(n - k + 1), mpmath.mpf(float(bound)))
            assert alpha * (1 - mpmath.mpf("2e-6")) <= tail <= alpha


def beta_tail(a, b, x):
    """I_x(a, b) by its continued fraction (Abramowitz & Stegun 26.5.8; modified Lentz)."""
    scale = mpmath.loggamma(a + b) - mpmath.loggamma(a) - mpmath.loggamma(b)
    front = mpmath.exp(scale + a * mpmath.log(x) + b * mpmath.log1p(-x)) / a
    c, d = mpmath.mpf(1), 1 / (1 - (a + b) * x / (a + 1))
    fraction, m = d, 0
    while True:
        m += 1
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d, c = 1 / (1 + term * d), 1 + term / c
            fraction *= c * d
        if abs(c * d - 1) < mpmath.mpf(10) ** -30:
            return front * fraction


def test_lower_covers():
    """The guarantee itself, exactly: at every p, P(bound > p) is at most alpha."""
    for n, alpha in ((10, 0.05), (100, 0.001), (1000, 0.01)):
        bound = clopper_pearson_lower(np.arange(n + 1), n, alpha)
        # The rate jumps where p passes a bound: just below each bound is where it is largest.
        for p in np.concatenate([bound[1:] * (1 - 1e-9), np.linspace(0, 1, 101)]):
            assert binom.pmf(np.arange(n + 1), n, p)[bound > p].sum() <= alpha * (1 + 1e-9)


def test_top_class_pvalue_by_hand():
    """Three votes to none: 2 / 8. Ties and no votes: 1."""
    assert top_class_pvalue(3, 0) == 0.25
    np.testing.assert_array_equal(top_class_pvalue([0, 4, 1, 1], [0, 4, 1, 0]), 1.0)
    assert top_class_pvalue(8, 2) == pytest.approx(2 * (45 + 10 + 1) / 1024, rel=1e-12)


@given(st.integers(0, 20_000), st.integers(0, 20_000))
def test_top_class_pvalue_against_scipy(a, b):
    n_a, n_b = max(a, b), min(a, b)
    expected = binomtest(n_a, n_a + n_b, 0.5).pvalue if n_a else 1.0
    assert top_class_pvalue(n_a, n_b) == pytest.approx(expected, rel=1e-9)


@given(st.integers(1, 300), st.integers(0, 300))
def test_top_class_pvalue_in_exact_arithmetic(n_a, n_b):
    n_a, n_b = max(n_a, n_b), min(n_a, n_b)
    tail = Fraction(sum(comb(n_a + n_b, i) for i in range(n_a, n_a + n_b + 1)), 2 ** (n_a + n_b))
    assert top_class_pvalue(n_a, n_b) == pytest.approx(float(min(2 * tail, Fraction(1))), rel=1e-12)


def test_certified_accuracy_lower_by_hand():
    """m = 500, y = 400, alpha = rho = .001 give .78992.

    (.8 - .001 - sqrt(.002 * .999 * log(1000) / 500) - log(1000) / 1500) / .999.
    """
    by_hand = (0.8 - 0.001 - 0.00525386 - 0.00460517) / 0.999
    assert certified_accuracy_lower(400, 500, 0.001, 0.001) == pytest.approx(by_hand, abs=1e-7)
    values = certified_accuracy_lower(np.arange(501), 500, 0.001, 0.001)
    assert values[0] == 0
    assert (np.diff(values) >= 0).all()
    assert (values <= np.arange(501) / 500).all()


@pytest.mark.parametrize(("m", "good"), [(50, 0), (500, 250), (500, 0), (10_000, 7000)])
@pytest.mark.parametrize(("alpha", "rho"), [(0.001, 0.1), (0.05, 0.05), (0.5, 0.2)])
def test_theorem_5_holds_at_its_worst_case(m, good, alpha, rho):
    """The bound exceeds the truth in at most rho of the runs.

    The worst case: truly certified examples always count, all others with probability alpha.
    """
    runs = 40_000
    y = good + np.random.default_rng(0).binomial(m - good, alpha, size=runs)
    wrong = int((certified_accuracy_lower(y, m, alpha, rho) > good / m).sum())
    assert binomtest(wrong, runs, rho, alternative="greater").pvalue > 1e-4


def test_theorem_5_is_not_vacuous():
    """At 10,000 examples and alpha = rho = .001 it costs less than a third of a percent.

    A bound of 0 would pass the test above.
    """
    assert certified_accuracy_lower(7000, 10_000, 0.001, 0.001) > 0.7 - 0.0033
