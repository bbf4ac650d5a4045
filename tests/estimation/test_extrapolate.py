"""The extrapolation from two shallow models is exact."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from conftest import slow_except, tiny_config

from esm_efficient import RECIPES, estimate

CASES = [
    ("8M", {"recipe": "base", "device": "cpu"}),
    ("8M", {"recipe": "ga", "device": "cpu", "optimizer": "adamw"}),
    ("8M", {"recipe": "gc", "device": "A10G", "attention": "eager", "precision": "pure-bf16"}),
    ("8M", {"recipe": "lora", "device": "T4", "precision": "fp16", "preset": "qkv"}),
    ("8M", {"recipe": "all", "device": "A10G"}),
    ("8M", {"recipe": "all", "device": "cpu", "adapter_options": {"lora_dropout": 0.1, "use_rslora": True}}),
    ("8M", {"recipe": "frozen", "device": "M4-Max-64"}),
    ("8M", {"recipe": "base", "device": "L4", "padding": "padding-free", "optimizer": "adamw_foreach"}),
    ("8M", {"recipe": "base", "device": "L4", "head": "masked-lm", "micro_batch": 3}),
    ("8M", {"recipe": "lora", "device": "cpu", "head": "token-classification", "num_labels": 5}),
    ("35M", {"recipe": "all", "device": "H100", "accumulation": 1}),
]


def bytes_of(memory):
    return np.array(dataclasses.astuple(memory))


@pytest.mark.parametrize(
    ("size", "options"),
    slow_except(CASES, *(CASES[number] for number in (3, 4, 6, 7))),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_extrapolated_figures_equal_those_of_all_layers(size, options):
    # Other backends must agree to the byte. CUDA's allocator rounds each tensor up to a block, and the list of the
    # gradients' norms, which grows by a few bytes per layer, sometimes needs one block more.
    block = 0 if options["device"] in ("cpu", "M4-Max-64") else 512
    short = estimate(size, tokens=100, **options)
    full = estimate(size, tokens=100, extrapolate=False, **options)
    for phase, cost in full.phases.items():
        allowed = block if phase == "optimizer" else 0
        assert np.abs(bytes_of(short.phases[phase].peak) - bytes_of(cost.peak)).max() <= allowed
        assert short.phases[phase].flops == cost.flops
        assert short.phases[phase].bytes_moved == cost.bytes_moved
        assert short.phases[phase].kernels == cost.kernels
        assert short.phases[phase].seconds == pytest.approx(cost.seconds, nan_ok=True)
    assert (short.peak, short.peak_phase) == (full.peak, full.peak_phase)
    assert [(point.phase, point.part) for point in short.timeline] == [(p.phase, p.part) for p in full.timeline]
    for ours, theirs in zip(short.timeline, full.timeline, strict=True):
        assert np.abs(bytes_of(ours.memory) - bytes_of(theirs.memory)).max() <= block
    assert short.trainable_parameters == full.trainable_parameters
    assert short.total_parameters == full.total_parameters


def test_the_layers_of_a_recipe_that_trains_the_head_alone_change_nothing():
    config, frozen = tiny_config(num_hidden_layers=5), RECIPES["frozen"].replace(cache=False)
    whole, top = (estimate(config, recipe=frozen.replace(layers=layers), tokens=9) for layers in ("all", "top-2"))
    assert top.phases == whole.phases
