"""PREDICT and CERTIFY, against the paper's pseudo-code, by hand, and audited."""

import dataclasses
from fractions import Fraction

import numpy as np
import pytest
from scipy.stats import binomtest, norm
from statsmodels.stats.proportion import proportion_confint

from lib.certify import ABSTAIN, Certificates, certify, certify_margin, certify_partition, predict
from lib.counts import RecordedCounts, SimulatedCounts
from lib.noise import Gaussian


class Scripted:
    """A source that gives prepared counts, one array a call, and remembers what was asked."""

    def __init__(self, *answers):
        self.answers, self.asked = [np.array(a) for a in answers], []
        self.classes = self.answers[0].shape[1]

    def __len__(self):
        return len(self.answers[0])

    def draw(self, n):
        self.asked.append(n)
        return self.answers.pop(0)


def test_certify_by_hand():
    """All of 100,000 votes: 3.811 sigma. 99,000: statsmodels' interval. 50,100: abstain.

    The class comes from the first draw alone.
    """
    source = Scripted(
        [[60, 40], [40, 60], [55, 45], [99, 1]],
        [[100_000, 0], [1000, 99_000], [50_100, 49_900], [100, 99_900]],
    )
    found = certify(source, Gaussian(0.5), n0=100, n=100_000, alpha=0.001)
    low = proportion_confint(99_000, 100_000, alpha=0.002, method="beta")[0]
    np.testing.assert_array_equal(found.prediction, [0, 1, ABSTAIN, ABSTAIN])
    np.testing.assert_allclose(
        found.radius, [0.5 * norm.ppf(0.001**1e-5), 0.5 * norm.ppf(low), 0, 0], rtol=1e-9
    )
    np.testing.assert_allclose(found.p_lower[:2], [0.001**1e-5, low], rtol=1e-9)
    assert (found.p_lower[2:] < 0.5).all()
    np.testing.assert_array_equal(found.n, 100_100)
    assert source.asked == [100, 100_000]
    assert [a.dtype for a in (found.prediction, found.radius, found.p_lower, found.n)] == [
        np.int64,
        np.float64,
        np.float64,
        np.int64,
    ]


def test_certify_follows_the_pseudo_code():
    """Section 3.2.2 with scipy's and statsmodels' own functions, on 500 examples."""
    rng = np.random.default_rng(0)
    first, second = (rng.multinomial(m, rng.dirichlet([1, 0.2, 0.2], 500)) for m in (20, 200))
    found = certify(Scripted(first, second), Gaussian(0.25), n0=20, n=200, alpha=0.01)
    for i in range(500):
        named = int(np.argmax(first[i]))
        low = proportion_confint(second[i, named], 200, alpha=0.02, method="beta")[0]
        low = 0.0 if np.isnan(low) else low
        expected = (named, 0.25 * norm.ppf(low)) if low > 0.5 else (ABSTAIN, 0.0)
        assert (found.prediction[i], found.radius[i]) == (
            expected[0],
            pytest.approx(expected[1], abs=1e-8),
        )


def test_certify_with_draws_and_noise_of_each_example():
    source = RecordedCounts([[100, 0], [1000, 0], [0, 500]], fixed=True)
    found = certify(
        source, Gaussian([0.1, 0.2, 0.3]), n0=[10, 10, 20], n=[90, 990, 300], alpha=0.001
    )
    np.testing.assert_array_equal(found.n, [100, 1000, 320])
    np.testing.assert_array_equal(found.prediction, [0, 0, 1])
    np.testing.assert_allclose(
        found.radius,
        Gaussian([0.1, 0.2, 0.3]).level * norm.ppf(0.001 ** (1 / np.array([90, 990, 300]))),
        rtol=1e-9,
    )
    np.testing.assert_array_equal(source.remaining.sum(axis=1), [0, 0, 180])


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.uint64])
def test_draws_of_any_whole_type_are_added_up_in_64_bits(dtype):
    """In uint8, 100 + 200 draws would be reported as 44; in int8, 100 + 100 as -56."""
    n0, n = dtype(100), dtype(100 if dtype is np.int8 else 200)
    for each in (np.asarray, lambda draws: np.full(2, draws)):
        source = RecordedCounts([[500, 0], [0, 500]])
        found = certify(source, Gaussian(0.5), each(n0), each(n), alpha=Fraction(1, 1000))
        np.testing.assert_array_equal(found.n, int(n0) + int(n))
        np.testing.assert_array_equal(source.remaining.sum(axis=1), 500 - found.n)
        np.testing.assert_allclose(found.p_lower, 0.001 ** (1 / int(n)), rtol=1e-9)


@pytest.mark.parametrize("kind", [np.float16, np.float32, Fraction])
def test_a_level_of_any_type_is_the_level(kind):
    alpha = kind(0.05)
    votes = [[90, 10], [60, 40], [59, 41], [58, 42]]
    source, again = (Scripted(votes, votes) for _ in range(2))
    found = certify(source, Gaussian(0.5), 100, 100, alpha)
    expected = certify(again, Gaussian(0.5), 100, 100, float(alpha))
    np.testing.assert_array_equal(found.radius, expected.radius)
    np.testing.assert_array_equal(
        predict(Scripted(votes), 100, alpha), predict(Scripted(votes), 100, float(alpha))
    )


def test_certify_with_the_class_given():
    source = Scripted([[90, 10], [90, 10]])
    found = certify(source, Gaussian(1.0), n0=0, n=100, alpha=0.001, prediction=[0, 1])
    np.testing.assert_array_equal(found.prediction, [0, ABSTAIN])
    np.testing.assert_array_equal(found.n, 100)
    assert source.asked == [100]


def test_a_bound_of_one_half_abstains():
    """One draw at alpha = 1/2: the bound is 1/2, less its rounding, and certifies nothing.

    At a slightly larger alpha it does. A bound of exactly 1/2 does not, either.
    """
    assert (
        certify(Scripted([[1, 0]], [[1, 0]]), Gaussian(1.0), n0=1, n=1, alpha=0.5).prediction
        == ABSTAIN
    )
    assert certify(
        Scripted([[1, 0]], [[1, 0]]), Gaussian(1.0), n0=1, n=1, alpha=0.501
    ).radius == pytest.approx(norm.ppf(0.501), rel=1e-6)
    found = Certificates.from_bounds(
        np.array([3, 3]), np.array([0.5, np.nextafter(0.5, 1)]), Gaussian(1.0), draws=10
    )
    np.testing.assert_array_equal(found.prediction, [ABSTAIN, 3])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"radius": np.array([0.5, -0.5])}, "radius must be >= 0"),
        ({"radius": np.array([0.5, np.nan])}, "radius must be >= 0"),
        ({"radius": np.array([0.5])}, r"radius \(1,\), p_lower \(2,\)"),
        ({"n": np.array(10)}, r"one shape; got .* n \(\)"),
        ({"prediction": np.array([0, -2])}, "prediction must be a class >= 0"),
    ],
)
def test_certificates_that_are_none_are_refused(wrong, message):
    """A metric would reckon with them."""
    found = Certificates.from_bounds(np.array([0, 1]), np.array([0.9, 0.5]), Gaussian(1.0), 10)
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(found, **wrong)
    assert found.select(0).prediction == 0


def test_certificates_as_a_table():
    found = Certificates.from_bounds(
        np.array([3, 1, 2]), np.array([0.9, 0.5, 0.7]), Gaussian(1.0), draws=10
    )
    plain, table = found.frame(), found.frame(labels=[3, 1, 0])
    assert list(plain.columns) == ["prediction", "radius", "p_lower", "n"]
    assert list(table.columns) == ["label", "prediction", "radius", "p_lower", "n", "correct"]
    assert table["correct"].tolist() == [True, False, False]
    assert table["prediction"].tolist() == [3, ABSTAIN, 2]
    np.testing.assert_array_equal(plain["radius"], found.radius)


def test_predict_by_hand():
    """10 to 0: p-value 2 / 1024. 9 to 1: 22 / 1024. A tie and a third class never decide."""
    source = [[10, 0, 0], [1, 9, 0], [5, 5, 0], [0, 0, 10], [6, 2, 2]]
    np.testing.assert_array_equal(
        predict(Scripted(source), n=10, alpha=0.002), [0, ABSTAIN, ABSTAIN, 2, ABSTAIN]
    )
    np.testing.assert_array_equal(
        predict(Scripted(source), n=10, alpha=22 / 1024), [0, 1, ABSTAIN, 2, ABSTAIN]
    )
    np.testing.assert_array_equal(predict(Scripted(source), n=10, alpha=0.3), [0, 1, ABSTAIN, 2, 0])


def test_predict_follows_the_pseudo_code():
    """Section 3.2.1 with scipy's binomtest, on 500 examples."""
    rng = np.random.default_rng(1)
    votes = rng.multinomial(60, rng.dirichlet([1.5, 1, 1, 0.3], 500))
    found = predict(Scripted(votes), n=60, alpha=0.05)
    for i in range(500):
        top, second = np.sort(votes[i])[::-1][:2]
        sure = binomtest(top, top + second, 0.5).pvalue <= 0.05
        assert found[i] == (np.argmax(votes[i]) if sure else ABSTAIN)


def test_predict_of_one_class_alone():
    """Without a rival the test is of n votes to none."""
    np.testing.assert_array_equal(
        predict(SimulatedCounts([[1.0], [1.0]]), n=20, alpha=0.001), [0, 0]
    )


def test_certify_margin_by_hand():
    """Both bounds with statsmodels, the largest other count, and abstention at a radius of 0."""
    first = [[9, 0, 1], [9, 0, 1], [9, 0, 1]]
    second = [[700, 100, 200], [450, 300, 250], [360, 340, 300]]
    found = certify_margin(Scripted(first, second), Gaussian(0.5), 10, 1000, 0.01)
    for i, (k, rival) in enumerate([(700, 200), (450, 300), (360, 340)]):
        low = proportion_confint(k, 1000, alpha=0.018, method="beta")[0]
        high = proportion_confint(rival, 1000, alpha=0.002, method="beta")[1]
        radius = 0.25 * (norm.ppf(low) - norm.ppf(high))
        assert found.p_lower[i] == pytest.approx(low, rel=1e-9)
        assert found.radius[i] == pytest.approx(max(radius, 0), rel=1e-8)
    np.testing.assert_array_equal(found.prediction, [0, 0, ABSTAIN])
    np.testing.assert_array_equal(found.n, 1010)


def test_margin_of_two_classes_is_certify_at_its_share():
    votes = np.array([[900, 100], [560, 440], [400, 600]])
    first = np.array([[9, 1]] * 3)
    margin = certify_margin(Scripted(first, votes.copy()), Gaussian(1.0), 10, 1000, 0.01)
    plain = certify(Scripted(first, votes.copy()), Gaussian(1.0), 10, 1000, 0.009)
    np.testing.assert_array_equal(margin.prediction, plain.prediction)
    np.testing.assert_allclose(margin.radius, plain.radius, rtol=1e-7, atol=1e-8)


def test_margin_certifies_no_less_than_a_union_over_classes():
    """At a class's own share of .9 alpha and the rest for all others, on every example."""
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.full(10, 0.5), 300)
    votes = SimulatedCounts(p, seed=0).draw(20_100)
    one, every = (
        f(RecordedCounts(votes, seed=1), Gaussian(0.5), 100, 20_000, 0.001)
        for f in (certify_margin, lambda *a: certify_partition(*a, merge=False))
    )
    assert (one.radius >= every.radius - 1e-12).all()
    assert one.radius.mean() > every.radius.mean()


def test_class_partitioning_by_hand():
    """Delattre et al. 2025: groups until the rest has no more votes than the runner-up."""
    first = [[50, 20, 15, 10, 5, 0], [90, 5, 2, 1, 1, 1], [40, 30, 10, 10, 10, 0]]
    second = [[500, 210, 140, 80, 50, 20]] * 3
    found = certify_partition(Scripted(first, second), Gaussian(1.0), 100, 1000, 0.01)
    # {0} {1} {2, 3, 4, 5} would have 30 > 20 votes, so {2} is alone and {3, 4, 5} has 15. In the
    # second the rest has 5 <= 5; in the third it has 30 <= 30.
    for i, (groups, rival) in enumerate([(4, 210), (3, 290), (3, 290)]):
        low = proportion_confint(500, 1000, alpha=0.02 / groups, method="beta")[0]
        high = proportion_confint(rival, 1000, alpha=0.02 / groups, method="beta")[1]
        radius = 0.5 * (norm.ppf(low) - norm.ppf(high))
        assert found.radius[i] == pytest.approx(radius, rel=1e-7)


def test_without_merging_every_class_is_a_group():
    first, second = [[9, 1, 0, 0]], [[700, 100, 150, 50]]
    args = (Gaussian(1.0), 10, 1000, 0.01)
    found = certify_partition(Scripted(first, second), *args, merge=False)
    low = proportion_confint(700, 1000, alpha=0.02 / 4, method="beta")[0]
    high = proportion_confint(150, 1000, alpha=0.02 / 4, method="beta")[1]
    assert found.radius[0] == pytest.approx(0.5 * (norm.ppf(low) - norm.ppf(high)), rel=1e-8)


def test_margin_refuses_a_noise_of_one_probability():
    class OneSided:
        pass

    for certified in (certify_margin, certify_partition):
        counts = SimulatedCounts([[0.9, 0.1]])
        counts.draw = None  # refused before it costs a draw
        with pytest.raises(ValueError, match="noise must have a radius of two probabilities"):
            certified(counts, OneSided(), 10, 100, 0.01)
        with pytest.raises(ValueError, match="counts must have two classes or more"):
            certified(SimulatedCounts([[1.0]]), Gaussian(1.0), 10, 100, 0.01)
    with pytest.raises(ValueError, match="share"):
        certify_margin(SimulatedCounts([[0.9, 0.1]]), Gaussian(1.0), 10, 100, 0.01, share=1.0)


@pytest.mark.parametrize("certified", [certify_margin, certify_partition])
def test_draws_and_levels_of_narrow_types_are_those_numbers(certified):
    found, same = (
        certified(SimulatedCounts([[0.9, 0.1]], seed=0), Gaussian(0.5), *draws, alpha)
        for draws, alpha in (((np.uint8(100), np.uint8(200)), np.float32(0.25)), ((100, 200), 0.25))
    )
    np.testing.assert_array_equal(found.n, 300)
    assert found.radius == same.radius
