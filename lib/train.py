"""One training loop for every loss: SGD with Nesterov momentum under a one-cycle schedule, stopped and resumed at any epoch."""

import copy
import dataclasses
import io
import pathlib

import numpy as np
import torch
from tqdm.auto import tqdm

from lib.checks import check_choice, check_draws, check_images, check_labels, check_seed, difference
from lib.engine.admission import logits_of
from lib.store.files import sha256, write_atomically


def one_cycle(step, steps, peak, warm=0.2):
    """Learning rate at a step: linear from 0 to `peak` over the first share `warm` of the steps, linear back to 0."""
    share = (step + 0.5) / steps
    return peak * min(share / warm, (1 - share) / (1 - warm))


def crop_and_flip(x, generator, pad=4):
    """Random crop after reflection padding by `pad` pixels, and random horizontal flip, of float images [B, C, H, W]."""
    size, (height, width) = len(x), x.shape[2:]
    padded = torch.nn.functional.pad(x, (pad, pad, pad, pad), mode="reflect")
    top, left = torch.randint(0, 2 * pad + 1, (2, size), generator=generator)
    flip = torch.rand(size, generator=generator) < 0.5
    rows = top[:, None] + torch.arange(height)
    columns = torch.arange(width).expand(size, width)
    columns = left[:, None] + torch.where(flip[:, None], columns.flip(1), columns)
    return padded[
        torch.arange(size)[:, None, None, None],
        torch.arange(x.shape[1])[:, None, None],
        rows[:, None, :, None],
        columns[:, None, None, :],
    ]


def fit(
    model, x, y, loss, noise, epochs, lr=0.1, batch=64, momentum=0.9, weight_decay=5e-4, seed=0,
    augment=False, average=None, dtype=torch.float32, device=None, state=None, progress=None, after_epoch=None,
):  # fmt: skip
    """Train `model` in place on clean images; returns the history, one dict an epoch (epoch, loss, lr). Same arguments, same weights.

    x, y     : float32 images [N, channels, height, width] in [0, 1], int64 labels [N]; on any device.
    loss     : lib.losses object, called as loss(model, x, y, noise, generator). noise: the smoothing distribution trained for.
    epochs   : passes over the data under one one-cycle schedule of peak rate `lr`; SGD, Nesterov `momentum`, `weight_decay`, `batch` images.
    augment  : random 4-pixel crops and flips. average: decay of an exponential moving average of the weights, which then is the result.
    dtype    : torch.bfloat16 trains under autocast, channels-last. device: default the model's.
    state    : path of a state file written after each epoch; where it exists, training resumes from it and ends in the same weights. A
               state of other images or arguments is refused.
    after_epoch : called with (model, history) after each epoch. progress: True, False, None (bar on more than a few seconds).
    Raises ValueError naming the argument.
    """
    check_images(x)
    check_draws(epochs=epochs, batch=batch)
    check_seed(seed)
    check_choice((torch.float32, torch.bfloat16), dtype=dtype)
    settings = {
        "model": f"{type(model).__name__} of {sum(p.numel() for p in model.parameters()):,} parameters",
        "images": sha256(x.cpu().numpy().tobytes()) if state else "", "labels": sha256(np.asarray(torch.as_tensor(y).cpu()).tobytes()),
        "loss": loss if dataclasses.is_dataclass(loss) else getattr(loss, "__qualname__", f"{type(loss).__name__} {getattr(loss, '__dict__', '')}"),
        "noise": noise, "epochs": epochs, "lr": lr, "batch": batch, "momentum": momentum, "weight_decay": weight_decay, "seed": seed,
        "augment": augment, "average": average, "dtype": dtype,
    }  # fmt: skip
    settings = {name: str(value) for name, value in settings.items()}
    device = torch.device(device) if device else next(model.parameters()).device
    model.to(device).to(memory_format=torch.channels_last)
    with torch.no_grad():
        classes = logits_of(model.eval(), x[:1].to(device)).shape[1]
    y = torch.from_numpy(check_labels(torch.as_tensor(y).cpu(), len(x), "y", classes))
    averaged = copy.deepcopy(model) if average else None
    optimizer = torch.optim.SGD(
        model.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=True
    )
    history = _resume(state, settings, model, averaged, optimizer, device)
    steps = max(1, len(x) // batch)
    with tqdm(
        total=epochs * steps,
        initial=len(history) * steps,
        unit=" steps",
        delay=3,
        disable=progress is False,
    ) as bar:
        for epoch in range(len(history), epochs):
            generator, order = _epoch_random(seed, epoch, len(x), device)
            model.train()
            total = 0.0
            for step in range(steps):
                rate = one_cycle(epoch * steps + step, epochs * steps, lr)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                rows = order[step * batch : (step + 1) * batch]
                images, labels = x[rows], y[rows].to(device)
                if augment:
                    images = crop_and_flip(images, generator["cpu"])
                images = images.to(device).to(memory_format=torch.channels_last)
                with torch.autocast(
                    device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16
                ):
                    value = loss(model, images, labels, noise, generator["noise"])
                optimizer.zero_grad(set_to_none=True)
                value.backward()
                optimizer.step()
                if averaged is not None:
                    _average(averaged, model, average, epoch * steps + step)
                total += float(value.detach())
                bar.update()
            if not np.isfinite(total):
                raise ValueError(
                    f"training diverged in epoch {epoch + 1} (loss {total / steps}): take a lower lr than {lr}"
                )
            history.append({"epoch": epoch + 1, "loss": total / steps, "lr": rate})
            bar.set_postfix(loss=f"{total / steps:.3f}", refresh=False)
            _save(state, settings, model, averaged, optimizer, history)
            if after_epoch:
                after_epoch(averaged or model, history)
    if averaged is not None:
        model.load_state_dict(averaged.state_dict())
    model.eval()
    return history


def _epoch_random(seed, epoch, size, device):
    """Generators and order of one epoch: functions of (seed, epoch), so that a resumed run continues exactly."""
    a, b = (int(v) for v in np.random.SeedSequence([seed, epoch]).generate_state(2))
    generator = {
        "cpu": torch.Generator().manual_seed(a),
        "noise": torch.Generator(device).manual_seed(b),
    }
    return generator, torch.randperm(size, generator=generator["cpu"])


@torch.no_grad()
def _average(averaged, model, decay, step):
    # Early on a shorter memory, so that the random start is forgotten.
    decay = min(decay, (1 + step) / (10 + step))
    for a, b in zip(averaged.state_dict().values(), model.state_dict().values(), strict=True):
        if a.is_floating_point():
            a.lerp_(b, 1 - decay)
        else:
            a.copy_(b)


def _save(path, settings, model, averaged, optimizer, history):
    if path is None:
        return
    buffer = io.BytesIO()
    parts = {
        "settings": settings,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "history": history,
    }
    torch.save(parts | ({"averaged": averaged.state_dict()} if averaged else {}), buffer)
    write_atomically(path, buffer.getvalue())


def _resume(path, settings, model, averaged, optimizer, device):
    """History of the state file, its weights loaded; [] where there is none. ValueError where it is of another training."""
    if path is None or not pathlib.Path(path).exists():
        return []
    parts = torch.load(path, map_location=device, weights_only=True)
    if (old := parts.get("settings", {})) != settings:
        raise ValueError(
            f"{path} is of a training with {difference(old, settings)}: go on with that, or delete the file"
        )
    model.load_state_dict(parts["model"])
    optimizer.load_state_dict(parts["optimizer"])
    if averaged is not None:
        averaged.load_state_dict(parts["averaged"])
    return parts["history"]
