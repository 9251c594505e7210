"""Attacks on the smoothed classifier, to hold against its certificates.

Projected gradient ascent, Cohen et al. 2019, appendix J.3.
"""

import copy

import numpy as np
import torch
from torch.nn import functional

from lib.checks import check_draws, check_images, check_labels, check_seed
from lib.engine.admission import logits_of
from lib.noise import noise_stream

# Noise of step t is chunk STREAMS + t of the example's stream. No ModelCounts of the same seed gets
# there (10^14 draws), so that an attack is never tuned to the draws that later judge it.
STREAMS = 2**40
TINY = torch.finfo(torch.float32).tiny


def attack_smoothed(
    model,
    x,
    y,
    noise,
    radius,
    steps=20,
    step_size=0.1,
    k=1000,
    seed=0,
    index=None,
    bounded=False,
    block=500,
):
    """PGD on the smoothed classifier: images near x that it mistakes most often.

    Maximises E[cross-entropy(model(x + delta + eps), y)] over ||delta||_2 < radius by steepest
    ascent from delta = 0 (Cohen et al. 2019, J.3, equation 39): `steps` times
        delta <- proj(delta + step_size g / ||g||),
    g being the gradient of that mean over k fresh draws of eps. An attack that fails proves
    nothing; one that succeeds inside a certified radius refutes the certificate.

    - model: nn.Module, logits from images [B, channels, height, width], normalisation inside; not
      changed, run in eval mode.
    - x: float32 images [B, ...] in [0, 1].
    - y: int [B], the class of each that is to be left (the label, or the certified class).
    - noise: smoothing distribution of the classifier attacked.
    - radius: l2 in pixels in [0, 1], > 0, a number or one per example.
    - steps: number of ascent steps.
    - step_size: l2 length of a step, as radius.
    - k: draws of noise per step.
    - seed, index: an example's noise depends on (seed, its index, the step) alone; index as for
      ModelCounts (default 0..B-1).
    - bounded: with False, x + delta may leave [0, 1], as in the certificate, which covers the whole
      ball in R^d: count its votes with ModelCounts(..., bounded=False). True clamps each step.
    - block: noisy images per pass; changes memory, not the noise.

    Returns float32 images [B, ...], each strictly inside its radius (in float64). Raises ValueError
    naming the argument.
    """
    check_images(x)
    steps, k, block = check_draws(steps=steps, k=k, block=block)
    check_seed(seed)
    radius = _per_example(radius, len(x), "radius")
    step_size = _per_example(step_size, len(x), "step_size")
    index = np.arange(len(x)) if index is None else check_labels(index, len(x), "index")
    model = copy.deepcopy(model).eval().requires_grad_(False)
    device = next((p.device for p in model.parameters()), x.device)
    classes = logits_of(model, x[:1].to(device)).shape[1]
    y = torch.from_numpy(check_labels(np.asarray(y), len(x), "y", classes))
    x, y, radius, step_size = (value.to(device) for value in (x, y, radius, step_size))
    delta = torch.zeros_like(x)
    for step in range(steps):
        streams = [noise_stream(seed, int(i), STREAMS + step, device) for i in index]
        g = _gradient(model, x + delta, y, noise, k, streams, block)
        delta = _project(delta + step_size.float() * g / _norm(g).clamp_min(TINY), radius.float())
        if bounded:
            # As x lies in [0, 1], clamping only shortens delta, coordinate by coordinate.
            delta = (x + delta).clamp(0, 1) - x
    while True:
        attacked = (x + delta).clamp(0, 1) if bounded else x + delta
        outside = _norm(attacked.double() - x.double()) >= radius
        if not outside.any():
            return attacked
        # x + delta was rounded onto the sphere: the radius is close to the pixels' resolution.
        delta = torch.where(outside, delta / 2, delta)


def _per_example(value, size, name):
    """A positive finite number, or one per example, as float64 [B, 1, 1, 1]."""
    array = np.asarray(value, dtype=np.float64)
    if array.shape not in ((), (size,)) or not (np.isfinite(array).all() and (array > 0).all()):
        raise ValueError(
            f"{name} must be finite and > 0, one number or {size}, one per example (leave out what "
            f"was abstained on); got {value!r}"
        )
    return torch.from_numpy(np.broadcast_to(array, (size,)).copy()).view(-1, 1, 1, 1)


def _norm(images):
    return images.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


def _project(delta, radius):
    # 1e-5 inside, so that rounding x + delta seldom reaches the sphere: a certified ball is open.
    return delta * (radius * (1 - 1e-5) / _norm(delta).clamp_min(TINY)).clamp_max(1)


def _gradient(model, images, y, noise, k, streams, block):
    """Gradient [B, ...] of each image's mean cross-entropy over k draws of noise.

    - streams: generators, one per image.
    - block: noisy images per pass, at most.
    """
    gradient = torch.zeros_like(images)
    per_pass = max(1, block // k)
    for first in range(0, len(images), per_pass):
        rows = np.arange(first, min(first + per_pass, len(images)))
        own = [streams[i] for i in rows]
        for start in range(0, k, block):
            draws = min(block, k - start)
            total = _pass(model, images[rows], y[rows], noise, rows, draws, own)
            gradient[rows] += total / k
    return gradient


def _pass(model, images, y, noise, rows, draws, streams):
    """Gradient [B, ...] of the summed cross-entropy of `draws` noisy copies of each image.

    - rows: places of the images in `noise`.
    """
    images = images.detach().requires_grad_()
    copies = (image.expand(draws, *image.shape) for image in images)
    noisy = [
        noise.select(np.full(draws, i)).sample(repeated, stream)
        for repeated, i, stream in zip(copies, rows, streams, strict=True)
    ]
    logits, target = model(torch.cat(noisy)).float(), y.repeat_interleave(draws)
    loss = functional.cross_entropy(logits, target, reduction="sum")
    if not loss.isfinite():
        raise ValueError(
            "model gave non-finite logits (NaN or infinity) on noisy copies: check its weights and "
            "normalisation"
        )
    return torch.autograd.grad(loss, images)[0]
