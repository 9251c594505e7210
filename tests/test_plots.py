"""Figures and tables: the files that they leave, and what they show."""

import sys

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
    assert (tmp_path / "nb/x.csv").read_text() == "radius,a\n0,0.33333333\n2,0.5\n"
    assert sorted(path.name for path in (tmp_path / "nb").iterdir()) == ["x.csv", "x.png"]
    assert shown[0][1]["metadata"] == {"figure": "nb/x", "caption": ""}
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
    assert (tmp_path / "nb/t.csv").read_text() == "log,n,ACR\na,10,0.33333333\nb,20,\n"
    assert shown[0][0].data.splitlines() == [
        "*Two rows.*", "", "| log | n | ACR |", "| --- | --- | --- |", "| a | 10 | **0.333** |",
        "| b | 20 | – |",
    ]  # fmt: skip


def test_a_table_beside_published_values_shows_and_keeps_both(tmp_path, shown):
    # The labels of the rows say nothing: tables are often put together from parts.
    ours = pd.DataFrame({"method": ["A", "B"], "ACR": [0.51249, np.nan], "draws": [100, 200]})
    ours.index = [0, 0]
    paper = pd.DataFrame({"ACR": [0.5, np.nan], "draws": [99, 201]})
    plots.table(ours, "nb/t", against=paper)
    assert "| A | 0.512 (0.500) | 100 (99) |" in shown[0][0].data
    assert "| B | – | 200 (201) |" in shown[0][0].data
    written = pd.read_csv(tmp_path / "nb/t.csv")
    assert len(written) == 2
    assert written["ACR, published"][0] == 0.5
    assert written.draws.tolist() == [100, 200]
    assert written["draws, published"].tolist() == [99, 201]


def test_a_table_of_parts_keeps_each_row_once(tmp_path, shown):
    plots.table(pd.concat([pd.DataFrame({"n": [1, 2]}), pd.DataFrame({"n": [3]})]), "nb/t")
    assert (tmp_path / "nb/t.csv").read_text() == "n\n1\n2\n3\n"
    assert shown[0][0].data.splitlines()[2:] == ["| 1 |", "| 2 |", "| 3 |"]


def test_a_difference_that_rounds_to_zero_has_no_sign(shown):
    plots.table(pd.DataFrame({"difference": [-0.0004, -0.0006, 0.0]}), "nb/t")
    assert shown[0][0].data.splitlines()[2:] == ["| 0.000 |", "| -0.001 |", "| 0.000 |"]


def test_figures_and_tables_of_a_chapter_are_numbered_in_order(tmp_path, shown, monkeypatch):
    monkeypatch.setattr(plots, "_shown", {"Figure": [], "Table": []})
    frame = pd.DataFrame({"n": [1]})
    for name in ("07_x/a", "07_x/b", "07_x/a"):
        plots.save(figure()[0], name, frame, "What is seen.")
    plots.table(frame, "07_x/t", "What it holds.")
    pictures = [settings["metadata"] for _, settings in shown if settings]
    assert [found["caption"] for found in pictures] == [
        "Figure 7.1. What is seen.", "Figure 7.2. What is seen.", "Figure 7.1. What is seen."
    ]  # fmt: skip
    assert shown[1][0].data == "*Figure 7.1. What is seen.*"
    assert shown[-1][0].data.startswith("*Table 7.1. What it holds.*")


def test_only_make_writes_to_figures(tmp_path, shown, monkeypatch):
    monkeypatch.delenv("FIGURES")
    monkeypatch.setattr(plots, "ROOT", tmp_path)
    plots.table(pd.DataFrame({"n": [1]}), "07_x/t")
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.csv")] == [
        "build/reader/figures/07_x/t.csv"
    ]


def test_digits_that_differ_between_processors_are_not_written(tmp_path, shown):
    sums = [0.1 + 0.2, sum([0.1] * 10)]
    plots.table(pd.DataFrame({"p": sums}), "nb/t")
    plots.table(pd.DataFrame({"p": [0.3, 1.0]}), "nb/u")
    assert (tmp_path / "nb/t.csv").read_text() == (tmp_path / "nb/u.csv").read_text()


def test_published_tables_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert plots.published("cohen2019_table3", dtype={"sigma": str}).sigma[0] == "0.12"
    message = r"name must be one of .*chen2022_table1, .*; got 'nothing'"
    with pytest.raises(ValueError, match=message):
        plots.published("nothing")


def test_sliders_stand_at_their_start_under_make(shown, monkeypatch):
    seen = []
    plots.sliders(lambda p, n: seen.append((p, n)), p=(0.9, 0, 1, 0.1), n=(3, 1, 9, 1))
    assert seen == [(0.9, 3)]
    moved = []
    monkeypatch.delenv("FIGURES")
    monkeypatch.setattr("ipywidgets.interact", lambda draw, **made: moved.append(made))
    plots.sliders(lambda p: None, p=(0.9, 0, 1, 0.1))
    assert (moved[0]["p"].value, moved[0]["p"].max) == (0.9, 1)


def test_versions_are_one_line():
    assert plots.versions("numpy") == f"Python {sys.version.split()[0]}, numpy {np.__version__}"


def test_panels_hold_one_curve_per_line_on_one_scale():
    points = pd.DataFrame(
        {"net": ["b"] * 4 + ["a"] * 2, "K": [0, 0, 9, 9, 0, 0], "r": [0, 1] * 3, "acc": range(6)}
    )
    fig, axes = plots.panels(points, "net", "K", "r", "acc", "radius (pixels)", "accuracy")
    assert [one.get_title() for one in axes] == ["b", "a"]
    assert [len(one.lines) for one in axes] == [2, 1]
    assert axes[0].lines[0].get_linestyle() != axes[0].lines[1].get_linestyle()
    np.testing.assert_array_equal(axes[0].lines[1].get_ydata(), [2, 3])
    assert axes[0].get_ylim() == axes[1].get_ylim()
    assert axes[0].get_ylabel() == "accuracy"
    plt.close(fig)
