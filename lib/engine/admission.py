"""What a network must do before its votes count: a row of logits per image, of it alone."""

import contextlib
import copy
import logging

import torch
from torch import nn

from lib.models import Normalize

# Of the usual gap between the two best logits. Passes of one shape over equal rows agree to
# rounding, far below it; so small a shift moves a probability by less than 100,000 draws can tell.
TOLERANCE = 1e-3
NOISE_LEVELS = (0.1, 0.5, 1.0)  # sigma of the noisy images that a network is checked on
PASSES, COPIES = 8, 8  # of a random network's check, and of each image in one of its passes
log = logging.getLogger(__name__)


def _first_logits(model, x):
    """`logits_of`, where torch's complaint of images that do not fit the network says so."""
    try:
        return logits_of(model, x)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, IndexError, TypeError) as error:
        raise ValueError(
            f"model does not run on images {list(x.shape)} ([B, channels, height, width]): "
            f"{str(error).splitlines()[0]}{_turned(x.shape[1:])}"
        ) from error


def _turned(shape):
    """What to do about images of this shape where their channels seem to stand last."""
    if shape[-1] in (1, 3) and shape[0] not in (1, 3):
        return ". Are its channels last? x.permute(0, 3, 1, 2) puts them first"
    return ""


def logits_of(model, x):
    """The model's logits [B, classes] for images x [B, ...]; a ValueError if it returns others."""
    logits = model(x)
    if not isinstance(logits, torch.Tensor):
        raise ValueError(
            "model must return a tensor of logits [B, classes]; "
            f"got {type(logits).__name__}: wrap it in a module that returns its logits alone"
        )
    if logits.ndim != 2 or len(logits) != len(x) or logits.shape[1] < 2:
        raise ValueError(
            f"model must map images {list(x.shape)} to logits [{len(x)}, classes], "
            "a row an image and two classes or more; "
            f"got shape {list(logits.shape)} (of one logit z make torch.cat([-z, z], dim=1))"
        )
    return logits


@contextlib.contextmanager
def evaluating(model):
    """Eval mode, and afterwards each module's own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@torch.no_grad()
def count_classes(model, shape, device):
    """Number of classes of a network in eval mode, after a check that it classifies row by row.

    The noisy copies of an image share their batches, so a network that mixes the rows of a batch
    gives votes that are not independent, and no guarantee holds. The check compares, for several
    batches of noisy images, the gap between the two best logits of a row among other companions.

    - model: nn.Module in eval mode, in float32.
    - shape: (channels, height, width) of an image.
    - device: torch.device of the model.

    Raises ValueError where the network does not run on such images, where a row depends on the
    other rows, and where a random network draws once for all rows of a pass. Warns where two passes
    over the same images differ: of a random network only the average over its randomness is
    certified.
    """
    _check_channels(model, shape)
    _check_registered(model)
    generator = torch.Generator().manual_seed(0)
    mixed = random = False
    for sigma in NOISE_LEVELS:
        x = torch.rand(6, *shape, generator=generator)
        noise = sigma * torch.randn(x.shape, generator=generator)
        # A dark and a bright companion, unlike the others in every average and extreme.
        x[4], x[5], noise[5] = 0.1 * x[4], 1, 3 * noise[5].abs()
        x = (x + noise).to(device)
        first, moved = _first_logits(model, x[:4]), logits_of(model, x[[4, 0, 1, 5]])
        mixed |= _differ(first[:2], moved[1:3])
        random |= _differ(first, logits_of(model, x[:4]))
    if random:
        if _shares_randomness(model, x[:4]):
            raise ValueError(
                "model must draw what is random in it for each image by itself: its logits change "
                "from pass to pass for all images of a batch together (weights drawn once a pass, "
                "one random crop for all, batch norm in training mode beside dropout?)"
            )
        log.warning(
            "model: two passes over the same images differ (dropout that stays on?): "
            "its votes will not be the same again"
        )
    elif mixed:
        raise ValueError(
            "model must classify each image by itself: its logits change with the other images of "
            "the batch (batch norm in training mode, a mean over the batch, attention with "
            "batch_first=False?)"
        )
    return first.shape[1]


def _check_channels(model, shape):
    """Normalisation of three channels would broadcast grey images to three, without a word."""
    for module in model.modules():
        if isinstance(module, Normalize) and len(module.mean) not in (1, shape[0]):
            raise ValueError(
                f"model normalises {len(module.mean)} channels, but the images have {shape[0]}: "
                f"give the images that it was trained on{_turned(shape)}"
            )


def _check_registered(model):
    """Networks in a plain list are in no hash of the weights: a run would go on with any others."""
    known = set(model.modules())
    for module in model.modules():
        for name in vars(module).keys() - vars(nn.Module()).keys():
            value = getattr(module, name)
            parts = value.values() if isinstance(value, dict) else value
            parts = parts if isinstance(value, dict | list | tuple | set) else ()
            if any(isinstance(part, nn.Module) and part not in known for part in parts):
                raise ValueError(
                    f"model holds networks in a plain {type(value).__name__}, {name}, where "
                    "neither eval mode nor the hash of its weights reaches them: make it an "
                    "nn.ModuleList or nn.ModuleDict"
                )


def _differ(a, b):
    """Whether logits of equal images differ by more than rounding, on the scale of the vote."""
    finite = a.isfinite().all(dim=1) & b.isfinite().all(dim=1)  # others are refused when counted
    if not finite.any():
        return False
    best, classes = a[finite].double().topk(2)
    other = b[finite].double().gather(1, classes)
    gap, change = best[:, 0] - best[:, 1], (best - other).diff(dim=1).abs()
    rounding = 64 * torch.finfo(torch.float32).eps * best.abs().max()
    moved = bool(change.max() > TOLERANCE * gap.mean() + rounding)
    # A third class that overtakes the two is another vote, even where their own gap stays.
    overtaken = b[finite].double().amax(dim=1) - other.amax(dim=1)
    return moved or bool(overtaken.max() > TOLERANCE * gap.mean() + rounding)


def _shares_randomness(model, x):
    """Whether the rows of a pass of a random network depend on each other: one-way ANOVA.

    Copies of some images pass beside dark companions, then beside bright ones, and so on. Where
    each row is drawn by itself, the means of an image's copies differ from pass to pass no more
    than the copies do within a pass.
    """
    copies, found = x.repeat_interleave(COPIES, dim=0), []
    for i in range(PASSES):
        beside = torch.cat([copies, torch.full_like(copies, 4.0 * (i % 2))])
        logits = logits_of(model, beside)[: len(copies)].double()
        logits = logits.nan_to_num(nan=0, posinf=0, neginf=0)  # refused when they are counted
        found.append(logits.unflatten(0, (-1, COPIES)))
    found = torch.stack(found)  # [pass, image, copy, class]
    within = found.var(dim=2).mean(dim=(0, 1))
    between = COPIES * found.mean(dim=2).var(dim=0).mean(dim=0)
    rounding = 64 * torch.finfo(torch.float32).eps * found.abs().max()
    # Of 28 and 224 degrees of freedom: by chance the ratio is above 6 about once in 10^14.
    return bool((between > 6 * within + rounding**2).any())


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
    """A copy of the modules around the same weights: what a pass stores on its modules is its own.

    - model: nn.Module. Parameters and buffers of the copy are the same tensors.
    """
    weights = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in weights})
