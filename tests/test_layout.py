"""The plan of lib: imports go down only, its folder is a table of contents, everything is public
under one name."""

import ast
import pathlib

import lib

LIB = pathlib.Path(lib.__file__).parent
# From the bottom to the top. A module imports from its own line only what stands before it, and
# from earlier lines freely.
LAYERS = """
checks
store.files store.registry store.journal store.logs store.records store.checkpoints store.*
bounds noise
boundaries
data
ensemble
models
variance theory
engine.hardware engine.folding engine.admission engine.tuning engine.*
engine.classifier engine.readouts engine.probe engine.live engine.processes engine.settings
engine.stages
engine.jobs engine.moments
counts
certify iss adaptive staircase audit memory sigma dual engine.copies attacks losses metrics
samplers plots
train
recipes
experiments
store.inventory
zoo options
__init__
__main__
"""
ORDER = {
    name: (i, j) for i, line in enumerate(LAYERS.split("\n")) for j, name in enumerate(line.split())
}


def place(module):
    folder = module.rpartition(".")[0]
    return ORDER.get(module) or ORDER[f"{folder}.*"]


def imports(path):
    """Modules of lib that a module of lib imports when it is itself imported."""
    tree = ast.parse(path.read_text())
    inside = {
        node for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for node in ast.walk(f)
    }
    for node in ast.walk(tree):
        if node in inside or not isinstance(node, ast.ImportFrom) or not node.module:
            continue
        if node.module == "lib":
            yield from (alias.name for alias in node.names)
        elif node.module.startswith("lib."):
            yield node.module.removeprefix("lib.")


def modules():
    for path in sorted(LIB.rglob("*.py")):
        name = ".".join(path.relative_to(LIB).with_suffix("").parts)
        if not name.endswith(".__init__"):
            yield name, path


def test_no_import_runs_upward():
    upward = [
        f"{name} imports {used}"
        for name, path in modules()
        for used in imports(path)
        if place(used) >= place(name)
    ]
    assert not upward


def test_the_folder_is_a_table_of_contents():
    assert len(list(LIB.glob("*.py"))) <= 30
    assert {path.name for path in LIB.iterdir() if path.is_dir()} - {"__pycache__"} == {
        "engine",
        "store",
    }


def test_public_names_exist_and_are_sorted():
    assert lib.__all__ == sorted(lib.__all__, key=lambda name: (not name.isupper(), name))
    for name in lib.__all__:
        assert getattr(lib, name).__doc__ or name.isupper()
