"""examples/finetune_location.py runs as a user starts it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from copies import Copy

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_it_prints_the_baselines_and_saves_the_thresholds(tmp_path, demo_table):
    options = ["--data", demo_table, "--limit", "60", "--recipe", "lora", "--token-budget", "2000", "--json", "r.json"]
    done = Copy(ROOT / "examples" / "finetune_location.py", *options, folder=tmp_path).wait()
    assert done.returncode == 0, done.stderr[-2000:]
    for words in ("commonest label", "residue composition", "recipe lora", "f1_macro", "Golgi apparatus", "threshold"):
        assert words in done.stdout
    figures = json.loads((tmp_path / "r.json").read_text())
    assert set(figures["baselines"]) == {"commonest label", "residue composition"}
    assert figures["baselines"]["commonest label"]["f1_macro"] < figures["baselines"]["commonest label"]["f1_micro"]
    assert len(figures["thresholds"]) == len(figures["task"]["names"]) == 10
    config = json.loads((tmp_path / "output" / "adapter" / "base_config" / "config.json").read_text())
    assert config["label_thresholds"] == figures["thresholds"]
