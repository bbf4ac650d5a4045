"""Growth: a leak is found and named, and memory that is freed again is not reported."""

from __future__ import annotations

import dataclasses
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esm_efficient.costs.memory import CATEGORIES, Memory
from esm_efficient.profiling.growth import Growth, GrowthWatch, find_growth

MIB = 2**20


@given(st.integers(MIB, 2**32), st.sampled_from(CATEGORIES), st.integers(6, 16), st.randoms(use_true_random=False))
def test_growth_is_found_and_named_in_spite_of_noise(step, category, steps, random):
    ends = [
        Memory(**{category: i * step, "weights" if category != "weights" else "other": 10**9}) for i in range(steps)
    ]
    ends = [dataclasses.replace(m, other=m.other + random.randrange(1000)) for m in ends]
    growth = find_growth(ends)
    assert growth.category == category
    assert growth.bytes_per_step == pytest.approx(step, rel=0.01)


@given(st.lists(st.integers(0, 2**30), max_size=16), st.integers(0, 15))
def test_memory_that_is_freed_again_is_not_growth(sizes, last):
    ends = [Memory(activations=size) for size in sizes]
    if ends:
        ends[-1] = Memory(activations=0)
    assert find_growth(ends) is None


@pytest.mark.parametrize("category", CATEGORIES)
def test_every_category_has_advice(category):
    assert str(Growth(2.0 * MIB, category, 8)).startswith(
        "memory in use at the end of a step grows by 2.00 MiB per step"
    )


def test_growth_is_logged_once_and_the_latest_finding_is_kept(caplog):
    watch = GrowthWatch()
    with caplog.at_level(logging.WARNING):
        for step in range(12):
            watch.add(Memory(activations=step * MIB))
    assert (watch.growth.steps, len(caplog.records)) == (12, 1)
    watch.restart()
    watch.add(Memory())
    assert watch.growth.steps == 12
