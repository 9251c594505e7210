"""Runs that survive anything: resumed after a kill, sharded over processes, continued later.

Files of a run with log OUT:
  OUT.journal         the run itself (lib.store.journal): one line per finished example, with its
                      certificate and the votes of each stage; OUT.journal.part1, ... of the other
                      processes of a run, taken over when it ends or is started again
  OUT, OUT.npz        the log and the record of all votes, written from the journal at the end
A run that only records votes has no log, and no journal once its record is written.
"""

import contextlib
import dataclasses
import datetime
import json
import logging
import os
import pathlib
import re
import time

import numpy as np
import torch
from torch.distributed.rendezvous import rendezvous
from tqdm.auto import tqdm

from lib.checks import check_labels, check_request, difference
from lib.data import content_hash
from lib.engine.classifier import BaseClassifier
from lib.engine.hardware import has_compiler
from lib.engine.live import ModelCounts
from lib.engine.readouts import Panel
from lib.models import model_hash
from lib.store.journal import Journal, read_journal
from lib.store.logs import journal_table, write_log
from lib.store.records import load_counts, save_counts

messages = logging.getLogger("lib")
BLOCKS = 20  # full blocks a group of examples should fill, so that the padding of its last is lost


@dataclasses.dataclass(frozen=True)
class Job:
    """What to certify.

    - model: nn.Module; name: what it is called in the record.
    - images: float32 [N, channels, height, width] in [0, 1], or any object with len() and
      content_hash() that gives as much when indexed by an int array.
    - labels: int64 [N] of the whole data set.
    - index: int [B], the examples to certify, ascending.
    - sampler: as those of lib.samplers (first, most, fixed, describe(), and a call).
    - noise: smoothing distribution, of one level or one per example of `index`.
    - seed: of the noise.
    - out: path of the log.
    - settings: flat dict of what else is to be kept in the record and compared when the run is
      resumed (data set, split, ...).
    - engine: arguments of BaseClassifier (device, dtype, block, layout, compile, ...), None or
      "auto" where it is to choose.
    - readouts: of a `model` that is an Ensemble, how its networks vote (lib.engine.readouts): the
      name of one, or a tuple of names, whose votes are recorded in one pass.

    Raises ValueError naming index, labels, noise or readouts.
    """

    model: torch.nn.Module
    name: str
    images: object
    labels: np.ndarray
    index: np.ndarray
    sampler: object
    noise: object
    seed: int
    out: pathlib.Path
    settings: dict = dataclasses.field(default_factory=dict)
    engine: dict = dataclasses.field(default_factory=dict)
    readouts: str | tuple | None = None

    def __post_init__(self):
        size = len(self.images)
        index = check_labels(self.index, len(self.index), "index", size)
        if (np.diff(index) <= 0).any():
            raise ValueError("index must be ascending, each example once")
        if self.noise.size not in (None, len(index)):
            raise ValueError(
                f"noise must have one level, or {len(index)}, one per example of index; "
                f"got {self.noise.size}"
            )
        known = {
            "model_sha256": model_hash(self.model),
            "data_sha256": content_hash(self.images),
            "noise": self.noise.describe(),
            "sampler": self.sampler.describe(),
            "fixed_draws": self.sampler.fixed,
            "seed": self.seed,
        }
        if self.readouts is not None:
            known |= self._checked_readouts()
        object.__setattr__(self, "index", index)
        object.__setattr__(self, "labels", check_labels(np.asarray(self.labels), size, "labels"))
        object.__setattr__(self, "out", pathlib.Path(self.out))
        object.__setattr__(self, "settings", self.settings | known)

    def _checked_readouts(self):
        """The readouts as settings: {"readout": name} or {"readouts": [names]}."""
        if not hasattr(self.model, "members"):
            raise ValueError("readouts must be left out for a model that is no Ensemble")
        if isinstance(self.readouts, str):
            return {"readout": self.readouts}
        if self.certifies:
            raise ValueError(
                "readouts must be one to be certified; several are recorded by the sampler record"
            )
        return {"readouts": list(self.readouts)}

    @property
    def certifies(self):
        """Whether the run makes certificates, or only records votes."""
        return getattr(self.sampler, "certifies", True)

    def path(self, suffix):
        return self.out.with_name(self.out.name + suffix)

    def shape(self):
        return tuple(self.images[self.index[:1]].shape[1:])


def rank():
    """(rank, number of processes) of this run, from torchrun's environment; (0, 1) without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def run(job):
    """Certify what is not yet certified; returns how many examples all processes did.

    Started again after a kill, with as many processes or others, it continues where it stopped. The
    finished log and record are the same in all cases but for the log's time column. A finished run
    continues with more examples, and under a sampler of fixed draws with more draws: the result is
    that of a run with as many from the start. Whether to continue must not be decided by what was
    certified, else alpha does not hold.

    A run may continue, or run at once, on machines of several types (`processor` of the engine's
    settings). It warns, and the record lists them in the order they came. A few votes may then
    differ from those of one type (see ModelCounts), and what a certificate bounds is the mean of
    the types' probabilities, each with its share of the draws.

    Raises ValueError naming the setting in which a run on disk differs from this one, and on
    damaged files; OSError where the disk fails.
    """
    me, processes = rank()
    if processes == 1:
        with _opened(job) as (journal, plan):
            _work(job, plan, journal, plan["todo"], journal.entries)
            _finish(job, journal)
        return len(plan["todo"])
    group = _Group(me, processes)
    with contextlib.ExitStack() as stack:
        opened = {}

        def prepare():
            opened["journal"], plan = stack.enter_context(_opened(job))
            return plan

        plan = group.agree("prepared", prepare)
        if job.settings != plan["settings"]:
            changed = difference(plan["settings"], job.settings)
            raise ValueError(f"rank {me} has other settings than rank 0: {changed}")
        local = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
        torch.set_num_threads(max(1, _cores() // local))
        journal = opened.get("journal") or stack.enter_context(
            Journal(job.path(f".journal.part{me}"))
        )
        # What rank 0 adds meanwhile is not of this rank's share.
        entries = read_journal(job.path(".journal"))[1] if me else journal.entries
        _work(job, plan, journal, plan["todo"][me::processes], entries)
        group.arrive("certified")
        group.agree("merged", lambda: _finish(job, opened["journal"]))
        group.arrive("ended")
    return len(plan["todo"])


class _Group:
    """The few messages between the processes of a run, through torchrun's key-value store.

    A process group of gloo or nccl would do it, too. But its threads now and then end a process
    with an abort at its exit, and it must find a network interface on machines with several.
    """

    def __init__(self, me, processes):
        # The ranks may end days apart. (Milliseconds in 31 bits last for 24.)
        self.store = next(rendezvous("env://", timeout=datetime.timedelta(days=20)))[0]
        self.me, self.processes = me, processes

    def agree(self, name, function):
        """The result (JSON) of rank 0's call, on all ranks; its error ends all of them."""
        if self.me == 0:
            try:
                result = function()
            except (ValueError, OSError):
                self.store.set(name, "null")
                raise
            self.store.set(name, json.dumps([result]))
        result = json.loads(self.store.get(name))
        if result is None:
            raise SystemExit(1)  # rank 0 alone reports the error
        return result[0]

    def arrive(self, name):
        """Say that this process has come so far; rank 0 waits for all of them."""
        self.store.set(f"{name}-{self.me}", "")
        if self.me == 0:
            self.store.wait([f"{name}-{i}" for i in range(self.processes)])


def _cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


@contextlib.contextmanager
def _opened(job):
    """(journal, {"settings", "engine", "todo": indices not done}) of a run, locked within."""
    path = job.path(".journal")
    stray = [p for p in (job.out, job.path(".npz"), *_parts(job)) if p.exists()]
    adopt = not job.certifies and job.path(".npz").exists()
    if not path.exists() and stray and not adopt:
        raise ValueError(
            f"{stray[0]} exists, but not how it was made ({path.name}): give another --out, "
            "or move it away"
        )
    with Journal(path) as journal:
        journal.absorb(_parts(job), _joined)
        if not journal.entries:
            journal.clear()
            if adopt:
                _adopt_record(job, journal)
            else:
                engine = _choose_engine(job)
                made = {"model": job.name, "settings": job.settings, "engine": engine}
                journal.begin(made)
        yield journal, _continued(job, journal) | {"todo": _todo(job, journal)}


def _parts(job):
    """Journals of this run's other processes."""
    pattern = re.compile(re.escape(job.out.name) + r"\.journal\.part\d+")
    if not job.out.parent.exists():
        return []
    return sorted(path for path in job.out.parent.iterdir() if pattern.fullmatch(path.name))


def _joined(made, part):
    """How a run is made, from its journal and that of a part: the part was begun with it, or after.

    A part of an older version does not say.
    """
    if not (made and part):
        return part or made
    types = _types(made["engine"])
    types += [kind for kind in _types(part["engine"]) if kind not in types]
    return part | {"engine": part["engine"] | {"processor": ", ".join(types)}}


def _types(engine):
    """The types of machine that a run has been on; those of an older version did not say."""
    return engine.get("processor", "unknown").split(", ")


def _adopt_record(job, journal):
    """Begin the journal of a run that records votes with those of its record."""
    record = load_counts(job.path(".npz"))
    engine = {name: record.header.get(name) for name in _choose_engine(job)}
    if engine["processor"] is None:
        del engine["processor"]  # the record is of an older version
    settings = {name: record.header.get(name) for name in job.settings}
    made = {"model": record.header["model"], "settings": settings, "engine": engine}
    journal.begin(made)
    columns = {}
    if "evaluations" in record.header:
        columns = {"evaluations": np.array(record.header["evaluations"]).T.tolist()}
    journal.append(
        [
            {"idx": int(i), "label": int(label), "votes": [record.counts[..., row, :].tolist()]}
            | {name: column[row] for name, column in columns.items()}
            for row, (i, label) in enumerate(zip(record.index, record.labels, strict=True))
        ]
    )


def _continued(job, journal):
    """How the run is made from here on: as its journal says, with what the job asks beyond it.

    The journal says so from the first results on: what was asked by mistake, and stopped before
    them, binds nobody.
    """
    made = journal.made
    old, new = made["settings"], job.settings
    extended = _extends(job, old["sampler"], new["sampler"])
    if old | ({"sampler": new["sampler"]} if extended else {}) != new:
        raise ValueError(
            f"{job.out} was made with {difference(old, new)}: use the old setting, or give another "
            "--out"
        )
    if foreign := sorted(set(journal.entries) - set(job.index.tolist())):
        raise ValueError(
            f"{job.out} holds example {foreign[0]}, which this run does not ask for: give another "
            "--out"
        )
    _check_engine(job, made["engine"])
    _check_results(job, journal)
    return made | {"settings": new}


def _extends(job, old, new):
    """Whether a sampler differs in its number of draws alone, which is fixed, and larger now."""
    if not (job.sampler.fixed and old and "n" in new):
        return False
    return old | {"n": None} == new | {"n": None} and old["n"] < new["n"]


def _check_engine(job, engine):
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


def _check_results(job, journal):
    """Refuse a log or a record beside the journal that are not this run's."""
    record = job.path(".npz")
    if record.exists():
        header = load_counts(record).header
        for name, value in journal.made["settings"].items():
            if name != "sampler" and header.get(name) != value:
                raise ValueError(
                    f"{record} is of another run, with {name} = {header.get(name)!r}, not "
                    f"{value!r}: give another --out, or move it away"
                )


def _done(job, entry):
    """Whether an example has all draws that the job asks for."""
    if not job.sampler.fixed:
        return True
    drawn = sum(int(_drawn(np.asarray(v)[..., None, :])[0]) for v in entry["votes"])
    if drawn > job.sampler.most:
        raise ValueError(
            f"{job.out} holds {drawn} draws of example {entry['idx']}, more than the "
            f"{job.sampler.most} of this run: ask for as many, or give another --out"
        )
    return drawn == job.sampler.most


def _todo(job, journal):
    entries = journal.entries
    return [i for i in job.index.tolist() if i not in entries or not _done(job, entries[i])]


def _choose_engine(job):
    """The engine's settings, from the whole size of the run, so that resumed runs count alike."""
    if rank()[1] > 1:
        torch.set_num_threads(_cores())
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


def _base(job, engine):
    """What votes in a run, with the engine's settings that it was begun with."""
    base = _ready(
        job,
        {
            "device": _device(job, engine),
            "dtype": engine["dtype"],
            "block": engine["block"],
            "layout": engine["layout"],
            "compile": engine["compiled"],
        },
    )
    if rank()[0] == 0:
        chosen = ", ".join(f"{name} {value}" for name, value in engine.items())
        messages.info("counting with %s", chosen)
    begun, here = (part | {"processor": None} for part in (engine, base.settings))
    if begun != here:
        raise ValueError(
            f"{job.out} was made with {difference(begun, here)}: run it on the device and with "
            "the versions it was begun with"
        )
    return base


def _with_processor(job, engine, here):
    """The engine's settings with this type of machine, `here`, among those of the run."""
    types = _types(engine)
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


def _work(job, plan, journal, mine, entries):
    """Certify the examples `mine`, appending each group to the journal.

    - entries: what earlier runs left of them.
    """
    if not mine:
        return
    base = _base(job, plan["engine"])
    engine = _with_processor(job, plan["engine"], base.settings["processor"])
    made = {"model": plan["model"], "settings": plan["settings"], "engine": engine}
    # A fixed number of draws fills blocks by itself; of an adaptive sampler the first stage must.
    draws = job.sampler.most if job.sampler.fixed else job.sampler.first
    size = max(1, -(-BLOCKS * base.block // draws))
    quiet = None if rank()[0] == 0 else True
    with tqdm(total=len(mine), unit=" examples", disable=quiet, smoothing=0.05) as bar:
        for first in range(0, len(mine), size):
            group = mine[first : first + size]
            journal.append(_certify_group(job, base, group, entries), made)
            bar.update(len(group))


def _drawn(votes):
    """Draws [B] behind votes [B, C] or [R, B, C]: every readout counts the same draws."""
    totals = votes.sum(axis=-1)
    return totals[0] if votes.ndim == 3 else totals


class _Staged:
    """A source that keeps the votes of each call, and begins with those of an earlier run."""

    def __init__(self, source, stages):
        self._source, self._had, self.stages = source, stages, []
        self.noise, self.classes = source.noise, source.classes

    def __len__(self):
        return len(self._source)

    def draw(self, n):
        n = check_request(n, len(self))
        stage = len(self.stages)
        if stage < len(self._had):
            had = self._had[stage]
            more = n - _drawn(had)
            # Of examples that are new to the run, any number of draws is the first.
            if stage < len(self._had) - 1 and more[_drawn(had) > 0].any():
                raise ValueError("n0 must be that of the earlier run: its votes came after it")
            votes = had + self._source.draw(more)
        else:
            votes = self._source.draw(n)
        self.stages.append(votes)
        return votes


def _certify_group(job, base, group, entries):
    """Journal entries of a group of examples, each with the votes of every stage."""
    start = time.perf_counter()
    index = np.array(group)
    labels = job.labels[index]
    noise = job.noise.select(np.searchsorted(job.index, index))
    source = ModelCounts(base, job.images[index], noise, index=index, seed=job.seed, progress=False)
    stages = _stages(group, entries, source.votes)
    source.votes += sum(stages)
    for i, example in enumerate(group):
        source.evaluations[..., i] += entries.get(example, {}).get("evaluations", 0)
    counts = _Staged(source, stages)
    certificates = job.sampler(counts, noise)
    drawn = _drawn(source.votes)
    if (drawn > job.sampler.most).any():
        raise ValueError(
            f"sampler took {drawn.max()} draws of an example, more than the {job.sampler.most} "
            "that it states (most)"
        )
    seconds = (time.perf_counter() - start) * drawn / max(1, drawn.sum())
    return [
        {
            "idx": int(index[i]),
            "label": int(labels[i]),
            "predict": int(certificates.prediction[i]),
            "radius": float(certificates.radius[i]),
            "n": int(certificates.n[i]),
            "time": float(seconds[i]),
            "votes": [stage[..., i, :].tolist() for stage in counts.stages],
        }
        | ({} if job.readouts is None else {"evaluations": source.evaluations[..., i].tolist()})
        for i in range(len(group))
    ]


def _stages(group, entries, like):
    """The votes that earlier runs left of a group, stage by stage, each of the shape of `like`."""
    old = [entries[i]["votes"] if i in entries else [] for i in group]
    stages = []
    for stage in range(max(map(len, old))):
        votes = np.zeros_like(like)
        for i, left in enumerate(old):
            if stage < len(left):
                votes[..., i, :] = left[stage]
        stages.append(votes)
    return stages


def _finish(job, journal):
    """Write log and record from the journal; returns how many examples they hold."""
    journal.absorb(_parts(job), _joined)
    missing = _todo(job, journal)
    if missing:
        raise ValueError(
            f"{job.path('.journal')} lacks {len(missing)} examples, the first {missing[0]}: run "
            "the same command again"
        )
    entries = [journal.entries[int(i)] for i in job.index]
    votes = [np.sum([np.asarray(stage) for stage in entry["votes"]], axis=0) for entry in entries]
    labels = job.labels[job.index]
    header = {"model": job.name} | job.settings | journal.made["engine"]
    if job.readouts is not None:
        header["evaluations"] = np.array([entry["evaluations"] for entry in entries]).T.tolist()
    save_counts(job.path(".npz"), np.stack(votes, axis=-2), job.index, labels, **header)
    if job.certifies:
        write_log(job.out, journal_table(entries))
    else:
        journal.path.unlink()
    return len(entries)
