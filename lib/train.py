"""One training loop for every loss.

SGD with Nesterov momentum under a one-cycle schedule, stopped and resumed at any epoch.
"""

import contextlib
import copy
import dataclasses
import io
import math
import pathlib

import numpy as np
import torch

from lib.checks import (
    check_choice,
    check_draws,
    check_images,
    check_labels,
    check_seed,
    difference,
)
from lib.engine.admission import logits_of
from lib.engine.hardware import keep_freed_memory
from lib.engine.progress import progress_bar
from lib.engine.rounding import in_bfloat16
from lib.sigma import RADII, Objective, carry
from lib.store.files import sha256, write_atomically
from lib.store.registry import option

DTYPES = ("float32", "bfloat16")
RANGES = {
    "lr": (0, math.inf),
    "momentum": (0, 1),
    "weight_decay": (0, math.inf),
    "average": (0, 1),
    "sigma_lr": (0, math.inf),
}
FIXED = 0.25  # fraction of the epochs before levels move: 50 of 200 (Alfarra et al. 2022, 4.1)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How a network is trained, whatever its loss: `fit`'s options, and the command line's.

    Raises ValueError naming the argument.
    """

    epochs: int = option(60, "Passes over the data.")
    lr: float = option(0.1, "Peak of the one-cycle learning rate.")
    batch: int = option(64, "Images per step.")
    momentum: float = option(0.9, "Nesterov momentum.")
    weight_decay: float = option(5e-4, "Weight decay.")
    seed: int = option(0, "Of the initial weights, the order of the images and the noise.")
    augment: bool = option(False, "Random 4-pixel crops and horizontal flips.")
    average: float | None = option(None, "Decay of an average of the weights: the result then.")
    dtype: str = option(
        "float32", "bfloat16: layers take and give it, weights stay float32.", DTYPES
    )
    sigma_steps: int | None = option(
        None, "Each image has its own sigma, moved so many steps an epoch (lib.sigma.carry)."
    )
    sigma_lr: float | None = option(None, "Size of these steps, 1e-4 unless given.")
    sigma_copies: int | None = option(None, "Noisy copies of each of these steps, 1 unless given.")

    def __post_init__(self):
        check_draws(epochs=self.epochs, batch=self.batch)
        check_seed(self.seed)
        check_choice(DTYPES, dtype=self.dtype)
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if value is not None and not low <= value < high:
                raise ValueError(f"{name} must be in [{low}, {high}); got {value!r}")
        for name in ("sigma_steps", "sigma_copies"):
            if getattr(self, name) is not None:
                check_draws(**{name: getattr(self, name)})


def one_cycle(step, steps, peak, warm=0.2):
    """Learning rate at a step: linear from 0 to `peak` over the first `warm` of them, then back."""
    done = (step + 0.5) / steps
    return peak * min(done / warm, (1 - done) / (1 - warm))


def crop_and_flip(x, generator, pad=4):
    """Random crops, after reflection padding by `pad` pixels, and flips of images [B, C, H, W]."""
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
    model, x, y, loss, noise, schedule, device=None, state=None, progress=None, after_epoch=None
):
    """Train `model` in place on clean images; the same arguments give the same weights.

    - model: nn.Module, logits from images in [0, 1].
    - x, y: float32 images [N, channels, height, width] in [0, 1], int64 labels [N].
    - loss: of lib.losses, called as loss(model, x, y, noise, generator). Where it has a method
      `at(progress)`, that is the loss of an epoch that ends at this fraction of the training.
    - noise: the smoothing distribution trained for, of one level or one per image.
    - schedule: a Schedule.
    - device: default the model's.
    - state: path of a state file written after each epoch. Where it exists, training resumes from
      it and ends in the same weights. A state of other images or arguments is refused.
    - progress: True, False, or None (a bar on more than a few seconds).
    - after_epoch: called with (model, history) after each epoch.

    Returns the history, one dict per epoch (epoch, loss, lr). Raises ValueError naming the
    argument.
    """
    check_images(x)
    if noise.size not in (None, len(x)):
        raise ValueError(f"noise must have one level, or {len(x)}, one per image; got {noise.size}")
    if schedule.sigma_steps is not None and type(noise) not in RADII:
        raise ValueError(f"noise must have one level that sigma_steps can move; got {noise}")
    settings = _settings(model, x, y, loss, noise, schedule, state)
    device = torch.device(device) if device else next(model.parameters()).device
    keep_freed_memory()
    model.to(device).to(memory_format=torch.channels_last)
    with torch.no_grad():
        classes = logits_of(model.eval(), x[:1].to(device)).shape[1]
    y = torch.from_numpy(check_labels(torch.as_tensor(y).cpu(), len(x), "y", classes))
    loop = _Loop(model, loss, noise, schedule, device)
    history = loop.resume(state, settings)
    steps = max(1, len(x) // schedule.batch)
    whole, begun = schedule.epochs * steps, len(history) * steps
    with progress_bar(whole, " steps", progress, initial=begun, delay=3) as bar:
        for epoch in range(len(history), schedule.epochs):
            total, rate = loop.epoch(x, y, epoch, steps, bar)
            if not np.isfinite(total):
                raise ValueError(
                    f"training diverged in epoch {epoch + 1} (loss {total / steps}): take a lower "
                    f"lr than {schedule.lr}"
                )
            history.append({"epoch": epoch + 1, "loss": total / steps, "lr": rate})
            bar.set_postfix(loss=f"{total / steps:.3f}", refresh=False)
            loop.save(state, settings, history)
            if after_epoch:
                after_epoch(loop.averaged or model, history)
    if loop.averaged is not None:
        model.load_state_dict(loop.averaged.state_dict())
    model.eval()
    return history


def _settings(model, x, y, loss, noise, schedule, state):
    """What a state file must agree with, as text."""
    fields = getattr(loss, "__dict__", "")
    named = getattr(loss, "__qualname__", f"{type(loss).__name__} {fields}")
    parameters = sum(p.numel() for p in model.parameters())
    labels = np.asarray(torch.as_tensor(y).cpu())
    settings = {
        "model": f"{type(model).__name__} of {parameters:,} parameters",
        "images": sha256(x.cpu().numpy().tobytes()) if state else "",
        "labels": sha256(labels.tobytes()),
        "loss": loss if dataclasses.is_dataclass(loss) else named,
        "noise": noise,
    } | dataclasses.asdict(schedule)
    return {name: str(value) for name, value in settings.items()}


class _Loop:
    """Model, average and optimiser of one training."""

    def __init__(self, model, loss, noise, schedule, device):
        self.model, self.loss, self.noise = model, loss, noise
        self.schedule, self.device = schedule, device
        self.averaged = copy.deepcopy(model) if schedule.average else None
        self.levels = None
        self.optimizer = torch.optim.SGD(
            model.parameters(),
            lr=schedule.lr,
            momentum=schedule.momentum,
            weight_decay=schedule.weight_decay,
            nesterov=True,
        )

    def epoch(self, x, y, epoch, steps, bar):
        """One pass over the data: (sum of the losses, last learning rate)."""
        schedule, total = self.schedule, 0.0
        generator, order = _epoch_random(schedule.seed, epoch, len(x), self.device)
        loss = self.loss
        if hasattr(loss, "at"):
            loss = loss.at((epoch + 1) / schedule.epochs)
        self.model.train()
        for step in range(steps):
            done = epoch * steps + step
            rate = one_cycle(done, schedule.epochs * steps, schedule.lr)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            rows = order[step * schedule.batch : (step + 1) * schedule.batch]
            images = x[rows]
            if schedule.augment:
                images = crop_and_flip(images, generator["cpu"])
            noise = self._noise(images, rows, epoch, len(x), generator["noise"])
            total += self._step(loss, images, y[rows], noise, generator["noise"])
            if self.averaged is not None:
                _average(self.averaged, self.model, schedule.average, done)
            bar.update()
        return total, rate

    def _noise(self, images, rows, epoch, size, generator):
        """The noise of some images, of the levels that algorithm 2 has carried so far and moves."""
        schedule = self.schedule
        if schedule.sigma_steps is None:
            return self.noise.select(rows)
        if self.levels is None:
            (start,) = vars(self.noise).values()
            self.levels = torch.as_tensor(start, dtype=torch.float32).expand(size).clone()
        if epoch >= FIXED * schedule.epochs:
            self.levels[rows] = carry(
                self.model,
                images.to(self.device),
                self.levels[rows].to(self.device),
                generator,
                schedule.sigma_steps,
                schedule.sigma_lr or 1e-4,
                schedule.sigma_copies or 1,
                objective=Objective(noise=type(self.noise)),
            ).cpu()
        return type(self.noise)(self.levels[rows].double().numpy())

    def _step(self, loss, images, labels, noise, generator):
        images = images.to(self.device).to(memory_format=torch.channels_last)
        reduced = self.schedule.dtype == "bfloat16"
        with in_bfloat16(self.device) if reduced else contextlib.nullcontext():
            value = loss(self.model, images, labels.to(self.device), noise, generator)
        self.optimizer.zero_grad(set_to_none=True)
        value.backward()
        self.optimizer.step()
        return float(value.detach())

    def save(self, path, settings, history):
        """Write the state file, whole or not at all; nothing without a path."""
        if path is None:
            return
        parts = {
            "settings": settings,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "history": history,
        }
        if self.averaged is not None:
            parts["averaged"] = self.averaged.state_dict()
        if self.levels is not None:
            parts["levels"] = self.levels
        buffer = io.BytesIO()
        torch.save(parts, buffer)
        write_atomically(path, buffer.getvalue())

    def resume(self, path, settings):
        """History of the state file, its weights loaded; [] where there is none.

        Raises ValueError where it is of another training.
        """
        if path is None or not pathlib.Path(path).exists():
            return []
        parts = torch.load(path, map_location=self.device, weights_only=True)
        if (old := parts.get("settings", {})) != settings:
            raise ValueError(
                f"{path} is of a training with {difference(old, settings)}: continue that one, or "
                "delete the file"
            )
        self.model.load_state_dict(parts["model"])
        self.optimizer.load_state_dict(parts["optimizer"])
        if self.averaged is not None:
            self.averaged.load_state_dict(parts["averaged"])
        if "levels" in parts:
            self.levels = parts["levels"].cpu()
        return parts["history"]


def _epoch_random(seed, epoch, size, device):
    """Generators and order of one epoch: functions of (seed, epoch), so that runs resume exactly.

    Torch's 32-bit generators: they share no stream with noise, which has others (lib.noise).
    """
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
