"""The staircase: its gates, its exact error, and what it saves."""

import numpy as np
import pytest
from scipy.stats import binom, norm
from sources import Tape, mixed

from lib.bounds import clopper_pearson_lower
from lib.certify import certify
from lib.counts import SimulatedCounts
from lib.noise import Gaussian
from lib.staircase import (
    certify_staircase,
    expected_staircase,
    failure_staircase,
    staircase,
    staircase_bounds,
)

NOISE, ALPHA = Gaussian(0.5), 0.001


def test_the_staircase_follows_its_gates():
    source = Tape(SimulatedCounts(mixed(300), seed=9))
    found = certify_staircase(source, NOISE, 100, 10_000, ALPHA)
    sizes, gates = staircase(10_000, ALPHA)
    chosen = source.given[0].argmax(axis=1)
    for i in range(300):
        k, best = 0, 0.0
        for j, n in enumerate(sizes):
            k += source.given[j + 1][i, chosen[i]]
            if j == len(gates) or k < gates[j]:
                break
            best = max(best, clopper_pearson_lower(gates[j], n, ALPHA))
        bound = max(best, clopper_pearson_lower(k, n, ALPHA))
        assert found.n[i] == 100 + n
        assert found.p_lower[i] == bound
        assert (found.prediction[i] == chosen[i]) == (bound > 0.5)
    assert len(np.unique(found.n)) > 5


@pytest.mark.parametrize(("n", "alpha", "price"), [(100_000, ALPHA, 0.4), (3000, 0.05, 0.3)])
def test_the_staircase_errs_at_most_alpha_exactly(n, alpha, price):
    """Just below each step of the bounds, where it errs most: within alpha, yet tight."""
    steps = staircase(n, alpha, price)
    bound = staircase_bounds(*steps, alpha)
    worst = []
    for j, size in enumerate(steps[0]):
        k = np.linspace(0.5 * size, size, 12).astype(int)
        gate = [steps[1][j]] if j < len(steps[1]) and steps[1][j] <= size else []
        worst += [bound(j, np.append(k, gate).astype(int))]
    worst = np.unique(np.concatenate(worst))
    rates = [failure_staircase(*steps, alpha, p * (1 - 1e-12)) for p in worst[worst > 0.5]]
    assert 0.97 * alpha < max(rates) <= alpha * (1 + 1e-9)


@pytest.mark.parametrize("p", [0.2, 0.4, 0.45, 0.5, 0.6, 0.9])
def test_the_exact_error_of_a_staircase_is_the_sum_over_all_counts(p):
    """A class below 1/2 errs where its bound is above 1/2: between p and 1/2 it abstains."""
    gate, alpha, total = 6, 0.2, 0.0
    floor = clopper_pearson_lower(gate, 8, alpha)
    for first in range(9):
        for second in range(13):
            bound = clopper_pearson_lower(first, 8, alpha)
            if first >= gate:
                bound = max(floor, clopper_pearson_lower(first + second, 20, alpha))
            chance = binom.pmf(first, 8, p) * binom.pmf(second, 12, p)
            total += chance * (bound > max(p, 0.5))
    found = failure_staircase(np.array([8, 20]), np.array([gate]), alpha, p)
    assert found == pytest.approx(total, rel=1e-12)
    assert 0 < found <= alpha


def test_gates_in_any_order_are_sound():
    """The proof needs nothing of the gates: drawn at random, the error stays within alpha."""
    rng = np.random.default_rng(0)
    sizes = np.array([50, 120, 300, 700])
    for _ in range(20):
        gates = rng.integers(sizes[:-1] // 2, sizes[:-1] + 2)
        bound = staircase_bounds(sizes, gates, 0.05)
        worst = np.concatenate([bound(j, np.arange(n // 2, n + 1)) for j, n in enumerate(sizes)])
        for p in rng.choice(worst[worst > 0.5], 25):
            assert failure_staircase(sizes, gates, 0.05, p * (1 - 1e-12)) <= 0.05 * (1 + 1e-9)


def test_the_price_trades_draws_for_radius():
    """Exact means at some p: a larger price never costs draws; price 0 takes CERTIFY's radius."""
    for p in (0.8, 0.9, 0.999):
        means = [
            expected_staircase(*staircase(20_000, ALPHA, price, 12, "radius"), ALPHA, p, NOISE)
            for price in (0.0, 0.2, 0.5, 2.0)
        ]
        radii, draws = zip(*means, strict=True)
        assert list(draws) == sorted(draws, reverse=True)
        assert list(radii) == sorted(radii, reverse=True)
        k = np.arange(20_001)
        one = binom.pmf(k, 20_000, p) @ NOISE.radius(clopper_pearson_lower(k, 20_000, ALPHA))
        assert radii[0] == pytest.approx(one, rel=2e-3)
        assert radii[2] > 0.9 * radii[0]


def test_expected_radius_and_draws_are_those_of_a_run():
    sizes, gates = staircase(5000, ALPHA, 0.3)
    # At the share of a gate about half the examples go on.
    share = gates / sizes[:-1]
    p = float(share[(share > 0.7) & (share < 1)][0])
    source = SimulatedCounts([[p, 1 - p]] * 20_000, seed=1)
    found = certify_staircase(source, NOISE, 100, 5000, ALPHA, price=0.3)
    assert len(np.unique(found.n)) > 1
    radius, draws = expected_staircase(sizes, gates, ALPHA, p, NOISE)
    for values, exact in ((found.radius, radius), (found.n - 100, draws)):
        assert values.mean() == pytest.approx(exact, abs=4 * values.std() / 20_000**0.5)


@pytest.mark.parametrize(
    ("shape", "radius", "draws"), [((), 0.9, 0.2), ((0.4, 12, "radius"), 0.93, 0.4)]
)
def test_the_staircase_takes_fewer_draws_than_certify_for_nearly_its_radius(shape, radius, draws):
    p = mixed(2000)
    found = certify_staircase(SimulatedCounts(p, seed=2), NOISE, 100, 50_000, ALPHA, *shape)
    whole = certify(SimulatedCounts(p, seed=2), NOISE, 100, 50_000, ALPHA)
    assert found.radius.mean() > radius * whole.radius.mean()
    assert found.n.mean() < draws * whole.n.mean()


@pytest.mark.parametrize("n", [5, 2000])
def test_a_staircase_of_one_look_is_certify(n):
    p = mixed(50)
    found = certify_staircase(SimulatedCounts(p, seed=3), NOISE, 100, n, ALPHA, looks=1)
    whole = certify(SimulatedCounts(p, seed=3), NOISE, 100, n, ALPHA)
    assert (found.n == 100 + n).all()
    np.testing.assert_array_equal(found.radius, whole.radius)


def test_gates_aimed_at_acr_serve_images_that_are_likelier_right():
    """Exact: what each aim maximises, over images of z = 0 .. 4, is larger with its own gates."""
    z, unit, price = np.linspace(0, 4, 17), Gaussian(1.0), 0.3
    right = 0.4 + 0.15 * z
    value = {}
    for aim in ("acr", "radius"):
        for looks in (12, 40):
            steps = staircase(20_000, ALPHA, price, looks, aim)
            means = [expected_staircase(*steps, ALPHA, p, unit) for p in norm.cdf(z)]
            radius, draws = np.transpose(means)
            cost = price * draws / 20_000
            value[aim, looks] = (right * radius - cost).mean(), (radius - cost).mean()
    assert value["acr", 40][0] > value["radius", 40][0]
    assert value["radius", 40][1] > value["acr", 40][1]
    # More looks leave more choices.
    assert value["acr", 40][0] > value["acr", 12][0]
    assert value["radius", 40][1] > value["radius", 12][1]


def test_bad_arguments_are_named():
    counts = SimulatedCounts([[0.9, 0.1]])
    with pytest.raises(ValueError, match="price must be"):
        certify_staircase(counts, NOISE, 10, 1000, ALPHA, price=-1)
    with pytest.raises(ValueError, match="aim must be"):
        certify_staircase(counts, NOISE, 10, 1000, ALPHA, aim="accuracy")
    with pytest.raises(ValueError, match=r"looks must be .* at most n = 1000; got 1001"):
        certify_staircase(counts, NOISE, 10, 1000, ALPHA, looks=1001)
    assert len(certify_staircase(counts, NOISE, 10, 20, ALPHA)) == 1
