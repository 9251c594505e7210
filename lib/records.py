"""Records of Monte Carlo votes, and the field's tab-separated certification logs."""

import dataclasses
import io
import json
import zipfile

import numpy as np
import pandas as pd

from lib.bounds import clopper_pearson_lower
from lib.checks import check_counts, check_draws, check_labels, check_level
from lib.files import read_bytes, sha256, write_atomically

LOG_COLUMNS = ["idx", "label", "predict", "radius", "correct", "time"]


@dataclasses.dataclass(frozen=True)
class Record:
    """Votes of one Monte Carlo run: counts int64 [B, C], index and labels int64 [B] in the data set, header (provenance, a flat dict)."""

    counts: np.ndarray
    index: np.ndarray
    labels: np.ndarray
    header: dict


def save_counts(path, counts, index, labels, **header):
    """Write a record: an npz that np.load opens, with a JSON header and, in the archive's comment, the SHA-256 of all bytes before it.

    counts: whole numbers [B, C]. index, labels: [B]. header: provenance (sigma, seed, model, dtype, ...), stored as JSON. The same content
    gives the same bytes. Never leaves a partial file. Raises ValueError naming the argument.
    """
    counts = check_counts(counts)
    small = np.int32 if counts.max() < 2**31 else np.int64
    arrays = {
        "counts": counts.astype(small),
        "index": check_labels(index, len(counts), "index").astype(np.int32),
        "labels": check_labels(labels, len(counts)).astype(np.int32),
        "header": np.array(json.dumps(header, sort_keys=True, default=lambda value: np.asarray(value).tolist())),
    }
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.comment = b"0" * 64
    data = buffer.getvalue()[:-64]
    write_atomically(path, data + sha256(data).encode())


def load_counts(path, **expected):
    """Read a record of `save_counts` as a Record, refusing damage: a single flipped, missing or added byte is a ValueError.

    expected: header entries that must agree (load_counts(path, sigma=0.5)); a ValueError names the one that does not.
    """
    data = read_bytes(path, "name a record written by save_counts, or compute it (make records)")
    if len(data) < 64 or sha256(data[:-64]).encode() != data[-64:]:
        raise ValueError(f"{path} is damaged or no record: its checksum does not match. Restore it (git checkout), or compute it again")
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        header = json.loads(str(arrays["header"]))
        record = Record(arrays["counts"].astype(np.int64), arrays["index"].astype(np.int64), arrays["labels"].astype(np.int64), header)
    for name, value in expected.items():
        if header.get(name) != value:
            raise ValueError(f"{path} was recorded with {name} = {header.get(name)!r}, not {value!r}: name the right record, or record anew")
    return record


def write_log(path, table):
    """Write the field's log: tab-separated `idx label predict radius correct time`, then `n` where the table has it, at full precision.

    table: DataFrame; radius float64, written with repr so that reading gives the same double (rounding could make a radius larger);
    time in seconds, written h:mm:ss.ffffff; predict -1 where abstained.
    """
    columns = [*LOG_COLUMNS, *(["n"] if "n" in table else [])]
    rows = [log_line(row) for row in table[columns].to_dict("records")]
    write_atomically(path, ("\t".join(columns) + "\n" + "".join(rows)).encode())


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
    text = read_bytes(path, "give the path of a tab-separated certification log").decode("utf-8-sig", errors="replace")
    lines = text.splitlines()
    names = lines[0].split("\t") if lines else []
    missing = [name for name in LOG_COLUMNS if name not in names]
    if missing:
        raise ValueError(f"{path} lacks the column(s) {', '.join(missing)}: a log begins with the line {' '.join(LOG_COLUMNS)}, tab-separated")
    rows = [line.split("\t") for line in lines[1:] if line.strip()]
    for number, row in enumerate(rows, start=2):
        if len(row) != len(names):
            raise ValueError(f"{path}, line {number}: {len(row)} cells instead of {len(names)}; the line is torn: delete it, or certify again")
    if "n" in names and not text.endswith("\n"):
        # Half a number of draws looks like a whole one. Without this column a torn line lacks cells, or loses part of its time.
        raise ValueError(f"{path}, line {len(lines)}: the last line has no line end; the line is torn: delete it, or certify again")
    table = pd.DataFrame(rows, columns=names)
    try:
        table["correct"] = table["correct"].replace({"True": "1", "False": "0", "1.0": "1", "0.0": "0"})
        table = table.astype({"idx": int, "label": int, "predict": int, "radius": float, "correct": int})
        clock = table["time"].str.contains(":")  # h:mm:ss.ffffff, or seconds
        table["time"] = pd.to_timedelta(table["time"].where(clock, table["time"] + "s")).dt.total_seconds()
        if "n" in table:
            table["n"] = table["n"].astype(int)
    except ValueError as error:
        raise ValueError(f"{path} has a cell that is not a number: {error}") from error
    if table["idx"].duplicated().any():
        raise ValueError(f"{path} holds idx {table['idx'][table['idx'].duplicated()].iloc[0]} twice: delete one of its lines")
    if not (np.isfinite(table["radius"]) & (table["radius"] >= 0)).all():
        raise ValueError(f"{path} has a radius that is negative or not finite")
    return table


@dataclasses.dataclass(frozen=True)
class LogCounts:
    """Votes recovered from a log (counts_from_log), to be replayed with the class given, not drawn.

    counts: int64 [B, C + 3]; the predicted class has the recovered count, all other votes lie in the nameless columns C...; where the log
    abstained its count is unknown, and the votes are spread in thirds over the nameless columns, so that every sampler abstains.
    prediction: int64 [B], the class to certify. labels: int64 [B]. abstained: bool [B].
    candidates: int64 [B], how many counts print the same radius: above 1 the rounding makes the count ambiguous, and the middle one is taken.
    """

    counts: np.ndarray
    prediction: np.ndarray
    labels: np.ndarray
    abstained: np.ndarray
    candidates: np.ndarray


def _as_printed(radius, digits):
    return np.array([float(f"{r:.{digits}g}") for r in radius])


def counts_from_log(log, noise, n, alpha):
    """Invert each radius of a log to the count it came from (n draws at failure probability alpha each). Returns LogCounts.

    The radii may be at full precision or rounded to three digits, as the field prints them (found by looking at them).
    Raises ValueError where a radius fits no count: the n, alpha or sigma stated is not the log's.
    """
    check_draws(n=n)
    check_level(alpha=alpha)
    if not len(log):
        raise ValueError("log holds no examples: give one with at least one line below its header")
    abstained = (log["predict"] < 0).to_numpy()
    radius = log["radius"].to_numpy()
    rounded = bool((_as_printed(radius, 3) == radius).all())
    k = np.arange(n // 2, n + 1)
    table = noise.radius(clopper_pearson_lower(k, n, alpha))
    if rounded:
        table = _as_printed(table, 3)
    # A full-precision log of another machine may differ in the last digits of the quantile; neighbouring counts are far farther apart.
    slack = 1e-12 if rounded else 1e-9
    first, last = np.searchsorted(table, radius * (1 - slack), "left"), np.searchsorted(table, radius * (1 + slack), "right")
    strange = (first >= last) & ~abstained
    if strange.any():
        i = int(np.argmax(strange))
        raise ValueError(
            f"log: radius {float(radius[i])} of idx {log['idx'].iloc[i]} fits no count of n = {n} draws at alpha = {alpha} "
            f"(the largest radius these allow is {table[-1]:.4g}): state the n, alpha and sigma that the log was made with"
        )
    votes = k[np.minimum((first + last - 1) // 2, len(k) - 1)]
    labels, predict = check_labels(log["label"].to_numpy(), len(log)), log["predict"].to_numpy()
    classes = int(max(labels.max(), predict.max())) + 1
    counts = np.zeros((len(log), classes + 3), dtype=np.int64)
    rows, seen = np.arange(len(log)), ~abstained
    counts[rows[seen], predict[seen]] = votes[seen]
    counts[rows[seen], classes] = n - votes[seen]
    counts[abstained, classes:] = [n - 2 * (n // 3), n // 3, n // 3]
    prediction = np.where(abstained, classes, predict).astype(np.int64)
    return LogCounts(counts, prediction, labels, abstained, np.where(abstained, 0, last - first))
