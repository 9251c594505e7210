"""Every notebook runs, from its first cell to its claims, at the smoke profile."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
NAMES = sorted(path.stem for path in (ROOT / "notebooks").glob("[0-9]*.ipynb"))


@pytest.mark.parametrize("name", NAMES)
def test_runs_at_the_smoke_profile(name):
    done = subprocess.run(
        [sys.executable, "notebooks/run.py", name, "smoke"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    text = (ROOT / "build/smoke/figures" / name / "README.md").read_text()
    assert text.startswith("# ")


def test_there_are_notebooks():
    assert len(NAMES) >= 5
