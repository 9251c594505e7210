"""Experiments by name: networks and records, loaded where committed, computed where they are not.

lib.experiments is their table. `python -m lib.zoo` trains and counts what is committed again.
"""

import dataclasses
import fnmatch
import functools
import pathlib
import sys
import tempfile

import numpy as np
from tqdm.auto import tqdm

from lib.checks import check_choice
from lib.data import content_hash, load
from lib.engine.jobs import Job, run
from lib.engine.moments import load_moments, measure_moments, save_moments
from lib.ensemble import Ensemble
from lib.experiments import (
    DATA,
    ENSEMBLES,
    MODELS,
    PUBLISHED,
    RUNS,
    expand_readouts,
    recipe_of,
)
from lib.models import load_checkpoint, model_hash
from lib.noise import restore_noise
from lib.recipes import quantize_network, train
from lib.samplers import RecordVotes
from lib.sigma import Ascent, load_sigma, search
from lib.store.inventory import model_table, record_table, with_table
from lib.store.logs import read_log
from lib.store.published import read_published
from lib.store.records import load_counts

ROUNDS = 20  # steps in which a long record is stored


def model(name, folder=DATA / "models"):
    """A trained classifier by name (in eval mode, float32): loaded, or trained and stored.

    An ensemble of the table is a lib.ensemble.Ensemble of its networks, by soft vote.
    """
    check_choice([*MODELS, *ENSEMBLES], model=name)
    if name in ENSEMBLES:
        return Ensemble([model(member, folder) for member in ENSEMBLES[name]])
    path = pathlib.Path(folder) / f"{name}.safetensors"
    if not path.exists():
        train(MODELS[name], path)
    return load_checkpoint(path)[0]


def published(name, folder=DATA / "records"):
    """A published certification log, radii rounded as printed.

    - name: one of PUBLISHED.
    - folder: of the records.

    Returns a DataFrame with columns idx, label, predict (-1: abstained), radius, correct. Its
    `attrs` hold sigma, n0, n, alpha, source, commit, licence, path and sha256. For votes give it to
    counts_from_log(log, Gaussian(log.attrs["sigma"]), log.attrs["n"], log.attrs["alpha"]).
    """
    check_choice(PUBLISHED, name=name)
    where = PUBLISHED[name]
    if isinstance(where, str):
        path = pathlib.Path(folder) / "published" / f"{where}.npz"
        return read_published(path, name.removeprefix(f"{where}-"))
    table = read_log(pathlib.Path(folder) / f"{name}.tsv")
    table.attrs = where
    return table


def record(name, n=None, index=None, folder=DATA / "records"):
    """A record of votes by name: loaded, or counted live and stored.

    An unfinished record of the table, which holds fewer draws than planned, is loaded as it is.

    - n, index: draws and test images of a smaller run than the named one, which is counted live
      and not stored.

    Returns a lib.store.records.Record.
    """
    check_choice(RUNS, record=name)
    path = pathlib.Path(folder) / f"{name}.npz"
    if n is not None or index is not None:
        return count(RUNS[name], None, n, index)
    if path.exists():
        found = load_counts(path, noise=noise_of(RUNS[name]))
        if found.header.get("model") not in _networks(name, RUNS[name]):
            load_counts(path, model=RUNS[name].model)  # says what it was recorded with
        return found
    return count(RUNS[name], path)


def _networks(name, run_):
    """Names of the networks that a run's record may be of: where it names no seed, of any."""
    chosen = f"{name.removesuffix('-int8')}-seed" in run_.model
    return siblings(run_.model) if chosen else [run_.model]


def committed(name, folder=DATA / "records"):
    """Whether a record of the table is there, so that a chapter can show it without counting."""
    return name in RUNS and (pathlib.Path(folder) / f"{name}.npz").exists()


def longest(name, folder=DATA / "records"):
    """The longer of two committed records: of a network's votes, or of its 8-bit version's.

    The second is called NAME-int8. The two networks are not the same, but vote alike.
    Raises ValueError where neither is there.
    """
    there = [each for each in (name, f"{name}-int8") if committed(each, folder)]
    if not there:
        raise ValueError(f"name must be of a record in {folder}; got {name!r}")
    found = [record(each, folder=folder) for each in there]
    same = [each for each in found if each.header["model"] == found[0].header["model"]]
    return max(same, key=lambda each: each.draws)


def noise_of(run_, data_path=None, models=DATA / "models"):
    """The description of the noise that a run's votes are drawn under.

    - data_path, models: as of `count`; levels of images are those of these networks.
    """
    if not run_.steps:
        return run_.noise
    folder = pathlib.Path(models).parent / "sigmas"
    levels = sigma(run_.of, data_path, folder, models, run_.copies).at(run_.steps).tolist()
    return {key: value if key == "name" else levels for key, value in run_.noise.items()}


@functools.cache
def sigma(name, data_path=None, folder=DATA / "sigmas", models=DATA / "models", copies=1):
    """The levels that algorithm 1 finds from the noise of a run: loaded, or computed and stored.

    900 steps of 1e-4, each on so many noisy copies; above 1 of them the file is NAME-nCOPIES.npz.
    Returns a lib.sigma.SigmaPath.
    """
    check_choice(RUNS, name=name)
    run_, end = RUNS[name], f"-n{copies}" if copies > 1 else ""
    path = pathlib.Path(folder) / f"{name}{end}.npz"
    if path.exists() and data_path is None:
        return load_sigma(path, model=run_.model)
    recipe, network = recipe_of(run_.model), model(run_.model, models)
    images, _ = load(recipe.data, "test", path=data_path)
    if path.exists():
        hashes = {"model_sha256": model_hash(network), "data_sha256": content_hash(images)}
        return load_sigma(path, model=run_.model, **hashes)
    (start,) = (value for key, value in run_.noise.items() if key != "name")
    index = np.arange(0, len(images), run_.stride)
    settings = {"data": recipe.data, "split": "test"}
    kind = type(restore_noise(run_.noise))
    found = search(
        network,
        run_.model,
        images,
        index,
        start,
        Ascent(n=copies),
        kind,
        run_.seed,
        settings,
        run_.engine,
    )
    found.save(path)
    return load_sigma(path)


def count(run_, path=None, n=None, index=None, data_path=None, models=DATA / "models"):
    """Count the votes of a run on its test images, store them, and return the Record.

    A record at `path` with fewer draws is continued, and ends as if counted at once. A long one
    is stored in rounds of equally many draws of every image, so that a stopped one is whole.

    - run_: a Run, or a name of RUNS. path: of the record (NAME.npz); None stores nothing.
    - n, index: other draws and test images than the run's.
    - data_path: as lib.data.load takes it. models: folder of the networks.

    Raises ValueError where the record at `path` was counted in another way.
    """
    run_ = RUNS[run_] if isinstance(run_, str) else run_
    n, recipe = n or run_.n, recipe_of(run_.model)
    x, y = load(recipe.data, "test", path=data_path)
    index = np.arange(0, len(x), run_.stride) if index is None else np.asarray(index)
    job = functools.partial(
        Job,
        network_of(run_, models, data_path),
        run_.model,
        x,
        y.numpy(),
        index,
        noise=restore_noise(noise_of(run_, data_path, models)),
        seed=run_.seed,
        settings={"data": recipe.data, "split": "test"},
        engine=run_.engine,
        readouts=_readouts(run_, models),
        ready={},
    )
    if path is None:
        return _counted(job, n)
    path = pathlib.Path(path)
    done = load_counts(path).draws if path.exists() else 0
    for target in _targets(done, n):
        run(job(sampler=RecordVotes(target), out=path.with_suffix("")))
    return load_counts(path)


def _readouts(run_, folder):
    """The names of a run's readouts, None where one network votes."""
    if not run_.readouts:
        return None
    if run_.model in ENSEMBLES:
        seeds = [MODELS[name].schedule.seed for name in ENSEMBLES[run_.model]]
        header = {"members": [{"seed": seed} for seed in seeds]}
    else:
        header = load_checkpoint(pathlib.Path(folder) / f"{run_.model}.safetensors")[1]
    return tuple(expand_readouts(run_.readouts, header))


def network_of(run_, folder=DATA / "models", data_path=None):
    """The network of a run: as it was trained, or its 8-bit version, which is made once."""
    if run_.engine["dtype"] != "int8":
        return model(run_.model, folder)
    if run_.model in ENSEMBLES:
        return Ensemble([_quantized(name, folder, data_path) for name in ENSEMBLES[run_.model]])
    return _quantized(run_.model, folder, data_path)


def _quantized(name, folder, data_path):
    path = pathlib.Path(folder) / f"{name}.int8.safetensors"
    if not path.exists():
        recipe = MODELS[name]
        header = {"name": name, "architecture": recipe.architecture, "data": recipe.data}
        noise = restore_noise(recipe.noise)
        quantize_network(path, model(name, folder), header, noise, data_path)
    network, header = load_checkpoint(path)
    source = path.with_name(f"{name}.safetensors")
    if source.exists() and header["source_sha256"] != model_hash(load_checkpoint(source)[0]):
        raise ValueError(
            f"{path} was made from other weights than those of {source.name}: delete it, and it is "
            "made anew"
        )
    return network


def _targets(done, n):
    """Numbers of draws at which a record is stored on its way to n."""
    step = max(500, n // ROUNDS)
    return [*range(done + step, n, step), n]


def _counted(job, n):
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "record"
        run(job(sampler=RecordVotes(n), out=out))
        return load_counts(out.with_name("record.npz"))


def moments(name, folder=DATA / "records"):
    """Moments of the logits of an ensemble's networks, loaded from data/records."""
    check_choice(ENSEMBLES, moments=name)
    return load_moments(pathlib.Path(folder) / f"{name}.moments.safetensors")


def measure(name, folder=DATA / "records", data_path=None, draws=1000):
    """Measure what `moments` reads, on 100 test images at equal strides, and store it.

    The noise is that which the first network was trained for.
    """
    check_choice(ENSEMBLES, moments=name)
    networks, recipe = [model(member) for member in ENSEMBLES[name]], recipe_of(name)
    x, y = load(recipe.data, "test", path=data_path)
    index, noise = np.arange(0, len(x), len(x) // 100), restore_noise(recipe.noise)
    header = {
        "model": ENSEMBLES[name],
        "model_sha256": [model_hash(network) for network in networks],
        "data": recipe.data,
        "split": "test",
        "data_sha256": content_hash(x),
        "dtype": "float32",
    }
    labels = y.numpy()[index]
    found = measure_moments(networks, x[index], labels, noise, draws, index, header)
    save_moments(pathlib.Path(folder) / f"{name}.moments.safetensors", found)


def siblings(name):
    """Names of the networks that differ from this one in their seed alone, itself included."""
    mine = dataclasses.replace(MODELS[name].schedule, seed=0)
    return [
        other
        for other, recipe in MODELS.items()
        if dataclasses.replace(recipe, schedule=mine)
        == dataclasses.replace(MODELS[name], schedule=mine)
        and dataclasses.replace(recipe.schedule, seed=0) == mine
    ]


def cifar10(data_path, out=DATA, losses=("gaussian",)):
    """Train what is missing of the CIFAR-10 networks of some losses, then count their records.

    A record that is named as its network without the seed is of the best seed: the one of highest
    noisy accuracy on test images that no record holds. Everything stops and resumes: a network at
    each epoch, a record at each round of draws.

    - data_path: as lib.data.load takes it.
    - out: folder whose models/ gets the weights and whose records/ the votes.
    - losses: names of the training losses. The others cost 2 to 20 times as much as "gaussian".

    Raises ValueError, before any work, naming losses, or where `out` holds records of other images:
    those in data/ are of JPEG copies of CIFAR-10 (data/README.md).
    """
    plan = {name: recipe for name, recipe in MODELS.items() if recipe.data == "cifar10"}
    for loss in losses:
        check_choice(sorted({recipe.loss["name"] for recipe in plan.values()}), losses=loss)
    recipes = {name: recipe for name, recipe in plan.items() if recipe.loss["name"] in losses}
    models, records = pathlib.Path(out) / "models", pathlib.Path(out) / "records"
    runs = {
        records / f"{name}.npz": run_
        for name, run_ in RUNS.items()
        if set(ENSEMBLES.get(run_.model, [run_.model])) <= set(recipes)
    }
    images = content_hash(load("cifar10", "test", path=data_path)[0])
    for path in filter(pathlib.Path.exists, runs):
        if load_counts(path).header["data_sha256"] != images:
            raise ValueError(
                f"{path} was counted on other images than those of {data_path}: take another "
                "folder, make cifar10 DATA=... OUT=runs/cifar10"
            )
    accuracy = {}
    for name, recipe in recipes.items():
        path = models / f"{name}.safetensors"
        if not path.exists() or path.with_name(path.name + ".state").exists():
            train(recipe, path, data_path, say=_say)
            path.with_name(path.name + ".csv").unlink(missing_ok=True)
        accuracy[name] = load_checkpoint(path)[1]["noisy_accuracy"]
        _say(f"{name}: noisy accuracy {accuracy[name]:.4f}")
    for path, run_ in runs.items():
        if len(_networks(path.stem, run_)) > 1:
            best = max(siblings(run_.model), key=accuracy.get)
            if path.exists() and (old := load_counts(path).header["model"]) != best:
                kept = f"{old}-int8.npz" if path.stem.endswith("-int8") else f"{old}.npz"
                _say(f"{best} is better than {old}: the record of that one is kept as {kept}")
                path.rename(records / kept)
            run_ = dataclasses.replace(run_, model=best)
        count(run_, path, data_path=data_path, models=models)


def _say(text):
    tqdm.write(text, file=sys.stderr)


def _chosen(networks, pattern="*"):
    """The names that a pattern fits, without CIFAR-10, which has a plan of its own.

    - networks: {name of a network or record: name of its network or ensemble}.
    """
    fits = [name for name in networks if fnmatch.fnmatch(name, pattern)]
    chosen = [name for name in fits if recipe_of(networks[name]).data != "cifar10"]
    if not chosen:
        why = "CIFAR-10 has a plan: python -m lib.zoo cifar10" if fits else "none has such a name"
        raise SystemExit(f"error: {pattern} chooses nothing of data/experiments.toml; {why}")
    return chosen


def main(what, *arguments):
    """python -m lib.zoo models | records | cifar10 | moments | tables, each with its arguments.

    Retrain networks; count records again (all but those on CIFAR-10, or those of a PATTERN of
    names); do the CIFAR-10 plan (DATA [OUT], and losses other than Gaussian augmentation by name);
    measure the moments of logits of CIFAR-10 networks; write the tables of data/models/README.md
    and data/records/README.md.
    """
    if what == "models" and len(arguments) < 2:
        for name in _chosen({name: name for name in MODELS}, *arguments):
            path = DATA / "models" / f"{name}.safetensors"
            path.unlink(missing_ok=True)
            train(MODELS[name], path)
            path.with_name(path.name + ".csv").unlink(missing_ok=True)
    elif what == "records" and len(arguments) < 2:
        for name in _chosen({name: run_.model for name, run_ in RUNS.items()}, *arguments):
            path = DATA / "records" / f"{name}.npz"
            path.unlink(missing_ok=True)
            count(RUNS[name], path)
    elif what == "moments" and len(arguments) in (1, 2):
        for name in filter(lambda name: recipe_of(name).data == "cifar10", ENSEMBLES):
            measure(name, *arguments[1:] or [DATA / "records"], data_path=arguments[0])
    elif what == "cifar10" and arguments:
        data_path, *rest = arguments
        out, losses = (rest or [DATA])[0], rest[1:] or ["gaussian"]
        try:
            cifar10(data_path, out, losses)
        except (ValueError, OSError) as error:
            raise SystemExit(f"error: {error}") from error
        except KeyboardInterrupt:
            raise SystemExit("\ninterrupted: the same command continues where it stopped") from None
    elif what == "tables" and not arguments:
        for folder, table in (("models", model_table()), ("records", record_table())):
            path = DATA / folder / "README.md"
            path.write_text(with_table(path.read_text(), table))
    else:
        raise SystemExit(
            "usage: python -m lib.zoo models [PATTERN] | records [PATTERN] | "
            "cifar10 DATA [OUT [LOSS ...]] | moments DATA [OUT] | tables\n"
            "(DATA: an npz, or the folder or tar.gz of CIFAR-10)"
        )


if __name__ == "__main__":
    main(*sys.argv[1:] or [""])
