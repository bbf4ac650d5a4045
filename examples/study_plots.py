"""The plots of the results page, and what they share with its tables."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from study_results import best_probe, mean_cost, runs_on, scores

from esm_efficient.reporting.plots import new_figure, plain_text, svg_of
from esm_efficient.training.metrics import confidence_interval

AGAINST = "lora-top6-first-e1"
LAYERS = 6
FULL = "full-first-e1"
CALIBRATED = "top-calibrated-e1"
CURVE = {
    "lora-top2-first-e1": ("LoRA, 1 epoch", "#0072b2"),
    "lora-top2-first-e3": ("LoRA, 3 epochs", "#d55e00"),
    FULL: ("full fine-tuning, 1 epoch", "#009e73"),
}
"""The methods of the learning curve beside the best probe, in words, and their colours."""


HELD_OUT, WITH_RELATIVES = ([0, 1, 2], [4]), ([0, 1, 2, 4], [4])
"""The partitions for training and for testing, without and with relatives of the test proteins in training."""
LEAKING = {"composition": "amino-acid shares", "probe": "the best linear probe", "lora-top2-first-e1": "the recipe top"}
"""The methods that are compared with and without relatives, in words."""


def tuned_at(layer: int) -> str:
    """Return the method that fine-tunes the lowest layers alone; with all of them it is LoRA on the whole model."""
    return AGAINST if layer == LAYERS else f"truncated{layer}-lora-first-e1"


def by_size(runs: list[dict]) -> dict[int, list[dict]]:
    """Return the runs by their number of training proteins, the smallest first."""
    sizes = sorted({run["split"]["proteins"][0] for run in runs})
    return {size: [run for run in runs if run["split"]["proteins"][0] == size] for size in sizes}


def leaks(runs: list[dict]) -> list[tuple[int, float, str, list[tuple[float, float]]]]:
    """Return what is known of leakage, a row per number of training proteins and method.

    Returns:
        The number of training proteins; the share of test proteins with a close relative among them, where there are
        any; the method in words; and, per seed, the MCC without such relatives and with them.
    """
    rows = []
    for size, same in by_size(runs).items():
        without, among = (runs_on(split, same) for split in (HELD_OUT, WITH_RELATIVES))
        shares = {run["seed"]: run["relatives"] for run in among}
        for method, title in LEAKING.items():
            probes = [run for run in without if run["method"].startswith("probe")]
            name = best_probe(probes) if method == "probe" and probes else method
            found = [scores(group, name) for group in (without, among)]
            if pairs := [(found[0][seed], found[1][seed]) for seed in found[1] if seed in found[0]]:
                rows.append((size, statistics.fmean(shares.values()), title, pairs))
    return rows


@plain_text
def leakage_plot(runs: list[dict]) -> str:
    """Plot how much the MCC of each method gains from relatives of the test proteins, with 95 % intervals."""
    rows = leaks(runs)[::-1]
    figure, [[axes]] = new_figure(7, 1 + 0.5 * len(rows))
    axes.axvline(0, color="#999999", linewidth=0.8)
    for place, (*_, pairs) in enumerate(rows):
        gains = [among - without for without, among in pairs]
        axes.scatter([statistics.fmean(gains)], [place], color="#0072b2")
        if (interval := confidence_interval(gains)) is not None:
            axes.plot(interval, [place, place], color="#0072b2")
    axes.set_ylim(-0.5, len(rows) - 0.5)
    axes.set_yticks(range(len(rows)), [f"{title}, {size:,} proteins" for size, _, title, _ in rows])
    axes.set_xlabel("MCC with relatives in training, minus MCC without")
    return svg_of(figure)


@plain_text
def truncation_plot(runs: list[dict]) -> str:
    """Plot the MCC of probes and of fine-tuning by the number of layers, with 95 % intervals."""
    figure, [[axes]] = new_figure(7, 4)
    lines = {
        "linear probe, first token": ("#999999", lambda layer: f"probe{layer}-first"),
        "linear probe, mean over residues": ("#0072b2", lambda layer: f"probe{layer}-mean"),
        "LoRA on all layers up to here, first token": ("#d55e00", tuned_at),
    }
    for name, (colour, method) in lines.items():
        draw(axes, [(layer, list(scores(runs, method(layer)).values())) for layer in range(LAYERS + 1)], name, colour)
    axes.set_xlabel("layers (0: embeddings)")
    axes.set_ylabel("MCC on the test proteins")
    figure.legend(loc="outside lower center", ncols=1, frameon=False, fontsize=9)
    return svg_of(figure)


@plain_text
def depth_plot(runs: list[dict]) -> str:
    """Plot the MCC of LoRA by its CPU seconds, with 95 % intervals, one line per number of epochs."""
    figure, [[axes]] = new_figure(7, 4)
    for epochs, colour, below in ((1, "#0072b2", -13), (3, "#d55e00", 5)):
        points = []
        for layers in (1, 2, 3, LAYERS):
            method = f"lora-top{layers}-first-e{epochs}"
            if (seconds := mean_cost(runs, method)) is not None:
                points.append((seconds, list(scores(runs, method).values())))
                place = points[-1][0], statistics.fmean(points[-1][1])
                axes.annotate(f"top {layers}", place, (5, below), fontsize=9, textcoords="offset points")
        draw(axes, points, f"LoRA, {epochs} epoch{'s' if epochs > 1 else ''}", colour)
    axes.set_xlim(left=0)
    axes.set_xlabel("CPU seconds of the run, cached states included")
    axes.set_ylabel("MCC on the test proteins")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return svg_of(figure)


def draw(axes: Any, points: Sequence[tuple[float, list[float]]], name: str, colour: str) -> None:
    """Draw the means of values over x as a line, with their 95 % intervals; points without values are left out."""
    shown = [(x, statistics.fmean(values), confidence_interval(values)) for x, values in points if values]
    axes.plot([x for x, _, _ in shown], [y for _, y, _ in shown], marker="o", color=colour, label=name)
    for x, _, interval in shown:
        if interval is not None:
            axes.plot([x, x], interval, color=colour, linewidth=1, alpha=0.5)


@plain_text
def curve_plot(runs: list[dict]) -> str:
    """Plot the MCC by the number of training proteins, with 95 % intervals."""
    figure, [[axes]] = new_figure(7, 4)
    sizes = by_size(runs)
    points = [(size, list(scores(same, best_probe(same)).values())) for size, same in sizes.items()]
    draw(axes, points, "the best linear probe", "#999999")
    for method, (title, colour) in CURVE.items():
        draw(axes, [(size, list(scores(same, method).values())) for size, same in sizes.items()], title, colour)
    axes.set_xscale("log")
    axes.set_xticks(list(sizes), [f"{size:,}" for size in sizes])
    axes.minorticks_off()
    axes.set_xlabel("training proteins")
    axes.set_ylabel("MCC on the test proteins")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return svg_of(figure)


def pooled(runs: Sequence[Sequence[tuple[float, float, int]]]) -> list[tuple[float, float]]:
    """Return mean probability and share that is right, in tenths of the probability, of the bins of several runs."""
    places: dict[int, list] = {}
    for chance, share, count in (entry for bins in runs for entry in bins):
        places.setdefault(min(int(chance * 10), 9), []).append((chance * count, share * count, count))
    sums = [[sum(column) for column in zip(*places[place], strict=True)] for place in sorted(places)]
    return [(chance / count, share / count) for chance, share, count in sums]


@plain_text
def calibration_plot(runs: list[dict]) -> str:
    """Plot how often predictions of a probability come true before and after the temperature, all seeds together."""
    figure, [[axes]] = new_figure(5, 4)
    axes.plot([0.5, 1], [0.5, 1], "--", color="#999999", linewidth=0.8)
    for name, colour in (("before", "#d55e00"), ("after", "#0072b2")):
        found = [run["calibration"][name]["bins"] for run in runs if run["method"] == CALIBRATED]
        axes.plot(*zip(*pooled(found), strict=True), marker="o", color=colour, label=f"{name} the temperature")
    axes.set(xlabel="probability that the model gives", ylabel="share that is right")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return svg_of(figure)


PLOTS = {
    "calibration": (calibration_plot, "Share of right predictions by probability, before and after the temperature"),
    "curve": (curve_plot, "MCC of a probe and of fine-tuning by the number of training proteins"),
    "truncation": (truncation_plot, "MCC of probes and of fine-tuning by the number of layers"),
    "leakage": (leakage_plot, "What the MCC gains from relatives of the test proteins in training, with intervals"),
    "depth": (depth_plot, "MCC of LoRA on the top layers by the time of the run"),
}
"""The function of a plot, and what it shows in words."""
