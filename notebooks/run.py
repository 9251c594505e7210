"""Execute one notebook headless and render it: python notebooks/run.py NN_name PROFILE.

The executed notebook goes to build/PROFILE/, its figures and the Markdown of the whole to
figures/NN_name/ (profile laptop, committed) or build/PROFILE/figures/NN_name/ (other profiles).
What is written is the same from run to run. python notebooks/run.py contents PROFILE writes the
table of contents beside the chapters' folders.
"""

import csv
import os
import re
import sys
import time

import nbformat
import papermill
import yaml
from lint import FOLDER, LABELS, LINK, chapters, line_of, title
from nbconvert import MarkdownExporter
from papermill.exceptions import PapermillExecutionError

ROOT = FOLDER.parent
# Waiting threads sleep instead of spinning: on a busy machine live counting is then up to 15 times
# faster, on an idle one no slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# The matrix products of notebooks are small: threads of BLAS would only wait for each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
CELL_SECONDS = 900  # no cell takes a tenth of it: a kernel silent for so long does not answer


def figures(profile):
    """The folder that the figures of a profile go to."""
    return ROOT / ("figures" if profile == "laptop" else f"build/{profile}/figures")


def execute(name, profile):
    """Run the notebook with the profile's parameters; returns the path of the executed notebook."""
    settings = FOLDER / "profiles" / f"{profile}.yml"
    parameters = yaml.safe_load(settings.read_text()) or {}
    target = ROOT / "build" / profile / f"{name}.ipynb"
    target.parent.mkdir(parents=True, exist_ok=True)
    os.environ["FIGURES"] = str(figures(profile))
    # The kernel works in the notebook's own folder, as in JupyterLab, with the lib of this tree.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    papermill.execute_notebook(
        FOLDER / f"{name}.ipynb",
        target,
        parameters.get(name, {}),
        cwd=str(FOLDER),
        kernel_name="python3",
        progress_bar=sys.stderr.isatty(),
        # Else every run warns that a kernel on this machine is spoken to in plain text.
        extra_arguments=["--IPKernelApp.log_level=ERROR"],
        execution_timeout=None if profile == "paper" else CELL_SECONDS,
    )
    return target


def render(executed, folder):
    """Write folder/README.md: the executed notebook as Markdown, with links to its PNGs.

    Ends the program where a cell shows a figure that lib.plots did not write.
    """
    book = nbformat.read(executed, as_version=4)
    cells = []
    for cell in book.cells:
        tags = cell.metadata.get("tags", [])
        if "injected-parameters" in tags:
            continue
        if cell.cell_type == "code":
            # Progress bars and the like, and numbers that vary from run to run, stay out.
            kept = [] if "volatile" in tags else cell.outputs
            cell.outputs = [_linked(output) for output in kept if not _chatter(output)]
        else:
            cell.source = LINK.sub(_from_figures, cell.source)
        cells.append(cell)
    book.cells = cells
    text, parts = MarkdownExporter().from_notebook_node(book)
    if parts["outputs"]:
        sys.exit(
            f"notebook {folder.name} shows a figure that is not saved: draw it and call plots.save "
            "in one cell"
        )
    text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(re.sub(r"\n{3,}", "\n\n", text).strip() + "\n")


def remove_older(folder, begin):
    """Remove files last written before the time `begin`: of an earlier version of the chapter."""
    for path in folder.iterdir():
        if path.stat().st_mtime < begin:
            path.unlink()


def _chatter(output):
    return output.get(
        "name"
    ) == "stderr" or "application/vnd.jupyter.widget-view+json" in output.get("data", {})


def _linked(output):
    shown = output.get("metadata", {})
    if "figure" in shown:
        name = shown["figure"].split("/")[-1]
        # Brackets and formulas would end, or garble, the alternative text of a picture.
        words = re.sub(r"[\[\]$\\{}]", "", shown.get("caption") or name)
        return nbformat.v4.new_output("display_data", {"text/markdown": f"![{words}]({name}.png)"})
    return output


def _from_figures(link):
    """A link from notebooks/ as it must stand in figures/NN_name/README.md."""
    target = link[1]
    name, _, anchor = target.partition("#")
    if re.match(r"\d\d_\w+\.ipynb$", name):
        target = f"../{name.removesuffix('.ipynb')}/README.md" + (anchor and f"#{anchor}")
    elif name.startswith("../figures/"):
        target = "../" + name.removeprefix("../figures/")
    elif anchor and name.endswith(".py"):
        target = f"../{name}#L{line_of(FOLDER / name, anchor)}"
    elif name and not re.match(r"https?:|mailto:", name):
        target = f"../{name}" if name.startswith("../") else f"../../notebooks/{name}"
    return f"]({target})"


def contents(folder):
    """Write folder/README.md: of each chapter its title, a sentence, its times and a picture."""
    rows = ["# Contents of the book", "", "| | chapter |", "| --- | --- |"]
    for path in chapters():
        book = nbformat.read(path, as_version=4)
        said = {label: _paragraph(book.cells[0].source, label) for label in LABELS}
        code = "\n".join(cell.source for cell in book.cells if cell.cell_type == "code")
        drawn = re.findall(rf'plots\.save\([^"]*"{path.stem}/([\w-]+)"', code)
        cover = book.metadata.get("cover") or next(iter(drawn), None)
        picture = f'<img src="{path.stem}/{cover}.png" alt="{cover}" width="320">' if cover else ""
        words = f"**[{title(book)}]({path.stem}/README.md)**<br>{said['In short']}"
        rows.append(f"| {picture} | {words}<br>*{said['Time']}* |")
    rows += ["", *coverage()]
    (folder / "README.md").write_text("\n".join(rows) + "\n")


def coverage():
    """notebooks/coverage.csv as Markdown: where each table and figure is, and how close."""
    with open(FOLDER / "coverage.csv", newline="") as file:
        table = list(csv.DictReader(file))
    text = """## What is reproduced, and how closely

Every table, figure, theorem and algorithm of the papers; a dash: not reproduced, and why."""
    yield from text.splitlines()
    for paper in dict.fromkeys(row["paper"] for row in table):
        yield from (
            "",
            f"### {paper}",
            "",
            "| item | chapter | how closely |",
            "| --- | --- | --- |",
        )
        for row in (row for row in table if row["paper"] == paper):
            link = f"[{row['chapter'][:2]}]({row['chapter']}/README.md)" if row["chapter"] else "–"
            where = f"{link}: {row['section'].removesuffix(' ·')}" if row["section"] else link
            yield f"| {row['item']} | {where} | {row['closeness']} |"


def _paragraph(source, label):
    found = re.search(rf"^\*\*{label}[.:]?\*\*(.*?)(?:\n\n|\Z)", source, re.MULTILINE | re.DOTALL)
    return " ".join(found[1].split()) if found else ""


def main():
    name, profile = sys.argv[1:]
    folder = figures(profile)
    if name == "contents":
        contents(folder)
        return
    begin = time.time()
    try:
        executed = execute(name, profile)
    except PapermillExecutionError as error:
        where = f"notebook {name} failed at profile {profile}, in cell {error.exec_count}"
        sys.exit(f"{where}: {error.ename}: {error.evalue}")
    except TimeoutError as error:
        late = f"a cell did not end within {CELL_SECONDS} s; run the same command again"
        sys.exit(f"notebook {name} at profile {profile}: {late} ({error})")
    render(executed, folder / name)
    remove_older(folder / name, begin)
    print(f"{name} ({profile}): {(folder / name).relative_to(ROOT)}/README.md")


if __name__ == "__main__":
    main()
