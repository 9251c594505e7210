"""What an example's votes depend on, and what they do not.

Counts the votes that differ between runs that should agree, and between block sizes and precisions.

python -m benchmarks.exactness [--model digits-cnn-sigma0.50 | FILE] [--data-path FILE]
    [--sigma 0.5] [--examples 20] [--draws 20000] [--compiled]
Prints Markdown tables. --model resnet20 trains a ResNet-20 on the digits first (a minute).
"""

import argparse
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
import torch

from lib import BaseClassifier, Gaussian, ModelCounts, RecordedCounts, certify, zoo
from lib.data import load
from lib.metrics import average_certified_radius
from lib.models import load_checkpoint
from lib.store.records import load_counts

ROOT = pathlib.Path(__file__).parent.parent


def differing(a, b):
    """How many votes went to another class: each moves one vote from one class to another."""
    return int(np.abs(a - b).sum()) // 2


class Bench:
    def __init__(self, options, folder):
        self.spec, self.options, self.folder = options.model, options, pathlib.Path(folder)
        if self.spec == "resnet20":
            self.spec = str(self.folder / "resnet20.safetensors")
            train = [
                "train",
                "--architecture",
                "cifar_resnet20",
                "--sigma",
                str(options.sigma),
                "--epochs",
                "10",
                "--out",
                self.spec,
            ]
            subprocess.run(
                [sys.executable, "-m", "lib", *train],
                check=True,
                cwd=ROOT,
                stderr=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
        if self.spec in zoo.MODELS:
            self.model, self.data = zoo.model(self.spec), zoo.MODELS[self.spec].data
        else:
            self.model, header = load_checkpoint(self.spec)
            self.data = header["data"]
        self.x, self.labels = load(self.data, "test", path=options.data_path)
        self.noise = Gaussian(options.sigma)

    def base(self, dtype, block):
        return BaseClassifier(
            self.model,
            self.x.shape[1:],
            device="cpu",
            dtype=dtype,
            block=block,
            layout="channels_last",
            compile=self.options.compiled,
        )

    def votes(self, base, index, n):
        return ModelCounts(base, self.x[index], self.noise, index=index, progress=False).draw(n)

    def invariance(self, dtype):
        """Votes that differ from a reference under each change that should change none.

        The reference: the first examples in their order.
        """
        base, n, count = self.base(dtype, 256), self.options.draws, self.options.examples
        index = np.arange(count)
        reference = self.votes(base, index, n)
        found = {
            "order reversed": differing(self.votes(base, index[::-1].copy(), n)[::-1], reference)
        }
        among = np.sort(np.concatenate([index, np.arange(100, 100 + count)]))
        asked = np.where(among < count, n, 137)
        found["other examples in the run"] = differing(
            self.votes(base, among, asked)[: len(reference)], reference
        )
        single = ModelCounts(base, self.x[index[-1:]], self.noise, index=index[-1:], progress=False)
        pieces = sum(single.draw(m) for m in (1, 99, 333, n - 433))
        found["one example alone, in four pieces"] = differing(pieces[0], reference[-1])
        records = {processes: self.command(processes, dtype) for processes in (1, 2)}
        found["command line, one process"] = differing(records[1], reference)
        found["torchrun, two processes"] = differing(records[2], reference)
        return found

    def command(self, processes, dtype):
        out = self.folder / f"{processes}-{dtype}.tsv"
        run = (
            ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
            if processes > 1
            else []
        )
        job = [
            self.spec,
            "--sigma",
            self.options.sigma,
            "--N0",
            100,
            "--N",
            self.options.draws - 100,
            "--stop",
            self.options.examples,
            "--out",
            out,
        ]
        job += [
            "--dtype",
            str(dtype).removeprefix("torch."),
            "--block",
            256,
            "--layout",
            "channels_last",
            "--device",
            "cpu",
        ]
        job += ["--compile" if self.options.compiled else "--no-compile"]
        job += ["--data-path", self.options.data_path] if self.options.data_path else []
        command = [sys.executable, *run, "-m", "lib", "certify", *map(str, job)]
        subprocess.run(
            command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        return load_counts(f"{out}.npz").counts

    def precisions(self, examples=100, draws=10_000):
        """bfloat16 against float32 on the same noise.

        Returns (largest difference of a class's share in standard errors, differing votes, votes,
        average certified radius of each).
        """
        index = np.linspace(0, len(self.x) - 1, examples).astype(int)
        votes = {
            dtype: self.votes(self.base(dtype, 256), index, draws)
            for dtype in (torch.float32, torch.bfloat16)
        }
        single, half = votes.values()
        share = (single + half + 1) / (2 * draws + 2)
        error = np.sqrt(share * (1 - share) / draws)
        radius = []
        for counts in votes.values():
            found = certify(
                RecordedCounts(counts, index=index), self.noise, 100, draws - 100, 0.001
            )
            radius.append(average_certified_radius(found, self.labels[index]))
        return (
            float((np.abs(single - half) / draws / error).max()),
            differing(single, half),
            examples * draws,
            radius,
        )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="digits-cnn-sigma0.50")
    parser.add_argument("--data-path")
    parser.add_argument("--sigma", type=float, default=0.5)
    parser.add_argument("--examples", type=int, default=20)
    parser.add_argument("--draws", type=int, default=20_000)
    parser.add_argument("--compiled", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, folder)
        total = options.examples * options.draws
        compiled = "compiled" if options.compiled else "eager"
        ran = f"{options.model}, {compiled}, torch {torch.__version__}, "
        ran += f"{torch.get_num_threads()} threads"
        print(
            f"{ran}: differing votes of {total:,} ({options.examples} examples x "
            f"{options.draws:,} draws, block 256)\n"
        )
        found = {dtype: bench.invariance(dtype) for dtype in (torch.float32, torch.bfloat16)}
        print(
            "| against the same examples in order, one process | float32 | bfloat16 |\n"
            "| --- | ---: | ---: |"
        )
        for name in found[torch.float32]:
            print(f"| {name} | {found[torch.float32][name]} | {found[torch.bfloat16][name]} |")
        index = np.arange(options.examples)
        blocks = [
            differing(
                *(
                    bench.votes(bench.base(dtype, block), index, options.draws)
                    for block in (64, 256)
                )
            )
            for dtype in found
        ]
        print(f"| block 64 instead of 256 | {blocks[0]} | {blocks[1]} |")
        errors, moved, draws, radius = bench.precisions()
        print(
            f"\nbfloat16 against float32 on 100 examples x 10,000 draws, same noise: largest "
            f"difference of a class's share {errors:.2f} Monte Carlo "
            f"standard errors; {moved:,} of {draws:,} votes differ; ACR {radius[0]:.4f} (float32), "
            f"{radius[1]:.4f} (bfloat16)"
        )


if __name__ == "__main__":
    main()
