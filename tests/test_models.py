"""The networks: normalisation inside, sizes as published, checkpoints that come back."""

import json

import pytest
import safetensors.torch
import torch
from torch import nn

from lib.data import INFO
from lib.losses import GaussianLoss
from lib.models import (
    ARCHITECTURES,
    Denoised,
    Normalize,
    build,
    load_checkpoint,
    mlp,
    model_hash,
    save_checkpoint,
)
from lib.noise import Gaussian
from lib.train import Schedule, fit

HEADER = {"architecture": "small_cnn", "data": "digits", "sigma": 0.5, "seed": 3}


def digits_cnn(seed=0):
    torch.manual_seed(seed)
    return build("small_cnn", "digits").eval()


def test_normalize_by_hand():
    """(x - mean) / std, channel by channel."""
    x = torch.stack([torch.full((2, 2), 0.5), torch.full((2, 2), 1.0)])[None]
    out = Normalize((0.25, 0.5), (0.5, 0.1))(x)
    torch.testing.assert_close(
        out, torch.stack([torch.full((2, 2), 0.5), torch.full((2, 2), 5.0)])[None]
    )


@pytest.mark.parametrize(
    ("architecture", "data", "parameters"),
    [
        ("mlp", "digits", 64 * 64 + 64 + 64 * 10 + 10),
        ("small_cnn", "digits", 8 * 9 + 8 + 16 * 8 * 9 + 16 + 256 * 10 + 10),
        ("small_cnn", "mnist", 8 * 9 + 8 + 16 * 8 * 9 + 16 + 16 * 14 * 14 * 10 + 10),
        ("cifar_resnet20", "cifar10", 272_474),
        ("cifar_resnet110", "cifar10", 1_730_714),
    ],
)
def test_sizes(architecture, data, parameters):
    """Counted by hand where layers are few.

    The ResNets have as many parameters as the published checkpoints of Cohen et al.
    """
    model = build(architecture, data).eval()
    assert sum(p.numel() for p in model.parameters()) == parameters
    if architecture != "cifar_resnet110":
        with torch.no_grad():
            assert model(torch.rand(3, *INFO[data].shape)).shape == (3, 10)


def test_normalisation_is_the_first_layer():
    """The network sees (x - mean) / std with the data set's constants.

    Noise is thus added to images in [0, 1].
    """
    model, x = digits_cnn(), torch.rand(2, 1, 8, 8)
    assert isinstance(model[0], Normalize)
    torch.testing.assert_close(
        model(x), model[1]((x - INFO["digits"].mean[0]) / INFO["digits"].std[0])
    )
    assert {"0.mean", "0.std"} <= set(model.state_dict())


def test_the_resnets_shortcut_keeps_the_shape_of_each_stage():
    """16, 32 and 64 channels at full, half and quarter size."""
    network, shapes = build("cifar_resnet20", "cifar10").eval()[1], []
    for stage in (network.layer1, network.layer2, network.layer3):
        stage.register_forward_hook(
            lambda module, inputs, output: shapes.append(tuple(output.shape[1:]))
        )
    with torch.no_grad():
        network(torch.rand(1, 3, 32, 32))
    assert shapes == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]


def test_a_checkpoint_in_half_precision_is_the_rounded_network(tmp_path):
    model = digits_cnn()
    save_checkpoint(tmp_path / "m.safetensors", model, HEADER)
    loaded, _ = load_checkpoint(tmp_path / "m.safetensors")
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.half().float())
    # Saved again it is the same file: what is rounded once stays.
    save_checkpoint(tmp_path / "again.safetensors", loaded, HEADER)
    assert (tmp_path / "again.safetensors").read_bytes() == (
        tmp_path / "m.safetensors"
    ).read_bytes()


def test_the_hash_tells_networks_apart():
    model, changed, other = digits_cnn(), digits_cnn(), digits_cnn(seed=1)
    assert model_hash(model) == model_hash(changed) != model_hash(other)
    with torch.no_grad():
        changed[1][0].bias[3] = torch.nextafter(changed[1][0].bias[3], torch.tensor(1.0))
    assert model_hash(changed) != model_hash(model)


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    """A header that names another architecture is refused, when written and when read.

    Missing and misshapen weights are listed.
    """
    header = HEADER | {"architecture": "mlp"}
    with pytest.raises(ValueError, match="model does not fit its architecture"):
        save_checkpoint(tmp_path / "m.safetensors", digits_cnn(), header)
    safetensors.torch.save_file(
        digits_cnn().state_dict(),
        tmp_path / "m.safetensors",
        metadata={"header": json.dumps(header)},
    )
    with pytest.raises(ValueError, match="does not fit its architecture"):
        load_checkpoint(tmp_path / "m.safetensors")


def test_a_checkpoint_of_an_own_architecture_says_how_to_register_it(tmp_path, monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "mynet", mlp)
    header = {"architecture": "mynet", "data": "digits"}
    save_checkpoint(tmp_path / "m.safetensors", build("mynet", "digits"), header)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"'mynet' is not known here.* register it in a file"):
        load_checkpoint(tmp_path / "m.safetensors")


def test_buffers_that_a_state_dict_leaves_out_are_in_the_hash():
    """Constants of a normalisation, mended between two runs, make another network."""

    class Scaled(torch.nn.Module):
        def __init__(self, scale):
            super().__init__()
            self.register_buffer("scale", torch.tensor(scale), persistent=False)

    assert model_hash(Scaled(0.5)) != model_hash(Scaled(0.25))
    assert model_hash(Scaled(0.5)) == model_hash(Scaled(0.5))


def test_a_denoiser_takes_off_what_it_predicts_and_learns_alone():
    """Linear maps by hand: the classifier sees x - 0.25 x. It stays in eval mode, and as it was."""
    denoiser, classifier = (
        nn.Conv2d(1, 1, 1, bias=False),
        nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(4, 2)),
    )
    nn.init.constant_(denoiser.weight, 0.25)
    model = Denoised(denoiser, classifier).train()
    assert model.denoiser.training
    assert not classifier[0].training
    x = torch.rand(3, 1, 2, 2)
    torch.testing.assert_close(model(x), classifier(0.75 * x))
    before = {name: value.clone() for name, value in classifier.state_dict().items()}
    fit(model, x, torch.tensor([0, 1, 1]), GaussianLoss(), Gaussian(0.25), Schedule(2, batch=3))
    assert all((value == before[name]).all() for name, value in classifier.state_dict().items())
    assert denoiser.weight.item() != 0.25
