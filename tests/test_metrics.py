"""What the papers report, on certificates small enough to count by hand."""

import functools

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.adaptive import certify_at
from lib.certify import ABSTAIN, Certificates, certify
from lib.counts import SimulatedCounts
from lib.iss import certify_iss, decline, sample_size_map
from lib.metrics import (
    abstention,
    average_certified_radius,
    certified_accuracy,
    curve,
    envelope,
    iss_beside_ias,
    paired_gain,
    right_radius,
    row,
    summarize,
)
from lib.noise import Gaussian


def certificates(prediction, radius):
    size = len(prediction)
    return Certificates(
        np.array(prediction), np.array(radius, dtype=np.float64), np.zeros(size), np.full(size, 10)
    )


# Right at 1.0, wrong at 2.0, abstained, right at 0.5.
FOUR, LABELS = certificates([0, 1, ABSTAIN, 3], [1.0, 2.0, 0.0, 0.5]), np.array([0, 7, 2, 3])
some_certificates = st.lists(
    st.tuples(st.integers(-1, 2), st.floats(0, 4), st.integers(0, 2)), min_size=1, max_size=30
)


def test_average_certified_radius_by_hand():
    """(1.0 + 0 + 0 + 0.5) / 4."""
    assert average_certified_radius(FOUR, LABELS) == 0.375


def test_a_wrong_example_of_infinite_radius_counts_nothing():
    assert average_certified_radius(certificates([1, 0], [np.inf, 2.0]), [0, 0]) == 1.0


def test_paired_gain_by_hand():
    """Gains .3, .2 (wrong before) and -.1: mean .4/3, deviation of the three over sqrt(3)."""
    before, after = (
        certificates([0, 1, 2], [0.1, 0.5, 0.6]),
        certificates([0, 2, 2], [0.4, 0.2, 0.5]),
    )
    labels = np.array([0, 2, 2])
    np.testing.assert_allclose(right_radius(before, labels), [0.1, 0, 0.6])
    gain, error = paired_gain(after, before, labels)
    assert gain == pytest.approx(0.4 / 3)
    assert error == pytest.approx(np.std([0.3, 0.2, -0.1], ddof=1) / np.sqrt(3))
    assert paired_gain(after, after, labels) == (0, 0)
    with pytest.raises(ValueError, match="after must certify the same examples"):
        paired_gain(after, certificates([0], [0.1]), labels)


def test_certified_accuracy_by_hand():
    """Up to the radius itself, as Cohen et al.'s code counts: at .5 the last example is in."""
    np.testing.assert_array_equal(
        certified_accuracy(FOUR, LABELS, [0, 0.49, 0.5, 0.99, 1.0, 3.0]),
        [0.5, 0.5, 0.5, 0.25, 0.25, 0],
    )
    assert certified_accuracy(FOUR, LABELS, 0.0) == 0.5
    assert certified_accuracy(FOUR, LABELS, [[0.0], [0.7]]).shape == (2, 1)


@pytest.mark.parametrize("radius", [0.0, 0.5])
def test_certificates_at_a_predetermined_radius_count_at_it(radius):
    counts = SimulatedCounts([[0.99, 0.01], [0.5, 0.5]], seed=0)
    found = certify_at(counts, Gaussian(0.5), radius, (100, 1000), 0.001, 0.001)
    assert found.radius.tolist() == [radius, 0.0]
    at = [radius, np.nextafter(radius, 1)]
    assert certified_accuracy(found, [0, 0], at).tolist() == [0.5, 0.0]
    log = pd.DataFrame({"predict": found.prediction, "radius": found.radius, "label": 0, "time": 0})
    table = summarize({"log": log})
    assert table[f"{radius:g}"].tolist() == [0.5]


def test_several_logs_are_paired_on_the_images_that_both_hold():
    first = pd.DataFrame(
        {"idx": [0, 1, 2], "label": 0, "predict": [0, 0, 1], "radius": [0.1, 0.2, 9.0], "time": 0}
    )
    other = pd.DataFrame(
        {"idx": [2, 1, 5], "label": 0, "predict": 0, "radius": [0.5, 0.3, 0.4], "time": 0}
    )
    relabelled = other.assign(label=1)
    table = summarize({"a": first, "b": other, "c": relabelled, "d": other[2:]})
    gain = np.array([0.5 - 0.0, 0.3 - 0.2])  # of images 2 and 1
    assert table.loc["b", "gain"] == pytest.approx(gain.mean())
    assert table.loc["b", "s.e."] == pytest.approx(gain.std(ddof=1) / np.sqrt(2))
    assert table.loc[["a", "c", "d"], ["gain", "s.e."]].isna().all(axis=None)
    assert "gain" not in summarize({"a": first})


def test_abstention_by_hand():
    assert abstention(FOUR) == 0.25
    # A certificate at the radius 0 is none.
    assert abstention(certificates([0, ABSTAIN], [0.0, 0.0])) == 0.5


def test_envelope_by_hand():
    np.testing.assert_array_equal(envelope([[0.9, 0.5, 0.0], [0.7, 0.6, 0.2]]), [0.9, 0.6, 0.2])


@given(some_certificates)
def test_average_radius_is_the_area_under_the_certified_accuracy(rows):
    """The mean radius is the area under the certified accuracy, integrated step by step."""
    prediction, radius, labels = (np.array(column) for column in zip(*rows, strict=True))
    found = certificates(prediction, np.where(prediction < 0, 0.0, radius))
    steps = np.unique(np.append(found.radius, 0.0))
    curve = certified_accuracy(found, labels, steps)
    assert (np.diff(curve) <= 0).all()
    assert certified_accuracy(found, labels, steps[-1] + 1) == 0
    assert average_certified_radius(found, labels) == pytest.approx(
        (curve[1:] * np.diff(steps)).sum(), abs=1e-12
    )


def test_a_row_and_a_curve_are_the_metrics():
    found = Certificates(
        np.array([0, 1, ABSTAIN]), np.array([0.5, 0.2, 0.0]), np.zeros(3), np.zeros(3, int)
    )
    labels = np.array([0, 0, 2])
    assert row(found, labels, [0.0, 0.5]) == {"acr": 0.5 / 3, "r0.00": 1 / 3, "r0.50": 1 / 3}
    assert curve(found, labels, [0.0, 0.4]).to_dict("list") == {
        "radius": [0.0, 0.4],
        "accuracy": [1 / 3, 1 / 3],
    }
    assert found.select([1]).radius.tolist() == [0.2]
    assert len(found.select(found.prediction != ABSTAIN)) == 2


def test_iss_beside_ias_at_equal_draws():
    """Two rows at the same average draws; ISS keeps its limit, and a hopeless image costs it n0."""
    noise, p = Gaussian(0.5), np.array([0.99, 0.9, 0.6, 0.3])
    chances = np.c_[p, (1 - p) / 2, (1 - p) / 2]
    sizes = sample_size_map(20_000, 0.05, "absolute", noise, 0.001)
    found = iss_beside_ias(
        functools.partial(SimulatedCounts, chances),
        sizes,
        np.zeros(4, int),
        p,
        [0.0, 0.5],
        replays=3,
    )
    iss, ias = found.iloc[0], found.iloc[1]
    assert list(found.method) == ["ISS", "IAS"]
    assert iss.draws == pytest.approx(ias.draws, rel=1e-3)
    assert iss.mad <= 0.05 + 1e-9
    assert iss["r0.00"] == ias["r0.00"] == 0.75
    assert iss["r0.50"] == 0.5
    # By hand from one replay.
    one = certify_iss(SimulatedCounts(chances, 0), noise, 200, 20_000, sizes, 0.001, True)
    alone = iss_beside_ias(
        functools.partial(SimulatedCounts, chances), sizes, np.zeros(4, int), p, [0.0], replays=1
    )
    assert alone.draws[0] == one.n.mean()
    assert alone.acr[0] == np.where(one.prediction == 0, one.radius, 0).mean()


def test_fresh_draws_and_a_given_class_are_counted_as_they_are_spent():
    noise, p = Gaussian(1.0), np.array([0.95, 0.7])
    make = functools.partial(SimulatedCounts, np.c_[p, 1 - p])
    sizes = sample_size_map(10_000, 0.1, "absolute", noise, 0.001, step=None)
    given = np.zeros(2, dtype=int)
    fresh = iss_beside_ias(make, sizes, given, p, [0.0], reuse=False, replays=2)
    known = iss_beside_ias(make, sizes, given, p, [0.0], known=given, reuse=False, replays=2)
    assert fresh.mad[0] <= 0.1 + 1e-9
    assert known.draws[1] == pytest.approx(known.draws[0], abs=0.5)


@pytest.mark.parametrize("known", [None, np.array([0, 1, 0, 0])])
@pytest.mark.parametrize("reuse", [False, True])
def test_iss_beside_ias_example_by_example(reuse, known):
    """Each cell from plain loops; an answer without a bound has lost its whole radius."""
    noise, p, labels = Gaussian(1.0), np.array([0.99, 0.9, 0.7, 0.6]), np.array([0, 0, 0, 1])
    n, alpha, radii = 100_000, 0.001, [0.0, 0.5]
    sizes = sample_size_map(n, 0.5, "absolute", noise, alpha)
    # The last alone: its first draws say that its whole radius is within the limit.
    for rows in (slice(None), slice(3, 4)):
        part = functools.partial(SimulatedCounts, np.c_[p, 1 - p][rows])
        given = None if known is None else known[rows]
        expected = {"ISS": [], "IAS": []}
        for seed in range(2):
            iss = certify_iss(part(seed), noise, 1000, n, sizes, alpha, reuse, given)
            chosen = 100 if known is None else 0
            even = round(iss.n.mean()) - chosen
            ias = certify(part(seed), noise, chosen, even, alpha, given)
            for name, found, apart in (("ISS", iss, 0 if reuse else 1000), ("IAS", ias, chosen)):
                lost = [
                    decline(found.n[i] - apart if found.p_lower[i] > 0 else 0, n, q, noise, alpha)
                    for i, q in enumerate(p[rows])
                ]
                right = right_radius(found, labels[rows])
                accuracy = certified_accuracy(found, labels[rows], radii)
                expected[name].append([found.n.mean(), max(lost), right.mean(), *accuracy])
        table = iss_beside_ias(part, sizes, labels[rows], p[rows], radii, given, reuse, replays=2)
        assert list(table.columns) == ["method", "draws", "mad", "acr", "r0.00", "r0.50"]
        for name, values in expected.items():
            cells = table[table.method == name].iloc[0, 1:].to_numpy(float)
            np.testing.assert_allclose(cells, np.mean(values, axis=0), rtol=1e-12)
    assert table.mad[0] > 0.2
