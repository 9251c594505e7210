"""The variance model of ensembles: numbers by two routes, and the fit on logits of known law."""

import numpy as np
import pytest
from scipy.special import ndtr
from scipy.stats import binom, norm

from lib.bounds import clopper_pearson_lower
from lib.certify import certify
from lib.counts import SimulatedCounts
from lib.noise import Gaussian
from lib.variance import (
    LogitModel,
    LogitMoments,
    chebyshev_success_bound,
    covariance_ratio,
    fit_logit_model,
    logit_moments,
    margin_matrix,
    margin_moments,
    margin_moments_by_blocks,
    network_covariances,
    noise_covariances,
    normalised_effects,
    radius_distribution,
    success_probability,
    variance_ratio,
)

CLASSES = 5


def random_model(seed, zeta_c=0.1, zeta_p=0.8, classes=CLASSES):
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((2, classes, classes))
    c = np.sort(rng.standard_normal(classes))[::-1] * 2
    return LogitModel(c, a @ a.T / 4, b @ b.T / 4, np.float64(zeta_c), np.float64(zeta_p))


def test_variance_ratio_by_hand():
    np.testing.assert_allclose(variance_ratio([1, 2, 10], 0.8), [1, 0.9, 0.82], rtol=1e-15)
    np.testing.assert_allclose(variance_ratio(7, [0, 1]), [1 / 7, 1], rtol=1e-15)
    # The form printed in section 5: (k + 2 C(k, 2) zeta) / k^2.
    k = np.arange(1, 51)
    printed = (k + 2 * (k * (k - 1) // 2) * 0.82) / k**2
    np.testing.assert_allclose(variance_ratio(k, 0.82), printed, rtol=1e-14)


@pytest.mark.parametrize("k", [1, 2, 3, 10, 50])
@pytest.mark.parametrize("zetas", [(0, 0), (0, 0.82), (0.3, 0.5), (1, 1)])
def test_margin_moments_by_two_routes(k, zetas):
    model = random_model(k, *zetas)
    for top in (0, 2):
        closed, blocks = margin_moments(model, k, top), margin_moments_by_blocks(model, k, top)
        np.testing.assert_allclose(closed[0], blocks[0], rtol=0, atol=1e-12)
        np.testing.assert_allclose(closed[1], blocks[1], rtol=0, atol=1e-12)


def test_margin_moments_of_several_images_are_those_of_each():
    models = [random_model(seed, 0.2, 0.1 * seed) for seed in range(4)]
    together = LogitModel(*(np.stack(part) for part in zip(*map(_parts, models), strict=True)))
    mean, covariance = margin_moments(together, 3, top=1)
    for i, model in enumerate(models):
        one = margin_moments(model, 3, top=1)
        np.testing.assert_allclose(mean[i], one[0], atol=1e-13)
        np.testing.assert_allclose(covariance[i], one[1], atol=1e-13)
        np.testing.assert_array_equal(together[i].sigma_p, model.sigma_p)


def _parts(model):
    return model.c, model.sigma_c, model.sigma_p, model.zeta_c, model.zeta_p


def test_margin_moments_of_simulated_networks():
    """The covariance of the model is that of logits drawn as section 5 says."""
    model, k, runs = random_model(3, 0.3, 0.7), 4, 200_000
    rng = np.random.default_rng(0)

    def correlated(sigma, zeta):
        common, own = rng.standard_normal((runs, CLASSES)), rng.standard_normal((runs, k, CLASSES))
        root = np.linalg.cholesky(sigma)
        return (np.sqrt(zeta) * common[:, None] + np.sqrt(1 - zeta) * own) @ root.T

    logits = model.c + correlated(model.sigma_c, 0.3) + correlated(model.sigma_p, 0.7)
    vote = logits.mean(axis=1)
    margins = vote[:, :1] - vote[:, 1:]
    mean, covariance = margin_moments(model, k)
    scale = np.sqrt(np.diag(covariance))
    np.testing.assert_allclose(margins.mean(axis=0), mean, atol=5 * scale.max() / np.sqrt(runs))
    # The standard error of a covariance is at most sqrt(2) times the two deviations / sqrt(runs).
    error = np.abs(np.cov(margins.T) - covariance) / np.outer(scale, scale)
    assert error.max() < 5 * np.sqrt(2 / runs)


def test_margin_matrix_needs_its_factor():
    """D as printed in appendix C, without 1/k, gives k^2 times the covariance that it states."""
    model, k = random_model(0), 3
    within = model.sigma_c + model.sigma_p
    between = 0.1 * model.sigma_c + 0.8 * model.sigma_p
    joint = np.block([[within if i == j else between for j in range(k)] for i in range(k)])
    printed = np.zeros((CLASSES - 1, k * CLASSES))
    for i in range(2, CLASSES + 1):
        for j in range(1, k * CLASSES + 1):
            one, other = j % CLASSES == 1, j % CLASSES == i % CLASSES
            printed[i - 2, j - 1] = 1 if one else -1 if other else 0
    np.testing.assert_allclose(margin_matrix(CLASSES, 0, k) * k, printed, atol=1e-15)
    stated = margin_moments(model, k)[1]
    np.testing.assert_allclose(printed @ joint @ printed.T, k**2 * stated, atol=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_success_probability_integral_against_monte_carlo(seed):
    mean, covariance = margin_moments(random_model(seed), 1 + seed)
    exact, draws = success_probability(mean, covariance), 400_000
    sampled = success_probability(mean, covariance, draws, seed=seed)
    assert abs(exact - sampled) < 5 * np.sqrt(0.25 / draws) + 1e-4


def test_success_probability_in_closed_form():
    """One margin; independent margins; two margins of correlation rho with mean 0 (Sheppard)."""
    assert success_probability([0.7], [[4.0]]) == pytest.approx(ndtr(0.35), abs=1e-9)
    assert success_probability([1.0, -0.5, 0.2], np.eye(3)) == pytest.approx(
        ndtr(1.0) * ndtr(-0.5) * ndtr(0.2), abs=2e-4
    )
    rho = 0.6
    assert success_probability([0, 0], [[1, rho], [rho, 1]]) == pytest.approx(
        0.25 + np.arcsin(rho) / (2 * np.pi), abs=1e-6
    )
    # Logits of variance 1 without correlation, all of mean 0: each of the C classes is as likely.
    assert success_probability(np.zeros(9), np.eye(9) + 1) == pytest.approx(0.1, abs=2e-4)


@pytest.mark.parametrize("seed", range(20))
def test_chebyshev_is_a_lower_bound(seed):
    mean, covariance = margin_moments(random_model(seed), 5)
    bound = chebyshev_success_bound(mean, covariance)
    assert 0 <= bound <= success_probability(mean, covariance) + 1e-4


def test_chebyshev_by_hand_and_where_it_is_vacuous():
    assert chebyshev_success_bound([2.0, 4.0], np.diag([1.0, 4.0])) == pytest.approx(0.5)
    assert chebyshev_success_bound([2.0, -4.0], np.diag([1.0, 4.0])) == 0
    assert chebyshev_success_bound([0.1, 4.0], np.diag([1.0, 4.0])) == 0


@pytest.mark.parametrize("p", [0.3, 0.52, 0.9, 0.999])
def test_radius_distribution_against_certify(p):
    """The exact distribution against CERTIFY on simulated votes: mean, median, abstentions."""
    noise, n, alpha, runs = Gaussian(0.25), 1000, 0.001, 20_000
    exact = radius_distribution(p, n, alpha, noise)
    counts = SimulatedCounts(np.tile([p, 1 - p], (runs, 1)), seed=1)
    chosen = np.zeros(runs, dtype=np.int64)
    radius = certify(counts, noise, 0, n, alpha, prediction=chosen).radius
    assert exact.probability.sum() == pytest.approx(1, abs=1e-12)
    assert (np.diff(exact.radius) > 0).all()
    error = np.sqrt(max(exact.probability @ exact.radius**2 - exact.mean() ** 2, 0) / runs)
    assert abs(radius.mean() - exact.mean()) < 5 * error + 1e-12
    abstained = exact.probability[exact.radius == 0].sum()
    assert binom.sf((radius == 0).sum() - 1, runs, abstained) > 1e-5
    assert binom.cdf((radius == 0).sum(), runs, abstained) > 1e-5
    for level in (0.1, 0.5, 0.9):
        quantile = exact.quantile(level)
        below, upto = (radius < quantile).sum(), (radius <= quantile).sum()
        assert binom.sf(below - 1, runs, level) > 1e-5
        assert binom.cdf(upto, runs, level) > 1e-5


def test_radius_distribution_at_its_ends():
    noise = Gaussian(0.5)
    all_votes = radius_distribution(1.0, 100, 0.001, noise)
    largest = noise.radius(clopper_pearson_lower(100, 100, 0.001))
    assert all_votes.mean() == pytest.approx(float(largest), rel=1e-12)
    assert all_votes.quantile(0.5) == pytest.approx(float(largest), rel=1e-12)
    none = radius_distribution(0.0, 100, 0.001, noise)
    assert none.mean() == 0
    assert none.quantile(0.99) == 0


@pytest.mark.parametrize("p", [0.3, 0.6, 0.98])
def test_the_mean_radius_is_the_sum_over_all_counts(p):
    noise, k = Gaussian(0.5), np.arange(201)
    radii = noise.radius(clopper_pearson_lower(k, 200, 0.01))
    found = radius_distribution(p, 200, 0.01, noise)
    assert found.mean() == pytest.approx(binom.pmf(k, 200, p) @ radii, rel=1e-9, abs=1e-12)


def simulated_logits(model, images, k, draws, seed):
    """Logits of k networks as section 5 says, each image with its own c: clean, perturbed."""
    rng = np.random.default_rng(seed)
    root_c, root_p = np.linalg.cholesky(model.sigma_c), np.linalg.cholesky(model.sigma_p)
    clean = model.c + rng.standard_normal((images, k, CLASSES)) @ root_c.T
    common = rng.standard_normal((images, draws, 1, CLASSES))
    own = rng.standard_normal((images, draws, k, CLASSES))
    zeta = float(model.zeta_p)
    effect = (np.sqrt(zeta) * common + np.sqrt(1 - zeta) * own) @ root_p.T
    return clean, clean[:, None] + effect


@pytest.mark.parametrize("definition", ["clean", "mean"])
def test_fit_finds_the_model_that_the_logits_came_from(definition):
    truth = random_model(8, 0.0, 0.7)
    clean, perturbed = simulated_logits(truth, 60, 20, 400, seed=2)
    fitted = fit_logit_model(logit_moments(clean, perturbed), definition)
    assert fitted.c.shape == (60, CLASSES)
    scale = np.sqrt(np.outer(np.diag(truth.sigma_p), np.diag(truth.sigma_p)))
    assert np.abs(fitted.sigma_p.mean(axis=0) - truth.sigma_p).max() < 0.03 * scale.max()
    scale = np.sqrt(np.outer(np.diag(truth.sigma_c), np.diag(truth.sigma_c)))
    assert np.abs(fitted.sigma_c.mean(axis=0) - truth.sigma_c).max() < 0.2 * scale.max()
    assert np.median(fitted.zeta_p) == pytest.approx(0.7, abs=0.02)
    assert (fitted.zeta_c == 0).all()


def test_moments_of_a_subset_are_those_of_its_mean_logits():
    clean, perturbed = simulated_logits(random_model(1), 3, 6, 50, seed=3)
    moments = logit_moments(clean, perturbed)
    assert isinstance(moments, LogitMoments)
    assert moments.draws == 50
    for members in ([0], [1, 4], [5, 0, 3]):
        mean, covariance = moments.soft_vote(members)
        vote = perturbed[:, :, members].mean(axis=2)
        np.testing.assert_allclose(mean, vote.mean(axis=1), atol=1e-12)
        for i in range(3):
            np.testing.assert_allclose(covariance[i], np.cov(vote[i].T), atol=1e-12)


def test_covariances_over_the_noise_average_over_networks_and_pairs():
    clean, perturbed = simulated_logits(random_model(1), 2, 3, 40, seed=4)
    within, between = noise_covariances(logit_moments(clean, perturbed))
    for i in range(2):
        joint = np.cov(perturbed[i].reshape(40, -1).T).reshape(3, CLASSES, 3, CLASSES)
        blocks = {(a, b): joint[a, :, b] for a in range(3) for b in range(3)}
        own = np.mean([blocks[a, a] for a in range(3)], axis=0)
        pair = np.mean([block for (a, b), block in blocks.items() if a != b], axis=0)
        np.testing.assert_allclose(within[i], own, atol=1e-12)
        np.testing.assert_allclose(between[i], pair, atol=1e-12)


@pytest.mark.parametrize("k", [2, 5, 50])
def test_zeta_c_about_their_own_mean_says_nothing(k):
    """The ratio is -1/k for independent networks and for networks that are all but equal."""
    rng = np.random.default_rng(k)
    independent = rng.standard_normal((4, k, CLASSES))
    alike = rng.standard_normal((4, 1, CLASSES)) + 0.01 * rng.standard_normal((4, k, CLASSES))
    for values in (independent, alike):
        within, between = network_covariances(values)
        np.testing.assert_allclose(covariance_ratio(between, within), -1 / k, rtol=1e-6)


def test_the_mean_definition_centres_the_perturbation_effect():
    """Where the mean moves under noise, c follows it under "mean" and not under "clean"."""
    clean, perturbed = simulated_logits(random_model(2), 5, 4, 300, seed=5)
    moments = logit_moments(clean, perturbed + 1.5)
    by_clean, by_mean = (fit_logit_model(moments, kind) for kind in ("clean", "mean"))
    np.testing.assert_allclose(by_clean.c, clean.mean(axis=1), atol=1e-12)
    assert np.abs((by_mean.c - by_clean.c) - 1.5).max() < 0.5
    np.testing.assert_array_equal(by_clean.sigma_p, by_mean.sigma_p)


def test_normalised_effects_are_standard_where_the_model_holds():
    clean, perturbed = simulated_logits(random_model(4), 6, 3, 2000, seed=6)
    moments = logit_moments(clean, perturbed)
    for kind in ("clean", "mean"):
        effects = normalised_effects(perturbed, moments, kind)
        assert effects.shape == perturbed.shape
        np.testing.assert_allclose(
            np.quantile(effects, ndtr([-2, -1, 0, 1, 2])), [-2, -1, 0, 1, 2], atol=0.05
        )
    np.testing.assert_allclose(effects.mean(axis=1), 0, atol=1e-12)
    np.testing.assert_allclose((effects**2).mean(axis=(1, 2)), 1, rtol=1e-3)
    shifted = normalised_effects(perturbed + 1.0, logit_moments(clean, perturbed + 1.0), "clean")
    assert np.median(shifted) > 0.5


def test_a_larger_ensemble_is_surer_of_a_right_class_and_of_a_wrong_one():
    """Section 5: probabilities move away from 1/2 as the variance falls."""
    right = LogitModel(np.array([0.5, 0]), np.eye(2) * 0.5, np.eye(2), np.array(0), np.array(0.5))
    chances = [success_probability(*margin_moments(right, k)) for k in (1, 3, 10)]
    assert np.all(np.diff(chances) > 0)
    wrong = LogitModel(-right.c, right.sigma_c, right.sigma_p, right.zeta_c, right.zeta_p)
    chances = [success_probability(*margin_moments(wrong, k)) for k in (1, 3, 10)]
    assert np.all(np.diff(chances) < 0)
    # With two classes the integral is Phi(mean / deviation).
    mean, covariance = margin_moments(right, 3)
    by_hand = norm.cdf(mean[0] / np.sqrt(covariance[0, 0]))
    assert success_probability(mean, covariance) == pytest.approx(by_hand, abs=1e-9)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: variance_ratio(0, 0.5), "k"),
        (lambda: variance_ratio(2, 1.5), "zeta"),
        (lambda: success_probability([1.0, 2.0], np.eye(3)), "mean"),
        (lambda: success_probability([1.0], [[1.0]], draws=0), "draws"),
        (lambda: chebyshev_success_bound([[1.0]], [[1.0]]), "mean"),
        (lambda: radius_distribution(1.2, 10, 0.1, Gaussian(1)), "p"),
        (lambda: radius_distribution(0.9, 0, 0.1, Gaussian(1)), "n"),
        (lambda: radius_distribution(0.9, 10, 0.1, Gaussian(1)).quantile(0), "level"),
        (lambda: logit_moments(np.zeros((2, 3, 4)), np.zeros((2, 5, 3, 5))), "clean"),
        (lambda: logit_moments(np.zeros((2, 3, 4)), np.zeros((2, 1, 3, 4))), "perturbed"),
        (lambda: logit_moments(np.zeros((1, 1, 2)), np.full((1, 2, 1, 2), np.nan)), "perturbed"),
        (lambda: fit_logit_model(_one_network()), "moments"),
        (lambda: fit_logit_model(_one_network(), "median"), "clean"),
    ],
)
def test_bad_input_is_named(call, name):
    with pytest.raises(ValueError, match=name):
        call()


def _one_network():
    return logit_moments(np.zeros((1, 1, 2)), np.random.default_rng(0).random((1, 9, 1, 2)))
