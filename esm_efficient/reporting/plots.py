"""Plots as SVG text: memory by category, memory over one step, time against memory."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np

from esm_efficient.errors import ConfigurationError
from esm_efficient.reporting.tables import one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GIB = 1024**3
_Plot = TypeVar("_Plot", bound=Callable[..., str])

# Okabe and Ito's palette, which is safe for colour-blind readers.
CATEGORY_COLOURS = {
    "weights": "#0072b2",
    "gradients": "#e69f00",
    "optimizer": "#009e73",
    "activations": "#d55e00",
    "other": "#999999",
}
PHASE_COLOURS = {"forward": "#56b4e9", "backward": "#cc79a7", "optimizer": "#e69f00"}


@dataclass(frozen=True)
class Method:
    """One point of `pareto_plot`.

    Attributes:
        name: label of the point.
        seconds: time of the whole run.
        memory: peak in bytes.
        metric: value of the metric, or None.
        low: lower end of the metric's confidence interval, or None.
        high: upper end of the interval, or None.
    """

    name: str
    seconds: float
    memory: int
    metric: float | None = None
    low: float | None = None
    high: float | None = None


def _plain_text(plot: _Plot) -> _Plot:
    """Show every text of a plot as it is. matplotlib would set a name with two dollar signs as a formula."""

    @functools.wraps(plot)
    def plotted(*args: Any, **options: Any) -> str:
        try:
            import matplotlib.figure
        except ImportError as error:
            raise ConfigurationError(
                "plots need matplotlib, which is not installed: pip install 'esm-efficient-finetuning[plot]'"
            ) from error
        with matplotlib.rc_context({"text.parse_math": False}):
            return plot(*args, **options)

    return cast("_Plot", plotted)


@_plain_text
def memory_plot(stacks: Mapping[str, Mapping[str, int]], *, capacity: int = 0) -> str:
    """Plot peak memory by category, one stacked bar per method.

    Args:
        stacks: bytes by category, by method.
        capacity: bytes of the device, drawn as a line; 0 draws none.

    Returns:
        SVG.

    Raises:
        ConfigurationError: matplotlib is not installed.
    """
    figure, [[axes]] = _figure(8, 0.45 * len(stacks) + 1.6)
    names = [one_line(name) for name in stacks]
    left = np.zeros(len(stacks))
    for category, colour in CATEGORY_COLOURS.items():
        sizes = np.array([stack.get(category, 0) for stack in stacks.values()]) / GIB
        axes.barh(names, sizes, left=left, color=colour, label=category, height=0.65)
        left = left + sizes
    for position, total in enumerate(left):
        axes.text(total, position, f" {total:.3g}", va="center", fontsize=9)
    widest = left.max()
    if capacity and capacity / GIB < 3 * widest:
        axes.axvline(capacity / GIB, color="black", linestyle="--", linewidth=1, label="memory of the device")
        widest = max(widest, capacity / GIB)
    axes.set_xlim(0, 1.12 * widest)
    axes.invert_yaxis()
    axes.set_xlabel("peak memory, GiB")
    figure.legend(loc="outside lower center", ncols=6, frameon=False, fontsize=9)
    return _svg(figure)


@_plain_text
def timeline_plot(timelines: Mapping[str, Sequence[tuple[str, float, int]]], *, unit: str = "seconds") -> str:
    """Plot memory over one step, one small plot per method, coloured by phase.

    Args:
        timelines: points by method: phase, time, bytes.
        unit: unit of the times.

    Returns:
        SVG.

    Raises:
        ConfigurationError: matplotlib is not installed.
    """
    columns = min(3, len(timelines))
    lines = -(-len(timelines) // columns)
    figure, grid = _figure(9, 2.3 * lines + 0.6, lines, columns)
    highest = max(size for points in timelines.values() for _, _, size in points) / GIB
    for axes, (name, points) in zip(grid.flat, timelines.items(), strict=False):
        for phase, colour in PHASE_COLOURS.items():
            indices = [i for i, point in enumerate(points) if point[0] == phase]
            if indices:
                shown = points[indices[0] : indices[-1] + 2]  # with the first point of the next phase, to leave no gap
                axes.fill_between(
                    [x for _, x, _ in shown], [y / GIB for _, _, y in shown], color=colour, label=phase, linewidth=0
                )
        axes.set_title(one_line(name), fontsize=10)
        axes.set_ylim(0, 1.05 * highest)
        axes.set_xlim(points[0][1], max(points[-1][1], 1e-9))
        axes.tick_params(labelsize=8)
    for axes in list(grid.flat)[len(timelines) :]:
        axes.set_axis_off()
    figure.supxlabel(unit, fontsize=9)
    figure.supylabel("GiB", fontsize=9)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=3, frameon=False, fontsize=9)
    return _svg(figure)


@_plain_text
def pareto_plot(methods: Sequence[Method], *, metric: str = "") -> str:
    """Plot time against peak memory, and beside it the metric if there is one.

    A line joins the methods that no other method beats in both time and memory.

    Args:
        methods: the points.
        metric: name of the metric.

    Returns:
        SVG.

    Raises:
        ConfigurationError: matplotlib is not installed.
    """
    measured = [method for method in methods if method.metric is not None]
    figure, [panels] = _figure(9 if measured else 6.5, 4.2, 1, 2 if measured else 1)
    axes = panels[0]
    front = sorted((m for m in methods if not any(_beats(other, m) for other in methods)), key=lambda m: m.seconds)
    axes.plot([m.seconds for m in front], [m.memory / GIB for m in front], color="#999999", linewidth=1, zorder=1)
    _points(axes, [(m.name, m.seconds, m.memory / GIB) for m in methods])
    axes.set_ylabel("peak memory, GiB")
    axes.set_xlabel("time of the run, s")
    axes.set_ylim(bottom=0)
    if measured:
        axes = panels[1]
        for m in measured:
            if m.low is not None:
                axes.plot([m.memory / GIB] * 2, [m.low, m.high], color="#999999", linewidth=1, zorder=1)
        _points(axes, [(m.name, m.memory / GIB, m.metric or 0.0) for m in measured])
        axes.set_xlabel("peak memory, GiB")
        axes.set_ylabel(one_line(metric))
    for axes in panels:
        axes.set_xlim(left=0)
        axes.margins(x=0.15)
    return _svg(figure)


def _beats(one: Method, other: Method) -> bool:
    no_worse = one.seconds <= other.seconds and one.memory <= other.memory
    return no_worse and (one.seconds < other.seconds or one.memory < other.memory)


def _points(axes: Axes, points: Sequence[tuple[str, float, float]]) -> None:
    axes.scatter([x for _, x, _ in points], [y for _, _, y in points], color="#0072b2", zorder=2)
    labelled: list[tuple[float, float]] = []
    spread = max((y for _, _, y in points), default=1.0) or 1.0
    for name, x, y in sorted(points, key=lambda point: point[2]):
        # Stack the labels of points that overlap.
        above = sum(abs(y - b) < 0.04 * spread and abs(x - a) < 0.15 * (abs(x) + 1e-9) for a, b in labelled)
        axes.annotate(one_line(name), (x, y), (6, 4 + 11 * above), textcoords="offset points", fontsize=9)
        labelled.append((x, y))


def _figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, grid


def _svg(figure: Figure) -> str:
    import matplotlib

    buffer = io.StringIO()
    # Keep text as text, and give the same file for the same figures.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
