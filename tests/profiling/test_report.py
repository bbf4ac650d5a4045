from __future__ import annotations

import json
import math

from esm_efficient.costs.memory import CATEGORIES, Memory
from esm_efficient.profiling.growth import Growth
from esm_efficient.profiling.report import PhaseFigures, ProfileReport, RankReports

MIB = 2**20


def make_report(**changes):
    phases = {
        "forward": PhaseFigures(Memory(weights=10 * MIB, activations=5 * MIB), 20 * MIB, 1.0),
        "backward": PhaseFigures(Memory(weights=10 * MIB, gradients=9 * MIB, other=3 * MIB), 30 * MIB, 3.0),
    }
    options = {"device": "cuda:0", "counted": "tensors", "phases": phases, "peak_phase": "backward"}
    options |= {"steps": 7, "warmup_steps": 2, "residues_per_second": 1000.0, "samples_per_second": 5.0}
    return ProfileReport(**(options | changes))


def test_the_peak_of_a_run_is_the_peak_of_its_highest_phase():
    report = make_report()
    assert report.peak.total == 22 * MIB
    assert report.reserved == 30 * MIB


def test_figures_that_could_not_be_measured_are_left_out_or_null():
    report = make_report()
    record = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert record["utilisation"] is None
    assert record["peak"] == {**{c: getattr(report.peak, c) for c in CATEGORIES}, "total": 22 * MIB}
    metrics = report.metrics("p/")
    assert metrics["p/backward_peak_bytes"] == 22 * MIB
    assert "p/utilisation" not in metrics
    assert not any(math.isnan(value) for value in metrics.values())


def test_the_text_has_the_main_figures():
    text = str(make_report(model_flops_per_second=2e12, matmul_flops_per_second=8e12, growth=Growth(3e6, "other", 8)))
    for wanted in ("22.0 MiB in backward", "1,000 residues/s", "25.0% of the 8 TFLOP/s", "75.0%", "grows by 2.86 MiB"):
        assert wanted in text


def test_ranks_are_shown_one_by_one_and_summed():
    reports = RankReports(
        tuple(make_report(rank=rank, ranks=2, residues_per_second=r) for rank, r in [(0, 10), (1, 30)])
    )
    assert reports.sums == {"peak_bytes": 44 * MIB, "samples_per_second": 10, "residues_per_second": 40}
    metrics = reports.metrics()
    assert metrics["profile/rank1_residues_per_second"] == 30
    assert metrics["profile/sum_peak_bytes"] == 44 * MIB
    assert "sum" in str(reports)
    assert [r["rank"] for r in reports.to_dict()["ranks"]] == [0, 1]
    assert "profile/sum_peak_bytes" not in RankReports((make_report(),)).metrics()
