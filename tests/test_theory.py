"""Appendices A, B, G and I of Cohen et al. 2019.

Each closed form is held against Monte Carlo, linear programming or a search.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog, minimize_scalar
from scipy.special import ndtr
from scipy.stats import binomtest, chi2_contingency, norm

from lib import Gaussian, ModelCounts, SimulatedCounts, certify, cohen_radius, li_radius
from lib.samplers import Certify
from lib.theory import (
    LinearClassifier,
    average_pooled,
    greatest_probability,
    least_probability,
    li_bound,
    most_powerful,
    plane_probabilities,
    unpooled,
    worst_case_classifier,
)

SHAPE = (1, 4, 4)
LIVE = {
    "dtype": torch.float32,
    "block": 400,
    "layout": "contiguous",
    "compile": False,
    "progress": False,
}
PAIRS = [(0.8, 0.2), (0.6, 0.1), (0.99, 0.01), (0.35, 0.3), (0.9, 1e-3)]


def images(count, seed=0, shape=SHAPE):
    return torch.from_numpy(np.random.default_rng(seed).random((count, *shape), dtype=np.float32))


def direction(seed=1, shape=SHAPE):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32))


def linear(seed=2):
    weight = direction(seed)
    # A bias that puts the boundary among the images, whose centre is the point 1/2.
    return LinearClassifier(weight, -float(weight.sum()) / 2)


# The Neyman-Pearson lemma, and the half-spaces it becomes under Gaussian noise.


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 9), st.floats(0, 1))
def test_most_powerful_rule_is_the_linear_programme_s_optimum(seed, size, level):
    """The knapsack over likelihood ratios finds the optimum of scipy's HiGHS.

    It maximises mu_y'h under mu_x'h <= level, 0 <= h <= 1; both are exact to 1e-9.
    """
    generator = np.random.default_rng(seed)
    mu_x, mu_y = generator.dirichlet(np.ones(size), 2)
    if seed % 3 == 0:
        mu_x[0], mu_y[1] = 0.0, 0.0  # atoms that only one of the two has
        mu_x, mu_y = mu_x / mu_x.sum(), mu_y / mu_y.sum()
    optimum = -linprog(-mu_y, A_ub=mu_x[None], b_ub=[level], bounds=(0, 1)).fun
    assert most_powerful(mu_x, mu_y, level) == pytest.approx(optimum, abs=1e-7)


@pytest.mark.parametrize("seed", range(5))
def test_lemma_3_holds_for_random_rules(seed):
    """Both parts, discrete: no random rule beats the likelihood-ratio rule of its level.

    None falls below its mirror image, either.
    """
    generator = np.random.default_rng(seed)
    mu_x, mu_y = generator.dirichlet(np.ones(6), 2)
    rules = generator.random((2000, 6)) ** generator.choice([0.1, 1, 10], (2000, 6))
    at_x, at_y = rules @ mu_x, rules @ mu_y
    assert (at_y <= most_powerful(mu_x, mu_y, at_x) + 1e-12).all()
    assert (at_y >= 1 - most_powerful(mu_x, mu_y, 1 - at_x) - 1e-12).all()


def test_a_threshold_on_the_likelihood_ratio_attains_the_lemma():
    """Each set {mu_y / mu_x >= t} has exactly the power that the lemma allows it."""
    mu_x, mu_y = np.array([0.4, 0.3, 0.2, 0.1]), np.array([0.1, 0.2, 0.3, 0.4])
    for t in mu_y / mu_x:
        chosen = mu_y / mu_x >= t
        assert most_powerful(mu_x, mu_y, mu_x[chosen].sum()) == pytest.approx(
            mu_y[chosen].sum(), abs=1e-12
        )


def test_gaussian_lemma_is_the_limit_of_the_discrete_one():
    """On 4,001 cells of a line the discrete optimum lies below lemma 4's half-space.

    The difference is less than the mass of one cell.
    """
    edges = np.linspace(-6, 7, 4000)
    mu_x, mu_y = (
        np.diff(ndtr(np.concatenate([[-np.inf], edges - m, [np.inf]]))) for m in (0.0, 1.0)
    )
    level = np.linspace(0.01, 0.99, 99)
    discrete, exact = most_powerful(mu_x, mu_y, level), greatest_probability(level, 1.0, 1.0)
    assert (discrete <= exact + 1e-12).all()
    np.testing.assert_allclose(discrete, exact, atol=2e-3)


@pytest.mark.parametrize("seed", range(10))
def test_lemma_4_holds_for_random_classifiers_of_the_plane(seed):
    """Random cell-wise classifiers stay between equations 13 and 14 at every shift."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 3, (9, 9)).repeat(5, axis=0).repeat(5, axis=1)
    edges, shifts = np.linspace(-3, 3, 44), np.linspace(-2, 2, 41)
    p = plane_probabilities(labels, edges, shifts, shifts, sigma=0.5)
    np.testing.assert_allclose(p.sum(axis=0), 1, atol=1e-12)
    distance = np.hypot(*np.meshgrid(shifts, shifts, indexing="ij"))
    here = p[:, 20, 20][:, None, None]
    assert (p >= least_probability(here, distance, 0.5) - 1e-12).all()
    assert (p <= greatest_probability(here, distance, 0.5) + 1e-12).all()


@pytest.mark.parametrize("seed", range(10))
def test_theorem_1_holds_for_random_classifiers_of_the_plane(seed):
    """No point of a fine grid nearer than theorem 1's radius changes the smoothed class."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 4, (6, 6)).repeat(8, axis=0).repeat(8, axis=1)
    shifts = np.linspace(-2, 2, 161)
    p = plane_probabilities(labels, np.linspace(-3, 3, 47), shifts, shifts, sigma=0.4)
    second, first = np.sort(p[:, 80, 80])[-2:]
    differs = p.argmax(axis=0) != p[:, 80, 80].argmax()
    assert differs.any()
    nearest = np.hypot(*np.meshgrid(shifts, shifts, indexing="ij"))[differs].min()
    assert nearest >= cohen_radius(first, second, 0.4)


def test_plane_probabilities_against_monte_carlo():
    """A checkerboard at two points, 200,000 draws: within 5 standard errors."""
    labels = np.add.outer(np.arange(6), np.arange(6)) % 2
    edges = np.linspace(-1, 1, 5)
    p = plane_probabilities(labels, edges, [0.2, 1.0], [-0.3], sigma=0.7)
    z = np.random.default_rng(0).standard_normal((2, 200_000, 2)) * 0.7 + np.array(
        [[[0.2, -0.3]], [[1.0, -0.3]]]
    )
    cell = np.searchsorted(edges, z)
    found = labels[cell[..., 0], cell[..., 1]].mean(axis=1)
    np.testing.assert_allclose(found, p[1, :, 0], atol=5 * 0.5 / np.sqrt(200_000))


# Theorem 2.


@pytest.mark.parametrize(("p_a", "p_b"), PAIRS)
def test_worst_case_is_consistent_and_flips_exactly_at_the_radius(p_a, p_b):
    worst = worst_case_classifier(images(1)[0], direction(), p_a, p_b, sigma=0.5)
    assert worst.radius == pytest.approx(cohen_radius(p_a, p_b, 0.5), rel=1e-14)
    at_x = worst.probabilities([0.0])[0]
    assert at_x[:2] == pytest.approx([p_a, p_b], rel=1e-12)
    assert at_x[1:].max() <= p_b * (1 + 1e-9)
    before, after = worst.probabilities([worst.radius * (1 - 1e-6), worst.radius * (1 + 1e-6)])
    assert before.argmax() == 0
    assert after[0] < after[1]
    inside = worst.probabilities(np.linspace(0, worst.radius * (1 - 1e-6), 200))
    assert (inside.argmax(axis=1) == 0).all()
    np.testing.assert_allclose(
        worst.probabilities(np.linspace(0, 3, 50)).sum(axis=1), 1, atol=1e-12
    )


@pytest.mark.parametrize(("p_a", "p_b"), [(0.8, 0.2), (0.6, 0.1)])
def test_worst_case_flips_by_monte_carlo(p_a, p_b):
    """20,000 live votes per point agree with the closed form within 5 standard errors.

    The winner changes across the radius.
    """
    x, u = torch.full((1, *SHAPE), 0.5), direction()
    worst = worst_case_classifier(x[0], u, p_a, p_b, sigma=0.3)
    distance = worst.radius * np.array([0.0, 0.9, 1.1])
    points = x + torch.from_numpy(distance).float().view(-1, 1, 1, 1) * (u / u.norm())
    votes = ModelCounts(worst, points, Gaussian(0.3), seed=3, **LIVE).draw(20_000)
    np.testing.assert_allclose(
        votes / 20_000, worst.probabilities(distance), atol=5 * 0.5 / np.sqrt(20_000)
    )
    assert (votes.argmax(axis=1)[:2] == 0).all()
    assert votes[2, 1] > votes[2, 0]


def test_worst_case_is_no_worse_elsewhere():
    """Theorem 1 forbids a flip inside the radius in any direction.

    At right angles nothing changes at all.
    """
    x, u = torch.full((1, *SHAPE), 0.5), direction()
    side = direction(9)
    side -= (side * u).sum() / (u * u).sum() * u
    worst = worst_case_classifier(x[0], u, 0.8, 0.2, sigma=0.3)
    votes = ModelCounts(worst, x + 0.4 * side / side.norm(), Gaussian(0.3), seed=4, **LIVE).draw(
        20_000
    )
    assert binomtest(int(votes[0, 0]), 20_000, 0.8).pvalue > 1e-4


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"p_a": 0.2}, "p_a"),
        ({"p_a": 0.9}, "p_a"),
        ({"p_b": 0.0}, "p_b"),
        ({"p_b": 1e-9}, "p_b"),
        ({"sigma": 0}, "sigma"),
        ({"delta_direction": torch.zeros(SHAPE)}, "delta"),
    ],
)
def test_worst_case_names_what_is_wrong(change, name):
    good = {"x": images(1)[0], "delta_direction": direction(), "p_a": 0.7, "p_b": 0.2, "sigma": 0.5}
    with pytest.raises(ValueError, match=name):
        worst_case_classifier(**good | change)


# Appendix B: the linear classifier.


@pytest.mark.parametrize("sigma", [0.1, 0.5, 2.0])
def test_theorem_1_certifies_a_linear_rule_to_its_margin(sigma):
    """Proposition 4, for every sigma.

    As far as p_A < 1 differs from 1 in double precision: margins up to 5 sigma here.
    """
    rule, x = linear(), images(200)
    near = np.abs(rule.margin(x)) < 5 * sigma
    p_a = rule.top_probability(x, sigma)[near]
    np.testing.assert_allclose(
        cohen_radius(p_a, 1 - p_a, sigma), np.abs(rule.margin(x))[near], rtol=1e-8, atol=1e-14
    )
    assert near.sum() > 30


def test_smoothing_leaves_a_linear_rule_unchanged():
    """Proposition 3, live: the majority of 2,000 votes is the rule's own class.

    Wherever p_A is 5 standard errors above one half.
    """
    rule, x = linear(), images(60)
    votes = ModelCounts(rule, x, Gaussian(0.4), seed=5, **LIVE).draw(2_000)
    p_a = rule.top_probability(x, 0.4)
    clear = p_a > 0.5 + 5 * 0.5 / np.sqrt(2_000)
    assert clear.sum() > 30
    assert (votes.argmax(axis=1) == (rule.margin(x) > 0))[clear].all()
    frequency = votes[np.arange(60), (rule.margin(x) > 0).astype(int)] / 2_000
    np.testing.assert_allclose(frequency, p_a, atol=5 * 0.5 / np.sqrt(2_000))


def test_a_linear_rule_flips_at_its_radius():
    """Proposition 5: the nearest flip lies |margin| away, on the boundary.

    Just before it the class is kept, just behind it another one wins.
    """
    rule, x = linear(), images(50)
    delta = rule.nearest_flip(x) - x
    np.testing.assert_allclose(
        delta.flatten(1).norm(dim=1), np.abs(rule.margin(x)), rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(rule.margin(x + delta), 0, atol=1e-6)
    label = rule(x).argmax(dim=1)
    assert (rule(x + 0.99 * delta).argmax(dim=1) == label).all()
    assert (rule(x + 1.01 * delta).argmax(dim=1) != label).all()


def test_certified_radius_of_a_linear_rule_converges_to_its_margin():
    """The median shortfall falls with n, about as 1/sqrt(n), at the rule's exact probabilities."""
    rule, x = linear(), images(200, seed=7)
    x = x[np.abs(rule.margin(x)) > 0.2]
    p_a = rule.top_probability(x, 0.5)
    gap = []
    for n in (1_000, 100_000, 10_000_000):
        found = certify(
            SimulatedCounts(np.stack([p_a, 1 - p_a], axis=1), seed=8),
            Gaussian(0.5),
            n0=100,
            n=n,
            alpha=0.001,
        )
        gap.append(np.median(1 - found.radius / np.abs(rule.margin(x))))
    assert 7 < gap[0] / gap[1] < 14
    assert 7 < gap[1] / gap[2] < 14
    assert gap[2] < 0.005


@pytest.mark.parametrize("p", [0.5, 0.6, 0.9])
def test_live_certificates_of_a_linear_rule_are_false_as_often_as_computed(p):
    """8,000 live certificates of one point, whose true radius is its margin.

    At alpha = 1/20 a rate above 1.2 alpha fails (400 certificates would pass up to 1.9 alpha),
    and so does one that is not the exact rate of these draws.
    """
    rule, sigma, alpha, runs = linear(), 0.3, 0.05, 8000
    centre = torch.full((1, *SHAPE), 0.5)
    unit = (rule.weight / rule.weight.norm()).view(1, *SHAPE)
    x = centre - unit * float(rule.margin(centre)[0] - sigma * norm.ppf(p))
    truth = rule.margin(x)[0]
    assert truth == pytest.approx(sigma * norm.ppf(p), abs=1e-6)
    source = ModelCounts(rule, x.expand(runs, *SHAPE), Gaussian(sigma), seed=11, **LIVE)
    found = certify(source, Gaussian(sigma), n0=20, n=100, alpha=alpha)
    # Class 1 is the rule's on this side; at p = 1/2 the point lies on the boundary.
    false = ((found.prediction == 1) & (found.radius > truth)) | (found.prediction == 0)
    exact = Certify(n0=20, n=100, alpha=alpha).failure(p, Gaussian(sigma))
    assert exact <= alpha
    assert binomtest(int(false.sum()), runs, alpha, alternative="greater").pvalue > 1e-4
    assert binomtest(int(false.sum()), runs, exact).pvalue > 1e-4


@pytest.mark.parametrize("weight", [np.zeros(4), np.array([1.0, np.nan])])
def test_linear_rule_needs_a_direction(weight):
    with pytest.raises(ValueError, match="weight"):
        LinearClassifier(weight)


# Appendix G: resolution.


@pytest.mark.parametrize("factor", [2, 4])
def test_pooled_classifier_has_the_votes_of_the_low_resolution_one(factor):
    """Proposition 6: the same law of votes at factor times the noise.

    By a chi-square test of 20,000 draws each; the radius is factor times as large.
    """
    rule, low = linear(), images(1, seed=10)
    high = low.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)
    votes = ModelCounts(rule, low, Gaussian(0.3), seed=1, **LIVE).draw(20_000)[0]
    pooled = ModelCounts(
        average_pooled(rule, factor), high, Gaussian(0.3 * factor), seed=2, **LIVE
    ).draw(20_000)[0]
    assert chi2_contingency(np.stack([votes, pooled])).pvalue > 1e-4
    p_a = rule.top_probability(low, 0.3)
    assert Gaussian(0.3 * factor).radius(p_a) == pytest.approx(
        factor * Gaussian(0.3).radius(p_a), rel=1e-14
    )


def test_unpooled_images_average_back_exactly():
    low = torch.from_numpy(
        np.random.default_rng(0).integers(0, 17, (5, 2, 3, 4)).astype(np.float32) / 16
    )
    high = unpooled(low, 4)
    assert high.shape == (5, 2, 12, 16)
    assert set(high.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(torch.nn.functional.avg_pool2d(high, 4), low)
    # The bright side of a square is the one towards its bright neighbour.
    ramp = unpooled(torch.tensor([[[[0.0, 0.5, 1.0]] * 3]]), 2)[0, 0]
    assert ramp[2:4, 2:4].tolist() == [[0, 1], [0, 1]]
    with pytest.raises(ValueError, match="x must have pixels"):
        unpooled(low, 3)
    with pytest.raises(ValueError, match="factor"):
        unpooled(low, 0)


# Appendix I: the forerunners.


@pytest.mark.parametrize(("p_a", "p_b"), [*PAIRS, (0.3, 0.3)])
@pytest.mark.parametrize("order", [0.3, 0.9, 1.5, 3.0])
def test_li_exponent_by_direct_minimisation(p_a, p_b, order):
    """The least Renyi divergence D(Q||P) of any Q with a tie on top, minimised directly.

    It is -log(1 - p_a - p_b + 2 M): the exponent outside M is 1/(1 - order).
    """
    rest = 1 - p_a - p_b

    def divergence(q):
        terms = q**order * (p_a ** (1 - order) + p_b ** (1 - order))
        # The other classes are best kept in their proportion under P.
        terms += (1 - 2 * q) ** order * rest ** (1 - order) if rest > 1e-12 else 0.0
        return np.log(terms) / (order - 1)

    least = (
        divergence(0.5)
        if rest <= 1e-12
        else minimize_scalar(
            divergence, bounds=(1e-9, 0.5 - 1e-9), method="bounded", options={"xatol": 1e-12}
        ).fun
    )
    # Equations 35 and 36: order * radius^2 / (2 sigma^2) equals that divergence.
    assert order * float(li_bound(p_a, p_b, order, 2.0)) ** 2 / (2 * 2.0**2) == pytest.approx(
        least, abs=1e-9
    )


def test_li_best_order_is_inside_the_range_searched():
    """From near ties to near certainties the best order is between 0.7 and 1.6.

    That is far inside the e^-14 to e^3 that li_radius searches.
    """
    order = np.geomspace(1e-5, 20, 4001)
    for p_b in (1e-6, 1e-3, 0.05, 0.3, 0.49):
        for p_a in p_b + (1 - 2 * p_b) * np.array([0.001, 0.01, 0.3, 0.9, 0.9999]):
            values = li_bound(p_a, p_b, order, 1.0)
            assert 0.7 < order[values.argmax()] < 1.6
            assert li_radius(p_a, p_b, 1.0) == pytest.approx(values.max(), rel=1e-5)


@pytest.mark.parametrize(
    "call", [lambda p: least_probability(p, 1.0, 1.0), lambda p: greatest_probability(p, 1.0, 1.0)]
)
def test_probabilities_are_checked(call):
    with pytest.raises(ValueError, match="p must"):
        call(1.2)


def test_extremes_by_hand():
    """No distance changes nothing; certainty and impossibility stay what they are.

    One sigma from one half is Phi(-1).
    """
    p = np.array([0.0, 0.3, 1.0])
    np.testing.assert_allclose(least_probability(p, 0.0, 2.0), p, rtol=1e-14)
    np.testing.assert_array_equal(least_probability([0.0, 1.0], 5.0, 1.0), [0, 1])
    assert least_probability(0.5, 2.0, 2.0) == pytest.approx(0.15865525393145707, rel=1e-14)
    assert most_powerful([0.5, 0.5], [0.5, 0.5], 0.3) == pytest.approx(0.3)
    assert most_powerful([1.0, 0.0], [0.0, 1.0], 0.0) == 1.0
    with pytest.raises(ValueError, match="mu_y"):
        most_powerful([0.5, 0.5], [0.5, 0.4], 0.3)
    with pytest.raises(ValueError, match="labels"):
        plane_probabilities(np.zeros((3, 3), dtype=int), np.array([0.0]), [0.0], [0.0], 1.0)
