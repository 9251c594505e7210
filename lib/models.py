"""Classifiers: logits from images in [0, 1], normalisation inside as the first layer."""

import logging

import torch
from torch import nn

from lib.checks import check_choice
from lib.data import INFO, OWN, fits, info, torchvision
from lib.ensemble import Ensemble
from lib.store.checkpoints import read_checkpoint, state_hash, write_checkpoint
from lib.store.programs import Program

log = logging.getLogger(__name__)
# The data set of a published checkpoint that does not name it, by its architecture.
USUAL_DATA = (("cifar", "cifar10"), ("resnet", "imagenet"))


class Normalize(nn.Module):
    """(x - mean) / std per channel, the first layer of every classifier here.

    Noise and radii stay in units of pixels in [0, 1].
    """

    def __init__(self, mean, std):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1))

    def forward(self, x):
        return (x - self.mean) / self.std


def mlp(shape, classes, width=64):
    """Two linear layers, for 8x8 digits: about 5,000 multiplications per image."""
    size = shape[0] * shape[1] * shape[2]
    return nn.Sequential(nn.Flatten(), nn.Linear(size, width), nn.ReLU(), nn.Linear(width, classes))


def small_cnn(shape, classes, width=8):
    """Two convolutions and a linear layer, for images of about 8x8 pixels."""
    channels, height, width_px = shape
    size = 2 * width * ((height + 1) // 2) * ((width_px + 1) // 2)
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(size, classes),
    )


class Denoised(nn.Module):
    """A denoiser in front of a classifier that stays as it is (Salman et al. 2020).

    The denoiser predicts the noise, which is taken off: f(x) = classifier(x - denoiser(x)). The
    classifier gets no gradient, and its layers are in eval mode at all times.

    - denoiser, classifier: nn.Module, of images to images and of images to logits.
    """

    def __init__(self, denoiser, classifier):
        super().__init__()
        self.denoiser, self.classifier = denoiser, classifier.requires_grad_(False)

    def train(self, mode=True):
        super().train(mode)
        self.classifier.eval()
        return self

    def forward(self, x):
        return self.classifier(x - self.denoiser(x))


def small_denoiser(channels, width=16):
    """Three convolutions, for images of about 8x8 pixels."""
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, channels, 3, padding=1),
    )


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2016).

    The shortcut is a 1x1 convolution where the shape changes, as in the code of Cohen et al.
    """

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x):
        shortcut = x if self.downsample is None else self.downsample(x)
        out = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(out)) + shortcut)


class CifarResNet(nn.Module):
    """The CIFAR ResNet of 6 n + 2 layers and 16, 32, 64 channels (He et al. 2016).

    Its parameters are named as in the checkpoints that Cohen et al. and their successors published.
    """

    def __init__(self, depth, classes, channels=3):
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks, 1)
        self.layer2 = self._stage(16, 32, blocks, 2)
        self.layer3 = self._stage(32, 64, blocks, 2)
        self.fc = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def _stage(inputs, outputs, blocks, stride):
        first = _BasicBlock(inputs, outputs, stride)
        return nn.Sequential(first, *(_BasicBlock(outputs, outputs, 1) for _ in range(blocks - 1)))

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean(dim=(2, 3)))


def build(architecture, data, classes=None):
    """A new classifier: Normalize with the data set's constants, then the network.

    - architecture: "mlp", "small_cnn", "cifar_resnet20" or "cifar_resnet110" (272,474 and 1,730,714
      parameters for 10 classes), torchvision's "resnet18" or "resnet50" (for 224x224 pixels), or
      "denoised_cnn", a small denoiser in front of a small_cnn, of which the denoiser alone learns.
    - data: name of a data set (lib.data.info).
    - classes: of the network's answers; None: the data set's.

    Returns an nn.Sequential of two. Raises ValueError naming architecture or data.
    """
    facts = info(data)
    check_choice(ARCHITECTURES, architecture=architecture)
    return nn.Sequential(
        Normalize(facts.mean, facts.std),
        ARCHITECTURES[architecture](facts.shape, classes or facts.classes),
    )


def _torchvision(name, shape, classes):
    if shape[0] != 3:
        raise ValueError(
            f"architecture {name!r} takes images of 3 channels; this data set has {shape[0]}: take "
            "small_cnn or cifar_resnet20"
        )
    return getattr(torchvision().models, name)(weights=None, num_classes=classes)


ARCHITECTURES = {
    "mlp": mlp,
    "small_cnn": small_cnn,
    "denoised_cnn": lambda shape, classes: Denoised(
        small_denoiser(shape[0]), small_cnn(shape, classes)
    ),
    "cifar_resnet20": lambda shape, classes: CifarResNet(20, classes, shape[0]),
    "cifar_resnet110": lambda shape, classes: CifarResNet(110, classes, shape[0]),
    "resnet18": lambda shape, classes: _torchvision("resnet18", shape, classes),
    "resnet50": lambda shape, classes: _torchvision("resnet50", shape, classes),
}


def model_hash(model):
    """Hex SHA-256 of a model's weights and buffers: names, dtypes, shapes and values.

    Buffers that the state dict leaves out (persistent=False) count: they make its logits, too.
    """
    state = model.state_dict()
    rest = {name: buffer for name, buffer in model.named_buffers() if name not in state}
    return state_hash(state | rest)


def save_checkpoint(path, model, header, half=True):
    """Write a model: its weights as safetensors, and a header.

    - header: dict with "architecture" and "data" (see `build`) and provenance (loss, sigma, ...).
    - half: round the weights to half precision (they are read back as float32).

    An Ensemble is one file with its members inside; its header is `ensemble_header`'s.

    Raises ValueError where the file could not be read back: a model of other weights than the
    header says, or weights beyond half precision.
    """
    if isinstance(model, Program):
        write_checkpoint(path, model.state_dict(), header | {"dtype": "int8"}, half=False)
        return
    with torch.device("meta"):
        _check_fit(_build_from(header), model.state_dict(), "model")
    write_checkpoint(path, model.state_dict(), header, half)


def ensemble_header(ensemble, headers):
    """The header of an Ensemble's checkpoint, from its members' headers (see save_checkpoint).

    Raises ValueError naming headers: one for each member, all of the same data set.
    """
    data = {header["data"] for header in headers}
    if len(headers) != len(ensemble.members) or len(data) != 1:
        raise ValueError(
            f"headers must be {len(ensemble.members)}, one for each member, all of one data set; "
            f"got {len(headers)} of {', '.join(sorted(data)) or 'none'}"
        )
    return {
        "architecture": "ensemble",
        "data": data.pop(),
        "members": list(headers),
        **ensemble.describe(),
    }


def _build_from(header):
    """The network of a checkpoint of ours, with fresh weights."""
    if header["architecture"] != "ensemble":
        if header["architecture"] not in ARCHITECTURES:
            raise ValueError(
                f"architecture {header['architecture']!r} is not known here, only "
                f"{', '.join(ARCHITECTURES)}: register it in a file of yours, and run that file in "
                "place of -m lib (README: a network of your own)"
            )
        classes = len(header.get("experts", "").split()) or None  # of a router (lib.recipes.Recipe)
        return build(header["architecture"], header["data"], classes)
    members = [_build_from(member) for member in header["members"]]
    return Ensemble(members, header["vote"], header["weights"], header["consensus"])


def load_checkpoint(path, architecture=None, data=None):
    """Read a model from a file: (module in float32 and eval mode, header dict).

    The module maps images in [0, 1] to logits. The file is one of
    - ours (save_checkpoint), which says all about itself, an Ensemble's members included;
    - a dict with `arch` and `state_dict` (Cohen et al. 2019 and the repositories that follow it).
      The first layer normalises by the file's `means` and `sds`, or by the data set's constants;
    - a dict with `net` (Zhai et al. 2020), which takes images in [0, 1] as they are;
    - a plain state dict (torchvision's), in front of which the data set's normalisation is set.
    That of images of your own is 0.5 and 0.5; a warning says so where the file has none.

    - architecture, data: needed where the file does not say (ARCHITECTURES, lib.data.info); data
      is taken to be cifar10 for cifar_resnet*, imagenet for resnet*.

    The header holds "architecture", "data", "format" and what else the file says. Raises
    FileNotFoundError, or ValueError on a damaged file, an unknown architecture, and missing,
    unexpected or misshapen weights, which it lists.
    """
    file = read_checkpoint(path)
    if file.format != "ours":
        return _build_published(path, file, architecture, data)
    for name, given in (("architecture", architecture), ("data", data)):
        if name not in file.header:
            held = ", ".join(file.header) or "nothing"
            raise ValueError(f"{path}: its header lacks {name!r}; it holds {held}")
        same = fits if name == "data" else lambda given, own: given in (None, own)
        if not same(given, file.header[name]):
            raise ValueError(
                f"{name} must be {file.header[name]!r}, as {path} says, or be left out; "
                f"got {given!r}"
            )
    if file.header.get("dtype") == "int8":
        return _program(path, file.state).eval(), {"format": "ours"} | file.header
    model = _build_from(file.header)
    _fill(model, file.state, path)
    return model.eval(), {"format": "ours"} | file.header


def _program(path, state):
    try:
        return Program(state)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _build_published(path, file, architecture, data):
    architecture = architecture or (file.header.get("arch") if file.format != "net" else None)
    if architecture not in ARCHITECTURES:
        says = "does not say its architecture"
        if architecture:
            says = f"names the architecture {architecture!r}"
        raise ValueError(
            f"{path} {says}: give it, one of {', '.join(ARCHITECTURES)} "
            "(README: a network of your own)"
        )
    data = data or next((d for a, d in USUAL_DATA if architecture.startswith(a)), None)
    if data not in INFO and not OWN.fullmatch(data or ""):
        raise ValueError(
            f"{path} does not say its data set: give data, one of {', '.join(INFO)}; got {data!r}"
        )
    model = build(architecture, data)
    _fill(model[1], file.state, path)
    if OWN.fullmatch(data) and file.format != "net" and not file.constants:
        log.warning(
            "%s holds no normalisation layer, and images of your own are normalised by 0.5 and "
            "0.5: where it was trained otherwise, put lib.models.Normalize(mean, std) in front, in "
            "Python", path,
        )  # fmt: skip
    elif file.format == "plain" and not file.constants:
        log.info(
            "%s holds no normalisation layer: as for torchvision's weights, one with the mean and "
            "deviation of %s is put in front", path, data,
        )  # fmt: skip
    if file.format == "net" and not file.constants:
        model[0] = nn.Identity()
    elif file.constants:
        mean, std = info(data).mean, info(data).std
        model[0] = Normalize(file.constants.get("mean", mean), file.constants.get("std", std))
    header = {name: value for name, value in file.header.items() if name != "arch"}
    return model.eval(), header | {
        "architecture": architecture,
        "data": data,
        "format": file.format,
    }


def _fill(model, state, path):
    """Load weights into a model in float32, where they fit."""
    _check_fit(model, state, path)
    state = {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
    model.load_state_dict(state, strict=False)


def _check_fit(model, state, source):
    """A ValueError that lists what of the weights is missing, unexpected or of another shape."""
    own = model.state_dict()
    both = [k for k in own if k in state]
    # Files from before torch 0.4.1 lack this counter, which the network does not use.
    needed = [k for k in own if not k.endswith("num_batches_tracked")]
    faults = {
        "missing": [k for k in needed if k not in state],
        "unexpected": [k for k in state if k not in own],
        "other shapes": [
            f"{k} {list(state[k].shape)}, not {list(own[k].shape)}"
            for k in both
            if state[k].shape != own[k].shape
        ],
    }
    if any(faults.values()):
        listed = [
            f"{what}: {', '.join(k[:10])}{f' and {len(k) - 10} more' if k[10:] else ''}"
            for what, k in faults.items()
            if k
        ]
        raise ValueError(f"{source} does not fit its architecture. {'; '.join(listed)}")
