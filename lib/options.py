"""Options of the command line: what a command offers, and the objects that it is given.

A group of options is a dataclass, or a registry, whose classes share the options of one name.
Examples and Engine are groups of several commands.
"""

import dataclasses
import functools
import inspect
import itertools
import os
import pathlib
import re
from difflib import get_close_matches
from typing import Annotated, Literal

import numpy as np
import typer

from lib import data as datasets
from lib import zoo
from lib.engine.classifier import DTYPES
from lib.engine.hardware import pick_device
from lib.ensemble import Ensemble
from lib.models import load_checkpoint, model_hash
from lib.noise import NOISES
from lib.sigma import load_sigma
from lib.store.inventory import in_words
from lib.store.registry import option


@dataclasses.dataclass(frozen=True)
class Examples:
    """Which examples of a data set are certified, by the conventions of Cohen et al.'s code."""

    split: str = option("test", "Part of the data set.", ("train", "test"))
    start: int = option(0, "First index in the data set.")
    stop: int | None = option(None, "End of the indices (not included).")
    skip: int = option(1, "Only indices that this divides: 20 takes 0, 20, 40, ...")
    max: int | None = option(None, "Stop at this index (as stop; -1: never).")

    def index(self, size):
        """The indices of the chosen examples. Where there are none, the usage is wrong."""
        if self.start < 0:
            raise ValueError(f"start must be >= 0; got {self.start}")
        if self.skip < 1:
            raise ValueError(f"skip must be >= 1; got {self.skip}")
        if self.stop is not None and self.stop < 0:
            raise ValueError(f"stop must be >= 0, or be left out; got {self.stop}")
        ends = [end for end in (self.stop, self.max) if end is not None and end >= 0]
        index = np.arange(min([size, *ends]))
        index = index[(index >= self.start) & (index % self.skip == 0)]
        if not len(index):
            given = {"start": self.start, "stop": self.stop, "skip": self.skip, "max": self.max}
            asked = ", ".join(f"{flag(k)} {v}" for k, v in given.items() if v is not None)
            raise typer.BadParameter(f"{asked} leave none of the {size} examples")
        return index


@dataclasses.dataclass(frozen=True)
class Engine:
    """How the network runs (lib.engine.classifier.BaseClassifier)."""

    device: str | None = option(None, "cpu, cuda, cuda:1; default a GPU where there is one.")
    dtype: str = option("auto", "Precision certified.", ("auto", *DTYPES))
    block: int | None = option(None, "Images per forward pass; default: measured.")
    layout: str | None = option(
        None, "Memory layout; default: measured.", ("channels_last", "contiguous")
    )
    compile: bool | None = option(None, "Default: where the job is long enough to pay for it.")
    tune: bool = option(True, "Measure what is fastest here (once, then cached).")

    def settings(self):
        """Arguments of BaseClassifier."""
        return {
            "device": self.device and pick_device(self.device),
            "dtype": None if self.dtype == "auto" else self.dtype,
            "block": self.block,
            "layout": self.layout,
            "compile": "auto" if self.compile is None else self.compile,
            "tune": self.tune,
        }


def with_options(function, groups):
    """A command that also offers the fields of groups, all of them optional.

    - function: takes them as keywords; those not given are left out.
    - groups: dataclasses and registries.

    Raises ValueError where a name would mean two things: a field of two groups, or one that is an
    option or argument of the command itself.
    """

    @functools.wraps(function)
    def offered(*args, **kwargs):
        return function(*args, **_given(kwargs, groups))

    own = [p for p in inspect.signature(function).parameters.values() if p.kind != p.VAR_KEYWORD]
    every = {p.name: p for p in own}
    itself = f"the command {function.__name__} itself"
    whose = {name: itself for name in ("help", *(name for p in own for name in _spellings(p)))}
    for group in groups:
        for parameter in parameters(group):
            name, owners = parameter.name, _in_words(group, fields(group)[parameter.name])
            if name in whose:
                raise ValueError(
                    f"{flag(name)} would be an option of {whose[name]} and of {owners}: rename the "
                    f"field {name} of your class"
                )
            whose[name], every[name] = owners, parameter
    offered.__signature__ = inspect.Signature(list(every.values()))
    offered.__annotations__ = {name: p.annotation for name, p in every.items()}
    return offered


def _spellings(parameter):
    """The names that a command's own option or argument takes: as_json and json for --json."""
    told, *_ = getattr(parameter.annotation, "__metadata__", [None])
    # Within Annotated, typer keeps the first spelling as `default`.
    given = [getattr(told, "default", None), *(getattr(told, "param_decls", None) or ())]
    given = [each.lstrip("-").replace("-", "_") for each in given if isinstance(each, str)]
    return [parameter.name, *given]


def _in_words(group, owners):
    """Which classes of a group, for an error message: "the noise Gaussian, Laplace"."""
    if not isinstance(group, dict):
        return group.__name__
    return f"the {group.kind} {', '.join(group[name].__name__ for name in owners)}"


def _given(kwargs, groups):
    """The arguments of a command without the options of its groups that were not given."""
    optional = {name for group in groups for name in fields(group)}
    return {k: v for k, v in kwargs.items() if v is not None or k not in optional}


def fields(group):
    """{option: {name of each registered class that has it: field}} of a group."""
    classes = group.items() if isinstance(group, dict) else [("", group)]
    fields = {}
    for name, cls in classes:
        for field in dataclasses.fields(cls):
            fields.setdefault(field.name, {})[name] = field
    return fields


def parameters(group):
    """The fields of a group as parameters of a command, all of them optional.

    Where the classes that have a field differ in its type, it is text, which `take` reads.
    Raises ValueError where it is a switch (bool) in some and takes a value in others.
    """
    for name, owners in fields(group).items():
        kinds = {_type(field) for field in owners.values()}
        if bool in kinds and len(kinds) > 1:
            raise ValueError(
                f"{flag(name)} would be a switch (bool) of some and take a value of others of "
                f"{_in_words(group, owners)}: rename the field {name} of your class"
            )
        every = [field.metadata.get("choices") for field in owners.values()]
        kind = kinds.pop() if len(kinds) == 1 else str
        kind = Literal[*itertools.chain(*every)] if all(every) else kind
        names = [f"{flag(name)}/--no-{flag(name)[2:]}" if kind is bool else flag(name)]
        names += [f"--{name.upper()}"] if name in ("n", "n0") else []
        annotation = Annotated[kind | None, typer.Option(*names, help=_help(group, owners))]
        yield inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
        )


def _help(group, owners):
    """The help of an option: for each meaning and default that it has, whose they are.

    - owners: {name of a class of the group: its field}.
    """
    meanings = {}
    for owner, field in owners.items():
        text = field.metadata.get("help") or f"Of the {group.kind}."
        default = None if field.default is dataclasses.MISSING else field.default
        meanings.setdefault((text, default), []).append(owner)
    if len(meanings) == 1:
        ((text, default), names), *_ = meanings.items()
        text += "" if default in (None, "") else f" [dim]default {_short(default)}[/]"
        everyone = not isinstance(group, dict) or len(names) == len(group)
        return text if everyone else f"{', '.join(names)}: {text}"
    parts = []
    for (text, default), names in meanings.items():
        end = "" if default in (None, "") else f", [dim]default {_short(default)}[/]"
        parts.append(f"{', '.join(names)}: {text.removesuffix('.')}{end}")
    return "; ".join(parts) + "."


def _short(default):
    """A default as the help shows it: 10 / 150 with three digits."""
    return f"{default:.3g}" if isinstance(default, float) and len(str(default)) > 8 else default


def _type(field):
    """The plain type of a field: float for `float | None` or `float | np.ndarray`."""
    types = getattr(field.type, "__args__", (field.type,))
    return next(each for each in (bool, int, float, str) if each in types)


def take(options, group, name=None):
    """Make the member of a group that the options describe, and remove those options.

    - group: a registry, or a dataclass. name: of a class of the registry; of a dataclass None.
    """
    cls = group if name is None else group[name]
    own = {field.name: field for field in dataclasses.fields(cls)}
    needed = [key for key, field in own.items() if field.default is dataclasses.MISSING]
    if missing := [key for key in needed if key not in options]:
        raise typer.BadParameter(f"{group.kind} {name} needs {flag(missing[0])}")
    for key, owners in fields(group).items():
        if key in options and key not in own:
            has = ", ".join(map(flag, own)) or "none"
            raise typer.BadParameter(
                f"{flag(key)} is not of the {group.kind} {name} (its options: {has}); "
                f"{flag(key)} is of {', '.join(owners)}"
            )
    return cls(**{key: _read(own[key], options.pop(key)) for key in own if key in options})


def _read(field, value):
    """An option's value as the field of the chosen class says: that of another class may differ."""
    kind, choices = _type(field), field.metadata.get("choices")
    try:
        value = kind(value)
    except ValueError as error:
        what = "a whole number" if kind is int else "a number"
        raise typer.BadParameter(f"{flag(field.name)} takes {what}; got {value}") from error
    if choices and value not in choices:
        raise typer.BadParameter(
            f"{flag(field.name)} must be one of {', '.join(choices)}; got {value}"
        )
    return value


def flag(name):
    """An option as it is given."""
    return f"--{name.replace('_', '-')}"


def usage_error(error, function, given):
    """The error of wrong usage behind a ValueError that says what an option must be, or None.

    - function: the command, whose parameters are its options and arguments. given: their values.
    """
    found = re.match(r"(\w+) must ", str(error))
    if not found or given.get(found[1]) is None:
        return None
    told = getattr(inspect.signature(function).parameters[found[1]].annotation, "__metadata__", ())
    if any(isinstance(each, typer.models.ArgumentInfo) for each in told):
        return None
    return typer.BadParameter(str(error).replace(found[1], flag(found[1]), 1))


def check_suffix(path, suffix, option="--out"):
    """Refuse to write a file of a kind that its name does not tell."""
    if path.suffix != suffix:
        raise typer.BadParameter(f"{option} must end in {suffix}; got {path}")


def check_report(logs, png):
    """Refuse a log given twice, and a picture that would overwrite one."""
    files = [path.resolve() for path in logs]
    if twice := [str(path) for i, path in enumerate(logs) if files[i] in files[:i]]:
        raise typer.BadParameter(f"{twice[0]} is given twice: give each log once")
    if png is not None:
        check_suffix(png, ".png", "--png")
        if png.resolve() in files:
            raise typer.BadParameter(f"--png {png} is one of the logs: give another file")


def data_set(text):
    """The value of --data: the name of a data set, or FILE.npz."""
    if text not in datasets.INFO and not datasets.is_file(text):
        names = ", ".join(datasets.INFO)
        raise typer.BadParameter(f"{text} is none of {names}, and no FILE.npz of your own images")
    return text


def data_file(data, path):
    """Where the images are read from: FILE.npz of --data, or --data-path."""
    if not datasets.is_file(data):
        return path
    if path is not None:
        raise typer.BadParameter(f"--data {data} is itself the file: leave out --data-path")
    return data


def load_model(spec, architecture=None, data=None):
    """(module, header) of a checkpoint file or of a network of the zoo.

    - data: a name, or a file of your own images; the header's is then the name of these.
    """
    own, data = datasets.is_file(data), datasets.name_of(data)
    if pathlib.Path(spec).is_file():
        network, header = load_checkpoint(spec, architecture, data)
    elif spec in zoo.MODELS:
        recipe = zoo.MODELS[spec]
        header = {"architecture": recipe.architecture, "data": recipe.data, "noise": recipe.noise}
        network = zoo.model(spec)
    else:
        raise FileNotFoundError(_no_model(spec))
    if not datasets.fits(data, header["data"]):
        raise ValueError(
            f"data must be {header['data']}, which {spec} was trained on, or be left out; "
            f"got {data}"
        )
    if own:
        facts = datasets.info(header["data"])
        header = header | {"data": datasets.own_name(facts.shape, facts.classes)}
    return network, header


def _no_model(spec):
    """Why there is no such network: it looks like a path, or like a name of the zoo."""
    path = pathlib.Path(spec)
    if path.is_dir():
        return f"{spec} is a folder: give a checkpoint in it"
    # The names of the zoo have points, too, before digits.
    if "/" in spec or path.name != spec or path.suffix[1:2].isalpha():
        return f"{spec} does not exist: give the path of a checkpoint, or a name of the zoo"
    near = ", ".join(get_close_matches(spec, zoo.MODELS, 3, 0))
    return f"model {spec} is neither a file nor a name of the zoo; the nearest names are {near}"


def load_ensemble(specs, vote, weights, consensus, architecture=None, data=None):
    """(module, header) of one network as it is, or of several as a lib.ensemble.Ensemble."""
    loaded = [load_model(spec, architecture, data) for spec in specs]
    network, header = loaded[0]
    if len(loaded) == 1 and {vote, weights, consensus} == {None}:
        return network, header
    members = [network for network, _ in loaded]
    if len(loaded) == 1 and isinstance(network, Ensemble):
        members = network.members
    names = sorted({header["data"] for _, header in loaded})
    if len(names) > 1:
        raise ValueError(f"model must be networks of one data set; got {', '.join(names)}")
    try:
        weights = None if weights is None else [float(weight) for weight in weights.split(",")]
    except ValueError as error:
        raise typer.BadParameter(
            f"--weights takes numbers between commas; got {weights}"
        ) from error
    return Ensemble(members, vote or "soft", weights, consensus), header


def say_other_noise(header, noise, say):
    """Say where a network was made for another noise than it is certified under."""
    (header, *_) = header.get("members", [header])
    made = header.get("noise")
    if made is None and isinstance(header.get("sigma"), float):
        made = {"name": "Gaussian", "sigma": header["sigma"]}
    if made is not None and made != noise.describe():
        say(
            f"note: the network was made for noise {in_words(made)}, and is certified under "
            f"{in_words(noise.describe())}"
        )


def short_names(paths):
    """The paths without the folders that they share, so that a narrow column tells them apart."""
    if len(paths) < 2:
        return list(paths)
    shared = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    return [os.path.relpath(path, shared) for path in paths]


def load_levels(path, steps, network, images, index):
    """The noise of a sigma file for the examples to certify, which it must hold."""
    hashes = {
        "model_sha256": model_hash(network),
        "data_sha256": datasets.content_hash(images),
    }
    found = load_sigma(path, **hashes)
    if missing := sorted(set(index.tolist()) - set(found.index.tolist())):
        raise ValueError(
            f"{path} has no level for example {missing[0]}, the first of {len(missing)}: "
            "give `certify` the --start, --stop and --skip of `sigma`"
        )
    levels = found.levels[-1] if steps is None else found.at(steps)
    rows = np.searchsorted(found.index, index)
    return NOISES[found.header["noise"]](levels[rows])


def check_sigma_file(path, steps, noise, options):
    """Refuse options that a sigma file, or the lack of one, leaves without effect."""
    if path is None and steps is not None:
        raise typer.BadParameter(
            "--sigma-steps chooses among the levels of a file: it needs --sigma-file"
        )
    own = [*(["noise"] if noise else []), *(name for name in options if name in fields(NOISES))]
    if path is not None and own:
        raise typer.BadParameter(
            f"--sigma-file holds the noise and its levels: leave out {flag(own[0])}"
        )
