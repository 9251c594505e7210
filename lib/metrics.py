"""What the papers report of a set of certificates."""

import numpy as np

from lib.checks import check_labels


def average_certified_radius(certificates, labels):
    """ACR: the mean radius, counted 0 where abstained or wrong (Zhai et al. 2020; Chen et al. 2022, equation 7). In the noise's units."""
    labels = check_labels(labels, len(certificates))
    return float(np.mean(certificates.radius * (certificates.prediction == labels)))


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
