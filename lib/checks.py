"""Checks at the boundary: each bad input is answered by one ValueError that names the argument and the remedy."""

import math
import numbers

import numpy as np
import torch


def check_level(**levels):
    """Each keyword is a failure probability: a number in the open interval (0, 1)."""
    for name, value in levels.items():
        if not isinstance(value, numbers.Real) or not 0 < value < 1:
            raise ValueError(f"{name} must be a number in (0, 1), such as 0.001; got {value!r}")


def check_choice(choices, **values):
    """Each keyword is one of `choices`."""
    for name, value in values.items():
        if value not in choices:
            raise ValueError(
                f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}"
            )


def check_draws(**draws):
    """Each keyword is a number of Monte Carlo draws (or of epochs, images ...): a whole number >= 1, or an array of them."""
    for name, value in draws.items():
        array = np.asarray(value)
        if array.dtype.kind not in "iu":
            raise ValueError(f"{name} must be a whole number (int); got {value!r}")
        if array.size == 0 or array.min() < 1:
            raise ValueError(f"{name} must be at least 1; got {value!r}")


def check_seed(seed):
    """The seed of a random stream: a whole number in [0, 2^32), so that (seed, index, chunk) name a stream without ambiguity."""
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < 2**32:
        raise ValueError(f"seed must be a whole number in [0, 2^32); got {seed!r}")


def check_sigma(sigma):
    """A noise level: finite and > 0, a scalar or one value per example. Returned as float or float64 array [B]."""
    try:
        array = np.asarray(sigma, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"sigma must be a number or one number per example; got {sigma!r}"
        ) from error
    if array.ndim > 1 or array.size == 0 or not np.isfinite(array).all() or (array <= 0).any():
        raise ValueError(
            f"sigma must be finite and > 0, a scalar or one value per example; got {sigma!r}"
        )
    return float(array) if array.ndim == 0 else array


def check_probability(p, name):
    """Class probabilities in [0, 1], as a float64 array."""
    array = np.asarray(p, dtype=np.float64)
    if not ((array >= 0) & (array <= 1)).all():
        raise ValueError(f"{name} must lie in [0, 1] and not be NaN; got {p!r}")
    return array


def check_radius(radius):
    """Radii >= 0 as float64."""
    radius = np.asarray(radius, dtype=np.float64)
    if not (radius >= 0).all():
        raise ValueError(f"radius must be >= 0, in units of pixels in [0, 1]; got {radius!r}")
    return radius


def check_images(x, bounded=True):
    """A batch of images: float32 tensor [B, channels, height, width] with values in [0, 1], or with bounded=False any finite ones."""
    if not isinstance(x, torch.Tensor):
        raise ValueError(
            f"x must be a torch.Tensor [B, channels, height, width]; got {type(x).__name__}"
        )
    if x.ndim != 4 or x.shape[0] == 0:
        raise ValueError(
            f"x must have shape [B, channels, height, width], B >= 1 (one image: x[None]); got {list(x.shape)}"
        )
    if x.dtype != torch.float32:
        raise ValueError(
            f"x must be float32 with pixels in [0, 1] (from uint8: x.float() / 255); got {x.dtype}"
        )
    low, high = float(x.min()), float(x.max())
    if not bounded and not math.isfinite(low + high):
        raise ValueError(f"x must have finite pixels; got values from {low:.4g} to {high:.4g}")
    if bounded and not (low >= 0 and high <= 1):
        raise ValueError(
            f"x must have pixels in [0, 1]; got values from {low:.4g} to {high:.4g}. Radii are in units of pixels in [0, 1]: "
            "divide by 255, and put the normalisation inside the model (lib.models.Normalize as its first layer)"
        )


def check_labels(labels, size, name="labels", classes=None):
    """Class labels or indices: `size` whole numbers >= 0 (and < classes, where given), as an int64 array."""
    array = np.asarray(labels)
    if array.shape != (size,) or array.dtype.kind not in "iu":
        raise ValueError(
            f"{name} must be {size} whole numbers, one per example; got shape {array.shape} of {array.dtype}"
        )
    if size and array.min() < 0:
        raise ValueError(f"{name} must be >= 0; got {array.min()}")
    if size and classes is not None and array.max() >= classes:
        raise ValueError(
            f"{name} must be class indices below {classes}, the number of classes; got {array.max()}"
        )
    return array.astype(np.int64)


def difference(old, new):
    """What differs first between two dicts of settings, in words: "sigma = 0.5, not 0.25"."""
    name = next(name for name in [*new, *old] if old.get(name) != new.get(name))
    before, after = old.get(name), new.get(name)
    if isinstance(before, dict) and isinstance(after, dict):
        if before.get("name") == after.get("name"):
            return difference(before, after)
        before, after = before.get("name"), after.get("name")
    return f"{name} = {before!r}, not {after!r}"


def check_counts(counts):
    """Votes: whole numbers >= 0 of shape [B, C], as an int64 array of their own."""
    counts = np.array(counts)
    if counts.ndim != 2 or counts.dtype.kind not in "iu" or counts.size == 0 or counts.min() < 0:
        least = f" with {counts.min()} the least" if counts.size else ""
        raise ValueError(
            f"counts must be whole numbers >= 0 of shape [B, C]; got shape {counts.shape} of {counts.dtype}{least}"
        )
    return counts.astype(np.int64)


def check_noise(counts, noise):
    """The noise of a certificate is the one that its votes were drawn under.

    - counts: a source of votes; its attribute `noise`, where it has one, is what it was drawn under.
    """
    own = getattr(counts, "noise", None)
    if own is not None and own != noise:
        raise ValueError(
            f"noise must be the one that the votes were drawn under, {own}; got {noise}"
        )
    size = getattr(noise, "size", None)
    if size not in (None, len(counts)):
        raise ValueError(
            f"noise must have one level, or {len(counts)}, one per example; got {size} of them"
        )


def check_request(n, size):
    """The draws asked of each example: int64 [B], >= 0."""
    request = np.asarray(n)
    if (
        request.dtype.kind not in "iu"
        or request.ndim > 1
        or (request.ndim == 1 and request.shape != (size,))
    ):
        raise ValueError(
            f"n must be a whole number of draws, or {size} of them, one per example; got {n!r}"
        )
    if request.size and request.min() < 0:
        raise ValueError(f"n must be at least 0 draws; got {request.min()}")
    return np.broadcast_to(request, (size,)).astype(np.int64)
