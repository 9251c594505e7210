"""The variance model of ensembles: why the mean of several networks' logits certifies more.

The logits of a network vary with the seed of its training and with the noise. What the variances
and the correlations of both say of a vote's margins, of its class probability and of its radius
(Horvath et al. 2022, section 5, appendices C and D).
"""

import dataclasses

import numpy as np
from scipy.stats import binom, multivariate_normal

from lib.bounds import clopper_pearson_lower
from lib.checks import check_choice, check_draws, check_level, check_probability


@dataclasses.dataclass(frozen=True)
class LogitModel:
    """The model of section 5: the logits of network l are y^l = y_c^l + y_p^l at one fixed image.

    y_c varies with the seed of the training, y_p with the noise; the two are independent, and
    between two networks each has its own covariance times zeta. Leading dimensions ... hold
    several images (Horvath et al. 2022, section 5 and appendix C).

    - c: float64 [..., C], the mean logits over networks.
    - sigma_c: float64 [..., C, C], the covariance of y_c over networks.
    - sigma_p: float64 [..., C, C], the covariance of y_p over the noise.
    - zeta_c, zeta_p: float64 [...] in [0, 1], correlation of two networks' y_c, and y_p.
    """

    c: np.ndarray
    sigma_c: np.ndarray
    sigma_p: np.ndarray
    zeta_c: np.ndarray
    zeta_p: np.ndarray

    def __getitem__(self, index):
        """The model of one image, or of some."""
        return LogitModel(*(np.asarray(part)[index] for part in dataclasses.astuple(self)))


def variance_ratio(k, zeta):
    """Variance of the mean of k logits over that of one: (1 + zeta (k - 1)) / k.

    It falls to zeta as k grows (Horvath et al. 2022, equation 3).

    - k: number of networks, >= 1. zeta: correlation of two networks, in [0, 1]. They broadcast.
    """
    check_draws(k=k)
    return (1 + check_probability(zeta, "zeta") * (np.asarray(k) - 1)) / np.asarray(k)


def margin_matrix(classes, top=0, k=1):
    """The matrix D of appendix C: logits of k networks, one below the other, to mean margins.

    Row i holds 1/k at the logits of class `top` and -1/k at those of the i-th other class. (The
    paper prints D without the 1/k, which gives k^2 times the covariance that it states.)
    Returns float64 [C - 1, k C].
    """
    check_draws(classes=classes, k=k)
    one = np.eye(classes)[top] - np.delete(np.eye(classes), top, axis=0)
    return np.tile(one, k) / k


def margin_moments(model, k, top=0):
    """Mean and covariance of the margins z_i = y_top - y_i of the mean of k networks' logits.

    Closed form: the two covariances of one network, each times its variance ratio (Horvath et
    al. 2022, section 5). Everything is conditional on the image.

    - model: LogitModel of one or several images.
    - k: number of networks, >= 1; it may exceed the number that the model was fitted to.
    - top: the class that the margins are taken from, one for all images.

    Returns (float64 [..., C - 1], float64 [..., C - 1, C - 1]), the other classes in order.
    """
    contrast = margin_matrix(model.c.shape[-1], top)
    ratio_c, ratio_p = (
        np.asarray(variance_ratio(k, zeta))[..., None, None]
        for zeta in (model.zeta_c, model.zeta_p)
    )
    covariance = ratio_c * model.sigma_c + ratio_p * model.sigma_p
    return model.c @ contrast.T, contrast @ covariance @ contrast.T


def margin_moments_by_blocks(model, k, top=0):
    """`margin_moments` by the other route of appendix C: D Sigma* D' with the joint covariance.

    Sigma* [k C, k C] has sigma_c + sigma_p in its diagonal blocks and zeta_c sigma_c +
    zeta_p sigma_p in the others. One image at a time; slower, and the same.
    """
    check_draws(k=k)
    within = model.sigma_c + model.sigma_p
    between = model.zeta_c * model.sigma_c + model.zeta_p * model.sigma_p
    joint = np.kron(np.eye(k), within - between) + np.kron(np.ones((k, k)), between)
    contrast = margin_matrix(len(model.c), top, k)
    return contrast @ np.tile(model.c, k), contrast @ joint @ contrast.T


def success_probability(mean, covariance, draws=None, seed=0):
    """P(all margins > 0) of Gaussian margins: the chance that the top class is voted for.

    The integral over the positive orthant (Horvath et al. 2022, equation 4), by Genz's
    algorithm to about 1e-4, or by Monte Carlo where `draws` is given (standard error
    sqrt(p (1 - p) / draws)).

    - mean: float64 [M]. covariance: float64 [M, M], positive semidefinite.
    - draws: None, or a number of Monte Carlo draws. seed: of the integration or the draws.
    """
    mean, covariance = _check_margins(mean, covariance)
    generator = np.random.default_rng(seed)
    if draws is not None:
        check_draws(draws=draws)
        margins = generator.multivariate_normal(mean, covariance, draws, method="eigh")
        return float((margins > 0).all(axis=1).mean())
    law = multivariate_normal(
        np.zeros(len(mean)), covariance, allow_singular=True, abseps=1e-4, releps=1e-4
    )
    return float(np.clip(law.cdf(mean, rng=generator), 0.0, 1.0))


def chebyshev_success_bound(mean, covariance):
    """A lower bound of P(all margins > 0) from their means and variances alone.

    1 - sum_i Var(z_i) / E(z_i)^2, by Chebyshev's inequality and the union bound, whatever the
    distribution (Horvath et al. 2022, equation 5); 0 where that is negative, or where a mean
    margin is not positive.
    """
    mean, covariance = _check_margins(mean, covariance)
    if (mean <= 0).any():
        return 0.0
    return float(max(0.0, 1 - (np.diag(covariance) / mean**2).sum()))


def _check_margins(mean, covariance):
    mean, covariance = (np.asarray(a, dtype=np.float64) for a in (mean, covariance))
    if mean.ndim != 1 or covariance.shape != 2 * mean.shape:
        raise ValueError(
            "mean and covariance must be of shapes [M] and [M, M], of one image's margins; "
            f"got {mean.shape} and {covariance.shape}"
        )
    return mean, covariance


@dataclasses.dataclass(frozen=True)
class RadiusDistribution:
    """The radii that CERTIFY may report, and their probabilities (see `radius_distribution`).

    - radius: float64 [R], increasing; 0 is an abstention. probability: float64 [R], sum 1.
    """

    radius: np.ndarray
    probability: np.ndarray

    def mean(self):
        """The expected radius."""
        return float(self.radius @ self.probability)

    def quantile(self, level):
        """The smallest radius that is not exceeded with probability `level`, in (0, 1)."""
        check_level(level=level)
        place = np.searchsorted(np.cumsum(self.probability), level)
        return float(self.radius[min(place, len(self.radius) - 1)])


def radius_distribution(p, n, alpha, noise):
    """The distribution of CERTIFY's radius for a class of true probability p (equation 6).

    Exact: k ~ Binomial(n, p) votes give noise.radius of the Clopper-Pearson bound of k. Counts of
    total probability below 1e-12 are left out. Choosing another class by mistake is left out too
    (Horvath et al. 2022, section 5).

    - p: probability of the top class under noise, in [0, 1]. n: draws. alpha: as in CERTIFY.
    - noise: the smoothing distribution; the radii are in its norm.

    Returns RadiusDistribution. Raises ValueError naming p, n or alpha.
    """
    p = float(check_probability(p, "p"))
    check_draws(n=n)
    law = binom(n, p)
    votes = np.arange(int(law.ppf(5e-13)), int(law.isf(5e-13)) + 1)
    radius = np.atleast_1d(noise.radius(clopper_pearson_lower(votes, n, alpha)))
    probability = law.pmf(votes)
    abstained = radius <= 0
    radius = np.concatenate([[0.0], radius[~abstained]])
    probability = np.concatenate([[probability[abstained].sum()], probability[~abstained]])
    return RadiusDistribution(radius, probability / probability.sum())


@dataclasses.dataclass(frozen=True)
class LogitMoments:
    """Moments of the logits of k networks on B images, over the noise (see `logit_moments`).

    - clean: float64 [B, k, C], logits of the unperturbed images.
    - mean: float64 [B, k, C], mean logits over the noise.
    - covariance: float64 [B, k, C, k, C], joint covariance of all logits over the noise.
    - draws: the number of noisy copies of each image that they were estimated from.
    """

    clean: np.ndarray
    mean: np.ndarray
    covariance: np.ndarray
    draws: int

    def soft_vote(self, members):
        """Mean [B, C] and covariance [B, C, C] over the noise of the mean logits of `members`."""
        members = np.asarray(members)
        part = self.covariance[:, members][:, :, :, members]
        return self.mean[:, members].mean(axis=1), part.mean(axis=(1, 3))


def logit_moments(clean, perturbed):
    """Moments of the logits of k networks: what `fit_logit_model` needs, and all that it needs.

    - clean: [B, k, C], logits of B images. perturbed: [B, N, k, C], logits of N >= 2 noisy copies
      of each image, a copy being the same for all networks.

    Returns LogitMoments.
    """
    clean, perturbed = np.asarray(clean, np.float64), np.asarray(perturbed)
    size, k, classes = clean.shape if clean.ndim == 3 else (0, 0, 0)
    if perturbed.ndim != 4 or perturbed.shape[::2] + perturbed.shape[3:] != (size, k, classes):
        raise ValueError(
            "clean and perturbed must be logits [B, k, C] and [B, N, k, C]; "
            f"got {clean.shape} and {perturbed.shape}"
        )
    draws = perturbed.shape[1]
    if draws < 2 or not np.isfinite(perturbed).all() or not np.isfinite(clean).all():
        raise ValueError("perturbed must hold at least 2 noisy copies, all logits finite")
    mean = perturbed.mean(axis=1, dtype=np.float64)
    covariance = np.empty((size, k, classes, k, classes))
    for image, centre, out in zip(perturbed, mean, covariance, strict=True):
        flat = (image - centre).reshape(draws, k * classes)
        out[:] = (flat.T @ flat / (draws - 1)).reshape(out.shape)
    return LogitMoments(clean, mean, covariance, draws)


def normalised_effects(perturbed, moments, clean="clean"):
    """(f(x + eps) - y_c) / sigma_p of logits, which the model takes for standard normal.

    sigma_p is the deviation over the noise of each image's and class's logit, the root of the
    diagonal of the model's sigma_p. Under "clean" the mean need not be 0 (appendix D, figure 9).

    - perturbed: [B, N, k, C], the logits that the moments are of, or some of the N copies.
    - moments: LogitMoments. clean: as for `fit_logit_model`.

    Returns float64 of the shape of perturbed.
    """
    check_choice(("clean", "mean"), clean=clean)
    centre = moments.clean if clean == "clean" else moments.mean
    within, _ = noise_covariances(moments)
    deviation = np.sqrt(np.einsum("bcc->bc", within))
    return (perturbed - centre[:, None]) / deviation[:, None, None]


def fit_logit_model(moments, clean="clean"):
    """The parameters of LogitModel for each image, from the moments of k >= 2 networks.

    sigma_p and zeta_p do not depend on what the clean component is; c and sigma_c do, and so does
    the mean of y_p, which the model takes to be 0 (Horvath et al. 2022, section 5, appendix D).

    zeta_p is the paper's: the median over pairs of classes of the covariance between networks
    over that within a network. zeta_c is set to 0, since networks of independent seeds are
    independent given the image. It cannot be estimated at one image: about their own mean, k
    networks have the ratio -1/k, whatever they are (`centred_ratio`).

    - moments: LogitMoments of B images.
    - clean: "clean" takes y_c = f(x); "mean" takes y_c = E f(x + eps).

    Returns LogitModel with leading dimension B.
    """
    check_choice(("clean", "mean"), clean=clean)
    values = moments.clean if clean == "clean" else moments.mean
    k = values.shape[1]
    if k < 2:
        raise ValueError(f"moments must be of at least 2 networks; got {k}")
    sigma_c, _ = network_covariances(values)
    within, between = noise_covariances(moments)
    zeta_p = np.clip(covariance_ratio(between, within), 0.0, 1.0)
    return LogitModel(values.mean(axis=1), sigma_c, within, np.zeros(len(values)), zeta_p)


def covariance_ratio(between, within):
    """The paper's zeta: the median over entries of [..., C, C] of between / within: [...]."""
    return np.median(between / within, axis=(-2, -1))


def noise_covariances(moments):
    """Covariance over the noise within a network and between two: two arrays [B, C, C], means."""
    k = moments.clean.shape[1]
    total = moments.covariance.sum(axis=(1, 3))
    within = np.einsum("bicid->bcd", moments.covariance)
    return within / k, (total - within) / max(k * (k - 1), 1)


def network_covariances(values):
    """Covariance over networks, within and between, of values [B, k, C]: two arrays [B, C, C].

    Between networks: the mean over ordered pairs of the product of their deviations from the
    mean of all k. It is -1/k times the covariance within, whatever the values: the deviations
    sum to 0.
    """
    k = values.shape[1]
    centred = values - values.mean(axis=1, keepdims=True)
    within = np.einsum("bic,bid->bcd", centred, centred)
    total = np.einsum("bic,bjd->bcd", centred, centred)
    return within / (k - 1), (total - within) / (k * (k - 1))
