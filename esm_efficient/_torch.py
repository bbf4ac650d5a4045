"""Private names of torch, in one place.

Each docstring says what breaks without the function, and a test fails when a release drops what it uses.
"""

from __future__ import annotations

# --- encoder ---


# --- costs ---


# --- estimation ---


# --- profiling ---
