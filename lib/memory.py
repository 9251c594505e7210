"""Memory-based certification of a data-dependent classifier (Alfarra et al. 2022, algorithm 3).

The source is section 3.5 and appendix C of the paper.

A classifier that chooses its noise level for each input isn't constant on the ball that one level
certifies: inside it, another input has another level. The paper's remedy is a memory of all answers
given so far: a new answer is changed where it would contradict one of them.

What this covers: the classifier together with its history. After any sequence of `add`, no two
remembered balls of different classes meet, so every later answer inside a remembered ball is that
ball's class, or an abstention where the answer given to `add` is one (`query` names the ball's
class then, too), as long as the memory is kept and is asked each time. It does not make the
function from images to classes robust: with another history the same image may get another class,
and whoever chooses the order of the queries chooses among these answers (Sukenik et al. 2022).
"""

import dataclasses
import math
import pathlib

import numpy as np

from lib.certify import ABSTAIN
from lib.checks import check_choice
from lib.store.files import read_bytes, sha256
from lib.store.records import load_arrays, save_arrays

BLOCK, COLUMNS = 128, 4096  # new and remembered points compared at a time: 2 MB
CELLS = 64  # averages over cells of an image, at most, by which far pairs are told apart
SLACK = 2e-5  # of squared lengths: above the rounding of CELLS + 3 single-precision terms
ROUNDING = 1e-12  # of a distance: above the rounding of a double-precision norm of 10^6 terms


class CertificateMemory:
    """All answers given so far, and the largest consistent answer for the next input.

    Invariant: the open balls of two remembered points of different classes don't intersect, and no
    remembered point lies in a ball of another class. Radii are rounded down, never up. Takes the
    bytes of each point and about 300 more.

    `add` and `add_all` remember answers and return them adjusted, `query` asks without adding,
    `save` writes the memory to a folder and `CertificateMemory.load` reads it; `predictions` and
    `radii` are what is remembered.

    - norm: "l2" or "l1", of the radii, in pixels.

    Raises ValueError naming norm.
    """

    def __init__(self, norm="l2"):
        check_choice(("l2", "l1"), norm=norm)
        self.norm, self.shape = norm, None
        self._points, self._saved = [], {None: 0}  # points up to the end of each part, by checksum
        self._keys = np.empty((0, 0), dtype=np.float32)
        self._classes, self._radii = np.empty(0, dtype=np.int64), np.empty(0)

    def __len__(self):
        return len(self._points)

    @property
    def predictions(self):
        """Remembered classes, int64 [N], in the order of their arrival."""
        return self._classes[: len(self)].copy()

    @property
    def radii(self):
        """Remembered radii, float64 [N]."""
        return self._radii[: len(self)].copy()

    def add(self, x, prediction, radius):
        """Remember one answer and return it, as (class, radius), adjusted to the earlier ones.

        Let d be the distance to a remembered ball of another class and radius R_i. Inside it (d <
        R_i, or d = 0), the answer becomes its class and min(radius, R_i - d), with the smallest R_i
        - d where several balls contain x. Otherwise the radius becomes at most d - R_i, for each
        such ball. An abstention is returned as it is and not remembered.

        - x: one point, an array of any shape, the same for all. prediction: class >= 0, or ABSTAIN.
          radius: finite, >= 0.

        Raises ValueError naming the argument.
        """
        classes, radii = self._add(np.asarray(x)[None], [prediction], [radius])
        return int(classes[0]), float(radii[0])

    def add_all(self, x, certificates):
        """`add` for each example in order. Returns the adjusted Certificates.

        - x: points [B, ...]. certificates: Certificates of these B examples.
        """
        classes, radii = self._add(np.asarray(x), certificates.prediction, certificates.radius)
        return dataclasses.replace(certificates, prediction=classes, radius=radii)

    def query(self, x):
        """What is remembered at points x [B, ...]: classes int64 [B] and radii float64 [B].

        The class of the ball that holds the point and the distance to its edge (the largest, of
        several balls); ABSTAIN and 0 outside all balls. Nothing is added.
        """
        points = self._check_points(np.asarray(x))
        classes, margins = np.full(len(points), ABSTAIN), np.zeros(len(points))
        keys = self._swapped(_keys(points, np.zeros(len(points))))
        for i, near in self._near(keys, np.full(len(points), len(self))):
            margin = self._radii[near] - self._distances(points[i], near) * (1 + ROUNDING)
            if margin.max() > 0:
                classes[i], margins[i] = self._classes[near[margin.argmax()]], margin.max()
        return classes, margins

    def save(self, folder):
        """Write what is not yet in `folder` as its next part.

        A part is a checksummed file that is there whole or not at all. It holds the checksum of the
        part before it, so that parts of two memories are not taken for one.

        Raises ValueError where this memory neither wrote nor loaded the folder's last part.
        """
        folder = pathlib.Path(folder)
        parts = _parts(folder)
        before = _checksum(parts[-1]) if parts else None
        if before not in self._saved:
            raise ValueError(
                f"{parts[-1]} is not of this memory, or damaged: give another folder, or add to "
                "the memory that CertificateMemory.load reads there"
            )
        start, stop = self._saved[before], len(self)
        if stop == start:
            return
        path = folder / f"part-{start:09d}.npz"
        header = {"norm": self.norm, "start": start, "shape": list(self.shape), "before": before}
        points = np.stack(self._points[start:stop])
        classes, radii = self._classes[start:stop], self._radii[start:stop]
        save_arrays(path, header, points=points, classes=classes, radii=radii)
        self._saved[_checksum(path)] = stop

    @classmethod
    def load(cls, folder):
        """The memory that `save` left in a folder.

        Raises ValueError where a part is damaged, missing or of another memory.
        """
        parts = _parts(folder)
        if not parts:
            raise FileNotFoundError(
                f"{folder} holds no part of a memory: name one that CertificateMemory.save wrote"
            )
        memory, before = None, None
        for path in parts:
            header, arrays = load_arrays(path, "name a part of a memory")
            memory = memory or cls(header["norm"])
            if (header["start"], header.get("before")) != (len(memory), before):
                raise ValueError(
                    f"{path} does not follow the parts before it, which hold {len(memory)} points: "
                    "restore the missing part, or the one of this memory"
                )
            memory._append(arrays["points"], arrays["classes"], arrays["radii"])
            before = _checksum(path)
            memory._saved[before] = len(memory)
        return memory

    def _add(self, x, classes, radii):
        points = self._check_points(x)
        classes, radii = _check_answers(classes, radii, len(points))
        sure = np.flatnonzero(classes != ABSTAIN)
        for start in range(0, len(sure), BLOCK):
            rows = sure[start : start + BLOCK]
            # All of a block enter as they are; each is then settled with those before it. Radii
            # only ever shrink, so that no pair that will meet is missed.
            new = np.arange(len(self), len(self) + len(rows))
            self._append(points[rows], classes[rows], radii[rows])
            for i, near in self._near(self._swapped(self._keys[new]), new):
                self._settle(new[i], near)
            classes[rows], radii[rows] = self._classes[new], self._radii[new]
        return classes, radii

    def _settle(self, new, near):
        """Algorithm 3 for one new point and the remembered ones that may be close to it."""
        near = near[self._classes[near] != self._classes[new]]
        if not len(near):
            return
        distance, radii = self._distances(self._points[new], near), self._radii[near]
        # On the edge itself, inside is the safe side: the class of the ball, and radius 0.
        inside = (distance * (1 - ROUNDING) < radii) | (distance == 0)
        margin = np.where(
            inside, radii - distance * (1 + ROUNDING), distance * (1 - ROUNDING) - radii
        )
        if inside.any():
            owner = self._classes[near[np.where(inside, margin, -np.inf).argmax()]]
            inside &= self._classes[near] == owner
            self._classes[new], margin = owner, margin[inside]
        self._radii[new] = max(0.0, min(self._radii[new], margin.min()))

    def _near(self, keys, before):
        """For each row of keys, the points before `before` whose balls may meet its own.

        All that do, and a few more. Rows without any are left out.
        """
        for first in range(0, len(keys), BLOCK):
            found = []
            block, limit = keys[first : first + BLOCK], before[first : first + BLOCK]
            for start in range(0, int(limit.max(initial=0)), COLUMNS):
                stored = self._keys[start : min(start + COLUMNS, int(limit.max()))]
                # Not "at least 0": beyond single precision (1e19) the product is NaN.
                row, column = np.divmod(np.flatnonzero(~(block @ stored.T < 0)), len(stored))
                keep = column + start < limit[row]
                found.append((row[keep], column[keep] + start))
            if found:
                rows, columns = (np.concatenate(part) for part in zip(*found, strict=True))
                order = np.argsort(rows, kind="stable")
                ends = np.searchsorted(rows[order], np.arange(len(block) + 1))
                for row in np.flatnonzero(np.diff(ends)):
                    yield first + int(row), columns[order[ends[row] : ends[row + 1]]]

    def _distances(self, x, near):
        """Distances float64 [n] in the memory's norm between a point and remembered points."""
        result = np.empty(len(near))
        for start in range(0, len(near), COLUMNS // 4):
            part = slice(start, start + COLUMNS // 4)
            others = np.stack([self._points[i] for i in near[part]]).astype(np.float64)
            difference = (others - x.astype(np.float64)).reshape(len(others), -1)
            if self.norm == "l1":
                result[part] = np.abs(difference).sum(axis=1)
            else:
                result[part] = np.sqrt((difference**2).sum(axis=1))
        return result

    def _append(self, points, classes, radii):
        size, keys = len(self), _keys(points, radii)
        if size + len(points) > len(self._radii):
            room = max(2 * len(self._radii), size + len(points), 1024)
            self._keys = _grown(self._keys.reshape(-1, keys.shape[1]), size, room)
            self._classes, self._radii = (
                _grown(self._classes, size, room),
                _grown(self._radii, size, room),
            )
        new = slice(size, size + len(points))
        self._keys[new], self._classes[new], self._radii[new] = keys, classes, radii
        self._points.extend(points.copy())
        self.shape = points.shape[1:]

    @staticmethod
    def _swapped(keys):
        """Keys of the points that ask, as against the keys of those that are asked."""
        return np.concatenate([keys[:, :-2], keys[:, :-3:-1]], axis=1)

    def _check_points(self, x):
        if x.dtype not in (np.float32, np.float64) or x.ndim < 2 or not np.isfinite(x).all():
            raise ValueError(
                f"x must be finite float32 or float64, [B, ...]; got shape {x.shape} of {x.dtype}"
            )
        if self.shape not in (None, x.shape[1:]):
            raise ValueError(
                f"x must have shape {self.shape}, as the points remembered; got {x.shape[1:]}"
            )
        return x


def _parts(folder):
    return sorted(pathlib.Path(folder).glob("part-*.npz"))


def _checksum(path):
    return sha256(read_bytes(path, "name a part of a memory"))


def _check_answers(classes, radii, size):
    classes, radii = np.array(classes), np.array(radii, dtype=np.float64)
    if (
        classes.shape != (size,)
        or classes.dtype.kind not in "iu"
        or classes.min(initial=0) < ABSTAIN
    ):
        raise ValueError(
            f"prediction must be a class >= 0 or ABSTAIN for each of {size} points; got {classes!r}"
        )
    if radii.shape != (size,) or not np.isfinite(radii).all() or (radii < 0).any():
        raise ValueError(
            f"radius must be finite and >= 0, one for each of {size} points; got {radii!r}"
        )
    return classes.astype(np.int64), radii


def _keys(points, radii):
    """Vectors float32 [B, cells + 3] whose products show which balls are too far apart to meet.

    For sums a over cells of an image, each divided by the root of its size, |a - b| <= |x - y|
    (Cauchy-Schwarz), in l2 and so in l1. Balls meet only where |a - b|^2 <= (r + s)^2, that is 2ab
    + 2rs - (|a|^2 - r^2) - (|b|^2 - s^2) >= 0: one product of two vectors.
    """
    cells, radii = _cell_sums(points.astype(np.float64)), np.asarray(radii)[:, None]
    edge = (cells**2).sum(axis=1, keepdims=True) * (1 - SLACK) - radii**2 * (1 + SLACK)
    parts = [math.sqrt(2) * cells, math.sqrt(2) * radii, -edge, np.ones_like(edge)]
    return np.concatenate(parts, axis=1).astype(np.float32)


def _cell_sums(points):
    """Sums over cells of b x b pixels, each divided by the root of the cell's size: [B, cells].

    At most CELLS of them, or one for each channel where there are more channels.
    """
    shape = (1, 1, *points.shape[1:])[-3:] if points.ndim <= 4 else (1, 1, -1)
    points = points.reshape(len(points), *shape)
    step = 1
    while points[0, :, ::step, ::step].size > CELLS and step < max(points.shape[2:]):
        step *= 2
    for axis in (2, 3):
        starts = np.arange(0, points.shape[axis], step)
        sizes = np.diff(np.append(starts, points.shape[axis])).reshape(-1, *[1] * (3 - axis))
        points = np.add.reduceat(points, starts, axis=axis) / np.sqrt(sizes)
    return points.reshape(len(points), -1)


def _grown(array, size, room):
    larger = np.empty((room, *array.shape[1:]), dtype=array.dtype)
    larger[:size] = array[:size]
    return larger
