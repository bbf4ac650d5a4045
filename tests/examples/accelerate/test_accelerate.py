"""The configuration files for accelerate are valid, and the memory script divides what the ranks divide."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from conftest import make_model
from copies import Copy

from esm_efficient import estimate

FOLDER = Path(__file__).parents[3] / "examples" / "accelerate"


@pytest.mark.parametrize(("name", "kind"), [("ddp", "MULTI_GPU"), ("fsdp2", "FSDP")])
def test_accelerate_reads_the_configuration_files(name, kind):
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert config.distributed_type == kind
    assert config.mixed_precision == "bf16"
    if kind == "FSDP":
        assert config.fsdp_config["fsdp_version"] == 2
        layer = type(make_model().esm.encoder.layer[0]).__name__
        assert config.fsdp_config["fsdp_transformer_layer_cls_to_wrap"] == layer


@pytest.mark.slow
def test_the_page_shows_the_table_that_the_script_prints(tmp_path):
    page = FOLDER.parents[1] / "docs/pages/distributed.md"
    printed = Copy(FOLDER / "memory.py", folder=tmp_path).wait().stdout
    assert f"```text\n{printed}```" in page.read_text()


def test_memory_per_gpu_falls_with_the_gpus_under_fsdp2_only():
    spec = importlib.util.spec_from_file_location("memory", FOLDER / "memory.py")
    memory = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(memory)
    options = ("8M", "gc", 1, "A10G")
    peaks = {
        (gpus, kind): memory.peak_per_gpu(*options, gpus, kind, tokens=64)[0]
        for gpus in (1, 2, 4)
        for kind in ("ddp", "fsdp2")
    }
    alone = estimate("8M", recipe="gc", micro_batch=1, device="A10G", tokens=64, precision="bf16").peak
    assert peaks[4, "ddp"] == peaks[2, "ddp"] == alone.total + alone.gradients
    saved = alone.weights + alone.gradients + alone.optimizer
    assert peaks[2, "fsdp2"] - peaks[4, "fsdp2"] == pytest.approx(saved / 4)
