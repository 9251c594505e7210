"""Samplers that stop when they know whether a radius given beforehand holds.

`certify_at` (Horvath et al. 2022, algorithm 2: fresh draws at each of a few stages) and
`certify_anytime` (group-sequential boundaries: no draw thrown away, several times fewer of them).
One loop, `_follow`, serves both; their boundaries are data (`lib.boundaries`).
"""

import itertools

import numpy as np
import pandas as pd
from scipy.special import ndtr, ndtri

from lib.boundaries import bonferroni, crossing, design
from lib.certify import ABSTAIN, Certificates, choose_class
from lib.checks import check_draws, check_level, check_noise, check_numbers


def last_stage_size(n, alpha, s):
    """The draws that the last of s stages needs to certify every radius that CERTIFY(n) can.

    ceil(n (1 - log_alpha s)): all of them hits, at level alpha / s, bound the probability by
    (alpha / s)^(1 / n_s), which is CERTIFY's alpha^(1 / n) there (Horvath et al. 2022, theorem
    6.1.3). 120,069 at n = 100,000, alpha = .001, s = 4. Raises ValueError naming the argument.
    """
    (n, s), alpha = check_draws(n=n, s=s), check_level(alpha=alpha)
    return int(np.ceil(n * (1 - np.log(s) / np.log(alpha))))


def _follow(counts, tests, alive, chosen=None):
    """Draw, look by look, until for each example the tests of rising radii are decided in turn.

    - counts: source of votes for B examples.
    - tests: Boundaries of each radius, on one stream of draws.
    - alive: bool [B], the examples to follow; the others are not drawn from.
    - chosen: int64 [B], the class to count, or None: whichever has the most votes.

    Returns (passed int64 [B]: how many of the tests, in order, certified; class int64 [B];
    draws int64 [B]). An example stops as soon as its first test that has not certified cannot.
    """
    size, at = len(counts), np.arange(len(counts))
    state = np.zeros((len(tests), size), dtype=np.int8)  # 1 certified, 2 abstained
    winner = np.full((len(tests), size), ABSTAIN, dtype=np.int64)
    votes, drawn = np.zeros((size, counts.classes), dtype=np.int64), np.zeros(size, dtype=np.int64)
    fresh, before, alive = tests[0].fresh, 0, alive.copy()
    for look in np.unique(np.concatenate([test.looks for test in tests])):
        if not alive.any():
            break
        more = int(look if fresh else look - before)
        new = counts.draw(np.where(alive, more, 0))
        votes, before = new if fresh else votes + new, look
        drawn += more * alive
        top = votes.argmax(axis=1) if chosen is None else chosen
        most = votes[at, top]
        for i, test in enumerate(tests):
            j = np.searchsorted(test.looks, look)
            if j < len(test.looks) and test.looks[j] == look:
                open_ = alive & (state[i] == 0)
                up, down = open_ & (most >= test.certify[j]), open_ & (most <= test.abstain[j])
                state[i, up], winner[i, up], state[i, down] = 1, top[up], 2
        passed = _in_turn(state, winner)
        alive &= (passed < len(tests)) & (state[np.minimum(passed, len(tests) - 1), at] == 0)
    return passed, winner[0], drawn


def _in_turn(state, winner):
    """How many tests, from the first on, certified one and the same class."""
    return np.cumprod((state == 1) & (winner == winner[0]), axis=0).sum(axis=0)


def _nulls(noise, radii, size):
    """The probabilities float64 [R, B] that certify each radius for each example."""
    return np.stack([np.broadcast_to(noise.probability(r), size) for r in radii])


def _check_radius(radius, noise):
    radii = np.atleast_1d(check_numbers(radius, "radius", "iuf"))
    if radii.ndim != 1 or not len(radii) or not (radii >= 0).all() or (np.diff(radii) <= 0).any():
        raise ValueError(
            "radius must be a number >= 0, or several of them rising, in the noise's units "
            f"(Gaussian: l2, pixels in [0, 1]); got {radius!r}"
        )
    # Rounded to 1, a probability is reached by no bound.
    if np.all(noise.probability(radii[-1]) >= 1):
        most = np.floor(1e4 * np.max(noise.radius(np.nextafter(1.0, 0.0)))) / 1e4
        raise ValueError(
            "radius must be one that a probability below 1 certifies, under this noise at most "
            f"{most:g}; got {radii[-1]:g}"
        )
    return radii


def _at_radii(counts, noise, radii, tests_of, chosen=None, spent=0):
    """Certificates at radii, by tests_of(nulls of one kind of example) -> list of Boundaries."""
    nulls = _nulls(noise, radii, len(counts))
    passed, winner, drawn = (np.zeros(len(counts), dtype=np.int64) for _ in range(3))
    for kind in np.unique(nulls, axis=1).T:
        alive = (nulls == kind[:, None]).all(axis=0)
        if not (tests := tests_of(kind)):
            continue
        found = _follow(counts, tests, alive, chosen)
        for all_, part in zip((passed, winner, drawn), found, strict=True):
            all_[alive] = part[alive]
    certain, best = passed > 0, np.maximum(passed - 1, 0)
    return Certificates(
        prediction=np.where(certain, winner, ABSTAIN),
        radius=np.where(certain, radii[best], 0.0),
        p_lower=np.where(certain, nulls[best, np.arange(len(counts))], 0.0),
        n=drawn + spent,
    )


def certify_at(counts, noise, radius, stages, alpha, beta, n0=100, prediction=None):
    """CERTIFYADP: certify one radius in stages of fresh draws (Horvath et al. 2022, algorithm 2).

    n0 draws choose the class. Stage i takes n_i fresh draws and certifies where their lower
    confidence bound at alpha / s reaches the radius, abstains where their upper bound at
    beta / (s - 1) does not, and goes on otherwise; the last stage certifies or abstains.

    Guarantee (theorem 6.1): for each example,
    1. with probability >= 1 - alpha, either it is abstained on or the smoothed classifier returns
       the given class on the open ball of this radius: each of s bounds fails with alpha / s;
    2. where the class's probability suffices for the radius, the probability to abstain before the
       last stage is <= beta;
    3. with stages[-1] >= last_stage_size(n, alpha, s) every radius that CERTIFY(n) can reach can be
       certified.
    The union bound is not used up: with stages (100, 1000, 10_000, 120_000) and alpha = 0.001 the
    error at the worst p is .91 / .54 / .38 alpha at a radius of 1 / 2 / 3 sigma.

    - counts: source of votes for B examples.
    - noise: smoothing distribution, in whose norm and units the radius is.
    - radius: number >= 0, the one to certify; a certificate holds exactly it.
    - stages: rising draws of each stage, such as (100, 1000, 10_000, 120_000).
    - alpha: one-sided failure probability per example, in (0, 1).
    - beta: failure probability of an early abstention, in (0, 1).
    - n0: draws that choose the class.
    - prediction: int [B], classes chosen beforehand, independently of these draws (of a source of
      another seed); n0 must be 0.

    Returns Certificates of B examples; `stage_shares` counts who left at which stage. Raises
    ValueError naming radius, stages, alpha, beta, n0, prediction or noise.
    """
    stages = _check_stages(stages)
    alpha, beta = check_level(alpha=alpha, beta=beta)
    check_noise(counts, noise)
    if np.ndim(radius):
        raise ValueError(f"radius must be one number; got {radius!r}. A grid: certify_anytime")
    radii = _check_radius(radius, noise)
    chosen = choose_class(counts, n0, prediction)

    def tests_of(kind):
        return [bonferroni(kind[0], stages, alpha, beta)]

    return _at_radii(counts, noise, radii, tests_of, chosen, n0)


def _check_stages(stages):
    stages = np.atleast_1d(check_draws(stages=stages))
    if stages.ndim != 1 or (np.diff(stages) <= 0).any():
        raise ValueError(f"stages must rise, such as (100, 1000, 10_000); got {stages.tolist()}")
    return stages


def stage_shares(certificates, spent):
    """The counters of Horvath et al.: the percentage of examples that left at each stage.

    - certificates: of B examples, by `certify_at` or `certify_anytime`.
    - spent: rising draws at the end of each stage, selection draws included
      (n0 + np.cumsum(stages)).

    Returns a DataFrame, one row per stage: draws, ASA (abstained), ASC (certified), ASR (returned,
    their sum), in percent of all examples. Raises ValueError where an example's draws are no
    stage's.
    """
    spent = np.asarray(spent)
    at = np.searchsorted(spent, certificates.n)
    if (at == len(spent)).any() or (spent[at] != certificates.n).any():
        raise ValueError(f"spent must list all draws at the end of every stage; got {spent}")
    certain = certificates.prediction != ABSTAIN
    shares = [np.bincount(at[who], minlength=len(spent)) for who in (~certain, certain)]
    asa, asc = (100 * share / len(certificates) for share in shares)
    return pd.DataFrame({"draws": spent, "ASA": asa, "ASC": asc, "ASR": asa + asc})


def certify_anytime(counts, noise, radius, n, alpha, beta=None, runner_up=False, n0=100):
    """Certify one radius, or the largest of a grid, from one stream of draws in few looks.

    A group-sequential test of p <= p_r, the probability that certifies the radius r, at cumulative
    draws 100, 200, 300, 400, 500, 700, 900, 1200, ...: at each look a class with enough votes is
    certified, an example whose largest count is too low is abstained on, and alpha is spent exactly
    (`lib.boundaries.design`). No selection draws are needed: any class may cross.

    Guarantee: for each example, with probability >= 1 - alpha over the draws, either it is
    abstained on or the smoothed classifier returns the given class on the open ball of the given
    radius. The boundary is such that a class of probability p_r crosses it at any look with
    probability <= alpha even if nobody abstained; crossing rises with p; and that another class
    crosses is counted in.
    Against CERTIFY(n): at every p certified with a probability at most .001 lower, for several
    times fewer draws than CERTIFYADP takes.

    A grid of radii is tested in turn, smallest first, each at full alpha, on the same stream
    (fixed-sequence testing): to certify any false radius, the smallest false one must be certified,
    which has probability <= alpha.

    - counts: source of votes for B examples; 1.35 n draws of an example are taken at most, for the
      smallest n up to 2 n.
    - noise: smoothing distribution, in whose norm and units the radius is.
    - radius: number >= 0, or rising numbers [R]: a certificate holds the largest certified.
    - n: draws of the CERTIFY to keep up with.
    - alpha: one-sided failure probability per example, in (0, 1).
    - beta: None: abstain as early as power allows. A probability: also keep theorem 6.1's second
      promise, that where the class's probability suffices, the probability to abstain before the
      last look is <= beta (more draws).
    - runner_up: count the second class, too, where the noise has a radius of two probabilities: see
      `_certify_pair`. One radius only; n0 selection draws.
    - n0: draws that choose the class, with runner_up alone.

    Returns Certificates of B examples. Raises ValueError naming the argument, also where not even n
    hits in n draws certify a radius. Each table is computed once for (p_r, n, alpha, beta) and then
    loaded from a cache; noise of many levels means many tables, one of each.
    """
    n, alpha = check_draws(n=n), check_level(alpha=alpha)
    check_noise(counts, noise)
    radii = _check_radius(radius, noise)
    if runner_up:
        if len(radii) > 1 or beta is not None:
            raise ValueError("runner_up takes one radius, and no beta")
        return _certify_pair(counts, noise, float(radii[0]), n, alpha, n0)
    nulls = _nulls(noise, radii, len(counts))
    # Where levels differ, an example abstains undrawn from a radius that n hits do not certify.
    some = noise.size is not None and (n * np.log(nulls[0]) <= np.log(alpha)).any()

    def tests_of(kind):
        return _grid(kind[n * np.log(kind) <= np.log(alpha)] if some else kind, n, alpha, beta)

    return _at_radii(counts, noise, radii, tests_of)


def _grid(nulls, n, alpha, beta):
    """The tests of rising radii on one stream, each with a total error <= alpha."""
    tests = [design(null, n, alpha, beta) for null in nulls[:1]]
    for low, null in itertools.pairwise(nulls):
        level = alpha
        while True:
            test = design(null, n, level, beta)
            # The radii below are true: p of the first class is in [low, null]. It crosses this
            # boundary, or another class crosses the first radius's, each less likely than at an
            # end of each of eight parts.
            ends = np.linspace(low, null, 9)
            worst = max(
                crossing(test, up) + crossing(tests[0], 1 - down)
                for down, up in itertools.pairwise(ends)
            )
            if worst <= alpha:
                break
            level *= 0.999 * alpha / worst
        tests.append(test)
    return tests


# ------------------------------------------------------------------ counting the runner-up


def _certify_pair(counts, noise, radius, n, alpha, n0):
    """`certify_anytime` with the runner-up: two tests on one stream, for one point (a, b).

    The radius is certified by p_A >= a and p_B <= b for any point of the curve
    radius_two(a, b) = r. The selection draws choose class A and a point of a fixed set; then one
    test of p_A <= a counts A, and its mirror image, of p_B >= b, the largest count of all others.
    Both must cross, each at full alpha.

    Why it is sound: let B be the truly likeliest other class, which no draw chooses. Where the
    radius does not hold, p_A <= a or p_B >= b (the radius rises with p_A and falls with p_B). In
    the first case the first test errs, in the second the second, as the largest other count is at
    least B's: each with probability <= alpha, and a certificate needs both. So their union is never
    paid for (an intersection-union test), nor is one over classes.
    """
    n0 = check_draws(n0=n0)
    if not hasattr(noise, "radius_two") or np.ndim(getattr(noise, "level", 0.0)):
        raise ValueError(
            f"noise must have a radius of two probabilities (radius_two) and one level; got {noise}"
        )
    points = probability_pairs(noise, radius, n, alpha)
    first = counts.draw(n0)
    chosen, which = first.argmax(axis=1), _nearest(points, first, n0)
    size = len(counts)
    certain, drawn = np.zeros(size, dtype=bool), np.full(size, n0, dtype=np.int64)
    for i in np.unique(which):
        mine = which == i
        crossed, spent = _follow_pair(counts, _pair_tests(points[i], n, alpha), mine, chosen)
        certain |= crossed
        drawn += spent
    return Certificates(
        prediction=np.where(certain, chosen, ABSTAIN),
        radius=np.where(certain, radius, 0.0),
        p_lower=np.where(certain, points[which, 0], 0.0),
        n=drawn,
    )


def probability_pairs(noise, radius, n, alpha, step=0.125):
    """Points (a, b) with radius_two(a, b) >= radius, float64 [P, 2]: the first has b = 1 - a.

    From there a falls in steps of `step` standard normal quantiles, b with it, as long as n draws
    could show p_B <= b.
    """
    top = ndtri(noise.probability(radius))
    points = []
    for below in np.arange(40) * step:
        a = float(noise.probability(radius) if below == 0 else ndtr(top - below))
        b = 1 - a if below == 0 else _largest_b(noise, radius, a)
        # Fewer votes could not show p_B <= b, at this alpha none at all.
        if b * n < max(20, -1.1 * np.log(alpha)) or a <= b:
            break
        points.append((a, b))
    if not points:
        points = [(float(noise.probability(radius)), 1 - float(noise.probability(radius)))]
    return np.array(points)


def _largest_b(noise, radius, a):
    """The largest b with radius_two(a, b) >= radius, by bisection from below."""
    low, high = 0.0, min(a, 1 - a)
    for _ in range(100):
        middle = (low + high) / 2
        reaches = middle > 0 and noise.radius_two(a, middle) >= radius
        low, high = (middle, high) if reaches or middle == 0 else (low, middle)
    return low


def _nearest(points, first, n0):
    """The point that each example's selection counts clear by the most standard errors."""
    ordered = np.sort(first, axis=1)
    # Half a vote more or less: a share of 0 or 1 is not known to be.
    p_a = (ordered[:, -1] - 0.5) / n0
    p_b = ((ordered[:, -2] if first.shape[1] > 1 else 0) + 0.5) / n0
    a, b = points[:, 0], points[:, 1]
    clear_a = (p_a[:, None] - a) / np.sqrt(a * (1 - a))
    clear_b = (b - p_b[:, None]) / np.sqrt(b * (1 - b))
    # At the first point 1 - p_A bounds p_B, and A's test alone decides.
    clear_b[:, 0] = np.inf
    return np.minimum(clear_a, clear_b).argmax(axis=1)


def _pair_tests(point, n, alpha):
    a, b = float(point[0]), float(point[1])
    mine = design(a, n, alpha, alone=True)
    return (mine,) if a + b == 1 else (mine, design(1 - b, n, alpha, alone=True))


def _follow_pair(counts, tests, alive, chosen):
    """(certified bool [B], draws int64 [B]) of two tests on one stream, for the examples alive."""
    size, at = len(counts), np.arange(len(counts))
    state = np.zeros((len(tests), size), dtype=np.int8)
    votes, drawn = np.zeros((size, counts.classes), dtype=np.int64), np.zeros(size, dtype=np.int64)
    before, mine, alive = 0, alive, alive.copy()
    for look in np.unique(np.concatenate([test.looks for test in tests])):
        if not alive.any():
            break
        votes = votes + counts.draw(np.where(alive, look - before, 0))
        drawn += (look - before) * alive
        before = look
        others = votes.copy()
        others[at, chosen] = 0
        # The second test counts the draws that missed the likeliest other class.
        for i, hits in enumerate((votes[at, chosen], look - others.max(axis=1))[: len(tests)]):
            j = np.searchsorted(tests[i].looks, look)
            if j < len(tests[i].looks) and tests[i].looks[j] == look:
                open_ = alive & (state[i] == 0)
                up, down = hits >= tests[i].certify[j], hits <= tests[i].abstain[j]
                state[i, open_ & up], state[i, open_ & down] = 1, 2
        alive &= (state != 2).all(axis=0) & (state == 0).any(axis=0)
    return mine & (state == 1).all(axis=0), drawn
