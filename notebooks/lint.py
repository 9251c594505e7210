"""Check every notebook against the frame of notebooks/template.ipynb; print each fault.

python notebooks/lint.py [NN_name ...] exits 1 if there is a fault. With --fix it first clears
outputs and writes the last cell, the links to the previous and to the next chapter.
"""

import ast
import pathlib
import re
import sys

import nbformat

FOLDER = pathlib.Path(__file__).parent
MAX_LINES, MAX_COLUMNS = 15, 100
LABELS = ("Reproduces", "You learn", "Prerequisites", "Time", "In short")
ENDS = ("Claims checked", "Takeaways", "Exercises")
EXERCISE = re.compile(r"^\*\*Exercise (\d+)\*\* \((easy|medium|hard)(, code)?\)", re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
# What code hosts strip, or take for emphasis, inside a formula.
BAD_MATH = re.compile(r"\\[,;!|:{}]|(?<!\\)\*")
MATH = re.compile(r"\$\$(.+?)\$\$|\$(?=\S)([^$\n]+?(?:\n[^$\n]+?)?)\$", re.DOTALL)
# A path that would hang on the folder in which the notebook runs.
RELATIVE = re.compile(r"""["'](?:\.\.?/|(?:data|figures|build|notebooks|runs)/)""")
NAVIGATION = "navigation"


def chapters(folder=FOLDER):
    """The numbered notebooks, in the order of the book."""
    return sorted(folder.glob("[0-9][0-9]_*.ipynb"))


def title(book):
    """The chapter's title: "05 · Input-specific sampling at work"."""
    return book.cells[0].source.splitlines()[0].removeprefix("# ")


def navigation(path):
    """The links to the previous and to the next chapter, in Markdown."""
    books = chapters(path.parent)
    at = books.index(path)
    beside = {"Previous": books[max(at - 1, 0) : at], "Next": books[at + 1 : at + 2]}
    links = [
        f"**{word}:** [{title(nbformat.read(other, as_version=4))}]({other.name})"
        for word, others in beside.items()
        for other in others
    ]
    return " · ".join([*links, "[Contents](../figures/README.md)"])


def faults(path):
    """Each fault of one notebook, as a sentence."""
    book = nbformat.read(path, as_version=4)
    text = [cell.source for cell in book.cells if cell.cell_type == "markdown"]
    yield from frame_faults(book, text)
    yield from code_faults([cell for cell in book.cells if cell.cell_type == "code"])
    yield from exercise_faults(text)
    for source in text:
        yield from link_faults(source, path.parent)
        yield from math_faults(source)
    if path in chapters(path.parent):
        last = book.cells[-1]
        if NAVIGATION not in last.metadata.get("tags", []) or last.source != navigation(path):
            yield "the last cell is not the links to the chapters beside it: run with --fix"


def frame_faults(book, text):
    """The parts of the frame that are missing, or out of order."""
    first = book.cells[0]
    if first.cell_type != "markdown" or not re.match(r"# \d\d · \S", first.source):
        yield "the first cell must begin with a title such as '# 05 · Input-specific sampling'"
    for label in LABELS:
        if not re.search(rf"^\*\*{label}[.:]?\*\*", first.source, re.MULTILINE):
            yield f"the first cell has no paragraph that begins with **{label}.**"
    headings = [line[3:] for part in text for line in part.splitlines() if line.startswith("## ")]
    found = [[i for i, line in enumerate(headings) if line.endswith(end)] for end in ENDS]
    if not all(found) or [at[0] for at in found] != sorted(at[0] for at in found):
        yield f"needs the sections {', '.join(ENDS)}, in this order, near its end"
    if not all("id" in cell for cell in book.cells):
        yield "has cells without an id"


def code_faults(code):
    """Outputs, the parameters, the versions, lengths, widths and paths of the code cells."""
    if any(cell.outputs or cell.execution_count for cell in code):
        yield "has outputs: clear them before committing, or run with --fix"
    tagged = [cell for cell in code if "parameters" in cell.metadata.get("tags", [])]
    if len(tagged) != 1:
        yield "needs exactly one code cell tagged 'parameters'"
    for name in re.findall(r"^(\w+) =", "\n".join(cell.source for cell in tagged), re.MULTILINE):
        if not name.isupper():
            yield f"the parameter {name} must be UPPERCASE"
    versions = [cell for cell in code if "plots.versions(" in cell.source]
    if len(versions) != 1 or "volatile" not in versions[0].metadata.get("tags", []):
        yield "needs one cell with plots.versions(...), tagged 'volatile'"
    if not any(re.search(r"^\s*assert ", cell.source, re.MULTILINE) for cell in code):
        yield "asserts no claim"
    for number, cell in enumerate(code):
        lines = cell.source.splitlines()
        if len(lines) > MAX_LINES:
            yield f"code cell {number} has {len(lines)} lines, more than {MAX_LINES}"
        if max(map(len, lines), default=0) > MAX_COLUMNS:
            yield f"code cell {number} has a line of more than {MAX_COLUMNS} columns"
        if RELATIVE.search(cell.source):
            yield f"code cell {number} has a path that depends on the folder it is run in"
        yield from caption_faults(number, cell.source)


def caption_faults(number, source):
    """Figures without a caption, which is also their alternative text."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        yield f"code cell {number} is not Python"
        return
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call) or ast.unparse(call.func) != "plots.save":
            continue
        if len(call.args) < 4 and "caption" not in {word.arg for word in call.keywords}:
            yield f"code cell {number} saves a figure without a caption"


def exercise_faults(text):
    """Exercises: at least four, each with its difficulty and a solution, half of them code."""
    text = "\n".join(text)
    found = EXERCISE.findall(text)
    if len(found) < 4:
        yield f"has {len(found)} exercises that begin '**Exercise 1** (easy, code)'; needs four"
    if 2 * sum(bool(code) for _, _, code in found) < len(found):
        yield "fewer than half of the exercises are marked as code"
    if [int(number) for number, _, _ in found] != list(range(1, len(found) + 1)):
        yield "the exercises are not numbered 1, 2, 3, ..."
    if text.count("<details>") < len(found) or text.count("<details>") != text.count("</details>"):
        yield "an exercise has no folded solution (<details> ... </details>)"


def link_faults(source, folder):
    """Links to files, or to names within files of lib, that are not there."""
    for target in LINK.findall(without_code(source)):
        if re.match(r"https?://|mailto:|#", target):
            continue
        name, _, anchor = target.partition("#")
        path = folder / name
        if not path.exists():
            yield f"the link to {target} leads nowhere"
        elif anchor and path.suffix == ".py" and line_of(path, anchor) is None:
            yield f"the link to {target} names nothing in that file"


def line_of(path, name):
    """The line on which a Python file defines a function, class, method or constant, or None."""
    body = ast.parse(path.read_text()).body
    for part in name.split("."):
        node = next((node for node in body if part in defined(node)), None)
        if node is None:
            return None
        body = getattr(node, "body", [])
    return node.lineno


def defined(node):
    """The names that one statement defines."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def math_faults(source):
    """Formulas that a code host does not render as they are meant."""
    for display, inline in MATH.findall(without_code(source)):
        if bad := BAD_MATH.search(display or inline):
            formula = " ".join((display or inline).split())[:40]
            yield f"the formula {formula!r} has {bad.group()!r}, which code hosts drop"


def without_code(source):
    """Markdown without its code blocks and code spans."""
    source = re.sub(r"^```.*?^```", "", source, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]*`", "", source)


def fix(path):
    """Clear the outputs of a chapter and write its last cell."""
    book = nbformat.read(path, as_version=4)
    if NAVIGATION not in book.cells[-1].metadata.get("tags", []):
        book.cells.append(nbformat.v4.new_markdown_cell(id=NAVIGATION))
        book.cells[-1].metadata["tags"] = [NAVIGATION]
    book.cells[-1].source = navigation(path)
    for cell in book.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nbformat.write(book, path)


def main():
    names = [name.removesuffix(".ipynb") for name in sys.argv[1:] if name != "--fix"]
    paths = [FOLDER / f"{name}.ipynb" for name in names] or [
        *chapters(),
        FOLDER / "template.ipynb",
    ]
    if "--fix" in sys.argv:
        for path in set(paths) & set(chapters()):
            fix(path)
    found = [f"{path.name}: {fault}" for path in paths for fault in faults(path)]
    sys.exit("\n".join(found) or 0)


if __name__ == "__main__":
    main()
