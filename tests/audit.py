"""The audit of a guarantee: how often a sampler is wrong, against the alpha it promises.

The class probabilities are known. Used by the tests; run as a script (`python tests/audit.py`) it
prints the tables of CERTIFY and of PREDICT.
"""

import numpy as np
import pandas as pd
from scipy.stats import binom, binomtest

from lib.bounds import clopper_pearson_lower
from lib.certify import ABSTAIN, Certificates, certify, predict
from lib.counts import SimulatedCounts
from lib.noise import Gaussian

NOISE = Gaussian(0.5)
PROBABILITIES = [0.5, 0.501, 0.55, 0.7, 0.9, 0.99]
RUNS = 100_000


def is_false(found, probabilities):
    """Which answers are wrong: bool [B].

    A certificate is wrong where its radius exceeds the true one, sigma Phi^-1(p) of the class named
    (0 for a class without the majority). A prediction (an int array) is wrong where it names
    another class than the first, which must be the likeliest.
    """
    if isinstance(found, Certificates):
        true = NOISE.radius(np.asarray(probabilities)[np.maximum(found.prediction, 0)])
        return (found.prediction != ABSTAIN) & (found.radius > true)
    return (found != ABSTAIN) & (found != 0)


def audit(sampler, probabilities, alpha, runs=RUNS, seed=0):
    """Run a sampler on simulated examples; returns a dict, one row of the table.

    - sampler: called as sampler(counts, alpha).
    - probabilities: of the classes, the same in all `runs` examples.

    `p-value` is that of the exact binomial test that the rate of wrong answers is at most alpha.
    """
    found = sampler(SimulatedCounts(np.tile(probabilities, (runs, 1)), seed=seed), alpha)
    false = int(is_false(found, probabilities).sum())
    pvalue = binomtest(false, runs, alpha, alternative="greater").pvalue
    return {
        "p": probabilities[0],
        "classes": len(probabilities),
        "alpha": alpha,
        "runs": runs,
        "false": false,
        "false / alpha": false / runs / alpha,
        "p-value": pvalue,
    }


def run_certify(counts, alpha):
    return certify(counts, NOISE, n0=100, n=1000, alpha=alpha)


def run_predict(counts, alpha):
    return predict(counts, n=1000, alpha=alpha)


def exact_rate(p, alpha, n0=100, n=1000):
    """The exact probability of a false certificate of CERTIFY.

    Two classes have probabilities p >= 1/2 and 1 - p; the sum is over the votes of both stages
    (ties name class 0).
    """
    named = binom.cdf(n0 // 2, n0, 1 - p), binom.sf(n0 // 2, n0, 1 - p)
    votes = np.arange(n + 1)
    bound = clopper_pearson_lower(votes, n, alpha)
    rates = [binom.pmf(votes, n, q)[(bound > 0.5) & (bound > q)].sum() for q in (p, 1 - p)]
    return named[0] * rates[0] + named[1] * rates[1]


def certify_cases():
    """Two classes, the worst case: the true radius is then no larger than sigma Phi^-1(p)."""
    return [([p, 1 - p], alpha) for alpha in (0.01, 0.001) for p in PROBABILITIES]


def predict_cases():
    """Classes that all but tie: the likelier the top class, the rarer another one wins."""
    ties = [[1 / c + 1e-9, *[(1 - 1 / c - 1e-9) / (c - 1)] * (c - 1)] for c in (2, 3, 10)]
    return [
        (p, alpha)
        for alpha in (0.05, 0.01, 0.001)
        for p in (*ties, [0.51, 0.49], [0.45, 0.44, 0.11])
    ]


if __name__ == "__main__":
    for name, sampler, cases in (
        ("CERTIFY (n0 = 100, n = 1,000)", run_certify, certify_cases()),
        ("PREDICT (n = 1,000)", run_predict, predict_cases()),
    ):
        table = pd.DataFrame([audit(sampler, *case) for case in cases])
        if sampler is run_certify:
            table.insert(
                6, "exact / alpha", [exact_rate(p[0], alpha) / alpha for p, alpha in cases]
            )
        print(f"{name}: worst rate of wrong answers {table['false / alpha'].max():.3f} alpha")
        print(table.round(3).to_string(index=False) + "\n")
