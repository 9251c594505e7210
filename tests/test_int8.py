"""8-bit networks: the same bits wherever they are loaded, the same votes however they are asked."""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from test_cli import call
from torch import nn

from lib import BaseClassifier, Gaussian, ModelCounts, quantize, zoo
from lib.data import load
from lib.engine import int8
from lib.engine.integers import in_float32
from lib.ensemble import Ensemble
from lib.models import build, load_checkpoint, model_hash, save_checkpoint
from lib.store.programs import Program
from lib.store.records import load_counts

ROOT = pathlib.Path(__file__).parent.parent
NOISE = Gaussian(0.25)
CPU = torch.device("cpu")
# How 8-bit products are reckoned: in float32 on every processor, by its own instructions on some.
ARITHMETIC = ["float32", "instructions"] if int8.has_eight_bit_products(CPU) else ["float32"]


def ready(program, arithmetic="float32", **settings):
    """A BaseClassifier of digits that reckons as it is told to."""
    with pytest.MonkeyPatch.context() as patch:
        if arithmetic == "float32":
            patch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
        return BaseClassifier(program, (1, 8, 8), **settings)


@pytest.fixture(scope="module")
def images():
    return load("digits", "train")[0][:256]


@pytest.fixture(scope="module")
def network():
    return load_checkpoint(ROOT / "data" / "models" / "digits-cnn-sigma0.25.safetensors")[0]


@pytest.fixture(scope="module")
def program(network, images):
    return quantize(network, images, NOISE)


@pytest.fixture(scope="module", params=ARITHMETIC)
def bases(program, request):
    """Base classifiers of the same 8-bit network at two block sizes."""
    return {block: ready(program, request.param, block=block) for block in (64, 256)}


def votes(base, images, index, n=150):
    return ModelCounts(base, images[index], NOISE, index=index, progress=False).draw(n)


def test_votes_depend_on_nothing_but_the_draw(bases, images):
    """Order, company, pieces and block size change no vote."""
    index = np.arange(8)
    reference = votes(bases[64], images, index)
    assert np.array_equal(votes(bases[256], images, index), reference)
    assert np.array_equal(votes(bases[64], images, index[::-1].copy())[::-1], reference)
    assert np.array_equal(votes(bases[64], images, np.arange(5, 9))[:3], reference[5:])
    alone = ModelCounts(bases[256], images[[3]], NOISE, index=[3], progress=False)
    assert np.array_equal(sum(alone.draw(n) for n in (1, 99, 50))[0], reference[3])
    assert len(np.unique(reference.argmax(axis=1))) > 2


def test_float32_gives_the_same_votes_compiled_or_not_in_every_layout(program, images):
    """Its sums are whole numbers, so that their order changes no bit of a logit."""
    x = NOISE.sample(images[:64], torch.Generator().manual_seed(1))
    found = []
    for settings in ({}, {"compile": False}, {"compile": False, "layout": "contiguous"}):
        base = ready(program, block=64, votes=False, **settings)
        assert base.compiled is (settings == {})
        assert base.settings["dtype"] == "int8"
        found.append(base.forward(x))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_a_file_says_what_its_network_votes(program, bases, images):
    """Its operations, run one by one in floating point, give all but a few votes."""
    noisy = [NOISE.sample(images, torch.Generator().manual_seed(seed)) for seed in range(8)]
    with torch.no_grad():
        wanted = torch.cat([program(x).argmax(dim=1) for x in noisy])
    found = torch.cat([bases[256].forward(x) for x in noisy])
    assert (found != wanted).float().mean() < 0.005
    assert len(wanted.unique()) == 10


def test_stored_network_is_the_same_in_a_new_process(program, images, tmp_path):
    """Same hash and votes; and neither torch nor torchao says anything."""
    path = tmp_path / "net.int8.safetensors"
    save_checkpoint(path, program, {"architecture": "small_cnn", "data": "digits", "sigma": 0.25})
    loaded, header = load_checkpoint(path)
    assert header["dtype"] == "int8"
    assert all(
        torch.equal(a, loaded.state_dict()[name]) for name, a in program.state_dict().items()
    )
    code = f"""
import numpy as np, torch
from lib import BaseClassifier, Gaussian, ModelCounts, quantize, zoo
from lib.data import load
from lib.models import load_checkpoint, model_hash
network, _ = load_checkpoint({str(path)!r})
images = load("digits", "train")[0]
base = BaseClassifier(network, (1, 8, 8), block=64)
index = np.arange(8)
votes = ModelCounts(base, images[index], Gaussian(0.25), index=index, progress=False).draw(150)
again = quantize(load_checkpoint("data/models/digits-cnn-sigma0.25.safetensors")[0], images[:256],
                 Gaussian(0.25))
print([model_hash(network), votes.tolist(), base.settings["dtype"], model_hash(again)])
"""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    assert found.stderr == ""
    hash_, counts, dtype, again = json.loads(found.stdout.replace("'", '"'))
    assert hash_ == again == model_hash(program)
    assert dtype == "int8"
    here = BaseClassifier(program, (1, 8, 8), block=64)
    assert np.array_equal(counts, votes(here, images, np.arange(8)))


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
def test_against_integer_arithmetic_by_hand(arithmetic, images):
    """A linear network: integers multiplied and summed in numpy, scaled once, give its logits."""
    torch.manual_seed(0)
    linear = nn.Linear(64, 5)
    network = nn.Sequential(nn.Flatten(), linear)
    program = quantize(network, images, NOISE)
    step = next(
        entry
        for entry in json.loads(bytes(program.program.tolist()))["nodes"]
        if entry[0] == "quantized_decomposed.quantize_per_tensor.default"
    )
    _, scale, zero = step[1][:3]
    state = {name.removeprefix("network."): t for name, t in program.state_dict().items()}
    weight = next(t for t in state.values() if t.dtype == torch.int8).numpy().astype(np.int64)
    scales = state["_scale_0"].double().numpy()
    assert np.allclose(weight * scales[:, None], linear.weight.detach(), atol=scales.max() / 2)
    x = NOISE.sample(images[:64], torch.Generator().manual_seed(1)).flatten(1).numpy()
    pixels = np.clip(np.rint(x / np.float32(scale)) + zero, 0, 255).astype(np.int64)
    logits = (pixels - zero) @ weight.T * (scale * scales) + linear.bias.detach().numpy()
    base = ready(program, arithmetic, block=64, votes=False)
    found = base.forward(torch.from_numpy(x).view(64, 1, 8, 8)).numpy()
    assert np.allclose(found, logits, rtol=0, atol=5e-3)  # a pixel may round to the next integer
    top = np.sort(logits, axis=1)
    clear = top[:, -1] - top[:, -2] > 1e-3
    assert clear.sum() > 55
    assert np.array_equal(found.argmax(axis=1)[clear], logits.argmax(axis=1)[clear])


def test_8_bits_lose_little(network, bases, images):
    single = BaseClassifier(
        network, (1, 8, 8), dtype="float32", block=64, layout="contiguous", compile=False
    )
    index = np.arange(20)
    a, b = votes(single, images, index), votes(bases[64], images, index)
    assert 0 < np.abs(a - b).sum() / 2 < 0.03 * a.sum()


def test_8_bit_or_not_is_the_networks_own(network, program):
    with pytest.raises(ValueError, match="dtype int8 needs a network that was quantised once"):
        BaseClassifier(network, (1, 8, 8), dtype="int8")
    for dtype in (torch.float32, "bfloat16"):
        with pytest.raises(ValueError, match="dtype must be int8 for a quantised network"):
            BaseClassifier(program, (1, 8, 8), dtype=dtype)
    with pytest.raises(ValueError, match="dtype must be one of"):
        BaseClassifier(network, (1, 8, 8), dtype="int4")
    with pytest.raises(ValueError, match=r"shape must be \(1, 8, 8\)"):
        BaseClassifier(program, (1, 16, 16))
    with pytest.raises(ValueError, match="8-bit network already"):
        quantize(program, torch.zeros(4, 1, 8, 8), NOISE)


def test_a_compile_that_multiplies_no_integers_is_refused(program, monkeypatch):
    monkeypatch.setattr(int8, "_products", lambda: 0)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_vnni": True})
    with pytest.raises(ValueError, match="did not compile the network to 8-bit products"):
        BaseClassifier(program, (1, 8, 8), block=64)


def test_without_a_compiler_it_counts_eagerly_and_says_so(program, images, monkeypatch, caplog):
    reference = votes(ready(program, block=64), images, np.arange(8))
    monkeypatch.setenv("CXX", "no-such-compiler")
    base = BaseClassifier(program, (1, 8, 8), block=64)
    assert "no C++ compiler" in caplog.text
    assert not base.compiled
    assert np.array_equal(votes(base, images, np.arange(8)), reference)


class _Branches(nn.Module):
    def forward(self, x):
        return x.flatten(1)[:, :3] if x.sum() > 0 else x.flatten(1)[:, 3:6]


class _NoLayers(nn.Module):
    def forward(self, x):
        return x.flatten(1)[:, :3] * 2


class _Random(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 3)

    def forward(self, x):
        return self.layer(nn.functional.dropout(x.flatten(1), training=True))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (_Branches(), "cannot be quantised: "),
        (_NoLayers(), "no convolution or linear layer"),
        (_Random(), "is random"),
    ],
)
def test_networks_that_cannot_be_quantised(model, reason, images):
    with pytest.raises(ValueError, match=reason) as found:
        quantize(model, images[:128], NOISE)
    assert "\n" not in str(found.value)


def test_networks_of_every_layer_kind(images):
    """Shortcuts, batch norms and a mean over pixels; the float network is left as it was."""
    torch.manual_seed(0)
    model = build("cifar_resnet20", "digits").train()
    before = model_hash(model)
    program = quantize(model, images[:128], NOISE)
    assert model_hash(model) == before
    assert model.training
    kept = [t for t in program.state_dict().values() if t.dtype == torch.int8]
    assert len(kept) == 22  # 19 convolutions, 2 shortcuts, 1 linear layer
    with torch.no_grad():
        model.eval()
        assert torch.allclose(program(images[:8]), model(images[:8]), atol=0.2)
        assert torch.allclose(in_float32(program)(images[:8]), program(images[:8]), atol=0.05)


def test_a_file_holds_operations_of_torch_alone(program, tmp_path):
    """What is not an operation on tensors is refused, and is never called."""
    state = program.state_dict()
    text = bytes(state["program"].tolist()).decode()
    for name in ("os.system.default", "aten.no_such_thing.default", "_operator.delitem"):
        damaged = text.replace("aten.relu.default", name).encode()
        with pytest.raises(ValueError, match="no program of torch operations"):
            Program(state | {"program": torch.frombuffer(bytearray(damaged), dtype=torch.uint8)})
    with pytest.raises(ValueError, match="no program of torch operations"):
        Program({name: tensor for name, tensor in state.items() if name != "network._scale_0"})
    path = tmp_path / "damaged.safetensors"
    save_checkpoint(path, program, {"architecture": "small_cnn", "data": "digits"})
    path.write_bytes(path.read_bytes().replace(b"_frozen_param0", b"_frozen_paramX", 1))
    with pytest.raises(ValueError, match="is damaged"):
        load_checkpoint(path)


def test_the_command_line_quantises_and_certifies(tmp_path):
    """One process, one that is killed and resumed, and two processes give the same record."""
    path, out = tmp_path / "net.int8.safetensors", tmp_path / "one.tsv"
    made = ["quantize", "digits-cnn-sigma0.25", "--sigma", 0.25, "--out", path, "--images", 128]
    status, printed, _ = call(*made, "--json")
    header = json.loads(printed)
    assert status == 0
    assert header["source"] == "digits-cnn-sigma0.25"
    assert header["noisy_accuracy"] > 0.7
    assert "a network is quantised once" in call(*made)[2]
    asked = ["certify", path, "--sigma", 0.25, "--N0", 20, "--N", 180, "--skip", 90, "--block", 64]
    assert call(*asked, "--out", out)[0] == 0
    reference = load_counts(f"{out}.npz")
    assert (reference.header["dtype"], reference.header["compiled"]) == ("int8", True)
    assert reference.header["model_sha256"] == model_hash(load_checkpoint(path)[0])
    journal = tmp_path / "one.tsv.journal"
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:3])[:-10])
    (tmp_path / "one.tsv.npz").unlink()
    out.unlink()
    assert call(*asked, "--out", out)[0] == 0
    assert np.array_equal(load_counts(f"{out}.npz").counts, reference.counts)
    two = [*asked, "--out", tmp_path / "two.tsv"]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "lib"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run(
        [sys.executable, *launch, *map(str, two)],
        cwd=ROOT,
        env=environment,
        check=True,
        capture_output=True,
    )
    assert np.array_equal(load_counts(tmp_path / "two.tsv.npz").counts, reference.counts)
    status, _, said = call(*asked, "--out", tmp_path / "three.tsv", "--dtype", "float32")
    assert status == 2
    assert "dtype must be int8 for a quantised network" in said


def test_a_record_of_the_table_in_8_bits(tmp_path):
    """The network is made where it is missing, and once: the second call finds it."""
    shutil.copy(ROOT / "data/models/digits-cnn-sigma0.25.safetensors", tmp_path)
    engine = {"dtype": "int8", "block": 64, "layout": "channels_last", "compile": True}
    run = dataclasses.replace(zoo.RUNS["digits-cnn-sigma0.25-n1000"], n=100, engine=engine)
    found = zoo.count(run, index=[0, 9, 70], models=tmp_path)
    path = tmp_path / "digits-cnn-sigma0.25.int8.safetensors"
    before = path.read_bytes()
    assert found.header["model_sha256"] == model_hash(load_checkpoint(path)[0])
    assert found.header["dtype"] == "int8"
    assert model_hash(zoo.network_of(run, tmp_path, None)) == found.header["model_sha256"]
    assert path.read_bytes() == before


def test_committed_networks_are_8_bit_versions_of_their_sources():
    for path in sorted((ROOT / "data" / "models").glob("*.int8.safetensors")):
        network, header = load_checkpoint(path)
        source, _ = load_checkpoint(path.with_name(f"{header['source']}.safetensors"))
        assert path.name == f"{header['source']}.int8.safetensors"
        assert header["source_sha256"] == model_hash(source)
        layers = [m for m in source.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        assert len(layers) in (22, 112)  # ResNet-20, ResNet-110
        assert len(network.integers()) == len(layers)
        assert sum(t.numel() for t in network.integers()) == sum(m.weight.numel() for m in layers)
        # Sums of so many products of integers are whole in float32 (lib.engine.integers).
        sums = [t.float().flatten(1).abs().sum(dim=1).max() * 255 for t in network.integers()]
        assert max(sums) < 2**24


def test_an_ensemble_is_not_quantised_its_members_are():
    ensemble = Ensemble([zoo.model("digits-cnn-sigma0.25")])
    with pytest.raises(ValueError, match="quantise each of its members"):
        quantize(ensemble, torch.zeros(2, 1, 8, 8), Gaussian(0.25))
