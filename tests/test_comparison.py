"""compare(): every format has the same figures, and the page opens in a real browser."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import shutil
import subprocess
from typing import get_args

import numpy as np
import pytest
from conftest import slow_except, tiny_config
from datasets import DatasetDict

from esm_efficient import RECIPES, compare, demo_model_path, estimate, load_deeploc, stratified_sample
from esm_efficient.comparison import estimate_page, runner
from esm_efficient.costs.memory import CATEGORIES
from esm_efficient.errors import ConfigurationError, DataError
from esm_efficient.tasks import Kind, Task
from esm_efficient.training.stopping import BEST


@pytest.fixture(scope="module")
def estimated():
    return compare(tiny_config(), device="A10G", tokens=100, steps=50, epochs=2, sequences=1000)


@pytest.fixture(scope="module")
def data(demo_table):
    splits = load_deeploc(demo_table, max_residues=220, validation_partitions=())
    return DatasetDict(train=stratified_sample(splits["train"], 24), test=stratified_sample(splits["test"], 24))


@pytest.fixture(scope="module")
def measured(data):
    return compare(
        demo_model_path(),
        data,
        recipes=["base", RECIPES["lora"].replace(micro_batch=4)],
        steps=3,
        epochs=1,
        seeds=(0, 1),
    )


def at(comparison, budget):
    return {f.recipe.name: f for f in comparison.figures if f.budget == budget}


def test_all_recipes_are_estimated_at_both_budgets(estimated):
    for budget, steps in (("steps", 50), ("epochs", 250)):
        figures = at(estimated, budget)
        assert list(figures) == list(RECIPES)
        for f in figures.values():
            assert (f.steps, f.epochs) == (steps, steps * 8 / 1000)
            estimate = estimated.timelines[f.recipe.name]
            assert f.seconds == pytest.approx(estimate.seconds * steps + f.cache_seconds)
            assert (f.cache_bytes > 0) == (f.cache_seconds > 0) == f.recipe.cache
            assert (f.score, f.interval) == (None, None)
    assert figures["all"].peak.total < figures["base"].peak.total
    assert figures["frozen"].cache_bytes == 1000 * (100 * 16 * 2 + 1)
    header, rows = estimated.rows("epochs")
    assert header[12:14] == ["cache", "caching, s"]
    assert [row[12] for row in rows if row[0] in ("base", "frozen")] == ["0 B", "3.05 MiB"]


@pytest.mark.parametrize(("tokens", "described"), [(1200, "of 1,200 tokens"), ([9, 9, 1200], "of up to 1,200 tokens")])
def test_the_note_names_the_longest_sequence(tokens, described):
    found = compare(tiny_config(), recipes=["frozen"], tokens=tokens, device="cpu")
    assert described in found.note


def test_one_pass_is_one_epoch_although_its_last_batch_is_smaller():
    found = compare(tiny_config(), recipes=["frozen"], tokens=9, device="cpu", sequences=42, epochs=1, steps=12)
    assert (at(found, "epochs")["frozen"].steps, at(found, "epochs")["frozen"].epochs) == (6, 1.0)
    assert at(found, "steps")["frozen"].epochs == 2.0


@pytest.mark.slow
def test_runs_are_measured_with_their_metric(measured, data):
    steps, epochs = at(measured, "steps"), at(measured, "epochs")
    # 24 sequences in batches of 8 are 3 steps, so both budgets share one run. In batches of 4 they are 6 steps.
    assert steps["base"].scores == epochs["base"].scores
    assert (steps["base"].steps, epochs["base"].steps) == (3, 3)
    assert (steps["lora"].steps, epochs["lora"].steps) == (3, 6)
    assert (steps["lora"].epochs, epochs["lora"].epochs) == (0.5, 1.0)
    for f in measured.figures:
        assert len(f.scores) == 2
        assert f.seconds > 0
        assert f.residues_per_second > 0
        assert f.interval[0] <= f.score <= f.interval[1]
        assert sum(getattr(f.peak, category) for category in CATEGORIES) == f.peak.total > 0
    assert steps["base"].trainable_parameters > 5 * steps["lora"].trainable_parameters
    assert "24 sequences" in measured.note
    assert "cache" not in measured.rows("steps")[0]


def test_a_run_on_cached_states_shows_what_the_cache_costs_and_its_folder_is_kept(data, tmp_path):
    comparison = compare(demo_model_path(), data, recipes=["frozen"], steps=3, epochs=1, output_dir=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"frozen-3-0"}
    assert (tmp_path / "frozen-3-0" / "report.html").exists()
    [f, _] = comparison.figures
    tokens = np.array([len(sequence) + 2 for sequence in data["train"]["sequence"]])
    assert f.cache_bytes == comparison.timelines["frozen"].cache.stored.bytes_for(tokens, 128).sum()
    assert 0 < f.cache_seconds < f.seconds


@pytest.mark.parametrize("kind", slow_except(["estimated", "measured"], "estimated"))
def test_every_format_has_the_same_figures(kind, request, tmp_path):
    comparison = request.getfixturevalue(kind)
    files = comparison.save(tmp_path / "out")
    assert [file.suffix for file in files] == [".txt", ".md", ".csv", ".json", ".html"]
    records = list(csv.DictReader(io.StringIO(files[2].read_text())))
    rows = json.loads(files[3].read_text())["rows"]
    assert len(records) == len(rows) == len(comparison.figures)
    for record, row, f in zip(records, rows, comparison.figures, strict=True):
        assert record["recipe"] == row["recipe"] == f.recipe.name
        assert int(record["peak_bytes"]) == row["peak_bytes"] == f.peak.total
        assert float(record["seconds"]) == row["seconds"] == f.seconds
    header, cells = comparison.rows("steps")
    for text in (files[0].read_text(), files[1].read_text(), files[4].read_text()):
        for value in [*header, *map(str, cells[0])]:
            assert value in text


@pytest.mark.usefixtures("drawn_figures")
def test_the_page_loads_nothing(estimated):
    page = estimated.to_html()
    assert "<script" not in page
    loaded = re.findall(r"""(?:src|href)\s*=\s*["']([^"'#][^"']*)|url\(([^#)][^)]*)\)|@import""", page)
    assert not loaded
    assert page.count("<svg") == 4


@pytest.mark.usefixtures("drawn_figures")
def test_the_page_opens_in_a_browser_without_a_network(estimated, tmp_path):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium is installed")
    [*_, page] = estimated.save(tmp_path)
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    options += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    run = subprocess.run([browser, *options, page.as_uri()], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-2000:]
    dom = run.stdout
    assert dom.count("<figure>") == dom.count("</svg>") == 4
    assert dom.count("<tbody>") == 2
    assert "<h2>Memory over one step</h2>" in dom
    for f in estimated.figures:
        assert f"<td>{f.recipe.name}</td>" in dom
    shot = tmp_path / "page.png"
    options[-1] = f"--screenshot={shot}"
    subprocess.run([browser, *options, page.as_uri()], capture_output=True, check=True, timeout=120)
    assert shot.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipes": []}, "expected at least one"),
        ({"steps": 0}, "steps=0.*expected at least 1 step"),
        ({"epochs": 0}, "epochs=0.*more than 0 epochs"),
        ({"epochs": math.nan}, "epochs=nan.*finite"),
        ({"seeds": (0, 1, 0)}, r"seeds=\[0, 1, 0\].*each of them once"),
        ({"precision": "bf16"}, "precision: options of training, which needs a dataset"),
        ({"recipes": ["lora", RECIPES["lora"].replace(r=64)]}, "share a name"),
        ({"recipes": ["best"]}, "no recipe is named"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps: give steps and epochs, and batch_size"),
        ({"seed": 1}, "seed: give seeds instead"),
        ({"recipe": "lora"}, "recipe: give recipes instead"),
        ({"profile": False}, "profile: every run is profiled"),
        ({"estimate_options": {"tokens": 5}}, "estimate_options has 'tokens'"),
        ({"estimate_options": {"padings": "padded"}}, "estimate_options has 'padings': did you mean 'padding'"),
    ],
)
def test_invalid_options_are_refused(options, message):
    with pytest.raises(ConfigurationError, match=message):
        compare("8M", **options)


def test_sizes_of_batches_are_those_of_the_runs(data, monkeypatch):
    monkeypatch.delattr("esm_efficient.training.result.FinetuneResult.save_page")  # for a page that nobody could read
    options = {"recipes": ["frozen"], "steps": 2, "epochs": 1, "batch_size": 4, "seeds": [0], "disable_tqdm": True}
    comparison = compare(demo_model_path(), data, **options)
    rows = len(data["train"])
    assert at(comparison, "epochs")["frozen"].steps == -(-rows // 4)
    assert at(comparison, "steps")["frozen"].epochs == 2 * 4 / rows


def test_an_unknown_metric_is_refused_with_the_known_ones_before_any_run(data, monkeypatch):
    monkeypatch.delattr("esm_efficient.training.finetune.finetune")
    with pytest.raises(ConfigurationError, match=r"metric='mc': expected one of .*mcc"):
        compare(demo_model_path(), data, recipes=["frozen"], steps=1, epochs=0.1, metric="mc")


@pytest.mark.parametrize("kind", get_args(Kind))
def test_the_metrics_that_are_known_before_a_run_are_those_of_the_task(kind):
    task = Task(kind, ("a", "b", "c"))
    with pytest.raises(ConfigurationError, match=BEST[kind][0]):
        runner._check_metric("mc", task)
    for metric in (None, "loss", BEST[kind][0]):
        runner._check_metric(metric, task)


def test_data_without_a_training_split_are_refused(data):
    with pytest.raises(DataError, match="the dataset has the splits test: expected train"):
        compare(demo_model_path(), DatasetDict(test=data["test"]), data_options=None)


def test_several_ranks_are_refused(data, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigurationError, match="trains in one process"):
        compare(demo_model_path(), data)


def test_an_unknown_budget_is_refused(estimated):
    with pytest.raises(ConfigurationError, match="budget='hours'"):
        estimated.rows("hours")


def test_the_page_of_an_estimate_keeps_its_lines_apart_and_shows_the_caching_pass():
    found = estimate(tiny_config(), recipe="frozen", device="cpu", tokens=20)
    page = estimate_page(found)
    assert "<td>caching</td>" in page
    assert "parameters train</p>" in page
    assert "<p></p>" not in page
    assert "The rates of cpu are unknown, so there are no times." in page
    assert "roofline" not in page
    timed = estimate_page(estimate(tiny_config(), recipe="lora", device="A10G", tokens=20))
    assert "times by a roofline" in timed
    assert "<td>caching</td>" not in timed


def test_what_was_measured_is_handed_on_before_a_later_run_fails(data, monkeypatch, measured, tmp_path):
    seen = []

    def fail(runs, recipe, steps, seed, folder):
        if recipe.name == "lora":
            raise DataError("as the test wants")
        runs.device = "cpu"

    monkeypatch.setattr(runner._Runs, "_train", fail)
    first = next(f for f in measured.figures if f.recipe.name == "base")
    monkeypatch.setattr(runner, "measured_figures", lambda *args, **options: first)
    with pytest.raises(DataError, match="as the test wants"):
        compare(demo_model_path(), data, recipes=["base", "lora"], steps=3, each=seen.append)
    [found] = seen
    assert [f.recipe.name for f in found.figures] == ["base"]
    [*_, page] = found.save(tmp_path, command="esm-efficient compare")
    text = page.read_text()
    assert "Nothing was run at this budget yet." in text
    assert "esm-efficient compare" in text
