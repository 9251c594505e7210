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
import os
import pathlib
import re
import time

import numpy as np
import torch

from lib.checks import check_images, check_labels, check_seed
from lib.data import content_hash
from lib.engine.probe import check_probe, probe
from lib.engine.processes import Group, own_cores, rank
from lib.engine.progress import progress_bar
from lib.engine.settings import (
    SETTINGS,
    changed,
    check_engine,
    choose_engine,
    machine_types,
    open_base,
    with_processor,
)
from lib.engine.stages import certify_group, drawn_of
from lib.models import model_hash
from lib.noise import Noise
from lib.store.journal import Journal, read_journal
from lib.store.logs import journal_table, write_log
from lib.store.records import load_counts, save_counts

BLOCKS = 20  # full blocks a group of examples should fill, so that the padding of its last is lost


@dataclasses.dataclass(frozen=True)
class Job:
    """What to certify.

    - model: nn.Module; name: what it is called in the record.
    - images: float32 [N, channels, height, width] in [0, 1], a tensor or a numpy array, or any
      object with len() and content_hash() that gives as much when indexed by an int array.
    - labels: int64 [N] of the whole data set.
    - index: int [B], the examples to certify, ascending.
    - sampler: as those of lib.samplers (first, most, fixed, describe(), and a call).
    - noise: smoothing distribution, of one level or one per example of `index`.
    - seed: of the noise.
    - out: path of the log.
    - settings: flat dict of what else is to be kept in the record and compared when the run is
      resumed (data set, split, ...), or None.
    - engine: arguments of BaseClassifier (device, dtype, block, layout, compile, ...), None or
      "auto" where it is to choose.
    - readouts: of a `model` that is an Ensemble, how its networks vote (lib.engine.readouts): the
      name of one, or a tuple of names, whose votes are recorded in one pass.
    - ready: a dict in which runs of one network, which nobody changes meanwhile, share what was
      made ready of it, so that it is compiled once.

    Raises ValueError naming model, images, labels, index, sampler, noise, seed or readouts.
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
    ready: dict = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        _check_parts(self)
        check_seed(self.seed)
        object.__setattr__(self, "images", _checked_images(self.images))
        size, index = len(self.images), np.asarray(self.index)
        if not index.size:
            raise ValueError("index must name at least one example; got none")
        index = check_labels(index, index.size, "index", size)
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
        object.__setattr__(self, "settings", (self.settings or {}) | known)
        object.__setattr__(self, "engine", self.engine or {})

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


def _check_parts(job):
    """Refuse what is no network, sampler or noise, and say what to give."""
    network, noise = isinstance(job.model, torch.nn.Module), isinstance(job.noise, Noise)
    sampler = hasattr(job.sampler, "describe") and not isinstance(job.sampler, type)
    for name, fits, remedy in (
        ("model", network, "a torch.nn.Module from images to logits: wrap a function in one"),
        ("sampler", sampler, "one of lib.samplers with its options, such as Certify(n=100_000)"),
        ("noise", noise, "a distribution of lib.noise with its level, such as Gaussian(0.25)"),
    ):
        if not fits:
            part = getattr(job, name)
            got = getattr(part, "__name__", type(part).__name__)
            raise ValueError(f"{name} must be {remedy}; got {got}")


def _checked_images(images):
    """Images as a run takes them. Raises ValueError naming images."""
    if isinstance(images, np.ndarray):
        images = torch.from_numpy(images)
    if isinstance(images, torch.Tensor):
        try:
            check_images(images)
        except ValueError as error:
            raise ValueError(f"images: {error}") from error
    elif not hasattr(images, "content_hash"):
        raise ValueError(
            "images must be float32 [N, channels, height, width] in [0, 1], a tensor or a numpy "
            f"array (lists: torch.stack them); got {type(images).__name__}"
        )
    return images


def run(job, say=None):
    """Certify what is not yet certified; returns how many examples all processes did.

    - say: called at the end, by rank 0, with a line on what was done.

    Started again after a kill, with as many processes or others, it continues where it stopped. The
    finished log and record are the same in all cases but for the log's time column. A finished run
    continues with more examples (where the noise has one level), and under a sampler of fixed draws
    with more draws: the result is that of a run with as many from the start. Whether to continue
    must not be decided by what was certified, else alpha does not hold.

    A run may continue, or run at once, on machines of several types (`processor` of the engine's
    settings). It warns, and the record lists them in the order they came. A few votes may then
    differ from those of one type (see ModelCounts), and what a certificate bounds is the mean of
    the types' probabilities, each with its share of the draws.

    Raises ValueError naming the setting in which a run on disk differs from this one, and on
    damaged files; OSError where the disk fails.
    """
    (me, processes), begin = rank(), time.perf_counter()
    if processes == 1:
        with _opened(job) as (journal, plan):
            _work(job, plan, journal, plan["todo"], journal.entries)
            _finish(job, journal)
        if say:
            say(_summary(job, plan, time.perf_counter() - begin))
        return len(plan["todo"])
    group = Group(me, processes)
    with contextlib.ExitStack() as stack:
        opened = {}

        def prepare():
            opened["journal"], plan = stack.enter_context(_opened(job))
            return plan

        plan = group.agree("prepared", prepare)
        if job.settings != plan["settings"]:
            found = changed(plan["settings"], job.settings)
            raise ValueError(f"rank {me} has other settings than rank 0: {found}")
        local = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
        torch.set_num_threads(max(1, own_cores() // local))
        journal = opened.get("journal") or stack.enter_context(
            Journal(job.path(f".journal.part{me}"))
        )
        # What rank 0 adds meanwhile is not of this rank's share.
        entries = read_journal(job.path(".journal"))[1] if me else journal.entries
        _work(job, plan, journal, plan["todo"][me::processes], entries)
        group.arrive("certified")
        group.agree("merged", lambda: _finish(job, opened["journal"]))
        group.arrive("ended")
    if say and me == 0:
        say(_summary(job, plan, time.perf_counter() - begin))
    return len(plan["todo"])


def _summary(job, plan, seconds):
    """What a run did, in a line: examples that are new to it, and those that got more draws."""
    had, verb = plan["had"], "certified" if job.certifies else "recorded"
    new, parts = len(plan["todo"]) - len(had), []
    if new or not had:
        parts = [f"{new:,} examples {verb}"]
    if had:
        least, most = (f"{draws:,}" for draws in (min(had), max(had)))
        begun = least if least == most else f"{least} to {most}"
        parts.append(f"{len(had):,} examples continued from {begun} to {job.sampler.most:,} draws")
    before = len(job.index) - len(plan["todo"])
    return f"{' and '.join(parts)} in {seconds:.1f} s, {before:,} were done before"


@contextlib.contextmanager
def _opened(job):
    """(journal, how the run is made and what there is to do) of a run, locked within.

    Beside "settings" and "engine", the latter says "todo", the indices not done, and "had", the
    draws of those among them that have some.
    """
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
                engine = choose_engine(job)
                made = {"model": job.name, "settings": job.settings, "engine": engine}
                journal.begin(made | {"probe": probe(job)})
        plan = _continued(job, journal) | {"todo": _todo(job, journal)}
        begun = [journal.entries[i] for i in plan["todo"] if i in journal.entries]
        yield journal, plan | {"had": [_drawn(entry) for entry in begun]}


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
    types = machine_types(made["engine"])
    types += [kind for kind in machine_types(part["engine"]) if kind not in types]
    return part | {"engine": part["engine"] | {"processor": ", ".join(types)}}


def _adopt_record(job, journal):
    """Begin the journal of a run that records votes with those of its record."""
    record = load_counts(job.path(".npz"))
    engine = {name: record.header.get(name) for name in SETTINGS}
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
            f"{job.out} was made with {changed(old, new)}: use the old setting, or give another "
            f"--out{_replay_instead(job, old)}"
        )
    if foreign := sorted(set(journal.entries) - set(job.index.tolist())):
        raise ValueError(
            f"{job.out} holds example {foreign[0]}, which this run does not ask for: give another "
            "--out"
        )
    check_engine(job, made["engine"])
    if journal.entries and "probe" in made:  # not in those of an older version
        check_probe(job, made["probe"])
    _check_results(job, journal)
    return made | {"settings": new}


def _replay_instead(job, old):
    """What to do where the run's record answers what is asked: only the sampler is another."""
    fixed, record = {"sampler", "fixed_draws"}, job.path(".npz")
    same = all(old.get(name) == value for name, value in job.settings.items() if name not in fixed)
    if not (same and job.certifies and old.get("fixed_draws") and record.exists()):
        return ""
    return f". Or replay its votes under another sampler, n or alpha: python -m lib replay {record}"


def _extends(job, old, new):
    """Whether a sampler differs in its number of draws alone, which is fixed, and larger now."""
    if not (job.sampler.fixed and old and "n" in new):
        return False
    return old | {"n": None} == new | {"n": None} and old["n"] < new["n"]


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
    drawn = _drawn(entry)
    if drawn > job.sampler.most:
        raise ValueError(
            f"{job.out} holds {drawn} draws of example {entry['idx']}, more than the "
            f"{job.sampler.most} of this run: ask for as many, or give another --out"
        )
    return drawn == job.sampler.most


def _drawn(entry):
    """Draws that an entry of a journal holds, of all stages."""
    return sum(int(drawn_of(np.asarray(votes)[..., None, :])[0]) for votes in entry["votes"])


def _todo(job, journal):
    entries = journal.entries
    return [i for i in job.index.tolist() if i not in entries or not _done(job, entries[i])]


def _work(job, plan, journal, mine, entries):
    """Certify the examples `mine`, appending each group to the journal.

    - entries: what earlier runs left of them.
    """
    if not mine:
        return
    base = open_base(job, plan["engine"])
    engine = with_processor(job, plan["engine"], base.settings["processor"])
    made = {name: plan[name] for name in ("model", "settings", "probe") if name in plan}
    made |= {"engine": engine}
    # Blocks are filled by the draws that a fixed number still lacks, or by the first stage.
    draws = job.sampler.first
    if job.sampler.fixed:
        left = sum(job.sampler.most - _drawn(entries.get(i, {"votes": []})) for i in mine)
        draws = max(1, left // len(mine))
    size = max(1, -(-BLOCKS * base.block // draws))
    with progress_bar(len(mine), " examples", rank()[0] == 0, smoothing=0.05) as bar:
        for first in range(0, len(mine), size):
            group = mine[first : first + size]
            journal.append(certify_group(job, base, group, entries), made)
            bar.update(len(group))


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
