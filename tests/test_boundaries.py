"""Group-sequential boundaries: exact by enumeration, minimal, within alpha, cached and checked."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
from scipy.stats import binom, norm

from lib import boundaries as module
from lib.boundaries import (
    Boundaries,
    abstain_count,
    bonferroni,
    certify_count,
    compute,
    crossing,
    design,
    error,
    load_table,
    looks_until,
    outcomes,
    reweighted,
    save_table,
    stopped,
    two_classes,
)
from lib.bounds import clopper_pearson_lower, clopper_pearson_upper

ALPHA = 0.001
SMALL = Boundaries(0.6, np.array([3, 5, 9]), np.array([4, 5, 8]), np.array([0, 2, 7]))


def paths(boundaries, p):
    """Every sequence of hits and misses, one by one: (certified [J], abstained [J])."""
    shares = np.zeros((2, len(boundaries.looks)))
    for path in itertools.product([0, 1], repeat=int(boundaries.looks[-1])):
        chance = math.prod(p if hit else 1 - p for hit in path)
        for j, n in enumerate(boundaries.looks):
            k = sum(path[:n])
            if k >= boundaries.certify[j] or k <= boundaries.abstain[j]:
                shares[int(k <= boundaries.abstain[j]), j] += chance
                break
    return shares


def plain_crossing(boundaries, p):
    """The chance to cross by a second route: full vectors, scipy's binomial, no windows, no FFT."""
    alive, before, crossed = np.ones(1), 0, 0.0
    for n, b in zip(boundaries.looks, boundaries.certify, strict=True):
        alive = np.convolve(alive, binom.pmf(np.arange(n - before + 1), n - before, p))
        crossed += alive[b:].sum()
        alive, before = np.where(np.arange(n + 1) < b, alive, 0.0), n
    return crossed


@pytest.mark.parametrize("p", [0.05, 0.5, 0.6, 0.93, 1.0])
def test_outcomes_are_the_sum_over_all_paths(p):
    certified, abstained = outcomes(SMALL, [p])
    np.testing.assert_allclose([certified[0], abstained[0]], paths(SMALL, p), atol=1e-15)
    never = dataclasses.replace(SMALL, abstain=np.full(3, -1))
    assert crossing(SMALL, p) == pytest.approx(paths(never, p)[0].sum(), abs=1e-14)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.7])
def test_two_classes_are_the_sum_over_all_paths(p):
    test = Boundaries(0.6, np.array([4, 7]), np.array([4, 6]), np.array([2, 5]))
    expected = np.zeros((3, 2))
    for path in itertools.product([0, 1], repeat=7):
        chance = math.prod(p if hit else 1 - p for hit in path)
        for j, n in enumerate(test.looks):
            k = sum(path[:n])
            sides = (k >= test.certify[j], n - k >= test.certify[j])
            sides += (max(k, n - k) <= test.abstain[j],)
            if any(sides):
                expected[sides.index(True), j] += chance
                break
    np.testing.assert_allclose(two_classes(test, p), expected, atol=1e-15)


def test_gates_are_the_sum_over_all_paths():
    looks, gates, p = np.array([3, 6, 8]), np.array([2, 7]), 0.7
    expected = {}
    for path in itertools.product([0, 1], repeat=8):
        j = next(j for j, n in enumerate(looks) if j == 2 or sum(path[:n]) < gates[j])
        key = (int(looks[j]), sum(path[: looks[j]]))
        expected[key] = expected.get(key, 0) + math.prod(p if hit else 1 - p for hit in path)
    found = {}
    for n, ks, masses in stopped(looks, gates, p):
        found |= {(int(n), int(k)): m for k, m in zip(ks, masses, strict=True)}
    assert {key: pytest.approx(m, abs=1e-14) for key, m in found.items() if m > 0} == expected


@pytest.mark.parametrize("p", [0.3, 0.8413, 0.9999, 0.02])
def test_counts_of_many_draws_have_their_binomial_distribution(p):
    """Without stops the count after all looks is binomial, to 12 digits, also far in its tail."""
    looks = looks_until(200_000)
    last = Boundaries(p, looks, looks + 1, np.full(len(looks), -1))
    last.certify[-1] = int(200_000 * p - 4 * math.sqrt(200_000 * p * (1 - p)))
    assert crossing(last, p) == pytest.approx(binom.sf(last.certify[-1] - 1, 200_000, p), rel=1e-11)
    last.certify[-1] = math.ceil(200_000 * p + 5 * math.sqrt(200_000 * p * (1 - p)))
    assert crossing(last, p) == pytest.approx(binom.sf(last.certify[-1] - 1, 200_000, p), abs=1e-12)


def test_fresh_stages_are_independent():
    test = bonferroni(0.8, [50, 200], 0.01, 0.05)
    certified, abstained = outcomes(test, [0.83])
    up = binom.sf(test.certify - 1, test.looks, 0.83)
    down = binom.cdf(test.abstain, test.looks, 0.83)
    np.testing.assert_allclose(certified[0], [up[0], (1 - up[0] - down[0]) * up[1]], rtol=1e-12)
    assert certified.sum() + abstained.sum() == pytest.approx(1, abs=1e-14)
    np.testing.assert_array_equal(test.spent, [50, 250])


@pytest.mark.parametrize("null", [0.55, 0.8413, 0.999])
def test_reweighting_one_chain_gives_every_p(null):
    test = design(null, 10_000, ALPHA)
    near = 6 * math.sqrt(null * (1 - null) / 10_000)
    p = np.linspace(null - near, min(1, null + near), 9)
    for ours, direct in zip(reweighted(test, p), outcomes(test, p), strict=True):
        np.testing.assert_allclose(ours, direct, atol=1e-9)


@pytest.mark.parametrize("n", [10, 100, 1000, 43_290])
@pytest.mark.parametrize("null", [0.5, 0.8413, 0.97])
def test_counts_agree_with_the_bounds_of_clopper_and_pearson(n, null):
    """The fewest votes whose lower bound reaches null, the most whose upper bound does not."""
    k = np.arange(n + 1)
    reached = k[clopper_pearson_lower(k, n, ALPHA) >= null]
    assert certify_count(null, n, ALPHA) == (reached[0] if len(reached) else n + 1)
    missed = k[clopper_pearson_upper(k, n, ALPHA) < null]
    assert abstain_count(null, n, ALPHA) == (missed[-1] if len(missed) else -1)


@pytest.mark.parametrize("alpha", [1e-16, 1e-17, 1e-30, 1e-150])
def test_the_fewest_votes_at_a_tiny_alpha(alpha):
    """scipy's quantile of a tail below 5.5e-17 is n: nothing short of all votes would certify."""
    n, null = np.array([[1000], [10**6]]), np.array([0.5, 0.6, 0.84])
    fewest = certify_count(null, n, alpha)
    assert (binom.sf(fewest - 1, n, null) <= alpha).all()
    assert (binom.sf(fewest - 2, n, null) > alpha).all()


def test_figure_4():
    """Horvath et al. 2022, figure 4: sigma = r = .25, alpha .001, beta .0001."""
    test = bonferroni(norm.cdf(1), [1000, 10_000, 125_000], 0.001, 0.0001)
    np.testing.assert_array_equal(test.certify, [880, 8538, 105_607])
    # "Fewer than 795 (8270) votes abstain"; at the last stage all others do.
    np.testing.assert_array_equal(test.abstain + 1, [795, 8270, 105_607])


def test_looks():
    np.testing.assert_array_equal(
        looks_until(1300), [100, 200, 300, 400, 500, 700, 900, 1200, 1300]
    )
    np.testing.assert_array_equal(looks_until(50), [50])


SETTINGS = [
    (null, n, alpha, beta)
    for null in (0.5, 0.504, 0.52, 0.6915, 0.8413, 0.9772, 0.99865)
    for n, alpha in ((1000, 0.05), (5000, 0.001))
    for beta in (None, 0.001)
    if n * math.log(null) <= math.log(alpha)
]


@pytest.mark.parametrize(("null", "n", "alpha", "beta"), SETTINGS)
def test_a_design_keeps_its_three_promises(null, n, alpha, beta):
    """Type-I error of both classes within alpha by a second route, and nearly all of it used.

    T2 (beta None): never .001 less power than CERTIFY. T1: early abstention within beta at null.
    """
    test = design(null, n, alpha, beta)
    wrong = plain_crossing(test, null) + plain_crossing(test, 1 - null)
    assert wrong <= alpha
    assert wrong == pytest.approx(error(test), abs=3e-12)
    assert wrong > 0.6 * alpha
    for lower in (null - 0.001, null - 0.02):
        if lower >= 0.5:
            assert plain_crossing(test, lower) + plain_crossing(test, 1 - lower) <= wrong
    needed = certify_count(null, n, alpha)
    p = 1 - np.geomspace(1 - null, 1e-12, 400)
    power = binom.sf(needed - 1, n, p)
    certified, abstained = outcomes(test, p)
    np.testing.assert_allclose(certified.sum(1) + abstained.sum(1), 1, atol=1e-12)
    # Where another class may cross, too, both share alpha, and CERTIFY alone is no match.
    if beta is None and plain_crossing(test, 1 - null) < 1e-3 * alpha:
        assert (power - certified.sum(axis=1)).max() < 0.001
    if beta is not None:
        for share in (null, null + 0.3 * (1 - null)):
            assert outcomes(test, share)[1][0, :-1].sum() <= beta


@pytest.mark.parametrize("null", [0.52, 0.8413])
def test_no_boundary_could_be_lower(null):
    """With one vote less at any look, more of alpha is spent than that look may."""
    test = design(null, 1000, 0.01, alone=True)
    share = test.looks / test.looks[-1]
    for j in range(len(test.looks)):
        certify = test.certify[: j + 1].copy()
        part = dataclasses.replace(test, looks=test.looks[: j + 1], certify=certify)
        assert plain_crossing(part, null) <= 0.01 * share[j]
        certify[-1] -= 1
        assert plain_crossing(part, null) > 0.01 * share[j] - 1e-11


def test_one_class_fixed_beforehand_may_have_all_of_alpha():
    """At p = 1/2 two classes share alpha; one alone has it, and may be tested below 1/2, too."""
    both, alone = design(0.5, 1000, 0.01), design(0.5, 1000, 0.01, alone=True)
    assert plain_crossing(both, 0.5) <= 0.005 < plain_crossing(alone, 0.5) <= 0.01
    assert plain_crossing(design(0.2, 1000, 0.01, alone=True), 0.2) <= 0.01


@pytest.mark.parametrize("n", [100, 1000, 100_000])
def test_the_largest_radius_of_certify_is_reached_and_beyond_is_an_error(n):
    most = ALPHA ** (1 / n) * (1 - 1e-9)
    test = design(most, n, ALPHA)
    assert test.certify[-1] <= test.looks[-1]
    assert outcomes(test, 1.0)[0].sum() == 1
    with pytest.raises(ValueError, match=f"radius must be one that n = {n} hits"):
        design(ALPHA ** (1 / n) + 1e-6, n, ALPHA)


def test_bad_designs_are_named():
    for null in (0.4, 1.0, float("nan")):
        with pytest.raises(ValueError, match="null must be"):
            design(null, 1000, ALPHA)
    with pytest.raises(ValueError, match="alpha"):
        design(0.8, 1000, 0.0)
    with pytest.raises(ValueError, match="beta"):
        design(0.8, 1000, ALPHA, beta=2.0)
    with pytest.raises(ValueError, match="n must be"):
        design(0.8, 0, ALPHA)
    for alpha in (2e-12, 9e-11):
        with pytest.raises(ValueError, match="alpha must be at least 1e-10"):
            design(0.8, 1000, alpha)
    with pytest.raises(ValueError, match="n must be larger for a design at null"):
        design(0.5, 7, 0.01)


def test_few_draws_that_do_not_certify_at_the_level_of_two_classes():
    """Ten hits in ten certify at alpha, but not at the half of it that each class has."""
    found = design(0.5, 10, 0.001)
    assert found.looks[-1] <= 20
    assert error(found) <= 0.001


@pytest.mark.parametrize(
    ("null", "n", "alpha"),
    [(0.5, 1000, 0.001), (0.52, 1000, 0.05), (0.6, 1000, 0.2), (0.95, 1000, 0.05)],
)
def test_two_classes_are_the_worst_truth(null, n, alpha):
    """No three classes err more often than `error` says, and its reason holds at every boundary."""
    found = compute(null, n, alpha)
    p = np.linspace(0, null, 25)
    crossed = {0.0: 0.0} | {q: crossing(found, q) for q in p[1:]}
    assert np.diff(list(crossed.values()), 2).min() > -1e-12
    for first, second in itertools.combinations_with_replacement(p, 2):
        third = 1 - first - second
        if 0 < third <= null:
            total = crossed[first] + crossed[second] + crossing(found, third)
            assert total <= error(found) + 1e-12
    hits, draws = (part[found.certify <= found.looks] for part in (found.certify, found.looks))
    sign = hits * (hits - 1) - 2 * null * hits * (draws - 1) + null**2 * draws * (draws - 1)
    assert (sign > 0).all()


def test_the_least_alpha_has_a_design():
    assert 0.9e-10 < error(design(0.8, 1000, 1e-10)) <= 1e-10


STATED = {"null": 0.8, "n": 1000, "alpha": 0.01, "beta": None, "alone": False, "version": 1}


def test_a_table_comes_back_and_a_wrong_one_does_not(tmp_path):
    path = tmp_path / "table.json"
    made = compute(0.8, 1000, 0.01)
    save_table(path, STATED, made)
    found = load_table(path, STATED)
    for field in ("looks", "certify", "abstain"):
        np.testing.assert_array_equal(getattr(found, field), getattr(made, field))
    assert load_table(path, STATED | {"alpha": 0.02}) is None
    assert load_table(tmp_path / "none.json", STATED) is None
    text = path.read_text()
    path.write_text(text.replace("1000", "1001", 1))
    assert load_table(path, STATED) is None
    path.write_text(text[:-20])
    assert load_table(path, STATED) is None
    # Well formed and signed, but with a boundary that errs too often.
    save_table(path, STATED, dataclasses.replace(made, certify=made.certify - 3))
    assert load_table(path, STATED) is None
    # At p = 1/2 the boundary of one class fixed beforehand is too low for two that may cross.
    half = STATED | {"null": 0.5}
    save_table(path, half, compute(0.5, 1000, 0.01, alone=True))
    assert load_table(path, half) is None
    save_table(path, half | {"alone": True}, compute(0.5, 1000, 0.01, alone=True))
    assert load_table(path, half | {"alone": True}) is not None


def test_a_design_is_loaded_not_computed_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(module.platformdirs, "user_cache_dir", lambda name: str(tmp_path / name))
    module._cached.cache_clear()
    first = design(0.77, 1000, 0.01)
    stored = next(tmp_path.glob("*/boundaries-*.json"))
    module._cached.cache_clear()
    monkeypatch.setattr(module, "compute", lambda *settings: pytest.fail("computed again"))
    np.testing.assert_array_equal(design(0.77, 1000, 0.01).certify, first.certify)
    module._cached.cache_clear()
    stored.write_text(json.dumps({"sha256": "", "table": "{}"}))
    with pytest.raises(pytest.fail.Exception, match="computed again"):
        design(0.77, 1000, 0.01)
    module._cached.cache_clear()
