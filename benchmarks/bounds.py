"""How long a million Clopper-Pearson bounds take, beside statsmodels called in a loop.

    python -m benchmarks.bounds [--repeat 5]

The loop calls proportion_confint once per value, as Cohen et al. 2019 (appendix C) do; 1,000 calls
are timed and scaled to a million. Whole counts repeat among a million values, and each is solved
once; the rows of real k show the time without repeats. Prints a Markdown table.
"""

import argparse
import platform
import statistics

# One thread is set there, before numpy is loaded.
from benchmarks.samplers import processor, seconds  # isort: skip

import numpy as np
import scipy
import statsmodels
from statsmodels.stats.proportion import proportion_confint

from lib.bounds import clopper_pearson_lower

VALUES, LOOPED, ALPHA = 1_000_000, 1_000, 0.001


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--repeat",
        type=int,
        default=5,
        help="timed calls of each setting, of which the median is shown",
    )
    repeat = parser.parse_args().repeat
    print(
        f"Machine: {processor()}, one used; Python {platform.python_version()}, numpy "
        f"{np.__version__}, scipy {scipy.__version__}, statsmodels {statsmodels.__version__}; "
        f"median of {repeat}.\n"
    )
    print(
        "| n | hits k | ours, 1e6 in one call (s) | statsmodels, loop scaled to 1e6 (s) "
        "| loop / ours | statsmodels, one call (s) | one call / ours |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    rng = np.random.default_rng(0)
    for n in (1_000, 100_000):
        kinds = {
            "uniform on 0..n": rng.integers(0, n + 1, VALUES),
            "at p uniform on (.9, 1)": rng.binomial(n, rng.uniform(0.9, 1, VALUES)),
            "real, all different": rng.uniform(0, n, VALUES),
        }
        for hits, k in kinds.items():
            ours, loop, call = (
                statistics.median(seconds(work, repeat)) for work in contenders(k, n)
            )
            loop *= VALUES / LOOPED
            print(
                f"| {n:,} | {hits} | {ours:.2f} | {loop:,.0f} | {loop / ours:,.0f} | {call:.2f} "
                f"| {call / ours:.1f} |"
            )


def contenders(k, n):
    """Ours on all k, statsmodels on the first LOOPED of them one by one, and on all k at once."""

    def theirs(hits):
        return proportion_confint(hits, n, alpha=2 * ALPHA, method="beta")[0]

    return (
        lambda: clopper_pearson_lower(k, n, ALPHA),
        lambda: [theirs(one) for one in k[:LOOPED]],
        lambda: theirs(k),
    )


if __name__ == "__main__":
    main()
