"""Attention within packed sequences, by the best kernel that is available.

A backend is a name in `BACKENDS`, a condition in `choose_backend`, and a kernel in `_kernel_of`.
"""

from __future__ import annotations

import importlib.util
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, lru_cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from esm_efficient import _torch
from esm_efficient.encoder.functions import MAX_CHUNKS, refuse_double_backward
from esm_efficient.encoder.packing import Packing, Run, runs_of
from esm_efficient.errors import ConfigurationError

logger = logging.getLogger(__name__)

Kernel = Callable[[Tensor, Tensor, Tensor, "CuSeqlens", float], Tensor]

BACKENDS = ("auto", "flash", "varlen", "flex", "sequences")
"""Ways to compute attention.

- ``"flash"``: ``flash_attn_varlen_func`` of the package flash-attn (Dao 2023), on CUDA in half precision.
- ``"varlen"``: torch's own ``torch.nn.attention.varlen``, on CUDA in half precision.
- ``"flex"``: torch's ``flex_attention`` with a block mask per sequence, compiled, on CUDA in any precision.
- ``"sequences"``: torch's fused attention, called once per distinct length in the batch; on any device.
- ``"auto"``: the first of these that is available.
"""


class CuSeqlens:
    """The boundaries of packed sequences, as variable-length attention kernels take them.

    Args:
        packing: the packed batch.
        first_only: each sequence has only one query, from its first token.
        device: device of the tensors.

    Attributes:
        query_lengths: queries per sequence.
        key_lengths: keys per sequence.
    """

    def __init__(self, packing: Packing, first_only: bool, device: torch.device) -> None:
        self.key_lengths = packing.lengths
        self.query_lengths = tuple(min(n, 1) for n in packing.lengths) if first_only else packing.lengths
        self.device = device

    @classmethod
    def cached(cls, packing: Packing, first_only: bool, device: torch.device) -> CuSeqlens:
        """Return the cu_seqlens of a batch; the first layer makes them, and the others reuse them."""
        key = ("cu_seqlens", first_only, device)
        if key not in packing.cache:
            packing.cache[key] = cls(packing, first_only, device)
        return cast(CuSeqlens, packing.cache[key])

    @cached_property
    def cu_seqlens_q(self) -> Tensor:
        """int32 of shape (sequences + 1,): the index of each sequence's first query, and the number of queries."""
        return self._cumulative(self.query_lengths)

    @cached_property
    def cu_seqlens_k(self) -> Tensor:
        """int32 of shape (sequences + 1,): the index of each sequence's first key, and the number of keys."""
        return self._cumulative(self.key_lengths)

    @property
    def max_seqlen_q(self) -> int:
        """The largest number of queries of a sequence."""
        return max(self.query_lengths)

    @property
    def max_seqlen_k(self) -> int:
        """The largest number of keys of a sequence."""
        return max(self.key_lengths)

    @cached_property
    def block_mask(self) -> Any:
        """Flex attention's mask of blocks, which lets queries see only the keys of their own sequence."""
        sequence_of_query, sequence_of_key = (
            torch.repeat_interleave(torch.tensor(lengths, device=self.device))
            for lengths in (self.query_lengths, self.key_lengths)
        )

        def same_sequence(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return sequence_of_query[q] == sequence_of_key[k]

        return _torch.create_block_mask(same_sequence, len(sequence_of_query), len(sequence_of_key), self.device)

    def _cumulative(self, lengths: tuple[int, ...]) -> Tensor:
        return F.pad(torch.tensor(lengths, dtype=torch.int32), (1, 0)).cumsum(0, dtype=torch.int32).to(self.device)


class _AttentionOverride(threading.local):
    """The kernel that replaces every backend in a thread; None if no kernel does."""

    kernel: Kernel | None = None


attention_override = _AttentionOverride()


@contextmanager
def use_attention(kernel: Kernel | None) -> Iterator[None]:
    """Compute attention with another function in this thread, for example to allocate like another device's kernel.

    A layer that is recomputed in the backward pass uses the kernel of its forward pass, in whichever thread it runs.

    Args:
        kernel: takes queries, keys and values of shape (tokens, heads, head width), `CuSeqlens` and the scale of the
            scores, and returns the shape of the queries; None for the usual backends.
    """
    previous, attention_override.kernel = attention_override.kernel, kernel
    try:
        yield
    finally:
        attention_override.kernel = previous


def attend(
    states: Tensor,
    query: Tensor | None,
    packing: Packing,
    *,
    backend: str = "auto",
    dropout: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """Compute attention of every token to the tokens of its own sequence.

    Args:
        states: (tokens, 3, heads, head width): queries, keys and values; or (tokens, 2, heads, head width): keys and
            values.
        query: (sequences, 1, heads, head width): the query of each sequence's first token, if `states` has no queries.
        packing: the packed batch.
        backend: one of `BACKENDS`.
        dropout: probability of dropping an attention weight.
        scale: factor of the scores; by default ``head width ** -0.5``.

    Returns:
        (queries, width): one row per token, or one per first token.
    """
    scale = states.shape[-1] ** -0.5 if scale is None else scale
    device, override = states.device, attention_override.kernel
    chosen = "sequences" if dropout else choose_backend(backend, device, states.dtype, states.shape[-1])
    if chosen == "sequences" and device.type == "cpu" and not dropout and override is None:
        return SequenceAttention.apply(states, query, packing.lengths, scale).flatten(1)
    cu_seqlens = CuSeqlens.cached(packing, query is not None, device)
    inputs = states[:, 0] if query is None else query[:, 0], states[:, -2], states[:, -1]
    if override is not None:
        return override(*inputs, cu_seqlens, scale).flatten(1)
    if chosen == "sequences":
        return attend_by_length(*inputs, cu_seqlens, scale, dropout).flatten(1)
    return _kernel_of(chosen)(*inputs, cu_seqlens, scale).flatten(1)


@lru_cache
def choose_backend(backend: str, device: torch.device, dtype: torch.dtype, width: int) -> str:
    """Return the backend that `attend` uses for heads of a given width, and log the choice of "auto" once.

    Raises:
        ConfigurationError: the name is unknown, or the backend is not available for the device and dtype.
    """
    if backend not in BACKENDS:
        raise ConfigurationError(f"attention={backend!r}: expected one of {', '.join(BACKENDS)}")
    cuda = device.type == "cuda"
    # FlashAttention-2 needs half precision, a head width that is a multiple of 8 and at most 256, and an Ampere GPU.
    half = dtype in (torch.float16, torch.bfloat16) and width % 8 == 0 and width <= 256
    flash = cuda and half and torch.cuda.get_device_capability(device) >= (8, 0)
    # Flex attention needs a head width that is a power of two and at least 16.
    flex = cuda and width >= 16 and width & (width - 1) == 0 and _torch.has_flex_attention()
    available = {
        "flash": flash and importlib.util.find_spec("flash_attn") is not None,
        "varlen": flash and importlib.util.find_spec("torch.nn.attention.varlen") is not None,
        "flex": flex and importlib.util.find_spec("triton") is not None,
        "sequences": True,
    }
    if backend == "auto":
        chosen = next(name for name, can_run in available.items() if can_run)
        logger.info("padding-free attention on %s in %s: %s", device.type, dtype, chosen)
        return chosen
    if backend == "flex" and device.type == "cpu":
        return backend  # uncompiled and slow, but correct: tests run it
    if not available[backend]:
        raise ConfigurationError(
            f"attention={backend!r} is not available on {device.type} in {dtype} with heads of width {width}: "
            "use attention='auto'"
        )
    return backend


class SequenceAttention(Function):
    """Torch's fused attention on a CPU, called once per distinct length in the batch.

    It reads queries, keys and values in the layout that a single matrix product gives, and writes gradients in the
    layout that the next product reads.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, query: Tensor | None, lengths: tuple[int, ...], scale: float) -> Tensor:
        """Return (queries, heads, head width)."""
        ctx.lengths, ctx.scale = lengths, scale
        runs = _chunked_runs(lengths)
        queries = states if query is None else query
        result = states.new_empty(queries.shape[0], *states.shape[2:])
        logsumexps = []
        for q, k, v, out in _views_of_runs(runs, states, query, result):
            values, logsumexp = _torch.cpu_attention(q, k, v, scale)
            out.copy_(values)
            logsumexps.append(logsumexp)
        ctx.save_for_backward(states, query, result, *logsumexps)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        """Return the gradients of `states` and `query`."""
        refuse_double_backward()
        states, query, result, *logsumexps = ctx.saved_tensors
        runs = _chunked_runs(ctx.lengths)
        d_states, d_query = torch.empty_like(states), None if query is None else torch.empty_like(query)
        inputs = _views_of_runs(runs, states, query, result)
        outputs = _views_of_runs(runs, d_states, d_query, gradient)
        for (q, k, v, out), (dq, dk, dv, d_out), logsumexp in zip(inputs, outputs, logsumexps, strict=True):
            grads = _torch.cpu_attention_backward(d_out, q, k, v, out, logsumexp, ctx.scale)
            for target, grad in zip((dq, dk, dv), grads, strict=True):
                target.copy_(grad)
        return d_states, d_query, None, None


def _chunked_runs(lengths: tuple[int, ...]) -> list[Run]:
    """Runs of at most a chunk of the batch, because a kernel's result is copied and needs memory until then."""
    return runs_of(lengths, max_tokens=sum(lengths) / MAX_CHUNKS)


def _views_of_runs(
    runs: list[Run], states: Tensor, query: Tensor | None, result: Tensor
) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Query, key, value and result of each run, as (sequences, heads, tokens, head width)."""
    views, sequence = [], 0
    for start, count, length in runs:
        tokens = states[start : start + count * length].unflatten(0, (count, length)).transpose(1, 3)
        if query is None:
            q, out = tokens[:, :, 0], result[start : start + count * length].unflatten(0, (count, length))
        else:
            q = query[sequence : sequence + count].transpose(1, 2)
            out = result[sequence : sequence + count].unflatten(0, (count, 1))
        views.append((q, tokens[:, :, -2], tokens[:, :, -1], out.transpose(1, 2)))
        sequence += count
    return views


def attend_by_length(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: CuSeqlens, scale: float, dropout: float = 0.0
) -> Tensor:
    """Call torch's fused attention once per distinct length in the batch; on any device, through autograd."""
    parts, q_start, k_start = [], 0, 0
    one_query = cu_seqlens.query_lengths != cu_seqlens.key_lengths
    for _, count, length in runs_of(cu_seqlens.key_lengths):
        queries = 1 if one_query else length
        q = query[q_start : q_start + count * queries].unflatten(0, (count, queries)).transpose(1, 2)
        k, v = (
            t[k_start : k_start + count * length].unflatten(0, (count, length)).transpose(1, 2) for t in (key, value)
        )
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale)
        parts.append(out.transpose(1, 2).flatten(0, 1))
        q_start, k_start = q_start + count * queries, k_start + count * length
    return torch.cat(parts)


@lru_cache
def _kernel_of(backend: str) -> Kernel:
    """Return the variable-length kernel of a backend."""
    if backend == "flash":
        from flash_attn import flash_attn_varlen_func

        def flash(query: Tensor, key: Tensor, value: Tensor, cu: CuSeqlens, scale: float) -> Tensor:
            sequences = cu.cu_seqlens_q, cu.cu_seqlens_k, cu.max_seqlen_q, cu.max_seqlen_k
            return flash_attn_varlen_func(query, key, value, *sequences, softmax_scale=scale)

        return flash
    if backend == "varlen":
        from torch.nn.attention.varlen import varlen_attn

        def varlen(query: Tensor, key: Tensor, value: Tensor, cu: CuSeqlens, scale: float) -> Tensor:
            sequences = cu.cu_seqlens_q, cu.cu_seqlens_k, cu.max_seqlen_q, cu.max_seqlen_k
            return cast(Tensor, varlen_attn(query, key, value, *sequences, scale=scale))

        return varlen
    return _flex


def _flex(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: CuSeqlens, scale: float) -> Tensor:
    q, k, v = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
    attention = _flex_attention(query.device.type == "cuda")
    return attention(q, k, v, block_mask=cu_seqlens.block_mask, scale=scale)[0].transpose(0, 1)


@lru_cache
def _flex_attention(compiled: bool) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return cast(Any, torch.compile(flex_attention, dynamic=True) if compiled else flex_attention)
