"""Memory of a training step as it was predicted before a run, beside what was measured, for the page of the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from esm_efficient.costs.memory import CATEGORIES
from esm_efficient.reporting import format_bytes
from esm_efficient.reporting.html import Part, Section, Table
from esm_efficient.reporting.plots import memory_plot, timeline_plot
from esm_efficient.training.evaluation_page import draw

if TYPE_CHECKING:
    from esm_efficient.estimation.estimate import Estimate
    from esm_efficient.profiling.report import ProfileReport

_STEP = ("forward", "backward", "optimizer")
"""The phases of a step, which both sides have."""

_CACHING = "caching"
"""The pass over the data before the first step that computes the cached states; it is estimated, and not measured."""

Bytes = Mapping[str, int]
"""Bytes by category, and their ``total``."""


@dataclass(frozen=True)
class StepMemory:
    """Memory of a training step, predicted and measured.

    Attributes:
        predicted_for: the device of the prediction, such as ``"A10G"``; empty without one.
        predicted: highest bytes of each phase, by category; with a cache also those of the pass that computes it.
        timeline: the predicted course of a step: phase, moment, bytes.
        unit: what the moments count.
        measured_on: the device of the run, such as ``"cuda:0"``; empty if the run was not profiled.
        measured: highest bytes of each phase, by category.
        counted: what was measured.
    """

    predicted_for: str = ""
    predicted: Mapping[str, Bytes] | None = None
    timeline: Sequence[tuple[str, float, int]] = ()
    unit: str = ""
    measured_on: str = ""
    measured: Mapping[str, Bytes] | None = None
    counted: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return everything, ready for JSON."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return fields | {"timeline": [list(point) for point in self.timeline]}


def step_memory(estimate: Estimate | None, report: ProfileReport | None) -> StepMemory | None:
    """Return the memory of a step; None if it was neither predicted nor measured.

    Args:
        estimate: the prediction.
        report: the measurement.
    """
    if estimate is None and report is None:
        return None
    found: dict[str, Any] = {}
    if estimate is not None:
        peaks = {} if estimate.cache is None else {_CACHING: estimate.cache.peak}
        peaks |= {name: cost.peak for name, cost in estimate.phases.items()}
        timed = estimate.timeline[-1].seconds > 0  # the rates of a CPU are unknown
        found |= {
            "predicted_for": estimate.device.name,
            "predicted": {name: peak.to_dict() for name, peak in peaks.items()},
            "timeline": tuple(
                (point.phase, point.seconds if timed else float(moment), point.memory.total)
                for moment, point in enumerate(estimate.timeline)
            ),
            "unit": "seconds of the roofline" if timed else "moments, in order",
        }
    if report is not None:
        found |= {
            "measured_on": report.device,
            "measured": {name: report.phases[name].peak.to_dict() for name in _STEP if name in report.phases},
            "counted": report.counted,
        }
    return StepMemory(**found)


def memory_section(memory: StepMemory) -> Section:
    """Return the section of a page: numbers side by side, bars by category, and the course of a step."""
    sides = {"estimated": memory.predicted or {}, "measured": memory.measured or {}}
    rows = [
        (phase, side, *(format_bytes(peaks[phase].get(name, 0)) for name in (*CATEGORIES, "total")))
        for phase in (_CACHING, *_STEP)
        for side, peaks in sides.items()
        if phase in peaks
    ]
    parts: list[Part] = [_explain(memory), Table(("peak of phase", "", *CATEGORIES, "total"), rows)]
    stacks = {f"{phase}, {side}": sides[side][phase] for phase, side, *_ in rows}
    if stacks:
        parts.append(draw(memory_plot, stacks, caption="Memory at the highest moment of each phase, by category."))
    if memory.timeline:
        caption = f"Memory over one micro-batch and the optimizer's step, estimated for {memory.predicted_for}."
        if memory.measured:
            caption += " Dashed: the measured peak of each phase."
        measured = {phase: peak["total"] for phase, peak in (memory.measured or {}).items()}
        parts.append(
            draw(
                lambda points: timeline_plot(points, unit=memory.unit, peaks=measured),
                {"one step": memory.timeline},
                caption=caption,
            )
        )
    return Section("Memory", parts)


def _explain(memory: StepMemory) -> str:
    said = []
    if memory.predicted_for:
        said.append(f"Before the run, the memory of a step was estimated for {memory.predicted_for}.")
    if _CACHING in (memory.predicted or {}):
        said.append("Caching is the pass over the data before the first step, which computes the cached states.")
    if not memory.measured_on:
        return " ".join([*said, "It was not measured; --profile measures it (profile=True in Python)."])
    said.append(f"The run was measured on {memory.measured_on} ({memory.counted}).")
    if memory.predicted is None:
        return " ".join(said)
    highest = {
        side: max((peak["total"] for phase, peak in peaks.items() if phase in _STEP), default=0)
        for side, peaks in (("estimated", memory.predicted), ("measured", memory.measured or {}))
    }
    if highest["measured"]:
        ratio = highest["estimated"] / highest["measured"]
        said.append(f"The estimated peak of a step is {100 * ratio:.0f} % of the measured one.")
    on_cpu = [name == "cpu" for name in (memory.predicted_for, memory.measured_on.split(":")[0])]
    if on_cpu[0] != on_cpu[1]:
        said.append("The devices differ: they have other kernels, so that the two need not agree.")
    elif on_cpu[0]:
        said.append("Both are those of a CPU, whose kernels allocate in another way than those of a GPU.")
    return " ".join(said)
