"""Cohen's two procedures, PREDICT and CERTIFY, on any source of counts (Cohen et al. 2019, 3.2)."""

import dataclasses

import numpy as np
import pandas as pd

from lib.bounds import clopper_pearson_lower, top_class_pvalue
from lib.checks import check_draws, check_labels, check_level, check_noise

ABSTAIN = -1


@dataclasses.dataclass(frozen=True)
class Certificates:
    """What a sampler returns for B examples.

    - prediction: int64 [B], the class, ABSTAIN (-1) where it abstained.
    - radius: float64 [B] in the noise's norm, pixels in [0, 1]; 0.0 where it abstained. The ball
      is open.
    - p_lower: float64 [B], the bound behind the radius.
    - n: int64 [B], draws used, selection draws included.
    """

    prediction: np.ndarray
    radius: np.ndarray
    p_lower: np.ndarray
    n: np.ndarray

    def __len__(self):
        return len(self.prediction)

    @classmethod
    def from_bounds(cls, prediction, p_lower, noise, draws):
        """Certificates of the classes whose probability is at least p_lower.

        Those not above 1/2 abstain. draws: int, or int [B].
        """
        certain = p_lower > 0.5
        return cls(
            prediction=np.where(certain, prediction, ABSTAIN).astype(np.int64),
            radius=np.where(certain, noise.radius(p_lower), 0.0),
            p_lower=np.asarray(p_lower, dtype=np.float64),
            n=np.broadcast_to(np.asarray(draws, dtype=np.int64), np.shape(prediction)).copy(),
        )

    def frame(self, labels=None):
        """A DataFrame, one row per example; with labels also `label` and `correct`."""
        fields = dataclasses.fields(self)
        table = pd.DataFrame({field.name: getattr(self, field.name) for field in fields})
        if labels is not None:
            labels = check_labels(labels, len(self))
            table.insert(0, "label", labels)
            table["correct"] = labels == self.prediction
        return table


def predict(counts, n, alpha):
    """PREDICT: each example's class, or ABSTAIN (Cohen et al. 2019, 3.2.1, proposition 1).

    Guarantee: for each example, the probability over the draws that the returned class is not the
    smoothed classifier's is <= alpha.

    - counts: source of votes for B examples; n draws of each are taken.
    - alpha: failure probability per example, in (0, 1).

    Returns int64 [B]. Raises ValueError naming n or alpha.
    """
    n, alpha = check_draws(n=n), check_level(alpha=alpha)
    votes = counts.draw(n)
    ordered = np.sort(votes, axis=1)
    several = votes.shape[1] > 1
    runner_up = ordered[:, -2] if several else np.zeros(len(votes), dtype=np.int64)
    certain = top_class_pvalue(ordered[:, -1], runner_up) <= alpha
    return np.where(certain, votes.argmax(axis=1), ABSTAIN)


def votes_for(prediction, votes):
    """The votes int64 [B] for each example's class, of votes [B, C]."""
    return np.take_along_axis(votes, prediction[:, None], axis=1)[:, 0]


def certify(counts, noise, n0, n, alpha, prediction=None):
    """CERTIFY: each example's class and a radius inside which it cannot change.

    Guarantee: for each example, with probability >= 1 - alpha over the draws, either it is
    abstained on or the smoothed classifier returns the given class on the whole open ball of
    the given radius (Cohen et al. 2019, section 3.2.2, proposition 2).

    - counts: source of votes for B examples; n0 + n draws of each are taken.
    - noise: smoothing distribution; its norm and units are the radius's (Gaussian: l2, pixels in
      [0, 1]). It must be the one that the counts were drawn under, where they know it. A sigma
      chosen for each image is held fixed over the image's ball: each certificate then speaks of
      the classifier smoothed with that sigma.
    - n0: draws that choose the class. n: fresh draws for the bound.
    - alpha: one-sided failure probability per example, in (0, 1).
    - prediction: int [B], classes chosen beforehand, independently of these draws (a published
      log's). n0 must then be 0.

    Returns Certificates of B examples. Raises ValueError naming noise, n0, n, alpha or prediction.
    """
    n, alpha = check_draws(n=n), check_level(alpha=alpha)
    check_noise(counts, noise)
    if prediction is None:
        n0 = check_draws(n0=n0)
        prediction = counts.draw(n0).argmax(axis=1)
    elif np.any(n0):
        raise ValueError(f"n0 must be 0 where prediction gives the classes; got {n0!r}")
    else:
        prediction = check_labels(prediction, len(counts), "prediction", counts.classes)
    # Fresh draws: the ones that chose the class would make the bound too high.
    p_lower = clopper_pearson_lower(votes_for(prediction, counts.draw(n)), n, alpha)
    return Certificates.from_bounds(prediction, p_lower, noise, draws=np.add(n0, n))
