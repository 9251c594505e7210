"""What the papers report, from logs alone: one row a log."""

import numpy as np
import pandas as pd

from lib.metrics import abstention, average_certified_radius, certified_accuracy
from lib.store.logs import read_log


def summarize(paths, radii=None):
    """A table of logs (ours or published), one row each: DataFrame indexed by `log`.

    Columns: examples; ACR, the mean radius, counted 0 where wrong or abstained (in the logs' units); abstained, a share; draws, the mean
    number per example (NaN where a log does not say); seconds an example; then for each radius the certified accuracy, the share of
    examples that are right and certified beyond it.
    radii: default 0, 0.25, ... up to the largest radius. Raises as read_log does, and ValueError on an empty log.
    """
    logs = _read(paths)
    for path, log in logs.items():
        if not len(log):
            raise ValueError(f"{path} holds no examples yet")
    if radii is None:
        radii = np.arange(0, max(log["radius"].max() for log in logs.values()) or 0.25, 0.25)
    rows = {}
    for name, log in logs.items():
        rows[name] = {
            "examples": len(log),
            "ACR": average_certified_radius(log, log["label"]),
            "abstained": abstention(log),
            "draws": float(log["n"].mean()) if "n" in log else np.nan,
            "seconds": float(log["time"].mean()),
        } | {
            f"{r:.12g}": a
            for r, a in zip(radii, certified_accuracy(log, log["label"], radii), strict=True)
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("log")


def as_text(table, style):
    """The table as "csv" (full precision), "markdown", or "latex" (booktabs; the best ACR and accuracies in bold)."""
    if style == "csv":
        return table.to_csv(lineterminator="\n")
    cells = formatted(table)
    if style == "markdown":
        rows = [
            ["log", *cells],
            ["---", *["---:"] * cells.shape[1]],
            *cells.reset_index().to_numpy(),
        ]
        return "".join("| " + " | ".join(row) + " |\n" for row in rows)
    radii = [column for column in table if column[0].isdigit()]
    if len(table) > 1:
        for column in ["ACR", *radii]:
            top = table[column] == table[column].max()
            cells.loc[top, column] = cells.loc[top, column].map("\\textbf{{{}}}".format)
    rows = [
        ["log", *(f"$r = {c}$" if c in radii else c for c in cells)],
        *cells.reset_index().to_numpy(),
    ]
    head, *body = (" & ".join(row).replace("_", "\\_") + " \\\\\n" for row in rows)
    return f"\\begin{{tabular}}{{l{'r' * cells.shape[1]}}}\n\\toprule\n{head}\\midrule\n{''.join(body)}\\bottomrule\n\\end{{tabular}}\n"


def formatted(table):
    """Each cell as text: three decimals, whole numbers as such, a dash where a log does not say."""
    digits = {"examples": ",.0f", "draws": ",.0f", "seconds": ".3g"}
    columns = {
        column: [
            "-" if np.isnan(v) else format(v, digits.get(column, ".3f")) for v in table[column]
        ]
        for column in table
    }
    return pd.DataFrame(columns, index=table.index)


def draw_curves(paths, png):
    """Write the certified accuracy of each log over the radius as a PNG."""
    import matplotlib.pyplot as plt

    from lib.plots import certified_accuracy_curves, style, write_png

    logs = _read(paths)
    radii = np.linspace(0, (max(log["radius"].max() for log in logs.values()) or 1.0) * 1.02, 500)
    style()
    figure, axes = plt.subplots()
    certified_accuracy_curves(
        axes,
        {name: certified_accuracy(log, log["label"], radii) for name, log in logs.items()},
        radii,
    )
    axes.set_title("Share of examples that are right and certified beyond the radius")
    write_png(figure, png)


def _read(paths):
    """{path: log}, whose class is called as in Certificates, so that what metrics tell of those they tell of logs."""
    return {str(path): read_log(path).rename(columns={"predict": "prediction"}) for path in paths}
