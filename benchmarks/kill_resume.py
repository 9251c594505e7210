"""A certification killed at random moments and started again until it is done.

    python -m benchmarks.kill_resume [--kills 10] [--seed 0] [--processes 1]

It is killed with SIGKILL, and compared with one that was left alone. Prints a Markdown table and
whether log (but for its times) and record are the same to the last byte.
"""

import argparse
import contextlib
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

from lib.store.journal import read_journal

STARTS = 3.0  # seconds, about, until a process counts (under torchrun twice as many)
ROOT = pathlib.Path(__file__).parent.parent
JOB = ["certify", "digits-cnn-sigma0.50", "--sigma", "0.5", "--N0", "100", "--N", "20000"]
JOB += ["--dtype", "float32", "--block", "256", "--no-compile", "--layout", "contiguous"]


def start(out, processes):
    run = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        if processes > 1
        else []
    )
    command = [sys.executable, *run, "-m", "lib", *JOB, "--out", str(out)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def finished(out):
    """Finished examples on disk, in the journal of the run and those of its other processes."""
    journals = out.parent.glob(f"{out.name}.journal*")
    return sum(len(read_journal(path)[1]) for path in journals)


def without_time(log):
    return [
        [cell for i, cell in enumerate(line.split("\t")) if i != 5]
        for line in log.read_text().splitlines()
    ]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        alone, out = pathlib.Path(folder) / "alone.tsv", pathlib.Path(folder) / "killed.tsv"
        begin = time.perf_counter()
        if start(alone, 1).wait():
            raise SystemExit("the run that was left alone failed")
        whole = time.perf_counter() - begin
        print("| kill | after (s) | examples on disk |\n| ---: | ---: | ---: |")
        for kill in range(1, options.kills + 1):
            process = start(out, options.processes)
            # One kill in five comes while it still imports and reads; the others come so early in
            # the counting that all of them together leave some of it.
            starts = STARTS * min(options.processes, 2)
            moment = (
                rng.uniform(0, starts)
                if rng.random() < 0.2
                else starts + rng.uniform(0, 1.6 * (whole - STARTS) / options.kills)
            )
            try:
                process.wait(timeout=moment)
            except subprocess.TimeoutExpired:
                # All at once, as when a machine is lost: torchrun and its workers, whose command
                # lines name the log, too.
                for one in _processes(out):
                    os.kill(one, signal.SIGKILL)
                process.wait()
                while _processes(out):
                    time.sleep(0.05)
            print(f"| {kill} | {moment:.2f} | {finished(out)} |")
        if start(out, options.processes).wait():
            raise SystemExit("the last run failed")
        same = without_time(out) == without_time(alone)
        records = (
            pathlib.Path(f"{out}.npz").read_bytes() == pathlib.Path(f"{alone}.npz").read_bytes()
        )
        lines = len(without_time(out)) - 1
        words = {True: "the same", False: "DIFFERS"}
        print(
            f"\n{lines} examples after {options.kills} kills: log {words[same]}, record "
            f"{words[records]}"
        )
        sys.exit(0 if same and records else 1)


def _processes(out):
    """Ids of the processes of a run (Linux); one that has ended has no command line any more."""
    ids = []
    for process in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if str(out).encode() in (process / "cmdline").read_bytes():
                ids.append(int(process.name))
    return ids


if __name__ == "__main__":
    main()
