"""What training costs, measured and predicted."""

from esm_efficient.profiling.devices import DEVICES, Device, get_device
from esm_efficient.profiling.memory import CATEGORIES, PHASES, Memory, PeakMemory, peak_memory

__all__ = ["CATEGORIES", "DEVICES", "PHASES", "Device", "Memory", "PeakMemory", "get_device", "peak_memory"]
