"""The audit of a guarantee: how often a sampler is wrong where the truth is known.

    table = audit(Certify(n0=100, n=1000), Gaussian(0.5))
    print(table, verdict(table))

A sampler is anything that is called with (counts, noise) and returns Certificates, or the classes
of a prediction; its own, with an `alpha`, need no more. The truth is a list of class probabilities.
Two classes are the worst case of a bound on one probability: the true radius is then as small as
theorem 1 allows.
"""

import numpy as np
import pandas as pd
from scipy.special import ndtr
from scipy.stats import binomtest

from lib.bounds import clopper_pearson_lower, clopper_pearson_upper
from lib.certify import ABSTAIN, Certificates
from lib.checks import check_draws, check_level
from lib.counts import SimulatedCounts

SURE = 1e-4  # a p-value below this, in one row of the table, condemns


def true_radius(noise, probabilities):
    """The radius float64 [C] inside which each class is returned, in the worst case; 0 if nowhere.

    By theorem 1, which is tight: from the probability of the class and of its strongest rival.
    """
    p = np.asarray(probabilities, dtype=np.float64)
    rival = np.array([np.delete(p, i).max(initial=0.0) for i in range(len(p))])
    if hasattr(noise, "radius_two"):
        return np.asarray(noise.radius_two(p, rival))
    return np.where(p > rival, noise.radius(p), 0.0)


def is_false(found, noise, probabilities):
    """Which answers are wrong: bool [B].

    - found: Certificates, wrong where the radius exceeds the true one of the class named; or int
      [B], predictions, wrong where another class than the likeliest is named.
    """
    p = np.asarray(probabilities, dtype=np.float64)
    if isinstance(found, Certificates):
        named = np.maximum(found.prediction, 0)
        # A class that is not the likeliest is wrong at any radius, 0 included.
        wrong = (found.radius > true_radius(noise, p)[named]) | (p[named] < p.max())
        return (found.prediction != ABSTAIN) & wrong
    return (found != ABSTAIN) & (p[np.maximum(found, 0)] < p.max())


def truths(sampler, noise):
    """Class probabilities at which samplers are likeliest to be wrong: rows of two to ten classes.

    Ties, near ties, the middle, near certainty; three and ten classes; and the probability just
    below the one that certifies a radius: the `radii` of a sampler that has them, else some of the
    radii of a noise that counts pixels. A sampler that states neither `radii` nor an exact
    `failure` may decide anywhere: two classes at 30 more probabilities.
    """
    rows = [[p, 1 - p] for p in (0.5, 0.501, 0.53, 0.6, 0.8, 0.95, 0.999)]
    rows += [[0.4, 0.35, 0.25], [1 / 3 + 2e-9, 1 / 3 - 1e-9, 1 / 3 - 1e-9], [0.5, 0.25, 0.25]]
    rows += [[0.2, 0.14, *[0.66 / 8] * 8], [0.1 + 9e-9, *[0.1 - 1e-9] * 9]]
    radii = getattr(sampler, "radii", [])
    if not np.size(radii) and not hasattr(sampler, "failure"):
        rows += [[p, 1 - p] for p in ndtr(np.arange(0.1, 3.05, 0.1))]
    if noise.stepped and not np.size(radii):
        radii = np.unique(np.linspace(1, max(1, noise.radius(1.0)), 6).astype(int))
    for radius in np.atleast_1d(radii):
        p = float(noise.probability(radius)) * (1 - 1e-12)
        rows += [[p, 1 - p], [p, (1 - p) / 2, (1 - p) / 2]]
    return rows


def audit(sampler, noise, probabilities=None, alpha=None, runs=100_000, seed=0):
    """How often a sampler is wrong at known class probabilities, in units of the alpha it promises.

    - sampler: called with (counts, noise); returns Certificates, or int [B] classes.
    - noise: smoothing distribution.
    - probabilities: list of truths, each a list of class probabilities; default `truths`.
    - alpha: the failure probability promised; default the sampler's own.
    - runs: simulated examples of each truth.
    - seed: of the simulation.

    Returns a DataFrame, one row per truth: `p` (the largest probability), `classes`, `false` (wrong
    answers), `rate` (their fraction / alpha), `low` and `high` (the exact 95% binomial interval of
    it), `exact` (the exact probability / alpha, where the sampler has a method
    failure(p, noise) for two classes, NaN elsewhere), `certified` (the fraction of right
    certificates: the power), `draws` (their mean number per example, NaN for predictions), and
    `p-value` (exact binomial test of rate <= 1). Raises ValueError naming alpha or runs.
    """
    alpha = getattr(sampler, "alpha", None) if alpha is None else alpha
    if alpha is None:
        name = getattr(sampler, "name", type(sampler).__name__)
        raise ValueError(f"sampler {name} has no field alpha, its promise: add one, or give alpha")
    check_level(alpha=alpha)
    check_draws(runs=runs)
    rows = truths(sampler, noise) if probabilities is None else probabilities
    return pd.DataFrame([_row(sampler, noise, list(p), alpha, runs, seed) for p in rows])


def _row(sampler, noise, p, alpha, runs, seed):
    found = sampler(SimulatedCounts(np.tile(p, (runs, 1)), seed=seed), noise)
    wrong = is_false(found, noise, p)
    false, certificates = int(wrong.sum()), isinstance(found, Certificates)
    named = (found.prediction if certificates else found) != ABSTAIN
    exact = np.nan
    if len(p) == 2 and hasattr(sampler, "failure"):
        exact = sampler.failure(p[0], noise) / alpha
    return {
        "p": max(p),
        "classes": len(p),
        "false": false,
        "rate": false / runs / alpha,
        "low": clopper_pearson_lower(false, runs, 0.025) / alpha,
        "high": clopper_pearson_upper(false, runs, 0.025) / alpha,
        "exact": exact,
        "certified": float((named & ~wrong).mean()),
        "draws": float(found.n.mean()) if certificates else np.nan,
        "p-value": binomtest(false, runs, alpha, alternative="greater").pvalue,
    }


def worst(table):
    """The largest rate of an audit, exact where it is known: a row of its table, as a dict."""
    refuted = table["rate"].where(table["p-value"] < SURE, 0.0)
    rate = table["exact"].where(table["exact"].notna(), table["rate"]).clip(lower=refuted)
    return table.loc[rate.idxmax()].to_dict() | {"rate": float(rate.max())}


def verdict(table):
    """ "holds" or "fails": whether any row of an audit is wrong more often than alpha.

    It fails where an exact probability is above alpha, or where the simulation could not be so
    wrong by chance (p-value below .0001 in a row).
    """
    # The tail of a Clopper-Pearson bound is alpha to 1 part in 1e10.
    broken = (table["exact"] > 1 + 1e-9) | (table["p-value"] < SURE)
    return "fails" if broken.any() else "holds"
