"""Sources of votes, a network of known probabilities and a way to write journals, for all tests."""

import pathlib

import numpy as np
import torch
from torch import nn

from lib.store.journal import Journal


class Tape:
    """A source that notes every request and answer of another one."""

    def __init__(self, source):
        self.source, self.classes, self.asked, self.given = source, source.classes, [], []

    def __len__(self):
        return len(self.source)

    def draw(self, n):
        self.given.append(self.source.draw(n))
        self.asked.append(np.broadcast_to(n, len(self)).copy())
        return self.given[-1]


def mixed(size, classes=3, seed=0):
    """Class probabilities from hopeless to certain."""
    top = np.random.default_rng(seed).permutation(np.linspace(0.4, 1, size))
    rest = np.repeat((1 - top)[:, None] / (classes - 1), classes - 1, axis=1)
    return np.concatenate([top[:, None], rest], axis=1)


class Band(nn.Module):
    """Class 0 scores .95 where the pixel is closer than `width` to 1/2, else .05; nearly a step."""

    def __init__(self, width=0.3, sharpness=400.0):
        super().__init__()
        self.width, self.sharpness = width, nn.Parameter(torch.tensor(sharpness))

    def forward(self, x):
        inside = self.sharpness * (self.width - (x.flatten(1)[:, 0] - 0.5).abs())
        inside = float(np.log(19) / 2) * inside.tanh()
        return torch.stack([inside, -inside], dim=1)


def write_journal(path, made, entries):
    """A whole journal in place of what was at `path`."""
    pathlib.Path(path).unlink(missing_ok=True)
    with Journal(pathlib.Path(path)) as journal:
        journal.begin(made)
        journal.append(list(entries))
