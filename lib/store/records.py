"""Records of Monte Carlo votes."""

import dataclasses
import io
import json
import zipfile

import numpy as np

from lib.checks import check_choice, check_counts, check_labels
from lib.store.files import read_bytes, sha256, write_atomically


@dataclasses.dataclass(frozen=True)
class Record:
    """Votes of one Monte Carlo run.

    - counts: int64 [B, C], or [R, B, C] of R readouts of the same draws.
    - index, labels: int64 [B], of each example in the data set.
    - header: provenance, a flat dict; of several readouts their names under "readouts" and, under
      "evaluations" [R][B], the passes of single networks that each would have cost alone.
    """

    counts: np.ndarray
    index: np.ndarray
    labels: np.ndarray
    header: dict

    @property
    def readouts(self):
        """The names of the readouts, () where the votes are those of one network."""
        return tuple(self.header.get("readouts", ()))

    def readout(self, name):
        """The record of one readout, counts [B, C]. Raises ValueError that lists the readouts."""
        check_choice(self.readouts, readout=name)
        place = self.readouts.index(name)
        header = self.header | {"readout": name}
        del header["readouts"]
        if "evaluations" in header:
            header["evaluations"] = header["evaluations"][place]
        return Record(self.counts[place], self.index, self.labels, header)

    @property
    def draws(self):
        """Draws of each example, where all have equally many; a ValueError where not."""
        totals = np.unique(self.counts.sum(axis=-1))
        if len(totals) != 1:
            raise ValueError(f"the examples have from {totals[0]} to {totals[-1]} draws")
        return int(totals[0])


def save_counts(path, counts, index, labels, **header):
    """Write a record, whole or not at all: the same content gives the same bytes.

    The file is an npz that np.load opens, with a JSON header and, in the archive's comment, the
    SHA-256 of all bytes before it.

    - counts: whole numbers [B, C], or [R, B, C] with the names of R readouts in the header.
    - index, labels: whole numbers [B].
    - header: provenance (noise, seed, model, dtype, ...), stored as JSON; `readouts` and
      `evaluations` as in Record.

    Raises ValueError naming the argument.
    """
    counts = check_counts(counts, readouts=True)
    names = header.get("readouts")
    if (counts.ndim == 3) != (names is not None) or (names and len(names) != len(counts)):
        raise ValueError(
            "readouts must name the readouts of counts [R, B, C], and be left out for [B, C]; "
            f"got {names!r} for counts of shape {counts.shape}"
        )
    save_arrays(
        path,
        header,
        counts=_smallest(counts),
        index=_smallest(check_labels(index, counts.shape[-2], "index")),
        labels=_smallest(check_labels(labels, counts.shape[-2])),
    )


def save_arrays(path, header, **arrays):
    """Write arrays and a JSON header as `save_counts` does: checksummed, whole or not at all."""
    text = json.dumps(header, sort_keys=True, default=lambda value: np.asarray(value).tolist())
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays, header=np.array(text))
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.comment = b"0" * 64
    data = buffer.getvalue()[:-64]
    write_atomically(path, data + sha256(data).encode())


def load_arrays(path, remedy, needs=()):
    """(header, arrays) of a file of `save_arrays`.

    - remedy: what to do where there is no such file, or one of another kind.
    - needs: names of the arrays that it must hold.

    Raises ValueError where a single byte is not as it was written, or an array is missing.
    """
    data = read_bytes(path, remedy)
    if len(data) < 64 or sha256(data[:-64]).encode() != data[-64:]:
        raise ValueError(
            f"{path} is damaged, or was not written by lib: its checksum does not match. Restore "
            f"it from a copy, or {remedy}"
        )
    with np.load(io.BytesIO(data), allow_pickle=False) as stored:
        arrays = dict(stored)
    if missing := sorted({"header", *needs} - set(arrays)):
        raise ValueError(f"{path} is a file of another kind, without {missing[0]}: {remedy}")
    return json.loads(str(arrays.pop("header"))), arrays


def _smallest(array):
    """The whole numbers as int32 where that holds them, else as int64."""
    return array.astype(np.int32 if array.max() < 2**31 else np.int64)


def load_counts(path, **expected):
    """Read a record of `save_counts` as a Record, refusing any damage.

    A single flipped, missing or added byte is a ValueError.

    - expected: header entries that must agree (load_counts(path, seed=3)); a ValueError names the
      one that does not.
    """
    remedy = "name a record written by save_counts, or compute it (make records)"
    header, arrays = load_arrays(path, remedy, ("counts", "index", "labels"))
    record = Record(
        *(arrays[name].astype(np.int64) for name in ("counts", "index", "labels")), header
    )
    for name, value in expected.items():
        if header.get(name) != value:
            raise ValueError(
                f"{path} was recorded with {name} = {header.get(name)!r}, not {value!r}: name the "
                "right record, or record anew"
            )
    return record
