"""What samplers cost: sample-size maps, boundary tables, and live certification in wall time.

    python -m benchmarks.samplers [--repeat 30] [--images 360]

Maps of input-specific sampling beside the times of table 3 of Chen et al. 2022 (n_max = 100,000; a
3.8 GHz Xeon Gold 5222; its step is not stated, ours is .001). Boundary tables of group-sequential
tests: computed, and loaded with checksum and type-I error. Live digits at r = sigma: CERTIFYADP and
the anytime sampler in the same run, and CERTIFY, whose time is that of a tenth of its draws times
ten. Prints Markdown tables.
"""

import argparse
import os
import pathlib
import platform
import statistics
import tempfile
import time

# One core, as a certification that runs beside it would leave.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pandas as pd
import scipy

from lib import zoo
from lib.boundaries import compute, load_table, save_table
from lib.data import load
from lib.engine.classifier import BaseClassifier
from lib.engine.live import ModelCounts
from lib.iss import sample_size_map
from lib.noise import Gaussian
from lib.samplers import Adaptive, Anytime, Certify

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


def maps(repeat):
    """Sample-size maps beside the paper's times."""
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


def tables(repeat):
    """Boundary tables: the first computation, and a load with its checks."""
    print("\n| radius / sigma | n | computed (s) | loaded (ms) | looks |")
    print("| --- | --- | --- | --- | --- |")
    for radius, n in ((0.05, 100_000), (1, 100_000), (0.05, 10**6), (1, 10**6), (3.5, 10**6)):
        null = float(Gaussian(1.0).probability(radius))
        start = time.perf_counter()
        found = compute(null, n, 0.001)
        taken = time.perf_counter() - start
        settings = {"null": null, "n": n, "alpha": 0.001, "alone": False}
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "table.json"
            save_table(path, settings, found)
            loaded = seconds(lambda p=path, s=settings: load_table(p, s), repeat)
        middle = 1e3 * statistics.median(loaded)
        print(f"| {radius} | {n:,} | {taken:.2f} | {middle:.0f} | {len(found.looks)} |")


def live(images, sigma=0.5, n=100_000):
    """Wall time of certifying digits at r = sigma, one engine for all samplers."""
    network, noise = zoo.model(f"digits-cnn-sigma{sigma:.2f}"), Gaussian(sigma)
    x = load("digits", "test")[0][:images]
    base = BaseClassifier(network, x.shape[1:], compile=False)
    samplers = {
        "CERTIFY": Certify(n=n // 10),
        "CERTIFYADP": Adaptive(str(sigma), f"100,{n // 100},{n // 10},{n * 12 // 10}"),
        "anytime": Anytime(str(sigma), n),
    }
    ModelCounts(base, x, noise, progress=False).draw(100)  # warms the caches
    print(f"\n| digits, sigma = r = {sigma} | draws | certified | seconds | SampleRF | TimeRF |")
    print("| --- | --- | --- | --- | --- | --- |")
    whole = None
    for name, sampler in samplers.items():
        counts = ModelCounts(base, x, noise, progress=False)
        start = time.perf_counter()
        found = sampler(counts, noise)
        taken, draws = time.perf_counter() - start, found.n.mean()
        if whole is None:
            taken, draws = 10 * taken, 100 + n
            whole = taken
        share = f"{(found.prediction >= 0).mean():.3f}" if name != "CERTIFY" else "-"
        print(
            f"| {name} | {draws:,.0f} | {share} | {taken:.1f} "
            f"| {(100 + n) / draws:.1f} | {whole / taken:.1f} |"
        )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeat", type=int, default=30, help="timed calls of each setting")
    parser.add_argument("--images", type=int, default=360, help="digits certified live")
    given = parser.parse_args()
    print(
        f"Machine: {processor()}; Python {platform.python_version()}, numpy {np.__version__}, "
        f"scipy {scipy.__version__}; {given.repeat} calls each.\n"
    )
    maps(given.repeat)
    tables(given.repeat)
    live(given.images)


if __name__ == "__main__":
    main()
