"""examples/location_study.py tests each partition once, goes on after a stop, and shows means over the folds."""

from __future__ import annotations

import json
import os
import shutil
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from copies import Copy
from datasets import ClassLabel, Dataset, DatasetDict
from transformers import TrainerCallback

import esm_efficient
from esm_efficient import demo_model_path

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def location_study(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import location_study

    return location_study


def make_run(method, fold, value):
    names = ("f1_macro", "f1_micro", "jaccard", "subset_accuracy")
    metrics = dict.fromkeys(names, value) | {"mcc_Nucleus": value / 2, "mcc_Golgi apparatus": value / 4}
    return {"method": method, "split": {"test": [fold]}, "metrics": metrics}


def cells(table):
    return [[cell.strip().replace("\\", "") for cell in row.strip("|").split("|")] for row in table.splitlines()]


def test_the_tables_show_means_over_the_folds_beside_the_published_figures(location_study):
    runs = [make_run("probe", fold, value) for fold, value in ((0, 0.4), (1, 0.6))]
    runs[0]["relatives"], runs[1]["relatives"] = 0.1, 0.3
    runs.append(make_run("residue composition", 0, 0.2))
    header, _, composition, probe, published = cells(location_study.location_table(runs))
    assert header[2] == "F1 macro"
    assert composition[1:3] == ["1", "0.200"]
    # Student's t with one degree of freedom: 12.706 times the standard error of 0.4 and 0.6, which is 0.1.
    assert (probe[1], probe[2], probe[-1]) == ("2", "0.500 [-0.771, 1.771]", "20 %")
    assert (header[-2], composition[-2]) == ("F1 macro - the probe", "-0.200")  # in the fold that both have
    assert published[1:] == ["5", "0.66", "0.73", "0.69", "0.55", "-", "-"]
    header, _, nucleus, golgi = cells(location_study.locations_table(runs))
    assert header == ["location", "amino-acid shares, partition 0 alone (minus the probe there)", "probe"]
    assert nucleus == ["Nucleus", "0.100 (-0.100)", "0.250"]  # the probe has 0.200 in partition 0
    assert golgi == ["Golgi apparatus", "0.050 (-0.050)", "0.125"]


def test_random_folds_have_the_same_proteins_each_in_the_test_set_once(location_study):
    rows = [(f"P{number:02}", part) for number, part in enumerate(np.arange(50) % 5)]
    tested, orders = [], set()
    for fold in range(5):
        split = {"train": [(fold + k) % 5 for k in (1, 2, 3)], "validation": [(fold + 4) % 5], "test": [fold]}
        data = DatasetDict(
            {
                name: Dataset.from_dict({"accession": [name_ for name_, part in rows if part in parts]})
                for name, parts in split.items()
            }
        )
        mixed = location_study.in_random_folds(data, split)
        assert {name: len(part) for name, part in mixed.items()} == {"train": 30, "validation": 10, "test": 10}
        assert sorted(name for part in mixed.values() for name in part["accession"][:]) == [name for name, _ in rows]
        tested += mixed["test"]["accession"][:]
        orders.add(len({int(name[1:]) % 5 for name in mixed["test"]["accession"][:]}))
    assert sorted(tested) == [name for name, _ in rows]
    assert max(orders) > 1  # a fold is not a partition


def test_the_share_of_relatives_is_that_of_the_test_proteins(location_study):
    train = ["MKTAYIAKQRQISFVKSHFSRQ", "GGGGSGGGGSGGGGSGGGGS"]
    test = ["MKTAYIAKQRQISFVKSHFSRL", "WWWWPWWWWPWWWWPWWWWPWW"]
    rows = {"train": train, "test": test}
    label = ClassLabel(names=["a", "b"])
    data = DatasetDict(
        {
            name: Dataset.from_dict({"sequence": found, "label": [0, 1]}).cast_column("label", label)
            for name, found in rows.items()
        }
    )
    assert location_study.share_of_relatives(data) == 0.5


@pytest.mark.slow
def test_each_partition_is_tested_once_and_finished_folds_and_states_are_kept(tmp_path, demo_table):
    def run(*rows):
        options = ["--data", demo_table, "--rows", *rows]
        done = Copy(EXAMPLES / "location_study.py", *options, folder=tmp_path).wait()
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    run("residue composition", "probe", "probe, random folds")
    file = tmp_path / "output" / "location.jsonl"
    lines = file.read_text().splitlines()
    runs = [json.loads(line) for line in lines]
    assert [(run["method"], *run["split"]["test"]) for run in runs] == [
        (method, fold) for method in ("residue composition", "probe", "probe, random folds") for fold in range(5)
    ]
    total = sum(run["proteins"]["test"] for run in runs[:5])
    for run_ in runs:
        parts = [*run_["split"]["train"], *run_["split"]["validation"], *run_["split"]["test"]]
        assert sorted(parts) == list(range(5))
        assert sum(run_["proteins"].values()) == total
    for run_ in runs[5:]:
        by_layer = run_["validation_auroc_by_layer"]
        assert run_["layer"] == int(np.argmax(by_layer))
        assert len(by_layer) == 5
        assert 0 <= run_["relatives"] <= 1
    assert [run_["split"].get("folds") for run_ in runs] == [None] * 10 + ["random"] * 5

    states = {file: file.stat().st_mtime_ns for file in (tmp_path / "output").glob("states-*.npz")}
    assert len(states) == 5
    file.write_text("\n".join(lines[:-1]) + "\n")
    output = run("probe, random folds")
    assert "probe, random folds, partition 4" in output
    assert "probe, random folds, partition 3" not in output
    again = json.loads(file.read_text().splitlines()[-1])
    assert again["metrics"] == runs[-1]["metrics"]
    assert {file: file.stat().st_mtime_ns for file in states} == states


class Stopped(Exception):
    """A run was stopped."""


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.step:
            raise Stopped


@pytest.mark.slow
def test_a_fine_tuning_that_was_stopped_goes_on_and_gives_the_same_figures(
    location_study, tmp_path, demo_table, monkeypatch
):
    def study(name, *callbacks):
        finetune = partial(esm_efficient.finetune, callbacks=callbacks)
        monkeypatch.setattr(location_study, "finetune", finetune)
        options = Namespace(model=None, data=str(demo_table), work=tmp_path / name)
        return location_study.LocationStudy(options).run("top", 1)

    monkeypatch.setattr(location_study, "SAVE_STEPS", 5)
    whole = study("whole")
    assert whole["steps"] > 8
    with pytest.raises(Stopped):
        study("stopped", StopAt(8))
    states = {file: file.stat().st_mtime_ns for file in (tmp_path / "stopped" / "states").rglob("*.arrow")}
    again = study("stopped", StopAt(4))  # where a run that begins anew would stop
    assert (again["metrics"], again["steps"]) == (whole["metrics"], whole["steps"])
    assert (again["was_stopped"], whole["was_stopped"]) == (True, False)
    assert states
    assert {file: file.stat().st_mtime_ns for file in states} == states


@pytest.mark.slow
def test_states_are_those_of_one_model_and_one_table(location_study, tmp_path, demo_table):
    shutil.copytree(demo_model_path(), tmp_path / "model")
    other = tmp_path / "other.csv"
    other.write_bytes(demo_table.read_bytes() + b"\n")

    def fingerprint(model, data):
        return location_study.LocationStudy(Namespace(model=model, data=data, work=tmp_path)).fingerprint()

    found = [
        fingerprint(*pair) for pair in ((None, None), ("8M", None), (None, str(other)), (tmp_path / "model", None))
    ]
    assert len(set(found)) == 4
    assert fingerprint(None, None) == found[0]
    weights = tmp_path / "model" / "model.safetensors"
    os.utime(weights, (0, 0))
    assert fingerprint(tmp_path / "model", None) != found[3]


def test_a_report_without_runs_is_one_line(location_study, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["location_study.py", "--report", "--results", str(tmp_path / "none.jsonl")])
    with pytest.raises(SystemExit, match="has no runs: run the study without --report first"):
        location_study.main()
