"""Experiments by name: models and counts, loaded where they are committed, computed where they are not."""

import dataclasses
import pathlib
import sys

import numpy as np
import torch

from lib.certify import certify
from lib.checkpoints import load_checkpoint, model_hash, save_checkpoint
from lib.data import load
from lib.engine import BaseClassifier, ModelCounts
from lib.files import sha256, write_atomically
from lib.losses import GaussianLoss
from lib.models import build
from lib.noise import Gaussian
from lib.records import Record, load_counts, save_counts
from lib.runner import Job, run
from lib.train import fit

DATA = pathlib.Path(__file__).parent.parent / "data"


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
    dtype: str = "float32"
    threads: int = 2  # split sums round differently: with another number of threads, training ends in other weights


@dataclasses.dataclass(frozen=True)
class Run:
    """How a committed record was made: the model, the noise that it was counted under, and the draws of each test image."""

    model: str
    sigma: float
    n: int
    seed: int = 0


MODELS = {f"digits-cnn-sigma{s:.2f}": Recipe("small_cnn", "digits", s) for s in (0.12, 0.25, 0.5, 1.0)}
MODELS |= {
    f"cifar10-resnet20-sigma{s:.2f}-seed{seed}": Recipe("cifar_resnet20", "cifar10", s, seed, 15, 0.4, 256, True, 0.998, "bfloat16", 1)
    for s in (0.25, 0.5, 1.0)
    for seed in range(5)
}
# 605,000 draws replay n_max = 500,000 with 1% selection draws and 100,000 fresh ones beside them (notebook 05).
RUNS = {name: Run(name, recipe.sigma, 100_100 if recipe.sigma == 0.12 else 605_000) for name, recipe in MODELS.items() if recipe.data == "digits"}
# Training noise against test noise (figure 15 of Cohen et al. 2019), prediction noise 0.50.
RUNS |= {f"digits-cnn-sigma{s:.2f}-at0.50": Run(f"digits-cnn-sigma{s:.2f}", 0.5, 100_100) for s in (0.25, 1.0)}
# Small enough for a test to count again.
RUNS["digits-cnn-sigma0.25-n1000"] = Run("digits-cnn-sigma0.25", 0.25, 1000)


def _lookup(name, table, kind):
    if name not in table:
        raise ValueError(f"{kind} {name!r} is unknown; there are: {', '.join(table)}")
    return table[name]


def model(name, folder=DATA / "models"):
    """A trained classifier by name (module in eval mode, float32): loaded from data/models, or trained and stored there."""
    _lookup(name, MODELS, "model")
    path = pathlib.Path(folder) / f"{name}.safetensors"
    if not path.exists():
        train(name, path)
    return load_checkpoint(path)[0]


def train(name, path, data_path=None, state=None):
    """Train a model of MODELS and store it at `path`, on as many threads as its recipe says; with a `state` file it resumes after a kill.

    data_path: as lib.data.load takes it.
    """
    recipe = _lookup(name, MODELS, "model")
    before = torch.get_num_threads()
    torch.set_num_threads(recipe.threads)
    torch.manual_seed(recipe.seed)
    network = build(recipe.architecture, recipe.data)
    x, y = load(recipe.data, "train", path=data_path)
    fit(
        network, x, y, GaussianLoss(), Gaussian(recipe.sigma), recipe.epochs, recipe.lr, recipe.batch, seed=recipe.seed,
        augment=recipe.augment, average=recipe.average, dtype=getattr(torch, recipe.dtype), state=state,
    )  # fmt: skip
    torch.set_num_threads(before)
    header = dataclasses.asdict(recipe) | {"loss": "GaussianLoss", "torch": torch.__version__}
    if recipe.data == "cifar10":
        header["noisy_accuracy"] = noisy_accuracy(network, recipe, data_path)
    save_checkpoint(path, network, header)


def noisy_accuracy(network, recipe, data_path=None, draws=20):
    """Share of votes for the right class on the test images 1, 21, ..., which are never certified: what networks are chosen by."""
    x, y = load(recipe.data, "test", path=data_path)
    index = np.arange(1, len(x), 20)
    base = BaseClassifier(network, x.shape[1:], dtype=getattr(torch, recipe.dtype), block=250, layout="channels_last", compile=False)
    votes = ModelCounts(base, x[index], Gaussian(recipe.sigma), index=index, progress=False).draw(draws)
    return float(votes[np.arange(len(index)), y.numpy()[index]].sum() / votes.sum())


def cifar10(data_path, n=100_000, runs=DATA.parent / "runs"):
    """Train what is missing of the CIFAR-10 networks, then certify the best of each noise level on the test images 0, 20, ..., 9980.

    Everything stops and resumes: a network at each epoch (runs/NAME.state), a record at each example (runs/NAME.tsv). Weights go to
    data/models, the finished records to data/records. data_path: as lib.data.load takes it. n: draws for the bound, n0 = 100.
    """
    recipes = {name: recipe for name, recipe in MODELS.items() if recipe.data == "cifar10"}
    for name in recipes:
        path = DATA / "models" / f"{name}.safetensors"
        if not path.exists():
            train(name, path, data_path, state=runs / f"{name}.state")
        print(f"{name}: noisy accuracy {load_checkpoint(path)[1]['noisy_accuracy']:.4f}", flush=True)
    for sigma in sorted({recipe.sigma for recipe in recipes.values()}):
        names = [name for name, recipe in recipes.items() if recipe.sigma == sigma]
        best = max(names, key=lambda name: load_checkpoint(DATA / "models" / f"{name}.safetensors")[1]["noisy_accuracy"])
        certify_subset(best, DATA / "records" / f"cifar10-resnet20-sigma{sigma:.2f}.npz", data_path, n, runs)


def certify_subset(name, path, data_path, n, runs):
    """CERTIFY every 20th test image with a model of the zoo, resumably, and put its record at `path`."""
    network, recipe = model(name), MODELS[name]
    x, y = load(recipe.data, "test", path=data_path)
    index, noise = np.arange(0, len(x), 20), Gaussian(recipe.sigma)
    settings = {"model_sha256": model_hash(network), "data": recipe.data, "sigma": recipe.sigma, "n0": 100, "n": n, "alpha": 0.001, "seed": 0}
    engine = {"dtype": getattr(torch, recipe.dtype)}
    out = pathlib.Path(runs) / f"{path.stem}.tsv"
    run(Job(network, name, x, y.numpy(), index, lambda counts: certify(counts, noise, 100, n, 0.001), noise, 0, n + 100, out, settings, engine))
    write_atomically(path, out.with_name(out.name + ".npz").read_bytes())


def counts(name, n=None, index=None, folder=DATA / "records"):
    """A record of votes by name: loaded from data/records, or counted live and stored there. Returns lib.records.Record.

    n, index: draws and test images of a smaller run than the named one, which is counted live and not stored.
    """
    run = _lookup(name, RUNS, "record")
    path = pathlib.Path(folder) / f"{name}.npz"
    if n is None and index is None and path.exists():
        return load_counts(path, model=run.model, sigma=run.sigma)
    return record(name, path if n is None and index is None else None, n, index)


def record(name, path=None, n=None, index=None):
    """Count the votes of a run of RUNS in float32, on all test images or those of `index`, and store them at `path` (if given)."""
    run = _lookup(name, RUNS, "record")
    network, recipe = model(run.model), MODELS[run.model]
    x, y = load(recipe.data, "test")
    index = np.arange(len(x)) if index is None else np.asarray(index)
    base = BaseClassifier(network, x.shape[1:], dtype=torch.float32, block=400, layout="contiguous", compile=False)
    n = n or run.n
    votes = ModelCounts(base, x[index], Gaussian(run.sigma), index=index, seed=run.seed).draw(n)
    header = {
        "model": run.model, "model_sha256": model_hash(network), "data": recipe.data, "split": "test", "data_sha256": sha256(x.numpy().tobytes()),
        "sigma": run.sigma, "seed": run.seed, "n": n, **base.settings,
    }  # fmt: skip
    if path is not None:
        save_counts(path, votes, index, y.numpy()[index], **header)
        return load_counts(path)
    return Record(votes, index, y.numpy()[index], header)


def main(what, data_path=None):
    """python -m lib.zoo models | records | cifar10 DATA: retrain the digits networks, count their records again, do the CIFAR-10 plan."""
    if what == "models":
        for name in (name for name, recipe in MODELS.items() if recipe.data == "digits"):
            train(name, DATA / "models" / f"{name}.safetensors")
    elif what == "records":
        for name in RUNS:
            record(name, DATA / "records" / f"{name}.npz")
    elif what == "cifar10" and data_path:
        cifar10(data_path)
    else:
        raise SystemExit("usage: python -m lib.zoo models | records | cifar10 DATA (an npz, or the folder or tar.gz of CIFAR-10)")


if __name__ == "__main__":
    main(*sys.argv[1:] or [""])
