"""Cohen's two procedures, PREDICT and CERTIFY, on any source of counts (Cohen et al. 2019, 3.2)."""

import dataclasses

import numpy as np
import pandas as pd

from lib.bounds import clopper_pearson_lower, clopper_pearson_upper, top_class_pvalue
from lib.checks import check_draws, check_labels, check_level, check_noise, check_one_readout

ABSTAIN = -1


@dataclasses.dataclass(frozen=True)
class Certificates:
    """What a sampler returns for B examples.

    - prediction: int64 [B], the class, ABSTAIN (-1) where it abstained.
    - radius: float64 [B] in the noise's norm, pixels in [0, 1]; 0.0 where it abstained. The ball
      is open.
    - p_lower: float64 [B], the bound behind the radius.
    - n: int64 [B], draws used, selection draws included.

    Labels are often a torch tensor, which does not compare with these arrays: `frame(labels)` takes
    either. Raises ValueError naming what differs in shape, or a radius or class below the least.
    """

    prediction: np.ndarray
    radius: np.ndarray
    p_lower: np.ndarray
    n: np.ndarray

    def __post_init__(self):
        shapes = {name: np.shape(value) for name, value in vars(self).items()}
        if len(set(shapes.values())) > 1:
            shown = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
            raise ValueError(f"prediction, radius, p_lower and n must have one shape; got {shown}")
        if not np.greater_equal(self.radius, 0).all():
            raise ValueError(f"radius must be >= 0, 0.0 where abstained; got {np.min(self.radius)}")
        if np.less(self.prediction, ABSTAIN).any():
            raise ValueError(
                f"prediction must be a class >= 0, or ABSTAIN (-1); got {np.min(self.prediction)}"
            )

    def __len__(self):
        return len(self.prediction)

    def select(self, index):
        """The certificates of some examples; index: as numpy takes it."""
        fields = (field.name for field in dataclasses.fields(self))
        return Certificates(**{name: getattr(self, name)[index] for name in fields})

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
        """A DataFrame, one row per example; with labels also `label` and `correct`.

        - labels: whole numbers [B], as an array or a tensor. `frame(y).correct.mean()` is the
          share of examples that are right.
        """
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

    Returns int64 [B]. Raises ValueError naming counts, n or alpha.
    """
    n, alpha = check_draws(n=n), check_level(alpha=alpha)
    check_one_readout(counts)
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
    - n0: draws that choose the class. n: fresh draws for the bound. Each one number, or int [B],
      one per example.
    - alpha: one-sided failure probability per example, in (0, 1).
    - prediction: int [B], classes chosen beforehand, independently of these draws: a published
      log's, or those of a source of another seed (with the same seed they are the same draws). n0
      must then be 0.

    Returns Certificates of B examples. Raises ValueError naming counts, noise, n0, n, alpha or
    prediction.
    """
    n, alpha = check_draws(n=n), check_level(alpha=alpha)
    check_noise(counts, noise)
    prediction = choose_class(counts, n0, prediction)
    # Fresh draws: the ones that chose the class would make the bound too high.
    p_lower = clopper_pearson_lower(votes_for(prediction, counts.draw(n)), n, alpha)
    return Certificates.from_bounds(prediction, p_lower, noise, draws=np.add(n0, n, dtype=np.int64))


def choose_class(counts, n0, prediction=None):
    """The class of each example, int64 [B]: by n0 draws, or as given (then n0 must be 0).

    Raises ValueError naming n0 or prediction.
    """
    if prediction is None:
        return counts.draw(check_draws(n0=n0)).argmax(axis=1)
    if np.any(n0):
        raise ValueError(f"n0 must be 0 where prediction gives the classes; got {n0!r}")
    return check_labels(prediction, len(counts), "prediction", counts.classes)


def certify_margin(counts, noise, n0, n, alpha, share=0.9):
    """CERTIFY with the runner-up counted: the radius of two probabilities, at full alpha.

    n0 draws choose the class A; then, from n fresh draws with counts k,

        L = CPlower(k_A, n, share alpha)
        U = min(CPupper(max of the other counts, n, (1 - share) alpha), 1 - L)

    and the radius is the noise's radius_two(L, U), for the Gaussian
    sigma/2 (Phi^-1(L) - Phi^-1(U)) (Cohen et al. 2019, theorem 1); where it is 0 it abstains.

    Guarantee: for each example, with probability >= 1 - alpha over the draws, either it is
    abstained on or the smoothed classifier returns the given class on the whole open ball of the
    given radius. No union over the classes is paid: let B be the truly likeliest other class, a
    fixed one, not one that the draws choose. U is at least CPupper(k_B, n, (1 - share) alpha),
    because CPupper rises with the count, or it is 1 - L, which bounds p_B wherever L <= p_A. So the
    radius is above the true one only if L > p_A or CPupper(k_B) < p_B: probability at most
    share alpha + (1 - share) alpha. A wrong class has a true radius of 0 and is covered by the same
    line. To take the count of a class that the selection draws named runner-up would be unsound:
    that one may be less likely than B.

    - counts: source of votes for B examples; n0 + n draws of each are taken.
    - noise: smoothing distribution with a `radius_two`; its norm and units are the radius's.
    - n0: draws that choose the class. n: fresh draws for both bounds.
    - alpha: one-sided failure probability per example, in (0, 1).
    - share: of alpha for the class's own bound, in (0, 1); from .5 to .95 it hardly matters.

    Returns Certificates of B examples; p_lower is L, which may lie below 1/2 where U does, too.
    With two classes this is CERTIFY at share alpha. Raises ValueError naming the argument.
    """
    n0, n = check_draws(n0=n0, n=n)
    alpha, share = check_level(alpha=alpha, share=share)
    _check_two(counts, noise)
    prediction = counts.draw(n0).argmax(axis=1)
    votes = counts.draw(n)
    others = np.where(np.arange(votes.shape[1]) == prediction[:, None], 0, votes)
    lower = clopper_pearson_lower(votes_for(prediction, votes), n, share * alpha)
    upper = clopper_pearson_upper(others.max(axis=1), n, (1 - share) * alpha)
    radius = noise.radius_two(lower, np.minimum(upper, 1 - lower))
    certain = radius > 0
    return Certificates(
        prediction=np.where(certain, prediction, ABSTAIN),
        radius=np.where(certain, radius, 0.0),
        p_lower=lower,
        n=np.broadcast_to(np.add(n0, n), prediction.shape).astype(np.int64),
    )


def certify_partition(counts, noise, n0, n, alpha, merge=True):
    """The radius of two probabilities with a union bound over groups of classes.

    n0 draws choose the class A and, with merge=True, a partition of the others (class partitioning,
    Delattre et al., AISTATS 2025): the runner-up alone, then the next most frequent ones alone
    until the rest together has no more selection draws than the runner-up, then that rest as one
    group. With merge=False every class is a group (Bonferroni over classes; Cohen et al. 2019
    remark on it, Lecuyer et al. 2019 do so). With G groups, A among them, each bound takes alpha/G;
    the largest of the groups' upper bounds, or one less the lower bound of A, is that of p_B.

    Guarantee: as CERTIFY's. All G bounds hold together with probability >= 1 - alpha given the
    selection draws, and each other class is at most as likely as its group.
    For comparison: `certify_margin` pays for no union.

    - counts: source of votes for B examples; n0 + n draws of each are taken.
    - noise: smoothing distribution with a `radius_two`; its norm and units are the radius's.
    - n0: draws that choose the class and the groups. n: fresh draws for all bounds.
    - alpha: one-sided failure probability per example, in (0, 1).
    - merge: whether rare classes share a group; False: every class is one.

    Returns Certificates of B examples; p_lower is the lower bound of A, which may lie below 1/2.
    Raises ValueError naming counts, noise, n0, n or alpha.
    """
    (n0, n), alpha = check_draws(n0=n0, n=n), check_level(alpha=alpha)
    _check_two(counts, noise)
    first = counts.draw(n0)
    prediction, at = first.argmax(axis=1), np.arange(len(first))
    others = np.where(np.arange(first.shape[1]) == prediction[:, None], -1, first)
    order = np.argsort(-others, axis=1, kind="stable")[:, :-1]  # the other classes, frequent first
    votes = counts.draw(n)
    hits = votes[at, prediction]
    votes = np.take_along_axis(votes, order, axis=1)
    alone = _alone(np.take_along_axis(first, order, axis=1)) if merge else order.shape[1]
    rank = np.arange(order.shape[1])
    rest = np.where(rank >= np.reshape(alone, (-1, 1)), votes, 0).sum(axis=1)
    largest = np.where(rank < np.reshape(alone, (-1, 1)), votes, 0).max(axis=1, initial=0)
    groups = 1 + np.broadcast_to(alone, len(at)) + (alone < order.shape[1])
    lower, upper = np.zeros(len(at)), np.ones(len(at))
    for g in np.unique(groups):
        these = groups == g
        most = np.maximum(largest, rest)[these]
        lower[these] = clopper_pearson_lower(hits[these], n, alpha / g)
        upper[these] = clopper_pearson_upper(most, n, alpha / g)
    radius = noise.radius_two(lower, np.minimum(upper, 1 - lower))
    return Certificates(
        prediction=np.where(radius > 0, prediction, ABSTAIN),
        radius=radius,
        p_lower=lower,
        n=np.full(len(at), n0 + n, dtype=np.int64),
    )


def _check_two(counts, noise):
    check_noise(counts, noise)
    if not hasattr(noise, "radius_two"):
        raise ValueError(f"noise must have a radius of two probabilities (radius_two); got {noise}")
    if counts.classes < 2:
        raise ValueError("counts must have two classes or more: of one there is no runner-up")


def _alone(ordered):
    """How many of the other classes, most frequent first, get a group of their own: int64 [B]."""
    rest = ordered.sum(axis=1, keepdims=True) - np.cumsum(ordered, axis=1)
    # The first group after which the rest is no more frequent than the runner-up.
    return np.argmax(rest <= ordered[:, :1], axis=1) + 1
