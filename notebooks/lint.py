"""Check every source notebook: no outputs, a parameters cell, short code cells. Prints each fault; exit 1 if there is one."""

import pathlib
import sys

import nbformat

MAX_LINES = 20


def faults(path):
    book = nbformat.read(path, as_version=4)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    if any(cell.outputs or cell.execution_count for cell in code):
        yield "has outputs: clear them before committing (jupyter nbconvert --clear-output --inplace)"
    if sum("parameters" in cell.metadata.get("tags", []) for cell in code) != 1:
        yield "needs exactly one code cell tagged 'parameters'"
    for number, cell in enumerate(code):
        if len(cell.source.splitlines()) > MAX_LINES:
            yield f"code cell {number} has more than {MAX_LINES} lines: move what deserves a test to lib"


def main():
    found = [f"{path.name}: {fault}" for path in sorted(pathlib.Path(__file__).parent.glob("*.ipynb")) for fault in faults(path)]
    sys.exit("\n".join(found) or 0)


if __name__ == "__main__":
    main()
