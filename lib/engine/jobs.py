"""Certification that survives anything: resumed after a kill, sharded over processes, each example's result on disk as soon as it is known.

Files of a run with log OUT:
  OUT                  the field's log, one line an example (column n: draws used)
  OUT.votes            one JSON line an example, [index, votes of class 0, 1, ...]; gone when the run is complete
  OUT.npz              the record (lib.records), once the run is complete
  OUT.settings.json    what the run was started with, which a resumed run must match
  OUT.part0, ...       of several processes: each one's log and votes, merged into the files above

An example counts as done when both its lines are whole. Lines are appended and synced, so that a kill tears at most the last one, which is
dropped and done again.
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

from lib.checks import difference
from lib.data import content_hash
from lib.engine.classifier import BaseClassifier
from lib.engine.hardware import has_compiler
from lib.engine.live import ModelCounts
from lib.models import model_hash
from lib.store.files import write_atomically
from lib.store.logs import LOG_COLUMNS, log_line
from lib.store.records import load_counts, save_counts

try:
    import fcntl
except ImportError:  # Windows has no such lock; there two runs of one log are not told apart
    fcntl = None

messages = logging.getLogger("lib")
HEADER = "\t".join([*LOG_COLUMNS, "n"]) + "\n"
BLOCKS = 20  # full blocks a group of examples should fill, so that the padding of its last one is lost in the rest


@dataclasses.dataclass(frozen=True)
class Job:
    """What to certify.

    model  : nn.Module; name: what it is called in the record. labels: int64 [N] of the whole data set.
    images : float32 [N, channels, height, width] in [0, 1], or any object with len() and content_hash() that gives as much when indexed by
             an int array.
    index  : int [B], the examples to certify, ascending. sampler: (counts) -> Certificates.
    noise  : smoothing distribution. seed: of the noise. draws: the most that the sampler takes of an example.
    out    : path of the log. settings: flat dict of what else determines the result (the sampler's arguments; the network, images, noise,
             seed and draws are added to it), compared when the run is resumed, and kept in the record.
    engine : arguments of BaseClassifier (device, dtype, block, layout, compile, tune), None or "auto" where it is to choose.
    """

    model: torch.nn.Module
    name: str
    images: object
    labels: np.ndarray
    index: np.ndarray
    sampler: object
    noise: object
    seed: int
    draws: int
    out: pathlib.Path
    settings: dict
    engine: dict

    def __post_init__(self):
        known = {
            "model_sha256": model_hash(self.model),
            "data_sha256": content_hash(self.images),
            "noise": type(self.noise).__name__,
        }
        object.__setattr__(
            self,
            "settings",
            self.settings
            | known
            | vars(self.noise)
            | {"seed": self.seed, "most_draws": self.draws},
        )

    def path(self, suffix):
        return self.out.with_name(self.out.name + suffix)


def rank():
    """(rank, number of processes) of this run, from torchrun's environment; (0, 1) without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def run(job):
    """Certify what is not yet certified; returns how many examples this call did (all processes together).

    Started again after a kill, with as many processes or others, it goes on where it stopped; the finished log and record are the same
    in all cases but for the log's time column. Raises ValueError naming the setting in which a run on disk differs from this one, and on
    damaged files; OSError where the disk fails.
    """
    me, processes = rank()
    with contextlib.ExitStack() as stack:
        if processes == 1:
            state = _prepare(job, stack)
            _work(job, state, job.out, range(len(state["todo"])))
            _merge(job, complete=True)
        else:
            group = _Group(me, processes)
            state = group.agree("prepared", lambda: _prepare(job, stack))
            if job.settings != state["settings"]:
                raise ValueError(
                    f"rank {me} has other settings than rank 0: {difference(state['settings'], job.settings)}"
                )
            torch.set_num_threads(
                max(1, _cores() // int(os.environ.get("LOCAL_WORLD_SIZE", processes)))
            )
            _work(job, state, job.path(f".part{me}"), range(me, len(state["todo"]), processes))
            group.arrive("certified")
            group.agree("merged", lambda: len(_merge(job, complete=True)))
            group.arrive("ended")
    return len(state["todo"])


class _Group:
    """The few messages between the processes of a run, through the key-value store that torchrun keeps for them.

    A process group of gloo or nccl would do it, too, but has threads of its own, which now and then end a process with an abort at its exit,
    and needs a network interface to be found on machines with several.
    """

    def __init__(self, me, processes):
        # The ranks may end days apart. (Milliseconds in 31 bits last for 24.)
        self.store = next(rendezvous("env://", timeout=datetime.timedelta(days=20)))[0]
        self.me, self.processes = me, processes

    def agree(self, name, function):
        """The result (JSON) of rank 0's call, on all ranks; its error ends all of them, and rank 0 alone reports it."""
        if self.me == 0:
            try:
                result = function()
            except (ValueError, OSError):
                self.store.set(name, "null")
                raise
            self.store.set(name, json.dumps([result]))
        result = json.loads(self.store.get(name))
        if result is None:
            raise SystemExit(1)
        return result[0]

    def arrive(self, name):
        """Say that this process has come so far; rank 0 waits for all of them."""
        self.store.set(f"{name}-{self.me}", "")
        if self.me == 0:
            self.store.wait([f"{name}-{i}" for i in range(self.processes)])


def _cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _prepare(job, stack):
    """Settings checked or written, files healed: {"settings", "engine", "todo": indices not done}. The log stays locked until `stack` ends."""
    job.out.parent.mkdir(parents=True, exist_ok=True)
    file = stack.enter_context(job.path(".settings.json").open("a+"))
    _lock(file, job.out)
    file.seek(0)
    try:
        old = json.loads(file.read())
    except ValueError:
        old = None
    found = [
        path
        for path in (job.out, job.path(".votes"), job.path(".npz"), *_parts(job))
        if path.exists()
    ]
    if old is None and found:
        raise ValueError(
            f"{found[0]} exists, but not how it was made ({job.out.name}.settings.json): give another --out, or move it away"
        )
    if old is None or not any(
        len(_whole_lines(path)) > 1 for path in found if path.suffix != ".npz"
    ):
        # No settings, or torn ones (they are written before anything else), or those of a run that ended before its first result.
        old = {"settings": job.settings, "engine": _choose_engine(job)}
        file.truncate(0)
        file.write(json.dumps(old, indent=1))
        file.flush()
        os.fsync(file.fileno())
    elif old["settings"] != job.settings:
        raise ValueError(
            f"{job.out} was made with {difference(old['settings'], job.settings)}: use the old setting, or give another --out"
        )
    else:
        _check_engine(job, old["engine"])
    done = _merge(job)
    return old | {"todo": [int(i) for i in job.index if int(i) not in done]}


def _check_engine(job, engine):
    """Refuse what was asked of the engine where the run has begun with something else."""
    asked = {
        ("compiled" if name == "compile" else name): str(value).removeprefix("torch.")
        for name, value in job.engine.items()
    }
    if asked.get("compiled") == "True" and not has_compiler():
        del asked["compiled"]  # the run was told so, and is eager
    for name, value in asked.items():
        if (
            name in engine
            and value not in ("None", "auto")
            and str(engine[name]).split(":")[0] != value.split(":")[0]
        ):
            raise ValueError(
                f"{job.out} was made with {name} = {engine[name]}, not {value}: leave it out, or give another --out"
            )


def _lock(file, out):
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(
            f"{out} is being written by another process: wait for it, or give another --out"
        ) from error
    except OSError:
        pass  # some network file systems know no locks


def _choose_engine(job):
    """The settings of a run, from its whole size, so that a resumed run and one of more processes count with the same ones."""
    if rank()[1] > 1:
        torch.set_num_threads(_cores())
    probe = BaseClassifier(job.model, _shape(job), **job.engine)
    probe.consider_compiling(len(job.index) * job.draws)
    return probe.settings


def _shape(job):
    return tuple(job.images[np.array([job.index[0]])].shape[1:])


def _device(job, engine):
    """The device asked for by number, else under torchrun each local rank its own GPU."""
    asked = str(job.engine.get("device") or engine["device"])
    return (
        f"cuda:{os.environ['LOCAL_RANK']}"
        if asked == "cuda" and "LOCAL_RANK" in os.environ
        else asked
    )


def _work(job, state, log, mine):
    """Certify todo[i] for i in `mine`, appending to the log and the votes beside it."""
    if not len(mine):
        return
    engine = state["engine"]
    base = BaseClassifier(
        job.model, _shape(job), device=_device(job, engine), dtype=getattr(torch, engine["dtype"]), block=engine["block"],
        layout=engine["layout"], compile=engine["compiled"],
    )  # fmt: skip
    if rank()[0] == 0:
        messages.info(
            "counting with %s", ", ".join(f"{name} {value}" for name, value in engine.items())
        )
    if base.settings != engine:
        raise ValueError(
            f"{job.out} was made with {difference(engine, base.settings)}: run it on the machine type and versions it was begun with"
        )
    size = 1 if job.draws >= BLOCKS * base.block else -(-BLOCKS * base.block // job.draws)
    fresh = not log.exists()
    with open(log, "a") as lines, open(log.with_name(log.name + ".votes"), "a") as votes:
        if fresh:
            _append(lines, HEADER)
        with tqdm(
            total=len(mine),
            unit=" examples",
            disable=None if rank()[0] == 0 else True,
            smoothing=0.05,
        ) as bar:
            for first in range(0, len(mine), size):
                index = np.array([state["todo"][i] for i in mine[first : first + size]])
                _certify_group(job, base, index, lines, votes)
                bar.update(len(index))


def _certify_group(job, base, index, lines, votes):
    start = time.perf_counter()
    labels = job.labels[index]
    counts = ModelCounts(
        base, job.images[index], job.noise, index=index, seed=job.seed, progress=False
    )
    found = job.sampler(counts)
    seconds = (time.perf_counter() - start) * found.n / found.n.sum()
    rows = {
        "idx": index, "label": labels, "predict": found.prediction, "radius": found.radius, "correct": found.prediction == labels,
        "time": seconds, "n": found.n,
    }  # fmt: skip
    # Votes first: what the log tells is never without them.
    _append(votes, _votes_lines(index, counts.votes))
    _append(
        lines,
        "".join(
            log_line(dict(zip(rows, row, strict=True))) for row in zip(*rows.values(), strict=True)
        ),
    )


def _votes_lines(index, votes):
    return "".join(
        json.dumps([int(i), *row.tolist()], separators=(",", ":")) + "\n"
        for i, row in zip(index, votes, strict=True)
    )


def _append(file, text):
    file.write(text)
    file.flush()
    os.fsync(file.fileno())


def _whole_lines(path):
    """The lines of a file, without its last one where that is torn."""
    data = path.read_bytes() if path.exists() else b""
    return data[: data.rfind(b"\n") + 1].decode(errors="replace").splitlines(keepends=True)


def _read(log, votes):
    """Finished examples of a log and its votes: {index: (log line, votes line)}; those of which one of the two is missing are not finished."""
    lines = _whole_lines(log)
    if lines and lines[0] != HEADER:
        raise ValueError(
            f"{log}, line 1: expected the columns {HEADER.split()}: move the file away, or give another --out"
        )
    logged, voted = {}, {}
    for number, line in enumerate(lines[1:], start=2):
        if not re.fullmatch(r"\d+(\t[^\t\n]+){6}\n", line):
            raise ValueError(f"{log}, line {number} is damaged: delete it, and it is done again")
        logged[int(line.split("\t")[0])] = line
    for number, line in enumerate(_whole_lines(votes), start=1):
        if not re.fullmatch(r"\[\d+(,\d+)+\]\n", line):
            raise ValueError(
                f"{votes}, line {number} is damaged: delete it, and its example is done again"
            )
        voted[json.loads(line)[0]] = line
    done = {i: (logged[i], voted[i]) for i in logged if i in voted}
    for i, (line, row) in done.items():
        if int(line.split("\t")[-1]) != sum(json.loads(row)[1:]):
            raise ValueError(
                f"{log}, idx {i}: n is not the number of votes in {votes.name}: delete its line, and it is done again"
            )
    return done


def _merge(job, complete=False):
    """Collect the finished examples of all files into OUT and OUT.votes, or, if complete, into OUT and OUT.npz; returns their indices."""
    log, votes, record = job.out, job.path(".votes"), job.path(".npz")
    if record.exists() and not votes.exists():
        old = load_counts(record)
        write_atomically(votes, _votes_lines(old.index, old.counts).encode())
    parts = _parts(job)
    done = _read(log, votes)
    for part in parts:
        if part.suffix != ".votes":
            done |= _read(part, part.with_name(part.name + ".votes"))
    wanted = set(job.index.tolist())
    if not set(done) <= wanted:
        raise ValueError(
            f"{log} holds example {min(set(done) - wanted)}, which this run does not ask for: give another --out"
        )
    if complete and set(done) != wanted:
        raise ValueError(
            f"{log} lacks {len(wanted - set(done))} examples, the first {min(wanted - set(done))}: run the same command again"
        )
    _write_if_new(votes, "".join(done[i][1] for i in sorted(done)))
    _write_if_new(log, HEADER + "".join(done[i][0] for i in sorted(done)))
    for part in parts:
        part.unlink()
    if complete:
        _save_record(job, done)
        votes.unlink()
    return set(done)


def _parts(job):
    """Logs and votes of this run's several processes."""
    pattern = re.compile(re.escape(job.out.name) + r"\.part\d+(\.votes)?")
    return sorted(path for path in job.out.parent.iterdir() if pattern.fullmatch(path.name))


def _write_if_new(path, text):
    if not path.exists() or path.read_bytes() != text.encode():
        write_atomically(path, text.encode())


def _save_record(job, done):
    engine = json.loads(job.path(".settings.json").read_text())["engine"]
    counts = np.array([json.loads(done[int(i)][1])[1:] for i in job.index])
    save_counts(
        job.path(".npz"),
        counts,
        job.index,
        job.labels[job.index],
        model=job.name,
        **job.settings,
        **engine,
    )
