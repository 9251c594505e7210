"""Smoothing distributions as data: what is drawn, the radius it certifies, how files name it.

A distribution of your own is one registered class, which then has streams, records and the
command line:

    @register("Laplace")
    @dataclasses.dataclass(frozen=True, eq=False)
    class Laplace(Noise):
        scale: float
        norm = "l1"

        def sample(self, x, generator): ...
        def radius(self, p_lower): ...

Nothing checks that `radius` is right but you: `lib.audit` takes it as the truth. Chapter 11,
section 4, tries formulas on classifiers whose radius is known without them.
"""

import dataclasses
import functools
import math
from dataclasses import MISSING

import numpy as np
import torch
from scipy.special import ndtr, ndtri

from lib.checks import check_draws, check_probability, check_radius, check_sigma
from lib.store.registry import Registry, option

CHUNK = 100  # draws that share one random stream: part of the definition of the noise
# Streams of other purposes than noise end in one of these words, so that none of them is a stream
# of noise or of another purpose, whatever the seeds are. Noise ends in none. One exception:
# `ensemble.noisy_logits` draws held-out images' noise from another kind of generator (PCG64).
PURPOSES = {"replay": 1, "simulation": 2, "search": 81}

NOISES = Registry("noise", needs=("norm", "sample", "radius"))
register = NOISES.register


class Noise:
    """Base of the smoothing distributions: frozen dataclasses of numbers, or arrays per example.

    A distribution states its law once, by
    - norm: of its radius, such as "l2";
    - sample(x, generator): noisy images, independent of each other, whose randomness comes from
      `generator` alone (`standard_normal` and `standard_uniform` draw from any kind of generator);
    - radius(p_lower): what a lower bound of the top class's probability certifies, 0 below 1/2;
    - radius_two(p_a, p_b), where there is one: the same from an upper bound p_b of every other
      class's (`certify_margin`, `certify_partition` and a runner-up ask for it);
    - probability(radius): the inverse of `radius`, found by bisection where the class has none.
    Each field is one number, or a float64 array [B] with one value per example; a constant of
    several numbers is a tuple.

    - stepped: whether the radius rises with p in steps. added: whether the noise is added to the
      image, so that its law is the same at every image.
    """

    norm = None
    stepped = False
    added = True

    def probability(self, radius):
        """The least top-class probability that certifies `radius`; 1 where none does."""
        radius = check_radius(radius)
        low = np.full(np.broadcast_shapes(np.shape(radius), np.shape(self.radius(1.0))), 0.5)
        high = np.ones_like(low)
        for _ in range(60):
            middle = (low + high) / 2
            enough = self.radius(middle) >= radius
            low, high = np.where(enough, low, middle), np.where(enough, middle, high)
        return high[()]

    def describe(self):
        """The distribution as data, {"name": ..., its fields}; `restore_noise` is the inverse."""
        return NOISES.describe(self)

    def _fields(self):
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @property
    def size(self):
        """Number of examples that have a value of their own; None where all share one."""
        sizes = {len(v) for v in self._fields().values() if isinstance(v, np.ndarray) and v.ndim}
        if len(sizes) > 1:
            raise ValueError(
                f"noise: its arrays differ in length, {sorted(sizes)}: one per example"
            )
        return sizes.pop() if sizes else None

    def select(self, index):
        """The noise of the chosen examples: itself where all examples share it."""
        if self.size is None:
            return self
        own = self._fields().items()
        chosen = {name: v[index] for name, v in own if isinstance(v, np.ndarray) and v.ndim}
        return dataclasses.replace(self, **chosen)

    def __eq__(self, other):
        if type(other) is not type(self):
            return NotImplemented
        mine, others = self._fields(), other._fields()
        return all(np.array_equal(value, others[name]) for name, value in mine.items())

    def __hash__(self):
        return hash(repr(self.describe()))


def restore_noise(description):
    """The distribution that `describe` described. Raises ValueError where it is unknown."""
    return NOISES.restore(description)


def _draw(like, generator, numpy_fill, torch_fill):
    out = torch.empty(like.shape, device=like.device)
    streams = generator if isinstance(generator, list) else [generator]
    for part, stream in zip(out.chunk(len(streams)), streams, strict=True):
        if isinstance(stream, np.random.Generator):
            numpy_fill(stream, out=part.numpy(), dtype=np.float32)
        else:
            torch_fill(part, generator=stream)
    return out


def standard_normal(like, generator):
    """Independent N(0, 1) draws of the shape and device of `like`, in float32.

    - generator: torch.Generator on that device, or a numpy Generator (CPU only; its seed has more
      than torch's 32 bits on the CPU), or a list of these, which draw equal parts of the rows.
    """
    return _draw(like, generator, np.random.Generator.standard_normal, torch.Tensor.normal_)


def standard_uniform(like, generator):
    """Independent draws from [0, 1), in float32; arguments as for `standard_normal`."""
    return _draw(like, generator, np.random.Generator.random, torch.Tensor.uniform_)


def float32_below(value):
    """The largest float32 number that is at most `value`, as float64.

    Noise is drawn in float32; its level is rounded down, so that one number is both the level of
    the noise and the level in the radius, and no radius exceeds that of the level stated.
    """
    value = np.asarray(value, dtype=np.float64)
    near = value.astype(np.float32)
    below = np.where(near > value, np.nextafter(near, np.float32(0)), near)
    return below.astype(np.float64)[()]


def per_image(value, x):
    """A number, or one per example as a float32 tensor [B, 1, ...] on the device of images x."""
    if np.ndim(value) == 0:
        return float(value)
    column = torch.as_tensor(value, dtype=torch.float32, device=x.device)
    return column.reshape(-1, *[1] * (x.ndim - 1))


@register("Gaussian")
@dataclasses.dataclass(frozen=True, eq=False)
class Gaussian(Noise):
    """Isotropic Gaussian noise N(0, sigma^2 I), certified in l2 (Cohen et al. 2019).

    - sigma: noise level in units of pixels in [0, 1]: a scalar, or [B], one value per example.

    Raises ValueError naming sigma.
    """

    sigma: float | np.ndarray = option(  # noqa: RUF009 (a field)
        MISSING, "Standard deviation; pixels in [0, 1], radii in l2."
    )
    norm = "l2"

    def __post_init__(self):
        object.__setattr__(self, "sigma", check_sigma(self.sigma))

    @property
    def level(self):
        """The sigma that noise and radii use: `sigma` rounded down to float32."""
        return float32_below(self.sigma)

    def sample(self, x, generator):
        """Noisy images x + eps, [B, ...] float32, drawn and added in float32.

        - x: float32 tensor, pixels in [0, 1].
        """
        return standard_normal(x, generator).mul_(per_image(self.level, x)).add_(x)

    def radius(self, p_lower):
        """Certified l2 radius sigma * Phi^-1(p_lower), 0 where p_lower <= 1/2.

        Cohen et al. 2019, theorem 1 with p_B = 1 - p_A.
        """
        return np.maximum(0.0, self.level * ndtri(check_probability(p_lower, "p_lower")))[()]

    def radius_two(self, p_a, p_b):
        """Certified l2 radius sigma/2 (Phi^-1(p_a) - Phi^-1(p_b)), 0 where p_a <= p_b.

        - p_a: lower bound of the top class's probability, in [0, 1].
        - p_b: upper bound of every other class's, in [0, 1].

        Bounds of two classes may sum to more than 1, which probabilities do not; the radius is
        then less than `radius(p_a)`, which holds as well: pass min(p_b, 1 - p_a).

        Cohen et al. 2019, theorem 1. With p_b = 1 - p_a it is `radius`.
        """
        p_a, p_b = check_probability(p_a, "p_a"), check_probability(p_b, "p_b")
        with np.errstate(invalid="ignore"):
            gap = ndtri(p_a) - ndtri(p_b)
        return np.where(p_a > p_b, self.level / 2 * gap, 0.0)[()]

    def probability(self, radius):
        """The top-class probability Phi(radius / sigma) that certifies `radius`."""
        return ndtr(check_radius(radius) / self.level)[()]


@register("Uniform")
@dataclasses.dataclass(frozen=True, eq=False)
class Uniform(Noise):
    """Uniform noise on the cube [-half, half]^d, certified in l1 (Yang et al. 2020, section 4).

    Two such cubes whose centres are apart by delta share at least 1 - |delta|_1 / (2 half) of
    their volume, so a class's probability changes by at most |delta|_1 / (2 half).

    - half: lambda of the paper, half the cube's edge, in pixels in [0, 1]: a scalar, or [B].

    Raises ValueError naming half.
    """

    half: float | np.ndarray = option(  # noqa: RUF009 (a field)
        MISSING, "Half the cube's edge; pixels in [0, 1], radii in l1."
    )
    norm = "l1"

    def __post_init__(self):
        object.__setattr__(self, "half", check_sigma(self.half, "half"))

    @property
    def level(self):
        """The half edge that noise and radii use: `half` rounded down to float32."""
        return float32_below(self.half)

    def sample(self, x, generator):
        """Noisy images x + eps, [B, ...] float32, drawn and added in float32."""
        unit = standard_uniform(x, generator).mul_(2).sub_(1)
        return unit.mul_(per_image(self.level, x)).add_(x)

    def radius(self, p_lower):
        """Certified l1 radius 2 lambda (p_lower - 1/2), 0 where p_lower <= 1/2."""
        p_lower = check_probability(p_lower, "p_lower")
        return np.maximum(0.0, 2 * self.level * (p_lower - 0.5))[()]

    def radius_two(self, p_a, p_b):
        """Certified l1 radius lambda (p_a - p_b), 0 where p_a <= p_b.

        A shift of l1 length d changes each class's probability by at most d / (2 lambda).
        Arguments as of Gaussian.radius_two; with p_b = 1 - p_a it is `radius`.
        """
        gap = check_probability(p_a, "p_a") - check_probability(p_b, "p_b")
        return np.maximum(0.0, self.level * gap)[()]

    def probability(self, radius):
        """The top-class probability 1/2 + radius / (2 lambda) that certifies `radius`.

        1 from radius lambda on, which no lower bound reaches.
        """
        return np.minimum(1.0, 0.5 + check_radius(radius) / (2 * self.level))[()]


@functools.cache
def _exposure(keep, pixels):
    """P(at least one of r changed pixels is kept), from above, up to the first r where it is 1/2.

    - keep of `pixels` pixels are kept, every subset equally likely.

    Returns float64 [r = 0, 1, ...], the last of them at least 1/2.
    """
    subsets, table = math.comb(pixels, keep), [0.0]
    while table[-1] < 0.5:
        hit = subsets - math.comb(pixels - len(table), keep)
        # The quotient of two integers is correctly rounded: one step up makes it an upper bound.
        table.append(np.nextafter(hit / subsets, 1.0))
    return np.array(table)


@register("Ablation")
@dataclasses.dataclass(frozen=True, eq=False)
class Ablation(Noise):
    """Randomized ablation: all but `keep` random pixels are erased, certified in l0.

    An image that differs in r pixels gives the same votes wherever none of the r is kept, so a
    class's probability changes by at most 1 - C(pixels - r, keep) / C(pixels, keep) (Levine and
    Feizi 2020). Radii are whole numbers of pixels, and the ball is closed: the class is that of
    every image that differs in at most so many pixels, whatever their values are.

    - keep: number of pixels that the classifier sees, 1 to `pixels`.
    - pixels: positions of an image, height times width; the channels of one position are kept or
      erased together, and count as one.

    Raises ValueError naming keep or pixels.
    """

    keep: int = option(MISSING, "Pixels that are kept; radii in l0, changed pixels.")
    pixels: int = option(MISSING, "Pixels of an image, height times width.")
    norm = "l0"
    stepped = True
    added = False
    erased = -1.0  # no pixel has this value: a classifier can tell erased from black

    def __post_init__(self):
        for name in ("keep", "pixels"):
            value = check_draws(**{name: getattr(self, name)})
            if not isinstance(value, int):
                raise ValueError(f"{name} must be one number for all examples; got {value!r}")
            object.__setattr__(self, name, value)
        if self.keep > self.pixels:
            raise ValueError(f"keep must be at most pixels = {self.pixels}; got {self.keep}")

    def sample(self, x, generator):
        """Images x of which all but `keep` positions are `erased`, [B, ...] float32.

        Raises ValueError naming pixels where the images have another number of them.
        """
        if x.shape[2:].numel() != self.pixels:
            raise ValueError(
                f"pixels must be {x.shape[2:].numel()}, those of images {list(x.shape[1:])}; "
                f"got {self.pixels}"
            )
        high, low = standard_uniform(x.new_empty(len(x), 2, self.pixels), generator).unbind(dim=1)
        # Two draws of 24 bits rank the pixels. Only a tie between the last one kept and the first
        # one erased is not fair, and its probability is below pixels / 2^48.
        rank = high.double() + low.double() * 2**-24
        first = rank.topk(self.keep, dim=1, largest=False, sorted=False).indices
        kept = torch.zeros_like(rank, dtype=torch.bool).scatter_(1, first, True)
        return x.where(kept.view(len(x), 1, *x.shape[2:]), self.erased)

    def radius(self, p_lower):
        """Certified number of pixels: the largest r whose exposure is below p_lower - 1/2.

        0 where p_lower <= 1/2, and where a single pixel is too many.
        """
        return self._most(check_probability(p_lower, "p_lower") - 0.5)

    def radius_two(self, p_a, p_b):
        """Certified number of pixels: the largest r with p_a - p_b above twice its exposure.

        Arguments as of Gaussian.radius_two; with p_b = 1 - p_a it is `radius`.
        """
        gap = check_probability(p_a, "p_a") - check_probability(p_b, "p_b")
        return self._most(gap / 2)

    def _most(self, margin):
        below = np.searchsorted(_exposure(self.keep, self.pixels), margin)
        return np.maximum(0.0, below - 1.0)[()]

    def probability(self, radius):
        """The top-class probability, rounded up, that certifies this number of pixels.

        1 where none is, which no lower bound reaches. A part of a pixel counts as a whole one.
        """
        table = _exposure(self.keep, self.pixels)
        place = np.minimum(np.ceil(check_radius(radius)), len(table) - 1).astype(np.int64)
        return np.minimum(1.0, np.nextafter(0.5 + table[place], 1.0))[()]


def noise_stream(seed, index, chunk, device):
    """The generator of the draws CHUNK * chunk, ... of one example: a function of its arguments.

    On the CPU numpy's SFC64, seeded with all bits: torch's CPU generator keeps 32 bits of its seed,
    so that among a million streams about a hundred pairs would be the same noise. On a GPU torch's
    Philox with a 63-bit seed. Raises ValueError where seed or index need more than 32 bits: two
    streams could then be the same.
    """
    if not (0 <= seed < 2**32 and 0 <= index < 2**32):
        raise ValueError(f"seed and index must lie in [0, 2^32); got {seed} and {index}")
    state = np.random.SeedSequence([seed, index, chunk])
    if device.type == "cpu":
        return np.random.Generator(np.random.SFC64(state))
    return torch.Generator(device).manual_seed(int(state.generate_state(1, np.uint64)[0] >> 1))


def purpose_stream(purpose, *words):
    """A numpy Generator that shares no stream with noise or with another purpose.

    - purpose: one of PURPOSES. words: whole numbers in [0, 2^32) that name the stream.
    """
    state = np.random.SeedSequence(words, spawn_key=(PURPOSES[purpose],))
    return np.random.default_rng(state)
