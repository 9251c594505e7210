"""The zoo: what is committed is what the table of experiments makes."""

import dataclasses
import pathlib

import numpy as np
import pytest
from test_recipes import made_up_cifar10, short

from lib import recipes, zoo
from lib.data import load
from lib.engine import jobs, settings
from lib.ensemble import noisy_logits
from lib.models import load_checkpoint, model_hash
from lib.noise import Gaussian
from lib.store.records import load_counts

NAME = "digits-cnn-sigma0.25-n1000"
RECORDS = zoo.DATA / "records"


def test_a_committed_record_is_counted_again():
    stored, again = zoo.record(NAME), zoo.count(NAME)
    for name in ("model_sha256", "data_sha256", "noise", "sampler", "seed", "block", "dtype"):
        assert again.header[name] == stored.header[name]
    # Another type of machine rounds logits differently: of 360,000 votes one or two at a tie may
    # then move, each counted twice here.
    assert np.abs(again.counts - stored.counts).sum() <= 4


@pytest.mark.parametrize("name", zoo.RUNS)
def test_records_belong_to_the_committed_networks(name):
    path, run = zoo.DATA / "records" / f"{name}.npz", zoo.RUNS[name]
    if not path.exists():  # planned, and not counted yet: README's table does not list it
        return
    record = zoo.record(name)
    assert record.header["model_sha256"] == model_hash(zoo.network_of(run))
    assert record.header["fixed_draws"] is True
    assert record.header["sampler"] == {"name": "record", "n": record.draws}
    # A record of CIFAR-10 may be unfinished; it is never longer than planned.
    assert record.draws == run.n or (run.stride == 20 and 1000 < record.draws < run.n)
    assert record.header["seed"] == run.seed
    data = zoo.recipe_of(run.model).data
    labels = load(data, "test")[1].numpy() if data == "digits" else np.zeros(10_000)
    assert record.index.tolist() == list(range(0, len(labels), run.stride))
    if data == "digits":
        np.testing.assert_array_equal(record.labels, labels[record.index])


def test_a_record_stopped_and_continued_equals_one_counted_at_once(tmp_path, monkeypatch):
    """Fewer draws first, a kill in the middle, the rest later: the bytes of one run."""
    some, path = np.arange(0, 360, 40), tmp_path / "parts.npz"
    zoo.count(NAME, tmp_path / "whole.npz", index=some)
    assert zoo.count(NAME, path, n=370, index=some).draws == 370
    certify, calls = jobs.certify_group, []

    def killed(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return certify(*arguments)

    monkeypatch.setattr(jobs, "BLOCKS", 1)
    monkeypatch.setattr(jobs, "certify_group", killed)
    with pytest.raises(KeyboardInterrupt):
        zoo.count(NAME, path, index=some)
    assert 370 <= load_counts(path).draws < 1000
    monkeypatch.setattr(jobs, "certify_group", certify)
    zoo.count(NAME, path, index=some)
    assert path.read_bytes() == (tmp_path / "whole.npz").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["parts.npz", "whole.npz"]
    with pytest.raises(ValueError, match="which this run does not ask for"):
        zoo.count(NAME, path, index=some[1:])
    other = dataclasses.replace(zoo.RUNS[NAME], model="digits-cnn-sigma0.50")
    with pytest.raises(ValueError, match="model_sha256 = "):
        zoo.count(other, path, index=some)


def test_the_rounds_of_a_record_share_one_network_made_ready(tmp_path, monkeypatch):
    """It is compiled once; a second command makes its own, since the network may have changed."""
    made, ready = [], settings._ready
    monkeypatch.setattr(settings, "_ready", lambda *given: made.append(1) or ready(*given))
    some, runs, run = np.arange(3), [], zoo.run
    monkeypatch.setattr(zoo, "run", lambda job: runs.append(job.sampler.n) or run(job))
    zoo.count(NAME, tmp_path / "a.npz", n=1100, index=some)
    assert (runs, len(made)) == ([500, 1000, 1100], 2)  # one chooses the engine, one counts
    zoo.count(NAME, tmp_path / "a.npz", n=1200, index=some)
    assert len(made) == 3  # as the record says that it was made


def test_the_committed_records_can_be_continued(tmp_path, monkeypatch):
    """Twenty draws more of each image: what was there is kept, the noise's next draws added."""
    name = "digits-cnn-sigma0.25-n1000"
    path, some = tmp_path / f"{name}.npz", np.arange(360)
    path.write_bytes((zoo.DATA / "records" / f"{name}.npz").read_bytes())
    before, after = load_counts(path), zoo.count(name, path, n=1020, index=some)
    more = after.counts - before.counts
    assert (more >= 0).all()
    assert (more.sum(axis=1) == 20).all()


def test_a_record_of_some_images_holds_their_votes_and_labels(tmp_path):
    """Image by image what a record of all has, in a file and live."""
    some = np.array([7, 40, 133])
    stored = zoo.count(NAME, tmp_path / "some.npz", n=200, index=some)
    whole = zoo.record(NAME, n=200, index=np.arange(134), folder=tmp_path)
    np.testing.assert_array_equal(stored.counts, whole.counts[some])
    np.testing.assert_array_equal(stored.labels, load("digits", "test")[1][some])
    np.testing.assert_array_equal(whole.labels, load("digits", "test")[1][:134])
    assert [path.name for path in tmp_path.iterdir()] == ["some.npz"]


def test_whether_a_record_is_committed(tmp_path):
    assert zoo.committed(NAME)
    assert not zoo.committed(NAME, tmp_path)
    assert not zoo.committed("gone")


def test_a_record_that_is_missing_is_counted(tmp_path, monkeypatch):
    monkeypatch.setitem(zoo.RUNS, NAME, dataclasses.replace(zoo.RUNS[NAME], n=30))
    assert zoo.record(NAME, folder=tmp_path).draws == 30
    assert load_counts(tmp_path / f"{NAME}.npz").draws == 30


@pytest.mark.parametrize("name", [n for n in zoo.RUNS if f"{n}-seed" in zoo.RUNS[n].model])
def test_the_recorded_network_is_the_best_of_its_noise_level(name):
    paths = {
        n: zoo.DATA / "models" / f"{n}.safetensors" for n in zoo.siblings(zoo.RUNS[name].model)
    }
    accuracy = {
        n: load_checkpoint(path)[1]["noisy_accuracy"] for n, path in paths.items() if path.exists()
    }
    assert len(accuracy) >= 5
    assert max(accuracy, key=accuracy.get) == zoo.RUNS[name].model


def test_the_long_record_agrees_with_the_short_one():
    stored, fresh = zoo.record("digits-cnn-sigma0.25"), zoo.record(NAME)
    p = stored.counts / stored.counts.sum(axis=1, keepdims=True)
    expected, variance = 1000 * p, 1000 * p * (1 - p)
    z = (fresh.counts - expected)[variance > 5] / np.sqrt(variance[variance > 5])
    assert abs(z.mean()) < 5 / np.sqrt(z.size)
    assert z.std() == pytest.approx(1, abs=0.15)


def test_the_cifar10_plan_trains_selects_and_records_in_a_folder(tmp_path, monkeypatch):
    """Two seeds of one noise level, one epoch of made-up images: all files appear, the better seed
    is recorded, other images are refused."""
    data, out = made_up_cifar10(tmp_path / "data.npz"), tmp_path / "out"
    name = "cifar10-resnet20-sigma0.50"
    names = [f"{name}-seed{seed}" for seed in (0, 1)]
    monkeypatch.setattr(zoo, "MODELS", {n: short(zoo.MODELS[n], 1) for n in names})
    run = dataclasses.replace(zoo.RUNS[name], model=names[0], n=150)
    # The second stands for the record of the network in 8 bits, which follows the same seed.
    monkeypatch.setattr(zoo, "RUNS", {name: run, f"{name}-int8": run})
    better = iter([0.1, 0.2])
    monkeypatch.setattr(recipes, "noisy_accuracy", lambda *a, **k: next(better))
    zoo.cifar10(data, out)
    best = names[1]
    record = load_counts(out / f"records/{name}.npz", model=best)
    trained = load_checkpoint(out / f"models/{best}.safetensors")[0]
    assert record.header["model_sha256"] == model_hash(trained)
    assert (record.draws, record.index.tolist()) == (150, [0, 20, 40])
    left = {path.suffix for path in pathlib.Path(out).rglob("*") if path.is_file()}
    assert left == {".safetensors", ".npz"}
    # A better seed comes: its votes are counted, those of the other kept.
    monkeypatch.setattr(recipes, "noisy_accuracy", lambda *a, **k: 0.5)
    (out / f"models/{names[0]}.safetensors").unlink()
    zoo.cifar10(data, out)
    assert load_counts(out / f"records/{name}.npz", model=names[0]).draws == 150
    assert load_counts(out / f"records/{name}-int8.npz", model=names[0]).draws == 150
    for kept in (best, f"{best}-int8"):
        assert load_counts(out / f"records/{kept}.npz", model=best).draws == 150
    with pytest.raises(ValueError, match=r"was counted on other images than those of .*OUT="):
        zoo.cifar10(made_up_cifar10(tmp_path / "other.npz", seed=1), out)


def test_the_cifar10_plan_trains_the_losses_that_are_named(tmp_path, monkeypatch):
    data, out = made_up_cifar10(tmp_path / "data.npz"), tmp_path / "out"
    plain, other = (f"cifar10-resnet20-{part}sigma0.50-seed0" for part in ("", "consistency-"))
    monkeypatch.setattr(zoo, "MODELS", {n: short(zoo.MODELS[n], 1) for n in (plain, other)})
    run = dataclasses.replace(zoo.RUNS["cifar10-resnet20-sigma0.50"], n=150)
    runs = {name: dataclasses.replace(run, model=name) for name in (plain, other)}
    monkeypatch.setattr(zoo, "RUNS", runs)
    zoo.main("cifar10", str(data), str(out), "consistency")
    made = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert made == {f"models/{other}.safetensors", f"records/{other}.npz"}
    with pytest.raises(SystemExit, match="losses must be one of 'consistency', 'gaussian'"):
        zoo.main("cifar10", str(data), str(out), "Consistency")


def test_one_network_and_one_record_are_made_by_name(tmp_path, monkeypatch):
    """The others stay as they are, and those on CIFAR-10 whatever the pattern."""
    kept, cifar = "digits-cnn-sigma0.50", "cifar10-resnet20-sigma0.50-seed0"
    monkeypatch.setitem(zoo.MODELS, "digits-new", short(zoo.MODELS[kept], 1))
    run = dataclasses.replace(zoo.RUNS[NAME], n=30, stride=40)
    for name, network in (("digits-new", kept), (cifar, cifar)):
        monkeypatch.setitem(zoo.RUNS, name, dataclasses.replace(run, model=network))
    monkeypatch.setattr(zoo, "DATA", tmp_path)
    for what, end in (("models", ".safetensors"), ("records", ".npz")):
        (tmp_path / what).mkdir()
        for name in (kept, cifar):
            (tmp_path / what / f"{name}{end}").write_text("as it was")
        zoo.main(what, "*new")
        assert (tmp_path / what / f"digits-new{end}").stat().st_size > 100
        with pytest.raises(SystemExit, match=r"cifar10-\* chooses nothing .*CIFAR-10 has a plan"):
            zoo.main(what, "cifar10-*")
        with pytest.raises(SystemExit, match=r"nowhere chooses nothing .*none has such a name"):
            zoo.main(what, "nowhere")
        for name in (kept, cifar):
            assert (tmp_path / what / f"{name}{end}").read_text() == "as it was"


def test_the_command_says_how_it_is_used(tmp_path):
    with pytest.raises(SystemExit, match=r"usage: python -m lib\.zoo"):
        zoo.main("cifar10")
    with pytest.raises(SystemExit, match=r"error: .*nowhere does not exist"):
        zoo.main("cifar10", str(tmp_path / "nowhere"))


def test_an_ensemble_s_record_is_counted_again(tmp_path):
    """Two images of the committed record of twenty networks, at once and continued."""
    name = "digits-cnn-x20-sigma0.25"
    stored, index = zoo.record(name), np.array([0, 14])
    again = zoo.record(name, n=stored.draws, index=index)
    assert again.readouts == stored.readouts
    rows = np.searchsorted(stored.index, index)
    # Another type of machine rounds logits differently: of 900,000 votes a few at ties may move.
    assert np.abs(again.counts - stored.counts[:, rows]).sum() <= 10
    for n in (600, 900):
        parts = zoo.count(name, tmp_path / "parts.npz", n=n, index=index)
    whole = zoo.record(name, n=900, index=index)
    np.testing.assert_array_equal(parts.counts, whole.counts)
    assert parts.header == whole.header
    with pytest.raises(ValueError, match="which this run does not ask for"):
        zoo.count(name, tmp_path / "parts.npz", n=1200, index=index + 1)


def test_committed_networks_vote_together(tmp_path, monkeypatch):
    """A record of an ensemble of the table: each member's votes are those of its own record."""
    names = ("digits-cnn-sigma0.25", "digits-cnn-sigma0.50")
    monkeypatch.setitem(zoo.ENSEMBLES, "two", names)
    run = dataclasses.replace(zoo.RUNS[NAME], model="two", readouts="member:* soft:0-1")
    some = np.array([3, 77])
    record = zoo.count(run, tmp_path / "two.npz", n=300, index=some)
    assert record.header["model"] == "two"
    for i, name in enumerate(names):
        alone = zoo.count(dataclasses.replace(run, model=name, readouts=""), n=300, index=some)
        np.testing.assert_array_equal(record.readout(f"member:{i}").counts, alone.counts)
    members = zoo.model("two").members
    assert [model_hash(m) for m in members] == [model_hash(zoo.model(name)) for name in names]


def test_a_name_that_the_table_lacks_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match=r"one of \d+ names, such as 'digits-cnn-sigma0.25'") as e:
        zoo.record("digit-cnn-sigma0.25")
    assert len(str(e.value)) < 300


def test_moments_are_stored_and_read(tmp_path, monkeypatch):
    """Of two digits networks: what is read is what their logits on the same noise give."""
    names = ("digits-cnn-sigma0.25", "digits-cnn-sigma0.50")
    monkeypatch.setitem(zoo.ENSEMBLES, "two", names)
    zoo.measure("two", tmp_path, draws=60)
    found = zoo.moments("two", tmp_path)
    x, y = load("digits", "test")
    np.testing.assert_array_equal(found.index, np.arange(0, 360, 3))
    np.testing.assert_array_equal(found.labels, y.numpy()[found.index])
    networks = [zoo.model(name) for name in names]
    noisy = noisy_logits(networks, x[found.index], Gaussian(0.25), 60, index=found.index).numpy()
    mean, covariance = found.logits.soft_vote([0, 1])
    vote = noisy.mean(axis=2)
    np.testing.assert_allclose(mean, vote.mean(axis=1), atol=1e-5)
    np.testing.assert_allclose(covariance[5], np.cov(vote[5].T), rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(
        found.logits.covariance[7].reshape(20, 20),
        np.cov(noisy[7].reshape(60, 20).T),
        rtol=2e-3,
        atol=2e-3,
    )
    for number, first, members in ((0, 1, [1]), (1, 0, [0, 1]), (1, 1, [1, 0])):
        classes = noisy[:, :, members].mean(axis=2).argmax(axis=-1)
        expected = np.stack([np.bincount(row, minlength=10) for row in classes])
        np.testing.assert_array_equal(found.votes[number, first], expected)
    assert found.effects["clean"].sum() <= noisy.size
    assert found.header["model_sha256"] == [model_hash(network) for network in networks]


@pytest.mark.parametrize(
    "name", [path.name.split(".moments")[0] for path in RECORDS.glob("*.moments.safetensors")]
)
def test_committed_moments_are_of_the_committed_networks(name):
    found = zoo.moments(name)
    hashes = [model_hash(zoo.model(member)) for member in zoo.ENSEMBLES[name]]
    assert found.header["model_sha256"] == hashes
    assert found.logits.covariance.shape == (100, 5, 10, 5, 10)
    assert (found.votes.sum(axis=-1) == found.header["draws"]).all()
    # Correlations lie in [-1, 1], and the stored triangle is that of one symmetric matrix.
    joint = found.logits.covariance.reshape(100, 50, 50)
    deviation = np.sqrt(np.einsum("bii->bi", joint))
    assert (np.abs(joint) <= 1.01 * deviation[:, :, None] * deviation[:, None]).all()
    np.testing.assert_array_equal(joint, joint.transpose(0, 2, 1))


def test_the_longer_of_two_records(tmp_path, monkeypatch):
    """Among NAME and NAME-int8, where either or both are there."""
    name = "digits-cnn-sigma0.25"
    runs = {each: dataclasses.replace(zoo.RUNS[name], n=n) for each, n in ((name, 300), ("x", 200))}
    monkeypatch.setattr(zoo, "RUNS", {name: runs[name], f"{name}-int8": runs["x"]})
    with pytest.raises(ValueError, match="name must be of a record in"):
        zoo.longest(name, tmp_path)
    zoo.count(runs["x"], tmp_path / f"{name}-int8.npz", index=[0, 1])
    assert zoo.longest(name, tmp_path).draws == 200
    zoo.count(runs[name], tmp_path / f"{name}.npz", index=[0, 1])
    assert zoo.longest(name, tmp_path).draws == 300
