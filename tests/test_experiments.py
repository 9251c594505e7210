"""The table of experiments: what its entries stand for, and what it refuses."""

import pytest

from lib.ensemble import VOTES
from lib.experiments import ENGINE, ENGINES, expand, expand_readouts, read_table
from lib.recipes import Recipe
from lib.train import Schedule


def test_one_entry_of_the_table_stands_for_many(tmp_path):
    text = """
[[model]]
name = "m-{sigma:.2f}-{seed}"
architecture = "mlp"
data = "digits"
sigma = [0.25, 0.5]
seed = [0, 1, 2]
lr = 0.2
[[model]]
name = "l1"
architecture = "mlp"
data = "digits"
noise = {name = "Gaussian", sigma = 2.0}
loss = {name = "gaussian", smoothing = 0.1}
[[record]]
name = "r-{sigma:.2f}"
model = "m-{sigma:.2f}-1"
sigma = [0.25, 0.5]
n = 10
engine = {block = 7}
"""
    path = tmp_path / "table.toml"
    path.write_text(text)
    models, runs, _ = read_table(path)
    assert list(models) == [f"m-{s}-{k}" for s in ("0.25", "0.50") for k in (0, 1, 2)] + ["l1"]
    assert models["m-0.50-2"] == Recipe(
        "mlp", "digits", {"name": "Gaussian", "sigma": 0.5}, schedule=Schedule(seed=2, lr=0.2)
    )
    assert models["l1"].loss == {"name": "gaussian", "smoothing": 0.1}
    assert runs["r-0.50"].model == "m-0.50-1"
    assert runs["r-0.50"].engine == ENGINES["digits"] | {"block": 7}
    path.write_text(text.replace("digits", "mnist"))
    assert read_table(path)[1]["r-0.50"].engine == ENGINE | {"block": 7}
    path.write_text(text.replace("r-{sigma:.2f}", "r"))
    with pytest.raises(ValueError, match="r twice"):
        read_table(path)
    path.write_text(text.replace("m-{sigma:.2f}-1", "gone"))
    with pytest.raises(ValueError, match="model must be one of"):
        read_table(path)


def test_an_entry_says_what_its_recipe_leaves_out(tmp_path):
    text = """
record = []
[recipe.small]
architecture = "mlp"
data = "digits"
lr = 0.2
[[model]]
name = "a"
recipe = "small"
sigma = 0.5
[[model]]
name = "b"
recipe = "small"
sigma = 0.5
lr = 0.3
"""
    path, noise = tmp_path / "table.toml", {"name": "Gaussian", "sigma": 0.5}
    path.write_text(text)
    models, _, _ = read_table(path)
    assert models == {
        name: Recipe("mlp", "digits", noise, schedule=Schedule(lr=lr))
        for name, lr in (("a", 0.2), ("b", 0.3))
    }
    path.write_text(text.replace('"small"', '"large"'))
    with pytest.raises(ValueError, match="recipe must be one of 'small'"):
        read_table(path)


def test_the_table_says_a_noise_in_full_and_names_what_is_unknown(tmp_path):
    text = """
model = []
[[record]]
name = "r"
model = "m"
noise = {name = "Gaussian", sigma = 0.5}
n = 10
"""
    path = tmp_path / "table.toml"
    for noise, message in (("Gausian", "noise must be one of"), ("Uniform", "takes no sigma")):
        path.write_text(text.replace("Gaussian", noise))
        with pytest.raises(ValueError, match=message):
            read_table(path)
    (_, fields), *_ = expand({"name": "a", "noise": {"name": "Uniform", "half": 1}})
    assert fields["noise"] == {"name": "Uniform", "half": 1.0}
    with pytest.raises(ValueError, match="loss must be one of"):
        expand({"name": "a", "loss": {"name": "arss"}})


def test_an_ensemble_of_the_table_has_networks_of_the_table(tmp_path):
    (tmp_path / "t.toml").write_text(
        'model = []\nrecord = []\n[ensembles]\npair = "nowhere-seed0"\n'
    )
    with pytest.raises(ValueError, match="a member of pair must be one of"):
        read_table(tmp_path / "t.toml")


def test_readouts_of_a_table_are_expanded(monkeypatch):
    monkeypatch.setitem(VOTES, "own", VOTES["weighted"])
    header = {"members": [{"seed": 3}, {"seed": 0}, {"seed": 2}], "best_weights": [0.5, 0.25, 0.25]}
    found = expand_readouts("member:* seeds:0,3 weighted:0-2 consensus2:0-2", header)
    assert found == [
        *("member:0", "member:1", "member:2"),
        *("soft:0-1", "weighted:0-2:0.5,0.25,0.25", "consensus2:0-2"),
    ]
    assert expand_readouts("own:0-2", header) == ["own:0-2:0.5,0.25,0.25"]
    found = expand_readouts("subsets:0-2 weighted:0-1:0.7,0.3", header)
    assert found == [
        *("member:0", "member:1", "member:2", "soft:0-1", "soft:0,2", "soft:1-2", "soft:0-2"),
        "weighted:0-1:0.7,0.3",
    ]
