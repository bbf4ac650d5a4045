"""The results page and the table of the README are made by a script from the committed results file."""

from __future__ import annotations

import json
import re
from pathlib import Path

import matplotlib
import pytest

pytestmark = pytest.mark.usefixtures("drawn_figures")

REPOSITORY = Path(__file__).parents[2]
PAGES = REPOSITORY / "docs" / "pages"
RESULTS = REPOSITORY / "examples" / "results"


@pytest.fixture
def study_page(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "examples"))
    import study_page

    return study_page


def test_the_committed_page_and_plots_are_those_of_the_results_file(tmp_path, study_page, monkeypatch):
    originals = [PAGES / "results.md", REPOSITORY / "README.md"]
    copies = [tmp_path / original.name for original in originals]
    for original, copy in zip(originals, copies, strict=True):
        emptied = re.sub(r"(<!-- table: [\w-]+ -->\n).*?(<!-- end -->)", r"\1\2", original.read_text(), flags=re.DOTALL)
        assert emptied != original.read_text()
        copy.write_text(emptied)
    monkeypatch.setattr("sys.argv", ["study_page.py", str(RESULTS), *map(str, copies)])
    study_page.main()
    assert [copy.read_text() for copy in copies] == [original.read_text() for original in originals]
    plots = sorted((tmp_path / "images").glob("*.svg"))
    assert [plot.name for plot in plots] == sorted(f"results_{name}.svg" for name in study_page.PLOTS)
    for plot in plots:
        committed = (PAGES / "images" / plot.name).read_text()
        if f"Matplotlib v{matplotlib.__version__}," in committed:  # other versions draw other paths
            assert plot.read_text() == committed
        assert re.findall(r"<text[^>]*>([^<]*)", plot.read_text()) == re.findall(r"<text[^>]*>([^<]*)", committed)


def test_the_headline_shows_the_best_probe_and_the_methods_that_were_run(study_page):
    def run(method, mcc, seed=0):
        metrics = {"mcc": mcc, "accuracy": 0.5, "auroc": 0.5}
        costs = {"prepare_cpu_seconds": 1.0, "train_cpu_seconds": 2.0}
        return {"method": method, "seed": seed, "settings": {}, "metrics": metrics} | costs

    runs = [run("majority", 0.0), run("probe1-mean", 0.3), run("probe1-mean", 0.5, 1), run("probe2-first", 0.39)]
    rows = [line.strip("| ").split(" | ") for line in study_page.headline_table(runs).splitlines()[2:]]
    assert [(row[0].strip(), row[1].strip(), row[4].split()[0]) for row in rows] == [
        ("the majority class", "1", "0.000"),
        ("linear probe on one layer: the best of all", "2", "0.400"),
    ]


def test_every_line_of_the_results_file_is_a_run_of_its_own(study_page):
    files = {file.stem: [json.loads(line) for line in file.read_text().splitlines()] for file in RESULTS.iterdir()}
    assert files.keys() == {"membrane", "location"}
    runs = [run for of_file in files.values() for run in of_file]
    assert len({(run["method"], run["seed"], json.dumps(run["split"])) for run in runs}) == len(runs)
    assert {(*run["split"]["train"], run["split"]["proteins"][1]) for run in files["membrane"]} <= {
        (0, 1, 2, 3, 800),
        (0, 1, 2, 800),
        (0, 1, 2, 4, 800),
    }
    assert {run["model"] for run in runs} == {"esm2_t6_8M"}
    assert all(run["commit"] and "dirty" not in run["commit"] for run in runs)


def test_fine_tuning_a_truncated_model_is_compared_with_the_whole_one_seed_by_seed(study_page):
    def run(method, seed, mcc, seconds):
        return {
            "method": method,
            "seed": seed,
            "settings": {},
            "metrics": {"mcc": mcc},
            "prepare_cpu_seconds": 0.0,
            "train_cpu_seconds": seconds,
        }

    runs = [run("lora-top6-first-e1", seed, mcc, 10.0) for seed, mcc in ((0, 0.5), (1, 0.7))]
    runs += [run("truncated2-lora-first-e1", seed, mcc, 4.0) for seed, mcc in ((1, 0.8), (0, 0.6))]
    runs += [run("probe2-mean", 0, 0.4, 1.0)]
    [line] = [line for line in study_page.truncation_table(runs).splitlines() if line.startswith("| 2 ")]
    layers, first, mean, tuned, difference, ratio = [cell.strip() for cell in line.strip("|").split("|")]
    assert (layers, first, mean, ratio) == ("2", "-", "0.400", "0.40")
    # Student's t with one degree of freedom: 12.706 times the standard error of 0.6 and 0.8, which is 0.1.
    assert tuned.replace("\\", "") == "0.700 [-0.571, 1.971]"
    assert difference.replace("\\", "") == "+0.100 [+0.100, +0.100]"


def test_settings_are_compared_with_the_recipe_on_the_partition_that_chooses(study_page):
    def run(method, seed, mcc, tested):
        metrics = {"mcc": mcc, "accuracy": 0.5, "auroc": 0.5}
        figures = {"metrics": metrics, "prepare_cpu_seconds": 1.0, "train_cpu_seconds": 2.0}
        split = {"train": [0, 1, 2], "test": tested, "proteins": [2400, 800]}
        return {"method": method, "seed": seed, "settings": {}, "split": split} | figures

    runs = [run("lora-top2-first-e1", seed, mcc, [3]) for seed, mcc in ((0, 0.5), (1, 0.7))]
    runs += [run("tune-rank-2", seed, mcc, [3]) for seed, mcc in ((1, 0.6), (0, 0.4))]
    runs += [run("tune-rank-2", 2, 0.9, [4]), run("lora-top2-first-e1", 2, 0.1, [4])]
    header, _, usual, changed = study_page.table("tuning", runs).splitlines()
    assert "MCC - the recipe" in header
    assert usual.startswith("| the recipe | 2 |")
    cells = [cell.strip().replace("\\", "") for cell in changed.strip("|").split("|")]
    assert (cells[0], cells[1], cells[5]) == ("rank 2, not 8", "2", "-0.100 [-0.100, -0.100]")


def test_the_learning_curve_pairs_the_seeds_of_each_size_with_its_own_best_probe(study_page):
    def run(method, size, seed, mcc, train=(0, 1, 2)):
        split = {"train": [*train], "test": [4], "proteins": [size, 800]}
        return {"method": method, "seed": seed, "settings": {}, "split": split, "metrics": {"mcc": mcc}}

    runs = [run("probe1-mean", 2400, 0, 0.6), run("probe2-mean", 2400, 0, 0.5), run("lora-top2-first-e1", 2400, 0, 0.7)]
    runs += [run("probe1-mean", 300, seed, 0.3) for seed in (0, 1)]
    runs += [run("probe2-mean", 300, seed, mcc) for seed, mcc in ((0, 0.4), (1, 0.6))]
    runs += [run("lora-top2-first-e3", 300, 1, 0.65), run("probe1-mean", 300, 2, 0.99, train=(0, 1, 2, 3))]
    rows = [
        [cell.strip() for cell in row.strip("|").split("|")] for row in study_page.table("curve", runs).splitlines()
    ]
    small, large = rows[2:]
    assert (small[0], small[1].split()[0], small[2:]) == ("300", "0.500", ["-", "0.650", "-", "-", "+0.050"])
    assert large == ["2,400", "0.600", "0.700", "-", "-", "+0.100", "-"]


def test_every_setting_of_the_study_has_its_words(study_page):
    from study_methods import tuning_methods

    assert {method.name for method in tuning_methods(study_page.LAYERS)} <= study_page.TUNED.keys()


def test_calibration_is_shown_before_and_after_the_temperature_and_its_bins_are_weighted(study_page, monkeypatch):
    def run(seed, temperature, before, after):
        errors = {"before": before, "after": after}
        found = {
            name: {"error": error, "bins": [[0.9, 0.8, 10], [0.6, 0.5, 4 + 8 * seed]]} for name, error in errors.items()
        }
        split = {"train": [0, 1, 2], "test": [4], "proteins": [2400, 800]}
        figures = {"temperature": temperature, "calibration": found, "metrics": {"mcc": 0.7 + seed / 10}}
        return {"method": "top-calibrated-e1", "seed": seed, "settings": {}, "split": split} | figures

    runs = [run(0, 1.5, 0.08, 0.03), run(1, 1.7, 0.06, 0.01)]
    runs[1]["calibration"]["after"]["bins"][1] = [0.6, 0.7, 12]
    rows = [
        [cell.strip() for cell in row.strip("|").split("|")]
        for row in study_page.table("calibration", runs).splitlines()
    ]
    assert rows[2] == ["0", "1.50", "0.080", "0.030", "0.700"]
    assert [cell.split()[0] for cell in rows[4]] == ["mean", "1.60", "0.070", "0.020", "0.750"]


def test_methods_are_beside_each_other_if_they_take_about_as_long(study_page):
    def run(method, seed, mcc, seconds):
        costs = {"prepare_cpu_seconds": 1.0, "train_cpu_seconds": seconds - 1.0}
        split = {"train": [0, 1, 2, 3], "test": [4], "proteins": [2400, 800], "data": "t"}
        return {"method": method, "seed": seed, "settings": {}, "metrics": {"mcc": mcc}, "split": split} | costs

    runs = [run("lora-top1-first-e3", seed, 0.7 + 0.02 * seed, 110.0) for seed in (0, 1)]
    runs += [run("lora-top2-first-e1", seed, 0.6, 100.0) for seed in (0, 1, 2)]
    runs += [run("lora-top1-first-e1", 0, 0.5, 60.0), run("full-first-e1", 0, 0.5, 100.0)]
    [row] = study_page.table("time", runs).splitlines()[2:]
    cells = row.strip("| ").split(" | ")
    assert cells[:4] == ["lora-top1-first-e3", "lora-top2-first-e1", "110", "100"]
    assert [cell.split()[0] for cell in cells[4:]] == ["0.710", "0.600", "+0.110"]


def test_the_bins_of_several_runs_are_pooled_by_their_number_of_predictions(study_page):
    import study_plots

    first, second = [(0.52, 0.5, 10), (0.95, 1.0, 30)], [(0.58, 0.8, 20), (1.0, 0.9, 10)]
    low, high = study_plots.pooled([first, second])
    assert low == pytest.approx(((5.2 + 11.6) / 30, (5 + 16) / 30))
    assert high == pytest.approx(((28.5 + 10) / 40, (30 + 9) / 40))


def test_training_with_relatives_of_the_test_proteins_is_compared_with_training_without(study_page):
    usual, among = ([0, 1, 2], [4]), ([0, 1, 2, 4], [4])

    def run(method, seed, mcc, parts, size=2400, relatives=0.25):
        split = {"train": parts[0], "test": parts[1], "proteins": [size, 800]}
        known = {} if parts is usual else {"relatives": relatives}
        return {"method": method, "seed": seed, "settings": {}, "split": split, "metrics": {"mcc": mcc}} | known

    runs = [run("composition", 0, 0.4, usual), run("composition", 0, 0.5, among)]
    runs += [run("probe1-mean", 0, 0.6, usual), run("probe2-mean", 0, 0.5, usual)]
    runs += [run("probe2-mean", 0, 0.9, among), run("probe1-mean", 0, 0.8, among)]
    runs += [run("lora-top2-first-e1", seed, mcc, usual) for seed, mcc in ((0, 0.7), (1, 0.72), (2, 0.5))]
    runs += [run("lora-top2-first-e1", seed, mcc, among) for seed, mcc in ((0, 0.9), (1, 0.92))]
    runs += [run("lora-top2-first-e1", 0, 0.1, ([0, 1, 2, 3], [4]))]
    runs += [run("probe0-first", 0, 0.2, usual, 9000), run("probe0-first", 0, 0.6, among, 9000, 0.5)]
    rows = [
        [cell.strip() for cell in row.strip("|").split("|")] for row in study_page.table("leakage", runs).splitlines()
    ]
    assert [(*row[:4], row[4].split()[0], row[5].split()[0], row[6].split()[0]) for row in rows[2:]] == [
        ("2,400", "25.0%", "amino-acid shares", "1", "0.400", "0.500", "+0.100"),
        ("2,400", "25.0%", "the best linear probe", "1", "0.600", "0.800", "+0.200"),
        ("2,400", "25.0%", "the recipe top", "2", "0.710", "0.910", "+0.200"),
        ("9,000", "50.0%", "the best linear probe", "1", "0.200", "0.600", "+0.400"),
    ]


def test_savings_are_compared_over_the_seeds_that_all_rows_have(study_page):
    def run(method, seed, mcc, peak):
        split = {"train": [0, 1, 2], "test": [4], "proteins": [2400, 800]}
        metrics = {"mcc": mcc, "accuracy": mcc, "auroc": mcc}
        found = {"method": method, "seed": seed, "settings": {}, "split": split, "metrics": metrics}
        return found | {"peak_activation_bytes": peak * 2**20}

    peaks = {"full-first-e1": 200, "ga-first-e1": 60, "gc-first-e1": 40, "lora-top6-first-e1": 200}
    peaks |= {"lora-ga-first-e1": 60, "lora-gc-first-e1": 40, "all-first-e1": 10}
    runs = [run(method, seed, 0.7 + 0.1 * seed, peak) for method, peak in peaks.items() for seed in (0, 1)]
    runs += [run("full-first-e1", 2, 0.1, 900)]  # a seed that the others do not have
    runs[5] = run("gc-first-e1", 1, 0.75, 40)
    rows = [
        [cell.strip() for cell in row.strip("|").split("|")] for row in study_page.table("savings", runs).splitlines()
    ]
    assert [row[1:] for row in rows[2:5]] == [
        ["2", "0.750", "0.750", "-", "200 MiB", "100%"],
        ["2", "0.750", "0.750", "0.000", "60.0 MiB", "30%"],
        ["2", "0.725", "0.725", "0.050", "40.0 MiB", "20%"],
    ]
    assert [row[-1] for row in rows[5:]] == ["100%", "30%", "20%", "5%"]
