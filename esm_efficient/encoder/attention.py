"""Attention within each of many sequences that lie one after another, through the best kernel that is present."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, lru_cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from esm_efficient import compat
from esm_efficient.encoder.functions import PIECES, refuse_double_backward
from esm_efficient.encoder.packing import Packing, Run, runs_of
from esm_efficient.errors import ConfigurationError

logger = logging.getLogger(__name__)

Kernel = Callable[[Tensor, Tensor, Tensor, "CuSeqlens", float], Tensor]

BACKENDS = ("auto", "flash", "varlen", "flex", "sequences")
"""What computes attention.

- ``"flash"``: ``flash_attn_varlen_func`` of the package flash-attn (Dao 2023), on CUDA in half precision.
- ``"varlen"``: torch's own ``torch.nn.attention.varlen``, on CUDA in half precision.
- ``"flex"``: torch's ``flex_attention`` with a block mask by sequence, compiled, on CUDA in any precision.
- ``"sequences"``: torch's fused attention, once for every length in the batch; on any device.
- ``"auto"``: the first of these that can be had.
"""


class CuSeqlens:
    """Where queries and keys of each sequence end, as kernels of variable length take them; made once for all layers.

    Args:
        packing: of the batch.
        first_only: there is one query a sequence, its first token.
        device: of the tensors.
    """

    def __init__(self, packing: Packing, first_only: bool, device: torch.device) -> None:
        self.key_lengths = packing.lengths
        self.query_lengths = tuple(min(n, 1) for n in packing.lengths) if first_only else packing.lengths
        self.device = device

    @classmethod
    def of(cls, packing: Packing, first_only: bool, device: torch.device) -> CuSeqlens:
        """Those of a packing, which keeps them for the layers that follow."""
        key = ("ends", first_only, device)
        if key not in packing.shared:
            packing.shared[key] = cls(packing, first_only, device)
        return cast(CuSeqlens, packing.shared[key])

    @cached_property
    def queries(self) -> Tensor:
        """int32 of shape (sequences + 1,): where each sequence's queries begin, and the end of the last."""
        return self._cumulative(self.query_lengths)

    @cached_property
    def keys(self) -> Tensor:
        """The same of the keys."""
        return self._cumulative(self.key_lengths)

    @cached_property
    def block_mask(self) -> Any:
        """Flex attention's mask that lets queries see the keys of their own sequence; of blocks, not of tokens."""
        from torch.nn.attention.flex_attention import create_block_mask

        of_query, of_key = (
            torch.repeat_interleave(torch.tensor(lengths, device=self.device))
            for lengths in (self.query_lengths, self.key_lengths)
        )

        def same_sequence(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return of_query[q] == of_key[k]

        compiled = self.device.type == "cuda"
        sizes = len(of_query), len(of_key)
        return create_block_mask(same_sequence, None, None, *sizes, device=str(self.device), _compile=compiled)

    def _cumulative(self, lengths: tuple[int, ...]) -> Tensor:
        return F.pad(torch.tensor(lengths, dtype=torch.int32), (1, 0)).cumsum(0, dtype=torch.int32).to(self.device)


def attend(
    states: Tensor, query: Tensor | None, packing: Packing, *, backend: str = "auto", dropout: float = 0.0
) -> Tensor:
    """Attention of every token to the tokens of its own sequence.

    Args:
        states: (tokens, 3, heads, head width), queries, keys and values; or (tokens, 2, heads, head width), keys and
            values.
        query: (sequences, 1, heads, head width), the query of each sequence's first token, if `states` has none.
        packing: of the batch.
        backend: one of `BACKENDS`.
        dropout: probability with which an attention weight is dropped.

    Returns:
        (queries, width): each token's, or each first token's.
    """
    scale, device = states.shape[-1] ** -0.5, states.device
    chosen = "sequences" if dropout else choose_backend(backend, device, states.dtype, states.shape[-1])
    if chosen == "sequences" and device.type == "cpu" and not dropout and _played is None:
        return SequenceAttention.apply(states, query, packing.lengths, scale).flatten(1)
    ends = CuSeqlens.of(packing, query is not None, device)
    inputs = states[:, 0] if query is None else query[:, 0], states[:, -2], states[:, -1]
    if _played is not None:
        return _played(*inputs, ends, scale).flatten(1)
    if chosen == "sequences":
        return by_sequence(*inputs, ends, scale, dropout).flatten(1)
    return _kernel(chosen)(*inputs, ends, scale).flatten(1)


_played: Kernel | None = None


@contextmanager
def played_by(kernel: Kernel) -> Iterator[None]:
    """Let another function compute attention, such as one that allocates as another device's kernel would.

    Args:
        kernel: takes queries, keys and values of shape (tokens, heads, head width), `CuSeqlens` and the scale of the
            scores, and returns the shape of the queries.
    """
    global _played
    before, _played = _played, kernel
    try:
        yield
    finally:
        _played = before


@lru_cache
def choose_backend(backend: str, device: torch.device, dtype: torch.dtype, width: int) -> str:
    """The backend that `attend` uses for heads of some width; said once in the log.

    Raises:
        ConfigurationError: no backend has that name, or it cannot be had for this device and type.
    """
    if backend not in BACKENDS:
        raise ConfigurationError(f"attention={backend!r}: expected one of {', '.join(BACKENDS)}")
    cuda = device.type == "cuda"
    # FlashAttention-2 wants half precision, heads of a multiple of 8 up to 256, and an Ampere GPU or a later one.
    half = dtype in (torch.float16, torch.bfloat16) and width % 8 == 0 and width <= 256
    flash = cuda and half and torch.cuda.get_device_capability(device) >= (8, 0)
    # Flex attention wants heads of a power of two, at least 16.
    flex = cuda and width >= 16 and width & (width - 1) == 0 and compat.has_flex_attention()
    possible = {
        "flash": flash and importlib.util.find_spec("flash_attn") is not None,
        "varlen": flash and importlib.util.find_spec("torch.nn.attention.varlen") is not None,
        "flex": flex and importlib.util.find_spec("triton") is not None,
        "sequences": True,
    }
    if backend == "auto":
        chosen = next(name for name, can in possible.items() if can)
        logger.info("padding-free attention on %s in %s: %s", device.type, dtype, chosen)
        return chosen
    if backend == "flex" and device.type == "cpu":
        return backend  # uncompiled and slow, but right: for tests of what is asked of it
    if not possible[backend]:
        raise ConfigurationError(
            f"attention={backend!r} cannot be had on {device.type} in {dtype} for heads of {width}: take 'auto'"
        )
    return backend


class SequenceAttention(Function):
    """Torch's fused attention on a CPU, once for every length in the batch.

    It reads queries, keys and values where a single matrix product has left them, and writes their gradients so that
    the next one can read them there.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, query: Tensor | None, lengths: tuple[int, ...], scale: float) -> Tensor:
        """(queries, heads, head width)."""
        ctx.lengths, ctx.scale = lengths, scale
        runs = _pieces(lengths)
        queries = states if query is None else query
        result = states.new_empty(queries.shape[0], *states.shape[2:])
        sums = []
        for q, k, v, out in _views(runs, states, query, result):
            part, total = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, scale=scale)
            out.copy_(part)
            sums.append(total)
        ctx.save_for_backward(states, query, result, *sums)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        """Of the states, where the forward pass has read them."""
        refuse_double_backward()
        states, query, result, *sums = ctx.saved_tensors
        runs = _pieces(ctx.lengths)
        d_states, d_query = torch.empty_like(states), None if query is None else torch.empty_like(query)
        inputs, outputs = _views(runs, states, query, result), _views(runs, d_states, d_query, gradient)
        for (q, k, v, out), (dq, dk, dv, d_out), total in zip(inputs, outputs, sums, strict=True):
            grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                d_out, q, k, v, out, total, 0.0, False, scale=ctx.scale
            )
            for target, grad in zip((dq, dk, dv), grads, strict=True):
                target.copy_(grad)
        return d_states, d_query, None, None


def _pieces(lengths: tuple[int, ...]) -> list[Run]:
    """The runs, in pieces of the batch, because a kernel returns in new memory what then goes to its place."""
    return runs_of(lengths, most=sum(lengths) / PIECES)


def _views(
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


def by_sequence(
    query: Tensor, key: Tensor, value: Tensor, ends: CuSeqlens, scale: float, dropout: float = 0.0
) -> Tensor:
    """Attention by torch's fused function, once for every length in the batch; for any device, through autograd."""
    parts, q_start, k_start = [], 0, 0
    one_each = ends.query_lengths != ends.key_lengths
    for _, count, length in runs_of(ends.key_lengths):
        queries = 1 if one_each else length
        q = query[q_start : q_start + count * queries].unflatten(0, (count, queries)).transpose(1, 2)
        k, v = (
            t[k_start : k_start + count * length].unflatten(0, (count, length)).transpose(1, 2) for t in (key, value)
        )
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale)
        parts.append(out.transpose(1, 2).flatten(0, 1))
        q_start, k_start = q_start + count * queries, k_start + count * length
    return torch.cat(parts)


@lru_cache
def _kernel(name: str) -> Kernel:
    """The function of a backend for sequences of any length."""
    if name == "flash":
        from flash_attn import flash_attn_varlen_func

        def flash(query: Tensor, key: Tensor, value: Tensor, ends: CuSeqlens, scale: float) -> Tensor:
            longest = max(ends.query_lengths), max(ends.key_lengths)
            return flash_attn_varlen_func(query, key, value, ends.queries, ends.keys, *longest, softmax_scale=scale)

        return flash
    if name == "varlen":
        from torch.nn.attention.varlen import varlen_attn

        def varlen(query: Tensor, key: Tensor, value: Tensor, ends: CuSeqlens, scale: float) -> Tensor:
            longest = max(ends.query_lengths), max(ends.key_lengths)
            return cast(Tensor, varlen_attn(query, key, value, ends.queries, ends.keys, *longest, scale=scale))

        return varlen
    return _flex


def _flex(query: Tensor, key: Tensor, value: Tensor, ends: CuSeqlens, scale: float) -> Tensor:
    q, k, v = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
    attention = _flex_attention(query.device.type == "cuda")
    return attention(q, k, v, block_mask=ends.block_mask, scale=scale)[0].transpose(0, 1)


@lru_cache
def _flex_attention(compiled: bool) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return cast(Any, torch.compile(flex_attention, dynamic=True) if compiled else flex_attention)
