"""The kernels of another device, so that a step under fake tensors on a CPU allocates what that device would."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from esm_efficient import _torch
from esm_efficient.costs.devices import Backend
from esm_efficient.encoder.attention import CuSeqlens

_FLOAT32_ON_CUDA = frozenset({F.layer_norm, torch.layer_norm, F.softmax, torch.softmax, Tensor.softmax})


class Kernels(TorchFunctionMode):
    """Make a step under fake tensors on a CPU allocate what it would on a device.

    CUDA differs from the CPU in two ways that matter here. Autocast runs layer norms and softmax in float32 (torch's
    list of CUDA operations that autocast to float32). Scaled dot-product attention has other kernels, which save other
    tensors: the flash kernel without a mask and in half precision, else the memory-efficient one. On Apple's GPUs
    attention is composed of matrix products.
    """

    def __init__(self, backend: Backend) -> None:
        super().__init__()
        self._backend = backend

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run a function with the kernels of the device."""
        kwargs = kwargs or {}
        if self._backend != "cpu":
            if func is F.scaled_dot_product_attention:
                return self._attention(*args, **kwargs)
            if self._backend == "cuda" and func in _FLOAT32_ON_CUDA and torch.is_autocast_enabled("cpu"):
                args = tuple(a.float() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
        return func(*args, **kwargs)

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        **_: Any,
    ) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        if self._backend == "mps":
            return _torch.math_attention(query, key, value, attn_mask, dropout_p, scale)
        if attn_mask is None and query.dtype != torch.float32:
            return _torch.flash_attention(query, key, value, dropout_p, scale)
        bias = None
        if attn_mask is not None:
            # The kernel adds a mask in the dtype of the scores, with rows aligned to 16 elements.
            bias = torch.zeros(attn_mask.shape, dtype=query.dtype)
            if bias.shape[-1] % 16:
                bias = F.pad(bias, (0, 16 - bias.shape[-1] % 16))[..., : attn_mask.shape[-1]]
            bias = bias.expand(*query.shape[:2], query.shape[2], key.shape[2])
        return _torch.efficient_attention(query, key, value, bias, dropout_p, scale)


def packed_attention(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: CuSeqlens, scale: float) -> Tensor:
    """Compute attention within packed sequences by CUDA's flash kernel for variable lengths.

    A real step in float32 uses flex attention, which saves the same tensors.
    """
    cu = cu_seqlens
    options = (cu.cu_seqlens_q, cu.cu_seqlens_k, cu.max_seqlen_q, cu.max_seqlen_k, 0.0, False, False)
    return _torch.varlen_flash_attention(query, key, value, *options, scale=scale)
