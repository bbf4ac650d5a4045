"""Throughput: FLOPs and tokens are counted exactly, and the rate of matrix products is plausible."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from esm_efficient import estimate
from esm_efficient.costs.throughput import TokenCounter, WorkCounter, flops_per_token, matmul_rate, measure_device


@given(
    st.floats(1e3, 1e9),
    st.floats(0, 1e5),
    st.lists(st.tuples(st.integers(1, 64), st.integers(10, 1024)), min_size=2, max_size=8),
)
def test_linear_and_quadratic_flops_are_fitted_from_any_batches(linear, square, shapes):
    batches = [(rows, n, rows * (linear * n + square * n * n)) for rows, n in shapes]
    fitted, fitted_square = flops_per_token(batches)
    total = sum(rows * (fitted * n + fitted_square * n * n) for rows, n in shapes)
    assert total == pytest.approx(sum(flops for *_, flops in batches), rel=1e-3)
    if max(n for _, n in shapes) > 2 * min(n for _, n in shapes):
        assert fitted == pytest.approx(linear, rel=0.01, abs=0.01 * square * 1024)


def test_without_batches_there_are_no_flops():
    assert flops_per_token([]) == (0.0, 0.0)


def test_batches_without_a_mask_count_as_unpadded():
    counter = TokenCounter()
    assert counter.add({"input_ids": torch.zeros(2, 7)}) == (2, 7)
    assert counter.add({"inputs_embeds": torch.zeros(2, 7, 3)}) is None
    assert counter.add({"input_ids": torch.zeros(1, 4), "attention_mask": torch.tensor([[1, 1, 1, 0]])}) == (1, 4)
    assert (counter.samples, counter.slots) == (3, 18)
    assert counter.totals() == (17.0, 2 * 49.0 + 9.0)


@pytest.mark.parametrize(("phase", "counted"), [("forward", True), ("backward", False), ("optimizer", False)])
def test_flops_are_counted_forward_and_backward_and_not_in_recomputation(phase, counted):
    counter = WorkCounter(lambda: phase)
    with counter:
        torch.ones(2, 3) @ torch.ones(3, 5)
    assert counter.flops == (60 if counted else 0)
    with counter, torch.no_grad():
        torch.ones(2, 3) @ torch.ones(3, 5)
    assert counter.flops == {"forward": 120, "backward": 60, "optimizer": 0}[phase]


def test_a_measured_device_can_be_estimated():
    device = measure_device("cpu")
    assert (device.backend, device.memory, set(device.flops_per_second)) == ("cpu", 0, {"float32"})
    assert 1e8 < device.bandwidth < 1e13
    assert 1e-7 < device.launch_seconds < 0.1
    assert estimate("8M", device=device, tokens=16, precision="float32").seconds > 0


def test_the_matmul_rate_is_plausible():
    assert 1e9 < matmul_rate("cpu", torch.float32) < 1e14
