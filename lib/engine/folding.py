"""Batch norms folded into the convolutions before them."""

import logging

import torch
from torch import nn


def folded(model, shape):
    """The network with its batch norms folded into the convolutions before them, in float32.

    - model: nn.Module in eval mode.
    - shape: (channels, height, width) of an image.

    Returns the network itself where it cannot be traced, or where folding would change it.
    """
    if not _batch_norms(model):
        return model
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(8, *shape, generator=generator) + torch.randn(8, *shape, generator=generator)
    try:
        from torch.fx.experimental.optimization import fuse  # here, since it may move

        with torch.no_grad():
            short, before = fuse(model), model(x)
            same = torch.allclose(
                short(x), before, rtol=1e-3, atol=1e-3 * float(before.abs().max())
            )
    # Tracing runs the user's code on proxies of tensors, which may raise anything.
    except Exception as error:
        logging.getLogger(__name__).debug("batch norms not folded: %s", error)
        return model
    return short if same and _batch_norms(short) < _batch_norms(model) else model


def _batch_norms(model):
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
