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
        parts = [
            standard_normal(part, g)
            for part, g in zip(like.chunk(len(generator)), generator, strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)
    if isinstance(generator, np.random.Generator):
        return torch.from_numpy(generator.standard_normal(tuple(like.shape), dtype=np.float32))
    return torch.randn(like.shape, generator=generator, device=like.device)


CHUNK = 100  # draws that share one random stream: part of the definition of the noise


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
            sigma = torch.as_tensor(sigma, dtype=torch.float32, device=x.device).reshape(
                -1, *[1] * (x.ndim - 1)
            )
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


def noise_stream(seed, index, chunk, device):
    """The generator of the draws CHUNK * chunk, ... of one example: a function of its arguments alone.

    On the CPU numpy's SFC64, seeded with all bits: torch's CPU generator keeps 32 bits of its seed, so that among a million streams
    about a hundred pairs would be the same noise. On a GPU torch's Philox with a 63-bit seed.
    """
    state = np.random.SeedSequence([seed, index, chunk])
    if device.type == "cpu":
        return np.random.Generator(np.random.SFC64(state))
    return torch.Generator(device).manual_seed(int(state.generate_state(1, np.uint64)[0] >> 1))
