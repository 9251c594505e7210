"""Peak memory of counting: many examples with few draws, few with many. Prints a Markdown table.

python -m benchmarks.memory
Each row is a process of its own that holds the model and nothing else; "beyond" is its peak less
that of the first row.
"""

import resource
import subprocess
import sys

ROWS = ((1, 100), (10_000, 1_000), (100, 100_000))


def worker(examples, draws):
    import torch

    from lib import Gaussian, ModelCounts, zoo
    from lib.data import load

    torch.set_num_threads(1)
    x = load("digits", "test")[0]
    x = x.repeat(-(-examples // len(x)), 1, 1, 1)[:examples]
    ModelCounts(zoo.model("digits-cnn-sigma0.50"), x, Gaussian(0.5), progress=False).draw(draws)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main():
    if len(sys.argv) > 1:
        return worker(*map(int, sys.argv[1:]))
    print(
        "| examples | draws of each | peak (MB) | beyond the first row (MB) |\n"
        "|---:|---:|---:|---:|"
    )
    first = None
    for examples, draws in ROWS:
        command = [sys.executable, "-m", "benchmarks.memory", str(examples), str(draws)]
        peak = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        first = first or peak
        print(f"| {examples:,} | {draws:,} | {peak:,.0f} | {peak - first:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
