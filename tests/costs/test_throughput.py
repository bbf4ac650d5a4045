"""Throughput: FLOPs and tokens are counted exactly, and the rate of matrix products is plausible."""

from __future__ import annotations

import math

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


PADDED = torch.tensor([[1, 1, 1, 0]])


@pytest.mark.parametrize(
    ("inputs", "shape", "samples", "totals"),
    [
        ({"input_ids": torch.zeros(2, 7)}, (2, 7), 2, (14.0, 98.0)),
        ({"input_ids": torch.zeros(1, 4), "attention_mask": PADDED}, (1, 4), 1, (3.0, 9.0)),
        ({"inputs_embeds": torch.zeros(2, 7, 3)}, (2, 7), 2, (14.0, 98.0)),
        ({"input_ids": None, "inputs_embeds": torch.zeros(1, 4, 3), "attention_mask": PADDED}, (1, 4), 1, (3.0, 9.0)),
        ({"inputs_embeds": torch.zeros(2, 1, 3)}, None, 2, (math.nan, math.nan)),
        ({"inputs_embeds": torch.zeros(2, 3, 3), "attention_mask": torch.ones(2, 3)}, None, 2, (math.nan, math.nan)),
        ({"input": torch.zeros(2, 7)}, None, 0, (math.nan, math.nan)),
    ],
    ids=["ids", "padded ids", "states", "padded states", "first states", "mean states", "no tokens"],
)
def test_tokens_are_counted_from_ids_and_from_states(inputs, shape, samples, totals):
    counter = TokenCounter()
    assert counter.add(inputs) == shape
    assert counter.samples == samples
    assert counter.slots == (0 if shape is None else shape[0] * shape[1])
    assert counter.totals() == pytest.approx(totals, nan_ok=True)


def test_tokens_of_batches_are_summed():
    counter = TokenCounter()
    for inputs in ({"input_ids": torch.zeros(2, 7)}, {"input_ids": torch.zeros(1, 4), "attention_mask": PADDED}):
        counter.add(inputs)
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


@pytest.mark.parametrize(("rate", "sizes"), [(1e9, [256]), (1e11, [256, 1024])])
def test_no_large_product_is_measured_that_takes_seconds(monkeypatch, rate, sizes):
    measured = []

    def measure(device, dtype, size):
        measured.append(size)
        return rate

    monkeypatch.setattr("esm_efficient.costs.throughput._matmul_rate", measure)
    assert matmul_rate("cpu", torch.bfloat16) == rate
    assert measured == sizes
