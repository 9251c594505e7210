"""Binomial statistics, vectorised in float64: the bounds and tests under every certificate."""

import numpy as np
from scipy.special import betainc, betaincinv

from lib.checks import MOST_DRAWS, check_level, check_numbers


def _check_counts(k, n):
    k, n = np.broadcast_arrays(check_numbers(k, "k"), check_numbers(n, "n"))
    good = np.isfinite(n) & (n >= 1)
    if not good.all():
        raise ValueError(f"n must be at least 1 draw everywhere, and finite; got {n[~good][0]}")
    if (n > MOST_DRAWS).any():
        raise ValueError(
            f"n must be at most {MOST_DRAWS:.0e} draws, up to which the bounds are checked; "
            f"got {n.max()}"
        )
    good = (k >= 0) & (k <= n)
    if not good.all():
        raise ValueError(
            "k must satisfy 0 <= k <= n everywhere (k successes among n draws), not NaN; "
            f"got k = {k[~good][0]}, n = {n[~good][0]}"
        )
    return k, n


def _bisect_down(k, n, alpha):
    """The largest double p whose computed tail P(X >= k | n, p) is at most alpha."""
    # Doubles >= 0 are ordered as their bits are: 62 halvings of the integers reach each of them.
    low, high = np.zeros(k.shape, dtype=np.int64), np.full(k.shape, np.ones(1).view(np.int64)[0])
    for _ in range(62):
        middle = (low + high) // 2
        below = betainc(k, n - k + 1, middle.view(np.float64)) <= alpha
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return low.view(np.float64)


def clopper_pearson_lower(k, n, alpha):
    """One-sided lower confidence bound of a binomial probability (Clopper & Pearson 1934).

    Guarantee: P(bound > p) <= alpha for every p, over k ~ Binomial(n, p). The bound solves
    P(X >= k | n, bound) = alpha, that is I_bound(k, n - k + 1) = alpha; it is 0 at k = 0 and
    alpha^(1/n) at k = n. It is LOWERCONFBOUND of Cohen et al. 2019, appendix C.

    - k, n: successes and draws, broadcast against each other; n from 1 to 1e10. k may be real
      (Chen et al. 2022, definition 1).
    - alpha: one-sided failure probability, in [1e-200, 1).

    Returns a float64 array (a float for scalars), never NaN and never too high. scipy's betaincinv
    returns wrong quantiles for some parameters (n = 43,290, k = 42,291, alpha = .001 gives .937
    instead of .975). Every value is therefore put back into betainc; where it does not solve the
    equation it is replaced by bisection, rounding down. betainc itself errs by less than 1 part in
    1e10 (against 40-digit arithmetic, n to 1e10, alpha from 1e-200), which is left as a margin.
    Raises ValueError naming k, n or alpha.
    """
    alpha = check_level(alpha=alpha)
    if alpha < 1e-200:
        raise ValueError(
            "alpha must be at least 1e-200, where the binomial tail is still computed to 10 "
            f"digits; got {alpha!r}"
        )
    k, n = _check_counts(k, n)
    # Counts of many examples repeat: each pair is solved once.
    key = k if (n == n.flat[:1]).all() else k + 1j * n
    _, first, where = np.unique(key, return_index=True, return_inverse=True)
    return _solve_lower(k.ravel()[first], n.ravel()[first], alpha)[where].reshape(k.shape)[()]


def _solve_lower(k, n, alpha):
    # Where k = 0 the bound is 0 and no equation is solved; k = 1 keeps scipy's arguments legal.
    a = np.where(k > 0, k, 1.0)
    target = alpha * (1 - 1e-10)
    # One part in 1e13 below the root costs next to no radius, and rounding rarely leaves the bound
    # above the root, where a bisection would be due.
    bound = betaincinv(a, n - a + 1, target) * (1 - 1e-13)
    tail = betainc(a, n - a + 1, bound)
    wrong = ~((tail <= target) & (tail >= alpha * (1 - 1e-6)))
    if wrong.any():
        bound[wrong] = _bisect_down(a[wrong], n[wrong], target)
    # k = n in closed form; exponent and result are lowered by more than the logarithm, the
    # quotient and the exponential are rounded.
    bound = np.where(k == n, np.exp(np.log(alpha) / n * (1 + 1e-15)) * (1 - 1e-15), bound)
    return np.where(k > 0, bound, 0.0)


def clopper_pearson_upper(k, n, alpha):
    """One-sided upper confidence bound: P(bound < p) <= alpha for every p, never too low.

    The mirror image of `clopper_pearson_lower`, in which successes become failures, with the same
    arguments, errors and source. It is 1 at k = n, and tight to 1e-12 (absolute).
    """
    k, n = _check_counts(k, n)
    return np.minimum(1.0, 1.0 - clopper_pearson_lower(n - k, n, alpha) + 1e-16)[()]


def top_class_pvalue(n_a, n_b):
    """p-value of the test that the class with the most votes is the top class.

    The two-sided exact test of n_a ~ Binomial(n_a + n_b, 1/2). Reject at p-value <= alpha: the
    probability of naming a wrong class is then at most alpha, over the draws (Hung & Fithian
    2019; BINOMPVALUE of Cohen et al. 2019, appendix C).

    - n_a, n_b: the two largest class counts, n_a >= n_b; arrays broadcast.

    Returns float64 in (0, 1]; 1 without any votes. Raises ValueError naming n_a and n_b.
    """
    n_a, n_b = np.broadcast_arrays(check_numbers(n_a, "n_a"), check_numbers(n_b, "n_b"))
    good = (n_a >= n_b) & (n_b >= 0) & np.isfinite(n_a)
    if not good.all():
        raise ValueError(
            "n_a and n_b must be the largest and second-largest class counts, n_a >= n_b >= 0, "
            f"finite; got n_a = {n_a[~good][0]}, n_b = {n_b[~good][0]}"
        )
    # P(X >= n_a | n_a + n_b, 1/2) = I_{1/2}(n_a, n_b + 1).
    tail = betainc(np.maximum(n_a, 1), n_b + 1, 0.5)
    return np.where(n_a > 0, np.minimum(1.0, 2 * tail), 1.0)[()]


def certified_accuracy_lower(y, m, alpha, rho):
    """Lower bound of the true certified accuracy (Cohen et al. 2019, theorem 5, equation 16).

    Guarantee: with probability >= 1 - rho over CERTIFY's draws, the certified accuracy of the
    smoothed classifier on the m examples is at least this, pointwise in the radius.

    - y: number of examples that were certified correctly, a whole number 0 .. m; may be an array.
    - m: number of examples, a whole number.
    - alpha: failure probability of each certificate, at most 1/2.
    - rho: failure probability of this bound, in (0, 1).

    Returns fractions in [0, 1]. Raises ValueError naming y, m, alpha or rho.
    """
    alpha, rho = check_level(alpha=alpha, rho=rho)
    if alpha > 0.5:
        raise ValueError(
            f"alpha must be at most 1/2 for theorem 5 (its variance bound needs it); got {alpha!r}"
        )
    y, m = _check_examples(y, m)
    log = np.log(1 / rho)
    slack = alpha + np.sqrt(2 * alpha * (1 - alpha) * log / m) + log / (3 * m)
    return np.maximum(0.0, (y / m - slack) / (1 - alpha))[()]


def _check_examples(y, m):
    y, m = check_numbers(y, "y"), check_numbers(m, "m")
    if not ((m >= 1) & (y >= 0) & (y <= m)).all() or (y % 1).any() or (m % 1).any():
        raise ValueError(
            "y must be the number of correctly certified examples among m: whole numbers, "
            f"0 <= y <= m, m >= 1 (of a share: np.round(share * m)); got y = {y}, m = {m}"
        )
    return y, m
