"""The HTML page of a sweep over the layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from esm_efficient.reporting import format_number
from esm_efficient.reporting.html import Command, Part, Plot, Section, Table, html_page
from esm_efficient.training.evaluation_page import draw

if TYPE_CHECKING:
    from esm_efficient.training.sweep import LayerSweep


def sweep_page(sweep: LayerSweep, what: str, *, command: str) -> str:
    """Return one HTML page with the plot and the table of a sweep over the layers.

    Args:
        sweep: the scores.
        what: model and data, for the title.
        command: the line that repeats it.
    """
    first, *_, last = str(sweep).split("\n\n")
    metrics = list(next(iter(sweep.scores)).metrics)
    shown = [name for name in metrics if not name.startswith(("f1_", "mcc_")) or name in ("f1_macro", "f1_micro")]
    rows = [
        (score.layer, score.reading, *(format_number(score.metrics[name], "{:.3f}") for name in shown))
        for score in sorted(sweep.scores, key=lambda score: (score.reading, score.layer))
    ]
    if sweep.majority:
        constant = (format_number(sweep.majority.get(name), "{:.3f}") for name in shown)
        rows.append(("-", "best constant prediction", *constant))
    plot: str | Plot = draw(sweep.to_svg, caption=f"{sweep.metric} of the probes by layer.")
    parts: list[Part] = [last, plot, Table(("layer", "reading", *shown), rows), "Repeat it:", Command(command)]
    return html_page(f"Probes: {what}", [Section("Scores by layer", parts)], note=first)
