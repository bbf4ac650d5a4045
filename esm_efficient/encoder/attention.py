"""Attention within packed sequences, by the best kernel that is available.

A backend is a name in `BACKENDS`, a condition in `choose_backend`, and a kernel in `_kernel_of`.
"""

from __future__ import annotations

import importlib.util
import inspect
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, lru_cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from esm_efficient import _torch
from esm_efficient.encoder.flash import flash_attention, hub_attention
from esm_efficient.encoder.functions import refuse_double_backward
from esm_efficient.encoder.packing import Packing, Run, runs_of
from esm_efficient.encoder.plan import MAX_CHUNKS
from esm_efficient.errors import ConfigurationError

logger = logging.getLogger(__name__)

Kernel = Callable[[Tensor, Tensor, Tensor, "CuSeqlens", float], Tensor]

BACKENDS = ("auto", "flash", "varlen", "efficient", "flex", "sequences", "hub")
"""Ways to compute attention.

- ``"flash"``: ``flash_attn_varlen_func`` of the packages flash-attn (Dao 2023), version 2, 3 or 4, on CUDA from Ampere
  on, in half precision (`esm_efficient.encoder.flash`).
- ``"varlen"``: torch's own ``torch.nn.attention.varlen``, on CUDA from Ampere on, in half precision.
- ``"efficient"``: torch's memory-efficient kernel, on CUDA in any precision; also on GPUs before Ampere, such as a T4.
- ``"flex"``: torch's ``flex_attention`` with a block mask per sequence, compiled, on CUDA from Ampere on, in any
  precision. It needs triton.
- ``"sequences"``: torch's fused attention, called once per distinct length in the batch; on any device.
- ``"hub"``: flash attention that the package kernels downloads from the Hub. It is never chosen unasked.
- ``"auto"``: the first of the others that is available.
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
        cu_seqlens_k: int32 of shape (sequences + 1,): the index of each sequence's first key, and the number of keys.
    """

    def __init__(self, packing: Packing, first_only: bool, device: torch.device) -> None:
        self.key_lengths = packing.lengths
        self.query_lengths = tuple(min(n, 1) for n in packing.lengths) if first_only else packing.lengths
        self.device = device
        # Not the packing itself: it keeps this object, and both would stay until the garbage is collected.
        self.cu_seqlens_k = packing.cu_seqlens(device)

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
        if self.query_lengths == self.key_lengths:
            return self.cu_seqlens_k
        if all(self.key_lengths):
            return torch.arange(len(self.key_lengths) + 1, dtype=torch.int32, device=self.device)
        return F.pad(self.cu_seqlens_k.diff().clamp(max=1).cumsum(0, dtype=torch.int32), (1, 0))

    @property
    def max_seqlen_q(self) -> int:
        """The largest number of queries of a sequence."""
        return max(self.query_lengths)

    @property
    def max_seqlen_k(self) -> int:
        """The largest number of keys of a sequence."""
        return max(self.key_lengths)

    @property
    def boundaries(self) -> tuple[Tensor, Tensor, int, int]:
        """The four arguments that variable-length kernels take after queries, keys and values."""
        return self.cu_seqlens_q, self.cu_seqlens_k, self.max_seqlen_q, self.max_seqlen_k

    @cached_property
    def block_mask(self) -> Any:
        """Flex attention's mask of blocks, which lets queries see only the keys of their own sequence."""
        sequence_of_query, sequence_of_key = (
            torch.repeat_interleave(bounds.diff(), output_size=sum(lengths))
            for bounds, lengths in ((self.cu_seqlens_q, self.query_lengths), (self.cu_seqlens_k, self.key_lengths))
        )

        def same_sequence(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return sequence_of_query[q] == sequence_of_key[k]

        return _torch.create_block_mask(same_sequence, len(sequence_of_query), len(sequence_of_key), self.device)


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
    states: Tensor | Sequence[Tensor],
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
            values. Or a sequence of these, each (tokens, heads, head width).
        query: (sequences, 1, heads, head width): the query of each sequence's first token, if `states` has no queries.
        packing: the packed batch.
        backend: one of `BACKENDS`.
        dropout: probability of dropping an attention weight. Above 0, the backend is always ``"sequences"``.
        scale: factor of the scores; by default ``head width ** -0.5``.

    Returns:
        One row per token, or one per first token, of shape (queries, width).

    Raises:
        ConfigurationError: as `choose_backend`.
    """
    value = states[:, -1] if isinstance(states, Tensor) else states[-1]
    scale = value.shape[-1] ** -0.5 if scale is None else scale
    device, override = value.device, attention_override.kernel
    chosen = "sequences" if dropout else choose_backend(backend, device, value.dtype, value.shape[-1])
    on_cpu = chosen == "sequences" and device.type == "cpu" and not dropout and override is None
    if on_cpu and isinstance(states, Tensor):
        return SequenceAttention.apply(states, query, packing.lengths, scale).flatten(1)
    cu_seqlens = CuSeqlens.cached(packing, query is not None, device)
    parts = states.unbind(1) if isinstance(states, Tensor) else states
    inputs = parts[0] if query is None else query[:, 0], parts[-2], parts[-1]
    if override is not None:
        return override(*inputs, cu_seqlens, scale).flatten(1)
    if chosen == "sequences":
        return attend_by_length(*inputs, cu_seqlens, scale, dropout).flatten(1)
    return _kernel_of(chosen, device, value.shape[-1])(*inputs, cu_seqlens, scale).flatten(1)


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
    half = dtype in (torch.float16, torch.bfloat16)
    capability = torch.cuda.get_device_capability(device) if cuda else (0, 0)
    ampere = capability >= (8, 0)
    flash = ampere and half and width % 8 == 0 and width <= 256
    package = flash_attention(capability, width) if flash and backend in ("auto", "flash") else None
    available = {
        "flash": package is not None,
        "varlen": flash and importlib.util.find_spec("torch.nn.attention.varlen") is not None,
        # The kernel reads 16 bytes at once.
        "efficient": cuda and width % (8 if half else 4) == 0,
        # On older GPUs inductor does not compile flex attention, and a matrix of all queries and keys would be made.
        "flex": ampere and _torch.has_flex_attention() and importlib.util.find_spec("triton") is not None,
        "sequences": True,
        "hub": flash,
    }
    if backend == "auto":
        chosen = next(name for name, can_run in available.items() if can_run)
        detail = f"{chosen} ({package[0]})" if package is not None else chosen
        logger.info("padding-free attention on %s in %s: %s", device.type, dtype, detail)
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
def _kernel_of(backend: str, device: torch.device, width: int) -> Kernel:
    """Return the variable-length kernel of a backend for heads of a given width."""
    if backend in ("flash", "hub"):
        capability = torch.cuda.get_device_capability(device)
        found = flash_attention(capability, width) if backend == "flash" else ("", hub_attention(capability[0]))
        assert found is not None, "the backend was not chosen for this device"
        compute = found[1]
        return lambda query, key, value, cu, scale: compute(query, key, value, cu.boundaries, scale)
    if backend == "varlen":
        from torch.nn.attention.varlen import varlen_attn

        takes_scale = "scale" in inspect.signature(varlen_attn).parameters  # that of torch 2.10 does not

        def varlen(query: Tensor, key: Tensor, value: Tensor, cu: CuSeqlens, scale: float) -> Tensor:
            usual = query.shape[-1] ** -0.5
            if not takes_scale and scale != usual:
                query = query * (scale / usual)
            options: Any = {"scale": scale} if takes_scale else {}
            return cast(Tensor, varlen_attn(query, key, value, *cu.boundaries, **options))

        return varlen
    return _efficient if backend == "efficient" else _flex


def _efficient(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: CuSeqlens, scale: float) -> Tensor:
    return _torch.varlen_efficient_attention(query, key, value, *cu_seqlens.boundaries, scale=scale)


def _flex(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: CuSeqlens, scale: float) -> Tensor:
    width = query.shape[-1]
    # Flex attention needs a head width that is a power of two; columns of zeros change nothing.
    padding = max(16, 1 << (width - 1).bit_length()) - width
    q, k, v = (F.pad(tensor, (0, padding)).transpose(0, 1)[None] for tensor in (query, key, value))
    attention = _flex_attention(query.device.type == "cuda")
    return attention(q, k, v, block_mask=cu_seqlens.block_mask, scale=scale)[0].transpose(0, 1)[..., :width]


@lru_cache
def _flex_attention(compiled: bool) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return cast(Any, torch.compile(flex_attention, dynamic=True) if compiled else flex_attention)
