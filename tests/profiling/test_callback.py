"""ProfilerCallback: what a Trainer's run prints and hands to trackers, on one rank and on two."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_dataset, make_model
from transformers import DataCollatorWithPadding, Trainer, TrainerCallback, TrainingArguments

from esm_efficient import ProfilerCallback, WeightedTrainer, recipe_arguments
from esm_efficient.costs.memory import CATEGORIES, OutOfMemoryError
from esm_efficient.errors import ConfigurationError
from esm_efficient.profiling.callback import METRIC_DEFINITIONS
from esm_efficient.training.metrics import compute_metrics_for


class Tracker(TrainerCallback):
    """Stands where Trainer puts the callbacks of trackers: before the user's own."""

    def __init__(self):
        self.logged = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logged.append(dict(logs))


def make_trainer(kind, tokenizer, folder, **options):
    tracker = Tracker()
    args = recipe_arguments("base", folder, max_steps=6, logging_steps=2, disable_tqdm=True, **options)
    trainer = kind(
        make_model(),
        args,
        train_dataset=make_dataset(64),
        eval_dataset=make_dataset(16, seed=1),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=compute_metrics_for(["no", "yes"]),
        callbacks=[tracker],
    )
    return trainer, tracker


@pytest.mark.parametrize("kind", [Trainer, WeightedTrainer])
def test_any_trainer_hands_the_figures_to_its_trackers(kind, tokenizer, tmp_path):
    trainer, tracker = make_trainer(kind, tokenizer, tmp_path, eval_strategy="steps", eval_steps=3)
    profiler = ProfilerCallback(trainer, compare_with_matmul=False)
    trainer.train()
    final = [logs for logs in tracker.logged if "profile/peak_bytes" in logs]
    assert len(final) == 3  # twice on the way, once at the end
    report = profiler.report
    assert final[-1]["profile/peak_bytes"] == report.peak.total
    assert sum(final[-1][f"profile/peak_{category}_bytes"] for category in CATEGORIES) == report.peak.total
    assert final[-1]["profile/residues_per_second"] == pytest.approx(report.residues_per_second)
    assert set(report.phases) == {"data", "forward", "backward", "optimizer", "evaluation"}
    assert report.steps == 6
    assert any("profile/peak_bytes" in entry for entry in trainer.state.log_history)


def test_accumulated_micro_batches_make_one_step(tokenizer, tmp_path):
    trainer, _ = make_trainer(
        WeightedTrainer, tokenizer, tmp_path, gradient_accumulation_steps=4, per_device_train_batch_size=2
    )
    profiler = ProfilerCallback(trainer, warmup_steps=1)
    trainer.train()
    assert profiler.report.steps == 6
    trained = sum(f.seconds for name, f in profiler.report.phases.items() if name != "evaluation")
    assert profiler.report.samples_per_second * trained == pytest.approx(5 * 8)
    assert profiler.report.phases["forward"].peak.gradients > 0


LOG_OF_TRANSFORMERS_4 = """
{'loss': 0.6931, 'learning_rate': 5e-05, 'epoch': 0.5}
{'eval_loss': 6.1e-05, 'eval_accuracy': 0.91, 'epoch': 1.0}
{'train_runtime': 12.3, 'train_samples_per_second': 17.09, 'epoch': 1.0}
Max GPU memory use during training: 3296 MB
"""


def found_in(log):
    return {d["Name"]: re.findall(d["Regex"], log) for d in METRIC_DEFINITIONS}


def test_the_six_metrics_are_found_in_a_real_log(tokenizer, tmp_path, capsys):
    trainer, _ = make_trainer(WeightedTrainer, tokenizer, tmp_path, eval_strategy="steps", eval_steps=3)
    ProfilerCallback(trainer)
    trainer.train()
    log = capsys.readouterr().out
    found = found_in(log)
    assert set(found) == {
        "epoch",
        "max_gpu_mem",
        "train_loss",
        "train_samples_per_second",
        "eval_loss",
        "eval_accuracy",
    }
    history = trainer.state.log_history
    expected = [entry["eval_accuracy"] for entry in history if "eval_accuracy" in entry]
    assert [float(value) for value in found["eval_accuracy"]] == pytest.approx(expected, rel=1e-3)
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert [float(value) for value in found["train_loss"]] == pytest.approx(losses, rel=1e-3)
    assert len(losses) == 3  # every second step: the profiler's own figures are logged beside them
    assert all(found.values())
    assert len(found["eval_loss"]) == len(expected) == 2
    assert len(found["train_samples_per_second"]) == 1
    assert len(found["epoch"]) >= 6
    used = torch.cuda.device_memory_used() // 2**20 if torch.cuda.is_available() else 0
    assert [float(value) for value in found["max_gpu_mem"]] == [used]


def test_the_six_metrics_are_found_in_a_log_of_transformers_4():
    assert found_in(LOG_OF_TRANSFORMERS_4) == {
        "epoch": ["0.5", "1.0", "1.0"],
        "max_gpu_mem": ["3296"],
        "train_loss": ["0.6931"],
        "train_samples_per_second": ["17.09"],
        "eval_loss": ["6.1e-05"],
        "eval_accuracy": ["0.91"],
    }


def test_a_run_that_fails_leaves_nothing_installed(tokenizer, tmp_path):
    trainer, _ = make_trainer(WeightedTrainer, tokenizer, tmp_path)
    profiler = ProfilerCallback(trainer)

    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    hook = trainer.model.esm.encoder.layer[1].register_forward_pre_hook(fail)
    with pytest.raises(OutOfMemoryError, match="out of memory in the phase 'forward'") as caught:
        trainer.train()
    assert caught.value.held["weights"] > 0
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
    hook.remove()
    assert not any(module._forward_pre_hooks for module in trainer.model.modules())
    trainer.train()
    assert profiler.report.steps == 6


def test_a_run_that_is_given_up_and_begun_again_is_profiled_anew(tokenizer, tmp_path):
    trainer, _ = make_trainer(WeightedTrainer, tokenizer, tmp_path)
    profiler = ProfilerCallback(trainer)
    optimizer = torch.optim.AdamW(trainer.model.parameters())
    profiler.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model, optimizer=optimizer)
    trainer.train()
    assert profiler.report.steps == 6
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
    assert not any(module._forward_pre_hooks for module in trainer.model.modules())


def test_a_trainer_is_profiled_once(tokenizer, tmp_path):
    trainer, _ = make_trainer(WeightedTrainer, tokenizer, tmp_path)
    ProfilerCallback(trainer)
    with pytest.raises(ConfigurationError, match="already"):
        ProfilerCallback(trainer)


def test_two_ranks_are_reported_one_by_one_and_summed(tmp_path):
    script = Path(__file__).with_name("profiled_ranks.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29541"]
    run = subprocess.run([*command, str(script), str(tmp_path)], capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr[-3000:]
    record = json.loads((tmp_path / "ranks.json").read_text())
    assert [rank["rank"] for rank in record["ranks"]] == [0, 1]
    peaks = [rank["peak_bytes"] for rank in record["ranks"]]
    assert record["sum"]["peak_bytes"] == sum(peaks)
    assert min(peaks) > 0
    rates = [rank["residues_per_second"] for rank in record["ranks"]]
    assert record["sum"]["residues_per_second"] == pytest.approx(sum(rates))
    assert run.stdout.count("Max GPU memory use during training") == 1


def test_training_arguments_of_plain_transformers_do(tokenizer, tmp_path):
    args = TrainingArguments(str(tmp_path), max_steps=2, report_to="none", use_cpu=True, disable_tqdm=True)
    collator = DataCollatorWithPadding(tokenizer)
    trainer = Trainer(make_model(), args, train_dataset=make_dataset(32), data_collator=collator)
    profiler = ProfilerCallback(trainer)
    trainer.train()
    assert profiler.report.phases["backward"].peak.total > 0
