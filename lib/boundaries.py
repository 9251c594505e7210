"""Group-sequential tests of one probability: tables of boundaries, exact errors, a cache on disk.

Draws come in looks. At look j, after n_j draws in all, a class with at least b_j votes is
certified, and an example whose largest count is at most a_j is abstained on. The null hypothesis is
p <= p_r, the probability that certifies the radius r. Everything here is exact: the distribution of
the count at a look is that at the look before, without what stopped there, convolved with the
binomial distribution of the new draws.
"""

import contextlib
import dataclasses
import functools
import json
import math
import pathlib

import numpy as np
import platformdirs
from scipy.fft import irfft, next_fast_len, rfft
from scipy.special import betaincinv, ndtr
from scipy.stats import binom

from lib.checks import check_draws, check_level
from lib.store.files import sha256, write_atomically

VERSION = 1  # of the design: a table of another version is computed anew
POWER_LOST = 0.98e-3  # against CERTIFY at n draws, at the worst p
SLACK = 1e-12  # what the convolutions may be off by, in probability; left unspent
LEAST_ALPHA = 1e-10  # far enough above SLACK, of which an error may hold two, to leave any draw


@dataclasses.dataclass(frozen=True)
class Boundaries:
    """When to certify and when to abstain: one test of p <= null.

    - null: the probability that certifies the radius.
    - looks: int64 [J], draws at each look; cumulative, or with fresh=True each stage's own.
    - certify: int64 [J]; a count at or above it certifies. looks + 1: never at this look.
    - abstain: int64 [J]; a count at or below it abstains. -1: never at this look.
    - fresh: whether each look counts its own draws only (CERTIFYADP) or all draws so far.
    """

    null: float
    looks: np.ndarray
    certify: np.ndarray
    abstain: np.ndarray
    fresh: bool = False

    @property
    def spent(self):
        """int64 [J]: all draws taken by the end of each look."""
        return np.cumsum(self.looks) if self.fresh else self.looks


# ------------------------------------------------------------------ exact distributions


def _window(n, p):
    """The counts of Binomial(n, p) outside which less than 1e-16 of it lies."""
    # 25 beside the 8.5 standard deviations: near p = 1 the misses are Poisson, with a long tail.
    reach = 8.5 * math.sqrt(n * p * (1 - p)) + 25
    return max(0, math.floor(n * p - reach)), min(n, math.ceil(n * p + reach))


def _steps(n, p):
    """(first count, probabilities) of Binomial(n, p) within its window."""
    low, high = _window(n, p)
    k = np.arange(low, high)
    # By the ratios of neighbours, to 13 digits: the logarithm of a million's factorial has nine.
    log = np.cumsum(np.log((n - k) * p / ((k + 1) * (1 - p)))) if p < 1 else np.full(len(k), 0.0)
    mass = np.exp(np.append(0.0, log) - max(0.0, log.max(initial=0.0)))
    if p == 1:
        mass[:-1] = 0
    return low, mass / mass.sum()


def _convolve(a, b):
    size = next_fast_len(len(a) + len(b) - 1, real=True)
    return np.maximum(irfft(rfft(a, size) * rfft(b, size), size)[: len(a) + len(b) - 1], 0)


def _advance(low, mass, draws, p, n, exact=False):
    """The count's distribution after more draws, cut to the window of all n; (first, mass)."""
    first, steps = _steps(draws, p)
    # Directly where small probabilities must keep their digits, by FFT where 1e-16 does.
    mass, low = (np.convolve if exact else _convolve)(mass, steps), low + first
    bottom, top = _window(n, p)
    start, stop = max(bottom - low, 0), max(top + 1 - low, 1)
    return low + start, mass[start:stop]


def _spend(looks, p, levels):
    """The smallest counts b_j such that P(count >= b_i at some look i <= j) <= levels[j].

    Computed as if nothing stopped below, so that the error stays what it is however early
    others abstain (non-binding futility). n_j + 1 where no count is rare enough.
    """
    low, mass, spent, before = 0, np.ones(1), 0.0, 0
    boundary = np.empty(len(looks), dtype=np.int64)
    for j, n in enumerate(looks):
        low, mass = _advance(low, mass, n - before, p, n)
        tail = np.cumsum(mass[::-1])[::-1]
        fits = tail <= levels[j] - spent - SLACK
        first = int(np.argmax(fits)) if fits.any() else len(mass)
        boundary[j] = low + first if first < len(mass) else min(low + len(mass), n + 1)
        spent += float(tail[first]) if first < len(mass) else 0.0
        mass, before = mass[:first], n
    return boundary


def _stopped(boundaries, p, exact=False):
    """Yields for each look (counts that certify, their mass, counts that abstain, their mass)."""
    low, mass, before = 0, np.ones(1), 0
    for n, b, a in zip(boundaries.looks, boundaries.certify, boundaries.abstain, strict=True):
        low, mass = _advance(low, mass, n - before, p, n, exact)
        before = n
        k = low + np.arange(len(mass))
        up, down = k >= b, k <= a
        yield k[up], mass[up], k[down], mass[down]
        stay = ~(up | down)
        low, mass = (k[stay][0], mass[stay]) if stay.any() else (low, np.zeros(1))


def crossing(boundaries, p):
    """P(certify) at probability p where nobody abstains early: what alpha bounds. Exact to 1e-12.

    Rises with p, because more votes are never fewer (coupling): at p = null it is the type-I error.
    """
    if p <= 0:
        return 0.0
    return sum(mass.sum() for _, mass, _, _ in _stopped(_binding_above(boundaries), p))


def _binding_above(boundaries):
    return dataclasses.replace(boundaries, abstain=np.full(len(boundaries.looks), -1))


def outcomes(boundaries, p):
    """Exact shares of the outcomes of one class of probability p, a chain of its own for each p.

    Returns (certified [P, J], abstained [P, J]), for p of shape [P]: the probability to certify and
    to abstain at each look. Their sum over both is 1.
    """
    p = np.atleast_1d(np.asarray(p, dtype=np.float64))
    if boundaries.fresh:
        up = binom.sf(boundaries.certify - 1, boundaries.looks, p[:, None])
        down = binom.cdf(boundaries.abstain, boundaries.looks, p[:, None])
        left = np.cumprod(1 - up - down, axis=1)
        reached = np.concatenate([np.ones((len(p), 1)), left[:, :-1]], axis=1)
        return up * reached, down * reached
    result = np.zeros((2, len(p), len(boundaries.looks)))
    for i, share in enumerate(p):
        for j, (_, up, _, down) in enumerate(_stopped(boundaries, share, exact=True)):
            result[:, i, j] = up.sum(), down.sum()
    return result[0], result[1]


def reweighted(boundaries, p, around=None):
    """As `outcomes`, for very many p at the cost of one (around: the p of the one chain, null).

    The probability of a path with k hits in n draws is p^k (1 - p)^(n - k) whatever the boundaries,
    so what one p gives, times the ratio of these, is what another p gives. To 1e-9 or so where the
    two agree within some 5 standard errors at the look where p stops. Cumulative looks only.
    """
    if boundaries.fresh:
        return outcomes(boundaries, p)
    p, again = np.unique(np.asarray(p, dtype=np.float64), return_inverse=True)
    base = boundaries.null if around is None else around
    with np.errstate(divide="ignore"):
        hit, miss = np.log(p / base), np.log1p(-p) - np.log1p(-base)
    result = np.zeros((2, len(p), len(boundaries.looks)))
    for j, (up, up_mass, down, down_mass) in enumerate(_stopped(boundaries, base, exact=True)):
        n = boundaries.looks[j]
        for side, k, mass in ((0, up, up_mass), (1, down, down_mass)):
            if len(k):
                with np.errstate(invalid="ignore"):
                    # 0 misses at p = 1: 0 times -inf is 0.
                    log = k * hit[:, None] + np.nan_to_num((n - k) * miss[:, None], nan=0.0)
                result[side, :, j] = np.exp(log) @ mass
    return result[0][again.ravel()], result[1][again.ravel()]


# ------------------------------------------------------------------ designs


def certify_count(null, n, alpha):
    """The fewest of n votes at which CERTIFY certifies: smallest c with P(X >= c | null) <= alpha.

    n + 1 where none does. Found by bisection on the tail itself: scipy's quantile says n for any
    alpha below 5.5e-17.
    """
    null, n = np.broadcast_arrays(null, n)
    low, high = np.zeros(n.shape, dtype=np.int64), n.astype(np.int64) + 1
    while (high - low > 1).any():
        middle = (low + high) // 2
        fits = binom.sf(middle - 1, n, null) <= alpha
        low, high = np.where(fits, low, middle), np.where(fits, middle, high)
    return high[()]


def abstain_count(null, n, beta):
    """The most of n votes that rule p >= null out at level beta: largest a, P(X <= a) <= beta.

    The upper confidence bound of a votes lies at or below null; -1 where none does.
    """
    return n - certify_count(1 - null, n, beta)


def bonferroni(null, stages, alpha, beta):
    """The boundaries of CERTIFYADP: fresh draws, alpha / s at each of s stages, beta / (s - 1).

    Horvath et al. 2022, algorithm 2, lines 6 to 9. The last stage certifies or abstains.
    """
    stages = np.asarray(stages, dtype=np.int64)
    s = len(stages)
    certify = np.array([certify_count(null, n, alpha / s) for n in stages])
    abstain = certify - 1
    abstain[:-1] = [abstain_count(null, n, beta / (s - 1)) for n in stages[:-1]]
    return Boundaries(float(null), stages, certify, np.minimum(abstain, certify - 1), fresh=True)


def looks_until(last, first=100, ratio=1.25):
    """Looks 100, 200, 300, 400, 500, 700, 900, 1200, ..., `last`: each a quarter beyond the last.

    Rounded up to hundreds. int64 [J].
    """
    looks = [first]
    while looks[-1] < last:
        looks.append(math.ceil(looks[-1] * ratio / first) * first)
    return np.array([*(n for n in looks if n < last), last], dtype=np.int64)


def design(null, n, alpha, beta=None, alone=False):
    """The boundaries of a test of p <= null that certifies what CERTIFY would from n draws.

    Guarantee: where every class may cross, P(the likeliest class crosses although its p <= null, or
    any other class crosses) <= alpha; with alone=True the same for one class, fixed beforehand.
    For every p, whatever the early abstentions.

    - null: probability that certifies the radius, in [1/2, 1), or with alone=True in (0, 1).
    - n: draws of the CERTIFY to keep up with. The last look is at 1.35 n (more where that is too
      little), but few examples get there.
    - alpha: one-sided failure probability, in [1e-10, 1).
    - beta: None: abstain as early as costs at most .001 of CERTIFY's power at any p. A probability:
      P(abstain before the last look) <= beta for every p >= null, theorem 6.1's second promise;
      the last look is then at 1.2 n.
    - alone: whether the class is fixed beforehand.

    Computed once (seconds), then loaded from the user's cache: a table whose parameters, checksum
    or exact type-I error are not right is computed anew. Raises ValueError naming null, n, alpha,
    beta, or the radius where even n hits in n draws do not certify it.
    """
    if np.ndim(n):
        raise ValueError(f"n must be one whole number; got {n!r}")
    n, alpha = check_draws(n=n), check_level(alpha=alpha)
    if beta is not None:
        beta = check_level(beta=beta)
    if alpha < LEAST_ALPHA:
        raise ValueError(
            f"alpha must be at least {LEAST_ALPHA}, below which the errors computed are not exact "
            f"enough (a grid of radii spends half of it on each): take a larger one; got {alpha!r}"
        )
    if not (0 if alone else 0.5) <= null < 1 or null == 0:
        raise ValueError(
            "radius must be one that a probability below 1 certifies: null must be in [1/2, 1), or "
            f"with alone=True in (0, 1); got {null!r}"
        )
    if n * math.log(null) > math.log(alpha):
        most = alpha ** (1 / n)
        raise ValueError(
            f"radius must be one that n = {n} hits in as many draws certify at alpha = {alpha}: "
            f"its probability at most {most:.6g}; got {null:.6g}. Take more draws or less radius"
        )
    beta = None if beta is None else float(beta)
    return _cached(float(null), int(n), float(alpha), beta, bool(alone))


@functools.lru_cache(maxsize=256)
def _cached(null, n, alpha, beta, alone):
    settings = {"null": null, "n": n, "alpha": alpha, "beta": beta, "alone": alone}
    settings["version"] = VERSION
    text = json.dumps(settings, sort_keys=True)
    folder = pathlib.Path(platformdirs.user_cache_dir("randomized-smoothing"))
    path = folder / f"boundaries-{sha256(text.encode())[:20]}.json"
    found = load_table(path, settings)
    if found is None:
        found = compute(null, n, alpha, beta, alone)
        with contextlib.suppress(OSError):  # a read-only home: computed again next time
            save_table(path, settings, found)
    return found


def save_table(path, settings, boundaries):
    """Write boundaries with what they were designed for and a checksum, whole or not at all."""
    table = {name: getattr(boundaries, name).tolist() for name in ("looks", "certify", "abstain")}
    body = json.dumps(settings | table, sort_keys=True)
    write_atomically(path, json.dumps({"sha256": sha256(body.encode()), "table": body}).encode())


def load_table(path, settings):
    """The boundaries that `save_table` wrote for these settings, or None where they do not hold.

    Refused are another file, other settings, a changed byte, and a table whose type-I error,
    computed here anew, is above alpha.
    """
    try:
        stored = json.loads(path.read_text())
        table = json.loads(stored["table"])
        if sha256(stored["table"].encode()) != stored["sha256"]:
            return None
        if any(table[name] != value for name, value in settings.items()):
            return None
        arrays = [np.array(table[name], np.int64) for name in ("looks", "certify", "abstain")]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    found = Boundaries(settings["null"], *arrays)
    return found if error(found, settings["alone"]) <= settings["alpha"] else None


def error(boundaries, alone=False):
    """The exact type-I error at the worst truth: two classes of p = null and 1 - null, any crosses.

    With more classes, or a smaller p, it is less: the chance to cross is 0 at p = 0, and convex up
    to null. (A path of S hits in n has p^S (1 - p)^(n - S), whose second derivative has the sign of
    S (S - 1) - 2 p S (n - 1) + p^2 n (n - 1), positive at every S that crosses at a small alpha.)
    alone: that of one class fixed beforehand, at p = null.
    """
    p = boundaries.null
    if alone:
        return crossing(boundaries, p) + SLACK
    # The other class crosses early or, by the union over the late looks, hardly ever.
    late = np.cumsum(binom.sf(boundaries.certify - 1, boundaries.looks, 1 - p)[::-1])[::-1]
    early = int((late > SLACK).sum())
    arrays = (boundaries.looks, boundaries.certify, boundaries.abstain)
    other = crossing(Boundaries(p, *(part[:early] for part in arrays)), 1 - p) + SLACK
    return crossing(boundaries, p) + other + SLACK


def compute(null, n, alpha, beta=None, alone=False):
    """As `design`, without the cache and the checks."""
    cap = 1.35 if beta is None else 1.2
    while cap < 2:
        found = _at_level(null, n, alpha, beta, alone, math.ceil(cap * n - 1e-9))
        if found is not None:
            return found
        cap += 0.05
    raise ValueError(
        f"n must be larger for a design at null = {null:.6g} and alpha = {alpha}; got {n}: take "
        "more draws"
    )


def _at_level(null, n, alpha, beta, alone, last):
    """The design with this last look; None where it loses too much power."""
    looks = looks_until(last)
    share = looks / last
    level = alpha
    while True:
        certify = _spend(looks, null, level * (share if beta is None else share**0.7))
        found = Boundaries(null, looks, certify, np.full(len(looks), -1))
        total = error(found, alone)
        if total <= alpha:
            break
        # Near p = 1/2 the other class has its chances, too: both together get alpha.
        level *= 0.999 * alpha / total
    certify[certify > looks] = looks[certify > looks] + 1
    if certify[-1] > last:
        return None
    if beta is not None:
        return _with_abstentions(found, null, beta, share**0.5)
    # Near p = 1/2 the CERTIFY to keep up with has this level, too: its class is chosen by draws,
    # so that each of two classes errs with half of alpha. That CERTIFY may never certify.
    if certify_count(null, n, level) > n:
        return None
    return _least_power_lost(found, n, level, share)


def _with_abstentions(boundaries, p, beta, share):
    """The boundaries with early abstention: P(abstain by look j | p) <= beta share_j."""
    looks = boundaries.looks
    # The mirror image: few hits are many misses.
    abstain = looks - _spend(looks, 1 - p, beta * share)
    abstain = np.minimum(abstain, boundaries.certify - 1)
    abstain[-1] = boundaries.certify[-1] - 1
    return dataclasses.replace(boundaries, abstain=abstain)


def _least_power_lost(boundaries, n, alpha, share):
    """T2's abstentions: as much beta as loses POWER_LOST against CERTIFY(n), by bisection."""
    needed = certify_count(boundaries.null, n, alpha)
    powers = ndtr(np.linspace(-3.2, 4.6, 53))
    p = betaincinv(needed, n - needed + 1, powers)
    likely = betaincinv(needed, n - needed + 1, 0.992)
    shape = share**0.4

    def lost(found):
        # A chain of its own for each third: far from its p the reweighting would lose digits.
        certified = [
            reweighted(found, part, around=float(part[len(part) // 2]))[0].sum(axis=1)
            for part in np.array_split(p, 3)
        ]
        return float((powers - np.concatenate(certified)).max())

    last = np.full(len(share), -1)
    last[-1] = boundaries.certify[-1] - 1
    best = dataclasses.replace(boundaries, abstain=last)
    if lost(best) > POWER_LOST:
        return None
    low, high = math.log(1e-7), math.log(0.05)
    while high - low > 0.02:
        middle = (low + high) / 2
        found = _with_abstentions(boundaries, likely, math.exp(middle), shape)
        if lost(found) <= POWER_LOST:
            low, best = middle, found
        else:
            high = middle
    return best


def two_classes(boundaries, p):
    """Exact shares of the outcomes where two classes of p and 1 - p may both cross.

    Returns (first certified [J], second certified [J], abstained [J]), the probabilities at each
    look, early abstentions included. Cumulative looks only.
    """
    low, mass, before = 0, np.ones(1), 0
    shares = np.zeros((3, len(boundaries.looks)))
    limits = zip(boundaries.looks, boundaries.certify, boundaries.abstain, strict=True)
    for j, (n, b, a) in enumerate(limits):
        low, mass = _advance(low, mass, n - before, p, n)
        before = n
        k = low + np.arange(len(mass))
        first, second = k >= b, n - k >= b
        out = ~first & ~second & (np.maximum(k, n - k) <= a)
        shares[:, j] = mass[first].sum(), mass[second].sum(), mass[out].sum()
        # Both ends may stop and the middle, too: what stays keeps its place.
        mass = np.where(first | second | out, 0.0, mass)
    return shares


def stopped(looks, certify, p):
    """Yields (look, counts that stop there, their mass) for gates: go on at or above `certify`.

    For the staircase: looks int64 [m], gates int64 [m - 1]; at the last look all stop.
    """
    low, mass, before = 0, np.ones(1), 0
    for j, n in enumerate(looks):
        low, mass = _advance(low, mass, n - before, p, n)
        before = n
        k = low + np.arange(len(mass))
        stop = k < certify[j] if j < len(certify) else np.ones(len(k), dtype=bool)
        yield n, k[stop], mass[stop]
        if stop.all():
            return
        low, mass = k[~stop][0], mass[~stop]
