"""One training loop for every loss, and one resumable driver for the zoo and the command line.

SGD with Nesterov momentum under a one-cycle schedule, stopped and resumed at any epoch.
"""

import copy
import dataclasses
import importlib.metadata
import io
import itertools
import pathlib
import time

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from lib.checks import (
    check_choice,
    check_draws,
    check_images,
    check_labels,
    check_seed,
    difference,
)
from lib.data import content_hash, load
from lib.engine.admission import logits_of
from lib.engine.classifier import BaseClassifier
from lib.engine.hardware import cores, pick_device
from lib.engine.int8 import quantize
from lib.engine.live import ModelCounts
from lib.ensemble import Ensemble, fit_weights, order_by_accuracy
from lib.losses import LOSSES
from lib.models import build, ensemble_header, load_checkpoint, model_hash, save_checkpoint
from lib.noise import Gaussian, restore_noise
from lib.sigma import Objective, best_expert, carry
from lib.store.files import sha256, write_atomically
from lib.store.registry import option

DTYPES = ("float32", "bfloat16")
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
    dtype: str = option("float32", "bfloat16 trains under autocast.", DTYPES)
    sigma_steps: int | None = option(
        None, "Each image has its own sigma, moved so many steps an epoch (lib.sigma.carry)."
    )
    sigma_lr: float | None = option(None, "Size of these steps, 1e-4 unless given.")
    sigma_copies: int | None = option(None, "Noisy copies of each of these steps, 1 unless given.")

    def __post_init__(self):
        check_draws(epochs=self.epochs, batch=self.batch)
        check_seed(self.seed)
        check_choice(DTYPES, dtype=self.dtype)
        for name in ("sigma_steps", "sigma_copies"):
            if getattr(self, name) is not None:
                check_draws(**{name: getattr(self, name)})


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A trained network as data: all that determines its weights.

    - architecture, data: see lib.models.build and lib.data.load.
    - noise: description of the smoothing distribution trained for (lib.noise).
    - loss: description of the training loss (lib.losses).
    - threads: of torch; split sums round differently, so another number gives other weights.
    - members: above 1 an ensemble of so many networks, of the seeds seed, seed + 1, ...
    - experts: names of networks, with spaces between them, stored beside it, of one noise each:
      this one is then the router of dual smoothing among them, trained on the labels of
      `lib.sigma.best_expert`.
    """

    architecture: str
    data: str
    noise: dict
    loss: dict = dataclasses.field(default_factory=lambda: {"name": "gaussian"})
    schedule: Schedule = dataclasses.field(default_factory=Schedule)
    threads: int | None = None
    members: int = 1
    experts: str = ""

    def header(self):
        """The recipe as a flat dict of plain values, for a checkpoint."""
        parts = dataclasses.asdict(self)
        if self.members == 1:
            del parts["members"]
        if not self.experts:
            del parts["experts"]
        return parts.pop("schedule") | parts


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
    settings = _settings(model, x, y, loss, noise, schedule, state)
    device = torch.device(device) if device else next(model.parameters()).device
    model.to(device).to(memory_format=torch.channels_last)
    with torch.no_grad():
        classes = logits_of(model.eval(), x[:1].to(device)).shape[1]
    y = torch.from_numpy(check_labels(torch.as_tensor(y).cpu(), len(x), "y", classes))
    loop = _Loop(model, loss, noise, schedule, device)
    history = loop.resume(state, settings)
    steps = max(1, len(x) // schedule.batch)
    silent = progress is False
    with tqdm(
        total=schedule.epochs * steps,
        initial=len(history) * steps,
        unit=" steps",
        delay=3,
        disable=silent,
    ) as bar:
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
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=reduced):
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


def noisy_accuracy(model, noise, x, y, dtype="float32", draws=20):
    """Fraction of votes for the right class on the test images 1, 21, 41, ...

    Networks are watched and chosen by it; images certified at a stride of 20 are never among them.

    - model: nn.Module. noise: the smoothing distribution. x, y: the test images and labels.
    - dtype: precision of the votes ("int8" for a network of lib.quantize). draws: of each image.
    """
    index = np.arange(1, len(x), 20)
    shape = x.shape[1:]
    base = BaseClassifier(
        model,
        shape,
        device=next(itertools.chain(model.parameters(), model.buffers())).device,
        dtype=dtype,
        block=250,
        layout="channels_last",
        compile=dtype == "int8",
    )
    votes = ModelCounts(base, x[index], noise, index=index, progress=False).draw(draws)
    return float(votes[np.arange(len(index)), np.asarray(y)[index]].sum() / votes.sum())


def quantize_network(path, model, header, noise, data_path=None, images=1024, seed=0):
    """Make the 8-bit version of a trained network and store it, once (lib.quantize).

    - path: of the checkpoint to write.
    - model, header: the network as load_checkpoint gives it; the header's "name", where it has
      one, is kept as the source.
    - noise: smoothing distribution of the calibration. seed: of its noise.
    - images: number of training images, at equal strides, that the scales are found on.
    - data_path: as lib.data.load takes it.

    Returns the header written, with the noisy accuracy. Raises ValueError naming images, or where
    the network cannot be quantised.
    """
    check_draws(images=images)
    x, _ = load(header["data"], "train", path=data_path)
    if images > len(x):
        raise ValueError(f"images must be at most {len(x)}, the training images; got {images}")
    index = np.arange(images) * (len(x) // images)
    network = quantize(model, x[index], noise, seed)
    made = {
        "architecture": header["architecture"],
        "data": header["data"],
        "dtype": "int8",
        "source": header.get("name"),
        "source_sha256": model_hash(model),
        "noise": noise.describe(),
        "images": images,
        "seed": seed,
        "data_sha256": content_hash(x),
        "noisy_accuracy": noisy_accuracy(
            network, noise, *load(header["data"], "test", path=data_path), "int8"
        ),
        "torch": torch.__version__,
        "torchao": importlib.metadata.version("torchao"),
    }
    save_checkpoint(path, network, made)
    return made


def train(recipe, path, data_path=None, device=None, half=True, say=None):
    """Train a network after a recipe and store it: stopped at any moment, it resumes.

    PATH gets the weights after each epoch, PATH.csv a line per epoch, PATH.state what resuming
    needs until the end. A finished network is left as it is.

    - recipe: a Recipe. path: of the checkpoint.
    - data_path: as lib.data.load takes it. device: default the CPU.
    - half: store the finished weights in half precision.
    - say: called with a line of text after each epoch.

    Returns the header. Raises ValueError where PATH was trained after another recipe.
    """
    path = pathlib.Path(path)
    if recipe.members > 1:
        return _train_ensemble(recipe, path, data_path, device, half, say)
    state, table = (path.with_name(path.name + end) for end in (".state", ".csv"))
    x, y = load(recipe.data, "train", path=data_path)
    test = load(recipe.data, "test", path=data_path)
    noise, settings = restore_noise(recipe.noise), recipe.header()
    settings |= {"data_sha256": content_hash(x)}
    header = load_checkpoint(path)[1] if path.exists() else {}
    if header and {name: header.get(name) for name in settings} != settings:
        raise ValueError(
            f"{path} was trained with {difference(header, header | settings)}: give another path, "
            "take the old setting, or delete it (and its .state)"
        )
    if header.get("epoch") == recipe.schedule.epochs and not state.exists():
        return header
    torch.manual_seed(recipe.schedule.seed)
    network = build(recipe.architecture, recipe.data, len(recipe.experts.split()) or None)
    if recipe.experts:
        y, test = _routes(recipe, path.parent, x, y), (test[0], _routes(recipe, path.parent, *test))
    begin, epochs = time.perf_counter(), recipe.schedule.epochs
    rows = pd.read_csv(table).to_dict("records") if table.exists() else []
    first = []

    def after_epoch(trained, history):
        first.append(len(history))
        last = len(history) == epochs
        accuracy = noisy_accuracy(
            trained, noise, *test, recipe.schedule.dtype, draws=20 if last else 4
        )
        made = settings | {"epoch": len(history), "noisy_accuracy": accuracy}
        save_checkpoint(path, trained, made | {"torch": torch.__version__}, half and last)
        rate = (len(history) - first[0] + 1) / (time.perf_counter() - begin)
        row = history[-1] | {"noisy_accuracy": accuracy, "images_per_second": rate * len(x)}
        rows[len(history) - 1 :] = [row]
        write_atomically(table, pd.DataFrame(rows).to_csv(index=False).encode())
        if say:
            say(_progress(row, epochs, (epochs - len(history)) / rate))

    with cores(recipe.threads or torch.get_num_threads()):
        history = fit(
            network,
            x,
            y,
            LOSSES.restore(recipe.loss),
            noise,
            recipe.schedule,
            device=pick_device(device or "cpu"),
            state=state,
            after_epoch=after_epoch,
        )
        if not first:  # killed after its last epoch, before that one's checkpoint
            after_epoch(network, history)
    state.unlink(missing_ok=True)
    return load_checkpoint(path)[1]


def _routes(recipe, folder, x, y):
    """The labels of a router: which of the recipe's experts has the largest radius at each image.

    Its own draws choose them, of another seed than any record's.
    """
    files = [load_checkpoint(folder / f"{name}.safetensors") for name in recipe.experts.split()]
    noises = [_trained_for(header) for _, header in files]
    return best_expert([network for network, _ in files], noises, x, y, seed=9)


def _trained_for(header):
    """The noise of a checkpoint; the first ones here, and published ones, only say a sigma."""
    return restore_noise(header["noise"]) if "noise" in header else Gaussian(header["sigma"])


def _train_ensemble(recipe, path, data_path, device, half, say):
    """Train the members of an ensemble, each in a file of its own until all are there.

    They are stored best first, by accuracy on noisy copies of every second test image (1, 3, ...);
    the others are for certificates. Its `weights` are those of the weighted vote of the first ten.
    """
    if path.exists():
        return _same_ensemble(recipe, path)
    x, y = load(recipe.data, "test", path=data_path)
    held_out = x[1::2], y.numpy()[1::2], restore_noise(recipe.noise)
    files, loaded = [], []
    for i, member in enumerate(_members(recipe)):
        files.append(path.with_name(f"{path.name}.{i}"))
        train(member, files[-1], data_path, device, half=False, say=say)
        loaded.append(load_checkpoint(files[-1]))
    order, accuracy = order_by_accuracy([network for network, _ in loaded], *held_out, draws=100)
    members = [loaded[i][0] for i in order]
    headers = [loaded[i][1] | {"held_out_accuracy": float(accuracy[i])} for i in order]
    for member in headers:
        del member["format"]
    ensemble, weights = Ensemble(members), fit_weights(members[:10], *held_out, draws=100)
    header = ensemble_header(ensemble, headers) | {"best_weights": np.round(weights, 4).tolist()}
    save_checkpoint(path, ensemble, header, half)
    for file in files:
        file.unlink()
        file.with_name(file.name + ".csv").unlink(missing_ok=True)
    return load_checkpoint(path)[1]


def _members(recipe):
    """The recipes of an ensemble's members, which differ in their seed."""
    for i in range(recipe.members):
        schedule = dataclasses.replace(recipe.schedule, seed=recipe.schedule.seed + i)
        yield dataclasses.replace(recipe, schedule=schedule, members=1)


def _same_ensemble(recipe, path):
    """The header of a finished ensemble; a ValueError where it was trained after another recipe."""
    header = load_checkpoint(path)[1]
    stored = sorted(header.get("members", []), key=lambda member: member["seed"])
    expected = [member.header() for member in _members(recipe)]
    if len(stored) != len(expected):
        raise ValueError(f"{path} holds {len(stored)} members, not {len(expected)}")
    for old, new in zip(stored, expected, strict=True):
        if {name: old.get(name) for name in new} != new:
            raise ValueError(f"{path} was trained with {difference(old, old | new)}")
    return header


def _progress(row, epochs, left):
    return (
        f"epoch {row['epoch']}/{epochs}  loss {row['loss']:.4f}  noisy accuracy "
        f"{row['noisy_accuracy']:.3f} (test images 1, 21, ..., only watched)  "
        f"{row['images_per_second']:,.0f} images/s  {left:.0f} s left"
    )
