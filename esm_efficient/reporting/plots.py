"""Plots as SVG text: memory by category, memory over one step, time against memory, a metric by layer."""

from __future__ import annotations

import functools
import io
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np

from esm_efficient.errors import ConfigurationError
from esm_efficient.reporting.tables import count_of, one_line

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


def plain_text(plot: _Plot) -> _Plot:
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


@plain_text
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
    figure, [[axes]] = new_figure(8, 0.45 * len(stacks) + 1.6)
    names = [one_line(name) for name in stacks]
    left = np.zeros(len(stacks))
    divisor, unit = _binary_unit(max(sum(stack.get(name, 0) for name in CATEGORY_COLOURS) for stack in stacks.values()))
    for category, colour in CATEGORY_COLOURS.items():
        sizes = np.array([stack.get(category, 0) for stack in stacks.values()]) / divisor
        axes.barh(names, sizes, left=left, color=colour, label=category, height=0.65)
        left = left + sizes
    for position, total in enumerate(left):
        axes.annotate(f"{total:.3g}", (total, position), (4, 0), textcoords="offset points", va="center", fontsize=9)
    widest = left.max()
    if capacity and capacity / divisor < 3 * widest:
        axes.axvline(capacity / divisor, color="black", linestyle="--", linewidth=1, label="memory of the device")
        widest = max(widest, capacity / divisor)
    axes.set_xlim(0, 1.12 * widest)
    axes.invert_yaxis()
    axes.set_xlabel(f"peak memory, {unit}")
    figure.legend(loc="outside lower center", ncols=6, frameon=False, fontsize=9)
    return svg_of(figure)


@plain_text
def timeline_plot(
    timelines: Mapping[str, Sequence[tuple[str, float, int]]],
    *,
    unit: str = "seconds",
    peaks: Mapping[str, int] | None = None,
) -> str:
    """Plot memory over one step, one small plot per method, coloured by phase.

    Args:
        timelines: points by method: phase, time, bytes.
        unit: unit of the times.
        peaks: bytes by phase, drawn as a dashed line over the phase.

    Returns:
        SVG.

    Raises:
        ConfigurationError: matplotlib is not installed.
    """
    from matplotlib.ticker import MaxNLocator

    columns = min(3, len(timelines))
    lines = -(-len(timelines) // columns)
    figure, grid = new_figure(9, 2.3 * lines + 0.6, lines, columns)
    highest = max([*(size for points in timelines.values() for _, _, size in points), *(peaks or {}).values()])
    divisor, name_of_unit = _binary_unit(highest)
    for axes, (name, points) in zip(grid.flat, timelines.items(), strict=False):
        for phase, colour in PHASE_COLOURS.items():
            indices = [i for i, point in enumerate(points) if point[0] == phase]
            if indices:
                shown = points[indices[0] : indices[-1] + 2]  # with the first point of the next phase, to leave no gap
                axes.fill_between(
                    [x for _, x, _ in shown], [y / divisor for _, _, y in shown], color=colour, label=phase, linewidth=0
                )
                if peaks and phase in peaks:
                    axes.hlines(peaks[phase] / divisor, shown[0][1], shown[-1][1], color="black", linestyle="--")
        axes.set_title(one_line(name), fontsize=10)
        axes.set_ylim(0, 1.05 * highest / divisor)
        axes.set_xlim(points[0][1], max(points[-1][1], 1e-9))
        axes.tick_params(labelsize=8)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=3 if columns > 1 else 6, steps=[1, 2, 5, 10]))
    for axes in list(grid.flat)[len(timelines) :]:
        axes.set_axis_off()
    figure.supxlabel(unit, fontsize=9)
    figure.supylabel(name_of_unit, fontsize=9)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=3, frameon=False, fontsize=9)
    return svg_of(figure)


@plain_text
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
    figure, [panels] = new_figure(9 if measured else 6.5, 4.2, 1, 2 if measured else 1)
    axes = panels[0]
    front = sorted((m for m in methods if not any(_beats(other, m) for other in methods)), key=lambda m: m.seconds)
    divisor, unit = _binary_unit(max(m.memory for m in methods))
    axes.plot([m.seconds for m in front], [m.memory / divisor for m in front], color="#999999", linewidth=1, zorder=1)
    _points(axes, [(m.name, m.seconds, m.memory / divisor) for m in methods])
    axes.set_ylabel(f"peak memory, {unit}")
    axes.set_xlabel("time of the run, s")
    axes.set_ylim(bottom=0)
    if measured:
        axes = panels[1]
        for m in measured:
            if m.low is not None:
                axes.plot([m.memory / divisor] * 2, [m.low, m.high], color="#999999", linewidth=1, zorder=1)
        _points(axes, [(m.name, m.memory / divisor, m.metric or 0.0) for m in measured])
        axes.set_xlabel(f"peak memory, {unit}")
        axes.set_ylabel(one_line(metric))
    for axes in panels:
        axes.set_xlim(left=0)
        axes.margins(x=0.15)
    return svg_of(figure)


@plain_text
def layers_plot(
    lines: Mapping[str, Sequence[float]], *, metric: str, enough: int | None, band: tuple[float, float] | None = None
) -> str:
    """Plot a metric by the number of layers, one line per name.

    Args:
        lines: values by name, for 0, 1, ... layers; NaN leaves a gap.
        metric: name of the metric.
        enough: number of layers to mark as enough for a probe; None for none.
        band: range of values to shade, such as one standard error below the best.

    Returns:
        SVG.

    Raises:
        ConfigurationError: matplotlib is not installed.
    """
    from matplotlib.ticker import MaxNLocator

    figure, [[axes]] = new_figure(7, 4)
    if band is not None:
        axes.axhspan(*band, color="#999999", alpha=0.3, linewidth=0, label="within one standard error of the best")
    for (name, values), colour in zip(lines.items(), itertools.cycle(CATEGORY_COLOURS.values())):
        axes.plot(range(len(values)), values, marker="o", markersize=4, color=colour, label=one_line(name))
    if enough is not None:
        label = f"enough for a probe: {count_of(enough, 'layer')}"
        axes.axvline(enough, color="black", linestyle="--", linewidth=1, label=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("layers (0: embeddings)")
    axes.set_ylabel(one_line(metric))
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return svg_of(figure)


def _binary_unit(highest: int) -> tuple[int, str]:
    """Return the bytes and the name of the unit for an axis up to some bytes."""
    return (GIB, "GiB") if highest >= GIB // 2 else (1024**2, "MiB")


def _beats(one: Method, other: Method) -> bool:
    no_worse = one.seconds <= other.seconds and one.memory <= other.memory
    return no_worse and (one.seconds < other.seconds or one.memory < other.memory)


def _points(axes: Axes, points: Sequence[tuple[str, float, float]]) -> None:
    axes.scatter([x for _, x, _ in points], [y for _, _, y in points], color="#0072b2", zorder=2, clip_on=False)
    labelled: list[tuple[float, float]] = []
    spread = max((y for _, _, y in points), default=1.0) or 1.0
    for name, x, y in sorted(points, key=lambda point: point[2]):
        # Stack the labels of points that overlap.
        above = sum(abs(y - b) < 0.04 * spread and abs(x - a) < 0.15 * (abs(x) + 1e-9) for a, b in labelled)
        axes.annotate(one_line(name), (x, y), (6, 4 + 11 * above), textcoords="offset points", fontsize=9)
        labelled.append((x, y))


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, Any]:
    """Return a figure of a size in inches, and its axes as an array of shape (rows, columns)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, grid


def svg_of(figure: Figure) -> str:
    """Return a figure as SVG, the same text for the same figure."""
    import matplotlib

    buffer = io.StringIO()
    # Keep text as text, and give the same file for the same figures.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
