"""Metrics that SageMaker reads from the log of the training job."""

from __future__ import annotations

NUMBER = r"'?([0-9.e+-]+)"
"""A number in the Trainer's log lines.

transformers 5 logs ``'loss': '0.69'`` and version 4 logged ``'loss': 0.69``. The patterns of the AWS tutorial
"Efficiently fine-tune the ESM-2 protein language model with Amazon SageMaker" have no quote and match only the latter.
"""
METRIC_DEFINITIONS: tuple[dict[str, str], ...] = (
    # The first six are the tutorial's.
    {"Name": "epoch", "Regex": r"'epoch': '?([0-9.]+)"},
    {"Name": "max_gpu_mem", "Regex": r"Max GPU memory use during training: ([0-9.e+-]+) MB"},
    {"Name": "train_loss", "Regex": f"'loss': {NUMBER}"},
    {"Name": "train_samples_per_second", "Regex": f"'train_samples_per_second': {NUMBER}"},
    {"Name": "eval_loss", "Regex": f"'eval_loss': {NUMBER}"},
    {"Name": "eval_accuracy", "Regex": f"'eval_accuracy': {NUMBER}"},
    {"Name": "test_accuracy", "Regex": f"'test_accuracy': {NUMBER}"},
    {"Name": "test_mcc", "Regex": f"'test_mcc': {NUMBER}"},
)
"""Metrics of the job by name and pattern, as SageMaker's metric definitions."""


def memory_line(used_bytes: int) -> str:
    """Return the log line that ``max_gpu_mem`` reads, in MiB, although the tutorial's line says MB."""
    return f"Max GPU memory use during training: {used_bytes // 2**20} MB"
