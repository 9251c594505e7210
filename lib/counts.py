"""Sources of votes: a live network, a record replayed, or known probabilities simulated.

Every source holds B examples, knows its number of `classes`, and answers `draw(n)` with int64 class
counts [B, C] of n fresh draws of each example (n: one number, or int [B]; 0 asks nothing of that
example). A sampler never knows which source it has.
"""

import dataclasses

import numpy as np

from lib.bounds import clopper_pearson_lower
from lib.checks import (
    check_choice,
    check_counts,
    check_draws,
    check_labels,
    check_level,
    check_request,
    check_seed,
)
from lib.engine.live import ModelCounts
from lib.noise import purpose_stream, restore_noise
from lib.store.records import Record

__all__ = ["LogCounts", "ModelCounts", "RecordedCounts", "SimulatedCounts", "counts_from_log"]


class RecordedCounts:
    """Replay of a stored Monte Carlo run: exact draws WITHOUT replacement from the recorded votes.

    The recorded draws of an example are exchangeable, so the first m of them are a multivariate
    hypergeometric draw from its class counts, and the next m one from what is left. Over all calls
    the draws add up to the record. A sampler that asks for no more draws than were recorded is
    replayed exactly as if it had run live. An example's draws depend on the seed, its index and
    the sizes asked for, and on nothing else.

    - counts: a lib.store.records.Record, with the noise that its votes were drawn under, or whole
      numbers [B, C], the votes of each class.
    - seed: of the replay.
    - index: int [B], of each example in its data set (default the record's, or 0..B-1).
    - fixed: the number of draws of each example was fixed before its votes were known. Only then
      are they exchangeable with a longer run. None: true where all examples have equally many
      votes, and where a record does not say that an adaptive sampler left it; one that says so is
      refused in any case. Rows of a plain array that were picked by their number of draws are
      picked by what was counted: an adaptive sampler stopped all of them at that number.

    `remaining` holds the votes that are not drawn yet. Raises ValueError on a bad shape, where an
    adaptive sampler left the record, where the record does not say its noise, and where it is
    exhausted.
    """

    def __init__(self, counts, seed=0, index=None, fixed=None):
        self.noise, promised, remedy = None, True, ", or pass fixed=True where they were fixed"
        if isinstance(counts, Record):
            if counts.readouts:
                raise ValueError(
                    "counts holds several readouts: replay one, record.readout(name), of "
                    f"{', '.join(counts.readouts)}"
                )
            index = counts.index if index is None else index
            self.noise, promised = _noise_of(counts.header), _is_fixed(counts.header)
            # What the record itself says is not overruled.
            fixed, remedy = fixed if promised else False, remedy if promised else ""
            counts = counts.counts
        self.remaining = counts = check_counts(counts, below=10**9)
        if fixed is None:
            totals = counts.sum(axis=1)
            fixed = promised and (totals == totals[0]).all()
        if not fixed:
            raise ValueError(
                "counts must be those of a run whose draws were fixed beforehand: an adaptive "
                "sampler stopped these after seeing them, and a replay would not keep its alpha. "
                f"Record anew with --sampler record{remedy}"
            )
        self.classes = counts.shape[1]
        check_seed(seed)
        index = np.arange(len(counts)) if index is None else index
        index = check_labels(index, len(counts), "index", 2**32)
        self._generators = [purpose_stream("replay", seed, int(i)) for i in index]

    def __len__(self):
        return len(self.remaining)

    def draw(self, n):
        """Class counts int64 [B, C] of the next n recorded draws of each example."""
        n = check_request(n, len(self))
        left = self.remaining.sum(axis=1)
        if (n > left).any():
            i = int(np.argmax(n > left))
            raise ValueError(
                f"the record is exhausted: n = {n[i]} draws asked of example {i}, {left[i]} left "
                "of those recorded. Replay with fewer draws, or record more of them "
                "(python -m lib certify --sampler record)"
            )
        drawn = np.zeros_like(self.remaining)
        for i in np.flatnonzero(n):
            drawn[i] = self._generators[i].multivariate_hypergeometric(
                self.remaining[i], n[i], method="marginals"
            )
        self.remaining -= drawn
        return drawn


def _noise_of(header):
    if "noise" not in header:
        raise ValueError(
            "counts: the record's header does not say the noise that its votes were drawn under. "
            "Record anew, or replay its plain counts under a noise that you know"
        )
    return restore_noise(header["noise"])


def _is_fixed(header):
    """Whether a record's header says that its draws were fixed beforehand."""
    return header.get("fixed_draws", "sampler" not in header)


class SimulatedCounts:
    """Multinomial draws at known class probabilities, so that guarantees can be audited.

    - probabilities: [B, C], rows summing to 1.
    - seed: whole number, or a numpy Generator.

    Raises ValueError naming probabilities or seed.
    """

    def __init__(self, probabilities, seed=0):
        p = np.asarray(probabilities, dtype=np.float64)
        whole = p.ndim == 2 and p.size > 0 and (p >= 0).all()
        if not whole or not np.allclose(p.sum(axis=1), 1, atol=1e-9):
            got = ""
            if p.size:
                sums = p.sum(axis=-1)
                got = f", least {p.min()}, sums from {sums.min()} to {sums.max()}"
            raise ValueError(
                "probabilities must have shape [B, C], be >= 0 and sum to 1 in each row; "
                f"got shape {p.shape}{got}"
            )
        self.probabilities = p / p.sum(axis=1, keepdims=True)
        self.classes = p.shape[1]
        if not isinstance(seed, np.random.Generator):
            check_seed(seed)
            seed = purpose_stream("simulation", seed)
        self._generator = seed

    def __len__(self):
        return len(self.probabilities)

    def draw(self, n):
        """Class counts int64 [B, C] of n fresh draws of each example."""
        return self._generator.multinomial(check_request(n, len(self)), self.probabilities)


@dataclasses.dataclass(frozen=True)
class LogCounts:
    """Votes recovered from a log by `counts_from_log`, to be replayed with the class given.

    - counts: int64 [B, C + 1 + NAMELESS]. In the first C columns the class of the log has its
      recovered count; all other votes of the row lie in column C, which stands for no class. Where
      the log abstained, its count is unknown: column C is empty, and the votes are spread evenly
      over the columns behind it.
    - prediction: int64 [B], the class to certify: the log's, and C where it abstained. C has no
      votes there, so that no sampler which is given the class certifies such a row, whatever its
      number of draws and its alpha. (A sampler that draws the class itself has no meaning on a
      log, whose rows hold the votes of one class. At alpha <= .05 and independent draws it would
      certify one of the nameless columns with probability below 1e-7.)
    - labels: int64 [B].
    - abstained: bool [B].
    - candidates: int64 [B], how many counts fit the printed radius; 0 where the log abstained.
    """

    counts: np.ndarray
    prediction: np.ndarray
    labels: np.ndarray
    abstained: np.ndarray
    candidates: np.ndarray


NAMELESS = 64  # five draws agree on one of so many columns with probability 6e-8


def _as_printed(radius, digits):
    return np.array([float(f"{r:.{digits}g}") for r in radius])


def counts_from_log(log, noise, n, alpha, take="middle"):
    """Invert each radius of a log to the count of votes that it came from.

    The radii may be at full precision or rounded to three digits, as Cohen et al.'s code prints
    them; which one is recognised by the radii. A rounded radius fits several counts.

    - log: DataFrame of `lib.store.logs.read_log`.
    - noise, n, alpha: smoothing distribution, draws of each bound and failure probability of each
      certificate, as the log was made with.
    - take: "middle", the candidate in the middle, for a replay: no better guess of the votes is
      known, but a radius computed from it may be larger than the true one and is no certificate.
      "lowest", the least candidate: the log's own count is at least that, so that CERTIFY's radius
      from it is a certificate at alpha wherever the log's was.

    Returns LogCounts. Raises ValueError naming n, alpha or take, and where a radius fits no count:
    the n, alpha or sigma stated is then not the log's.
    """
    n, alpha = check_draws(n=n), check_level(alpha=alpha)
    check_choice(("middle", "lowest"), take=take)
    if not len(log):
        raise ValueError("log holds no examples: give one with at least one line below its header")
    abstained = (log["predict"] < 0).to_numpy()
    k, first, last = _candidates(log, noise, n, alpha, abstained)
    place = first if take == "lowest" else (first + last - 1) // 2
    votes = k[np.minimum(place, len(k) - 1)]
    labels, predict = check_labels(log["label"].to_numpy(), len(log)), log["predict"].to_numpy()
    classes = int(max(labels.max(), predict.max())) + 1
    counts = np.zeros((len(log), classes + 1 + NAMELESS), dtype=np.int64)
    rows, seen = np.arange(len(log)), ~abstained
    counts[rows[seen], predict[seen]] = votes[seen]
    counts[rows[seen], classes] = n - votes[seen]
    counts[abstained, classes + 1 :] = (n + np.arange(NAMELESS)) // NAMELESS
    prediction = np.where(abstained, classes, predict).astype(np.int64)
    return LogCounts(counts, prediction, labels, abstained, np.where(abstained, 0, last - first))


def _candidates(log, noise, n, alpha, abstained):
    """(counts k, first [B], last [B]): k[first:last] are the counts that fit each radius."""
    radius = log["radius"].to_numpy()
    rounded = bool((_as_printed(radius, 3) == radius).all())
    k = np.arange(n // 2, n + 1)
    table = noise.radius(clopper_pearson_lower(k, n, alpha))
    # The last digits of the quantile may differ on the machine that wrote the log; neighbouring
    # counts are much farther apart.
    low, high = table * (1 - 1e-9), table * (1 + 1e-9)
    if rounded:
        low, high = _as_printed(low, 3), _as_printed(high, 3)
    first, last = np.searchsorted(high, radius, "left"), np.searchsorted(low, radius, "right")
    strange = (first >= last) & ~abstained
    if strange.any():
        i = int(np.argmax(strange))
        raise ValueError(
            f"log: radius {float(radius[i])} of idx {log['idx'].iloc[i]} fits no count of n = {n} "
            f"draws at alpha = {alpha} (the largest radius these allow is {table[-1]:.4g}): state "
            "the n, alpha and sigma that the log was made with"
        )
    return k, first, last
