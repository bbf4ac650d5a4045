"""The benchmark scripts run as a user runs them, with their smallest settings."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from copies import Copy

RECIPES = ["all"]
FOLDER = Path(__file__).parents[3] / "examples" / "benchmarks"


def run(script, *options, timeout=240):
    """Run a script in its own process, as a benchmark must."""
    command = [sys.executable, str(FOLDER / script), *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


def run_copy(folder, script, *options, timeout=240):
    return Copy(FOLDER / script, *options, folder=folder).wait(timeout)


@pytest.mark.slow
def test_estimates_are_within_five_percent_of_real_steps(tmp_path):
    file = tmp_path / "accuracy.json"
    options = {"sizes": ["8M"], "recipes": RECIPES, "precisions": ["float32"], "tokens": [40], "micro-batches": [2]}
    encoders = ["lean", "plain"]
    arguments = [word for name, values in options.items() for word in (f"--{name}", *values)]
    result = run_copy(tmp_path, "estimate_accuracy.py", *arguments, "--json", file)
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]
    record = json.loads(file.read_text())
    rows = [row["what"].split()[1:3] for row in record["rows"]]
    assert rows == [[recipe, encoder] for recipe in RECIPES for encoder in encoders]
    for row in record["rows"]:
        assert row["predicted_bytes"] == pytest.approx(row["measured_bytes"], rel=0.05)
        assert row["predicted_bytes"] == row["predicted"]["total"]
    assert len(record["published"]) == 9
    for row in record["published"]:
        assert row["source"]
        assert row["explanation"] or abs(row["difference"]) <= 0.15
        assert abs(row["difference"]) <= 0.15 or row["explanation"] in result.stdout


@pytest.mark.slow
def test_the_profiler_overhead_is_printed_and_written(tmp_path):
    file = tmp_path / "overhead.json"
    options = ["--recipes", "lora", "--steps", "11", "--real-steps", "11", "--tokens", "16"]
    result = run_copy(tmp_path, "profiler_overhead.py", *options, "--json", file)
    # With batches this small the overhead may be above two percent; then the script must fail with that message.
    assert result.returncode == 0 or "costs more than 2%" in result.stderr, result.stderr[-2000:]
    [row] = json.loads(file.read_text())["rows"]
    assert row["overhead"] == pytest.approx(row["profiler_seconds_per_step"] / row["seconds_per_step"])
    assert (row["overhead"] > 0.02) == (result.returncode == 1)
    assert "lora" in result.stdout


@pytest.mark.slow
def test_the_lean_encoder_is_compared_with_its_baselines(tmp_path):
    file = tmp_path / "step.json"
    baselines = ["tutorial", "checkpointing", "prediction"]
    options = ["--model", "demo", "--batches", "2", "--max-residues", "150", "--threads", "1", "--others", "faesm"]
    result = run_copy(tmp_path, "training_step.py", *options, "--baselines", *baselines, "--json", file)
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]
    record = json.loads(file.read_text())
    assert [row["baseline"] for row in record["rows"]] == ["tutorial", *baselines]
    for row in record["rows"]:
        sides = row["sides"]
        ratios = [
            a / b for a, b in zip(*(sides[name]["activation_bytes"] for name in ("lean", "baseline")), strict=True)
        ]
        assert row["activation_ratio"] == pytest.approx(statistics.median(ratios))
        assert 0 < row["activation_ratio"] < 1
        assert row["residues_per_s_ratio"] > 0
        if row["baseline"] == "prediction":
            assert row["output_error"] < 1e-5
        elif row["baseline"] != "tutorial" or row["trains"] == "full":
            assert row["gradient_error"] < 1e-5
            assert row["matmul_share"] > 0
    assert [row["package"] for row in record["others"]] == ["faesm", "faesm"]
    assert all(row.get("reason") or row["residues_per_s_ratio"] > 0 for row in record["others"])


@pytest.mark.slow
def test_cached_states_are_compared_with_training_without_them(tmp_path):
    file = tmp_path / "trunk.json"
    options = {"model": "demo", "batches": 2, "frozen-batches": 1, "turns": 2, "max-residues": 120, "threads": 1}
    arguments = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    result = run_copy(tmp_path, "trunk.py", *arguments, "--shares", "0", "1/3", "--json", file)
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]
    record = json.loads(file.read_text())
    assert [(row["share"], row["top"], row["layers"]) for row in record["rows"]] == [("0", 0, 4), ("1/3", 1, 4)]
    for row in record["rows"]:
        assert row["gradient_error"] < 1e-5
        for name in ("all", "top"):
            turns = zip(row["seconds"][name], row["seconds"]["cached"], strict=True)
            assert row[f"{name}_ratio"] == pytest.approx(statistics.median(a / b for a, b in turns))
            assert row[f"saved_ratio_{name}"] == pytest.approx(
                row["memory"]["cached"]["saved"] / row["memory"][name]["saved"]
            )
        assert 0 < row["memory"]["cached"]["saved"] < row["memory"]["all"]["saved"] < row["memory"]["all"]["peak"]
        states, epoch = (statistics.median(row["seconds"][name]) for name in ("states", "cached"))
        assert row["totals"]["3"]["cached"] == pytest.approx(states + 3 * epoch)
    frozen = record["frozen"]
    totals = [a + b for a, b in zip(frozen["states_seconds"], frozen["training_seconds"], strict=True)]
    ratios = [total / seconds for total, seconds in zip(totals, frozen["prediction_seconds"], strict=True)]
    assert frozen["ratio"] == pytest.approx(statistics.median(ratios))
    assert len(record["goals"]) == 3
    for goal in record["goals"]:
        assert f"{goal['figure']:.2f}, goal {goal['goal']}: {'met' if goal['met'] else 'missed'}" in result.stdout


def test_the_encoder_is_compared_with_the_tokenizer_and_gives_equal_ids(tmp_path):
    result = run_copy(tmp_path, "encoding.py", "--turns", "1", "--sample", "20", "--json", tmp_path / "e.json")
    assert result.returncode == 0, result.stderr[-2000:]
    record = json.loads((tmp_path / "e.json").read_text())
    rates = record["residues_per_s"]
    assert record["ratio"] == pytest.approx(rates["ResidueEncoder"][0] / rates["EsmTokenizer"][0])
    assert record["proteins"] == 1400


def test_batches_of_a_token_budget_have_little_padding(tmp_path):
    result = run_copy(tmp_path, "batching.py", "--budgets", "2048", "--json", tmp_path / "b.json")
    assert result.returncode == 0, result.stderr[-2000:]
    record = json.loads((tmp_path / "b.json").read_text())
    assert min(record["budgets"]["2048"]["non_padding"]) > 0.97 > max(record["random"])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the script reads memory from /proc")
def test_embedding_is_compared_with_other_packages(tmp_path):
    options = ["--model", "demo", "--proteins", "8", "--turns", "1", "--sequences", "100", "200", "--residues", "40"]
    result = run_copy(tmp_path, "prediction.py", *options, "--json", tmp_path / "p.json")
    record = json.loads((tmp_path / "p.json").read_text())
    first, *others = record["speed"]
    assert [row["package"] for row in others] == ["transformers", "sorted", "fair-esm", "esm-cpp"]
    for row in (first, *(other for other in others if "reason" not in other)):
        assert row["difference"] < 1e-4
    for row in others[:3]:
        [ours], [theirs] = (row["residues_per_s"][name] for name in ("esm_efficient", row["package"]))
        assert row["ratio"] == pytest.approx(ours / theirs)
    assert [(row["sequences"], row["rows"]) for row in record["memory"]] == [(100, 100), (200, 200)]
    # Such small files and few proteins may miss the goals; then the script must fail with that message.
    slower = [row["package"] for row in others if row.get("ratio", 1) < 1]
    assert all(row["first_half"] <= row["anonymous"] for row in record["memory"])
    grown = record["memory"][1]["anonymous"] > 1.1 * max(1, record["memory"][1]["first_half"])
    assert (result.returncode == 0) == (not slower and not grown), result.stderr[-2000:]
    assert all(f"{name} is faster" in result.stderr for name in slower)
    assert ("memory grew" in result.stderr) == grown


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the script reads memory from /proc")
def test_loading_is_measured_and_loses_no_rows(tmp_path):
    result = run("loading.py", "--sequences", "500", "2000", "--residues", "60", "--json", tmp_path / "l.json")
    assert result.returncode == 0, result.stderr[-2000:]
    record = json.loads((tmp_path / "l.json").read_text())
    assert [(row["sequences"], row["rows"]) for row in record] == [(500, 500), (2000, 2000)]
    assert all(row["residues"] > 40 * row["rows"] for row in record)


@pytest.mark.slow
def test_the_script_for_a_gpu_runs_on_a_cpu_with_a_tiny_model(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    from gpu import PARTS

    result = run_copy(tmp_path, "gpu.py", "--tiny", "--json", tmp_path / "g.json", timeout=540)
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]
    record = json.loads((tmp_path / "g.json").read_text())["parts"]
    assert {name: part["status"] for name, part in record.items()} == dict.fromkeys(PARTS, "done")
    assert all(part["rows"] and f"{name}: done" in result.stdout for name, part in record.items())
    sides = [(row["recipe"], row["what"], row["encoder"]) for row in record["recipes_650m"]["rows"]]
    assert sides == [("lora", what, encoder) for what in ("mixed", "even") for encoder in ("plain", "lean")]
    assert all(row["ms"] > 0 and row["peak_bytes"] > 0 for row in record["recipes_650m"]["rows"])
    assert record["recipes_650m"]["rows"][1]["peak_ratio"] < 0.5
    for row in record["estimates"]["rows"]:
        assert row["bytes_ratio"] == pytest.approx(row["predicted_bytes"] / row["measured_bytes"])
        assert 0.8 < row["bytes_ratio"] < 1.2
    for row in record["gradients"]["rows"]:
        assert (row["relative_error"] < 1e-5) == (row["precision"] == "float32")
