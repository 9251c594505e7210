"""Data sets as tensors: images in [0, 1], labels, and the constants that a model's first layer needs."""

import dataclasses

import numpy as np
import torch
from sklearn.datasets import load_digits


@dataclasses.dataclass(frozen=True)
class Info:
    """shape (channels, height, width), number of classes, per-channel mean and standard deviation of the training images."""

    shape: tuple
    classes: int
    mean: tuple
    std: tuple


INFO = {
    "digits": Info((1, 8, 8), 10, (0.3051,), (0.3759,)),
    "cifar10": Info((3, 32, 32), 10, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
}


def load(name, split, path=None):
    """A data set: (images float32 [N, channels, height, width] in [0, 1], labels int64 [N]).

    name: "digits" (1,797 grey 8x8 images that ship inside scikit-learn; split once and for all: 1,437 train, 360 test).
    split: "train" or "test". Raises ValueError naming name or split.
    """
    if name not in INFO:
        raise ValueError(f"name must be one of {', '.join(INFO)}; got {name!r}")
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test'; got {split!r}")
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    order = order[360:] if split == "train" else order[:360]
    images = torch.from_numpy(digits.images[order].astype(np.float32) / 16)[:, None]
    return images, torch.from_numpy(digits.target[order].astype(np.int64))
