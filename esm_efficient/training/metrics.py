"""Metrics of each task, and the confidence interval of a mean.

Metrics of classes and labels come from counts of all of them at once, since scikit-learn's functions, called for each
label in each draw of a bootstrap, would take minutes. F1 and MCC are exactly those of scikit-learn.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from esm_efficient.errors import DataError
from esm_efficient.tasks import IGNORE, Task
from esm_efficient.training.number_metrics import number_metrics

if TYPE_CHECKING:
    from transformers import EvalPrediction

logger = logging.getLogger(__name__)


def logits_of(outputs: Any) -> np.ndarray:
    """Return the logits of what a Trainer predicted: a model with further outputs, such as states, gives a tuple."""
    return np.asarray(outputs[0] if isinstance(outputs, tuple) else outputs)


def classification_metrics(y_true: np.ndarray, y_score: np.ndarray, label_names: Sequence[str]) -> dict[str, float]:
    """Return accuracy, MCC, AUROC and F1 of each class, and the accuracy of always predicting the most frequent class.

    Args:
        y_true: class ids of shape (examples,); -100 if unknown. No metric counts unknown ones.
        y_score: logits, float of shape (examples, classes).
        label_names: names of the classes in the order of their ids.

    Returns:
        ``accuracy`` (with one class per example, this is also the micro-averaged F1), ``mcc``, ``auroc`` (with more
        than two classes the mean of each class that has examples against the rest; NaN if all examples are of one
        class), ``f1_<name>`` of each class, ``f1_macro`` (the mean over the classes that have examples or are
        predicted, as in scikit-learn), with more than two classes ``mcc_<name>`` of each against the rest, and
        ``majority_accuracy``. Each is NaN, with a warning, if no class is known.

    Raises:
        DataError: the shapes do not fit, a label is not a class id, or the logits are not finite.

    Example:
        >>> import numpy as np
        >>> logits = np.array([[2.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 3.0]])
        >>> metrics = classification_metrics(np.array([0, 1, 1, 1]), logits, ["no", "yes"])
        >>> metrics["accuracy"], round(metrics["mcc"], 3), metrics["auroc"]
        (0.75, 0.577, 1.0)
    """
    classes = np.arange(len(label_names))
    if y_score.shape != (len(y_true), len(classes)):
        raise DataError(
            f"logits have shape {y_score.shape}: expected {(len(y_true), len(classes))}, one row per label and one "
            f"column for each of {', '.join(label_names)}"
        )
    _check_finite(y_score)
    y_true, y_score = y_true[y_true != IGNORE], y_score[y_true != IGNORE]
    if unknown := sorted(set(y_true.tolist()) - set(classes.tolist())):
        raise DataError(
            f"labels {unknown[:5]} are not class ids: expected 0 to {len(classes) - 1} ({', '.join(label_names)}), or "
            f"{IGNORE} for an unknown one"
        )
    each = [
        f"{metric}_{name}" for metric in ("f1", "mcc") for name in label_names if metric == "f1" or len(classes) > 2
    ]
    if not len(y_true):
        return _undefined(["accuracy", "mcc", "auroc", *each, "f1_macro", "majority_accuracy"])
    y_true, y_pred = y_true.astype(int), y_score.argmax(axis=1)
    counted = (y_true[y_true == y_pred], y_true, y_pred)
    right, true, predicted = (np.bincount(ids, minlength=len(classes)) for ids in counted)
    if true.max() == len(y_true):
        auroc = float("nan")
    elif len(classes) == 2:
        auroc = _auroc(y_true == 1, y_score[:, 1].astype(np.float64) - y_score[:, 0])
    else:
        probabilities = np.exp(y_score.astype(np.float64) - y_score.max(axis=1, keepdims=True))
        probabilities /= probabilities.sum(axis=1, keepdims=True)
        auroc = statistics.fmean(_auroc(y_true == index, probabilities[:, index]) for index in np.flatnonzero(true))
    f1 = _f1(right, true, predicted)
    return {
        "accuracy": float(right.sum() / len(y_true)),
        "mcc": float(_mcc(right.sum(), true @ predicted, predicted @ predicted, true @ true, len(y_true))),
        "auroc": auroc,
        **{f"f1_{name}": float(value) for name, value in zip(label_names, f1, strict=True)},
        "f1_macro": float(f1[(true > 0) | (predicted > 0)].mean()),
        **(_mcc_of_each(label_names, right, true, predicted, len(y_true)) if len(classes) > 2 else {}),
        "majority_accuracy": float(true.max() / len(y_true)),
    }


def multi_label_metrics(
    y_true: np.ndarray, y_score: np.ndarray, label_names: Sequence[str], *, thresholds: np.ndarray | None = None
) -> dict[str, float]:
    """Return the metrics of several labels per example, for each label and for all together.

    Args:
        y_true: 0 or 1, of shape (examples, labels); NaN or -100 if unknown. No metric counts unknown labels.
        y_score: logits, float of the same shape.
        label_names: names of the labels in their order.
        thresholds: probability from which each label is positive, of shape (labels,); 0.5 if None.

    Returns:
        ``f1_micro``, ``f1_macro`` (the mean over the labels that have positive examples or are predicted; 0 without
        one), ``jaccard`` (mean over examples of true positives / labels that are positive in truth or in prediction; 1
        if there are none), ``subset_accuracy`` (share of examples with all known labels right), ``auroc`` (mean over
        the labels with positive and negative examples), and ``mcc_<name>`` and ``f1_<name>`` of each label. Those of a
        label that is always unknown are NaN, and no mean counts them. If all labels are unknown, each is NaN, with a
        warning.

    Raises:
        DataError: the shapes do not fit, or the logits are not finite.

    Example:
        >>> metrics = multi_label_metrics(np.array([[1, 0], [0, 1]]), np.array([[2.0, -1.0], [1.0, 3.0]]), ["a", "b"])
        >>> metrics["subset_accuracy"], metrics["jaccard"], round(metrics["f1_micro"], 3)
        (0.5, 0.75, 0.8)
    """
    known = _known_labels(y_true, y_score, label_names)
    if not known.any():
        each_name = [f"{metric}_{name}" for metric in ("mcc", "f1") for name in label_names]
        return _undefined(["f1_micro", "f1_macro", "jaccard", "subset_accuracy", "auroc", *each_name])
    true = np.where(known, y_true, 0).round() == 1
    predicted = apply_thresholds(y_score, thresholds) & known
    right, positive, found = (table.sum(axis=0) for table in (true & predicted, true, predicted))
    is_known = known.any(axis=0)
    f1 = np.where(is_known, _f1(right, positive, found), np.nan)
    mcc = _mcc_of_each(label_names, right, positive, found, known.sum(axis=0))
    areas = [
        _auroc(true[rows, index], y_score[rows, index])
        for index, rows in enumerate(known.T)
        if 0 < positive[index] < rows.sum()
    ]
    counted = known.any(axis=1)
    common, union = (true & predicted).sum(axis=1)[counted], (true | predicted).sum(axis=1)[counted]
    shown = (positive > 0) | (found > 0)
    overall = {
        "f1_micro": float(_f1(right.sum(), positive.sum(), found.sum())),
        "f1_macro": float(f1[shown].mean()) if shown.any() else 0.0,
        "jaccard": float(np.where(union, common / np.maximum(union, 1), 1.0).mean()),
        "subset_accuracy": float((true == predicted).all(axis=1)[counted].mean()),
        "auroc": statistics.fmean(areas) if areas else float("nan"),
    }
    each = {f"f1_{name}": float(value) for name, value in zip(label_names, f1, strict=True)}
    # A label that is called macro does not replace the mean.
    return overall | mcc | each | overall


def regression_metrics(y_true: np.ndarray, y_pred: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """Return errors of predicted numbers, and their correlation with the true ones.

    Args:
        y_true: float of shape (examples, numbers), or (examples,) for one; NaN if unknown. No metric counts unknown
            numbers.
        y_pred: float of the same shape.
        names: names of the numbers in their order.

    Returns:
        ``spearman``, ``pearson``, ``rmse``, ``mae`` and ``r2``, with several numbers their means, and
        ``spearman_<name>`` for each. A correlation with a constant is NaN. The means leave out a number that is always
        unknown; if all are, each is NaN, with a warning.

    Raises:
        DataError: the shapes do not fit, a number is infinite, or the predictions are not finite.

    Example:
        >>> regression_metrics(np.array([1.0, 3.0, 9.0]), np.array([1.0, 2.0, 4.0]), ["stability"])["spearman"]
        1.0
    """
    true, predicted = (v.reshape(len(v), -1) if v.size else v.reshape(0, len(names)) for v in (y_true, y_pred))
    if predicted.shape != true.shape or predicted.shape[1] != len(names):
        raise DataError(
            f"predictions have shape {y_pred.shape} and labels {y_true.shape}: expected {len(names)} per example"
        )
    _check_finite(predicted)
    if infinite := int(np.isinf(true).any(axis=1).sum()):
        raise DataError(f"{infinite} of {len(true)} labels are infinite: expected numbers, or NaN for unknown ones")
    each, known = number_metrics(true, predicted), ~np.isnan(true).all(axis=0)
    spearman = {f"spearman_{name}": float(value) for name, value in zip(names, each["spearman"], strict=True)}
    if not len(true) or not known.any():
        return _undefined([*each, *(spearman if len(names) > 1 else ())])
    result = {key: statistics.fmean(values[known].tolist()) for key, values in each.items()}
    return result | (spearman if len(names) > 1 else {})


def apply_thresholds(y_score: np.ndarray, thresholds: np.ndarray | None = None) -> np.ndarray:
    """Threshold logits into a boolean label matrix.

    Args:
        y_score: logits, float of shape (examples, labels).
        thresholds: probability from which each label is positive, of shape (labels,); 0.5 if None.

    Returns:
        bool of shape (examples, labels), True for a positive label.

    Example:
        >>> apply_thresholds(np.array([[0.1, 0.1]]), np.array([0.5, 0.6])).tolist()
        [[True, False]]
    """
    return _sigmoid(y_score) >= (0.5 if thresholds is None else np.asarray(thresholds))


def tune_thresholds(y_true: np.ndarray, y_score: np.ndarray, label_names: Sequence[str]) -> np.ndarray:
    """Return the threshold of each label with the highest MCC, as DeepLoc 2.0 chooses them.

    Use examples of neither the training nor the test set. Among equally good thresholds the middle one is chosen.

    Args:
        y_true: 0 or 1, of shape (examples, labels); NaN or -100 if unknown.
        y_score: logits, float of the same shape.
        label_names: names of the labels in their order.

    Returns:
        float64 of shape (labels,), in probabilities; 0.5, with a warning, for a label with only positive or only
        negative examples.

    Raises:
        DataError: the shapes do not fit, or the logits are not finite.

    Example:
        >>> tune_thresholds(np.array([[0], [1], [1]]), np.array([[-2.0], [-1.0], [0.5]]), ["a"]).round(2).tolist()
        [0.19]
    """
    known = _known_labels(y_true, y_score, label_names)
    probabilities = _sigmoid(y_score)
    thresholds = np.full(len(label_names), 0.5)
    for index, name in enumerate(label_names):
        rows = known[:, index]
        probability, true = probabilities[rows, index], y_true[rows, index].round() == 1
        if not true.any() or true.all():
            logger.warning("%s: no example, or every one, has the label: its threshold stays at 0.5", name)
            continue
        # A cut lies between two neighbours in the order of their probability; the examples above it are positive.
        order = np.argsort(probability, kind="stable")
        probability, true = probability[order], true[order]
        cuts = np.flatnonzero(np.diff(probability) > 0) + 1
        if not len(cuts):
            continue
        false_negatives, positives = np.cumsum(true)[cuts - 1].astype(float), float(true.sum())
        true_positives, above = positives - false_negatives, (len(true) - cuts).astype(float)
        n = float(len(true))
        mcc = (n * true_positives - above * positives) / np.sqrt(above * (n - above) * positives * (n - positives))
        best = cuts[np.isclose(mcc, mcc.max())]
        middle = best[len(best) // 2]
        thresholds[index] = (probability[middle - 1] + probability[middle]) / 2
    return thresholds


def compute_metrics_for(
    task: Task | Sequence[str], *, thresholds: np.ndarray | None = None
) -> Callable[[EvalPrediction], dict[str, float]]:
    """Return a ``compute_metrics`` function for a transformers Trainer.

    Args:
        task: a task, as from `esm_efficient.tasks.task_of`; or the names of the classes in the order of their ids, for
            one class per sequence.
        thresholds: for several labels per sequence, as in `multi_label_metrics`.

    Returns:
        A function that returns `classification_metrics` (of tokens for a token classifier, without label -100),
        `multi_label_metrics` or `regression_metrics`.

    Example:
        >>> from transformers import EvalPrediction
        >>> import numpy as np
        >>> compute = compute_metrics_for(["no", "yes"])
        >>> compute(EvalPrediction(predictions=np.eye(2), label_ids=np.array([0, 1])))["accuracy"]
        1.0
    """
    resolved = task if isinstance(task, Task) else Task("single_label_classification", tuple(task))

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        logits, labels = logits_of(prediction.predictions), np.asarray(prediction.label_ids)
        if resolved.kind == "multi_label_classification":
            return multi_label_metrics(labels, logits, resolved.names, thresholds=thresholds)
        if resolved.kind == "regression":
            return regression_metrics(labels, logits, resolved.names)
        if resolved.kind == "token_classification":
            logits, labels = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
            # The logits of padding are arbitrary, and may be no numbers.
            logits, labels = logits[labels != IGNORE], labels[labels != IGNORE]
        return classification_metrics(labels, logits, resolved.names)

    return compute


def confidence_interval(values: Sequence[float], *, level: float = 0.95) -> tuple[float, float] | None:
    """Return Student's t interval of a mean; None for fewer than two values, or if one is NaN.

    Example:
        >>> low, high = confidence_interval([0.70, 0.71, 0.72])
        >>> round(low, 3), round(high, 3)
        (0.685, 0.735)
    """
    from scipy import stats

    if len(values) < 2 or any(math.isnan(value) for value in values):
        return None
    # scipy gives NaN for a scale of 0, so the interval of equal values is scaled here.
    low, high = (statistics.fmean(values) + t * stats.sem(values) for t in stats.t.interval(level, len(values) - 1))
    return float(low), float(high)


def _known_labels(y_true: np.ndarray, y_score: np.ndarray, label_names: Sequence[str]) -> np.ndarray:
    """Check the shapes and logits of several labels, and return a mask of known labels."""
    if y_score.shape != y_true.shape or y_score.shape[1:] != (len(label_names),):
        raise DataError(
            f"logits have shape {y_score.shape} and labels {y_true.shape}: expected (examples, {len(label_names)}), "
            f"one column for each of {', '.join(label_names)}"
        )
    _check_finite(y_score)
    return ~np.isnan(y_true) & (y_true != IGNORE)


def _undefined(names: Sequence[str]) -> dict[str, float]:
    """Return NaN for each metric, because nothing is known to compare the predictions with."""
    logger.warning("no label of the evaluated examples is known: their metrics are NaN")
    return dict.fromkeys(names, float("nan"))


def _check_finite(logits: np.ndarray) -> None:
    if bad := int((~np.isfinite(logits)).any(axis=1).sum()):
        raise DataError(f"the logits of {bad} of {len(logits)} examples are not finite: training has diverged")


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    from scipy.special import expit

    return np.asarray(expit(logits.astype(np.float64)))


def _f1(right: Any, true: Any, predicted: Any) -> np.ndarray:
    """Return F1 from numbers of true positives, positives and predicted positives; 0 if there are none."""
    total = np.asarray(true + predicted)
    return 2 * right / np.where(total, total, 1)


def _mcc(right: Any, both: Any, predicted: Any, true: Any, count: Any) -> np.ndarray:
    """Return MCC from the confusion matrix of any number of classes, as scikit-learn; 0 if one side is constant.

    Args:
        right: number of examples whose class is predicted.
        both: sum over the classes of the examples of a class times the predictions of it.
        predicted: sum of the squared numbers of predictions of a class.
        true: sum of the squared numbers of examples of a class.
        count: number of examples.
    """
    count = np.asarray(count, dtype=np.float64)
    spread = (count**2 - predicted) * (count**2 - true)
    return np.where(spread == 0, 0.0, (right * count - both) / np.sqrt(np.where(spread == 0, 1, spread)))


def _mcc_of_each(
    names: Sequence[str], right: np.ndarray, true: np.ndarray, predicted: np.ndarray, count: Any
) -> dict[str, float]:
    """Return the MCC of each label from its counts, as `_f1` takes them; NaN if `count`, its known examples, is 0."""
    others, not_predicted = count - true, count - predicted
    values = _mcc(
        right + count - true - predicted + right,
        true * predicted + others * not_predicted,
        predicted**2 + not_predicted**2,
        true**2 + others**2,
        count,
    )
    values = np.where(count, values, np.nan)
    return {f"mcc_{name}": float(value) for name, value in zip(names, values, strict=True)}


def _auroc(positive: np.ndarray, scores: np.ndarray) -> float:
    """Return the share of pairs of a positive and a negative example in which the positive one scores higher.

    A tie counts half. Both kinds of examples must exist.
    """
    negatives, positives = np.sort(scores[~positive]), scores[positive]
    higher = sum(int(np.searchsorted(negatives, positives, side).sum()) for side in ("left", "right"))
    return higher / (2 * len(positives) * len(negatives))
