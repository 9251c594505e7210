"""Several processes under torchrun: the result is that of one process, and a process that dies
loses only what it had not finished.
"""

import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from test_cli import ENGINE, ROOT, done, one_thread, without_time

from lib.engine import jobs
from lib.noise import Gaussian
from lib.samplers import Certify
from lib.store.journal import read_journal

__all__ = ["one_thread"]  # a fixture, used by itself
TORCHRUN = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc-per-node",
    "2",
    "-m",
    "--",
    "lib",
]
# Without --, Python's argparse would take --n and --max for abbreviations of torchrun's options.
JOB = [
    "certify",
    "digits-cnn-sigma0.50",
    "--sigma",
    "0.5",
    "--n0",
    "20",
    "--n",
    "2000",
    "--max",
    "60",
    *ENGINE,
]


def start(out):
    return subprocess.Popen(
        [*TORCHRUN, *JOB, "--out", str(out)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def processes(parent):
    """Process ids of the children of a process by their rank (Linux)."""
    found = {}
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            if int(re.search(r"\nPPid:\s(\d+)", (folder / "status").read_text())[1]) == parent:
                rank = re.search(rb"(?:^|\0)RANK=(\d+)", (folder / "environ").read_bytes())
                found[int(rank[1]) if rank else None] = int(folder.name)
        except (OSError, TypeError):  # ended meanwhile
            continue
    return found


def wait_for_lines(path, count, process):
    while process.poll() is None and (not path.exists() or path.read_bytes().count(b"\n") < count):
        time.sleep(0.005)


def test_two_processes_give_the_result_of_one_also_when_one_is_killed(tmp_path):
    done(*JOB, "--out", tmp_path / "one.tsv")
    killed = tmp_path / "killed.tsv"
    torchrun = start(killed)
    wait_for_lines(tmp_path / "killed.tsv.journal.part1", 4, torchrun)
    os.kill(processes(torchrun.pid)[1], signal.SIGKILL)
    said = torchrun.communicate(timeout=120)[0]
    assert torchrun.returncode != 0, said
    journals = [tmp_path / f"killed.tsv.journal{end}" for end in ("", ".part1")]
    entries = [entry for path in journals for entry in read_journal(path)[1].values()]
    finished = len(entries)
    assert 3 <= finished < 60, said
    # The rest by two processes again. What was finished is not counted a second time: its entries,
    # time included, are kept.
    torchrun = start(killed)
    said = torchrun.communicate(timeout=120)[0]
    assert torchrun.returncode == 0, said
    lost = re.search(r"(\d+) examples certified in .*, (\d+) were done before", said)
    assert int(lost[1]) + int(lost[2]) == 60
    assert int(lost[2]) == finished
    again = read_journal(tmp_path / "killed.tsv.journal")[1]
    assert all(again[entry["idx"]] == entry for entry in entries)
    assert without_time(killed) == without_time(tmp_path / "one.tsv")
    assert (tmp_path / "killed.tsv.npz").read_bytes() == (tmp_path / "one.tsv.npz").read_bytes()
    assert sorted(path.name for path in tmp_path.glob("killed*")) == [
        "killed.tsv",
        "killed.tsv.journal",
        "killed.tsv.npz",
    ]


def test_one_process_finishes_what_two_began(tmp_path):
    """Parts of a run of several processes, as a kill leaves them, are taken up by one; a part of
    more lines wins over a torn one.
    """
    done(*JOB, "--out", tmp_path / "one.tsv")
    out = tmp_path / "begun.tsv"
    torchrun = start(out)
    wait_for_lines(tmp_path / "begun.tsv.journal.part1", 4, torchrun)
    children = processes(torchrun.pid)
    torchrun.kill()
    for child in children.values():
        os.kill(child, signal.SIGKILL)
    torchrun.communicate()
    while any(
        pathlib.Path(f"/proc/{child}").exists()
        and "\nState:\tZ" not in pathlib.Path(f"/proc/{child}/status").read_text()
        for child in children.values()
    ):
        time.sleep(0.01)
    done(*JOB, "--out", out)
    assert without_time(out) == without_time(tmp_path / "one.tsv")
    assert (tmp_path / "begun.tsv.npz").read_bytes() == (tmp_path / "one.tsv.npz").read_bytes()


def test_a_process_with_other_settings_is_refused(tmp_path, monkeypatch):
    """A machine of the same run that was started with another line, seen from that machine."""

    class Group:
        def __init__(self, me, processes):
            pass

        def agree(self, name, function):
            noise = {"noise": Gaussian(0.25).describe()}
            return {"settings": job.settings | noise, "engine": {}, "todo": [0]}

    monkeypatch.setattr(jobs, "Group", Group)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    network, images = torch.nn.Linear(1, 2), torch.zeros(1, 1, 1, 1)
    job = jobs.Job(
        network, "", images, np.zeros(1, int), [0], Certify(), Gaussian(0.5), 0, tmp_path / "x.tsv"
    )
    with pytest.raises(
        ValueError, match=r"rank 1 has other settings than rank 0: sigma = 0\.25, not 0\.5"
    ):
        jobs.run(job)


def test_two_processes_end_together_where_one_fails(tmp_path):
    (tmp_path / "x.tsv").write_text("")
    torchrun = start(tmp_path / "x.tsv")
    said = torchrun.communicate(timeout=120)[0]
    assert torchrun.returncode == 1
    assert said.count("exists, but not how it was made") == 1
