"""Trained networks as data: a recipe determines the weights, and its training stops and resumes.

One driver for the zoo and the command line, on the loop of lib.train: single networks, ensembles,
routers and 8-bit versions.
"""

import dataclasses
import importlib.metadata
import itertools
import pathlib
import time

import numpy as np
import pandas as pd
import torch

from lib.checks import check_draws, difference
from lib.data import content_hash, load
from lib.dual import best_expert
from lib.engine.classifier import BaseClassifier
from lib.engine.hardware import cores, pick_device
from lib.engine.int8 import quantize
from lib.engine.live import ModelCounts
from lib.ensemble import Ensemble, fit_weights, order_by_accuracy
from lib.losses import LOSSES
from lib.models import (
    Denoised,
    build,
    ensemble_header,
    load_checkpoint,
    model_hash,
    save_checkpoint,
)
from lib.noise import Gaussian, restore_noise
from lib.store.files import write_atomically
from lib.train import Schedule, fit


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A trained network as data: all that determines its weights.

    - architecture, data: see lib.models.build and lib.data.load.
    - noise: description of the smoothing distribution trained for (lib.noise).
    - loss: description of the training loss (lib.losses).
    - threads: of torch; split sums round differently, so another number gives other weights.
    - members: above 1 an ensemble of so many networks, of the seeds seed, seed + 1, ...
    - experts: names of networks, with spaces between them, stored beside it, of one noise each:
      this one is then the router of dual smoothing among them, trained on the labels of
      `lib.dual.best_expert`.
    - classifier: name of a network stored beside it, which the denoiser of this one is trained for
      (lib.models.Denoised).
    """

    architecture: str
    data: str
    noise: dict
    loss: dict = dataclasses.field(default_factory=lambda: {"name": "gaussian"})
    schedule: Schedule = dataclasses.field(default_factory=Schedule)
    threads: int | None = None
    members: int = 1
    experts: str = ""
    classifier: str = ""

    def header(self):
        """The recipe as a flat dict of plain values, for a checkpoint."""
        parts = dataclasses.asdict(self)
        if self.members == 1:
            del parts["members"]
        for name in ("experts", "classifier"):
            if not parts[name]:
                del parts[name]
        return parts.pop("schedule") | parts


def noisy_accuracy(model, noise, x, y, dtype="float32", draws=20):
    """Fraction of votes for the right class on the test images 1, 21, 41, ...

    Networks are watched and chosen by it; images certified at a stride of 20 are never among them.

    - model: nn.Module. noise: the smoothing distribution. x, y: the test images and labels.
    - dtype: precision of the votes ("int8" for a network of lib.quantize). draws: of each image.
    """
    index = np.arange(1, len(x), 20)
    shape = x.shape[1:]
    base = BaseClassifier(
        model,
        shape,
        device=next(itertools.chain(model.parameters(), model.buffers())).device,
        dtype=dtype,
        block=250,
        layout="channels_last",
        compile=dtype == "int8",
    )
    votes = ModelCounts(base, x[index], noise, index=index, progress=False).draw(draws)
    return float(votes[np.arange(len(index)), np.asarray(y)[index]].sum() / votes.sum())


def train(recipe, path, data_path=None, device=None, half=True, say=None):
    """Train a network after a recipe and store it: stopped at any moment, it resumes.

    PATH gets the weights after each epoch, PATH.csv a line per epoch, PATH.state what resuming
    needs until the end. A finished network is left as it is.

    - recipe: a Recipe. path: of the checkpoint.
    - data_path: as lib.data.load takes it. device: default the CPU.
    - half: store the finished weights in half precision.
    - say: called with a line of text after each epoch.

    Returns the header. Raises ValueError where PATH was trained after another recipe.
    """
    path = pathlib.Path(path)
    if recipe.members > 1:
        return _train_ensemble(recipe, path, data_path, device, half, say)
    state, table = (path.with_name(path.name + end) for end in (".state", ".csv"))
    x, y = load(recipe.data, "train", path=data_path)
    test = load(recipe.data, "test", path=data_path)
    noise, settings = restore_noise(recipe.noise), recipe.header()
    settings |= {"data_sha256": content_hash(x)}
    header = load_checkpoint(path)[1] if path.exists() else {}
    if header and {name: header.get(name) for name in settings} != settings:
        raise ValueError(
            f"{path} was trained with {difference(header, header | settings)}: give another path, "
            "take the old setting, or delete it (and its .state)"
        )
    if header.get("epoch") == recipe.schedule.epochs and not state.exists():
        return header
    torch.manual_seed(recipe.schedule.seed)
    network = build(recipe.architecture, recipe.data, len(recipe.experts.split()) or None)
    if recipe.classifier or isinstance(network[1], Denoised):
        _take_classifier(network, recipe, path.parent)
    if recipe.experts:
        y, test = _routes(recipe, path.parent, x, y), (test[0], _routes(recipe, path.parent, *test))
    begin, epochs = time.perf_counter(), recipe.schedule.epochs
    rows = pd.read_csv(table).to_dict("records") if table.exists() else []
    first = []

    def after_epoch(trained, history):
        first.append(len(history))
        last = len(history) == epochs
        accuracy = noisy_accuracy(
            trained, noise, *test, recipe.schedule.dtype, draws=20 if last else 4
        )
        made = settings | {"epoch": len(history), "noisy_accuracy": accuracy}
        save_checkpoint(path, trained, made | {"torch": torch.__version__}, half and last)
        rate = (len(history) - first[0] + 1) / (time.perf_counter() - begin)
        row = history[-1] | {"noisy_accuracy": accuracy, "images_per_second": rate * len(x)}
        rows[len(history) - 1 :] = [row]
        write_atomically(table, pd.DataFrame(rows).to_csv(index=False).encode())
        if say:
            say(_progress(row, epochs, (epochs - len(history)) / rate))

    with cores(recipe.threads or torch.get_num_threads()):
        history = fit(
            network,
            x,
            y,
            LOSSES.restore(recipe.loss),
            noise,
            recipe.schedule,
            device=pick_device(device or "cpu"),
            state=state,
            after_epoch=after_epoch,
        )
        if not first:  # killed after its last epoch, before that one's checkpoint
            after_epoch(network, history)
    state.unlink(missing_ok=True)
    return load_checkpoint(path)[1]


def _take_classifier(network, recipe, folder):
    """Put a trained classifier behind the denoiser of a new network."""
    if not (recipe.classifier and isinstance(network[1], Denoised)):
        raise ValueError(
            "classifier must be the name of a trained network where the architecture is a denoiser "
            f"in front of one, and there alone; got {recipe.classifier!r} and {recipe.architecture}"
        )
    frozen, header = load_checkpoint(folder / f"{recipe.classifier}.safetensors")
    try:
        # With its normalisation, which is the denoiser's, too.
        both = torch.nn.Sequential(network[0], network[1].classifier)
        both.load_state_dict(frozen.state_dict())
    except RuntimeError as error:
        raise ValueError(
            f"classifier {recipe.classifier}, a {header['architecture']} for {header['data']}, is "
            f"not the one of architecture {recipe.architecture}"
        ) from error


def _routes(recipe, folder, x, y):
    """The labels of a router: which of the recipe's experts has the largest radius at each image.

    Its own draws choose them, of another seed than any record's.
    """
    files = [load_checkpoint(folder / f"{name}.safetensors") for name in recipe.experts.split()]
    noises = [_trained_for(header) for _, header in files]
    return best_expert([network for network, _ in files], noises, x, y, seed=9)


def _trained_for(header):
    """The noise of a checkpoint; the first ones here, and published ones, only say a sigma."""
    return restore_noise(header["noise"]) if "noise" in header else Gaussian(header["sigma"])


def _train_ensemble(recipe, path, data_path, device, half, say):
    """Train the members of an ensemble, each in a file of its own until all are there.

    They are stored best first, by accuracy on noisy copies of every second test image (1, 3, ...);
    the others are for certificates. Its `weights` are those of the weighted vote of the first ten.
    """
    if path.exists():
        return _same_ensemble(recipe, path)
    x, y = load(recipe.data, "test", path=data_path)
    held_out = x[1::2], y.numpy()[1::2], restore_noise(recipe.noise)
    files, loaded = [], []
    for i, member in enumerate(_members(recipe)):
        files.append(path.with_name(f"{path.name}.{i}"))
        train(member, files[-1], data_path, device, half=False, say=say)
        loaded.append(load_checkpoint(files[-1]))
    order, accuracy = order_by_accuracy([network for network, _ in loaded], *held_out, draws=100)
    members = [loaded[i][0] for i in order]
    headers = [loaded[i][1] | {"held_out_accuracy": float(accuracy[i])} for i in order]
    for member in headers:
        del member["format"]
    ensemble, weights = Ensemble(members), fit_weights(members[:10], *held_out, draws=100)
    header = ensemble_header(ensemble, headers) | {"best_weights": np.round(weights, 4).tolist()}
    save_checkpoint(path, ensemble, header, half)
    for file in files:
        file.unlink()
        file.with_name(file.name + ".csv").unlink(missing_ok=True)
    return load_checkpoint(path)[1]


def _members(recipe):
    """The recipes of an ensemble's members, which differ in their seed."""
    for i in range(recipe.members):
        schedule = dataclasses.replace(recipe.schedule, seed=recipe.schedule.seed + i)
        yield dataclasses.replace(recipe, schedule=schedule, members=1)


def _same_ensemble(recipe, path):
    """The header of a finished ensemble; a ValueError where it was trained after another recipe."""
    header = load_checkpoint(path)[1]
    stored = sorted(header.get("members", []), key=lambda member: member["seed"])
    expected = [member.header() for member in _members(recipe)]
    if len(stored) != len(expected):
        raise ValueError(f"{path} holds {len(stored)} members, not {len(expected)}")
    for old, new in zip(stored, expected, strict=True):
        if {name: old.get(name) for name in new} != new:
            raise ValueError(f"{path} was trained with {difference(old, old | new)}")
    return header


def _progress(row, epochs, left):
    return (
        f"epoch {row['epoch']}/{epochs}  loss {row['loss']:.4f}  noisy accuracy "
        f"{row['noisy_accuracy']:.3f} (test images 1, 21, ..., only watched)  "
        f"{row['images_per_second']:,.0f} images/s  {left:.0f} s left"
    )


def quantize_network(path, model, header, noise, data_path=None, images=1024, seed=0):
    """Make the 8-bit version of a trained network and store it, once (lib.quantize).

    - path: of the checkpoint to write.
    - model, header: the network as load_checkpoint gives it; the header's "name", where it has
      one, is kept as the source.
    - noise: smoothing distribution of the calibration. seed: of its noise.
    - images: number of training images, at equal strides, that the scales are found on.
    - data_path: as lib.data.load takes it.

    Returns the header written, with the noisy accuracy. Raises ValueError naming images, or where
    the network cannot be quantised.
    """
    check_draws(images=images)
    x, _ = load(header["data"], "train", path=data_path)
    if images > len(x):
        raise ValueError(f"images must be at most {len(x)}, the training images; got {images}")
    index = np.arange(images) * (len(x) // images)
    network = quantize(model, x[index], noise, seed)
    made = {
        "architecture": header["architecture"],
        "data": header["data"],
        "dtype": "int8",
        "source": header.get("name"),
        "source_sha256": model_hash(model),
        "noise": noise.describe(),
        "images": images,
        "seed": seed,
        "data_sha256": content_hash(x),
        "noisy_accuracy": noisy_accuracy(
            network, noise, *load(header["data"], "test", path=data_path), "int8"
        ),
        "torch": torch.__version__,
        "torchao": importlib.metadata.version("torchao"),
    }
    save_checkpoint(path, network, made)
    return made
