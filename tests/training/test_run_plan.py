"""What a run says before it starts: the device that it is estimated for is the one that trains."""

from __future__ import annotations

import types

import pytest
import torch

from esm_efficient.costs.devices import GIB
from esm_efficient.training.run_plan import device_here


@pytest.fixture
def machine_with_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA A10G")
    properties = types.SimpleNamespace(total_memory=22 * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


def test_a_run_on_the_cpu_is_estimated_for_the_cpu_of_a_machine_with_a_gpu(machine_with_a_gpu):
    assert device_here(torch.device("cpu")).name == "cpu"
    gpu = device_here(torch.device("cuda", 0))
    assert (gpu.name, gpu.memory) == ("A10G", 22 * GIB)
    assert gpu.flops_per_second


def test_the_plan_of_a_run_names_the_device_of_its_options(machine_with_a_gpu, demo_table, tmp_path):
    from esm_efficient import RECIPES, load_deeploc
    from esm_efficient.training.job import begin_job

    data = load_deeploc(demo_table, max_residues=220)
    job = begin_job(
        "8M",
        data,
        RECIPES["frozen"],
        tmp_path,
        seed=0,
        task=None,
        precision="float32",
        data_options={},
        training_options={"use_cpu": True},
        early_stopping=None,
    )
    plan = job.with_plan(max_tokens=200, probe=False).plan
    assert plan.estimate.device.name == "cpu"
    assert "of cpu" in str(plan)
