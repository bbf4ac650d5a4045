"""examples/compare_methods.py survives a stop, and its report is made from the results file alone."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from copies import Copy

from esm_efficient import write_demo_table
from esm_efficient.data.relatives import close_relatives

EXAMPLES = Path(__file__).parents[2] / "examples"
SPLIT = {"train": [0, 1], "test": [4], "proteins": [20, 10], "data": "table.csv"}


@pytest.fixture
def study_results(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import study_results

    return study_results


def make_run(method, seed, mcc, *, prepared=1.0, trained=2.0, states=None, **changes):
    return {
        "method": method,
        "settings": {},
        "seed": seed,
        "split": SPLIT,
        "model": "tiny",
        "metrics": {"accuracy": 0.8, "mcc": mcc, "auroc": 0.9},
        "prepare_cpu_seconds": prepared,
        "train_cpu_seconds": trained,
        "states": states,
        **changes,
    }


def cells_of(report, method):
    [line] = [line for line in report.splitlines() if line.startswith(f"{method} ")]
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


@pytest.mark.slow
def test_a_killed_study_goes_on_and_repeats_no_finished_run(tmp_path, demo_table):
    file = tmp_path / "output" / "results.jsonl"
    rows = ["majority", "composition", "probe2-mean", "lora-top1-first-e1", "truncated1-lora-first-e1"]
    sizes = ["--seeds", 0, 1, "--train-size", 64, "--test-size", 16]
    study = [EXAMPLES / "compare_methods.py", "--data", demo_table, "--rows", *rows, *sizes]
    killed = Copy(*study, folder=tmp_path)
    deadline = time.monotonic() + 240
    while not (file.exists() and file.read_bytes().count(b"\n") >= 5):
        assert killed.is_running, (tmp_path / "stderr").read_text()[-2000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    killed.kill()
    finished = file.read_bytes()
    file.write_bytes(finished + b'{"method": "lora-to')

    resumed = Copy(*study, folder=tmp_path).wait()
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    assert file.read_bytes().startswith(finished)
    runs = [json.loads(line) for line in file.read_text().splitlines()]
    assert sorted((run["method"], run["seed"]) for run in runs) == sorted(
        (row, seed) for row in rows for seed in (0, 1)
    )
    for run in runs:
        assert run["split"] == {**SPLIT, "train": [0, 1, 2, 3], "proteins": [64, 16]}
        assert run["versions"].keys() >= {"torch", "transformers", "peft"}
        if "lora" in run["method"]:
            assert run["steps"] == 8
            assert run["peak_activation_bytes"] > 0
            assert 0 < run["train_cpu_seconds"] < run["cpu_seconds"]
        assert f"\n{run['method']} " in resumed.stdout
    assert all(run["states"]["layers_below"] == 3 for run in runs if run["method"].startswith("lora-top1"))

    again = Copy(*study, folder=tmp_path).wait()
    assert again.returncode == 0
    assert "seed 0" not in again.stdout
    assert [json.loads(line) for line in file.read_text().splitlines()] == runs


def test_a_line_that_was_cut_off_is_dropped_when_reading_and_when_appending(tmp_path, study_results):
    file = tmp_path / "results.jsonl"
    assert study_results.read_results(file) == []
    study_results.append_result(file, {"seed": 0})
    with file.open("a") as out:
        out.write('{"seed": 1')
    assert study_results.read_results(file) == [{"seed": 0}]
    study_results.append_result(file, {"seed": 2})
    assert file.read_text() == '{"seed": 0}\n{"seed": 2}\n'


def test_a_damaged_line_within_the_file_is_named(tmp_path, study_results):
    file = tmp_path / "results.jsonl"
    file.write_text('{"seed": 0}\n{"seed\n{"seed": 2}\n')
    with pytest.raises(SystemExit, match="line 2 is not JSON"):
        study_results.read_results(file)


def test_differences_are_paired_by_seed(study_results):
    runs = [make_run("full", seed, mcc) for seed, mcc in ((0, 0.5), (1, 0.7), (2, 0.6))]
    runs += [make_run("lora", seed, mcc, trained=0.5) for seed, mcc in ((1, 0.8), (0, 0.62), (2, 0.71), (3, 0.1))]
    report = study_results.report(runs, "full")
    assert "tiny on table.csv" in report
    _, seeds, _, mean, _, _, difference, interval, seconds, ratio, _ = cells_of(report, "lora")
    assert (seeds, mean, difference) == ("0 1 2 3", "0.557", "+0.110")
    low, high = (float(end) for end in interval.strip("[]").split(","))
    # Student's t with two degrees of freedom: 4.303 times the standard error of 0.12, 0.10 and 0.11.
    assert (low, high) == pytest.approx((0.110 - 0.025, 0.110 + 0.025), abs=6e-4)
    assert (seconds, ratio) == ("1.5", "0.50")


def test_runs_of_other_data_or_models_are_in_tables_of_their_own(study_results):
    runs = [make_run("full", 0, 0.5), make_run("full", 0, 0.6, model="other"), make_run("lora", 0, 0.7)]
    runs.append(make_run("lora", 0, 0.8, split={**SPLIT, "proteins": [40, 10]}))
    report = study_results.report(runs, "full")
    assert report.count("training proteins of partitions 0, 1") == 3
    assert "+0.200" in report
    assert "+0.300" not in report


def test_runs_with_other_settings_have_rows_of_their_own(study_results):
    runs = [make_run("lora", 0, 0.5), make_run("lora", 0, 0.7, settings={"learning_rate": 0.01})]
    lines = [line for line in study_results.report(runs, "full").splitlines() if line.startswith("lora ")]
    assert len(lines) == 2


@pytest.mark.parametrize(
    ("maker", "seconds"),
    [
        ({"layers_below": 4, "made": True}, "11.0"),  # 9 s to make the states, 2 s of training
        ({"layers_below": 5, "made": True}, "-"),  # other states
        ({"layers_below": 4, "made": False}, "-"),
    ],
)
def test_the_cost_of_states_is_counted_whoever_made_them(maker, seconds, study_results):
    user = make_run("three epochs", 0, 0.5, states={"layers_below": 4, "made": False})
    other = make_run("one epoch", 0, 0.5, prepared=9.0, states=maker)
    assert cells_of(study_results.report([user, other], "full"), "three epochs")[-3] == seconds


@pytest.fixture
def study_of(monkeypatch, demo_table, tmp_path):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import compare_methods

    def make(*options):
        arguments = ["--data", demo_table, "--work", tmp_path, "--train-size", "60", "--test-size", "20", *options]
        monkeypatch.setattr("sys.argv", ["compare_methods.py", *map(str, arguments)])
        return compare_methods.Study(compare_methods.parse_arguments())

    return make


def method_named(name):
    import study_methods

    return next(method for method in study_methods.list_methods(4) if method.name == name)


def test_a_partition_may_both_train_and_test_without_sharing_a_protein(study_of):
    apart, shared = study_of(), study_of("--train-partitions", 0, 1, 2, 3, 4)
    data = {name: study.load(0) for name, study in (("apart", apart), ("shared", shared))}
    for splits in data.values():
        assert {name: len(split) for name, split in splits.items()} == {"train": 60, "test": 20}
    assert data["shared"]["test"]["accession"] == data["apart"]["test"]["accession"]
    assert set(data["apart"]["train"]["partition"]) == set(range(4))
    assert set(data["shared"]["train"]["partition"]) == set(range(5))
    assert not set(data["shared"]["train"]["sequence"]) & set(data["shared"]["test"]["sequence"])
    run = shared.run(method_named("composition"), 0)
    assert (run["split"]["train"], run["split"]["test"]) == ([0, 1, 2, 3, 4], [4])
    expected = close_relatives(data["shared"]["test"]["sequence"], data["shared"]["train"]["sequence"])
    assert run["relatives"] == expected


@pytest.mark.slow
def test_calibration_is_measured_on_a_partition_that_neither_trains_nor_tests(study_of, tmp_path):
    calibrated = method_named("top-calibrated-e1")
    with pytest.raises(SystemExit, match="needs validation proteins"):
        study_of().run(calibrated, 0)
    partitions = ["--train-partitions", 0, 1, 2]
    with pytest.raises(SystemExit, match="needs 100 validation proteins"):
        study_of(*partitions).run(calibrated, 0)
    table = write_demo_table(tmp_path / "larger.csv", proteins=900, seed=1)
    study = study_of(*partitions, "--test-size", 120, "--data", table)
    plain = study.run(method_named("lora-top1-first-e1"), 0)
    run = study.run(calibrated, 0)
    assert run["temperature"] > 0
    for when in ("before", "after"):
        bins = run["calibration"][when]["bins"]
        assert sum(count for _, _, count in bins) == len(study.load(0)["test"])
        right = sum(share * count for _, share, count in bins) / sum(count for _, _, count in bins)
        assert right == pytest.approx(run["metrics"]["accuracy"])  # the temperature changes no class
    assert run["metrics"]["mcc"] == plain["metrics"]["mcc"]
    assert "calibration" not in plain


def test_the_states_of_a_head_that_reads_the_same_are_counted_before_those_of_others(study_results):
    states = {"layers_below": 4, "made": True}
    mean = {"pooling": "mean"}
    makers = [make_run("a", 0, 0.5, prepared=20.0, states=states, settings=mean)]
    used = make_run("b", 0, 0.5, prepared=0.1, states={**states, "made": False})
    assert study_results.cost(used, [*makers, used]) == 22.0
    makers.append(make_run("c", 0, 0.5, prepared=9.0, states=states))
    assert study_results.cost(used, [*makers, used]) == 11.0
