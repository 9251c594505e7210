"""Many readouts of several networks from one pass, against votes counted one by one in NumPy."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from lib.adaptive import certify_anytime, certify_at
from lib.certify import certify, certify_margin, certify_partition, predict
from lib.counts import RecordedCounts
from lib.engine import classifier, jobs
from lib.engine.classifier import BaseClassifier
from lib.engine.live import ModelCounts
from lib.engine.readouts import Readout, readout
from lib.ensemble import VOTES, Ensemble
from lib.iss import certify_iss, sample_size_map
from lib.noise import CHUNK, Gaussian, noise_stream
from lib.samplers import Certify, InputSpecific, RecordVotes
from lib.staircase import certify_staircase
from lib.store.logs import read_log
from lib.store.records import load_counts

SHAPE, NOISE = (1, 4, 4), Gaussian(0.5)
PLAIN = {"dtype": torch.float32, "block": 64, "layout": "contiguous", "compile": False}
NAMES = (
    "member:0",
    "member:4",
    "soft:0-4",
    "soft:1,3",
    "hard:0-4",
    "hard:0-1",
    "softmax:0-4",
    "weighted:0-2:0.2,0.7,0.1",
    "consensus2:0-4",
    "consensus3:4,0-2",
    "consensus1:1-3",
    "consensus5:0-4",
    "consensus2-hard:0-4",
    "consensus2-weighted:3,0-1:0.5,0.25,0.25",
    "consensus2:4,1,0,2-3",
)


def images(size, seed=0):
    return torch.rand(size, *SHAPE, generator=torch.Generator().manual_seed(seed))


def networks():
    """Five of different architectures, whose classes are three and likely to differ."""
    torch.manual_seed(0)
    small = [nn.Sequential(nn.Flatten(), nn.Linear(16, 3)) for _ in range(2)]
    convolved = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    normed = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)
    )
    deep = nn.Sequential(nn.Flatten(), nn.Linear(16, 30), nn.Tanh(), nn.Linear(30, 3))
    models = [*small, convolved, normed.eval(), deep]
    with torch.no_grad():
        for model in models:
            for parameter in model.parameters():
                parameter.mul_(3)
            center = model(images(200, seed=9)).mean(dim=0)
            model[-1].bias.sub_(center)
    return models


def draws(x, n, seed=0, index=None):
    """The first n noisy copies of each image, [B, n, *SHAPE]."""
    index, chunks = range(len(x)) if index is None else index, -(-n // CHUNK)
    copies = []
    for i, row in zip(index, x, strict=True):
        streams = [noise_stream(seed, i, chunk, torch.device("cpu")) for chunk in range(chunks)]
        copies.append(NOISE.sample(row.expand(CHUNK * chunks, *SHAPE), streams)[:n])
    return torch.stack(copies)


def logits_of_all(models, x, n, **stream):
    """Logits float64 [k, B, n, C], each network by itself in float32."""
    noisy = draws(x, n, **stream)
    with torch.no_grad():
        return np.stack(
            [model(noisy.flatten(0, 1)).view(len(x), n, -1).double().numpy() for model in models]
        )


def first_of(scores):
    return min(range(len(scores)), key=lambda c: (-scores[c], c))


def voted(item, logits):
    """(class, evaluations) of one draw, from the definition: logits [k of all networks, C]."""
    own = logits[list(item.members)]
    votes = [first_of(row) for row in own]
    if item.consensus is not None and len(set(votes[: item.consensus])) == 1:
        return votes[0], item.consensus
    if item.vote == "hard":
        return first_of([votes.count(c) for c in range(len(own[0]))]), len(own)
    if item.vote == "softmax":
        own = np.exp(own) / np.exp(own).sum(axis=1, keepdims=True)
    weights = item.weights or [1] * len(own)
    return first_of(
        [sum(w * row[c] for w, row in zip(weights, own, strict=True)) for c in range(3)]
    ), len(own)


def naive(names, logits):
    """Votes and evaluations [R, B, n] of all draws, one by one."""
    found = [
        [
            [voted(readout(name), logits[:, b, j]) for j in range(logits.shape[2])]
            for b in range(logits.shape[1])
        ]
        for name in names
    ]
    return np.moveaxis(np.array(found), -1, 0)


def counted(votes):
    """[..., n] votes as counts [..., 3]."""
    return (votes[..., None] == np.arange(3)).sum(axis=-2)


@pytest.mark.parametrize("name", NAMES)
def test_names_are_read_back(name):
    assert readout(name).name == name
    assert readout(readout(name).name) == readout(name)


def test_the_meaning_of_names():
    assert readout("soft:0-2,7") == Readout((0, 1, 2, 7))
    assert readout("soft:3") == readout("member:3") == Readout((3,))
    assert readout("soft:4,0-1").members == (4, 0, 1)
    assert readout("consensus2-hard:0-4") == Readout((0, 1, 2, 3, 4), "hard", consensus=2)
    assert readout("weighted:0-1:0.75,0.25") == Readout((0, 1), "weighted", weights=(0.75, 0.25))


def test_a_vote_of_ones_own_may_be_weighted_and_have_a_hyphen(monkeypatch):
    monkeypatch.setitem(VOTES, "trimmed-mean", VOTES["soft"])
    monkeypatch.setitem(VOTES, "own-weights", VOTES["weighted"])
    for name in ("trimmed-mean:0-2", "consensus2-trimmed-mean:0-2", "own-weights:0-1:0.75,0.25"):
        assert readout(name).name == name
    assert readout("consensus2-trimmed-mean:0-2") == Readout((0, 1, 2), "trimmed-mean", 2)
    with pytest.raises(ValueError, match="vote must come with weights where it is own-weights"):
        readout("own-weights:0-1")
    with pytest.raises(ValueError, match="weights must be left out where the vote is trimmed-mean"):
        readout("trimmed-mean:0-1:1,1")


@pytest.mark.parametrize(
    "name",
    [
        "",
        "soft",
        "soft:",
        "loud:0-1",
        "soft:1-0",
        "soft:0,0",
        "soft:a",
        "member:0-",
        "soft:0:1:2",
        "weighted:0-1",
        "weighted:0-1:1",
        "weighted:0-1:-1,2",
        "weighted:0-1:nan,1",
        "soft:0-1:1,1",
        "consensus0:0-1",
        "consensus3:0-1",
        "consensus:0-1",
    ],
)
def test_names_without_sense_are_refused(name):
    with pytest.raises(ValueError, match="readout"):
        readout(name)


def test_every_readout_is_the_naive_one_vote_for_vote():
    models, x = networks(), images(3)
    source = ModelCounts(models, x, NOISE, readouts=NAMES, **PLAIN)
    votes, evaluations = naive(NAMES, logits_of_all(models, x, 230))
    first = source.draw([100, 7, 230])
    found = first + source.draw([130, 223, 0])
    assert found.shape == (len(NAMES), 3, 3)
    np.testing.assert_array_equal(found, counted(votes))
    np.testing.assert_array_equal(first[:, 1], counted(votes[:, 1, :7]))
    np.testing.assert_array_equal(source.votes, found)
    np.testing.assert_array_equal(source.evaluations, evaluations.sum(axis=2))
    # The test can tell: readouts differ from each other, and a consensus is neither all nor none.
    assert len(np.unique(found, axis=0)) >= 9
    assert 2 * 690 < source.evaluations[NAMES.index("consensus2:0-4")].sum() < 5 * 690


def test_one_member_is_the_network_alone():
    models, x, index = networks(), images(3), [4, 0, 9]
    many = ModelCounts(
        models, x, NOISE, index=index, seed=7, readouts=[f"member:{i}" for i in range(5)], **PLAIN
    ).draw(300)
    for i, model in enumerate(models):
        alone = ModelCounts(model, x, NOISE, index=index, seed=7, **PLAIN)
        np.testing.assert_array_equal(alone.draw(300), many[i])
        np.testing.assert_array_equal(alone.evaluations, [300] * 3)
    single = ModelCounts(models[2], x, NOISE, index=index, seed=7, readouts="member:0", **PLAIN)
    np.testing.assert_array_equal(single.draw(300), many[2])


def test_the_members_of_an_ensemble_are_several_networks():
    """A ModuleList votes as the list of the same networks; without readouts it is refused."""
    models, x, names = networks(), images(2), ["member:1", "soft:0-4", "consensus2:0-4"]
    members = Ensemble(models).members
    assert isinstance(members, nn.ModuleList)
    found = ModelCounts(members, x, NOISE, readouts=names, **PLAIN).draw(100)
    listed = ModelCounts(models, x, NOISE, readouts=names, **PLAIN).draw(100)
    np.testing.assert_array_equal(found, listed)
    with pytest.raises(ValueError, match="readouts must say how several networks vote"):
        ModelCounts(members, x, NOISE, **PLAIN)


@pytest.mark.parametrize("seed", range(4))
def test_views_are_sources_that_share_one_stream(seed):
    """Whatever is asked of the views, and in which order: each gets its own first draws."""
    models, x, names = networks(), images(3), NAMES[2:10:2]
    votes, evaluations = naive(names, logits_of_all(models, x, 400))
    source = ModelCounts(models, x, NOISE, readouts=names, **PLAIN)
    views, random = [source.view(name) for name in names], np.random.default_rng(seed)
    for _ in range(12):
        r = random.integers(len(views))
        n = random.integers(0, 60, size=3) * random.integers(0, 2, size=3)
        before = views[r].votes.sum(axis=1)
        expected = [counted(votes[r, b, before[b] : before[b] + n[b]]) for b in range(3)]
        np.testing.assert_array_equal(views[r].draw(n), expected)
    for r, view in enumerate(views):
        done = view.votes.sum(axis=1)
        spent = [evaluations[r, b, : done[b]].sum() for b in range(3)]
        np.testing.assert_array_equal(view.evaluations, spent)


def test_views_evaluate_each_draw_once_and_keep_none_that_all_have():
    spy, x = Counting(), images(4)
    names = ("member:0", "soft:0-1", "consensus1:0-1")
    source = ModelCounts([spy, networks()[0]], x, NOISE, readouts=names, **PLAIN)
    before = spy.passes
    for name in names:
        source.view(name).draw([64, 64, 0, 128])
    assert spy.passes == before + 4
    assert all(kept is None for kept in source._stream.kept)
    more = source.view(names[0]).draw(64)
    alone = ModelCounts(spy, x, NOISE, **PLAIN)
    alone.draw([64, 64, 0, 128])
    np.testing.assert_array_equal(more, alone.draw(64))
    assert [kept.shape for kept in source._stream.kept] == [(3, 64)] * 4


def test_samplers_take_views():
    """Cohen's and an adaptive sampler give each readout what they give its counts alone."""
    models, x = networks(), images(4)
    table = sample_size_map(2000, 0.05, "absolute", NOISE, 0.01)
    for sampler in (
        lambda counts: certify(counts, NOISE, n0=20, n=300, alpha=0.01),
        lambda counts: certify_iss(counts, NOISE, 100, 2000, table, 0.01),
    ):
        source = ModelCounts(models, x, NOISE, readouts=NAMES, **PLAIN)
        for name in NAMES:
            found = sampler(source.view(name))
            alone = sampler(ModelCounts(models, x, NOISE, readouts=name, **PLAIN))
            for field in dataclasses.fields(found):
                np.testing.assert_array_equal(
                    getattr(found, field.name), getattr(alone, field.name), err_msg=name
                )


class Counting(nn.Module):
    """Votes by the sign of the first pixel, and counts its passes."""

    def __init__(self):
        super().__init__()
        self.passes = 0

    def __deepcopy__(self, memo):
        return self

    def forward(self, x):
        self.passes += 1
        first = x.flatten(1)[:, 0] - 0.5
        return torch.stack([first, -first, 0 * first - 1], dim=1)


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("consensus")])
@pytest.mark.parametrize("cores", [1, 3])
def test_a_true_consensus_run_gives_its_readout(name, cores, threads):
    threads(cores)
    models, x = networks(), images(5)
    source = ModelCounts(models, x, NOISE, readouts=[name, "soft:0-4"], **PLAIN)
    true = ModelCounts(models, x, NOISE, readouts=name, **PLAIN)
    for n in ([300, 1, 64, 0, 999], 17):
        np.testing.assert_array_equal(true.draw(n), source.draw(n)[0])
    np.testing.assert_array_equal(true.evaluations, source.evaluations[0])
    assert true.votes.shape == (5, 3)


def test_a_true_consensus_run_saves_passes(threads):
    """The later network sees full blocks of the draws on which the first two differ, no others."""
    threads(1)
    later, models = Counting(), networks()
    source = ModelCounts([*models[:2], later], images(6), NOISE, readouts="consensus2:0-2", **PLAIN)
    before = later.passes
    source.draw(500)
    differ = (source.evaluations - 2 * 500).sum()
    assert 64 < differ < 3000
    assert later.passes - before == -(-differ // 64)


def test_counts_of_readouts_do_not_depend_on_cores_blocks_or_company(threads):
    models, x, order = networks(), images(6), np.array([4, 0, 3])
    threads(1)
    expected = ModelCounts(models, x, NOISE, readouts=NAMES, **PLAIN).draw(150)
    threads(3)
    some = ModelCounts(
        models, x[order], NOISE, index=order, readouts=NAMES, **PLAIN | {"block": 37}
    )
    found = some.draw([150, 0, 20]) + some.draw([0, 150, 130])
    np.testing.assert_array_equal(found, expected[:, order])


class Constant(nn.Module):
    def __init__(self, *logits):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, x):
        return self.logits.expand(len(x), -1)


def test_logits_are_combined_in_float32():
    """255 + 1.5 is 256 in bfloat16: a tie, which class 0 would win."""
    models = [Constant(256.0, 255.0), Constant(0.0, 1.5)]
    source = ModelCounts(
        models,
        images(1),
        NOISE,
        readouts=["soft:0-1", "weighted:0-1:0.5,0.5"],
        **PLAIN | {"dtype": torch.bfloat16},
    )
    np.testing.assert_array_equal(source.draw(10), [[[0, 10]]] * 2)


def test_members_of_different_precision_and_layout():
    models, x = networks(), images(2)
    bases = [
        BaseClassifier(model, SHAPE, **PLAIN | {"dtype": dtype, "layout": layout})
        for model, dtype, layout in zip(
            models[:3],
            (torch.float32, torch.bfloat16, torch.bfloat16),
            ("contiguous", "channels_last", "contiguous"),
            strict=True,
        )
    ]
    names = ["member:0", "member:1", "member:2", "soft:0-2"]
    source = ModelCounts(bases, x, NOISE, readouts=names)
    found = source.draw(200)
    for i in range(3):
        np.testing.assert_array_equal(ModelCounts(bases[i], x, NOISE).draw(200), found[i])
    assert source.base.settings["dtype"] == "float32, bfloat16, bfloat16"
    assert source.base.settings["block"] == 64


def test_compiled_members_give_the_same_votes():
    models, x = [networks()[0], networks()[3]], images(3)
    names = ["member:0", "member:1", "soft:0-1", "consensus2:0-1"]
    eager = ModelCounts(models, x, NOISE, readouts=names, **PLAIN).draw(200)
    compiled = ModelCounts(models, x, NOISE, readouts=names, **PLAIN | {"compile": True})
    np.testing.assert_array_equal(compiled.draw(200), eager)
    assert compiled.base.settings["compiled"] is True


def test_a_readout_of_your_own():
    @dataclasses.dataclass(frozen=True)
    class Boldest:
        """The class of the largest logit of all members."""

        members: tuple
        name = "boldest"
        consensus = None

        def read(self, logits):
            return logits.amax(dim=0).argmax(dim=-1), None

    models, x = networks(), images(2)
    logits = logits_of_all(models, x, 100)[[1, 4, 2]].max(axis=0)
    found = ModelCounts(models, x, NOISE, readouts=[Boldest((1, 4, 2))], **PLAIN).draw(100)
    np.testing.assert_array_equal(found, counted(logits.argmax(axis=-1))[None])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m, x: ModelCounts(m, x, NOISE, **PLAIN), "readouts must say how"),
        (lambda m, x: ModelCounts(m, x, NOISE, readouts=[], **PLAIN), "at least one"),
        (lambda m, x: ModelCounts(m, x, NOISE, readouts=["soft:0", "member:0"], **PLAIN), "differ"),
        (lambda m, x: ModelCounts(m, x, NOISE, readouts="soft:0-5", **PLAIN), "network 5 of 5"),
        (
            lambda m, x: ModelCounts([m[0], Constant(1.0, 2.0)], x, NOISE, readouts="soft:0-1"),
            "networks must have the same classes; got",
        ),
        (
            lambda m, x: ModelCounts(
                [BaseClassifier(m[i], SHAPE, **PLAIN | {"block": 8 + i}) for i in (0, 1)],
                x,
                NOISE,
                readouts="soft:0-1",
            ),
            "networks must have the same block; got",
        ),
        (
            lambda m, x: ModelCounts(
                [BaseClassifier(m[0], SHAPE, **PLAIN)], x, NOISE, readouts="member:0", block=8
            ),
            "block: set when the BaseClassifier was made",
        ),
        (
            lambda m, x: ModelCounts(m, x, NOISE, readouts=["soft:0-1"], **PLAIN).view("hard:0-1"),
            "readout must be one of soft:0-1; got 'hard:0-1'",
        ),
        (lambda m, x: ModelCounts(m[0], x, NOISE, **PLAIN).view("member:0"), "readout must be one"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make(networks(), images(2))


def test_a_source_and_its_views_are_not_mixed():
    source = ModelCounts(networks(), images(1), NOISE, readouts=["soft:0-1"], **PLAIN)
    source.view("soft:0-1").draw(3)
    with pytest.raises(ValueError, match="not from both"):
        source.draw(3)
    source = ModelCounts(networks(), images(1), NOISE, readouts=["soft:0-1"], **PLAIN)
    source.draw(3)
    with pytest.raises(ValueError, match="not from both"):
        source.view("soft:0-1")


class Overflows(nn.Module):
    def forward(self, x):
        first = x.flatten(1)[:, 0]
        return torch.stack([torch.where(first > 1.5, torch.nan, first), -first, 0 * first], dim=1)


@pytest.mark.parametrize(
    "readouts", [["soft:0-1"], "soft:0-1", "consensus1:1,0", "consensus1:0-1", "consensus2:0,2,1"]
)
def test_non_finite_logits_of_a_member_are_refused(readouts):
    models = [networks()[0], Overflows(), networks()[1]]
    if readouts == "consensus1:0-1":  # the second is never asked
        ModelCounts(models, images(2), NOISE, readouts=readouts, **PLAIN).draw(1000)
        return
    source = ModelCounts(models, images(2), NOISE, readouts=readouts, **PLAIN)
    with pytest.raises(ValueError, match=r"read as .*, gave non-finite logits .* of example \d"):
        source.draw(1000)
    if isinstance(readouts, list):
        other = ModelCounts(models, images(2), NOISE, readouts=readouts, **PLAIN)
        with pytest.raises(ValueError, match="non-finite"):
            other.view(readouts[0]).draw(1000)


def job(out, sampler, readouts, index=(1, 2, 5, 6), **engine):
    x = images(8)
    network = Ensemble(networks())
    labels, index = torch.zeros(8, dtype=torch.int64), np.array(index)
    engine = PLAIN | engine
    return jobs.Job(network, "five", x, labels, index, sampler, NOISE, 3, out, {}, engine, readouts)


def test_a_run_records_all_readouts_killed_and_continued(tmp_path, monkeypatch):
    """A kill between two groups, more examples, more draws: the record is that of one draw."""
    monkeypatch.setattr(jobs, "BLOCKS", 1)
    direct = ModelCounts(
        networks(), images(8)[[1, 2, 5, 6]], NOISE, [1, 2, 5, 6], 3, readouts=NAMES, **PLAIN
    )
    expected = direct.draw(250)
    append, path = jobs.Journal.append, tmp_path / "votes"

    def killed(journal, *given):
        append(journal, *given)
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs.Journal, "append", killed)
    with pytest.raises(KeyboardInterrupt):
        jobs.run(job(path, RecordVotes(90), NAMES, [2, 5]))
    monkeypatch.setattr(jobs.Journal, "append", append)
    assert jobs.run(job(path, RecordVotes(90), NAMES, [2, 5])) == 1
    jobs.run(job(path, RecordVotes(90), NAMES))
    jobs.run(job(path, RecordVotes(250), NAMES))
    record = load_counts(tmp_path / "votes.npz")
    assert record.readouts == NAMES
    np.testing.assert_array_equal(record.counts, expected)
    np.testing.assert_array_equal(record.header["evaluations"], direct.evaluations)
    name = "consensus2:0-4"
    alone = RecordedCounts(record.readout(name)).draw(250)
    np.testing.assert_array_equal(alone, expected[NAMES.index(name)])
    with pytest.raises(ValueError, match="readouts = "):
        jobs.run(job(path, RecordVotes(250), NAMES[::-1]))


@pytest.mark.parametrize("sampler", [Certify(20, 300, 0.01), InputSpecific(50, 900, 0.01)])
def test_a_run_of_one_readout_certifies_it(sampler, tmp_path):
    """A true K-consensus: log, record and the passes that it cost."""
    name, out = "consensus2:0-4", tmp_path / "log"
    assert jobs.run(job(out, sampler, name)) == 4
    assert jobs.run(job(out, sampler, name)) == 0
    source = ModelCounts(
        networks(), images(8)[[1, 2, 5, 6]], NOISE, [1, 2, 5, 6], 3, readouts=NAMES, **PLAIN
    ).view(name)
    found, log, record = sampler(source, NOISE), read_log(out), load_counts(tmp_path / "log.npz")
    np.testing.assert_array_equal(log["predict"], found.prediction)
    np.testing.assert_array_equal(log["radius"], found.radius)
    np.testing.assert_array_equal(record.counts, source.votes)
    assert record.header["readout"] == name
    np.testing.assert_array_equal(record.header["evaluations"], source.evaluations)


def test_a_run_restores_members_of_different_precision(tmp_path):
    engine = {"dtype": "float32, bfloat16", "layout": "contiguous, channels_last"}
    made = job(tmp_path / "x", RecordVotes(100), ("soft:1,3",), **engine)
    jobs.run(made)
    header = load_counts(tmp_path / "x.npz").header
    assert header["dtype"] == "float32, bfloat16"
    assert header["layout"] == "contiguous, channels_last"
    assert jobs.run(dataclasses.replace(made, sampler=RecordVotes(130))) == 4


def test_runs_of_readouts_that_cannot_be(tmp_path):
    with pytest.raises(ValueError, match="several are recorded by the sampler record"):
        job(tmp_path / "x", Certify(20, 100), NAMES)
    with pytest.raises(ValueError, match="readouts must be left out for a model that is no Ens"):
        dataclasses.replace(job(tmp_path / "x", RecordVotes(10), NAMES), model=networks()[0])


def test_a_consensus_never_counts_non_finite_logits_of_its_first_members():
    """NaN never agrees with class 1, and the third network could not mend it."""
    models = [Overflows(), Constant(0.0, 1.0, 0.0), networks()[0]]
    source = ModelCounts(models, images(2), NOISE, readouts="consensus2:0-2", **PLAIN)
    with pytest.raises(ValueError, match="non-finite"):
        source.draw(1000)


def test_networks_that_are_made_ready_together_share_a_block(monkeypatch):
    """Whatever block would be the fastest for each."""
    blocks = iter([8, 16])

    def tuned(model, shape, device, dtype, given):
        return {"block": given["block"] or next(blocks), "layout": "contiguous"}

    monkeypatch.setattr(classifier, "tuned", tuned)
    engine = {"dtype": torch.float32, "compile": False}
    source = ModelCounts(networks()[:2], images(1), NOISE, readouts="soft:0-1", **engine)
    assert [base.block for base in source.base.members] == [8, 8]


def test_views_of_hundreds_of_classes():
    """Class 299 does not fit into a byte."""
    wide = nn.Sequential(nn.Flatten(), nn.Linear(16, 300))
    with torch.no_grad():
        wide[1].bias[299] += 2
    names = ["member:0", "consensus1:0"]
    direct = ModelCounts([wide], images(1), NOISE, readouts=names, **PLAIN).draw(300)
    source = ModelCounts([wide], images(1), NOISE, readouts=names, **PLAIN)
    for name, counts in zip(names, direct, strict=True):
        np.testing.assert_array_equal(source.view(name).draw(300), counts)
    assert direct[:, :, 299].min() > 100


def test_a_falling_span_is_refused():
    with pytest.raises(ValueError, match="must not fall"):
        readout("soft:4-0,2")


SIZES = sample_size_map(100, 0.1, "absolute", NOISE, 0.01, step=0.1)


@pytest.mark.parametrize(
    "sampler",
    [
        lambda counts: predict(counts, 50, 0.01),
        lambda counts: certify(counts, NOISE, 10, 50, 0.01),
        lambda counts: certify_margin(counts, NOISE, 10, 50, 0.01),
        lambda counts: certify_partition(counts, NOISE, 10, 50, 0.01),
        lambda counts: certify_iss(counts, NOISE, 10, 100, SIZES, 0.01),
        lambda counts: certify_at(counts, NOISE, 0.1, (10, 50), 0.01, 0.01),
        lambda counts: certify_anytime(counts, NOISE, 0.1, 100, 0.01),
        lambda counts: certify_anytime(counts, NOISE, 0.1, 100, 0.01, runner_up=True),
        lambda counts: certify_staircase(counts, NOISE, 10, 100, 0.01),
    ],
)
def test_a_sampler_asks_for_one_of_several_readouts_before_it_draws(sampler):
    """Votes [R, B, C] read as [B, C] would give classes that are numbers of examples."""
    source = ModelCounts(
        networks()[:3], images(4), NOISE, readouts=["soft:0-2", "hard:0-2"], **PLAIN
    )
    with pytest.raises(ValueError, match=r"2 readouts .*counts.view\('soft:0-2'\)"):
        sampler(source)
    assert len(sampler(source.view("hard:0-2"))) == 4
