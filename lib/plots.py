"""One look for all figures, and the one place that writes them: a PNG and the CSV behind it."""

import base64
import importlib.metadata
import io
import itertools
import os
import pathlib
import platform

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from IPython.display import Markdown, display

from lib.metrics import as_certificates, certified_accuracy
from lib.store.files import write_atomically

ROOT = pathlib.Path(__file__).parent.parent
# What has been shown so far, in order: the numbers of figures and tables.
_shown = {"Figure": [], "Table": []}


def _folder():
    # Only make sets FIGURES: a reader's run leaves the committed figures alone.
    return pathlib.Path(os.environ.get("FIGURES") or ROOT / "build/reader/figures")


def style():
    """Set the house style: colour-blind-safe, white grid, sizes for a laptop; call once."""
    sns.set_theme(context="notebook", style="whitegrid", palette="colorblind")
    plt.rcParams |= {
        "figure.figsize": (7.0, 4.2),
        "figure.dpi": 100,
        "savefig.dpi": 150,
        "axes.titlesize": "medium",
        "figure.constrained_layout.use": True,
    }


def versions(*packages):
    """One line with the versions of Python and of the named packages."""
    found = [f"{name} {importlib.metadata.version(name)}" for name in packages]
    return ", ".join([f"Python {platform.python_version()}", *found])


def published(name, **settings):
    """A paper's own table as printed: data/published/NAME.csv as a DataFrame.

    - name: such as "cohen2019_table3".
    - settings: further arguments of pandas.read_csv, such as dtype.

    Raises ValueError that lists the names if there is no such table.
    """
    folder = ROOT / "data/published"
    names = sorted(path.stem for path in folder.glob("*.csv"))
    if name not in names:
        raise ValueError(f"name must be one of {', '.join(names)}; got {name!r}")
    return pd.read_csv(folder / f"{name}.csv", comment="#", **settings)


def sliders(draw, **ranges):
    """Call `draw` whenever a reader moves a slider; under make, once, at the starting values.

    - draw: function of the named numbers; what it prints or shows appears below the sliders.
    - ranges: name=(start, low, high, step) of each slider.
    """
    if "FIGURES" in os.environ:
        draw(**{name: start for name, (start, *_) in ranges.items()})
        return
    from ipywidgets import FloatSlider, interact

    made = {
        name: FloatSlider(start, min=low, max=high, step=step, readout_format=".3f")
        for name, (start, low, high, step) in ranges.items()
    }
    interact(draw, **made)


def _write_csv(data, path):
    if not isinstance(data, pd.DataFrame):
        raise ValueError(
            f"data must be a pandas DataFrame, the numbers behind {path}; got {type(data).__name__}"
        )
    # Eight digits: sums in another order, on another processor, differ in later ones.
    text = data.to_csv(index=False, float_format="%.8g", lineterminator="\n")
    write_atomically(path, text.encode())


def write_png(fig, path):
    """Write a figure to `path`, whole or not at all, and close it.

    Returns the bytes, the same for the same figure (matplotlib's version is left out).
    """
    buffer = io.BytesIO()
    # Tight: pictures of fixed shape leave no empty strip below them.
    fig.savefig(buffer, format="png", metadata={"Software": None}, bbox_inches="tight")
    plt.close(fig)
    write_atomically(path, buffer.getvalue())
    return buffer.getvalue()


def _numbered(kind, name, caption):
    # "Figure 2.3. Caption": the third figure of chapter 02, however often its cell is run.
    chapter = name[:2]
    if not (caption and chapter.isdigit()):
        return caption
    if name not in _shown[kind]:
        _shown[kind].append(name)
    return f"{kind} {int(chapter)}.{_shown[kind].index(name) + 1}. {caption}"


def save(fig, name, data, caption=""):
    """Write NAME.png and NAME.csv, whole or not at all, and show the figure with its number.

    They go to $FIGURES, which make sets, or else to build/reader/figures.

    - fig: matplotlib figure; it is closed.
    - name: "NN_notebook/short-name".
    - data: DataFrame, the numbers behind the figure.
    - caption: what is seen, in a sentence; also the picture's alternative text.
    """
    png = write_png(fig, _folder() / f"{name}.png")
    _write_csv(data, _folder() / f"{name}.csv")
    caption = _numbered("Figure", name, caption)
    # The name in the metadata lets notebooks/run.py link to the file: the picture is kept once.
    picture = {"image/png": base64.b64encode(png).decode(), "text/plain": f"figure {name}"}
    display(picture, raw=True, metadata={"figure": name, "caption": caption})
    if caption:
        display(Markdown(f"*{caption}*"))


def table(frame, name, caption="", digits=3, bold=None, against=None):
    """Write NAME.csv (eight digits) and show the table, a dash where there is no number.

    - frame: DataFrame; index levels that have names become columns.
    - name: "NN_notebook/short-name", in the folder that `save` writes to.
    - caption: what the table holds; it is numbered.
    - digits: decimals of the floats that are shown.
    - bold: columns whose largest value is set bold.
    - against: DataFrame of the same rows and some of the columns, such as a paper's values; they
      are shown in brackets behind the own ones, and written as columns "NAME, published".
    """
    frame = frame.reset_index(drop=not any(frame.index.names))
    published = pd.DataFrame() if against is None else against.reset_index(drop=True)
    beside = pd.concat([frame, published.add_suffix(", published")], axis=1)
    _write_csv(beside, _folder() / f"{name}.csv")
    shown = frame.copy().astype(object)
    for column in frame:
        cells = frame[column]
        shown[column] = [_shown_as(value, digits) for value in cells]
        if column in published:
            theirs = [_shown_as(value, digits) for value in published[column]]
            pairs = zip(shown[column], theirs, strict=True)
            shown[column] = [own if own == his == "–" else f"{own} ({his})" for own, his in pairs]
        if column in (bold or []):
            shown.loc[(cells == cells.max()).to_numpy(), column] = shown[column].map(
                "**{}**".format
            )
    text = markdown(shown)
    caption = _numbered("Table", name, caption)
    display(Markdown(f"*{caption}*\n\n{text}" if caption else text))


def _shown_as(value, digits):
    if pd.isna(value):
        return "–"
    # Plus zero: what rounds to zero from below is shown without a sign.
    return f"{round(value, digits) + 0.0:.{digits}f}" if isinstance(value, float) else str(value)


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
    axes.set_title("Fraction of examples that are right and certified at the radius")
    write_png(figure, path)


def certified_accuracy_curves(axes, curves, radii):
    """Draw certified accuracy over the radius.

    - axes: matplotlib axes.
    - curves: {name: accuracy [R]}, one line each.
    - radii: [R], l2, pixels in [0, 1].
    """
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


def panels(frame, panel, line, x, y, xlabel, ylabel):
    """Small multiples of curves, side by side on one scale; returns (figure, axes [panels]).

    - frame: DataFrame, one row per point of a curve.
    - panel, line: columns whose values tell panels and curves apart, in order of appearance. Curves
      differ in colour and dashes; the last panel has the legend.
    - x, y: columns of the coordinates. xlabel, ylabel: with units.
    """
    groups = frame.groupby(panel, sort=False)
    size = (3.7 * groups.ngroups + 0.6, 3.8)
    fig, axes = plt.subplots(1, groups.ngroups, figsize=size, sharey=True, squeeze=False)
    for one, (title, rows) in zip(axes[0], groups, strict=True):
        dashes = itertools.cycle(["-", "--", "-.", ":", (0, (1, 4))])
        for name, curve in rows.groupby(line, sort=False):
            one.plot(curve[x], curve[y], ls=next(dashes), label=str(name))
        one.set(title=str(title), xlabel=xlabel)
    axes[0, 0].set_ylabel(ylabel)
    axes[0, -1].legend()
    return fig, axes[0]
