"""Confidence intervals of metrics, by bootstrap over the examples."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from esm_efficient.training.metrics import logits_of

if TYPE_CHECKING:
    from transformers import EvalPrediction

RESAMPLES = 200
"""Draws of the bootstrap."""

MOST_SCORES = 500_000
"""The most scores for which intervals are computed: examples times classes, labels or numbers."""


def intervals_of(
    prediction: EvalPrediction, compute: Callable[[EvalPrediction], Mapping[str, float]]
) -> dict[str, tuple[float, float]]:
    """Return the intervals of `bootstrap_intervals`; none of a single example, or of more scores than `MOST_SCORES`."""
    scores = logits_of(prediction.predictions)
    return bootstrap_intervals(prediction, compute) if len(scores) > 1 and scores.size <= MOST_SCORES else {}


def bootstrap_intervals(
    prediction: EvalPrediction,
    compute: Callable[[EvalPrediction], Mapping[str, float]],
    *,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """Return the interval of each metric, from examples drawn with replacement (Efron and Tibshirani 1993).

    The interval says how the metrics of this model would scatter over other test sets of this size. It does not contain
    the scatter between seeds. With labels per residue, whole sequences are drawn.

    Args:
        prediction: logits and labels of each example, such as a Trainer gives.
        compute: the metrics, such as `compute_metrics_for` returns.
        level: share of the draws within the interval.
        resamples: number of draws.
        seed: seed of the draws.

    Returns:
        Lower and upper end by metric, without metrics that are undefined in a draw.

    Example:
        >>> from transformers import EvalPrediction
        >>> from esm_efficient import compute_metrics_for
        >>> from esm_efficient.tasks import Task
        >>> compute = compute_metrics_for(Task("single_label_classification", ("no", "yes")))
        >>> logits = np.eye(2)[[0, 1] * 50]
        >>> bootstrap_intervals(EvalPrediction(logits, np.array([0, 1] * 50)), compute)["accuracy"]
        (1.0, 1.0)
    """
    from transformers import EvalPrediction

    scores, labels = logits_of(prediction.predictions), np.asarray(prediction.label_ids)
    rng = np.random.default_rng(seed)
    drawn: dict[str, list[float]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a draw may lack a class
        for _ in range(resamples):
            rows = rng.integers(0, len(labels), len(labels))
            for name, value in compute(EvalPrediction(predictions=scores[rows], label_ids=labels[rows])).items():
                drawn.setdefault(name, []).append(value)
    ends = [(1 - level) / 2, (1 + level) / 2]
    return {
        name: (float(np.quantile(values, ends[0])), float(np.quantile(values, ends[1])))
        for name, values in drawn.items()
        if len(values) == resamples and np.isfinite(values).all()
    }
