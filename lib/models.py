"""Classifiers: logits from images in [0, 1], normalisation inside as the first layer."""

import logging

import torch
from torch import nn

from lib.checks import check_choice
from lib.data import INFO


class Normalize(nn.Module):
    """First layer of every classifier here: (x - mean) / std per channel, so that noise and radii stay in units of pixels in [0, 1]."""

    def __init__(self, mean, std):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1))

    def forward(self, x):
        return (x - self.mean) / self.std


def mlp(shape, classes, width=64):
    """Two linear layers, for 8x8 digits: about 5,000 multiplications an image."""
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


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2016); the shortcut is a 1x1 convolution where the shape changes, as in the field's code."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        shortcut = x if self.downsample is None else self.downsample(x)
        out = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(out)) + shortcut)


class CifarResNet(nn.Module):
    """The CIFAR ResNet of 6 n + 2 layers and 16, 32, 64 channels (He et al. 2016), parameter names as in the published checkpoints of the field."""

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


def build(architecture, data):
    """A new classifier for a data set (lib.data.INFO): Normalize with the data set's constants, then the network, as nn.Sequential.

    architecture: "mlp", "small_cnn", "cifar_resnet20" or "cifar_resnet110" (272,474 and 1,730,714 parameters for 10 classes), or
    torchvision's "resnet18" or "resnet50" (for images of 224x224). Raises ValueError naming architecture or data.
    """
    check_choice(INFO, data=data)
    check_choice(ARCHITECTURES, architecture=architecture)
    info = INFO[data]
    return nn.Sequential(Normalize(info.mean, info.std), ARCHITECTURES[architecture](info.shape, info.classes))


def _torchvision(name, shape, classes):
    from lib.vision import torchvision

    if shape[0] != 3:
        raise ValueError(f"architecture {name!r} takes images of 3 channels; this data set has {shape[0]}: take small_cnn or cifar_resnet20")
    return getattr(torchvision.models, name)(weights=None, num_classes=classes)


ARCHITECTURES = {
    "mlp": mlp,
    "small_cnn": small_cnn,
    "cifar_resnet20": lambda shape, classes: CifarResNet(20, classes, shape[0]),
    "cifar_resnet110": lambda shape, classes: CifarResNet(110, classes, shape[0]),
    "resnet18": lambda shape, classes: _torchvision("resnet18", shape, classes),
    "resnet50": lambda shape, classes: _torchvision("resnet50", shape, classes),
}


def folded(model, shape):
    """The network with its batch norms folded into the convolutions before them (float32), where it can be traced and stays the same; else itself."""
    if not _batch_norms(model):
        return model
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(8, *shape, generator=generator) + torch.randn(8, *shape, generator=generator)
    try:
        from torch.fx.experimental.optimization import fuse  # here, since it may move

        with torch.no_grad():
            short, before = fuse(model), model(x)
            same = torch.allclose(short(x), before, rtol=1e-3, atol=1e-3 * float(before.abs().max()))
    except Exception as error:  # tracing runs the user's code on proxies of tensors: what that raises is anyone's guess
        logging.getLogger(__name__).debug("batch norms not folded: %s", error)
        return model
    return short if same and _batch_norms(short) < _batch_norms(model) else model


def _batch_norms(model):
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
