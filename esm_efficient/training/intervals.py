"""Confidence intervals of metrics, by bootstrap over the examples."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from esm_efficient.tasks import IGNORE
from esm_efficient.training.metrics import logger as metrics_logger
from esm_efficient.training.metrics import logits_of

if TYPE_CHECKING:
    from transformers import EvalPrediction

RESAMPLES = 200
"""Draws of the bootstrap."""

MOST_SCORES = 500_000
"""The most scores for which intervals are computed: examples or labelled residues, times classes, labels or numbers."""

Draws = Mapping[str, np.ndarray]
"""Value of each metric in each draw, float of shape (draws,), without metrics that are undefined in a draw."""


def intervals_of(
    prediction: EvalPrediction, compute: Callable[[EvalPrediction], Mapping[str, float]]
) -> dict[str, tuple[float, float]]:
    """Return the 95 % interval of each metric, from `draws_of`."""
    return ends_of(draws_of(prediction, compute))


def draws_of(prediction: EvalPrediction, compute: Callable[[EvalPrediction], Mapping[str, float]]) -> Draws:
    """Return `bootstrap_draws`; none of a single example, or of more scores than `MOST_SCORES`."""
    scores = logits_of(prediction.predictions)
    labels: Any = prediction.label_ids
    count = scores.size if scores.ndim < 3 else scores.shape[-1] * np.count_nonzero(labels != IGNORE)
    return bootstrap_draws(prediction, compute) if len(scores) > 1 and count <= MOST_SCORES else {}


def bootstrap_draws(
    prediction: EvalPrediction,
    compute: Callable[[EvalPrediction], Mapping[str, float]],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Draws:
    """Return each metric of examples drawn with replacement (Efron and Tibshirani 1993).

    Their interval says how the metrics of this model would scatter over other test sets of this size. It does not
    contain the scatter between seeds. Two predictions of the same examples have the same draws, so that their
    difference can be taken draw by draw. With labels per residue, whole sequences are drawn.

    Args:
        prediction: logits and labels of each example, such as a Trainer gives.
        compute: the metrics, such as `compute_metrics_for` returns.
        resamples: number of draws.
        seed: seed of the draws.

    Example:
        >>> from transformers import EvalPrediction
        >>> from esm_efficient import compute_metrics_for
        >>> from esm_efficient.tasks import Task
        >>> compute = compute_metrics_for(Task("single_label_classification", ("no", "yes")))
        >>> logits = np.eye(2)[[0, 1] * 50]
        >>> ends_of(bootstrap_draws(EvalPrediction(logits, np.array([0, 1] * 50)), compute))["accuracy"]
        (1.0, 1.0)
    """
    from transformers import EvalPrediction

    scores, labels = logits_of(prediction.predictions), np.asarray(prediction.label_ids)
    rng = np.random.default_rng(seed)
    drawn: dict[str, list[float]] = {}
    with without_warnings():
        for _ in range(resamples):
            rows = rng.integers(0, len(labels), len(labels))
            for name, value in compute(EvalPrediction(predictions=scores[rows], label_ids=labels[rows])).items():
                drawn.setdefault(name, []).append(value)
    return {
        name: np.array(values)
        for name, values in drawn.items()
        if len(values) == resamples and np.isfinite(values).all()
    }


@contextmanager
def without_warnings() -> Iterator[None]:
    """Keep back what this thread warns of or logs in the metrics: a draw may lack a class, or every known label."""
    thread = threading.get_ident()

    def is_of_another_thread(record: logging.LogRecord) -> bool:
        return record.thread != thread

    metrics_logger.addFilter(is_of_another_thread)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        metrics_logger.removeFilter(is_of_another_thread)


def ends_of(draws: Draws, *, level: float = 0.95) -> dict[str, tuple[float, float]]:
    """Return lower and upper end of the interval of each metric that has the share `level` of the draws."""
    ends = [(1 - level) / 2, (1 + level) / 2]
    return {
        name: (float(np.quantile(values, ends[0])), float(np.quantile(values, ends[1])))
        for name, values in draws.items()
    }


def differences_of(draws: Draws, others: Draws) -> dict[str, tuple[float, float]]:
    """Return the interval of the difference of each metric that both have: the first minus the second, by draw.

    Example:
        >>> ends = differences_of({"mcc": np.array([0.5, 0.7])}, {"mcc": np.array([0.4, 0.6])})["mcc"]
        >>> [round(end, 3) for end in ends]
        [0.1, 0.1]
    """
    return ends_of({name: values - others[name] for name, values in draws.items() if name in others})
