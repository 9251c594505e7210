"""The table of experiments: networks, records and ensembles by name, as data/experiments.toml says.

Also the names of the logs that others published. lib.zoo loads all of them, or computes them.
"""

import dataclasses
import itertools
import pathlib
import tomllib

from lib.checks import check_choice
from lib.engine.readouts import Readout, readout
from lib.ensemble import VOTES
from lib.losses import LOSSES
from lib.noise import restore_noise
from lib.recipes import Recipe
from lib.train import Schedule

DATA = pathlib.Path(__file__).parent.parent / "data"
# Usual settings of the engine: part of what a record is, so never chosen by timing.
ENGINE = {"dtype": "float32", "block": 64, "layout": "contiguous", "compile": False}
# By data set, where others are usual.
ENGINES = {
    "digits": ENGINE | {"block": 400},
    "cifar10": ENGINE | {"dtype": "bfloat16", "layout": "channels_last"},
}


@dataclasses.dataclass(frozen=True)
class Run:
    """How a record is counted.

    - model: name of the network or ensemble. noise: description of the noise of the votes.
    - n: draws of each test image. stride: between the test images. seed: of the noise.
    - engine: settings of the base classifier (dtype, block, layout, compile).
    - readouts: of an ensemble, names of lib.engine.readouts with spaces between them, as
      `expand_readouts` reads them: its networks are counted in one pass.
    - of, steps: where steps > 0, each image has the level that algorithm 1 finds in so many steps
      from the noise of the run `of` (lib.zoo.sigma), on so many noisy copies a step (`copies`).
    """

    model: str
    noise: dict
    n: int
    stride: int = 1
    seed: int = 0
    engine: dict = dataclasses.field(default_factory=dict)
    readouts: str = ""
    of: str = ""
    steps: int = 0
    copies: int = 1


def expand(entry):
    """The experiments [(name, fields)] that one entry of the table stands for."""
    axes = {key: value for key, value in entry.items() if isinstance(value, list)}
    experiments = []
    for values in itertools.product(*axes.values()):
        fields = entry | dict(zip(axes, values, strict=True))
        texts = {key: value.format(**fields) for key, value in fields.items() if type(value) is str}
        fields |= texts
        if "sigma" in fields:
            fields["noise"] = {"name": "Gaussian", "sigma": float(fields.pop("sigma"))}
        if "noise" in fields:
            fields["noise"] = restore_noise(fields["noise"]).describe()
        if "loss" in fields:
            LOSSES.restore(fields["loss"])
        experiments.append((fields.pop("name"), fields))
    return experiments


def _of_recipe(entry, recipes):
    """An entry with the fields of the recipe that it names, where it does not say them itself."""
    if "recipe" not in entry:
        return entry
    check_choice(recipes, recipe=entry["recipe"])
    return {k: v for k, v in (recipes[entry["recipe"]] | entry).items() if k != "recipe"}


def _check_new(name, known, path):
    if name in known:
        raise ValueError(f"{path} has {name} twice: give one of them another name")


def read_table(path=DATA / "experiments.toml"):
    """({name: Recipe}, {name: Run}, {name: networks}) of the table of experiments.

    The third are the ensembles: names of networks that vote together, in the order of the members.

    Raises ValueError where a name occurs twice or a network is missing.
    """
    table = tomllib.loads(pathlib.Path(path).read_text())
    schedule = [field.name for field in dataclasses.fields(Schedule)]
    models, runs = {}, {}
    entries = [_of_recipe(entry, table.get("recipe", {})) for entry in table["model"]]
    for name, fields in itertools.chain.from_iterable(map(expand, entries)):
        _check_new(name, models, path)
        options = {key: fields.pop(key) for key in schedule if key in fields}
        models[name] = Recipe(**fields, schedule=Schedule(**options))
    ensembles = {name: members.split() for name, members in table.get("ensembles", {}).items()}
    for name, members in ensembles.items():
        for member in members:
            check_choice(models, **{f"a member of {name}": member})
    for name, fields in itertools.chain.from_iterable(map(expand, table["record"])):
        _check_new(name, runs, path)
        if "of" in fields:
            check_choice(runs, of=fields["of"])
            same = {key: getattr(runs[fields["of"]], key) for key in ("model", "noise", "stride")}
            fields = same | fields
        check_choice([*models, *ensembles], model=fields["model"])
        (first, *_) = ensembles.get(fields["model"], [fields["model"]])
        engine = ENGINES.get(models[first].data, ENGINE) | fields.pop("engine", {})
        runs[name] = Run(**fields, engine=engine)
    return models, runs, ensembles


MODELS, RUNS, ENSEMBLES = read_table()


def recipe_of(name):
    """The recipe of a network, or of the first of an ensemble."""
    return MODELS[ENSEMBLES.get(name, [name])[0]]


def expand_readouts(text, header):
    """The names of the readouts of an ensemble that a table's text stands for.

    "member:*" is each member, "seeds:0-4" the soft vote of the members of these seeds,
    "subsets:0-4" that of every subset of these members, and a weighted vote without weights, such
    as "weighted:0-9", gets those that the checkpoint's header holds.

    - text: names with spaces between them. header: of the ensemble's checkpoint, with its members.
    """
    seeds, names = [member["seed"] for member in header["members"]], []
    for name in text.split():
        kind, members = name.split(":", 1)
        if members == "*":
            names += [f"{kind}:{i}" for i in range(len(seeds))]
        elif kind == "seeds":
            chosen = readout(f"soft:{members}").members
            names.append(Readout(sorted(seeds.index(seed) for seed in chosen)).name)
        elif kind == "subsets":
            every = readout(f"soft:{members}").members
            for size in range(1, len(every) + 1):
                names += [Readout(part).name for part in itertools.combinations(every, size)]
        elif ":" not in members and kind in VOTES and VOTES[kind].weighted:
            weights = ",".join(map(str, header["best_weights"]))
            names.append(readout(f"{name}:{weights}").name)
        else:
            names.append(readout(name).name)
    return names


# Logs that others published: in a packed file, or a file of their own and what is true of it.
METHODS = ("cohen", "stab", "salman", "macer", "consistency", "cat-rs")
PUBLISHED = {
    f"cifar10-resnet110-{method}-sigma{sigma:.2f}": "cifar10-resnet110"
    for method in METHODS
    for sigma in (0.25, 0.5, 1.0)
}
PUBLISHED |= {
    f"imagenet-resnet50-consistency-sigma{sigma:.2f}": {
        "sigma": sigma,
        "method": "consistency",
        "architecture": "ResNet-50",
        "data": "ImageNet validation, 500 images: 0, 100, ..., 49,900",
        "n0": 100,
        "n": 100_000,
        "alpha": 0.001,
        "source": "https://github.com/jh-jeong/smoothing-consistency",
        "licence": "MIT",
        "commit": "a11954aa91adb9924eecf49aaca74051e79bbb86",
        "path": f"data/certify/imagenet/consistency/cohen/num_2/lbd_5.0/{path}",
        "sha256": digest,
    }
    for sigma, path, digest in (
        (
            0.5,
            "eta_0.5/noise_0.50",
            "123a2c82fb044ace8db3776c1b6f84d651ebd4dcf421aaff40ab16ae73c3fc44",
        ),
        (
            1.0,
            "eta_0.1/noise_1.00",
            "5f0390cdfa227e6193fa9931c47e77d5c35a887928f984ab9d3595b9de322593",
        ),
    )
}
