"""What training costs, measured and predicted."""

from esm_efficient.profiling.devices import DEVICES, Device, get_device
from esm_efficient.profiling.estimate import Estimate, estimate
from esm_efficient.profiling.memory import CATEGORIES, Memory, PeakMemory, peak_memory

__all__ = [
    "CATEGORIES",
    "DEVICES",
    "Device",
    "Estimate",
    "Memory",
    "PeakMemory",
    "estimate",
    "get_device",
    "peak_memory",
]
