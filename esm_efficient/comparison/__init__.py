"""Many runs or many estimates side by side."""

from esm_efficient.comparison.record import Comparison
from esm_efficient.comparison.rendering import estimate_page
from esm_efficient.comparison.runner import compare

__all__ = ["Comparison", "compare", "estimate_page"]
