"""Runs use the hardware: the blocks of adaptive samplers are full."""

import dataclasses

import numpy as np
import pytest
import torch
from sources import write_journal
from torch import nn

from lib.certify import certify
from lib.engine import classifier, jobs
from lib.engine.live import ModelCounts
from lib.engine.settings import SETTINGS
from lib.ensemble import VOTES, Ensemble
from lib.noise import Gaussian
from lib.samplers import (
    SAMPLERS,
    Adaptive,
    Anytime,
    Certify,
    InputSpecific,
    Margin,
    Partition,
    RecordVotes,
    Staircase,
)
from lib.store.journal import read_journal
from lib.store.records import load_counts, save_counts

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


def job(sampler, size, out, of=None):
    """The first `size` of `of` images, some near the boundary."""
    of = of or size
    images = torch.linspace(0, 1, of)[:, None, None, None].expand(of, 1, 4, 4).contiguous()
    labels, index = np.zeros(of, dtype=np.int64), np.arange(size)
    noise = Gaussian(0.3)
    return jobs.Job(Counting(), "", images, labels, index, sampler, noise, 0, out, {}, ENGINE)


def run(*given, **keywords):
    """(passes, votes [B, C]) of a run."""
    task = job(*given, **keywords)
    jobs.run(task)
    return task.model.passes, load_counts(task.path(".npz")).counts


def run_until(group, monkeypatch, *given):
    """A run that meets Ctrl-C as this group begins, of groups of one example each."""
    certify, calls = jobs.certify_group, []

    def stopped(*given):
        calls.append(1)
        if len(calls) == group:
            raise KeyboardInterrupt
        return certify(*given)

    with monkeypatch.context() as patch:
        patch.setattr(jobs, "BLOCKS", 1)
        patch.setattr(jobs, "certify_group", stopped)
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


EVERY = [
    Certify(20, 300),
    InputSpecific(20, 300),
    Margin(20, 300),
    Partition(20, 300),
    Adaptive(radius="0.1", stages="50,400", n0=20),
    Anytime(radius="0.1", n=300),
    Staircase(20, 300),
]


def test_every_sampler_is_among_those_run_here():
    assert {type(sampler) for sampler in EVERY} == {c for c in SAMPLERS.values() if c.certifies}


@pytest.mark.parametrize("sampler", EVERY, ids=lambda s: type(s).__name__)
def test_a_run_certifies_as_the_sampler_called_directly(sampler, tmp_path):
    """And its record holds the votes that the network gave."""
    task = job(sampler, 9, tmp_path / "log")
    jobs.run(task)
    source = ModelCounts(Counting(), task.images, task.noise, seed=0, progress=False, **ENGINE)
    expected = sampler(source, task.noise)
    found = list(read_journal(task.path(".journal"))[1].values())
    assert [entry["predict"] for entry in found] == expected.prediction.tolist()
    assert [entry["radius"] for entry in found] == pytest.approx(expected.radius.tolist())
    assert (load_counts(task.path(".npz")).counts == source.votes).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": lambda x: x}, "model must be a torch.nn.Module"),
        ({"images": torch.zeros(4, 1, 4, 4, dtype=torch.uint8)}, "images: .* float32 .*255"),
        ({"images": np.full((4, 1, 4, 4), 2, np.float32)}, "images: .* pixels in .*0, 1"),
        ({"images": torch.zeros(4, 4, 4)}, "images: .* shape"),
        ({"images": [torch.zeros(1, 4, 4)] * 4}, "images must be .* got list"),
        ({"index": []}, "index must name at least one example"),
        ({"sampler": certify}, r"sampler must be .*Certify\(n=100_000\); got certify"),
        ({"sampler": Certify}, "sampler must be .* got Certify"),
        ({"noise": 0.25}, r"noise must be .*Gaussian\(0.25\); got float"),
    ],
)
def test_a_job_names_the_argument_that_it_cannot_use(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(job(Certify(20, 100), 4, tmp_path / "log"), **change)


def test_a_job_takes_numpy_images_and_no_settings(tmp_path):
    task = job(Certify(20, 100), 4, tmp_path / "log")
    plain = dataclasses.replace(
        task, images=task.images.numpy(), settings=None, out=tmp_path / "plain"
    )
    jobs.run(task)
    jobs.run(plain)
    assert (tmp_path / "log.npz").read_bytes() == (tmp_path / "plain.npz").read_bytes()


def test_a_sampler_that_reckons_in_the_votes_it_is_given_spoils_no_record(tmp_path, monkeypatch):
    expected, certify = run(Certify(20, 100), 5, tmp_path / "whole")[1], Certify.__call__

    def careless(sampler, counts, noise):
        found = certify(sampler, counts, noise)
        counts.draw(0)[:] = 7
        return found

    monkeypatch.setattr(Certify, "__call__", careless)
    assert (run(Certify(20, 100), 5, tmp_path / "log")[1] == expected).all()


def test_a_fixed_sampler_is_journaled_after_few_blocks(tmp_path, monkeypatch):
    """Its blocks are full by themselves, and a kill loses a group at most."""
    groups, certify = [], jobs.certify_group
    monkeypatch.setattr(
        jobs, "certify_group", lambda *given: groups.append(len(given[2])) or certify(*given)
    )
    passes, votes = run(Certify(60, 580), 10, tmp_path / "log")
    assert groups == [2] * 5
    assert (votes.sum(axis=1) == 640).all()
    assert passes <= 5 * (2 + 19)


def test_a_continued_run_fills_blocks_with_the_draws_that_it_lacks(tmp_path, threads):
    """Sixteen more draws of each of 40 examples are ten full blocks, not 40 blocks of one."""
    threads(1)
    run(Certify(60, 4800), 40, tmp_path / "log")
    passes, votes = run(Certify(60, 4816), 40, tmp_path / "log")
    assert (votes.sum(axis=1) == 4876).all()
    assert passes == 10


def test_a_sampler_that_wrongly_says_it_is_fixed_is_told_at_once(tmp_path, monkeypatch):
    """Else its run would never end: its examples would have fewer draws than `most` for ever."""
    monkeypatch.setattr(InputSpecific, "fixed", True)
    with pytest.raises(ValueError, match="but states fixed = True with 2016"):
        run(InputSpecific(16, 2000, 0.05), 9, tmp_path / "log")


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


@pytest.fixture
def on(monkeypatch):
    """Makes this a machine of another type."""
    return lambda kind: monkeypatch.setattr(classifier, "processor", lambda device: kind)


def types(out):
    return load_counts(f"{out}.npz").header.get("processor")


def test_a_run_that_continues_on_another_type_of_machine_says_so_once(tmp_path, on, caplog):
    out, said = tmp_path / "log", []
    for size, kind in enumerate(["A", "A", "B", "B", "A", "C"], start=1):
        on(kind)
        run(Certify(20, 100), size, out, of=9)
        said.append("another type of machine" in caplog.text)
        caplog.clear()
        run(Certify(20, 100), size, out, of=9)  # nothing is left to do
        assert "WARNING" not in [record.levelname for record in caplog.records]
    assert said == [False, False, True, False, False, True]
    assert types(out) == "A, B, C"


def test_what_is_older_than_the_type_of_machine_continues_as_unknown(tmp_path, on, caplog):
    """A journal and a record; one with nothing left to do stays as it is."""
    out = tmp_path / "log"
    run(Certify(20, 100), 3, out, of=9)
    made, entries = read_journal(f"{out}.journal")
    del made["engine"]["processor"]
    write_journal(f"{out}.journal", made, entries.values())
    votes = tmp_path / "votes"
    run(RecordVotes(100), 3, votes)
    record = load_counts(f"{votes}.npz")
    del record.header["processor"]
    save_counts(f"{votes}.npz", record.counts, record.index, record.labels, **record.header)
    on("B")
    run(Certify(20, 100), 3, out, of=9)
    run(RecordVotes(100), 3, votes)
    assert (types(out), types(votes)) == (None, None)
    run(Certify(20, 100), 4, out, of=9)
    run(RecordVotes(200), 3, votes)
    assert (types(out), types(votes)) == ("unknown, B", "unknown, B")
    assert "WARNING" not in [record.levelname for record in caplog.records]


class Group:
    """The second of two processes, whose first has only planned the run."""

    def __init__(self, me, processes):
        pass

    def agree(self, name, function):
        return self.plan

    def arrive(self, name):
        pass


def run_as_second(task, monkeypatch):
    """The second process's share of a run that the first has opened."""
    with monkeypatch.context() as patch:
        patch.setattr(jobs, "Group", Group)
        patch.setenv("RANK", "1")
        patch.setenv("WORLD_SIZE", "2")
        jobs.run(task)


def test_processes_on_machines_of_two_types_are_both_listed(
    tmp_path, on, monkeypatch, caplog, threads
):
    threads(1)
    task = job(Certify(20, 100), 6, tmp_path / "log")
    on("A")
    with jobs._opened(task) as (_, Group.plan):
        pass
    on("B")
    run_as_second(task, monkeypatch)
    assert caplog.text.count("another type of machine (A) and continues on B") == 1
    assert len(read_journal(f"{task.out}.journal.part1")[1]) == 3
    on("A")
    jobs.run(task)
    assert types(task.out) == "A, B"
    votes = load_counts(f"{task.out}.npz").counts
    assert (votes == run(Certify(20, 100), 6, tmp_path / "whole")[1]).all()


def test_every_process_continues_the_votes_of_its_share(tmp_path, monkeypatch, threads):
    """100 draws more of each of three examples are five blocks; from the start it would be 11."""
    threads(1)
    out = tmp_path / "log"
    run(Certify(20, 100), 6, out)
    task = job(Certify(20, 200), 6, out)
    with jobs._opened(task) as (_, Group.plan):
        pass
    run_as_second(task, monkeypatch)
    assert task.model.passes == 5
    votes = run(Certify(20, 200), 6, out)[1]
    assert (votes == run(Certify(20, 200), 6, tmp_path / "whole")[1]).all()


def test_the_settings_of_a_run_are_those_of_the_engine():
    base = classifier.BaseClassifier(Counting(), (1, 4, 4), **ENGINE)
    assert tuple(base.settings) == SETTINGS


def test_a_run_is_not_continued_by_a_network_whose_code_has_changed(tmp_path, monkeypatch):
    """Of the same weights: neither a finished run, nor one that was stopped or wants more draws."""
    run(Certify(20, 100), 5, tmp_path / "done")
    run_until(3, monkeypatch, Certify(20, 100), 5, tmp_path / "stopped")
    run(RecordVotes(100), 5, tmp_path / "record")
    with monkeypatch.context() as patch:
        forward = Counting.forward
        patch.setattr(Counting, "forward", lambda self, x: forward(self, x) * 1.1)
        for out, n in (("done", 100), ("done", 200), ("stopped", 100)):
            with pytest.raises(ValueError, match="other code: model gives other values"):
                run(Certify(20, n), 5, tmp_path / out)
    assert run(Certify(20, 100), 5, tmp_path / "done")[0] == 0
    assert (run(Certify(20, 100), 5, tmp_path / "stopped")[1].sum(axis=1) == 120).all()


def test_a_run_is_not_continued_by_a_noise_whose_code_has_changed(tmp_path, monkeypatch):
    run_until(3, monkeypatch, Certify(20, 100), 5, tmp_path / "log")
    sample = Gaussian.sample
    monkeypatch.setattr(
        Gaussian, "sample", lambda self, x, generator: (sample(self, x, generator) - x) * 1.05 + x
    )
    with pytest.raises(ValueError, match="other code: noise gives other values"):
        run(Certify(20, 100), 5, tmp_path / "log")


@pytest.mark.parametrize("n", [100, 200])
def test_a_run_is_not_continued_by_a_sampler_whose_code_has_changed(tmp_path, monkeypatch, n):
    run_until(3, monkeypatch, Certify(20, 100), 5, tmp_path / "log")
    call = Certify.__call__
    with monkeypatch.context() as patch:
        patch.setattr(
            Certify,
            "__call__",
            lambda self, *args: call(dataclasses.replace(self, alpha=0.9), *args),
        )
        with pytest.raises(ValueError, match="other code: sampler gives other values"):
            run(Certify(20, n), 5, tmp_path / "log")
    assert run(Certify(20, n), 5, tmp_path / "log")[0] > 0
    begun = read_journal(tmp_path / "log.journal")[0]["probe"]
    assert begun["n"] == [100]  # what later runs are compared with, too


@pytest.mark.parametrize("sampler", [Certify(20, 100), RecordVotes(100)])
def test_a_run_is_not_continued_by_a_vote_whose_code_has_changed(tmp_path, monkeypatch, sampler):
    names = "hard:0-1" if sampler.certifies else ("member:0", "hard:0-1")
    networks = Ensemble([Counting(), Counting()])
    task = dataclasses.replace(
        job(sampler, 3, tmp_path / "log"), model=networks, readouts=names, settings={}
    )
    with jobs._opened(task) as (journal, plan):
        jobs._work(task, plan, journal, plan["todo"][:2], {})
    hard = VOTES["hard"]
    other = dataclasses.replace(hard, pool=lambda *args: -hard.pool(*args))
    with monkeypatch.context() as patch:
        patch.setitem(VOTES, "hard", other)
        with pytest.raises(ValueError, match="other code: vote gives other values"):
            jobs.run(task)
    assert jobs.run(task) == 1


def test_slight_rounding_and_a_network_that_draws_at_random_continue(tmp_path, monkeypatch):
    forward = Counting.forward
    monkeypatch.setattr(
        Counting, "forward", lambda self, x: forward(self, x) + 0.01 * torch.rand(len(x), 1)
    )
    run_until(3, monkeypatch, Certify(20, 100), 5, tmp_path / "log")
    torch.rand(7)
    noisy = Counting.forward
    monkeypatch.setattr(Counting, "forward", lambda self, x: noisy(self, x) * (1 + 1e-4))
    assert run(Certify(20, 100), 5, tmp_path / "log")[0] > 0


def test_a_run_of_an_older_version_kept_no_probe_and_continues(tmp_path, monkeypatch):
    run_until(3, monkeypatch, Certify(20, 100), 5, tmp_path / "log")
    made, entries = read_journal(tmp_path / "log.journal")
    write_journal(
        tmp_path / "log.journal", {k: made[k] for k in made if k != "probe"}, entries.values()
    )
    assert run(Certify(20, 100), 5, tmp_path / "log")[0] > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_network_of_another_precision_is_tried_in_its_own(tmp_path, dtype):
    task = job(Certify(20, 100), 3, tmp_path / "log")
    task.model.to(dtype)
    task = dataclasses.replace(task, settings={})  # its hash is that of these weights
    jobs.run(task)
    assert read_journal(tmp_path / "log.journal")[0]["probe"]["model"]
