"""Simulate a model of any depth from shallow ones, which do all that the deep one does."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from esm_efficient.estimation.segments import Segment, Simulation
from esm_efficient.estimation.simulate import simulate, simulate_trunk
from esm_efficient.estimation.step import Step

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Depths = tuple[int, int]
"""Numbers of layers: those below the lowest layer that trains, and those from it on."""
Place = tuple[int, int] | str
"""Where a segment is: the group of its layer and the number in the group, -1 for the last; or a part without layers."""

_SHALLOW = 2
"""Layers of a group that is simulated shallow: its first and its last. One more layer is one between them."""


def simulate_model(config: PreTrainedConfig, step: Step, *, extrapolate: bool = True) -> Simulation:
    """Simulate one optimizer step of a model at its own depth, as `simulate` does; results are cached.

    Without `extrapolate` every layer runs, which gives the same figures and takes longer. So it does for a recipe that
    trains layers with others between them.
    """
    config_class: Any = type(config)
    return _simulate_cached(config_class, config.to_json_string(use_diff=False), step, extrapolate, None)


def simulate_caching(config: PreTrainedConfig, step: Step, *, layers: int, extrapolate: bool = True) -> Simulation:
    """Simulate one forward pass of a trunk with some layers, as `simulate_trunk` does; results are cached."""
    config_class: Any = type(config)
    return _simulate_cached(config_class, config.to_json_string(use_diff=False), step, extrapolate, layers)


@lru_cache(maxsize=512)
def _simulate_cached(
    config_class: Any, config_json: str, step: Step, extrapolate: bool, trunk_layers: int | None
) -> Simulation:
    config = config_class.from_dict(json.loads(config_json))
    count = config.num_hidden_layers
    if trunk_layers is not None:
        return _extrapolate(
            lambda depths: simulate_trunk(config, step, layers=depths[0], whole=trunk_layers == count),
            (trunk_layers, 0),
            (extrapolate, False),
        )
    recipe = step.recipe
    trained = recipe.trained_layers(count)
    frozen = min(trained, default=count)
    if not extrapolate or trained != tuple(range(frozen, count)):
        return simulate(config, step, layers=count)

    def run(depths: Depths) -> Simulation:
        # A recipe for the head alone trains no layer, whatever its `layers` are.
        is_all = recipe.layers == "all" or recipe.trains == "head"
        layers = "all" if is_all else tuple(range(depths[0], sum(depths)))
        return simulate(config, replace(step, recipe=replace(recipe, layers=layers)), layers=sum(depths))

    # A cached trunk's layers do nothing in a step, so that they cost nothing to simulate.
    return _extrapolate(run, (frozen, count - frozen), (not recipe.cache, True))


def _extrapolate(run: Callable[[Depths], Simulation], counts: Depths, groups: tuple[bool, bool]) -> Simulation:
    """Simulate a model from one in which both groups of layers are shallow, and one more for each group.

    Args:
        run: simulates a model of some depths.
        counts: the layers of the model.
        groups: whether to extrapolate each group.
    """
    depths = [
        _SHALLOW if wanted and count > _SHALLOW + 1 else count for wanted, count in zip(groups, counts, strict=True)
    ]
    base = run((depths[0], depths[1]))
    deeper = {}
    for group, (depth, count) in enumerate(zip(depths, counts, strict=True)):
        if depth < count:
            changed = list(depths)
            changed[group] += 1
            deeper[group] = run((changed[0], changed[1]))
    return _extend(base, deeper, (depths[0], depths[1]), counts) if deeper else base


def _extend(base: Simulation, deeper: Mapping[int, Simulation], depths: Depths, counts: Depths) -> Simulation:
    """Return the simulation of a model of many layers.

    Every layer between the first and the last of a group does the same, so the segments of the layer that a deeper
    model has between them are repeated. Each part around these layers is the same at every depth or, like the
    optimizer's step, grows by the same amount with every layer. Each segment begins with the bytes in use at the end of
    the segment before it.

    Args:
        base: the model with the fewest layers.
        deeper: models with one layer more in a group, by group.
        depths: layers of `base`.
        counts: layers of the result.
    """
    by_place = {
        group: {
            (s.phase, _place(s.part, (depths[0] + (group == 0), depths[1] + (group == 1)))): s
            for s in simulation.segments
        }
        for group, simulation in deeper.items()
    }
    firsts = (0, counts[0])

    def at_depth(figure: Callable[[Any], Any], small: Any, larger: Mapping[int, Any]) -> Any:
        """Extend a figure of the models by its growth per layer."""
        value = figure(small)
        return value + sum((counts[g] - depths[g]) * (figure(large) - value) for g, large in larger.items())

    in_use = at_depth(lambda s: s.segments[0].start, base, deeper)
    extended: list[Segment] = []

    def add(phase: str, part: str, peak: np.ndarray, change: np.ndarray, cost: np.ndarray) -> None:
        nonlocal in_use
        extended.append(Segment(phase, part, in_use, in_use + peak, in_use + change, cost))
        in_use = in_use + change

    for segment in base.segments:
        place = _place(segment.part, depths)
        others = {group: segments[segment.phase, place] for group, segments in by_place.items()}
        part = segment.part
        if not isinstance(place, str):
            group, number = place
            part = f"layer {firsts[group] + (number if number >= 0 else counts[group] - 1)}"
        add(
            segment.phase,
            part,
            at_depth(lambda s: s.peak - s.start, segment, others),
            at_depth(lambda s: s.end - s.start, segment, others),
            at_depth(lambda s: s.cost, segment, others),
        )
        if isinstance(place, str) or place[0] not in deeper or place[1] != (0 if segment.phase == "forward" else -1):
            continue
        middle = by_place[group][segment.phase, (group, 1)]
        numbers = range(firsts[group] + 1, firsts[group] + counts[group] - 1)
        for number in numbers if segment.phase == "forward" else reversed(numbers):
            peak, change = middle.peak - middle.start, middle.end - middle.start
            add(segment.phase, f"layer {number}", peak, change, middle.cost)
    return Simulation(
        tuple(extended),
        at_depth(lambda s: s.trainable_parameters, base, deeper),
        at_depth(lambda s: s.total_parameters, base, deeper),
    )


def _place(part: str, depths: Depths) -> Place:
    """Return the place of a segment in a model of some depths."""
    if not part.startswith("layer "):
        return part
    number = int(part.removeprefix("layer "))
    group = int(number >= depths[0])
    number -= group * depths[0]
    return group, -1 if 0 < number == depths[group] - 1 else number
