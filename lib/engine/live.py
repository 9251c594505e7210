"""Live votes: a network under noise, counted at the speed of the hardware."""

import math
import threading
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

import numpy as np
import torch
from tqdm.auto import tqdm

from lib.checks import check_images, check_labels, check_request, check_seed
from lib.engine.classifier import BaseClassifier
from lib.engine.hardware import cores
from lib.noise import CHUNK, noise_stream

NOISE_PIXELS = 1 << 16  # pixels of noise drawn at a time: smaller pieces cost more in calls


class ModelCounts:
    """Live Monte Carlo: votes of a base classifier under noise, for B examples at once.

    The draws of all examples fill blocks of one fixed shape, so that a draw of 100 for each of 500 examples is full device batches. Noise is
    drawn and added in float32. Draw j of an example depends on (seed, its index, j) alone: counts are the same for any batch, order of
    examples, number of cores or processes, at one block size and engine setting on one machine type.

    model : nn.Module (see BaseClassifier, whose further arguments may be given by keyword) or a BaseClassifier.
    x     : float32 images [B, channels, height, width] in [0, 1]. noise: smoothing distribution; sigma a scalar or one value per example.
    index : int [B], each example's index in its data set, which seeds its noise; default 0..B-1. seed: whole number >= 0.
    bounded: False admits finite pixels outside [0, 1], in the same units: a perturbed image may leave the range, a certificate covers it too.
    progress: True, False, or None: a bar on draws of more than a few seconds.
    `votes` holds the counts of all draws so far, int64 [B, C]; the next draw goes on behind them.
    Raises ValueError naming the argument; also where the model gives non-finite logits, which are never counted as a class.
    """

    def __init__(self, model, x, noise, index=None, seed=0, progress=None, bounded=True, **engine):
        check_images(x, bounded=bounded)
        if isinstance(model, BaseClassifier):
            if engine:
                raise ValueError(
                    f"{', '.join(engine)}: set when the BaseClassifier was made, not here"
                )
            if model.shape != tuple(x.shape[1:]):
                raise ValueError(
                    f"x must hold images of shape {model.shape}, as the BaseClassifier was made for; got {tuple(x.shape[1:])}"
                )
        self.base = (
            model
            if isinstance(model, BaseClassifier)
            else BaseClassifier(model, x.shape[1:], **engine)
        )
        self.x, self.noise, self.seed, self.progress = x.detach(), noise, seed, progress
        self.index = np.arange(len(x)) if index is None else check_labels(index, len(x), "index")
        check_seed(seed)
        if np.ndim(getattr(noise, "sigma", 0)) == 1 and len(noise.sigma) != len(x):
            raise ValueError(
                f"noise: sigma must be one value, or {len(x)}, one per example of x; got {len(noise.sigma)}"
            )
        self.classes = self.base.classes
        self.votes = np.zeros((len(x), self.classes), dtype=np.int64)

    def __len__(self):
        return len(self.x)

    def draw(self, n):
        """Class counts int64 [B, C] of the next n draws of each example (n: one number, or int [B])."""
        n = check_request(n, len(self))
        total = int(n.sum())
        self.base.consider_compiling(total)
        with tqdm(
            total=total,
            unit=" draws",
            unit_scale=True,
            delay=3,
            disable=False if self.progress is None else not self.progress,
        ) as bar:
            counts = self._share(self._pieces(n, bar), -(-total // self.base.block))
        if counts[:, -1].any():
            i = int(np.argmax(counts[:, -1]))
            raise ValueError(
                f"model gave non-finite logits (NaN or infinity) on {counts[i, -1]} of {n[i]} noisy copies of example {self.index[i]}: "
                "check its weights and normalisation, or try dtype=torch.float32"
            )
        self.votes += counts[:, :-1]
        return counts[:, :-1].copy()

    def _pieces(self, n, bar):
        """What is to be drawn, in pieces of one chunk, or some of small images: (example, chunks, first and last + 1 of their draws)."""
        some = max(1, NOISE_PIXELS // (CHUNK * math.prod(self.base.shape)))
        drawn = self.votes.sum(axis=1)
        for i in np.flatnonzero(n):
            start, end = int(drawn[i]), int(drawn[i] + n[i])
            for chunk in range(start // CHUNK, -(-end // CHUNK), some):
                chunks = range(chunk, min(chunk + some, -(-end // CHUNK)))
                first, last = (
                    max(start - chunk * CHUNK, 0),
                    min(end - chunk * CHUNK, CHUNK * len(chunks)),
                )
                bar.update(last - first)
                yield int(i), chunks, first, last

    def _share(self, pieces, blocks):
        """Counts int64 [B, C + 1] of all pieces, which the workers take one by one; never more workers than blocks."""
        if self.base.device.type != "cpu":
            with cores(1):  # as it was compiled: torch compiles anew for another number of threads
                return self._count(pieces, self.base.voters(1)[0])
        lock, over, workers = (
            threading.Lock(),
            threading.Event(),
            max(1, min(self.base.workers, blocks)),
        )

        def take():
            with lock:
                return None if over.is_set() else next(pieces, None)

        # The limit of threads is each thread's own, but for MKL's, which is restored here.
        with (
            cores(1),
            ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool,
        ):
            try:
                tasks = [
                    pool.submit(self._count, iter(take, None), voter)
                    for voter in self.base.voters(workers)
                ]
                wait(tasks, return_when=FIRST_EXCEPTION)
            finally:
                over.set()  # where one fails, or the user interrupts, the others take no more
            return sum(task.result() for task in tasks)

    def _count(self, pieces, voter):
        """Votes int64 [B, C + 1] of pieces, the last column for logits that are not finite, in full blocks of which the last is padded."""
        base = self.base
        block, owner, filled = base.empty_block(), np.full(base.block, len(self)), 0
        counts = torch.zeros(
            (len(self) + 1) * (self.classes + 1), dtype=torch.int64, device=base.device
        )

        def vote():
            votes = base.votes(block, voter)
            cell = torch.from_numpy(owner).to(votes.device) * (self.classes + 1) + votes
            counts.index_add_(0, cell, torch.ones_like(cell))

        for i, chunks, first, last in pieces:
            noisy = self._noisy(i, chunks)[first:last]
            while len(noisy):
                rows = min(len(noisy), base.block - filled)
                block[filled : filled + rows] = noisy[:rows]
                owner[filled : filled + rows] = i
                filled, noisy = filled + rows, noisy[rows:]
                if filled == base.block:
                    vote()
                    filled = 0
        if filled:
            owner[filled:] = len(self)  # the padding votes for nobody
            vote()
        return counts.view(len(self) + 1, self.classes + 1)[:-1].cpu().numpy()

    def _noisy(self, i, chunks):
        """The noisy copies of example i that make up some chunks, CHUNK of each, float32 on the device."""
        streams = [
            noise_stream(self.seed, int(self.index[i]), chunk, self.base.device) for chunk in chunks
        ]
        size = CHUNK * len(streams)
        return self.noise.select(np.full(size, i)).sample(
            self.x[i].to(self.base.device).expand(size, *self.base.shape), streams
        )
