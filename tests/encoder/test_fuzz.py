"""Random models and calls; a failure names its seed, which `fuzzing.run` repeats. `fuzzing.py` tries more."""

from __future__ import annotations

import fuzzing
import pytest
from conftest import slow_except

BLOCK = 25
"""Models per test."""


@pytest.mark.parametrize("block", slow_except(range(20), 0, 1))
def test_random_calls_agree_with_the_plain_model(block):
    for seed in range(block * BLOCK, (block + 1) * BLOCK):
        fuzzing.run(seed)
