"""Peak memory: a block that takes memory shows it, also when it fails."""

from __future__ import annotations

import sys

import pytest
import torch

from esm_efficient import peak_memory

MEBIBYTE = 2**20


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems count from the start of the process")
@pytest.mark.skipif(torch.cuda.is_available(), reason="counts the device's tensors there")
def test_the_peak_of_the_process_is_that_of_the_block():
    with peak_memory() as before:
        pass
    with peak_memory() as large:
        tensor = torch.ones(256 * MEBIBYTE // 4)
        del tensor
    with peak_memory() as after:
        pass
    assert large.kind == "process"
    assert 200 * MEBIBYTE < large.bytes - before.bytes < 400 * MEBIBYTE
    assert after.bytes < large.bytes - 200 * MEBIBYTE


def test_the_figures_are_there_when_the_block_fails():
    with pytest.raises(RuntimeError, match="broken"), peak_memory() as peak:
        raise RuntimeError("broken")
    assert peak.bytes > 0
    assert peak.kind


@pytest.mark.cuda
def test_on_cuda_the_allocators_own_peak():
    with peak_memory() as peak:
        tensor = torch.ones(64 * MEBIBYTE // 4, device="cuda")
        expected = torch.cuda.memory_allocated()
        del tensor
    assert peak.kind == "CUDA tensors"
    assert peak.bytes == expected
