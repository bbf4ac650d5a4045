"""The costs of segments: which operations are kernels, and how host and device overlap."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from esm_efficient import Device, estimate
from esm_efficient._torch import fake_tensor_mode
from esm_efficient.estimation.segments import Recorder, seconds_of

PLAYED = Device("played", "cuda", 2**34, {"float32": 1e12, "bfloat16": 1e13}, 1e11)

OPERATIONS = [
    ("a matrix product", lambda x: x @ x, 1),
    ("a linear layer with bias", lambda x: F.linear(x, x, x[0]), 1),
    ("a change in place", lambda x: x.add_(1), 1),
    ("another number format", lambda x: x.to(torch.bfloat16), 1),
    ("the same number format", lambda x: x.to(torch.float32), 0),
    ("zeros", lambda x: torch.zeros(3), 1),
    ("views", lambda x: (x.view(16), x.t(), x[0], x.split(2), x.unbind(), x.detach(), x.expand(2, 4, 4)), 0),
    ("a reshape that copies", lambda x: x.t().reshape(16), 1),
    ("questions", lambda x: (x.device, x.dtype, x.shape, x.is_contiguous()), 0),
    (
        "empty memory",
        lambda x: (torch.empty(3), torch.empty_like(x), x.new_empty(2), torch.empty_strided((2,), (1,))),
        0,
    ),
]


def record(operation):
    recorder = Recorder(PLAYED)
    with fake_tensor_mode(), recorder.tracker:
        x = torch.empty(4, 4)
        recorder.begin("forward", "part")
        operation(x)
        recorder.end()
    return recorder.segments[0].cost


@pytest.mark.parametrize(("operation", "kernels"), [case[1:] for case in OPERATIONS], ids=[c[0] for c in OPERATIONS])
def test_only_kernels_are_counted_and_take_time(operation, kernels):
    _, moved, busy, counted = record(operation)
    assert counted == kernels
    assert (moved > 0) == (busy > 0) == (kernels > 0)


def test_the_device_is_busy_for_the_larger_of_arithmetic_and_traffic():
    flops, moved, busy, _ = record(lambda x: x @ x)
    assert (flops, moved) == (2 * 4**3, 3 * 64)
    assert busy == pytest.approx(max(flops / 1e12, moved / 1e11))


@pytest.mark.parametrize(
    ("backend", "rates", "expected"),
    [
        ("cuda", {"float32": 1e12}, [10e-3, 20e-3]),  # 30 ms of launches hide 9 ms of work
        ("mps", {"float32": 1e12}, [10e-3, 20e-3]),
        ("cpu", {"float32": 1e12}, [18e-3, 21e-3]),  # nothing overlaps on a CPU
        ("cuda", {}, [math.nan, math.nan]),
    ],
)
def test_a_step_takes_as_long_as_the_slower_of_host_and_device(backend, rates, expected):
    costs = np.array([[0, 0, 8e-3, 100], [0, 0, 1e-3, 200]])
    device = Device("played", backend, 1, rates, 1e11, launch_seconds=1e-4)
    assert seconds_of(costs, device).tolist() == pytest.approx(expected, nan_ok=True)
    if rates and backend != "cpu":
        fast = Device("played", backend, 1, rates, 1e11, launch_seconds=1e-6)
        assert seconds_of(costs, fast).tolist() == pytest.approx([8e-3, 1e-3])


def test_the_launches_of_a_step_limit_a_small_model_on_a_fast_device():
    small = estimate("8M", recipe="lora", device="H100", tokens=50, micro_batch=1)
    assert small.is_host_bound
    assert small.seconds == pytest.approx(small.kernels * 5e-6)
    assert small.seconds == pytest.approx(sum(cost.seconds for cost in small.phases.values()))
    assert f"launching {small.kernels:,.0f} kernels limits it" in str(small)
    large = estimate("8M", recipe="lora", device="T4", tokens=1024, micro_batch=32)
    assert not large.is_host_bound
    assert large.seconds > large.kernels * 5e-6
    assert "the device limits it" in str(large)
    assert [e.to_dict()["host_bound"] for e in (small, large)] == [True, False]
