"""Gaussian noise and its radius, and Cohen's bound beside the two older ones.

Against closed forms, naive formulas and scipy's optimiser.
"""

import itertools
import math
from fractions import Fraction

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.stats import binomtest, chisquare, hypergeom, kstest, norm

from lib.counts import ModelCounts
from lib.noise import NOISES, Ablation, Gaussian, Noise, Uniform, restore_noise
from lib.theory import cohen_radius, lecuyer_bound, lecuyer_radius, li_bound, li_radius

sigmas = st.floats(0.01, 4)
# Pairs of every kind: far apart, close together, near 0 and near 1.
small = st.floats(0, 12).map(lambda digits: 10.0**-digits)
pairs = st.one_of(
    st.tuples(st.floats(0, 1), st.floats(0, 1)).map(lambda t: (t[0], t[1] * min(t[0], 1 - t[0]))),
    st.tuples(st.floats(0.001, 0.5), small).map(lambda t: (t[0], t[0] * (1 - t[1]))),
    st.tuples(small, st.floats(0, 1)).map(lambda t: (1 - t[0], t[0] * min(t[1], 1 - t[0]))),
).filter(lambda t: t[0] > t[1])


def some_pairs(count=300):
    """p_a, p_b as arrays: random ones, close ones and extreme ones."""
    rng = np.random.default_rng(0)
    p_a = rng.uniform(0, 1, count)
    p_b = rng.uniform(0, 1, count) * np.minimum(p_a, 1 - p_a)
    gap = 10.0 ** -np.arange(1, 10)
    p_a, p_b = np.append(p_a, 0.4 + gap / 2), np.append(p_b, 0.4 - gap / 2)
    far = 10.0 ** -np.arange(1, 15)
    return np.append(p_a, 1 - far), np.append(p_b, far * rng.uniform(0, 1, len(far)))


def test_radius_by_hand():
    """sigma Phi^-1(p), with Phi^-1(.99) = 2.3263479 from a printed table.

    At or below 1/2 nothing is certified, at 1 everything.
    """
    np.testing.assert_allclose(
        Gaussian(0.5).radius([0.99, 0.5, 0.3, 0.0, 1.0]), [1.16317394, 0, 0, 0, np.inf], rtol=1e-8
    )
    assert isinstance(Gaussian(0.5).radius(0.99), float)
    assert Gaussian(1.0).probability(1.0) == pytest.approx(0.8413447461, abs=1e-10)
    assert Gaussian(0.25).probability(0) == 0.5


def test_the_largest_radius_of_the_papers_setting():
    """n = 100,000, alpha = .001, all votes for one class: 3.811 sigma.

    By the normal quantile of .001^(1/100,000).
    """
    assert Gaussian(1.0).radius(0.001**1e-5) == pytest.approx(norm.ppf(0.001**1e-5), rel=1e-12)
    assert Gaussian(1.0).radius(0.001**1e-5) == pytest.approx(3.8115, abs=5e-5)


@given(st.floats(0, 5), sigmas)
def test_radius_and_probability_are_inverse(z, sigma):
    """Both ways round, to the precision of a double.

    Near 1 it holds p to 1e-16, and z moves by 1e-16 / phi(z): 1e-10 at z = 5.
    """
    noise = Gaussian(sigma)
    assert noise.radius(noise.probability(sigma * z)) == pytest.approx(
        sigma * z, rel=1e-9, abs=1e-9
    )
    p = norm.cdf(z)
    assert noise.probability(noise.radius(p)) == pytest.approx(p, rel=1e-14)


@given(st.floats(0.5, 1), st.floats(0.5, 1), sigmas)
def test_radius_rises_with_probability_and_noise(p, q, sigma):
    assert Gaussian(sigma).radius(max(p, q)) >= Gaussian(sigma).radius(min(p, q))
    assert Gaussian(2 * sigma).radius(p) == 2 * Gaussian(sigma).radius(p)


def test_one_sigma_per_example():
    noise = Gaussian([0.25, 0.5, 1.0])
    np.testing.assert_allclose(noise.radius(0.99), np.array([0.25, 0.5, 1.0]) * norm.ppf(0.99))
    np.testing.assert_allclose(noise.probability(noise.radius(0.99)), 0.99)
    np.testing.assert_array_equal(noise.select([2, 2, 0]).sigma, [1.0, 1.0, 0.25])
    single = Gaussian(0.5)
    assert single.select([2, 2, 0]) is single


def tails_are_normal(z):
    """How often |z| exceeds 3, 3.5 and 4: a truncation there escapes Kolmogorov and Smirnov."""
    for limit in (3.0, 3.5, 4.0):
        beyond = int((np.abs(z) > limit).sum())
        if binomtest(beyond, z.size, 2 * norm.sf(limit)).pvalue <= 1e-4:
            return False
    return True


def test_the_check_of_tails_sees_a_truncation():
    """Clamped at 3 sigma, 320,000 draws still pass the Kolmogorov-Smirnov test."""
    z = np.random.default_rng(0).standard_normal(320_000)
    assert tails_are_normal(z)
    assert kstest(np.clip(z, -3, 3), "norm").pvalue > 0.05
    for limit in (3.0, 3.5, 4.0):
        assert not tails_are_normal(np.clip(z, -limit, limit))
    assert not tails_are_normal(1.03 * z)


def generators(seed):
    return [torch.Generator().manual_seed(seed), np.random.default_rng(seed)]


@pytest.mark.parametrize("kind", [0, 1], ids=["torch", "numpy"])
def test_samples_are_independent_normal_draws_around_the_image(kind):
    """Mean, spread, shape and tails of 320,000 pixels are normal.

    There is no correlation between pixels, images or calls.
    """
    x = torch.rand(5000, 1, 8, 8, generator=torch.Generator().manual_seed(9))
    generator = generators(1)[kind]
    first, second = (
        (Gaussian(0.5).sample(x, generator) - x).numpy().reshape(5000, 64) for _ in range(2)
    )
    for noise in (first, second):
        assert noise.dtype == np.float32
        assert kstest(noise.ravel() / 0.5, "norm").pvalue > 1e-4
        assert tails_are_normal(noise / 0.5)
    # Under independence a correlation over m pairs is normal with standard deviation 1 / sqrt(m).
    for a, b in (
        (first, second),
        (first[:, 1:], first[:, :-1]),
        (first[1:], first[:-1]),
        (np.abs(first), np.abs(second)),
    ):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 4.5 / np.sqrt(a.size)


@pytest.mark.parametrize("kind", [0, 1], ids=["torch", "numpy"])
def test_samples_follow_the_seed_and_leave_the_image_alone(kind):
    x = torch.rand(4, 3, 5, 5, generator=torch.Generator().manual_seed(9))
    before = x.clone()
    first, again, other = (Gaussian(0.25).sample(x, generators(seed)[kind]) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(x, before)
    assert first.shape == x.shape


def test_samples_at_one_sigma_per_example():
    """The same underlying draws, scaled row by row."""
    x = torch.zeros(3, 1, 40, 40)
    sigma = np.array([0.1, 1.0, 3.0])
    noise = Gaussian(sigma).sample(x, np.random.default_rng(0)).numpy()
    plain = Gaussian(1.0).sample(x, np.random.default_rng(0)).numpy()
    np.testing.assert_allclose(noise, plain * sigma.reshape(3, 1, 1, 1), rtol=1e-6)
    np.testing.assert_allclose(noise.std(axis=(1, 2, 3)), sigma, rtol=4.5 / np.sqrt(2 * 1600))


def test_cohen_radius_by_hand():
    """sigma / 2 (Phi^-1(p_a) - Phi^-1(p_b)); at p_b = 1 - p_a it is the one-sided radius."""
    assert cohen_radius(0.8, 0.1, 0.5) == pytest.approx(
        0.25 * (0.8416212336 + 1.2815515655), abs=1e-9
    )
    p = np.linspace(0.5, 1, 51)
    np.testing.assert_allclose(
        cohen_radius(p, 1 - p, 0.25), Gaussian(0.25).radius(p), rtol=1e-9, atol=1e-15
    )


@pytest.mark.parametrize(
    ("p_a", "p_b", "expected"),
    [
        (1, 0, np.inf),
        (0.7, 0, np.inf),
        (0.5, 0.5, 0),
        (0.3, 0.3, 0),
        (0, 0, 0),
        (0.2, 0.6, 0),
        (0, 1, 0),
    ],
)
def test_cohen_radius_at_the_edges(p_a, p_b, expected):
    assert cohen_radius(p_a, p_b, 0.5) == expected


def test_cohen_radius_of_close_probabilities():
    """Against 50-digit quantiles; the difference of two in double precision may even be 0."""
    for p_b in (1e-300, 2.0**-52, 0.01, 0.4999):
        for gap in (2.0**-52, 1e-12, 9e-7, 1.1e-6, 1e-4):
            p_a = p_b * (1 + gap)
            with mpmath.workdps(50):
                exact = (quantile(p_a) - quantile(p_b)) / 2
            assert cohen_radius(p_a, p_b, 1.0) == pytest.approx(float(exact), rel=1e-7)


def quantile(p):
    """Phi^-1(p) of a double by Newton's method from scipy's value."""
    z, p = mpmath.mpf(float(norm.ppf(p))), mpmath.mpf(float(p))
    for _ in range(4):
        z -= (mpmath.ncdf(z) - p) / mpmath.npdf(z)
    return z


@given(pairs, sigmas)
def test_cohen_radius_is_where_the_worst_case_flips(pair, sigma):
    """The radius is where theorem 2's half-space classifiers flip.

    Moved by r, the classes have Phi(Phi^-1(p_a) - r/sigma) and Phi(Phi^-1(p_b) + r/sigma).
    """
    radius = cohen_radius(*pair, sigma)
    assume(1e-6 < radius / sigma < 5)
    a, b = norm.ppf(pair)
    for factor, holds in ((1 - 1e-6, True), (1 + 1e-6, False)):
        moved = factor * radius / sigma
        assert (a - moved > b + moved) == holds


def test_older_bounds_against_their_printed_formulas():
    """Equations 30 and 37 as they are printed, where rounding does not hurt them.

    The outer exponent of the power mean is 1 / (1 - order).
    """
    p_a, p_b, sigma = 0.8, 0.15, 0.5
    for beta in (0.05, 0.3, 0.7):
        inside = 1.25 * (1 + np.exp(beta)) / (p_a - np.exp(2 * beta) * p_b)
        expected = sigma * beta / np.sqrt(2 * np.log(inside))
        assert lecuyer_bound(p_a, p_b, beta, sigma) == pytest.approx(expected, rel=1e-12)
    for order in (0.01, 0.5, 0.9, 1.1, 2.0, 7.0):
        mean = ((p_a ** (1 - order) + p_b ** (1 - order)) / 2) ** (1 / (1 - order))
        expected = sigma * np.sqrt(-2 / order * np.log(1 - p_a - p_b + 2 * mean))
        assert li_bound(p_a, p_b, order, sigma) == pytest.approx(expected, rel=1e-11)


def test_lecuyers_beta_is_at_most_one():
    """Without a runner-up the bound rises with beta, so that the supremum is at beta = 1."""
    for p_a in (0.9, 0.999, 1.0):
        expected = 0.5 / np.sqrt(2 * np.log(1.25 * (1 + np.e) / p_a))
        assert lecuyer_radius(p_a, 0.0, 0.5) == pytest.approx(expected, rel=1e-9)


def test_older_bounds_are_zero_outside_their_range():
    # With next to no runner-up only beta <= 1 ends the range: its formula would go on.
    assert lecuyer_bound(0.999, 1e-30, 1.0, 0.5) > 0
    assert lecuyer_bound(0.999, 1e-30, np.nextafter(1.0, 2), 0.5) == 0
    assert lecuyer_bound(0.999, 1e-30, 2.0, 0.5) == 0
    assert lecuyer_bound(0.8, 0.15, 1.01, 0.5) == 0
    assert lecuyer_bound(0.8, 0.15, np.log(0.8 / 0.15) / 2 + 1e-9, 0.5) == 0
    assert lecuyer_bound(0.8, 0.15, 0.0, 0.5) == 0
    assert li_bound(0.3, 0.4, 2.0, 0.5) == 0


@pytest.mark.parametrize(
    ("p_a", "p_b"), [(0.9, 0.05), (0.6, 0.4), (0.5001, 0.4999), (0.999, 1e-30), (0.2, 0.01)]
)
def test_li_at_order_one_is_the_limit(p_a, p_b):
    """The power mean of exponent 0 is the geometric mean; the bound is continuous there."""
    expected = np.sqrt(-2 * np.log1p(-p_a - p_b + 2 * np.sqrt(p_a * p_b)))
    assert li_bound(p_a, p_b, 1.0, 1.0) == pytest.approx(expected, rel=1e-7)
    for order in (1 - 1e-9, 1 + 1e-9):
        assert li_bound(p_a, p_b, order, 1.0) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("bound", "radius"),
    [(lecuyer_bound, lecuyer_radius), (lambda a, b, t, s: li_bound(a, b, np.exp(t), s), li_radius)],
)
def test_suprema_against_scipys_optimiser(bound, radius):
    """At 300 pairs our supremum is the best value of scipy's optimiser.

    It scans the whole range coarsely and then takes Brent's method.
    """
    for p_a, p_b in zip(*some_pairs(), strict=True):
        high = min(1.0, np.log(p_a / p_b) / 2) if bound is lecuyer_bound else 8.0
        scan = np.linspace(0.0 if bound is lecuyer_bound else -11.0, high, 200)
        values = bound(p_a, p_b, scan, 1.0)
        i = int(np.argmax(values))
        around = scan[max(i - 1, 0)], scan[min(i + 1, 199)]
        found = minimize_scalar(
            lambda t, a=p_a, b=p_b: -float(bound(a, b, t, 1.0)),
            bounds=around,
            method="bounded",
            options={"xatol": 1e-14},
        )
        best = max(-found.fun, values.max())
        # A double holds 1 - p_a to 1e-16: at p_a = 1 - 1e-12 that alone moves the logarithm in Li's
        # bound by a few parts in 1e6.
        assert radius(p_a, p_b, 1.0) == pytest.approx(best, rel=1e-6)


def test_li_of_close_probabilities_by_its_limit():
    """As p_a and p_b close up, the bound at any order is sqrt(p_a + p_b) u.

    u = log(p_a / p_b) / 2. As printed the bound is lost to rounding there.
    """
    for gap in (1e-3, 1e-6, 1e-9, 1e-12):
        p_a, p_b = 0.4 * (1 + gap), 0.4 * (1 - gap)
        assert li_radius(p_a, p_b, 1.0) == pytest.approx(
            np.sqrt(p_a + p_b) * np.log1p((p_a - p_b) / p_b) / 2, rel=1e-5
        )


@given(pairs, sigmas)
def test_cohen_dominates_both_older_bounds(pair, sigma):
    cohen, lecuyer, li = (
        cohen_radius(*pair, sigma),
        lecuyer_radius(*pair, sigma),
        li_radius(*pair, sigma),
    )
    assert 0 <= lecuyer < cohen
    assert 0 <= li < cohen or li == cohen == np.inf
    assert not np.isnan([cohen, lecuyer, li]).any()


def test_bounds_broadcast_and_scale_with_sigma():
    p_a, p_b = np.array([[0.9], [0.6]]), np.array([0.05, 0.1, 0.09])
    for radius in (cohen_radius, lecuyer_radius, li_radius):
        table = radius(p_a, p_b, 1.0)
        assert table.shape == (2, 3)
        np.testing.assert_allclose(table[1, 2], radius(0.6, p_b[2], 1.0), rtol=1e-12)
        np.testing.assert_allclose(
            radius(0.9, 0.05, [0.25, 0.5]), table[0, 0] * np.array([0.25, 0.5]), rtol=1e-12
        )
        assert isinstance(radius(0.9, 0.05, 1.0), float)


@pytest.mark.parametrize("radius", [lecuyer_radius, li_radius])
@pytest.mark.parametrize(
    ("p_a", "p_b"),
    [
        (1, 0),
        (1.0, 1e-20),
        (0.9, 0),
        (0.5, 0.5),
        (0, 0),
        (0.2, 0.6),
        (1e-300, 0),
        (0.5, np.nextafter(0.5, 0)),
        (0, 1),
    ],
)
def test_older_bounds_at_the_edges(radius, p_a, p_b):
    found = radius(p_a, p_b, 0.5)
    assert 0 <= found <= cohen_radius(p_a, p_b, 0.5)


def test_li_without_a_runner_up():
    """At p_b = 0 and order <= 1 the power mean is p_a 2^(-1 / (1 - order)).

    The best order lies a little below 1.
    """
    order = np.linspace(0.5, 1, 200_001)[:-1]
    expected = np.sqrt(-2 / order * np.log(1 - 0.9 + 2 * 0.9 * 0.5 ** (1 / (1 - order)))).max()
    assert li_radius(0.9, 0.0, 1.0) == pytest.approx(expected, rel=1e-6)
    assert li_radius(1.0, 0.0, 1.0) == np.inf


def test_uniform_radius_by_hand():
    noise = Uniform(0.5)
    np.testing.assert_allclose(noise.radius([1.0, 0.75, 0.5, 0.2]), [0.5, 0.25, 0, 0])
    np.testing.assert_allclose(noise.probability([0.0, 0.25, 0.5, 3.0]), [0.5, 0.75, 1, 1])
    assert noise.norm == "l1"
    assert restore_noise(noise.describe()) == noise
    some = Uniform([0.5, 1.0])
    np.testing.assert_allclose(some.radius(0.75), [0.25, 0.5])
    assert some.select([1]) == Uniform([1.0])
    with pytest.raises(ValueError, match="half"):
        Uniform(0.0)


@given(st.floats(0, 1), sigmas)
def test_uniform_radius_and_probability_are_inverse(share, half):
    noise = Uniform(half)
    radius = share * noise.level
    assert noise.radius(noise.probability(radius)) == pytest.approx(radius, rel=1e-9, abs=1e-12)


def test_uniform_noise_is_uniform_on_its_cube():
    noisy = Uniform([0.2, 1.5]).sample(
        torch.zeros(2, 1, 100, 200), torch.Generator().manual_seed(0)
    )
    for row, half in zip(noisy.flatten(1).double().numpy(), (0.2, 1.5), strict=True):
        assert np.abs(row).max() <= half
        assert kstest(row, "uniform", args=(-half, 2 * half)).pvalue > 1e-3


def test_the_l1_radius_is_tight():
    """A threshold on one pixel: its probability reaches 1/2 at the radius.

    It falls by |delta|_1 / (2 lambda).
    """
    half, edge, size = 0.8, 0.3, 400_000
    noise, generator = Uniform(half), np.random.Generator(np.random.SFC64(0))
    p = (half + edge) / (2 * half)
    for share, above in ((0.99, True), (1.01, False)):
        x = torch.full((size, 1, 1, 1), float(share * noise.radius(p)))
        votes = int((noise.sample(x, generator) < edge).sum())
        assert (votes > size / 2) == above
    drawn = noise.sample(torch.zeros(size, 1, 1, 1), generator)
    assert binomtest(int((drawn < edge).sum()), size, p).pvalue > 1e-3


@pytest.mark.parametrize(
    "noise", [Gaussian(0.25), Gaussian([0.25, 0.5, 1.0]), Uniform(0.5), Ablation(4, 64)]
)
def test_the_radius_of_two_probabilities(noise):
    """With p_b = 1 - p_a it is that of one; more of a rest that is shared is more radius."""
    p = np.array([0.6, 0.75, 0.9])
    np.testing.assert_allclose(noise.radius_two(p, 1 - p), noise.radius(p), rtol=1e-9)
    assert (noise.radius_two(p, (1 - p) / 2) > noise.radius(p)).all()
    assert (noise.radius_two(p / 2, p) == 0).all()
    with pytest.raises(ValueError, match="p_b"):
        noise.radius_two(p, -p)


ALL = [Gaussian(0.25), Uniform(0.5), Ablation(8, 64)]


def test_every_noise_is_among_those_tried_here():
    assert {type(noise) for noise in ALL} == set(NOISES.values())


@pytest.mark.parametrize("noise", ALL, ids=repr)
def test_what_every_noise_owes(noise):
    """Copies that are independent and depend on their stream alone; a radius and its inverse."""
    x = torch.full((200, 1, 8, 8), 0.5)
    drawn, again = (noise.sample(x, np.random.default_rng(3)) for _ in range(2))
    assert torch.equal(drawn, again)
    assert (x == 0.5).all()
    flat = drawn.flatten(1).double()
    assert abs(np.corrcoef(flat[:100].ravel(), flat[100:].ravel())[0, 1]) < 0.05
    law = drawn.mean() - noise.sample(torch.zeros_like(x), np.random.default_rng(3)).mean()
    assert (abs(float(law) - 0.5) < 1e-6) == noise.added
    p = np.linspace(0.5, 0.999, 200)
    radius = noise.radius(p)
    assert radius[0] == 0
    assert (np.diff(radius) >= 0).all()
    assert ((np.diff(radius) == 0).any()) == noise.stepped
    some = np.unique(radius[radius > 0])
    least = noise.probability(some)
    assert (noise.radius(np.minimum(1, least * (1 + 1e-9))) >= some * (1 - 1e-9)).all()
    assert (noise.radius(least * (1 - 1e-6)) < some).all()
    np.testing.assert_allclose(Noise.probability(noise, some), least, rtol=1e-9)
    assert restore_noise(noise.describe()) == noise


def test_ablation_radius_by_hand():
    """One pixel of four kept: r changed ones are seen with probability r / 4."""
    noise = Ablation(keep=1, pixels=4)
    np.testing.assert_array_equal(
        noise.radius([0.4, 0.5, 0.6, 0.75, 0.7501, 1.0]), [0, 0, 0, 0, 1, 1]
    )
    np.testing.assert_allclose(
        noise.probability([0, 0.5, 1, 2, 99, np.inf]), [0.5, 0.75, 0.75, 1, 1, 1]
    )
    assert noise.norm == "l0"
    assert noise.size is None
    assert restore_noise(noise.describe()) == noise
    # 45 of 784 pixels: half of MNIST is certified for 8 pixels (Levine and Feizi 2020), which
    # needs a probability that a vote can have.
    assert Ablation(45, 784).radius(0.9) == 8
    assert Ablation(64, 64).radius(1.0) == 0


@given(st.integers(1, 300), st.data())
def test_ablation_radius_and_probability_are_inverse(pixels, data):
    keep = data.draw(st.integers(1, pixels))
    noise = Ablation(keep, pixels)
    for r in range(int(noise.radius(1.0)) + 1):
        p = noise.probability(r)
        assert noise.radius(p) == r
        assert noise.radius(p * (1 - 1e-12)) == max(r - 1, 0)
        exposure = 1 - hypergeom.pmf(0, pixels, r, keep)
        assert p == pytest.approx(0.5 + exposure, rel=1e-9)
        # Never below the exact one, which is a tie of two classes.
        missed = Fraction(math.comb(pixels - r, keep), math.comb(pixels, keep))
        assert Fraction(float(p)) > Fraction(3, 2) - missed
    assert noise.probability(noise.radius(1.0) + 1) == 1.0


def test_every_subset_of_pixels_is_kept_equally_often():
    noise, x = Ablation(2, 6), torch.rand(1, 3, 2, 3)
    streams = [np.random.Generator(np.random.SFC64(seed)) for seed in range(3)]
    noisy = noise.sample(x.expand(30_000, 3, 2, 3), streams)
    kept = noisy != noise.erased
    assert (kept == kept[:, :1]).all()
    torch.testing.assert_close(noisy[kept], x.expand_as(noisy)[kept], rtol=0, atol=0)
    kept = kept[:, 0].flatten(1)
    assert (kept.sum(dim=1) == 2).all()
    names = (kept * 2 ** torch.arange(6)).sum(dim=1)
    seen = np.bincount(names.numpy())
    assert chisquare(seen[seen > 0]).pvalue > 1e-3
    assert (seen > 0).sum() == 15


def subset_votes(table, image, subsets):
    """Share of subsets whose kept pixels the classifier `table` calls class 1."""
    return np.mean([table[subset, tuple(image[list(subset)])] for subset in subsets])


@pytest.mark.parametrize(("keep", "pixels"), [(1, 6), (2, 6), (3, 7)])
def test_no_change_of_so_few_pixels_moves_the_vote(keep, pixels):
    """Exactly: random classifiers of black and white images, against every changed image.

    The last of them is the worst case for r pixels, and one more than the radius moves its vote.
    """
    rng, noise = np.random.default_rng(0), Ablation(keep, pixels)
    subsets = list(itertools.combinations(range(pixels), keep))
    values = list(itertools.product((0, 1), repeat=keep))
    images = np.array(list(itertools.product((0, 1), repeat=pixels)))
    distance = images.sum(axis=1)  # from the black image
    for bias in (0.6, 0.8, 0.95, None):
        if bias is None:
            # Sees class 0 only in what has changed: the vote of the black image is certain.
            table = {(s, v): int(not any(v)) for s in subsets for v in values}
        else:
            table = {(s, v): int(rng.random() < bias) for s in subsets for v in values}
        votes = np.array([subset_votes(table, image, subsets) for image in images])
        p = votes[0]
        radius = noise.radius(p)
        if p > 0.5:
            assert (votes[distance <= radius] > 0.5).all()
        if bias is None:
            assert (votes[distance == radius + 1] <= 0.5).any()


def test_votes_under_ablation_do_not_depend_on_blocks():
    """Also where fewer draws are asked for than share a stream."""
    x = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))

    class Seen(torch.nn.Module):
        def forward(self, x):
            return torch.stack([x.flatten(1).max(dim=1).values, torch.full((len(x),), 0.9)], dim=1)

    def votes(block, *draws):
        engine = {"block": block, "layout": "contiguous", "compile": False, "progress": False}
        counts = ModelCounts(Seen(), x, Ablation(3, 16), **engine)
        return sum(counts.draw(n) for n in draws)

    np.testing.assert_array_equal(votes(8, 250), votes(64, 30, 1, 219))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Ablation(0, 4), "keep must be at least 1"),
        (lambda: Ablation(5, 4), "keep must be at most pixels = 4; got 5"),
        (lambda: Ablation(2.0, 4), "keep must be a whole number"),
        (lambda: Ablation([1, 2], 4), "keep must be one number for all examples"),
        (lambda: Ablation(2, 4).sample(torch.zeros(1, 1, 3, 3), None), "pixels must be 9"),
        (lambda: Ablation(2, 4).radius(1.1), "p_lower"),
        (lambda: Ablation(2, 4).probability(-1), "radius"),
    ],
)
def test_bad_ablations(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("kind", [Gaussian, Uniform])
def test_levels_changed_in_place_do_not_change_the_noise(kind):
    """Else a certificate of the votes already drawn would get the radius of other levels."""
    levels = np.array([0.25, 0.5])
    noise, before = kind(levels), kind([0.25, 0.5])
    levels *= 2
    assert noise == before
