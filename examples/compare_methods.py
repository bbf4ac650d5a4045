"""Compare methods on one task, from the majority class to full fine-tuning, in a study that survives a stop.

    python examples/compare_methods.py --quick
    python examples/compare_methods.py --model FOLDER --data TABLE.csv --results results.jsonl --seeds 0 1 2
    python examples/compare_methods.py --results results.jsonl --report

The task is to tell membrane proteins from soluble ones in DeepLoc-2.0's table. Each run appends one line of JSON to the
results file. A finished run is never repeated, and a line that was cut off by a stop is dropped; so the same command
again goes on where it stopped. ``--report`` reads the results file alone. ``--list`` prints the methods, and ``--rows``
chooses some by shell patterns. Give each model and each table a results file of its own: a line has their names without
the folders.

A seed draws the sample of proteins, the head, the adapters and the order of the batches. Methods with the same seed
have the same sample, so their differences are paired by seed. A partition that is both for training and for testing
gives the training proteins what the test sample leaves: the test proteins stay the same, and have relatives in
training.

CPU seconds are those of this process, before and during training. They leave out waiting, but a process beside it that
uses the same caches or the same memory makes them longer.
Those of a run on cached states include making the states, also if an earlier run made them. Those of a linear probe are
of the whole sweep: one pass that gives the states of all layers, and the probes on all of them.
"""

from __future__ import annotations

import argparse
import functools
import logging
import platform
import shutil
import subprocess
import time
import warnings
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import accelerate
import datasets
import numpy as np
import peft
import sklearn
import torch
import transformers
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from study_methods import GroupRates, Method, list_methods, quick_rows
from study_results import append_result, identity, read_results, report
from transformers import AutoConfig, TrainerCallback
from transformers.utils import logging as transformers_logging
from tutorial_methods import train_as_the_tutorial

import esm_efficient
from esm_efficient import (
    EsmEfficientError,
    FinetuneResult,
    classification_metrics,
    demo_model_path,
    finetune,
    load_deeploc,
    stratified_sample,
    sweep_layers,
    write_demo_table,
)
from esm_efficient.data.relatives import close_relatives
from esm_efficient.reporting.score_plots import reliability
from esm_efficient.trunk.layer_states import Reading

QUICK = {"seeds": [0, 1], "train_size": 400, "test_size": 134}
"""Options of ``--quick``: a sixth of the sample. Its figures are not those of the whole study."""
LETTERS = "ACDEFGHIKLMNPQRSTVWY"
PARTITIONS = range(5)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub name of an ESM-2 model (default: the demo model)")
    parser.add_argument("--data", help='a table in the DeepLoc-2.0 format, or "deeploc" (default: the demo table)')
    parser.add_argument("--results", type=Path, default=Path("output/results.jsonl"), help="file to append runs to")
    parser.add_argument("--report", action="store_true", help="print the table of the results file, and run nothing")
    parser.add_argument("--against", default="full-first-e1", help="the method that --report compares with")
    parser.add_argument("--list", action="store_true", help="print the names of the methods, and run nothing")
    parser.add_argument("--rows", nargs="+", metavar="PATTERN", help="methods, in the order to run them (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--train-partitions", type=int, nargs="+", default=[0, 1, 2, 3], choices=PARTITIONS)
    parser.add_argument("--test-partitions", type=int, nargs="+", default=[4], choices=PARTITIONS)
    parser.add_argument("--train-size", type=int, default=2400, help="training proteins")
    parser.add_argument("--test-size", type=int, default=800, help="test proteins")
    parser.add_argument(
        "--quick", action="store_true", help="a few methods on 400 proteins with two seeds, in about ten minutes"
    )
    parser.add_argument(
        "--work", type=Path, default=Path("output"), help="folder for cached states and temporary files"
    )
    options = parser.parse_args()
    if options.quick:
        parser.set_defaults(**QUICK)
        options = parser.parse_args()
    return options


class Study:
    """The runs of one results file on one model and one way to split the data."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.model = options.model or demo_model_path()
        self.layers = AutoConfig.from_pretrained(self.model).num_hidden_layers
        self.states = options.work / "states"
        self.loaded: tuple[int | None, Any] = (None, None)
        self.swept: tuple[int | None, Any] = (None, None)
        self.shares: dict[int, float] = {}
        self.split = {
            "train": sorted(options.train_partitions),
            "test": sorted(options.test_partitions),
            "proteins": [options.train_size, options.test_size],
            "data": Path(options.data).name if options.data else "demo",
        }

    def chosen(self) -> Iterator[tuple[Method, int]]:
        """Yield methods and seeds, pattern by pattern, and in each seed by seed."""
        for pattern in self.options.rows or (quick_rows(self.layers) if self.options.quick else ["*"]):
            methods = [method for method in list_methods(self.layers) if fnmatch(method.name, pattern)]
            if not methods:
                raise SystemExit(f"no method is named like {pattern!r}: --list prints the names")
            yield from ((method, seed) for seed in self.options.seeds for method in methods)

    def data(self, seed: int) -> datasets.DatasetDict:
        """Return the sample of a seed; training and test proteins are those of `finetune_membrane.py`."""
        if seed != self.loaded[0]:
            self.loaded = seed, self.load(seed)
        return self.loaded[1]

    def load(self, seed: int) -> datasets.DatasetDict:
        """Load the table and draw the sample of a seed."""
        source = self.options.data
        if source is None:
            self.options.work.mkdir(parents=True, exist_ok=True)
            source = write_demo_table(self.options.work / "demo_table.csv")
        unused = {*PARTITIONS} - {*self.split["train"], *self.split["test"]}
        how: dict[str, Any] = {"test_partitions": self.split["test"], "validation_partitions": sorted(unused)}
        data = load_deeploc(None if source == "deeploc" else source, seed=seed, **how)
        train, test = self.split["proteins"]
        sizes = {"train": train, "test": test} | ({"validation": test} if "validation" in data else {})
        drawn = {"test": stratified_sample(data["test"], test, seed=seed)}
        if shared := {*self.split["train"]} & {*self.split["test"]}:
            tested = set(drawn["test"]["sequence"])
            left = data["test"].filter(lambda row: row["partition"] in shared and row["sequence"] not in tested)
            data["train"] = datasets.concatenate_datasets([data["train"], left])
        drawn |= {k: stratified_sample(data[k], n, seed=seed) for k, n in sizes.items() if k != "test"}
        return datasets.DatasetDict(drawn)

    def relatives(self, seed: int) -> float:
        """Return the share of a seed's test proteins that have a close relative among its training proteins."""
        if seed not in self.shares:
            data = self.data(seed)
            self.shares[seed] = close_relatives(data["test"]["sequence"], data["train"]["sequence"])
        return self.shares[seed]

    def run(self, method: Method, seed: int) -> dict:
        """Run a method and return its line of the results file."""
        data = self.data(seed)
        if method.calibrated and "validation" not in data:
            raise SystemExit(f"{method.name} needs validation proteins: leave a partition neither to train nor to test")
        if not method.calibrated:
            data = datasets.DatasetDict({name: data[name] for name in ("train", "test")})
        relatives = self.relatives(seed)
        wall, cpu = time.perf_counter(), time.process_time()
        if method.recipe:
            figures = self.fine_tune(method, seed, data)
        elif method.probed:
            figures = self.probe(*method.probed, seed, data)
        elif method.name.startswith("tutorial-"):
            figures = self.tutorial(method.name.removeprefix("tutorial-"), seed, data)
        else:
            figures = fit_baseline(method.name, data)
        return {
            **self.key(method, seed),
            **figures,
            "relatives": relatives,
            "wall_seconds": time.perf_counter() - wall,
            "cpu_seconds": time.process_time() - cpu,
            "versions": versions(),
            "commit": commit(),
            "machine": machine(),
        }

    def key(self, method: Method, seed: int) -> dict:
        """Return what identifies a run."""
        name = Path(self.options.model).name if self.options.model else "demo"
        return {"method": method.name, "settings": method.settings, "seed": seed, "split": self.split, "model": name}

    def fine_tune(self, method: Method, seed: int, data: datasets.DatasetDict) -> dict:
        """Train a method's recipe and return its figures."""
        work, clock, before = self.options.work / "run", CpuClock(), state_folders(self.states)
        shutil.rmtree(work, ignore_errors=True)
        result = finetune(
            self.model,
            data,
            recipe=method.recipe,
            output_dir=work,
            states_dir=self.states,
            seed=seed,
            num_train_epochs=method.epochs,
            early_stopping=None,
            probe=False,
            profile=True,
            keep_layers=method.truncated or None,
            callbacks=[clock, *([GroupRates(method.rates)] if method.rates else [])],
            **method.options,
        )
        assert method.recipe is not None
        assert result.profile is not None
        states = None
        if method.recipe.cache:
            below = self.layers - len(method.recipe.trained_layers(self.layers))
            states = {"layers_below": below, "made": state_folders(self.states) > before}
        peaks = [phase.peak.activations for phase in result.profile.phases.values()]
        shutil.rmtree(work)
        return {
            "metrics": result.to_dict()["metrics"],
            **(calibration(result) if method.calibrated else {}),
            "steps": result.steps,
            "train_seconds": result.seconds,
            "states_seconds": result.states_seconds,
            "prepare_cpu_seconds": clock.prepared,
            "train_cpu_seconds": clock.trained,
            "states": states,
            "peak_activation_bytes": max(peaks),
            "trainable_parameters": result.trainable_parameters,
            "residues_per_second": result.residues_per_second,
        }

    def probe(self, layer: int, reading: Reading, seed: int, data: datasets.DatasetDict) -> dict:
        """Return the figures of a linear probe, from a sweep of all layers that is made once per seed."""
        if seed != self.swept[0]:
            started = time.process_time()
            sweep = sweep_layers(self.model, data, seed=seed)
            self.swept = seed, (sweep, time.process_time() - started)
        sweep, seconds = self.swept[1]
        metrics = next(score.metrics for score in sweep.scores if (score.layer, score.reading) == (layer, reading))
        return {"metrics": metrics, "prepare_cpu_seconds": seconds, "train_cpu_seconds": 0.0}

    def tutorial(self, kind: str, seed: int, data: datasets.DatasetDict) -> dict:
        """Return the figures of a method of the tutorial."""
        folder, clock = self.options.work / "run", CpuClock()
        figures = train_as_the_tutorial(kind, self.model, data, seed=seed, folder=folder, callbacks=[clock])
        return {**figures, "prepare_cpu_seconds": clock.prepared, "train_cpu_seconds": clock.trained}


class CpuClock(TrainerCallback):
    """Measure the CPU seconds of this process before and during training."""

    def __init__(self) -> None:
        self.started = time.process_time()
        self.prepared = self.trained = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self.prepared = time.process_time() - self.started

    def on_train_end(self, args, state, control, **kwargs):
        self.trained = time.process_time() - self.started - self.prepared


def state_folders(folder: Path) -> set[Path]:
    """Return the folders with states; one that a stopped run left half full is there too, so its cost is unknown."""
    return {file.parent for file in folder.glob("*/*.arrow")}


def fit_baseline(name: str, data: datasets.DatasetDict) -> dict:
    """Fit a method without a network: the majority class, or the composition of the sequence."""
    cpu = time.process_time()
    labels = {split: np.asarray(data[split]["label"]) for split in data}
    names = data["train"].features["label"].names
    if name == "majority":
        shares = np.bincount(labels["train"], minlength=len(names)) / len(labels["train"])
        logits = np.tile(np.log(shares), (len(labels["test"]), 1))
    else:
        counts = {s: np.array([[q.count(c) / len(q) for c in LETTERS] for q in data[s]["sequence"]]) for s in data}
        model = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=1000))
        logits = model.fit(counts["train"], labels["train"]).predict_log_proba(counts["test"])
    metrics = classification_metrics(labels["test"], logits, names)
    return {"metrics": metrics, "prepare_cpu_seconds": 0.0, "train_cpu_seconds": time.process_time() - cpu}


def calibration(result: FinetuneResult) -> dict:
    """Return the temperature of a run, and how far its probabilities are from what comes true, before and after it."""
    if result.evaluation is None or result.temperature is None:
        raise SystemExit("no temperature was fitted: it needs 100 validation proteins (--test-size 100 or more)")
    found = {}
    for name, factor in (("before", result.temperature), ("after", 1.0)):  # the saved model has the temperature in it
        chances = softmax(result.evaluation.scores * factor, axis=1)
        bins, error = reliability(chances.max(1), chances.argmax(1) == result.evaluation.labels)
        found[name] = {"error": error, "bins": bins}
    return {"temperature": result.temperature, "calibration": found}


def versions() -> dict[str, str]:
    libraries = (accelerate, datasets, esm_efficient, peft, sklearn, torch, transformers)
    return {"python": platform.python_version()} | {library.__name__: library.__version__ for library in libraries}


@functools.lru_cache
def commit() -> str | None:
    """Return the commit of this file's repository, or None outside one; it is asked once, when the first run ends."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=40"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    return done.stdout.strip() or None


def machine() -> str:
    """Return what a time depends on."""
    capability = torch.backends.cpu.get_cpu_capability()  # such as AVX512
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU with {capability}"
    return f"{platform.machine()}, {torch.get_num_threads()} thread(s), {device}"


def main() -> None:
    options = parse_arguments()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    transformers_logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    if options.report:
        print(report(read_results(options.results), options.against))
        return
    study = Study(options)
    if options.list:
        print("\n".join(method.name for method in list_methods(study.layers)))
        return
    for method, seed in study.chosen():
        finished = {identity(run) for run in read_results(options.results)}
        if identity(study.key(method, seed)) in finished:
            continue
        run = study.run(method, seed)
        append_result(options.results, run)
        print(f"{method.name}, seed {seed}: MCC {run['metrics']['mcc']:.3f}, {run['wall_seconds']:.0f} s", flush=True)
    print(report(read_results(options.results), options.against))


if __name__ == "__main__":
    try:
        main()
    except EsmEfficientError as error:
        raise SystemExit(f"error: {error}") from error
