"""Attacks on the smoothed classifier: to hold against its certificates, and to train on.

`attack_smoothed` is the projected gradient ascent of Cohen et al. 2019, appendix J.3, on fresh
noise at each step. `pgd` and `ddn` are the attacks of SmoothAdv (Salman et al. 2019), on a few
noises that stay fixed.
"""

import copy
import math

import numpy as np
import torch
from torch.nn import functional

from lib.checks import check_draws, check_images, check_labels, check_seed
from lib.engine.admission import evaluating, logits_of
from lib.engine.copies import log_mean_softmax, logits_of_copies
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
    - noise: smoothing distribution of the classifier attacked; its radii must be l2.
    - radius: l2 in pixels in [0, 1], > 0, a number or one per example.
    - steps: number of ascent steps.
    - step_size: l2 length of a step, as radius.
    - k: draws of noise per step.
    - seed, index: an example's noise depends on (seed, its index, the step) alone; index as for
      ModelCounts (default 0..B-1).
    - bounded: with False, x + delta may leave [0, 1], as in the certificate, which covers the whole
      ball in R^d: count its votes with ModelCounts(..., bounded=False). True clamps each step.
    - block: noisy images per pass; on a CPU it changes memory alone, on a GPU the noise, too.

    Returns float32 images [B, ...], each strictly inside its radius (in float64). Raises ValueError
    naming the argument.
    """
    check_images(x)
    if noise.norm != "l2":
        raise ValueError(f"noise must certify l2, the norm of this attack; got {noise}")
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


def _project(delta, radius):
    # 1e-5 inside, so that rounding x + delta seldom reaches the sphere: a certified ball is open.
    return within(delta, radius * (1 - 1e-5))


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


def pgd(model, x, y, eps, epsilon, steps):
    """delta [B, ...] of norm <= epsilon, x + delta in [0, 1], by projected gradient ascent.

    It raises -log mean softmax at y over m noises, on the network in eval mode.

    - x, y: images [B, ...] in [0, 1] and their labels [B].
    - eps: the noises [B m, ...], those of one image side by side.
    - epsilon: largest l2 norm, in pixels in [0, 1].
    - steps: number of steps, each of length 2 epsilon / steps.
    """
    delta = torch.zeros_like(x)
    for _ in range(steps):
        direction, _ = _direction(model, x, delta, y, eps)
        moved = (x + delta + 2 * epsilon / steps * direction).clamp(0, 1)
        delta = within(moved - x, epsilon)
    return delta


def ddn(model, x, y, eps, epsilon, steps, gamma):
    """The smallest delta found that makes most copies wrong, cut to norm epsilon; 0 where none is.

    The direction and the norm are searched apart: the norm shrinks by gamma where delta
    suffices and grows by gamma where it does not (Rony et al. 2019). Arguments are those of `pgd`.
    """
    delta, best = torch.zeros_like(x), torch.zeros_like(x)
    farthest = _norm(torch.maximum(x, 1 - x))
    norm, least = torch.full_like(farthest, epsilon), farthest.clone()
    for step in range(steps):
        direction, wrong = _direction(model, x, delta, y, eps)
        wrong = wrong.view(norm.shape)
        better = wrong & (_norm(delta) < least)
        least = torch.where(better, _norm(delta), least)
        best = torch.where(better, delta, best)
        rate = 0.01 + 0.99 * (1 + math.cos(math.pi * step / steps)) / 2
        norm = torch.minimum(norm * (1 + gamma * (1 - 2 * wrong.to(norm.dtype))), farthest)
        delta = norm * normalised(delta + rate * direction)
        delta = (x + delta).clamp(0, 1) - x
    return within(best, epsilon)


def _direction(model, x, delta, y, eps):
    """Unit gradient of -log mean softmax at y, and whether most copies are wrong: [B, ...], [B].

    Most copies are wrong where the class of most votes is not y, as in the published code.
    """
    m = len(eps) // len(x)
    with evaluating(model), torch.enable_grad():
        delta = delta.detach().requires_grad_()
        logits = logits_of_copies(model, (x + delta).repeat_interleave(m, dim=0) + eps, m)
        objective = functional.nll_loss(log_mean_softmax(logits), y, reduction="sum")
        gradient = torch.autograd.grad(objective, delta)[0]
    return normalised(gradient), logits.detach().argmax(dim=2).mode(dim=1).values != y


def _norm(images):
    return images.flatten(1).norm(dim=1).view(-1, *[1] * (images.ndim - 1))


def normalised(gradient):
    """Gradients of length 1 per image; those that are exactly 0 stay 0."""
    return gradient / _norm(gradient).clamp_min(torch.finfo(gradient.dtype).tiny)


def within(delta, epsilon):
    """Each delta, shortened to norm epsilon where it is longer."""
    return delta * (epsilon / _norm(delta).clamp_min(torch.finfo(delta.dtype).tiny)).clamp_max(1)
