"""The Python of README.md runs as it stands, but for fewer draws."""

import pathlib
import re
import sys

import numpy as np
import pytest

from lib.__main__ import certify
from lib.noise import Gaussian
from lib.store.logs import read_log
from lib.store.records import load_counts, save_counts

README = (pathlib.Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def runs(mark, **known):
    """The names that the one block with `mark` leaves, beside those `known` from earlier blocks."""
    (block,) = [block for block in BLOCKS if mark in block]
    exec(block.replace("n=10_000", "n=200"), known)
    return known


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_ten_lines_and_several_networks():
    left = runs("average_certified_radius")
    assert left["certificates"].frame(left["y"])["correct"].mean() > 0.9
    few = {name: left[name] for name in ("zoo", "noise", "ModelCounts", "certify")}
    left = runs("readouts=", x=left["x"][:10], **few)
    assert (left["certificates"].radius > 0).any()


def test_a_record_is_replayed():
    header = {"noise": Gaussian(0.25).describe(), "fixed_draws": True}
    save_counts("runs/digits.tsv.npz", [[300, 20]], np.array([0]), np.array([0]), **header)
    assert runs("RecordedCounts")["certificates"].radius > 0


def test_a_job_leaves_its_log_and_record():
    left = runs("Job(")
    log = read_log("runs/job.tsv")
    assert log["idx"].tolist() == left["index"].tolist()
    assert log["correct"].mean() > 0.8
    assert load_counts("runs/job.tsv.npz").draws == 1100


def test_an_architecture_of_ones_own_is_registered(monkeypatch):
    """The block ends in the command line."""
    from lib.models import ARCHITECTURES

    monkeypatch.setitem(ARCHITECTURES, "mynet", None)  # taken out again afterwards
    monkeypatch.setattr(sys, "argv", ["mine.py", "--version"])
    with pytest.raises(SystemExit) as ended:
        runs("ARCHITECTURES[", MyNet=lambda shape, classes: (shape, classes))
    assert ended.value.code == 0
    assert ARCHITECTURES["mynet"]((1, 8, 8), 10) == ((1, 8, 8), 10)


def test_torchrun_is_told_where_its_own_options_end():
    """Else it takes --n, --max or --start for abbreviations of them."""
    texts = [README, certify.__doc__]
    commands = [part.split("lib")[0] for text in texts for part in text.split("torchrun ")[1:]]
    assert len(commands) >= 3
    assert all(command.endswith(" -m -- ") for command in commands if "nproc" in command)


def test_every_block_is_run_here():
    marks = "average_certified_radius", "readouts=", "RecordedCounts", "Job(", "ARCHITECTURES["
    assert [sum(mark in block for mark in marks) for block in BLOCKS] == [1] * len(marks)
