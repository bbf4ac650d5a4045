"""Table of GPUs and of the instance types that have them.

Rates are the vendors' dense peak figures, from the data sheets that `Device.source` names. The sheets of L4, H100 and
H200 state half-precision rates with sparsity, so half of these is used. For the RTX cards the half-precision rates are
those with float32 accumulation. Instance types are those of EC2; SageMaker puts ``ml.`` before them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from esm_efficient.errors import ConfigurationError
from esm_efficient.recipes import Precision

if TYPE_CHECKING:
    import torch

Backend = Literal["cuda", "mps", "cpu"]

GIB = 1024**3
"""Bytes in a GiB."""

LAUNCH_SECONDS = 5e-6
"""Time of the host to launch a kernel from eager PyTorch, an assumption; `measure_device` measures it."""


@dataclass(frozen=True)
class Device:
    """Memory, speed and instance types of a device.

    Attributes:
        name: the name in `DEVICES`.
        backend: the torch backend that runs on it: ``"cuda"``, ``"mps"`` or ``"cpu"``.
        memory: bytes that torch sees; 0 if unknown.
        flops_per_second: matrix-multiply rate by dtype, with torch's default settings (``float32`` without TF32).
        bandwidth: bytes per second between memory and chip; 0 if unknown.
        launch_seconds: time that the host needs to launch a kernel.
        instances: EC2 instance types that have the device, and the number of devices in each.
        source: the document that the figures are from.
    """

    name: str
    backend: Backend
    memory: int = 0
    flops_per_second: Mapping[str, float] = field(default_factory=dict, hash=False)
    bandwidth: float = 0.0
    launch_seconds: float = LAUNCH_SECONDS
    instances: Mapping[str, int] = field(default_factory=dict, hash=False)
    source: str = ""

    @property
    def has_bf16(self) -> bool:
        """Whether the device multiplies bfloat16 matrices in hardware."""
        return "bfloat16" in self.flops_per_second

    @property
    def precision(self) -> Precision:
        """What the precision ``"auto"`` means on the device."""
        if self.backend != "cuda":
            return "float32"
        if not self.flops_per_second:
            return "bf16"  # as every GPU of NVIDIA since 2020
        return "bf16" if self.has_bf16 else "fp16" if "float16" in self.flops_per_second else "float32"


_SMALL = ("xlarge", "2xlarge", "4xlarge", "8xlarge", "16xlarge")

_INSTANCES: dict[str, dict[int, tuple[str, ...]]] = {
    "g4dn": {1: _SMALL, 4: ("12xlarge",), 8: ("metal",)},
    "g5": {1: _SMALL, 4: ("12xlarge", "24xlarge"), 8: ("48xlarge",)},
    "g6": {1: _SMALL, 4: ("12xlarge", "24xlarge"), 8: ("48xlarge",)},
    "p4d": {8: ("24xlarge",)},
    "p4de": {8: ("24xlarge",)},
    "p5": {1: ("4xlarge",), 8: ("48xlarge",)},
    "p5e": {8: ("48xlarge",)},
    "p5en": {8: ("48xlarge",)},
}
"""Sizes of an EC2 family's instances by their number of devices."""


def _gpu(
    name: str,
    gib: float,
    gbps: float,
    *,
    fp32: float,
    half: float,
    source: str,
    families: tuple[str, ...] = (),
    bf16: bool = True,
    backend: Backend = "cuda",
) -> Device:
    """Return a device from the figures of a data sheet: GiB, GB/s and TFLOP/s."""
    flops = {"float32": fp32 * 1e12, "float16": half * 1e12}
    if bf16:
        flops["bfloat16"] = half * 1e12
    instances = {
        f"{family}.{size}": count
        for family in families
        for count, sizes in _INSTANCES[family].items()
        for size in sizes
    }
    return Device(name, backend, int(gib * GIB), flops, gbps * 1e9, instances=instances, source=source)


DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        Device("cpu", "cpu", source="no figures: memory by category only"),
        _gpu("T4", 14.6, 320, fp32=8.1, half=65, bf16=False, families=("g4dn",), source="NVIDIA T4 data sheet"),
        _gpu("L4", 22.0, 300, fp32=30.3, half=121, families=("g6",), source="NVIDIA L4 data sheet"),
        _gpu("A10G", 22.1, 600, fp32=31.5, half=70, families=("g5",), source="NVIDIA A10G data sheet"),
        _gpu("A100-40", 39.4, 1555, fp32=19.5, half=312, families=("p4d",), source="NVIDIA A100 data sheet"),
        _gpu("A100-80", 79.2, 2039, fp32=19.5, half=312, families=("p4de",), source="NVIDIA A100 data sheet (SXM)"),
        _gpu("H100", 79.1, 3350, fp32=67, half=989, families=("p5",), source="NVIDIA H100 data sheet (SXM)"),
        _gpu("H200", 139.8, 4800, fp32=67, half=989, families=("p5e", "p5en"), source="NVIDIA H200 data sheet (SXM)"),
        _gpu("RTX-3090", 23.6, 936, fp32=35.6, half=71, source="NVIDIA Ampere GA102 whitepaper"),
        _gpu("RTX-4090", 23.6, 1008, fp32=82.6, half=165.2, source="NVIDIA Ada whitepaper"),
        # Apple states the shared memory and its bandwidth. The GPU may use about three quarters of the memory. It has
        # no faster unit for half precision, so both rates are those of float32 arithmetic.
        _gpu("M1-Max-32", 21.3, 400, fp32=10.4, half=10.4, backend="mps", source="Apple specifications"),
        _gpu("M2-Ultra-64", 48.0, 800, fp32=27.2, half=27.2, backend="mps", source="Apple specifications"),
        _gpu("M3-Max-64", 48.0, 400, fp32=14.2, half=14.2, backend="mps", source="Apple specifications (40 cores)"),
        _gpu("M4-Max-64", 48.0, 546, fp32=17.2, half=17.2, backend="mps", source="Apple specifications (40 cores)"),
    )
}
"""The devices by their names, with the rates that the data sheets state.

``memory`` is the total that torch reports, which is less than the name says.
"""

DEFAULT_DEVICE = "A10G"
"""The default device of estimates: the GPU of SageMaker's ``ml.g5`` instances."""


def get_device(device: str | Device) -> Device:
    """Return the device of a name, of an instance type or of a memory; a `Device` is returned unchanged.

    Args:
        device: such as ``"A10G"``, ``"g5.2xlarge"`` or ``"ml.g5.2xlarge"``; or the memory of another GPU of NVIDIA,
            such as ``"12GB"``, whose rates are then unknown. Case is ignored, and so are spaces and hyphens
            in a name. Of a GPU with several sizes of memory, such as ``"A100"``, it is the smallest.

    Raises:
        ConfigurationError: no device and no instance type has the name, or it is not a text.

    Example:
        >>> get_device("ml.g5.2xlarge").name
        'A10G'
    """
    if isinstance(device, Device):
        return device
    if not isinstance(device, str):
        raise ConfigurationError(
            f"device={device!r} is a {type(device).__name__}: expected a name such as {DEFAULT_DEVICE!r}, or a Device; "
            "measure_device makes one of a device of this machine"
        )
    wanted = device.lower().strip().removeprefix("ml.")
    for known in DEVICES.values():
        if _letters(wanted) == _letters(known.name.lower()) or wanted in known.instances:
            return known
    if alike := devices_called(wanted):
        return min(alike, key=lambda known: known.memory)
    if memory := re.fullmatch(r"(\d+(?:\.\d+)?) ?gi?b", wanted):
        if not GIB <= float(memory[1]) * GIB <= 1024 * GIB:
            raise ConfigurationError(f"device={device!r}: expected the memory of one GPU, such as '12GB'")
        return Device(f"{memory[1]}GB", "cuda", int(float(memory[1]) * GIB), source="its memory alone")
    raise ConfigurationError(
        f"no device or instance type is named {device!r}: name the memory of your GPU, such as 12GB, an instance type "
        f"such as g5.2xlarge, or one of {', '.join(DEVICES)}"
    )


def devices_called(name: str) -> list[Device]:
    """Return the devices of a name, with or without the memory in GB, as drivers and people write it.

    Example:
        >>> [device.name for device in devices_called("NVIDIA A100-SXM4-80GB")], devices_called("NVIDIA L40S")
        (['A100-80'], [])
    """
    letters = _letters(name.lower())
    return [device for device in DEVICES.values() if _has_name(letters, device)]


def _has_name(letters: str, device: Device) -> bool:
    """Whether letters are the name of a device without its memory, alone or with the memory in GB behind them."""
    stem = _letters(re.sub(r"-\d\d$", "", device.name).lower())
    memory = letters.removeprefix(stem)
    if not letters.startswith(stem) or not (memory.isdecimal() or not memory):
        return False
    return not memory or abs(int(memory) - device.memory / GIB) <= 0.1 * int(memory)


def _letters(name: str) -> str:
    """Return a name of a device without the words and signs that people write in different ways."""
    return re.sub(r"nvidia|geforce|tesla|sxm\d?|pcie|hbm\w*|(?<=\d)gi?b|[\s_-]", "", name)


def native_precision(device: torch.device) -> Precision:
    """Return what the precision ``"auto"`` means on a device of this machine.

    It is bf16 on a CUDA device that multiplies bfloat16 in hardware, fp16 on an older one with tensor cores, such as a
    T4, and float32 on any other device. torch reports support for bfloat16 on a T4 too: it emulates it.
    """
    import torch

    if device.type != "cuda" or not torch.cuda.is_available():
        return "float32"
    # Without a number it is the current one. A machine may have several kinds.
    with nullcontext() if device.index is None else torch.cuda.device(device):
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16"
    return "fp16" if torch.cuda.get_device_capability(device) >= (7, 0) else "float32"
