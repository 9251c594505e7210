"""Votes of a run stage by stage: a group of examples is certified on from what was counted."""

import time

import numpy as np

from lib.checks import check_request
from lib.engine.live import ModelCounts


def certify_group(job, base, group, entries):
    """Journal entries of a group of examples, each with the votes of every stage.

    An example's time is its share of the group's, by draws, and what earlier runs took for it.
    """
    start = time.perf_counter()
    index = np.array(group)
    labels = job.labels[index]
    noise = job.noise.select(np.searchsorted(job.index, index))
    source = ModelCounts(base, job.images[index], noise, index=index, seed=job.seed, progress=False)
    stages = _stages(group, entries, source.votes)
    source.votes += sum(stages)
    had = drawn_of(source.votes)
    for i, example in enumerate(group):
        source.evaluations[..., i] += entries.get(example, {}).get("evaluations", 0)
    counts = _Staged(source, stages)
    certificates = job.sampler(counts, noise)
    drawn = drawn_of(source.votes)
    if (drawn > job.sampler.most).any():
        raise ValueError(
            f"sampler took {drawn.max()} draws of an example, more than the {job.sampler.most} "
            "that it states (most)"
        )
    if job.sampler.fixed and (drawn < job.sampler.most).any():
        raise ValueError(
            f"sampler took {drawn.min()} draws of an example, but states fixed = True with "
            f"{job.sampler.most} (most): leave fixed out where the votes decide on more draws"
        )
    new = drawn - had
    seconds = (time.perf_counter() - start) * new / max(1, new.sum())
    seconds += [entries.get(example, {}).get("time", 0.0) for example in group]
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
            more = n - drawn_of(had)
            # Of examples that are new to the run, any number of draws is the first.
            if stage < len(self._had) - 1 and more[drawn_of(had) > 0].any():
                raise ValueError("n0 must be that of the earlier run: its votes came after it")
            votes = had + self._source.draw(more)
        else:
            votes = self._source.draw(n)
        self.stages.append(votes.copy())  # a sampler may reckon in the array that it is given
        return votes


def drawn_of(votes):
    """Draws [B] behind votes [B, C] or [R, B, C]: every readout counts the same draws."""
    totals = votes.sum(axis=-1)
    return totals[0] if votes.ndim == 3 else totals
