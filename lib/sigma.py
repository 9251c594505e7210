"""Data-dependent smoothing: a noise level for each input, found by gradient ascent.

Algorithm 1 of Alfarra et al. (2022) chooses the level that maximises an estimate of the certified
radius. The votes of the certificate must then be drawn afresh at that level. What such a
certificate covers, and what it does not, is said in `lib.memory`; dual smoothing (`lib.dual`) needs
no memory: its choice of the level is itself certified.
"""

import dataclasses
import pathlib
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch.special import ndtri

from lib.checks import (
    check_choice,
    check_draws,
    check_images,
    check_labels,
    check_seed,
    check_sigma,
)
from lib.data import content_hash
from lib.engine.admission import copy_with_shared_weights, evaluating, logits_of
from lib.engine.classifier import BaseClassifier
from lib.engine.hardware import cores
from lib.engine.progress import progress_bar
from lib.engine.settings import changed
from lib.models import model_hash
from lib.noise import PURPOSES, Gaussian, Uniform
from lib.store.records import load_arrays, save_arrays
from lib.store.registry import option

EVERY = 100  # steps between two entries of a path of sigma
CLASS_DRAWS = 100  # draws at sigma0 that fix the class, where the objective keeps one class
# The radius as a function of the scale of the noise and the scores of the two best classes.
RADII = {
    Gaussian: lambda scale, a, b: scale / 2 * (ndtri(a) - ndtri(b)),
    Uniform: lambda scale, a, b: scale * (a - b),
}


@dataclasses.dataclass(frozen=True)
class Objective:
    """The estimated radius that a search for sigma maximises (Alfarra et al. 2022, equation 3, G).

    sigma/2 (Phi^-1(E_A) - Phi^-1(E_B)) for Gaussian noise, lambda (E_A - E_B) for uniform noise,
    with E the mean score of a class over n noisy copies, A the best class and B the next. The
    paper's three statements of it differ; the defaults follow the text, and each field offers the
    alternative.

    - noise: a class of `lib.noise` whose samples scale with its one parameter (Gaussian, Uniform).
    - scores: "softmax", as the text defines f (values in the simplex), or "logits", which the
      listing of appendix A applies to a network that ends without a softmax. Clamped logits have no
      gradient for most images.
    - clamp: (low, high) within (0, 1), applied to E_A and E_B as in the listing; algorithm 1 has
      none, but Phi^-1 is infinite at 0 and 1. (1e-6, 1 - 1e-6) is as good as none.
    - fixed_class: False takes the best class anew in each step (algorithm 1, the listing); True
      keeps the one that is best under sigma0 (equation 2), estimated from 100 draws.
    - against: "next" takes E_B of the next best class (all three statements); "rest" takes 1 - E_A,
      the form of the radius that CERTIFY certifies. They differ where many classes share the rest.
    - bounds: (low, high), the range that sigma is kept in; > 0. The paper's stays positive by its
      small steps alone.

    The factor 1/2 of equation 2 belongs to the radius and is kept; without it, the same steps are
    taken at half the rate. Raises ValueError naming the field.
    """

    noise: type = Gaussian
    scores: str = "softmax"
    clamp: tuple = (0.02, 0.98)
    fixed_class: bool = False
    against: str = "next"
    bounds: tuple = (0.01, 10.0)

    def __post_init__(self):
        check_choice(("softmax", "logits"), scores=self.scores)
        check_choice(("next", "rest"), against=self.against)
        if self.noise not in RADII:
            known = ", ".join(kind.__name__ for kind in RADII)
            raise ValueError(
                f"noise must be one of {known}: the search needs its radius over sigma, "
                f"an entry of lib.sigma.RADII; got {self.noise.__name__}"
            )
        for name, top in (("clamp", 1), ("bounds", np.inf)):
            pair = getattr(self, name)
            if not (isinstance(pair, tuple) and len(pair) == 2 and 0 < pair[0] < pair[1] < top):
                raise ValueError(
                    f"{name} must be (low, high), 0 < low < high < {top}; got {pair!r}"
                )

    def scores_of(self, logits):
        """Scores float32 [B, C] of logits [B, C]."""
        logits = logits.float()
        return logits.softmax(dim=1) if self.scores == "softmax" else logits

    def radius(self, scale, scores, top=None):
        """Estimated radius [B] for scales [B] and mean scores [B, C].

        - top: int64 [B], the class kept for each example, or None for the best.
        """
        if top is None:
            first, second = scores.topk(2, dim=1).values.unbind(dim=1)
        else:
            first = scores.gather(1, top[:, None])[:, 0]
            second = scores.scatter(1, top[:, None], -torch.inf).amax(dim=1)
        if self.against == "rest":
            second = 1 - first
        return RADII[self.noise](scale, first.clamp(*self.clamp), second.clamp(*self.clamp))


@dataclasses.dataclass(frozen=True)
class Ascent:
    """The options of algorithm 1 (`optimize_sigma`) on the command line.

    Raises ValueError naming the option; `steps` must be a multiple of 100.
    """

    steps: int = option(900, "Steps of the search (K of the paper), a multiple of 100.")
    lr: float = option(1e-4, "Size of a step.")
    n: int = option(1, "Noisy copies per step.")

    def __post_init__(self):
        check_draws(steps=self.steps, n=self.n)
        _check_rate(self.lr)
        if self.steps % EVERY:
            raise ValueError(
                f"steps must be a multiple of {EVERY}, after each of which the levels are kept; "
                f"got {self.steps}"
            )


def _check_rate(lr):
    if not 0 < lr < np.inf:
        raise ValueError(f"lr must be a step size > 0, such as 1e-4; got {lr!r}")


def mean_scores(network, x, scale, unit, objective):
    """Mean scores [B, C] of noisy copies x + scale * unit, differentiable in the scale.

    - network: maps images [N, ...] to logits [N, C].
    - x: images [B, ...]. scale: [B]. unit: noise of scale 1, [B, n, ...].
    """
    noisy = x[:, None] + scale.view(-1, *[1] * (unit.ndim - 1)) * unit
    scores = objective.scores_of(logits_of(network, noisy.flatten(0, 1)))
    return scores.view(*unit.shape[:2], -1).mean(dim=1)


def climb(network, x, scale, unit, lr, objective, top=None):
    """One step of algorithm 1: the scales [B] after it and the estimated radii [B] before it.

    The noise is x + scale * unit, so that the gradient of the estimate flows through the scale
    (reparameterisation). No gradient is left on the network. Arguments as for `mean_scores`,
    `Objective.radius` and `optimize_sigma`.
    """
    with torch.enable_grad():
        scale = scale.detach().requires_grad_()
        radius = objective.radius(scale, mean_scores(network, x, scale, unit, objective), top)
        (slope,) = torch.autograd.grad(radius.sum(), scale)
    return (scale.detach() + lr * slope).clamp(*objective.bounds), radius.detach()


def optimize_sigma(
    model, x, sigma0, steps, lr=1e-4, n=1, objective=None, index=None, seed=0, return_path=False,
    progress=None,
):  # fmt: skip
    """The noise level of each input that maximises its estimated radius: algorithm 1.

    Alfarra et al. 2022, section 3.4. Stochastic gradient ascent, `steps` steps of size `lr` from
    sigma0, each on n fresh noisy copies. The search proves nothing: its draws are of another stream
    than those of `ModelCounts`, and a certificate at the level found needs fresh ones. An example's
    result depends on its image, sigma0, its index and the seed, and not on the other examples.

    - model: nn.Module, not changed, or the BaseClassifier to be certified: the search then runs in
      its precision and blocks.
    - x: float32 images [B, channels, height, width] in [0, 1].
    - sigma0: the level (for Uniform: lambda) to start from, a scalar or [B], in pixels.
    - steps: K of the paper, a whole number >= 0; the paper takes 100 to 900. lr: its alpha. n:
      noisy copies a step.
    - objective: Objective, the estimate to maximise; None is the paper's, for Gaussian noise.
    - index: int [B], each example's index in its data set; default 0 .. B - 1. seed: of the noise.
    - return_path: also return float64 [steps // 100 + 1, B], the levels after 0, 100, 200, ...
      steps.
    - progress: True, False, or None, a bar on anything over a few seconds.

    Returns float64 [B] (and the path). Raises ValueError naming the argument, and where logits are
    not finite.
    """
    if isinstance(steps, bool) or not isinstance(steps, int | np.integer) or steps < 0:
        raise ValueError(f"steps must be a whole number >= 0 (0: no search); got {steps!r}")
    check_draws(n=n)
    check_choice((None, True, False), progress=progress)
    _check_rate(lr)
    search = _Search(model, x, sigma0, n, objective or Objective(), index, seed)

    def path_of(rows):
        images, scale, streams = search.start(rows)
        top = search.class_at(images, scale, streams) if search.objective.fixed_class else None
        path = [scale]
        for step in range(1, steps + 1):
            unit = search.unit(images, streams, n)
            scale, _ = climb(search.network, images, scale, unit, lr, search.objective, top)
            if step % EVERY == 0 or step == steps:
                path.append(scale)
        return torch.stack(path).double().cpu().numpy()

    path = np.concatenate(search.run(path_of, progress), axis=1)
    if not np.isfinite(path).all():
        raise ValueError(
            "model gave non-finite logits (NaN or infinity) under noise: try dtype=torch.float32"
        )
    path[0] = search.scale0  # as given, not rounded to single precision
    return (path[-1], path[: steps // EVERY + 1]) if return_path else path[-1]


def grid_search_sigma(
    model, x, sigma0, n=1, evaluations=200, high=1.0, objective=None, index=None, seed=0,
    progress=None,
):  # fmt: skip
    """The noise level of each input that is best on a grid (Alfarra et al. 2022, B, equation 4).

    The grid n/evaluations, 2 n/evaluations, ... of `high`, n noisy copies at each level:
    `evaluations` forward passes in all, as many as algorithm 1 makes forward and backward in
    evaluations / 2 steps. More copies mean a coarser grid. Level 0 of the paper's grid has radius 0
    and is left out. Arguments, errors and streams as in `optimize_sigma`; sigma0 only fixes the
    class, where the objective keeps one. Returns float64 [B].
    """
    check_draws(n=n, evaluations=evaluations)
    if n > evaluations:
        raise ValueError(
            f"n must be at most evaluations = {evaluations}, the passes of each input; got {n}"
        )
    search = _Search(model, x, sigma0, n, objective or Objective(), index, seed)
    grid = high * np.arange(1, evaluations // n + 1) * n / evaluations

    @torch.no_grad()
    def best_of(rows):
        images, scale, streams = search.start(rows)
        top = search.class_at(images, scale, streams) if search.objective.fixed_class else None
        radii = []
        for level in grid:
            levels = torch.full_like(scale, level)
            unit = search.unit(images, streams, n)
            scores = mean_scores(search.network, images, levels, unit, search.objective)
            radii.append(search.objective.radius(levels, scores, top))
        return grid[torch.stack(radii).argmax(dim=0).cpu().numpy()]

    return np.concatenate(search.run(best_of, progress))


class _Search:
    """What both searches share: the network, its blocks, each example's stream, the cores."""

    def __init__(self, model, x, sigma0, n, objective, index, seed):
        check_images(x)
        check_seed(seed)
        self.base = (
            model
            if isinstance(model, BaseClassifier)
            else BaseClassifier(model, x.shape[1:], compile=False)
        )
        if self.base.dtype == torch.int8:
            raise ValueError(
                "model must be of dtype float32 or bfloat16: an 8-bit network has no gradient. "
                "Search with one of these, and certify in int8"
            )
        self.x, self.objective, self.seed = x.detach(), objective, seed
        self.scale0 = np.broadcast_to(check_sigma(sigma0, "sigma0"), len(x)).astype(np.float64)
        low, high = objective.bounds
        if self.scale0.min() < low or self.scale0.max() > high:
            raise ValueError(
                f"sigma0 must lie in the objective's bounds {objective.bounds}; got {sigma0!r}"
            )
        self.index = np.arange(len(x)) if index is None else check_labels(index, len(x), "index")
        self.group = max(1, self.base.block // n)
        self._own = threading.local()

    def network(self, x):
        """Logits of float32 images through the network as it votes.

        Gradients pass through the rounding to its precision.
        """
        # Two passes at once must not meet in what a forward stores on its modules.
        if not hasattr(self._own, "network"):
            self._own.network = copy_with_shared_weights(self.base.network)
        x = x.to(self.base.dtype).to(memory_format=self.base.memory_format)
        return self._own.network(x)

    def start(self, rows):
        """Images, first scales and streams of some examples, on the device."""
        device = self.base.device
        scale = torch.tensor(self.scale0[rows], dtype=torch.float32, device=device)
        return self.x[rows].to(device), scale, [self._stream(i) for i in self.index[rows]]

    def _stream(self, index):
        state = np.random.SeedSequence([self.seed, int(index)], spawn_key=(PURPOSES["search"],))
        if self.base.device.type == "cpu":
            return np.random.Generator(np.random.SFC64(state))
        seed = int(state.generate_state(1, np.uint64)[0] >> 1)
        return torch.Generator(self.base.device).manual_seed(seed)

    def unit(self, images, streams, n):
        """The next n draws of noise of scale 1 for each image, [B, n, ...]."""
        zeros = torch.zeros(len(images) * n, *images.shape[1:], device=images.device)
        return (
            self.objective.noise(1.0).sample(zeros, streams).view(len(images), n, *images.shape[1:])
        )

    @torch.no_grad()
    def class_at(self, images, scale, streams):
        """The best class of each image under its first scale, from CLASS_DRAWS draws."""
        parts = [
            mean_scores(self.network, images, scale, self.unit(images, streams, 1), self.objective)
            for _ in range(CLASS_DRAWS)
        ]
        return sum(parts).argmax(dim=1)

    def run(self, work, progress):
        """The results of work(rows) for groups of examples, each a block, in order; one a core."""
        groups = np.array_split(np.arange(len(self.x)), -(-len(self.x) // self.group))
        with (
            progress_bar(len(self.x), " inputs", progress, delay=3) as bar,
            cores(1),
            ThreadPoolExecutor(
                self.base.workers, initializer=torch.set_num_threads, initargs=(1,)
            ) as pool,
        ):
            results = []
            for rows, result in zip(groups, pool.map(work, groups), strict=True):
                results.append(result)
                bar.update(len(rows))
        return results


def carry(model, x, scale, generator, steps=1, lr=1e-4, n=1, objective=None):
    """The scales [B] of a training batch after `steps` more steps of algorithm 1.

    Algorithm 2 (Alfarra et al. 2022, section 3.6) trains on noise of these levels and carries them
    on to the next epoch. The network is in eval mode for the steps, so that its batch norms do not
    learn from the search.

    - model: nn.Module in training. x: images [B, ...] as they are trained on.
    - scale: float32 [B], the levels that the last epoch left. generator: of the noise.
    """
    objective = objective or Objective()
    zeros = torch.zeros(len(x) * n, *x.shape[1:], device=x.device)
    with evaluating(model):
        for _ in range(steps):
            unit = objective.noise(1.0).sample(zeros, generator).view(len(x), n, *x.shape[1:])
            scale, _ = climb(model, x, scale, unit, lr, objective)
    return scale


@dataclasses.dataclass(frozen=True)
class SigmaPath:
    """The levels of a search, as a file holds them.

    - levels: float64 [S, B], after 0, 100, 200, ... steps. index: int64 [B], in the data set.
    - nearest: float64 [B], the l2 distance of each image to the closest other one of the file.
      Where it exceeds the sum of all two radii, a memory changes nothing.
    - header: provenance (model, data, sigma0, lr, n, seed, engine, ...), a flat dict.
    """

    levels: np.ndarray
    index: np.ndarray
    nearest: np.ndarray
    header: dict

    def at(self, steps):
        """The levels float64 [B] after a multiple of 100 steps. Raises ValueError naming steps."""
        check_choice(range(0, EVERY * len(self.levels), EVERY), steps=steps)
        return self.levels[steps // EVERY]

    def save(self, path):
        """Write the path, whole or not at all, checksummed; single precision is exact for it."""
        save_arrays(
            path,
            self.header,
            levels=self.levels.astype(np.float32),
            index=self.index.astype(np.int32),
            nearest=self.nearest,
        )


def search(
    model, name, images, index, sigma0, ascent=None, noise=Gaussian, seed=0, settings=None,
    engine=None, path=None,
):  # fmt: skip
    """Run algorithm 1 on some images of a data set and return the SigmaPath with its provenance.

    - model: nn.Module; name: what the header calls it.
    - images: float32 [N, ...] in [0, 1], the whole data set. index: int [B], those to search for.
    - sigma0: the level to start from. ascent: Ascent. noise: class of `lib.noise`. seed: of it.
    - settings: what else the header holds. engine: arguments of BaseClassifier.
    - path: of the file to write at the end; one that this search has written is left as it is.

    Raises ValueError where the file is of another search.
    """
    ascent, engine = ascent or Ascent(), engine or {}
    x = images[np.asarray(index)]
    base = BaseClassifier(model, x.shape[1:], **{"compile": False} | engine)
    options, goal = dataclasses.asdict(ascent), Objective(noise=noise)
    made = (settings or {}) | options | {"sigma0": sigma0, "seed": seed, "noise": noise.name}
    made |= {"model_sha256": model_hash(model), "data_sha256": content_hash(images)}
    if path is not None and pathlib.Path(path).exists():
        asked = {k for k, v in engine.items() if v not in (None, "auto")}
        made |= {k: v for k, v in base.settings.items() if k in asked}
        return _same_search(path, made, index)
    _, levels = optimize_sigma(
        base, x, sigma0, **options, objective=goal, index=index, seed=seed, return_path=True
    )
    header = made | base.settings | {"model": name}
    found = SigmaPath(levels, np.asarray(index), nearest_distances(x), header)
    if path is not None:
        found.save(path)
    return found


def _same_search(path, made, index):
    """The SigmaPath of a file; a ValueError where it is of another search, or of none."""
    found = load_sigma(path)
    old = {name: found.header.get(name) for name in made} | {"index": found.index.tolist()}
    new = made | {"index": np.asarray(index).tolist()}
    if old != new:
        raise ValueError(
            f"{path} was made with {changed(old, new)}: use the old setting, or give another --out"
        )
    return found


def load_sigma(path, **expected):
    """Read a SigmaPath, refusing damage and headers that do not agree with `expected`."""
    remedy = "name a file that `python -m lib sigma` wrote"
    header, arrays = load_arrays(path, remedy, ("levels", "index", "nearest"))
    old = {name: header.get(name) for name in expected}
    if old != expected:
        raise ValueError(
            f"{path} was made with {changed(old, expected)}: name the file that `python -m lib "
            "sigma` wrote for it, or search anew"
        )
    index, levels = arrays["index"].astype(np.int64), arrays["levels"].astype(np.float64)
    levels[0] = header["sigma0"]
    return SigmaPath(levels, index, arrays["nearest"], header)


def nearest_distances(x):
    """The l2 distance of each image to the closest other one, float64 [B]; infinity if alone."""
    flat = torch.as_tensor(x).reshape(len(x), -1).double()
    nearest = [
        torch.cdist(rows[None], flat[None], compute_mode="donot_use_mm_for_euclid_dist")[0]
        for rows in flat.split(64)
    ]
    return torch.cat(nearest).fill_diagonal_(torch.inf).amin(dim=1).numpy()
