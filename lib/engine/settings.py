"""The engine's settings of a run: chosen once, kept in its journal, checked when it continues."""

import logging
import os

import torch

from lib.checks import check_labels, difference
from lib.engine.classifier import BaseClassifier
from lib.engine.hardware import has_compiler
from lib.engine.processes import own_cores, rank
from lib.engine.readouts import Panel

messages = logging.getLogger("lib")
HASHES = {"model_sha256": "another network", "data_sha256": "other images"}
# What `BaseClassifier.settings` says.
SETTINGS = ("device", "processor", "dtype", "block", "layout", "folded", "compiled", "torch")


def changed(old, new):
    """How what was made differs from what is asked for, in words: "another network (...)"."""
    text = difference(old, new)
    what = HASHES.get(text.split()[0])
    return f"{what} ({text})" if what else text


def choose_engine(job):
    """The engine's settings, from the whole size of the run, so that resumed runs count alike."""
    if rank()[1] > 1:
        torch.set_num_threads(own_cores())
    chosen = _ready(job, job.engine)
    check_labels(job.labels[job.index], len(job.index), "labels", chosen.classes)
    chosen.consider_compiling(len(job.index) * job.sampler.most)
    return chosen.settings


def _device(job, engine):
    """The device asked for by number, else under torchrun each local rank its own GPU."""
    asked = str(job.engine.get("device") or engine["device"])
    several = asked == "cuda" and "LOCAL_RANK" in os.environ
    return f"cuda:{os.environ['LOCAL_RANK']}" if several else asked


def _ready(job, engine):
    """What votes in a run: a BaseClassifier, or the Panel of its readouts."""
    if job.readouts is None:
        return BaseClassifier(job.model, job.shape(), **engine)
    return Panel(list(job.model.members), job.readouts, job.shape(), engine)


def open_base(job, engine):
    """What votes in a run, with the engine's settings that it was begun with."""
    arguments = {
        "device": _device(job, engine),
        "dtype": engine["dtype"],
        "block": engine["block"],
        "layout": engine["layout"],
        "compile": engine["compiled"],
    }
    key = (job.settings["model_sha256"], job.readouts, *arguments.values())
    if key not in job.ready:
        if rank()[0] == 0:
            chosen = ", ".join(f"{name} {value}" for name, value in engine.items())
            messages.info("counting with %s", chosen)
            if engine["compiled"]:
                messages.info("compiling the network, once: until then nothing is counted")
        job.ready[key] = _ready(job, arguments)
    base = job.ready[key]
    begun, here = (part | {"processor": None} for part in (engine, base.settings))
    if begun != here:
        raise ValueError(
            f"{job.out} was made with {difference(begun, here)}: run it on the device and with "
            "the versions it was begun with"
        )
    return base


def with_processor(job, engine, here):
    """The engine's settings with this type of machine, `here`, among those of the run."""
    types = machine_types(engine)
    if here in types:
        return engine
    if "processor" in engine and os.environ.get("LOCAL_RANK", "0") == "0":
        messages.warning(
            "%s was begun on another type of machine (%s) and continues on %s: a few votes of "
            "bfloat16 and 8-bit networks differ between types, and its record lists both",
            job.out,
            engine["processor"],
            here,
        )
    return engine | {"processor": ", ".join([*types, here])}


def check_engine(job, engine):
    """Refuse what was asked of the engine where the run has begun with something else."""
    asked = {
        ("compiled" if name == "compile" else name): str(value).removeprefix("torch.")
        for name, value in job.engine.items()
    }
    if asked.get("compiled") == "True" and not has_compiler():
        del asked["compiled"]  # the run was told so, and is eager
    for name, value in asked.items():
        if name not in engine or value in ("None", "auto"):
            continue
        if str(engine[name]).split(":")[0] != value.split(":")[0]:
            raise ValueError(
                f"{job.out} was made with {name} = {engine[name]}, not {value}: leave it out, or "
                "give another --out"
            )


def machine_types(engine):
    """The types of machine that a run has been on; those of an older version did not say."""
    return engine.get("processor", "unknown").split(", ")
