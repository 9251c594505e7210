"""Adaptive samplers: the pseudo-code example by example, theorem 6.1, and exact audits."""

import dataclasses

import numpy as np
import pytest
from scipy.stats import norm
from sources import Tape, mixed

from lib.adaptive import (
    _grid,
    _pair_tests,
    certify_anytime,
    certify_at,
    last_stage_size,
    probability_pairs,
    stage_shares,
)
from lib.audit import audit, true_radius, verdict
from lib.boundaries import bonferroni, crossing, design, outcomes, two_classes
from lib.bounds import clopper_pearson_lower, clopper_pearson_upper
from lib.certify import ABSTAIN
from lib.counts import RecordedCounts, SimulatedCounts
from lib.noise import Ablation, Gaussian

NOISE, ALPHA, BETA = Gaussian(0.5), 0.001, 0.001
STAGES = (100, 1000, 12_000)


def test_last_stage_size_of_theorem_6_1():
    """The paper's own last stage of four, 120,000, is 69 draws short of its theorem."""
    assert [last_stage_size(100_000, 0.001, s) for s in (2, 3, 4)] == [110_035, 115_905, 120_069]
    assert last_stage_size(1_000_000, 0.001, 4) == 1_200_687
    assert last_stage_size(1_000_000, 0.001, 3) == 1_159_041
    assert last_stage_size(1000, 0.001, 1) == 1000


@pytest.mark.parametrize(("n", "alpha", "s"), [(1000, 0.001, 4), (50, 0.05, 2), (12_345, 0.01, 7)])
def test_the_last_stage_reaches_certifys_largest_radius_and_no_smaller_one_does(n, alpha, s):
    most = alpha ** (1 / n)
    last = last_stage_size(n, alpha, s)
    assert (alpha / s) ** (1 / last) >= most > (alpha / s) ** (1 / (last - 1))


def test_certify_at_follows_algorithm_2():
    """Line by line with Clopper and Pearson's bounds, on 400 examples, from the same draws."""
    source = Tape(SimulatedCounts(mixed(400), seed=1))
    found = certify_at(source, NOISE, 0.3, STAGES, ALPHA, BETA, n0=50)
    chosen = source.given[0].argmax(axis=1)
    s, needed = len(STAGES), norm.cdf(0.3 / 0.5)
    for i in range(400):
        drawn, answer = 50, ABSTAIN
        for stage, n in enumerate(STAGES, start=1):
            k = source.given[stage][i, chosen[i]]
            drawn += n
            assert source.asked[stage][i] == n
            if clopper_pearson_lower(k, n, ALPHA / s) >= needed:
                answer = chosen[i]
                break
            if stage < s and clopper_pearson_upper(k, n, BETA / (s - 1)) < needed:
                break
        assert (found.prediction[i], found.n[i]) == (answer, drawn)
        # Nothing is drawn after the answer.
        assert all(asked[i] == 0 for asked in source.asked[stage + 1 :])
    np.testing.assert_array_equal(found.radius, np.where(found.prediction == ABSTAIN, 0, 0.3))
    assert len(np.unique(found.n)) == 3


def test_the_counters_of_algorithm_2():
    """ASA, ASC, ASR at each stage: hand-made examples, one for each exit."""
    votes = [[[100, 0], [0, 100], [80, 20], [76, 24]], [[0, 0], [0, 0], [990, 10], [700, 300]]]

    given = iter(np.array([[[9, 1]] * 4, *votes]))

    class Scripted:
        classes = 2

        def __len__(self):
            return 4

        def draw(self, n):
            return next(given)

    found = certify_at(Scripted(), Gaussian(1.0), 1.0, (100, 1000), ALPHA, BETA, n0=10)
    np.testing.assert_array_equal(found.prediction, [0, ABSTAIN, 0, ABSTAIN])
    np.testing.assert_array_equal(found.n, [110, 110, 1110, 1110])
    table = stage_shares(found, 10 + np.cumsum((100, 1000)))
    np.testing.assert_array_equal(table[["ASA", "ASC", "ASR"]], [[25, 25, 50], [25, 25, 50]])
    with pytest.raises(ValueError, match="spent must list"):
        stage_shares(found, [100, 1100])


@pytest.mark.parametrize("radius", [0.0, 0.05, 0.5, 1.0])
def test_theorem_6_1_exactly(radius):
    """1: P(certify) <= alpha at p_r. 2: P(abstain early) <= beta from p_r on."""
    null = NOISE.probability(radius)
    test = bonferroni(null, STAGES, ALPHA, BETA)
    certified, _ = outcomes(test, [null * (1 - 1e-9)])
    assert certified.sum() <= ALPHA
    for p in np.linspace(null, 1, 7):
        assert outcomes(test, [p])[1][0, :-1].sum() <= BETA


def test_certify_at_with_the_class_given():
    record = np.array([[13_100, 0], [0, 13_100]])
    found = certify_at(
        RecordedCounts(record), NOISE, 0.5, STAGES, ALPHA, BETA, n0=0, prediction=[0, 0]
    )
    np.testing.assert_array_equal(found.prediction, [0, ABSTAIN])
    np.testing.assert_array_equal(found.n, [100, 100])


@pytest.mark.parametrize("beta", [None, BETA])
def test_certify_anytime_follows_its_boundaries(beta):
    """Look by look on 300 examples: any class may cross, nothing is drawn after the answer."""
    source = Tape(SimulatedCounts(mixed(300), seed=2))
    found = certify_anytime(source, NOISE, 0.3, 5000, ALPHA, beta)
    test = design(NOISE.probability(0.3), 5000, ALPHA, beta)
    votes = np.cumsum(source.given, axis=0)
    drawn = np.cumsum(source.asked, axis=0)
    for i in range(300):
        for j, (b, a) in enumerate(zip(test.certify, test.abstain, strict=True)):
            most = votes[j, i].max()
            if most >= b or most <= a:
                break
        answer = votes[j, i].argmax() if most >= b else ABSTAIN
        n = test.looks[j]
        assert (found.prediction[i], found.n[i]) == (answer, n)
        assert (drawn[: j + 1, i] == test.looks[: j + 1]).all()
        assert drawn[-1, i] == n
    certain = found.prediction != ABSTAIN
    assert 0.2 < certain.mean() < 0.9
    np.testing.assert_array_equal(found.p_lower[certain], NOISE.probability(0.3))
    np.testing.assert_array_equal(found.radius, np.where(certain, 0.3, 0.0))


@pytest.mark.parametrize("n", [1000, 20_000])
def test_anytime_takes_a_fraction_of_certify_ats_draws_at_no_less_power(n):
    """Exact: mean draws over p, and at no p more than .001 less power than CERTIFY(n)."""
    null = NOISE.probability(0.5)
    theirs = bonferroni(null, (100, n // 10, last_stage_size(n, ALPHA, 3)), ALPHA, BETA)
    ours = design(null, n, ALPHA)
    p = np.linspace(0.5, 0.999, 60)
    draws = [np.sum((c + a) * t.spent) / 60 for t in (theirs, ours) for c, a in [outcomes(t, p)]]
    assert draws[0] > 2 * draws[1]


def test_a_grid_is_tested_in_turn_on_one_stream():
    """The largest radius of the certified prefix; a single one is the grid of one."""
    radii, p = [0.0, 0.25, 0.5, 1.0], mixed(200)
    grid = certify_anytime(SimulatedCounts(p, seed=3), NOISE, radii, 2000, ALPHA)
    assert set(np.unique(grid.radius)) == {0.0, 0.25, 0.5, 1.0}
    for i in np.random.default_rng(0).choice(200, 40, replace=False):
        # With the truth far from every radius there is only one right answer.
        gaps = np.abs(np.sqrt(2000) * (p[i, 0] - NOISE.probability(np.array(radii))))
        if gaps.min() > 4:
            expected = [r for r in radii if NOISE.probability(r) < p[i, 0]]
            answer = expected[-1] if expected else None
            assert (grid.prediction[i] != ABSTAIN) == bool(expected)
            assert not expected or grid.radius[i] == answer
    one = certify_anytime(SimulatedCounts(p, seed=4), NOISE, [0.25], 2000, ALPHA)
    same = certify_anytime(SimulatedCounts(p, seed=4), NOISE, 0.25, 2000, ALPHA)
    for field in dataclasses.fields(one):
        np.testing.assert_array_equal(getattr(one, field.name), getattr(same, field.name))


def test_a_larger_radius_of_a_grid_is_of_the_class_of_the_smaller_one():
    """Class 0 crosses the first boundary, later class 1 the second: class 0 keeps radius 0."""

    class Turning:
        classes, drawn = 2, 0

        def __len__(self):
            return 1

        def draw(self, n):
            before, self.drawn = self.drawn, self.drawn + int(n[0])
            return np.array([[0, int(n[0])] if before else [least, 100 - least]])

    low, high = (design(NOISE.probability(r), 2000, ALPHA) for r in (0.0, 0.1))
    least = int(low.certify[0])
    assert high.abstain[0] < least < high.certify[0]
    source = Turning()
    found = certify_anytime(source, NOISE, [0.0, 0.1], 2000, ALPHA)
    assert (found.prediction[0], found.radius[0], found.p_lower[0]) == (0, 0.0, 0.5)
    # Class 1 alone would have had the larger radius from these draws.
    hits = source.drawn - least
    assert clopper_pearson_lower(hits, source.drawn, ALPHA) > norm.cdf(0.1 / 0.5)


def test_the_tests_of_a_grid_share_alpha_with_other_classes_at_the_first():
    """Exactly, near p = 1/2, where a design made for its own radius alone would err too often."""
    nulls, alpha = NOISE.probability(np.array([0.0, 0.005, 0.015])), 0.05
    tests = _grid(nulls, 1000, alpha, None)
    alone = [design(null, 1000, alpha) for null in nulls]
    for i in (1, 2):
        for others, holds in ((tests, True), (alone, False)):
            worst = max(
                crossing(others[i], p) + crossing(tests[0], 1 - p)
                for p in np.linspace(nulls[i - 1], nulls[i], 17)
            )
            assert (worst <= alpha) == holds
            assert 0.9 * alpha < worst


def test_a_grid_costs_less_than_its_radii_one_by_one():
    p, radii = mixed(300), [0.1, 0.25, 0.5, 0.75, 1.0]
    grid = certify_anytime(SimulatedCounts(p, seed=5), NOISE, radii, 5000, ALPHA).n.mean()
    alone = [
        certify_anytime(SimulatedCounts(p, seed=5), NOISE, r, 5000, ALPHA).n.mean() for r in radii
    ]
    assert max(alone) <= grid < 0.9 * sum(alone)


def test_noise_of_each_example_is_a_loop_over_them():
    record = SimulatedCounts(mixed(30), seed=6).draw(3000)
    sigma = np.array([0.25, 0.5, 1.0] * 10)
    together = certify_anytime(RecordedCounts(record), Gaussian(sigma), [0.1, 0.3], 2000, ALPHA)
    at = certify_at(RecordedCounts(record), Gaussian(sigma), 0.2, (100, 800), ALPHA, BETA)
    for i in range(30):
        noise = Gaussian(float(sigma[i]))
        for whole, sampler in (
            (together, lambda c, noise=noise: certify_anytime(c, noise, [0.1, 0.3], 2000, ALPHA)),
            (at, lambda c, noise=noise: certify_at(c, noise, 0.2, (100, 800), ALPHA, BETA)),
        ):
            own = sampler(RecordedCounts(record[i : i + 1], index=[i]))
            for name in ("prediction", "radius", "n"):
                assert getattr(whole, name)[i] == getattr(own, name)[0]


def test_the_guarantee_of_the_anytime_samplers_by_simulation():
    """T2, T1 and a grid from 1/2 on, at the truths just below each radius and at ties."""
    samplers = {
        "T2": lambda counts, noise: certify_anytime(counts, noise, 0.25, 2000, 0.01),
        "T1": lambda counts, noise: certify_anytime(counts, noise, 0.25, 2000, 0.01, 0.01),
        "small": lambda counts, noise: certify_anytime(counts, noise, 0.005, 2000, 0.01),
        "grid": lambda counts, noise: certify_anytime(counts, noise, [0, 0.02, 0.5], 2000, 0.01),
    }
    just = [float(NOISE.probability(r)) * (1 - 1e-12) for r in (0.0, 0.005, 0.02, 0.25, 0.5)]
    rows = [[p, 1 - p] for p in just] + [[p, (1 - p) / 2, (1 - p) / 2] for p in just[1:]]
    for name, sampler in samplers.items():
        table = audit(sampler, NOISE, rows, alpha=0.01, runs=10_000)
        assert verdict(table) == "holds", f"{name}\n{table}"
        # Not for want of use: at the worst truth most of alpha is spent.
        assert table["rate"].max() > 0.6, f"{name}\n{table}"


def test_two_class_errors_are_exact():
    """The simulated rates are those of the exact convolution, early abstentions included."""
    test = design(NOISE.probability(0.02), 1000, 0.02)
    p = float(test.null) * (1 - 1e-12)
    found = certify_anytime(SimulatedCounts([[p, 1 - p]] * 40_000, seed=7), NOISE, 0.02, 1000, 0.02)
    exact = two_classes(test, p).sum(axis=1)
    shares = [(found.prediction == c).mean() for c in (0, 1, ABSTAIN)]
    np.testing.assert_allclose(shares, exact, atol=4 * np.sqrt(0.02 / 40_000))
    assert exact[:2].sum() <= 0.02


def test_the_curve_holds_the_radius():
    points = probability_pairs(NOISE, 0.5, 10_000, ALPHA)
    assert points[0] == pytest.approx([norm.cdf(1), 1 - norm.cdf(1)])
    assert (np.diff(points, axis=0) < 0).all()
    reached = NOISE.radius_two(points[1:, 0], points[1:, 1])
    assert ((reached >= 0.5) & (reached < 0.5 + 1e-9)).all()


def test_both_tests_of_a_pair_have_alpha_and_no_more():
    """Exactly, at the point of the curve that each refutes: p_A = a, and p_B = b."""
    for a, b in probability_pairs(NOISE, 0.25, 1000, 0.02)[1::2]:
        first, second = _pair_tests((a, b), 1000, 0.02)
        assert (first.null, second.null) == (a, 1 - b)
        for test in (first, second):
            assert 0.6 * 0.02 < crossing(test, test.null) <= 0.02


def test_counting_the_runner_up_certifies_what_one_probability_cannot():
    """p_A = .75 and ten rivals of .025 each: sigma Phi^-1(.75) < .5 = r < the true radius."""
    p = [[0.75, *[0.025] * 10]] * 200
    assert NOISE.radius(0.75) < 0.5 < true_radius(NOISE, p[0])[0]
    with_rival = certify_anytime(
        SimulatedCounts(p, seed=8), NOISE, 0.5, 20_000, ALPHA, runner_up=True
    )
    alone = certify_anytime(SimulatedCounts(p, seed=8), NOISE, 0.5, 20_000, ALPHA)
    assert (alone.prediction == ABSTAIN).all()
    assert (with_rival.prediction == 0).mean() > 0.95
    assert with_rival.n.mean() < 20_000 / 3


def test_the_guarantee_with_the_runner_up():
    """Truths on the curve itself, where any point's test may err, with few and many classes."""
    points = probability_pairs(NOISE, 0.25, 1000, 0.02)
    rows = [[points[0, 0] - 1e-12, 1 - points[0, 0] + 1e-12]]
    for a, b in points[[1, 3, 6]]:
        a = a * (1 - 1e-9)
        rest = 1 - a - b
        parts = int(np.ceil(rest / b))
        rows.append([a, b, *[rest / parts] * parts])
        rows.append([a, b * (1 - 1e-9), *[rest / (parts + 5)] * (parts + 5)])

    def sampler(counts, noise):
        return certify_anytime(counts, noise, 0.25, 1000, 0.02, runner_up=True, n0=50)

    table = audit(sampler, NOISE, rows, alpha=0.02, runs=10_000)
    assert verdict(table) == "holds", str(table)
    assert table["rate"].max() > 0.3


def test_bad_arguments_are_named():
    counts = SimulatedCounts([[0.9, 0.1]])
    with pytest.raises(ValueError, match="stages must rise"):
        certify_at(counts, NOISE, 0.5, (100, 100), ALPHA, BETA)
    with pytest.raises(ValueError, match="stages must be"):
        certify_at(counts, NOISE, 0.5, (0, 100), ALPHA, BETA)
    with pytest.raises(ValueError, match="beta"):
        certify_at(counts, NOISE, 0.5, STAGES, ALPHA, 0.0)
    with pytest.raises(ValueError, match="one number"):
        certify_at(counts, NOISE, [0.5, 1.0], STAGES, ALPHA, BETA)
    with pytest.raises(ValueError, match="n0 must be 0"):
        certify_at(counts, NOISE, 0.5, STAGES, ALPHA, BETA, n0=10, prediction=[0])
    for radius in (-1.0, [0.5, 0.25], [], np.nan):
        with pytest.raises(ValueError, match="radius must be"):
            certify_anytime(counts, NOISE, radius, 1000, ALPHA)
    with pytest.raises(ValueError, match="radius must be one that n = 1000"):
        certify_anytime(counts, NOISE, 2.0, 1000, ALPHA)
    with pytest.raises(ValueError, match="runner_up takes one radius"):
        certify_anytime(counts, NOISE, [0.1, 0.2], 1000, ALPHA, runner_up=True)
    with pytest.raises(ValueError, match="s must be"):
        last_stage_size(1000, ALPHA, 0)


def test_the_first_point_of_a_curve_certifies_its_radius():
    """Also where the radius rises in steps, and a rounding error would lose a whole pixel."""
    for keep, pixels, radii in ((4, 64, (1, 6, 7)), (4, 784, (81,)), (45, 784, (5,))):
        noise = Ablation(keep, pixels)
        for radius in radii:
            a, b = probability_pairs(noise, radius, 10_000, 0.001)[0]
            assert noise.radius_two(a, b) >= radius
            assert noise.radius(a) >= radius


def test_an_example_that_no_draws_can_certify_abstains_beside_others():
    """At r = .5 a thousand hits do not show Phi(.5 / .12); the second example is as if alone."""
    p, noise = [[0.97, 0.03]] * 2, Gaussian(np.array([0.12, 0.5]))
    found = certify_anytime(SimulatedCounts(p, seed=3), noise, 0.5, 1000, ALPHA)
    assert (found.prediction[0], found.n[0]) == (ABSTAIN, 0)
    assert found.radius[1] == 0.5
    with pytest.raises(ValueError, match="radius must be one that n = 1000 hits"):
        certify_anytime(SimulatedCounts(p, seed=3), Gaussian(np.full(2, 0.12)), 0.5, 1000, ALPHA)


def test_pairs_of_probabilities_have_tests_at_the_least_alpha():
    for b in probability_pairs(NOISE, 0.31, 1000, 1e-10)[:, 1]:
        design(1 - b, 1000, 1e-10, alone=True)
