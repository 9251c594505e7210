"""Files that are whole or absent: written beside their final name, synced, then renamed."""

import hashlib
import os
import pathlib


def write_atomically(path, data):
    """Write bytes to `path`, whole or not at all.

    A kill at any moment leaves the old file or the new one, never a part.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # One temporary name per process: two writers of one path cannot mix their bytes.
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def sha256(*parts):
    """Hex SHA-256 of byte strings, one after the other."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def read_bytes(path, remedy):
    """The bytes of a file, or an OSError that says what to do."""
    path = pathlib.Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: {remedy}")
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: {remedy}")
    return path.read_bytes()
