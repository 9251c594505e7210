"""Noisy copies of a batch, m of each image, and a network's logits on them: [B, m, classes].

What the training losses and their attacks share. Copies of one image stand side by side.
"""

import math

import torch

# Pixels that pass through the network at once. Beyond it the copies pass one noise at a time: the
# activations of all of them leave the caches, and a step of ResNet-20 takes twice as long.
ONE_PASS = 2**20


def _noisy(x, noise, generator, m):
    """m noisy copies of each image, those of one image side by side: [B m, ...]."""
    index = torch.arange(len(x)).repeat_interleave(m).numpy()
    return noise.select(index).sample(x.repeat_interleave(m, dim=0), generator).to(x.dtype)


def additive(x, noise, generator, m):
    """The noise itself, [B m, ...], for losses that hold it fixed while the image moves."""
    if not noise.added:
        raise ValueError(f"noise must be added to the image for this loss; got {noise}")
    return _noisy(torch.zeros_like(x), noise, generator, m)


def logits_of_copies(model, images, m):
    """Logits [B, m, classes] of m copies each; at least float32, also under autocast.

    Batch norms in training mode see all copies together, or one noise of each image (ONE_PASS).
    """
    if images.numel() <= ONE_PASS:
        logits = model(images).unflatten(0, (-1, m))
    else:
        layout = torch.channels_last if images.ndim == 4 else torch.contiguous_format
        noises = images.unflatten(0, (-1, m)).unbind(dim=1)
        logits = torch.stack([model(x.contiguous(memory_format=layout)) for x in noises], dim=1)
    return logits if logits.dtype == torch.float64 else logits.float()


def fresh_logits(model, x, noise, generator, m):
    """Logits [B, m, classes] of m fresh noisy copies of each image."""
    return logits_of_copies(model, _noisy(x, noise, generator, m), m)


def log_mean_softmax(logits):
    """log of the mean over the copies of softmax: [B, classes] from [B, m, classes]."""
    return logits.log_softmax(dim=2).logsumexp(dim=1) - math.log(logits.shape[1])
