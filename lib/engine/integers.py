"""8-bit networks in float32: the same integers, where no processor multiplies 8-bit ones."""

from typing import NamedTuple

import torch
from torch import fx

# Products of weights and activations, and how many dimensions of their result follow the channels.
LAYERS = {f"aten.conv{k}d.default": k for k in (1, 2, 3)} | {"aten.linear.default": 0}


class _Scaled(NamedTuple):
    """Whole numbers held in float32, and what each is worth: a float, or one of each channel."""

    whole: fx.Proxy
    scale: fx.Proxy | float


class _Rewriter(fx.Transformer):
    """Each 8-bit product by one of whole numbers in float32, scaled once where it is summed up."""

    def call_function(self, target, args, kwargs):
        name = str(target).removeprefix("quantized_decomposed.")
        if name == "quantize_per_tensor.default":
            x, scale, zero, low, high = args[:5]
            return torch.clamp(torch.round(x * (1.0 / scale)) + zero, low, high) - zero
        if name == "dequantize_per_tensor.default":
            return _Scaled(args[0], args[1])
        if name == "dequantize_per_channel.default" and args[3] == 0:
            weight, scale, zero = args[:3]
            shape = (-1,) + (1,) * (self._dimensions(weight) - 1)
            return _Scaled(weight.float() - zero.float().view(shape), scale)
        if name in LAYERS and all(isinstance(part, _Scaled) for part in args[:2]):
            return self._layer(target, LAYERS[name], *args, **kwargs)
        return super().call_function(target, tuple(map(_worth, args)), kwargs)

    def _dimensions(self, weight):
        return self.module.get_buffer(weight.node.target).dim()

    def _layer(self, target, after, x, weight, bias=None, *rest, **kwargs):
        shape = (-1,) + (1,) * after
        found = super().call_function(target, (x.whole, weight.whole, None, *rest), kwargs)
        found = found.round() * (weight.scale * x.scale).view(shape)
        return found if bias is None else found + bias.view(shape)


def _worth(value):
    return value.whole * value.scale if isinstance(value, _Scaled) else value


def in_float32(program):
    """An 8-bit network as an nn.Module that holds its whole numbers in float32, for any device.

    A product of two 8-bit numbers and a sum of such products below 2 ** 24 are whole in float32, so
    that neither the order of the summands nor the processor changes them; a layer is scaled once,
    after its sum, as 8-bit instructions do.

    - program: a Program (`lib.quantize`). It is not changed, and shares its tensors.
    """
    return _Rewriter(program.network).transform()
