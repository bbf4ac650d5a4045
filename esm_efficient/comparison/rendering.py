"""The table and the HTML page of a comparison."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence

from esm_efficient.comparison.figures import BUDGETS, MethodFigures
from esm_efficient.costs.memory import CATEGORIES
from esm_efficient.estimation.estimate import Estimate
from esm_efficient.reporting import format_bytes, format_number, format_seconds
from esm_efficient.reporting.html import Plot, Section, Table, html_page, repeated_by
from esm_efficient.reporting.plots import Method, memory_plot, pareto_plot, timeline_plot
from esm_efficient.training.evaluation_page import draw


def table_rows(figures: Sequence[MethodFigures], metric: str | None) -> tuple[list[str], list[list[object]]]:
    """Return the header and the rows of a table, as text for people.

    Args:
        figures: one entry per row.
        metric: name of the metric; None for estimates, which have none.
    """
    has_cache = any(f.cache_bytes for f in figures)
    # The quality comes first, where a narrow window shows it.
    header = ["recipe", *([] if metric is None else [metric, "95 % interval"]), "micro-batch", "steps", "epochs"]
    header += ["time, s", "residues/s", "peak", *CATEGORIES, *(["cache", "caching, s"] if has_cache else [])]
    header += ["trained parameters"]
    rows: list[list[object]] = []
    for f in figures:
        interval = "-" if f.interval is None else f"{f.interval[0]:.3f} to {f.interval[1]:.3f}"
        row: list[object] = [
            f.recipe.name,
            *([] if metric is None else [format_number(f.score, "{:.3f}"), interval]),
            f"{f.recipe.micro_batch} x {f.recipe.accumulation}",
            f"{f.steps:,}",
            f"{f.epochs:.3g}",
            format_number(f.seconds, "{:,.1f}"),
            format_number(f.residues_per_second, "{:,.0f}"),
            format_bytes(f.peak.total),
            *(format_bytes(getattr(f.peak, category)) for category in CATEGORIES),
            *([format_bytes(f.cache_bytes), format_number(f.cache_seconds, "{:,.1f}")] if has_cache else ()),
            f"{f.trainable_parameters:,}",
        ]
        rows.append(row)
    return header, rows


def comparison_page(
    model: str,
    by_budget: Mapping[str, Sequence[MethodFigures]],
    metric: str | None,
    *,
    timelines: Mapping[str, Estimate],
    note: str,
    command: str | None = None,
) -> str:
    """Return one HTML page with tables and plots.

    Args:
        model: name of the model.
        by_budget: figures by budget.
        metric: name of the metric; None for estimates, which have none.
        timelines: estimates by recipe, for the plot of memory over one step.
        note: where the figures are from.
        command: the line that repeats it, if there is one.
    """
    sections = [_budget_section(f"At {BUDGETS[budget]}", figures, metric) for budget, figures in by_budget.items()]
    stacks = {f.recipe.name: f.peak.to_dict() for f in by_budget["steps"]}
    # Measured peaks are those of the machine that trained, whatever device the timelines are estimated for.
    capacity = next(iter(timelines.values())).device.memory if metric is None else 0
    bars = functools.partial(memory_plot, capacity=capacity)
    memory = draw(bars, stacks, caption="Memory at the highest moment, by category.")
    sections.append(Section("Memory by category", [memory]))
    sections.append(Section("Memory over one step", [_timelines(timelines)]))
    sections += repeated_by(command)
    return html_page(f"Fine-tuning methods for {model}", sections, note=note)


def _budget_section(heading: str, figures: Sequence[MethodFigures], metric: str | None) -> Section:
    if not figures:
        return Section(heading, ["Nothing was run at this budget yet."])
    parts: list[str | Table | Plot] = [Table(*table_rows(figures, metric))]
    if not any(math.isnan(f.seconds) for f in figures):
        methods = [
            Method(f.recipe.name, f.seconds, f.peak.total, f.score, *(f.interval or (None, None))) for f in figures
        ]
        caption = "Time against peak memory. A line joins the methods that no other beats in both, if they are several."
        if metric is not None:
            caption += f" Right: {metric} against peak memory, with the interval over the seeds."
        parts.append(draw(functools.partial(pareto_plot, metric=metric or ""), methods, caption=caption))
    return Section(heading, parts)


def estimate_page(estimate: Estimate, *, command: str | None = None) -> str:
    """Return one HTML page of the predicted costs of a step.

    Args:
        estimate: the costs.
        command: the line that repeats it, if there is one.

    Example:
        >>> from esm_efficient import estimate, estimate_page
        >>> page = estimate_page(estimate("8M", recipe="lora"))
        >>> "Memory over one step" in page
        True
    """
    recipe, device = estimate.recipe, estimate.device
    header = ("phase", *CATEGORIES, "total", "time at least")
    costs = {name: (cost.peak, cost.seconds) for name, cost in estimate.phases.items()}
    if estimate.cache is not None:
        costs = {"caching": (estimate.cache.peak, estimate.cache.seconds)} | costs
    rows = [
        (name, *map(format_bytes, peak.to_dict().values()), format_seconds(seconds))
        for name, (peak, seconds) in costs.items()
    ]
    bars = functools.partial(memory_plot, capacity=device.memory)
    parts: list[str | Table | Plot] = [
        *(line for block in str(estimate).split("\n\n")[::2] for line in block.splitlines() if line.strip()),
        Table(header, rows),
        draw(bars, {recipe.name: estimate.peak.to_dict()}, caption="Memory at the highest moment, by category."),
    ]
    sections = [Section("Costs of an optimizer step", parts)]
    sections.append(Section("Memory over one step", [_timelines({recipe.name: estimate})]))
    sections += repeated_by(command)
    note = "Estimated: peaks of tensors, counted operation by operation"
    if math.isnan(estimate.seconds):
        note += f". The rates of {device.name} are unknown, so there are no times."
    else:
        note += "; times by a roofline, so real ones are longer."
    return html_page(f"{estimate.model} on {device.name}, recipe {recipe.name}", sections, note=note)


def _timelines(timelines: Mapping[str, Estimate]) -> str | Plot:
    first = next(iter(timelines.values()))
    timed = not any(math.isnan(estimate.seconds) for estimate in timelines.values())
    points = {
        name: [(p.phase, p.seconds if timed else float(i), p.memory.total) for i, p in enumerate(estimate.timeline)]
        for name, estimate in timelines.items()
    }
    caption = f"Memory over one micro-batch and the optimizer's step, estimated for {first.device.name} and "
    unit = "seconds of the roofline" if timed else "moments, in order"
    caption += f"{first.precision}."
    if any(estimate.cache is not None for estimate in timelines.values()):
        caption += " The pass that computes cached states is not shown."
    return draw(functools.partial(timeline_plot, unit=unit), points, caption=caption)
