"""examples/finetune_membrane.py runs as a user starts it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from copies import Copy

from esm_efficient import demo_model_path

ROOT = Path(__file__).parents[2]


def start(*options: str, cwd: Path) -> subprocess.CompletedProcess:
    return Copy(ROOT / "examples" / "finetune_membrane.py", *options, folder=cwd).wait()


def test_a_small_run_writes_every_figure_and_an_adapter(tmp_path, demo_table):
    done = start(
        "--data", str(demo_table), "--model", "demo", "--limit", "24", "--seed", "3", "--output", "out",
        "--recipe", "all",
        "--json", "figures/r.json", "--no-class-weights",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    figures = json.loads((tmp_path / "figures" / "r.json").read_text())
    assert figures["recipe"] == "all"
    assert figures["seed"] == 3
    assert (figures["train_proteins"], figures["test_proteins"]) == (24, 8)
    for name in ("accuracy", "mcc", "auroc"):
        assert -1 <= figures["metrics"][name] <= 1
    for name in ("residues_per_second", "peak_memory_bytes", "trainable_parameters", "seconds"):
        assert figures[name] > 0
    assert figures["trained_layers"] == [0, 1, 2, 3]
    assert figures["logit_difference"] <= 1e-4
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").exists()
    for words in ("layers that trained", "majority class", "bacteriorhodopsin", "residues/s", "peak memory"):
        assert words in done.stdout


def test_the_head_alone_trains_and_is_the_one_that_is_loaded_again(tmp_path, demo_table):
    """It reads all residues, which the classes of transformers do not know."""
    options = ["--data", str(demo_table), "--model", demo_model_path(), "--limit", "24", "--json", "r.json"]
    done = start(*options, "--recipe", "frozen", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    figures = json.loads((tmp_path / "r.json").read_text())
    assert figures["trained_layers"] == []
    assert figures["logit_difference"] <= 1e-4
    assert (tmp_path / "output" / "model" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "absent.csv"], "error: no file at absent.csv"),
        pytest.param(["--recipe", "everything"], "invalid choice", marks=pytest.mark.slow),
        pytest.param(["--no-class-weight=1"], "--no-class-weights", marks=pytest.mark.slow),
    ],
)
def test_wrong_options_give_one_line_and_no_traceback(tmp_path, options, message):
    done = start(*options, cwd=tmp_path)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr
