"""Cost of data-dependent smoothing against the published listings. Prints Markdown tables.

python -m benchmarks.sigma [POINTS ...]
Processor time of one thread. The search: image-steps per second on a ResNet-20, beside the listing
of Alfarra et al. (2022, appendix A) run eagerly in float32, and beside the draws of a certificate.
The memory: seconds and peak memory to add so many points of 3x32x32, beside the listing of appendix
C (its errors of syntax mended), which compares each new point with a stack of all earlier ones: its
time grows at least with the square of their number, and beyond 10,000 is extrapolated so.
"""

import pathlib
import subprocess
import sys
import time

import numpy as np
import torch

from lib.certify import Certificates
from lib.data import load
from lib.engine.classifier import BaseClassifier
from lib.engine.live import ModelCounts
from lib.experiments import ENGINES
from lib.memory import CertificateMemory
from lib.models import build
from lib.noise import Gaussian
from lib.sigma import optimize_sigma
from lib.zoo import model

IMAGES, STEPS, LISTING = 128, 5, 10_000


def seconds(function, times=3):
    """Least processor time of a call."""
    taken = []
    for _ in range(times):
        begin = time.process_time()
        function()
        taken.append(time.process_time() - begin)
    return min(taken)


def search_listing(network, x, sigma0, steps):
    sigma = torch.full((len(x), 1, 1, 1), sigma0, requires_grad=True)
    normal = torch.distributions.Normal(torch.zeros(len(x)), torch.ones(len(x)))
    for _ in range(steps):
        scores = network(x + torch.randn_like(x) * sigma).softmax(1)
        high, low = scores.topk(2).values.T
        gap = normal.icdf(high.clamp(0.02, 0.98)) - normal.icdf(low.clamp(0.02, 0.98))
        (slope,) = torch.autograd.grad((sigma.view(-1) / 2 * gap).sum(), sigma)
        sigma.data += 1e-4 * slope


def searches():
    torch.manual_seed(0)
    network, x = build("cifar_resnet20", "cifar10").eval(), torch.rand(IMAGES, 3, 32, 32)
    base = BaseClassifier(network, x.shape[1:], **ENGINES["cifar10"] | {"dtype": torch.bfloat16})
    counts = ModelCounts(base, x[:4], Gaussian(0.25), progress=False)
    listing = seconds(lambda: search_listing(network, x, 0.25, STEPS))
    ours = seconds(lambda: optimize_sigma(base, x, 0.25, STEPS, progress=False))
    draw = seconds(lambda: counts.draw(500)) / 2_000
    print("| ResNet-20, one thread | image-steps/s | ratio |\n| --- | ---: | ---: |")
    print(f"| listing, float32, eager, batch {IMAGES} | {IMAGES * STEPS / listing:,.0f} | 1.0 |")
    rate = IMAGES * STEPS / ours
    print(f"| optimize_sigma, bfloat16, blocks of 64 | {rate:,.0f} | {listing / ours:.1f} |")
    print(f"\nK = 900 is {900 / rate / (100_100 * draw):.1%} of 100,100 draws of an image.")
    x = load("digits", "test")[0]
    small = BaseClassifier(
        model("digits-cnn-sigma0.25"), x.shape[1:], block=400, layout="contiguous", compile=False
    )
    taken = seconds(lambda: optimize_sigma(small, x, 0.25, 900, progress=False), 1)
    print(f"\n360 digits, K = 900: {taken:.1f} s.\n")


def points_like_images(size):
    """Smooth colour fields and pixel noise, about as far apart as natural images are."""
    rng = np.random.default_rng(0)
    coarse = rng.random((size, 3, 4, 4), dtype=np.float32)
    x = coarse.repeat(8, axis=2).repeat(8, axis=3)
    x += 0.1 * rng.random(x.shape, dtype=np.float32)
    classes, radii = rng.integers(0, 10, size), rng.exponential(0.5, size)
    return x, Certificates(classes, radii, np.zeros(size), np.zeros(size, dtype=np.int64))


def add_listing(x, found):
    images, radii, classes = [], [], []
    for image, label, radius in zip(
        torch.from_numpy(x), found.prediction, found.radius, strict=True
    ):
        if images:
            apart = torch.norm(
                image.reshape(1, -1) - torch.stack(images).reshape(len(images), -1), dim=1
            )
            if (apart < torch.tensor(radii) + radius).any():
                raise SystemExit("the listing meets an overlap, which it cannot handle")
        images.append(image)
        radii.append(radius)
        classes.append(label)


def peak_memory():
    """Peak resident memory of this process in MB since `forget_peak` (Linux)."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def forget_peak():
    pathlib.Path("/proc/self/clear_refs").write_text("5")


def worker(points, who):
    x, found = points_like_images(points)
    forget_peak()
    before, begin = peak_memory(), time.process_time()
    if who == "listing":
        add_listing(x, found)
    else:
        CertificateMemory().add_all(x, found)
    print(time.process_time() - begin, peak_memory() - before, x.nbytes / 2**20)


def run_worker(points, who):
    command = [sys.executable, "-m", "benchmarks.sigma", "worker", str(points), who]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [float(value) for value in output.split()]


def main(*arguments):
    torch.set_num_threads(1)
    if arguments[:1] == ("worker",):
        return worker(int(arguments[1]), arguments[2])
    if not arguments:
        searches()
    sizes = [int(a) for a in arguments] or [2_000, LISTING, 50_000]
    print("| points added | seconds | listing, seconds | ratio | peak (MB) | listing's peak (MB) |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: |")
    for size in sizes:
        ours, peak, held = run_worker(size, "ours")
        theirs, most, _ = run_worker(min(size, LISTING), "listing")
        theirs *= max(1, size / LISTING) ** 2
        mine = f"{peak:,.0f} (a copy of the points: {held:,.0f})"
        most = f"{most:,.0f}" if size <= LISTING else ""
        cells = [f"{size:,}", f"{ours:.2f}", f"{theirs:,.1f}", f"{theirs / ours:,.0f}", mine, most]
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
