"""Views of a source: each of several readouts as a source of counts, on one stream of draws."""

import numpy as np
import torch

from lib.checks import check_request


class _Roll:
    """Votes kept one by one, in the order of the stream."""

    def __init__(self, readings, size, width, device):
        dtype = torch.uint8 if width <= 256 else torch.int16
        self.votes = torch.zeros(readings, size + 1, dtype=dtype, device=device)

    def add(self, place, votes):
        """Keep votes [R, rows] at place [rows]."""
        self.votes[:, place] = votes.to(self.votes.dtype)


class Stream:
    """The draws of several readouts that not all views have asked for yet."""

    def __init__(self, source):
        self.source = source
        self.views = [View(self, source, r) for r in range(len(source.names))]
        self.start, self.end = np.zeros((2, len(source)), dtype=np.int64)
        self.kept = [None] * len(source)

    def counts(self, r, position, n):
        """Counts int64 [1, B, width] of n draws of readout r from its position on."""
        width = self.source.width
        self._reach(position + n)
        counts = np.zeros((1, len(n), width), dtype=np.int64)
        for i in np.flatnonzero(n):
            first = position[i] - self.start[i]
            counts[0, i] = np.bincount(self.kept[i][r, first : first + n[i]], minlength=width)
        return counts

    def _reach(self, end):
        """Evaluate, for all readouts, the draws up to `end` that are not evaluated yet."""
        source, more = self.source, np.maximum(end - self.end, 0)
        if not more.any():
            return
        total, before = int(more.sum()), np.cumsum(more) - more
        roll = _Roll(len(self.views), total, source.width, source.base.device)
        source.evaluate(
            self.end,
            more,
            lambda i, first, last: before[i] - self.end[i] + np.arange(first, last),
            lambda: roll,
            padding=total,
        )
        votes = roll.votes.cpu().numpy()
        for i in np.flatnonzero(more):
            new = votes[:, before[i] : before[i] + more[i]]
            self.kept[i] = new if self.kept[i] is None else np.hstack([self.kept[i], new])
        self.end += more

    def forget(self):
        """Let go of an example's draws once all views are past them."""
        done = (self.end > self.start) & (
            np.min([view.drawn for view in self.views], axis=0) == self.end
        )
        for i in np.flatnonzero(done):
            self.kept[i] = None
        self.start[done] = self.end[done]


class View:
    """One readout of several as a source of counts."""

    def __init__(self, stream, source, r):
        self._stream, self._source, self._r = stream, source, r
        self.name, self.readout = source.names[r], source.readouts[r]
        self.classes, self.noise, self.index = source.classes, source.noise, source.index
        self.votes = np.zeros((len(source), source.classes), dtype=np.int64)
        self.evaluations = np.zeros(len(source), dtype=np.int64)

    def __len__(self):
        return len(self.votes)

    @property
    def drawn(self):
        """Draws so far, int64 [B]."""
        return self.votes.sum(axis=1)

    def draw(self, n):
        """Class counts int64 [B, C] of the next n draws of each example.

        - n: one number, or int [B].
        """
        n = check_request(n, len(self))
        counts = self._stream.counts(self._r, self.drawn, n)
        votes, evaluations = self._source.summed(counts, n, self._r)
        self.votes += votes[0]
        self.evaluations += evaluations[0]
        self._stream.forget()
        return votes[0]
