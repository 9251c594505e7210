"""Records that survive a round trip and refuse any damage; logs at full precision; published radii inverted to their counts."""

import csv
import dataclasses
import datetime
import json
import pathlib
import signal
import subprocess
import sys
import tempfile

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.bounds import clopper_pearson_lower
from lib.certify import ABSTAIN, certify
from lib.counts import RecordedCounts, counts_from_log
from lib.metrics import average_certified_radius
from lib.noise import Gaussian
from lib.store.files import write_atomically
from lib.store.logs import LOG_COLUMNS, read_log, write_log
from lib.store.records import load_counts, save_counts

ROOT = pathlib.Path(__file__).parent.parent
IMAGENET = ROOT / "data/records/imagenet-resnet50-consistency-sigma0.50.tsv"
COUNTS, INDEX, LABELS = (
    np.array([[99_000, 1000, 0], [5, 3, 99_992]]),
    np.array([4, 17]),
    np.array([0, 2]),
)


@pytest.fixture
def record(tmp_path):
    path = tmp_path / "record.npz"
    save_counts(path, COUNTS, INDEX, LABELS, sigma=0.5, seed=3, model="digits", note="π")
    return path


def log_of(radius, predict=None, label=None, **more):
    """A log as a table: class 0 everywhere unless said otherwise."""
    radius = np.asarray(radius, dtype=np.float64)
    size = len(radius)
    predict, label = (
        np.zeros(size, int) if predict is None else predict,
        np.zeros(size, int) if label is None else label,
    )
    columns = {
        "idx": np.arange(size),
        "label": label,
        "predict": predict,
        "radius": radius,
        "correct": np.equal(label, predict).astype(int),
    }
    return pd.DataFrame(columns | {"time": np.full(size, 1.5)} | more)


# ------------------------------------------------------------------ records


def test_a_record_survives_the_round_trip(record):
    found = load_counts(record, sigma=0.5, model="digits")
    for ours, expected in ((found.counts, COUNTS), (found.index, INDEX), (found.labels, LABELS)):
        np.testing.assert_array_equal(ours, expected)
        assert ours.dtype == np.int64
    assert found.header == {"sigma": 0.5, "seed": 3, "model": "digits", "note": "π"}


def test_a_record_opens_without_this_library(record):
    with np.load(record, allow_pickle=False) as arrays:
        np.testing.assert_array_equal(arrays["counts"], COUNTS)
        assert json.loads(str(arrays["header"]))["sigma"] == 0.5


def test_the_same_content_gives_the_same_bytes(record, tmp_path):
    other = tmp_path / "elsewhere" / "again.npz"
    save_counts(
        other,
        COUNTS.tolist(),
        INDEX.tolist(),
        LABELS.tolist(),
        note="π",
        model="digits",
        seed=3,
        sigma=0.5,
    )
    assert other.read_bytes() == record.read_bytes()


def test_counts_beyond_32_bits(tmp_path):
    save_counts(tmp_path / "r.npz", [[2**40, 1]], [0], [0])
    assert load_counts(tmp_path / "r.npz").counts[0, 0] == 2**40


def test_every_flipped_byte_is_refused(record):
    """Each byte of the file in turn, one bit of it changed."""
    whole = record.read_bytes()
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        record.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"record\.npz is damaged"):
            load_counts(record)


def test_a_truncated_or_lengthened_record_is_refused(record):
    whole = record.read_bytes()
    for damaged in [whole[:length] for length in range(0, len(whole), 13)] + [
        whole[:-1],
        whole[1:],
        whole + b"0",
        whole + whole,
    ]:
        record.write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged"):
            load_counts(record)


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        ({"sigma": 0.25}, "sigma = 0.5, not 0.25"),
        ({"seed": 4}, "seed = 3, not 4"),
        ({"n": 10}, "n = None, not 10"),
    ],
)
def test_a_record_of_another_run_is_refused(record, expected, message):
    with pytest.raises(ValueError, match=message):
        load_counts(record, **expected)


def test_a_missing_record_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.npz does not exist: .*make records"):
        load_counts(tmp_path / "nothing.npz")


# ------------------------------------------------------------------ whole files or none


@pytest.mark.parametrize("old", [None, b"the old content"])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_killed_write_leaves_the_old_file_or_none(tmp_path, old, call):
    """A process killed while it writes (before the bytes are synced, and again before the rename): nothing partial under the final name."""
    path = tmp_path / "result.npz"
    if old:
        path.write_bytes(old)
    program = f"""
import os, pathlib, runpy, signal
files = runpy.run_path({str(ROOT / "lib/store/files.py")!r})
def die(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)
os.fsync = die if {call!r} == "fsync" else os.fsync
pathlib.Path.replace = die if {call!r} == "replace" else pathlib.Path.replace
files["write_atomically"]({str(path)!r}, b"x" * 100_000)
"""
    assert (
        subprocess.run([sys.executable, "-c", program], check=False).returncode == -signal.SIGKILL
    )
    assert (path.read_bytes() if path.exists() else None) == old
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"


def test_a_failed_write_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(tmp_path / "result.npz", b"x")
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------ logs


def independent_reader(path):
    """The log as a program of someone else's would read it: csv, float(), and times by hand."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    for row in rows:
        hours, minutes, seconds = row["time"].split(":")
        row["time"] = int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    return rows


@given(
    st.lists(
        st.tuples(st.floats(0, 10), st.integers(-1, 9), st.integers(0, 9), st.floats(0, 86_000)),
        min_size=1,
        max_size=20,
    )
)
def test_a_log_keeps_every_digit(rows):
    """What an independent reader reads is the same double, bit by bit; what we read too. Times keep their microseconds."""
    radius, predict, label, seconds = (np.array(column) for column in zip(*rows, strict=True))
    table = log_of(radius, predict, label).assign(time=seconds, n=np.arange(len(rows)) + 100)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "log.tsv"
        write_log(path, table)
        read, theirs = read_log(path), independent_reader(path)
    for name in ("idx", "label", "predict", "radius", "correct", "n"):
        np.testing.assert_array_equal(read[name], table[name])
    np.testing.assert_allclose(read["time"], seconds, atol=1e-6)
    for row, r, p, s in zip(theirs, radius, predict, seconds, strict=True):
        assert float(row["radius"]) == r
        assert int(row["predict"]) == p
        assert row["time"] == pytest.approx(s, abs=1e-6)


def test_a_log_looks_like_the_fields(tmp_path):
    write_log(tmp_path / "log", log_of([0.1 + 0.2, 0.0], predict=[3, -1], label=[3, 5]))
    lines = (tmp_path / "log").read_text().split("\n")
    assert lines == [
        "\t".join(LOG_COLUMNS),
        "0\t3\t3\t0.30000000000000004\t1\t0:00:01.500000",
        "1\t5\t-1\t0.0\t0\t0:00:01.500000",
        "",
    ]
    assert str(datetime.timedelta(seconds=1.5)) in lines[1]


@pytest.mark.parametrize("name", LOG_COLUMNS)
def test_a_log_without_a_column_is_refused(tmp_path, name):
    log_of([0.5]).drop(columns=name).to_csv(tmp_path / "log", sep="\t", index=False)
    with pytest.raises(
        ValueError,
        match=rf"log lacks the column\(s\) {name}: .*idx label predict radius correct time",
    ):
        read_log(tmp_path / "log")


def test_a_log_torn_anywhere_in_its_last_line_is_refused(tmp_path):
    """Cut behind any byte of the last line: with a column n, half a number would look whole."""
    write_log(tmp_path / "whole", log_of([0.5, 0.123456], n=[100_100, 100_100]))
    whole = (tmp_path / "whole").read_bytes()
    start = whole.rindex(b"\n", 0, -1) + 1
    for length in range(start + 1, len(whole)):
        (tmp_path / "log").write_bytes(whole[:length])
        with pytest.raises(ValueError, match="line 3"):
            read_log(tmp_path / "log")
    (tmp_path / "log").write_bytes(whole[:start])
    assert len(read_log(tmp_path / "log")) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0\t0\t0\thalf\t1\t0:00:01", "not a number.*half"),
        ("zero\t0\t0\t0.5\t1\t0:00:01", "not a number.*zero"),
        ("0\t0\t0\t-0.5\t1\t0:00:01", "radius that is negative"),
        ("0\t0\t0\tnan\t1\t0:00:01", "radius .* not finite"),
        ("0\t0\t0\t0.5\t1\tsoon", "not a number"),
        ("0\t0\t0\t0.5\t1", "line 2: 5 cells instead of 6"),
        ("7\t0\t0\t0.5\t1\t0:00:01\n7\t0\t0\t0.6\t1\t0:00:01", "idx 7 twice"),
    ],
)
def test_a_malformed_line_is_refused(tmp_path, line, message):
    (tmp_path / "log").write_text("\t".join(LOG_COLUMNS) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=message):
        read_log(tmp_path / "log")


@pytest.mark.parametrize(
    ("line", "correct", "time"),
    [
        ("True\t14.5", 1, 14.5),
        ("0.0\t14", 0, 14),
        ("1\t0:00:14.5", 1, 14.5),
        ("1\t1:00:00", 1, 3600),
    ],
)
def test_other_spellings_of_a_log_are_read(tmp_path, line, correct, time):
    """As other scripts write them: truth as True or 1.0, time in seconds, a byte-order mark in front."""
    (tmp_path / "log").write_bytes(
        ("\ufeff" + "\t".join(LOG_COLUMNS) + f"\n0\t0\t0\t0.5\t{line}\n").encode()
    )
    (row,) = read_log(tmp_path / "log").to_dict("records")
    assert (row["correct"], row["time"]) == (correct, time)


def test_an_empty_or_missing_log_says_so(tmp_path):
    (tmp_path / "log").write_text("")
    with pytest.raises(ValueError, match="lacks the column"):
        read_log(tmp_path / "log")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_log(tmp_path / "none")
    (tmp_path / "log").write_text("\t".join(LOG_COLUMNS) + "\n")
    assert len(read_log(tmp_path / "log")) == 0


# ------------------------------------------------------------------ radii back to counts

N, ALPHA, NOISE = 100_000, 0.001, Gaussian(0.5)


def hits():
    """Counts that certify: every one near 1/2 and near n, 400 between."""
    k = np.unique(
        np.concatenate(
            [
                np.arange(50_492, 50_550),
                np.linspace(50_550, N - 100, 400).astype(int),
                np.arange(N - 100, N + 1),
            ]
        )
    )
    return k[clopper_pearson_lower(k, N, ALPHA) > 0.5]


def test_radii_at_full_precision_give_their_counts_back():
    k = hits()
    found = counts_from_log(
        log_of(NOISE.radius(clopper_pearson_lower(k, N, ALPHA))), NOISE, N, ALPHA
    )
    np.testing.assert_array_equal(found.counts[:, 0], k)
    np.testing.assert_array_equal(found.counts.sum(axis=1), N)
    np.testing.assert_array_equal(found.candidates, 1)
    assert not found.abstained.any()


def test_radii_at_three_digits_give_a_count_that_prints_the_same():
    """The true count is always one of the candidates, and the one taken prints the radius of the log."""
    k = hits()
    printed = np.array([float(f"{r:.3}") for r in NOISE.radius(clopper_pearson_lower(k, N, ALPHA))])
    found = counts_from_log(log_of(printed), NOISE, N, ALPHA)
    taken = found.counts[:, 0]
    again = np.array(
        [float(f"{r:.3}") for r in NOISE.radius(clopper_pearson_lower(taken, N, ALPHA))]
    )
    np.testing.assert_array_equal(again, printed)
    assert (np.abs(taken - k) < found.candidates).all()
    # How many counts share a print, one by one: where the radius is 1.x, hundreds; the largest radius, the last few.
    every = np.arange(N // 2, N + 1)
    prints = np.array(
        [float(f"{r:.3}") for r in NOISE.radius(clopper_pearson_lower(every, N, ALPHA))]
    )
    np.testing.assert_array_equal(found.candidates, [(prints == p).sum() for p in printed])
    assert found.candidates.max() > 50


@pytest.mark.parametrize(
    ("noise", "n", "alpha"),
    [
        (Gaussian(0.25), N, ALPHA),
        (Gaussian(0.51), N, ALPHA),
        (NOISE, 10_000, ALPHA),
        (NOISE, 100_001, ALPHA),
        (NOISE, N, 0.01),
    ],
)
def test_a_wrong_n_alpha_or_sigma_is_noticed(noise, n, alpha):
    """At full precision nearly every radius fits no count of other settings."""
    log = log_of(NOISE.radius(clopper_pearson_lower(hits(), N, ALPHA)))
    with pytest.raises(
        ValueError,
        match=rf"fits no count of n = {n} draws at alpha = {alpha} .*: state the n, alpha and sigma",
    ):
        counts_from_log(log, noise, n, alpha)


@pytest.mark.parametrize(("noise", "n"), [(Gaussian(0.25), N), (NOISE, 10_000)])
def test_at_three_digits_a_smaller_n_or_sigma_is_noticed(noise, n):
    """By the largest radii, which it could not have given."""
    with pytest.raises(ValueError, match=r"radius 1\.91 .* \(the largest radius these allow is"):
        counts_from_log(log_of([0.5, 1.91]), noise, n, ALPHA)


def test_replay_of_a_log_abstains_where_it_abstained():
    log = log_of([0.5, 0.0, 1.25], predict=[2, -1, 7], label=[2, 4, 1])
    found = counts_from_log(log, NOISE, N, ALPHA)
    np.testing.assert_array_equal(found.abstained, [False, True, False])
    np.testing.assert_array_equal(found.candidates > 0, [True, False, True])
    replay = certify(RecordedCounts(found.counts), NOISE, 0, N, ALPHA, prediction=found.prediction)
    np.testing.assert_array_equal(replay.prediction, [2, ABSTAIN, 7])
    assert [f"{r:.3}" for r in replay.radius] == ["0.5", "0.0", "1.25"]


def test_the_published_imagenet_log_replays():
    """500 examples, n = 100,000: CERTIFY on the replayed counts gives the log's own radii, to its digits, and so its ACR of 0.8215.

    Unrounded the ACR is 0.8204: the log prints the largest radius, 1.9057, as 1.91.
    """
    log = read_log(IMAGENET)
    found = counts_from_log(log, NOISE, N, ALPHA)
    replay = certify(RecordedCounts(found.counts), NOISE, 0, N, ALPHA, prediction=found.prediction)
    assert len(log) == 500
    np.testing.assert_array_equal(replay.prediction, log["predict"])
    np.testing.assert_array_equal([float(f"{r:.3}") for r in replay.radius], log["radius"])
    printed = dataclasses.replace(
        replay, radius=np.array([float(f"{r:.3}") for r in replay.radius])
    )
    assert average_certified_radius(printed, found.labels) == pytest.approx(0.8215, abs=5e-5)
    assert average_certified_radius(replay, found.labels) == pytest.approx(0.8204, abs=5e-5)
    assert replay.radius.max() == pytest.approx(1.9057, abs=5e-5)
    assert ((log["predict"] == log["label"]) == (log["correct"] == 1)).all()
