"""Private names of torch, in one place.

Each docstring says what breaks without the function, and a test fails when a release drops what it uses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# The base class of the modes that see every operation; without it neither memory on a CPU nor FLOPs could be counted.
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode

# --- encoder ---


# --- costs ---


def storage_key(storage: torch.UntypedStorage) -> int:
    """Return the address of the C++ storage, which all tensors that share memory have in common.

    Without it, views would be counted as memory of their own.
    """
    return storage._cdata


def operation_of(overload: Any) -> Any:
    """Return the operation that an overload belongs to.

    torch's table of FLOP formulas has operations as keys; without it every formula would be needed per overload.
    """
    return overload._overloadpacket


def cpu_attention_operations() -> tuple[Any, Any]:
    """Return the CPU's attention kernel and its backward pass.

    torch's FLOP counter has no formulas for the two; without them, FLOPs on a CPU would leave attention out.
    """
    aten = torch.ops.aten
    return aten._scaled_dot_product_flash_attention_for_cpu, aten._scaled_dot_product_flash_attention_for_cpu_backward


# --- estimation ---


# --- profiling ---


def call_after_backward(callback: Callable[[], None]) -> None:
    """Call a function when the backward pass that runs now has ended; only its hooks may ask for that.

    Without it, the end of the backward pass would be found at the optimizer's step, and clipping counted as backward.
    """
    torch.autograd.Variable._execution_engine.queue_callback(callback)
