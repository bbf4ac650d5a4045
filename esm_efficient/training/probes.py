"""Linear probes: a linear model on fixed features, fitted in a closed form or by a convex solver."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from esm_efficient.errors import DataError
from esm_efficient.tasks import IGNORE, Task

PRIOR_VARIANCE = 3.2
"""Variance of a logit before any data are seen.

Features are standardised, so a weight's prior variance is this divided by their number; it is scikit-learn's C. The
value gives C=0.01 for the 320 features of ESM-2 8M. A wider model has a smaller C, and so the same prior.
"""
_MAX_ITERATIONS = 1000

Fitted = Callable[[np.ndarray], np.ndarray]
"""What a fitted model computes for the features of other examples."""


def probe(
    task: Task, features: np.ndarray, labels: np.ndarray, others: np.ndarray, *, weights: np.ndarray | None = None
) -> np.ndarray:
    """Fit a linear model and return what it computes for other examples: ``fit_probe(...)(others)``.

    Example:
        >>> x = np.array([[0.0], [0.1], [1.0], [1.1]])
        >>> probe(Task("single_label_classification", ("no", "yes")), x, np.array([0, 0, 1, 1]), x).argmax(1).tolist()
        [0, 0, 1, 1]
    """
    return fit_probe(task, features, labels, weights=weights)(others)


def fit_probe(task: Task, features: np.ndarray, labels: np.ndarray, *, weights: np.ndarray | None = None) -> Fitted:
    """Fit a linear model.

    One class per example: logistic regression with balanced weights; several labels: one for each label; numbers: ridge
    regression. Features are standardised by those that the model is fitted on.

    Args:
        task: the task.
        features: of shape (examples, features).
        labels: class ids of shape (examples,), -100 if unknown; or floats of shape (examples, labels), NaN if unknown.
        weights: weight of each example; None for 1.

    Returns:
        A function of the features of other examples, of shape (others, features). It returns float64 of shape (others,
        labels): logits, or numbers in the unit of the labels.

    Raises:
        DataError: all known examples with a weight have the same class, a label is not a class, or a feature is not
            finite.

    Example:
        >>> x = np.array([[0.0], [0.1], [1.0], [1.1]])
        >>> predict = fit_probe(Task("single_label_classification", ("no", "yes")), x, np.array([0, 0, 1, 1]))
        >>> predict(np.array([[0.2]])).argmax(1).tolist()
        [0]
    """
    if wrong := int((~np.isfinite(features)).any(axis=1).sum()):
        raise DataError(
            f"the states of {wrong:,} of {len(features):,} training examples are not finite: with fp16 use bf16 or "
            "float32; otherwise the weights of the model are damaged"
        )
    mean, spread = features.mean(0, dtype=np.float64), features.std(0, dtype=np.float64)
    spread[spread == 0] = 1
    x = (features - mean) / spread
    variance = PRIOR_VARIANCE / x.shape[1]
    if task.kind in ("single_label_classification", "token_classification"):
        known = labels != IGNORE
        if len(wrong := labels[known & ~np.isin(labels, np.arange(len(task.names)))]):
            raise DataError(
                f"{len(wrong):,} training label(s) are not classes, such as {wrong[0]:g}: expected 0 to "
                f"{len(task.names) - 1} ({', '.join(task.names)}), or {IGNORE} if unknown"
            )
        if weights is not None:
            known &= weights > 0
        fitted = _class_logits(x[known], labels[known], task, variance, _select(weights, known))
        return lambda others: fitted((others - mean) / spread)
    table = labels.reshape(len(labels), -1).astype(np.float64)
    one = _label_logits if task.kind == "multi_label_classification" else _numbers
    columns = []
    for column in table.T:
        known = ~np.isnan(column)
        if task.kind == "multi_label_classification":  # a number may be -100
            known &= column != IGNORE
        columns.append(one(x[known], column[known], variance, _select(weights, known)))
    return lambda others: np.stack([column((others - mean) / spread) for column in columns], axis=1)


def _class_logits(x: np.ndarray, labels: np.ndarray, task: Task, variance: float, weights: np.ndarray | None) -> Fitted:
    present = np.unique(labels)
    if len(present) < 2:
        names = ", ".join(task.names[index] for index in present)
        raise DataError(f"all training examples with a known label are {names or 'missing'}: expected two classes")
    model = _logistic(variance).fit(x, labels, weights)

    def logits_of(z: np.ndarray) -> np.ndarray:
        scores = model.decision_function(z)
        if scores.ndim == 1:
            scores = np.stack([np.zeros_like(scores), scores], axis=1)
        logits = np.full((len(z), len(task.names)), scores.min() - 10)  # of a class without training examples
        logits[:, present] = scores
        return logits

    return logits_of


def _label_logits(x: np.ndarray, labels: np.ndarray, variance: float, weights: np.ndarray | None) -> Fitted:
    positive = labels.round() == 1
    if positive.all() or not positive.any():  # nothing to learn: the frequency of the label
        frequency = np.log((positive.sum() + 0.5) / ((~positive).sum() + 0.5))
        return lambda z: np.full(len(z), frequency)
    fitted: Fitted = _logistic(variance).fit(x, positive, weights).decision_function
    return fitted


def _numbers(x: np.ndarray, numbers: np.ndarray, variance: float, weights: np.ndarray | None) -> Fitted:
    from sklearn.linear_model import Ridge

    if not len(numbers):
        return lambda z: np.zeros(len(z))
    mean, spread = numbers.mean(), numbers.std() or 1.0
    model = Ridge(alpha=1 / variance).fit(x, (numbers - mean) / spread, weights)
    return lambda z: np.asarray(model.predict(z) * spread + mean)


def _logistic(variance: float) -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=variance, class_weight="balanced", max_iter=_MAX_ITERATIONS)


def _select(weights: np.ndarray | None, known: np.ndarray) -> np.ndarray | None:
    return None if weights is None else weights[known]
