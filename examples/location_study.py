"""Predict where in the cell a protein is, in a cross-validation over the five homology partitions of DeepLoc-2.0.

    python examples/location_study.py
    python examples/location_study.py --model FOLDER --data TABLE.csv --results location.jsonl
    python examples/location_study.py --results location.jsonl --report

Each partition is tested once. The one before it chooses the layer of the probe and the thresholds of the labels, and
the other three train. With random folds in place of the partitions, each protein is tested once too, but may have
relatives among the training proteins: the difference is the price of leakage.

A protein has one or more of ten locations, and proteins of all lengths are used; of one with more than 1,022 residues
the two ends are read, where most sorting signals are.

Each fold of each method appends one line of JSON to the results file, and a finished one is never repeated. The states
of all layers are read once per partition and kept in ``--work``, and so are those that training reads, once per fold;
so the same command again goes on where it stopped. The CPU seconds of a run that was stopped are those after the stop.
Give each model and each table a results file of its own: a line has their names without the folders.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import shutil
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from compare_methods import PARTITIONS, commit, machine, versions
from datasets import DatasetDict, concatenate_datasets
from finetune_location import baselines, label_table
from study_results import append_result, identity, read_results, show
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging as transformers_logging

from esm_efficient import (
    EsmEfficientError,
    demo_model_path,
    finetune,
    format_table,
    load_deeploc,
    multi_label_metrics,
    stratified_sample,
    task_of,
    tokenize_dataset,
    tune_thresholds,
    write_demo_table,
)
from esm_efficient.data.relatives import close_relatives
from esm_efficient.reporting.tables import format_markdown
from esm_efficient.training.probes import fit_probe
from esm_efficient.trunk.layer_states import LayerReader

METHODS = ("commonest label", "residue composition", "probe", "top", "probe, random folds")
SHOWN = {"f1_macro": "F1 macro", "f1_micro": "F1 micro", "jaccard": "Jaccard", "subset_accuracy": "all labels right"}
PUBLISHED = {"f1_macro": 0.66, "f1_micro": 0.73, "jaccard": 0.69, "subset_accuracy": 0.55}
"""DeepLoc 2.0 on ProtT5, in the same cross-validation (Thumuluri et al. 2022, doi:10.1093/nar/gkac278)."""
SAVE_STEPS = 200
"""Optimizer steps between two checkpoints."""
SHORT = {"residue composition": "amino-acid shares"}
TITLES = {
    "commonest label": "the most common location for every protein",
    "residue composition": "logistic regression on amino-acid shares",
    "probe": "linear probe on one layer, mean over residues",
    "top": "top: LoRA on the top third, one epoch",
    "probe, random folds": "the same probe, but proteins in random folds",
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub name of an ESM-2 model (default: the demo model)")
    parser.add_argument("--data", help='a table in the DeepLoc-2.0 format, or "deeploc" (default: the demo table)')
    parser.add_argument("--results", type=Path, default=Path("output/location.jsonl"), help="file to append runs to")
    parser.add_argument("--report", action="store_true", help="print the tables of the results file, and run nothing")
    parser.add_argument("--rows", nargs="+", choices=METHODS, default=METHODS[:3], help="default: all without training")
    parser.add_argument("--folds", type=int, nargs="+", default=list(PARTITIONS), choices=PARTITIONS)
    parser.add_argument("--work", type=Path, default=Path("output"), help="folder for states and temporary files")
    return parser.parse_args()


class LocationStudy:
    """The runs of one results file on one model."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.model = options.model or demo_model_path()
        self.source = None if options.data == "deeploc" else options.data
        if options.data is None:
            options.work.mkdir(parents=True, exist_ok=True)
            self.source = write_demo_table(options.work / "demo_table.csv")

    def key(self, method: str, fold: int) -> dict[str, Any]:
        """Return what identifies a run; `fold` is the partition that is tested."""
        validation = (fold - 1) % len(PARTITIONS)
        split = {
            "train": [number for number in PARTITIONS if number not in (fold, validation)],
            "validation": [validation],
            "test": [fold],
            "data": Path(self.options.data).name if self.options.data else "demo",
        }
        if method.endswith("random folds"):
            split["folds"] = "random"
        name = Path(self.options.model).name if self.options.model else "demo"
        return {"method": method, "settings": {}, "seed": 0, "split": split, "model": name}

    def run(self, method: str, fold: int) -> dict[str, Any]:
        """Run a method on a fold and return its line of the results file."""
        key = self.key(method, fold)
        data = self.load(fold, key["split"]["validation"])
        if method.endswith("random folds"):
            data = in_random_folds(data, key["split"])
        reading = self.read_states() if method.startswith("probe") else None
        started = time.process_time()
        if reading is not None:
            figures = self.probe(data, *reading)
        elif method == "top":
            figures = self.fine_tune(data, fold)
        else:
            figures = {"metrics": baselines(data)[method]}
        seconds = {"cpu_seconds": time.process_time() - started}
        sizes: dict[str, Any] = {"proteins": {name: len(part) for name, part in data.items()}}
        if method.startswith("probe"):
            sizes["relatives"] = share_of_relatives(data)
        return {**key, **figures, **seconds, **sizes, "versions": versions(), "commit": commit(), "machine": machine()}

    def load(self, fold: int, validation: list[int]) -> DatasetDict:
        """Return the proteins of a fold, in an order that the fold does not change within a partition."""
        return load_deeploc(
            self.source,
            task="location",
            min_residues=None,
            max_residues=None,
            test_partitions=[fold],
            validation_partitions=validation,
        )

    def probe(self, data: DatasetDict, states: Mapping[str, np.ndarray], reading_seconds: float) -> dict[str, Any]:
        """Return the figures of the layer whose probe has the best mean AUROC on the validation proteins.

        Args:
            data: the splits of a fold.
            states: float32 of shape (layers + 1, width) by accession, from `read_states`.
            reading_seconds: CPU seconds that reading all states took.
        """
        task = task_of(data["train"].features)
        x = {name: np.stack([states[accession] for accession in part["accession"]], 1) for name, part in data.items()}
        y = {name: label_table(part) for name, part in data.items()}
        by_layer: list[float] = []
        best: tuple[float, int, Any] = (-np.inf, 0, None)
        for layer in range(len(x["train"])):
            predict = fit_probe(task, x["train"][layer], y["train"])
            metrics = multi_label_metrics(y["validation"], predict(x["validation"][layer]), task.names)
            by_layer.append(metrics["auroc"])
            best = max(best, (metrics["auroc"], layer, predict), key=lambda found: found[0])
        _, layer, predict = best
        logits = {name: predict(x[name][layer]) for name in ("validation", "test")}
        thresholds = tune_thresholds(y["validation"], logits["validation"], task.names)
        return {
            "metrics": multi_label_metrics(y["test"], logits["test"], task.names, thresholds=thresholds),
            "layer": layer,
            "validation_auroc_by_layer": by_layer,
            "states_cpu_seconds": reading_seconds,
        }

    def read_states(self) -> tuple[dict[str, np.ndarray], float]:
        """Return the mean over residues of the states of each layer by accession, and the CPU seconds of reading all.

        The states of a partition are read once and kept, of shape (layers + 1, proteins, width).
        """
        found: dict[str, np.ndarray] = {}
        seconds = 0.0
        reader = None
        for number in PARTITIONS:
            file = self.options.work / f"states-{self.fingerprint()}-{number}.npz"
            if not file.exists():
                part = self.load(number, [(number - 1) % len(PARTITIONS)])["test"]
                started = time.process_time()
                tokens, _ = tokenize_dataset(
                    DatasetDict(test=part), AutoTokenizer.from_pretrained(self.model), keep="both"
                )
                reader = reader or LayerReader(AutoModel.from_pretrained(self.model, add_pooling_layer=False))
                states = reader.pool(tokens["test"], ["mean"], token_budget=8192, name=f"partition {number}")[:, 0]
                spent = time.process_time() - started
                half = file.with_suffix(".half.npz")
                np.savez(half, accession=np.array(part["accession"]), states=states, seconds=spent)
                half.rename(file)
            with np.load(file) as kept:
                found |= dict(zip(kept["accession"].tolist(), np.moveaxis(kept["states"], 1, 0), strict=True))
                seconds += float(kept["seconds"])
        return found, seconds

    def fingerprint(self) -> str:
        """Return a short hash of the model and the table, by which kept states are told apart."""
        table = Path(self.source or "deeploc")
        weights = [(file.resolve(), file.stat()) for file in sorted(Path(self.model).glob("*.safetensors"))]
        facts = [str(self.model), *((str(file), stat.st_size, stat.st_mtime_ns) for file, stat in weights)]
        content = table.read_bytes() if table.is_file() else str(table).encode()
        return hashlib.sha256(repr(facts).encode() + content).hexdigest()[:12]

    def fine_tune(self, data: DatasetDict, fold: int) -> dict[str, Any]:
        """Return the figures of the recipe `top`; a run that was stopped goes on from its last checkpoint."""
        tokens, _ = tokenize_dataset(data, AutoTokenizer.from_pretrained(self.model), keep="both")
        folder = self.options.work / f"top-{self.fingerprint()}-{fold}"
        if (folder / "result.json").is_file():  # it ended, and was stopped before its line was written
            shutil.rmtree(folder)
        goes_on = any(folder.glob("checkpoint-*"))
        result = finetune(
            self.model,
            tokens,
            task=task_of(data["train"].features),
            recipe="top",
            output_dir=folder,
            states_dir=self.options.work / "states",
            save_strategy="steps",
            save_steps=SAVE_STEPS,
            save_total_limit=1,
            resume_from_checkpoint=goes_on or None,
            class_weights=None,
            token_budget=4096,
            num_train_epochs=1,
            early_stopping=None,
            probe=False,
        )
        shutil.rmtree(folder)
        return {"metrics": result.to_dict()["metrics"], "steps": result.steps, "was_stopped": goes_on}


def share_of_relatives(data: DatasetDict) -> float:
    """Return the share of test proteins with a close relative among the training proteins, of 1,500 drawn at random."""
    drawn = stratified_sample(data["test"], min(1500, len(data["test"])))
    return close_relatives(list(drawn["sequence"]), list(data["train"]["sequence"]))


def in_random_folds(data: DatasetDict, split: Mapping[str, Any]) -> DatasetDict:
    """Return the same proteins in five random folds, which are the same for each way to use them."""
    whole = concatenate_datasets(list(data.values())).sort("accession")
    folds = np.random.default_rng(0).permutation(len(whole)) % len(PARTITIONS)
    return DatasetDict({name: whole.select(np.flatnonzero(np.isin(folds, split[name]))) for name in data})


def location_table(runs: list[dict], form: Callable = format_markdown) -> str:
    """Return the metrics over all labels: the mean over the folds and its 95 % interval, beside the published ones.

    A column compares the macro-F1 with that of the probe, fold by fold.
    """
    rows = []
    probed = by_fold([run for run in runs if run["method"] == "probe"], "f1_macro")
    for method in METHODS:
        same = [run for run in runs if run["method"] == method]
        if same:
            cells = [show([run["metrics"][key] for run in same]) for key in SHOWN]
            found = {} if method.endswith("random folds") else by_fold(same, "f1_macro")
            cells.append(show([found[fold][0] - probed[fold][0] for fold in found if fold in probed], "{:+.3f}"))
            related = [100 * run["relatives"] for run in same if "relatives" in run]
            cells.append(f"{statistics.fmean(related):.0f} %" if related else "-")
            rows.append((TITLES[method], str(len(same)), *cells))
    rows.append(
        ("DeepLoc 2.0 on ProtT5, as published", "5", *(f"{value:.2f}" for value in PUBLISHED.values()), "-", "-")
    )
    return form(rows, ("method", "folds", *SHOWN.values(), "F1 macro - the probe", "with relatives"))


def by_fold(runs: list[dict], *metrics: str) -> dict[int, list[float]]:
    """Return the values of some metrics by the partition that is tested."""
    return {run["split"]["test"][0]: [run["metrics"][name] for name in metrics] for run in runs}


def locations_table(runs: list[dict], form: Callable = format_markdown) -> str:
    """Return the MCC of each location, the mean over the folds.

    A method that tested fewer folds says which, with the difference to the probe in the same folds in brackets.
    """
    names = [key for key in runs[0]["metrics"] if key.startswith("mcc_")]
    found = {method: by_fold([run for run in runs if run["method"] == method], *names) for method in METHODS[1:4]}
    methods = [method for method, folds in found.items() if folds]
    most = max(map(len, found.values()))
    columns = [[name.removeprefix("mcc_") for name in names]]
    titles = ["location"]
    for method in methods:
        folds, title = found[method], SHORT.get(method, method)
        cells = [f"{value:.3f}" for value in np.mean([*folds.values()], axis=0)]
        if len(folds) < most:
            title += f", partition{'s' * (len(folds) > 1)} {', '.join(map(str, sorted(folds)))} alone"
        if len(folds) < most and folds.keys() <= found["probe"].keys():
            title += " (minus the probe there)"
            gains = np.mean([np.subtract(folds[fold], found["probe"][fold]) for fold in folds], axis=0)
            cells = [f"{cell} ({gain:+.3f})" for cell, gain in zip(cells, gains, strict=True)]
        columns.append(cells)
        titles.append(title)
    return form([*zip(*columns, strict=True)], titles)


def main() -> None:
    options = parse_arguments()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    transformers_logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    if not options.report:
        study = LocationStudy(options)
        for method in options.rows:
            for fold in options.folds:
                if identity(study.key(method, fold)) in {identity(run) for run in read_results(options.results)}:
                    continue
                run = study.run(method, fold)
                append_result(options.results, run)
                print(f"{method}, partition {fold}: F1 macro {run['metrics']['f1_macro']:.3f}", flush=True)
    runs = read_results(options.results)
    if not runs:
        raise SystemExit(f"{options.results} has no runs: run the study without --report first")
    print(f"\n{location_table(runs, format_table)}\n\nMCC by location\n{locations_table(runs, format_table)}")


if __name__ == "__main__":
    try:
        main()
    except EsmEfficientError as error:
        raise SystemExit(f"error: {error}") from error
