"""What a network must do before its votes may count: a row of logits for each image, from that image alone."""

import copy
import logging

import torch

SLACK = 0.05  # of the logits' spread: above any rounding, below what a batch that is mixed does
log = logging.getLogger(__name__)


def logits_of(model, x):
    """The model's logits [B, classes] for images x [B, ...]; a ValueError that says what else it returned."""
    logits = model(x)
    if not isinstance(logits, torch.Tensor):
        raise ValueError(
            f"model must return a tensor of logits [B, classes]; got {type(logits).__name__}: wrap it in a module that returns its logits alone"
        )
    if logits.ndim != 2 or len(logits) != len(x) or logits.shape[1] < 2:
        raise ValueError(
            f"model must map images {list(x.shape)} to logits [{len(x)}, classes], a row an image and two classes or more; "
            f"got shape {list(logits.shape)} (of one logit z make torch.cat([-z, z], dim=1))"
        )
    return logits


@torch.no_grad()
def count_classes(model, shape, device):
    """Number of classes of a network in eval mode, shown four random images, the same again, and two of them elsewhere, among dark ones.

    Raises ValueError where a row of its output depends on the other images: the noisy copies of an image share their batches, and votes
    that lean on each other are no independent draws. Warns where forward is random: then only the average over its randomness is certified.
    """
    x = torch.rand(6, *shape, generator=torch.Generator().manual_seed(0)).to(device)
    x[4:] *= 0.1
    first, again, moved = (
        logits_of(model, x[rows]) for rows in ([0, 1, 2, 3], [0, 1, 2, 3], [4, 0, 1, 5])
    )
    spread = (first - first.mean(dim=1, keepdim=True)).abs().max()
    if not spread.isfinite():  # told where it is counted
        return first.shape[1]
    if (first - again).abs().max() > SLACK * spread:
        log.warning(
            "model: two passes over the same images differ (dropout that stays on?): its votes will not be the same again"
        )
    elif (first[:2] - moved[1:3]).abs().max() > SLACK * spread:
        raise ValueError(
            "model must classify each image by itself: its logits change with the other images of the batch (batch norm in training mode, "
            "a mean over the batch, attention with batch_first=False?)"
        )
    return first.shape[1]


@torch.no_grad()
def runs_in_bfloat16(model, shape, device):
    """Whether the network runs in bfloat16 (None), or the first line of torch's complaint."""
    try:
        copy.deepcopy(model).to(torch.bfloat16)(
            torch.zeros(1, *shape, dtype=torch.bfloat16, device=device)
        )
    except (RuntimeError, TypeError) as error:
        return str(error).splitlines()[0]


def copy_with_shared_weights(model):
    """A copy of the modules around the same weights: what a forward pass stores on its modules is the copy's own."""
    weights = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in weights})
