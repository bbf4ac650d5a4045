"""Backends: the categories sum to the peak, and a GPU's counters are read at every change of phase."""

from __future__ import annotations

import pytest
import torch
from conftest import make_model

from esm_efficient.costs.memory import Memory
from esm_efficient.profiling.backends import (
    CpuBackend,
    CudaBackend,
    GradientBytes,
    MpsBackend,
    TotalsBackend,
    make_backend,
    split,
)
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


def test_gradients_are_counted_when_they_appear_and_after_they_are_gone():
    parameters = [torch.nn.Parameter(torch.zeros(n)) for n in (1, 2, 4, 8)]
    shared = torch.zeros(12)
    counted = GradientBytes(parameters, torch.device("cpu"))
    assert counted.update() == 0
    parameters[3].grad = torch.zeros(8)
    assert (counted.update(), counted.update()) == (32, 32)
    parameters[0].grad, parameters[1].grad = shared[:1], shared[1:3]  # as in the buckets of DistributedDataParallel
    assert counted.update() == 32 + 48
    parameters[3].grad = None
    assert counted.recount() == 48


@pytest.mark.parametrize(("detailed", "updates"), [(False, 1), (True, 5)])
def test_a_step_looks_at_all_parameters_only_twice(monkeypatch, detailed, updates):
    seen = []
    for name in ("recount", "update"):
        method = getattr(GradientBytes, name)
        monkeypatch.setattr(GradientBytes, name, lambda self, n=name, m=method: (seen.append(n), m(self))[1])
    monkeypatch.setattr(TotalsBackend, "_current", lambda self: 0)
    monkeypatch.setattr(TotalsBackend, "_take_peak", lambda self: (0, 0))
    monkeypatch.setattr(TotalsBackend, "__abstractmethods__", frozenset())
    model = make_model(num_hidden_layers=4)
    phases = PhaseTracker()
    backend = TotalsBackend(model, torch.device("cpu"), phases)
    backend.start([])
    backend.detailed = detailed
    walks = []
    walk = torch.nn.Module.parameters
    monkeypatch.setattr(torch.nn.Module, "parameters", lambda *args, **kw: (walks.append(1), walk(*args, **kw))[1])
    seen.clear()

    def begin(stage):
        backend.switch(phases.switch(stage), stage)

    begin("forward")
    logits = model(input_ids=torch.full((1, 5), 4)).logits
    begin("backward")
    logits.sum().backward()
    begin("between")
    begin("optimizer")
    begin("between")
    backend.end_step()
    backend.stop()
    # Each of the two recounts contains one update.
    assert (seen.count("recount"), seen.count("update") - seen.count("recount")) == (2, updates)
    assert not walks


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
