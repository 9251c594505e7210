"""A sampler of the largest radius that stops where more draws would hardly raise it."""

import numpy as np
from scipy.special import ndtri

from lib.boundaries import stopped
from lib.bounds import clopper_pearson_lower
from lib.certify import Certificates, choose_class, votes_for
from lib.checks import check_choice, check_draws, check_level, check_noise

LOOKS = 40  # with fewer draws than that, at each of them
AIMS = ("acr", "radius")  # the mean radius of right images, or of all


def check_looks(n, looks):
    """The draws of the last look, and how many looks at them: two numbers, looks at most n."""
    n, looks = check_draws(n=n, looks=looks)
    if np.ndim(n):
        raise ValueError(f"n must be one whole number, the draws of the last look; got {n!r}")
    if np.ndim(looks) or looks > max(n, LOOKS):
        raise ValueError(f"looks must be one whole number, at most n = {n}; got {looks}")
    return n, looks


def staircase(n, alpha, price=0.3, looks=LOOKS, aim="acr"):
    """The looks and gates of `certify_staircase`: int64 [m] and int64 [m - 1].

    Looks: geometric from n / 200 to n. Gate j is the smallest count k from which it pays to go on:
    where the best of w (z(k n_i / n_j; n_i) - z(k; n_j)) - price (n_i - n_j) / n over the later
    looks i is above 0. That is the gain of radius in units of sigma if the rate of hits stayed,
    less the price of the draws. z(k; n) = Phi^-1(clopper_pearson_lower(k, n, alpha)), at least 0.

    - aim: "radius" for the mean radius of all images: w = 1. "acr" for that of the rightly
      classified alone, with 0 for the others: w is the probability that the class is right, taken
      as .4 + .15 Phi^-1(k / n_j), at most 1. This line fits a ResNet-110 on CIFAR-10 (twelve
      published logs pooled: .38 near p = 1/2, .57 at .83, .77 at .985, .96 near 1).
    """
    n, looks = check_looks(n, looks)
    alpha = check_level(alpha=alpha)
    check_choice(AIMS, aim=aim)
    if not np.isscalar(price) or not 0 <= price < np.inf:
        raise ValueError(f"price must be a finite price >= 0, such as 0.3; got {price!r}")
    sizes = np.unique(np.round(n / 200 ** (1 - np.arange(looks) / max(looks - 1, 1))).astype(int))
    sizes[-1] = n  # also where there is one look alone
    sizes = sizes[sizes >= 1]

    def z(k, m):
        return np.maximum(ndtri(clopper_pearson_lower(k, m, alpha)), 0.0)

    gates = np.empty(len(sizes) - 1, dtype=np.int64)
    for j, size in enumerate(sizes[:-1]):
        later = sizes[j + 1 :]
        low, high = -1, size + 1  # stop at low, go on from high
        while high - low > 1:
            k = (low + high) // 2
            right = np.clip(0.4 + 0.15 * ndtri(k / size), 0, 1) if aim == "acr" else 1.0
            gain = right * (z(k / size * later, later) - z(k, size))
            go = (gain > price * (later - size) / n).any()
            low, high = (low, k) if go else (k, high)
        gates[j] = high
    return sizes, gates


def certify_staircase(
    counts, noise, n0, n, alpha, price=0.3, looks=LOOKS, aim="acr", prediction=None
):
    """The largest radius, with few draws where more would hardly raise it: looks with gates.

    n0 draws choose the class; looks n_1 < ... < n_m = n and a gate for each but the last are fixed
    (`staircase`). At look j the count k_j of all fresh draws so far is compared with its gate: at
    or above it goes on, below it stops. The bound returned is max(Q_{j-1}, CPlower(k_j, n_j,
    alpha)), where q_i = CPlower(gate_i, n_i, alpha) and Q_j = max(q_1 .. q_j): at full alpha, with
    no correction for the looks.

    Guarantee: for each example, with probability >= 1 - alpha over the draws, either it is
    abstained on or the smoothed classifier returns the given class on the open ball of the given
    radius. Why: let p_A lie in [Q_{i-1}, Q_i). A bound returned at a look j before i comes from a
    count below the gate, so CPlower < q_j <= Q_{i-1} <= p_A: true. A return after look i needs
    k_i >= gate_i, so CPlower(k_i, n_i, alpha) >= q_i = Q_i > p_A; a false one at look i needs
    CPlower(k_i, n_i, alpha) > p_A. Both lie in the one event {CPlower(k_i, n_i, alpha) > p_A}, of
    probability <= alpha. Where p_A >= Q_{m-1}, the same holds with the last look. A run cut short
    after gate j may return Q_j.

    - counts: source of votes for B examples; at most n0 + n draws of each are taken.
    - noise: smoothing distribution; its norm and units are the radius's.
    - n0: draws that choose the class. n: draws of the last look.
    - alpha: one-sided failure probability per example, in (0, 1).
    - price: price of n draws in units of radius / sigma: a larger one saves draws and loses radius.
    - looks: how many, at most n. Images that are always hit all stop at one look, so that few looks
      leave few choices of their draws: 12 looks take up to 4% more draws than 40 at equal ACR.
    - aim: "acr" or "radius", what the gates save draws for (`staircase`). Price, looks and aim
      never touch the guarantee.
    - prediction: int [B], classes chosen beforehand, independently of these draws (of a source of
      another seed); n0 must be 0.

    Returns Certificates of B examples. Raises ValueError naming the argument.
    """
    check_noise(counts, noise)
    sizes, gates = staircase(n, alpha, price, looks, aim)
    chosen = choose_class(counts, n0, prediction)
    size = len(counts)
    hits, drawn = np.zeros(size, dtype=np.int64), np.zeros(size, dtype=np.int64)
    alive, before, p_lower = np.ones(size, dtype=bool), 0, np.zeros(size)
    bound = staircase_bounds(sizes, gates, alpha)
    for j, look in enumerate(sizes):
        if not alive.any():
            break
        new = votes_for(chosen, counts.draw(np.where(alive, int(look) - before, 0)))
        hits, drawn, before = hits + new, drawn + (look - before) * alive, int(look)
        stop = alive & (hits < gates[j]) if j < len(gates) else alive
        if stop.any():
            p_lower[stop] = bound(j, hits[stop])
        alive = alive & ~stop
    return Certificates.from_bounds(chosen, p_lower, noise, draws=n0 + drawn)


def staircase_bounds(sizes, gates, alpha):
    """The bound that `certify_staircase` returns at each look for each count: a function (j, k)."""
    floors = [0.0]
    for gate, size in zip(gates, sizes[:-1], strict=True):
        q = clopper_pearson_lower(int(gate), int(size), alpha) if gate <= size else 0.0
        floors.append(max(floors[-1], float(q)))

    def bound(j, k):
        return np.maximum(floors[j], clopper_pearson_lower(k, int(sizes[j]), alpha))

    return bound


def failure_staircase(sizes, gates, alpha, p):
    """The exact probability that the staircase's bound of a class of probability p is false.

    Above p, or above 1/2 where p is less (the class is then not the likeliest of two).
    """
    bound, failed = staircase_bounds(sizes, gates, alpha), 0.0
    for j, (_, k, mass) in enumerate(stopped(sizes, gates, p)):
        if len(k):
            failed += mass[bound(j, k) > max(p, 0.5)].sum()
    return failed


def expected_staircase(sizes, gates, alpha, p, noise):
    """The exact mean (radius, draws) of the staircase for the class of probability p."""
    bound, radius, draws = staircase_bounds(sizes, gates, alpha), 0.0, 0.0
    for j, (n, k, mass) in enumerate(stopped(sizes, gates, p)):
        if len(k):
            radius += mass @ np.atleast_1d(noise.radius(bound(j, k)))
            draws += n * mass.sum()
    return radius, draws
