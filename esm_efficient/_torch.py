"""Private names of torch, in one place.

Each docstring says what breaks without the function, and a test fails when a release drops what it uses.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

# --- encoder ---


# --- costs ---


# --- estimation ---


def fake_tensor_mode() -> AbstractContextManager[Any]:
    """Return a mode in which tensors have shapes and dtypes and no numbers.

    Without it, a step could be simulated on meta tensors only, and these do not follow a device's dtype rules.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode()


def real_tensors() -> AbstractContextManager[Any]:
    """Leave fake tensor mode for a ``with`` block, which gets the mode or None.

    Without it, tables that an optimizer computes once, such as quantisation maps, could not be computed under the mode.
    """
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    return unset_fake_temporarily()


def run_backward(loss: Tensor) -> None:
    """Do what ``loss.backward()`` does, and keep function modes active while layers are recomputed.

    ``Tensor.backward`` disables function modes for its whole call, so that the attention kernels of recomputed layers
    would be those of the CPU.
    """
    import torch

    torch.autograd.Variable._execution_engine.run_backward(
        (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


def is_view(operation: Any) -> bool:
    """Return whether an operation returns a view of its input and so moves no memory.

    ``_unsafe_view`` is one that torch's schema does not mark; without it, every matrix product would be charged for a
    copy of its result.
    """
    import torch

    return operation.is_view or operation is torch.ops.aten._unsafe_view.default


def math_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, scale: float | None
) -> Tensor:
    """Scaled dot-product attention composed of matrix products, as Apple's GPUs run it.

    Without this name and those of the next three functions, a step could not be simulated for another device: the
    public function chooses the kernel of the CPU.
    """
    import torch

    return torch.ops.aten._scaled_dot_product_attention_math(query, key, value, mask, dropout, scale=scale)[0]


def flash_attention(query: Tensor, key: Tensor, value: Tensor, dropout: float, scale: float | None) -> Tensor:
    """Scaled dot-product attention by CUDA's flash kernel; see `math_attention`."""
    import torch

    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, dropout, scale=scale)[0]


def efficient_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, dropout: float, scale: float | None
) -> Tensor:
    """Scaled dot-product attention by CUDA's memory-efficient kernel; see `math_attention`."""
    import torch

    needs_gradient = any(tensor.requires_grad for tensor in (query, key, value))
    attention = torch.ops.aten._scaled_dot_product_efficient_attention
    return attention(query, key, value, bias, needs_gradient, dropout, scale=scale)[0]


def varlen_flash_attention(query: Tensor, key: Tensor, value: Tensor, *options: Any, scale: float) -> Tensor:
    """Attention by CUDA's flash kernel for packed sequences; see `math_attention`.

    Args:
        query: of shape (queries, heads, head width).
        key: of shape (keys, heads, head width).
        value: like `key`.
        *options: cu_seqlens of the queries and of the keys, the longest of each, dropout, whether the attention is
            causal, and whether to return the mask of the dropout.
        scale: factor of the scores.
    """
    import torch

    return torch.ops.aten._flash_attention_forward(query, key, value, *options, scale=scale)[0]


# --- profiling ---
