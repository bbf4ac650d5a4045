"""peak_memory measures a block even if it fails."""

from __future__ import annotations

import mmap
import sys

import pytest
import torch

from esm_efficient import peak_memory
from esm_efficient.costs.memory import driver_bytes

MEBIBYTE = 2**20


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="other systems measure the peak since the start of the process"
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA the peak is that of the device's tensors")
def test_the_peak_of_the_process_is_measured_per_block():
    with peak_memory() as before:
        pass
    # A tensor may get memory that the process already holds, from a list of freed blocks; a new mapping may not.
    with peak_memory() as large, mmap.mmap(-1, 256 * MEBIBYTE) as pages:
        for start in range(0, len(pages), mmap.PAGESIZE):
            pages[start] = 1
    with peak_memory() as after:
        pass
    assert large.kind == "process"
    assert 200 * MEBIBYTE < large.bytes - before.bytes < 400 * MEBIBYTE
    assert after.bytes < large.bytes - 200 * MEBIBYTE


def test_the_figures_are_set_when_the_block_fails():
    with pytest.raises(RuntimeError, match="broken"), peak_memory() as peak:
        raise RuntimeError("broken")
    assert peak.bytes > 0
    assert peak.kind


def test_the_driver_reports_no_memory_of_a_cpu():
    assert driver_bytes(torch.device("cpu")) == (None, "")


def test_without_nvml_the_cuda_driver_is_asked(monkeypatch):
    def fail(device):
        raise ModuleNotFoundError("pynvml")

    monkeypatch.setattr(torch.cuda, "device_memory_used", fail)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (30, 100))
    assert driver_bytes(torch.device("cuda")) == (70, "CUDA driver; NVML failed: pynvml")


@pytest.mark.cuda
def test_on_cuda_the_peak_is_the_allocators_own():
    with peak_memory() as peak:
        tensor = torch.ones(64 * MEBIBYTE // 4, device="cuda")
        expected = torch.cuda.memory_allocated()
        del tensor
    assert peak.kind == "CUDA tensors"
    assert peak.bytes == expected
