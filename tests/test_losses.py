"""Training losses: by hand, against finite differences, at their limits; nothing left changed."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import nn

from lib import losses
from lib.engine import copies
from lib.losses import (
    LOSSES,
    CatRsLoss,
    ConsistencyLoss,
    GaussianLoss,
    MacerLoss,
    SmoothAdvConsistencyLoss,
    SmoothAdvLoss,
    StabilityLoss,
)
from lib.models import model_hash
from lib.noise import Ablation, Gaussian, Uniform
from lib.train import Schedule, fit

W = np.array([3.0, -2.0, -2.0, 1.0])
ALL = [
    GaussianLoss(m=2),
    StabilityLoss(),
    MacerLoss(k=4),
    ConsistencyLoss(),
    SmoothAdvLoss(epsilon=0.5, steps=3, m=2),
    SmoothAdvLoss(epsilon=0.5, steps=4, m=2, attack="ddn", train="mean"),
    SmoothAdvConsistencyLoss(epsilon=0.5, steps=2, m=2),
    CatRsLoss(epsilon=0.5, steps=2, m=3),
]
NAMES = [f"{type(loss).__name__}-{getattr(loss, 'attack', '')}" for loss in ALL]
every_loss = pytest.mark.parametrize("loss", ALL, ids=NAMES)


class Linear(nn.Module):
    """Logits (w x, 0): class 0 has probability 1 / (1 + exp(-w x))."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(W, dtype=torch.float64))

    def forward(self, x):
        z = x.flatten(1) @ self.w
        return torch.stack([z, torch.zeros_like(z)], dim=1)


class Fixed(Gaussian):
    """Noise that is known: the copies of the one image get these shifts along w, in logits."""

    def __init__(self, shifts, sigma=0.5):
        super().__init__(sigma)
        object.__setattr__(self, "shifts", shifts)

    def select(self, index):
        return self

    def sample(self, x, generator):
        along = np.outer(self.shifts, W / (W @ W))
        return x + torch.tensor(along).reshape(x.shape)


def image(z):
    """One image of four grey pixels whose logit w x is z."""
    grey = np.full(4, 0.5)
    return torch.tensor(grey + (z - W @ grey) * W / (W @ W)).reshape(1, 1, 2, 2)


def network(dtype=torch.float32, seed=0):
    """A smooth network with a batch norm, for 16 images of 8x8 and 3 classes, in training mode."""
    torch.manual_seed(seed)
    layers = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(144, 3)
    return nn.Sequential(*layers).to(dtype)


def batch(dtype=torch.float32, size=16):
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(size, 1, 8, 8, generator=generator, dtype=dtype)
    return x, torch.randint(3, (size,), generator=generator)


def value(loss, model, x, y, noise=None, seed=0):
    noise = noise or Gaussian(0.25)
    return loss(model, x, y, noise, torch.Generator().manual_seed(seed))


def by_hand(loss, z, shifts, sigma=0.5):
    """The loss of the linear model on one image of logit z and class 0."""
    found = value(loss, Linear(), image(z), torch.tensor([0]), Fixed(shifts, sigma))
    return float(found.detach())


# At logits log 3 and log 9 class 0 has probability .75 and .9: their mean is .825.

LOG3 = math.log(3)


def entropy(p):
    return -p * math.log(p) - (1 - p) * math.log(1 - p)


def cross_entropy(p, q):
    return -p * math.log(q) - (1 - p) * math.log(1 - q)


def test_gaussian_by_hand():
    expected = -(math.log(0.75) + math.log(0.9)) / 2
    assert by_hand(GaussianLoss(m=2), LOG3, (0, LOG3)) == pytest.approx(expected, rel=1e-12)
    smooth = (0.9 * expected) + 0.1 * (cross_entropy(0.5, 0.75) + cross_entropy(0.5, 0.9)) / 2
    found = by_hand(GaussianLoss(smoothing=0.1, m=2), LOG3, (0, LOG3))
    assert found == pytest.approx(smooth, rel=1e-12)


def test_stability_by_hand():
    """Clean .75, noisy .9: the noisy prediction is held to the clean one."""
    expected = -math.log(0.75) + 2.5 * cross_entropy(0.75, 0.9)
    assert by_hand(StabilityLoss(lbd=2.5), LOG3, (LOG3,)) == pytest.approx(expected, rel=1e-12)


def test_macer_by_hand():
    """The hinge at p = .825 against .175, sigma .5; with beta = 2 at the mean of 9/10 and 81/82."""
    for beta, p in ((1.0, 0.825), (2.0, (9 / 10 + 81 / 82) / 2)):
        hinge = 8 - 2 * norm.ppf(p)
        expected = -math.log(0.825) + 12 * 0.25 * hinge
        found = by_hand(MacerLoss(k=2, beta=beta), LOG3, (0, LOG3))
        assert found == pytest.approx(expected, rel=1e-9)


def test_consistency_by_hand():
    divergence = cross_entropy(0.825, 0.75) + cross_entropy(0.825, 0.9) - 2 * entropy(0.825)
    expected = -(math.log(0.75) + math.log(0.9)) / 2 + 10 * divergence / 2 + 0.5 * entropy(0.825)
    assert by_hand(ConsistencyLoss(), LOG3, (0, LOG3)) == pytest.approx(expected, rel=1e-12)


def test_smoothadv_by_hand():
    """The best attack on a linear model lowers its logit by epsilon |w|, here by log 3."""
    epsilon = LOG3 / np.linalg.norm(W)
    each = -(math.log(0.5) + math.log(0.75)) / 2
    mean = -math.log(0.625)
    for train, expected in (("each", each), ("mean", mean)):
        loss = SmoothAdvLoss(epsilon=epsilon, m=2, train=train)
        assert by_hand(loss, LOG3, (0, LOG3)) == pytest.approx(expected, rel=1e-9)
    loss = SmoothAdvConsistencyLoss(epsilon=epsilon, m=2, lbd=2.0, eta=0.5)
    divergence = cross_entropy(0.625, 0.5) + cross_entropy(0.625, 0.75) - 2 * entropy(0.625)
    expected = each + 2 * divergence / 2 + 0.5 * entropy(0.625)
    assert by_hand(loss, LOG3, (0, LOG3)) == pytest.approx(expected, rel=1e-9)


def test_ddn_by_hand():
    """Its recursion in one dimension: the norm shrinks by gamma where wrong, and grows else."""
    steps, gamma, epsilon, length = 8, 0.2, 0.5, np.linalg.norm(W)
    z, norm_, delta, best = 0.3 * length, epsilon, 0.0, np.inf
    for _ in range(steps):
        wrong = z - delta * length < 0
        best = delta if wrong and delta < best else best
        norm_ *= 1 - gamma if wrong else 1 + gamma
        delta = norm_  # on a line every step points the same way
    assert 0.3 < best < epsilon
    loss = SmoothAdvLoss(epsilon=epsilon, steps=steps, m=1, attack="ddn", gamma=gamma)
    expected = math.log1p(math.exp(best * length - z))
    assert by_hand(loss, z, (0,)) == pytest.approx(expected, rel=1e-9)


def test_ddn_leaves_alone_what_it_cannot_break():
    loss = SmoothAdvLoss(epsilon=0.01, steps=4, m=1, attack="ddn")
    assert by_hand(loss, 1.0, (0,)) == pytest.approx(math.log1p(math.exp(-1.0)), rel=1e-12)


def test_cat_rs_by_hand():
    """All copies right: both terms, the attack by its own recursion in numpy, copy by copy."""
    rng = np.random.default_rng(0)
    x, eps = rng.uniform(0.4, 0.6, 4) + 2.5 * W / (W @ W), rng.normal(0, 0.2, (3, 4))
    probability = lambda points: 1 / (1 + np.exp(-points @ W))  # noqa: E731
    target = probability(x + eps).mean()
    assert (probability(x + eps) > 0.5).all()
    high = []
    for e in eps:
        now = e
        for _ in range(2):
            uphill = np.sign(probability(x + now) - target) * W / np.linalg.norm(W)
            shift = now + 0.3 * uphill - e
            now = e + shift * min(1, 0.3 / np.linalg.norm(shift))
            scale = np.sqrt(np.mean(e**2) / np.mean(now**2))
            now = e.mean() + (now - now.mean()) * scale
        high.append(cross_entropy(target, probability(x + now)) - entropy(target))
    expected = -np.log(probability(x + eps)).mean() + 1.5 * max(high)
    fixed = Fixed(())
    fixed.sample = lambda images, generator: images + torch.tensor(eps).reshape(images.shape)
    loss = CatRsLoss(lbd=1.5, epsilon=0.3, steps=2, m=3)
    found = value(loss, Linear(), torch.tensor(x).reshape(1, 1, 2, 2), torch.tensor([0]), fixed)
    assert float(found.detach()) == pytest.approx(expected, rel=1e-9)


def test_cat_rs_drops_the_copies_of_largest_loss():
    """Two of four copies right: K is Binomial(4, 1/2), at least 1; the rest and `high` count 0."""
    shifts = (-0.6, 0.2, 0.4, -1.0)
    sorted_losses = np.sort([math.log1p(math.exp(-(0.3 + s))) for s in shifts])
    values = {k: sorted_losses[:k].sum() / 4 for k in (1, 2, 3)}
    found = []
    for seed in range(400):
        loss = CatRsLoss(lbd=0.0)
        got = value(loss, Linear(), image(0.3), torch.tensor([0]), Fixed(shifts), seed)
        found.append(float(got.detach()))
    counts = {k: np.isclose(found, values[k], rtol=1e-9).sum() for k in values}
    # P(K = 1), also where the draw is 0, then 2 and 3: 5/16, 6/16, 4/16, within 4 deviations.
    for k, p in ((1, 5 / 16), (2, 6 / 16), (3, 4 / 16)):
        assert abs(counts[k] - 400 * p) < 4 * math.sqrt(400 * p * (1 - p))


@every_loss
def test_gradients_match_finite_differences(loss, monkeypatch):
    """In float64, with what the method holds constant (attack, soft target) held constant."""
    model, (x, y) = network(torch.float64), batch(torch.float64)
    for name in ("pgd", "ddn"):
        monkeypatch.setattr(losses, name, once(getattr(losses, name)))
    for name in ("_attack", "_target"):
        monkeypatch.setattr(CatRsLoss, name, once(getattr(CatRsLoss, name)))
    value(loss, model, x, y).backward()
    worst = 0.0
    for parameter in model.parameters():
        flat, gradient = parameter.data.view(-1), parameter.grad.view(-1)
        largest = gradient.abs().max()
        for i in {0, flat.numel() // 2, int(gradient.abs().argmax())}:
            numeric = central_difference(lambda: value(loss, model, x, y), flat, i)
            worst = max(worst, float((gradient[i] - numeric).abs() / largest.clamp_min(1e-3)))
    print(f"largest error of {loss}: {worst:.1e}")
    assert worst < 1e-6


def once(function):
    """The function, computed the first time and from then on remembered."""
    results = []

    def remembered(*arguments, **keywords):
        if not results:
            results.append(function(*arguments, **keywords).detach())
        return results[0]

    return remembered


@torch.no_grad()
def central_difference(f, flat, i, h=1e-5):
    saved, ends = flat[i].clone(), []
    for step in (h, -h):
        flat[i] = saved + step
        ends.append(f())
    flat[i] = saved
    return (ends[0] - ends[1]) / (2 * h)


def same(first, second, seed=3):
    """Both losses and their gradients agree, but for the rounding of noise to float32."""
    results = []
    for loss in (first, second):
        model, (x, y) = network(torch.float64), batch(torch.float64)
        got = value(loss, model, x, y, seed=seed)
        got.backward()
        results.append([got.detach(), *(p.grad for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


@dataclasses.dataclass(frozen=True)
class MeanSoftmax:
    """-log of the mean softmax over m copies, written out."""

    m: int = 2

    def __call__(self, model, x, y, noise, generator):
        copies = noise.sample(x.repeat_interleave(self.m, 0), generator).to(x.dtype)
        p = model(copies).softmax(1).reshape(len(x), self.m, -1).mean(1)
        return -p[torch.arange(len(x)), y].log().mean()


def test_limits():
    """A weight or an epsilon of 0 leaves the simpler loss, value and gradient."""
    same(ConsistencyLoss(lbd=0.0, eta=0.0, m=3), GaussianLoss(m=3))
    same(SmoothAdvLoss(epsilon=0.0, m=2), GaussianLoss(m=2))
    same(SmoothAdvLoss(epsilon=0.0, m=2, train="mean"), MeanSoftmax())
    same(SmoothAdvConsistencyLoss(epsilon=0.0, m=2, lbd=3.0), ConsistencyLoss(lbd=3.0))
    consistent = SmoothAdvConsistencyLoss(epsilon=0.5, steps=2, m=2, lbd=0.0, eta=0.0)
    same(consistent, SmoothAdvLoss(epsilon=0.5, steps=2, m=2))
    same(MacerLoss(lbd=0.0, k=2), MeanSoftmax())
    same(MacerLoss(k=2, deferred=0.5).at(0.5), MeanSoftmax())
    same(MacerLoss(k=2, gamma=0.0), MeanSoftmax())


def test_macer_has_no_radius_term_where_wrong():
    """On an image of which most copies are wrong lbd does not count; on its mirror it does."""
    for z, counts in ((-LOG3, False), (LOG3, True)):
        found = [by_hand(MacerLoss(k=2, beta=1.0, lbd=lbd), z, (0, 0.2)) for lbd in (0.0, 12.0)]
        assert (found[0] != found[1]) == counts


def test_macer_is_finite_where_a_probability_rounds_to_one():
    """Phi^-1(1) is infinite: such an image is beyond every hinge, without NaN gradients."""
    model, x = Linear(), image(200.0)
    loss = value(MacerLoss(k=2), model, x, torch.tensor([0]), Fixed((0, 1)))
    loss.backward()
    assert loss.detach() == pytest.approx(0, abs=1e-12)
    assert torch.isfinite(model.w.grad).all()


def test_warm_up_and_deferral():
    """epsilon grows linearly over the first tenth; lbd waits for the first third."""
    adversarial = SmoothAdvLoss(epsilon=2.0, warmup=0.1)
    found = [adversarial.at(share).epsilon for share in (0.01, 0.05, 0.1, 0.5, 1.0)]
    assert found == pytest.approx([0.2, 1.0, 2.0, 2.0, 2.0])
    assert SmoothAdvLoss(warmup=0.0).at(0.01).epsilon == SmoothAdvLoss().epsilon
    # Published: 10 of 150 epochs.
    assert SmoothAdvLoss().at(3 / 150).epsilon == pytest.approx(0.3)
    assert isinstance(SmoothAdvConsistencyLoss().at(0.5), SmoothAdvConsistencyLoss)
    assert [MacerLoss(deferred=1 / 3).at(s).lbd for s in (0.1, 1 / 3, 0.34, 1.0)] == [0, 0, 12, 12]


def test_cat_rs_takes_the_votes_of_its_teacher(tmp_path, monkeypatch):
    """With a teacher that is sure of class 0, the divergence is held to class 0."""
    teacher = Linear()
    monkeypatch.setattr(losses, "_teacher", lambda path, device: teacher)
    teacher.w.data *= 1000
    model, x, y = Linear(), image(LOG3), torch.tensor([0])
    loss = CatRsLoss(lbd=1.0, epsilon=0.0, m=2, teacher="network.safetensors")
    found = float(value(loss, model, x, y, Fixed((0, LOG3))).detach())
    expected = -(math.log(0.75) + math.log(0.9)) / 2 - math.log(0.75)
    assert found == pytest.approx(expected, rel=1e-9)


@every_loss
def test_seeded(loss):
    """The same generator seed gives the same value, another one another; no global randomness."""
    model, (x, y) = network(), batch()
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(np.random.SeedSequence().entropy % 2**32)
        found.append(float(value(loss, copy.deepcopy(model), x, y, seed=seed).detach()))
    assert found[0] == found[1] != found[2]


@every_loss
def test_one_sigma_per_example_equals_a_loop(loss, monkeypatch):
    """In eval mode, where examples do not meet in a batch norm. CAT-RS's draw is left out."""
    monkeypatch.setattr(CatRsLoss, "_accepted", lambda self, logits, y, g: torch.full_like(y, 3))
    model, (x, y) = network().eval(), batch(size=6)
    sigma = np.linspace(0.05, 1.0, 6)
    together = value(loss, model, x, y, Gaussian(sigma))
    generator = torch.Generator().manual_seed(0)
    alone = [
        loss(model, x[i : i + 1], y[i : i + 1], Gaussian(sigma[i]), generator) for i in range(6)
    ]
    torch.testing.assert_close(together, torch.stack(alone).mean(), rtol=1e-4, atol=1e-5)
    equal = value(loss, model, x, y, Gaussian(np.full(6, 0.25)))
    torch.testing.assert_close(equal, value(loss, model, x, y))


@every_loss
def test_nothing_is_left_changed(loss):
    """Modes, also mixed ones, gradients, images; batch norms count training passes only."""
    model, (x, y) = network(), batch()
    model[2].eval()
    model[4].bias.requires_grad_(False)
    before = x.clone()
    result = value(loss, model, x, y)
    assert [module.training for module in model] == [True, True, False, True, True]
    assert all(p.grad is None for p in model.parameters())
    assert [p.requires_grad for p in model.parameters()] == [True] * 5 + [False]
    assert torch.equal(x, before)
    assert not x.requires_grad
    assert result.shape == ()
    assert result.requires_grad
    assert model[1].num_batches_tracked == (2 if isinstance(loss, StabilityLoss | CatRsLoss) else 1)


@every_loss
def test_passes_are_counted(loss):
    """`passes` counts the images that go through the network, in units of the batch."""
    model, (x, y) = network(), batch()
    seen = []
    model[0].register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    value(loss, model, x, y)
    assert sum(seen) == loss.passes * len(x)


@every_loss
def test_large_batches_pass_one_noise_at_a_time_to_the_same_value(loss, monkeypatch):
    model, (x, y) = network(torch.float64).eval(), batch(torch.float64)
    results = []
    for pixels in (copies.ONE_PASS, 0):
        monkeypatch.setattr(copies, "ONE_PASS", pixels)
        model.zero_grad()
        result = value(loss, model, x, y)
        result.backward()
        results.append([result.detach(), *(p.grad.clone() for p in model.parameters())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@every_loss
def test_under_autocast_and_without_gradients(loss):
    """A float32 value near the exact one, in bfloat16; and a value where gradients are off."""
    model, (x, y) = network(), batch()
    exact = value(loss, copy.deepcopy(model), x, y).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = value(loss, copy.deepcopy(model), x, y).detach()
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=0.1, atol=0.05)
    with torch.no_grad():
        torch.testing.assert_close(value(loss, model, x, y), exact)


@every_loss
def test_a_stopped_training_resumes_to_the_same_weights(loss, tmp_path):
    """Stopped in its warm-up, after the first of three epochs; also another run's global seed."""
    if hasattr(loss, "warmup"):
        loss = dataclasses.replace(loss, warmup=0.9)
    schedule, state = Schedule(epochs=3, batch=8, lr=0.05), tmp_path / "state"

    def stop(model, history):
        raise KeyboardInterrupt

    hashes = []
    for seed, stopped in ((0, False), (0, True)):
        model, (x, y) = network(seed=seed), batch()
        if stopped:
            with pytest.raises(KeyboardInterrupt):
                train(model, x, y, loss, schedule, state=state, after_epoch=stop)
            model = network(seed=1)
        train(model, x, y, loss, schedule, state=state if stopped else None)
        hashes.append(model_hash(model))
    assert hashes[0] == hashes[1]


def train(model, x, y, loss, schedule, **options):
    return fit(model, x, y, loss, Gaussian(0.25), schedule, progress=False, **options)


def test_every_loss_is_registered_under_one_name():
    assert {type(loss) for loss in ALL} == set(LOSSES.values())
    for loss in LOSSES.values():
        assert loss() == loss()
        with pytest.raises(dataclasses.FrozenInstanceError):
            loss().m = 3


def test_a_loss_of_ones_own_is_made_by_name():
    """Registered, it is known by name; described as data, it is restored."""
    registry = type(LOSSES)("loss")
    registry.register("mean-softmax")(MeanSoftmax)
    own = registry.make("mean-softmax", m=5)
    assert own == MeanSoftmax(m=5)
    assert registry.restore(registry.describe(own)) == own
    for loss in ALL:
        assert LOSSES.restore(LOSSES.describe(loss)) == loss


BAD = [
    (lambda: GaussianLoss(m=0), "m must be at least 1"),
    (lambda: GaussianLoss(smoothing=1.0), r"smoothing must be a number in \[0, 1\)"),
    (lambda: StabilityLoss(lbd=-1.0), r"lbd must be a number in \[0, inf\)"),
    (lambda: MacerLoss(k=2.5), "k must be a whole number"),
    (lambda: MacerLoss(gamma=math.nan), "gamma must be a number"),
    (lambda: ConsistencyLoss(eta="1"), "eta must be a number"),
    (lambda: SmoothAdvLoss(epsilon=-0.1), "epsilon must be a number"),
    (lambda: SmoothAdvLoss(attack="fgsm"), "attack must be one of 'pgd', 'ddn'"),
    (lambda: SmoothAdvLoss(train="all"), "train must be one of 'each', 'mean'"),
    (lambda: SmoothAdvConsistencyLoss(lbd=math.inf), "lbd must be a number"),
    (lambda: CatRsLoss(steps=0), "steps must be at least 1"),
]


@pytest.mark.parametrize(("make", "message"), BAD, ids=[message[:20] for _, message in BAD])
def test_bad_hyper_parameters(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_losses_that_need_additive_l2_noise_refuse_others():
    for loss in (MacerLoss(), SmoothAdvLoss(), CatRsLoss()):
        with pytest.raises(ValueError, match="noise must be"):
            value(loss, network(), *batch(), Ablation(4, 64))
    clipped = Gaussian(0.5)
    object.__setattr__(clipped, "added", False)  # as of a noise that keeps pixels in [0, 1]
    with pytest.raises(ValueError, match="noise must be added to the image"):
        value(SmoothAdvLoss(), network(), *batch(), clipped)
    with pytest.raises(ValueError, match="noise must be Gaussian for MACER"):
        value(MacerLoss(), network(), *batch(), Uniform(0.5))
