"""Noise, samplers and losses as data: one registered class gets files, streams and refusals."""

import dataclasses
import functools

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import ndtr, ndtri
from scipy.stats import binom

from lib.adaptive import certify_anytime, certify_at, last_stage_size
from lib.certify import certify, certify_margin, certify_partition
from lib.counts import ModelCounts, RecordedCounts, SimulatedCounts
from lib.iss import certify_iss, failure_rate, sample_size_map
from lib.losses import LOSSES, GaussianLoss
from lib.noise import (
    NOISES,
    Ablation,
    Gaussian,
    Noise,
    Uniform,
    float32_below,
    noise_stream,
    per_image,
    restore_noise,
    standard_uniform,
)
from lib.samplers import (
    SAMPLERS,
    Adaptive,
    Anytime,
    Certify,
    InputSpecific,
    Margin,
    Partition,
    RecordVotes,
    Staircase,
)
from lib.staircase import certify_staircase, failure_staircase, staircase
from lib.store.records import load_counts, save_counts
from lib.store.registry import Registry, option


@pytest.fixture
def registry(monkeypatch):
    """The known noises, and whatever a test adds for its own time."""
    monkeypatch.setattr("lib.noise.NOISES", known := Registry("noise"))
    known |= NOISES
    return known


@pytest.fixture
def box(registry):
    """A distribution of a user's own: uniform on a cube, certified in l1 by lambda (2 p - 1)."""

    @registry.register("Box")
    @dataclasses.dataclass(frozen=True, eq=False)
    class Box(Noise):
        half: float | np.ndarray
        norm = "l1"

        def sample(self, x, generator):
            unit = standard_uniform(x, generator).mul_(2).sub_(1)
            return unit.mul_(per_image(self.half, x)).add_(x)

        def radius(self, p_lower):
            return np.maximum(0.0, self.half * (2 * np.asarray(p_lower) - 1))

        def probability(self, radius):
            return (np.asarray(radius) / self.half + 1) / 2

    return Box


class Bright(torch.nn.Module):
    """Class 1 where the image's mean is above 1/2."""

    def forward(self, x):
        z = x.flatten(1).mean(dim=1, keepdim=True) - 0.5
        return torch.cat([-z, z], dim=1)


def test_a_noise_of_ones_own_has_streams_counts_and_records(box, tmp_path):
    """One class: votes that do not depend on batch or order, a record that restores it, and a
    certificate in its own norm that no other noise can take over."""
    x = torch.full((3, 1, 4, 4), 0.5) + torch.tensor([0.0, 0.02, -0.05]).view(3, 1, 1, 1)
    noise = box(np.array([0.5, 0.5, 0.25]))
    counts = ModelCounts(Bright(), x, noise, block=32, layout="contiguous", progress=False)
    votes = counts.draw(700)
    lone = ModelCounts(
        Bright(), x[2:], noise.select([2]), index=[2], block=32, layout="contiguous", progress=False
    )
    np.testing.assert_array_equal(lone.draw(700)[0], votes[2])
    save_counts(tmp_path / "r.npz", votes, [0, 1, 2], [0, 1, 0], noise=noise.describe())
    replay = RecordedCounts(load_counts(tmp_path / "r.npz"))
    assert replay.noise == noise
    assert certify(replay, noise, 100, 600, 0.01).radius[2] > 0
    with pytest.raises(ValueError, match="noise must be the one that the votes were drawn under"):
        certify(RecordedCounts(load_counts(tmp_path / "r.npz")), Gaussian(0.5), 100, 600, 0.01)


def test_a_record_of_a_noise_that_is_not_registered_here_is_refused(box, tmp_path, monkeypatch):
    header = {"noise": box(0.5).describe()}
    save_counts(tmp_path / "r.npz", [[9, 1]], [0], [0], **header)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"noise must be one of .*; got 'Box'"):
        RecordedCounts(load_counts(tmp_path / "r.npz"))


@pytest.mark.parametrize("sigma", [0.12, np.array([0.12, 0.5, 1 / 3])])
def test_descriptions_come_back_exactly(sigma):
    noise = Gaussian(sigma)
    assert restore_noise(noise.describe()) == noise
    assert hash(restore_noise(noise.describe())) == hash(noise)
    assert noise != Gaussian(np.asarray(sigma) * (1 + 1e-15))
    for registry, things in (
        (SAMPLERS, [Certify(20, 300, 0.01), InputSpecific(decline=0.1), RecordVotes(50)]),
        (LOSSES, [GaussianLoss(smoothing=0.1)]),
    ):
        for thing in things:
            assert registry.restore(registry.describe(thing)) == thing


def test_unknown_names_options_and_classes_are_refused():
    things = Registry("thing")

    @things.register("a")
    @dataclasses.dataclass(frozen=True)
    class A:
        size: int = option(3, "Size.")

    assert things.make("a", size=4) == A(4)
    for description, message in (
        ({"name": "b"}, "thing must be one of a; got 'b'"),
        ({"name": "a", "length": 3}, "thing a takes no length; it takes size"),
        ({"size": 3}, "must be described by name and fields"),
        ("a", "must be described by name and fields"),
    ):
        with pytest.raises(ValueError, match=message):
            things.restore(description)
    with pytest.raises(ValueError, match="thing int is not registered"):
        things.describe(3)
    with pytest.raises(ValueError, match="'a' is registered already"):
        things.register("a")(Certify)
    elsewhere = type("A", (), {"__module__": "mine", "__qualname__": A.__qualname__})
    with pytest.raises(ValueError, match="'a' is registered already"):
        things.register("a")(elsewhere)


def test_a_class_that_lacks_what_its_kind_needs_is_refused():
    """A loss of one's own does not become a noise by the wrong import of `register`."""
    with pytest.raises(ValueError, match="noise 'mine' lacks norm, sample, radius: each noise has"):
        NOISES.register("mine")(GaussianLoss)
    assert "mine" not in NOISES
    with pytest.raises(ValueError, match="sampler 'mine' lacks first, most"):
        SAMPLERS.register("mine")(GaussianLoss)
    with pytest.raises(ValueError, match="loss 'mine' lacks __call__"):
        LOSSES.register("mine")(Gaussian)


@pytest.fixture
def laplace(registry):
    """As short as a noise can be: no inverse of the radius, a table of its own, a tuple."""

    @registry.register("Laplace")
    @dataclasses.dataclass(frozen=True, eq=False)
    class Laplace(Noise):
        scale: float
        corner: tuple = (0.0, 1.0, 2.0)
        norm = "l1"

        @functools.cached_property
        def table(self):
            return np.arange(5)

        def sample(self, x, generator):
            unit = standard_uniform(x, generator)
            return x + self.scale * (unit - 0.5).sign() * (unit - 0.5).abs().mul(-2).log1p().neg()

        def radius(self, p_lower):
            p = np.asarray(p_lower)
            with np.errstate(divide="ignore"):
                return np.maximum(0.0, -self.scale * np.log(2 * (1 - p)))[()]

    return Laplace


def test_a_noise_without_probability_gets_it_by_bisection(laplace):
    noise, exact = laplace(0.5), 1 - np.exp(-np.array([0.0, 0.3, 1.0]) / 0.5) / 2
    np.testing.assert_allclose(noise.probability([0.0, 0.3, 1.0]), exact, rtol=1e-12)
    assert isinstance(noise.probability(0.3), float)
    steps = np.arange(1, 4)
    assert (Noise.probability(Ablation(8, 64), steps) <= Ablation(8, 64).probability(steps)).all()
    assert (Ablation(8, 64).radius(Noise.probability(Ablation(8, 64), steps)) == steps).all()
    counts = SimulatedCounts([[0.95, 0.05]] * 3)
    assert (certify_at(counts, noise, 0.3, (100, 1000), 0.01, 0.01).radius == 0.3).all()
    assert sample_size_map(1000, 0.05, "absolute", noise, 0.01).psi(0.9) > 0


def test_only_arrays_among_a_noises_fields_are_one_number_per_example(laplace):
    noise = laplace(0.5)
    assert len(noise.table) == 5
    assert noise.size is None
    assert noise == laplace(0.5) != laplace(0.5, (0.0, 1.0, 3.0))
    again = noise.__class__(**{k: v for k, v in noise.describe().items() if k != "name"})
    assert again == noise
    assert hash(again) == hash(noise)
    assert laplace(np.array([0.5, 0.25])).select([1]).scale.tolist() == [0.25]


def test_one_number_is_the_level_of_noise_and_radius():
    """At .12 the noise is drawn in float32; the radius is never that of a larger level."""
    for sigma in (0.12, 0.1, 0.25, 1 / 3, 0.5, 1.0):
        noise = Gaussian(sigma)
        drawn = noise.sample(torch.zeros(1, 1, 1, 1), noise_stream(0, 0, 0, torch.device("cpu")))
        unit = noise_stream(0, 0, 0, torch.device("cpu")).standard_normal(1, dtype=np.float32)
        assert drawn.item() == np.float32(noise.level) * unit[0]
        assert noise.radius(0.9) == noise.level * ndtri(0.9)
        assert noise.radius_two(0.9, 0.05) == noise.level / 2 * (ndtri(0.9) - ndtri(0.05))
        assert noise.probability(noise.level) == ndtr(1.0)
        cube = Uniform(sigma)
        assert cube.level == noise.level
        assert cube.radius(0.75) == cube.level / 2
        assert cube.radius_two(0.75, 0.25) == cube.level / 2
        assert cube.probability(cube.level / 2) == 0.75
        assert sigma * (1 - 2**-23) <= noise.level <= sigma
    assert float32_below(0.1) < 0.1 < float(np.float32(0.1))
    assert Gaussian(0.12).level == float(np.float32(0.12)) < 0.12


def test_streams_beyond_32_bits_are_refused():
    """(seed 0, index 2^32 + 5, chunk 0) would be the stream (0, 5, 1)."""
    cpu = torch.device("cpu")
    for seed, index in ((0, 2**32 + 5), (2**32, 0), (0, -1)):
        with pytest.raises(ValueError, match=r"must lie in \[0, 2\^32\)"):
            noise_stream(seed, index, 0, cpu)
    noise_stream(2**32 - 1, 2**32 - 1, 0, cpu)


def test_a_noise_of_another_number_of_examples_is_refused():
    counts = SimulatedCounts([[0.9, 0.1]])
    with pytest.raises(ValueError, match="noise must have one level, or 1, one per example; got 3"):
        certify(counts, Gaussian([0.5, 0.5, 0.5]), 10, 100, 0.01)

    @dataclasses.dataclass(frozen=True, eq=False)
    class Two(Noise):
        a: np.ndarray
        b: np.ndarray

    two = Two(np.ones(2), np.ones(3))
    with pytest.raises(ValueError, match="arrays differ in length"):
        two.select([0])


def test_what_a_sampler_states_is_what_it_takes():
    """first, most and fixed of every registered sampler, at the probabilities where it may stop."""
    noise = Gaussian(0.5)
    samplers = [
        Certify(20, 300),
        *(InputSpecific(20, 300, decline=1e-6, reuse=reuse) for reuse in (False, True)),
        Margin(20, 300),
        Partition(20, 300),
        Adaptive(radius="0.25", stages="50,400", n0=20),
        Anytime(radius="0.25", n=300),
        Anytime(radius="0.0", n=110),
        Anytime(radius="0.25", n=300, runner_up=True, n0=20),
        Staircase(20, 300),
        RecordVotes(50),
    ]
    assert {type(sampler) for sampler in samplers} == set(SAMPLERS.values())
    for sampler in samplers:
        source = SimulatedCounts([[p, 1 - p] for p in (0.5, 0.6, 0.9, 0.999, 1.0)])
        asked, draw = [], source.draw

        def spy(n, asked=asked, draw=draw):
            asked.append(np.broadcast_to(n, 5))
            return draw(n)

        source.draw = spy
        certificates = sampler(source, noise)
        assert (asked[0] == sampler.first).all()
        total = np.sum(asked, axis=0)
        np.testing.assert_array_equal(total, certificates.n)
        assert (total <= sampler.most).all()
        assert not sampler.fixed or (total == sampler.most).all()
    votes = RecordVotes(50)(SimulatedCounts([[0.5, 0.5]]), noise)
    assert (votes.n[0], votes.prediction[0], votes.radius[0]) == (50, -1, 0)


@pytest.mark.parametrize(
    ("sampler", "call"),
    [
        (Certify(20, 300, 0.01), lambda c, z: certify(c, z, 20, 300, 0.01)),
        (
            InputSpecific(20, 300, 0.01, 0.2, "relative", True),
            lambda c, z: certify_iss(
                c, z, 20, 300, sample_size_map(300, 0.2, "relative", z, 0.01), 0.01, True
            ),
        ),
        (Margin(20, 300, 0.01, 0.3), lambda c, z: certify_margin(c, z, 20, 300, 0.01, 0.3)),
        (
            Partition(20, 300, 0.01, False),
            lambda c, z: certify_partition(c, z, 20, 300, 0.01, False),
        ),
        (
            Adaptive("0.25", "50,400", 20, 0.01, 0.1),
            lambda c, z: certify_at(c, z, 0.25, (50, 400), 0.01, 0.1, n0=20),
        ),
        (
            Anytime("0.1,0.25", 500, 0.01, 0.1),
            lambda c, z: certify_anytime(c, z, [0.1, 0.25], 500, 0.01, 0.1),
        ),
        (
            Anytime("0.25", 500, 0.01, runner_up=True, n0=20),
            lambda c, z: certify_anytime(c, z, 0.25, 500, 0.01, runner_up=True, n0=20),
        ),
        (
            Staircase(20, 3000, 0.01, 0.1, 5, "radius"),
            lambda c, z: certify_staircase(c, z, 20, 3000, 0.01, 0.1, 5, "radius"),
        ),
    ],
)
def test_a_sampler_is_its_function_with_all_of_its_options(sampler, call):
    """None of them left at its default, and none that makes no difference to these votes."""
    noise, top = Gaussian(0.5), np.linspace(0.5, 1, 60)
    p = np.stack([top, 0.6 * (1 - top), 0.3 * (1 - top), 0.1 * (1 - top)], axis=1)

    def answers(run):
        return run(SimulatedCounts(p, seed=1), noise).frame()

    found = answers(sampler)
    pd.testing.assert_frame_equal(found, answers(call))
    assert 0.1 < (found["prediction"] >= 0).mean() < 1
    plain = type(sampler)()
    for field in dataclasses.fields(sampler):
        default = getattr(plain, field.name)
        if getattr(sampler, field.name) != default and field.name not in ("n", "stages", "radius"):
            other = dataclasses.replace(sampler, **{field.name: default})
            assert not found.equals(answers(other)), field.name


@pytest.mark.parametrize("reuse", [False, True])
def test_exact_failures_are_those_of_the_options_given(reuse):
    noise, p = Gaussian(0.5), 0.55
    sizes = sample_size_map(300, 0.2, "relative", noise, 0.01)
    iss = InputSpecific(20, 300, 0.01, 0.2, "relative", reuse)
    assert iss.failure(p, noise) == failure_rate(p, 20, sizes, reuse)
    steps, right = staircase(3000, 0.01, 0.1, 5, "radius"), binom.sf(9, 20, p)
    expected = right * failure_staircase(*steps, 0.01, p)
    expected += (1 - right) * failure_staircase(*steps, 0.01, 1 - p)
    stairs = Staircase(20, 3000, 0.01, 0.1, 5, "radius")
    assert stairs.failure(p, noise) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("n", [1000, 100_000])
def test_the_standard_of_adaptive_stages_is_the_certify_of_the_same_reach(n):
    """Theorem 6.1.3 backwards: from the last stage that CERTIFY(n) needs to n."""
    last = last_stage_size(n, 0.001, 3)
    sampler = Adaptive(stages=f"100,500,{last}", n0=50)
    assert sampler.standard - 50 == n
    assert Anytime(n=n).standard == Staircase(100, n).standard == 100 + n
