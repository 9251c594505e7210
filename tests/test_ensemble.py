"""Votes of several networks against the formulas written out, and against what they cannot do."""

import itertools

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from torch import nn

from lib.attacks import attack_smoothed
from lib.certify import certify
from lib.engine.live import ModelCounts
from lib.engine.readouts import Readout
from lib.ensemble import (
    VOTES,
    Ensemble,
    Vote,
    combine,
    combine_consensus,
    fit_weights,
    noisy_logits,
    order_by_accuracy,
)
from lib.models import build, ensemble_header, load_checkpoint, model_hash, save_checkpoint
from lib.noise import Gaussian

K, CLASSES = 5, 4


@pytest.fixture(scope="module")
def logits():
    return torch.randn(K, 2000, CLASSES, generator=torch.Generator().manual_seed(0))


def networks(number, architecture="small_cnn", seed=0):
    torch.manual_seed(seed)
    return [build(architecture, "digits").eval() for _ in range(number)]


def images(number, seed=0):
    return torch.rand(number, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def options(vote):
    return {"vote": vote, "weights": [0.5, 0.1, 0.2, 0.2, 0.0] if vote == "weighted" else None}


def test_votes_are_those_of_the_formulas(logits):
    y = logits.double().numpy()
    weights = options("weighted")["weights"]
    hard = np.zeros(y.shape[1:])
    for member in y:
        hard[np.arange(len(hard)), member.argmax(axis=1)] += 1 / K
    expected = {
        "soft": y.mean(axis=0),
        "hard": hard,
        "softmax": np.log(softmax(y, axis=2).mean(axis=0)),
        "weighted": np.einsum("k,kbc->bc", weights, y),
    }
    assert set(expected) == set(VOTES)
    for vote, scores in expected.items():
        found = combine(logits, **options(vote)).numpy()
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, scores, atol=1e-6)
        np.testing.assert_array_equal(found.argmax(axis=1), scores.argmax(axis=1))


def test_a_hard_vote_that_ties_goes_to_the_class_of_lowest_index():
    y = torch.tensor([[[0.0, 0, 9]], [[0, 9, 0]], [[0, 9, 0]], [[0, 0, 9]]])
    assert combine(y, "hard").argmax(dim=-1).item() == 1


def test_softmax_scores_are_log_probabilities(logits):
    scores = combine(logits, "softmax").double()
    np.testing.assert_allclose(scores.exp().sum(dim=-1), 1, atol=1e-6)
    one = combine(logits[:1], "softmax").numpy()
    np.testing.assert_allclose(one, log_softmax(logits[0].numpy(), axis=1), atol=1e-6)


def test_members_are_combined_in_float32(logits):
    """bfloat16 logits give the scores of the same numbers in float32, not a bfloat16 mean."""
    rounded = logits.bfloat16()
    for vote in VOTES:
        found = combine(rounded, **options(vote))
        assert found.dtype == torch.float32
        assert torch.equal(found, combine(rounded.float(), **options(vote)))
    assert not torch.equal(combine(rounded), rounded.mean(dim=0).float())


@pytest.mark.parametrize("vote", VOTES)
@pytest.mark.parametrize("consensus", [1, 2, 3, 5])
def test_consensus_is_the_first_networks_vote_where_they_agree(logits, vote, consensus):
    settings = options(vote)
    scores, agreed = combine_consensus(logits, consensus, **settings)
    classes, everyone = logits.argmax(dim=-1), combine(logits, **settings).argmax(dim=-1)
    found = scores.argmax(dim=-1)
    for b in range(200):
        first = set(classes[:consensus, b].tolist())
        assert bool(agreed[b]) == (len(first) == 1)
        assert found[b].item() == (first.pop() if len(first) == 1 else everyone[b].item())
    # One network always agrees with itself; all of them agreeing give the full vote anyway.
    if consensus == 1:
        assert agreed.all()
        assert torch.equal(found, classes[0])
    if consensus == K:
        assert torch.equal(found, everyone)
    elif consensus > 1:
        assert 0 < agreed.float().mean() < 1


def test_a_consensus_of_networks_of_weight_0_is_their_vote(logits):
    weights = (0.0, 0.0, *[1 / (K - 2)] * (K - 2))
    scores, agreed = combine_consensus(logits, 2, "weighted", weights)
    assert 0 < agreed.float().mean() < 1
    expected = torch.where(
        agreed, logits[0].argmax(-1), combine(logits, "weighted", weights).argmax(-1)
    )
    assert torch.equal(scores.argmax(dim=-1), expected)


def test_a_consensus_holds_under_a_vote_of_ones_own(logits, monkeypatch):
    """Also one that does not keep the class that all agree on: as the readout votes."""
    monkeypatch.setitem(VOTES, "least", Vote(lambda logits: -logits, VOTES["soft"].pool))
    scores, agreed = combine_consensus(logits, 2, "least")
    votes, sufficed = Readout(range(K), "least", 2).read(logits)
    assert torch.equal(scores.argmax(dim=-1), votes)
    assert torch.equal(agreed, sufficed)
    assert (votes == logits[0].argmax(dim=-1))[agreed].all()


@pytest.mark.parametrize("vote", VOTES)
@pytest.mark.parametrize("consensus", [None, 2])
def test_ensemble_is_the_vote_of_its_members(vote, consensus):
    members, x = networks(K), images(50)
    ensemble = Ensemble(members, consensus=consensus, **options(vote))
    with torch.no_grad():
        scores, stacked = ensemble(x), torch.stack([member(x) for member in members])
        assert torch.equal(ensemble.member_logits(x), stacked)
    expected = combine(stacked, **options(vote))
    if consensus:
        expected = combine_consensus(stacked, consensus, **options(vote))[0]
    assert torch.equal(scores, expected)


def test_members_may_be_of_different_architectures():
    mixed = Ensemble([*networks(1), *networks(2, "mlp")])
    assert mixed(images(3)).shape == (3, 10)


@pytest.mark.parametrize("vote", VOTES)
def test_an_ensemble_is_certified_as_a_network(vote):
    """Votes of the engine are the argmax of the ensemble's scores on the same noise."""
    ensemble, x, noise = Ensemble(networks(K), **options(vote)), images(3), Gaussian(0.25)
    counts = ModelCounts(ensemble, x, noise, seed=4, tune=False, compile=False)
    found = certify(counts, noise, 20, 180, 0.01)
    assert len(found) == 3
    again = ModelCounts(ensemble, x, noise, seed=4, tune=False, compile=False)
    noisy = torch.stack([again._noisy(i, range(2)) for i in range(3)])
    with torch.no_grad():
        votes = ensemble(noisy.flatten(0, 1)).argmax(dim=1).view(3, 200)
    expected = np.stack([np.bincount(row, minlength=10) for row in votes.numpy()])
    np.testing.assert_array_equal(counts.votes, expected)


@pytest.mark.parametrize("vote", VOTES)
@pytest.mark.parametrize("consensus", [None, 1, 3])
def test_its_votes_are_those_of_the_readout_of_the_same_name(vote, consensus):
    """The ensemble as one network and the engine's readout: the same class on every draw."""
    members, x, noise = networks(K), images(4), Gaussian(0.5)
    engine = {"seed": 2, "tune": False, "compile": False, "dtype": torch.float32}
    ensemble = Ensemble(members, consensus=consensus, **options(vote))
    read = Readout(range(K), vote, consensus, ensemble.weights)
    alone = ModelCounts(ensemble, x, noise, **engine)
    together = ModelCounts(members, x, noise, readouts=read.name, **engine)
    for _ in range(3):
        np.testing.assert_array_equal(alone.draw(100), together.draw(100))
    assert together.evaluations.max() <= K * 300
    if consensus == 1:
        assert (together.evaluations == 300).all()


def test_an_ensemble_is_attacked_as_a_network():
    ensemble, x = Ensemble(networks(3)), images(2)
    settings = {"radius": 0.5, "steps": 3, "k": 8, "seed": 0}
    moved = attack_smoothed(ensemble, x, torch.tensor([0, 1]), Gaussian(0.25), **settings)
    assert (moved != x).flatten(1).any(dim=1).all()


def test_a_checkpoint_holds_the_whole_ensemble(tmp_path):
    members = [*networks(2), *networks(1, "mlp")]
    names = ["small_cnn", "small_cnn", "mlp"]
    headers = [{"architecture": name, "data": "digits", "seed": i} for i, name in enumerate(names)]
    for settings in (
        {"vote": "soft"},
        {"vote": "hard", "consensus": 2},
        {"vote": "weighted", "weights": [1, 2, 1]},
    ):
        ensemble, path = Ensemble(members, **settings), tmp_path / "ensemble.safetensors"
        save_checkpoint(path, ensemble, ensemble_header(ensemble, headers), half=False)
        loaded, header = load_checkpoint(path)
        assert loaded.describe() == ensemble.describe()
        assert header["members"] == headers
        assert model_hash(loaded) == model_hash(ensemble)
        assert torch.equal(loaded(images(9)), ensemble(images(9)))


def test_the_hash_tells_votes_apart():
    members = networks(3)
    settings = [
        {"vote": "soft"},
        {"vote": "hard"},
        {"vote": "soft", "consensus": 2},
        {"vote": "weighted", "weights": [1, 1, 2]},
        {"vote": "weighted", "weights": [1, 2, 1]},
    ]
    assert len({model_hash(Ensemble(members, **given)) for given in settings}) == len(settings)


def test_a_header_that_does_not_fit_is_refused(tmp_path):
    ensemble = Ensemble(networks(2))
    good = {"architecture": "small_cnn", "data": "digits"}
    with pytest.raises(ValueError, match="headers"):
        ensemble_header(ensemble, [good])
    with pytest.raises(ValueError, match="headers"):
        ensemble_header(ensemble, [good, good | {"data": "mnist"}])
    other = ensemble_header(ensemble, [good, {"architecture": "mlp", "data": "digits"}])
    with pytest.raises(ValueError, match=r"missing.*members\.1"):
        save_checkpoint(tmp_path / "x.safetensors", ensemble, other)
    assert not list(tmp_path.iterdir())


class Fixed(nn.Module):
    """Logits by a rule of the image's first pixel: right (class of the label) or not."""

    def __init__(self, right, scale=4.0):
        super().__init__()
        self.right, self.scale = right, scale

    def forward(self, x):
        label = (x[:, 0, 0, 0] > 0.5).long()
        named = label if self.right else 1 - label
        return self.scale * nn.functional.one_hot(named, 2).float()


def held_out():
    x = images(40)
    return x, (x[:, 0, 0, 0] > 0.5).long().numpy()


def test_networks_are_ordered_by_accuracy_under_noise():
    x, y = held_out()
    models = [Fixed(False), Fixed(True), Fixed(False), Fixed(True)]
    order, accuracy = order_by_accuracy(models, x, y, Gaussian(1e-6), draws=2)
    np.testing.assert_array_equal(order, [1, 3, 0, 2])
    np.testing.assert_array_equal(accuracy, [0, 1, 0, 1])


def test_noisy_logits_of_all_networks_are_of_the_same_copies():
    models, x, noise = networks(3), images(4), Gaussian(np.array([0.1, 0.2, 0.3, 0.4]))
    for model in models:
        model.train()
    found = noisy_logits(models, x, noise, draws=7, seed=3, index=[5, 6, 7, 8])
    assert found.shape == (4, 7, 3, 10)
    assert all(module.training for model in models for module in model.modules())
    for i, draw in itertools.product(range(4), (0, 6)):
        noisy = Gaussian(noise.sigma[i]).sample(
            x[i].expand(7, -1, -1, -1), np.random.default_rng([3, 5 + i])
        )
        for k, model in enumerate(models):
            with torch.no_grad():
                one = model.eval()(noisy[draw][None])[0]
            torch.testing.assert_close(found[i, draw, k], one)
    alone = noisy_logits(models, x[2:3], Gaussian(0.3), draws=7, seed=3, index=[7])
    torch.testing.assert_close(found[2:3], alone)


def test_weights_go_to_the_network_that_is_right():
    x, y = held_out()
    weights = fit_weights([Fixed(False), Fixed(True)], x, y, Gaussian(1e-6), draws=2)
    assert sum(weights) == pytest.approx(1)
    assert weights[1] == pytest.approx(1, abs=1e-6)


def test_fitted_weights_are_no_worse_than_any_other():
    """The convex optimum against equal weights, each network alone and random weights."""
    models, x, noise = networks(4), images(30), Gaussian(0.3)
    y = np.arange(30) % 10
    weights = fit_weights(models, x, y, noise, draws=5, seed=1)
    logits = noisy_logits(models, x, noise, draws=5, seed=1).double()

    def loss(w):
        mixed = torch.einsum("k,bnkc->bnc", torch.as_tensor(w, dtype=torch.float64), logits)
        labels = torch.from_numpy(y).repeat_interleave(5)
        return float(nn.functional.cross_entropy(mixed.flatten(0, 1), labels))

    others = [np.full(4, 0.25), *np.eye(4), *np.random.default_rng(0).dirichlet(np.ones(4), 50)]
    assert loss(weights) <= min(map(loss, others)) + 1e-8
    assert min(weights) >= 0


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"models": []}, "models"),
        ({"models": [len]}, "models"),
        ({"models": nn.Sequential(nn.Flatten(), nn.Linear(64, 10))}, "models must .*: .model."),
        ({"vote": "loud"}, "vote"),
        ({"vote": "weighted"}, "weights"),
        ({"weights": [1, 1]}, "weights"),
        ({"vote": "weighted", "weights": [1, -1]}, "weights"),
        ({"vote": "weighted", "weights": [0, 0]}, "weights"),
        ({"vote": "weighted", "weights": [1, 1, 1]}, "weights"),
        ({"vote": "weighted", "weights": [1, float("nan")]}, "weights"),
        ({"consensus": 0}, "consensus"),
        ({"consensus": 3}, "consensus"),
    ],
)
def test_bad_input_is_named(arguments, name):
    with pytest.raises(ValueError, match=name):
        Ensemble(**{"models": networks(2)} | arguments)


def test_a_vote_of_ones_own_may_be_weighted(monkeypatch):
    monkeypatch.setitem(VOTES, "own", VOTES["weighted"])
    x, settings = images(3), {"weights": [3, 1]}
    found, expected = (Ensemble(networks(2), v, **settings)(x) for v in ("own", "weighted"))
    assert torch.equal(found, expected)
    with pytest.raises(ValueError, match="vote must come with weights where it is own"):
        Ensemble(networks(2), "own")


def test_members_of_other_classes_are_refused():
    class Two(nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :2]

    with pytest.raises(ValueError, match="models must give logits of the same classes"):
        Ensemble([*networks(1), Two()])(images(2))
