"""Smoothing distributions and the radius that each certifies, and Cohen's l2 bound beside its two forerunners.

A distribution of your own needs `norm`, and of `Gaussian` below: `radius(p_lower)`; `probability(radius)` for the ISS map; `select(index)`, itself
where all examples share it; `sample(x, generator)`, whose randomness comes from `generator` alone (as for `standard_normal`: counts
would not repeat otherwise).
"""

import dataclasses

import numpy as np
import torch
from scipy.special import ndtr, ndtri

from lib.checks import check_probability, check_sigma


def standard_normal(like, generator):
    """Independent N(0, 1) draws of the shape and device of `like`, in float32.

    generator: torch.Generator on that device, or a numpy Generator (CPU only), whose seed has more than torch's 32 bits on the CPU;
    a list of them draws equal parts of the rows in turn.
    """
    if isinstance(generator, list):
        parts = [standard_normal(part, g) for part, g in zip(like.chunk(len(generator)), generator, strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)
    if isinstance(generator, np.random.Generator):
        return torch.from_numpy(generator.standard_normal(tuple(like.shape), dtype=np.float32))
    return torch.randn(like.shape, generator=generator, device=like.device)


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """Isotropic Gaussian noise N(0, sigma^2 I), certified in l2 (Cohen et al. 2019).

    sigma: noise level in units of pixels in [0, 1]: a scalar, or an array with one value per example. Raises ValueError naming sigma.
    """

    sigma: float | np.ndarray
    norm = "l2"

    def __post_init__(self):
        object.__setattr__(self, "sigma", check_sigma(self.sigma))

    def select(self, index):
        """The noise of the chosen examples: itself where sigma is a scalar."""
        return self if np.isscalar(self.sigma) else Gaussian(self.sigma[index])

    def sample(self, x, generator):
        """Noisy images x + eps, [B, ...] float32, drawn and added in float32 (x: float32 tensor, pixels in [0, 1])."""
        sigma = self.sigma
        if not np.isscalar(sigma):
            sigma = torch.as_tensor(sigma, dtype=torch.float32, device=x.device).reshape(-1, *[1] * (x.ndim - 1))
        return standard_normal(x, generator).mul_(sigma).add_(x)

    def radius(self, p_lower):
        """Certified l2 radius sigma * Phi^-1(p_lower), 0 where p_lower <= 1/2 (Cohen et al. 2019, theorem 1 with p_B = 1 - p_A)."""
        return np.maximum(0.0, self.sigma * ndtri(check_probability(p_lower, "p_lower")))[()]

    def probability(self, radius):
        """The top-class probability Phi(radius / sigma) that certifies `radius`: the inverse of `radius`."""
        radius = np.asarray(radius, dtype=np.float64)
        if not (radius >= 0).all():
            raise ValueError(f"radius must be >= 0, in units of pixels in [0, 1]; got {radius!r}")
        return ndtr(radius / self.sigma)[()]


def _check_pair(p_a, p_b, sigma):
    p_a, p_b, sigma = np.broadcast_arrays(check_probability(p_a, "p_a"), check_probability(p_b, "p_b"), check_sigma(sigma))
    if (p_a + p_b > 1 + 1e-12).any():
        raise ValueError(f"p_a + p_b must be at most 1: they bound the probabilities of two different classes; got {(p_a + p_b).max()}")
    return p_a, p_b, sigma


def cohen_radius(p_a, p_b, sigma):
    """Certified l2 radius sigma/2 (Phi^-1(p_a) - Phi^-1(p_b)), tight (Cohen et al. 2019, theorems 1 and 2).

    p_a: lower bound of the top class's probability, p_b: upper bound of every other's; all three broadcast; sigma in pixel units.
    Returns float64 radii, 0 where p_a <= p_b. Raises ValueError naming the argument.
    """
    p_a, p_b, sigma = _check_pair(p_a, p_b, sigma)
    with np.errstate(invalid="ignore"):
        radius = sigma / 2 * (ndtri(p_a) - ndtri(p_b))
    return np.where(p_a > p_b, radius, 0.0)[()]


def _supremum(bound, low, high, points=400, rounds=5):
    """sup of bound(t) over t in [low, high], elementwise: a grid, then ever finer grids about its best point.

    Every value it compares is itself a valid bound, so that a missed supremum loses radius but never soundness.
    """
    best = np.zeros(np.shape(low))
    share = np.linspace(0.0, 1.0, points).reshape(-1, *[1] * np.ndim(low))
    for _ in range(rounds):
        t = low + (high - low) * share
        values = bound(t)
        best = np.maximum(best, values.max(axis=0))
        at = values.argmax(axis=0)
        step = (high - low) / (points - 1)
        centre = np.take_along_axis(t, at[None], axis=0)[0]
        low, high = np.maximum(low, centre - step), np.minimum(high, centre + step)
    return best


def lecuyer_bound(p_a, p_b, beta, sigma):
    """The radius of Lecuyer et al. (2019) at one setting of its parameter beta (Cohen et al. 2019, equation 30); 0 where it says nothing.

    sigma beta / sqrt(2 log(1.25 (1 + e^beta) / (p_a - e^(2 beta) p_b))), for 0 < beta <= min(1, log(p_a / p_b) / 2).
    """
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        margin = (p_a - p_b) - np.expm1(2 * beta) * p_b
        radius = sigma * beta / np.sqrt(2 * np.log(1.25 * (1 + np.exp(beta)) / margin))
    return np.where((margin > 0) & (beta > 0) & (beta <= 1), radius, 0.0)


def lecuyer_radius(p_a, p_b, sigma):
    """Certified l2 radius of Lecuyer et al. (2019): the supremum of `lecuyer_bound` over beta (Cohen et al. 2019, I.1, equation 31).

    Same arguments, units and errors as `cohen_radius`, which is larger everywhere.
    """
    p_a, p_b, sigma = _check_pair(p_a, p_b, sigma)
    top = np.minimum(1.0, np.log1p(np.maximum(p_a - p_b, 0) / np.maximum(p_b, 1e-300)) / 2)
    return _supremum(lambda beta: lecuyer_bound(p_a, p_b, beta, sigma), np.zeros_like(top), top)[()]


def li_bound(p_a, p_b, order, sigma):
    """The radius of Li et al. (2018) at one order of its Renyi divergence (Cohen et al. 2019, equation 37); 0 where it says nothing.

    sigma sqrt(-2/order log(1 - p_a - p_b + 2 M)), with M the power mean of p_a and p_b of exponent 1 - order, M^(1 - order) =
    (p_a^(1 - order) + p_b^(1 - order)) / 2: the exponent outside is 1/(1 - order), the geometric mean at order 1.
    """
    # With u = log(p_a / p_b) / 2: p_a + p_b = 2 sqrt(p_a p_b) cosh(u) and M = sqrt(p_a p_b) cosh((1 - order) u)^(1 / (1 - order)).
    # Their difference is taken in logarithms: as written above, it drowns in rounding where p_a is close to p_b.
    p_b = np.maximum(p_b, 1e-300)
    power = np.where(order == 1, 1e-300, 1 - order)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        half = np.log1p((p_a - p_b) / p_b) / 2
        gap = _log_cosh(power * half) / power - _log_cosh(half)
        inside = -2 / order * np.log1p((p_a + p_b) * np.expm1(gap))
    return np.where((p_a > p_b) & (inside > 0), sigma * np.sqrt(np.maximum(inside, 0)), 0.0)


def _log_cosh(x):
    """log cosh(x), to a relative 1e-15 also near 0 (where it is x^2 / 2) and without overflow."""
    x = np.abs(x)
    return np.where(x < 1, np.log1p(2 * np.sinh(np.minimum(x, 1) / 2) ** 2), x + np.log1p(np.exp(-2 * x)) - np.log(2))


def li_radius(p_a, p_b, sigma):
    """Certified l2 radius of Li et al. (2018): the supremum of `li_bound` over the order (Cohen et al. 2019, I.2, equation 38).

    Same arguments, units and errors as `cohen_radius`, which is larger everywhere. The order is searched on a logarithmic scale.
    """
    p_a, p_b, sigma = _check_pair(p_a, p_b, sigma)
    # The best order is between 0.7 and 1.6, also where p_a is close to p_b (tests/test_theory.py); the range searched is wider.
    low, high = np.full(p_a.shape, -14.0), np.full(p_a.shape, 3.0)
    return _supremum(lambda t: li_bound(p_a, p_b, np.exp(t), sigma), low, high)[()]
