"""Live votes: networks under noise, counted at the speed of the hardware."""

import math
import threading
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

import numpy as np
import torch

from lib.checks import check_choice, check_images, check_labels, check_request, check_seed
from lib.engine.classifier import BaseClassifier
from lib.engine.hardware import cores
from lib.engine.progress import progress_bar
from lib.engine.readouts import Panel, readout
from lib.engine.views import Stream
from lib.noise import CHUNK, noise_stream

PIXELS_AT_A_TIME = 1 << 16  # of noise, drawn in one call: smaller pieces cost more in calls


class ModelCounts:
    """Live Monte Carlo: votes of a base classifier under noise, for B examples at once.

    The draws of all examples fill blocks of one fixed shape: 100 draws of each of 500 examples are
    full device batches. Noise is drawn and added in float32. Draw j of an example depends on
    (seed, its index, j) alone, so that counts are the same for any batch, order of examples and
    number of cores or processes, at one block size and engine setting on one type of machine
    (`processor` of the settings). Between an AMD EPYC and an Intel Xeon with AMX, votes of bfloat16
    and 8-bit networks differed at about 1 to 7 of 100,000 draws, those of float32 networks of the
    digits at none of 2 million.

    Several networks share each noise draw, and `readouts` says how they vote. A list of R readouts
    makes `draw` return [R, B, C]; each readout by itself is an ordinary source of counts, `view`.
    One readout makes this an ordinary source, and one K-consensus runs the later networks only on
    draws where the first K differ, with the votes of the same readout among others.

    - model: nn.Module (see BaseClassifier, whose further arguments may be given by keyword), a
      BaseClassifier, or a list of them (or an nn.ModuleList, such as an Ensemble's members).
    - x: float32 images [B, channels, height, width] in [0, 1].
    - noise: smoothing distribution; sigma a scalar or one value per example.
    - index: int [B], each example's index in its data set, which seeds its noise; default 0..B-1.
    - seed: whole number >= 0.
    - progress: True, False, or None: a bar on draws of more than a few seconds.
    - bounded: False admits finite pixels outside [0, 1], in the same units: a perturbed image may
      leave the range, and a certificate covers it as well.
    - readouts: readouts of several networks or their names (see lib.engine.readouts), or one.
    - planned: draws of each example that will be asked in all, from which compile="auto" decides at
      the first draw; default: those of the first draw.

    `votes` holds the counts of all draws so far, int64 [B, C] or [R, B, C]; the next draw
    continues the stream from there. `evaluations`, int64 [B] or [R, B], are the passes of single
    networks that they cost, or would have cost each readout alone.
    Raises ValueError naming the argument; also where a model gives non-finite logits, which are
    never counted as a class.
    """

    def __init__(
        self,
        model,
        x,
        noise,
        index=None,
        seed=0,
        progress=None,
        bounded=True,
        readouts=None,
        planned=None,
        **engine,
    ):
        check_images(x, bounded=bounded)
        check_choice((None, True, False), progress=progress)
        self.base = _ready(model, tuple(x.shape[1:]), readouts, engine)
        self.x, self.noise, self.seed, self.progress = x.detach(), noise, seed, progress
        self.index = np.arange(len(x)) if index is None else check_labels(index, len(x), "index")
        check_seed(seed)
        if noise.size not in (None, len(x)):
            raise ValueError(
                f"noise must have one level (one sigma), or {len(x)}, one per example of x; "
                f"got {noise.size}"
            )
        self.classes = self.base.classes
        many = bool(self.readouts) and not self.base.single
        size = (len(self.names), len(x)) if many else (len(x),)
        self.votes = np.zeros((*size, self.classes), dtype=np.int64)
        self.evaluations = np.zeros(size, dtype=np.int64)
        self._planned, self._compiled, self._stream = planned, None, None

    def __len__(self):
        return len(self.x)

    @property
    def readouts(self):
        """The readouts: a tuple, empty for one network."""
        return getattr(self.base, "readouts", ())

    @property
    def names(self):
        """The names of the readouts."""
        return tuple(item.name for item in self.readouts)

    def view(self, name):
        """One of several readouts as an ordinary source of counts [B, C].

        All views walk the same stream of draws: what one asks is evaluated once for all of them,
        and kept vote by vote (a byte per draw and readout) until the others have asked for it.

        - name: of a readout, or the readout.

        Raises ValueError where there is no such readout.
        """
        name = readout(name).name
        if name not in self.names:
            raise ValueError(f"readout must be one of {', '.join(self.names)}; got {name!r}")
        if self._stream is None:
            if self.votes.any():
                raise ValueError(_NOT_BOTH)
            self._stream = Stream(self)
        return self._stream.views[self.names.index(name)]

    def draw(self, n):
        """Class counts int64 [B, C], of several readouts [R, B, C], of the next n draws.

        - n: draws of each example, one number or int [B].
        """
        if self._stream is not None:
            raise ValueError(_NOT_BOTH)
        n = check_request(n, len(self))
        drawn = self.votes.reshape(-1, len(self), self.classes)[0].sum(axis=1)
        tallies = self.evaluate(
            drawn,
            n,
            lambda i, first, last: np.full(last - first, i),
            lambda: _Tally(len(self._costs), len(self), self.width, self.base.device),
            padding=len(self),
        )
        counts = sum(tally.counts() for tally in tallies)
        votes, evaluations = self.summed(counts, n)
        self.votes += votes.reshape(self.votes.shape)
        self.evaluations += evaluations.reshape(self.evaluations.shape)
        return votes.reshape(self.votes.shape)

    @property
    def _costs(self):
        """Passes of single networks that a draw costs: [R, 2], where the first K suffice or not."""
        costs = [(item.consensus or len(item.members), len(item.members)) for item in self.readouts]
        return np.array(costs or [(1, 1)])

    @property
    def width(self):
        """Different votes of a draw: each class, "not finite", and both again past a consensus."""
        some = any(item.consensus is not None for item in self.readouts)
        return (self.classes + 1) * (2 if some else 1)

    def summed(self, counts, n, first=0):
        """Counts [R, B, width] of votes as class counts [R, B, C] and evaluations [R, B].

        - counts: of the readouts from number `first` on.
        - n: int64 [B], draws of each example.
        """
        counts = counts.reshape(*counts.shape[:2], -1, self.classes + 1)
        bad = counts[..., -1].sum(axis=2)
        if bad.any():
            r, i = np.unravel_index(np.argmax(bad), bad.shape)
            who = f"model, read as {self.names[first + r]}," if self.names else "model"
            raise ValueError(
                f"{who} gave non-finite logits (NaN or infinity) on {bad[r, i]} of {n[i]} noisy "
                f"copies of example {self.index[i]}: check its weights and normalisation, or try "
                "dtype=torch.float32"
            )
        cost = self._costs[first : first + len(counts), None, : counts.shape[2]]
        return counts[..., :-1].sum(axis=2), (counts.sum(axis=3) * cost).sum(axis=2)

    def evaluate(self, start, n, place, sink, padding):
        """Sinks that hold the votes of draws start, ..., start + n - 1 of each example.

        - start, n: int64 [B].
        - place: (example, first, last) -> where the sink puts the draws of that range.
        - sink: () -> a sink of one worker.
        - padding: the place of rows that count for nobody.
        """
        total = int(n.sum())
        if self._compiled is None:  # decided once: two draws come from one and the same network
            planned = total if self._planned is None else self._planned * len(self)
            self._compiled = self.base.consider_compiling(planned)
        with progress_bar(total, " draws", self.progress, unit_scale=True, delay=3) as bar:
            pieces = self._pieces(start, n, place, bar)
            return self._distribute(pieces, -(-total // self.base.block), sink, padding)

    def _pieces(self, start, n, place, bar):
        """The draws in pieces of one chunk, or several of small images.

        Yields (example, chunks, first and last + 1 of their draws, places of these).
        """
        several = max(1, PIXELS_AT_A_TIME // (CHUNK * math.prod(self.base.shape)))
        for i in np.flatnonzero(n):
            begin, end = int(start[i]), int(start[i] + n[i])
            for chunk in range(begin // CHUNK, -(-end // CHUNK), several):
                chunks = range(chunk, min(chunk + several, -(-end // CHUNK)))
                offset = chunk * CHUNK
                first = max(begin - offset, 0)
                last = min(end - offset, CHUNK * len(chunks))
                bar.update(last - first)
                yield int(i), chunks, first, last, place(i, offset + first, offset + last)

    def _distribute(self, pieces, blocks, sink, padding):
        """The sinks of all workers, which take the pieces one by one."""
        if self.base.device.type != "cpu":
            with cores(1):  # as it was compiled: torch compiles anew for another number of threads
                (ballot,) = self.base.ballots(1, self._compiled)
                return [self._count(pieces, ballot, sink(), padding)]
        lock, over = threading.Lock(), threading.Event()
        workers = max(1, min(self.base.workers, blocks))

        def take():
            with lock:
                return None if over.is_set() else next(pieces, None)

        # set_num_threads acts on the thread that calls it, except in MKL, where it acts on the
        # whole process: `cores` restores that.
        with (
            cores(1),
            ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool,
        ):
            try:
                tasks = [
                    pool.submit(self._count, iter(take, None), ballot, sink(), padding)
                    for ballot in self.base.ballots(workers, self._compiled)
                ]
                wait(tasks, return_when=FIRST_EXCEPTION)
            finally:
                over.set()  # where one fails, or the user interrupts, the others take no more
            return [task.result() for task in tasks]

    def _count(self, pieces, ballot, sink, padding):
        """The sink with the votes of pieces, which are put into full blocks (the last padded)."""
        for block, place in self._blocks(pieces, padding):
            for where, votes in ballot(block, place):
                sink.add(where, votes)
        for where, votes in ballot.rest():
            sink.add(where, votes)
        return sink

    def _blocks(self, pieces, padding):
        """Full blocks of noisy images and the places of their rows. The block is overwritten."""
        base = self.base
        block, place, filled = base.empty_block(), np.full(base.block, padding), 0
        for i, chunks, first, last, places in pieces:
            noisy = self._noisy(i, chunks)[first:last]
            while len(noisy):
                rows = min(len(noisy), base.block - filled)
                block[filled : filled + rows] = noisy[:rows]
                place[filled : filled + rows] = places[:rows]
                filled, noisy, places = filled + rows, noisy[rows:], places[rows:]
                if filled == base.block:
                    yield block, torch.from_numpy(place).to(base.device)
                    filled = 0
        if filled:
            place[filled:] = padding
            yield block, torch.from_numpy(place).to(base.device)

    def _noisy(self, i, chunks):
        """The noisy copies of example i in some chunks, CHUNK each, float32 on the device."""
        streams = [
            noise_stream(self.seed, int(self.index[i]), chunk, self.base.device) for chunk in chunks
        ]
        size = CHUNK * len(streams)
        return self.noise.select(np.full(size, i)).sample(
            self.x[i].to(self.base.device).expand(size, *self.base.shape), streams
        )


ENGINE = ("device", "dtype", "block", "layout", "compile", "tune")  # further arguments
_NOT_BOTH = "draw from the source or from its views, not from both: they share one stream"


def _ready(model, shape, readouts, engine):
    """The BaseClassifier, or the Panel of several networks, that votes."""
    for name in engine:
        check_choice(ENGINE, **{"a further argument of ModelCounts": name})
    if isinstance(model, Panel):
        if readouts is not None or engine:
            given = ", ".join([*(["readouts"] if readouts is not None else []), *engine])
            raise ValueError(f"{given}: set when the Panel was made, not here")
        if model.shape != shape:
            raise ValueError(
                f"x must hold images of shape {model.shape}, as the Panel was made for; got {shape}"
            )
        return model
    several = isinstance(model, list | tuple | torch.nn.ModuleList)
    networks = list(model) if several else [model]
    made = [network for network in networks if isinstance(network, BaseClassifier)]
    if several and readouts is None:
        raise ValueError(
            'readouts must say how several networks vote, such as ["member:0", "soft:0-4"]'
        )
    if engine and len(made) == len(networks):
        raise ValueError(f"{', '.join(engine)}: set when the BaseClassifier was made, not here")
    for base in made:
        if base.shape != shape:
            raise ValueError(
                f"x must hold images of shape {base.shape}, as the BaseClassifier was made for; "
                f"got {shape}"
            )
    if readouts is not None:
        return Panel(networks, readouts, shape, engine)
    return model if made else BaseClassifier(model, shape, **engine)


class _Tally:
    """Votes counted by readout and example."""

    def __init__(self, readings, examples, width, device):
        self.shape = (readings, examples + 1, width)
        self.cells = torch.zeros(math.prod(self.shape), dtype=torch.int64, device=device)
        self.first = torch.arange(readings, device=device)[:, None] * (examples + 1) * width

    def add(self, place, votes):
        """Count votes [R, rows] of the examples place [rows]."""
        cell = place * self.shape[2] + votes
        if len(votes) > 1:
            cell += self.first
        cell = cell.flatten()
        self.cells.index_add_(0, cell, torch.ones_like(cell))

    def counts(self):
        """int64 [R, B, width]."""
        return self.cells.view(self.shape)[:, :-1].cpu().numpy()
