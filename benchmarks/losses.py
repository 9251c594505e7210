"""What an epoch of each training loss costs, relative to Gaussian augmentation with one noise.

    python -m benchmarks.losses [--rounds 5] [--steps 4] [--network small_cnn]

One step (loss, backward, SGD) of the same batch is timed for each loss in turn, round after round;
the median over rounds of the ratio to the Gaussian step of the same round is printed, beside
the number of forward and backward passes that the loss must pay. On one core, in processor time,
so that other work on the machine disturbs little. Prints a Markdown table.
"""

import argparse
import statistics
import time

from benchmarks.samplers import processor  # isort: skip (sets one thread before numpy is loaded)

import torch

from lib.losses import (
    CatRsLoss,
    ConsistencyLoss,
    GaussianLoss,
    MacerLoss,
    SmoothAdvConsistencyLoss,
    SmoothAdvLoss,
    StabilityLoss,
)
from lib.models import build
from lib.noise import Gaussian

LOSSES = {
    "Gaussian": GaussianLoss(),
    "Gaussian, m = 2": GaussianLoss(m=2),
    "stability": StabilityLoss(),
    "consistency, m = 2": ConsistencyLoss(),
    "MACER, k = 16": MacerLoss(),
    "SmoothAdv, PGD of 2 steps, m = 2": SmoothAdvLoss(steps=2, m=2),
    "SmoothAdv, DDN of 4 steps, m = 2": SmoothAdvLoss(steps=4, m=2, attack="ddn"),
    "consistency on SmoothAdv, 2 steps, m = 2": SmoothAdvConsistencyLoss(steps=2, m=2),
    "CAT-RS, 4 steps, m = 4": CatRsLoss(),
}
DATA = {"small_cnn": ("digits", (1, 8, 8)), "cifar_resnet20": ("cifar10", (3, 32, 32))}


def step_seconds(loss, network, steps, batch):
    """Processor seconds of `steps` training steps of one loss on a fixed batch."""
    data, shape = DATA[network]
    torch.manual_seed(0)
    model = build(network, data).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, nesterov=True)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(batch, *shape, generator=generator)
    y = torch.randint(10, (batch,), generator=generator)
    start = time.process_time()
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        loss(model, x, y, Gaussian(0.25), generator).backward()
        optimizer.step()
    return time.process_time() - start


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="of which the median is shown")
    parser.add_argument("--steps", type=int, default=4, help="training steps a measurement")
    parser.add_argument("--batch", type=int, default=64, help="images a step")
    parser.add_argument("--network", choices=DATA, default="small_cnn")
    given = parser.parse_args()
    torch.set_num_threads(1)
    measure = (given.network, given.steps, given.batch)
    step_seconds(LOSSES["Gaussian"], *measure)  # the first steps also set the libraries up
    ratios = {name: [] for name in LOSSES}
    for _ in range(given.rounds):
        seconds = {name: step_seconds(loss, *measure) for name, loss in LOSSES.items()}
        for name in LOSSES:
            ratios[name].append(seconds[name] / seconds["Gaussian"])
    print(f"Machine: {processor()}, one core; {given.network}, batch {given.batch}, float32.\n")
    print("| loss | passes | cost relative to Gaussian | cost / passes |")
    print("| --- | ---: | ---: | ---: |")
    for name, loss in LOSSES.items():
        ratio = statistics.median(ratios[name])
        print(f"| {name} | {loss.passes} | {ratio:.2f} | {ratio / loss.passes:.2f} |")


if __name__ == "__main__":
    main()
