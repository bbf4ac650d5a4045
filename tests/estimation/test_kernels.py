"""A simulated step runs the attention kernels of its device."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from esm_efficient.encoder.attention import attend as lean_attend
from esm_efficient.encoder.attention import use_attention
from esm_efficient.encoder.packing import Packing
from esm_efficient.estimation.kernels import Kernels, packed_attention


class Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func._overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def attend(backend, dtype, *, masked=False):
    shape = (2, 4, 24, 16)
    with FakeTensorMode(), Names() as names, Kernels(backend):
        query, key, value = (torch.empty(shape, dtype=dtype, requires_grad=True) for _ in range(3))
        mask = torch.ones(2, 1, 24, 24, dtype=torch.bool) if masked else None
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        assert (out.shape, out.dtype) == (shape, dtype)
        torch.autograd.grad(out.float().sum(), [query, key, value])
    return {name for name in names.seen if "attention" in name or name == "bmm"}


@pytest.mark.parametrize(
    ("backend", "dtype", "options", "kernel"),
    [
        ("cuda", torch.bfloat16, {}, "_scaled_dot_product_flash_attention"),
        ("cuda", torch.float16, {}, "_scaled_dot_product_flash_attention"),
        ("cuda", torch.float32, {}, "_scaled_dot_product_efficient_attention"),
        ("cuda", torch.bfloat16, {"masked": True}, "_scaled_dot_product_efficient_attention"),
        ("cpu", torch.float32, {"masked": True}, "_scaled_dot_product_flash_attention_for_cpu"),
        ("mps", torch.float32, {"masked": True}, "bmm"),
    ],
)
def test_attention_runs_the_kernel_of_the_device(backend, dtype, options, kernel):
    kernels = attend(backend, dtype, **options)
    assert kernel in kernels
    assert ("bmm" in kernels) == (backend == "mps")


@pytest.mark.parametrize("first_only", [False, True])
def test_packed_attention_runs_a_kernel_of_variable_length(first_only):
    packing = Packing((3, 8), (5, 8, 8))
    with FakeTensorMode(), Names() as names, use_attention(packed_attention):
        states = torch.empty(21, 2 if first_only else 3, 4, 16, requires_grad=True)
        query = torch.empty(3, 1, 4, 16, requires_grad=True) if first_only else None
        out = lean_attend(states, query, packing)
        assert out.shape == (3 if first_only else 21, 64)
        torch.autograd.grad(out.sum(), states)
    assert {"_flash_attention_forward", "_flash_attention_backward"} <= set(names.seen)


@pytest.mark.parametrize(("backend", "dtype"), [("cuda", torch.float32), ("cpu", torch.bfloat16)])
def test_layer_norms_run_in_float32_under_autocast_on_cuda_alone(backend, dtype):
    norm = torch.nn.LayerNorm(8).bfloat16()
    with FakeTensorMode(allow_non_fake_inputs=True), Kernels(backend), torch.autocast("cpu", torch.bfloat16):
        x = torch.empty(2, 8, dtype=torch.bfloat16)
        assert norm(x).dtype == dtype
        assert x.softmax(-1).dtype == dtype
    with FakeTensorMode(allow_non_fake_inputs=True), Kernels(backend):
        assert norm(torch.empty(2, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
