"""Write the tables and the plots of the results page and of the README from the results files of the studies.

    python examples/study_page.py examples/results docs/pages/results.md README.md

The folder has ``membrane.jsonl`` of ``compare_methods.py`` and ``location.jsonl`` of ``location_study.py``. A table or
a plot stands between two comments of the page, such as ``<!-- table: depth -->`` and ``<!-- end -->``. The script
replaces what is between them, and writes the plots as SVG files beside the page. The same results give the same page.
"""

from __future__ import annotations

import argparse
import re
import statistics
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from location_study import location_table, locations_table
from study_results import best_probe, cost, read_results, runs_on, scores, show

from esm_efficient.reporting.plots import new_figure, plain_text, svg_of
from esm_efficient.reporting.tables import format_bytes, format_markdown
from esm_efficient.training.metrics import confidence_interval

AGAINST = "lora-top6-first-e1"
LAYERS = 6
FULL = "full-first-e1"
CHOOSING, HELD_OUT, AT_RANDOM = ([0, 1, 2], [3]), ([0, 1, 2], [4]), (["random"], ["random"])
USUAL_SPLIT = ([0, 1, 2, 3], [4])
SPLITS = {"tuning": [CHOOSING], "leakage": [USUAL_SPLIT, AT_RANDOM]}
SPLITS |= {name: [HELD_OUT] for name in ("headline", "bar", "curve", "calibration", "full")}
"""The partitions for training and for testing of some tables and plots; all others have the usual split."""
PROTEINS = 2400
"""The training proteins of everything but the learning curve."""
TABLES = {
    "cheap": ["majority", "composition", "probe*-mean", "probe*-first"],
    "depth": ["lora-top*-first-e1", "lora-top*-first-e3"],
}
HEADLINE = {
    "majority": "the majority class",
    "composition": "logistic regression on amino-acid shares",
    "probe": "linear probe on one layer: the best of all",
    "frozen-attention-e3": "frozen: the head alone, on a learned mean over residues, three epochs",
    "lora-top2-first-e1": "top: LoRA on the top third, on cached states",
    "lora-top2-first-e3": "top, for three epochs (the default)",
    "all-first-e1": "all: LoRA on all layers, with the least memory",
    "full-first-e1": "base: full fine-tuning",
    "full-first-e3": "base, for three epochs",
    "tutorial-base": "tutorial: full fine-tuning, eager attention, padding",
    "tutorial-all": 'the tutorial\'s "all": adapters cut off, a quarter of the steps',
}
"""The rows of the README's table, in words; ``probe`` is the linear probe with the highest mean."""
TUNED = {
    "lora-top2-first-e1": "the recipe",
    "tune-rate-third": "learning rate 3e-4, not 1e-3",
    "tune-rate-triple": "learning rate 3e-3, not 1e-3",
    "tune-batch-16": "16 sequences per step, not 8, at rate 1.4e-3",
    "tune-batch-32": "32 sequences per step, not 8, at rate 2e-3",
    "tune-rank-2": "rank 2, not 8",
    "tune-rank-32": "rank 32, not 8",
    "tune-alpha-half": "alpha 8, not 16",
    "tune-alpha-double": "alpha 32, not 16",
    "tune-qkv": "adapters on query, key and value alone",
    "tune-dropout": "dropout of 0.1 on the inputs of the adapters",
    "tune-rslora": "rsLoRA: alpha over the root of the rank",
    "tune-dora": "DoRA",
    "tune-eva": "EVA: first values from the training data",
    "tune-lora-plus": "LoRA+: four times the rate for the matrices B",
    "tune-head-slow": "a tenth of the rate for the head",
    "tune-head-fast": "ten times the rate for the head",
    "tune-warm-up": "warm-up over a tenth of the steps",
    "tune-cosine": "cosine schedule, not linear",
    "tune-weights-none": "no class weights",
    "lora-top2-mean-e1": "a head that reads the mean over residues",
    "lora-top2-attention-e1": "a head that reads a learned mean over residues",
    "lora-top2-first-e3": "3 epochs, not 1",
}
"""The rows of the table of settings, in words; the first is what the others are compared with."""
CALIBRATED = "top-calibrated-e1"
LEAKING = {"composition": "amino-acid shares", "probe": "the best linear probe", "lora-top2-first-e1": "the recipe top"}
"""The methods of the table of leakage, in words."""
CURVE = {
    "lora-top2-first-e1": ("LoRA, 1 epoch", "#0072b2"),
    "lora-top2-first-e3": ("LoRA, 3 epochs", "#d55e00"),
    FULL: ("full fine-tuning, 1 epoch", "#009e73"),
}
"""The methods of the learning curve beside the best probe, in words, and their colours."""
HEADER = ("method", "seeds", "accuracy", "AUROC", "MCC", "MCC - {}", "CPU s", "activations")
PLACE = re.compile(r"(<!-- (?P<kind>table|plot): (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def tuned_at(layer: int) -> str:
    """Return the method that fine-tunes the lowest layers alone; with all of them it is LoRA on the whole model."""
    return AGAINST if layer == LAYERS else f"truncated{layer}-lora-first-e1"


def truncation_table(runs: list[dict]) -> str:
    """Return the probes of each layer beside fine-tuning of the model that ends there."""
    whole = scores(runs, AGAINST)
    costs = {run["seed"]: cost(run, runs) for run in runs if run["method"] == AGAINST}
    rows = []
    for layer in range(1, LAYERS + 1):
        tuned = [run for run in runs if run["method"] == tuned_at(layer)]
        found = scores(tuned, tuned_at(layer))
        ratios = [(cost(run, runs) or 0) / (costs[run["seed"]] or 1) for run in tuned if costs.get(run["seed"])]
        probes = [show(list(scores(runs, f"probe{layer}-{reading}").values())) for reading in ("first", "mean")]
        differences = [found[seed] - whole[seed] for seed in found if seed in whole]
        ratio = f"{statistics.fmean(ratios):.2f}" if ratios else "-"
        rows.append([layer, *probes, show(list(found.values())), show(differences, "{:+.3f}"), ratio])
    header = ("layers", "probe, first token", "probe, mean", "LoRA", "LoRA - LoRA on all", "time of LoRA on all")
    return format_markdown(rows, header)


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
    for epochs, colour in ((1, "#0072b2"), (3, "#d55e00")):
        points = []
        for layers in (1, 2, 3, LAYERS):
            method = f"lora-top{layers}-first-e{epochs}"
            costs = [seconds for run in runs if run["method"] == method and (seconds := cost(run, runs)) is not None]
            if costs:
                points.append((statistics.fmean(costs), list(scores(runs, method).values())))
                place = points[-1][0], statistics.fmean(points[-1][1])
                axes.annotate(f"top {layers}", place, (5, 5), fontsize=9, textcoords="offset points")
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


def curve_sizes(runs: list[dict]) -> dict[int, list[dict]]:
    """Return the runs by their number of training proteins, the smallest first."""
    sizes = sorted({run["split"]["proteins"][0] for run in runs})
    return {size: [run for run in runs if run["split"]["proteins"][0] == size] for size in sizes}


def curve_table(runs: list[dict]) -> str:
    """Return the methods by the number of training proteins."""
    rows = []
    for size, same in curve_sizes(runs).items():
        probe = scores(same, best_probe(same))
        columns = [scores(same, method) for method in CURVE]
        gains = [[found[seed] - probe[seed] for seed in found if seed in probe] for found in columns[:2]]
        cells = [show(list(found.values())) for found in (probe, *columns)]
        rows.append([f"{size:,}", *cells, *(show(values, "{:+.3f}") for values in gains)])
    titles = [title for title, _ in CURVE.values()]
    return format_markdown(rows, ("training proteins", "best probe", *titles, *(f"{t} - probe" for t in titles[:2])))


@plain_text
def curve_plot(runs: list[dict]) -> str:
    """Plot the MCC by the number of training proteins, with 95 % intervals."""
    figure, [[axes]] = new_figure(7, 4)
    sizes = curve_sizes(runs)
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


def calibration_table(runs: list[dict]) -> str:
    """Return the temperature and the expected calibration error before and after it, seed by seed and their mean."""
    same = [run for run in runs if run["method"] == CALIBRATED]
    errors = {name: [run["calibration"][name]["error"] for run in same] for name in ("before", "after")}
    temperatures = [run["temperature"] for run in same]
    mcc = list(scores(same, CALIBRATED).values())
    rows = [
        (
            run["seed"],
            f"{run['temperature']:.2f}",
            *(f"{found[row]:.3f}" for found in errors.values()),
            f"{mcc[row]:.3f}",
        )
        for row, run in enumerate(same)
    ]
    rows.append(("mean", show(temperatures, "{:.2f}"), *(show(found) for found in errors.values()), show(mcc)))
    return format_markdown(rows, ("seed", "temperature", "error before", "error after", "MCC"))


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


def leakage_table(runs: list[dict]) -> str:
    """Return the MCC of methods on a random split and on partitions, each the mean over the seeds."""
    by_split = [runs_on(split, runs) for split in (USUAL_SPLIT, AT_RANDOM)]
    rows = []
    for method, title in LEAKING.items():
        names = [best_probe(same) if method == "probe" else method for same in by_split]
        found = [list(scores(same, name).values()) for same, name in zip(by_split, names, strict=True)]
        if all(found):
            gain = statistics.fmean(found[1]) - statistics.fmean(found[0])
            rows.append((title, *(show(values) for values in found), f"{gain:+.3f}"))
    return format_markdown(rows, ("method", "MCC by partition", "MCC of a random split", "difference"))


PLOTS = {
    "calibration": (calibration_plot, "Share of right predictions by probability, before and after the temperature"),
    "curve": (curve_plot, "MCC of a probe and of fine-tuning by the number of training proteins"),
    "truncation": (truncation_plot, "MCC of probes and of fine-tuning by the number of layers"),
    "depth": (depth_plot, "MCC of LoRA on the top layers by the time of the run"),
}
"""The function of a plot, and what it shows in words."""


def headline_table(runs: list[dict]) -> str:
    """Return the README's table: the methods of `HEADLINE` that were run."""
    best = best_probe(runs)
    methods = {run["method"] for run in runs}
    titles = {best if name == "probe" else name: title for name, title in HEADLINE.items()}
    return methods_table(runs, {name: title for name, title in titles.items() if name in methods}, FULL, "full")


def bar_table(runs: list[dict]) -> str:
    """Return the methods of the README's table that train a network, compared with the best probe."""
    methods = {run["method"] for run in runs}
    titles = {name: title for name, title in HEADLINE.items() if name in methods and "-" in name}
    return methods_table(runs, titles, best_probe(runs), "the best probe")


def gain_table(runs: list[dict]) -> str:
    """Return the methods that train a network, compared with the best probe."""
    titles = matching(runs, ["frozen-*", "lora-*", "full-*"])
    return methods_table(runs, titles, best_probe(runs), "the best probe")


def full_table(runs: list[dict]) -> str:
    """Return full fine-tuning with each head and number of epochs, compared with the recipe `base` for one epoch."""
    return methods_table(runs, matching(runs, ["full-*"]), FULL, FULL)


def matching(runs: list[dict], patterns: Sequence[str]) -> dict[str, str]:
    """Return the methods whose name fits a pattern, pattern by pattern, each with its name as title."""
    methods = dict.fromkeys(run["method"] for run in runs)
    return {name: name for pattern in patterns for name in methods if fnmatch(name, pattern)}


def tuning_table(runs: list[dict]) -> str:
    """Return the table of `TUNED` settings that were run."""
    methods = {run["method"] for run in runs}
    against, called = next(iter(TUNED.items()))
    return methods_table(runs, {name: title for name, title in TUNED.items() if name in methods}, against, called)


def methods_table(
    runs: list[dict], titles: Mapping[str, str], against: str = AGAINST, called: str = "LoRA on all"
) -> str:
    """Return one row per method.

    Args:
        runs: all runs.
        titles: what a method is called in its row.
        against: the method whose MCC is subtracted, seed by seed.
        called: its name in the header.
    """
    whole = {run["seed"]: run for run in runs if run["method"] == against}
    rows = []
    for name, title in titles.items():
        same = [run for run in runs if run["method"] == name]
        mean = {key: statistics.fmean(run["metrics"][key] for run in same) for key in ("accuracy", "auroc")}
        found = scores(same, name)
        differences = [found[seed] - whole[seed]["metrics"]["mcc"] for seed in found if seed in whole]
        costs = [seconds for run in same if (seconds := cost(run, runs)) is not None]
        peaks = [run["peak_activation_bytes"] for run in same if "peak_activation_bytes" in run]
        rows.append(
            (
                title,
                len(same),
                f"{mean['accuracy']:.3f}",
                f"{mean['auroc']:.3f}",
                show(list(found.values())),
                show(differences, "{:+.3f}"),
                f"{statistics.fmean(costs):.1f}" if costs else "-",
                format_bytes(max(peaks)) if peaks else "-",
            )
        )
    return format_markdown(rows, [title.format(called) for title in HEADER])


LOCATION_TABLES = {"location": location_table, "locations": locations_table}
"""The tables that are made from the other results file."""
WHOLE_TABLES = {
    "bar": bar_table,
    "calibration": calibration_table,
    "curve": curve_table,
    "truncation": truncation_table,
    "headline": headline_table,
    "leakage": leakage_table,
    "full": full_table,
    "gain": gain_table,
    "tuning": tuning_table,
}


def table(name: str, runs: list[dict]) -> str:
    """Return a table as Markdown, made of the runs that belong to it."""
    if name in LOCATION_TABLES:
        return LOCATION_TABLES[name](runs)
    runs = select(name, runs)
    if name in WHOLE_TABLES:
        return WHOLE_TABLES[name](runs)
    return methods_table(runs, matching(runs, TABLES[name]))


def select(name: str, runs: list[dict]) -> list[dict]:
    """Return the runs on the split that a table or a plot is about."""
    same = [run for split in SPLITS.get(name, [USUAL_SPLIT]) for run in runs_on(split, runs)]
    return same if name == "curve" else [run for run in same if run["split"]["proteins"][0] == PROTEINS]


def fill(page: str, runs: list[dict], location: list[dict], images: Path) -> str:
    """Return the page with its tables and plots made anew; the plots are written to the folder."""

    def content(place: re.Match) -> str:
        name = place["name"]
        if place["kind"] == "table":
            text = f"\n{table(name, location if name in LOCATION_TABLES else runs)}\n\n"
        else:
            plot, shown = PLOTS[name]
            images.mkdir(exist_ok=True)
            (images / f"results_{name}.svg").write_text(plot(select(name, runs)))
            text = f"![{shown}]({images.name}/results_{name}.svg)\n"
        return place[1] + text + place[4]

    return PLACE.sub(content, page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="folder with membrane.jsonl and location.jsonl, on one model")
    parser.add_argument("pages", type=Path, nargs="+", help="Markdown files to fill")
    options = parser.parse_args()
    runs, location = (read_results(options.results / f"{name}.jsonl") for name in ("membrane", "location"))
    for page in options.pages:
        page.write_text(fill(page.read_text(), runs, location, page.parent / "images"))


if __name__ == "__main__":
    main()
