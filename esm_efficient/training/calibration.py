"""Temperature scaling: make probabilities come true as often as they say, without changing a class."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from esm_efficient.tasks import IGNORE, Task
from esm_efficient.training.metrics import logits_of
from esm_efficient.training.standardizing import find_output_layer

if TYPE_CHECKING:
    from transformers.trainer_utils import PredictionOutput

logger = logging.getLogger(__name__)

MIN_EXAMPLES = 100
"""Validation examples with a known label below which no temperature is fitted."""
_RANGE = (0.05, 20.0)


def fit_temperature(task: Task, labels: np.ndarray, logits: np.ndarray) -> float | None:
    """Return the temperature by which logits are divided so that the labels are most likely.

    Guo et al. (2017), "On calibration of modern neural networks". One number for all classes: the order of the classes,
    and so every predicted class, stays the same. With several labels per sequence it is one number for all labels.
    The labels are smoothed as Platt (1999) does: of n known labels each counts as right with probability
    (n + 1) / (n + classes), and as every other class with 1 / (n + classes). A model that is right about all of them
    then claims no more than n examples can show.

    Args:
        task: the task.
        labels: class ids of shape (examples,) or (sequences, residues), -100 if unknown; or floats of shape (sequences,
            labels), NaN if unknown.
        logits: logits of examples that the model was not trained on, of shape (examples, classes), (sequences,
            residues, classes) or (sequences, labels).

    Returns:
        The temperature, from 0.05 to 20; None for numbers, and with less than 100 known labels.

    Example:
        >>> task = Task("single_label_classification", ("no", "yes"))
        >>> labels = np.arange(400) % 4 == 0  # a quarter is wrong, but the logits claim 2 %
        >>> logits = np.tile([4.0, 0.0], (400, 1))
        >>> round(fit_temperature(task, labels.astype(int), logits), 2)
        3.66
    """
    from scipy.optimize import minimize_scalar

    if task.kind == "regression":
        return None
    known, scores = _known(task, np.asarray(labels), np.asarray(logits, dtype=np.float64))
    if len(known) < MIN_EXAMPLES:
        return None

    several = task.kind == "multi_label_classification"
    other = 1 / (len(known) + (2 if several else scores.shape[1]))

    def loss(log_temperature: float) -> float:
        z = scores / np.exp(log_temperature)
        if several:
            return float(np.mean(np.logaddexp(0, z) - (other + (1 - 2 * other) * known) * z))
        right = z[np.arange(len(z)), known]
        smoothed = other * z.sum(axis=1) + (1 - other * z.shape[1]) * right
        return float(np.mean(np.logaddexp.reduce(z, axis=1) - smoothed))

    found = minimize_scalar(loss, bounds=np.log(_RANGE), method="bounded", options={"xatol": 1e-9})
    return float(np.exp(found.x))


def calibrate(
    trainer: Any, splits: Mapping[str, Any], task: Task, tokenizer: Any
) -> tuple[float | None, PredictionOutput | None]:
    """Fit a temperature on ``validation``, and divide the logits of a Trainer's model by it.

    It is done where there is a test split too, so that no metric is measured on the examples of the fit.

    Args:
        trainer: the Trainer; its model's last layer is changed in place, so that plain transformers predicts calibrated
            probabilities.
        splits: tokenised splits by name.
        task: the task.
        tokenizer: the tokenizer of the model.

    Returns:
        A pair. The temperature; None if there is no validation and test split with 100 known labels, if the task is to
        predict numbers, if the model is sharded, or if its last layer is not linear with a bias. The labels of
        validation with what the changed model predicts for them; None if nothing was predicted.
    """
    sharded = trainer.args.fsdp or trainer.args.deepspeed
    if task.kind == "regression" or sharded or not {"validation", "test"} <= set(splits):
        return None, None
    layer = find_output_layer(trainer.accelerator.unwrap_model(trainer.model), tokenizer)
    if layer is None:
        return None, None
    found = trainer.predict(splits["validation"], metric_key_prefix="validation")
    logits = logits_of(found.predictions)
    temperature = fit_temperature(task, np.asarray(found.label_ids), logits)
    if temperature is None:
        return None, found
    scale_logits(layer, temperature)
    logger.info("probabilities are calibrated on validation: logits are divided by %.3f", temperature)
    return temperature, found._replace(predictions=logits / temperature)


def scale_logits(layer: nn.Linear, temperature: float) -> None:
    """Divide what a layer computes by a temperature, in its weights; plain transformers then gives the same numbers."""
    layer.weight.data /= temperature
    layer.bias.data /= temperature


def _known(task: Task, labels: np.ndarray, logits: np.ndarray) -> tuple[np.ndarray, Any]:
    """Return known labels, and their logits: of shape (known,) with several labels, else (known, classes)."""
    if task.kind == "multi_label_classification":
        is_known = ~np.isnan(labels.astype(np.float64)) & (labels != IGNORE)
        return labels[is_known].astype(np.float64), logits[is_known]
    flat, rows = labels.reshape(-1), logits.reshape(-1, logits.shape[-1])
    return flat[flat != IGNORE].astype(int), rows[flat != IGNORE]
