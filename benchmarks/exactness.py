"""What an example's votes depend on, and what they do not.

Differing votes between runs that should agree, and between block sizes and precisions:
python -m benchmarks.exactness [--model digits-cnn-sigma0.50 | FILE] [--int8 FILE] [--sigma 0.5]
    [--data-path FILE] [--dtypes float32 bfloat16] [--examples 20] [--draws 20000] [--compiled]
    [--against float32] [--shares 100 10000]
Prints Markdown tables. --model resnet20 trains a ResNet-20 on the digits first (a minute); --int8
is the 8-bit version of the model (python -m lib quantize), needed for the dtype int8.
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
        self.known = {}
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
        self.eight = options.int8 and load_checkpoint(options.int8)[0]
        self.x, self.labels = load(self.data, "test", path=options.data_path)
        self.noise = Gaussian(options.sigma)

    def base(self, dtype, block):
        return BaseClassifier(
            self.eight if dtype == "int8" else self.model,
            self.x.shape[1:],
            device="cpu",
            dtype=dtype,
            block=block,
            layout="channels_last",
            compile=self.options.compiled or dtype == "int8",
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
            self.options.int8 if dtype == "int8" else self.spec,
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
            dtype,
            "--block",
            256,
            "--layout",
            "channels_last",
            "--device",
            "cpu",
        ]
        job += ["--compile" if self.options.compiled or dtype == "int8" else "--no-compile"]
        job += ["--data-path", self.options.data_path] if self.options.data_path else []
        command = [sys.executable, *run, "-m", "lib", "certify", *map(str, job)]
        subprocess.run(
            command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        return load_counts(f"{out}.npz").counts

    def counted(self, dtype, index, draws):
        """The votes of some test images, counted once."""
        key = (dtype, len(index), draws)
        if key not in self.known:
            self.known[key] = self.votes(self.base(dtype, 256), index, draws)
        return self.known[key]

    def precision(self, dtype, examples, draws):
        """A dtype against another on the same noise, as one row of a table.

        The largest difference of a class's share in Monte Carlo standard errors, the votes that
        differ, and the ACR of both.
        """
        index = np.arange(examples) * (len(self.x) // examples)
        pair = [self.counted(name, index, draws) for name in (self.options.against, dtype)]
        share = (sum(pair) + 1) / (2 * draws + 2)
        error = np.sqrt(share * (1 - share) / draws)
        radius = []
        for counts in pair:
            found = certify(
                RecordedCounts(counts, index=index), self.noise, 100, draws - 100, 0.001
            )
            radius.append(average_certified_radius(found, self.labels[index]))
        largest, moved = float((np.abs(pair[0] - pair[1]) / draws / error).max()), differing(*pair)
        return (
            f"{largest:.2f} | {moved:,} of {examples * draws:,} | {radius[0]:.4f} / {radius[1]:.4f}"
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
    parser.add_argument("--int8")
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--against", default="float32", help="the dtype that others are held to")
    parser.add_argument("--shares", nargs=2, type=int, default=[100, 10_000])
    options = parser.parse_args()
    how = "compiled" if options.compiled else "eager (int8 compiled)"
    ran = f"{options.model}, {how}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, folder)
        if options.examples:
            print_invariance(bench, ran)
        examples, draws = options.shares
        others = [dtype for dtype in options.dtypes if dtype != options.against]
        if examples and others:
            print(f"\n{ran}: {examples} examples x {draws:,} draws, the same noise\n")
            print(
                f"| against {options.against} | largest difference of a class's fraction, in Monte "
                "Carlo standard errors | votes that differ | ACR of both |\n"
                "| --- | ---: | ---: | --- |"
            )
        for dtype in others if examples else []:
            print(f"| {dtype} | {bench.precision(dtype, examples, draws)} |", flush=True)


def print_invariance(bench, ran):
    options = bench.options
    total = options.examples * options.draws
    print(
        f"{ran}: differing votes of {total:,} ({options.examples} examples x {options.draws:,} "
        "draws, block 256)\n"
    )
    found = {dtype: bench.invariance(dtype) for dtype in options.dtypes}
    index = np.arange(options.examples)
    for dtype in found:
        pair = (bench.votes(bench.base(dtype, block), index, options.draws) for block in (64, 256))
        found[dtype]["block 64 instead of 256"] = differing(*pair)
    print(f"| against the same examples in order, one process | {' | '.join(found)} |")
    print(f"| --- |{' ---: |' * len(found)}")
    for name in found[options.dtypes[0]]:
        print(f"| {name} | {' | '.join(str(found[dtype][name]) for dtype in found)} |", flush=True)


if __name__ == "__main__":
    main()
