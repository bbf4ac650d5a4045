"""The counts of reliability.py, with fewer kills, inputs and steps than the script has by default."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "examples" / "benchmarks" / "reliability.py"


def counted(file, *options, timeout):
    command = [sys.executable, str(SCRIPT), *map(str, options), "--json", str(file)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    return json.loads(file.read_text())


def check(record, *, kills, tables, bodies):
    assert record["wrong"] == []
    assert record["kills"] == {"tried": kills, "killed": kills, "resumed": kills, "identical": kills}
    for name, number in (("tables", tables), ("bodies", bodies)):
        counts = record[name]
        assert counts["tried"] == number == counts["read"] + counts["refused"]
        assert counts["lost"] == 0
        assert min(counts["read"], counts["refused"]) > 0
    disk = record["full_disk"]
    assert disk["tried"] == disk["kept"] == disk["named"] > 0


@pytest.mark.slow
def test_several_killed_runs_damaged_inputs_and_long_runs(tmp_path):
    options = ["--kills", 2, "--tables", 200, "--bodies", 200, "--steps", 120, "--predictions", 1_000]
    record = counted(tmp_path / "r.json", *options, timeout=3600)
    check(record, kills=2, tables=200, bodies=200)
    for counts in record["memory"].values():
        assert counts["growth_bytes"] < 15_000_000
    assert {name: counts["number"] for name, counts in record["memory"].items()} == {
        "optimizer steps": 120,
        "predictions": 1_000,
    }
