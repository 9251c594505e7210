"""Figures and tables: the files that they leave, and what they show."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from lib import plots


@pytest.fixture(autouse=True)
def shown(tmp_path, monkeypatch):
    """What was displayed; figures go to a folder of the test."""
    monkeypatch.setenv("FIGURES", str(tmp_path))
    monkeypatch.setattr(
        plots, "display", lambda content, **settings: displayed.append((content, settings))
    )
    displayed = []
    return displayed


def figure():
    plots.style()
    fig, axes = plt.subplots()
    plots.certified_accuracy_curves(axes, {"a": [1.0, 0.5], "b": [0.8, 0.1]}, np.array([0.0, 2.0]))
    return fig, axes


def test_a_figure_leaves_the_same_picture_each_time_and_its_numbers(tmp_path, shown):
    data = pd.DataFrame({"radius": [0.0, 2.0], "a": [1 / 3, 0.5]})
    plots.save(figure()[0], "nb/x", data)
    first = (tmp_path / "nb/x.png").read_bytes()
    plots.save(figure()[0], "nb/x", data)
    assert first[:8] == b"\x89PNG\r\n\x1a\n"
    assert (tmp_path / "nb/x.png").read_bytes() == first
    assert (tmp_path / "nb/x.csv").read_text() == "radius,a\n0,0.333333333333\n2,0.5\n"
    assert sorted(path.name for path in (tmp_path / "nb").iterdir()) == ["x.csv", "x.png"]
    assert shown[0][1]["metadata"] == {"figure": "nb/x"}
    assert not plt.get_fignums()
    with pytest.raises(ValueError, match="data must be a pandas DataFrame"):
        plots.save(figure()[0], "nb/y", [1, 2])
    plt.close("all")


def test_curves_can_be_told_apart_without_colour():
    fig, axes = figure()
    assert [line.get_linestyle() for line in axes.lines] == ["-", "--"]
    assert axes.lines[1].get_xydata().tolist() == [[0, 0.8], [2, 0.1]]
    assert axes.get_xlabel()
    assert axes.get_ylabel() == "certified accuracy"
    plt.close(fig)


def test_a_table_shows_rounded_numbers_and_keeps_full_ones(tmp_path, shown):
    frame = pd.DataFrame(
        {"n": [10, 20], "ACR": [1 / 3, np.nan]}, index=pd.Index(["a", "b"], name="log")
    )
    plots.table(frame, "nb/t", "Two rows.", bold=["ACR"])
    assert (tmp_path / "nb/t.csv").read_text() == "log,n,ACR\na,10,0.333333333333\nb,20,\n"
    assert shown[0][0].data.split("\n") == [
        "*Two rows.*",
        "",
        "| log | n | ACR |",
        "| --- | --- | --- |",
        "| a | 10 | **0.333** |",
        "| b | 20 | – |",
    ]
