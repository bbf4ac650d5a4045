"""Read the tensors of a model's modules, if the lean encoder knows what these modules compute."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from esm_efficient import _torch, compat
from esm_efficient.encoder.linear import Adapter, Group, Linear


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
    if type(module) is nn.Linear:
        return _read_plain(module)
    try:
        from peft.tuners.lora.layer import Linear as LoraLinear
    except ImportError:  # pragma: no cover
        return type(module).__name__
    if type(module) is not LoraLinear:
        return _name_of(module)
    base = module.get_base_layer()
    plain = _read_plain(base) if type(base) is nn.Linear else _name_of(base)
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
    seed = int(torch.randint(2**62, ())) if p and not _torch.is_fake(a.weight) else 0
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


def autocast_dtype(device: str) -> torch.dtype | None:
    """Return the dtype of matrix products under torch.autocast on a device type; None without autocast."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _name_of(module: nn.Module) -> str:
    return f"{type(module).__module__.split('.')[0]}'s {type(module).__name__}"
