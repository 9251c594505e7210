"""How long the sample-size map of input-specific sampling takes, beside the paper's times.

    python -m benchmarks.samplers [--repeat 30]

The paper's times are table 3 of Chen et al. 2022 (n_max = 100,000; a 3.8 GHz Xeon Gold 5222; its
step is not stated, ours is .001). Prints a Markdown table.
"""

import argparse
import os
import pathlib
import platform
import statistics
import time

# One core, as a certification that runs beside it would leave.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pandas as pd
import scipy

from lib.iss import sample_size_map
from lib.noise import Gaussian

PUBLISHED = pathlib.Path(__file__).parent.parent / "data" / "published" / "chen2022_table3.csv"


def processor():
    """The processor's name, where the system tells it."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} logical cores"


def seconds(work, repeat):
    """Wall-clock seconds of each of `repeat` calls, after one that warms the caches."""
    work()
    taken = []
    for _ in range(repeat):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return taken


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeat", type=int, default=30, help="timed calls of each setting")
    repeat = parser.parse_args().repeat
    print(
        f"Machine: {processor()}; Python {platform.python_version()}, numpy {np.__version__}, "
        f"scipy {scipy.__version__}; {repeat} calls each.\n"
    )
    print("| n_max | kind | decline | best (ms) | median (ms) | paper (s) | paper / our median |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for row in pd.read_csv(PUBLISHED).itertuples():
        taken = seconds(
            lambda r=row: sample_size_map(100_000, r.decline, r.kind, Gaussian(0.5), 0.001), repeat
        )
        middle = statistics.median(taken)
        print(
            f"| 100,000 | {row.kind} | {row.decline} | {1e3 * min(taken):.1f} "
            f"| {1e3 * middle:.1f} | {row.seconds} | {row.seconds / middle:,.0f} |"
        )


if __name__ == "__main__":
    main()
