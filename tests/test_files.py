"""Files that are whole or absent, whatever happens while they are written."""

import pathlib
import signal
import subprocess
import sys

import pytest

from lib.store.files import write_atomically

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.parametrize("old", [None, b"the old content"])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_killed_write_leaves_the_old_file_or_none(tmp_path, old, call):
    """A process is killed before the bytes are synced, or before the rename.

    Nothing partial lies under the final name, and the next write succeeds.
    """
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
    done = subprocess.run([sys.executable, "-c", program], check=False)
    assert done.returncode == -signal.SIGKILL
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
