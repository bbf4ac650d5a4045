"""What is set on the modules of a model beside its weights, and changes what they compute."""

from __future__ import annotations

import functools
import hashlib
import inspect
import logging
import types
import uuid
from typing import Any

import numpy as np
import torch
from torch import distributed

from esm_efficient import _torch
from esm_efficient.trunk.states import bytes_of

logger = logging.getLogger(__name__)

_PASSING = ("training", "gradient_checkpointing", "name_or_path", "active_adapter")
"""Values of a module that do not change what it computes. The active adapter of a model is that of its layers too."""
_LIBRARIES = ("esm_efficient.", "transformers.", "peft.", "accelerate.", "torch.")
"""Prefixes of functions that are known by their names."""
_SIMPLE = (bool, int, float, complex, str, bytes, type(None), type(...), torch.dtype, torch.device)
"""Types whose values are told apart by their ``repr``."""


def matmul_precision() -> list[str]:
    """Return how float32 matrices are multiplied: by the settings of torch 2.9, or by the one that was before them.

    The function for the earlier one raises an error once a newer one is set, as transformers does for ``tf32=True``.
    """
    backends: Any = torch.backends
    if not hasattr(backends, "fp32_precision"):
        return [torch.get_float32_matmul_precision()]
    return [place.fp32_precision for place in (backends, backends.cuda.matmul, backends.mkldnn.matmul)]


def settings_of(name: str, module: Any) -> tuple[Any, ...]:
    """Return the class of a module, its numbers and switches, and what is known of its hooks and another forward."""
    values = {key: value for key, value in vars(module).items() if not key.startswith("_") and key not in _PASSING}
    simple = sorted((key, value) for key, value in values.items() if isinstance(value, (bool, int, float, str)))
    hooks = list(_torch.hooks_of(module))
    if (replaced := vars(module).get("forward")) is not None:
        hooks.append(replaced)
    return name, f"{type(module).__module__}.{type(module).__qualname__}", simple, [*map(_facts_of, hooks)]


def _facts_of(value: Any, depth: int = 5) -> Any:
    """Return what decides the result of a function: its name, and the values that it holds.

    A value that cannot be compared gives another text each time, so that nothing that was computed before is used.
    Functions of the libraries are known by their names. Global variables that a function reads are not seen.
    """

    def several(values: Any) -> list[Any]:
        return [_facts_of(item, depth - 1) for item in values]

    if isinstance(value, _SIMPLE):
        return repr(value)
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    if not depth:
        return _new_text(value)
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), hashlib.sha256(bytes_of(value).data).hexdigest()
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind != "O":
        return str(value.dtype), value.shape, hashlib.sha256(value.tobytes()).hexdigest()
    if isinstance(value, (tuple, list)):
        return several(value)
    if isinstance(value, (set, frozenset)):
        return sorted(map(repr, several(value)))
    if isinstance(value, dict):
        return sorted(map(repr, map(several, value.items())))
    if isinstance(value, functools.partial):
        return several([value.func, value.args, value.keywords])
    if isinstance(value, types.MethodType):
        return several([value.__func__, *_held_by(value.__self__)])
    if isinstance(value, types.FunctionType):
        name = f"{value.__module__}.{value.__qualname__}"
        if name.startswith(_LIBRARIES):
            return name
        cells = [_content_of(cell) for cell in value.__closure__ or ()]
        return name, several([value.__code__, *cells, value.__defaults__, value.__kwdefaults__])
    if isinstance(value, types.CodeType):
        return value.co_code.hex(), value.co_names, several(value.co_consts)
    call = inspect.getattr_static(type(value), "__call__", None)
    if isinstance(call, types.FunctionType) and not isinstance(value, torch.nn.Module):
        return several([call, *_held_by(value)])
    return _new_text(value)


def _held_by(owner: Any) -> list[Any]:
    """Return what the methods of an object read of it; nothing of a module, whose settings are listed by itself."""
    if isinstance(owner, torch.nn.Module):
        return []
    if isinstance(owner, type):
        return [owner]
    return [type(owner), vars(owner) if hasattr(owner, "__dict__") else _new_text(owner)]


def _content_of(cell: types.CellType) -> Any:
    """Return what a function holds in a cell; None if it is not set yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def _new_text(value: Any) -> str:
    """Return a text that was never returned before, the same on all ranks of a run, and warn of the value."""
    _warn_of(type(value).__qualname__)
    texts = [uuid.uuid4().hex]
    if distributed.is_available() and distributed.is_initialized():
        distributed.broadcast_object_list(texts)
    return texts[0]


@functools.cache
def _warn_of(kind: str) -> None:
    logger.warning(
        "a hook of the model holds a %s, which cannot be compared with that of another run: cached states and "
        "predictions of earlier runs are not used again",
        kind,
    )
