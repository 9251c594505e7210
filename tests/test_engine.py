"""Live votes against known class probabilities; noise that depends on its seed alone."""

import copy
import os
import time
import warnings

import numpy as np
import pytest
import torch
from scipy.stats import binom, binomtest, chisquare, kstest, norm
from torch import nn

from lib.certify import certify
from lib.engine import classifier as engine
from lib.engine.classifier import BaseClassifier
from lib.engine.folding import folded
from lib.engine.live import ModelCounts
from lib.models import Normalize
from lib.noise import CHUNK, Gaussian, noise_stream

SHAPE = (1, 4, 4)
PLAIN = {"dtype": torch.float32, "block": 64, "layout": "contiguous", "compile": False}


class Steps(nn.Module):
    """Class j lies between the j-th and the next threshold on s = w'x.

    The logits are lines of rising slope in s, whose upper envelope changes at the thresholds.

    Under N(x, sigma^2 I) s is normal with mean w'x and deviation sigma ||w||, so the class
    probabilities are differences of Phi.
    """

    def __init__(self, weight, thresholds):
        super().__init__()
        self.weight = nn.Parameter(torch.as_tensor(weight, dtype=torch.float32).flatten())
        self.thresholds = thresholds
        # Line j + 1 overtakes line j at threshold j: each intercept is lower by the threshold.
        self.intercepts = nn.Parameter(
            torch.tensor(np.append(0.0, -np.cumsum(thresholds)), dtype=torch.float32)
        )

    def forward(self, x):
        s = x.flatten(1) @ self.weight.to(x.dtype)
        slopes = torch.arange(len(self.intercepts), dtype=x.dtype, device=x.device)
        return s[:, None] * slopes + self.intercepts

    def probabilities(self, x, sigma):
        mean = (x.double().flatten(1) @ self.weight.detach().double()).numpy()
        deviation = np.broadcast_to(sigma, len(x)) * float(self.weight.detach().double().norm())
        edges = np.array([-np.inf, *self.thresholds, np.inf])
        return np.diff(norm.cdf((edges - mean[:, None]) / deviation[:, None]), axis=1)


class Spy(nn.Module):
    """Remembers every row that it is shown; votes by the sign of the first pixel."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __deepcopy__(self, memo):
        return self

    def forward(self, x):
        self.seen.append(x.detach().clone())
        first = x.flatten(1)[:, 0]
        return torch.stack([first, -first], dim=1)


def images(size, seed=0):
    return torch.rand(size, *SHAPE, generator=torch.Generator().manual_seed(seed))


def steps():
    """Four classes, each likely somewhere among images of random pixels."""
    weight = torch.randn(16, generator=torch.Generator().manual_seed(1))
    return Steps(weight, np.array([-1.0, 0.1, 0.9]) + float(weight.sum()) / 2)


def noise_of(source, n):
    """The noise behind n draws of each of equal images, float64 [rows, pixels], in stream order."""
    spy = source.base._voter.model
    spy.seen.clear()
    total = int(np.broadcast_to(n, len(source)).sum())
    source.draw(n)
    return (torch.cat(spy.seen)[:total] - 0.5).double().flatten(1).numpy()


def spied(size=1, block=64, sigma=0.5, **settings):
    return ModelCounts(
        Spy(),
        torch.full((size, *SHAPE), 0.5),
        Gaussian(sigma),
        **PLAIN | {"block": block} | settings,
    )


def test_votes_follow_the_closed_form():
    """Each image's counts fit its four probabilities (chi-square), and so do all together.

    12 images, 20,000 draws of each.
    """
    model, x = steps(), images(12)
    counts = ModelCounts(model, x, Gaussian(0.3), seed=5, **PLAIN | {"block": 512}).draw(20_000)
    assert counts.dtype == np.int64
    assert (counts.sum(axis=1) == 20_000).all()
    pvalues = [
        chisquare(c, 20_000 * p).pvalue
        for c, p in zip(counts, model.probabilities(x, 0.3), strict=True)
    ]
    assert min(pvalues) > 1e-4
    assert kstest(pvalues, "uniform").pvalue > 1e-4


def test_one_sigma_per_example():
    model, x, sigma = steps(), images(3), np.array([0.2, 0.4, 1.5])
    counts = ModelCounts(model, x, Gaussian(sigma), **PLAIN).draw([5000, 7000, 9000])
    for c, p in zip(counts, model.probabilities(x, sigma), strict=True):
        assert chisquare(c, c.sum() * p).pvalue > 1e-4


@pytest.mark.parametrize(("size", "sigmas"), [(1, 3), (1, 2), (3, 1), (2, 3)])
def test_as_many_sigmas_as_examples(size, sigmas):
    with pytest.raises(
        ValueError, match=f"noise must have one level .*, or {size}, .*got {sigmas}"
    ):
        ModelCounts(steps(), images(size), Gaussian(np.full(sigmas, 0.5)), **PLAIN)


def test_the_sigma_of_an_example_is_found_by_its_place_not_by_its_index():
    model, x, sigma, index = steps(), images(3), np.array([0.2, 0.4, 1.5]), [2, 0, 1]
    together = ModelCounts(model, x, Gaussian(sigma), index=index, **PLAIN).draw(300)
    for i in range(3):
        alone = ModelCounts(
            model, x[i : i + 1], Gaussian(sigma[i]), index=index[i : i + 1], **PLAIN
        ).draw(300)
        np.testing.assert_array_equal(together[i], alone[0])


def test_certificates_of_a_linear_network_respect_the_true_margin():
    """400 certificates at alpha = 1/20 exceed the true radius no more often than that.

    The true radius is the distance to the boundary, |w'x + b| / ||w||.
    """
    weight = np.random.default_rng(0).normal(size=16)
    model, x = Steps(weight, [weight.sum() / 2]), images(400, seed=3)
    distance = np.abs(x.double().flatten(1).numpy() @ weight - weight.sum() / 2) / np.linalg.norm(
        weight
    )
    true = (x.double().flatten(1).numpy() @ weight > weight.sum() / 2).astype(int)
    found = certify(
        ModelCounts(model, x, Gaussian(0.25), **PLAIN | {"block": 512}),
        Gaussian(0.25),
        n0=20,
        n=400,
        alpha=0.05,
    )
    false = (found.prediction >= 0) & ((found.prediction != true) | (found.radius > distance))
    assert binomtest(int(false.sum()), 400, 0.05, alternative="greater").pvalue > 1e-4
    # Not by saying nothing: most are certified, and none of the far ones falls much short.
    assert (found.prediction >= 0).mean() > 0.6
    near = (distance > 0.1) & (distance < 0.3)
    assert np.median(found.radius[near] / distance[near]) > 0.7


def test_bfloat16_is_the_network_that_runs():
    """bfloat16 votes come from bfloat16 weights and images, and are counted on the same noise."""
    spy = Spy()
    ModelCounts(
        spy, torch.full((1, *SHAPE), 0.5), Gaussian(0.5), **PLAIN | {"dtype": torch.bfloat16}
    ).draw(10)
    single = spied()
    noise = noise_of(single, 10)
    assert spy.seen[-1].dtype == torch.bfloat16
    np.testing.assert_array_equal(
        (torch.from_numpy(noise).float() + 0.5).bfloat16().float(),
        spy.seen[-1][:10].flatten(1).float(),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_settings_name_the_precision_of_weights_and_images(dtype):
    class Precise(Steps):
        def forward(self, x):
            seen.append((x.dtype, self.weight.dtype, self.intercepts.dtype))
            return super().forward(x)

    seen = []
    source = ModelCounts(
        Precise(np.ones(16), [8.0]), images(1), Gaussian(0.5), **PLAIN | {"dtype": dtype}
    )
    source.draw(10)
    assert set(seen[-1]) == {dtype}
    assert source.base.settings["dtype"] == str(dtype).removeprefix("torch.")


def test_float32_weights_keep_all_their_bits():
    """A network that votes by the last bits of a weight: lost ones make it another network."""

    class Fine(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(1 + 2.0**-22))

        def forward(self, x):
            first = 0 * x.flatten(1)[:, 0]
            return torch.stack([first + (self.weight - 1) * 2**22, first + 0.5], dim=1)

    counts = ModelCounts(Fine(), images(1), Gaussian(0.5), **PLAIN).draw(64)
    np.testing.assert_array_equal(counts, [[64, 0]])


def test_noise_moments_and_law():
    """Normal (Kolmogorov-Smirnov), mean 0, variance sigma^2, pixel by pixel uncorrelated.

    Over 3 examples and 7,000 draws.
    """
    noise = noise_of(spied(size=3, block=100), 7000) / 0.5
    assert noise.shape == (21_000, 16)
    assert kstest(noise.ravel(), "norm").pvalue > 1e-4
    assert abs(noise.mean()) < 4.5 / np.sqrt(noise.size)
    assert abs(noise.var() - 1) < 4.5 * np.sqrt(2 / noise.size)
    correlation = np.corrcoef(noise.T)[np.triu_indices(16, 1)]
    assert np.abs(correlation).max() < 4.5 / np.sqrt(len(noise))


@pytest.mark.parametrize("generator", [np.random.default_rng, torch.Generator().manual_seed])
@pytest.mark.parametrize("parts", [1, 4])
def test_noise_has_the_tails_of_the_normal(generator, parts):
    """A clamp at 3 sigma moves the distribution by .0013, which Kolmogorov-Smirnov cannot see.

    The generators of the CPU and, run on the CPU, of a GPU.
    """
    streams = [copy.deepcopy(generator(seed)) for seed in range(parts)]
    x = torch.full((4000, *SHAPE), 0.25)
    noisy = Gaussian(0.5).sample(x, streams[0] if parts == 1 else streams)
    noise = ((noisy - x) / 0.5).double().abs().flatten().numpy()
    for level in (1, 2, 3, 3.5, 4):
        law = 2 * norm.sf(level)
        assert binomtest(int((noise > level).sum()), noise.size, law).pvalue > 1e-4
    assert binom.cdf(0, noise.size, 2 * norm.sf(4)) < 0.03  # so that the last level can fail, too
    assert len(np.unique(noise)) > 0.9 * noise.size


def test_noise_is_independent_across_draws_blocks_chunks_examples_seeds_and_calls():
    """No two rows are equal, and whole streams are uncorrelated.

    Neighbours, block by block, chunk by chunk, and one source against others.
    """
    source = spied(size=2, block=64)
    stream = noise_of(source, 40 * CHUNK)
    first, second = stream[: 40 * CHUNK], stream[40 * CHUNK :]
    later = noise_of(source, [40 * CHUNK, 0])
    other = noise_of(spied(seed=1), 40 * CHUNK)
    moved = noise_of(spied(index=[7]), 40 * CHUNK)
    everything = np.concatenate([first, second, later, other, moved])
    assert len(np.unique(everything, axis=0)) == len(everything)
    pairs = [(first, b) for b in (second, later, other, moved)] + [
        (first[lag:], first[:-lag]) for lag in (1, 64, CHUNK)
    ]
    for a, b in pairs:
        for change in (np.asarray, np.abs):
            assert abs(np.corrcoef(change(a).ravel(), change(b).ravel())[0, 1]) < 4.5 / np.sqrt(
                a.size
            )


def test_noise_of_a_draw_hangs_on_seed_index_and_number_alone():
    """Draw j of an example is the same noise whatever else was asked before or beside it.

    It does not depend on the pieces, nor on the blocks.
    """
    whole = noise_of(spied(index=[3], seed=9), 350)
    pieces = spied(size=3, block=7, index=[8, 3, 0], seed=9)
    parts = [
        noise_of(pieces, n)[slice(n[0], n[0] + n[1])]
        for n in ([5, 1, 9], [0, 99, 4], [70, 0, 0], [0, 101, 0], [1, 149, 30])
    ]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_streams_of_a_gpu_are_seeded_apart(monkeypatch):
    """Without a GPU at hand: the seeds given to torch's generator use 63 bits; no two are equal."""

    class Generator:
        def __init__(self, device):
            self.device = device

        def manual_seed(self, seed):
            return seed

    monkeypatch.setattr(torch, "Generator", Generator)
    cases = [
        (seed, index, chunk)
        for seed in range(4)
        for index in range(20)
        for chunk in (0, 1, 2, 1 << 40)
    ]
    seeds = {noise_stream(*case, torch.device("cuda")) for case in cases}
    assert len(seeds) == len(cases)
    assert all(0 <= seed < 1 << 63 for seed in seeds)
    assert max(seeds) > 1 << 60


@pytest.mark.parametrize("block", [1, 37, 64, 1000])
def test_counts_are_the_same_for_any_block_order_and_company(block):
    """On the line network in float32, whose logits are far from ties next to rounding."""
    model, x = steps(), images(9)
    expected = ModelCounts(model, x, Gaussian(0.3), seed=2, **PLAIN).draw(230)
    order = np.array([4, 0, 8, 5])
    some = ModelCounts(
        model, x[order], Gaussian(0.3), seed=2, index=order, **PLAIN | {"block": block}
    )
    counted = (
        some.draw([30, 0, 130, 230]) + some.draw([200, 100, 0, 0]) + some.draw([0, 130, 100, 0])
    )
    np.testing.assert_array_equal(counted, expected[order])
    assert (ModelCounts(model, x, Gaussian(0.3), seed=3, **PLAIN).draw(230) != expected).any()


def test_layout_and_tuning_do_not_change_what_is_counted(tmp_path, monkeypatch):
    """The engine says what it chose, keeps what was fixed, and remembers it on disk.

    The votes stay the same.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    torch.manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p)
    x = images(3)
    expected = ModelCounts(model, x, Gaussian(0.3), **PLAIN).draw(150)
    chosen = BaseClassifier(model, SHAPE, device="cpu", dtype=torch.float32, compile=False)
    assert chosen.settings["dtype"] == "float32"
    assert chosen.settings["block"] in (16, 32, 64, 128, 256, 512)
    assert chosen.settings["layout"] in ("channels_last", "contiguous")
    assert (
        BaseClassifier(model, SHAPE, device="cpu", dtype=torch.float32, compile=False).settings
        == chosen.settings
    )
    assert len(os.listdir(tmp_path / "randomized-smoothing")) == 1
    for base in (chosen, BaseClassifier(model, SHAPE, **PLAIN | {"layout": "channels_last"})):
        np.testing.assert_array_equal(ModelCounts(base, x, Gaussian(0.3)).draw(150), expected)


def test_a_compiled_engine_counts_the_same_votes():
    """Frozen and compiled, draws equal the eager ones and still differ from each other.

    The counts are binomial, not all or nothing.
    """
    model, x = steps(), images(3)
    eager = ModelCounts(model, x, Gaussian(0.3), **PLAIN)
    compiled = ModelCounts(model, x, Gaussian(0.3), **PLAIN | {"compile": True})
    assert compiled.base.settings["compiled"] is True
    expected = eager.draw([1000, 1500, 700])
    np.testing.assert_array_equal(compiled.draw([1000, 1500, 700]), expected)
    assert ((expected > 0).sum(axis=1) > 1).all()


def test_the_default_precision_follows_size_and_hardware(monkeypatch):
    """It is certified: bfloat16 from 100,000 parameters on, where the hardware has it."""
    for has in (True, False):
        monkeypatch.setattr(engine, "has_bfloat16", lambda device, has=has: has)
        for outputs, dtype in (
            (99, torch.float32),
            (100, torch.bfloat16 if has else torch.float32),
        ):
            assert (
                engine.default_dtype(nn.Linear(1000, outputs, bias=False), torch.device("cpu"))
                is dtype
            )


@pytest.mark.parametrize(("faster", "compiled"), [(True, True), (False, False)])
def test_long_jobs_are_compiled_where_that_is_faster(monkeypatch, faster, compiled):
    """By "auto": not for few draws, nor where compiling costs more than it saves or is slower."""
    base = BaseClassifier(steps(), SHAPE, **PLAIN | {"compile": "auto"})
    eager, times = base._voter, iter([1.0, 1.0, 0.5 if faster else 2.0])

    def compile():
        base._voter, base.compiled = object(), True

    monkeypatch.setattr(base, "compile", compile)
    monkeypatch.setattr(base, "_seconds", lambda: next(times))
    base.consider_compiling(19 * 64)  # not even timed
    base.consider_compiling(29 * 64 * base.workers)
    assert not base.compiled
    base.consider_compiling(31 * 64 * base.workers)
    assert (base.compiled, base._voter is not eager) == (compiled, compiled)


def test_all_draws_of_a_job_come_from_one_network(monkeypatch):
    """ "auto" decides at a job's first draw: a later one, or another job, changes nothing in it."""

    class Other(nn.Module):
        def forward(self, x):
            return torch.full((len(x),), 3)

    base = BaseClassifier(steps(), SHAPE, **PLAIN | {"compile": "auto"})

    def compile():
        base._voter, base.compiled = Other(), True

    monkeypatch.setattr(base, "compile", compile)
    monkeypatch.setattr(base, "_seconds", lambda: 0.0 if base.compiled else 1e3)
    eager = ModelCounts(steps(), images(2), Gaussian(0.3), **PLAIN)
    source = ModelCounts(base, images(2), Gaussian(0.3))
    np.testing.assert_array_equal(source.draw(1), eager.draw(1))
    np.testing.assert_array_equal(source.draw(2000), eager.draw(2000))
    assert not base.compiled
    planned = ModelCounts(base, images(2), Gaussian(0.3), planned=2000)
    np.testing.assert_array_equal(planned.draw(1), [[0, 0, 0, 1]] * 2)
    assert base.compiled
    np.testing.assert_array_equal(source.draw(100), eager.draw(100))


def test_without_tuning_the_settings_are_fixed():
    settings = BaseClassifier(
        steps(), SHAPE, device="cpu", dtype=torch.float32, compile=False, tune=False
    ).settings
    assert (settings["block"], settings["layout"]) == (128, "channels_last")


def test_the_type_of_machine_is_its_instructions_not_its_name(monkeypatch):
    found = {"cpu_name": "Fast 9000", "amx_int8": True, "avx512_vnni": True, "avx_vnni": False}
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    settings = BaseClassifier(steps(), SHAPE, **PLAIN).settings
    assert settings["processor"] == "AVX512 amx_int8 avx512_vnni"


def small_resnet():
    """Convolutions, batch norms with statistics of their own, a residual connection."""
    torch.manual_seed(0)
    model = BatchNormed().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return model


class BatchNormed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.a = nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.second, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.head = nn.Linear(64, 3)

    def forward(self, x):
        x = torch.relu(self.a(self.first(x)))
        return self.head((x + self.b(self.second(x))).flatten(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_counts_are_the_same_on_any_number_of_cores(threads, dtype):
    model, x, counted = small_resnet(), images(5), []
    for number in (1, 2, 5):
        threads(number)
        source = ModelCounts(model, x, Gaussian(0.5), **PLAIN | {"dtype": dtype, "block": 32})
        counted.append(source.draw([700, 0, 130, 1, 64]) + source.draw([300, 50, 0, 0, 999]))
        assert torch.get_num_threads() == number
    np.testing.assert_array_equal(counted[1], counted[0])
    np.testing.assert_array_equal(counted[2], counted[0])
    assert ((counted[0] > 0).sum(axis=1) > 1).any()


def test_a_network_that_fails_ends_the_draw(threads):
    """The error of one worker is the caller's, and the others stop at once."""

    class Fails(Spy):
        def forward(self, x):
            if len(self.seen) >= 12:
                raise RuntimeError("out of memory")
            return super().forward(x)

    threads(2)
    model = Fails()
    with pytest.raises(RuntimeError, match="out of memory"):
        ModelCounts(model, images(1), Gaussian(0.5), **PLAIN).draw(10_000_000)
    assert 12 <= len(model.seen) <= 13
    assert torch.get_num_threads() == 2


def test_what_a_forward_pass_stores_on_its_modules_is_its_own(threads):
    """Many networks keep features on self between two layers.

    Passes side by side must not read each other's.
    """

    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.body, self.head = nn.Linear(16, 64), nn.Linear(64, 3)

        def forward(self, x):
            self.kept = torch.relu(self.body(x.flatten(1)))
            time.sleep(1e-4)
            return self.head(self.kept)

    counted = []
    for number in (1, 4):
        threads(number)
        counted.append(ModelCounts(Keeps(), images(4), Gaussian(0.5), **PLAIN).draw(1000))
    np.testing.assert_array_equal(*counted)


def test_the_copies_of_the_workers_share_their_weights():
    base = BaseClassifier(small_resnet(), SHAPE, **PLAIN)
    first, second = base.voters(2, compiled=False)
    assert first is not second
    assert [p.data_ptr() for p in first.parameters()] == [p.data_ptr() for p in second.parameters()]
    assert base.voters(2, compiled=False)[1] is second


def test_batch_norms_are_folded_where_that_changes_nothing():
    model = small_resnet()
    short = folded(model, SHAPE)
    assert BaseClassifier(model, SHAPE, **PLAIN).settings["folded"]
    assert not any(isinstance(module, nn.BatchNorm2d) for module in short.modules())
    with torch.no_grad():
        torch.testing.assert_close(short(images(7)), model(images(7)), rtol=1e-4, atol=1e-4)


def test_networks_that_cannot_be_folded_stay_as_they_are():
    """Control flow on data cannot be traced.

    One convolution before two batch norms, or noise inside, must not be folded.
    """

    class Branches(BatchNormed):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else super().forward(-x)

    class Shares(BatchNormed):
        def forward(self, x):
            return self.head((self.a(self.first(x)) + self.b(self.first(x * x))).flatten(1))

    class Repeats(BatchNormed):
        def forward(self, x):
            return self.head((self.a(self.first(x)) + self.first(torch.relu(-x))).flatten(1))

    class Throws(BatchNormed):
        def forward(self, x):
            return super().forward(x + torch.rand(1, 1, 4, 4))

    class Slightly(BatchNormed):
        def forward(self, x):
            return self.head((self.a(self.first(x)) + 0.02 * self.first(torch.relu(-x))).flatten(1))

    for kind in (Branches, Shares, Repeats, Throws, Slightly):
        model = kind().eval()
        for layer in (model.a, model.b):
            nn.init.uniform_(layer.running_mean, -0.5, 0.5)
        assert folded(model, SHAPE) is model, kind
        if kind is not Throws:  # one noise for all rows of a pass: it may not vote
            assert not BaseClassifier(model, SHAPE, **PLAIN).settings["folded"]


@pytest.mark.parametrize("n", [1, 63, 64, 65, 130])
def test_padding_is_never_counted(n):
    """Counts sum to what was asked, though each pass is a full block whose padding votes too."""
    source = spied(size=2, block=64)
    before = len(source.base._voter.model.seen)  # passes of the check of the network
    counts = source.draw([n, 2])
    np.testing.assert_array_equal(counts.sum(axis=1), [n, 2])
    seen = source.base._voter.model.seen[before:]
    assert [len(b) for b in seen] == [64] * -(-(n + 2) // 64)


def test_asking_nothing_runs_nothing():
    source = spied(size=3)
    before = len(source.base._voter.model.seen)
    np.testing.assert_array_equal(source.draw(0), np.zeros((3, 2)))
    np.testing.assert_array_equal(source.draw([0, 5, 0]).sum(axis=1), [0, 5, 0])
    assert len(source.base._voter.model.seen) == before + 1


def test_votes_of_many_examples_are_binomial_together():
    """Counts of one image under 1,500 indices spread as the binomial: the noise is independent."""
    model = steps()
    x = images(1).expand(1500, *SHAPE).contiguous()
    counts = ModelCounts(model, x, Gaussian(0.3), **PLAIN | {"block": 512}).draw(40)[:, 1]
    p = model.probabilities(x[:1], 0.3)[0, 1]
    edges = np.unique(binom.ppf(np.linspace(0, 1, 11)[1:-1], 40, p))
    law = np.diff(np.concatenate([[0], binom.cdf(edges, 40, p), [1]]))
    seen = np.bincount(np.searchsorted(edges, counts), minlength=len(law))
    assert chisquare(seen, 1500 * law).pvalue > 1e-4


def test_the_model_is_copied_and_put_in_eval_mode():
    """Dropout and batch statistics do not act while voting; the given network stays as it was."""
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.9), nn.Linear(16, 3)).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    source = ModelCounts(model, images(2), Gaussian(0.001), **PLAIN)
    with torch.no_grad():
        model[2].weight.zero_()
    assert model.training
    counts = source.draw(50)
    with torch.no_grad():
        logits = images(2).flatten(1) @ before["2.weight"].T + before["2.bias"]
    np.testing.assert_array_equal(counts.argmax(axis=1), logits.argmax(dim=1))
    assert counts.max(axis=1).min() > 40


class OnItsOwn(nn.Module):
    """A linear network with something on top."""

    def __init__(self, change):
        super().__init__()
        torch.manual_seed(0)
        self.head, self.change = nn.Linear(16, 3), change

    def forward(self, x):
        return self.change(self.head(x.flatten(1)))


class Attends(nn.Module):
    """Tokens are the rows of an image; with batch_first=False torch takes images for them."""

    def __init__(self, batch_first):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=batch_first)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.layer(x[:, 0]).flatten(1))


class AlwaysTraining(BatchNormed):
    def train(self, mode=True):
        return super().train(True)


def deciding(mix):
    """Classes 0 and 1 by the first pixel and `mix` of it over the batch; class 2 far below."""

    class Deciding(nn.Module):
        def forward(self, x):
            own = x.flatten(1)[:, 0] - 0.5
            gap = mix(own)
            return torch.stack([gap, -gap, 0 * gap - 100], dim=1)

    return Deciding()


def hooked():
    """A network that reads its features from a hook.

    The hook writes them into the original, wherever its copies run.
    """
    model, found = OnItsOwn(lambda z: found["features"]), {}
    model.head.register_forward_hook(
        lambda module, inputs, output: found.setdefault("features", output)
    )
    with torch.no_grad():
        model(images(1))
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (OnItsOwn(lambda z: z - z.mean(dim=0, keepdim=True)), "each image by itself"),
        (
            OnItsOwn(lambda z: nn.functional.batch_norm(z, None, None, training=True)),
            "each image by itself",
        ),
        (Attends(batch_first=False), "each image by itself"),
        (deciding(lambda own: own.mean().expand(len(own))), "each image by itself"),
        (deciding(lambda own: own + 0.02 * own.mean()), "each image by itself"),
        (deciding(lambda own: own + (own.max() > 0.6)), "each image by itself"),
        (deciding(lambda own: own + 0.05 * own.roll(1)), "each image by itself"),
        (OnItsOwn(lambda z: z.mean(dim=0, keepdim=True)), r"a row an image.*got shape \[1, 3\]"),
        (OnItsOwn(lambda z: (z, z)), "a tensor of logits .*; got tuple: wrap it"),
        (OnItsOwn(lambda z: {"logits": z}), "; got dict: wrap it"),
        (OnItsOwn(lambda z: z[:, :1]), r"two classes or more; got shape \[4, 1\].*torch\.cat"),
        (OnItsOwn(lambda z: z[:, 0]), r"got shape \[4\]"),
        (hooked(), r"got shape \[1, 3\]"),
    ],
)
def test_networks_whose_votes_would_not_be_independent_are_refused(model, message):
    with pytest.raises(ValueError, match=f"model must .*{message}"):
        BaseClassifier(model, SHAPE, **PLAIN)


@pytest.mark.parametrize("held", [list, tuple, set, lambda nets: dict(enumerate(nets))])
def test_networks_that_are_not_registered_are_refused(held):
    """Neither eval mode nor a hash reaches them: a run would continue with other networks."""

    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.networks = held([OnItsOwn(lambda z: z), OnItsOwn(lambda z: -z)])

        def forward(self, x):
            nets = self.networks
            return sum(net(x) for net in (nets.values() if isinstance(nets, dict) else nets))

    with pytest.raises(ValueError, match=r"model holds .*plain \w+, networks,.*nn\.ModuleList"):
        BaseClassifier(nn.Sequential(Mean()), SHAPE, **PLAIN)


def test_batch_norm_that_stays_in_training_mode_is_refused():
    with pytest.raises(ValueError, match="each image by itself"):
        BaseClassifier(AlwaysTraining(), SHAPE, **PLAIN)


@pytest.mark.parametrize(
    "model",
    [
        Attends(batch_first=True),
        small_resnet(),
        OnItsOwn(lambda z: 0 * z),
        OnItsOwn(lambda z: z * 1e-6 + 5),
        OnItsOwn(lambda z: z - torch.tensor([0, 0, torch.inf])),
    ],
)
def test_networks_that_take_each_image_by_itself_are_not(model):
    assert BaseClassifier(model, SHAPE, **PLAIN).classes == 3


def test_a_random_forward_is_admitted_with_a_warning(caplog):
    source = ModelCounts(
        OnItsOwn(lambda z: nn.functional.dropout(z, 0.5)), images(2), Gaussian(0.3), **PLAIN
    )
    assert "two passes over the same images differ" in caplog.text
    assert source.draw(30).sum() == 60


class DrawsItsWeights(nn.Module):
    """A Bayesian linear network: weights drawn anew in each pass, for all of its rows together."""

    def __init__(self, share=1.0):
        super().__init__()
        torch.manual_seed(0)
        self.head, self.share = nn.Linear(16, 3), share

    def forward(self, x):
        own = 2 * (1 - self.share) * torch.randn(len(x), 3)
        return self.head(x.flatten(1)) + 2 * self.share * torch.randn(3) + own


@pytest.mark.parametrize(
    "model",
    [
        DrawsItsWeights(),
        DrawsItsWeights(share=0.6),
        OnItsOwn(lambda z: z * (torch.rand(()) < 0.5)),
        OnItsOwn(
            lambda z: nn.functional.dropout(
                nn.functional.batch_norm(z, None, None, training=True), 0.1
            )
        ),
    ],
)
def test_a_random_network_whose_rows_share_their_randomness_is_refused(model):
    """Votes of one block would be one draw: 11% of images were certified at p = .37."""
    for _ in range(20):
        with pytest.raises(ValueError, match=r"model must .* each image by itself"):
            BaseClassifier(model, SHAPE, **PLAIN)


@pytest.mark.parametrize(
    "change",
    [
        lambda z: nn.functional.dropout(z, 0.3),
        lambda z: z + torch.randn(z.shape),
        lambda z: z + 1e3 * (torch.rand(len(z), 1) < 0.02),
        lambda z: z * torch.rand(len(z), 1),
    ],
)
def test_a_random_network_of_independent_rows_is_not(change):
    for _ in range(50):
        assert BaseClassifier(OnItsOwn(change), SHAPE, **PLAIN).classes == 3


@pytest.mark.parametrize("convert", [nn.Module.double, nn.Module.half, nn.Module.bfloat16])
def test_networks_of_other_precisions_are_converted(convert):
    model = OnItsOwn(lambda z: z)
    rounded = convert(OnItsOwn(lambda z: z)).float()
    expected = ModelCounts(rounded, images(2), Gaussian(0.3), **PLAIN).draw(200)
    np.testing.assert_array_equal(
        ModelCounts(convert(model), images(2), Gaussian(0.3), **PLAIN).draw(200), expected
    )


def test_a_network_that_knows_no_bfloat16_runs_in_float32_unless_bfloat16_is_asked_for(
    monkeypatch, caplog
):
    monkeypatch.setattr(engine, "default_dtype", lambda model, device: torch.bfloat16)
    model = OnItsOwn(lambda z: z @ torch.eye(3))
    assert BaseClassifier(model, SHAPE, **PLAIN | {"dtype": None}).settings["dtype"] == "float32"
    assert "does not run in bfloat16, counting in float32" in caplog.text
    with pytest.raises(
        ValueError, match=r"dtype: model does not run in bfloat16 .*pass dtype=torch\.float32"
    ):
        BaseClassifier(model, SHAPE, **PLAIN | {"dtype": torch.bfloat16})
    assert (
        BaseClassifier(OnItsOwn(lambda z: z), SHAPE, **PLAIN | {"dtype": None}).settings["dtype"]
        == "bfloat16"
    )


def test_a_single_non_finite_logit_is_found():
    """One row in 3,000 whose logit overflows is refused and named, not counted as class 0."""

    class Rare(nn.Module):
        def forward(self, x):
            first = x.flatten(1)[:, 0]
            return torch.stack(
                [torch.where(first > 0.5 + 0.5 * 3.2, torch.nan, first), -first], dim=1
            )

    source = ModelCounts(Rare(), torch.full((4, *SHAPE), 0.5), Gaussian(0.5), **PLAIN)
    with pytest.raises(
        ValueError, match=r"non-finite logits .* on \d of 3000 noisy copies of example \d"
    ):
        source.draw(3000)


def test_images_outside_the_range_on_request():
    """A perturbed image may leave [0, 1]: with bounded=False its votes follow the closed form."""
    model, x = steps(), images(2) + 1.5
    counts = ModelCounts(model, x, Gaussian(1.0), bounded=False, **PLAIN).draw(5000)
    for c, p in zip(counts, model.probabilities(x, 1.0), strict=True):
        assert chisquare(c, 5000 * p).pvalue > 1e-4


def test_images_that_want_gradients_are_counted_without_a_word():
    """Those of an attack; torch warns where such a tensor is made a number."""
    x = images(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        counts = ModelCounts(steps(), x.clone().requires_grad_(), Gaussian(0.5), **PLAIN).draw(100)
    np.testing.assert_array_equal(counts, ModelCounts(steps(), x, Gaussian(0.5), **PLAIN).draw(100))


def test_grey_images_are_refused_by_a_network_of_three_channels():
    """Its normalisation would broadcast them to three channels: such votes mean nothing."""
    network = nn.Sequential(Normalize((0.5,) * 3, (0.2,) * 3), nn.Flatten(), nn.LazyLinear(2))
    network(torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match="normalises 3 channels, but the images have 1"):
        BaseClassifier(network, (1, 4, 4))
    BaseClassifier(network, (3, 4, 4), tune=False)
