"""Metrics of each task equal counts by hand, and tuned thresholds are the best of all thresholds."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef, roc_auc_score
from transformers import EvalPrediction

from esm_efficient import classification_metrics, compute_metrics_for
from esm_efficient.errors import DataError
from esm_efficient.tasks import Task
from esm_efficient.training.metrics import (
    apply_thresholds,
    confidence_interval,
    multi_label_metrics,
    regression_metrics,
    tune_thresholds,
)


def test_against_counts_by_hand():
    labels = np.array([0, 0, 0, 0, 0, 0, 1, 1, 1, 1])
    right = np.array([1, 1, 1, 1, 1, 0, 1, 1, 1, 0], dtype=bool)
    predicted = np.where(right, labels, 1 - labels)
    logits = np.eye(2)[predicted] * 2.0
    metrics = classification_metrics(labels, logits, ["no", "yes"])
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
    assert classification_metrics(np.array([0, 0, 1]), logits, ["no", "yes"])["auroc"] == 1.0


def test_three_classes_and_an_absent_one():
    logits = np.array([[3.0, 0, 0], [0, 3, 0], [0, -1, 3], [0, 3, 0]])
    metrics = classification_metrics(np.array([0, 1, 2, 1]), logits, ["a", "b", "c"])
    assert metrics["accuracy"] == metrics["auroc"] == metrics["f1_c"] == metrics["f1_macro"] == metrics["mcc_b"] == 1.0
    absent = classification_metrics(np.array([0, 1, 1, 1]), logits, ["a", "b", "c"])
    assert absent["auroc"] == pytest.approx((1 + 2 / 3) / 2)  # of a and of b against the rest
    assert absent["f1_c"] == 0.0
    assert absent["f1_macro"] == pytest.approx((1 + 0.8 + 0) / 3)  # c is predicted once, wrongly
    unseen = classification_metrics(np.array([0, 1, 1, 1]), logits[[0, 1, 0, 1]], ["a", "b", "c"])
    assert unseen["f1_macro"] == pytest.approx((2 / 3 + 0.8) / 2)  # c is neither there nor predicted
    one = classification_metrics(np.array([1, 1, 1, 1]), logits, ["a", "b", "c"])
    assert math.isnan(one["auroc"])


DRAWN = np.random.default_rng(1)


@pytest.mark.parametrize(
    ("labels", "predicted"),
    [
        (DRAWN.integers(0, 4, 200), DRAWN.integers(0, 4, 200)),
        (DRAWN.integers(0, 2, 50), DRAWN.integers(0, 4, 50)),
        (DRAWN.integers(1, 4, 50), DRAWN.integers(0, 2, 50)),
        (np.zeros(9, int), np.zeros(9, int)),
        (np.zeros(9, int), np.full(9, 3)),
        (np.zeros(9, int), np.arange(9) % 4),
        (np.arange(9) % 4, np.full(9, 2)),
        (np.arange(9) % 4, np.arange(9) % 4),
        (np.array([2]), np.array([2])),
    ],
    ids=[
        "all",
        "absent",
        "not predicted",
        "one",
        "one, wrong",
        "one true",
        "one predicted",
        "all right",
        "one example",
    ],
)
@pytest.mark.parametrize("classes", [4, 2])
@pytest.mark.filterwarnings("ignore")
def test_classes_have_exactly_the_scores_of_scikit_learn(labels, predicted, classes):
    labels, predicted, names = labels % classes, predicted % classes, "abcd"[:classes]
    found = classification_metrics(labels, np.eye(classes)[predicted], list(names))
    assert found["accuracy"] == accuracy_score(labels, predicted)
    assert found["mcc"] == matthews_corrcoef(labels, predicted)
    f1 = f1_score(labels, predicted, labels=range(classes), average=None, zero_division=0.0)
    assert [found[f"f1_{name}"] for name in names] == f1.tolist()
    assert found["f1_macro"] == pytest.approx(f1_score(labels, predicted, average="macro", zero_division=0.0))
    for index, name in enumerate(names if classes > 2 else ""):
        assert found[f"mcc_{name}"] == matthews_corrcoef(labels == index, predicted == index)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("shift", [-9.0, 0.0, 9.0], ids=["none predicted", "some predicted", "all predicted"])
@pytest.mark.filterwarnings("ignore")
def test_labels_have_exactly_the_scores_of_scikit_learn(share, shift):
    rng = np.random.default_rng(0)
    labels, logits = (rng.random((60, 3)) < share).astype(float), rng.normal(shift, 1, (60, 3)).round(1)  # with ties
    found, predicted = multi_label_metrics(labels, logits, list("abc")), logits >= 0
    assert found["f1_micro"] == f1_score(labels, predicted, average="micro", zero_division=0.0)
    assert found["f1_macro"] == pytest.approx(f1_score(labels, predicted, average="macro", zero_division=0.0))
    areas = [roc_auc_score(*pair) for pair in zip(labels.T, logits.T, strict=True) if len(set(pair[0])) == 2]
    assert found["auroc"] == pytest.approx(np.mean(areas) if areas else NAN, abs=1e-12, nan_ok=True)
    for index, name in enumerate("abc"):
        pair = labels[:, index], predicted[:, index]
        assert found[f"f1_{name}"] == f1_score(*pair, zero_division=0.0)
        assert found[f"mcc_{name}"] == matthews_corrcoef(*pair)


def test_a_label_that_is_called_macro_does_not_replace_the_mean():
    labels, logits = np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([[1.0, -1.0], [-1.0, -1.0]])
    assert multi_label_metrics(labels, logits, ["macro", "b"])["f1_macro"] == 0.5
    assert classification_metrics(np.array([0, 1]), np.array([[1.0, 0.0]] * 2), ["macro", "b"])["f1_macro"] < 0.5


def test_wrong_shapes_and_logits_that_are_not_finite_are_refused():
    with pytest.raises(DataError, match="one row per label"):
        classification_metrics(np.array([0, 1]), np.zeros((3, 2)), ["no", "yes"])
    with pytest.raises(DataError, match="1 of 2 examples are not finite"):
        classification_metrics(np.array([0, 1]), np.array([[0.0, np.nan], [0.0, 1.0]]), ["no", "yes"])


def test_predictions_may_be_logits_or_a_tuple_that_begins_with_them():
    logits, labels = np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([0, 1])
    compute = compute_metrics_for(["no", "yes"])
    for predictions in (logits, (logits, np.zeros(5))):
        assert compute(EvalPrediction(predictions=predictions, label_ids=labels))["accuracy"] == 1.0


def test_the_interval_is_students():
    assert confidence_interval([0.5]) is None
    assert confidence_interval([0.5, math.nan]) is None
    assert confidence_interval([0.5, 0.5, 0.5]) == (0.5, 0.5)
    low, high = confidence_interval([1.0, 2.0, 3.0, 4.0])
    assert (low, high) == pytest.approx((2.5 - 2.0542, 2.5 + 2.0542), abs=1e-3)  # t = 3.1824, s = 1.2910


NAN = math.nan
LABELS = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 1], [0, 0, 0]], dtype=float)
PREDICTED = np.array([[1, 0, 0], [1, 0, 1], [0, 0, 1], [0, 0, 0]], dtype=float)


def test_several_labels_against_counts_by_hand():
    metrics = multi_label_metrics(LABELS, PREDICTED * 4 - 2, ["a", "b", "c"])
    assert metrics["f1_a"] == metrics["mcc_a"] == 1.0
    assert metrics["f1_b"] == metrics["mcc_b"] == 0.0
    assert metrics["f1_c"] == pytest.approx(2 / 3)
    assert metrics["mcc_c"] == pytest.approx((1 * 2 - 1 * 0) / math.sqrt(2 * 1 * 3 * 2))
    assert metrics["f1_macro"] == pytest.approx((1 + 0 + 2 / 3) / 3)
    assert metrics["f1_micro"] == pytest.approx(2 * 3 / (4 + 4))
    assert metrics["subset_accuracy"] == 0.75
    assert metrics["jaccard"] == pytest.approx((1 + 1 / 3 + 1 + 1) / 4)
    assert metrics["auroc"] == pytest.approx((1 + 0.5 + 5 / 6) / 3)


def test_no_metric_counts_unknown_labels():
    labels = LABELS.copy()
    labels[1, 1:] = NAN, -100  # the two that were wrong
    metrics = multi_label_metrics(labels, PREDICTED * 4 - 2, ["a", "b", "c"])
    assert metrics["f1_micro"] == metrics["subset_accuracy"] == metrics["jaccard"] == metrics["mcc_c"] == 1.0
    assert metrics["auroc"] == 1.0  # b has no known positive example
    assert metrics["f1_b"] == 0.0


def test_the_macro_f1_leaves_out_labels_that_have_no_example_and_are_not_predicted():
    labels, logits = LABELS.copy(), PREDICTED * 4 - 2
    labels[:, 1] = 0
    metrics = multi_label_metrics(labels, logits, ["a", "b", "c"])
    assert metrics["f1_macro"] == pytest.approx((1 + 2 / 3) / 2)
    logits[0, 1] = 2  # b is predicted once, wrongly
    assert multi_label_metrics(labels, logits, ["a", "b", "c"])["f1_macro"] == pytest.approx((1 + 0 + 2 / 3) / 3)
    none = np.zeros_like(labels)
    assert multi_label_metrics(none, none - 2, ["a", "b", "c"])["f1_macro"] == 0


def test_no_metric_counts_examples_without_known_labels():
    labels = np.concatenate([1 - LABELS, np.full_like(LABELS, NAN)])
    logits = np.concatenate([LABELS, LABELS]) * 4 - 2
    metrics = multi_label_metrics(labels, logits, ["a", "b", "c"])
    assert metrics["jaccard"] == metrics["subset_accuracy"] == 0.0
    assert math.isnan(multi_label_metrics(labels[4:], logits[4:], ["a", "b", "c"])["jaccard"])


def test_there_may_be_one_label_only():
    metrics = multi_label_metrics(np.array([[1.0], [1.0]]), np.array([[2.0], [-2.0]]), ["a"])
    assert metrics["jaccard"] == metrics["subset_accuracy"] == 0.5


def test_a_label_is_positive_from_its_threshold_on():
    logits = np.array([[0.0, 0.0], [2.0, -2.0]])
    assert apply_thresholds(logits).tolist() == [[True, True], [True, False]]
    assert apply_thresholds(logits, np.array([0.6, 0.1])).tolist() == [[False, True], [True, True]]
    metrics = multi_label_metrics(np.array([[0, 1], [1, 1]]), logits, ["a", "b"], thresholds=np.array([0.6, 0.1]))
    assert metrics["subset_accuracy"] == 1.0


@given(st.lists(st.tuples(st.integers(-5, 5), st.booleans()), min_size=2, max_size=25))
@settings(max_examples=150, deadline=None)
def test_no_threshold_is_better_than_the_tuned_one(rows):
    logits, labels = np.array([[float(x)] for x, _ in rows]), np.array([[float(positive)] for _, positive in rows])
    (tuned,) = tune_thresholds(labels, logits, ["a"])
    if len(set(labels.ravel())) == 1 or len(set(logits.ravel())) == 1:
        assert tuned == 0.5
        return
    probabilities = 1 / (1 + np.exp(-logits.ravel()))
    between = (np.unique(probabilities)[1:] + np.unique(probabilities)[:-1]) / 2
    best = max(matthews_corrcoef(labels.ravel(), probabilities >= threshold) for threshold in between)
    assert matthews_corrcoef(labels.ravel(), probabilities >= tuned) == pytest.approx(best)


def test_thresholds_ignore_unknown_labels_and_a_label_that_cannot_be_tuned_is_logged(caplog):
    logits = np.array([[3.0, 0.0], [-1.0, 1.0], [-2.0, 2.0]])
    labels = np.array([[NAN, 0.0], [1.0, 0.0], [0.0, 0.0]])
    tuned = tune_thresholds(labels, logits, ["a", "b"])
    assert 1 / (1 + math.exp(2)) < tuned[0] < 1 / (1 + math.exp(1))
    assert tuned[1] == 0.5
    assert "b: no example, or every one" in caplog.text


def test_numbers_against_counts_by_hand():
    predicted, true = np.array([[1.0], [2.0], [4.0], [9.0]]), np.array([2.0, 1.0, 5.0, NAN])
    metrics = regression_metrics(true, predicted, ["stability"])
    assert metrics["spearman"] == pytest.approx(0.5)
    assert metrics["mae"] == metrics["rmse"] == 1.0
    assert metrics["r2"] == pytest.approx(1 - 3 / (14 / 3 + 4))
    assert metrics["pearson"] == pytest.approx(np.corrcoef([1, 2, 4], [2, 1, 5])[0, 1])
    several = regression_metrics(np.array([[1.0, 1.0], [2.0, 2.0]]), np.array([[1.0, 2.0], [2.0, 1.0]]), ["a", "b"])
    assert (several["spearman_a"], several["spearman_b"], several["spearman"]) == pytest.approx((1, -1, 0))
    assert math.isnan(regression_metrics(np.arange(3.0), np.ones(3), ["a"])["spearman"])


def test_the_task_determines_the_metrics():
    tokens = Task("token_classification", ("free", "binding"))
    logits = np.array([[[5.0, 0.0], [0.0, 5.0], [0.0, 5.0]], [[0.0, 5.0], [5.0, 0.0], [-100.0, -100.0]]])
    labels = np.array([[-100, 1, 1], [1, 0, -100]])
    metrics = compute_metrics_for(tokens)(EvalPrediction(predictions=logits, label_ids=labels))
    assert metrics["accuracy"] == metrics["f1_binding"] == 1.0
    several = compute_metrics_for(Task("multi_label_classification", ("a", "b", "c")))
    assert several(EvalPrediction(predictions=PREDICTED * 4 - 2, label_ids=LABELS))["subset_accuracy"] == 0.75
    number = compute_metrics_for(Task("regression", ("label",)))
    assert number(EvalPrediction(predictions=np.arange(3.0)[:, None], label_ids=np.arange(3.0)))["spearman"] == 1.0


def test_shapes_that_do_not_fit_the_labels_are_refused():
    with pytest.raises(DataError, match=r"expected \(examples, 2\)"):
        multi_label_metrics(LABELS, PREDICTED, ["a", "b"])
    with pytest.raises(DataError, match="not finite"):
        multi_label_metrics(LABELS, PREDICTED * NAN, ["a", "b", "c"])
    with pytest.raises(DataError, match=r"expected \(examples, 2\)"):
        tune_thresholds(LABELS, PREDICTED, ["a", "b"])
    with pytest.raises(DataError, match="expected 1 per example"):
        regression_metrics(np.zeros((3, 2)), np.zeros((3, 2)), ["a"])
    with pytest.raises(DataError, match="not finite"):
        regression_metrics(np.zeros(3), np.full(3, NAN), ["a"])


# For each task: logits, labels of which some or all are unknown, and the metrics of the known part (None: all are NaN).
KINDS = {
    "classes": Task("single_label_classification", ("a", "b", "c")),
    "tokens": Task("token_classification", ("a", "b", "c")),
    "several": Task("multi_label_classification", ("a", "b", "c")),
    "number": Task("regression", ("y",)),
    "numbers": Task("regression", ("x", "y", "z")),
}
ROWS = np.random.default_rng(0).normal(size=(12, 3))
CLASS_LABELS = np.array([0, 1, 2, 0, 1, 2, 1, 2, 0, 1, 2, 0])


def predicted(kind, logits, labels):
    return compute_metrics_for(KINDS[kind])(EvalPrediction(predictions=logits, label_ids=labels))


@pytest.mark.parametrize("known", [12, 5, 1, 0])
@pytest.mark.parametrize("kind", KINDS)
def test_metrics_are_those_of_the_known_labels_alone(kind, known, caplog):
    if kind in ("classes", "tokens"):
        logits, labels, unknown = ROWS, CLASS_LABELS, -100
    elif kind == "several":
        logits, labels, unknown = ROWS, (ROWS[::-1] > 0.2).astype(float), NAN
    else:
        columns = slice(0, 1 if kind == "number" else 3)
        logits, labels, unknown = ROWS[:, columns], ROWS[::-1, columns].copy(), NAN
    some = labels.copy()
    some[known:] = unknown
    as_tokens = (lambda values: values[None]) if kind == "tokens" else (lambda values: values)
    found = predicted(kind, as_tokens(logits), as_tokens(some))
    expected = predicted(kind, as_tokens(logits[:known]), as_tokens(labels[:known]))
    assert found == pytest.approx(expected, nan_ok=True)
    assert found.keys() == predicted(kind, as_tokens(logits), as_tokens(labels)).keys()
    assert all(math.isnan(value) for value in found.values()) == (known == 0)
    assert ("no label of the evaluated examples is known" in caplog.text) == (known == 0)


def test_means_leave_out_what_is_always_unknown():
    labels = ROWS[::-1].copy()
    labels[:, 1] = NAN
    found = predicted("numbers", ROWS, labels)
    assert math.isnan(found["spearman_y"])
    assert found["spearman"] == pytest.approx((found["spearman_x"] + found["spearman_z"]) / 2)
    several = (labels > 0).astype(float)
    several[:, 1] = NAN
    found = predicted("several", ROWS, several)
    assert math.isnan(found["f1_b"])
    assert math.isnan(found["mcc_b"])
    assert found["f1_macro"] == pytest.approx((found["f1_a"] + found["f1_c"]) / 2)
    assert predicted("number", np.array([[1.0], [2.0]]), np.array([3.0, NAN]))["rmse"] == 2.0


def test_labels_that_are_no_class_or_infinite_are_refused():
    with pytest.raises(DataError, match=r"labels \[3, 7\] are not class ids: expected 0 to 2 \(a, b, c\)"):
        predicted("classes", ROWS, np.array([7, 3] * 6))
    with pytest.raises(DataError, match="1 of 12 labels are infinite"):
        predicted("number", ROWS[:, :1], np.array([math.inf] + [0.0] * 11))
