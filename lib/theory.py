"""Classifiers whose smoothed probabilities are known, and the bounds behind every certificate."""

import numpy as np
import torch
from scipy.special import ndtr, ndtri
from torch import nn

from lib.checks import check_draws, check_images, check_level, check_probability, check_sigma


def _check_pair(p_a, p_b, sigma):
    p_a, p_b, sigma = np.broadcast_arrays(
        check_probability(p_a, "p_a"), check_probability(p_b, "p_b"), check_sigma(sigma)
    )
    if (p_a + p_b > 1 + 1e-12).any():
        raise ValueError(
            "p_a + p_b must be at most 1: they bound the probabilities of two different classes; "
            f"got {(p_a + p_b).max()}"
        )
    return p_a, p_b, sigma


def cohen_radius(p_a, p_b, sigma):
    """Certified l2 radius sigma/2 (Phi^-1(p_a) - Phi^-1(p_b)), which is tight.

    Cohen et al. 2019, theorems 1 and 2. The arguments broadcast.

    - p_a: lower bound of the top class's probability.
    - p_b: upper bound of every other class's probability. p_a + p_b <= 1: where two bounds sum to
      more, pass min(p_b, 1 - p_a), which bounds it as well (`Gaussian.radius_two` takes any).
    - sigma: noise level, in units of pixels in [0, 1].

    Returns float64 radii, 0 where p_a <= p_b. Raises ValueError naming the argument.
    """
    p_a, p_b, sigma = _check_pair(p_a, p_b, sigma)
    with np.errstate(invalid="ignore", over="ignore"):
        a, b, gap = ndtri(p_a), ndtri(p_b), p_a - p_b
        # The difference of close quantiles is lost to rounding; the density between them is not.
        between = gap * np.sqrt(2 * np.pi) * np.exp((a + b) ** 2 / 8)
        close = gap < 1e-6 * np.minimum(p_b, 1 - p_a)
        radius = sigma / 2 * np.where(close, between, a - b)
    return np.where(p_a > p_b, radius, 0.0)[()]


def _supremum(bound, low, high, points=400, rounds=5):
    """The supremum of bound(t) over t in [low, high], elementwise.

    A grid is searched, then ever finer grids around its best point. Every value compared is itself
    a valid bound, so that a missed supremum costs radius but never soundness.
    """
    best = np.zeros(np.shape(low))
    grid = np.linspace(0.0, 1.0, points).reshape(-1, *[1] * np.ndim(low))
    for _ in range(rounds):
        t = low + (high - low) * grid
        values = bound(t)
        best = np.maximum(best, values.max(axis=0))
        at = values.argmax(axis=0)
        step = (high - low) / (points - 1)
        centre = np.take_along_axis(t, at[None], axis=0)[0]
        low, high = np.maximum(low, centre - step), np.minimum(high, centre + step)
    return best


def lecuyer_bound(p_a, p_b, beta, sigma):
    """The l2 radius of Lecuyer et al. (2019) at one beta; 0 where the bound is vacuous.

    sigma beta / sqrt(2 log(1.25 (1 + e^beta) / (p_a - e^(2 beta) p_b))), for
    0 < beta <= min(1, log(p_a / p_b) / 2) (Cohen et al. 2019, equation 30).

    - p_a, p_b, sigma: as for `cohen_radius`.
    - beta: the bound's parameter; all arguments broadcast.
    """
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        margin = (p_a - p_b) - np.expm1(2 * beta) * p_b
        radius = sigma * beta / np.sqrt(2 * np.log(1.25 * (1 + np.exp(beta)) / margin))
    return np.where((margin > 0) & (beta > 0) & (beta <= 1), radius, 0.0)


def lecuyer_radius(p_a, p_b, sigma):
    """Certified l2 radius of Lecuyer et al. (2019): the supremum of `lecuyer_bound` over beta.

    Cohen et al. 2019, I.1, equation 31. Arguments, units and errors are those of `cohen_radius`,
    which is larger everywhere.
    """
    p_a, p_b, sigma = _check_pair(p_a, p_b, sigma)
    top = np.minimum(1.0, np.log1p(np.maximum(p_a - p_b, 0) / np.maximum(p_b, 1e-300)) / 2)
    return _supremum(lambda beta: lecuyer_bound(p_a, p_b, beta, sigma), np.zeros_like(top), top)[()]


def li_bound(p_a, p_b, order, sigma):
    """The l2 radius of Li et al. (2018) at one order; 0 where the bound is vacuous.

    sigma sqrt(-2/order log(1 - p_a - p_b + 2 M)), where M is the power mean of p_a and p_b of
    exponent 1 - order: M^(1 - order) = (p_a^(1 - order) + p_b^(1 - order)) / 2, and the geometric
    mean at order 1 (Cohen et al. 2019, equation 37).

    - p_a, p_b, sigma: as for `cohen_radius`.
    - order: of the Renyi divergence, > 0; all arguments broadcast.
    """
    # With u = log(p_a / p_b) / 2: p_a + p_b = 2 sqrt(p_a p_b) cosh(u), and
    # M = sqrt(p_a p_b) cosh((1 - order) u)^(1 / (1 - order)). Their difference is taken in
    # logarithms: as written above it is lost to rounding where p_a is close to p_b.
    p_b = np.maximum(p_b, 1e-300)
    power = np.where(order == 1, 1e-300, 1 - order)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        half = np.log1p((p_a - p_b) / p_b) / 2
        gap = _log_cosh(power * half) / power - _log_cosh(half)
        inside = -2 / order * np.log1p((p_a + p_b) * np.expm1(gap))
    return np.where((p_a > p_b) & (inside > 0), sigma * np.sqrt(np.maximum(inside, 0)), 0.0)


def _log_cosh(x):
    """log cosh(x), to a relative 1e-15 also near 0 (where it is x^2 / 2) and without overflow."""
    x = np.abs(x)
    return np.where(
        x < 1,
        np.log1p(2 * np.sinh(np.minimum(x, 1) / 2) ** 2),
        x + np.log1p(np.exp(-2 * x)) - np.log(2),
    )


def li_radius(p_a, p_b, sigma):
    """Certified l2 radius of Li et al. (2018): the supremum of `li_bound` over the order.

    Cohen et al. 2019, I.2, equation 38. Arguments, units and errors are those of `cohen_radius`,
    which is larger everywhere. The order is searched on a logarithmic scale.
    """
    p_a, p_b, sigma = _check_pair(p_a, p_b, sigma)
    # The best order is between 0.7 and 1.6, also where p_a is close to p_b (tests/test_theory.py);
    # the range searched is wider.
    low, high = np.full(p_a.shape, -14.0), np.full(p_a.shape, 3.0)
    return _supremum(lambda t: li_bound(p_a, p_b, np.exp(t), sigma), low, high)[()]


def least_probability(p, distance, sigma):
    """The least probability that a class can have at a distance, under Gaussian noise.

    Phi(Phi^-1(p) - distance/sigma), for every base classifier; a half-space attains it (Cohen et
    al. 2019, appendix A, equation 13; lemma 4, part 1). The arguments broadcast.

    - p: the class's probability at x.
    - distance: l2 distance from x, in units of pixels in [0, 1].
    - sigma: noise level, in the same units.
    """
    return ndtr(ndtri(check_probability(p, "p")) - np.asarray(distance) / check_sigma(sigma))[()]


def greatest_probability(p, distance, sigma):
    """The greatest probability that a class can have at a distance (arguments as above).

    Cohen et al. 2019, appendix A, equation 14; lemma 4, part 2.
    """
    return ndtr(ndtri(check_probability(p, "p")) + np.asarray(distance) / check_sigma(sigma))[()]


def most_powerful(mu_x, mu_y, level):
    """The greatest P(h(Y) = 1) of any rule h, random ones included, with P(h(X) = 1) <= level.

    The Neyman-Pearson lemma (Cohen et al. 2019, lemma 3). Atoms are taken in the order of their
    likelihood ratio mu_y / mu_x, the last one with a probability: a fractional knapsack, so that
    the answer is piecewise linear in the level.

    - mu_x, mu_y: probabilities [M] of the same atoms under X and Y.
    - level: in [0, 1], any shape.

    Returns float64 of the shape of level. Raises ValueError naming mu_x, mu_y or level.
    """
    mu_x, mu_y = check_probability(mu_x, "mu_x"), check_probability(mu_y, "mu_y")
    for name, mu in {"mu_x": mu_x, "mu_y": mu_y}.items():
        if mu.ndim != 1 or mu.shape != mu_x.shape or abs(mu.sum() - 1) > 1e-9:
            raise ValueError(
                f"{name} must be probabilities of the same M atoms that sum to 1; "
                f"got shape {mu.shape} and sum {mu.sum():.6g}"
            )
    # The angle has the order of the ratio, also where mu_x is 0.
    order = np.argsort(-np.arctan2(mu_y, mu_x), kind="stable")
    used, power = (np.concatenate([[0.0], np.cumsum(mu[order])]) for mu in (mu_x, mu_y))
    return np.interp(check_probability(level, "level"), used, power)


def plane_probabilities(labels, edges, x1, x2, sigma):
    """Exact class probabilities, under Gaussian noise, of a classifier of the plane.

    The classifier is constant on the cells of a grid, whose outermost cells reach to infinity.

    - labels: int [E + 1, E + 1], the class of each cell, first axis along x1.
    - edges: the E increasing grid lines of both axes.
    - x1: first coordinates [N] of the points.
    - x2: second coordinates [M].
    - sigma: noise level, in units of the coordinates.

    Returns float64 [C, N, M]. Raises ValueError naming labels or sigma.
    """
    labels = np.asarray(labels)
    if (
        labels.shape != (len(edges) + 1, len(edges) + 1)
        or labels.dtype.kind not in "iu"
        or labels.min() < 0
    ):
        raise ValueError(
            f"labels must be classes >= 0 of the {len(edges) + 1} x {len(edges) + 1} cells; "
            f"got {labels.shape} of {labels.dtype}"
        )
    lines = np.concatenate([[-np.inf], edges, [np.inf]])
    mass = [
        np.diff(ndtr((lines - np.asarray(x)[:, None]) / check_sigma(sigma)), axis=1)
        for x in (x1, x2)
    ]
    return np.stack(
        [mass[0] @ (labels == c).astype(np.float64) @ mass[1].T for c in range(labels.max() + 1)]
    )


class LinearClassifier(nn.Module):
    """f(x) = sign(w'x + b) as logits [B, 2], class 1 where w'x + b > 0.

    Its margin and its class probabilities under noise are known exactly. Smoothing does not change
    it, and theorem 1 with the exact p_A certifies exactly its margin, whatever sigma (Cohen et al.
    2019, appendix B).

    - weight: w, as many numbers as an image has pixels, not all 0.
    - bias: b, a number.

    Raises ValueError naming weight.
    """

    def __init__(self, weight, bias=0.0):
        super().__init__()
        weight = torch.as_tensor(weight, dtype=torch.float32).flatten()
        if not weight.isfinite().all() or not weight.any():
            raise ValueError("weight must be finite and not all 0: a linear rule needs a direction")
        self.register_buffer("weight", weight)
        self.register_buffer("bias", torch.tensor(float(bias)))

    def forward(self, x):
        score = x.flatten(1) @ self.weight + self.bias
        return torch.stack([-score, score], dim=1)

    def margin(self, x):
        """Signed l2 distance (w'x + b) / ||w|| of each image to the boundary, float64 [B]."""
        weight = self.weight.double()
        return ((x.flatten(1).double() @ weight + self.bias.double()) / weight.norm()).numpy()

    def top_probability(self, x, sigma):
        """Exact p_A = Phi(|w'x + b| / (sigma ||w||)), float64 [B] (proposition 4)."""
        return ndtr(np.abs(self.margin(x)) / check_sigma(sigma))

    def nearest_flip(self, x):
        """The nearest points of the boundary, x - margin w/||w||, [B, ...].

        They lie at exactly the radius that theorem 1 certifies (proposition 5).
        """
        unit = (self.weight.double() / self.weight.double().norm()).view(1, *x.shape[1:])
        margin = torch.from_numpy(self.margin(x)).view(-1, *[1] * (x.ndim - 1))
        return (x.double() - margin * unit).to(x.dtype)


class WorstCaseClassifier(nn.Module):
    """The base classifier of theorem 2, made by `worst_case_classifier`."""

    def __init__(self, x, direction, p_a, p_b, sigma):
        super().__init__()
        self.p_a, self.p_b, self.sigma = p_a, p_b, sigma
        self.radius = float(cohen_radius(p_a, p_b, sigma))
        rest = max(0.0, 1 - p_a - p_b)
        slabs = int(np.ceil(rest / p_b - 1e-9)) if rest > 1e-12 else 0
        # Along the direction: c_A = 0, then the other classes 2, 3, ... in slabs of equal
        # probability at x, then c_B = 1.
        self.cuts = sigma * ndtri(p_a + rest * np.arange(slabs + 1) / max(slabs, 1))
        self.register_buffer("order", torch.tensor([0, *range(2, slabs + 2), 1]))
        self.register_buffer("x", x.detach().clone())
        self.register_buffer("unit", direction / direction.norm())

    def forward(self, z):
        along = (z - self.x).flatten(1) @ self.unit.flatten()
        cuts = torch.as_tensor(self.cuts, dtype=along.dtype, device=along.device)
        slab = torch.bucketize(along, cuts)
        return nn.functional.one_hot(self.order[slab], len(self.order)).to(z.dtype)

    def probabilities(self, distance):
        """Class probabilities [T, C] under noise at distances [T] from x along the direction."""
        distance = np.asarray(distance, dtype=np.float64).reshape(-1, 1)
        inner = ndtr((self.cuts - distance) / self.sigma)
        slabs = np.diff(inner, axis=1)
        first = least_probability(self.p_a, distance, self.sigma)
        second = greatest_probability(self.p_b, distance, self.sigma)
        return np.concatenate([first, second, slabs], axis=1)


def worst_case_classifier(x, delta_direction, p_a, p_b, sigma):
    """The classifier that shows that theorem 1 is tight (Cohen et al. 2019, theorem 2).

    One half-space is of class 0, one of class 1, other classes lie between. Under noise at x,
    P(class 0) = p_a and P(class 1) = p_b exactly, and every other class has at most p_b (there are
    as many as that takes). Theorem 1 therefore certifies `radius`. At x + t u, u being the unit
    vector of delta_direction, class 0 wins for 0 <= t < radius and loses to class 1 for t > radius.

    - x: float tensor [C, H, W].
    - delta_direction: tensor of the shape of x, not 0.
    - p_a, p_b: p_a > p_b > 0, p_a + p_b <= 1.
    - sigma: noise level > 0, in units of x.

    Returns a WorstCaseClassifier (nn.Module with one-hot logits). Raises ValueError that names the
    argument.
    """
    check_sigma(sigma)
    p_a, p_b = check_level(p_a=p_a, p_b=p_b)
    if not p_a > p_b or p_a + p_b > 1 + 1e-12:
        raise ValueError(
            "p_a and p_b must satisfy p_a > p_b and p_a + p_b <= 1, two classes' probabilities; "
            f"got {p_a} and {p_b}"
        )
    if (1 - p_a - p_b) / p_b > 10_000:
        raise ValueError(
            "p_b must be at least (1 - p_a - p_b) / 10,000, so that 10,000 other classes suffice; "
            f"got {p_b} beside p_a = {p_a}"
        )
    if delta_direction.shape != x.shape or not delta_direction.any():
        raise ValueError(
            f"delta_direction must be a direction of x's shape {list(x.shape)}, not 0; "
            f"got shape {list(delta_direction.shape)}"
        )
    return WorstCaseClassifier(x, delta_direction, p_a, p_b, sigma)


def average_pooled(model, factor=2):
    """The classifier that averages squares of factor x factor pixels, then asks `model`.

    Smoothed at factor * sigma it has the class probabilities of `model` at sigma, and so `factor`
    times its certified radii (Cohen et al. 2019, proposition 6).

    - model: nn.Module, logits from images [B, C, H, W].
    - factor: whole number >= 1.

    Returns an nn.Module of images [B, C, factor H, factor W]. Raises ValueError naming factor.
    """
    factor = check_draws(factor=factor)
    return nn.Sequential(nn.AvgPool2d(factor), model)


def unpooled(x, factor):
    """Black-and-white images whose average over squares of factor x factor pixels is exactly x.

    In each square the pixels that a smooth enlargement makes brightest are white.

    - x: images [B, C, H, W] of pixels that are multiples of 1 / factor^2. (The digits are, at
      factor 4: they were made by counting the pixels of 4x4 squares.)
    - factor: whole number >= 1.

    Returns float32 [B, C, factor H, factor W]. Raises ValueError naming factor or x.
    """
    factor = check_draws(factor=factor)
    check_images(x)
    white = x.double() * factor**2
    if not torch.equal(white, white.round()):
        raise ValueError(
            f"x must have pixels that are multiples of 1/{factor**2}, to be made of black and "
            "white squares; try another factor"
        )
    smooth = nn.functional.interpolate(
        x.double(), scale_factor=factor, mode="bicubic", align_corners=False
    )
    squares = nn.functional.pixel_unshuffle(smooth.flatten(0, 1)[:, None], factor)
    # Rounded, so that ties are broken by position on every machine.
    rank = (-squares.round(decimals=6)).argsort(dim=1, stable=True).argsort(dim=1, stable=True)
    return nn.functional.pixel_shuffle((rank < white.flatten(0, 1)[:, None]).float(), factor).view(
        *x.shape[:2], *smooth.shape[2:]
    )
