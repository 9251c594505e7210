"""The audit: it passes what is sound, it catches what is not, and its parts are right by hand."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binom, binomtest

from lib.audit import audit, is_false, true_radius, truths, verdict, worst
from lib.bounds import clopper_pearson_lower
from lib.certify import ABSTAIN, Certificates, certify, certify_margin, predict, votes_for
from lib.counts import SimulatedCounts
from lib.noise import Ablation, Gaussian, Uniform
from lib.samplers import (
    SAMPLERS,
    Adaptive,
    Anytime,
    Certify,
    InputSpecific,
    Margin,
    Partition,
    Staircase,
)

NOISE = Gaussian(0.5)
# Every registered sampler, small; those that promise nothing are not among them.
SOUND = [
    Certify(n=1000),
    InputSpecific(n0=100, n=5000),
    Margin(n=1000),
    Partition(n=1000),
    Partition(n=1000, merge=False),
    Adaptive(stages="100,1000", radius="0.25"),
    Anytime(n=2000, radius="0.25"),
    Anytime(n=2000, radius="0.25", beta=0.001),
    Anytime(n=1000, radius="0,0.25"),
    Anytime(n=1000, radius="0.25", runner_up=True),
    Staircase(n=5000),
]
PUBLISHED_UNSOUND = [InputSpecific(n0=1000, n=100_000, reuse=True)]


def certificates(prediction, radius):
    size = len(prediction)
    return Certificates(np.array(prediction), np.array(radius), np.zeros(size), np.ones(size, int))


def test_what_is_false_by_hand():
    p = [0.7, 0.2, 0.1]
    truth = NOISE.radius_two(0.7, 0.2)
    np.testing.assert_allclose(true_radius(NOISE, p), [truth, 0, 0])
    found = certificates([0, 0, 1, ABSTAIN, 1], [truth, truth + 1e-9, 0.0, 0.0, 0.1])
    np.testing.assert_array_equal(is_false(found, NOISE, p), [False, True, True, False, True])
    named = np.array([0, 1, ABSTAIN])
    np.testing.assert_array_equal(is_false(named, NOISE, p), [False, True, False])
    # At a tie either class may be named, with the radius 0.
    tie = certificates([0, 1, 1], [0.0, 0.0, 1e-9])
    np.testing.assert_array_equal(is_false(tie, NOISE, [0.5, 0.5]), [False, False, True])


def test_every_sampler_that_certifies_is_audited():
    audited = {type(sampler) for sampler in SOUND + PUBLISHED_UNSOUND}
    assert audited == {cls for cls in SAMPLERS.values() if cls.certifies}


@pytest.mark.parametrize("sampler", SOUND, ids=repr)
def test_sound_samplers_hold(sampler):
    table = audit(sampler, NOISE, runs=5000)
    assert verdict(table) == "holds", str(table)
    assert worst(table)["rate"] <= 2.0
    assert (table["exact"].dropna() <= 1 + 1e-9).all()
    assert table["certified"].max() > 0.9


@pytest.mark.parametrize("sampler", SOUND, ids=repr)
def test_samplers_refuse_votes_of_another_noise(sampler):
    """Votes under less noise than the radius speaks of would be certified too far."""
    counts = SimulatedCounts([[0.9, 0.1]])
    counts.draw = None  # refused before it costs a draw
    with pytest.raises(ValueError, match="noise must have one level, or 1, one per example"):
        sampler(counts, Gaussian([0.5, 0.5]))
    counts.noise = Gaussian(0.25)
    with pytest.raises(ValueError, match="noise must be the one that the votes were drawn under"):
        sampler(counts, NOISE)


def test_margin_holds_under_uniform_noise():
    """Its radius of two probabilities is another one, lambda (p_a - p_b)."""
    table = audit(Margin(n=1000, alpha=0.01), Uniform(1.0), runs=4000)
    assert verdict(table) == "holds", str(table)


@pytest.mark.parametrize(
    "sampler",
    [Certify(n=500, alpha=0.01), Margin(n=500, alpha=0.01), Anytime("2", 500, alpha=0.01)],
    ids=repr,
)
def test_whole_numbers_of_pixels_hold(sampler):
    """Under ablation, just below the probability that certifies each number of pixels, too."""
    noise = Ablation(8, 64)
    rows = truths(sampler, noise)
    for r in range(1, 6):
        p = float(noise.probability(r)) * (1 - 1e-12)
        rows += [[p, 1 - p], [p, (1 - p) / 2, (1 - p) / 2]]
    table = audit(sampler, noise, rows, runs=4000)
    assert verdict(table) == "holds", str(table)
    # At a tie the class is wrong at any radius: this is where a bound that is too high shows.
    assert worst(table)["rate"] > 0.3


@pytest.mark.parametrize("sampler", PUBLISHED_UNSOUND, ids=repr)
def test_published_unsound_samplers_are_caught(sampler):
    """Without a run: the exact probability at a tie is 1.8 alpha for AD .05."""
    table = audit(sampler, NOISE, [[0.5, 0.5]], runs=10)
    assert verdict(table) == "fails"
    assert 1.7 < worst(table)["rate"] < 1.9


def test_a_literal_runner_up_is_caught():
    """The count of the class that the selection draws named second, not the largest: unsound."""

    @dataclasses.dataclass(frozen=True)
    class Literal:
        alpha: float = 0.05

        def __call__(self, counts, noise):
            first = counts.draw(10)
            order, at = np.argsort(-first, axis=1, kind="stable"), np.arange(len(counts))
            votes = counts.draw(1000)
            two = np.stack([votes[at, order[:, 0]], votes[at, order[:, 1]]], axis=1)
            pad = np.concatenate([two, 1000 - two.sum(axis=1, keepdims=True)], axis=1)
            pad[:, 2] = 0
            given = iter([np.tile([1, 0, 0], (len(at), 1)), pad])
            fake = type("Fake", (), {"classes": 3, "draw": lambda self, n: next(given)})
            fake.__len__ = lambda self: len(at)
            found = certify_margin(fake(), noise, 1, 1000, self.alpha)
            named = np.where(found.prediction == ABSTAIN, ABSTAIN, order[:, 0])
            return dataclasses.replace(found, prediction=named)

    rows = [[0.5, 0.2, 0.1, 0.1, 0.1]]
    assert verdict(audit(Literal(), NOISE, rows, runs=5000)) == "fails"
    assert verdict(audit(Margin(n0=10, n=1000, alpha=0.05), NOISE, rows, runs=5000)) == "holds"


def test_bounding_by_the_draws_that_chose_the_class_is_caught():
    """The mistake that CERTIFY avoids."""

    def reuse(counts, noise):
        votes = counts.draw(1000)
        given = iter([votes, votes])
        same = type("Same", (), {"classes": 2, "draw": lambda self, n: next(given)})
        same.__len__ = lambda self: len(votes)
        return certify(same(), noise, n0=1000, n=1000, alpha=0.01)

    table = audit(reuse, NOISE, [[0.5, 0.5]], alpha=0.01, runs=20_000)
    assert verdict(table) == "fails"
    assert table["rate"][0] > 1.5


@pytest.mark.parametrize("alpha", [0.01, 0.001])
def test_the_exact_rate_of_certify_is_the_sum_over_its_votes(alpha):
    """By a second route, and the simulation agrees with it."""
    sampler, votes = Certify(n0=100, n=1000, alpha=alpha), np.arange(1001)
    bound = clopper_pearson_lower(votes, 1000, alpha)
    for p in (0.5, 0.501, 0.55, 0.7, 0.9, 0.99):
        named = binom.cdf(50, 100, 1 - p), binom.sf(50, 100, 1 - p)
        rates = [binom.pmf(votes, 1000, q)[(bound > 0.5) & (bound > q)].sum() for q in (p, 1 - p)]
        exact = named[0] * rates[0] + named[1] * rates[1]
        assert sampler.failure(p, NOISE) == pytest.approx(exact, rel=1e-9)
        assert exact <= alpha
        row = audit(sampler, NOISE, [[p, 1 - p]], runs=20_000).iloc[0]
        assert binomtest(int(row["false"]), 20_000, exact).pvalue > 1e-4


@pytest.mark.parametrize("sampler", [s for s in SOUND if hasattr(s, "failure")], ids=repr)
def test_exact_rates_agree_with_simulated_ones(sampler):
    """At a large alpha, where ten thousand runs tell much."""
    sampler = dataclasses.replace(sampler, alpha=0.05)
    rows = [row for row in truths(sampler, NOISE) if len(row) == 2]
    table = audit(sampler, NOISE, rows, runs=4000).dropna(subset="exact")
    for row in table.to_dict("records"):
        chance = min(1.0, row["exact"] * 0.05)
        assert binomtest(row["false"], 4000, chance).pvalue > 1e-4, row


def ties():
    """Classes that all but tie: the likelier the top class, the rarer another one wins."""
    some = [[1 / c + 1e-9, *[(1 - 1 / c - 1e-9) / (c - 1)] * (c - 1)] for c in (2, 3, 10)]
    return [*some, [0.51, 0.49], [0.45, 0.44, 0.11]]


@pytest.mark.parametrize("alpha", [0.05, 0.001])
def test_predict_keeps_its_promise(alpha):
    """And at a tie errs half as often: its test is two-sided, less what its steps cost."""

    def sampler(counts, noise):
        return predict(counts, 1000, alpha)

    table = audit(sampler, NOISE, ties(), alpha=alpha, runs=20_000)
    assert verdict(table) == "holds"
    if alpha == 0.05:
        assert 0.3 < table["rate"][0] < 0.55
    assert table["draws"].isna().all()


def test_the_interval_of_the_rate():
    """No error in 1000 runs at alpha .1: below 1 - .025^(1/1000), in units of alpha."""

    def never(counts, noise):
        counts.draw(1)
        return np.full(len(counts), ABSTAIN)

    row = audit(never, NOISE, [[0.6, 0.4]], alpha=0.1, runs=1000).iloc[0]
    assert (row["rate"], row["low"], row["certified"]) == (0, 0, 0)
    assert row["high"] == pytest.approx((1 - 0.025**0.001) / 0.1)

    def sometimes(counts, noise):
        return np.where(np.arange(len(counts)) < 30, 1, ABSTAIN)

    row = audit(sometimes, NOISE, [[0.6, 0.4]], alpha=0.1, runs=1000).iloc[0]
    interval = binomtest(30, 1000).proportion_ci(0.95, method="exact")
    assert (row["false"], row["rate"]) == (30, pytest.approx(0.3))
    assert (row["low"], row["high"]) == pytest.approx((interval.low / 0.1, interval.high / 0.1))
    assert row["p-value"] == pytest.approx(binom.sf(29, 1000, 0.1))


@pytest.mark.parametrize(
    ("exact", "p_value", "expected"),
    [
        (1 + 1e-10, 0.5, "holds"),
        (1.001, 0.5, "fails"),
        (np.nan, 1.1e-4, "holds"),
        (np.nan, 0.9e-4, "fails"),
        (0.5, 0.9e-4, "fails"),
    ],
)
def test_one_row_condemns(exact, p_value, expected):
    table = pd.DataFrame({"exact": [0.9, exact], "p-value": [0.5, p_value]})
    assert verdict(table) == expected


def test_a_sampler_that_states_nothing_is_tried_all_over():
    """One that stops early at a radius, else counts all: it errs near that radius alone."""

    alpha = 0.05

    def greedy(counts, noise):
        votes = votes_for(np.zeros(len(counts), dtype=int), counts.draw(200))
        some = noise.radius(clopper_pearson_lower(votes, 200, alpha))
        votes = votes + votes_for(np.zeros(len(counts), dtype=int), counts.draw(800))
        rest = noise.radius(clopper_pearson_lower(votes, 1000, alpha))
        radius = np.where(some >= 0.25, some, rest)
        zero = np.zeros(len(counts), dtype=int)
        return Certificates(np.where(radius > 0, zero, ABSTAIN), radius, radius, zero + 1000)

    rows = truths(greedy, NOISE)
    assert len(rows) == len(truths(Certify(), NOISE)) + 30
    assert verdict(audit(greedy, NOISE, truths(Certify(), NOISE), alpha, 20_000)) == "holds"
    assert verdict(audit(greedy, NOISE, alpha=alpha, runs=20_000)) == "fails"


def test_the_worst_rate_is_a_simulated_one_where_that_refutes_the_exact():
    """A noise whose probability does not fit its radius: the exact error knows nothing of it."""

    class Wrong(Gaussian):
        def probability(self, radius):
            return super().probability(radius) - 0.2

    table = audit(Adaptive(radius="0.5", alpha=0.05), Wrong(0.5), [[0.75, 0.25]], runs=2000)
    assert verdict(table) == "fails"
    assert worst(table)["rate"] == table["rate"].max() > 2 * table["exact"].max()


def test_a_sampler_without_alpha_must_be_told():
    with pytest.raises(ValueError, match="alpha"):
        audit(lambda counts, noise: None, NOISE)
    with pytest.raises(ValueError, match="runs"):
        audit(Certify(), NOISE, runs=0)


def test_noise_that_counts_pixels_is_audited_just_below_its_steps():
    noise = Ablation(8, 64)
    pairs = [row for row in truths(Certify(), noise) if len(row) == 2]
    edges = [float(noise.probability(r)) for r in range(1, int(noise.radius(1.0)) + 1)]
    below = [min(edge - p for p, _ in pairs if p < edge) for edge in edges]
    assert sum(gap < 1e-9 for gap in below) >= min(5, len(edges))


@pytest.mark.parametrize("sampler", [Adaptive(radius="0.3"), Anytime(radius="0.2,0.3")], ids=repr)
def test_samplers_of_given_radii_are_audited_just_below_each(sampler):
    """With two classes and with three: there they are likeliest to certify too far."""
    for edge in NOISE.probability(np.array(sampler.radii)):
        below = [len(row) for row in truths(sampler, NOISE) if 0 < edge - row[0] < 1e-9]
        assert below == [2, 3]


@pytest.mark.parametrize(
    "sampler",
    [*(Margin(5, 60, 0.05, share) for share in (0.1, 0.3, 0.5, 0.9)), Partition(5, 60, 0.05)],
    ids=repr,
)
def test_the_exact_error_of_two_bounds_is_the_sum_over_all_counts(sampler):
    """Of two classes: by the sampler itself on every possible count."""
    p, n, hits, rate = 0.6, 60, np.arange(61), 0.0
    for chosen, q, chance in ((0, p, binom.sf(2, 5, p)), (1, 1 - p, binom.cdf(2, 5, p))):
        first = np.tile(np.eye(2, dtype=int)[chosen] * 5, (n + 1, 1))
        votes = np.stack([hits, n - hits], axis=1)
        votes = votes if chosen == 0 else votes[:, ::-1]
        found = sampler(Both(first, votes), Gaussian(0.5))
        true = Gaussian(0.5).radius(q)
        rate += chance * binom.pmf(hits[found.radius > true + 1e-12], n, q).sum()
    assert sampler.failure(p, Gaussian(0.5)) == pytest.approx(rate, rel=1e-9)


class Both:
    """Votes of two calls, as given."""

    noise, classes = None, 2

    def __init__(self, *votes):
        self.votes = [v.copy() for v in votes]

    def __len__(self):
        return len(self.votes[0])

    def draw(self, n):
        return self.votes.pop(0)


def test_a_sampler_that_promises_no_alpha_is_told_to():
    with pytest.raises(ValueError, match=r"sampler .* has no field alpha, its promise: add one"):
        audit(lambda counts, noise: None, Gaussian(0.5))
