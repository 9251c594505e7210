"""One look for all figures, and the one place that writes them: a PNG and the CSV behind it."""

import base64
import io
import itertools
import os
import pathlib

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from IPython.display import Markdown, display

from lib.metrics import as_certificates, certified_accuracy
from lib.store.files import write_atomically


def _folder():
    return pathlib.Path(os.environ.get("FIGURES", "figures"))


def style():
    """Set the house style: colour-blind-safe, white grid, sizes that read on a laptop. Call once at the top of a notebook."""
    sns.set_theme(context="notebook", style="whitegrid", palette="colorblind")
    plt.rcParams |= {
        "figure.figsize": (7.0, 4.2),
        "figure.dpi": 100,
        "savefig.dpi": 150,
        "axes.titlesize": "medium",
        "figure.constrained_layout.use": True,
    }


def _write_csv(data, path):
    if not isinstance(data, pd.DataFrame):
        raise ValueError(
            f"data must be a pandas DataFrame, the numbers behind {path}; got {type(data).__name__}"
        )
    # Twelve digits: more than a reader needs, fewer than differ between machines.
    write_atomically(
        path, data.to_csv(index=False, float_format="%.12g", lineterminator="\n").encode()
    )


def write_png(fig, path):
    """Write a figure to `path`, whole or not at all, and close it; returns the bytes, the same for the same figure."""
    buffer = io.BytesIO()
    fig.savefig(
        buffer, format="png", metadata={"Software": None}
    )  # without matplotlib's version in it
    plt.close(fig)
    write_atomically(path, buffer.getvalue())
    return buffer.getvalue()


def save(fig, name, data):
    """Write figures/NAME.png and figures/NAME.csv and show the figure; nothing partial is left under either name.

    name: "NN_notebook/short-name". data: DataFrame, the numbers behind the figure. (Folder: $FIGURES, default figures/.)
    """
    png = write_png(fig, _folder() / f"{name}.png")
    _write_csv(data, _folder() / f"{name}.csv")
    # The name in the metadata lets notebooks/run.py link to the file instead of embedding the picture again.
    picture = {"image/png": base64.b64encode(png).decode(), "text/plain": f"figure {name}"}
    display(picture, raw=True, metadata={"figure": name})


def table(frame, name, caption="", digits=3, bold=None):
    """Write figures/NAME.csv (full precision) and show the table, floats with `digits` decimals, a dash where there is no number.

    bold: columns whose largest value is set bold. Index levels that have names become columns.
    """
    if any(frame.index.names):
        frame = frame.reset_index()
    _write_csv(frame, _folder() / f"{name}.csv")
    shown = frame.copy().astype(object)
    for column in frame:
        cells = frame[column]
        shown[column] = [
            "–" if pd.isna(v) else f"{v:.{digits}f}" if isinstance(v, float) else str(v)
            for v in cells
        ]
        if column in (bold or []):
            shown.loc[(cells == cells.max()).to_numpy(), column] = shown[column].map(
                "**{}**".format
            )
    text = markdown(shown)
    display(Markdown(f"*{caption}*\n\n{text}" if caption else text))


def markdown(cells):
    """A DataFrame of texts as a Markdown table, its index left out."""
    rows = [list(map(str, cells.columns)), ["---"] * cells.shape[1], *cells.to_numpy().tolist()]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def draw_logs(logs, path):
    """Write the certified accuracy of each log over the radius as a PNG, whole or not at all.

    - logs: {name: DataFrame of `lib.store.logs.read_log`}.
    """
    radii = np.linspace(0, (max(log["radius"].max() for log in logs.values()) or 1.0) * 1.02, 500)
    curves = {
        name: certified_accuracy(as_certificates(log), log["label"], radii)
        for name, log in logs.items()
    }
    style()
    figure, axes = plt.subplots()
    certified_accuracy_curves(axes, curves, radii)
    axes.set_title("Fraction of examples that are right and certified beyond the radius")
    write_png(figure, path)


def certified_accuracy_curves(axes, curves, radii):
    """Draw certified accuracy over the radius, one curve a name: curves {name: accuracy [R]}, radii [R] in l2, pixels in [0, 1]."""
    for (name, accuracy), dash in zip(
        curves.items(), itertools.cycle(["-", "--", "-.", ":"]), strict=False
    ):
        axes.plot(radii, accuracy, dash, label=name)
    axes.set(
        xlabel="$\\ell_2$ radius (pixels in [0, 1])",
        ylabel="certified accuracy",
        xlim=(0, float(np.max(radii))),
        ylim=(0, 1),
    )
    axes.legend()
