"""Published checkpoints load, safely, into the network that was saved.

Each wrong file says what is wrong with it.
"""

import functools
import io
import pickle

import pytest
import safetensors.torch
import torch
from torch import nn

from lib.data import INFO
from lib.models import ARCHITECTURES, Normalize, build, load_checkpoint, model_hash, save_checkpoint

CIFAR = INFO["cifar10"]


class NormalizeLayer(nn.Module):
    """The first layer of the published networks, with its constants in the file.

    Written from its description.
    """

    def __init__(self, means, sds, stored=True):
        super().__init__()
        means, sds = torch.tensor(means), torch.tensor(sds)
        if stored:
            self.register_buffer("means", means)
            self.register_buffer("sds", sds)
        else:
            self.means, self.sds = means, sds

    def forward(self, x):
        return (x - self.means[:, None, None]) / self.sds[:, None, None]


def network(architecture="cifar_resnet20", data="cifar10", seed=0):
    """A bare network with random weights and batch statistics."""
    torch.manual_seed(seed)
    net = ARCHITECTURES[architecture](INFO[data].shape, INFO[data].classes)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return net.eval()


def save(path, content):
    torch.save(content, path)
    return path


def assert_same_logits(found, source, shape=(3, 32, 32)):
    x = torch.rand(4, *shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(found(x), source.eval()(x), rtol=0, atol=0)


STORED, FIXED = (
    NormalizeLayer([0.1, 0.2, 0.3], [0.9, 0.8, 0.7]),
    NormalizeLayer(CIFAR.mean, CIFAR.std, stored=False),
)


@pytest.mark.parametrize(
    "layer", [STORED, FIXED], ids=["constants in the file", "constants of the data set"]
)
@pytest.mark.parametrize(
    ("wrap", "prefix"),
    [
        (lambda layer, net: nn.Sequential(layer, net), "1."),
        (lambda layer, net: nn.Sequential(layer, nn.DataParallel(net)), "1.module."),
        (lambda layer, net: nn.DataParallel(nn.Sequential(layer, net)), "module.1."),
        (
            lambda layer, net: nn.DataParallel(nn.Sequential(layer, nn.DataParallel(net))),
            "module.1.module.",
        ),
    ],
)
def test_the_format_of_cohens_code(tmp_path, layer, wrap, prefix):
    """dict(arch, epoch, state_dict) under each prefix that Sequential and DataParallel give."""
    source = wrap(layer, network())
    assert sum(name.startswith(f"{prefix}conv1") for name in source.state_dict()) == 1
    path = save(
        tmp_path / "checkpoint.pth.tar",
        {"epoch": 90, "arch": "cifar_resnet20", "state_dict": source.state_dict()},
    )
    found, header = load_checkpoint(path)
    assert_same_logits(found, source)
    assert header == {
        "architecture": "cifar_resnet20",
        "data": "cifar10",
        "epoch": 90,
        "format": "state_dict",
    }


def test_the_format_of_cohens_code_of_old_torch_with_an_optimizer(tmp_path):
    """Files of torch before 1.6 are no zip archives.

    Training scripts also store the optimizer's state in them.
    """
    source = nn.Sequential(FIXED, nn.DataParallel(network()))
    optimizer = torch.optim.SGD(source.parameters(), lr=0.1, momentum=0.9)
    content = {
        "epoch": 1,
        "arch": "cifar_resnet20",
        "state_dict": source.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    torch.save(content, tmp_path / "old.tar", _use_new_zipfile_serialization=False)
    assert (tmp_path / "old.tar").read_bytes()[:1] == b"\x80"
    assert_same_logits(load_checkpoint(tmp_path / "old.tar")[0], source)


def test_older_still_without_the_batch_counters(tmp_path):
    source = nn.Sequential(FIXED, network())
    state = {
        name: value for name, value in source.state_dict().items() if "num_batches" not in name
    }
    assert len(state) < len(source.state_dict())
    assert_same_logits(
        load_checkpoint(save(tmp_path / "c.tar", {"arch": "cifar_resnet20", "state_dict": state}))[
            0
        ],
        source,
    )


@pytest.mark.parametrize("parallel", [True, False])
def test_macers_format(tmp_path, parallel):
    """dict(net): there is no normalisation layer, the network sees images in [0, 1].

    The file does not name its architecture.
    """
    source = network()
    path = save(
        tmp_path / "440.pth",
        {"net": (nn.DataParallel(source) if parallel else source).state_dict(), "epoch": 440},
    )
    with pytest.raises(
        ValueError, match=r"does not say its architecture: give it, one of mlp, .*cifar_resnet110"
    ):
        load_checkpoint(path)
    found, header = load_checkpoint(path, architecture="cifar_resnet20")
    assert_same_logits(found, source)
    assert header == {
        "architecture": "cifar_resnet20",
        "data": "cifar10",
        "epoch": 440,
        "format": "net",
    }


def test_torchvisions_format(tmp_path, caplog):
    """A plain state dict of torchvision's, whose weights expect ImageNet's normalisation.

    It is put in front, and the log says so.
    """
    caplog.set_level("INFO")
    net = network("resnet18", "imagenet")
    found, header = load_checkpoint(
        save(tmp_path / "resnet18.pth", net.state_dict()), architecture="resnet18"
    )
    info = INFO["imagenet"]
    assert_same_logits(found, nn.Sequential(Normalize(info.mean, info.std), net), (3, 64, 64))
    assert header == {"architecture": "resnet18", "data": "imagenet", "format": "plain"}
    assert "holds no normalisation layer" in caplog.text
    assert "of imagenet is put in front" in caplog.text


def test_ours(tmp_path):
    model = build("small_cnn", "digits").eval()
    save_checkpoint(
        tmp_path / "m.safetensors",
        model,
        {"architecture": "small_cnn", "data": "digits", "sigma": 0.5},
        half=False,
    )
    found, header = load_checkpoint(tmp_path / "m.safetensors")
    assert model_hash(found) == model_hash(model)
    assert header == {"architecture": "small_cnn", "data": "digits", "sigma": 0.5, "format": "ours"}
    with pytest.raises(
        ValueError, match=r"architecture must be 'small_cnn', as .* says, or be left out; got 'mlp'"
    ):
        load_checkpoint(tmp_path / "m.safetensors", architecture="mlp")
    with pytest.raises(
        ValueError, match=r"data must be 'digits', as .* says, or be left out; got 'mnist'"
    ):
        load_checkpoint(tmp_path / "m.safetensors", data="mnist")
    for damaged in (
        b"",
        (whole := (tmp_path / "m.safetensors").read_bytes())[:-1],
        whole[8:],
        whole + b"0",
    ):
        (tmp_path / "damaged").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"damaged is damaged or no checkpoint"):
            load_checkpoint(tmp_path / "damaged")


def test_a_plain_dict_of_our_own_network(tmp_path):
    """torch.save of the state dict of lib.models.build, normalisation included."""
    source = build("small_cnn", "mnist").eval()
    path = save(tmp_path / "m.pth", source.state_dict())
    with pytest.raises(
        ValueError, match=r"does not say its data set: give data, one of digits, mnist"
    ):
        load_checkpoint(path, architecture="small_cnn")
    assert_same_logits(
        load_checkpoint(path, architecture="small_cnn", data="mnist")[0], source, (1, 28, 28)
    )


class Exploit:
    """Runs a program when unpickled, as a published file could."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('code in the file was run')",))


@functools.cache
def wrong_files():
    """Name: (bytes of a file, what the error must say)."""
    state = nn.Sequential(FIXED, network()).state_dict()
    buffers = {}

    def saved(content):
        buffer = io.BytesIO()
        torch.save(content, buffer)
        return buffer.getvalue()

    without = {k: v for k, v in state.items() if k not in ("1.conv1.weight", "1.fc.bias")}
    more = state | {"1.extra.weight": torch.zeros(1)}
    shaped = state | {"1.fc.weight": torch.zeros(100, 64)}
    field = {"arch": "cifar_resnet20", "epoch": 1}
    whole = saved(field | {"state_dict": state})
    header = {"header": '{"data": "digits"}'}
    buffers["unknown architecture"] = (
        saved(field | {"arch": "vgg16", "state_dict": state}),
        r"names the architecture 'vgg16'.*one of mlp, .*resnet50",
    )
    buffers["missing weights"] = (
        saved(field | {"state_dict": without}),
        r"missing: conv1\.weight, fc\.bias",
    )
    buffers["unexpected weights"] = (
        saved(field | {"state_dict": more}),
        r"unexpected: extra\.weight",
    )
    buffers["other shapes"] = (
        saved(field | {"state_dict": shaped}),
        r"other shapes: fc\.weight \[100, 64\], not \[10, 64\]",
    )
    buffers["another architecture"] = (
        saved(field | {"arch": "cifar_resnet110", "state_dict": state}),
        r"missing: layer1\.3\.conv1\.weight.* and \d+ more",
    )
    buffers["no weights"] = (
        saved({"epoch": 3, "accuracy": 0.9}),
        r"expected a dict with state_dict and arch.*holds epoch, accuracy",
    )
    buffers["no dict"] = saved(torch.zeros(3)), "it holds Tensor"
    buffers["code"] = (
        saved(field | {"state_dict": state, "note": Exploit()}),
        "could run any code and is not read",
    )
    buffers["pickled code"] = pickle.dumps(Exploit()), "could run any code and is not read"
    buffers["whole module"] = saved(network()), "could run any code and is not read"
    buffers["truncated"] = whole[: len(whole) // 2], "is damaged, or holds more"
    buffers["text"] = b"<html>404: Not Found</html>", "is damaged or no checkpoint"
    buffers["empty"] = b"", "is damaged or no checkpoint"
    buffers["safetensors without our header"] = (
        safetensors.torch.save({"w": torch.zeros(1)}),
        "is damaged or no checkpoint",
    )
    buffers["safetensors of half a header"] = (
        safetensors.torch.save({"w": torch.zeros(1)}, metadata=header),
        "its header lacks 'architecture'",
    )
    return buffers


@pytest.mark.parametrize("name", wrong_files())
def test_wrong_files(tmp_path, name):
    content, message = wrong_files()[name]
    (tmp_path / "checkpoint").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(tmp_path / "checkpoint")


@pytest.mark.parametrize("ours", [True, False])
def test_a_flipped_bit_is_a_value_error_or_one_weight(tmp_path, ours):
    """Wherever a published file or one of ours is damaged, reading it gives a ValueError."""
    path = tmp_path / "c"
    save_checkpoint(path, build("mlp", "digits"), {"architecture": "mlp", "data": "digits"})
    if not ours:
        save(path, {"arch": "mlp", "epoch": 3, "state_dict": build("mlp", "digits").state_dict()})
    whole, refused = path.read_bytes(), 0
    for place in range(min(1500, len(whole))):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        try:
            load_checkpoint(path, data="digits")
        except ValueError:
            refused += 1
    assert refused > 100


def test_what_is_written_can_be_read_or_is_refused(tmp_path):
    header, path = {"architecture": "mlp", "data": "digits"}, tmp_path / "c"
    bare = nn.Sequential(nn.Identity(), build("mlp", "digits")[1])
    with pytest.raises(
        ValueError, match=r"model does not fit its architecture\. missing: 0\.mean, 0\.std"
    ):
        save_checkpoint(path, bare, header)
    large = build("mlp", "digits")
    nn.init.constant_(large[1][1].bias, 1e5)
    with pytest.raises(
        ValueError, match=r"half precision cannot hold, in 1\.1\.bias: pass half=False"
    ):
        save_checkpoint(path, large, header)
    assert not path.exists()
    save_checkpoint(path, large, header, half=False)
    assert_same_logits(load_checkpoint(path)[0], large.eval(), (1, 8, 8))


def test_what_a_refused_file_asks_for_is_named(tmp_path):
    (tmp_path / "c").write_bytes(wrong_files()["code"][0])
    with pytest.raises(ValueError, match=r"\(exec\)|builtins\.exec"):
        load_checkpoint(tmp_path / "c")


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.tar does not exist: name a checkpoint"):
        load_checkpoint(tmp_path / "nowhere.tar")
