"""The progress of a run: one bar in a terminal, and one line per report elsewhere."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from copies import Copy
from transformers import TrainerState

from esm_efficient import stratified_sample
from esm_efficient.training.given import splits_from
from esm_efficient.training.progress import RunLines

CODE = (
    "import sys; from esm_efficient import demo_model_path, finetune, stratified_sample\n"
    "from esm_efficient.training.given import splits_from\n"
    "data = {name: stratified_sample(split, 24) for name, split in splits_from('demo').items()}\n"
    "finetune(demo_model_path(), data, recipe='lora', output_dir=sys.argv[1], logging_steps=1, epochs=1,\n"
    "    eval_strategy='epoch', disable_tqdm='quiet' in sys.argv)\n"
)
COMMAND = [
    "finetune",
    "proteins.csv",
    "--model",
    "demo",
    "--recipe",
    "frozen",
    "--no-probe",
    "--epochs",
    "1",
    "-o",
    "out",
]
NUMBER = r"\d\.\d{3}"
SIZE = r"[\d.]+ [MG]iB"


@pytest.fixture
def table(tmp_path):
    """A table of 168 proteins to train on, 21 steps, and a few for validation and test."""
    parts = [
        stratified_sample(split, 168 if name == "train" else 16).to_pandas().assign(split=name)
        for name, split in splits_from("demo").items()
    ]
    pd.concat(parts)[["sequence", "label", "split"]].to_csv(tmp_path / "proteins.csv", index=False)


@pytest.mark.slow
def test_without_a_terminal_the_log_has_a_line_per_report(tmp_path):
    done = Copy(CODE, tmp_path / "out", folder=tmp_path).wait()
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stderr.splitlines() if line.startswith("step ")]
    for step, line in enumerate(lines[:3], 1):
        left = r", \d+ s left" if step < 3 else ""
        assert re.fullmatch(rf"step {step} of 3: loss {NUMBER}, [\d,]+ residues/s, memory {SIZE}{left}", line)
    assert re.fullmatch(rf"step 3 of 3: validation: MCC -?{NUMBER}, F1 {NUMBER}, memory {SIZE}", lines[3])
    assert len(lines) == 4
    assert "{" not in done.stdout + done.stderr
    assert "training:" not in done.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("table")
def test_the_command_has_the_same_lines(tmp_path):
    """It lowers the level of transformers' logs, from which transformers concludes that no progress is wanted."""
    done = Copy("import sys; from esm_efficient.cli import main; sys.exit(main())", *COMMAND, folder=tmp_path).wait()
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stderr.splitlines() if line.startswith("step ")]
    assert re.fullmatch(rf"step 20 of 21: loss {NUMBER}, \d.* left", lines[0])
    assert sum("validation: MCC" in line for line in lines) == 1
    assert "{" not in done.stderr


@pytest.mark.slow
def test_disable_tqdm_keeps_the_lines_of_the_trainer(tmp_path):
    done = Copy(CODE, tmp_path / "out", "quiet", folder=tmp_path).wait()
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("'loss'") == 3
    assert "step " not in done.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("table")
@pytest.mark.parametrize(
    ("arguments", "steps"),
    [(["-c", CODE, "out"], 3), (["-m", "esm_efficient", *COMMAND], 21)],
    ids=["python", "command"],
)
def test_in_a_terminal_one_bar_shows_steps_loss_and_validation(tmp_path, arguments, steps):
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 160, 0, 0))
    command = [sys.executable, *arguments]
    run = subprocess.Popen(command, cwd=tmp_path, stderr=child, stdout=subprocess.DEVNULL)
    os.close(child)
    text = ""
    while True:
        try:
            block = os.read(parent, 65536).decode(errors="replace")
        except OSError:  # the other end is closed
            break
        if not block:
            break
        text += block
    assert run.wait() == 0
    last = [part for part in re.split("[\r\n]", text) if part.startswith("training:")][-1]
    assert f"{steps}/{steps}" in last
    assert re.search(r"loss=\d\.\d+", last)
    assert "MCC=" in last
    assert re.search(rf"memory={SIZE}", last)
    if steps == 3:  # on pooled states there are no residues to count
        assert re.search(r"residues/s=[\d,]+", last)
    assert "{'loss'" not in text


def test_every_rank_adds_up_its_residues_and_one_writes(capfd):
    """Adding up is an exchange between the ranks, in which all must take part."""

    class Counting:
        asked = 0
        args = SimpleNamespace(device=torch.device("cpu"))

        @property
        def residues_trained(self):
            self.asked += 1
            return 500 * self.asked

    for is_first in (True, False):
        trainer, state = Counting(), TrainerState(max_steps=10, is_world_process_zero=is_first)
        lines = RunLines(trainer)
        lines.on_train_begin(None, state, None)
        state.global_step = 5
        lines.on_log(None, state, None, logs={"loss": 0.5})
        assert trainer.asked == 2
        assert ("step 5 of 10: loss 0.500" in capfd.readouterr().err) == is_first
