"""The samplers by name: each a frozen dataclass of its options, ready for a run.

A sampler of your own is one registered class. Its fields become options of the command line:

    @register("mine")
    @dataclasses.dataclass(frozen=True)
    class Mine(Sampler):
        n: int = option(1000, "Draws.")
        first = most = property(lambda self: self.n)
        fixed = True

        def __call__(self, counts, noise):
            return my_sampler(counts, noise, self.n)
"""

import dataclasses

import numpy as np

from lib.certify import ABSTAIN, Certificates, certify
from lib.checks import check_draws, check_level
from lib.iss import KINDS, certify_iss, sample_size_map
from lib.store.registry import Registry, option

SAMPLERS = Registry("sampler")
register = SAMPLERS.register


class Sampler:
    """What a run must know of a sampler, beside its options.

    - first: draws of each example in the first stage. most: the most draws of an example.
    - fixed: whether every example takes `most` draws, whatever its votes are. Only then can the
      votes be replayed under another sampler, and the run be continued to more draws.
    - certifies: whether it makes certificates, or only records votes.
    - __call__(counts, noise): the Certificates of the examples of `counts`.
    """

    fixed = False
    certifies = True

    def describe(self):
        """The sampler as data, {"name": ..., its options}."""
        return SAMPLERS.describe(self)


@register("certify")
@dataclasses.dataclass(frozen=True)
class Certify(Sampler):
    """CERTIFY (lib.certify.certify)."""

    n0: int = option(100, "Draws that choose the class.")
    n: int = option(100_000, "Draws for the bound (the most, where the sampler decides).")
    alpha: float = option(0.001, "Failure probability per example, one-sided.")
    fixed = True

    def __post_init__(self):
        check_draws(n0=self.n0, n=self.n)
        check_level(alpha=self.alpha)

    first = property(lambda self: self.n0)
    most = property(lambda self: self.n0 + self.n)

    def __call__(self, counts, noise):
        return certify(counts, noise, self.n0, self.n, self.alpha)


@register("iss")
@dataclasses.dataclass(frozen=True)
class InputSpecific(Sampler):
    """Input-specific sampling (lib.iss.certify_iss)."""

    n0: int = option(100, "Draws that choose the class.")
    n: int = option(100_000, "Draws for the bound (the most, where the sampler decides).")
    alpha: float = option(0.001, "Failure probability per example, one-sided.")
    decline: float = option(0.05, "Radius that may be lost, or its fraction.")
    kind: str = option("absolute", "What decline is.", KINDS)
    reuse: bool = option(False, "Count the first draws again, as published (no guarantee).")

    def __post_init__(self):
        check_draws(n0=self.n0, n=self.n)
        check_level(alpha=self.alpha)
        if self.n0 > self.n:
            raise ValueError(f"n0 must be at most n = {self.n} draws; got {self.n0}")

    first = property(lambda self: self.n0)
    most = property(lambda self: self.n if self.reuse else self.n0 + self.n)

    def __call__(self, counts, noise):
        sizes = sample_size_map(self.n, self.decline, self.kind, noise, self.alpha)
        return certify_iss(counts, noise, self.n0, self.n, sizes, self.alpha, self.reuse)


@register("record")
@dataclasses.dataclass(frozen=True)
class RecordVotes(Sampler):
    """No certificate: a fixed number of votes of each example, for replay under any sampler."""

    n: int = option(100_100, "Draws for the bound (the most, where the sampler decides).")
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
