"""Metrics of each task, computed by scikit-learn and scipy, and the interval of their mean."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from esm_efficient.errors import DataError
from esm_efficient.tasks import IGNORE, Task

if TYPE_CHECKING:
    from transformers import EvalPrediction

logger = logging.getLogger(__name__)


def classification_metrics(y_true: np.ndarray, y_score: np.ndarray, label_names: Sequence[str]) -> dict[str, float]:
    """Accuracy, MCC, AUROC and F1 of each class, beside the accuracy of always guessing the commonest class.

    Args:
        y_true: class ids of shape (examples,).
        y_score: logits, float of shape (examples, classes).
        label_names: names of the classes in the order of their ids.

    Returns:
        ``accuracy`` (with one class an example, also the micro-averaged F1), ``mcc``, ``auroc`` (one against the rest,
        averaged over the classes if there are more than two; NaN if a class has no example), ``f1_<name>`` for each
        class and their mean ``f1_macro``, with more than two classes ``mcc_<name>`` of each against the rest, and
        ``majority_accuracy``.

    Raises:
        DataError: the shapes do not fit, or the logits are not finite.

    Example:
        >>> import numpy as np
        >>> logits = np.array([[2.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 3.0]])
        >>> metrics = classification_metrics(np.array([0, 1, 1, 1]), logits, ["no", "yes"])
        >>> metrics["accuracy"], round(metrics["mcc"], 3), metrics["auroc"]
        (0.75, 0.577, 1.0)
    """
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef, roc_auc_score

    classes = np.arange(len(label_names))
    if y_score.shape != (len(y_true), len(classes)):
        raise DataError(
            f"logits have shape {y_score.shape}: expected {(len(y_true), len(classes))}, one row per label and one "
            f"column for each of {', '.join(label_names)}"
        )
    _check_finite(y_score)
    predicted = y_score.argmax(axis=1)
    scores = np.exp(y_score.astype(np.float64) - y_score.max(axis=1, keepdims=True))
    scores /= scores.sum(axis=1, keepdims=True)
    if len(set(y_true.tolist())) < len(classes):
        auroc = float("nan")
    elif len(classes) == 2:
        auroc = float(roc_auc_score(y_true, y_score[:, 1].astype(np.float64) - y_score[:, 0]))
    else:
        auroc = float(roc_auc_score(y_true, scores, multi_class="ovr", labels=classes))
    f1 = f1_score(y_true, predicted, labels=classes, average=None, zero_division=0.0)
    return {
        "accuracy": float(accuracy_score(y_true, predicted)),
        "mcc": float(matthews_corrcoef(y_true, predicted)),
        "auroc": auroc,
        **{f"f1_{name}": float(value) for name, value in zip(label_names, f1, strict=True)},
        "f1_macro": float(f1.mean()),
        **(_mcc_each(y_true, predicted, label_names) if len(classes) > 2 else {}),
        "majority_accuracy": float(np.bincount(y_true, minlength=len(classes)).max() / len(y_true)),
    }


def multi_label_metrics(
    y_true: np.ndarray, y_score: np.ndarray, label_names: Sequence[str], *, thresholds: np.ndarray | None = None
) -> dict[str, float]:
    """How well several labels an example are told, each by itself and all together.

    Args:
        y_true: 0 or 1, of shape (examples, labels); NaN or -100 where unknown. Unknown labels count nowhere.
        y_score: logits, float of the same shape.
        label_names: names of the labels in their order.
        thresholds: probability from which each label is said to hold, of shape (labels,); 0.5 if None.

    Returns:
        ``f1_micro``, ``f1_macro``, ``jaccard`` (mean over examples of the labels in common among those that hold or are
        said to; 1 if there are none), ``subset_accuracy`` (examples with every known label right), ``auroc`` (mean over
        the labels that have both kinds of examples), and ``mcc_<name>`` and ``f1_<name>`` of each label.

    Raises:
        DataError: the shapes do not fit, or the logits are not finite.

    Example:
        >>> metrics = multi_label_metrics(np.array([[1, 0], [0, 1]]), np.array([[2.0, -1.0], [1.0, 3.0]]), ["a", "b"])
        >>> metrics["subset_accuracy"], metrics["jaccard"], round(metrics["f1_micro"], 3)
        (0.5, 0.75, 0.8)
    """
    from sklearn.metrics import f1_score, roc_auc_score

    if y_score.shape != y_true.shape or y_score.shape[1:] != (len(label_names),):
        raise DataError(
            f"logits have shape {y_score.shape} and labels {y_true.shape}: expected (examples, {len(label_names)}), "
            f"one column for each of {', '.join(label_names)}"
        )
    _check_finite(y_score)
    known = ~np.isnan(y_true) & (y_true != IGNORE)
    true = np.where(known, y_true, 0).round().astype(int)
    said = np.where(known, apply_thresholds(y_score, thresholds), 0).astype(int)
    f1, areas = {}, []
    for index, name in enumerate(label_names):
        rows = known[:, index]
        f1[f"f1_{name}"] = float(f1_score(true[:, index], said[:, index], zero_division=0.0))
        if len(set(true[rows, index].tolist())) == 2:
            areas.append(float(roc_auc_score(true[rows, index], y_score[rows, index])))
    counted = known.any(axis=1)
    common, either = (true & said).sum(1)[counted], (true | said).sum(1)[counted]
    jaccard = np.where(either, common / np.maximum(either, 1), 1.0)
    return {
        "f1_micro": float(f1_score(true, said, average="micro", zero_division=0.0)),
        "f1_macro": statistics.fmean(f1.values()),
        "jaccard": float(jaccard.mean()) if len(jaccard) else float("nan"),
        "subset_accuracy": float((true == said).all(axis=1)[counted].mean()) if counted.any() else float("nan"),
        "auroc": statistics.fmean(areas) if areas else float("nan"),
        **_mcc_each(true, said, label_names, known),
        **f1,
    }


def regression_metrics(y_true: np.ndarray, y_pred: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """How close numbers are, and whether they are in the right order.

    Args:
        y_true: float of shape (examples, numbers), or (examples,) for one; NaN where unknown, which counts nowhere.
        y_pred: float of the same shape.
        names: of the numbers in their order.

    Returns:
        ``spearman``, ``pearson``, ``rmse``, ``mae`` and ``r2``, with several numbers their means, and
        ``spearman_<name>`` for each. A correlation with a constant is NaN.

    Raises:
        DataError: the shapes do not fit, or the predictions are not finite.

    Example:
        >>> regression_metrics(np.array([1.0, 3.0, 9.0]), np.array([1.0, 2.0, 4.0]), ["stability"])["spearman"]
        1.0
    """
    from scipy import stats
    from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error

    found, true = y_pred.reshape(len(y_true), -1), y_true.reshape(len(y_true), -1)
    if found.shape != true.shape or found.shape[1] != len(names):
        raise DataError(
            f"predictions have shape {y_pred.shape} and labels {y_true.shape}: expected {len(names)} an example"
        )
    _check_finite(found)
    each: dict[str, list[float]] = {key: [] for key in ("spearman", "pearson", "rmse", "mae", "r2")}
    for index in range(len(names)):
        rows = ~np.isnan(true[:, index])
        x, y = found[rows, index].astype(np.float64), true[rows, index].astype(np.float64)
        varies = len(x) > 1 and np.ptp(x) > 0 and np.ptp(y) > 0
        each["spearman"].append(float(stats.spearmanr(x, y).statistic) if varies else float("nan"))
        each["pearson"].append(float(stats.pearsonr(x, y).statistic) if varies else float("nan"))
        for key, metric in (("rmse", root_mean_squared_error), ("mae", mean_absolute_error), ("r2", r2_score)):
            each[key].append(float(metric(y, x)) if len(x) > 1 else float("nan"))
    result = {key: statistics.fmean(values) for key, values in each.items()}
    if len(names) > 1:
        result |= {f"spearman_{name}": value for name, value in zip(names, each["spearman"], strict=True)}
    return result


def apply_thresholds(y_score: np.ndarray, thresholds: np.ndarray | None = None) -> np.ndarray:
    """Turn logits of several labels into a boolean matrix: a label is positive from its threshold on.

    Args:
        y_score: logits, float of shape (examples, labels).
        thresholds: probability from which each label is positive, of shape (labels,); 0.5 if None.

    Returns:
        bool of shape (examples, labels).

    Example:
        >>> apply_thresholds(np.array([[0.1, 0.1]]), np.array([0.5, 0.6])).tolist()
        [[True, False]]
    """
    return _sigmoid(y_score) >= (0.5 if thresholds is None else np.asarray(thresholds))


def tune_thresholds(y_true: np.ndarray, y_score: np.ndarray, label_names: Sequence[str]) -> np.ndarray:
    """The threshold of each label that gives it the highest MCC, as DeepLoc 2.0 chooses them.

    Give it examples that were neither trained nor tested on. Of thresholds that are equally good the middle one is
    taken.

    Args:
        y_true: 0 or 1, of shape (examples, labels); NaN or -100 where unknown.
        y_score: logits, float of the same shape.
        label_names: names of the labels in their order.

    Returns:
        float64 of shape (labels,), in probabilities; 0.5 for a label that holds everywhere or nowhere, with a warning.

    Raises:
        DataError: the shapes do not fit, or the logits are not finite.

    Example:
        >>> tune_thresholds(np.array([[0], [1], [1]]), np.array([[-2.0], [-1.0], [0.5]]), ["a"]).round(2).tolist()
        [0.19]
    """
    if y_score.shape != y_true.shape or y_score.shape[1:] != (len(label_names),):
        raise DataError(
            f"logits have shape {y_score.shape} and labels {y_true.shape}: expected (examples, {len(label_names)})"
        )
    _check_finite(y_score)
    chances = _sigmoid(y_score)
    thresholds = np.full(len(label_names), 0.5)
    for index, name in enumerate(label_names):
        rows = ~np.isnan(y_true[:, index]) & (y_true[:, index] != IGNORE)
        chance, true = chances[rows, index], y_true[rows, index].round() == 1
        if not true.any() or true.all():
            logger.warning("%s: no example, or every one, has the label: its threshold stays at 0.5", name)
            continue
        # Between each two neighbours in the order of their probability: what is above is said to hold.
        order = np.argsort(chance, kind="stable")
        chance, true = chance[order], true[order]
        cuts = np.flatnonzero(np.diff(chance) > 0) + 1
        if not len(cuts):
            continue
        missed, positives = np.cumsum(true)[cuts - 1].astype(float), float(true.sum())
        hit, above = positives - missed, (len(true) - cuts).astype(float)
        n = float(len(true))
        scores = (n * hit - above * positives) / np.sqrt(above * (n - above) * positives * (n - positives))
        best = cuts[np.isclose(scores, scores.max())]
        middle = best[len(best) // 2]
        thresholds[index] = (chance[middle - 1] + chance[middle]) / 2
    return thresholds


def compute_metrics_for(
    task: Task | Sequence[str], *, thresholds: np.ndarray | None = None
) -> Callable[[EvalPrediction], dict[str, float]]:
    """A ``compute_metrics`` for a transformers Trainer.

    Args:
        task: from `esm_efficient.tasks.task_of`; or the names of the classes in the order of their ids, for one
            class a sequence.
        thresholds: for several labels a sequence, as in `multi_label_metrics`.

    Returns:
        A function that returns `classification_metrics` (of tokens for a token classifier, -100 left out),
        `multi_label_metrics` or `regression_metrics`.

    Example:
        >>> from transformers import EvalPrediction
        >>> import numpy as np
        >>> compute = compute_metrics_for(["no", "yes"])
        >>> compute(EvalPrediction(predictions=np.eye(2), label_ids=np.array([0, 1])))["accuracy"]
        1.0
    """
    known = task if isinstance(task, Task) else Task("single_label_classification", tuple(task))

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        found = prediction.predictions
        logits, labels = np.asarray(found[0] if isinstance(found, tuple) else found), np.asarray(prediction.label_ids)
        if known.kind == "multi_label_classification":
            return multi_label_metrics(labels, logits, known.names, thresholds=thresholds)
        if known.kind == "regression":
            return regression_metrics(labels, logits, known.names)
        if known.kind == "token_classification":
            logits, labels = logits[labels != IGNORE], labels[labels != IGNORE]
        return classification_metrics(labels, logits, known.names)

    return compute


def _check_finite(logits: np.ndarray) -> None:
    if bad := int((~np.isfinite(logits)).any(axis=1).sum()):
        raise DataError(f"the logits of {bad} of {len(logits)} examples are not finite: training has diverged")


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    from scipy.special import expit

    return np.asarray(expit(logits.astype(np.float64)))


def _mcc_each(
    true: np.ndarray, said: np.ndarray, names: Sequence[str], known: np.ndarray | None = None
) -> dict[str, float]:
    """The MCC of each label; of each class against the rest where there is one an example."""
    from sklearn.metrics import matthews_corrcoef

    result = {}
    for index, name in enumerate(names):
        pair = (true == index, said == index) if true.ndim == 1 else (true[:, index], said[:, index])
        rows = slice(None) if known is None else known[:, index]
        both = [np.asarray(part[rows]) for part in pair]
        # Where one side never changes it is 0 by definition, and scikit-learn says so in a warning.
        varies = all(len(np.unique(part)) > 1 for part in both)
        result[f"mcc_{name}"] = float(matthews_corrcoef(*both)) if varies else 0.0
    return result


def confidence_interval(values: Sequence[float], *, level: float = 0.95) -> tuple[float, float] | None:
    """Student's t interval of a mean; None with fewer than two, or an undefined one.

    Example:
        >>> low, high = confidence_interval([0.70, 0.71, 0.72])
        >>> round(low, 3), round(high, 3)
        (0.685, 0.735)
    """
    from scipy import stats  # scikit-learn needs it too

    if len(values) < 2 or any(math.isnan(value) for value in values):
        return None
    half = float(stats.t.ppf((1 + level) / 2, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.fmean(values)
    return mean - half, mean + half
