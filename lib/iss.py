"""Input-specific sampling (Chen et al. 2022): as few draws as cost a radius no more than a decline.

The guarantee and the saving are two things. Each certificate is sound, or not, by how its draws are
spent (`certify_iss`). The map only decides how many there are: a wrong number of draws costs radius
or time, never truth.
"""

import dataclasses

import numpy as np
from scipy.special import betainc
from scipy.stats import binom

from lib.boundaries import certify_count
from lib.bounds import clopper_pearson_lower, clopper_pearson_upper
from lib.certify import Certificates, votes_for
from lib.checks import (
    check_choice,
    check_draws,
    check_labels,
    check_level,
    check_noise,
    check_numbers,
    check_probability,
)

KINDS = ("absolute", "relative")


def decline(k, n_max, p, noise, alpha, kind="absolute"):
    """The radius lost by k draws instead of n_max (Chen et al. 2022, definitions 1 and 2).

    AD = radius(B(alpha; p n_max, n_max - p n_max + 1)) - radius(B(alpha; p k, k - p k + 1)), in the
    noise's units; RD = AD / the first radius. It decreases in k for alpha <= 1/2.

    - k: draws taken, >= 0; the hits p k are real numbers. A radius without draws is 0.
    - n_max: draws of the standard to compare with.
    - p: the fraction of the draws that hit. k, n_max and p broadcast.
    - noise: smoothing distribution. alpha: one-sided failure probability.
    - kind: "absolute" for AD, "relative" for RD (0 where there is nothing to lose).

    Returns float64. Raises ValueError naming k, n_max, p, alpha or kind.
    """
    alpha, n_max = check_level(alpha=alpha), check_draws(n_max=n_max)
    check_choice(KINDS, kind=kind)
    k = check_numbers(k, "k")
    k, n_max, p = np.broadcast_arrays(k, n_max, check_probability(p, "p"))
    if not ((k >= 0) & (k <= n_max)).all():
        raise ValueError("k must satisfy 0 <= k <= n_max everywhere: the draws taken of n_max")
    desired = noise.radius(clopper_pearson_lower(p * n_max, n_max, alpha))
    some = np.maximum(k, 1)
    kept = np.where(k > 0, noise.radius(clopper_pearson_lower(p * some, some, alpha)), 0.0)
    lost = desired - kept
    if kind == "relative":
        lost = np.divide(lost, desired, out=np.zeros(lost.shape), where=desired > 0)
    return lost[()]


@dataclasses.dataclass(frozen=True)
class SampleSizeMap:
    """psi: the class probability p -> the draws k that keep the decline within its limit.

    Made by `sample_size_map`.

    - n_max, limit (the decline allowed), kind, noise, alpha: of the map.
    - step: of its grid; None: no grid, every p is solved exactly.
    - grid: float64 [G], empty without a step. sizes: int64 [G], psi on the grid; empty without a
      grid, and where the noise has one level per example (each p is then solved for its own).
    """

    n_max: int
    limit: float
    kind: str
    noise: object
    alpha: float
    step: float | None
    grid: np.ndarray = dataclasses.field(compare=False)
    sizes: np.ndarray = dataclasses.field(compare=False)

    def psi(self, p):
        """Draws int64 for probabilities p, of the same shape.

        On a grid the larger of both neighbours (equation 6), exact without one. p must have shape
        [B] where the noise has B levels.
        """
        p = check_probability(p, "p")
        if self.noise.size is not None and p.shape != (self.noise.size,):
            raise ValueError(
                f"p must have shape [{self.noise.size}], one per example of the map's noise; "
                f"got {list(p.shape)}"
            )
        if self.step is None:
            return self._exact(p)
        left = np.searchsorted(self.grid, p, side="right") - 1
        right = np.searchsorted(self.grid, p, side="left")
        if not len(self.sizes):
            return np.maximum(self._exact(self.grid[left]), self._exact(self.grid[right]))
        return np.maximum(self.sizes[left], self.sizes[right])

    def _exact(self, p):
        return _smallest_sizes(p, self.n_max, self.limit, self.kind, self.noise, self.alpha)

    def __call__(self, p_low, p_up):
        """k_hat = max(psi(p_low), psi(p_up)), int64 (equation 5).

        It keeps the decline within the limit for every p of the interval (proposition 1), because
        psi has no inner peak. For AD it rises with p. For RD it falls, then rises, above p*, the p
        from which n_max draws certify anything at all. An interval (or a cell of the grid) that
        contains p* is RD's exception: just above p* psi jumps from 0 to n_max, which neither end
        sees, and a radius near 0 may be lost whole.
        """
        p_low, p_up = check_probability(p_low, "p_low"), check_probability(p_up, "p_up")
        if not (p_low <= p_up).all():
            raise ValueError("p_low must be at most p_up: the ends of an interval of probabilities")
        return np.maximum(self.psi(p_low), self.psi(p_up))


def sample_size_map(n_max, decline, kind, noise, alpha, step=0.001):
    """Algorithm 1 for all p at once: from a class probability to the fewest draws.

    Chen et al. 2022.

    psi(p) = the smallest whole k whose AD or RD against n_max draws is at most `decline`; 0 where
    that allows the radius 0. A whole grid is solved in milliseconds by one bisection over k, of the
    tail P(X >= p k | k, p_target) <= alpha: this is what "the bound is at least p_target" means,
    and needs no quantile. Bisection needs the tail to fall with k. It does for alpha <= 1/2
    (the tests assert it on every k of dense scans), so a larger alpha is refused.

    - n_max: draws of the standard to keep up with.
    - decline: for AD a radius > 0 in the noise's units; for RD a fraction in (0, 1).
    - kind: "absolute" (AD) or "relative" (RD).
    - noise: smoothing distribution, of one level or one per example.
    - alpha: one-sided failure probability of the certificates, in (0, 1/2].
    - step: of the grid on [0, 1], both ends included (equation 6, an upper approximation: at .001,
      6% more draws on an ImageNet log). None: no grid, every p is solved exactly.

    Returns a SampleSizeMap. Raises ValueError naming n_max, decline, kind, noise, alpha or step.
    """
    alpha, n_max = check_level(alpha=alpha), check_draws(n_max=n_max)
    check_choice(KINDS, kind=kind)
    if alpha > 0.5:
        raise ValueError(
            f"alpha must be at most 1/2: else more draws may lower the bound; got {alpha!r}"
        )
    if np.ndim(n_max):
        raise ValueError("n_max must be a single number: a map belongs to one n_max")
    if noise.stepped:
        raise ValueError(
            "noise must have a radius that rises steadily with p: in steps, the ends of an "
            f"interval do not bound the decline within it; got {noise}"
        )
    _check_decline(decline, kind)
    grid = np.zeros(0)
    if step is not None:
        if not np.isscalar(step) or not 1e-6 <= step <= 0.5:
            raise ValueError(
                "step must be None (the exact map) or a number in [1e-6, 0.5], such as 0.001; "
                f"got {step!r}"
            )
        grid = np.append(np.arange(int(np.ceil(1 / step - 1e-9))) * step, 1.0)
    sizes = np.zeros(0, dtype=np.int64)
    if noise.size is None:
        sizes = _smallest_sizes(grid, n_max, decline, kind, noise, alpha)
    return SampleSizeMap(int(n_max), float(decline), kind, noise, float(alpha), step, grid, sizes)


def _check_decline(decline, kind):
    good = np.isscalar(decline) and np.isfinite(decline) and decline > 0
    if not good or (kind == "relative" and not decline < 1):
        raise ValueError(
            "decline must be a finite radius > 0 (absolute) or a fraction in (0, 1) (relative); "
            f"got {decline!r}"
        )


def _smallest_sizes(p, n_max, limit, kind, noise, alpha):
    """psi(p), int64 of p's shape, by bisection over whole k: low fails, high holds throughout."""
    shape, p = np.shape(p), np.ravel(p)
    sizes = np.zeros(p.shape, dtype=np.int64)
    desired = noise.radius(clopper_pearson_lower(p * n_max, n_max, alpha))
    target = desired - limit if kind == "absolute" else (1 - limit) * desired
    # At p <= 1/2 no number of draws certifies.
    some = np.flatnonzero((p > 0.5) & (target > 0))
    p, p_target = p[some], noise.select(some).probability(target[some])
    low, high = np.zeros(p.shape), np.full(p.shape, float(n_max))
    while (high - low > 1).any():
        # Where low and high have met, the middle is low = high - 1 again, which fails or is 0.
        middle = np.floor((low + high) / 2)
        a = np.maximum(middle, 1)
        holds = (betainc(p * a, a - p * a + 1, p_target) <= alpha) & (middle > 0)
        low, high = np.where(holds, low, middle), np.where(holds, middle, high)
    sizes[some] = high
    return sizes.reshape(shape)[()]


def certify_iss(counts, noise, n0, n_max, sizes, alpha, reuse=False, prediction=None):
    """CERTIFY with input-specific sampling (Chen et al. 2022, algorithm 2), batch-first.

    n0 draws choose the class and a two-sided 1 - alpha interval of its probability; the map turns
    the interval into k_hat draws for the bound. Where the interval lies below 1/2, or k_hat = 0,
    the example is abstained on after its n0 draws: a radius of 0 is within the decline.

    reuse=False (default): k_hat FRESH draws for the bound, n = n0 + k_hat.
        Guarantee: for each example, with probability >= 1 - alpha over the draws, either it is
        abstained on or the smoothed classifier returns the given class on the whole open ball of
        the given radius. Given the first n0 draws, class and k_hat are fixed, and the bound is
        Clopper and Pearson's on k_hat new draws.
    reuse=True: the paper's. max(k_hat - n0, 0) more draws, and the first n0 count again for the
        class that they chose; n = max(k_hat, n0), and where 0 < k_hat < n0 the bound uses all n0
        (line 7 as printed would use the first k_hat of them).
        NO guarantee at alpha: the draws that chose the class and k_hat count twice. The audited
        worst rates of false certificates (`failure_rate`, n_max = 100,000, n0 = 1,000, alpha =
        .001, sigma .25 - 1) are, at p = 1/2, 1.8 alpha for AD .05 and 1.4 for RD .05; with the
        class given independently 1.00 and 1.04. The decline limits the radius lost, not failures.

    - counts: source of votes for B examples.
    - noise: smoothing distribution that they were drawn under; its norm and units are the radius's.
    - n0: draws of the first stage, 1 .. n_max.
    - n_max: draws of the standard to keep up with; at most so many for the bound.
    - sizes: the SampleSizeMap; its n_max, noise and alpha must be those given here.
    - alpha: one-sided failure probability per example, in (0, 1/2].
    - reuse: whether the first n0 draws count again (see above).
    - prediction: int [B], classes chosen beforehand, independently of these draws (of a source of
      another seed); the first n0 draws then only give the interval.

    Returns Certificates of B examples, never NaN. Raises ValueError naming counts, n0, n_max,
    noise, alpha, reuse or prediction.
    """
    n0, n_max = check_draws(n0=n0, n_max=n_max)
    alpha = check_level(alpha=alpha)
    if n0 > n_max:
        raise ValueError(f"n0 must be at most n_max = {n_max} draws; got {n0!r}")
    agrees = {
        "n_max": n_max == sizes.n_max,
        "alpha": alpha == sizes.alpha,
        "noise": noise == sizes.noise,
    }
    for name in (name for name, same in agrees.items() if not same):
        raise ValueError(
            f"{name} must be the map's, {getattr(sizes, name)!r}. Make the map with "
            f"sample_size_map for the {name} you certify with"
        )
    check_noise(counts, noise)
    check_choice((False, True), reuse=reuse)
    first = counts.draw(n0)
    if prediction is None:
        prediction = first.argmax(axis=1)
    else:
        prediction = check_labels(prediction, len(counts), "prediction", counts.classes)
    hits = votes_for(prediction, first)
    used, more = _spending(_sizes_after(hits, n0, sizes), n0, reuse)
    hits = votes_for(prediction, counts.draw(more)) + (hits if reuse else 0)
    # Without draws there is no bound: 0 hits of 1 stand in, whose bound is 0.
    hits, drawn = np.where(used > 0, hits, 0), np.maximum(used, 1)
    p_lower = clopper_pearson_lower(hits, drawn, alpha)
    return Certificates.from_bounds(prediction, p_lower, noise, draws=n0 + more)


def _sizes_after(hits, n0, sizes):
    """k_hat after `hits` of the first n0 draws (algorithm 2, lines 4 and 5).

    0 where the interval lies below 1/2.
    """
    p_low = clopper_pearson_lower(hits, n0, sizes.alpha / 2)
    p_up = clopper_pearson_upper(hits, n0, sizes.alpha / 2)
    return np.where(p_up > 0.5, sizes(p_low, p_up), 0)


def _spending(k_hat, n0, reuse):
    """(draws that the bound uses, draws still to be taken) after n0 have given k_hat."""
    if not reuse:
        return k_hat, k_hat
    return np.where(k_hat > 0, np.maximum(k_hat, n0), 0), np.maximum(k_hat - n0, 0)


def failure_rate(p, n0, sizes, reuse=False, chosen=True):
    """The exact probability of a false certificate of `certify_iss`, for two classes p and 1 - p.

    A sum over the first stage's count K ~ Binomial(n0, p) of the chance that the second stage takes
    the bound above the truth (above 1/2 where the class is the wrong one).

    - p: probability of the first class. n0: draws of the first stage.
    - sizes: the SampleSizeMap. reuse: as for certify_iss.
    - chosen: whether the n0 draws choose the class; False: it is given, the one of probability p.

    Returns a float, to compare with alpha. Raises ValueError naming p, n0 or reuse.
    """
    n0 = check_draws(n0=n0)
    check_probability(p, "p")
    if n0 > sizes.n_max:
        raise ValueError(f"n0 must be at most the map's n_max = {sizes.n_max} draws; got {n0!r}")
    check_choice((False, True), reuse=reuse)
    first = np.arange(n0 + 1)
    weight = binom.pmf(first, n0, p)
    first, weight = first[weight > 1e-18], weight[weight > 1e-18]
    swapped = chosen & (2 * first < n0)
    hits = np.where(swapped, n0 - first, first)
    truth = np.where(swapped, 1 - p, p)
    used, new = _spending(_sizes_after(hits, n0, sizes), n0, reuse)
    # The smallest count whose bound exceeds the truth: P(X >= count | used, truth) < alpha.
    needed = certify_count(np.maximum(truth, 0.5), used, sizes.alpha)
    known = hits if reuse else 0
    fails = np.where(used > 0, binom.sf(needed - known - 1, new, truth), 0.0)
    return float(np.sum(weight * fails))
