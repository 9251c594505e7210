"""Certification logs: tab-separated, as Cohen et al.'s code writes them."""

import pathlib

import numpy as np
import pandas as pd

from lib.store.files import read_bytes, write_atomically
from lib.store.journal import read_journal

LOG_COLUMNS = ["idx", "label", "predict", "radius", "correct", "time"]
TRUTH = {"True": "1", "False": "0", "1.0": "1", "0.0": "0"}


def write_log(path, table, replace=True):
    """Write a log, whole or not at all: LOG_COLUMNS, then `n` where the table has it.

    - table: DataFrame with these columns; predict is -1 where abstained, radius float64 (written
      in full: rounding could make it larger), time in seconds (written h:mm:ss.ffffff).
    - replace: whether a file of other content may be written over; False: a ValueError.
    """
    columns = [*LOG_COLUMNS, *(["n"] if "n" in table else [])]
    rows = [log_line(row) for row in table[columns].to_dict("records")]
    data = ("\t".join(columns) + "\n" + "".join(rows)).encode()
    path = pathlib.Path(path)
    if not replace and path.exists() and path.read_bytes() != data:
        raise ValueError(
            f"{path} exists and holds something else: give another --out, or move it away"
        )
    write_atomically(path, data)


def journal_table(entries):
    """The log of a run, from the entries of its journal: a DataFrame of the log's columns."""
    columns = ["idx", "label", "predict", "radius", "time", "n"]
    for entry in entries:
        if missing := [name for name in columns if name not in entry]:
            raise ValueError(
                f"a journal without {missing[0]} is of a run that records votes: it has no log"
            )
    table = pd.DataFrame([[entry[name] for name in columns] for entry in entries], columns=columns)
    table["correct"] = (table["predict"] == table["label"]).astype(int)
    return table[[*LOG_COLUMNS, "n"]]


def log_line(row):
    """One line of a log from a dict of its columns."""
    cells = {
        "idx": int(row["idx"]),
        "label": int(row["label"]),
        "predict": int(row["predict"]),
        "radius": repr(float(row["radius"])),
        "correct": int(row["correct"]),
        "time": pd.Timedelta(seconds=float(row["time"])).to_pytimedelta(),
    }
    if "n" in row:
        cells["n"] = int(row["n"])
    return "\t".join(str(cell) for cell in cells.values()) + "\n"


def read_log(path):
    """Read a log of ours or of any published certification script.

    Returns a DataFrame with idx, label, predict, radius, correct, time (in seconds) and, where the
    log has it, n. Raises FileNotFoundError, or ValueError that names the missing columns, the torn
    or malformed line, or the example whose `correct` is not what its label and class say, or that
    has a radius although it was abstained on.
    """
    data = read_bytes(path, "give the path of a tab-separated certification log")
    if data.startswith(b'{"run":'):
        return journal_table(read_journal(path)[1].values())
    if data.startswith(b"PK"):  # an archive
        raise ValueError(
            f"{path} is no log. If it is a record of votes, certify from it: "
            f"python -m lib replay {path} --sampler certify --out LOG"
        )
    names, rows = _cells(path, data.decode("utf-8-sig", errors="replace"))
    table = _parsed(path, pd.DataFrame(rows, columns=names))
    repeated = table["idx"][table["idx"].duplicated()]
    if len(repeated):
        raise ValueError(f"{path} holds idx {repeated.iloc[0]} twice: delete one of its lines")
    if not (np.isfinite(table["radius"]) & (table["radius"] >= 0)).all():
        raise ValueError(f"{path} has a radius that is negative or not finite")
    strange = table[(table["predict"] < 0) & (table["radius"] > 0)]
    if len(strange):
        row = strange.iloc[0]
        raise ValueError(
            f"{path}, idx {row['idx']:.0f}: an abstention (class {row['predict']:.0f}) of radius "
            f"{row['radius']:g}, not 0; the line is damaged: certify again"
        )
    wrong = table[(table["label"] == table["predict"]) != (table["correct"] == 1)]
    if len(wrong):
        row = wrong.iloc[0]
        raise ValueError(
            f"{path}, idx {row['idx']:.0f}: correct is {row['correct']:.0f} for label "
            f"{row['label']:.0f} and class {row['predict']:.0f}; the line is damaged: certify again"
        )
    return table


def _cells(path, text):
    """(names of the columns, cells of each line); every line must be whole."""
    lines = text.splitlines()
    names = lines[0].split("\t") if lines else []
    missing = [name for name in LOG_COLUMNS if name not in names]
    if missing:
        raise ValueError(
            f"{path} lacks the column(s) {', '.join(missing)}: a log begins with the line "
            f"{' '.join(LOG_COLUMNS)}, tab-separated"
        )
    rows = [line.split("\t") for line in lines[1:] if line.strip()]
    for number, row in enumerate(rows, start=2):
        if len(row) != len(names):
            raise ValueError(
                f"{path}, line {number}: {len(row)} cells instead of {len(names)}; the line is "
                "torn: delete it, or certify again"
            )
    if "n" in names and not text.endswith("\n"):
        # Half a number of draws looks like a whole one. Without the column n a torn line lacks
        # cells, or loses part of its time.
        raise ValueError(
            f"{path}, line {len(lines)}: the last line has no line end; the line is torn: delete "
            "it, or certify again"
        )
    return names, rows


def _parsed(path, table):
    """The texts of a log as numbers."""
    kinds = {"idx": int, "label": int, "predict": int, "radius": float, "correct": int}
    try:
        table["correct"] = table["correct"].replace(TRUTH)
        table = table.astype(kinds | ({"n": int} if "n" in table else {}))
        clock = table["time"].str.contains(":")  # h:mm:ss.ffffff, or seconds
        time = table["time"].where(clock, table["time"] + "s")
        table["time"] = pd.to_timedelta(time).dt.total_seconds()
    except ValueError as error:
        raise ValueError(f"{path} has a cell that is not a number: {error}") from error
    return table
