"""The command line: what it writes, what it refuses, and that a run interrupted anywhere ends as if
it had not been.
"""

import csv
import datetime
import fcntl
import json
import os
import pathlib
import random
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch
from sources import write_journal
from test_recipes import made_up_cifar10
from typer.testing import CliRunner

import lib
from lib import __main__ as cli
from lib import data, recipes, zoo
from lib.certify import certify
from lib.counts import RecordedCounts
from lib.engine import jobs
from lib.engine.classifier import BaseClassifier
from lib.engine.live import ModelCounts
from lib.ensemble import Ensemble
from lib.iss import certify_iss, sample_size_map
from lib.models import load_checkpoint, model_hash
from lib.noise import Gaussian
from lib.samplers import SAMPLERS, Certify
from lib.store.journal import read_journal
from lib.store.records import load_counts, save_counts

ROOT = pathlib.Path(__file__).parent.parent
PUBLISHED = ROOT / "data/records/imagenet-resnet50-consistency-sigma0.50.tsv"
ENGINE = ["--dtype", "float32", "--block", "64", "--layout", "contiguous", "--no-compile"]
SMALL = [
    "certify",
    "digits-cnn-sigma0.50",
    "--sigma",
    "0.5",
    "--n0",
    "20",
    "--n",
    "300",
    "--stop",
    "12",
    *ENGINE,
]


def call(*arguments):
    """(exit code, what it printed, what it said on the error stream) of a command."""
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def done(*arguments):
    code, printed, said = call(*arguments)
    assert code == 0, said
    return printed


def refused(*arguments, code=1):
    found, printed, said = call(*arguments)
    assert found == code, printed + said
    assert "Traceback" not in said
    # Wrong usage is told in a box.
    return " ".join(said.replace("│", " ").split()) if code == 2 else said


def without_time(path):
    """A log's rows as lists of cells, the time left out: by a reader of the format's description,
    not by lib's.
    """
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    for row in rows:
        time = row.pop("time")
        assert datetime.datetime.strptime(time if "." in time else f"{time}.0", "%H:%M:%S.%f")
    return [list(row.values()) for row in rows]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Blocks of 64 tiny images are too little work to share among threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The log of SMALL, certified in one go."""
    out = tmp_path_factory.mktemp("reference") / "small.tsv"
    done(*SMALL, "--out", out)
    return out


def test_the_log_and_the_record_are_those_of_the_library(reference):
    """The same certificates and votes as lib.certify on all images in one batch; the log read as
    the field's analysis reads it.
    """
    images, labels = data.load("digits", "test")
    base = BaseClassifier(
        zoo.model("digits-cnn-sigma0.50"),
        (1, 8, 8),
        dtype=torch.float32,
        block=64,
        layout="contiguous",
        compile=False,
    )
    counts = ModelCounts(base, images[:12], Gaussian(0.5), progress=False)
    expected = certify(counts, Gaussian(0.5), 20, 300, 0.001)
    rows = without_time(reference)
    assert reference.read_text().splitlines()[0].split("\t") == [
        "idx",
        "label",
        "predict",
        "radius",
        "correct",
        "time",
        "n",
    ]
    assert [row[:3] for row in rows] == [
        [str(i), str(int(labels[i])), str(expected.prediction[i])] for i in range(12)
    ]
    assert [float(row[3]) for row in rows] == expected.radius.tolist()
    assert [row[4:] for row in rows] == [
        [str(int(labels[i] == expected.prediction[i])), "320"] for i in range(12)
    ]
    record = load_counts(
        f"{reference}.npz",
        noise={"name": "Gaussian", "sigma": 0.5},
        seed=0,
        sampler={"name": "certify", "n0": 20, "n": 300, "alpha": 0.001},
        dtype="float32",
        block=64,
        data="digits",
        split="test",
    )
    np.testing.assert_array_equal(
        record.counts, ModelCounts(base, images[:12], Gaussian(0.5), progress=False).draw(320)
    )
    np.testing.assert_array_equal(record.labels, labels[:12])
    assert record.header["model_sha256"] == model_hash(zoo.model("digits-cnn-sigma0.50"))
    assert sorted(path.name for path in reference.parent.iterdir()) == [
        "small.tsv",
        "small.tsv.journal",
        "small.tsv.npz",
    ]


def test_an_example_is_the_same_in_any_selection(reference, tmp_path):
    """Counts belong to the index in the data set, not to the run."""
    done(*SMALL, "--start", 3, "--skip", 4, "--out", tmp_path / "some.tsv")
    rows = without_time(reference)
    assert without_time(tmp_path / "some.tsv") == [rows[4], rows[8]]


def test_input_specific_sampling(tmp_path):
    done(
        *SMALL,
        "--sampler",
        "iss",
        "--decline",
        0.2,
        "--kind",
        "relative",
        "--out",
        tmp_path / "iss.tsv",
    )
    images, _ = data.load("digits", "test")
    base = BaseClassifier(
        zoo.model("digits-cnn-sigma0.50"),
        (1, 8, 8),
        dtype=torch.float32,
        block=64,
        layout="contiguous",
        compile=False,
    )
    sizes = sample_size_map(300, 0.2, "relative", Gaussian(0.5), 0.001)
    expected = certify_iss(
        ModelCounts(base, images[:12], Gaussian(0.5), progress=False),
        Gaussian(0.5),
        20,
        300,
        sizes,
        0.001,
    )
    rows = without_time(tmp_path / "iss.tsv")
    assert [float(row[3]) for row in rows] == expected.radius.tolist()
    assert [int(row[5]) for row in rows] == expected.n.tolist()
    assert load_counts(tmp_path / "iss.tsv.npz").counts.sum(axis=1).tolist() == expected.n.tolist()
    said = refused(
        *SMALL,
        "--sampler",
        "iss",
        "--decline",
        0.1,
        "--kind",
        "relative",
        "--out",
        tmp_path / "iss.tsv",
    )
    assert "decline = 0.2, not 0.1" in said
    said = refused(*SMALL, "--decline", 0.1, "--out", tmp_path / "new.tsv", code=2)
    assert (
        "--decline is not of the sampler certify (its options: --n0, --n, --alpha); "
        "--decline is of iss" in said
    )


@pytest.mark.parametrize(
    ("options", "split", "reuse"),
    [
        ("", "train", None),
        ("--sampler iss", "test", False),
        ("--sampler iss --reuse", "test", True),
    ],
)
def test_every_option_reaches_the_sampler(tmp_path, options, split, reuse):
    """alpha, seed, split and the sampler's own, the default of reuse among them: the library's
    certificates, and the labels of those images.
    """
    out, x, y, index = tmp_path / "o.tsv", *data.load("digits", split), np.arange(0, 24, 4)
    done(
        *SMALL,
        "--skip",
        4,
        "--stop",
        24,
        "--alpha",
        0.05,
        "--seed",
        7,
        "--split",
        split,
        *options.split(),
        "--out",
        out,
    )
    base = BaseClassifier(
        zoo.model("digits-cnn-sigma0.50"),
        (1, 8, 8),
        dtype=torch.float32,
        block=64,
        layout="contiguous",
        compile=False,
    )
    live = ModelCounts(base, x[index], Gaussian(0.5), index=index, seed=7, progress=False)
    if reuse is not None:
        expected = certify_iss(
            live,
            Gaussian(0.5),
            20,
            300,
            sample_size_map(300, 0.05, "absolute", Gaussian(0.5), 0.05),
            0.05,
            reuse,
        )
    else:
        expected = certify(live, Gaussian(0.5), 20, 300, 0.05)
    rows = without_time(out)
    assert [(float(row[3]), int(row[5])) for row in rows] == list(
        zip(expected.radius.tolist(), expected.n.tolist(), strict=True)
    )
    record = load_counts(f"{out}.npz", seed=7, split=split)
    assert record.header["sampler"]["alpha"] == 0.05
    np.testing.assert_array_equal(record.index, index)
    np.testing.assert_array_equal(record.labels, y[index])


def test_the_precision_asked_for_is_the_one_that_runs(tmp_path):
    done(*SMALL, "--dtype", "bfloat16", "--out", tmp_path / "o.tsv")
    assert load_counts(tmp_path / "o.tsv.npz").header["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ("--sigma 0.25", "sigma = 0.5, not 0.25"),
        ("--n0 21", "n0 = 20, not 21"),
        ("--n 299", "n = 300, not 299"),
        ("--alpha 0.01", "alpha = 0.001, not 0.01"),
        ("--seed 1", "seed = 0, not 1"),
        ("--split train", "split = 'test', not 'train'"),
        ("--start 1", "start = 0, not 1"),
        ("--skip 5", "skip = 1, not 5"),
        ("--stop 11", "holds example 11, which this run does not ask for"),
        ("--sampler iss", "sampler = 'certify', not 'iss'"),
        ("--block 32", "block = 64, not 32"),
        ("--compile", "compiled = False, not True"),
        ("--layout channels_last", "layout = contiguous, not channels_last"),
    ],
)
def test_a_log_is_not_continued_with_other_settings(reference, option, named):
    before = {path.name: path.read_bytes() for path in reference.parent.iterdir()}
    assert named in refused(*SMALL, *option.split(), "--out", reference)
    assert {path.name: path.read_bytes() for path in reference.parent.iterdir()} == before


def test_a_log_is_not_continued_with_another_network_or_engine(reference, tmp_path, monkeypatch):
    arguments = [a if a != "digits-cnn-sigma0.50" else "digits-cnn-sigma0.25" for a in SMALL]
    said = refused(*arguments, "--out", reference)
    assert "was made with another network (model_sha256 = " in said
    out = unfinished(reference, tmp_path, 2500)
    made, entries = read_journal(f"{out}.journal")
    made["engine"]["torch"] = "1.0"
    write_journal(f"{out}.journal", made, entries.values())
    assert "torch = '1.0', not '2" in refused(*SMALL, "--out", out)
    (tmp_path / "alone.tsv").write_text("somebody else's")
    assert "alone.tsv exists, but not how it was made" in refused(
        *SMALL, "--out", tmp_path / "alone.tsv"
    )
    assert (tmp_path / "alone.tsv").read_text() == "somebody else's"


def test_a_job_knows_its_network_images_noise_and_seed(tmp_path):
    """From Python, whatever settings it is given, none can change in the middle of a log."""
    images, labels = data.load("digits", "test")
    engine = {"dtype": torch.float32, "block": 64, "layout": "contiguous", "compile": False}

    def job(model="digits-cnn-sigma0.50", images=images, sigma=0.5, seed=0, alpha=0.01):
        return jobs.Job(
            zoo.model(model),
            "mine",
            images,
            labels.numpy(),
            np.arange(3),
            Certify(20, 100, alpha),
            Gaussian(sigma),
            seed,
            tmp_path / "x",
            {"of": "mine"},
            engine,
        )

    assert jobs.run(job()) == 3
    assert jobs.run(job()) == 0
    record = load_counts(tmp_path / "x.npz", of="mine", model="mine")
    assert RecordedCounts(record).noise == Gaussian(0.5)
    for argument, change, said in (
        ("model", "digits-cnn-sigma0.25", r"another network \(model_sha256 = "),
        ("images", 1 - images, r"other images \(data_sha256 = "),
        ("sigma", 0.25, "sigma = "),
        ("seed", 1, "seed = "),
        ("alpha", 0.02, "alpha = "),
    ):
        with pytest.raises(ValueError, match=f"was made with {said}"):
            jobs.run(job(**{argument: change}))


def test_a_job_refuses_what_it_cannot_certify(tmp_path):
    """Before any work: examples twice or beyond the data, labels beyond the classes, other data."""
    images, labels = data.load("digits", "test")
    network = zoo.model("digits-cnn-sigma0.50")

    def job(index=(0, 1), labels=labels, noise=0.5):
        settings = (Certify(20, 100), Gaussian(noise), 0, tmp_path / "x", {}, {"compile": False})
        return jobs.Job(network, "", images, labels, np.array(index), *settings)

    with pytest.raises(ValueError, match="index must be ascending, each example once"):
        job([1, 1])
    with pytest.raises(ValueError, match="index must"):
        job([0, 360])
    with pytest.raises(ValueError, match="noise must have one level, or 2"):
        job(noise=[0.5, 0.5, 0.5])
    with pytest.raises(ValueError, match="labels must be class indices below 10"):
        jobs.run(job(labels=labels + 5))
    said = refused(*SMALL, "--data", "mnist", "--out", tmp_path / "y", code=2)
    assert "--data must be digits, which digits-cnn-sigma0.50 was trained on" in said
    assert not (tmp_path / "y").exists()


def test_a_run_that_lacks_an_example_is_not_finished(tmp_path, monkeypatch):
    """As where another process lost its part: no log and no record of fewer examples."""
    images, labels = data.load("digits", "test")
    network, index = zoo.model("digits-cnn-sigma0.50"), np.arange(3)
    job = jobs.Job(
        network, "", images, labels, index, Certify(20, 100), Gaussian(0.5), 0, tmp_path / "x"
    )
    work = jobs._work
    monkeypatch.setattr(
        jobs,
        "_work",
        lambda job, plan, journal, mine, *rest: work(job, plan, journal, mine[:2], *rest),
    )
    with pytest.raises(ValueError, match="lacks 1 examples, the first 2: run the same command"):
        jobs.run(job)
    assert [path.name for path in tmp_path.iterdir()] == ["x.journal"]


def test_a_sampler_that_takes_more_draws_than_it_states_is_refused(tmp_path):
    class Greedy(Certify):
        most = 100

        def describe(self):
            return {"name": "greedy"}

    images, labels = data.load("digits", "test")
    network, index = zoo.model("digits-cnn-sigma0.50"), np.arange(2)
    job = jobs.Job(
        network, "", images, labels, index, Greedy(20, 100), Gaussian(0.5), 0, tmp_path / "x"
    )
    with pytest.raises(ValueError, match="took 120 draws of an example, more than the 100"):
        jobs.run(job)


def test_one_sigma_per_example(tmp_path):
    """The whole path with a sigma of each image, in groups of one: votes, radii, record, replay."""
    images, labels = data.load("digits", "test")
    sigmas, index = np.array([0.25, 0.5, 0.75, 0.3]), np.array([3, 5, 8, 13])
    engine = {"dtype": torch.float32, "block": 16, "layout": "contiguous", "compile": False}

    def job(out, index=index, sigmas=sigmas):
        settings = (Gaussian(sigmas), 0, tmp_path / out, {}, engine)
        return jobs.Job(
            zoo.model("digits-cnn-sigma0.50"),
            "",
            images,
            labels,
            index,
            Certify(20, 300),
            *settings,
        )

    jobs.run(job("all"))
    rows = without_time(tmp_path / "all")
    for i in range(4):
        jobs.run(job(f"{i}", index[[i]], sigmas[i]))
        assert without_time(tmp_path / f"{i}") == [rows[i]]
    replay = RecordedCounts(load_counts(tmp_path / "all.npz"))
    assert replay.noise == Gaussian(sigmas)
    with pytest.raises(ValueError, match="noise must be the one"):
        certify(replay, Gaussian(sigmas[::-1].copy()), 20, 300, 0.001)


def test_the_help_warns_of_optional_stopping():
    said = " ".join(done("certify", "--help").split())
    assert "must not be decided by what was certified, else alpha does not hold" in said


def test_a_finished_run_is_continued(reference, tmp_path):
    """More images, then more draws: the files are those of a run with as many from the start."""
    arguments = [a for a in SMALL if a not in ("--stop", "12", "--n", "300")]
    out, whole = tmp_path / "o.tsv", tmp_path / "whole.tsv"
    done(*SMALL, "--out", out)
    done(*arguments, "--n", 300, "--stop", 20, "--out", out)
    said = call(*arguments, "--n", 500, "--stop", 20, "--out", out)[2]
    assert "20 examples continued from 320 to 520 draws in " in said
    assert "0 were done before" in said
    done(*arguments, "--n", 500, "--stop", 20, "--out", whole)
    assert without_time(out) == without_time(whole)
    assert pathlib.Path(f"{out}.npz").read_bytes() == pathlib.Path(f"{whole}.npz").read_bytes()
    iss = [*arguments, "--sampler", "iss", "--stop", 12, "--out", tmp_path / "iss.tsv"]
    done(*iss, "--n", 300)
    assert "n = 300, not 500" in refused(*iss, "--n", 500)
    both = call(*arguments, "--n", 600, "--stop", 22, "--out", out)[2]
    assert "2 examples certified and 20 examples continued from 520 to 620 draws in " in both


def test_the_time_of_a_continued_example_is_that_of_all_its_draws(tmp_path):
    arguments = [a for a in SMALL if a not in ("--n", "300")]
    out = tmp_path / "o.tsv"
    done(*arguments, "--n", 300, "--out", out)
    made, entries = read_journal(f"{out}.journal")
    write_journal(f"{out}.journal", made, [e | {"time": 1000.0} for e in entries.values()])
    done(*arguments, "--n", 400, "--out", out)
    assert (pd.to_timedelta(pd.read_csv(out, sep="\t")["time"]).dt.total_seconds() > 1000).all()


def test_a_running_journal_is_reported(reference, tmp_path):
    out = unfinished(reference, tmp_path, 2500)
    whole = read_journal(f"{out}.journal")[1]
    assert 0 < len(whole) < 12
    (row,) = json.loads(done("report", f"{out}.journal", "--json"))
    assert row["examples"] == len(whole)


def test_a_sampler_and_a_loss_of_ones_own_work_from_the_command_line(tmp_path):
    """A file that registers them and calls the app: their fields are options, in log and record."""
    (tmp_path / "mine.py").write_text(
        """
import dataclasses
from lib.certify import certify
from lib.losses import GaussianLoss, register as register_loss
from lib.samplers import Certify, Sampler, register
from lib.store.registry import option

@register("halved")
@dataclasses.dataclass(frozen=True)
class Halved(Sampler):
    n: int = option(200, "Draws.")
    part: float = option(0.5, "Of alpha.")
    first, fixed = 20, True
    most = property(lambda self: 20 + self.n)

    def __call__(self, counts, noise):
        return certify(counts, noise, 20, self.n, 0.01 * self.part)

@register_loss("doubled")
@dataclasses.dataclass(frozen=True)
class Doubled:
    factor: float = option(2.0, "Factor.")

    def __call__(self, *arguments):
        return self.factor * GaussianLoss()(*arguments)

from lib.__main__ import app
app()
"""
    )

    def mine(*arguments):
        command = [sys.executable, "mine.py", *map(str, arguments)]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    mine("train", "--sigma", 0.5, "--epochs", 1, "--loss", "doubled", "--factor", 3,
         "--out", "m.safetensors")  # fmt: skip
    mine("certify", "m.safetensors", "--sigma", 0.5, "--sampler", "halved", "--part", 0.1,
         "--stop", 3, *ENGINE, "--out", "m.tsv")  # fmt: skip
    header = load_counts(tmp_path / "m.tsv.npz").header
    assert header["sampler"] == {"name": "halved", "n": 200, "part": 0.1}
    assert load_checkpoint(tmp_path / "m.safetensors")[1]["loss"] == {
        "name": "doubled",
        "factor": 3.0,
    }


def test_two_runs_do_not_write_one_log(reference):
    with open(f"{reference}.journal") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert "being written by another process" in refused(*SMALL, "--out", reference)


def test_a_run_that_failed_before_its_first_result_binds_nobody(tmp_path):
    """Its settings may be corrected, as its error told, under the same name."""
    arguments = [*SMALL, "--sampler", "iss", "--out", tmp_path / "iss.tsv"]
    assert "--decline must be" in refused(*arguments, "--decline", -1, code=2)
    done(*arguments)
    assert "n0 = 20, not 10" in refused(*arguments, "--n0", 10)


@pytest.mark.parametrize("suffix", ["", ".npz", ".journal.part1"])
def test_leftovers_of_another_run_are_not_adopted(reference, tmp_path, suffix):
    """Certificates that lie about without their journal are not taken for this run's."""
    left = tmp_path / f"left.tsv{suffix}"
    source = {"": "", ".npz": ".npz", ".journal.part1": ".journal"}[suffix]
    left.write_bytes(pathlib.Path(f"{reference}{source}").read_bytes())
    said = refused(*SMALL, "--out", tmp_path / "left.tsv")
    assert f"left.tsv{suffix} exists, but not how it was made" in said


def test_a_record_of_another_run_beside_the_journal_is_refused(reference, tmp_path):
    """It would otherwise be relabelled as this run's."""
    out = unfinished(reference, tmp_path, 10**6)
    other = load_counts(f"{reference}.npz")
    header = other.header | {"noise": {"name": "Gaussian", "sigma": 0.25}}
    save_counts(f"{out}.npz", other.counts, other.index, other.labels, **header)
    before = pathlib.Path(f"{out}.npz").read_bytes()
    assert "is of another run, with noise" in refused(*SMALL, "--out", out)
    assert pathlib.Path(f"{out}.npz").read_bytes() == before


def test_without_a_compiler_a_run_says_so_and_is_eager(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    for _ in range(2):  # the same command again finds it done
        done(*SMALL[:-1], "--compile", "--out", tmp_path / "eager.tsv")
    assert load_counts(tmp_path / "eager.tsv.npz").header["compiled"] is False
    journal = tmp_path / "eager.tsv.journal"  # a finished run that was compiled, elsewhere
    made, entries = read_journal(journal)
    made["engine"]["compiled"] = True
    write_journal(journal, made, entries.values())
    assert "compiled = True, not False" in refused(*SMALL, "--out", tmp_path / "eager.tsv")


def test_a_run_that_abstains_everywhere_is_reported(tmp_path):
    out = tmp_path / "few.tsv"
    done(*SMALL, "--n0", 1, "--n", 5, "--out", out)
    (row,) = json.loads(done("report", out, "--json", "--png", tmp_path / "few.png"))
    assert (row["abstained"], row["ACR"], row["0"]) == (1, 0, 0)


def test_a_run_of_a_gpu_is_not_continued_without_one(reference, tmp_path):
    out = unfinished(reference, tmp_path, 2500)
    made, entries = read_journal(f"{out}.journal")
    made["engine"]["device"] = "cuda:99"
    write_journal(f"{out}.journal", made, entries.values())
    assert "device must be one that is here" in refused(*SMALL, "--out", out)


def unfinished(reference, folder, size):
    """A copy of a finished run of which a kill left so many bytes of the journal."""
    out = folder / reference.name
    data = pathlib.Path(f"{reference}.journal").read_bytes()
    pathlib.Path(f"{out}.journal").write_bytes(data[:size])
    return out


@pytest.mark.parametrize("seed", range(6))
def test_a_run_cut_at_any_byte_is_completed(reference, tmp_path, seed):
    """Whatever a kill or a full disk left: the same finished run, and no whole example twice."""
    data = pathlib.Path(f"{reference}.journal").read_bytes()
    size = random.Random(seed).randrange(len(data) + 1) if seed else len(data) - 1
    out = unfinished(reference, tmp_path, size)
    whole = max(data[:size].count(b"\n") - 1, 0)
    code, _, said = call(*SMALL, "--out", out)
    assert code == 0, said
    assert f"{12 - whole} examples certified in" in said
    assert f"{whole} were done before" in said
    assert without_time(out) == without_time(reference)
    kept = reference.read_text().splitlines()[: whole + 1]
    assert out.read_text().splitlines()[: whole + 1] == kept
    assert pathlib.Path(f"{out}.npz").read_bytes() == pathlib.Path(f"{reference}.npz").read_bytes()


def test_a_line_deleted_from_a_finished_journal_is_done_again(reference, tmp_path):
    out = unfinished(reference, tmp_path, 10**6)
    done(*SMALL, "--out", out)
    journal = pathlib.Path(f"{out}.journal")
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:5] + lines[6:]))
    assert "1 examples certified" in call(*SMALL, "--out", out)[2]
    assert without_time(out) == without_time(reference)
    assert "0 examples certified" in call(*SMALL, "--out", out)[2]


@pytest.mark.parametrize(
    ("old", "new"),
    [(b'"radius":', b'"Radius":'), (b'"n":320', b'"n":321'), (b'"idx":', b'"idx":9')],
)
def test_damage_inside_a_journal_is_named(reference, tmp_path, old, new):
    """Any changed byte of a line, by its checksum."""
    out = unfinished(reference, tmp_path, 10**6)
    journal = pathlib.Path(f"{out}.journal")
    lines = journal.read_bytes().splitlines(keepends=True)
    lines[3] = lines[3].replace(old, new)
    journal.write_bytes(b"".join(lines))
    assert "small.tsv.journal, line 4 is damaged" in refused(*SMALL, "--out", out)
    # A log or record that was lost is written again from the journal.
    whole = unfinished(reference, tmp_path, 10**6)
    assert "0 examples certified" in call(*SMALL, "--out", whole)[2]
    assert without_time(whole) == without_time(reference)


def test_ctrl_c_says_how_to_go_on(reference, tmp_path, monkeypatch):
    calls, certify_group = [], jobs.certify_group

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return certify_group(*arguments)

    monkeypatch.setattr(jobs, "certify_group", interrupted)
    assert "the same command continues" in refused(
        *SMALL, "--out", tmp_path / "small.tsv", code=130
    )
    assert "8 examples certified" in call(*SMALL, "--out", tmp_path / "small.tsv")[2]
    assert without_time(tmp_path / "small.tsv") == without_time(reference)


def test_kill_9_twice(tmp_path):
    """A real process, killed while it writes its log, twice: what a third one completes is what one
    alone writes.
    """
    arguments = [
        "certify",
        "digits-cnn-sigma0.50",
        "--sigma",
        "0.5",
        "--n",
        "1000",
        "--stop",
        "200",
        *ENGINE,
    ]
    out, journal = tmp_path / "killed.tsv", tmp_path / "killed.tsv.journal"
    kept, environment = 0, os.environ | {"OMP_NUM_THREADS": "1"}
    for _ in range(2):
        command = [sys.executable, "-m", "lib", *arguments, "--out", str(out)]
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, env=environment)
        while process.poll() is None and (
            not journal.exists() or journal.read_bytes().count(b"\n") < kept + 6
        ):
            time.sleep(0.002)
        process.kill()
        assert process.wait() == -9
        now = journal.read_bytes().count(b"\n") - 1
        assert kept < now < 200
        kept = now
    done(*arguments, "--out", out)
    done(*arguments, "--out", tmp_path / "alone.tsv")
    assert without_time(out) == without_time(tmp_path / "alone.tsv")
    assert pathlib.Path(f"{out}.npz").read_bytes() == (tmp_path / "alone.tsv.npz").read_bytes()


def test_the_report_on_the_published_imagenet_log():
    """ACR and certified accuracies of a published log, by arithmetic on its text."""
    rows = without_time(PUBLISHED)
    right = [float(radius) if correct == "1" else 0.0 for _, _, _, radius, correct in rows]
    (found,) = json.loads(done("report", PUBLISHED, "--json", "--radii", "0,0.5,1,1.5,3"))
    assert found["examples"] == 500
    assert found["ACR"] == pytest.approx(sum(right) / 500, rel=1e-12)
    assert round(found["ACR"], 3) == 0.822
    assert [found[r] for r in ("0", "0.5", "1", "1.5", "3")] == [
        sum(row[4] == "1" and float(row[3]) >= r for row in rows) / 500 for r in (0, 0.5, 1, 1.5, 3)
    ]
    assert found["abstained"] == sum(row[2] == "-1" for row in rows) / 500
    assert found["draws"] is None
    assert "0.822" in done("report", PUBLISHED)


def test_draws_and_seconds_are_means(tmp_path):
    lines = [
        "idx\tlabel\tpredict\tradius\tcorrect\ttime\tn",
        "0\t1\t1\t0.5\t1\t0:00:01\t100",
        "1\t1\t-1\t0.0\t0\t0:00:03\t300",
    ]
    (tmp_path / "two.tsv").write_text("\n".join(lines) + "\n")
    (row,) = json.loads(done("report", tmp_path / "two.tsv", "--json"))
    assert (row["draws"], row["seconds"], row["ACR"], row["abstained"]) == (200, 2, 0.25, 0.5)


def test_a_report_in_every_form(reference, tmp_path):
    both = [PUBLISHED, reference]
    table = {row["log"]: row for row in csv.DictReader(done("report", *both, "--csv").splitlines())}
    rows = {row["log"]: row for row in json.loads(done("report", *both, "--json"))}
    assert list(table) == list(rows) == [str(path) for path in both]
    for path in map(str, both):
        assert {k: float(v) for k, v in table[path].items() if k != "log" and v} == {
            k: v for k, v in rows[path].items() if k != "log" and v is not None
        }
    assert rows[str(reference)]["draws"] == 320
    markdown = done("report", *both, "--markdown").splitlines()
    assert len(markdown) == 4
    assert len({line.count("|") for line in markdown}) == 1
    latex = done("report", *both, "--latex")
    assert r"\textbf{0.822}" in latex
    assert latex.count(r"\\") == 3
    assert "_" not in latex.replace(r"\_", "")
    (row,) = json.loads(done("report", PUBLISHED, "--json", "--radii", "0.1255,1.2345,0.10001,0.1"))
    assert {"0.1255", "1.2345", "0.10001", "0.1"} < set(row)
    done("report", *both, "--png", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("a.png --png a.png", "--png a.png is one of the logs"),
        ("a.png --png ./a.png", "is one of the logs"),
        ("a.png --png a.pdf", "--png must end in .png; got a.pdf"),
        ("a.png ./a.png", "a.png is given twice"),
    ],
)
def test_a_report_overwrites_no_log_and_counts_none_twice(
    reference, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("a.png").write_bytes(reference.read_bytes())
    assert message in refused("report", *arguments.split(), code=2)
    assert pathlib.Path("a.png").read_bytes() == reference.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png"]


def test_a_report_tells_logs_with_long_paths_apart(reference, tmp_path):
    paths = []
    for name in ("a", "b"):
        paths.append(tmp_path / ("deep" * 40) / f"run-{name}.tsv")
        paths[-1].parent.mkdir(exist_ok=True)
        paths[-1].write_bytes(reference.read_bytes())
    printed = done("report", *paths)
    assert "│ run-a.tsv │" in printed
    assert "│ run-b.tsv │" in printed
    assert [row["log"] for row in json.loads(done("report", *paths, "--json"))] == [
        *map(str, paths)
    ]


def test_info(reference, tmp_path):
    found = json.loads(done("info", f"{reference}.npz", "--json"))
    assert (found["kind"], found["examples"], found["votes"]) == ("record", 12, 12 * 320)
    assert found["noise"] == {"name": "Gaussian", "sigma": 0.5}
    done(*SMALL, "--sampler", "iss", "--out", tmp_path / "iss.tsv")
    found = json.loads(done("info", tmp_path / "iss.tsv.npz", "--json"))
    assert found["sampler"] == {
        "name": "iss", "n0": 20, "n": 300, "alpha": 0.001,
        "decline": 0.05, "kind": "absolute", "reuse": False,
    }  # fmt: skip
    assert found["fixed_draws"] is False
    assert json.loads(done("info", f"{reference}.journal", "--json"))["examples"] == 12
    found = json.loads(
        done("info", ROOT / "data/models/digits-cnn-sigma0.50.safetensors", "--json")
    )
    assert (found["kind"], found["architecture"], found["parameters"]) == (
        "checkpoint",
        "small_cnn",
        3818,
    )
    assert json.loads(done("info", PUBLISHED, "--json"))["examples"] == 500
    # Of a log, and of a running one, also how it was made: by its journal, or else its record.
    alone = tmp_path / "alone.tsv"
    for end in ("", ".npz"):
        pathlib.Path(f"{alone}{end}").write_bytes(pathlib.Path(f"{reference}{end}").read_bytes())
    for path in (reference, f"{reference}.journal", alone):
        found = json.loads(done("info", path, "--json"))
        assert (found["kind"], found["examples"], found["block"]) == ("log", 12, 64)
        assert found["sampler"] == {"name": "certify", "n0": 20, "n": 300, "alpha": 0.001}
        assert found["noise"] == {"name": "Gaussian", "sigma": 0.5}
    levels = ROOT / "data/sigmas/digits-cnn-sigma0.25.npz"
    found = json.loads(done("info", levels, "--json"))
    assert (found["kind"], found["examples"], found["sigma0"]) == ("levels", 360, 0.25)
    torch.save({"arch": "mlp", "state_dict": {}}, tmp_path / "c.tar")
    assert "missing: 1.weight" in refused("info", tmp_path / "c.tar", "--data", "digits")
    assert "noise            Gaussian sigma 0.5" in done("info", f"{reference}.npz")


def test_a_reader_that_has_enough_is_no_error():
    """As in `info X | head -1`: a pipe that nobody reads any more."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "lib", "info", PUBLISHED]
    with os.fdopen(write, "wb") as pipe:
        ran = subprocess.run(command, cwd=ROOT, stdout=pipe, stderr=subprocess.PIPE, text=True)
    assert ran.stderr == ""


@pytest.mark.parametrize(
    ("model", "options", "note"),
    [
        ("digits-cnn-sigma0.50", "--sigma 0.25", "Gaussian sigma 0.5, and is certified under"),
        ("digits-cnn-x20-sigma0.25", "--sigma 0.5", "Gaussian sigma 0.25, and is certified under"),
        ("digits-cnn-sigma0.50", "--noise Uniform --half 1", "under Uniform half 1.0"),
        ("digits-cnn-sigma0.50", "--sigma 0.5", None),
        ("data/models/digits-cnn-sigma0.50.safetensors", "--sigma 0.5", None),
    ],
)
def test_another_noise_than_the_networks_is_pointed_out(
    tmp_path, monkeypatch, model, options, note
):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(cli, "run", lambda job, say: None)
    monkeypatch.setattr(cli, "read_log", lambda path: None)
    monkeypatch.setattr(cli, "summarize", lambda logs: None)
    monkeypatch.setattr(cli, "_print_report", lambda table, as_json: None)
    said = call("certify", model, *options.split(), "--out", tmp_path / "o.tsv")[2]
    assert "certified under" in said if note else said == ""
    assert note is None or note in said


TRAIN = ["train", "--architecture", "mlp", "--sigma", "0.25", "--epochs", "3", "--batch", "128"]


def test_training_interrupted_ends_in_the_same_weights(tmp_path, monkeypatch):
    done(*TRAIN, "--out", tmp_path / "whole.safetensors")
    out, watch, calls = tmp_path / "cut.safetensors", recipes.noisy_accuracy, []

    def interrupted(*arguments, **named):
        calls.append(1)
        if len(calls) in (2, 3):  # after the second epoch, and in the next run after the third
            raise KeyboardInterrupt
        return watch(*arguments, **named)

    monkeypatch.setattr(recipes, "noisy_accuracy", interrupted)
    assert "the same command continues" in refused(*TRAIN, "--out", out, code=130)
    assert load_checkpoint(out)[1]["epoch"] == 1
    assert "lr = 0.1, not 0.2" in refused(*TRAIN, "--lr", 0.2, "--out", out)
    refused(*TRAIN, "--out", out, code=130)
    done(*TRAIN, "--out", out)
    (model, header), whole = load_checkpoint(out), load_checkpoint(tmp_path / "whole.safetensors")
    assert model_hash(model) == model_hash(whole[0])
    assert header == whole[1]
    assert header["noisy_accuracy"] > 0.5
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "cut.safetensors",
        "cut.safetensors.csv",
        "whole.safetensors",
        "whole.safetensors.csv",
    ]
    assert json.loads(done(*TRAIN, "--out", out, "--json"))["epoch"] == 3
    assert "sigma = 0.25, not 0.5" in refused(*TRAIN, "--sigma", 0.5, "--out", out)
    old = out.rename(tmp_path / "old.pth")  # a name that a new training may not take
    assert json.loads(done(*TRAIN, "--out", old, "--json"))["epoch"] == 3


@pytest.mark.parametrize(
    ("options", "augment"),
    [("--augment", True), ("", False), ("--data cifar10 --data-path data.npz", True)],
)
def test_training_is_told_what_was_asked(tmp_path, monkeypatch, options, augment):
    told, fit = [], recipes.fit
    monkeypatch.chdir(tmp_path)
    made_up_cifar10(tmp_path / "data.npz")

    def spy(*arguments, **named):
        told.append(arguments[5])
        return fit(*arguments, **named)

    monkeypatch.setattr(recipes, "fit", spy)
    asked = [
        "--epochs",
        1,
        "--seed",
        3,
        "--average",
        0.9,
        "--dtype",
        "bfloat16",
        "--weight-decay",
        0,
        *options.split(),
    ]
    done(*TRAIN, *asked, "--out", "m.safetensors")
    expected = {
        "seed": 3,
        "average": 0.9,
        "dtype": "bfloat16",
        "weight_decay": 0,
        "augment": augment,
    }
    assert {name: getattr(told[0], name) for name in expected} == expected


def test_a_training_that_failed_may_be_corrected(tmp_path):
    arguments = [*TRAIN, "--out", tmp_path / "m.safetensors"]
    assert "take a lower lr" in refused(*arguments, "--lr", 1e30)
    done(*arguments)


def test_a_trained_network_is_certified(tmp_path):
    model = tmp_path / "m.safetensors"
    done(*TRAIN, "--out", model)
    done(
        "certify",
        model,
        "--sigma",
        0.25,
        "--n",
        200,
        "--stop",
        20,
        *ENGINE,
        "--out",
        tmp_path / "m.tsv",
    )
    (row,) = json.loads(done("report", tmp_path / "m.tsv", "--json", "--radii", 0))
    assert row["0"] > 0.5


def test_images_of_ones_own_are_trained_on_and_certified(tmp_path, caplog):
    """--data FILE.npz wherever a data set is named; a network takes other images of its shape."""
    x, y = (part.numpy() for part in data.load("digits", "test"))
    path, model = tmp_path / "mine.npz", tmp_path / "m.safetensors"
    parts = {"x_train": x[:300], "y_train": y[:300], "x_test": x[300:], "y_test": y[300:]}
    np.savez(path, **parts)
    done(*TRAIN, "--data", path, "--out", model)
    small = ["--sigma", 0.25, "--n", 200, "--stop", 4, *ENGINE, "--out"]
    done("certify", model, "--data", path, *small, tmp_path / "m.tsv")
    record = load_counts(tmp_path / "m.tsv.npz", data="images-1x8x8-10")
    assert record.header["data_sha256"] == data.content_hash(torch.from_numpy(x[300:]))
    assert record.labels.tolist() == y[300:304].tolist()
    network, header = load_checkpoint(model)
    assert (header["data"], len(network[0].mean)) == ("images-1x8x8-10", 1)
    search = ["--sigma0", 0.25, "--steps", 100, "--stop", 2, "--out", tmp_path / "levels.npz"]
    done("sigma", "digits-cnn-sigma0.25", "--data", path, *search)
    assert "give their file" in refused("certify", model, *small, tmp_path / "x")
    said = refused("certify", model, "--data", path, "--data-path", path, *small, "x", code=2)
    assert "leave out" in said
    said = refused("certify", model, "--data", "mine", *small, tmp_path / "x", code=2)
    assert "FILE.npz of your own images" in " ".join(said.replace("│", " ").split())
    held = {"kind": "images", "data": "images-1x8x8-10"}
    held |= {"train_images": 300, "test_images": len(x) - 300}
    assert json.loads(done("info", path, "--json")) == held
    np.savez(path, x_test=x[:9, :, :4], y_test=y[:9])
    said = refused("certify", model, "--data", path, *small, tmp_path / "x", code=2)
    assert "data must be 'images-1x8x8-10'" in said
    assert "got 'images-1x4x8-" in said
    torch.save(network[1].state_dict(), tmp_path / "plain.pth")
    np.savez(path, x_test=x[:9], y_test=y[:9] % 3, classes=10)
    options = ["--architecture", "mlp", "--data", path]
    assert "images-1x8x8-10" in done("info", tmp_path / "plain.pth", *options)
    assert "images of your own are normalised by 0.5 and 0.5" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            "certify nothing --sigma 1 --out x",
            1,
            "model nothing is neither a file nor a name of the zoo; the nearest names are ",
        ),
        (
            "certify digits-cnn-sigma0.5 --sigma 1 --out x",
            1,
            "the nearest names are digits-cnn-sigma0.50, digits-cnn-sigma0.25, ",
        ),
        ("info data", 1, "data is a folder: give the path of a checkpoint"),
        ("certify data --sigma 1 --out x", 1, "data is a folder: give a checkpoint in it"),
        *(
            (f"certify {name} --sigma 1 --out x", 1, f"{name} does not exist: give the path of")
            for name in ("no.pth", "runs/digits-cnn-sigma0.50", "a/b.pth.tar")
        ),
        ("certify digits-cnn-sigma0.50 --sigma -1 --out x", 2, "--sigma must be finite and > 0"),
        ("certify digits-cnn-sigma0.50 --sigma 1 --seed -1 --out x", 2, "--seed must be a whole"),
        ("audit --sigma 1 --runs 0", 2, "--runs must be at least 1"),
        ("sigma digits-cnn-sigma0.50 --sigma0 1 --steps 20 --out x", 2, "--steps must be a mult"),
        ("sigma digits-cnn-sigma0.50 --sigma0 99 --out x", 2, "--sigma0 must lie in"),
        ("train --sigma 1 --epochs 0 --out x.safetensors", 2, "--epochs must be at least 1"),
        (
            "certify digits-cnn-sigma0.50 --sigma 1 --sampler adaptive --stages a --out x",
            2,
            "--stages must be numbers between commas; got 'a'",
        ),
        (
            "certify digits-cnn-sigma0.50 --sigma 1 --alpha 1 --out x",
            2,
            "--alpha must be a number in (0, 1)",
        ),
        ("certify digits-cnn-sigma0.50 --sigma 1 --n 0 --out x", 2, "--n must be at least 1"),
        (
            "certify digits-cnn-sigma0.50 --sigma 1 --skip 0 --out x",
            2,
            "--skip must be >= 1; got 0",
        ),
        (
            "certify digits-cnn-sigma0.50 --sigma 1 --start 360 --out x",
            2,
            "--start 360, --skip 1 leave none of the 360 examples",
        ),
        (
            "certify digits-cnn-sigma0.50 --sigma 1 --data cifar10 --data-path nowhere --out x",
            2,
            "--data must be digits",
        ),
        (
            "certify cifar10-resnet20-sigma0.50-seed0 --sigma 1 --data-path nowhere --out x",
            1,
            "nowhere does not exist",
        ),
        (
            "certify digits-cnn-sigma0.50 --sigma 1 --device nonsense --out x",
            2,
            "--device must be one that is here",
        ),
        ("certify digits-cnn-sigma0.50 --sigma 1", 2, "--out"),
        ("certify digits-cnn-sigma0.50 --out x", 2, "noise Gaussian needs --sigma"),
        ("certify digits-cnn-sigma0.50 --sigma 1 --sampler none --out x", 2, "--sampler"),
        ("report nowhere.tsv", 1, "nowhere.tsv does not exist"),
        ("report README.md", 1, "lacks the column(s) idx"),
        ("report x.tsv --csv --latex", 2, "take one of"),
        (
            "report data/records/imagenet-resnet50-consistency-sigma0.50.tsv --radii a",
            2,
            "--radii takes numbers",
        ),
        ("info nowhere", 1, "nowhere does not exist"),
        ("info Makefile", 1, "Makefile is neither a checkpoint, a record (.npz), a file of levels"),
        ("train --sigma 1 --out x.pth", 2, "--out must end in .safetensors; got x.pth"),
        ("quantize digits-cnn-sigma0.50 --sigma 1 --out x", 2, "--out must end in .safetensors"),
        (
            "train --sigma 1 --architecture resnet18 --out x.safetensors",
            1,
            "takes images of 3 channels",
        ),
        (
            "train --sigma 1 --data imagenet --out x.safetensors",
            2,
            "--data must be a data set that fits into memory",
        ),
        ("nonsense", 2, "nonsense"),
    ],
)
def test_wrong_usage(arguments, code, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("README.md", "Makefile"):
        (tmp_path / name).write_text("# A text\n")
    (tmp_path / "data").symlink_to(ROOT / "data")
    said = refused(*arguments.split(), code=code)
    assert message in said
    if code == 1:
        assert said.strip().count("\n") == 0
    assert not (tmp_path / "x").exists()


def test_an_error_of_torch_is_one_line(tmp_path, monkeypatch):
    def fails(job, say):
        raise RuntimeError("out of memory\nat length")

    monkeypatch.setattr(cli, "run", fails)
    assert (
        refused(*SMALL, "--out", tmp_path / "o.tsv")
        == "error: out of memory (--debug shows where)\n"
    )


def test_debug_shows_the_error_itself():
    with pytest.raises(FileNotFoundError, match="nowhere"):
        call("--debug", "info", "nowhere")


def helped(command, option, monkeypatch):
    """What the help of a command says of an option, on one line."""
    monkeypatch.setenv("COLUMNS", "250")
    words = done(command, "--help").replace("│", " ").split()
    begin = words.index(option)
    end = next(i for i, word in enumerate(words) if i > begin and word.startswith("--"))
    return " ".join(words[begin + 2 : end])


@pytest.mark.parametrize(
    ("command", "option", "text"),
    [
        (
            "train",
            "--lbd",
            "stability: Weight of the stability term, default 2.0; "
            "macer: Weight of the radius term, default 12.0; "
            "consistency: Weight of the divergence between the copies, default 10.0; "
            "smoothadv-consistency: Weight of the divergence between the copies, default 2.0; "
            "cat-rs: Weight of the worst divergence, default 1.0.",
        ),
        (
            "train",
            "--m",
            "gaussian: Noisy copies of each image, default 1; "
            "consistency: Noisy copies of each image, default 2; "
            "smoothadv, smoothadv-consistency, cat-rs: Noisy copies of each image, default 4.",
        ),
        (
            "certify",
            "--beta",
            "adaptive: Failure probability of an early abstention, default 0.001; "
            "anytime: Failure probability of an early abstention, if promised.",
        ),
        ("train", "--k", "macer: Noisy copies of each image. default 16"),
        ("train", "--lr", "Peak of the one-cycle learning rate. default 0.1"),
        (
            "certify",
            "--sigma",
            "Gaussian: Standard deviation; pixels in [0, 1], radii in l2.",
        ),
        (
            "certify",
            "--radius",
            "adaptive: The radius to certify, default 0.5; "
            "anytime: The radius to certify, or rising ones between commas, default 0.5.",
        ),
    ],
)
def test_help_tells_whose_an_option_is(command, option, text, monkeypatch):
    """An option of several losses or samplers has the meaning and the default of each."""
    assert helped(command, option, monkeypatch) == text


def test_version():
    assert done("--version").startswith(
        f"randomized-smoothing {lib.__version__}, torch {torch.__version__}"
    )


def test_as_a_program(tmp_path):
    """python -m lib in its own process: exit code, one line of error, and nothing on the output."""
    result = subprocess.run(
        [sys.executable, "-m", "lib", "info", "nowhere"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ,
    )
    assert (result.returncode, result.stdout) == (1, "")
    assert (
        result.stderr
        == "error: nowhere does not exist: give the path of a checkpoint, a record or a log\n"
    )


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A record of 320 votes of 12 images."""
    out = tmp_path_factory.mktemp("recorded") / "votes"
    done(*[a for a in SMALL if a not in ("--n0", "20", "--n", "300")],
         "--sampler", "record", "--n", 320, "--out", out)  # fmt: skip
    return f"{out}.npz"


@pytest.mark.parametrize(
    ("options", "sampler"),
    [
        ("--n0 20 --n 300 --alpha 0.01", SAMPLERS.make("certify", n0=20, n=300, alpha=0.01)),
        ("--sampler iss --n0 20 --n 300", SAMPLERS.make("iss", n0=20, n=300)),
        ("--sampler anytime --n 200", SAMPLERS.make("anytime", n=200)),
    ],
)
def test_a_replay_is_the_sampler_called_on_the_record(recorded, tmp_path, options, sampler):
    """In a log as a run writes it, whose bytes the same command writes again."""
    out, record = tmp_path / "r.tsv", load_counts(recorded)
    command = ["replay", recorded, *options.split(), "--seed", 3, "--out", out]
    done(*command)
    expected = sampler(RecordedCounts(record, seed=3), Gaussian(0.5)).frame(record.labels)
    log = pd.read_csv(out, sep="\t")
    assert [*log] == ["idx", "label", "predict", "radius", "correct", "time", "n"]
    assert log["idx"].tolist() == list(range(12))
    assert log[["label", "predict", "radius", "correct", "n"]].to_numpy().tolist() == (
        expected[["label", "prediction", "radius", "correct", "n"]].to_numpy(float).tolist()
    )
    before = out.read_bytes()
    done(*command)
    assert "r.tsv exists and holds something else" in refused(*command, "--alpha", 0.2)
    assert out.read_bytes() == before


def test_a_replay_has_each_images_own_level_and_the_readout_asked_for(tmp_path):
    counts = np.stack([np.full((3, 2), 160), np.tile([310, 10], (3, 1))])
    noise, labels = Gaussian([0.25, 0.5, 1.0]), np.zeros(3, int)
    header = {"noise": noise.describe(), "fixed_draws": True, "readouts": ["member:0", "soft:0-1"]}
    path = tmp_path / "two.npz"
    save_counts(path, counts, np.arange(3), labels, **header)
    command = ["replay", path, "--n0", 20, "--n", 300, "--out", tmp_path / "r.tsv"]
    assert "one of member:0, soft:0-1" in refused(*command, code=2)
    done(*command, "--readout", "soft:0-1")
    source = RecordedCounts(load_counts(path).readout("soft:0-1"))
    expected = certify(source, noise, 20, 300, 0.001).radius
    assert pd.read_csv(tmp_path / "r.tsv", sep="\t")["radius"].tolist() == expected.tolist()
    assert expected[2] > 3 * expected[0] > 0


def test_what_cannot_be_replayed_is_refused(reference, recorded, tmp_path):
    """Votes that an adaptive sampler left, a log of a run, no sampler; and nothing is written."""
    iss = tmp_path / "iss.tsv"
    done(*SMALL, "--sampler", "iss", "--out", iss)
    small = ["--n0", 20, "--n", 300, "--out", tmp_path / "r.tsv"]
    assert "draws were fixed beforehand" in refused("replay", f"{iss}.npz", *small)
    assert "the record is exhausted" in refused("replay", recorded, "--out", tmp_path / "r.tsv")
    options = ["--n", 300, "--out", tmp_path / "r.tsv"]
    said = refused("replay", recorded, "--sampler", "record", *options, code=2)
    assert "makes no certificates" in said
    said = refused("replay", recorded, *small, "--readout", "soft", code=2)
    assert "--readout is of records of several" in said
    assert not (tmp_path / "r.tsv").exists()
    assert "is the log of a run" in refused("replay", recorded, "--out", reference)


def test_a_record_is_not_reported_and_another_alpha_is_replayed(reference, recorded, tmp_path):
    """The errors name the command that does what was meant, and it does."""
    assert f"python -m lib replay {recorded} " in refused("report", recorded)
    said = refused(*SMALL, "--alpha", 0.01, "--out", reference)
    assert f"python -m lib replay {reference}.npz" in said
    done("replay", f"{reference}.npz", "--n0", 20, "--n", 300, "--out", tmp_path / "r.tsv")
    assert "replay" not in refused(*SMALL, "--seed", 1, "--out", reference)


def test_audit_tells_the_sound_from_the_unsound():
    small = ["audit", "--sigma", 0.5, "--runs", 200]
    printed = done(*small, "--sampler", "margin", "--n", 500)
    assert "margin holds: at worst" in printed
    found = json.loads(done(*small, "--sampler", "anytime", "--n", 1000, "--json"))
    assert found["verdict"] == "holds"
    assert found["worst"] <= 1
    code, printed, _ = call(*small, "--sampler", "iss", "--n0", 1000, "--reuse")
    assert code == 1
    assert "iss fails: at worst 1.79" in printed
    assert "makes no certificates" in refused(*small, "--sampler", "record", code=2)
    said = refused(*small, "--sampler", "adaptive", "--radius", "0.1,0.2", code=2)
    assert "--radius must be one number" in said


@pytest.mark.parametrize(
    "sampler",
    [
        ["adaptive", "--radius", "0.5", "--stages", "100,400"],
        ["anytime", "--radius", "0.25,0.5", "--n", "500"],
        ["anytime", "--radius", "0.25", "--n", "500", "--runner-up"],
        ["staircase", "--n", "500"],
    ],
)
def test_adaptive_samplers_certify_and_report_their_saving(tmp_path, sampler):
    """Beside CERTIFY the log holds fewer draws on average, and the command says by which factor."""
    out = tmp_path / "log.tsv"
    start = ["certify", "digits-cnn-sigma0.50", "--sigma", "0.5", "--stop", "40", *ENGINE]
    code, _, said = call(*start, "--sampler", *sampler, "--out", out)
    assert code == 0
    assert "SampleRF " in said
    log = pd.read_csv(out, sep="\t")
    assert log["n"].nunique() > 1
    assert (log["predict"] >= 0).any()
    assert (load_counts(f"{out}.npz").counts.sum(axis=1) == log["n"]).all()


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ("", {}),
        ("--vote hard", {"vote": "hard"}),
        ("--vote weighted --weights 3,1", {"vote": "weighted", "weights": [3, 1]}),
        ("--consensus 1", {"consensus": 1}),
    ],
)
def test_several_networks_are_certified_as_an_ensemble(tmp_path, options, settings):
    """The votes are those of lib's Ensemble of the same networks under the same noise."""
    names = ["digits-cnn-sigma0.50", "digits-cnn-sigma0.25"]
    out = tmp_path / "small.tsv"
    done("certify", *names, *SMALL[2:], *options.split(), "--out", out)
    ensemble = Ensemble([zoo.model(name) for name in names], **settings)
    settings = {"dtype": torch.float32, "block": 64, "layout": "contiguous", "compile": False}
    images, _ = data.load("digits", "test")
    counts = ModelCounts(ensemble, images[:12], Gaussian(0.5), progress=False, **settings)
    record = load_counts(f"{out}.npz")
    np.testing.assert_array_equal(record.counts, counts.draw(320))
    assert record.header["model"] == " ".join(names)
    assert record.header["model_sha256"] == model_hash(ensemble)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--vote weighted", "--vote must come with weights where it is weighted"),
        ("--vote weighted --weights 1,2", "--weights must be 1 finite numbers"),
        ("--vote weighted --weights a", "--weights takes numbers between commas; got a"),
        ("--weights 1", "--weights must be left out where the vote is soft"),
        ("--consensus 2", "--consensus must be at most 1"),
    ],
)
def test_a_vote_that_cannot_be_is_refused(tmp_path, options, message):
    said = refused(*SMALL, *options.split(), "--out", tmp_path / "x.tsv", code=2)
    assert message in said
