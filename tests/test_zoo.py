"""The zoo: what is committed is what the table of experiments makes."""

import dataclasses
import pathlib

import numpy as np
import pytest
import torch

from lib import train as training
from lib import zoo
from lib.data import load
from lib.engine import jobs
from lib.models import load_checkpoint, model_hash
from lib.store.records import load_counts
from lib.train import Recipe, Schedule

NAME = "digits-cnn-sigma0.25-n1000"
DIGITS = [name for name, recipe in zoo.MODELS.items() if recipe.data == "digits"]


def test_a_committed_record_is_counted_again():
    stored, again = zoo.record(NAME), zoo.count(NAME)
    for name in ("model_sha256", "data_sha256", "noise", "sampler", "seed", "block", "dtype"):
        assert again.header[name] == stored.header[name]
    # Another type of machine rounds logits differently: of 360,000 votes one or two at a tie may
    # then move, each counted twice here.
    assert np.abs(again.counts - stored.counts).sum() <= 4


@pytest.mark.parametrize("name", zoo.RUNS)
def test_records_belong_to_the_committed_networks(name):
    path, run = zoo.DATA / "records" / f"{name}.npz", zoo.RUNS[name]
    if not path.exists():  # planned, and not counted yet: README's table does not list it
        return
    record = zoo.record(name)
    assert record.header["model_sha256"] == model_hash(zoo.model(run.model))
    assert record.header["fixed_draws"] is True
    assert record.header["sampler"] == {"name": "record", "n": record.draws}
    # A CIFAR-10 record may be unfinished; it is never longer than planned.
    assert record.draws == run.n or (run.stride == 20 and 1000 < record.draws < run.n)
    assert record.header["seed"] == run.seed
    labels = load(zoo.MODELS[run.model].data, "test")[1] if run.stride == 1 else np.zeros(10_000)
    assert record.index.tolist() == list(range(0, len(labels), run.stride))
    if run.stride == 1:
        np.testing.assert_array_equal(record.labels, labels)


@pytest.mark.parametrize(
    ("folder", "table"), [("models", zoo.model_table), ("records", zoo.record_table)]
)
def test_the_tables_of_the_readmes_are_not_stale(folder, table):
    """They are written by python -m lib.zoo tables."""
    text = (zoo.DATA / folder / "README.md").read_text()
    assert zoo.with_table(text, table()) == text
    names = {path.stem for path in (zoo.DATA / folder).glob("*.[ns]*") if path.suffix != ".tsv"}
    assert names <= {*zoo.MODELS, *zoo.RUNS}


def test_a_record_stopped_and_continued_equals_one_counted_at_once(tmp_path, monkeypatch):
    """Fewer draws first, a kill in the middle, the rest later: the bytes of one run."""
    some, path = np.arange(0, 360, 40), tmp_path / "parts.npz"
    zoo.count(NAME, tmp_path / "whole.npz", index=some)
    assert zoo.count(NAME, path, n=370, index=some).draws == 370
    certify, calls = jobs._certify_group, []

    def killed(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return certify(*arguments)

    monkeypatch.setattr(jobs, "BLOCKS", 1)
    monkeypatch.setattr(jobs, "_certify_group", killed)
    with pytest.raises(KeyboardInterrupt):
        zoo.count(NAME, path, index=some)
    assert 370 <= load_counts(path).draws < 1000
    monkeypatch.setattr(jobs, "_certify_group", certify)
    zoo.count(NAME, path, index=some)
    assert path.read_bytes() == (tmp_path / "whole.npz").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["parts.npz", "whole.npz"]
    with pytest.raises(ValueError, match="which this run does not ask for"):
        zoo.count(NAME, path, index=some[1:])
    other = dataclasses.replace(zoo.RUNS[NAME], model="digits-cnn-sigma0.50")
    with pytest.raises(ValueError, match="model_sha256 = "):
        zoo.count(other, path, index=some)


def test_the_committed_records_can_be_continued(tmp_path, monkeypatch):
    """Twenty draws more of each image: what was there is kept, the rest is the noise's next draws."""
    name = "digits-cnn-sigma0.25-n1000"
    path, some = tmp_path / f"{name}.npz", np.arange(360)
    path.write_bytes((zoo.DATA / "records" / f"{name}.npz").read_bytes())
    before, after = load_counts(path), zoo.count(name, path, n=1020, index=some)
    more = after.counts - before.counts
    assert (more >= 0).all()
    assert (more.sum(axis=1) == 20).all()


def test_a_record_of_some_images_holds_their_votes_and_labels(tmp_path):
    """Image by image what a record of all has, in a file and live."""
    some = np.array([7, 40, 133])
    stored = zoo.count(NAME, tmp_path / "some.npz", n=200, index=some)
    whole = zoo.record(NAME, n=200, index=np.arange(134), folder=tmp_path)
    np.testing.assert_array_equal(stored.counts, whole.counts[some])
    np.testing.assert_array_equal(stored.labels, load("digits", "test")[1][some])
    np.testing.assert_array_equal(whole.labels, load("digits", "test")[1][:134])
    assert [path.name for path in tmp_path.iterdir()] == ["some.npz"]


def test_a_record_that_is_missing_is_counted(tmp_path, monkeypatch):
    monkeypatch.setitem(zoo.RUNS, NAME, dataclasses.replace(zoo.RUNS[NAME], n=30))
    assert zoo.record(NAME, folder=tmp_path).draws == 30
    assert load_counts(tmp_path / f"{NAME}.npz").draws == 30


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
    models, runs = zoo.read_table(path)
    assert list(models) == [f"m-{s}-{k}" for s in ("0.25", "0.50") for k in (0, 1, 2)] + ["l1"]
    assert models["m-0.50-2"] == Recipe(
        "mlp", "digits", {"name": "Gaussian", "sigma": 0.5}, schedule=Schedule(seed=2, lr=0.2)
    )
    assert models["l1"].loss == {"name": "gaussian", "smoothing": 0.1}
    assert runs["r-0.50"].model == "m-0.50-1"
    assert runs["r-0.50"].engine == zoo.ENGINES["digits"] | {"block": 7}
    path.write_text(text.replace("r-{sigma:.2f}", "r"))
    with pytest.raises(ValueError, match="r twice"):
        zoo.read_table(path)
    path.write_text(text.replace("m-{sigma:.2f}-1", "gone"))
    with pytest.raises(ValueError, match="model must be one of"):
        zoo.read_table(path)


def test_networks_are_chosen_on_images_that_are_never_certified(monkeypatch):
    """Noisy accuracy is measured at the given noise, on images of which no record at a stride of
    20 holds any."""
    asked, counts = [], training.ModelCounts

    def spy(base, x, noise, index, **settings):
        asked.append((noise.sigma, index.tolist()))
        return counts(base, x, noise, index=index, **settings)

    monkeypatch.setattr(training, "ModelCounts", spy)
    network, noise = (
        zoo.model("digits-cnn-sigma0.25"),
        training.restore_noise(zoo.MODELS["digits-cnn-sigma0.25"].noise),
    )
    accuracy = training.noisy_accuracy(network, noise, *load("digits", "test"), draws=400)
    assert asked == [(0.25, list(range(1, 360, 20)))]
    record = zoo.record("digits-cnn-sigma0.25")
    votes = record.counts[1::20]
    fraction = votes[np.arange(18), record.labels[1::20]].sum() / votes.sum()
    assert accuracy == pytest.approx(fraction, abs=4.5 * 0.5 / np.sqrt(18 * 400))


@pytest.mark.parametrize("name", [n for n in zoo.RUNS if f"{n}-seed" in zoo.RUNS[n].model])
def test_the_recorded_network_is_the_best_of_its_noise_level(name):
    paths = {
        n: zoo.DATA / "models" / f"{n}.safetensors" for n in zoo.siblings(zoo.RUNS[name].model)
    }
    accuracy = {
        n: load_checkpoint(path)[1]["noisy_accuracy"] for n, path in paths.items() if path.exists()
    }
    assert len(accuracy) >= 5
    assert max(accuracy, key=accuracy.get) == zoo.RUNS[name].model


def test_the_long_record_agrees_with_the_short_one():
    stored, fresh = zoo.record("digits-cnn-sigma0.25"), zoo.record(NAME)
    p = stored.counts / stored.counts.sum(axis=1, keepdims=True)
    expected, variance = 1000 * p, 1000 * p * (1 - p)
    z = (fresh.counts - expected)[variance > 5] / np.sqrt(variance[variance > 5])
    assert abs(z.mean()) < 5 / np.sqrt(z.size)
    assert z.std() == pytest.approx(1, abs=0.15)


def test_training_repeats_the_committed_weights_or_nearly(tmp_path):
    """The same recipe makes a network of the same quality everywhere."""
    training.train(zoo.MODELS["digits-cnn-sigma0.25"], tmp_path / "again.safetensors")
    again, header = load_checkpoint(tmp_path / "again.safetensors")
    x, y = load("digits", "test")
    with torch.no_grad():
        accuracy = [
            float((network(x).argmax(1) == y).float().mean())
            for network in (again, zoo.model("digits-cnn-sigma0.25"))
        ]
    assert header["noise"] == {"name": "Gaussian", "sigma": 0.25}
    assert abs(accuracy[0] - accuracy[1]) <= 0.02


def made_up_cifar10(path, seed=0):
    """An npz like Keras's of CIFAR-10, of 256 random training and 60 test images."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for part, size in (("train", 256), ("test", 60)):
        arrays[f"x_{part}"] = rng.integers(0, 256, (size, 32, 32, 3), dtype=np.uint8)
        arrays[f"y_{part}"] = rng.integers(0, 10, (size, 1))
    np.savez(path, **arrays)
    return path


def short(recipe, epochs):
    return dataclasses.replace(recipe, schedule=dataclasses.replace(recipe.schedule, epochs=epochs))


def test_a_stopped_cifar_training_ends_in_the_same_weights(tmp_path):
    """The recipe of the CIFAR-10 networks (crops, weight average, bfloat16) for two epochs of
    made-up images, at once and killed after the first."""
    data = made_up_cifar10(tmp_path / "data.npz")
    recipe = short(zoo.MODELS["cifar10-resnet20-sigma0.25-seed0"], 2)
    training.train(recipe, tmp_path / "whole.safetensors", data)

    def stop(text):
        raise KeyboardInterrupt

    stopped = tmp_path / "stopped.safetensors"
    with pytest.raises(KeyboardInterrupt):
        training.train(recipe, stopped, data, say=stop)
    assert load_checkpoint(stopped)[1]["epoch"] == 1
    training.train(recipe, stopped, data)
    assert stopped.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_the_cifar10_plan_trains_selects_and_records_in_a_folder(tmp_path, monkeypatch):
    """Two seeds of one noise level, one epoch of made-up images: all files appear, the better seed
    is recorded, other images are refused."""
    data, out = made_up_cifar10(tmp_path / "data.npz"), tmp_path / "out"
    name = "cifar10-resnet20-sigma0.50"
    names = [f"{name}-seed{seed}" for seed in (0, 1)]
    monkeypatch.setattr(zoo, "MODELS", {n: short(zoo.MODELS[n], 1) for n in names})
    run = dataclasses.replace(zoo.RUNS[name], model=names[0], n=150)
    monkeypatch.setattr(zoo, "RUNS", {name: run})
    better = iter([0.1, 0.2])
    monkeypatch.setattr(training, "noisy_accuracy", lambda *a, **k: next(better))
    zoo.cifar10(data, out)
    best = names[1]
    record = load_counts(out / f"records/{name}.npz", model=best)
    trained = load_checkpoint(out / f"models/{best}.safetensors")[0]
    assert record.header["model_sha256"] == model_hash(trained)
    assert (record.draws, record.index.tolist()) == (150, [0, 20, 40])
    left = {path.suffix for path in pathlib.Path(out).rglob("*") if path.is_file()}
    assert left == {".safetensors", ".npz"}
    # A better seed comes: its votes are counted, those of the other kept.
    monkeypatch.setattr(training, "noisy_accuracy", lambda *a, **k: 0.5)
    (out / f"models/{names[0]}.safetensors").unlink()
    zoo.cifar10(data, out)
    assert load_counts(out / f"records/{name}.npz", model=names[0]).draws == 150
    assert load_counts(out / f"records/{best}.npz", model=best).draws == 150
    with pytest.raises(ValueError, match=r"was counted on other images than those of .*OUT="):
        zoo.cifar10(made_up_cifar10(tmp_path / "other.npz", seed=1), out)


def test_the_command_says_how_it_is_used(tmp_path):
    with pytest.raises(SystemExit, match=r"usage: python -m lib\.zoo"):
        zoo.main("cifar10")
    with pytest.raises(SystemExit, match=r"error: .*nowhere does not exist"):
        zoo.main("cifar10", str(tmp_path / "nowhere"))
