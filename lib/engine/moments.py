"""Moments of several networks' logits on the same noisy copies: measured once, stored as numbers.

What the variance model of lib.variance is fitted to, without the logits themselves, which are a
hundred times larger.
"""

import dataclasses

import numpy as np
import torch

from lib.checks import check_draws
from lib.ensemble import noisy_logits
from lib.store.checkpoints import read_checkpoint, write_checkpoint
from lib.variance import LogitMoments, logit_moments, normalised_effects

EDGES = np.linspace(-8, 8, 161)  # bins of normalised effects


@dataclasses.dataclass(frozen=True)
class Moments:
    """Moments of k networks' logits on B images, clean and under noise.

    - logits: LogitMoments of the images.
    - index, labels: int64 [B], of the images in their data set.
    - effects: {"clean", "mean"} -> int64 [160], histogram of normalised_effects over EDGES.
    - votes: int64 [k, k, B, C]; entry [j - 1, i] are the soft votes of the networks i, ...,
      i + j - 1 (counted round) on the noisy copies.
    - header: provenance (networks, data, sigma, seed, draws), a dict.
    """

    logits: LogitMoments
    index: np.ndarray
    labels: np.ndarray
    effects: dict
    votes: np.ndarray
    header: dict


def measure_moments(networks, x, y, noise, draws, index, header):
    """Measure Moments on images x [B, ...] with labels y.

    - draws: noisy copies of each image, the same for all networks; their stream is that of
      lib.ensemble.noisy_logits at seed 0 and `index` int [B].
    - header: dict, what else is to be kept with them.
    """
    check_draws(draws=draws)
    perturbed = noisy_logits(networks, x, noise, draws, seed=0, index=index).numpy()
    with torch.no_grad():
        clean = torch.stack([network(x) for network in networks], dim=1).numpy()
    facts = header | {"noise": noise.describe(), "seed": 0, "draws": draws}
    return _summary(clean, perturbed, np.asarray(index), np.asarray(y), facts)


def _summary(clean, perturbed, index, labels, header):
    logits = logit_moments(clean, perturbed)
    effects = {
        kind: np.histogram(normalised_effects(perturbed, logits, kind), EDGES)[0]
        for kind in ("clean", "mean")
    }
    size, k, classes = clean.shape
    votes = np.zeros((k, k, size, classes), dtype=np.int64)
    for number, first in np.ndindex(k, k):
        members = np.arange(first, first + number + 1) % k
        chosen = perturbed[:, :, members].mean(axis=2).argmax(axis=-1)
        votes[number, first] = (chosen[..., None] == np.arange(classes)).sum(axis=1)
    return Moments(logits, index, labels, effects, votes, header)


def save_moments(path, moments):
    """Write Moments as safetensors, whole or not at all.

    Of the covariance the upper triangle is kept, in half precision: its rounding (5e-4) is a
    hundredth of the standard error at 1,000 copies. The logits are kept in single precision.
    """
    size, k, classes = moments.logits.clean.shape
    rows, columns = np.triu_indices(k * classes)
    joint = moments.logits.covariance.reshape(size, k * classes, k * classes)
    state = {
        "clean": moments.logits.clean.astype(np.float32),
        "mean": moments.logits.mean.astype(np.float32),
        "covariance": joint[:, rows, columns].astype(np.float16),
        "index": moments.index.astype(np.int32),
        "labels": moments.labels.astype(np.int32),
        "votes": moments.votes.astype(np.int32),
    }
    state |= {f"effects_{kind}": part.astype(np.int32) for kind, part in moments.effects.items()}
    tensors = {name: torch.from_numpy(array) for name, array in state.items()}
    write_checkpoint(path, tensors, moments.header, half=False)


def load_moments(path):
    """Read Moments from a file of `save_moments`."""
    file = read_checkpoint(path)
    part = {name: tensor.numpy() for name, tensor in file.state.items()}
    size, k, classes = part["clean"].shape
    rows, columns = np.triu_indices(k * classes)
    joint = np.empty((size, k * classes, k * classes))
    joint[:, rows, columns] = joint[:, columns, rows] = part["covariance"]
    logits = LogitMoments(
        part["clean"].astype(np.float64),
        part["mean"].astype(np.float64),
        joint.reshape(size, k, classes, k, classes),
        file.header["draws"],
    )
    index, labels, votes = (part[name].astype(np.int64) for name in ("index", "labels", "votes"))
    effects = {kind: part[f"effects_{kind}"].astype(np.int64) for kind in ("clean", "mean")}
    return Moments(logits, index, labels, effects, votes, file.header)
