"""What is set on the modules of a model beside its weights, and changes what they compute."""

from __future__ import annotations

import functools
import hashlib
import types
import uuid
from typing import Any

import torch
from torch import distributed

from esm_efficient.trunk.states import bytes_of

_PASSING = ("training", "gradient_checkpointing", "name_or_path", "active_adapter")
"""Values of a module that do not change what it computes. The active adapter of a model is that of its layers too."""
_LIBRARIES = ("esm_efficient.", "transformers.", "peft.", "accelerate.", "torch.")
"""Prefixes of functions that are known by their names."""


def settings_of(name: str, module: Any) -> tuple[Any, ...]:
    """Return the class of a module, its numbers and switches, and what is known of its hooks and another forward."""
    values = {key: value for key, value in vars(module).items() if not key.startswith("_") and key not in _PASSING}
    simple = sorted((key, value) for key, value in values.items() if isinstance(value, (bool, int, float, str)))
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    if (replaced := vars(module).get("forward")) is not None:
        hooks.append(replaced)
    return name, f"{type(module).__module__}.{type(module).__qualname__}", simple, [*map(_facts_of, hooks)]


def _facts_of(value: Any, depth: int = 5) -> Any:
    """Return what decides the result of a function: its name, and the values that it holds.

    A value that cannot be compared gives another text each time, so that nothing that was computed before is used.
    Functions of the libraries are known by their names. Global variables that a function reads are not seen.
    """

    def several(values: Any) -> list[Any]:
        return [_facts_of(item, depth - 1) for item in values or ()]

    if isinstance(value, (bool, int, float, str, bytes, type(None))):
        return repr(value)
    if depth and isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), hashlib.sha256(bytes_of(value).data).hexdigest()
    if depth and isinstance(value, (tuple, list)):
        return several(value)
    if depth and isinstance(value, functools.partial):
        return several([value.func, value.args, *sum(sorted(value.keywords.items()), ())])
    if depth and isinstance(value, types.MethodType):
        owner: Any = value.__self__
        held = () if isinstance(owner, torch.nn.Module) else sum(sorted(vars(owner).items()), ())
        return several([value.__func__, *held])
    if depth and isinstance(value, types.FunctionType):
        name = f"{value.__module__}.{value.__qualname__}"
        if name.startswith(_LIBRARIES):
            return name
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        defaults = *(value.__defaults__ or ()), *sum(sorted((value.__kwdefaults__ or {}).items()), ())
        return name, several([value.__code__, *cells, *defaults])
    if depth and isinstance(value, types.CodeType):
        return value.co_code.hex(), value.co_names, several(value.co_consts)
    return _new_text()


def _new_text() -> str:
    """Return a text that was never returned before, the same on all ranks of a run."""
    texts = [uuid.uuid4().hex]
    if distributed.is_available() and distributed.is_initialized():
        distributed.broadcast_object_list(texts)
    return texts[0]
