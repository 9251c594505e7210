"""What the papers report of a set of certificates."""

import numpy as np

from lib.checks import check_labels


def average_certified_radius(certificates, labels):
    """ACR: the mean radius, counted 0 where abstained or wrong (Zhai et al. 2020; Chen et al. 2022, equation 7). In the noise's units."""
    labels = check_labels(labels, len(certificates))
    return float(np.mean(np.where(certificates.prediction == labels, certificates.radius, 0.0)))


def certified_accuracy(certificates, labels, radii):
    """Approximate certified accuracy: the share of examples that are right and certified beyond r (Cohen et al. 2019, E; R > r, strictly).

    radii: a number or array, >= 0. Returns float64 of the same shape. r = 0 gives the accuracy of the smoothed classifier.
    """
    labels = check_labels(labels, len(certificates))
    radii = np.asarray(radii, dtype=np.float64)
    if not (radii >= 0).all():
        raise ValueError(f"radii must be >= 0, in the units of the certificates; got {radii!r}")
    right = np.where(certificates.prediction == labels, certificates.radius, -1.0)
    return (right > radii[..., None]).mean(axis=-1)[()]


def abstention(certificates):
    """The share of examples on which the sampler abstained."""
    return float(np.mean(certificates.prediction < 0))


def envelope(accuracies):
    """The best certified accuracy at each radius over several noise levels: the maximum over the first axis of [S, R]."""
    return np.max(np.asarray(accuracies), axis=0)


def max_absolute_decline(before, after):
    """MAD: the largest radius that any example lost between two sets of certificates (Chen et al. 2022, section on metrics).

    before, after: Certificates of the same examples, in the noise's units; abstained counts 0. It holds both runs' Monte Carlo error;
    `lib.iss.decline` is the loss without it. Raises ValueError naming after.
    """
    if len(before) != len(after):
        raise ValueError(
            f"after must certify the same {len(before)} examples as before; got {len(after)}"
        )
    return float(np.max(before.radius - after.radius))


def average_sample_size(certificates):
    """The mean number of draws per example, selection draws included."""
    return float(np.mean(certificates.n))


def speed_up(certificates, n):
    """How many times fewer draws these certificates took than n draws (> 0) of every example would have."""
    if not n > 0:
        raise ValueError(
            f"n must be a number of draws > 0, of the standard certification; got {n!r}"
        )
    return float(n / np.mean(certificates.n))
