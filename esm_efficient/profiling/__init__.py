"""What training costs."""

from esm_efficient.profiling.memory import PeakMemory, peak_memory

__all__ = ["PeakMemory", "peak_memory"]
