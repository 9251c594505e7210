"""Records of votes: they survive the round trip and refuse any damage."""

import json

import numpy as np
import pytest

from lib.counts import RecordedCounts
from lib.noise import Gaussian
from lib.store.records import load_counts, save_arrays, save_counts

COUNTS = np.array([[99_000, 1000, 0], [5, 3, 99_992]])
INDEX, LABELS = np.array([4, 17]), np.array([0, 2])


@pytest.fixture
def record(tmp_path):
    path = tmp_path / "record.npz"
    save_counts(path, COUNTS, INDEX, LABELS, sigma=0.5, seed=3, model="digits", note="π")
    return path


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
    header = {"note": "π", "model": "digits", "seed": 3, "sigma": 0.5}
    save_counts(other, COUNTS.tolist(), INDEX.tolist(), LABELS.tolist(), **header)
    assert other.read_bytes() == record.read_bytes()


@pytest.mark.parametrize("name", ["counts", "index", "labels"])
@pytest.mark.parametrize("large", [2**31 - 1, 2**31, 2**40])
def test_numbers_beyond_31_bits_come_back(tmp_path, name, large):
    """Votes, indices and labels alike; in int32 they would become negative."""
    arrays = {"counts": [[7, 1]], "index": [3], "labels": [1]}
    arrays[name] = [[large, 1]] if name == "counts" else [large]
    save_counts(tmp_path / "r.npz", **arrays)
    found = load_counts(tmp_path / "r.npz")
    for field, value in arrays.items():
        np.testing.assert_array_equal(getattr(found, field), value)


@pytest.mark.parametrize("name", ["counts", "index", "labels"])
def test_numbers_beyond_63_bits_are_refused(tmp_path, name):
    arrays = {"counts": [[7, 1]], "index": [3], "labels": [1]}
    arrays[name] = np.full_like(arrays[name], 2**63, dtype=np.uint64)
    with pytest.raises(ValueError, match=rf"{name} must be below 2\^63; got 9223372036854775808"):
        save_counts(tmp_path / "r.npz", **arrays)


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
    shorter = [whole[:length] for length in range(0, len(whole), 13)] + [whole[:-1], whole[1:]]
    for damaged in [*shorter, whole + b"0", whole + whole]:
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


def test_a_record_of_readouts_replays_each_of_them(tmp_path):
    """Votes [R, B, C] of one pass: each readout is a record of its own; all together are none."""
    votes = np.random.default_rng(0).multinomial(40, [0.5, 0.3, 0.2], size=(2, 4))
    noise = Gaussian(0.25).describe()
    names, evaluations = ["soft:0-2", "consensus2:0-2"], [[120] * 4, [80, 90, 100, 110]]
    path, index, labels = tmp_path / "r.npz", np.arange(4) * 5, np.zeros(4, dtype=int)
    save_counts(path, votes, index, labels, readouts=names, evaluations=evaluations, noise=noise)
    found = load_counts(path)
    assert found.readouts == tuple(names)
    np.testing.assert_array_equal(found.counts, votes)
    for r, name in enumerate(names):
        one = found.readout(name)
        assert one.readouts == ()
        assert one.header == {"noise": noise, "readout": name, "evaluations": evaluations[r]}
        np.testing.assert_array_equal(one.index, index)
        replay = RecordedCounts(one)
        np.testing.assert_array_equal(replay.draw(15) + replay.draw(25), votes[r])
    with pytest.raises(ValueError, match=r"several readouts.*soft:0-2, consensus2:0-2"):
        RecordedCounts(found)
    with pytest.raises(ValueError, match="readout must be one of"):
        found.readout("hard:0-2")
    for counts, named in ((votes, None), (votes, names[:1]), (votes[0], names)):
        header = {} if named is None else {"readouts": named}
        with pytest.raises(ValueError, match="readouts must name"):
            save_counts(tmp_path / "bad.npz", counts, index, labels, **header)
    assert not (tmp_path / "bad.npz").exists()


def test_a_file_of_another_kind_says_so(tmp_path):
    save_arrays(tmp_path / "other.npz", {"a": 1}, levels=np.ones(3))
    with pytest.raises(ValueError, match="of another kind, without counts"):
        load_counts(tmp_path / "other.npz")
