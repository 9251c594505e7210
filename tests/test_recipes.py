"""Recipes: the same one makes the same network, stopped or not, alone or with others."""

import dataclasses

import numpy as np
import pytest
import torch

from lib import recipes, zoo
from lib.data import load
from lib.dual import best_expert
from lib.models import load_checkpoint, model_hash
from lib.noise import Gaussian, restore_noise
from lib.recipes import Recipe
from lib.train import Schedule


def test_training_repeats_the_committed_weights_or_nearly(tmp_path):
    """The same recipe makes a network of the same quality everywhere."""
    recipes.train(zoo.MODELS["digits-cnn-sigma0.25"], tmp_path / "again.safetensors")
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
    recipes.train(recipe, tmp_path / "whole.safetensors", data)

    def stop(text):
        raise KeyboardInterrupt

    stopped = tmp_path / "stopped.safetensors"
    with pytest.raises(KeyboardInterrupt):
        recipes.train(recipe, stopped, data, say=stop)
    assert load_checkpoint(stopped)[1]["epoch"] == 1
    recipes.train(recipe, stopped, data)
    assert stopped.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_a_router_is_trained_to_name_the_best_expert(tmp_path):
    """As many answers as experts; its accuracy is that on the experts' labels."""
    experts = ["digits-cnn-sigma0.12", "digits-cnn-sigma0.50"]
    for name in experts:
        file = f"{name}.safetensors"
        (tmp_path / file).write_bytes((zoo.DATA / "models" / file).read_bytes())
    noise = {"name": "Gaussian", "sigma": 0.5}
    recipe = Recipe("small_cnn", "digits", noise, {"name": "gaussian"}, Schedule(epochs=2))
    recipe = dataclasses.replace(recipe, experts=" ".join(experts), threads=1)
    path = tmp_path / "router.safetensors"
    header = recipes.train(recipe, path)
    router, (x, y) = load_checkpoint(path)[0], load("digits", "test")
    assert router(x[:5]).shape == (5, 2)
    networks = [zoo.model(name) for name in experts]
    wanted = best_expert(networks, [Gaussian(0.12), Gaussian(0.5)], x, y, seed=9)
    again = recipes.noisy_accuracy(router, Gaussian(0.5), x, wanted)
    assert header["noisy_accuracy"] == pytest.approx(again)
    assert header["experts"] == recipe.experts
    assert "experts" not in zoo.MODELS[experts[0]].header()


def test_a_denoiser_is_trained_for_a_classifier_that_stays_as_it_is(tmp_path):
    """The one it names, of the same architecture; without one nothing is trained."""
    for name in ("digits-cnn-clean", "cifar10-resnet20-sigma0.25-seed0"):
        file = f"{name}.safetensors"
        (tmp_path / file).write_bytes((zoo.DATA / "models" / file).read_bytes())
    noise = {"name": "Gaussian", "sigma": 0.25}
    recipe = Recipe("denoised_cnn", "digits", noise, {"name": "gaussian"}, Schedule(epochs=2))
    recipe = dataclasses.replace(recipe, classifier="digits-cnn-clean", threads=1)
    header = recipes.train(recipe, tmp_path / "denoised.safetensors")
    network = load_checkpoint(tmp_path / "denoised.safetensors")[0]
    clean = zoo.model("digits-cnn-clean")
    assert header["classifier"] == recipe.classifier
    assert model_hash(network[1].classifier) == model_hash(clean[1])
    x = load("digits", "test")[0]
    assert not torch.equal(network(x), clean(x))
    for changes, message in (
        ({"classifier": ""}, "classifier must be the name"),
        ({"architecture": "small_cnn"}, "classifier must be the name"),
        ({"classifier": "cifar10-resnet20-sigma0.25-seed0"}, "cifar_resnet20 for cifar10, is not"),
    ):
        with pytest.raises(ValueError, match=message):
            recipes.train(dataclasses.replace(recipe, **changes), tmp_path / "other.safetensors")


def test_networks_are_chosen_on_images_that_are_never_certified(monkeypatch):
    """Noisy accuracy is measured at the given noise, on images of which no record at a stride of
    20 holds any."""
    asked, counts = [], recipes.ModelCounts

    def spy(base, x, noise, index, **settings):
        asked.append((noise.sigma, index.tolist()))
        return counts(base, x, noise, index=index, **settings)

    monkeypatch.setattr(recipes, "ModelCounts", spy)
    network, noise = (
        zoo.model("digits-cnn-sigma0.25"),
        restore_noise(zoo.MODELS["digits-cnn-sigma0.25"].noise),
    )
    accuracy = recipes.noisy_accuracy(network, noise, *load("digits", "test"), draws=400)
    assert asked == [(0.25, list(range(1, 360, 20)))]
    record = zoo.record("digits-cnn-sigma0.25")
    votes = record.counts[1::20]
    fraction = votes[np.arange(18), record.labels[1::20]].sum() / votes.sum()
    assert accuracy == pytest.approx(fraction, abs=4.5 * 0.5 / np.sqrt(18 * 400))


def test_an_ensemble_is_trained_member_by_member(tmp_path):
    """Its members are the networks of their seeds, best first; nothing else is left behind."""
    recipe = dataclasses.replace(
        zoo.MODELS["digits-cnn-x20-sigma0.25"], members=3, schedule=Schedule(epochs=2, seed=4)
    )
    path = tmp_path / "three.safetensors"
    recipes.train(recipe, path)
    ensemble, header = load_checkpoint(path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    accuracy = [member["held_out_accuracy"] for member in header["members"]]
    assert accuracy == sorted(accuracy, reverse=True)
    assert sorted(member["seed"] for member in header["members"]) == [4, 5, 6]
    assert sum(header["best_weights"]) == pytest.approx(1, abs=1e-3)
    alone = dataclasses.replace(recipe, members=1)
    recipes.train(alone, tmp_path / "alone.safetensors")
    place = [member["seed"] for member in header["members"]].index(4)
    same = load_checkpoint(tmp_path / "alone.safetensors")[0]
    assert model_hash(ensemble.members[place]) == model_hash(same)
    assert recipes.train(recipe, path) == header  # a finished one is left as it is
    for other, said in (
        (dataclasses.replace(recipe, members=4), "3 members, not 4"),
        (dataclasses.replace(recipe, schedule=Schedule(epochs=3, seed=4)), "epochs = 2, not 3"),
    ):
        with pytest.raises(ValueError, match=said):
            recipes.train(other, path)
