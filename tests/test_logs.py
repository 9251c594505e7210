"""Logs at full precision, and published radii inverted to the counts that they came from."""

import csv
import dataclasses
import datetime
import pathlib
import tempfile

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.bounds import clopper_pearson_lower
from lib.certify import ABSTAIN, certify, predict
from lib.counts import RecordedCounts, counts_from_log
from lib.iss import certify_iss, sample_size_map
from lib.metrics import average_certified_radius
from lib.noise import Gaussian
from lib.store.logs import LOG_COLUMNS, read_log, write_log

ROOT = pathlib.Path(__file__).parent.parent
IMAGENET = ROOT / "data/records/imagenet-resnet50-consistency-sigma0.50.tsv"
HEADER = "\t".join(LOG_COLUMNS)
N, ALPHA, NOISE = 100_000, 0.001, Gaussian(0.5)


def log_of(radius, predict=None, label=None, **more):
    """A log as a table: class 0 everywhere unless said otherwise."""
    radius = np.asarray(radius, dtype=np.float64)
    size = len(radius)
    predict = np.zeros(size, int) if predict is None else predict
    label = np.zeros(size, int) if label is None else label
    columns = {
        "idx": np.arange(size),
        "label": label,
        "predict": predict,
        "radius": radius,
        "correct": np.equal(label, predict).astype(int),
    }
    return pd.DataFrame(columns | {"time": np.full(size, 1.5)} | more)


def independent_reader(path):
    """The log as another program would read it: csv, float(), and times by hand."""
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
    """Both readers find the same double, bit by bit; times keep their microseconds."""
    radius, predict, label, seconds = (np.array(column) for column in zip(*rows, strict=True))
    radius = np.where(predict < 0, 0.0, radius)
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


def test_a_log_looks_like_those_of_cohens_code(tmp_path):
    write_log(tmp_path / "log", log_of([0.1 + 0.2, 0.0], predict=[3, -1], label=[3, 5]))
    lines = (tmp_path / "log").read_text().split("\n")
    assert lines == [
        HEADER,
        "0\t3\t3\t0.30000000000000004\t1\t0:00:01.500000",
        "1\t5\t-1\t0.0\t0\t0:00:01.500000",
        "",
    ]
    assert str(datetime.timedelta(seconds=1.5)) in lines[1]


@pytest.mark.parametrize("name", LOG_COLUMNS)
def test_a_log_without_a_column_is_refused(tmp_path, name):
    log_of([0.5]).drop(columns=name).to_csv(tmp_path / "log", sep="\t", index=False)
    message = rf"log lacks the column\(s\) {name}: .*idx label predict radius correct time"
    with pytest.raises(ValueError, match=message):
        read_log(tmp_path / "log")


def test_a_log_torn_anywhere_in_its_last_line_is_refused(tmp_path):
    """The file is cut after each byte of its last line; half a number n would look whole."""
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
        ("7\t3\t3\t0.5\t0\t0:00:01", "idx 7: correct is 0 for label 3 and class 3"),
        ("7\t3\t4\t0.5\t1\t0:00:01", "idx 7: correct is 1 for label 3 and class 4"),
        ("7\t3\t-1\t0.0\t1\t0:00:01", "idx 7: correct is 1 for label 3 and class -1"),
        ("7\t3\t-1\t0.5\t0\t0:00:01", "idx 7: an abstention .* of radius 0.5, not 0"),
        ("7\t3\t3\t0.5\t2\t0:00:01", "idx 7: correct is 2 for label 3 and class 3"),
    ],
)
def test_a_malformed_line_is_refused(tmp_path, line, message):
    (tmp_path / "log").write_text(f"{HEADER}\n{line}\n")
    with pytest.raises(ValueError, match=message):
        read_log(tmp_path / "log")


@pytest.mark.parametrize(
    ("line", "correct", "time"),
    [
        ("0\tTrue\t14.5", 1, 14.5),
        ("1\t0.0\t14", 0, 14),
        ("1\tFalse\t14", 0, 14),
        ("0\t1\t0:00:14.5", 1, 14.5),
        ("0\t1.0\t1:00:00", 1, 3600),
    ],
)
def test_other_spellings_of_a_log_are_read(tmp_path, line, correct, time):
    """Other scripts write truth as True or 1.0, time in seconds, and a byte-order mark first."""
    predicted, rest = line.split("\t", 1)
    text = f"\ufeff{HEADER}\n0\t0\t{predicted}\t0.5\t{rest}\n"
    (tmp_path / "log").write_bytes(text.encode())
    (row,) = read_log(tmp_path / "log").to_dict("records")
    assert (row["correct"], row["time"]) == (correct, time)


def test_an_empty_or_missing_log_says_so(tmp_path):
    (tmp_path / "log").write_text("")
    with pytest.raises(ValueError, match="lacks the column"):
        read_log(tmp_path / "log")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_log(tmp_path / "none")
    (tmp_path / "log").write_text(HEADER + "\n")
    assert len(read_log(tmp_path / "log")) == 0


def hits():
    """Counts that certify: every one near 1/2 and near n, 400 between."""
    between = np.linspace(50_550, N - 100, 400).astype(int)
    k = np.unique(np.concatenate([np.arange(50_492, 50_550), between, np.arange(N - 100, N + 1)]))
    return k[clopper_pearson_lower(k, N, ALPHA) > 0.5]


def radii(k):
    return NOISE.radius(clopper_pearson_lower(k, N, ALPHA))


def printed(radius):
    return np.array([float(f"{r:.3}") for r in radius])


@pytest.mark.parametrize("take", ["middle", "lowest"])
def test_radii_at_full_precision_give_their_counts_back(take):
    """Also where the last digits differ, as those of another machine's quantile may."""
    k = hits()
    for factor in (1, 1 - 5e-10, 1 + 5e-10):
        found = counts_from_log(log_of(radii(k) * factor), NOISE, N, ALPHA, take)
        np.testing.assert_array_equal(found.counts[:, 0], k)
        np.testing.assert_array_equal(found.counts.sum(axis=1), N)
        np.testing.assert_array_equal(found.candidates, 1)
        assert not found.abstained.any()


@pytest.mark.parametrize("factor", [1 - 2e-9, 1 + 2e-9])
def test_a_radius_that_is_off_by_more_than_its_last_digits_is_refused(factor):
    for k in hits()[[0, 200, -1]]:
        with pytest.raises(ValueError, match=f"fits no count of n = {N}"):
            counts_from_log(log_of([*radii(hits()[:2]), *(radii([k]) * factor)]), NOISE, N, ALPHA)


def test_radii_at_three_digits_give_a_count_that_prints_the_same():
    """The true count is always one of the candidates; the one taken prints the log's radius."""
    k = hits()
    shown = printed(radii(k))
    found = counts_from_log(log_of(shown), NOISE, N, ALPHA)
    taken = found.counts[:, 0]
    np.testing.assert_array_equal(printed(radii(taken)), shown)
    assert (np.abs(taken - k) < found.candidates).all()
    # How many counts have the same print, one by one: where the radius is 1.x, hundreds; of the
    # largest radius, the last few.
    prints = printed(radii(np.arange(N // 2, N + 1)))
    np.testing.assert_array_equal(found.candidates, [(prints == p).sum() for p in shown])
    assert found.candidates.max() > 50


def test_only_the_lowest_candidate_is_a_certificate():
    """Radii from the lowest candidates never exceed the true ones, those from the middle do."""
    k = hits()
    log = log_of(printed(radii(k)))
    lowest, middle = (counts_from_log(log, NOISE, N, ALPHA, t) for t in ("lowest", "middle"))
    assert (lowest.counts[:, 0] <= k).all()
    assert (middle.counts[:, 0] > k).mean() > 0.2
    np.testing.assert_array_equal(printed(radii(lowest.counts[:, 0])), log["radius"])
    # One vote less would have been printed as a smaller radius: nothing is given away.
    assert (printed(radii(lowest.counts[:, 0] - 1)) < log["radius"]).all()
    source = RecordedCounts(lowest.counts)
    again = certify(source, NOISE, 0, N, ALPHA, prediction=lowest.prediction)
    assert (again.radius <= radii(k)).all()


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
    message = rf"fits no count of n = {n} draws at alpha = {alpha} .*: state the n, alpha and sigma"
    with pytest.raises(ValueError, match=message):
        counts_from_log(log_of(radii(hits())), noise, n, alpha)


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
    np.testing.assert_array_equal(found.counts.sum(axis=1), N)
    replay = certify(RecordedCounts(found.counts), NOISE, 0, N, ALPHA, prediction=found.prediction)
    np.testing.assert_array_equal(replay.prediction, [2, ABSTAIN, 7])
    assert [f"{r:.3}" for r in replay.radius] == ["0.5", "0.0", "1.25"]


@pytest.mark.parametrize("given_class", [True, False])
def test_abstained_rows_abstain_under_every_sampler(given_class):
    """Also with few draws at a lenient level, where one class of three would often win by chance.

    20,000 abstained rows, 10 draws for the bound, alpha = 1/20: nine draws of ten must agree.
    """
    size, n, alpha = 20_000, 10, 0.05
    log = log_of(np.zeros(size), predict=np.full(size, -1))
    found = counts_from_log(log, NOISE, N, ALPHA)
    prediction = found.prediction if given_class else None
    sizes = sample_size_map(n, 0.05, "absolute", NOISE, alpha)
    source = RecordedCounts(found.counts, seed=1)
    answers = [
        certify(source, NOISE, 0 if given_class else 5, n, alpha, prediction=prediction),
        certify_iss(source, NOISE, 3, n, sizes, alpha, prediction=prediction),
    ]
    for answer in answers:
        assert (answer.prediction == ABSTAIN).all()
        assert (answer.radius == 0).all()
    assert given_class or (predict(source, n, alpha) == ABSTAIN).all()
    # With the class given it is no matter of chance: that class has no votes.
    assert (found.counts[np.arange(size), found.prediction] == 0).all()


def test_the_published_imagenet_log_replays():
    """500 examples, n = 100,000: replayed, CERTIFY gives the log's radii and its ACR of 0.8215.

    Unrounded the ACR is 0.8204: the log prints the largest radius, 1.9057, as 1.91.
    """
    log = read_log(IMAGENET)
    found = counts_from_log(log, NOISE, N, ALPHA)
    replay = certify(RecordedCounts(found.counts), NOISE, 0, N, ALPHA, prediction=found.prediction)
    assert len(log) == 500
    np.testing.assert_array_equal(replay.prediction, log["predict"])
    np.testing.assert_array_equal(printed(replay.radius), log["radius"])
    rounded = dataclasses.replace(replay, radius=printed(replay.radius))
    assert average_certified_radius(rounded, found.labels) == pytest.approx(0.8215, abs=5e-5)
    assert average_certified_radius(replay, found.labels) == pytest.approx(0.8204, abs=5e-5)
    assert replay.radius.max() == pytest.approx(1.9057, abs=5e-5)
    assert ((log["predict"] == log["label"]) == (log["correct"] == 1)).all()
