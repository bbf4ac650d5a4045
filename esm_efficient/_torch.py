"""Private names of torch, in one place.

Each docstring says what breaks without the function, and a test fails when a release drops what it uses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

# The base class of the modes that see every operation; without it neither memory on a CPU nor FLOPs could be counted.
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode

if TYPE_CHECKING:
    from torch import Tensor, nn

# --- encoder ---

HOOK_DICTIONARIES = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""The dictionaries of a module's hooks. Without them a hook inside a layer would see packed tokens unnoticed."""


def hooks_of(module: nn.Module) -> Sequence[Any]:
    """Return the hooks that are registered on a module."""
    members = module.__dict__
    if not any(map(members.get, HOOK_DICTIONARIES)):
        return ()
    return [hook for name in HOOK_DICTIONARIES for hook in (members.get(name) or {}).values()]


def descendants(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules below a module.

    Without it every forward pass would use ``modules()``, which looks for shared modules and is slower.
    """
    waiting = [module]
    while waiting:
        for child in waiting.pop()._modules.values():
            if child is not None:
                waiting.append(child)
                yield child


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor is a fake tensor, which has no values; without it a training step could not be simulated."""
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(tensor, FakeTensor)


def cpu_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Call torch's fused CPU attention.

    Without it attention on a CPU would go through autograd, which copies queries, keys and values.

    Args:
        query: shape (sequences, heads, queries, head width).
        key: shape (sequences, heads, tokens, head width).
        value: the same shape.
        scale: factor of the scores.

    Returns:
        The result in the shape of `query`, and the logsumexp of the scores, which the backward pass needs.
    """
    import torch

    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, False, scale=scale)


def cpu_attention_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, result: Tensor, logsumexp: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value of `cpu_attention`, which has no backward pass without it."""
    import torch

    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        gradient, query, key, value, result, logsumexp, 0.0, False, scale=scale
    )


def has_flex_attention() -> bool:
    """Whether torch's flex attention can be trained under torch.compile; that of torch 2.6 cannot."""
    import torch

    major, minor = torch.__version__.split(".")[:2]
    return (int(major), int(minor)) >= (2, 7)


def create_block_mask(mask: Callable[..., Tensor], queries: int, keys: int, device: torch.device) -> Any:
    """Make a block mask of flex attention, for all sequences and heads.

    The private option compiles it on CUDA; without it the mask would need a matrix of queries and keys in memory.
    """
    from torch.nn.attention import flex_attention

    compiled = device.type == "cuda"
    return flex_attention.create_block_mask(mask, None, None, queries, keys, device=str(device), _compile=compiled)


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
