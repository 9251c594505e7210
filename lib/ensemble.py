"""Several networks as one classifier: votes, K-consensus, weights, order (Horvath et al. 2022)."""

import dataclasses
import json
import math
from collections.abc import Callable

import numpy as np
import torch
from scipy.optimize import minimize
from torch import nn
from torch.nn import functional

from lib.checks import check_choice, check_draws, check_images, check_labels, check_seed


@dataclasses.dataclass(frozen=True)
class Vote:
    """A way to vote, in two steps: many votes of the same networks share the first.

    - term: logits y^l (float32 [k, ..., C]) to what each network adds, float32 [k, ..., C].
    - pool: the terms of the networks that vote, and their weights (None without), to the scores
      [..., C], whose largest is the class voted for.
    - weighted: whether it takes a weight for each network.
    """

    term: Callable
    pool: Callable
    weighted: bool = False


def _logits(logits):
    return logits


def _one_vote(logits):
    """1 at the largest logit (of equal ones the first), 0 elsewhere."""
    return functional.one_hot(logits.argmax(dim=-1), logits.shape[-1]).float()


def _log_softmax(logits):
    return logits.log_softmax(dim=-1)


def _mean(terms, weights=None):
    return terms.mean(dim=0)


def _log_mean(terms, weights=None):
    """The logarithm of the mean of softmax(y^l): the softmax of these scores is that mean."""
    return terms.logsumexp(dim=0) - math.log(len(terms))


def _weighted_sum(terms, weights):
    weights = torch.tensor(weights, dtype=torch.float32, device=terms.device)
    return torch.tensordot(weights, terms, dims=1)


# Votes by name (Horvath et al. 2022, section 4 and H.3.1): the mean of the logits y^l, which is the
# paper's choice (equation 2); the share of networks whose largest logit is the class; the mean of
# softmax(y^l); the sum of w_l y^l.
VOTES = {
    "soft": Vote(_logits, _mean),
    "hard": Vote(_one_vote, _mean),
    "softmax": Vote(_log_softmax, _log_mean),
    "weighted": Vote(_logits, _weighted_sum, weighted=True),
}


def combine(logits, vote="soft", weights=None):
    """The scores of several networks' vote (see VOTES); the class voted for is their argmax.

    - logits: float tensor [k, ..., C]; combined in float32, whatever their precision.
    - vote: a name of VOTES. weights: k numbers where it is weighted, else None.

    Returns float32 [..., C].
    """
    rule = VOTES[vote]
    return rule.pool(rule.term(logits.float()), weights)


def combine_consensus(logits, consensus, vote="soft", weights=None):
    """K-consensus: the first K networks' vote where they agree, else that of all (section 6).

    Where they agree, the scores are the mean of their logits, whose largest is their common class
    whatever the vote. The guarantee of smoothing is that of any base classifier.

    - logits: float tensor [k, ..., C], the networks in the order in which they are asked.
    - consensus: K, from 1 to k. vote, weights: as for `combine`.

    Returns (scores float32 [..., C], bool [...] where the first K agree, so that K evaluations
    were enough; elsewhere it takes k).
    """
    first = logits[:consensus]
    votes = first.argmax(dim=-1)
    agreed = (votes == votes[0]).all(dim=0)
    return torch.where(agreed[..., None], combine(first), combine(logits, vote, weights)), agreed


class Ensemble(nn.Module):
    """Several networks as one: scores [B, C] from images [B, ...], for use wherever a network is.

    Its class is that of the engine's readout of the same vote, draw for draw. All members are
    evaluated, also with a consensus: the saving of evaluations is the engine's.

    - models: networks of the same classes, any architectures, normalisation inside each: a list, a
      tuple or an nn.ModuleList.
    - vote: a name of VOTES, such as "soft", "hard" (no gradients), "softmax" or "weighted".
    - weights: where the vote is weighted, one number >= 0 for each network; scaled to sum 1.
    - consensus: K of K-consensus, or None. The order of `models` is that of asking.

    Raises ValueError naming the argument.
    """

    def __init__(self, models, vote="soft", weights=None, consensus=None):
        super().__init__()
        # The layers of one nn.Sequential are modules, too.
        alone = isinstance(models, nn.Module) and not isinstance(models, nn.ModuleList)
        models = [] if alone else list(models)
        if not models or not all(isinstance(model, nn.Module) for model in models):
            raise ValueError(
                "models must be one torch.nn.Module or more, in a list or an nn.ModuleList (one "
                "network: [model])"
            )
        check_vote(vote, weights)
        if consensus is not None:
            check_draws(consensus=consensus)
            if consensus > len(models):
                raise ValueError(f"consensus must be at most {len(models)}; got {consensus}")
        self.members = nn.ModuleList(models)
        self.vote, self.consensus = vote, consensus
        self.weights = None if weights is None else check_weights(weights, len(models))

    def forward(self, x):
        logits = self.member_logits(x)
        if self.consensus is None:
            return combine(logits, self.vote, self.weights)
        return combine_consensus(logits, self.consensus, self.vote, self.weights)[0]

    def member_logits(self, x):
        """The logits of each member, float32 [k, B, C]."""
        logits = [member(x).float() for member in self.members]
        try:
            return torch.stack(logits)
        except RuntimeError as error:
            shapes = ", ".join(str(list(part.shape)) for part in logits)
            text = f"models must give logits of the same classes; got {shapes}"
            raise ValueError(text) from error

    def describe(self):
        """How it votes: {"vote", "weights", "consensus"}."""
        return {"vote": self.vote, "weights": self.weights, "consensus": self.consensus}

    def get_extra_state(self):
        # Among the weights, so that the hash of the weights is that of the classifier.
        return torch.frombuffer(bytearray(json.dumps(self.describe()).encode()), dtype=torch.uint8)

    def set_extra_state(self, state):
        found = json.loads(bytes(state.tolist()))
        self.vote, self.consensus = found["vote"], found["consensus"]
        self.weights = found["weights"] and tuple(found["weights"])


def check_vote(vote, weights):
    """Refuse a name that VOTES lacks, and weights but where the vote is weighted."""
    check_choice(VOTES, vote=vote)
    if VOTES[vote].weighted and weights is None:
        raise ValueError(f"vote must come with weights where it is {vote}")
    if weights is not None and not VOTES[vote].weighted:
        raise ValueError(f"weights must be left out where the vote is {vote}")


def check_weights(weights, k):
    """One weight >= 0 for each of k networks, not all 0: a tuple of floats of sum 1."""
    array = np.asarray(weights, dtype=np.float64)
    if array.shape != (k,) or not np.isfinite(array).all() or (array < 0).any() or not array.any():
        raise ValueError(f"weights must be {k} finite numbers >= 0, not all 0; got {weights!r}")
    return tuple((array / array.sum()).tolist())


@torch.no_grad()
def noisy_logits(models, x, noise, draws, seed=0, index=None):
    """Logits of several networks on the same noisy copies: float32 [B, draws, k, C].

    - models: networks, evaluated as they are (eval mode is set for the call).
    - x: float32 images [B, channels, height, width]. noise: one sigma, or one for each image.
    - draws: noisy copies of each image. seed, index: the stream of image i is that of
      (seed, index[i]); index defaults to 0..B-1.
    """
    check_images(x)
    check_draws(draws=draws)
    check_seed(seed)
    index = np.arange(len(x)) if index is None else check_labels(index, len(x), "index")
    ensemble, out = Ensemble(models), []
    training = [module for module in ensemble.modules() if module.training]
    ensemble.eval()
    try:
        for i, image in enumerate(x):
            generator = np.random.default_rng([seed, int(index[i])])
            copies = image.expand(draws, *image.shape)
            noisy = noise.select(np.full(draws, i)).sample(copies, generator)
            parts = [ensemble.member_logits(part) for part in noisy.split(500)]
            out.append(torch.cat(parts, dim=1))
    finally:
        for module in training:
            module.training = True
    return torch.stack(out).permute(0, 2, 1, 3)


def order_by_accuracy(models, x, y, noise, draws=20, seed=0):
    """The order in which K-consensus asks networks: by accuracy under noise (section 6).

    - x, y: held-out images and labels, which are never certified. draws: noisy copies of each.

    Returns (order int64 [k], best first, of equals the first; accuracy float64 [k] of each
    network in the order given).
    """
    y = check_labels(y, len(x), "y")
    votes = noisy_logits(models, x, noise, draws, seed).argmax(dim=-1).numpy()
    accuracy = (votes == y[:, None, None]).mean(axis=(0, 1))
    return np.argsort(-accuracy, kind="stable"), accuracy


def fit_weights(models, x, y, noise, draws=20, seed=0):
    """Weights of the weighted vote: >= 0, sum 1, least noisy cross entropy (H.3.1).

    The mean over the noisy copies of -log softmax(sum_l w_l y^l)[label] is convex in w, so that
    its least value on the simplex is found (SLSQP, float64).

    - x, y: held-out images and labels, which are never certified. draws: noisy copies of each.

    Returns a tuple of k floats. Raises ValueError naming y, or where the search does not end.
    """
    y = np.repeat(check_labels(y, len(x), "y"), draws)
    logits = noisy_logits(models, x, noise, draws, seed).flatten(0, 1).double().numpy()
    k, rows = logits.shape[1], np.arange(len(y))
    right = logits[rows, :, y]

    def loss(weights):
        mixed = weights @ logits
        top = mixed.max(axis=1, keepdims=True)
        share = np.exp(mixed - top)
        total = share.sum(axis=1, keepdims=True)
        expected = np.einsum("nkc,nc->nk", logits, share / total)
        value = np.log(total[:, 0]) + top[:, 0] - mixed[rows, y]
        return value.mean(), (expected - right).mean(axis=0)

    simplex = {"type": "eq", "fun": lambda w: w.sum() - 1, "jac": lambda w: np.ones(k)}
    start = np.full(k, 1 / k)
    found = minimize(
        loss, start, jac=True, bounds=[(0, 1)] * k, constraints=simplex, options={"ftol": 1e-10}
    )
    if not found.success:
        raise ValueError(f"y: no weights found, the search ended with {found.message!r}")
    return check_weights(np.maximum(found.x, 0), k)
