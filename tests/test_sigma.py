"""The search for sigma against a listing, closed forms and known optima."""

import copy

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.special import ndtr, ndtri
from scipy.stats import binomtest
from sources import Band
from torch import nn
from typer.testing import CliRunner

from lib import __main__ as cli
from lib import zoo
from lib.certify import certify
from lib.counts import RecordedCounts, SimulatedCounts
from lib.data import load
from lib.engine.classifier import BaseClassifier
from lib.experiments import ENGINES
from lib.noise import Ablation, Gaussian, Uniform
from lib.sigma import (
    Ascent,
    Objective,
    climb,
    grid_search_sigma,
    load_sigma,
    mean_scores,
    optimize_sigma,
)
from lib.store.records import load_counts

ALPHA, NAME = 0.05, "digits-cnn-sigma0.25"
ENGINE = ["--dtype", "float32", "--block", "64", "--layout", "contiguous", "--no-compile"]


@pytest.fixture(scope="module")
def digits():
    x, _ = load("digits", "test")
    base = BaseClassifier(
        zoo.model("digits-cnn-sigma0.25"), x.shape[1:], block=64, layout="contiguous", compile=False
    )
    return base, x[:40]


PIXEL = torch.full((1, 1, 1, 1), 0.5)


def listing(model, x, sigma0, steps, lr, unit):
    """Appendix A as released, f as a softmax; the noise of step k is unit[k], [B, n, ...]."""
    size, n = unit.shape[1:3]
    sig = torch.tensor(sigma0, dtype=torch.float32, requires_grad=True).view(size, 1, 1, 1)
    normal = torch.distributions.Normal(torch.zeros(size), torch.ones(size))
    batch = x.repeat((1, n, 1, 1)).view(size * n, *x.shape[1:])
    for step in range(steps):
        eps = unit[step].flatten(0, 1) * sig.repeat((1, n, 1, 1)).view(-1, 1, 1, 1)
        out = model(batch + eps).softmax(1).reshape(size, n, -1).mean(1)
        high, low = out.topk(2).values.T
        gap = normal.icdf(high.clamp(0.02, 0.98)) - normal.icdf(low.clamp(0.02, 0.98))
        (slope,) = torch.autograd.grad((sig.reshape(-1) / 2 * gap).sum(), sig)
        sig.data += lr * slope
    return sig.detach().reshape(-1)


@pytest.mark.parametrize("n", [1, 3])
def test_steps_are_those_of_the_listing(digits, n):
    base, x = digits
    unit = torch.randn(20, len(x), n, *x.shape[1:], generator=torch.Generator().manual_seed(0))
    sigma = torch.full((len(x),), 0.25)
    for step in range(20):
        sigma, _ = climb(base.network, x, sigma, unit[step], 1e-3, Objective())
    expected = listing(base.network, x, [0.25] * len(x), 20, 1e-3, unit)
    torch.testing.assert_close(sigma, expected, rtol=0, atol=1e-6)
    assert (sigma - 0.25).abs().max() > 1e-3


@pytest.mark.parametrize("objective", [Objective(), Objective(scores="logits", clamp=(0.1, 0.9))])
def test_slope_is_that_of_the_estimate(objective):
    """Against central differences in double precision, the noise held fixed."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).double()
    objective = copy.copy(objective)
    object.__setattr__(objective, "scores_of", lambda z: (z / 5).softmax(1))
    x, unit = torch.rand(6, 3, 2, 2).double(), torch.randn(6, 4, 3, 2, 2).double()
    scale = torch.linspace(0.2, 1.0, 6).double()

    def estimate(scale):
        return objective.radius(scale, mean_scores(network, x, scale, unit, objective))

    after, radius = climb(network, x, scale, unit, 1e-3, objective)
    torch.testing.assert_close(radius, estimate(scale).detach())
    slope = (estimate(scale + 1e-6) - estimate(scale - 1e-6)).detach() / 2e-6
    torch.testing.assert_close((after - scale) / 1e-3, slope, rtol=1e-5, atol=1e-7)


def test_finds_the_best_sigma():
    """Half-width .3: sigma Phi^-1(E), E = .05 + .9 (2 Phi(.3 / sigma) - 1), has one maximum."""
    best = minimize_scalar(
        lambda s: -s * ndtri(0.05 + 0.9 * (2 * ndtr(0.3 / s) - 1)),
        bounds=(0.05, 0.4),
        method="bounded",
    ).x
    options = {"steps": 300, "lr": 0.003, "n": 512}
    start = np.array([0.08, 0.3])
    found = optimize_sigma(Band(sharpness=40.0), PIXEL.expand(2, 1, 1, 1), start, **options)
    np.testing.assert_allclose(found, best, rtol=0.05)
    grid = grid_search_sigma(Band(), PIXEL, 0.1, n=20_000, evaluations=20_000 * 50, high=0.5)
    np.testing.assert_allclose(grid, best, rtol=0.1)


def test_the_radius_really_rises(digits):
    """The estimate on fresh noise, after 900 steps and before."""
    base, x = digits
    sigma, path = optimize_sigma(base, x, 0.25, 900, return_path=True)
    assert path.shape == (10, len(x))
    assert (path[0] == 0.25).all()
    assert (path[-1] == sigma).all()
    unit = torch.randn(len(x), 200, *x.shape[1:], generator=torch.Generator().manual_seed(1))

    def estimate(sigma):
        levels = torch.tensor(sigma, dtype=torch.float32)
        with torch.no_grad():
            scores = mean_scores(base.network, x, levels, unit, Objective())
            return Objective().radius(levels, scores).mean()

    radii = [estimate(level) for level in path]
    assert radii[-1] > radii[4] > 1.05 * radii[0]


def test_an_example_depends_on_itself_alone(digits):
    base, x = digits
    whole, path = optimize_sigma(base, x, 0.25, 120, return_path=True)
    assert path.shape == (2, len(x))
    rows = [3, 17, 31]
    few = optimize_sigma(base, x[rows], 0.25, 120, index=rows)
    np.testing.assert_allclose(few, whole[rows], rtol=0, atol=1e-7)
    assert (optimize_sigma(base, x[rows], 0.25, 120, index=rows) == few).all()
    assert (optimize_sigma(base, x[rows], 0.25, 120, index=rows, seed=1) != few).all()
    assert (optimize_sigma(base, x[:1], 0.25, 0) == 0.25).all()
    starts = np.array([0.2, 0.3, 0.4])
    found = optimize_sigma(base, x[rows], starts, 10)
    assert (np.abs(found - starts) < 0.01).all()


def test_leaves_the_model_as_it_was(digits):
    _, x = digits
    model = zoo.model("digits-cnn-sigma0.25").train()
    before = copy.deepcopy(model.state_dict())
    optimize_sigma(model, x[:4], 0.25, 3)
    grid_search_sigma(model, x[:4], 0.25, n=10, evaluations=20)
    assert model.training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(
        torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True)
    )


def test_stays_inside_its_bounds():
    options = {"steps": 50, "lr": 1.0, "n": 8}
    narrow = Objective(bounds=(0.09, 0.11))
    found = optimize_sigma(Band(), PIXEL.expand(4, 1, 1, 1), 0.1, objective=narrow, **options)
    assert ((found >= 0.09) & (found <= 0.11)).all()
    assert (found != 0.1).any()


def test_the_class_may_be_kept():
    """Outside the band class 1 is best at first, and with more noise, too."""
    x = torch.full((1, 1, 1, 1), 0.75)
    kept, anew = Objective(fixed_class=True), Objective()
    for objective in (kept, anew):
        assert objective.radius(
            torch.tensor([2.0]), torch.tensor([[0.3, 0.6, 0.1]]), torch.tensor([0])
        ) == pytest.approx(ndtri(0.3) - ndtri(0.6), abs=1e-6)
    options = {"steps": 100, "lr": 0.003, "n": 256}
    found = [
        optimize_sigma(Band(sharpness=20.0), x, 0.15, objective=o, **options) for o in (kept, anew)
    ]
    assert found[0] != found[1]


def test_the_rest_of_the_classes_may_stand_against_the_best():
    """1 - E_A in place of the next best: the radius of CERTIFY, sigma Phi^-1(E_A)."""
    scores, scale = torch.tensor([[0.2, 0.7, 0.1]]), torch.tensor([0.5])
    rest, following = Objective(against="rest"), Objective()
    assert rest.radius(scale, scores).item() == pytest.approx(Gaussian(0.5).radius(0.7), abs=1e-6)
    expected = 0.25 * (ndtri(0.7) - ndtri(0.2))
    assert following.radius(scale, scores).item() == pytest.approx(expected, abs=1e-6)
    kept = rest.radius(scale, scores, torch.tensor([0])).item()
    assert kept == pytest.approx(0.5 * ndtri(0.2), abs=1e-6)


def test_grid_search_makes_as_many_evaluations_as_it_says():
    class Counted(Band):
        seen = 0

        def forward(self, x):
            Counted.seen += len(x)
            return super().forward(x)

    base = BaseClassifier(Counted(), (1, 1, 1), block=10, layout="contiguous", compile=False)
    for n in (1, 2, 4, 10):
        Counted.seen = 0
        found = grid_search_sigma(base, PIXEL.expand(3, 1, 1, 1), 0.1, n=n)
        assert Counted.seen == 3 * 200
        np.testing.assert_allclose(found * 200 / n, np.rint(found * 200 / n))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"steps": -1}, "steps"),
        ({"steps": 1.5}, "steps"),
        ({"lr": 0}, "lr"),
        ({"n": 0}, "n must"),
        ({"sigma0": 0}, "sigma"),
        ({"sigma0": 20.0}, "bounds"),
        ({"index": [0, 1]}, "index"),
        ({"seed": -1}, "seed"),
        ({"x": torch.zeros(1, 1)}, "x must"),
    ],
)
def test_refuses_bad_input(change, name):
    good = {"model": Band(), "x": PIXEL, "sigma0": 0.1, "steps": 2}
    with pytest.raises(ValueError, match=name):
        optimize_sigma(**good | change)


def test_objective_and_grid_refuse_bad_input():
    for field in (
        {"scores": "odds"},
        {"against": "all"},
        {"clamp": (0.0, 1.0)},
        {"bounds": (0, 1)},
        {"noise": int},
        {"noise": Ablation},
    ):
        with pytest.raises(ValueError, match=next(iter(field))):
            Objective(**field)
    with pytest.raises(ValueError, match="evaluations"):
        grid_search_sigma(Band(), PIXEL, 0.1, n=201)
    with pytest.raises(ValueError, match="non-finite"):
        optimize_sigma(Band(sharpness=float("nan")), PIXEL, 0.1, 2)


def test_votes_of_the_search_must_not_be_counted_again():
    """Nine levels of equal radius, the best bound taken: on the same votes it errs too often."""
    radius, levels = 0.3, np.geomspace(0.2, 1.0, 9)
    runs, n = 20_000, 500
    p = ndtr(radius / levels)
    sources = [SimulatedCounts(np.tile([q, 1 - q], (runs, 1)), j) for j, q in enumerate(p)]
    bounds = [certify(s, Gaussian(v), 100, n, ALPHA) for s, v in zip(sources, levels, strict=True)]
    radii = np.array([b.radius for b in bounds])
    reused = int((radii.max(axis=0) > radius).sum())
    assert reused / runs > 5 * ALPHA
    chosen = radii.argmax(axis=0)
    q = p[chosen]
    fresh = certify(
        SimulatedCounts(np.stack([q, 1 - q], axis=1), 99), Gaussian(levels[chosen]), 100, n, ALPHA
    )
    false = int((fresh.radius > radius).sum())
    assert binomtest(false, runs, ALPHA, alternative="greater").pvalue > 1e-4


def test_uniform_noise_has_its_own_radius(digits):
    """lambda (E_A - E_B): one step by hand, and a search that moves lambda."""
    base, x = digits
    goal = Objective(noise=Uniform)
    scores = torch.tensor([[0.7, 0.1, 0.2]])
    torch.testing.assert_close(goal.radius(torch.tensor([0.4]), scores), torch.tensor([0.2]))
    found = optimize_sigma(base, x, 0.4, 50, lr=1e-3, objective=goal)
    assert np.abs(found - 0.4).max() > 1e-3


@pytest.fixture(scope="module")
def sigma_file(tmp_path_factory):
    """The levels of five digits, as the command writes them."""
    path = tmp_path_factory.mktemp("sigma") / "levels.npz"
    arguments = ["sigma", NAME, "--sigma0", "0.25", "--steps", "200", "--stop", "5", *ENGINE]
    result = CliRunner().invoke(cli.app, [*arguments, "--out", str(path)])
    assert result.exit_code == 0, result.stderr
    return path


def test_the_command_writes_the_levels_of_the_library(sigma_file, digits):
    found, (base, x) = load_sigma(sigma_file), digits
    _, path = optimize_sigma(base, x[:5], 0.25, 200, return_path=True)
    np.testing.assert_array_equal(found.levels, path)
    assert found.index.tolist() == [0, 1, 2, 3, 4]
    assert found.header["model"] == NAME
    assert found.header["lr"] == 1e-4
    apart = torch.cdist(x[:5].flatten(1).double(), x[:5].flatten(1).double()).fill_diagonal_(9)
    np.testing.assert_allclose(found.nearest, apart.amin(dim=1))
    np.testing.assert_array_equal(found.at(100), path[1])
    with pytest.raises(ValueError, match="steps must be one of"):
        found.at(150)
    with pytest.raises(ValueError, match="model = "):
        load_sigma(sigma_file, model="another")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--sigma0 0.3", "sigma0 = 0.25, not 0.3"),
        ("--sigma0 0.25 --seed 1", "seed = 0, not 1"),
        ("--sigma0 0.25 --steps 100", "steps = 200, not 100"),
        ("--sigma0 0.25 --stop 4", "index = [0, 1, 2, 3, 4], not [0, 1, 2, 3]"),
        ("--sigma0 0.25 --block 32", "block = "),
    ],
)
def test_levels_of_another_search_are_not_overwritten(sigma_file, options, message):
    before = sigma_file.read_bytes()
    arguments = ["sigma", NAME, "--steps", "200", "--stop", "5", *ENGINE, *options.split()]
    result = CliRunner().invoke(cli.app, [*arguments, "--out", str(sigma_file)])
    assert result.exit_code == 1
    assert message in result.stderr
    assert "give another --out" in result.stderr
    assert sigma_file.read_bytes() == before


def test_a_finished_search_is_left_as_it_is(sigma_file, monkeypatch):
    monkeypatch.setattr("lib.sigma.optimize_sigma", None)  # so that no search can run
    before = sigma_file.read_bytes()
    arguments = ["sigma", NAME, "--sigma0", "0.25", "--steps", "200", "--stop", "5", *ENGINE]
    result = CliRunner().invoke(cli.app, [*arguments, "--out", str(sigma_file)])
    assert result.exit_code == 0, result.stderr
    assert "5 levels after 200 steps from 0.25" in result.stderr
    assert sigma_file.read_bytes() == before


@pytest.mark.parametrize("wrong", [{"steps": 20}, {"steps": 0}, {"n": 0}, {"lr": -1.0}])
def test_the_options_of_a_search_are_checked(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
        Ascent(**wrong)


def test_certify_takes_a_level_for_each_image(sigma_file, tmp_path):
    log = tmp_path / "log.tsv"
    base = ["certify", NAME, "--sigma-file", str(sigma_file), "--n", "500", *ENGINE]
    run = CliRunner().invoke(cli.app, [*base, "--start", "1", "--stop", "4", "--out", str(log)])
    assert run.exit_code == 0, run.stderr
    record, path = load_counts(f"{log}.npz"), load_sigma(sigma_file)
    assert record.header["noise"]["sigma"] == path.levels[-1, 1:4].tolist()
    found = certify(RecordedCounts(record), Gaussian(path.levels[-1, 1:4]), 100, 500, 0.001)
    assert (found.radius <= Gaussian(path.levels[-1, 1:4]).radius(0.001 ** (1 / 500))).all()
    other = [*base, "--sigma-steps", "100", "--stop", "4", "--out", str(tmp_path / "other")]
    assert CliRunner().invoke(cli.app, other).exit_code == 0
    first = load_counts(tmp_path / "other.npz").header["noise"]["sigma"]
    assert first == path.levels[1, :4].tolist()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stop", "8"], "no level for example 5"),
        (["--stop", "4", "--sigma-steps", "300"], "steps must be one of"),
    ],
)
def test_certify_refuses_a_sigma_file_of_other_images(sigma_file, tmp_path, arguments, message):
    base = ["certify", NAME, "--sigma-file", str(sigma_file), "--out", str(tmp_path / "log")]
    result = CliRunner().invoke(cli.app, [*base, *arguments])
    assert result.exit_code == 1
    assert message in result.stderr


def test_certify_refuses_a_sigma_file_of_another_network(sigma_file, tmp_path):
    base = ["certify", "digits-cnn-sigma0.50", "--sigma-file", str(sigma_file), "--stop", "3"]
    result = CliRunner().invoke(cli.app, [*base, "--out", str(tmp_path / "log")])
    assert result.exit_code == 1
    assert "was made with another network (model_sha256 = " in result.stderr
    assert "or search anew" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sigma-file", "f", "--sigma", "0.9"], "leave out --sigma"),
        (["--sigma-file", "f", "--noise", "Uniform"], "leave out --noise"),
        (["--sigma", "0.25", "--sigma-steps", "100"], "it needs --sigma-file"),
    ],
)
def test_certify_ignores_no_option_beside_a_sigma_file(tmp_path, arguments, message):
    base = ["certify", NAME, "--stop", "3", *ENGINE, "--out", str(tmp_path / "log")]
    result = CliRunner().invoke(cli.app, [*base, *arguments])
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.replace("│", " ").split())


def test_levels_found_on_eight_copies_are_another_path_of_the_zoo():
    name = "digits-macer-sigma0.25-seed0"
    found = zoo.sigma(name, copies=8)
    assert (found.header["n"], found.header["sigma0"]) == (8, 0.25)
    x, _ = load("digits", "test")
    base = BaseClassifier(zoo.model(name), x.shape[1:], **ENGINES["digits"])
    _, path = optimize_sigma(base, x[:10], 0.25, 100, n=8, return_path=True)
    np.testing.assert_allclose(found.levels[:2, :10], path, atol=1e-5)
    record = zoo.record(f"{name}-ds-n8-k100")
    assert record.header["noise"]["sigma"] == found.at(100).tolist()


def test_levels_and_votes_of_the_zoo():
    """A committed path is computed again; a record at sigma* says its levels."""
    found = zoo.sigma(NAME)
    x, _ = load("digits", "test")
    engine = {"block": 400, "layout": "contiguous", "compile": False}
    base = BaseClassifier(zoo.model(NAME), x.shape[1:], **engine)
    _, path = optimize_sigma(base, x[:20], 0.25, 100, return_path=True)
    # Another machine rounds the gradients differently.
    np.testing.assert_allclose(found.levels[:2, :20], path, atol=1e-5)
    record = zoo.record(f"{NAME}-ds-k300")
    assert record.header["noise"] == {"name": "Gaussian", "sigma": found.at(300).tolist()}
    few = zoo.count(f"{NAME}-ds-k300", n=20)
    assert (few.counts.sum(axis=1) == 20).all()
    assert (few.counts <= record.counts).all()
