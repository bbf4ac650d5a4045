"""Simulate a model of any depth from two shallow ones, which do all that the deep one does."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from esm_efficient.estimation.segments import Segment, Simulation
from esm_efficient.estimation.simulate import simulate
from esm_efficient.estimation.step import Step

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_SHALLOW, _DEEP = 2, 3
"""Layers of the two models that are simulated: a first and a last layer, and in the deeper one a layer between them."""


def simulate_model(config: PreTrainedConfig, step: Step, *, extrapolate: bool = True) -> Simulation:
    """Simulate one optimizer step of a model at its own depth, as `simulate` does; results are cached.

    Without `extrapolate` every layer runs, which gives the same figures and takes longer. So it does for a recipe that
    trains some of the layers, because the layers then differ.
    """
    config_class: Any = type(config)
    return _simulate_cached(config_class, config.to_json_string(use_diff=False), step, extrapolate)


@lru_cache(maxsize=256)
def _simulate_cached(config_class: Any, config_json: str, step: Step, extrapolate: bool) -> Simulation:
    config = config_class.from_dict(json.loads(config_json))
    layers = config.num_hidden_layers
    if not extrapolate or layers <= _DEEP or step.recipe.layers != "all":
        return simulate(config, step, layers=layers)
    shallow, deep = (simulate(config, step, layers=depth) for depth in (_SHALLOW, _DEEP))
    return _extend(shallow, deep, layers)


def _extend(shallow: Simulation, deep: Simulation, layers: int) -> Simulation:
    """Return the simulation of a model of many layers.

    Every layer between the first and the last does the same, so the middle segments of the deeper model are repeated.
    Each part around the layers is the same at every depth or, like the optimizer's step, grows by the same amount with
    every layer. Each segment begins with the bytes in use at the end of the segment before it.
    """
    last_shallow, last_deep = f"layer {_SHALLOW - 1}", f"layer {_DEEP - 1}"
    by_part = {(s.phase, s.part if s.part != last_shallow else last_deep): s for s in shallow.segments}

    def at_depth(small: Any, large: Any) -> Any:
        """Extend a figure of the two models by its growth per layer."""
        return large + (layers - _DEEP) * (large - small)

    in_use = at_depth(shallow.segments[0].start, deep.segments[0].start)
    extended: list[Segment] = []

    def add(phase: str, part: str, peak: np.ndarray, change: np.ndarray, cost: np.ndarray) -> None:
        nonlocal in_use
        extended.append(Segment(phase, part, in_use, in_use + peak, in_use + change, cost))
        in_use = in_use + change

    for segment in deep.segments:
        peak, change = segment.peak - segment.start, segment.end - segment.start
        if segment.part == "layer 1":
            numbers = range(1, layers - 1)
            for number in numbers if segment.phase == "forward" else reversed(numbers):
                add(segment.phase, f"layer {number}", peak, change, segment.cost)
            continue
        other = by_part[segment.phase, segment.part]
        add(
            segment.phase,
            f"layer {layers - 1}" if segment.part == last_deep else segment.part,
            at_depth(other.peak - other.start, peak),
            at_depth(other.end - other.start, change),
            at_depth(other.cost, segment.cost),
        )
    return Simulation(
        tuple(extended),
        at_depth(shallow.trainable_parameters, deep.trainable_parameters),
        at_depth(shallow.total_parameters, deep.total_parameters),
    )
