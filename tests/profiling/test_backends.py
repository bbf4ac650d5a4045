"""Backends: the categories sum to the peak, and a GPU's counters are read at every change of phase."""

from __future__ import annotations

import pytest
import torch

from esm_efficient.costs.memory import Memory
from esm_efficient.profiling.backends import CpuBackend, CudaBackend, MpsBackend, make_backend, split
from esm_efficient.profiling.phases import PhaseTracker


def test_a_split_sums_to_the_peak_for_all_inputs():
    for peak in (0, 10, 35, 100):
        for held in (0, 50, 200):
            assert split(peak, held, weights=20, gradients=5, optimizer=10).total == peak


def test_the_highest_peak_of_a_phase_is_kept():
    backend = make_backend(torch.nn.Linear(1, 1), torch.device("cpu"), PhaseTracker())
    for size, reserved in ((1, 9), (3, 2), (2, 1)):
        backend.record_peak("forward", Memory(other=size), reserved)
    assert backend.peaks == {"forward": Memory(other=3)}
    assert backend.reserved == {"forward": 9}


@pytest.mark.parametrize(("kind", "backend"), [("cuda", CudaBackend), ("mps", MpsBackend), ("cpu", CpuBackend)])
def test_each_kind_of_device_has_a_backend(kind, backend):
    made = make_backend(torch.nn.Linear(1, 1), torch.device(kind), PhaseTracker())
    assert type(made) is backend
    made.stop()


def test_on_mps_the_peak_is_the_highest_figure_that_was_read(monkeypatch):
    used = iter([100, 100, 300, 250, 200])
    monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: next(used))
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 1000)
    backend = MpsBackend(torch.nn.Linear(1, 1), torch.device("mps"), PhaseTracker())
    backend.start([])
    assert backend.held().total == 300
    backend.switch("forward", "backward")
    # Tensors of 100 bytes existed before; the rest of a forward pass is activations.
    assert backend.peaks["forward"] == Memory(activations=200, other=100)
    assert backend.reserved["forward"] == 1000


def test_on_cuda_the_allocators_peak_is_read_and_reset(monkeypatch):
    resets = []
    counters = {"allocated_bytes": {"all": {"current": 40, "peak": 90}}, "reserved_bytes": {"all": {"peak": 128}}}
    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", lambda device: counters)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", resets.append)
    backend = CudaBackend(torch.nn.Linear(1, 1), torch.device("cuda"), PhaseTracker())
    backend.start([])
    backend.switch("forward", "between")
    assert backend.peaks["forward"] == Memory(activations=50, other=40)
    assert backend.reserved["forward"] == 128
    assert resets == [torch.device("cuda")] * 2
