"""Read the tensors of a model's modules, if the lean encoder knows what these modules compute."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from esm_efficient import _torch, compat
from esm_efficient.encoder.linear import Group
from esm_efficient.encoder.low_rank import Adapter
from esm_efficient.encoder.plan import autocast_dtype
from esm_efficient.encoder.quantized import is_lora_of_quantized, read_quantized
from esm_efficient.encoder.weights import Linear

CONVERSION_ADVICE = (
    "the frozen weights are float32, and every pass converts them: held in half precision they need no conversion and "
    "half the memory. Use prepare_model(dtype=%s), or from_pretrained(dtype=%s) before adapters are added"
)
"""What the log says once of a training run whose frozen weights are converted."""


def frozen_conversion(layer: Any) -> torch.dtype | None:
    """Return the dtype to which each pass converts the frozen float32 weights of an ``EsmLayer``; None if none does.

    The converted weights are not kept from pass to pass. peft merges adapters through ``weight.data``, which no version
    counter shows, so a kept copy could be stale unnoticed.
    """
    weight = getattr(_torch.child_of(layer, "output", "dense"), "weight", None)
    if not isinstance(weight, Tensor) or weight.requires_grad or weight.dtype != torch.float32:
        return None
    return autocast_dtype(weight.device.type)


def read_group(modules: Iterable[nn.Module], **options: Any) -> Group | str:
    """Return linear layers as a group, or the reason why one of them must run through its own forward."""
    linears = []
    for module in modules:
        linear = read_linear(module)
        if isinstance(linear, str):
            return linear
        linears.append(linear)
    return Group(linears, autocast=autocast_dtype(linears[0].weight.device.type), **options)


def read_linear(module: nn.Module) -> Linear | str:
    """Return a linear layer with its active LoRA adapters, or the reason why its forward may compute more."""
    plain = _read_base(module)
    if not isinstance(plain, str):
        return plain
    try:
        from peft.tuners.lora.layer import Linear as LoraLinear
    except ImportError:  # pragma: no cover
        return type(module).__name__
    if type(module) is not LoraLinear and not is_lora_of_quantized(module):
        return plain
    layer: Any = module
    return _read_lora(layer)


def _read_base(module: nn.Module) -> Linear | str:
    """Return a linear layer of torch, or one in 4 bits."""
    return _read_plain(module) if type(module) is nn.Linear else read_quantized(module) or _name_of(module)


def _read_lora(module: Any) -> Linear | str:
    plain = _read_base(module.get_base_layer())
    if isinstance(plain, str):
        return plain
    if module.disable_adapters and module.merged:
        module.unmerge()  # as its own forward does
    if module.disable_adapters or module.merged:
        return plain
    adapters = []
    for name in module.active_adapters:
        if name not in module.lora_A:
            continue
        adapter = _read_adapter(module, name)
        if isinstance(adapter, str):
            return adapter
        adapters.append(adapter)
    return plain._replace(adapters=tuple(adapters))


def _read_plain(module: nn.Linear) -> Linear | str:
    for tensor in (module.weight, module.bias):
        if tensor is not None and type(tensor) not in (Tensor, nn.Parameter) and not _torch.is_fake(tensor):
            return f"a weight of {type(tensor).__name__}"
    return Linear(module.weight, module.bias)


def _read_adapter(module: Any, name: str) -> Adapter | str:
    """Return one adapter of peft's ``lora.Linear``, or its kind if it is not LoRA's original form."""
    extension = compat.lora_extension(module, name)
    if extension:
        return extension
    a, b, dropout = module.lora_A[name], module.lora_B[name], module.lora_dropout[name]
    if type(a) is not nn.Linear or type(b) is not nn.Linear or a.bias is not None or b.bias is not None:
        return f"LoRA of {type(a).__name__}"
    if type(dropout) not in (nn.Identity, nn.Dropout):
        return type(dropout).__name__
    p = dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0
    # A fake tensor has no value to take a seed from.
    seed = int(torch.randint(2**62, (), device="cpu")) if p and not _torch.is_fake(a.weight) else 0
    return Adapter(a.weight, b.weight, float(module.scaling[name]), p, seed)


def trainable_tensors(module: nn.Module) -> list[Tensor]:
    """Return the weights that train, including the views by which FSDP replaces parameters."""
    tensors = {
        id(value): value
        for part in module.modules()
        for value in (*part.parameters(recurse=False), *part.__dict__.values())
        if isinstance(value, Tensor) and value.requires_grad
    }
    return list(tensors.values())


def is_norm(module: nn.Module) -> bool:
    """Whether a module is exactly torch's layer norm, over one axis."""
    return type(module) is nn.LayerNorm and len(module.normalized_shape) == 1


def _name_of(module: nn.Module) -> str:
    return f"{type(module).__module__.split('.')[0]}'s {type(module).__name__}"
