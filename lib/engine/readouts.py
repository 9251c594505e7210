"""Readouts: many answers from one pass of several networks over the same noise.

A readout says which networks vote and how. Its name is text, such as "member:0", "soft:0-4",
"hard:0,2", "weighted:0-1:0.7,0.3" or "consensus2:0-4", and `readout(name)` restores it.
"""

import dataclasses
import itertools
import re

import numpy as np
import torch

from lib.engine.classifier import BaseClassifier
from lib.ensemble import VOTES, check_vote, check_weights


@dataclasses.dataclass(frozen=True)
class Readout:
    """Which networks vote, and how: a base classifier made of several (Horvath et al. 2022).

    - members: positions of the networks, in the order in which they are asked.
    - vote: how logits are combined, a name of lib.ensemble.VOTES.
    - consensus: K of K-consensus (section 6): where the first K members choose the same class, it
      is voted for without asking the others. None: all members are asked.
    - weights: of each member where the vote is weighted, else None.

    A readout of your own is any object with `name`, `members` and `read`, and consensus None.
    Raises ValueError naming the argument.
    """

    members: tuple
    vote: str = "soft"
    consensus: int | None = None
    weights: tuple | None = None

    def __post_init__(self):
        members = tuple(self.members)
        whole = all(isinstance(i, int | np.integer) and i >= 0 for i in members)
        if not members or not whole or len(set(members)) < len(members):
            raise ValueError(f"members must be different whole numbers >= 0; got {self.members!r}")
        object.__setattr__(self, "members", tuple(map(int, members)))
        check_vote(self.vote, self.weights)
        if self.weights is not None:
            check_weights(self.weights, len(members))
            object.__setattr__(self, "weights", tuple(map(float, self.weights)))
        if self.consensus is not None and not 1 <= self.consensus <= len(members):
            raise ValueError(
                f"consensus must be from 1 to the {len(members)} members; got {self.consensus!r}"
            )

    @property
    def name(self):
        """The text that `readout` reads."""
        kind = self.vote
        if self.consensus is not None:
            kind = f"consensus{self.consensus}" + ("" if kind == "soft" else f"-{kind}")
        elif kind == "soft" and len(self.members) == 1:
            kind = "member"
        parts = [kind, _ranges(self.members)]
        if self.weights is not None:
            parts.append(",".join(map(repr, self.weights)))
        return ":".join(parts)

    @property
    def term(self):
        """What each member adds to the vote, from its logits (lib.ensemble.Vote)."""
        return VOTES[self.vote].term

    def read(self, logits):
        """Votes int64 [B] from the members' logits, float32 [k, B, C], and where K sufficed.

        The second is a bool tensor [B], or None without a consensus.
        """
        choices = None if self.consensus is None else logits.argmax(dim=-1)
        return self.read_terms(self.term(logits), choices)

    def read_terms(self, terms, choices):
        """As `read`, from the members' terms and, for a consensus, their classes, int64 [k, B].

        Other readouts of the same networks need the same ones, so a block computes them once.
        """
        votes = VOTES[self.vote].pool(terms, self.weights).argmax(dim=-1)
        if self.consensus is None:
            return votes, None
        first, agreed = self.agreement(choices)
        return torch.where(agreed, first, votes), agreed

    def agreement(self, choices):
        """The class [B] of the first member, and where the first K choose it, bool [B]."""
        first = choices[: self.consensus]
        return first[0], (first == first[0]).all(dim=0)


def readout(name):
    """The readout of a name, or the readout itself. Raises ValueError where the name has no sense.

    - name: text as in `Readout.name`, or a readout.
    """
    if not isinstance(name, str):
        return name
    kind, members, weights = ([*name.split(":"), "", ""])[:3]
    found = re.fullmatch(r"(?:consensus(\d+)(?:-([\w-]+))?|([\w-]+))", kind)
    numbers = [re.fullmatch(r"(\d+)(?:-(\d+))?", part) for part in members.split(",")]
    vote = found and (found[3] or found[2] or "soft")
    vote = "soft" if vote == "member" else vote
    if vote not in VOTES or not all(numbers) or name.count(":") > 2:
        raise ValueError(
            "readout must be a name such as member:0, soft:0-4, hard:0,2, weighted:0-1:0.7,0.3 or "
            f"consensus2:0-4, with a vote of {', '.join(VOTES)}; got {name!r}"
        )
    spans = [range(int(part[1]), int(part[2] or part[1]) + 1) for part in numbers]
    if not all(spans):
        raise ValueError(f"readout {name!r}: a span of members must not fall, such as 0-4")
    consensus = int(found[1]) if found[1] else None
    try:
        weights = tuple(map(float, weights.split(","))) if weights else None
        return Readout(tuple(itertools.chain(*spans)), vote, consensus, weights)
    except ValueError as error:
        raise ValueError(f"readout {name!r}: {error}") from error


def ensemble_readout(ensemble):
    """The readout of a lib.ensemble.Ensemble, whose votes it gives."""
    members = tuple(range(len(ensemble.members)))
    return Readout(members, ensemble.vote, ensemble.consensus, ensemble.weights)


def _part(value, j):
    """Value j of text such as "float32, bfloat16", else the value itself."""
    if not isinstance(value, str) or ", " not in value:
        return value
    part = value.split(", ")[j]
    return {"True": True, "False": False}.get(part, part)


def _without_copy(rows):
    """Row numbers as a slice where they follow each other, which indexes without a copy."""
    span = range(rows[0], rows[0] + len(rows))
    return slice(span.start, span.stop) if rows == list(span) else rows


def _ranges(members):
    """Numbers as text: (0, 1, 2, 5) is "0-2,5"."""
    parts = []
    for i in members:
        if parts and i == parts[-1][1] + 1:
            parts[-1][1] = i
        else:
            parts.append([i, i])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


class Panel:
    """Networks that vote on the same noise, and their readouts: takes a BaseClassifier's place.

    - networks: nn.Module or BaseClassifier each, of any architectures and precisions, with the same
      image shape, classes, device and block.
    - readouts: readouts or their names; one by itself makes an ordinary source of counts.
    - shape: (channels, height, width) of an image.
    - engine: arguments of BaseClassifier, for networks that are none yet. Text such as "float32,
      bfloat16" has a value for each network that votes, as in `settings`.

    Only networks that a readout names are run. Raises ValueError naming networks or readouts.
    """

    def __init__(self, networks, readouts, shape, engine):
        self.single = isinstance(readouts, str) or hasattr(readouts, "read")
        self.readouts = tuple(readout(name) for name in ([readouts] if self.single else readouts))
        names = [item.name for item in self.readouts]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"readouts must be different, and at least one; got {names}")
        self.used = sorted({i for item in self.readouts for i in item.members})
        if self.used[-1] >= len(networks):
            raise ValueError(
                f"readouts name network {self.used[-1]} of {len(networks)}, counted from 0"
            )
        self.members = []
        for j, i in enumerate(self.used):
            base = networks[i]
            if not isinstance(base, BaseClassifier):
                own = {name: _part(value, j) for name, value in engine.items()}
                base = BaseClassifier(base, shape, **own, votes=False)
                engine = engine | {"block": base.block}
            self.members.append(base.scoring())
        for name in ("shape", "device", "block", "classes"):
            values = {getattr(base, name) for base in self.members}
            if len(values) > 1:
                raise ValueError(
                    f"networks must have the same {name}; got {' and '.join(map(str, values))}"
                )
            setattr(self, name, values.pop())
        formats = {(base.input_dtype, base.memory_format) for base in self.members}
        self.dtype, self.memory_format = (
            formats.pop() if len(formats) == 1 else (torch.float32, torch.contiguous_format)
        )

    @property
    def workers(self):
        """Forward passes side by side."""
        return self.members[0].workers

    @property
    def settings(self):
        """What runs: the first network's settings, where others differ "a, b, ..." in order."""
        each = [base.settings for base in self.members]
        return {
            name: each[0][name]
            if len({part[name] for part in each}) == 1
            else ", ".join(str(part[name]) for part in each)
            for name in each[0]
        }

    def consider_compiling(self, draws):
        """As BaseClassifier's, for each network."""
        return tuple(base.consider_compiling(draws) for base in self.members)

    def empty_block(self):
        """A block of zeros, in the networks' dtype and layout if they share it, else float32."""
        return torch.zeros(
            self.block, *self.shape, dtype=self.dtype, device=self.device
        ).contiguous(memory_format=self.memory_format)

    def ballots(self, workers, compiled):
        """A ballot for each worker: calls of (block, place), then `rest`, give (place, votes)."""
        voters = zip(
            *(base.voters(workers, how) for base, how in zip(self.members, compiled, strict=True)),
            strict=True,
        )
        first = self.readouts[0]
        early = len(self.readouts) == 1 and first.consensus is not None
        early = early and first.consensus < len(first.members)
        kind = _Consensus if early else _Ballot
        return [kind(self, list(own)) for own in voters]

    def logits(self, block, voters, members):
        """Logits float32 [k, block, C] of some networks (positions in `used`) on a block."""
        # Copied at once: on a GPU the next replay of a CUDA graph may overwrite its output.
        return torch.stack(
            [self.members[j].forward(self._given(block, j), voters[j]).clone() for j in members]
        )

    def _given(self, block, j):
        member = self.members[j]
        return block.to(member.input_dtype, memory_format=member.memory_format)

    def positions(self, item):
        """Where a readout's networks stand in `used`."""
        return [self.used.index(i) for i in item.members]


class _Ballot:
    """All readouts of each block; what several of them need is computed once."""

    def __init__(self, panel, voters):
        self.panel, self.voters = panel, voters
        positions = [panel.positions(item) for item in panel.readouts]
        self.rows = [_without_copy(rows) for rows in positions]
        self.terms = {item.term for item in panel.readouts if isinstance(item, Readout)}
        consensus = [r for r, item in enumerate(panel.readouts) if item.consensus is not None]
        self.consensus = torch.tensor(consensus, dtype=torch.int64, device=panel.device)
        self.asked = torch.zeros(len(positions), len(panel.used), device=panel.device)
        for r, rows in enumerate(positions):
            self.asked[r, rows] = 1

    @torch.no_grad()
    def __call__(self, block, place):
        """[(place, votes int64 [R, block])].

        A vote is the class; `classes` where a logit is not finite; and classes + 1 more where the
        first K of a consensus did not suffice.
        """
        panel = self.panel
        logits = panel.logits(block, self.voters, range(len(panel.used)))
        terms = {term: term(logits) for term in self.terms}
        choices = logits.argmax(dim=-1) if len(self.consensus) else None
        votes, known = [], []
        for item, rows in zip(panel.readouts, self.rows, strict=True):
            if not isinstance(item, Readout):
                votes.append(item.read(logits[rows])[0])
                continue
            own = None if item.consensus is None else choices[rows]
            vote, agreed = item.read_terms(terms[item.term][rows], own)
            votes.append(vote)
            known += [] if agreed is None else [agreed]
        # 0 times a logit is NaN where it is not finite: cheaper than asking each of them.
        broken = self.asked @ ((logits * 0).sum(dim=-1) != 0).float()
        votes = torch.where(broken > 0, panel.classes, torch.stack(votes))
        if known:
            votes[self.consensus] += ~torch.stack(known) * (panel.classes + 1)
        return [(place, votes)]

    def rest(self):
        """Nothing is left over."""
        return []


class _Consensus:
    """One K-consensus: later networks run only where the first K differ, on blocks of their own."""

    def __init__(self, panel, voters):
        self.panel, self.voters, self.item = panel, voters, panel.readouts[0]
        rows = panel.positions(self.item)
        self.first, self.later = rows[: self.item.consensus], rows[self.item.consensus :]
        self.block, self.filled = panel.empty_block(), 0
        self.place = torch.zeros(panel.block, dtype=torch.int64, device=panel.device)
        self.logits = torch.zeros(len(self.first), panel.block, panel.classes, device=panel.device)

    @torch.no_grad()
    def __call__(self, block, place):
        """[(place, votes int64 [1, rows])]: those that are known by now."""
        logits = self.panel.logits(block, self.voters, self.first)
        vote, known = self.item.agreement(logits.argmax(dim=-1))
        finite = logits.isfinite().all(dim=-1).all(dim=0)
        vote, known = torch.where(finite, vote, self.panel.classes), known | ~finite
        found = [(place[known], vote[None, known])]
        open_rows = (~known).nonzero()[:, 0]
        while len(open_rows):
            some = open_rows[: self.panel.block - self.filled]
            into = slice(self.filled, self.filled + len(some))
            self.block[into], self.place[into] = block[some], place[some]
            self.logits[:, into] = logits[:, some]
            self.filled, open_rows = into.stop, open_rows[len(some) :]
            if self.filled == self.panel.block:
                found += self.rest()
        return found

    @torch.no_grad()
    def rest(self):
        """[(place, votes int64 [1, rows])] of the rows that still wait for the later networks."""
        if not self.filled:
            return []
        later = self.panel.logits(self.block, self.voters, self.later)
        vote, _ = dataclasses.replace(self.item, consensus=None).read(
            torch.cat([self.logits, later])
        )
        vote = torch.where(later.isfinite().all(dim=-1).all(dim=0), vote, self.panel.classes)
        rows, self.filled = slice(self.filled), 0
        return [(self.place[rows].clone(), vote[None, rows] + self.panel.classes + 1)]
