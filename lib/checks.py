"""Checks at the boundary: a bad input is one ValueError that names the argument and the remedy.

What is accepted is returned as one of Python's or numpy's 64-bit types, so that no caller computes
in the narrow type that came in (an alpha in float16, draws in uint8).
"""

import math
import numbers
from difflib import get_close_matches

import numpy as np
import torch

MOST_DRAWS = 10**10  # up to here lib.bounds is checked against 40-digit arithmetic
SLIGHT = 0.05  # pixels this far outside [0, 1] are rounding or a perturbation, no other scale
MOST_SHOWN = 20  # choices that an error lists, beyond them the nearest


def _one_or_all(values):
    return values[0] if len(values) == 1 else values


def check_numbers(value, name, kinds="iufb"):
    """Real numbers as a float64 array; text, None and (without "b" in kinds) truth are refused."""
    try:
        array = np.asarray(value)
        if array.dtype.kind not in kinds + "O":
            raise TypeError
        return array.astype(np.float64, copy=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be a number, or an array of them; got {value!r}") from error


def check_level(**levels):
    """Failure probabilities: each keyword is a number in the open interval (0, 1).

    Returns them as Python floats: one, or a list in the order given.
    """
    for name, value in levels.items():
        if not isinstance(value, numbers.Real) or not 0 < value < 1 or not 0 < float(value) < 1:
            example = 0.5 if name == "share" else 0.001
            raise ValueError(f"{name} must be a number in (0, 1), such as {example}; got {value!r}")
    return _one_or_all([float(value) for value in levels.values()])


def check_choice(choices, **values):
    """Each keyword is one of `choices`."""
    for name, value in values.items():
        if value not in choices:
            shown, among = list(choices), ""
            if len(shown) > MOST_SHOWN:
                among = f"{len(shown)} names, such as "
                shown = get_close_matches(str(value), map(str, shown), 5, 0) or shown[:5]
            shown = ", ".join(map(repr, shown))
            raise ValueError(f"{name} must be one of {among}{shown}; got {value!r}")


def check_draws(**draws):
    """Numbers of Monte Carlo draws (or of epochs, images ...): whole, from 1 to MOST_DRAWS.

    Each keyword is a number or an array of them. Returns them as int or int64 array: one, or a
    list in the order given.
    """
    checked = []
    for name, value in draws.items():
        array = np.asarray(value)
        if array.size == 0:
            raise ValueError(f"{name} must hold at least one whole number; got {value!r}")
        if array.dtype.kind not in "iu":
            raise ValueError(f"{name} must be a whole number (int); got {value!r}")
        if array.min() < 1:
            raise ValueError(f"{name} must be at least 1; got {value!r}")
        if array.max() > MOST_DRAWS:
            raise ValueError(f"{name} must be at most {MOST_DRAWS:.0e}; got {value!r}")
        array = array.astype(np.int64)
        checked.append(int(array) if array.ndim == 0 else array)
    return _one_or_all(checked)


def check_seed(seed):
    """The seed of a random stream: a whole number in [0, 2^32).

    Within these bounds (seed, index, chunk) name a stream without ambiguity.
    """
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < 2**32:
        raise ValueError(f"seed must be a whole number in [0, 2^32); got {seed!r}")


def check_sigma(sigma, name="sigma"):
    """A noise level: finite and > 0, a scalar or one value per example.

    - name: of the argument.

    Returns it as float or float64 array [B], a copy: levels that a search goes on to change in
    place must not change the noise that votes were drawn under.
    """
    array = check_numbers(sigma, name).copy()
    tiny = np.finfo(np.float32).tiny  # below it a level would be 0 as the noise uses it
    if array.ndim > 1 or array.size == 0 or not np.isfinite(array).all() or (array < tiny).any():
        raise ValueError(
            f"{name} must be finite and > 0, a scalar or one value per example; got {sigma!r}"
        )
    return float(array) if array.ndim == 0 else array


def check_probability(p, name):
    """Class probabilities in [0, 1], as a float64 array."""
    array = check_numbers(p, name)
    if not ((array >= 0) & (array <= 1)).all():
        raise ValueError(f"{name} must lie in [0, 1] and not be NaN; got {p!r}")
    return array


def check_radius(radius):
    """Radii >= 0 as float64."""
    radius = check_numbers(radius, "radius", "iuf")
    if not (radius >= 0).all():
        raise ValueError(f"radius must be >= 0, in units of pixels in [0, 1]; got {radius!r}")
    return radius


def check_images(x, bounded=True):
    """A batch of images: float32 tensor [B, channels, height, width], B >= 1.

    - bounded: pixels must lie in [0, 1]; with False they may be any finite numbers.
    """
    if not isinstance(x, torch.Tensor):
        raise ValueError(
            f"x must be a torch.Tensor [B, channels, height, width]; got {type(x).__name__}"
        )
    if x.ndim != 4 or x.shape[0] == 0:
        raise ValueError(
            "x must have shape [B, channels, height, width], B >= 1 (one image: x[None]); "
            f"got {list(x.shape)}"
        )
    if x.dtype != torch.float32:
        raise ValueError(
            f"x must be float32 with pixels in [0, 1] (from uint8: x.float() / 255); got {x.dtype}"
        )
    low, high = (float(end) for end in x.detach().aminmax())
    if not math.isfinite(low + high):
        what = "NaN" if math.isnan(low + high) else "infinite values"
        raise ValueError(
            f"x must have finite pixels; it holds {what}: look at how the images were read or made"
        )
    excess = max(-low, high - 1)
    if bounded and 0 < excess <= SLIGHT:
        raise ValueError(
            f"x must have pixels in [0, 1]; some lie outside by up to {excess:.3g}. Rounding: pass "
            "x.clamp(0, 1). A perturbed image may lie outside: ModelCounts(..., bounded=False)"
        )
    if bounded and excess > SLIGHT:
        raise ValueError(
            f"x must have pixels in [0, 1]; got values from {low:.4g} to {high:.4g}. Radii are in "
            "units of pixels in [0, 1]: divide by 255, and put the normalisation inside the model "
            "(lib.models.Normalize as its first layer)"
        )


def check_labels(labels, size, name="labels", classes=None):
    """Class labels or indices: `size` whole numbers >= 0, returned as an int64 array.

    - classes: labels must lie below it, where it is given.
    """
    array = np.asarray(labels)
    if array.shape != (size,) or array.dtype.kind not in "iu":
        raise ValueError(
            f"{name} must be {size} whole numbers, one per example; "
            f"got shape {array.shape} of {array.dtype}"
        )
    if size and array.min() < 0:
        raise ValueError(f"{name} must be >= 0; got {array.min()}")
    if size and classes is not None and array.max() >= classes:
        what = "examples" if name == "index" else "classes"
        kind = "" if name == "index" else "class indices "
        raise ValueError(
            f"{name} must be {kind}below {classes}, the number of {what}; got {array.max()}"
        )
    return _int64(array, name)


def _int64(array, name):
    """An int64 copy; unsigned numbers that do not fit are refused, not wrapped around."""
    if array.dtype == np.uint64 and array.size and array.max() >= 2**63:
        raise ValueError(f"{name} must be below 2^63; got {array.max()}")
    return array.astype(np.int64)


def difference(old, new):
    """The first difference between two dicts of settings, in words: "sigma = 0.5, not 0.25"."""
    name = next(name for name in [*new, *old] if old.get(name) != new.get(name))
    before, after = old.get(name), new.get(name)
    if isinstance(before, dict) and isinstance(after, dict):
        if before.get("name") == after.get("name"):
            return difference(before, after)
        before, after = before.get("name"), after.get("name")
    return f"{name} = {_short(before)}, not {_short(after)}"


def _short(value):
    """A setting as an error shows it: of many numbers their first, last and how many."""
    if isinstance(value, list) and len(value) > MOST_SHOWN:
        return f"{len(value)} values, {value[0]!r} to {value[-1]!r}"
    return repr(value)


def check_counts(counts, below=None, readouts=False):
    """Votes: whole numbers >= 0 of shape [B, C], as an int64 array of their own.

    - below: each example must have fewer votes than this, where it is given.
    - readouts: shape [R, B, C] is admitted, too: R readouts of the same draws.
    """
    counts = np.array(counts)
    shapes = {2: "[B, C]"} | ({3: "[R, B, C]"} if readouts else {})
    whole = counts.dtype.kind in "iu" and counts.size > 0 and counts.min() >= 0
    if counts.ndim not in shapes or not whole:
        least = f" with {counts.min()} the least" if counts.size else ""
        raise ValueError(
            f"counts must be whole numbers >= 0 of shape {' or '.join(shapes.values())}; got "
            f"shape {counts.shape} of {counts.dtype}{least}"
        )
    counts = _int64(counts, "counts")
    # Summed as floats, which cannot overflow.
    most = counts.sum(axis=-1, dtype=np.float64).max()
    if below is not None and most >= below:
        raise ValueError(
            f"counts must be fewer than {below:.0e} votes for each example, the most that numpy's "
            f"hypergeometric generator takes; got {most:.4g}. Replay a shorter record"
        )
    return counts


def check_one_readout(counts):
    """A source of votes [B, C]: of several readouts, [R, B, C], each is certified by its view."""
    names = getattr(counts, "names", ())
    if names and np.ndim(getattr(counts, "votes", None)) == 3:
        raise ValueError(
            f"counts hold {len(names)} readouts ({', '.join(names)}): pass one of them, "
            f"counts.view({names[0]!r})"
        )


def check_noise(counts, noise):
    """The noise of a certificate is the one that its votes were drawn under.

    - counts: a source of votes; its attribute `noise`, where it has one, is that of its votes.
    """
    check_one_readout(counts)
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
    """The draws asked of each of `size` examples: 0 or more, returned as int64 [size]."""
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
    if request.size and request.max() > MOST_DRAWS:
        raise ValueError(f"n must be at most {MOST_DRAWS:.0e} draws; got {request.max()}")
    return np.broadcast_to(request, (size,)).astype(np.int64)
