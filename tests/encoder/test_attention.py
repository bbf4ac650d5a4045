"""Every attention backend gives the numbers of attention that is computed one sequence at a time."""

from __future__ import annotations

import functools
import itertools
import logging
import sys
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.nn import functional as F

from esm_efficient import _torch
from esm_efficient.costs.allocations import AllocationTracker
from esm_efficient.costs.throughput import WorkCounter
from esm_efficient.encoder import attention
from esm_efficient.encoder.attention import CuSeqlens, attend, choose_backend, use_attention
from esm_efficient.encoder.packing import Packing
from esm_efficient.errors import ConfigurationError

ALL = {"flash_attn", "torch.nn.attention.varlen", "triton"}
LENGTHS = (1, 2, 2, 7)
HEADS, WIDTH = 2, 16


def reference(states, query=None):
    parts, start = [], 0
    for number, length in enumerate(LENGTHS):
        tokens = states[start : start + length].transpose(0, 2)
        q = tokens[:, 0] if query is None else query[number].transpose(0, 1)
        scores = q @ tokens[:, -2].transpose(1, 2) * states.shape[-1] ** -0.5
        parts.append((scores.softmax(-1) @ tokens[:, -1]).transpose(0, 1))
        start += length
    return torch.cat(parts).flatten(1)


def varlen_attention(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale):
    """Compute what the documentation of variable-length kernels says."""
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert max_seqlen_q == int(cu_seqlens_q.diff().max())
    assert max_seqlen_k == int(cu_seqlens_k.diff().max())
    parts = []
    for (a, b), (c, d) in zip(itertools.pairwise(cu_seqlens_q), itertools.pairwise(cu_seqlens_k), strict=True):
        q, k, v = (t.transpose(0, 1)[None] for t in (query[a:b], key[c:d], value[c:d]))
        parts.append(F.scaled_dot_product_attention(q, k, v, scale=scale)[0].transpose(0, 1))
    return torch.cat(parts)


@pytest.fixture
def fake_kernels(monkeypatch):
    """CPU functions with the documented signature of torch's varlen_attn, and in place of flash-attn."""
    monkeypatch.setattr(
        attention,
        "flash_attention",
        lambda capability, width: ("played", lambda q, k, v, bounds, scale: varlen_attention(q, k, v, *bounds, scale)),
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(attention._torch, "varlen_efficient_attention", varlen_attention)
    varlen = types.ModuleType("torch.nn.attention.varlen")
    varlen.varlen_attn = lambda q, k, v, cu_q, cu_k, max_q, max_k, *, scale: varlen_attention(
        q, k, v, cu_q, cu_k, max_q, max_k, scale
    )
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", varlen)
    monkeypatch.setattr(attention, "choose_backend", lambda backend, device, dtype, width: backend)
    attention._kernel_of.cache_clear()
    yield
    attention._kernel_of.cache_clear()


@pytest.mark.parametrize("backend", ["sequences", "flash", "varlen", "efficient", "flex"])
@pytest.mark.parametrize("first_only", [False, True])
@pytest.mark.parametrize("width", [WIDTH, 24])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_backend_attends_only_within_sequences(backend, first_only, width, fake_kernels):
    torch.manual_seed(0)
    states = torch.randn(sum(LENGTHS), 2 if first_only else 3, HEADS, width, requires_grad=backend != "flex")
    query = torch.randn(len(LENGTHS), 1, HEADS, width).requires_grad_(backend != "flex") if first_only else None
    inputs = [states] if query is None else [states, query]
    expected = reference(states, query)
    trains = backend != "flex"  # flex attention has no backward pass on a CPU
    with torch.set_grad_enabled(trains):
        found = attend(states, query, Packing((4, 7), LENGTHS), backend=backend)
    assert torch.allclose(found, expected, atol=1e-6)
    if not trains:
        return
    upstream = torch.randn_like(expected)
    for a, b in zip(
        torch.autograd.grad(found, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    ):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("backend", ["varlen", "flex"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_all_layers_share_the_cu_seqlens_of_a_batch(backend, fake_kernels):
    packing = Packing((4, 7), LENGTHS)
    states, query = torch.randn(sum(LENGTHS), 3, HEADS, WIDTH), torch.randn(len(LENGTHS), 1, HEADS, WIDTH)
    for _ in range(2):
        assert torch.allclose(attend(states, None, packing, backend=backend), reference(states), atol=1e-6)
    last = attend(states[:, 1:], query, packing, backend=backend)
    assert torch.allclose(last, reference(states[:, 1:], query), atol=1e-6)
    assert len(packing.cache) == 3  # of all queries, of first tokens, and the boundaries that both use


def test_an_override_computes_attention_in_its_thread_only():
    packing = Packing((4, 7), LENGTHS)
    states = torch.randn(sum(LENGTHS), 3, HEADS, WIDTH)

    def zeros(query, key, value, cu_seqlens, scale):
        assert cu_seqlens.cu_seqlens_q.tolist() == cu_seqlens.cu_seqlens_k.tolist() == [0, 1, 3, 5, 12]
        return torch.zeros_like(query)

    with use_attention(zeros), ThreadPoolExecutor(1) as pool:
        assert not attend(states, None, packing).any()
        with use_attention(None):
            assert torch.allclose(attend(states, None, packing), reference(states), atol=1e-6)
        assert not attend(states, None, packing).any()
        assert torch.allclose(pool.submit(attend, states, None, packing).result(), reference(states), atol=1e-6)
    assert torch.allclose(attend(states, None, packing), reference(states), atol=1e-6)


def test_attention_with_dropout_has_the_right_mean():
    torch.manual_seed(0)
    states = torch.randn(sum(LENGTHS), 3, HEADS, WIDTH)
    packing = Packing((4, 7), LENGTHS)
    kept = torch.stack([attend(states, None, packing, dropout=0.5) for _ in range(300)])
    assert torch.allclose(kept.mean(0), reference(states), atol=0.35)
    assert not torch.allclose(kept[0], kept[1])


@pytest.mark.parametrize(
    ("device", "dtype", "width", "capability", "present", "expected"),
    [
        ("cpu", torch.float32, 64, None, ALL, "sequences"),
        ("mps", torch.float32, 64, None, ALL, "sequences"),
        ("cuda", torch.bfloat16, 64, (8, 0), ALL, "flash"),
        ("cuda", torch.float16, 24, (9, 0), ALL - {"flash_attn"}, "varlen"),
        ("cuda", torch.float16, 24, (9, 0), {"triton"}, "efficient"),
        ("cuda", torch.float16, 64, (7, 5), ALL, "efficient"),
        ("cuda", torch.float16, 24, (7, 5), ALL, "efficient"),
        ("cuda", torch.float32, 64, (8, 0), ALL, "efficient"),
        ("cuda", torch.float32, 24, (8, 0), ALL, "efficient"),
        ("cuda", torch.float16, 20, (8, 0), ALL, "flex"),
        ("cuda", torch.float16, 20, (7, 5), ALL, "sequences"),
        ("cuda", torch.float16, 20, (8, 0), ALL - {"triton"}, "sequences"),
    ],
)
def test_auto_chooses_the_best_backend_and_logs_it_once(
    device, dtype, width, capability, present, expected, monkeypatch, caplog
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(attention._torch, "has_flex_attention", lambda: True)
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: name if name in present else None)
    found = ("flash-attn", print) if "flash_attn" in present else None
    monkeypatch.setattr(attention, "flash_attention", lambda capability, width: found)
    choose_backend.cache_clear()
    with caplog.at_level(logging.INFO, "esm_efficient"):
        assert [choose_backend("auto", torch.device(device), dtype, width) for _ in range(3)] == [expected] * 3
    assert len(caplog.messages) == 1
    assert expected in caplog.messages[0]
    choose_backend.cache_clear()


def test_a_backend_that_is_not_available_is_an_error():
    with pytest.raises(ConfigurationError, match="is not available on cpu"):
        choose_backend("flash", torch.device("cpu"), torch.float32, 64)
    with pytest.raises(ConfigurationError, match="expected one of"):
        choose_backend("fast", torch.device("cpu"), torch.float32, 64)


@pytest.mark.parametrize("takes_scale", [False, True])
@pytest.mark.parametrize("scale", [WIDTH**-0.5, 0.7])
def test_torch_varlen_attention_gets_any_scale(takes_scale, scale, monkeypatch):
    """varlen_attn of torch 2.10 takes no scale."""
    varlen = types.ModuleType("torch.nn.attention.varlen")
    if takes_scale:
        varlen.varlen_attn = varlen_attention
    else:
        varlen.varlen_attn = lambda q, *rest: varlen_attention(q, *rest, scale=WIDTH**-0.5)
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", varlen)
    attention._kernel_of.cache_clear()
    q, k, v = torch.randn(3, sum(LENGTHS), HEADS, WIDTH)
    cu_seqlens = CuSeqlens(Packing((4, 7), LENGTHS), False, q.device)
    found = attention._kernel_of("varlen", q.device, WIDTH)(q, k, v, cu_seqlens, scale)
    attention._kernel_of.cache_clear()
    assert torch.allclose(found, varlen_attention(q, k, v, *cu_seqlens.boundaries, scale), atol=1e-6)


def test_torch_has_the_memory_efficient_kernel_with_a_gradient():
    """There are no numbers on the device "meta": this holds the private operation's arguments and shapes."""
    states = torch.empty(sum(LENGTHS), 3, HEADS, 24, device="meta", requires_grad=True)
    query = torch.empty(len(LENGTHS), HEADS, 24, device="meta", requires_grad=True)
    cu_seqlens = CuSeqlens(Packing((4, 7), LENGTHS), True, states.device)
    found = _torch.varlen_efficient_attention(query, states[:, 1], states[:, 2], *cu_seqlens.boundaries, scale=0.5)
    assert found.shape == query.shape
    operation = found.grad_fn.next_functions[0][0]  # below the selection of the only batch
    assert operation.name() == "EfficientAttentionBackward0"
    assert sum(function is not None for function, _ in operation.next_functions) == 3  # query, key and value


@pytest.mark.parametrize("mode", [AllocationTracker, functools.partial(WorkCounter, lambda: "forward")])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_flex_attention_runs_while_a_step_is_profiled(mode):
    states = torch.randn(sum(LENGTHS), 3, HEADS, WIDTH)
    with torch.no_grad(), mode() as counted:
        found = attend(states, None, Packing((4, 7), LENGTHS), backend="flex")
    assert torch.allclose(found, reference(states), atol=1e-6)
    assert type(counted).ignore_compile_internals()
    assert counted.peak.total >= 4 * found.numel() if isinstance(counted, AllocationTracker) else counted.flops > 0


@pytest.mark.cuda
@pytest.mark.parametrize("backend", ["auto", "flash", "varlen", "efficient", "flex", "sequences"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [16, 24, 64])
@pytest.mark.parametrize("first_only", [False, True])
def test_backends_on_a_gpu(backend, dtype, width, first_only):
    try:
        choose_backend(backend, torch.device("cuda"), dtype, width)
    except ConfigurationError as error:
        pytest.skip(str(error))

    def draw(*shape):
        return torch.randn(*shape, HEADS, width, device="cuda", dtype=dtype, requires_grad=True)

    states, query = draw(sum(LENGTHS), 2 if first_only else 3), draw(len(LENGTHS), 1) if first_only else None
    inputs = [states] if query is None else [states, query]
    found = attend(states, query, Packing((4, 7), LENGTHS), backend=backend)
    expected = reference(states.float(), None if query is None else query.float())
    limit = 3e-2 if dtype == torch.bfloat16 else 1e-4
    assert torch.allclose(found.float(), expected, atol=limit)
    upstream = torch.randn_like(expected)
    grads = torch.autograd.grad(found, inputs, upstream.to(dtype))
    for a, b in zip(grads, torch.autograd.grad(expected, inputs, upstream), strict=True):
        assert torch.allclose(a.float(), b.float(), atol=3 * limit)
