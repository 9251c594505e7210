"""Many readouts of five networks in one pass, against a run for each and a run for each network.

python -m benchmarks.readouts [--draws 2000] [--rounds 5] [--compile] [--threads N]
Prints a Markdown table of processor seconds (all threads together), best of the rounds, which take
turns. On a GPU the seconds are the clock's.
"""

import argparse
import time

import torch

from lib import BaseClassifier, Gaussian, ModelCounts, zoo
from lib.data import INFO
from lib.models import build

VOTES = [f"{vote}:0-{k}" for vote in ("soft", "hard", "softmax") for k in range(1, 5)]
VOTES += [f"weighted:0-{k}:{','.join(['1'] * (k + 1))}" for k in range(1, 5)]
NAMES = [f"member:{i}" for i in range(5)] + VOTES
NAMES += [f"consensus{k}:0-4" for k in range(1, 5)] + ["consensus2:0-2", "consensus2:0-3"]
NAMES += ["consensus3:0-3", "consensus2-hard:0-4", "consensus2-softmax:0-4"]


def networks(name):
    """Five networks of one kind: trained ones of CIFAR-10, or random ones for the digits."""
    if name == "resnet20":
        return [zoo.model(f"cifar10-resnet20-sigma0.25-seed{i}") for i in range(5)], "cifar10"
    models = []
    for seed in range(5):
        torch.manual_seed(seed)
        models.append(build("small_cnn", "digits").eval())
    return models, "digits"


def seconds(run):
    """Processor seconds of all threads; of a GPU the clock's."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    start = clock()
    run()
    return clock() - start


def compare(name, options):
    """Table rows: one pass, a run per network, a run per readout, for one kind of network."""
    models, data = networks(name)
    x = torch.rand(4, *INFO[data].shape, generator=torch.Generator().manual_seed(0))
    bases = [
        BaseClassifier(model, x.shape[1:], compile=options.compile, block=options.block)
        for model in models
    ]
    source = {"x": x, "noise": Gaussian(0.25), "progress": False}

    def count(model, **readouts):
        ModelCounts(model, **source, **readouts).draw(options.draws)

    runs = {
        "one pass, 30 readouts": lambda: count(bases, readouts=NAMES),
        "5 runs of one network": lambda: [count(base) for base in bases],
        "30 runs of one readout": lambda: [count(bases, readouts=[each]) for each in NAMES],
    }
    times = {kind: [] for kind in runs}
    for _ in range(options.rounds):
        for kind, run in runs.items():
            times[kind].append(seconds(run))
    one = min(times["one pass, 30 readouts"])
    how = ", ".join(f"{key} {bases[0].settings[key]}" for key in ("dtype", "block", "compiled"))
    for kind, found in times.items():
        print(
            f"| {name} ({how}) | {kind} | {min(found):.2f} | {min(found) / one:.2f} |", flush=True
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="+", default=["resnet20", "digits"])
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--block", type=int)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    assert len(set(NAMES)) == 30
    torch.set_num_threads(options.threads)
    print(f"4 images x {options.draws:,} draws, {options.threads} threads\n")
    print("| networks | | processor seconds | of one pass |\n| --- | --- | ---: | ---: |")
    for name in options.networks:
        compare(name, options)


if __name__ == "__main__":
    main()
