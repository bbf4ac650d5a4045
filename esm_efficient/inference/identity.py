"""Tell models apart by what they compute."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn


def identity_of(model: nn.Module, config: Any, *options: object) -> str:
    """Return a hash of a model's class, config and weights, of its active adapters with their scale, and of options.

    Args:
        model: a module.
        config: the config of the transformers model that it is, or is a part of.
        *options: whatever else the results depend on; their ``repr`` is hashed.
    """
    digest = hashlib.sha256(repr((type(model).__name__, config.to_json_string(), options)).encode())
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer | ModulesToSaveWrapper):
            facts = (module.active_adapters, module.disable_adapters, sorted(getattr(module, "scaling", {}).items()))
            digest.update(f"{name} {facts}".encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
