"""Fine-tune a model on a dataset: weights, losses, trainer, audit, metrics, checkpoints, export."""

from esm_efficient.training.audit import AuditCallback, AuditReport
from esm_efficient.training.metrics import (
    apply_thresholds,
    classification_metrics,
    compute_metrics_for,
    multi_label_metrics,
    regression_metrics,
    tune_thresholds,
)
from esm_efficient.training.trainer import WeightedTrainer
from esm_efficient.training.weights import balanced_class_weights

__all__ = [
    "AuditCallback",
    "AuditReport",
    "WeightedTrainer",
    "apply_thresholds",
    "balanced_class_weights",
    "classification_metrics",
    "compute_metrics_for",
    "multi_label_metrics",
    "regression_metrics",
    "tune_thresholds",
]
