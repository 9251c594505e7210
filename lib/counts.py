"""Where votes come from: a record replayed, or a simulation of known probabilities (live networks: engine.py).

Every source holds B examples and answers `draw(n)` with int64 class counts [B, C] of n fresh draws of each (n: one number, or int [B];
0 asks nothing of that example). A sampler never knows which source it has.
"""

import numpy as np

from lib.checks import check_counts, check_labels, check_seed
from lib.noise import Gaussian
from lib.records import Record


def check_request(n, size):
    """The draws asked of each example: int64 [B], >= 0."""
    request = np.asarray(n)
    if request.dtype.kind not in "iu" or request.ndim > 1 or (request.ndim == 1 and request.shape != (size,)):
        raise ValueError(f"n must be a whole number of draws, or {size} of them, one per example; got {n!r}")
    if request.size and request.min() < 0:
        raise ValueError(f"n must be at least 0 draws; got {request.min()}")
    return np.broadcast_to(request, (size,)).astype(np.int64)


class RecordedCounts:
    """Replay of a stored Monte Carlo run: exact draws WITHOUT replacement from the recorded votes.

    The recorded draws of an example are exchangeable, so the first m of them are a multivariate hypergeometric draw from its class
    counts, and the next m one from what is left: over all calls the draws add up to the record, and a sampler that asks no more than was
    recorded is replayed exactly as if it had run live. An example's draws depend on (seed, its index) and the sizes asked, on no other.

    counts: a lib.records.Record (of load_counts), with the noise that it was drawn under, or whole numbers [B, C], the votes of each class.
    seed: of the replay. index: of each example in its data set (default the record's, or 0..B-1). `remaining` holds the votes not drawn yet.
    The record's number of draws must not have hung on the votes: one that an adaptive sampler left is not exchangeable with a longer run.
    Raises ValueError on a bad shape, and where a record is exhausted.
    """

    def __init__(self, counts, seed=0, index=None):
        self.noise = None
        if isinstance(counts, Record):
            index = counts.index if index is None else index
            if "sigma" in counts.header and counts.header.get("noise", "Gaussian") == "Gaussian":
                self.noise = Gaussian(counts.header["sigma"])
            counts = counts.counts
        self.remaining = counts = check_counts(counts)
        self.classes = counts.shape[1]
        check_seed(seed)
        index = np.arange(len(counts)) if index is None else check_labels(index, len(counts), "index")
        self._generators = [np.random.default_rng([seed, int(i)]) for i in index]

    def __len__(self):
        return len(self.remaining)

    def draw(self, n):
        """Class counts int64 [B, C] of the next n recorded draws of each example."""
        n = check_request(n, len(self))
        left = self.remaining.sum(axis=1)
        if (n > left).any():
            i = int(np.argmax(n > left))
            raise ValueError(
                f"the record is exhausted: n = {n[i]} draws asked of example {i}, {left[i]} left of those recorded. "
                "Replay with fewer draws, or record more of them (save_counts on a longer ModelCounts run)"
            )
        drawn = np.zeros_like(self.remaining)
        for i in np.flatnonzero(n):
            drawn[i] = self._generators[i].multivariate_hypergeometric(self.remaining[i], n[i], method="marginals")
        self.remaining -= drawn
        return drawn


class SimulatedCounts:
    """Multinomial draws at known class probabilities: the truth is known, so that guarantees can be audited.

    probabilities: [B, C], rows summing to 1. seed: whole number or numpy Generator. Raises ValueError naming probabilities.
    """

    def __init__(self, probabilities, seed=0):
        p = np.asarray(probabilities, dtype=np.float64)
        if p.ndim != 2 or p.size == 0 or not (p >= 0).all() or not np.allclose(p.sum(axis=1), 1, atol=1e-9):
            got = f", least {p.min()}, sums from {p.sum(axis=-1).min()} to {p.sum(axis=-1).max()}" if p.size else ""
            raise ValueError(f"probabilities must have shape [B, C], be >= 0 and sum to 1 in each row; got shape {p.shape}{got}")
        self.probabilities = p / p.sum(axis=1, keepdims=True)
        self.classes = p.shape[1]
        self._generator = np.random.default_rng(seed)

    def __len__(self):
        return len(self.probabilities)

    def draw(self, n):
        """Class counts int64 [B, C] of n fresh draws of each example."""
        return self._generator.multinomial(check_request(n, len(self)), self.probabilities)
