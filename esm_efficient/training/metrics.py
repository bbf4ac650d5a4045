"""Metrics of classification, computed by scikit-learn, and the interval of their mean."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from esm_efficient.errors import DataError

if TYPE_CHECKING:
    from transformers import EvalPrediction


def classification_metrics(logits: np.ndarray, labels: np.ndarray, label_names: Sequence[str]) -> dict[str, float]:
    """Accuracy, MCC, AUROC and F1 of each class, beside the accuracy of always guessing the commonest class.

    Args:
        logits: float of shape (examples, classes).
        labels: class ids of shape (examples,).
        label_names: names of the classes in the order of their ids.

    Returns:
        ``accuracy``, ``mcc``, ``auroc`` (one against the rest, averaged over the classes if there are more than two;
        NaN if a class has no example), ``f1_<name>`` for each class, and ``majority_accuracy``.

    Raises:
        DataError: the shapes do not fit, or the logits are not finite.

    Example:
        >>> import numpy as np
        >>> logits = np.array([[2.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 3.0]])
        >>> metrics = classification_metrics(logits, np.array([0, 1, 1, 1]), ["no", "yes"])
        >>> metrics["accuracy"], round(metrics["mcc"], 3), metrics["auroc"]
        (0.75, 0.577, 1.0)
    """
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef, roc_auc_score

    classes = np.arange(len(label_names))
    if logits.shape != (len(labels), len(classes)):
        raise DataError(
            f"logits have shape {logits.shape}: expected {(len(labels), len(classes))}, one row a label and one column "
            f"for each of {', '.join(label_names)}"
        )
    if bad := int((~np.isfinite(logits)).any(axis=1).sum()):
        raise DataError(f"the logits of {bad} of {len(labels)} examples are not finite: training has diverged")
    predicted = logits.argmax(axis=1)
    scores = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    scores /= scores.sum(axis=1, keepdims=True)
    if len(set(labels.tolist())) < len(classes):
        auroc = float("nan")
    elif len(classes) == 2:
        auroc = float(roc_auc_score(labels, logits[:, 1].astype(np.float64) - logits[:, 0]))
    else:
        auroc = float(roc_auc_score(labels, scores, multi_class="ovr", labels=classes))
    f1 = f1_score(labels, predicted, labels=classes, average=None, zero_division=0.0)
    return {
        "accuracy": float(accuracy_score(labels, predicted)),
        "mcc": float(matthews_corrcoef(labels, predicted)),
        "auroc": auroc,
        **{f"f1_{name}": float(value) for name, value in zip(label_names, f1, strict=True)},
        "majority_accuracy": float(np.bincount(labels, minlength=len(classes)).max() / len(labels)),
    }


def compute_metrics_for(label_names: Sequence[str]) -> Callable[[EvalPrediction], dict[str, float]]:
    """A ``compute_metrics`` for a transformers Trainer that returns `classification_metrics`.

    Args:
        label_names: names of the classes in the order of their ids.

    Example:
        >>> from transformers import EvalPrediction
        >>> import numpy as np
        >>> compute = compute_metrics_for(["no", "yes"])
        >>> compute(EvalPrediction(predictions=np.eye(2), label_ids=np.array([0, 1])))["accuracy"]
        1.0
    """

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        logits = prediction.predictions
        return classification_metrics(
            np.asarray(logits[0] if isinstance(logits, tuple) else logits),
            np.asarray(prediction.label_ids),
            label_names,
        )

    return compute


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
