"""Replay without replacement and simulation: the laws of their draws, and that a sampler cannot
tell them from live votes.
"""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, chisquare, hypergeom, multivariate_hypergeom

from lib.certify import certify
from lib.counts import RecordedCounts, SimulatedCounts
from lib.noise import PURPOSES, Gaussian, purpose_stream
from lib.store.records import Record, load_counts, save_counts

VOTES = [6, 3, 1]
COPIES = 20_000


def outcomes(m, votes=VOTES):
    """Every class count of m draws from the votes, and its probability."""
    found = [c for c in itertools.product(*(range(min(v, m) + 1) for v in votes)) if sum(c) == m]
    return found, multivariate_hypergeom.pmf(found, votes, m)


def fits(draws, cells, probabilities):
    """Chi-square p-value of the draws [B, C] against the law of the cells."""
    seen = [int((draws == cell).all(axis=1).sum()) for cell in cells]
    assert sum(seen) == len(draws)
    return chisquare(seen, np.array(probabilities) * len(draws)).pvalue


def copies(seed=0, votes=VOTES):
    return RecordedCounts(np.tile(votes, (COPIES, 1)), seed=seed)


@pytest.mark.parametrize("m", [1, 4, 9])
def test_first_draws_are_hypergeometric(m):
    assert fits(copies().draw(m), *outcomes(m)) > 1e-4


def test_later_draws_have_the_law_of_first_draws():
    """Exchangeability: draws 4 to 6 of a record look like draws 1 to 3."""
    replay = copies()
    replay.draw(3)
    assert fits(replay.draw(3), *outcomes(3)) > 1e-4


def test_draws_in_two_stages_have_the_law_of_one():
    replay = copies()
    assert fits(replay.draw(2) + replay.draw(3), *outcomes(5)) > 1e-4


def test_two_stages_jointly():
    """Both stages at once, 3 and 3 draws of five votes against five: the second is drawn from what
    the first left.
    """
    replay = copies(votes=[5, 5])
    first, second = replay.draw(3)[:, 0], replay.draw(3)[:, 0]
    cells = [(a, b) for a in range(4) for b in range(4) if a + b <= 5 and 6 - a - b <= 5]
    law = [hypergeom.pmf(a, 10, 5, 3) * hypergeom.pmf(b, 7, 5 - a, 3) for a, b in cells]
    assert fits(np.stack([first, second], axis=1), cells, law) > 1e-4


@given(
    st.lists(st.lists(st.integers(0, 50), min_size=3, max_size=3), min_size=1, max_size=5),
    st.integers(0, 2**32 - 1),
    st.data(),
)
def test_draws_add_up_to_the_record(votes, seed, data):
    """In any number of calls of any sizes, zeros among them, until nothing is left."""
    votes = np.array(votes)
    replay, total = RecordedCounts(votes, seed=seed, fixed=True), np.zeros_like(votes)
    for _ in range(data.draw(st.integers(0, 3))):
        left = replay.remaining.sum(axis=1)
        n = np.array([data.draw(st.integers(0, int(m))) for m in left])
        drawn = replay.draw(n)
        assert drawn.dtype == np.int64
        assert (drawn >= 0).all()
        np.testing.assert_array_equal(drawn.sum(axis=1), n)
        total += drawn
        np.testing.assert_array_equal(total + replay.remaining, votes)
    total += replay.draw(replay.remaining.sum(axis=1))
    np.testing.assert_array_equal(total, votes)


def test_an_exhausted_record_is_an_error_and_draws_nothing():
    replay = RecordedCounts([[6, 4], [60, 40]], fixed=True)
    replay.draw(8)
    left = replay.remaining.copy()
    with pytest.raises(ValueError, match=r"exhausted: n = 3 draws asked of example 0, 2 left"):
        replay.draw(3)
    np.testing.assert_array_equal(replay.remaining, left)
    assert replay.draw([2, 92]).sum() == 94
    assert replay.draw(0).sum() == 0
    with pytest.raises(ValueError, match="exhausted"):
        replay.draw([0, 1])


def test_an_examples_draws_hang_on_its_index_and_seed_alone():
    votes = np.random.default_rng(0).integers(0, 1000, (6, 4))
    together = RecordedCounts(votes, seed=3, fixed=True)
    whole = [together.draw(50), together.draw(100)]
    order = [5, 1, 2]
    some = RecordedCounts(votes[order], seed=3, index=order, fixed=True)
    for drawn in whole:
        np.testing.assert_array_equal(some.draw(drawn[0].sum()), drawn[order])
    # Asking nothing of the other examples changes nothing either.
    lone = RecordedCounts(votes, seed=3, fixed=True)
    np.testing.assert_array_equal(lone.draw([0, 50, 0, 0, 0, 0])[1], whole[0][1])
    np.testing.assert_array_equal(lone.draw([0, 100, 0, 0, 0, 0])[1], whole[1][1])
    assert (RecordedCounts(votes, seed=4, fixed=True).draw(50) != whole[0]).any()


def test_a_record_is_replayed_as_it_was_saved(tmp_path):
    """Counts, indices and the noise that they were drawn under, from the file alone."""
    votes, index = np.random.default_rng(0).multinomial(900, [0.2] * 5, 3), np.array([5, 1, 2])
    noise = Gaussian(np.array([0.5, 0.25, 1.0]))
    path, header = tmp_path / "r.npz", {"noise": noise.describe(), "seed": np.int64(3)}
    save_counts(path, votes, index, [0, 0, 0], **header)
    record = load_counts(path, seed=3, noise=noise.describe())
    replay = RecordedCounts(record, seed=7)
    np.testing.assert_array_equal(
        replay.draw(50), RecordedCounts(votes, seed=7, index=index).draw(50)
    )
    assert replay.noise == noise


def test_a_record_of_an_unknown_noise_is_refused():
    """Its votes would be certified as those of a noise that was never drawn."""
    record = Record(np.array([[90, 10]]), np.arange(1), np.zeros(1, int), {})
    with pytest.raises(ValueError, match="does not say the noise"):
        RecordedCounts(record)
    described = {"noise": {"name": "Uniform of a user", "lam": 1.0}}
    with pytest.raises(ValueError, match="noise must be one of Gaussian"):
        RecordedCounts(dataclasses.replace(record, header=described))
    under = {"noise": Gaussian(0.5).describe()}
    replay = RecordedCounts(dataclasses.replace(record, header=under))
    with pytest.raises(ValueError, match="noise must be the one that the votes were drawn under"):
        certify(replay, Gaussian(0.25), n0=10, n=90, alpha=0.05)


def test_what_an_adaptive_sampler_left_is_not_replayed():
    """Its number of draws hung on the votes: 1.086 alpha at n0 = 20, n = 180 where live .935."""
    header = {"noise": Gaussian(0.5).describe(), "sampler": {"name": "iss"}}
    equal = Record(np.array([[90, 10], [60, 40]]), np.arange(2), np.zeros(2, int), header)
    with pytest.raises(ValueError, match="fixed beforehand"):
        RecordedCounts(equal)
    with pytest.raises(ValueError, match="fixed beforehand"):
        RecordedCounts(dataclasses.replace(equal, header=header | {"fixed_draws": False}))
    RecordedCounts(dataclasses.replace(equal, header=header | {"fixed_draws": True}))
    for found in (equal, dataclasses.replace(equal, header=header | {"fixed_draws": False})):
        with pytest.raises(ValueError, match=r"--sampler record$"):
            RecordedCounts(found, fixed=True)
    with pytest.raises(ValueError, match="fixed beforehand"):
        RecordedCounts([[90, 10], [60, 41]])
    RecordedCounts([[90, 10], [60, 41]], fixed=True)


def test_replay_simulation_and_noise_share_no_stream():
    """Equal seeds, equal indices: a simulation that feeds a replay is independent of it."""
    votes = SimulatedCounts(np.tile([0.5, 0.5], (4000, 1)), seed=0).draw(200)
    first = RecordedCounts(votes, seed=0, index=np.zeros(4000, int)).draw(20)[:, 0]
    again = RecordedCounts(votes, seed=0).draw(20)[:, 0]
    rest = votes[:, 0] - again
    # Given the record, the first 20 and the rest are only as dependent as they must be.
    slope = np.cov(again, rest)[0, 1] / np.var(rest)
    assert abs(slope) < 4.5 * np.sqrt(5 / 45 / 4000)
    assert (first == again).mean() < 0.5
    states = {tuple(np.random.SeedSequence([0, 0]).generate_state(4))}
    states |= {
        tuple(purpose_stream(purpose, 0, 0).bit_generator.seed_seq.generate_state(4))
        for purpose in PURPOSES
    }
    assert len(states) == 1 + len(PURPOSES)


def test_equal_examples_are_drawn_independently():
    """Copies of one record under different indices: neighbours are uncorrelated."""
    drawn = RecordedCounts(np.tile([500, 500], (COPIES, 1))).draw(100)[:, 0]
    assert abs(np.corrcoef(drawn[1:], drawn[:-1])[0, 1]) < 4.5 / np.sqrt(COPIES)


def test_replays_of_neighbouring_seeds_share_no_streams():
    """Were a stream a function of seed + index, example i + 1 at seed 0 would be drawn as example i
    at seed 1.
    """
    first, second = (
        RecordedCounts(np.tile([500, 500], (40, 1)), seed=seed).draw(400)[:, 0] for seed in (0, 1)
    )
    assert (first[1:] == second[:-1]).mean() < 0.5


def test_the_record_given_is_not_changed():
    votes = np.array([[6, 4]])
    RecordedCounts(votes).draw(5)
    np.testing.assert_array_equal(votes, [[6, 4]])


def test_replay_of_a_simulated_record_is_binomial():
    """Counts drawn at p, recorded, then replayed: the replayed draws, both stages, are again
    binomial in p.
    """
    replay = RecordedCounts(
        SimulatedCounts(np.tile([0.7, 0.3], (COPIES, 1)), seed=1).draw(50), seed=2
    )
    for m in (5, 8):
        draws, law = replay.draw(m)[:, :1], binom.pmf(np.arange(m + 1), m, 0.7)
        merged = np.append(law[:2].sum(), law[2:])
        assert fits(np.maximum(draws, 1), np.arange(1, m + 1)[:, None], merged) > 1e-4


def test_a_replayed_certificate_is_a_live_one():
    """CERTIFY on a whole record: the votes are the record's, less the selection's, and the radii
    follow the same law as live ones.
    """
    p = np.tile([0.75, 0.25], (4000, 1))
    live = certify(SimulatedCounts(p, seed=1), Gaussian(1.0), n0=10, n=90, alpha=0.05)
    replay = certify(
        RecordedCounts(SimulatedCounts(p, seed=2).draw(100)), Gaussian(1.0), n0=10, n=90, alpha=0.05
    )
    error = np.sqrt((live.radius.var() + replay.radius.var()) / 4000)
    assert abs(live.radius.mean() - replay.radius.mean()) < 4.5 * error
    assert live.radius.std() == pytest.approx(replay.radius.std(), rel=0.1)


def test_simulated_moments():
    """Mean n p and covariance n (diag(p) - p p'), over 200,000 examples, to 4.5 standard errors;
    totals exact.
    """
    p, n, size = np.array([0.6, 0.3, 0.1, 0.0]), 40, 200_000
    drawn = SimulatedCounts(np.tile(p, (size, 1)), seed=0).draw(n)
    assert drawn.dtype == np.int64
    assert (drawn.sum(axis=1) == n).all()
    assert (drawn[:, 3] == 0).all()
    covariance = n * (np.diag(p) - np.outer(p, p))
    assert (np.abs(drawn.mean(axis=0) - n * p) <= 4.5 * np.sqrt(np.diag(covariance) / size)).all()
    np.testing.assert_allclose(np.cov(drawn.T), covariance, atol=4.5 * n * np.sqrt(2 / size))


def test_simulated_draws_are_fresh_independent_and_seeded():
    source, again = (SimulatedCounts(np.tile([0.5, 0.5], (COPIES, 1)), seed=5) for _ in range(2))
    first, second = source.draw(100)[:, 0], source.draw(100)[:, 0]
    np.testing.assert_array_equal(again.draw(100)[:, 0], first)
    for a, b in ((first, second), (first[1:], first[:-1])):
        assert abs(np.corrcoef(a, b)[0, 1]) < 4.5 / np.sqrt(len(a))


def test_simulation_takes_one_number_of_draws_per_example():
    source = SimulatedCounts([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]], seed=np.random.default_rng(0))
    np.testing.assert_array_equal(source.draw([3, 0, 10]).sum(axis=1), [3, 0, 10])
    np.testing.assert_array_equal(source.draw([3, 4, 0]), [[3, 0], [0, 4], [0, 0]])
    assert (len(source), source.classes) == (3, 2)
