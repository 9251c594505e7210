"""Training: the loss by hand, the schedule, augmentation pixel by pixel, reproducible and resumable
runs that learn.
"""

import collections
import copy
import dataclasses

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import nn

from lib import train as training
from lib.data import load
from lib.engine import rounding
from lib.losses import LOSSES, GaussianLoss
from lib.models import build, model_hash
from lib.noise import Gaussian, Uniform
from lib.train import Schedule, crop_and_flip, fit, one_cycle

NOISE = Gaussian(0.25)


def network(architecture="mlp", seed=0):
    torch.manual_seed(seed)
    return build(architecture, "digits")


@pytest.fixture(scope="module")
def digits():
    x, y = load("digits", "train")
    return x[:320], y[:320]


@pytest.fixture(autouse=True)
def one_thread():
    """Sums over several threads may be added in another order from run to run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_gaussian_loss_by_hand():
    """The mean of -log softmax at the label, on the same noisy copies; smoothing mixes in the mean
    over classes.
    """
    model, x, y = network().eval(), torch.rand(5, 1, 8, 8), torch.tensor([0, 3, 9, 1, 1])
    noisy = NOISE.sample(x, torch.Generator().manual_seed(4))
    with torch.no_grad():
        log_p = torch.log_softmax(model(noisy), dim=1)
        plain = -log_p[torch.arange(5), y].mean()
        for smoothing, expected in ((0.0, plain), (0.1, 0.9 * plain - 0.1 * log_p.mean())):
            found = GaussianLoss(smoothing=smoothing)(
                model, x, y, NOISE, torch.Generator().manual_seed(4)
            )
            torch.testing.assert_close(found, expected)


def test_gaussian_loss_draws_fresh_noise():
    model, x, y = network().eval(), torch.rand(5, 1, 8, 8), torch.zeros(5, dtype=torch.int64)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        assert GaussianLoss()(model, x, y, NOISE, generator) != GaussianLoss()(
            model, x, y, NOISE, generator
        )


def test_one_cycle_rises_and_falls():
    """Up to the peak over the first fifth, down to 0 at the end, symmetric about the steps'
    middles; never above the peak.
    """
    rates = np.array([one_cycle(step, 100, 0.4) for step in range(100)])
    assert (np.diff(rates[:20]) > 0).all()
    assert (np.diff(rates[20:]) < 0).all()
    assert rates.max() <= 0.4
    assert rates[0] == pytest.approx(0.4 * 0.005 / 0.2)
    assert rates[-1] == pytest.approx(0.4 * 0.005 / 0.8)
    assert rates[9] + rates[10] == pytest.approx(0.4)


def test_crop_and_flip_gives_a_window_of_the_reflected_image():
    """Each output is one of the 81 windows of the image reflected by 4 pixels, mirrored or not;
    every offset and both kinds occur.
    """
    x = torch.rand(1, 2, 14, 14, generator=torch.Generator().manual_seed(0))
    padded = np.pad(x[0].numpy(), ((0, 0), (4, 4), (4, 4)), mode="reflect")
    windows = {}
    for top in range(9):
        for left in range(9):
            window = padded[:, top : top + 14, left : left + 14]
            windows[window.tobytes()] = (top, left, False)
            windows[window[:, :, ::-1].tobytes()] = (top, left, True)
    assert len(windows) == 162
    out = crop_and_flip(x.expand(3000, -1, -1, -1), torch.Generator().manual_seed(1))
    found = [windows[image.tobytes()] for image in out.contiguous().numpy()]
    assert set(found) == set(windows.values())
    # Each equally likely.
    assert chisquare(list(collections.Counter(found).values())).pvalue > 1e-4


def test_training_learns_and_says_how(digits):
    model = network()
    history = fit(
        model, *digits, GaussianLoss(), Gaussian(0.1), Schedule(12, 0.1, 32), progress=False
    )
    assert [h["epoch"] for h in history] == list(range(1, 13))
    assert history[-1]["loss"] < 0.3 * history[0]["loss"]
    assert not model.training
    x, y = load("digits", "test")
    with torch.no_grad():
        assert (model(x).argmax(dim=1) == y).float().mean() > 0.85


def test_the_optimizer_and_its_schedule_by_hand():
    """SGD with Nesterov momentum and weight decay under one cycle, on |w|^2 / 2, whose gradient is
    w.
    """

    class Scaled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.tensor([1.0, -0.5]))

        def forward(self, x):
            return x.flatten(1)[:, :1] * self.w

    model, x, y = Scaled(), torch.full((4, 1, 1, 1), 0.5), torch.tensor([0, 1, 0, 1])
    expected, velocity = np.array([1.0, -0.5]), 0.0
    settings = {
        "epochs": 5,
        "lr": 0.3,
        "batch": 2,
        "momentum": 0.8,
        "weight_decay": 0.1,
    }

    def loss(model, *others):
        return model.w.square().sum() / 2

    fit(model, x, y, loss, NOISE, Schedule(**settings), progress=False)
    for step in range(10):
        share = (step + 0.5) / 10
        rate = 0.3 * min(share / 0.2, (1 - share) / 0.8)
        gradient = expected + 0.1 * expected
        velocity = 0.8 * velocity + gradient
        expected = expected - rate * (gradient + 0.8 * velocity)
    np.testing.assert_allclose(model.w.detach(), expected, rtol=1e-5)


def test_each_epoch_sees_every_image_once_in_an_order_of_its_own(digits):
    """A loss that notes what it is given: 320 images, 10 batches, no image twice an epoch; fresh
    noise each time.
    """
    seen, draws = [], []

    def spy(model, x, y, noise, generator):
        seen.append(x.reshape(len(x), -1).numpy().copy())
        draws.append(torch.randn(4, generator=generator).numpy())
        return GaussianLoss()(model, x, y, noise, generator)

    fit(network(), *digits, spy, NOISE, Schedule(3, batch=32), progress=False)
    epochs = np.concatenate(seen).reshape(3, 320, 64)
    expected = np.unique(digits[0].reshape(320, 64).numpy(), axis=0, return_counts=True)
    for epoch in epochs:
        for found, wanted in zip(
            np.unique(epoch, axis=0, return_counts=True), expected, strict=True
        ):
            np.testing.assert_array_equal(found, wanted)
    assert (epochs[0] != epochs[1]).any()
    assert (epochs[1] != epochs[2]).any()
    assert len(np.unique(draws, axis=0)) == 30


def test_training_twice_gives_the_same_weights_and_another_seed_others(digits):
    models = [network() for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        # The global generator must not matter.
        torch.manual_seed(np.random.SeedSequence().entropy % 2**32)
        fit(model, *digits, GaussianLoss(), NOISE, Schedule(2, seed=seed), progress=False)
    first, again, other = map(model_hash, models)
    assert first == again != other


@pytest.mark.parametrize("average", [None, 0.9])
def test_a_resumed_training_ends_in_the_same_weights(digits, tmp_path, average):
    """Stopped after two epochs of four, as by a kill, and started again from its state file."""
    schedule = Schedule(4, batch=32, average=average, augment=True)
    whole, stopped, resumed = network(), network(), network(seed=7)
    expected = fit(whole, *digits, GaussianLoss(), NOISE, schedule, progress=False)

    def stop(model, history):
        if len(history) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(
            stopped,
            *digits,
            GaussianLoss(),
            NOISE,
            schedule,
            state=tmp_path / "state",
            progress=False,
            after_epoch=stop,
        )
    found = fit(
        resumed, *digits, GaussianLoss(), NOISE, schedule, state=tmp_path / "state", progress=False
    )
    assert found == expected
    assert model_hash(resumed) == model_hash(whole)


def test_a_state_of_another_training_is_refused(digits, tmp_path):
    x, y = digits
    usual = {"epochs": 1, "batch": 32}

    def trained(model=None, x=x, y=y, loss=None, noise=NOISE, **changed):
        fit(
            model or network(),
            x,
            y,
            loss or GaussianLoss(),
            noise,
            Schedule(**usual | changed),
            state=tmp_path / "state",
            progress=False,
        )

    trained()
    others = {
        "lr": lambda: trained(lr=0.2),
        "weight_decay": lambda: trained(weight_decay=0.0),
        "seed": lambda: trained(seed=1),
        "noise": lambda: trained(noise=Gaussian(0.7)),
        "loss": lambda: trained(loss=GaussianLoss(smoothing=0.1)),
        "labels": lambda: trained(y=(y + 1) % 10),
        "images": lambda: trained(x=1 - x),
        "model": lambda: trained(build("small_cnn", "digits")),
    }
    for name, call in others.items():
        with pytest.raises(ValueError, match=f"is of a training with {name} = "):
            call()


def test_a_state_of_a_loss_with_other_parameters_is_refused(digits, tmp_path):
    """Also of a loss that is no dataclass."""

    class Scaled:
        def __init__(self, factor):
            self.factor = factor

        def __call__(self, *arguments):
            return self.factor * GaussianLoss()(*arguments)

    given = {"state": tmp_path / "state", "progress": False}
    schedule = Schedule(1, batch=32)
    fit(network(), *digits, Scaled(1.0), NOISE, schedule, **given)
    fit(network(), *digits, Scaled(1.0), NOISE, schedule, **given)
    with pytest.raises(ValueError, match="is of a training with loss = "):
        fit(network(), *digits, Scaled(2.0), NOISE, schedule, **given)


def test_averaged_weights_are_the_moving_average(digits):
    """One step an epoch: the mean after each step, recomputed from the weights that plain training
    of the same seed passes through.
    """
    x, y = digits[0][:32], digits[1][:32]
    path, model, plain = [], network(), network()
    expected = copy.deepcopy(plain)
    fit(
        plain,
        x,
        y,
        GaussianLoss(),
        NOISE,
        Schedule(15, batch=32),
        progress=False,
        after_epoch=lambda m, h: path.append(copy.deepcopy(m.state_dict())),
    )
    fit(model, x, y, GaussianLoss(), NOISE, Schedule(15, batch=32, average=0.5), progress=False)
    mean = {k: v.clone() for k, v in expected.state_dict().items()}
    for step, weights in enumerate(path):
        decay = min(0.5, (1 + step) / (10 + step))
        mean = {k: decay * mean[k] + (1 - decay) * weights[k] for k in mean}
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, mean[name], rtol=1e-5, atol=1e-6)


def test_training_in_bfloat16_learns_too(digits):
    model = network("small_cnn")
    history = fit(
        model,
        *digits,
        GaussianLoss(),
        Gaussian(0.1),
        Schedule(8, 0.1, dtype="bfloat16"),
        progress=False,
    )
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def gradients(layer, x, native, monkeypatch):
    """A layer's results and gradients in bfloat16, by the processor's arithmetic or float32's."""
    monkeypatch.setattr(rounding, "has_bfloat16", lambda device: native)
    x = x.clone().requires_grad_()
    layer.zero_grad()
    with rounding.in_bfloat16(torch.device("cpu")):
        out = layer(x)
    (out * torch.linspace(-1, 1, out[0].numel()).view(out[0].shape)).sum().backward()
    return [out.detach(), x.grad, layer.weight.grad.clone(), layer.bias.grad.clone()]


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.Conv2d(8, 16, 3, padding=1, stride=2), (4, 8, 10, 10)), (nn.Linear(30, 20), (16, 30))],
)
def test_bfloat16_in_float32_rounds_as_bfloat16_does(layer, shape, monkeypatch):
    """Each number is the exact one of rounded inputs, rounded; torch's own is near it."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = gradients(layer, x, False, monkeypatch)
    assert found[0].dtype == torch.bfloat16
    exact = copy.deepcopy(layer).bfloat16().double()
    inputs = x.bfloat16().double().requires_grad_()
    out = exact(inputs)
    weights = torch.linspace(-1, 1, out[0].numel()).view(out[0].shape).bfloat16().double()
    (out * weights).sum().backward()
    wanted = [out.detach(), inputs.grad, exact.weight.grad, exact.bias.grad]
    native = gradients(layer, x, True, monkeypatch)
    for a, b, c in zip(found, wanted, native, strict=True):
        # Sums in float32 are off by up to 1e-6 of their largest terms.
        assert (a.double() - b).abs().max() <= 2**-8 * b.abs().max()
        assert (a.double() == b.bfloat16().double()).double().mean() > 0.99
        assert (a.double() - c.double()).norm() < 0.01 * b.norm()


def test_training_by_either_arithmetic_starts_alike(digits, monkeypatch):
    losses = []
    for native in (True, False):
        monkeypatch.setattr(rounding, "has_bfloat16", lambda device, native=native: native)
        schedule = Schedule(2, 0.05, dtype="bfloat16")
        history = fit(
            network("small_cnn"), *digits, GaussianLoss(), NOISE, schedule, progress=False
        )
        losses.append([row["loss"] for row in history])
    assert np.allclose(*losses, rtol=0.02)


def test_each_image_is_trained_under_its_own_sigma(digits):
    """Noise of one level per image follows the images through the shuffled batches."""
    x, y = digits
    sigmas = np.linspace(0.1, 1.0, len(x))
    level = {image.numpy().tobytes(): s for image, s in zip(x, sigmas, strict=True)}
    seen = []

    def spy(model, images, labels, noise, generator):
        found = [level[image.contiguous().numpy().tobytes()] for image in images]
        np.testing.assert_array_equal(noise.sigma, found)
        seen.extend(found)
        return GaussianLoss()(model, images, labels, noise, generator)

    unique = np.unique(x.flatten(1).numpy(), axis=0, return_index=True)[1]
    kept = np.sort(unique)
    noise = Gaussian(sigmas[kept])
    fit(network(), x[kept], y[kept], spy, noise, Schedule(1, batch=32), progress=False)
    assert len(seen) == len(kept) // 32 * 32
    with pytest.raises(ValueError, match="noise must have one level, or"):
        fit(network(), x[kept[:-1]], y[kept[:-1]], spy, noise, Schedule(1), progress=False)


def test_a_loss_may_warm_up(digits):
    """A loss with a method `at` is asked once per epoch for the loss of that fraction."""
    asked = []

    class Warm:
        def at(self, progress):
            asked.append(progress)
            return GaussianLoss()

    fit(network(), *digits, Warm(), NOISE, Schedule(4, batch=64), progress=False)
    assert asked == [0.25, 0.5, 0.75, 1.0]


PER_INPUT = Schedule(4, batch=32, sigma_steps=2, sigma_lr=0.01)


@pytest.mark.parametrize("noise", [Gaussian(0.25), Uniform(0.5)])
def test_each_images_sigma_is_carried_from_epoch_to_epoch(digits, noise):
    """Fixed for a quarter of the epochs; then each moves on from where the last epoch left it."""
    x, y = digits
    start, seen = float(next(iter(vars(noise).values()))), []

    def spy(model, images, labels, noise, generator):
        assert model.training
        seen.append(next(iter(vars(noise).values())))
        return GaussianLoss()(model, images, labels, noise, generator)

    fit(network("small_cnn"), x[:128], y[:128], spy, noise, PER_INPUT, progress=False)
    epochs = np.array(seen).reshape(4, 128)
    assert (epochs[0] == start).all()
    moves = [np.abs(epochs[e] - start).max() for e in (1, 2, 3)]
    assert 0 < moves[0] < moves[2] < 2 * 3 * 0.01 * 5
    assert len(np.unique(epochs[3])) > 100


def test_levels_are_moved_on_as_many_copies_as_asked(digits, monkeypatch):
    x, y = digits
    asked, carry = [], training.carry

    def spy(model, x, scale, generator, steps, lr, n, objective):
        asked.append((steps, lr, n))
        return carry(model, x, scale, generator, steps, lr, n, objective)

    monkeypatch.setattr(training, "carry", spy)
    schedule = dataclasses.replace(PER_INPUT, sigma_copies=3)
    fit(network(), x[:64], y[:64], GaussianLoss(), NOISE, schedule, progress=False)
    assert asked == [(2, 0.01, 3)] * 6  # two steps in each of three epochs
    with pytest.raises(ValueError, match="sigma_copies"):
        dataclasses.replace(PER_INPUT, sigma_copies=0)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_trains_with_a_sigma_of_each_image(digits, name):
    x, y = digits
    history = fit(network(), x[:64], y[:64], LOSSES.make(name), NOISE, PER_INPUT, progress=False)
    assert len(history) == 4


def test_a_resumed_training_carries_its_sigmas_on(digits, tmp_path):
    x, y = (part[:96] for part in digits)
    whole, parts = network(), network()
    fit(whole, x, y, GaussianLoss(), NOISE, PER_INPUT, progress=False)
    state = tmp_path / "state"

    def stop(model, history):
        if len(history) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(parts, x, y, GaussianLoss(), NOISE, PER_INPUT, None, state, False, stop)
    again = network(seed=1)
    fit(again, x, y, GaussianLoss(), NOISE, PER_INPUT, state=state, progress=False)
    assert model_hash(again) == model_hash(whole)
    levels = torch.load(state, weights_only=True)["levels"]
    assert levels.shape == (96,)
    assert len(levels.unique()) > 90


@pytest.mark.parametrize(
    "wrong",
    [{"lr": -1.0}, {"momentum": 1.0}, {"weight_decay": -1e-4}, {"average": 1.5}, {"sigma_lr": -1}],
)
def test_a_schedule_out_of_range_is_named(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"{name} must be in"):
        Schedule(**wrong)
