"""The metric definitions of the job match real log lines, and the memory line reports the GPUs of all ranks."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import make_dataset, make_model
from transformers import DataCollatorWithPadding

from esm_efficient import WeightedTrainer, compute_metrics_for, recipe_arguments

SCRIPTS = Path(__file__).resolve().parents[3] / "examples" / "sagemaker"
TUTORIAL_METRICS = {"epoch", "max_gpu_mem", "train_loss", "train_samples_per_second", "eval_loss", "eval_accuracy"}
LOG_OF_TRANSFORMERS_4 = """
{'loss': 0.6931, 'learning_rate': 5e-05, 'epoch': 0.5}
{'eval_loss': 6.1e-05, 'eval_accuracy': 0.91, 'epoch': 1.0}
{'train_runtime': 12.3, 'train_samples_per_second': 17.09, 'epoch': 1.0}
Max GPU memory use during training: 3296 MB
"""


@pytest.fixture
def job_metrics(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    import job_metrics

    return job_metrics


@pytest.fixture
def train(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    import train

    return train


def values_in(log, job_metrics):
    """The values of each metric that occurs in a log."""
    values = {d["Name"]: re.findall(d["Regex"], log) for d in job_metrics.METRIC_DEFINITIONS}
    return {name: texts for name, texts in values.items() if texts}


def test_the_six_metrics_of_the_tutorial_are_found_in_a_real_log(job_metrics, tokenizer, tmp_path, capsys):
    args = recipe_arguments(
        "base", tmp_path, max_steps=6, logging_steps=2, disable_tqdm=True, eval_strategy="steps", eval_steps=3
    )
    trainer = WeightedTrainer(
        make_model(),
        args,
        train_dataset=make_dataset(64),
        eval_dataset=make_dataset(16, seed=1),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=compute_metrics_for(["no", "yes"]),
    )
    trainer.train()
    print(job_metrics.memory_line(3296 * 2**20 + 5))
    values = values_in(capsys.readouterr().out, job_metrics)
    assert set(values) == TUTORIAL_METRICS
    history = trainer.state.log_history
    accuracies = [entry["eval_accuracy"] for entry in history if "eval_accuracy" in entry]
    assert [float(value) for value in values["eval_accuracy"]] == pytest.approx(accuracies, rel=1e-3)
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert [float(value) for value in values["train_loss"]] == pytest.approx(losses, rel=1e-3)
    assert len(losses) == 3
    assert len(values["eval_loss"]) == len(accuracies) == 2
    assert len(values["train_samples_per_second"]) == 1
    assert len(values["epoch"]) >= 6
    assert values["max_gpu_mem"] == ["3296"]


def test_the_six_metrics_are_found_in_a_log_of_transformers_4(job_metrics):
    assert values_in(LOG_OF_TRANSFORMERS_4, job_metrics) == {
        "epoch": ["0.5", "1.0", "1.0"],
        "max_gpu_mem": ["3296"],
        "train_loss": ["0.6931"],
        "train_samples_per_second": ["17.09"],
        "eval_loss": ["6.1e-05"],
        "eval_accuracy": ["0.91"],
    }


@pytest.mark.parametrize(
    ("device", "driver_bytes", "used"), [("cuda:0", 5 * 2**30, 5 * 2**30), ("cpu", None, 0), ("mps", 2**30, 0)]
)
def test_the_memory_line_counts_cuda_devices_only(train, device, driver_bytes, used):
    profile = SimpleNamespace(device=device, driver_bytes=driver_bytes)
    assert train.gpu_bytes_used(SimpleNamespace(profile=profile)) == used


def test_the_memory_line_adds_the_gpus_of_all_ranks(train, monkeypatch):
    monkeypatch.setattr(train, "gather_object", lambda values: [*values, 3 * 2**30])
    profile = SimpleNamespace(device="cuda:0", driver_bytes=2**30)
    assert train.gpu_bytes_used(SimpleNamespace(profile=profile)) == 4 * 2**30
