"""Published certification logs, several of the same images packed into one small file."""

import numpy as np
import pandas as pd

from lib.checks import check_choice, check_labels
from lib.store.records import load_arrays, save_arrays


def save_logs(path, tables, headers, **header):
    """Write logs of the same images as one npz; `read_published` gives each back as printed.

    A radius of up to four significant digits is kept as the whole number of its digits and the
    number of its decimals: 0.377 is (377, 3). Both are exact, so the same double comes back. The
    times of single images are dropped. np.load opens the file, whose last 64 bytes (the archive's
    comment) are the SHA-256 of all bytes before them.

    - path: of the npz.
    - tables: {name: DataFrame with columns idx, label, predict, radius}, as `read_log` returns.
    - headers: {name: dict}, what is true of one log (sigma, its path at the source, ...).
    - header: what is true of all of them (source, licence, n, alpha, ...).

    Raises ValueError where the logs are of different images or labels, where a radius has more than
    four significant digits, or where `correct` does not follow from the other columns.
    """
    first = next(iter(tables.values()))
    arrays = {"idx": first["idx"].to_numpy(np.int32), "label": first["label"].to_numpy(np.int16)}
    for name, table in tables.items():
        for column, same in arrays.items():
            if column in ("idx", "label") and not np.array_equal(table[column], same):
                raise ValueError(f"tables: {name} has other values of {column} than the first log")
        if not ((table["predict"] == table["label"]) == (table["correct"] == 1)).all():
            raise ValueError(f"tables: {name} calls a class correct that is not the label")
        digits, places = _split(table["radius"].to_numpy())
        arrays[f"{name}/predict"] = table["predict"].to_numpy(np.int16)
        arrays[f"{name}/digits"], arrays[f"{name}/places"] = digits, places
    save_arrays(path, header | {"logs": headers}, **arrays)


def _split(radius):
    digits, places = np.zeros(len(radius), np.uint16), np.zeros(len(radius), np.uint8)
    for decimals in range(12, -1, -1):
        whole = np.round(radius * 10.0**decimals)
        fits = (whole < 1e4) & (whole / 10.0**decimals == radius)
        digits[fits], places[fits] = whole[fits], decimals
    if not np.array_equal(digits / 10.0**places, radius):
        wrong = radius[digits / 10.0**places != radius][0]
        raise ValueError(f"tables: radius {wrong!r} has more than four significant digits")
    return digits, places


def read_published(path, name):
    """One log of a file of `save_logs`, as `read_log` gives it, without the times.

    Returns a DataFrame with columns idx, label, predict, radius, correct. Its `attrs` hold what the
    file says of it: sigma, n0, n, alpha, source, licence, commit, path and sha256 of the original.
    Raises ValueError naming the file where it is damaged, or the name where it is not in it.
    """
    header, arrays = load_arrays(path, "name a file written by save_logs (data/records/published)")
    check_choice(header["logs"], name=name)
    label, predict = arrays["label"].astype(np.int64), arrays[f"{name}/predict"].astype(np.int64)
    check_labels(label, len(predict))
    table = pd.DataFrame(
        {
            "idx": arrays["idx"].astype(np.int64),
            "label": label,
            "predict": predict,
            # Whole numbers divided by a power of ten: correctly rounded, hence the printed double.
            "radius": arrays[f"{name}/digits"] / 10.0 ** arrays[f"{name}/places"],
            "correct": (label == predict).astype(np.int64),
        }
    )
    table.attrs = {k: v for k, v in header.items() if k != "logs"} | header["logs"][name]
    return table
