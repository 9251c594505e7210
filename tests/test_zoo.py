"""The zoo: what is committed is what its recipes make."""

import dataclasses
import functools

import numpy as np
import pytest
import torch

from lib import zoo
from lib.models import load_checkpoint, model_hash

DIGITS = [name for name, recipe in zoo.MODELS.items() if recipe.data == "digits"]


def test_a_committed_record_is_counted_again():
    stored, again = (
        zoo.counts("digits-cnn-sigma0.25-n1000"),
        zoo.record("digits-cnn-sigma0.25-n1000"),
    )
    assert again.header["model_sha256"] == stored.header["model_sha256"]
    assert again.header["data_sha256"] == stored.header["data_sha256"]
    # Another type of machine rounds logits differently: of 360,000 votes one or two at a tie may then move, each counted twice here.
    assert np.abs(again.counts - stored.counts).sum() <= 4


@pytest.mark.parametrize("name", zoo.RUNS)
def test_records_belong_to_the_committed_networks(name):
    record, run = zoo.counts(name), zoo.RUNS[name]
    assert record.header["model_sha256"] == model_hash(zoo.model(run.model))
    assert (record.counts.sum(axis=1) == record.header["n"]).all()
    assert record.header["n"] == run.n or (
        run.every == 20 and 1000 < record.header["n"] < run.n
    )  # those of CIFAR-10 may still grow
    assert record.header["seed"] == run.seed
    assert record.index.tolist() == list(range(0, 10_000 if run.every == 20 else 360, run.every))
    if run.every == 1:
        np.testing.assert_array_equal(record.labels, zoo.load("digits", "test")[1])


def test_a_record_stopped_and_continued_equals_one_counted_at_once(tmp_path, monkeypatch):
    """Fewer draws first, a kill in the middle, the rest later: the file's bytes are those of one run. What belongs to another run is refused."""
    name, some, path = "digits-cnn-sigma0.25-n1000", np.arange(0, 360, 40), tmp_path / "parts.npz"
    zoo.record(name, tmp_path / "whole.npz", index=some)
    monkeypatch.setattr(zoo, "ROUND", 150)
    assert zoo.record(name, path, n=370, index=some).header["n"] == 370
    save, calls = zoo.save_counts, []

    def killed(*arguments, **header):
        calls.append(header["n"])
        if len(calls) == 3:
            raise KeyboardInterrupt
        save(*arguments, **header)

    monkeypatch.setattr(zoo, "save_counts", killed)
    with pytest.raises(KeyboardInterrupt):
        zoo.record(name, path, index=some)
    monkeypatch.setattr(zoo, "save_counts", save)
    assert zoo.load_counts(path).header["n"] == 670
    zoo.record(name, path, index=some)
    assert path.read_bytes() == (tmp_path / "whole.npz").read_bytes()
    with pytest.raises(ValueError, match="holds other images"):
        zoo.record(name, path, index=some[1:])
    with pytest.raises(ValueError, match=r"was recorded with model = 'digits-cnn-sigma0\.25'"):
        zoo.record("digits-cnn-sigma0.50", path, index=some)


def test_a_record_of_some_images_holds_their_votes_and_labels(tmp_path):
    """Image by image what a record of all has: in the file, and live from `counts`, which stores nothing."""
    name, some = "digits-cnn-sigma0.25-n1000", np.array([7, 40, 133])
    zoo.record(name, tmp_path / "some.npz", n=200, index=some)
    found, whole = (
        zoo.load_counts(tmp_path / "some.npz"),
        zoo.counts(name, n=200, index=np.arange(134), folder=tmp_path),
    )
    np.testing.assert_array_equal(found.counts, whole.counts[some])
    np.testing.assert_array_equal(found.labels, zoo.load("digits", "test")[1][some])
    np.testing.assert_array_equal(whole.labels, zoo.load("digits", "test")[1][:134])
    assert [path.name for path in tmp_path.iterdir()] == ["some.npz"]


def test_a_record_that_is_missing_or_short_is_counted(tmp_path, monkeypatch):
    name = "digits-cnn-sigma0.25-n1000"
    monkeypatch.setitem(zoo.RUNS, name, dataclasses.replace(zoo.RUNS[name], n=30))
    zoo.record(name, tmp_path / f"{name}.npz", n=10)
    assert zoo.counts(name, folder=tmp_path).header["n"] == 30
    assert zoo.load_counts(tmp_path / f"{name}.npz").header["n"] == 30


def test_networks_are_chosen_on_images_that_are_never_certified(monkeypatch):
    """Noisy accuracy is measured at the recipe's noise, on images of which no record of CIFAR-10 holds any."""
    asked = []

    def spy(base, x, noise, index, **settings):
        asked.append((noise.sigma, index.tolist()))
        return zoo_counts(base, x, noise, index=index, **settings)

    zoo_counts = zoo.ModelCounts
    monkeypatch.setattr(zoo, "ModelCounts", spy)
    recipe, network = zoo.MODELS["digits-cnn-sigma0.25"], zoo.model("digits-cnn-sigma0.25")
    found = zoo.noisy_accuracy(network, recipe, draws=400)
    assert asked == [(0.25, list(range(1, 360, 20)))]
    record = zoo.counts("digits-cnn-sigma0.25")
    share = (
        record.counts[1::20][np.arange(18), record.labels[1::20]].sum() / record.counts[1::20].sum()
    )
    assert found == pytest.approx(share, abs=4.5 * 0.5 / np.sqrt(18 * 400))


def test_training_is_told_the_recipe(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(
        zoo,
        "fit",
        lambda network, x, y, loss, noise, *settings, **named: told.append(
            (noise, settings, named)
        ),
    )
    monkeypatch.setitem(
        zoo.MODELS,
        "x",
        zoo.Recipe("small_cnn", "digits", 0.3, 4, 5, 0.2, 32, True, 0.9, 1e-3, "bfloat16"),
    )
    zoo.train("x", tmp_path / "x.safetensors", state="s")
    named = {
        "weight_decay": 1e-3,
        "seed": 4,
        "augment": True,
        "average": 0.9,
        "dtype": torch.bfloat16,
        "state": "s",
    }
    assert told == [(zoo.Gaussian(0.3), (5, 0.2, 32), named)]


@pytest.mark.parametrize("sigma", zoo.BEST)
def test_the_recorded_network_is_the_best_of_its_noise_level(sigma):
    names = [
        name
        for name, recipe in zoo.MODELS.items()
        if recipe.data == "cifar10" and recipe.sigma == sigma
    ]
    paths = {name: zoo.DATA / "models" / f"{name}.safetensors" for name in names}
    shares = {
        name: load_checkpoint(path)[1]["noisy_accuracy"]
        for name, path in paths.items()
        if path.exists()
    }
    assert max(shares, key=shares.get) == zoo.RUNS[f"cifar10-resnet20-sigma{sigma:.2f}"].model


def test_the_long_record_agrees_with_the_short_one():
    stored, fresh = zoo.counts("digits-cnn-sigma0.25"), zoo.counts("digits-cnn-sigma0.25-n1000")
    p = stored.counts / stored.counts.sum(axis=1, keepdims=True)
    expected, variance = 1000 * p, 1000 * p * (1 - p)
    z = (fresh.counts - expected)[variance > 5] / np.sqrt(variance[variance > 5])
    assert abs(z.mean()) < 5 / np.sqrt(z.size)
    assert z.std() == pytest.approx(1, abs=0.15)


def test_training_repeats_the_committed_weights_or_nearly(tmp_path):
    """The same recipe makes a network of the same quality everywhere, and the same weights on one type of machine."""
    zoo.train("digits-cnn-sigma0.25", tmp_path / "again.safetensors")
    again, header = load_checkpoint(tmp_path / "again.safetensors")
    x, y = zoo.load("digits", "test")
    with torch.no_grad():
        shares = [
            float((network(x).argmax(1) == y).float().mean())
            for network in (again, zoo.model("digits-cnn-sigma0.25"))
        ]
    assert header["sigma"] == 0.25
    assert abs(shares[0] - shares[1]) <= 0.02


def made_up_cifar10(path, seed=0):
    """An npz like Keras's of CIFAR-10, of 256 random training and 60 test images."""
    rng = np.random.default_rng(seed)
    images = {
        name: rng.integers(0, 256, (size, 32, 32, 3), dtype=np.uint8)
        for name, size in (("x_train", 256), ("x_test", 60))
    }
    labels = {
        name: rng.integers(0, 10, (size, 1)) for name, size in (("y_train", 256), ("y_test", 60))
    }
    np.savez(path, **images, **labels)
    return path


def test_a_stopped_cifar_training_ends_in_the_same_weights(tmp_path, monkeypatch):
    """The recipe of the CIFAR-10 networks (crops, weight average, bfloat16) for two epochs of made-up images, at once and killed after the first."""
    data, name = made_up_cifar10(tmp_path / "data.npz"), "cifar10-resnet20-sigma0.25-seed0"
    monkeypatch.setitem(zoo.MODELS, name, dataclasses.replace(zoo.MODELS[name], epochs=2))
    zoo.train(name, tmp_path / "whole.safetensors", data)

    def stop(model, history):
        raise KeyboardInterrupt

    stopped = [name, tmp_path / "stopped.safetensors", data, tmp_path / "state"]
    with monkeypatch.context() as patch:
        patch.setattr(zoo, "fit", functools.partial(zoo.fit, after_epoch=stop))
        with pytest.raises(KeyboardInterrupt):
            zoo.train(*stopped)
    assert not stopped[1].exists()
    zoo.train(*stopped)
    assert stopped[1].read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_the_cifar10_plan_trains_selects_and_records_in_a_folder(tmp_path, monkeypatch):
    """Two seeds of one noise level, one epoch of made-up images: all files appear, the better seed is recorded, other images are refused."""
    data, out, name = (
        made_up_cifar10(tmp_path / "data.npz"),
        tmp_path / "out",
        "cifar10-resnet20-sigma0.50",
    )
    names = [f"{name}-seed{seed}" for seed in (0, 1)]
    monkeypatch.setattr(
        zoo, "MODELS", {name: dataclasses.replace(zoo.MODELS[name], epochs=1) for name in names}
    )
    monkeypatch.setattr(
        zoo, "RUNS", {name: dataclasses.replace(zoo.RUNS[name], model=names[0], n=150)}
    )
    told = []
    monkeypatch.setattr(
        zoo, "noisy_accuracy", lambda network, recipe, data: told.append(recipe) or recipe.seed / 10
    )
    zoo.cifar10(data, out)
    assert told == list(zoo.MODELS.values())
    best = names[1]
    record = zoo.load_counts(out / f"records/{name}.npz", model=best, n=150)
    assert record.header["model_sha256"] == model_hash(
        load_checkpoint(out / f"models/{best}.safetensors")[0]
    )
    assert record.index.tolist() == [0, 20, 40]
    assert not list(out.rglob("*.state"))
    # A better seed comes: its votes are counted, those of the other kept.
    monkeypatch.setattr(zoo, "noisy_accuracy", lambda network, recipe, data: 0.5)
    (out / f"models/{names[0]}.safetensors").unlink()
    zoo.cifar10(data, out)
    assert zoo.load_counts(out / f"records/{name}.npz", model=names[0]).header["n"] == 150
    assert zoo.load_counts(out / f"records/{best}.npz", model=best).header["n"] == 150
    with pytest.raises(ValueError, match=r"was counted on other images than those of .*OUT="):
        zoo.cifar10(made_up_cifar10(tmp_path / "other.npz", seed=1), out)


def test_the_command_says_how_it_is_used(tmp_path):
    with pytest.raises(SystemExit, match=r"usage: python -m lib\.zoo"):
        zoo.main("cifar10")
    with pytest.raises(SystemExit, match=r"error: .*nowhere does not exist"):
        zoo.main("cifar10", str(tmp_path / "nowhere"))


def test_an_interrupted_plan_says_that_it_continues(monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(zoo, "cifar10", interrupt)
    with pytest.raises(SystemExit, match="interrupted: the same command continues"):
        zoo.main("cifar10", "data.npz")


def test_unknown_names_list_the_known():
    with pytest.raises(ValueError, match=f"model must be one of '{DIGITS[0]}'.*; got 'x'"):
        zoo.model("x")
    with pytest.raises(ValueError, match=r"record must be one of .*; got 'x'"):
        zoo.counts("x")
