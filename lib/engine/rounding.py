"""Training in bfloat16, on processors that have it and on those that do not."""

import contextlib

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from lib.engine.hardware import has_bfloat16

LAYERS = {functional.conv1d, functional.conv2d, functional.conv3d, functional.linear}


@contextlib.contextmanager
def in_bfloat16(device):
    """Within it, convolutions and linear layers take and give bfloat16, forward and backward.

    It is torch.autocast. On a CPU without bfloat16, where torch is many times slower in it than in
    float32, these layers multiply in float32 what was rounded to bfloat16, and their results are
    rounded again: as the instructions do, but for the order of the sums.

    - device: torch.device that the tensors are on.
    """
    native = device.type != "cpu" or has_bfloat16(device)
    with (
        torch.autocast(device.type, dtype=torch.bfloat16),
        contextlib.nullcontext() if native else _Rounded(),
    ):
        yield


class _Rounded(TorchFunctionMode):
    """The layers in float32 between roundings to bfloat16; so are their gradients, by autograd."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function not in LAYERS:
            return function(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            args = tuple(map(_rounded, args))
            kwargs = {name: _rounded(value) for name, value in kwargs.items()}
            return function(*args, **kwargs).bfloat16()


def _rounded(value):
    return value.bfloat16().float() if isinstance(value, torch.Tensor) else value
