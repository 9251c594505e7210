"""The READMEs of data/: what they list is what is there."""

import pytest

from lib.experiments import DATA, ENSEMBLES, MODELS, RUNS
from lib.store.inventory import model_table, record_table, with_table


@pytest.mark.parametrize(("folder", "table"), [("models", model_table), ("records", record_table)])
def test_the_tables_of_the_readmes_are_not_stale(folder, table):
    """They are written by python -m lib.zoo tables."""
    text = (DATA / folder / "README.md").read_text()
    assert with_table(text, table()) == text
    names = {path.stem for path in (DATA / folder).glob("*.[ns]*") if path.suffix != ".tsv"}
    measured = {f"{name}.moments" for name in ENSEMBLES}
    names = {name.removesuffix(".int8") for name in names}  # quantised, beside the original
    assert names <= {*MODELS, *RUNS, *measured}
