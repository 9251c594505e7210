"""Dual smoothing: a noise level for each input whose choice is itself certified.

A sound way to what `lib.sigma` does by search: it needs no memory (`lib.memory`).
"""

import numpy as np
import torch

from lib.bounds import clopper_pearson_lower
from lib.certify import ABSTAIN, Certificates, certify, votes_for
from lib.checks import check_draws, check_level, check_noise
from lib.engine.classifier import BaseClassifier
from lib.engine.live import ModelCounts


def best_expert(networks, noises, x, y, draws=100, seed=0):
    """Which classifier has the largest estimated radius at each image: labels of a router.

    The radius of the share of votes for the right class, kept within [1/draws, 1 - 1/draws].
    For training the router of `certify_dual`; proves nothing.

    - networks: nn.Modules. noises: the smoothing distribution of each.
    - x: float32 images [B, channels, height, width] in [0, 1]. y: int64 labels [B].
    - draws: votes of each at each image. seed: of the noise.

    Returns int64 [B], numbers of networks; the first of several equal ones.
    """
    radii = []
    for network, noise in zip(networks, noises, strict=True):
        # The same on every machine: labels of a training depend on it.
        base = BaseClassifier(
            network,
            x.shape[1:],
            device="cpu",
            dtype="float32",
            block=250,
            layout="channels_last",
            compile=False,
        )
        counts = ModelCounts(base, x, noise, seed=seed, progress=False)
        votes = votes_for(y.numpy(), counts.draw(draws))
        share = np.clip(votes / draws, 1 / draws, 1 - 1 / draws)
        radii.append(noise.radius(share))
    return torch.as_tensor(np.argmax(radii, axis=0))


def certify_dual(router, router_noise, counts, noises, n0, n, alpha, share=0.5):
    """Certify a classifier whose noise level is itself chosen by a smoothed classifier.

    The router h is a classifier of m classes smoothed at one fixed level; class j stands for
    noises[j]. The classifier certified is F(x) = g_h(x)(x), with g_j the base classifier smoothed
    under noises[j] (Dual Randomized Smoothing, Sun et al. 2025, arXiv 2512.01782). It is a function
    of the image alone: no memory, no order of queries.

    Guarantee: for each example, with probability >= 1 - alpha over the draws, either it is
    abstained on or F returns the given class on the whole open ball of the given radius. Proof: the
    router's certificate (class j, radius r) is false with probability <= share alpha, and that of
    g_j (class c, radius s) of any one j with probability <= (1 - share) alpha. Where the router's
    bound holds, j is the one choice of probability above 1/2, which no draw decides. A failure thus
    needs one of two false certificates, the router's or that of this one g_j: their probabilities
    add up to alpha, however their draws depend on each other. If both hold, h = j on the ball of
    radius r, so F = g_j there, and g_j = c on the ball of radius s: F = c on the smaller ball.

    - router: source of votes for the m choices, B examples. router_noise: the noise of these votes.
    - counts: m sources of votes of the classifier for the same B examples, one for each of noises.
      Draws are taken only from the source chosen.
    - n0, n: draws that choose a class, and fresh draws that bound its probability, of the router
      and of the classifier.
    - alpha: one-sided failure probability per example. share: the router's part of it, in (0, 1).

    Returns Certificates of B examples (p_lower is the classifier's, n counts the router's draws
    too) and the choices, int64 [B], ABSTAIN where the router's certificate fails. Raises ValueError
    naming the argument.
    """
    n0, n = check_draws(n0=n0, n=n)
    alpha, share = check_level(alpha=alpha, share=share)
    if not len(counts) == len(noises) == router.classes:
        raise ValueError(
            f"counts and noises must be {router.classes} each, one for each class of the router; "
            f"got {len(counts)} and {len(noises)}"
        )
    if {noise.norm for noise in noises} != {router_noise.norm} or {len(c) for c in counts} != {
        len(router)
    }:
        raise ValueError("noises and counts must have the router's norm and its number of examples")
    check_noise(router, router_noise)
    first = certify(router, router_noise, n0, n, share * alpha)
    prediction, radius = np.full(len(router), ABSTAIN), np.zeros(len(router))
    p_lower, draws = np.zeros(len(router)), first.n.copy()
    for choice, (source, noise) in enumerate(zip(counts, noises, strict=True)):
        check_noise(source, noise)
        rows = first.prediction == choice
        voted = source.draw(np.where(rows, n0, 0)).argmax(axis=1)
        votes = votes_for(voted, source.draw(np.where(rows, n, 0)))
        bound = np.where(rows, clopper_pearson_lower(votes, n, (1 - share) * alpha), 0.0)
        reach = np.where(bound > 0.5, noise.radius(bound), 0.0)
        prediction = np.where(rows & (bound > 0.5), voted, prediction)
        radius, p_lower = np.where(rows, np.minimum(first.radius, reach), radius), p_lower + bound
        draws += rows * (n0 + n)
    return Certificates(prediction, radius, p_lower, draws), first.prediction
