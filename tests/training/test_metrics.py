from __future__ import annotations

import math

import numpy as np
import pytest
from transformers import EvalPrediction

from esm_efficient import classification_metrics, compute_metrics_for
from esm_efficient.errors import DataError
from esm_efficient.training.metrics import confidence_interval


def test_against_counts_by_hand():
    labels = np.array([0, 0, 0, 0, 0, 0, 1, 1, 1, 1])
    right = np.array([1, 1, 1, 1, 1, 0, 1, 1, 1, 0], dtype=bool)
    predicted = np.where(right, labels, 1 - labels)
    logits = np.eye(2)[predicted] * 2.0
    metrics = classification_metrics(logits, labels, ["no", "yes"])
    tp, tn, fp, fn = 3, 5, 1, 1
    assert metrics["accuracy"] == pytest.approx(0.8)
    assert metrics["mcc"] == pytest.approx(
        (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    )
    assert metrics["f1_yes"] == pytest.approx(2 * tp / (2 * tp + fp + fn))
    assert metrics["f1_no"] == pytest.approx(2 * tn / (2 * tn + fp + fn))
    assert metrics["auroc"] == pytest.approx((tp / 4 + tn / 6) / 2)
    assert metrics["majority_accuracy"] == pytest.approx(0.6)


def test_auroc_ranks_confident_logits_that_a_softmax_would_round_together():
    logits = np.array([[0.0, 40.0], [0.0, 60.0], [0.0, 80.0]])
    assert classification_metrics(logits, np.array([0, 0, 1]), ["no", "yes"])["auroc"] == 1.0


def test_three_classes_and_an_absent_one():
    logits = np.eye(3)[[0, 1, 2, 1]] * 3.0
    metrics = classification_metrics(logits, np.array([0, 1, 2, 1]), ["a", "b", "c"])
    assert metrics["accuracy"] == metrics["auroc"] == metrics["f1_c"] == 1.0
    absent = classification_metrics(logits, np.array([0, 1, 1, 1]), ["a", "b", "c"])
    assert math.isnan(absent["auroc"])
    assert absent["f1_c"] == 0.0


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(DataError, match="one row a label"):
        classification_metrics(np.zeros((3, 2)), np.array([0, 1]), ["no", "yes"])
    with pytest.raises(DataError, match="1 of 2 examples are not finite"):
        classification_metrics(np.array([[0.0, np.nan], [0.0, 1.0]]), np.array([0, 1]), ["no", "yes"])


def test_a_trainers_predictions_are_taken_alone_or_first_of_a_tuple():
    logits, labels = np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([0, 1])
    compute = compute_metrics_for(["no", "yes"])
    for predictions in (logits, (logits, np.zeros(5))):
        assert compute(EvalPrediction(predictions=predictions, label_ids=labels))["accuracy"] == 1.0


def test_an_interval_is_that_of_student():
    assert confidence_interval([0.5]) is None
    low, high = confidence_interval([1.0, 2.0, 3.0, 4.0])
    assert (low, high) == pytest.approx((2.5 - 2.0542, 2.5 + 2.0542), abs=1e-3)  # t = 3.1824, s = 1.2910
