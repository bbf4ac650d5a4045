"""The results file of a study: JSON lines, one per run, and the table that is made from them."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path

from esm_efficient import format_table
from esm_efficient.reporting.tables import format_bytes
from esm_efficient.training.metrics import confidence_interval


def read_results(file: Path) -> list[dict]:
    """Read the runs of a results file, without a line that is cut off at its end."""
    lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
    runs = []
    for number, line in enumerate(lines, 1):
        try:
            runs.append(json.loads(line))
        except ValueError as error:
            raise SystemExit(f"{file}, line {number} is not JSON: {error}. Remove or repair this line") from error
    return runs


def append_result(file: Path, run: dict) -> None:
    """Append a run; a line that is cut off at the end of the file is removed."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    with file.open("rb+") as out:
        whole = out.read().rpartition(b"\n")
        out.truncate(len(whole[0] + whole[1]))
        out.seek(0, os.SEEK_END)
        out.write(json.dumps(run).encode() + b"\n")
        out.flush()
        os.fsync(out.fileno())


def identity(run: dict) -> str:
    """Return what makes two runs the same run."""
    return json.dumps([run[key] for key in ("method", "settings", "seed", "split", "model")], sort_keys=True)


def cost(run: dict, runs: list[dict]) -> float | None:
    """Return the CPU seconds before and during training; None if no run of the file made the states that it used."""
    prepared = run["prepare_cpu_seconds"]
    if (states := run.get("states")) and not states["made"]:
        same = [r for r in runs if all(r[key] == run[key] for key in ("seed", "split", "model"))]
        made = [r for r in same if r.get("states") == states | {"made": True}]
        if not made:
            return None
        # A head that reads less of the states has cheaper ones, and validation proteins have states too.
        alike = [
            r for r in made if all(r["settings"].get(k) == run["settings"].get(k) for k in ("pooling", "calibrated"))
        ]
        prepared = max(r["prepare_cpu_seconds"] for r in alike or made)
    return prepared + run["train_cpu_seconds"]


def show(values: Sequence[float], pattern: str = "{:.3f}") -> str:
    """Return the mean, and the 95 % interval if there is more than one value."""
    if not values:
        return "-"
    interval = confidence_interval(list(values))
    end = "" if interval is None else f" [{pattern.format(interval[0])}, {pattern.format(interval[1])}]"
    return pattern.format(statistics.fmean(values)) + end


def show_interval(values: list[float], pattern: str) -> str:
    interval = confidence_interval(values)
    return "-" if interval is None else f"[{interval[0]:{pattern}}, {interval[1]:{pattern}}]"


def report(runs: list[dict], against: str) -> str:
    """Return a table for each model and split of a results file."""
    texts = []
    for model, split in dict.fromkeys((run["model"], json.dumps(run["split"])) for run in runs):
        group = [run for run in runs if run["model"] == model and json.dumps(run["split"]) == split]
        methods: dict[str, list[dict]] = {}
        for run in group:
            methods.setdefault(json.dumps([run["method"], run["settings"]], sort_keys=True), []).append(run)
        baseline = {run["seed"]: run for run in group if run["method"] == against}
        rows = [report_row(same, baseline, group) for same in methods.values()]
        parts = json.loads(split)
        trained, tested = (f"partitions {', '.join(map(str, parts[name]))}" for name in ("train", "test"))
        title = (
            f"{model} on {parts['data']}: up to {parts['proteins'][0]:,} training proteins of {trained}, up to "
            f"{parts['proteins'][1]:,} test proteins of {tested}"
        )
        header = ("method", "seeds", "accuracy", "MCC", "95 %", "AUROC", f"MCC - {against}", "95 %", "CPU s", "ratio")
        texts.append(f"{title}\n\n{format_table(rows, (*header, 'activations'))}")
    return "\n\n".join(texts)


def report_row(same: list[dict], baseline: dict[int, dict], group: list[dict]) -> tuple[str, ...]:
    """Return the cells of one method."""
    values = {key: [run["metrics"][key] for run in same] for key in ("accuracy", "mcc", "auroc")}
    means = {key: f"{statistics.fmean(found):.3f}" for key, found in values.items()}
    pairs = [(run, baseline[run["seed"]]) for run in same if run["seed"] in baseline]
    differences = [one["metrics"]["mcc"] - other["metrics"]["mcc"] for one, other in pairs]
    costs = [seconds for run in same if (seconds := cost(run, group)) is not None]
    both = [(cost(one, group), cost(other, group)) for one, other in pairs]
    ratios = [one / other for one, other in both if one is not None and other is not None]
    peaks = [run["peak_activation_bytes"] for run in same if "peak_activation_bytes" in run]
    return (
        same[0]["method"],
        " ".join(str(seed) for seed in sorted(run["seed"] for run in same)),
        means["accuracy"],
        means["mcc"],
        show_interval(values["mcc"], ".3f"),
        means["auroc"],
        f"{statistics.fmean(differences):+.3f}" if differences else "-",
        show_interval(differences, "+.3f"),
        f"{statistics.fmean(costs):.1f}" if costs else "-",
        f"{statistics.fmean(ratios):.2f}" if ratios else "-",
        format_bytes(max(peaks)) if peaks else "-",
    )


def scores(runs: list[dict], method: str) -> dict[int, float]:
    """Return the MCC of a method by seed."""
    return {run["seed"]: run["metrics"]["mcc"] for run in runs if run["method"] == method}


def mean_cost(runs: list[dict], method: str) -> float | None:
    """Return the mean CPU seconds of a method's runs; None if no run has a cost."""
    costs = [seconds for run in runs if run["method"] == method and (seconds := cost(run, runs)) is not None]
    return statistics.fmean(costs) if costs else None


def best_probe(runs: list[dict]) -> str:
    """Return the linear probe with the highest mean MCC."""
    probes = dict.fromkeys(run["method"] for run in runs if run["method"].startswith("probe"))
    return max(probes, key=lambda name: statistics.fmean(scores(runs, name).values()))


def runs_on(split: tuple[list, list], runs: list[dict]) -> list[dict]:
    """Return the runs that were trained and tested on these partitions."""
    return [run for run in runs if (run["split"]["train"], run["split"]["test"]) == split]
