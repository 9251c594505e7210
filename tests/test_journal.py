"""Journals: synced line by line, checked, torn only at the end, written by one process."""

import os

import pytest
from sources import write_journal

from lib.store.journal import Journal, read_journal


def entry(index, votes=(3, 4)):
    return {"idx": index, "votes": [list(votes)]}


def test_a_journal_comes_back(tmp_path):
    path = tmp_path / "a.journal"
    with Journal(path) as journal:
        assert (journal.made, journal.entries) == (None, {})
        journal.begin({"n": 7})
        journal.append([entry(2), entry(5)])
        journal.append([entry(2, (0, 9))])
    assert read_journal(path) == ({"n": 7}, {2: entry(2, (0, 9)), 5: entry(5)})
    with Journal(path) as journal:
        journal.begin({"n": 8})
        assert journal.entries[5] == entry(5)
    assert read_journal(path)[0] == {"n": 8}


def test_every_line_is_synced_before_it_counts(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: (synced.append(number), fsync(number)))
    with Journal(tmp_path / "a.journal") as journal:
        journal.begin({})
        journal.append([entry(0)])
    assert len(synced) == 2


def test_a_full_disk_leaves_whole_lines(tmp_path, monkeypatch):
    """A write that fails half-way is taken back, and what was there stays."""
    path = tmp_path / "a.journal"
    with Journal(path) as journal:
        journal.begin({})
        journal.append([entry(0)])
        before = path.read_bytes()

        def full(number):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(OSError, match="No space"):
                journal.append([entry(1)])
        assert path.read_bytes() == before
        assert list(journal.entries) == [0]
        journal.append([entry(2)])
    assert list(read_journal(path)[1]) == [0, 2]


@pytest.mark.parametrize("cut", range(0, 60, 7))
def test_a_torn_end_is_cut_off(tmp_path, cut):
    path = tmp_path / "a.journal"
    write_journal(path, {}, [entry(0), entry(1)])
    data = path.read_bytes()
    path.write_bytes(data[: len(data) - 1 - cut])
    whole = data[: len(data) - 1 - cut].count(b"\n") - 1
    assert len(read_journal(path)[1]) == max(whole, 0)
    with Journal(path) as journal:
        journal.append([entry(9)])
    assert list(read_journal(path)[1])[-1] == 9


def test_every_changed_byte_of_a_whole_line_is_refused(tmp_path):
    """Each byte in turn, one bit of it changed: votes are never read other than written."""
    path = tmp_path / "a.journal"
    write_journal(path, {"n": 7}, [entry(0), entry(1)])
    data = path.read_bytes()
    for place in range(len(data) - 1):
        damaged = bytearray(data)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        line = data.count(b"\n", 0, place) + 1
        with pytest.raises(ValueError, match=rf"a\.journal, line {line} is damaged"):
            read_journal(path)


def test_another_process_is_kept_out_and_parts_are_taken_over(tmp_path):
    path, part = tmp_path / "a.journal", tmp_path / "a.journal.part1"
    write_journal(part, {}, [entry(4)])
    with Journal(path) as journal:
        with pytest.raises(ValueError, match="being written by another process"):
            Journal(path)
        journal.absorb([part])
        assert journal.entries == {4: entry(4)}
    assert not part.exists()
    with Journal(path) as journal:
        journal.clear()
    assert read_journal(path) == (None, {})
