"""Experiments by name: models and counts, loaded where they are committed, computed where they are not."""

import dataclasses
import pathlib
import sys

import numpy as np
import torch

from lib.checks import check_choice
from lib.data import content_hash, load
from lib.engine.classifier import BaseClassifier
from lib.engine.hardware import cores
from lib.engine.live import ModelCounts
from lib.losses import GaussianLoss
from lib.models import build, load_checkpoint, model_hash, save_checkpoint
from lib.noise import Gaussian
from lib.store.records import Record, load_counts, save_counts
from lib.train import fit

DATA = pathlib.Path(__file__).parent.parent / "data"
ROUND = 500  # draws of each image between two savings of a record


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a model is trained: architecture, data set, training noise, and what `lib.train.fit` is told."""

    architecture: str
    data: str
    sigma: float
    seed: int = 0
    epochs: int = 60
    lr: float = 0.1
    batch: int = 64
    augment: bool = False
    average: float | None = None
    weight_decay: float = 5e-4
    dtype: str = "float32"
    threads: int = 2  # split sums round differently: with another number of threads, training ends in other weights


@dataclasses.dataclass(frozen=True)
class Run:
    """How a committed record was made: the model, the noise that it was counted under, the draws of each test image, every how manieth image."""

    model: str
    sigma: float
    n: int
    seed: int = 0
    every: int = 1


MODELS = {
    f"digits-cnn-sigma{s:.2f}": Recipe("small_cnn", "digits", s) for s in (0.12, 0.25, 0.5, 1.0)
}
MODELS |= {
    f"cifar10-resnet20-sigma{s:.2f}-seed{seed}": Recipe(
        "cifar_resnet20", "cifar10", s, seed, 15, 0.2, 128, True, 0.999, 2e-4, "bfloat16", 1
    )
    for seed in range(5)
    for s in (0.25, 0.5, 1.0)
}
# 605,000 draws replay n_max = 500,000 with 1% selection draws and 100,000 fresh ones beside them (notebook 05).
RUNS = {
    name: Run(name, recipe.sigma, 100_100 if recipe.sigma == 0.12 else 605_000)
    for name, recipe in MODELS.items()
    if recipe.data == "digits"
}
# Training noise against test noise (figure 15 of Cohen et al. 2019), prediction noise 0.50.
RUNS |= {
    f"digits-cnn-sigma{s:.2f}-at0.50": Run(f"digits-cnn-sigma{s:.2f}", 0.5, 100_100)
    for s in (0.25, 1.0)
}
# Of each noise level the seed of highest noisy accuracy among the networks that are there; on every 20th test image. n is the plan: the
# records may hold fewer draws yet, as their headers say.
BEST = {0.25: 0, 0.50: 4, 1.00: 2}
RUNS |= {
    f"cifar10-resnet20-sigma{s:.2f}": Run(
        f"cifar10-resnet20-sigma{s:.2f}-seed{seed}", s, 100_100, every=20
    )
    for s, seed in BEST.items()
}
# Small enough for a test to count again.
RUNS["digits-cnn-sigma0.25-n1000"] = Run("digits-cnn-sigma0.25", 0.25, 1000)


def model(name, folder=DATA / "models"):
    """A trained classifier by name (module in eval mode, float32): loaded from data/models, or trained and stored there."""
    check_choice(MODELS, model=name)
    path = pathlib.Path(folder) / f"{name}.safetensors"
    if not path.exists():
        train(name, path)
    return load_checkpoint(path)[0]


def train(name, path, data_path=None, state=None):
    """Train a model of MODELS and store it at `path`, on as many threads as its recipe says; with a `state` file it resumes after a kill.

    data_path: as lib.data.load takes it.
    """
    check_choice(MODELS, model=name)
    recipe = MODELS[name]
    torch.manual_seed(recipe.seed)
    network = build(recipe.architecture, recipe.data)
    x, y = load(recipe.data, "train", path=data_path)
    with cores(recipe.threads):
        fit(
            network, x, y, GaussianLoss(), Gaussian(recipe.sigma), recipe.epochs, recipe.lr, recipe.batch, weight_decay=recipe.weight_decay,
            seed=recipe.seed, augment=recipe.augment, average=recipe.average, dtype=getattr(torch, recipe.dtype), state=state,
        )  # fmt: skip
    header = dataclasses.asdict(recipe) | {"loss": "GaussianLoss", "torch": torch.__version__}
    if recipe.data == "cifar10":
        header["noisy_accuracy"] = noisy_accuracy(network, recipe, data_path)
    save_checkpoint(path, network, header)


def noisy_accuracy(network, recipe, data_path=None, draws=20):
    """Share of votes for the right class on the test images 1, 21, ..., which are never certified: what networks are chosen by."""
    x, y = load(recipe.data, "test", path=data_path)
    index = np.arange(1, len(x), 20)
    base = BaseClassifier(
        network,
        x.shape[1:],
        dtype=getattr(torch, recipe.dtype),
        block=250,
        layout="channels_last",
        compile=False,
    )
    votes = ModelCounts(base, x[index], Gaussian(recipe.sigma), index=index, progress=False).draw(
        draws
    )
    return float(votes[np.arange(len(index)), y.numpy()[index]].sum() / votes.sum())


def cifar10(data_path, out=DATA):
    """Train what is missing of the CIFAR-10 networks, then count the votes of the best of each noise level on the test images 0, 20, ..., 9980.

    out: folder whose models/ gets the weights and whose records/ the votes. Everything stops and resumes: a network at each epoch (NAME.state beside
    it), a record, even a finished shorter one, at each ROUND of draws. data_path: as lib.data.load takes it. Raises ValueError, before any work,
    where `out` holds records of other images: those in data/ are of JPEG copies of CIFAR-10 (data/README.md).
    """
    recipes = {name: recipe for name, recipe in MODELS.items() if recipe.data == "cifar10"}
    models, records = pathlib.Path(out) / "models", pathlib.Path(out) / "records"
    runs = {records / f"{name}.npz": run for name, run in RUNS.items() if run.model in recipes}
    images = content_hash(load("cifar10", "test", path=data_path)[0])
    for path in filter(pathlib.Path.exists, runs):
        if load_counts(path).header["data_sha256"] != images:
            raise ValueError(
                f"{path} was counted on other images than those of {data_path}: take another folder, make cifar10 DATA=... OUT=runs/cifar10"
            )
    shares = {}
    for name in recipes:
        path = models / f"{name}.safetensors"
        if not path.exists():
            train(name, path, data_path, state=path.with_suffix(".state"))
            path.with_suffix(".state").unlink()
        shares[name] = load_checkpoint(path)[1]["noisy_accuracy"]
        print(f"{name}: noisy accuracy {shares[name]:.4f}", flush=True)
    for path, run in runs.items():
        best = max((name for name in recipes if recipes[name].sigma == run.sigma), key=shares.get)
        if path.exists() and (old := load_counts(path).header["model"]) != best:
            print(
                f"{best} is better than {old}: the record of that one is kept as {old}.npz (in data/, set zoo.BEST)",
                flush=True,
            )
            path.rename(records / f"{old}.npz")
        record(dataclasses.replace(run, model=best), path, data_path=data_path, models=models)


def counts(name, n=None, index=None, folder=DATA / "records"):
    """A record of votes by name: loaded from data/records, or counted live and stored there. Returns lib.store.records.Record.

    n, index: draws and test images of a smaller run than the named one, which is counted live and not stored.
    """
    check_choice(RUNS, record=name)
    run = RUNS[name]
    path = pathlib.Path(folder) / f"{name}.npz"
    if n is None and index is None and path.exists():
        found = load_counts(path, model=run.model, sigma=run.sigma)
        if (
            found.header["n"] >= run.n or run.every > 1
        ):  # the long records of CIFAR-10 may still grow
            return found
    return record(name, path if n is None and index is None else None, n, index)


def record(run, path=None, n=None, index=None, data_path=None, models=DATA / "models"):
    """Count the votes of a run (a Run, or a name of RUNS) on its test images or those of `index`, up to `n` draws of each; store them at `path`.

    Stored after every ROUND draws of each image; a record at `path` with fewer draws is continued, and ends as if counted at once.
    Raises ValueError where the record at `path` was counted in another way. Returns lib.store.records.Record; without a path nothing is stored.
    """
    if not isinstance(run, Run):
        check_choice(RUNS, run=run)
        run = RUNS[run]
    network, recipe, n = model(run.model, models), MODELS[run.model], n or run.n
    x, y = load(recipe.data, "test", path=data_path)
    index = np.arange(0, len(x), run.every) if index is None else np.asarray(index)
    labels = y.numpy()[index]
    engine = (
        {"block": 64, "layout": "channels_last"}
        if recipe.data == "cifar10"
        else {"block": 400, "layout": "contiguous"}
    )
    base = BaseClassifier(
        network, x.shape[1:], dtype=getattr(torch, recipe.dtype), compile=False, **engine
    )
    header = {
        "model": run.model, "model_sha256": model_hash(network), "data": recipe.data, "split": "test", "data_sha256": content_hash(x),
        "sigma": run.sigma, "seed": run.seed, **base.settings,
    }  # fmt: skip
    source = ModelCounts(base, x[index], Gaussian(run.sigma), index=index, seed=run.seed)
    if path is not None and pathlib.Path(path).exists():
        old = load_counts(path, **header)
        if not np.array_equal(old.index, index):
            raise ValueError(f"{path} holds other images than asked for: give another path")
        source.votes[:] = old.counts
    while (done := int(source.votes[0].sum())) < n:
        more = min(ROUND, n - done)
        source.draw(more)
        if path is not None:
            save_counts(path, source.votes, index, labels, n=done + more, **header)
    return Record(source.votes, index, labels, header | {"n": done})


def main(what, *paths):
    """python -m lib.zoo models | records | cifar10 DATA [OUT]: retrain the digits networks, count their records again, do the CIFAR-10 plan."""
    if what == "models":
        for name in (name for name, recipe in MODELS.items() if recipe.data == "digits"):
            train(name, DATA / "models" / f"{name}.safetensors")
    elif what == "records":
        for name, run in RUNS.items():
            if MODELS[run.model].data == "digits":
                path = DATA / "records" / f"{name}.npz"
                path.unlink(missing_ok=True)
                record(name, path)
    elif what == "cifar10" and len(paths) in (1, 2):
        try:
            cifar10(*paths)
        except (ValueError, OSError) as error:
            raise SystemExit(f"error: {error}") from error
        except KeyboardInterrupt:
            raise SystemExit("\ninterrupted: the same command continues where it stopped") from None
    else:
        raise SystemExit(
            "usage: python -m lib.zoo models | records | cifar10 DATA [OUT] (DATA: an npz, or the folder or tar.gz of CIFAR-10)"
        )


if __name__ == "__main__":
    main(*sys.argv[1:] or [""])
