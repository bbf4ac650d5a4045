"""Read linear layers that bitsandbytes holds in 4 bits.

Layers in 8 bits run through their own forward: LLM.int8 rounds the inputs of a product too, so that a product with the
restored weight would be another one.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from esm_efficient.adapters.quantization import is_quantized, usual_layout
from esm_efficient.encoder.weights import Linear, Packed


def read_quantized(module: nn.Module) -> Linear | None:
    """Return a linear layer in 4 bits, or None for any other module.

    The stand-in of estimates says itself what its weight stands for.
    """
    own: Any = module
    packed = getattr(own, "packed", None)
    if isinstance(packed, Packed):
        return Linear(own.weight, own.bias, packed=packed)
    if not is_quantized(module) or type(module).__name__ != "Linear4bit":
        return None
    weight: Any = usual_layout(module).weight
    state = getattr(weight, "quant_state", None)
    if state is None:  # not quantised yet
        return None
    bias: Any = module.bias
    dtype: Any = module.compute_dtype or state.dtype
    return Linear(weight, bias, packed=Packed(state.shape, dtype, partial(_restore, state)))


def is_lora_of_quantized(module: nn.Module) -> bool:
    """Whether a module is peft's LoRA around a linear layer in 4 bits."""
    return type(module).__module__ == "peft.tuners.lora.bnb" and type(module).__name__ == "Linear4bit"


def _restore(state: Any, weight: Tensor) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    restored: Tensor = dequantize_4bit(weight, state)
    return restored
