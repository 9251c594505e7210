"""The samplers by name: each a frozen dataclass of its options, ready for a run.

A sampler of your own is one registered class. Its fields become options of the command line:

    @register("mine")
    @dataclasses.dataclass(frozen=True)
    class Mine(Sampler):
        n: int = option(1000, "Draws.")
        alpha: float = option(0.001, "Failure probability per example, one-sided.")
        first = most = property(lambda self: self.n)
        fixed = True

        def __call__(self, counts, noise):
            return my_sampler(counts, noise, self.n, self.alpha)
"""

import dataclasses

import numpy as np
from scipy.stats import binom

from lib.adaptive import certify_anytime, certify_at
from lib.boundaries import bonferroni, certify_count, design, outcomes, two_classes
from lib.bounds import clopper_pearson_lower, clopper_pearson_upper
from lib.certify import ABSTAIN, Certificates, certify, certify_margin, certify_partition
from lib.checks import check_draws, check_level
from lib.iss import KINDS, certify_iss, failure_rate, sample_size_map
from lib.staircase import AIMS, LOOKS, certify_staircase, check_looks, failure_staircase, staircase
from lib.store.registry import Registry, option

SAMPLERS = Registry("sampler", needs=("first", "most", "__call__"))
register = SAMPLERS.register


class Sampler:
    """What a run must know of a sampler, beside its options.

    - first: draws of each example in the first stage. most: the most draws of an example.
    - fixed: whether every example takes `most` draws, whatever its votes are. Only then can the
      votes be replayed under another sampler, and the run be continued to more draws (a larger
      field `n`).
    - radii, where it decides at some: the audit tries the probabilities just below theirs.
    - certifies: whether it makes certificates, or only records votes.
    - standard: draws of the CERTIFY that reaches the same radii, for SampleRF; None: not asked.
    - failure(p, noise), where it has one: P(its bound is above the truth) for two classes, exactly:
      P(false certificate) where the radius rises strictly with p, and an upper bound of it where it
      rises in steps (Ablation).
    - __call__(counts, noise): the Certificates of the examples of `counts`.
    """

    fixed = False
    standard = None
    certifies = True

    def describe(self):
        """The sampler as data, {"name": ..., its options}."""
        return SAMPLERS.describe(self)


@dataclasses.dataclass(frozen=True)
class TwoStage(Sampler):
    """Samplers whose n0 draws choose the class, and whose other draws bound it."""

    n0: int = option(100, "Draws that choose the class.")
    n: int = option(100_000, "Draws for the bound (the most, where the sampler decides).")
    alpha: float = option(0.001, "Failure probability per example, one-sided.")

    def __post_init__(self):
        check_draws(n0=self.n0, n=self.n)
        check_level(alpha=self.alpha)

    first = property(lambda self: self.n0)
    most = property(lambda self: self.n0 + self.n)


@register("certify")
@dataclasses.dataclass(frozen=True)
class Certify(TwoStage):
    """CERTIFY (lib.certify.certify)."""

    fixed = True

    def __call__(self, counts, noise):
        return certify(counts, noise, self.n0, self.n, self.alpha)

    def failure(self, p, noise):
        """P(false certificate) for two classes, exactly: the sum over both choices of the class."""
        rates = []
        for chosen, q in _chosen(self.n0, p):
            least = certify_count(max(q, 0.5), self.n, self.alpha)
            rates.append(chosen * binom.sf(least - 1, self.n, q))
        return float(sum(rates))


@register("iss")
@dataclasses.dataclass(frozen=True)
class InputSpecific(TwoStage):
    """Input-specific sampling (lib.iss.certify_iss)."""

    decline: float = option(0.05, "Radius that may be lost, or its fraction.")
    kind: str = option("absolute", "What decline is.", KINDS)
    reuse: bool = option(False, "Count the first draws again, as published (no guarantee).")

    def __post_init__(self):
        super().__post_init__()
        if self.n0 > self.n:
            raise ValueError(f"n0 must be at most n = {self.n} draws; got {self.n0}")

    most = property(lambda self: self.n if self.reuse else self.n0 + self.n)

    def __call__(self, counts, noise):
        sizes = sample_size_map(self.n, self.decline, self.kind, noise, self.alpha)
        return certify_iss(counts, noise, self.n0, self.n, sizes, self.alpha, self.reuse)

    def failure(self, p, noise):
        """P(false certificate) for two classes, exactly."""
        sizes = sample_size_map(self.n, self.decline, self.kind, noise, self.alpha)
        return failure_rate(p, self.n0, sizes, self.reuse)


@register("record")
@dataclasses.dataclass(frozen=True)
class RecordVotes(Sampler):
    """No certificate: a fixed number of votes of each example, for replay under any sampler."""

    n: int = option(100_100, "Draws of each example.")
    fixed = True
    certifies = False

    def __post_init__(self):
        check_draws(n=self.n)

    first = most = property(lambda self: self.n)

    def __call__(self, counts, noise):
        counts.draw(self.n)
        size = len(counts)
        return Certificates(
            prediction=np.full(size, ABSTAIN),
            radius=np.zeros(size),
            p_lower=np.zeros(size),
            n=np.full(size, self.n),
        )


def _numbers(kind, **option):
    """Numbers of an option: "100,1000", one number, or several, as a tuple."""
    ((name, text),) = option.items()
    parts = text.split(",") if isinstance(text, str) else np.atleast_1d(text).tolist()
    try:
        return tuple(kind(part) for part in parts)
    except ValueError as error:
        raise ValueError(f"{name} must be numbers between commas; got {text!r}") from error


@register("margin")
@dataclasses.dataclass(frozen=True)
class Margin(TwoStage):
    """CERTIFY with the runner-up counted, without a union over classes (certify_margin)."""

    share: float = option(0.9, "Fraction of alpha for the class's own bound.")
    fixed = True

    def __post_init__(self):
        super().__post_init__()
        check_level(share=self.share)

    def __call__(self, counts, noise):
        return certify_margin(counts, noise, self.n0, self.n, self.alpha, self.share)

    def failure(self, p, noise):
        """P(false certificate) for two classes, exactly: from share 1/2 on CERTIFY at share alpha.

        There U is never below 1 - L; with a smaller share it may be.
        """
        if self.share >= 0.5:
            return Certify(self.n0, self.n, self.share * self.alpha).failure(p, noise)
        k = np.arange(self.n + 1)
        lower = clopper_pearson_lower(k, self.n, self.share * self.alpha)
        upper = clopper_pearson_upper(self.n - k, self.n, (1 - self.share) * self.alpha)
        radius = noise.radius_two(lower, np.minimum(upper, 1 - lower))
        rates = []
        for chosen, q in _chosen(self.n0, p):
            false = radius > noise.radius_two(max(q, 0.5), min(1 - q, 0.5))
            rates.append(chosen * binom.pmf(k[false], self.n, q).sum())
        return float(sum(rates))


@register("partition")
@dataclasses.dataclass(frozen=True)
class Partition(TwoStage):
    """The runner-up counted, with a union bound over groups of classes (certify_partition)."""

    merge: bool = option(True, "Group rare classes (else Bonferroni over all classes).")
    fixed = True

    def __call__(self, counts, noise):
        return certify_partition(counts, noise, self.n0, self.n, self.alpha, self.merge)

    def failure(self, p, noise):
        """P(false certificate) for two classes, exactly: two groups, so CERTIFY at alpha / 2."""
        return Certify(self.n0, self.n, self.alpha / 2).failure(p, noise)


@register("adaptive")
@dataclasses.dataclass(frozen=True)
class Adaptive(Sampler):
    """CERTIFYADP: one radius, in stages of fresh draws (lib.adaptive.certify_at)."""

    radius: str = option("0.5", "The radius to certify.")
    stages: str = option("100,1000,10000,120000", "Draws of each stage, between commas.")
    n0: int = option(100, "Draws that choose the class.")
    alpha: float = option(0.001, "Failure probability per example, one-sided.")
    beta: float = option(0.001, "Failure probability of an early abstention.")

    def __post_init__(self):
        check_draws(n0=self.n0, stages=self.sizes)
        check_level(alpha=self.alpha, beta=self.beta)
        if len(self.radii) > 1:
            raise ValueError(f"radius must be one number (a grid: anytime); got {self.radius}")
        object.__setattr__(self, "stages", ",".join(map(str, self.sizes)))
        object.__setattr__(self, "radius", repr(self.radii[0]))

    sizes = property(lambda self: _numbers(int, stages=self.stages))
    radii = property(lambda self: _numbers(float, radius=self.radius))
    first = property(lambda self: self.n0)
    most = property(lambda self: self.n0 + sum(self.sizes))

    @property
    def standard(self):
        """n0 and the n whose largest radius the last stage reaches (theorem 6.1.3)."""
        share = 1 - np.log(len(self.sizes)) / np.log(self.alpha)
        return self.n0 + int(self.sizes[-1] / share)

    def __call__(self, counts, noise):
        return certify_at(
            counts, noise, self.radii[0], self.sizes, self.alpha, self.beta, n0=self.n0
        )

    def failure(self, p, noise):
        """P(false certificate) for two classes, exactly."""
        test = bonferroni(noise.probability(self.radii[0]), self.sizes, self.alpha, self.beta)
        return sum(
            chosen * outcomes(test, q)[0].sum()
            for chosen, q in _chosen(self.n0, p)
            if q < test.null or q < 0.5
        )


@register("anytime")
@dataclasses.dataclass(frozen=True)
class Anytime(Sampler):
    """One radius, or the largest of a grid, from one stream of draws (certify_anytime)."""

    radius: str = option("0.5", "The radius to certify, or rising ones between commas.")
    n: int = option(100_000, "Draws of the CERTIFY to keep up with; up to 1.35 times as many.")
    alpha: float = option(0.001, "Failure probability per example, one-sided.")
    beta: float | None = option(None, "Failure probability of an early abstention, if promised.")
    runner_up: bool = option(False, "Count the second class, too (one radius only).")
    n0: int = option(100, "Draws that choose the class, with runner_up alone.")

    def __post_init__(self):
        check_draws(n0=self.n0, n=self.n)
        check_level(alpha=self.alpha, **({} if self.beta is None else {"beta": self.beta}))
        object.__setattr__(self, "radius", ",".join(map(repr, self.radii)))

    radii = property(lambda self: _numbers(float, radius=self.radius))
    first = property(lambda self: self.n0 if self.runner_up else min(100, self.n))
    # A cap above 1.35 n is needed for few n; the table of the radius says how much.
    most = property(lambda self: self.n0 + 2 * self.n)
    standard = property(lambda self: 100 + self.n)

    def __call__(self, counts, noise):
        radii = self.radii[0] if len(self.radii) == 1 else self.radii
        return certify_anytime(
            counts, noise, radii, self.n, self.alpha, self.beta, self.runner_up, self.n0
        )

    def failure(self, p, noise):
        """P(false certificate) for two classes, exactly; NaN for a grid or with runner_up."""
        if len(self.radii) > 1 or self.runner_up:
            return np.nan
        test = design(noise.probability(self.radii[0]), self.n, self.alpha, self.beta)
        first, second, _ = two_classes(test, p).sum(axis=1)
        return sum(s for s, q in ((first, p), (second, 1 - p)) if q < test.null or q < 0.5)


@register("staircase")
@dataclasses.dataclass(frozen=True)
class Staircase(TwoStage):
    """The largest radius, with few draws where more would hardly raise it (certify_staircase)."""

    price: float = option(0.3, "Of n draws, in radius / sigma: saves draws, costs radius.")
    looks: int = option(LOOKS, "Looks at the votes, at most n.")
    aim: str = option("acr", "Save draws for the radius of right images, or of all.", AIMS)

    def __post_init__(self):
        super().__post_init__()
        check_looks(self.n, self.looks)

    shape = property(lambda self: (self.price, self.looks, self.aim))

    most = standard = property(lambda self: self.n0 + self.n)

    def __call__(self, counts, noise):
        return certify_staircase(counts, noise, self.n0, self.n, self.alpha, *self.shape)

    def failure(self, p, noise):
        """P(false certificate) for two classes, exactly."""
        steps = staircase(self.n, self.alpha, *self.shape)
        return sum(s * failure_staircase(*steps, self.alpha, q) for s, q in _chosen(self.n0, p))


def _chosen(n0, p):
    """((P(the first of two classes is chosen), p), (the second, 1 - p)); a tie names the first."""
    second = float(binom.cdf((n0 - 1) // 2, n0, p))
    return (1 - second, p), (second, 1 - p)
