"""Execute one notebook headless and render it: python notebooks/run.py NN_name PROFILE.

The executed notebook goes to build/PROFILE/, its figures and the Markdown of the whole to figures/NN_name/ (profile laptop, committed)
or build/PROFILE/figures/NN_name/ (other profiles). What is written is the same from run to run.
"""

import os
import pathlib
import re
import sys

import nbformat
import papermill
import yaml
from nbconvert import MarkdownExporter
from papermill.exceptions import PapermillExecutionError

ROOT = pathlib.Path(__file__).parent.parent
# Waiting threads sleep instead of spinning: on a busy machine live counting is then up to 15 times faster, on an idle one no slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# The matrix products of notebooks are small: threads of numpy's BLAS would only wait for each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


CELL_SECONDS = 900  # no cell takes a tenth of it: a kernel that is silent for so long has lost its way


def execute(name, profile):
    """Run the notebook with the profile's parameters; returns the path of the executed notebook."""
    parameters = yaml.safe_load((ROOT / "notebooks/profiles" / f"{profile}.yml").read_text()) or {}
    target = ROOT / "build" / profile / f"{name}.ipynb"
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = ROOT / ("figures" if profile == "laptop" else f"build/{profile}/figures")
    os.environ["FIGURES"] = str(folder)
    source = ROOT / "notebooks" / f"{name}.ipynb"
    quiet = ["--IPKernelApp.log_level=ERROR"]  # else every run warns that a kernel on this machine talks to it in plain text
    papermill.execute_notebook(
        source, target, parameters.get(name, {}), cwd=str(ROOT), kernel_name="python3", progress_bar=sys.stderr.isatty(), extra_arguments=quiet,
        execution_timeout=None if profile == "paper" else CELL_SECONDS,
    )  # fmt: skip
    return target, folder / name


def render(executed, folder):
    """Write folder/README.md: the executed notebook as Markdown, its figures as links to the PNGs beside it."""
    book = nbformat.read(executed, as_version=4)
    cells = []
    for cell in book.cells:
        tags = cell.metadata.get("tags", [])
        if "injected-parameters" in tags:
            continue
        if cell.cell_type == "code":
            # Progress bars and other chatter on stderr, and cells whose numbers vary from run to run, stay out of the book.
            cell.outputs = [] if "volatile" in tags else [_linked(output) for output in cell.outputs if not _chatter(output)]
        cells.append(cell)
    book.cells = cells
    text, _ = MarkdownExporter().from_notebook_node(book)
    text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(re.sub(r"\n{3,}", "\n\n", text).strip() + "\n")


def _chatter(output):
    return output.get("name") == "stderr" or "application/vnd.jupyter.widget-view+json" in output.get("data", {})


def _linked(output):
    figure = output.get("metadata", {}).get("figure")
    if figure:
        name = figure.split("/")[-1]
        return nbformat.v4.new_output("display_data", {"text/markdown": f"![{name}]({name}.png)"})
    return output


def main():
    name, profile = sys.argv[1:]
    try:
        executed, folder = execute(name, profile)
    except PapermillExecutionError as error:
        sys.exit(f"notebook {name} failed at profile {profile}, in cell {error.exec_count}: {error.ename}: {error.evalue}")
    except TimeoutError as error:
        sys.exit(f"notebook {name} at profile {profile}: a cell did not end within {CELL_SECONDS} s; run the same command again ({error})")
    render(executed, folder)
    print(f"{name} ({profile}): {folder.relative_to(ROOT)}/README.md")


if __name__ == "__main__":
    main()
