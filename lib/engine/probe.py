"""What the code of a run makes of one example, kept in its journal: changed code continues no run.

The hash of a network covers its weights alone; noise, sampler and votes are known by their names
and numbers.
"""

import dataclasses
import itertools

import numpy as np
import torch

from lib.engine.admission import evaluating
from lib.engine.readouts import readout
from lib.noise import CHUNK, noise_stream
from lib.store.programs import Program

COPIES, SHOWN = 4, 10  # noisy copies that the network sees; pixels and logits of each that are kept
ROUNDING = 0.01  # of their spread: by so much machines, precisions and versions may differ
SHARES = ((0.97, 0.03), (0.7, 0.3), (0.45, 0.55))  # of the votes that a sampler is shown


class Shares:
    """A source whose draws have the shares SHARES, up to rounding: the same in every version."""

    classes = 2

    def __len__(self):
        return len(SHARES)

    def draw(self, n):
        """Votes int64 [3, 2] of n draws (int, or int [3])."""
        n = np.broadcast_to(n, len(self))
        second = np.rint(n * np.array(SHARES)[:, 1]).astype(np.int64)
        return np.stack([n - second, second], axis=1)


@torch.no_grad()
def probe(job, n=None):
    """What a job makes of its first image, and its sampler and votes of made-up numbers.

    - n: that the sampler has instead of its own.

    Returns {"noise": pixels, "model": logits, "sampler": radii, "draws": theirs, "n": of the
    sampler, "vote": classes}, each a list, or a list of rows of at most SHOWN numbers. Of a Program
    no logits: its hash covers its code.
    """
    (image,) = torch.as_tensor(job.images[np.array([0])])
    stream = noise_stream(job.seed, 0, 0, torch.device("cpu"))
    noise = job.noise.select(np.zeros(CHUNK, dtype=np.int64))
    noisy = noise.sample(image.cpu().expand(CHUNK, *image.shape), [stream])[:COPIES]
    found = {"noise": _shown(noisy)}
    if not any(isinstance(module, Program) for module in job.model.modules()):
        tensors = itertools.chain(job.model.parameters(), job.model.buffers(), [noisy])
        like = next(tensor for tensor in tensors if tensor.is_floating_point())
        with evaluating(job.model), torch.random.fork_rng():
            torch.manual_seed(0)  # of a network that draws at random
            found["model"] = _shown(job.model(noisy.to(like)))
    if job.certifies:
        level = job.noise.select(np.zeros(len(SHARES), dtype=np.int64))
        sampler = job.sampler if n is None else dataclasses.replace(job.sampler, n=n)
        certificates = sampler(Shares(), level)
        signed = np.where(certificates.prediction == 1, -1, 1) * certificates.radius
        found |= {"sampler": signed.tolist(), "draws": certificates.n.tolist()}
        if "n" in sampler.describe():
            found["n"] = [sampler.n]
    if job.readouts is not None:
        found["vote"] = _votes(job)
    return found


def _votes(job):
    """The classes that a job's readouts make of made-up logits of its networks."""
    size = len(job.model.members), SHOWN, 5
    logits = torch.sin(torch.arange(np.prod(size), dtype=torch.float64) ** 2).float().view(size)
    names = [job.readouts] if isinstance(job.readouts, str) else job.readouts
    votes = map(readout, names)
    return [vote.read(logits[list(vote.members)])[0].tolist() for vote in votes]


def check_probe(job, old):
    """Refuse to continue a run whose code has changed since it was begun.

    - old: what `probe` found then, of a sampler that may have had fewer draws.

    Raises ValueError naming what has changed.
    """
    for name, values in probe(job, *old.get("n", ())).items():
        before, now = np.array(old.get(name, values)), np.array(values)
        if before.shape != now.shape or (abs(before - now) > ROUNDING * np.ptp(before)).any():
            raise ValueError(
                f"{job.out} was made with other code: {name} gives other values at the same "
                "numbers and weights than when the run was begun. Give another --out"
            )


def _shown(rows):
    """The first values of each row, as numbers for JSON."""
    return [[float(f"{value:.6g}") for value in row] for row in rows.flatten(1)[:, :SHOWN].tolist()]
