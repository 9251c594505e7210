"""Input-specific sampling (Chen et al. 2022): as few draws for each example as cost its radius no more than a stated decline.

The guarantee and the saving are two things. Each certificate is sound, or not, by how its draws are spent (`certify_iss`); the map only
decides how many there are, and a wrong number of draws costs radius or time, never truth.
"""

import dataclasses
import json

import numpy as np
from scipy.special import betainc
from scipy.stats import binom

from lib import noise as distributions
from lib.bounds import clopper_pearson_lower, clopper_pearson_upper
from lib.certify import Certificates, votes_for
from lib.checks import (
    check_choice,
    check_draws,
    check_labels,
    check_level,
    check_noise,
    check_probability,
)
from lib.store.files import read_bytes, write_atomically

KINDS, DRAWS = ("absolute", "relative"), ("fresh", "reused")


def decline(k, n_max, p, noise, alpha, kind="absolute"):
    """The radius lost by k draws instead of n_max when the share p of the draws hits (Chen et al. 2022, definitions 1 and 2).

    AD = radius(B(alpha; p n_max, n_max - p n_max + 1)) - radius(B(alpha; p k, k - p k + 1)), in the noise's units; RD = AD / the first
    radius. The hits p k are real numbers. k, n_max and p broadcast, k >= 0; a radius is 0 without draws, and RD is 0 where there is
    nothing to lose. Decreases in k for alpha <= 1/2. Returns float64. Raises ValueError naming k, n_max, p, alpha or kind.
    """
    alpha, n_max = check_level(alpha=alpha), check_draws(n_max=n_max)
    check_choice(KINDS, kind=kind)
    k, n_max, p = np.broadcast_arrays(
        np.asarray(k, dtype=np.float64), n_max, check_probability(p, "p")
    )
    if not ((k >= 0) & (k <= n_max)).all():
        raise ValueError(
            "k must satisfy 0 <= k <= n_max everywhere: the draws taken instead of n_max"
        )
    desired = noise.radius(clopper_pearson_lower(p * n_max, n_max, alpha))
    some = np.maximum(k, 1)
    lost = desired - np.where(
        k > 0, noise.radius(clopper_pearson_lower(p * some, some, alpha)), 0.0
    )
    return (
        lost
        if kind == "absolute"
        else np.divide(lost, desired, out=np.zeros(lost.shape), where=desired > 0)
    )[()]


@dataclasses.dataclass(frozen=True)
class SampleSizeMap:
    """psi: the class probability p -> the draws k that keep the decline within its limit. Made by `sample_size_map`.

    n_max, limit (the decline allowed), kind, noise, alpha: of the map. step: of its grid; None: no grid, every p is solved exactly.
    grid: float64 [G] and sizes: int64 [G], psi on the grid (empty without one).
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
        """Draws int64 for probabilities p, of the same shape: equation 6 (between grid points the larger neighbour), exact without a grid."""
        p = check_probability(p, "p")
        if self.step is None:
            return _smallest_sizes(p, self.n_max, self.limit, self.kind, self.noise, self.alpha)
        left = np.searchsorted(self.grid, p, side="right") - 1
        right = np.searchsorted(self.grid, p, side="left")
        return np.maximum(self.sizes[left], self.sizes[right])

    def __call__(self, p_low, p_up):
        """k_hat = max(psi(p_low), psi(p_up)), int64 (equation 5).

        It keeps the decline within the limit for every p of the interval (proposition 1), because psi has no inner peak: for AD it rises
        with p; for RD it falls, then rises, above p*, the p from which n_max draws certify anything at all. An interval (or a cell of the
        grid) that contains p* is RD's exception: just above p* psi jumps from 0 to n_max, which neither end sees, and a radius near 0
        may be lost whole.
        """
        p_low, p_up = check_probability(p_low, "p_low"), check_probability(p_up, "p_up")
        if not (p_low <= p_up).all():
            raise ValueError("p_low must be at most p_up: the ends of an interval of probabilities")
        return np.maximum(self.psi(p_low), self.psi(p_up))

    def save(self, path):
        """Write the map to `path` as JSON, whole or not at all."""
        described = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        described["noise"] = {
            "distribution": type(self.noise).__name__,
            **dataclasses.asdict(self.noise),
        }
        described |= {"grid": self.grid.tolist(), "sizes": self.sizes.tolist()}
        write_atomically(path, (json.dumps(described) + "\n").encode())

    @classmethod
    def load(cls, path):
        """The map that `save` wrote. Raises ValueError where the file holds something else."""
        try:
            described = json.loads(
                read_bytes(path, "make the map with sample_size_map and save it")
            )
            noise = described["noise"]
            described["noise"] = getattr(distributions, noise.pop("distribution"))(**noise)
            described |= {
                "grid": np.array(described["grid"], dtype=np.float64),
                "sizes": np.array(described["sizes"], dtype=np.int64),
            }
            return cls(**described)
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"path must be a file written by SampleSizeMap.save; {path} is not ({error!r}). Make the map anew"
            ) from error


def sample_size_map(n_max, decline, kind, noise, alpha, step=0.001):
    """Algorithm 1 for all p at once: the map from a class probability to the fewest draws within the decline (Chen et al. 2022).

    psi(p) = the smallest whole k whose AD (kind="absolute") or RD ("relative") against n_max draws is at most `decline`; 0 where that
    allows the radius 0. A whole grid is solved by one bisection over k, of the tail P(X >= p k | k, p_target) <= alpha, which is what
    "the bound is at least p_target" means and needs no quantile: milliseconds. Bisection needs the tail to fall with k; it does for
    alpha <= 1/2, asserted by the tests on every k of dense scans, so a larger alpha is refused.

    n_max  : draws of the standard to keep up with. decline: for AD a radius > 0 in the noise's units; for RD a share in (0, 1).
    noise  : smoothing distribution with one noise level. alpha: one-sided failure probability of the certificates, in (0, 1/2].
    step   : of the grid on [0, 1], both ends included (equation 6, an upper approximation: at .001, 6% more draws on an ImageNet log);
             None: no grid, `map(p_low, p_up)` solves its own p exactly.
    Returns a SampleSizeMap. Raises ValueError naming n_max, decline, kind, noise, alpha or step.
    """
    alpha, n_max = check_level(alpha=alpha), check_draws(n_max=n_max)
    check_choice(KINDS, kind=kind)
    if alpha > 0.5:
        raise ValueError(
            f"alpha must be at most 1/2: above it more draws may lower the bound; got {alpha!r}"
        )
    if np.ndim(n_max) or np.ndim(getattr(noise, "sigma", 0.0)):
        raise ValueError(
            "n_max and the level of noise must be single numbers: a map belongs to one of each. Make one map per value"
        )
    if (
        not np.isscalar(decline)
        or not decline > 0
        or (kind == "relative" and not decline < 1)
        or not np.isfinite(decline)
    ):
        raise ValueError(
            f"decline must be a finite radius > 0 (absolute) or a share in (0, 1) (relative); got {decline!r}"
        )
    grid = np.zeros(0)
    if step is not None:
        if not np.isscalar(step) or not 1e-6 <= step <= 0.5:
            raise ValueError(
                f"step must be None (the exact map) or a number in [1e-6, 0.5], such as 0.001; got {step!r}"
            )
        grid = np.append(np.arange(int(np.ceil(1 / step - 1e-9))) * step, 1.0)
    sizes = _smallest_sizes(grid, n_max, decline, kind, noise, alpha)
    return SampleSizeMap(int(n_max), float(decline), kind, noise, float(alpha), step, grid, sizes)


def _smallest_sizes(p, n_max, limit, kind, noise, alpha):
    """psi(p), int64 of p's shape, by bisection over whole k with (low fails, high holds) kept throughout."""
    shape, p = np.shape(p), np.ravel(p)
    sizes = np.zeros(p.shape, dtype=np.int64)
    # At p <= 1/2 no number of draws certifies.
    some = p > 0.5
    desired = noise.radius(clopper_pearson_lower(p[some] * n_max, n_max, alpha))
    target = desired - limit if kind == "absolute" else (1 - limit) * desired
    some[some] = target > 0
    p, p_target = p[some], noise.probability(target[target > 0])
    low, high = np.zeros(p.shape), np.full(p.shape, float(n_max))
    while (high - low > 1).any():
        # Where low and high have met, the middle is low = high - 1 again, which fails or is 0.
        middle = np.floor((low + high) / 2)
        a = np.maximum(middle, 1)
        holds = (betainc(p * a, a - p * a + 1, p_target) <= alpha) & (middle > 0)
        low, high = np.where(holds, low, middle), np.where(holds, middle, high)
    sizes[some] = high
    return sizes.reshape(shape)[()]


def certify_iss(counts, noise, n0, n_max, map, alpha, draws="fresh", prediction=None):
    """CERTIFY with input-specific sampling (Chen et al. 2022, algorithm 2), batch-first: one pass of n0 draws, one of the rest.

    n0 draws choose the class and a two-sided 1 - alpha interval of its probability; the map turns the interval into k_hat.
    draws="fresh" (default): k_hat FRESH draws for the bound, n = n0 + k_hat.
        Guarantee: for each example, with probability >= 1 - alpha over the draws, either it is abstained on or the smoothed classifier
        returns the given class on the whole open ball of the given radius. Given the first n0 draws, class and k_hat are fixed, and the
        bound is Clopper and Pearson's on k_hat new draws.
    draws="reused": the paper's. max(k_hat - n0, 0) more draws, the first n0 counting again for the class that they chose;
        n = max(k_hat, n0), and where 0 < k_hat < n0 the bound uses all n0 (line 7 as printed would use the first k_hat of them).
        NO guarantee at alpha: the draws that chose the class and k_hat count twice. The audited worst rates of false certificates
        (`failure_rate`, n_max = 100,000, n0 = 1,000, alpha = .001, sigma .25 - 1) are, at p = 1/2, 1.8 alpha for AD .05 and 1.4 for
        RD .05; with the class given independently 1.00 and 1.04. The decline limits the radius lost, not the failures.
    Where the interval lies below 1/2, or k_hat = 0, the example is abstained on after its n0 draws: a radius of 0 is within the decline.

    counts : source of votes for B examples. n_max, noise, alpha: must be the map's. n0: 1 .. n_max.
    prediction : int [B], classes chosen beforehand, independently of these draws; the first n0 draws then only give the interval.
    Returns Certificates over the B examples, never NaN. Raises ValueError naming n0, n_max, noise, alpha, draws or prediction.
    """
    n0, n_max = check_draws(n0=n0, n_max=n_max)
    alpha = check_level(alpha=alpha)
    if n0 > n_max:
        raise ValueError(f"n0 must be at most n_max = {n_max} draws; got {n0!r}")
    same = {
        "n_max": n_max == map.n_max,
        "alpha": alpha == map.alpha,
        "noise": repr(noise) == repr(map.noise),
    }
    for name in (name for name, agrees in same.items() if not agrees):
        raise ValueError(
            f"{name} must be the map's, {getattr(map, name)!r}. Make the map with sample_size_map for the {name} you certify with"
        )
    check_noise(counts, noise)
    check_choice(DRAWS, draws=draws)
    first = counts.draw(n0)
    prediction = (
        first.argmax(axis=1)
        if prediction is None
        else check_labels(prediction, len(counts), "prediction", counts.classes)
    )
    hits = votes_for(prediction, first)
    used, more = _spending(_sizes_after(hits, n0, map), n0, draws)
    hits = votes_for(prediction, counts.draw(more)) + (hits if draws == "reused" else 0)
    # Without draws there is no bound: 0 hits of 1 stand in, whose bound is 0.
    p_lower = clopper_pearson_lower(np.where(used > 0, hits, 0), np.maximum(used, 1), alpha)
    return Certificates.from_bounds(prediction, p_lower, noise, draws=n0 + more)


def _sizes_after(hits, n0, map):
    """k_hat after `hits` of the first n0 draws (algorithm 2, lines 4 and 5); 0 where the interval lies below 1/2."""
    p_low = clopper_pearson_lower(hits, n0, map.alpha / 2)
    p_up = clopper_pearson_upper(hits, n0, map.alpha / 2)
    return np.where(p_up > 0.5, map(p_low, p_up), 0)


def _spending(k_hat, n0, draws):
    """(draws that the bound uses, draws still to be taken) after n0 have given k_hat."""
    if draws == "fresh":
        return k_hat, k_hat
    return np.where(k_hat > 0, np.maximum(k_hat, n0), 0), np.maximum(k_hat - n0, 0)


def failure_rate(p, n0, map, draws="fresh", chosen=True):
    """The exact probability that `certify_iss` returns a false certificate, for two classes of probabilities p and 1 - p.

    A sum over the first stage's count K ~ Binomial(n0, p) of the chance that the second stage takes the bound above the truth (above 1/2
    where the class is the wrong one). chosen=False: the class is given beforehand, the one of probability p. Returns a float,
    to compare with alpha. Raises ValueError naming p, n0 or draws.
    """
    n0 = check_draws(n0=n0)
    check_probability(p, "p")
    if n0 > map.n_max:
        raise ValueError(f"n0 must be at most the map's n_max = {map.n_max} draws; got {n0!r}")
    check_choice(DRAWS, draws=draws)
    first = np.arange(n0 + 1)
    weight = binom.pmf(first, n0, p)
    first, weight = first[weight > 1e-18], weight[weight > 1e-18]
    swapped = chosen & (2 * first < n0)
    hits = np.where(swapped, n0 - first, first)
    share = np.where(swapped, 1 - p, p)
    used, new = _spending(_sizes_after(hits, n0, map), n0, draws)
    # The smallest count whose bound exceeds the truth: P(X >= count | used, truth) < alpha.
    needed = binom.isf(map.alpha, used, np.maximum(share, 0.5)) + 1
    known = 0 if draws == "fresh" else hits
    fails = np.where(used > 0, binom.sf(needed - known - 1, new, share), 0.0)
    return float(np.sum(weight * fails))
