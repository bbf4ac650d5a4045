"""A stand-in for quantised linear layers, so that estimates need neither weights nor bitsandbytes."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import Function

from esm_efficient.adapters.registry import find_architecture, is_in_head, is_unread, linear_layers
from esm_efficient.encoder.weights import Packed
from esm_efficient.recipes import Quantization

_BLOCK, _OUTER_BLOCK = 64, 256
"""Weights per scale in 4 bits, and scales per outer scale: bitsandbytes' defaults."""


def quantize(model: nn.Module, quantization: Quantization, dtype: torch.dtype) -> None:
    """Replace the linear layers that bitsandbytes would quantise: all but heads and what no loss reads.

    Args:
        model: a model on any device, changed in place.
        quantization: how the weights are held.
        dtype: the dtype of products.
    """
    architecture = find_architecture(model)
    for path, layer in linear_layers(model):
        if not (is_in_head(architecture, path) or is_unread(architecture, path)):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, QuantizedLinear(cast(nn.Linear, layer), quantization, dtype))


class QuantizedLinear(nn.Linear):
    """A linear layer that allocates what one of bitsandbytes does; its results have no meaning.

    Args:
        linear: the layer in whose place it stands.
        quantization: how the weight is held.
        dtype: the dtype of products.
    """

    def __init__(self, linear: nn.Linear, quantization: Quantization, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self.shape, self.dtype = linear.weight.shape, dtype
        count = self.shape.numel()
        if quantization == "4bit":
            blocks = -(-count // _BLOCK)
            size, scales = count // 2, blocks + 4 * -(-blocks // _OUTER_BLOCK)
            self.packed = Packed(self.shape, dtype, self.restore)
        else:
            size, scales = count, 4 * self.out_features
        device = linear.weight.device
        self.weight = nn.Parameter(torch.empty(size, dtype=torch.uint8, device=device), requires_grad=False)
        self.register_buffer("scales", torch.empty(scales, dtype=torch.uint8, device=device))

    def restore(self, weight: Tensor) -> Tensor:
        """Allocate the weight as products take it."""
        return torch.zeros(self.shape, dtype=self.dtype, device=weight.device)

    def forward(self, input: Tensor) -> Tensor:
        """Return the outputs of the layer; nothing is kept for the backward pass."""
        return _Product.apply(input, self)


class _Product(Function):
    """A product with a restored weight, which the backward pass restores again."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer, ctx.dtype = layer, inputs.dtype
        bias = None if layer.bias is None else layer.bias.to(layer.dtype)
        weight = layer.restore(layer.weight)
        return nn.functional.linear(inputs.to(layer.dtype), weight, bias).to(inputs.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        layer = ctx.layer
        return (gradient.to(layer.dtype) @ layer.restore(layer.weight)).to(ctx.dtype), None
