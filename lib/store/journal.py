"""Journals of runs: one synced line per finished example, which a kill can tear but not corrupt.

A line is JSON and the CRC-32 of its bytes. Lines that begin a run say how it is made; later lines
of the same example replace earlier ones.
"""

import contextlib
import json
import os
import pathlib
import zlib

from lib.store.files import read_bytes

try:
    import fcntl
except ImportError:  # Windows has no such lock; there two runs of one journal are not told apart
    fcntl = None


def _line(content):
    text = json.dumps(content, separators=(",", ":"))
    return f"{text} {zlib.crc32(text.encode()):08x}\n".encode()


def _content(path, number, line):
    text, _, check = line.rpartition(b" ")
    if check.decode(errors="replace") != f"{zlib.crc32(text):08x}":
        raise ValueError(
            f"{path}, line {number} is damaged: delete it, and its example is done again"
        )
    return json.loads(text)


def read_journal(path):
    """(how the run is made, {index: entry}) of a journal; (None, {}) of an empty one.

    A torn last line is left out. Raises FileNotFoundError, or ValueError naming a damaged line.
    """
    made, entries = None, {}
    data = read_bytes(path, "give the path of the journal of a run")
    for number, line in enumerate(data[: data.rfind(b"\n") + 1].splitlines(), start=1):
        content = _content(path, number, line)
        if "run" in content:
            made = content["run"]
        else:
            entries[content["idx"]] = content
    return made, entries


class Journal:
    """A journal opened for writing: locked, its torn end cut off. A context manager.

    - path: of the journal; made where it is missing.

    `made` and `entries` are what it holds. Raises ValueError where another process writes it, or
    where a line is damaged.
    """

    def __init__(self, path):
        self.path = pathlib.Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "a+b")  # noqa: SIM115 (closed by __exit__)
        try:
            self._lock()
            self._file.seek(0)
            self._file.truncate(self._file.read().rfind(b"\n") + 1)
            self.made, self.entries = read_journal(self.path)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()

    def _lock(self):
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"{self.path} is being written by another process: wait for it, or give another "
                "--out"
            ) from error
        except OSError:
            pass  # some network file systems know no locks

    def begin(self, made):
        """Say how the run is made, from here on."""
        self._append([{"run": made}])
        self.made = made

    def clear(self):
        """Forget everything, as where a run failed before its first result."""
        self._file.truncate(0)
        self.made, self.entries = None, {}

    def append(self, entries, made=None):
        """Add finished examples: dicts with "idx". They are on disk when this returns.

        - made: how the run is made from these examples on; None: as before.
        """
        changed = made is not None and made != self.made
        self._append([*([{"run": made}] if changed else []), *entries])
        self.made = made if changed else self.made
        self.entries |= {entry["idx"]: entry for entry in entries}

    def absorb(self, paths, join=lambda made, part: made):
        """Take over the entries of other journals of this run, then delete those files.

        - join: how the run is made, from what this journal says and what the other does.
        """
        for path in paths:
            made, entries = read_journal(path)
            self.append(list(entries.values()), join(self.made, made))
            path.unlink()

    def _append(self, contents):
        lines = b"".join(_line(content) for content in contents)
        end = self._file.seek(0, os.SEEK_END)
        try:
            self._file.write(lines)
            self._file.flush()
            os.fsync(self._file.fileno())
        except BaseException:
            with contextlib.suppress(OSError):
                self._file.truncate(end)
            raise
