"""Devices are found by name and by instance type, and their figures are in the stated units."""

from __future__ import annotations

import pytest
import torch

from esm_efficient.costs.devices import DEVICES, GIB, get_device
from esm_efficient.errors import ConfigurationError


@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("a10g", "A10G"),
        ("ml.g5.2xlarge", "A10G"),
        ("g4dn.xlarge", "T4"),
        ("ml.g6.12xlarge", "L4"),
        ("p4d.24xlarge", "A100-40"),
        ("ml.p4de.24xlarge", "A100-80"),
        ("p5.48xlarge", "H100"),
        ("ml.p5en.48xlarge", "H200"),
        ("rtx-4090", "RTX-4090"),
        ("RTX4090", "RTX-4090"),
        ("NVIDIA GeForce RTX 4090", "RTX-4090"),
        ("Tesla T4", "T4"),
        ("a100 80", "A100-80"),
        ("a100", "A100-40"),
        ("A100-SXM4-80GB", "A100-80"),
        ("NVIDIA A100 80GB PCIe", "A100-80"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("l4 24gb", "L4"),
        ("M1 Max", "M1-Max-32"),
    ],
)
def test_devices_are_found_by_their_names_and_by_instance_types(name, device):
    assert get_device(name).name == device
    assert get_device(get_device(name)) is DEVICES[device]


def test_an_unknown_name_is_an_error_that_lists_the_known_names():
    with pytest.raises(
        ConfigurationError, match=r"'RTX3060': name the memory of your GPU, such as 12GB.*A100-80"
    ) as error:
        get_device("RTX3060")
    assert len(str(error.value)) < 300
    for other in ("A10", "L40", "L40S", "A100 16GB", "RTX 4090 Ti", "H1000"):
        with pytest.raises(ConfigurationError, match="no device or instance type is named"):
            get_device(other)
    with pytest.raises(ConfigurationError, match="is a device: expected a name such as 'A10G', or a Device"):
        get_device(torch.device("cuda"))


@pytest.mark.parametrize("name", ["12GB", "12gb", "12 GB", "12GiB", "12.0 gb"])
def test_a_device_is_named_by_its_memory(name):
    device = get_device(name)
    assert (device.backend, device.memory, device.precision) == ("cuda", 12 * GIB, "bf16")
    assert not device.flops_per_second


@pytest.mark.parametrize("name", ["12", "0GB", "-4GB", "12 MB", "9999GB", "3060", "GB"])
def test_no_other_number_is_a_memory(name):
    with pytest.raises(ConfigurationError, match=r"such as '?12GB"):
        get_device(name)


def test_figures_are_in_the_stated_units():
    for device in DEVICES.values():
        if device.backend == "cpu":
            continue
        assert 8 * GIB < device.memory < 200 * GIB
        assert 1e11 < device.bandwidth < 1e13
        assert all(1e12 < rate < 2e15 for rate in device.flops_per_second.values())
        assert device.flops_per_second["float32"] <= device.flops_per_second["float16"]
        assert device.source
    instances = [name for device in DEVICES.values() for name in device.instances]
    assert len(instances) == len(set(instances))
    assert not DEVICES["T4"].has_bf16
    assert DEVICES["A10G"].has_bf16
