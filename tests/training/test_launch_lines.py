"""The launch lines of docs/pages/distributed.md run as they are written, with a small model on two ranks of a CPU."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from esm_efficient import demo_model_path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "pages" / "distributed.md"
# accelerate ignores FSDP on a CPU, unless the script is started through this one.
STARTER = """
import runpy, sys
from rank_runs import shard_on_a_cpu
shard_on_a_cpu()
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def launch_lines() -> list[list[str]]:
    """The words of each command in the page's first block of shell commands."""
    block = re.search(r"```bash\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert block is not None
    return [words for line in block[1].replace("\\\n", " ").splitlines() if (words := shlex.split(line, comments=True))]


def replaced(words: list[str], changes: dict[str, str]) -> list[str]:
    """The words with other values after the given options, all of which must occur."""
    assert changes.keys() <= set(words)
    return [changes.get(before, word) for before, word in zip(["", *words], words, strict=False)]


@pytest.mark.slow
@pytest.mark.parametrize("words", launch_lines(), ids=lambda words: f"{words[0]} {Path(words[3]).name}")
def test_a_launch_line_trains_on_two_ranks_and_one_of_them_reports(tmp_path, demo_table, words):
    words = replaced(words, {"--model": demo_model_path(), "--data": str(demo_table)})
    script = words.index("examples/finetune_membrane.py")
    if words[0] == "torchrun":
        words = [sys.executable, "-m", "torch.distributed.run", *replaced(words, {"--nproc-per-node": "2"})[1:]]
        words.insert(3, "--standalone")  # a free port: another test may have the usual one
    else:
        starter = tmp_path / "starter.py"
        starter.write_text(STARTER)
        launch = [*words[2:script], "--num_processes", "2", "--main_process_port", "0"]
        through = [str(starter)] if any("fsdp" in word for word in launch) else []
        words = [sys.executable, "-m", "accelerate.commands.launch", *launch, *through, *words[script:]]
    done = subprocess.run(
        [*words, "--limit", "24", "--output", str(tmp_path / "out")],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").exists()
    assert done.stdout.count("reloaded from") == 1
    compared = "divided among the ranks" if "fsdp2.yaml" in " ".join(words) else "largest difference between logits"
    assert compared in done.stdout
