"""Runs use the hardware: the blocks of adaptive samplers are full."""

import numpy as np
import pytest
import torch
from torch import nn

from lib.engine import jobs
from lib.noise import Gaussian
from lib.samplers import Certify, InputSpecific
from lib.store.records import load_counts

ENGINE = {"dtype": torch.float32, "block": 64, "layout": "contiguous", "compile": False}


class Counting(nn.Module):
    """Votes by the first pixel, and counts its passes of a whole block."""

    def __init__(self):
        super().__init__()
        self.weight, self.passes = nn.Parameter(torch.ones(1)), 0

    def __deepcopy__(self, memo):
        return self

    def forward(self, x):
        self.passes += len(x) == 64
        first = (x.flatten(1)[:, 0] - 0.5) * self.weight
        return torch.stack([first, -first], dim=1)


def run(sampler, size, out, of=None):
    """(passes, votes [B, C]) of a run over the first of `of` images, some near the boundary."""
    of = of or size
    images = torch.linspace(0, 1, of)[:, None, None, None].expand(of, 1, 4, 4).contiguous()
    network, labels = Counting(), np.zeros(of, dtype=np.int64)
    index = np.arange(size)
    jobs.run(
        jobs.Job(network, "", images, labels, index, sampler, Gaussian(0.3), 0, out, {}, ENGINE)
    )
    return network.passes, load_counts(f"{out}.npz").counts


def run_until(group, monkeypatch, *given):
    """A run that meets Ctrl-C as this group begins, of groups of one example each."""
    certify, calls = jobs._certify_group, []

    def stopped(*given):
        calls.append(1)
        if len(calls) == group:
            raise KeyboardInterrupt
        return certify(*given)

    with monkeypatch.context() as patch:
        patch.setattr(jobs, "BLOCKS", 1)
        patch.setattr(jobs, "_certify_group", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(*given)


def test_the_first_stage_of_an_adaptive_sampler_fills_blocks(tmp_path, threads):
    """A group is sized by the first stage: 16 draws of each of 40 examples are ten full blocks,
    though one example alone could take more than twenty blocks of the second."""
    threads(1)
    passes, votes = run(InputSpecific(16, 2000, 0.05), 40, tmp_path / "log")
    second = votes.sum() - 40 * 16
    assert second > 64
    assert passes == 10 + -(-second // 64)


def test_a_fixed_sampler_is_journaled_after_few_blocks(tmp_path, monkeypatch):
    """Its blocks are full by themselves, and a kill loses a group at most."""
    groups, certify = [], jobs._certify_group
    monkeypatch.setattr(
        jobs, "_certify_group", lambda *given: groups.append(len(given[2])) or certify(*given)
    )
    passes, votes = run(Certify(60, 580), 10, tmp_path / "log")
    assert groups == [2] * 5
    assert (votes.sum(axis=1) == 640).all()
    assert passes <= 5 * (2 + 19)


def test_a_run_is_continued_with_more_examples_and_more_draws_at_once(tmp_path):
    run(Certify(20, 100), 5, tmp_path / "log", of=9)
    votes = run(Certify(20, 200), 6, tmp_path / "log", of=9)[1]
    assert (votes == run(Certify(20, 200), 6, tmp_path / "whole", of=9)[1]).all()
    with pytest.raises(ValueError, match="n0 = 20, not 30"):
        run(Certify(30, 400), 6, tmp_path / "log", of=9)


def test_a_stopped_run_is_continued_with_more_draws(tmp_path, monkeypatch):
    run_until(3, monkeypatch, Certify(20, 100), 5, tmp_path / "log")
    votes = run(Certify(20, 200), 5, tmp_path / "log")[1]
    assert (votes == run(Certify(20, 200), 5, tmp_path / "whole")[1]).all()


def test_draws_asked_for_by_mistake_and_stopped_at_once_bind_nobody(tmp_path, monkeypatch):
    before = run(Certify(20, 100), 5, tmp_path / "log")[1]
    run_until(1, monkeypatch, Certify(20, 10_000), 5, tmp_path / "log")
    assert (run(Certify(20, 100), 5, tmp_path / "log")[1] == before).all()
    # From the first result on they do.
    run_until(2, monkeypatch, Certify(20, 10_000), 5, tmp_path / "log")
    with pytest.raises(ValueError, match="n = 10000, not 100"):
        run(Certify(20, 100), 5, tmp_path / "log")
