"""The engine against the loop of Cohen et al.'s code: draws per second and their ratios.

Each contender has a process of its own, and they take turns in one run.

python -m benchmarks.engine [--seconds 4] [--rounds 5] [--job 100000] [--threads N]
    [--processes 2] [--networks resnet20 digits ...]
Prints Markdown tables; benchmarks/README.md holds the last committed run. On a GPU it adds
ResNet-110 and ResNet-50 at 224 x 224.
"""

import argparse
import math
import pathlib
import platform
import statistics
import subprocess
import sys
import time

import numpy as np
import torch

from lib import BaseClassifier, Gaussian, ModelCounts, quantize
from lib.data import INFO
from lib.engine.hardware import has_compiler, has_int8_products
from lib.models import build

NETWORKS = {
    "resnet20": ("cifar_resnet20", "cifar10"),
    "digits": ("small_cnn", "digits"),
    "resnet110": ("cifar_resnet110", "cifar10"),
}
NETWORKS |= {"resnet50": ("resnet50", "imagenet")}
# Arithmetic operations of one pass.
OPERATIONS = {"resnet20": 81.6e6, "resnet110": 506e6}
SIDE = 1024  # of the matrices whose product is the best that a processor can do


@torch.no_grad()
def field_loop(model, image, draws, batch, sigma, classes):
    """The certification loop of the field, from its description.

    Repeat the image, add randn_like, eager float32, argmax, count in Python.
    """
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
    """(draws per second, draws per second of processor time) of `run(draws)`, over `seconds`."""
    start, busy, done, elapsed = time.perf_counter(), time.process_time(), 0, 0.0
    while elapsed < seconds:
        # Pieces of about half a second once the rate is known.
        draws = max(1024, int(0.5 * done / elapsed)) if done else 1024
        run(draws)
        done, elapsed = done + draws, time.perf_counter() - start
    return done / elapsed, done / (time.process_time() - busy)


def network(name):
    torch.manual_seed(0)
    architecture, data = NETWORKS[name]
    return build(architecture, data).eval()


def contender(name, kind, device):
    """run(draws) of one contender, ready to count, and a note on how it got ready."""
    model, data = network(name), NETWORKS[name][1]
    shape, classes = INFO[data].shape, INFO[data].classes
    image = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    start = time.perf_counter()
    if kind.startswith("products"):
        run, note = products(getattr(torch, kind.split()[-1]), OPERATIONS[name], device), ""
    elif kind.startswith("field"):
        model, image, batch = model.to(device), image.to(device), int(kind.split()[-1])
        run, note = lambda n: field_loop(model, image, n, batch, 0.25, classes), ""
        run(batch)
    else:
        dtype = kind.split()[1]
        if dtype == "int8":
            model = quantize(model, torch.rand(128, *shape), Gaussian(0.25))
        base = BaseClassifier(
            model, shape, device=device, dtype=dtype, compile=kind.endswith("compiled")
        )
        run, note = (
            lambda n: ModelCounts(base, image[None], Gaussian(0.25), progress=False).draw(n),
            f"block {base.block}",
        )
        run(base.block)
    return run, f"{note}, ready in {time.perf_counter() - start:.0f} s".removeprefix(", ")


def products(dtype, operations, device):
    """run(draws): the matrix products with as many operations as so many passes of a network."""
    if dtype == torch.int8:
        a = torch.randint(0, 128, (SIDE, SIDE), dtype=torch.uint8)
        b = torch.randint(-127, 128, (SIDE, SIDE), dtype=torch.int8)
        multiply = torch._int_mm
    else:
        a = b = torch.rand(SIDE, SIDE, device=device).to(dtype)
        multiply = torch.matmul

    def run(draws):
        for _ in range(math.ceil(draws * operations / (2 * SIDE**3))):
            result = multiply(a, b)
        float(result[0, 0])

    run(1)
    return run


def worker(name, kind, threads, device):
    """A process of `Contender`: ready, it measures once for each line of seconds that it reads."""
    torch.set_num_threads(threads)
    run, note = contender(name, kind, device)
    print(note, flush=True)
    for seconds in sys.stdin:
        print(*rate(run, float(seconds)), flush=True)


class Contender:
    """One contender in processes of its own.

    What one does to the allocator would help or hurt another in the same process.
    """

    def __init__(self, name, kind, device, threads, processes=1):
        command = [
            sys.executable,
            "-m",
            "benchmarks.engine",
            "--worker",
            name,
            "--kind",
            kind,
            "--threads",
            str(threads),
            "--device",
            device,
        ]
        self.processes = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for _ in range(processes)
        ]
        notes = [process.stdout.readline().strip() for process in self.processes]
        self.note = notes[0]
        self.rates, self.busy = [], []

    def measure(self, seconds):
        for process in self.processes:
            process.stdin.write(f"{seconds}\n")
            process.stdin.flush()
        found = [process.stdout.readline().split() for process in self.processes]
        self.rates.append(sum(float(rate) for rate, _ in found))
        self.busy.append(statistics.mean(float(busy) for _, busy in found))

    def close(self):
        for process in self.processes:
            process.communicate()


def contenders(name, device):
    """The kinds that are compared, the field's loop at batch 400 first."""
    kinds = [f"field's loop, batch {batch}" for batch in (400, 1000)]
    kinds += [
        f"engine, {dtype}, {how}"
        for dtype in ("float32", "bfloat16")
        for how in ("eager", "compiled")
    ]
    dtypes = ["float32", "bfloat16"]
    if device == "cpu" and has_compiler():
        kinds.append("engine, int8, compiled")
        dtypes += ["int8"] if has_int8_products() else []
    if name in OPERATIONS:
        kinds += [f"products of matrices, {dtype}" for dtype in dtypes]
    return kinds


def compare(name, device, seconds, rounds, threads, processes=1, kinds=None):
    """Table of all contenders, alternating: rounds of so many seconds each.

    A busy machine is fairer by processor time, which is the last pair of columns. The products of
    matrices are as many as the network's passes need: the best that this hardware can do.
    """
    kinds = kinds or contenders(name, device)
    rivals = {
        kind: Contender(name, kind.replace(",", ""), device, threads, processes) for kind in kinds
    }
    for _ in range(rounds):
        for rival in rivals.values():
            rival.measure(seconds)
    first = rivals[kinds[0]]
    base, idle = statistics.median(first.rates), statistics.median(first.busy)
    one = "process" if processes == 1 else "processes"
    print(f"\n### {name} on {device}, {processes} {one} of {threads} thread(s)\n")
    print("| | | best draws/s | median draws/s | ratio | per processor second | ratio |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for kind, rival in rivals.items():
        median, busy = statistics.median(rival.rates), statistics.median(rival.busy)
        print(
            f"| {kind} | {rival.note} | {max(rival.rates):,.0f} | {median:,.0f} | "
            f"{median / base:.1f} | {busy:,.0f} | {busy / idle:.1f} |",
            flush=True,
        )
        rival.close()
    for dtype in ("float32", "bfloat16", "int8"):
        engine, peak = (
            rivals.get(kind.format(dtype))
            for kind in ("engine, {}, compiled", "products of matrices, {}")
        )
        if engine and peak:
            share = statistics.median(engine.busy) / statistics.median(peak.busy)
            print(f"\nThe engine at {dtype}: {share:.0%} of the matrix products, noise included.")


def whole_job(name, device, draws, examples=20):
    """Wall time of a whole job, compile included, against the field's loop.

    The loop's time is extrapolated from a tenth of one example.
    """
    data = NETWORKS[name][1]
    code = {
        "engine": f"ModelCounts(model, x, Gaussian(.25), device='{device}', progress=False)"
        f".draw({draws})",
        "field": f"field_loop(model.to('{device}'), x[0].to('{device}'), {draws // 10}, 400, .25, "
        f"{INFO[data].classes})",
    }
    seconds = {}
    for kind, line in code.items():
        setup = "import torch, time\nfrom lib import Gaussian, ModelCounts\n"
        setup += "from benchmarks.engine import field_loop, network\n"
        setup += f"model, x = network('{name}'), torch.rand({examples}, *{INFO[data].shape})\n"
        setup += "start = time.perf_counter()\n"
        command = [sys.executable, "-c", f"{setup}{line}\nprint(time.perf_counter() - start)"]
        seconds[kind] = float(
            subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]
        )
    ours, theirs = seconds["engine"], seconds["field"] * 10 * examples
    print(
        f"\nWhole job on {name}, {examples} examples x {draws:,} draws: "
        f"engine {ours:,.0f} s with tuning and compile,",
        end=" ",
    )
    print(
        f"field's loop {theirs:,.0f} s (extrapolated from {draws // 10:,} draws), "
        f"ratio {theirs / ours:.1f}.",
        flush=True,
    )


def machine():
    flags = pathlib.Path("/proc/cpuinfo")
    flags = (
        next((line for line in flags.read_text().splitlines() if line.startswith("flags")), "")
        if flags.exists()
        else ""
    )
    wanted = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "avx_vnni", "amx_bf16", "amx_int8")
    names = [flag for flag in wanted if flag in flags.split()]
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    print(
        f"{platform.machine()}, {torch.get_num_threads()} threads, "
        f"CPU flags: {' '.join(names) or 'none of note'}{gpu}; ",
        end="",
    )
    print(f"Python {platform.python_version()}, torch {torch.__version__}.")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--job", type=int, default=100_000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--networks", nargs="+")
    parser.add_argument("--kinds", nargs="+", help="only these rows of the tables")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--kind", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device, threads = arguments.device, arguments.threads
    if arguments.worker:
        return worker(arguments.worker, arguments.kind, threads, device)
    machine()
    names = arguments.networks or (["resnet20", "digits"] if device == "cpu" else list(NETWORKS))
    for name in names:
        compare(name, device, arguments.seconds, arguments.rounds, threads, 1, arguments.kinds)
    if device == "cpu" and arguments.processes > 1:
        compare(
            names[0], device, arguments.seconds, arguments.rounds, 1, arguments.processes,
            arguments.kinds,
        )  # fmt: skip
    if arguments.job:
        for name in names[:2]:
            whole_job(name, device, arguments.job)


if __name__ == "__main__":
    main()
