"""Every notebook runs, from its first cell to its claims, at the smoke profile; the frame holds."""

import csv
import json
import os
import pathlib
import subprocess
import sys

import nbformat
import papermill
import pytest

ROOT = pathlib.Path(__file__).parent.parent
NAMES = sorted(path.stem for path in (ROOT / "notebooks").glob("[0-9]*.ipynb"))

sys.path.insert(0, str(ROOT / "notebooks"))
import lint  # noqa: E402
import run  # noqa: E402


@pytest.mark.parametrize("name", NAMES)
def test_runs_at_the_smoke_profile(name):
    """Its kernel works in notebooks/, as in JupyterLab."""
    done = subprocess.run(
        [sys.executable, "notebooks/run.py", name, "smoke"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    text = (ROOT / "build/smoke/figures" / name / "README.md").read_text()
    assert text.startswith("# ")
    assert ".ipynb" not in text


def test_there_are_notebooks():
    assert len(NAMES) >= 5


def test_a_readers_run_from_the_root_leaves_the_committed_figures_alone(tmp_path, monkeypatch):
    monkeypatch.delenv("FIGURES", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    written = ROOT / "build/reader/figures/00_template/lower-bound.png"
    written.unlink(missing_ok=True)
    papermill.execute_notebook(
        ROOT / "notebooks/template.ipynb",
        tmp_path / "out.ipynb",
        cwd=str(ROOT),
        kernel_name="python3",
        progress_bar=False,
        extra_arguments=["--IPKernelApp.log_level=ERROR"],
    )
    assert written.exists()
    assert not (ROOT / "figures/00_template").exists()


@pytest.mark.parametrize("name", [*NAMES, "template"])
def test_keeps_to_the_frame(name):
    assert list(lint.faults(ROOT / "notebooks" / f"{name}.ipynb")) == []


def template():
    return nbformat.read(ROOT / "notebooks/template.ipynb", as_version=4)


def found(book, tmp_path):
    # A copy of the template stands in a folder beside a lib/, as the real ones do.
    (tmp_path / "notebooks").mkdir(exist_ok=True)
    if not (tmp_path / "lib").exists():
        (tmp_path / "lib").symlink_to(ROOT / "lib")
        (tmp_path / "figures").symlink_to(ROOT / "figures")
    path = tmp_path / "notebooks/any.ipynb"
    nbformat.write(book, path)
    return " / ".join(lint.faults(path))


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("# 00 · Title", "# Title", "the first cell must begin with a title"),
        ("**In short.**", "In short,", "begins with **In short.**"),
        ("## Claims checked", "## Claims", "needs the sections Claims checked"),
        ("## Takeaways", "## Exercises", "in this order"),
        ("plots.versions(", "print(", "needs one cell with plots.versions"),
        ("ALPHA = 0.001", "alpha = 0.001", "the parameter alpha must be UPPERCASE"),
        ("assert ", "bool ", "is not Python"),
        ("assert ", "_ = ", "asserts no claim"),
        ("share of votes", 90 * "s", "more than 100 columns"),
        ("SEED = 0", "SEED = 0\n" * 14, "more than 15"),
        ("np.arange(0, N + 1, N // 100)", 'pd.read_csv("data/x.csv").k', "depends on the folder"),
        ("bounds, caption)", "bounds)", "saves a figure without a caption"),
        ("**Exercise 4** (hard).", "**Exercise 4.**", "has 3 exercises"),
        ("(easy, code)", "(easy)", "marked as code"),
        ("**Exercise 3**", "**Exercise 7**", "not numbered"),
        ("<details><summary>Solution</summary>\n\nThe proof.\n\n</details>", "", "no folded"),
        ("../lib/bounds.py#clopper_pearson_lower", "../lib/bound.py", "leads nowhere"),
        ("#clopper_pearson_lower", "#clopper_lower", "names nothing in that file"),
        (r"\thinspace k", r"\, k", r"has '\\,'"),
        (r"\underline{p_A} =", r"\underline{p_A}^* =", "has '*'"),
        ('"parameters"', '"parameter"', "exactly one code cell tagged 'parameters'"),
        ('"volatile"', '"quiet"', "tagged 'volatile'"),
    ],
)  # fmt: skip
def test_lint_finds_each_fault(old, new, fault, tmp_path):
    assert found(template(), tmp_path) == ""
    text = json.dumps(template(), ensure_ascii=False)
    # In the JSON text line ends, quotes and backslashes are escaped; tags keep their quotes.
    tag = old.startswith('"')
    old, new = (s if tag else json.dumps(s, ensure_ascii=False)[1:-1] for s in (old, new))
    broken = text.replace(old, new)
    assert broken != text
    assert fault in found(nbformat.reads(broken, as_version=4), tmp_path)


def test_lint_finds_outputs(tmp_path):
    book = template()
    book.cells[1].execution_count = 1
    assert "has outputs" in found(book, tmp_path)


def test_fix_clears_outputs_and_links_the_chapters(tmp_path):
    for name in ("00_first", "01_second", "05_third"):
        book = template()
        book.cells[0].source = f"# {name[:2]} · The {name[3:]}\n"
        book.cells[1].execution_count = 1
        nbformat.write(book, tmp_path / f"{name}.ipynb")
    for path in lint.chapters(tmp_path):
        lint.fix(path)
    book = nbformat.read(tmp_path / "01_second.ipynb", as_version=4)
    assert book.cells[1].execution_count is None
    assert len(book.cells) == len(template().cells)
    assert book.cells[-1].source == (
        "**Previous:** [00 · The first](00_first.ipynb) · "
        "**Next:** [05 · The third](05_third.ipynb) · [Contents](../figures/README.md)"
    )


def test_a_figure_that_is_shown_and_not_saved_ends_the_run(tmp_path):
    picture = nbformat.v4.new_output("display_data", {"image/png": "iVBORw0KGgo="})
    book = template()
    book.cells.append(nbformat.v4.new_code_cell("plt.plot()", outputs=[picture]))
    nbformat.write(book, tmp_path / "book.ipynb")
    with pytest.raises(SystemExit, match="shows a figure that is not saved"):
        run.render(tmp_path / "book.ipynb", tmp_path / "05_book")
    assert not (tmp_path / "05_book").exists()


def test_files_of_an_earlier_version_of_a_chapter_go(tmp_path):
    for name, when in (("old.csv", 100), ("new.csv", 300)):
        (tmp_path / name).write_text("")
        os.utime(tmp_path / name, (when, when))
    run.remove_older(tmp_path, 200)
    assert [path.name for path in tmp_path.iterdir()] == ["new.csv"]


def test_links_of_a_chapter_hold_in_the_rendered_book():
    source = (
        "[a](01_theory.ipynb) [n](00_quickstart.ipynb#notation) "
        "[b](../lib/bounds.py#clopper_pearson_lower) [c](../README.md) "
        "![d](../figures/01_theory/x.png) [e](https://arxiv.org/abs/1902.02918) [f](#here)"
    )
    lines = (ROOT / "lib/bounds.py").read_text().splitlines()
    at = next(i for i, line in enumerate(lines, 1) if line.startswith("def clopper_pearson_lower"))
    assert lint.LINK.sub(run._from_figures, source) == (
        f"[a](../01_theory/README.md) [n](../00_quickstart/README.md#notation) "
        f"[b](../../lib/bounds.py#L{at}) [c](../../README.md) "
        "![d](../01_theory/x.png) [e](https://arxiv.org/abs/1902.02918) [f](#here)"
    )


def test_the_contents_name_every_chapter_with_a_picture_and_a_sentence(tmp_path):
    run.contents(tmp_path)
    text = (tmp_path / "README.md").read_text()
    rows = text.splitlines()[4 : 4 + len(NAMES)]
    for name, row in zip(NAMES, rows, strict=True):
        picture = row.split('src="')[1].split('"')[0]
        assert picture.startswith(f"{name}/")
        assert f"({name}/README.md)**<br>" in row
        assert (ROOT / "figures" / picture).exists()
        sentence = row.split("<br>")[1]
        assert len(sentence) > 40


def test_every_row_of_the_coverage_table_leads_to_a_section():
    """Chapters that are not written yet are not checked; an empty chapter must say why."""
    with open(ROOT / "notebooks/coverage.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["paper"] for row in rows} >= {"Cohen 2019", "Chen 2022"}
    for row in rows:
        assert row["closeness"], row
        assert None not in row.values(), row
        if not row["chapter"]:
            assert row["closeness"].startswith("not"), row
        elif row["chapter"] in NAMES:
            book = nbformat.read(ROOT / f"notebooks/{row['chapter']}.ipynb", as_version=4)
            text = "\n".join(cell.source for cell in book.cells if cell.cell_type == "markdown")
            headings = [line.lstrip("# ") for line in text.splitlines() if line.startswith("#")]
            assert any(line.startswith(row["section"]) for line in headings), row
