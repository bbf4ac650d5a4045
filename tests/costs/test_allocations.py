"""AllocationTracker agrees with arithmetic, with autograd and with torch's own profiler."""

from __future__ import annotations

import gc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from esm_efficient.costs.allocations import AllocationTracker, model_tensors, storage_bytes, tensors_in
from esm_efficient.costs.memory import Memory


def test_an_allocation_counts_from_its_operation_to_its_last_reference():
    with AllocationTracker() as tracker:
        kept = torch.zeros(100)
        freed = torch.zeros(50)
        assert tracker.current == Memory(other=600)
        del freed
        assert tracker.current == Memory(other=400)
    del kept
    assert tracker.current.total == 0
    assert tracker.peak.total == 600


def test_views_and_writes_in_place_allocate_nothing():
    with AllocationTracker() as tracker:
        x = torch.ones(4, 5)
        views = [x.t(), x[1:], x.view(-1), x.add_(1), x.detach()]
    assert tracker.current.total == 80
    assert len(views) == 5


def test_a_view_keeps_its_storage_alive():
    with AllocationTracker() as tracker:
        x = torch.ones(100)
        view = x[:1]
        del x
    assert tracker.current.total == 400
    del view
    assert tracker.current.total == 0


def test_tensors_saved_by_autograd_live_until_the_backward_pass():
    weight = torch.randn(8, 8, requires_grad=True)
    tracker = AllocationTracker()
    with tracker:
        tracker.hold([weight], "weights")
        tracker.category = "activations"
        loss = (torch.randn(4, 8) @ weight).exp().sum()
        gc.collect()
        # The input of the product (4 x 8), the output of exp (4 x 8), and the loss.
        assert tracker.current == Memory(weights=256, activations=128 + 128 + 4)
        tracker.category = "other"
        loss.backward()
        tracker.hold([weight.grad], "gradients")
        del loss
    assert tracker.current == Memory(weights=256, gradients=256)


def test_recomputed_tensors_count_as_activations():
    x = torch.randn(10, requires_grad=True)
    tracker = AllocationTracker()
    with tracker:
        tracker.category = "activations"
        loss = checkpoint(lambda y: y.exp().exp(), x, use_reentrant=False).sum()
        tracker.category, tracker.recomputes = "other", True
        before = tracker.current.activations
        tracker.reset_peak()
        loss.backward()
    assert tracker.peak.activations >= before + 40


def test_sizes_are_rounded_up_to_the_granularity():
    with AllocationTracker(granularity=512) as tracker:
        kept = [torch.zeros(1), torch.zeros(128), torch.zeros(129)]
    assert tracker.current.total == 512 + 512 + 1024
    assert len(kept) == 3


def test_hold_moves_a_tensor_between_categories_once():
    x = torch.zeros(10)
    tracker = AllocationTracker()
    tracker.hold([x, None, x.view(2, 5)], "weights")
    assert tracker.current == Memory(weights=40)
    tracker.hold([x], "gradients")
    assert tracker.current == tracker.peak == Memory(gradients=40)


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 500)), max_size=40))
def test_current_and_peak_bytes_agree_with_arithmetic(steps):
    alive: list[torch.Tensor] = []
    expected = peak = 0
    tracker = AllocationTracker()
    with tracker:
        for add, size in steps:
            if add or not alive:
                alive.append(torch.empty(size, dtype=torch.uint8))
                expected += size
            else:
                expected -= alive.pop(size % len(alive)).numel()
            peak = max(peak, expected)
            assert tracker.current.total == expected
    assert tracker.peak.total == peak


def test_the_peak_agrees_with_torchs_own_memory_records():
    def work():
        torch.manual_seed(0)
        layers = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 8))
        layers(torch.randn(32, 64)).square().sum().backward()

    work()
    with AllocationTracker() as tracker:
        work()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    held = peak = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert tracker.peak.total == pytest.approx(peak, rel=0.02)


def test_storage_bytes_counts_shared_memory_once_and_ignores_other_devices():
    tied = torch.nn.Linear(4, 4, bias=False)
    model = torch.nn.Sequential(tied, torch.nn.BatchNorm1d(4, affine=False))
    model.append(torch.nn.Linear(4, 4, bias=False))
    model[2].weight = torch.nn.Parameter(tied.weight[:2])
    tensors = [*model_tensors(model), None, torch.empty(100, device="meta")]
    assert storage_bytes(tensors, torch.device("cpu")) == 4 * 16 + 2 * 4 * 4 + 8


def test_tensors_are_found_in_values_of_every_kind():
    x = torch.zeros(1)
    values = (x, {"a": x, "b": 1}, (x, None), None, {"a": [(x, x)]})
    assert [list(tensors_in(value)) for value in values] == [[x], [x], [x], [], [x, x]]
