"""Tell models apart by what they compute."""

from __future__ import annotations

import hashlib
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

from esm_efficient.inference.files import rank_and_ranks
from esm_efficient.trunk.settings import settings_of
from esm_efficient.trunk.states import bytes_of


def identity_of(model: nn.Module, config: Any, *options: object) -> str:
    """Return a hash of the config, weights, hooks and options of a model, and of its active adapters with their scale.

    All ranks of a run return the same hash. In a distributed run the call joins the ranks.

    Args:
        model: a module.
        config: the config of the transformers model that it is, or is a part of.
        *options: whatever else the results depend on; their ``repr`` is hashed.
    """
    rank_and_ranks()  # joins them, if there are several
    digest = hashlib.sha256(repr((config.to_json_string(), options)).encode())
    for name, module in model.named_modules():
        digest.update(repr(settings_of(name, module)).encode())
        if isinstance(module, BaseTunerLayer | ModulesToSaveWrapper):
            facts = (module.active_adapters, module.disable_adapters, sorted(getattr(module, "scaling", {}).items()))
            digest.update(f"{name} {facts}".encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(bytes_of(tensor).data)
    return digest.hexdigest()
