"""Dual smoothing: the guarantee by simulation, and the labels of its router."""

import numpy as np
import pytest
import torch
from scipy.special import ndtri
from scipy.stats import binomtest
from sources import Band

from lib.certify import ABSTAIN, certify
from lib.counts import SimulatedCounts
from lib.dual import best_expert, certify_dual
from lib.noise import Gaussian, Uniform

ALPHA = 0.05


def dual(router, classifiers, noises, runs=20_000, seed=0, **options):
    """certify_dual on simulated votes of the router, and of the classifier under each noise."""
    sources = [
        SimulatedCounts(np.tile(p, (runs, 1)), seed + 1 + j) for j, p in enumerate(classifiers)
    ]
    votes = SimulatedCounts(np.tile(router, (runs, 1)), seed)
    options = {"n0": 20, "n": 200, "alpha": ALPHA} | options
    return certify_dual(votes, Gaussian(0.5), sources, noises, **options)


NOISES = [Gaussian(0.25), Gaussian(1.0)]


@pytest.mark.parametrize("router", [0.5, 0.52, 0.6, 0.9, 1.0])
@pytest.mark.parametrize("classifier", [0.5, 0.52, 0.6, 0.9])
def test_dual_keeps_its_promise(router, classifier):
    """False where the radius exceeds the router's, or the classifier's at the level chosen."""
    p, q = [router, 1 - router], [[classifier, 1 - classifier], [1 - classifier, classifier]]
    found, choice = dual(p, q, NOISES)
    sure = found.prediction != ABSTAIN
    reach = Gaussian(0.5).radius(np.take(p, choice))
    level = np.array([noise.sigma for noise in NOISES])[choice]
    own = np.take_along_axis(np.array(q)[choice], np.maximum(found.prediction, 0)[:, None], axis=1)
    truth = np.minimum(reach, np.maximum(0, level * ndtri(own[:, 0])))
    false = int((sure & (found.radius > truth)).sum())
    assert binomtest(false, len(sure), ALPHA, alternative="greater").pvalue > 1e-4
    assert ((choice == ABSTAIN) <= ~sure).all()


@pytest.mark.parametrize("share", [0.5, 0.2])
def test_dual_of_a_constant_router_is_certify(share):
    """A sure router of large radius: certify at alpha (1 - share), all draws counted."""
    noises = [Gaussian(0.1), Gaussian(9.0)]
    found, choice = dual([1.0, 0.0], [[0.7, 0.3], [0.5, 0.5]], noises, share=share)
    source = SimulatedCounts(np.tile([0.7, 0.3], (20_000, 1)), 1)
    alone = certify(source, Gaussian(0.1), 20, 200, ALPHA * (1 - share))
    assert (choice == 0).all()
    assert (found.prediction == alone.prediction).all()
    np.testing.assert_array_equal(found.radius, alone.radius)
    assert (found.n == 440).all()


@pytest.mark.parametrize("share", [0.5, 0.2])
def test_dual_is_limited_by_its_router(share):
    found, choice = dual([0.0, 1.0], [[0.5, 0.5], [0.0, 1.0]], NOISES, runs=5, share=share)
    assert (choice == 1).all()
    assert (found.prediction == 1).all()
    limit = Gaussian(0.5).radius((ALPHA * share) ** (1 / 200))
    np.testing.assert_allclose(found.radius, limit, rtol=1e-6)
    undecided, choice = dual([0.5, 0.5], [[1.0, 0.0]] * 2, NOISES, alpha=1e-6, runs=50)
    assert (choice == ABSTAIN).all()
    assert (undecided.prediction == ABSTAIN).all()
    assert (undecided.n == 220).all()


def test_dual_refuses_bad_input():
    with pytest.raises(ValueError, match="counts and noises"):
        dual([0.5, 0.5], [[0.5, 0.5]], NOISES)
    with pytest.raises(ValueError, match="share"):
        dual([0.5, 0.5], [[0.5, 0.5]] * 2, NOISES, share=1.0)
    with pytest.raises(ValueError, match="must have the router's norm"):
        dual([0.5, 0.5], [[0.5, 0.5]] * 2, [Gaussian(0.25), Uniform(1.0)])


@pytest.mark.parametrize("place", [0, 1, 2])
def test_dual_refuses_votes_of_another_noise_or_of_other_examples(place):
    """Of the router, or of either classifier."""
    noises = [Gaussian(0.5), *NOISES]

    def sources():
        made = [SimulatedCounts([[0.9, 0.1]] * 5, seed) for seed in range(3)]
        for source, noise in zip(made, noises, strict=True):
            source.noise = noise
        return made

    router, *counts = sources()
    certify_dual(router, noises[0], counts, NOISES, 20, 200, ALPHA)
    wrong = sources()
    wrong[place].noise = Gaussian(0.3)
    with pytest.raises(ValueError, match="noise must be the one that the votes were drawn under"):
        certify_dual(wrong[0], noises[0], wrong[1:], NOISES, 20, 200, ALPHA)
    wrong = sources()
    wrong[place] = SimulatedCounts([[0.9, 0.1]] * 4)
    with pytest.raises(ValueError, match="its number of examples"):
        certify_dual(wrong[0], noises[0], wrong[1:], NOISES, 20, 200, ALPHA)


def test_the_best_expert_has_the_largest_radius_at_the_right_class():
    """Bands whose probabilities are known: .23 against .53, 0 against 0, and .20 against 0."""
    experts, noises = [Band(0.3), Band(0.6)], [Gaussian(0.1), Gaussian(0.25)]
    x = torch.tensor([0.5, 0.5, 1.0]).view(3, 1, 1, 1)
    chosen = best_expert(experts, noises, x, torch.tensor([0, 1, 1]), draws=1000)
    assert chosen.tolist() == [1, 0, 0]
    reversed_ = best_expert(experts[::-1], noises[::-1], x, torch.tensor([0, 1, 1]), draws=1000)
    assert reversed_.tolist() == [0, 0, 1]
