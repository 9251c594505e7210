"""What the code of a run makes of one image, kept in its journal: changed code votes in no old run.

The hash of a network covers its weights alone, and a noise is known by its name and numbers.
"""

import itertools

import numpy as np
import torch

from lib.engine.admission import evaluating
from lib.noise import CHUNK, noise_stream
from lib.store.programs import Program

COPIES, SHOWN = 4, 10  # noisy copies that the network sees; pixels and logits of each that are kept
ROUNDING = 0.01  # of their spread: by so much machines, precisions and versions may differ


@torch.no_grad()
def probe(job):
    """{"noise": pixels, "model": logits}, each [COPIES, SHOWN], of a job's first image.

    Of a Program no logits: its hash covers its code.
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
    return found


def check_probe(job, old):
    """Refuse to continue a run whose code has changed since it was begun.

    - old: what `probe` found then.

    Raises ValueError naming what has changed.
    """
    for name, values in probe(job).items():
        before, now = np.array(old.get(name, values)), np.array(values)
        if before.shape != now.shape or (abs(before - now) > ROUNDING * np.ptp(before)).any():
            raise ValueError(
                f"{job.out} was made with other code: {name} gives other values at the same "
                "numbers and weights than when the run was begun. Give another --out"
            )


def _shown(rows):
    """The first values of each row, as numbers for JSON."""
    return [[float(f"{value:.6g}") for value in row] for row in rows.flatten(1)[:, :SHOWN].tolist()]
