"""The memory against a brute-force reference, its invariant, and where the listing differs."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy.special import ndtr, ndtri

from lib import memory as module
from lib.certify import ABSTAIN, Certificates
from lib.memory import CertificateMemory, _cell_sums


def certificates(classes, radii):
    size = len(classes)
    return Certificates(
        np.asarray(classes), np.asarray(radii, float), np.zeros(size), np.zeros(size, int)
    )


def distance(x, y, norm):
    return np.linalg.norm((x - y).astype(np.float64).ravel(), 1 if norm == "l1" else 2)


def reference(points, classes, radii, norm):
    """Algorithm 3, one pair at a time, without rounding."""
    memory, answers = [], []
    for x, label, radius in zip(points, classes, radii, strict=True):
        if label != ABSTAIN:
            others = [(distance(x, y, norm), c, r) for y, c, r in memory if c != label]
            inside = [(r - d, c) for d, c, r in others if d < r or d == 0]
            if inside:
                label = max(inside)[1]
                radius = max(0.0, min([radius, *(m for m, c in inside if c == label)]))
            else:
                radius = max(0.0, min([radius, *(d - r for d, c, r in others)]))
            memory.append((x, label, radius))
        answers.append((label, radius))
    return np.array([a[0] for a in answers]), np.array([a[1] for a in answers])


def crowd(seed, dimension, size=300, norm="l2"):
    """Answers most of which meet, with equal points, zero radii and abstentions among them."""
    rng = np.random.default_rng(seed)
    points = rng.random((size, dimension))
    points[size // 2 :: 7] = points[rng.integers(0, size // 2, len(points[size // 2 :: 7]))]
    classes = rng.integers(-1, 4, size)
    scale = 0.15 * dimension ** (0.5 if norm == "l2" else 1.0)
    radii = np.where(rng.random(size) < 0.1, 0.0, rng.exponential(scale, size))
    return points, classes, np.where(classes == ABSTAIN, 0.0, radii)


def check_invariant(points, classes, radii, norm):
    """Over all pairs: balls of different classes do not meet, nor is a point in one of them."""
    sure = np.flatnonzero(classes != ABSTAIN)
    points, classes, radii = points[sure], classes[sure], radii[sure]
    flat = points.reshape(len(points), -1).astype(np.float64)
    apart = flat[:, None] - flat
    apart = np.abs(apart).sum(2) if norm == "l1" else np.sqrt((apart**2).sum(2))
    differ = classes[:, None] != classes
    assert ((radii[:, None] + radii <= apart) | ~differ).all()
    assert ((apart > 0) | ~differ).all()


@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize("dimension", [1, 2, 5, 64, 200])
def test_agrees_with_the_reference_and_keeps_the_invariant(norm, dimension):
    points, classes, radii = crowd(dimension, dimension, norm=norm)
    found = CertificateMemory(norm).add_all(points, certificates(classes, radii))
    expected, reach = reference(points, classes, radii, norm)
    assert (found.prediction == expected).all()
    # The reference does not round; each radius passes its rounding on to the next.
    np.testing.assert_allclose(found.radius, reach, atol=1e-9)
    assert (found.prediction != classes).any()
    assert (found.radius < radii).any()
    check_invariant(points, found.prediction, found.radius, norm)


POINTS = arrays.arrays(
    np.float64, st.tuples(st.integers(2, 12), st.just(2)), elements=st.integers(0, 4)
)


@settings(max_examples=100)
@given(POINTS, st.data())
def test_invariant_on_touching_balls(points, data):
    """Integer coordinates and radii: balls that touch exactly, equal points, points on an edge."""
    size = len(points)
    classes = np.array(data.draw(st.lists(st.integers(-1, 2), min_size=size, max_size=size)))
    radii = np.array(data.draw(st.lists(st.integers(0, 3), min_size=size, max_size=size)), float)
    norm = data.draw(st.sampled_from(["l1", "l2"]))
    found = CertificateMemory(norm).add_all(points, certificates(classes, radii))
    assert (found.radius <= radii).all()
    assert ((found.prediction == ABSTAIN) == (classes == ABSTAIN)).all()
    check_invariant(points, found.prediction, found.radius, norm)


def test_one_by_one_in_blocks_and_together_are_the_same():
    points, classes, radii = crowd(3, 8, size=200)
    together = CertificateMemory().add_all(points, certificates(classes, radii))
    memory = CertificateMemory()
    for i in range(len(points)):
        expected = together.prediction[i], together.radius[i]
        assert memory.add(points[i], classes[i], radii[i]) == expected
    assert len(memory) == (classes != ABSTAIN).sum()


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_the_sizes_of_its_blocks_change_no_answer(norm, monkeypatch):
    """Few points at a time, so that these meet many blocks, as thousands of points do."""
    points, classes, radii = crowd(4, 8, norm=norm)
    given, asked = certificates(classes, radii), points[::3] + 0.02
    expected = CertificateMemory(norm).add_all(points, given)
    monkeypatch.setattr(module, "BLOCK", 4)
    monkeypatch.setattr(module, "COLUMNS", 12)
    memory = CertificateMemory(norm)
    found = memory.add_all(points, given)
    np.testing.assert_array_equal(found.prediction, expected.prediction)
    np.testing.assert_array_equal(found.radius, expected.radius)
    answers, margins = memory.query(asked)
    for x, answer, margin in zip(asked, answers, margins, strict=True):
        inside = memory.radii - [distance(x, y, norm) for y in points[classes != ABSTAIN]]
        assert margin == pytest.approx(max(inside.max(), 0), abs=1e-9)
        assert answer == (memory.predictions[inside.argmax()] if margin > 0 else ABSTAIN)
    assert 20 < (answers != ABSTAIN).sum() < 80


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
@pytest.mark.parametrize("scale", [1e-30, 1e18, 1e25])
def test_points_of_any_scale_keep_the_invariant(scale):
    memory = CertificateMemory("l2")
    assert memory.add(np.array([scale, 0.0]), 0, 0.9 * scale) == (0, 0.9 * scale)
    assert memory.add(np.array([1.5 * scale, 0.0]), 1, scale)[0] == 0
    assert memory.query(np.array([[1.5 * scale, 0.0]]))[0] == 0


def test_a_memory_that_has_grown_forgets_nothing():
    """More points than it first has room for: all are still there, and still kept apart."""
    points, classes, radii = crowd(6, 2, size=1500)
    radii, memory = radii / 10, CertificateMemory()
    found = memory.add_all(points, certificates(classes, radii))
    sure = classes != ABSTAIN
    assert sure.sum() > 1024
    np.testing.assert_array_equal(memory.predictions, found.prediction[sure])
    np.testing.assert_array_equal(memory.radii, found.radius[sure])
    check_invariant(points, found.prediction, found.radius, "l2")
    held = sure & (found.radius > 0)
    answers, margins = memory.query(points[held])
    np.testing.assert_array_equal(answers, found.prediction[held])
    assert (margins >= found.radius[held] * (1 - 1e-9)).all()


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 8, 8), (3, 7, 5), (300,), (100, 2, 2)])
def test_cells_never_exceed_a_distance(shape):
    """The filter of far pairs is a lower bound, for images and for vectors."""
    x, y = np.random.default_rng(0).random((2, 50, *shape))
    lower = np.linalg.norm(_cell_sums(x) - _cell_sums(y), axis=1)
    assert (lower <= np.linalg.norm((x - y).reshape(50, -1), axis=1) * (1 + 1e-12)).all()
    smooth = np.ones((1, *shape))
    np.testing.assert_allclose(np.linalg.norm(_cell_sums(smooth)), np.linalg.norm(smooth))


def line(*answers, norm="l2"):
    """A memory of balls on the real line: (centre, class, radius) each."""
    memory = CertificateMemory(norm)
    for centre, label, radius in answers:
        assert memory.add(np.array([float(centre)]), label, radius) == (label, radius)
    return memory


def near(value):
    return pytest.approx(value, abs=1e-10)


def test_scenarios_of_figure_2():
    at = np.array
    assert line((0, 0, 1.0)).add(at([0.5]), 0, 2.0) == (
        0,
        2.0,
    )  # left: the same class, nothing changes
    assert line((0, 0, 1.0)).add(at([0.5]), 1, 2.0) == (0, near(0.5))  # middle: inside
    assert line((0, 0, 1.0)).add(at([1.5]), 1, 2.0) == (1, near(0.5))  # right: the balls overlap
    assert line((0, 0, 1.0)).add(at([4.0]), 1, 2.0) == (1, 2.0)  # far apart


def listing(memory, x, label, radius):
    """The paper's listing (appendix C) with its syntax mended: its rule for one new point.

    As printed it unpacks torch.min of a vector and indexes lists with tensors: the first overlap
    ends it.
    """
    for y, c, r in memory:
        if torch.equal(x, y):
            return c, r
    if not memory:
        return label, radius
    apart = torch.stack([torch.linalg.norm(x - y) for y, _, _ in memory])
    classes, radii = (
        torch.tensor([c for _, c, _ in memory]),
        torch.tensor([r for _, _, r in memory]),
    )
    meet = (apart < radii + radius) & (classes != label)
    if meet.any():
        gap, at = (apart - radii)[meet].min(dim=0)
        if gap < 0:
            label = int(classes[meet][at])
        radius = abs(float(gap))
    return label, radius


def both(stored, x, label, radius):
    """The answers of the library and of the listing to one new point."""
    memory = [(torch.tensor([float(c)]), k, r) for c, k, r in stored]
    theirs = listing(memory, torch.tensor([float(x)]), label, radius)
    return line(*stored).add(np.array([float(x)]), label, radius), theirs


def test_listing_gives_a_larger_radius_inside_a_ball():
    """It forgets min(R_new, .): radius 0.9 where the new certificate reached 0.1 only."""
    ours, theirs = both([(0, 0, 1.0)], 0.1, 1, 0.1)
    assert ours == (0, near(0.1))
    assert theirs == (0, pytest.approx(0.9))


def test_listing_takes_the_largest_of_two_balls():
    ours, theirs = both([(0, 0, 1.0), (0.5, 0, 3.0)], 0.25, 1, 5.0)
    assert ours == (0, near(0.75))
    assert theirs == (0, pytest.approx(2.75))


def test_listing_answers_an_equal_point_from_the_memory():
    """Algorithm 3 doesn't: of the same class it keeps the new radius."""
    ours, theirs = both([(0, 0, 1.0)], 0, 0, 2.0)
    assert ours == (0, 2.0)
    assert theirs == (0, 1.0)
    assert both([(0, 0, 1.0)], 0, 1, 2.0) == ((0, near(1.0)), (0, 1.0))


def test_listing_counts_abstentions_as_a_class():
    ours, theirs = both([(0, 0, 1.0)], 0.5, ABSTAIN, 0.0)
    assert ours == (ABSTAIN, 0.0)
    assert theirs == (0, pytest.approx(0.5))
    memory = CertificateMemory()
    assert memory.add(np.array([0.0]), ABSTAIN, 0.0) == (ABSTAIN, 0.0)
    assert len(memory) == 0
    assert memory.add(np.array([0.1]), 0, 1.0) == (0, 1.0)
    stored = [(torch.tensor([0.0]), ABSTAIN, 0.0)]
    assert listing(stored, torch.tensor([0.1]), 0, 1.0) == (0, pytest.approx(0.1))


def test_listing_contradicts_a_stored_answer_of_radius_0():
    """An equal point keeps its class, at radius 0 too; a ball of another class stops short."""
    ours, _ = both([(0, 0, 0.0)], 0.5, 1, 2.0)
    assert ours == (1, near(0.5))
    assert line((0, 0, 0.0)).add(np.array([0.0]), 1, 2.0) == (0, 0.0)


def test_listing_measures_in_single_precision():
    """Its distance is rounded; ours never lets two balls overlap."""
    rng = np.random.default_rng(0)
    x, y = rng.random((2, 3, 32, 32), dtype=np.float32)
    exact = float(np.sqrt(((x.astype(np.float64) - y) ** 2).sum()))
    memory = CertificateMemory()
    memory.add(x, 0, 1.0)
    _, radius = memory.add(y, 1, 1e3)
    assert exact - 1.0 - 1e-10 < radius <= exact - 1.0
    theirs = listing([(torch.from_numpy(x), 0, 1.0)], torch.from_numpy(y), 1, 1e3)[1]
    assert abs(theirs - (exact - 1.0)) > 1e-9


def test_an_edge_counts_as_inside_with_radius_0():
    assert line((0, 0, 1.0)).add(np.array([1.0]), 1, 0.5) == (0, 0.0)
    assert line((0, 0, 1.0)).add(np.array([1.0 + 1e-6]), 1, 0.5) == (1, near(1e-6))


def test_two_histories_answer_differently_and_the_order_is_an_attack():
    """The guarantee is of the classifier with its history: the same answers in another order."""
    point, left, right = np.array([0.5]), (np.array([0.0]), 0, 0.6), (np.array([1.0]), 1, 0.6)
    first, second = CertificateMemory(), CertificateMemory()
    assert [first.add(*a) for a in (left, right)] == [(0, 0.6), (1, near(0.4))]
    assert [second.add(*a) for a in (right, left)] == [(1, 0.6), (0, near(0.4))]
    assert first.query(point[None])[0] == [0]
    assert second.query(point[None])[0] == [1]
    # The point's own answer is class 1 in both; who asks for `left` first turns it into class 0.
    assert first.add(point, 1, 0.3)[0] == 0
    assert second.add(point, 1, 0.3)[0] == 1


def test_query():
    memory = line((0, 0, 1.0), (0.5, 0, 0.7), (3, 1, 1.0))
    classes, radii = memory.query(np.array([[0.4], [3.5], [1.9], [2.0]]))
    assert classes.tolist() == [0, 1, ABSTAIN, ABSTAIN]
    np.testing.assert_allclose(radii, [0.6, 0.5, 0, 0], atol=1e-9)
    assert len(memory) == 3
    assert CertificateMemory().query(np.zeros((2, 5)))[0].tolist() == [ABSTAIN, ABSTAIN]


def test_saved_in_parts_and_read_back(tmp_path):
    points, classes, radii = crowd(5, 6, size=120)
    given, folder = certificates(classes, radii), tmp_path / "memory"
    whole = CertificateMemory("l1").add_all(points, given)
    memory, parts = CertificateMemory("l1"), [slice(0, 50), slice(50, 51), slice(51, 120)]
    fields = [f.name for f in dataclasses.fields(Certificates)]
    for part in parts:
        piece = Certificates(*(getattr(given, name)[part] for name in fields))
        found = memory.add_all(points[part], piece)
        assert (found.radius == whole.radius[part]).all()
        memory.save(folder)
        memory.save(folder)  # nothing new: nothing is written
        memory = CertificateMemory.load(folder)
        assert memory.norm == "l1"
    assert (memory.predictions == whole.prediction[classes != ABSTAIN]).all()
    assert (memory.radii == whole.radius[classes != ABSTAIN]).all()
    files = sorted(folder.iterdir())
    assert [file.suffix for file in files] == [".npz"] * 3
    kept = files[1].read_bytes()
    files[1].write_bytes(kept[:-100] + b"x" + kept[-99:])
    with pytest.raises(ValueError, match="damaged"):
        CertificateMemory.load(folder)
    files[1].unlink()
    with pytest.raises(ValueError, match="missing part"):
        CertificateMemory.load(folder)
    with pytest.raises(FileNotFoundError, match="no part of a memory"):
        CertificateMemory.load(tmp_path / "nowhere")


def test_parts_of_two_memories_are_not_mixed(tmp_path):
    """Neither by a save into the folder of another memory, nor by copies of its files."""
    first, second = line((0, 0, 1.0), (9, 0, 1.0)), line((3, 1, 1.0), (5, 1, 1.0))
    first.save(tmp_path / "first")
    first.add(np.array([4.0]), 0, 5.0)
    first.save(tmp_path / "first")
    with pytest.raises(ValueError, match="not of this memory"):
        second.save(tmp_path / "first")
    assert CertificateMemory.load(tmp_path / "first").radii.tolist() == [1.0, 1.0, 5.0]
    second.save(tmp_path / "second")
    foreign, place = (tmp_path / name / "part-000000000.npz" for name in ("second", "first"))
    place.write_bytes(foreign.read_bytes())
    with pytest.raises(ValueError, match="does not follow the parts before it"):
        CertificateMemory.load(tmp_path / "first")


def test_a_part_that_another_process_added_is_not_overwritten(tmp_path):
    line((0, 0, 1.0)).save(tmp_path)
    one, other = (CertificateMemory.load(tmp_path) for _ in range(2))
    one.add(np.array([3.0]), 1, 1.0)
    one.save(tmp_path)
    other.add(np.array([3.0]), 2, 1.0)
    with pytest.raises(ValueError, match="not of this memory"):
        other.save(tmp_path)
    assert CertificateMemory.load(tmp_path).predictions.tolist() == [0, 1]


def test_saved_to_a_second_folder_the_memory_is_whole_there(tmp_path):
    memory = line((0, 0, 1.0))
    for folder in (tmp_path / "first", tmp_path / "second"):
        memory.save(folder)
        memory.add(np.array([9.0]), 1, 1.0)
        memory.save(folder)
        assert len(CertificateMemory.load(folder)) == len(memory)
    memory.save(tmp_path / "first")
    assert len(CertificateMemory.load(tmp_path / "first")) == 3


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"x": np.zeros(3, int)}, "x must"),
        ({"x": np.full(3, np.nan)}, "x must"),
        ({"x": np.zeros(4)}, "x must have shape"),
        ({"prediction": -2}, "prediction must"),
        ({"prediction": 0.5}, "prediction must"),
        ({"radius": -1.0}, "radius must"),
        ({"radius": np.inf}, "radius must"),
    ],
)
def test_refuses_bad_input(change, name):
    memory = CertificateMemory()
    memory.add(np.zeros(3), 0, 1.0)
    with pytest.raises(ValueError, match=name):
        memory.add(**{"x": np.ones(3), "prediction": 1, "radius": 1.0} | change)
    with pytest.raises(ValueError, match="norm"):
        CertificateMemory("linf")
    assert len(memory) == 1


def islands(at):
    """Equation 2 on a line, exactly: class 0 left of 0 and from .5 to .6, else class 1."""
    grid = np.r_[0.02, np.linspace(0.02, 1.5, 1500)]
    zero = ndtr(-at / grid) + ndtr((0.6 - at) / grid) - ndtr((0.5 - at) / grid)
    label = int(zero[0] < 0.5)
    return np.array([at]), label, (grid * ndtri(zero) * (1 - 2 * label)).max()


def test_who_chooses_the_order_changes_a_later_prediction():
    """A classifier computed exactly: asked about 1.2 first, it calls .55 class 1, else 0."""
    island, right = islands(0.55), islands(1.2)
    assert island[1] == 0
    assert right[1] == 1
    assert right[2] > 0.65
    honest, attacked = CertificateMemory(), CertificateMemory()
    assert honest.add(*island) == (0, island[2])
    attacked.add(*right)
    assert attacked.add(*island)[0] == 1
    # The other way round, the answer at 1.2 loses most of its radius instead.
    assert honest.add(*right) == (1, near(0.65 - island[2]))
