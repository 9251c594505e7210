"""The engine against the field's loop, alternating in one run: images per second, best and median of several rounds, as ratios.

python -m benchmarks.engine [--seconds 4] [--rounds 5] [--job 100000] [--networks resnet20 digits ...] [--processes 2]
Prints Markdown tables; benchmarks/README.md holds the last committed run. On a GPU it adds ResNet-110 and ResNet-50 at 224 x 224.
"""

import argparse
import pathlib
import platform
import statistics
import subprocess
import sys
import time

import numpy as np
import torch

from lib import BaseClassifier, Gaussian, ModelCounts
from lib.data import INFO
from lib.models import build

NETWORKS = {"resnet20": ("cifar_resnet20", "cifar10"), "digits": ("small_cnn", "digits"), "resnet110": ("cifar_resnet110", "cifar10")}
NETWORKS |= {"resnet50": ("resnet50", "imagenet")}


@torch.no_grad()
def field_loop(model, image, draws, batch, sigma, classes):
    """The certification loop of the field, from its description: repeat the image, add randn_like, eager float32, argmax, count in Python."""
    counts = np.zeros(classes, dtype=int)
    while draws > 0:
        size = min(batch, draws)
        draws -= size
        images = image.repeat((size, 1, 1, 1))
        predictions = model(images + torch.randn_like(images) * sigma).argmax(1)
        for prediction in predictions.cpu().numpy():
            counts[prediction] += 1
    return counts


def rate(run, seconds):
    """Draws per second of `run(draws)`, over at least `seconds`."""
    start, done, elapsed = time.perf_counter(), 0, 0.0
    while elapsed < seconds:
        # Pieces of about half a second once the rate is known.
        draws = max(2000, int(0.5 * done / elapsed)) if done else 2000
        run(draws)
        done, elapsed = done + draws, time.perf_counter() - start
    return done / elapsed


def network(name):
    torch.manual_seed(0)
    architecture, data = NETWORKS[name]
    return build(architecture, data).eval()


def contenders(name, device):
    """{name: run(draws)} for one network: the field's loop at two batches and the engine at two precisions."""
    model, data = network(name), NETWORKS[name][1]
    shape, classes = INFO[data].shape, INFO[data].classes
    image, noise = torch.rand(shape, generator=torch.Generator().manual_seed(0)), Gaussian(0.25)
    on_device = model.to(device)
    runs = {f"field's loop, batch {b}": lambda n, b=b: field_loop(on_device, image.to(device), n, b, 0.25, classes) for b in (400, 1000)}
    compile_seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        label = f"engine, {str(dtype).removeprefix('torch.')}"
        start = time.perf_counter()
        base = BaseClassifier(model, shape, device=device, dtype=dtype, compile=True)
        base.votes(base.empty_block())
        compile_seconds[label] = time.perf_counter() - start
        runs[f"{label}, block {base.block}"] = lambda n, base=base: ModelCounts(base, image[None], noise, progress=False).draw(n)
    return runs, compile_seconds


def compare(name, device, seconds, rounds):
    runs, compile_seconds = contenders(name, device)
    for run in runs.values():
        run(2000)
    rates = {label: [] for label in runs}
    for _ in range(rounds):
        for label, run in runs.items():
            rates[label].append(rate(run, seconds))
    base = rates["field's loop, batch 400"]
    print(f"\n### {name} on {device}\n\n| | best draws/s | median draws/s | ratio of medians to the field's loop at batch 400 |\n|---|---|---|---|")
    for label, values in rates.items():
        print(f"| {label} | {max(values):,.0f} | {statistics.median(values):,.0f} | {statistics.median(values) / statistics.median(base):.1f} |")
    print("\nReady to count (calibration, compile, first block): " + ", ".join(f"{k} {v:.1f} s" for k, v in compile_seconds.items()) + ".")


def one_process(name, seconds, kind):
    """A worker of `two_processes`: one thread, prints its rate."""
    torch.set_num_threads(1)
    runs, _ = contenders(name, "cpu")
    run = next(run for label, run in runs.items() if label.startswith(kind))
    run(2000)
    input()
    print(rate(run, seconds))


def two_processes(name, seconds, processes):
    """Draws per second of several one-thread processes at once: the field's loop and the bfloat16 engine."""
    print(f"\n### {name}, {processes} processes of one thread each\n\n| | draws/s, all processes | ratio |\n|---|---|---|")
    first = None
    for kind in ("field's loop, batch 400", "engine, float32", "engine, bfloat16"):
        command = [sys.executable, "-m", "benchmarks.engine", "--worker", name, "--kind", kind, "--seconds", str(seconds)]
        workers = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(processes)]
        time.sleep(60 if kind.startswith("engine") else 15)
        for worker in workers:
            worker.stdin.write("\n")
            worker.stdin.flush()
        total = sum(float(worker.communicate()[0].strip().splitlines()[-1]) for worker in workers)
        first = first or total
        print(f"| {kind} | {total:,.0f} | {total / first:.1f} |", flush=True)


def whole_job(name, device, draws, examples=20):
    """Wall time of a whole job, compile included, against the field's loop extrapolated from a tenth of one example."""
    model, data = network(name).to(device), NETWORKS[name][1]
    x = torch.rand(examples, *INFO[data].shape, generator=torch.Generator().manual_seed(0))
    start = time.perf_counter()
    ModelCounts(model, x, Gaussian(0.25), device=device, progress=False).draw(draws)
    ours = time.perf_counter() - start
    start = time.perf_counter()
    field_loop(model, x[0].to(device), draws // 10, 400, 0.25, INFO[data].classes)
    theirs = (time.perf_counter() - start) * 10 * examples
    print(f"\nWhole job on {name}, {examples} examples x {draws:,} draws: engine {ours:,.0f} s with calibration and compile,", end=" ")
    print(f"field's loop {theirs:,.0f} s (extrapolated from {draws // 10:,} draws), ratio {theirs / ours:.1f}.")


def machine():
    flags = pathlib.Path("/proc/cpuinfo")
    flags = next((line for line in flags.read_text().splitlines() if line.startswith("flags")), "") if flags.exists() else ""
    names = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {flag}" in flags]
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, CPU flags: {' '.join(names) or 'none of note'}{gpu}; ", end="")
    print(f"Python {platform.python_version()}, torch {torch.__version__}.")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--job", type=int, default=100_000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--networks", nargs="+")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--kind", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return one_process(arguments.worker, arguments.seconds, arguments.kind)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    machine()
    names = arguments.networks or (["resnet20", "digits"] if device == "cpu" else list(NETWORKS))
    for name in names:
        compare(name, device, arguments.seconds, arguments.rounds)
    if device == "cpu" and arguments.processes > 1:
        two_processes(names[0], arguments.seconds, arguments.processes)
    if arguments.job:
        for name in names[:2]:
            whole_job(name, device, arguments.job)


if __name__ == "__main__":
    main()
