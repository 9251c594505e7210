"""The attack: inside its ball, repeatable, and beaten by every certificate.

Where the best attack is known, it is as strong as that.
"""

import numpy as np
import pytest
import torch
from test_losses import batch
from test_losses import network as smooth_network
from torch import nn

from lib import attacks, zoo
from lib.attacks import STREAMS, attack_smoothed, ddn, pgd, within
from lib.certify import ABSTAIN, certify, predict
from lib.data import load
from lib.engine.classifier import BaseClassifier
from lib.engine.copies import log_mean_softmax, logits_of_copies
from lib.engine.live import ModelCounts
from lib.noise import CHUNK, Ablation, Gaussian, Uniform, noise_stream

NOISE = Gaussian(0.25)
SHAPE = (1, 8, 8)


@pytest.fixture(scope="module")
def digits():
    """A trained network, its base classifier, 24 test images and their labels."""
    network = zoo.model("digits-cnn-sigma0.25")
    x, y = load("digits", "test")
    return (
        network,
        BaseClassifier(network, SHAPE, dtype=torch.float32, block=400, compile=False),
        x[:24],
        y[:24].numpy(),
    )


def linear(seed=0):
    """A two-class linear network and its unit normal w, which points from class 0 to class 1."""
    torch.manual_seed(seed)  # of the bias
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    network[1].weight.data = torch.randn(2, 64, generator=torch.Generator().manual_seed(seed)) * 0.3
    weight, bias = network[1].weight.detach(), network[1].bias.detach()
    normal = weight[1] - weight[0]
    return network, normal / normal.norm(), (bias[1] - bias[0]) / normal.norm()


def images(count, seed=1):
    return torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(seed)) * 0.5 + 0.25


def length(attacked, x):
    return (attacked.double() - x.double()).flatten(1).norm(dim=1).numpy()


def test_the_attack_stays_strictly_inside_each_radius(digits):
    """Radii from below the resolution of float32 pixels to beyond the path of the attack.

    At the smallest nothing may move.
    """
    network, _, x, y = digits
    radius = np.geomspace(1e-9, 30, len(x))
    attacked = attack_smoothed(network, x, y, NOISE, radius, steps=3, k=10)
    moved = length(attacked, x)
    assert (moved < radius).all()
    reached = (radius > 1e-3) & (radius < 0.2)
    assert (moved[reached] > 0.9999 * radius[reached]).all()
    # Three steps of 0.1 that bend a little.
    assert 0.2 < moved[-1] < 0.3 + 1e-6


def test_one_step_on_a_linear_network_is_its_normal():
    """A linear network's loss grows along its normal, whatever the noise.

    One step has the step's length and no other direction.
    """
    network, normal, _ = linear()
    x = images(6)
    y = np.array([0, 1, 0, 1, 0, 1])
    delta = (attack_smoothed(network, x, y, NOISE, 10.0, steps=1, step_size=0.1, k=5) - x).flatten(
        1
    )
    np.testing.assert_allclose(
        delta, np.where(y == 0, 0.1, -0.1)[:, None] * normal.numpy(), atol=1e-6
    )


def test_a_linear_network_falls_exactly_beyond_its_margin():
    """The attack finds the nearest point where a smoothed linear classifier changes.

    Its distance is |w'x + b| / ||w|| (proposition 5).
    """
    network, normal, offset = linear()
    x = images(40)
    margin = (x.flatten(1) @ normal + offset).numpy()
    side = (margin > 0).astype(int)
    for factor, falls in [(0.9, False), (1.1, True)]:
        attacked = attack_smoothed(
            network, x, side, NOISE, factor * np.abs(margin), step_size=0.05, steps=40, k=20
        )
        after = (attacked.flatten(1) @ normal + offset).numpy() > 0
        np.testing.assert_array_equal(after != side, np.full(40, falls))
        # The best attack ends on the normal, at the radius: no point of the ball is nearer to the
        # other side.
        np.testing.assert_allclose(
            (attacked.flatten(1) @ normal + offset).numpy(), margin * (1 - factor), atol=2e-4
        )
    found = predict(
        ModelCounts(
            network, attacked, NOISE, bounded=False, dtype=torch.float32, block=400, compile=False
        ),
        20_000,
        0.001,
    )
    assert ((found == 1 - side) | (found == ABSTAIN)).all()
    assert (found == 1 - side).mean() > 0.6


def test_no_certificate_falls_and_beyond_it_most_do(digits):
    """The attack breaks most points at twice the radius, and none inside it."""
    network, base, x, _ = digits
    found = certify(ModelCounts(base, x, NOISE), NOISE, 50, 3000, 0.001)
    kept = found.prediction != ABSTAIN
    assert kept.sum() > 15
    fallen = {}
    for factor in (1.0, 2.0):
        radius = factor * found.radius[kept]
        attacked = attack_smoothed(
            network,
            x[kept],
            found.prediction[kept],
            NOISE,
            radius,
            step_size=radius / 8,
            k=50,
            seed=1,
        )
        after = predict(ModelCounts(base, attacked, NOISE, seed=2, bounded=False), 1000, 0.001)
        fallen[factor] = np.mean((after != found.prediction[kept]) & (after != ABSTAIN))
    assert fallen[1.0] == 0
    assert fallen[2.0] > 0.5


def test_the_attack_beats_random_directions(digits):
    network, base, x, y = digits
    radius = 0.5
    attacked = attack_smoothed(network, x, y, NOISE, radius, k=50)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    random = x + radius * direction / direction.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    right = [
        ModelCounts(base, points, NOISE, bounded=False).draw(500)[np.arange(len(y)), y].mean() / 500
        for points in (attacked, random)
    ]
    assert right[0] < right[1] - 0.2


def test_bounded_stays_in_the_pixel_range_and_unbounded_leaves_it(digits):
    network, _, x, y = digits
    inside = attack_smoothed(network, x, y, NOISE, 0.8, k=10, bounded=True)
    assert inside.min() >= 0
    assert inside.max() <= 1
    assert (length(inside, x) < 0.8).all()
    assert length(inside, x).max() > 0.7
    assert attack_smoothed(network, x, y, NOISE, 0.8, k=10).min() < 0


def test_an_example_is_attacked_alike_in_any_company(digits):
    """Its noise is a function of (seed, index, step) alone.

    Neither the batch nor the size of a pass matters, beyond float32 rounding.
    """
    network, _, x, y = digits
    whole = attack_smoothed(network, x, y, NOISE, 0.4, steps=5, k=30, seed=3)
    part = attack_smoothed(
        network, x[[7, 2]], y[[7, 2]], NOISE, 0.4, steps=5, k=30, seed=3, index=[7, 2]
    )
    pieces = attack_smoothed(network, x, y, NOISE, 0.4, steps=5, k=30, seed=3, block=30)
    np.testing.assert_allclose(part, whole[[7, 2]], atol=1e-4)
    np.testing.assert_allclose(pieces, whole, atol=1e-4)
    assert not np.allclose(
        attack_smoothed(network, x, y, NOISE, 0.4, steps=5, k=30, seed=4), whole, atol=1e-4
    )


def test_more_draws_than_a_pass_holds_make_the_same_gradient():
    """k = 25 draws in passes of 10, 10 and 5 give the same image as in one pass.

    On a linear network the gradient's direction has no noise.
    """
    network, _, _ = linear()
    x = images(3)
    split, single = (
        attack_smoothed(network, x, [0, 1, 0], NOISE, 1.0, steps=2, k=25, block=block)
        for block in (10, 1000)
    )
    np.testing.assert_allclose(split, single, atol=1e-6)


def test_sigma_per_example_is_each_examples_own(digits):
    network, _, x, y = digits
    sigma = np.where(np.arange(6) % 2 == 0, 0.1, 0.9)
    both = attack_smoothed(network, x[:6], y[:6], Gaussian(sigma), 0.5, steps=3, k=20)
    for i in range(6):
        alone = attack_smoothed(
            network, x[i : i + 1], y[i : i + 1], Gaussian(sigma[i]), 0.5, steps=3, k=20, index=[i]
        )
        np.testing.assert_allclose(both[i : i + 1], alone, atol=1e-4)
    # Also where each image needs a pass of its own.
    np.testing.assert_allclose(
        attack_smoothed(network, x[:6], y[:6], Gaussian(sigma), 0.5, steps=3, k=20, block=20),
        both,
        atol=1e-4,
    )


def test_the_attack_never_sees_the_draws_that_judge_it(monkeypatch):
    """Each step of each example has a stream of its own.

    It lies beyond every chunk that ModelCounts may draw at the same seed.
    """
    asked = []
    monkeypatch.setattr(
        attacks,
        "noise_stream",
        lambda *arguments: asked.append(arguments[:3]) or noise_stream(*arguments),
    )
    attack_smoothed(linear()[0], images(2), [0, 1], NOISE, 1.0, steps=3, k=4, seed=6, index=[5, 9])
    assert asked == [(6, i, STREAMS + step) for step in range(3) for i in (5, 9)]
    assert STREAMS * CHUNK > 1e12


def test_the_model_is_left_as_it_was():
    network, _, _ = linear()
    network.train()
    attack_smoothed(network, images(2), [0, 1], NOISE, 1.0, steps=1, k=2)
    assert network.training
    assert all(p.requires_grad and p.grad is None for p in network.parameters())


class Broken(nn.Module):
    def forward(self, x):
        return x.flatten(1)[:, :2] * float("nan")


BAD = [
    ({"radius": 0.0}, "radius must be finite and > 0"),
    ({"radius": [0.1, -1.0]}, "radius must be finite and > 0"),
    ({"radius": [0.1, np.nan]}, "radius must be finite and > 0"),
    ({"radius": [0.1, 0.1, 0.1]}, "radius must be .* 2, one per example"),
    ({"radius": np.inf}, "radius must be finite"),
    ({"step_size": 0.0}, "step_size must be finite and > 0"),
    ({"steps": 0}, "steps must be at least 1"),
    ({"k": 2.5}, "k must be a whole number"),
    ({"block": 0}, "block must be at least 1"),
    ({"y": [0]}, "y must be 2 whole numbers"),
    ({"y": [0, -1]}, "y must be >= 0"),
    ({"y": [0, 2]}, "y must be class indices below 2"),
    ({"x": images(2) * 9}, r"x must have pixels in \[0, 1\]"),
    ({"index": [0, 1, 2]}, "index must be 2 whole numbers"),
    ({"seed": -1}, r"seed must be a whole number in \[0, 2\^32\)"),
    ({"seed": 2**32}, "seed must be"),
    ({"model": Broken()}, "model gave non-finite logits"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_input_is_refused_by_name(change, message):
    arguments = {
        "model": linear()[0],
        "x": images(2),
        "y": [0, 1],
        "noise": NOISE,
        "radius": 0.5,
        "steps": 1,
        "k": 2,
    }
    with pytest.raises(ValueError, match=message):
        attack_smoothed(**(arguments | change))


def test_unbounded_counts_are_the_same_counts_inside_the_range(digits):
    _, base, x, _ = digits
    np.testing.assert_array_equal(
        ModelCounts(base, x, NOISE, bounded=False).draw(150), ModelCounts(base, x, NOISE).draw(150)
    )


def test_unbounded_counts_admit_any_finite_pixel_and_no_other(digits):
    _, base, x, _ = digits
    assert (ModelCounts(base, x - 0.5, NOISE, bounded=False).draw(10).sum(axis=1) == 10).all()
    with pytest.raises(ValueError, match=r"pixels in \[0, 1\]"):
        ModelCounts(base, x - 0.5, NOISE)
    for bad in (np.nan, np.inf):
        broken = x.clone()
        broken[3, 0, 2, 2] = bad
        with pytest.raises(ValueError, match="finite pixels"):
            ModelCounts(base, broken, NOISE, bounded=False)


@pytest.mark.parametrize("search", ["pgd", "ddn"])
def test_attacks_stay_in_the_ball_and_in_the_pixel_range(search):
    model, (x, y) = smooth_network().eval(), batch()
    eps = Gaussian(0.25).sample(x.repeat_interleave(2, 0) * 0, torch.Generator().manual_seed(0))
    for epsilon in (0.1, 1.0, 5.0):
        if search == "pgd":
            delta = pgd(model, x, y, eps, epsilon, 6)
        else:
            delta = ddn(model, x, y, eps, epsilon, 6, 0.05)
        assert delta.flatten(1).norm(dim=1).max() <= epsilon * (1 + 1e-5)
        assert (x + delta).min() >= -1e-6
        assert (x + delta).max() <= 1 + 1e-6
        assert delta.abs().max() > 0


def test_the_attack_raises_the_loss_more_than_chance():
    model, (x, y) = smooth_network().eval().requires_grad_(False), batch()
    eps = Gaussian(0.25).sample(x.repeat_interleave(4, 0) * 0, torch.Generator().manual_seed(0))
    delta = pgd(model, x, y, eps, 0.5, 10)
    chance = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    chance = within(chance, 0.5)
    found = []
    for shift in (torch.zeros_like(x), chance, delta):
        logits = logits_of_copies(model, (x + shift).repeat_interleave(4, 0) + eps, 4)
        found.append(float(-log_mean_softmax(logits)[torch.arange(16), y].mean()))
    assert found[2] - found[0] > 3 * abs(found[1] - found[0])


def test_the_attack_refuses_noise_of_another_norm():
    """An l2 step may leave the ball of an l1 or l0 certificate, and would refute nothing."""
    for noise in (Uniform(0.5), Ablation(8, 64)):
        with pytest.raises(ValueError, match="noise must certify l2, the norm of this attack"):
            attack_smoothed(linear()[0], images(2), [0, 1], noise, 1.0, steps=1, k=2)
