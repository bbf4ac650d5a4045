"""Write the tables and the plots of the results page and of the README from the results files of the studies.

    python examples/study_page.py examples/results docs/pages/results.md README.md

The folder has ``membrane.jsonl`` of ``compare_methods.py`` and ``location.jsonl`` of ``location_study.py``. A table or
a plot stands between two comments of the page, such as ``<!-- table: depth -->`` and ``<!-- end -->``. The script
replaces what is between them, and writes the plots as SVG files beside the page. The same results give the same page.
"""

from __future__ import annotations

import argparse
import itertools
import re
import statistics
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path

from location_study import location_table, locations_table
from study_plots import (
    AGAINST,
    CALIBRATED,
    CURVE,
    FULL,
    HELD_OUT,
    LAYERS,
    PLOTS,
    WITH_RELATIVES,
    by_size,
    leaks,
    tuned_at,
)
from study_results import best_probe, cost, mean_cost, read_results, runs_on, scores, show

from esm_efficient.reporting.tables import format_bytes, format_markdown

CHOOSING, USUAL_SPLIT = ([0, 1, 2], [3]), ([0, 1, 2, 3], [4])
SPLITS = {"tuning": [CHOOSING], "leakage": [HELD_OUT, WITH_RELATIVES]}
SPLITS |= {name: [HELD_OUT] for name in ("headline", "bar", "curve", "calibration", "full", "savings")}
"""The partitions for training and for testing of some tables and plots; all others have the usual split."""
ALIKE = 0.15
"""Two methods whose times differ by no more than this share take about as long."""
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
    "lora-top1-first-e1": "the top sixth of the layers, not a third",
    "lora-top3-first-e1": "the top half of the layers",
    "lora-top6-first-e1": "all layers, not on cached states",
    "lora-top2-mean-e1": "a head that reads the mean over residues",
    "lora-top2-attention-e1": "a head that reads a learned mean over residues",
    "lora-top2-first-e3": "3 epochs, not 1",
}
"""The rows of the table of settings, in words; the first is what the others are compared with."""
SAVINGS = {
    "full-first-e1": ("full fine-tuning (base)", "full-first-e1"),
    "ga-first-e1": ("with accumulation, 2 x 4 (ga)", "full-first-e1"),
    "gc-first-e1": ("with checkpointing (gc)", "full-first-e1"),
    "lora-top6-first-e1": ("LoRA on all layers (lora)", "lora-top6-first-e1"),
    "lora-ga-first-e1": ("LoRA with accumulation, 2 x 4", "lora-top6-first-e1"),
    "lora-gc-first-e1": ("LoRA with checkpointing", "lora-top6-first-e1"),
    "all-first-e1": ("LoRA with both (all)", "lora-top6-first-e1"),
}
"""The rows of the table of savings, in words, and the method without the savings."""
HEADER = ("method", "seeds", "accuracy", "AUROC", "MCC", "MCC - {}", "CPU s", "activations")
PLACE = re.compile(r"(<!-- (?P<kind>table|plot): (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


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


def curve_table(runs: list[dict]) -> str:
    """Return the methods by the number of training proteins."""
    rows = []
    for size, same in by_size(runs).items():
        probe = scores(same, best_probe(same))
        columns = [scores(same, method) for method in CURVE]
        gains = [[found[seed] - probe[seed] for seed in found if seed in probe] for found in columns[:2]]
        cells = [show(list(found.values())) for found in (probe, *columns)]
        rows.append([f"{size:,}", *cells, *(show(values, "{:+.3f}") for values in gains)])
    titles = [title for title, _ in CURVE.values()]
    return format_markdown(rows, ("training proteins", "best probe", *titles, *(f"{t} - probe" for t in titles[:2])))


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


def leakage_table(runs: list[dict]) -> str:
    """Return the MCC of methods on the same test proteins, without and with their relatives among the training ones."""
    rows = []
    for size, share, title, pairs in leaks(runs):
        cells = (show(list(column)) for column in zip(*pairs, strict=True))
        gain = show([among - without for without, among in pairs], "{:+.3f}")
        rows.append((f"{size:,}", f"{share:.1%}", title, len(pairs), *cells, gain))
    titles = ("training proteins", "with a relative", "method", "seeds", "MCC without", "MCC with", "difference")
    return format_markdown(rows, titles)


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


def savings_table(runs: list[dict]) -> str:
    """Return what accumulation and checkpointing save and change, over the seeds that all rows have."""
    found = {name: {run["seed"]: run for run in runs if run["method"] == name} for name in SAVINGS}
    seeds = sorted(set.intersection(*map(set, found.values())))
    header = ("method", "seeds", "accuracy", "MCC", "change", "activations", "of base")
    if not seeds:  # a study that is still running
        return format_markdown([], header)
    rows = []
    for name, (title, without) in SAVINGS.items():
        metrics = {key: [found[name][seed]["metrics"][key] for seed in seeds] for key in ("accuracy", "mcc")}
        peaks = [max(found[method][seed]["peak_activation_bytes"] for seed in seeds) for method in (name, FULL)]
        changes = [abs(found[name][seed]["metrics"]["mcc"] - found[without][seed]["metrics"]["mcc"]) for seed in seeds]
        change = "-" if name == without else f"{max(changes):.3f}"
        cells = (f"{statistics.fmean(values):.3f}" for values in metrics.values())
        rows.append((title, len(seeds), *cells, change, format_bytes(peaks[0]), f"{peaks[0] / peaks[1]:.0%}"))
    return format_markdown(rows, header)


def full_table(runs: list[dict]) -> str:
    """Return full fine-tuning with each head and number of epochs, compared with the recipe `base` for one epoch."""
    return methods_table(runs, matching(runs, ["full-*"]), FULL, FULL)


def time_table(runs: list[dict]) -> str:
    """Return each method of three epochs beside each method of one epoch that takes about as long."""
    rows = []
    for three, one in itertools.product(*(matching(runs, [f"lora-top*-first-e{epochs}"]) for epochs in (3, 1))):
        seconds = [mean_cost(runs, name) for name in (three, one)]
        if None in seconds or abs(seconds[0] / seconds[1] - 1) > ALIKE:
            continue
        found = [scores(runs, name) for name in (three, one)]
        differences = [found[0][seed] - found[1][seed] for seed in found[0] if seed in found[1]]
        cells = (show(list(of_one.values())) for of_one in found)
        rows.append((three, one, *(f"{value:.0f}" for value in seconds), *cells, show(differences, "{:+.3f}")))
    header = ("three epochs", "one epoch", "CPU s", "CPU s", "MCC", "MCC", "difference")
    return format_markdown(rows, header)


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
        seconds = mean_cost(runs, name)
        peaks = [run["peak_activation_bytes"] for run in same if "peak_activation_bytes" in run]
        rows.append(
            (
                title,
                len(same),
                f"{mean['accuracy']:.3f}",
                f"{mean['auroc']:.3f}",
                show(list(found.values())),
                show(differences, "{:+.3f}"),
                "-" if seconds is None else f"{seconds:.1f}",
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
    "savings": savings_table,
    "time": time_table,
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
    return same if name in ("curve", "leakage") else [run for run in same if run["split"]["proteins"][0] == PROTEINS]


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
