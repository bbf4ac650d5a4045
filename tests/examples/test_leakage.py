"""examples/leakage.py runs as a user starts it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from copies import Copy

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_leakage_is_the_difference_between_two_runs_of_the_same_size(tmp_path, demo_table):
    options = ["--data", demo_table, "--limit", "48", "--recipe", "frozen", "--json", "r.json"]
    done = Copy(ROOT / "examples" / "leakage.py", *options, folder=tmp_path).wait()
    assert done.returncode == 0, done.stderr[-2000:]
    assert "48 proteins to train on, 16 to test on, 1 seed(s)" in done.stdout
    figures = json.loads((tmp_path / "r.json").read_text())
    (by_partition,), (at_random,) = figures["runs"]["partition"], figures["runs"]["random"]
    for key, difference in figures["leakage"].items():
        assert difference == pytest.approx(at_random[key] - by_partition[key])
        assert f"{difference:+.3f}" in done.stdout
