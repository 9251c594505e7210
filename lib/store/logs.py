"""Certification logs: tab-separated, as Cohen et al.'s code writes them."""

import numpy as np
import pandas as pd

from lib.store.files import read_bytes, write_atomically
from lib.store.journal import read_journal

LOG_COLUMNS = ["idx", "label", "predict", "radius", "correct", "time"]


def write_log(path, table):
    """Write the field's log: tab-separated `idx label predict radius correct time`, then `n` where the table has it, at full precision.

    table: DataFrame; radius float64, written with repr so that reading gives the same double (rounding could make a radius larger);
    time in seconds, written h:mm:ss.ffffff; predict -1 where abstained.
    """
    columns = [*LOG_COLUMNS, *(["n"] if "n" in table else [])]
    rows = [log_line(row) for row in table[columns].to_dict("records")]
    write_atomically(path, ("\t".join(columns) + "\n" + "".join(rows)).encode())


def journal_table(entries):
    """The log of a run, from the entries of its journal: a DataFrame of the log's columns."""
    columns = ["idx", "label", "predict", "radius", "time", "n"]
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
    """Read a log of ours or of any published certification script: DataFrame idx, label, predict, radius, correct, time (s), [n].

    Raises FileNotFoundError, or ValueError naming the missing columns or the torn or malformed line.
    """
    data = read_bytes(path, "give the path of a tab-separated certification log")
    if data.startswith(b'{"run":'):
        return journal_table(read_journal(path)[1].values())
    text = data.decode("utf-8-sig", errors="replace")
    lines = text.splitlines()
    names = lines[0].split("\t") if lines else []
    missing = [name for name in LOG_COLUMNS if name not in names]
    if missing:
        raise ValueError(
            f"{path} lacks the column(s) {', '.join(missing)}: a log begins with the line {' '.join(LOG_COLUMNS)}, tab-separated"
        )
    rows = [line.split("\t") for line in lines[1:] if line.strip()]
    for number, row in enumerate(rows, start=2):
        if len(row) != len(names):
            raise ValueError(
                f"{path}, line {number}: {len(row)} cells instead of {len(names)}; the line is torn: delete it, or certify again"
            )
    if "n" in names and not text.endswith("\n"):
        # Half a number of draws looks like a whole one. Without this column a torn line lacks cells, or loses part of its time.
        raise ValueError(
            f"{path}, line {len(lines)}: the last line has no line end; the line is torn: delete it, or certify again"
        )
    table = pd.DataFrame(rows, columns=names)
    try:
        table["correct"] = table["correct"].replace(
            {"True": "1", "False": "0", "1.0": "1", "0.0": "0"}
        )
        table = table.astype(
            {"idx": int, "label": int, "predict": int, "radius": float, "correct": int}
        )
        clock = table["time"].str.contains(":")  # h:mm:ss.ffffff, or seconds
        table["time"] = pd.to_timedelta(
            table["time"].where(clock, table["time"] + "s")
        ).dt.total_seconds()
        if "n" in table:
            table["n"] = table["n"].astype(int)
    except ValueError as error:
        raise ValueError(f"{path} has a cell that is not a number: {error}") from error
    if table["idx"].duplicated().any():
        raise ValueError(
            f"{path} holds idx {table['idx'][table['idx'].duplicated()].iloc[0]} twice: delete one of its lines"
        )
    if not (np.isfinite(table["radius"]) & (table["radius"] >= 0)).all():
        raise ValueError(f"{path} has a radius that is negative or not finite")
    return table
