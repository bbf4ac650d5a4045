"""Errors and correlations of many columns of numbers at once, some of which may be unknown.

scikit-learn's and scipy's functions, called for each column in each draw of a bootstrap, would take minutes.
"""

from __future__ import annotations

import numpy as np


def number_metrics(true: np.ndarray, predicted: np.ndarray) -> dict[str, np.ndarray]:
    """Return the metrics of each column: those of scipy and scikit-learn, for the rows whose true number is known.

    Args:
        true: float of shape (examples, numbers); NaN if unknown.
        predicted: finite floats of the same shape.

    Returns:
        ``spearman``, ``pearson``, ``rmse``, ``mae`` and ``r2``, each of shape (numbers,). A correlation with a constant
        is NaN; so is what has too few known numbers: none for an error, fewer than two for the others.

    Example:
        >>> number_metrics(np.array([[1.0], [3.0], [np.nan]]), np.array([[1.0], [2.0], [9.0]]))["mae"].tolist()
        [0.5]
    """
    known = ~np.isnan(true)
    counts = known.sum(axis=0)
    y = true.astype(np.float64)
    x = np.where(known, predicted.astype(np.float64), np.nan)
    errors, spread = np.where(known, x - y, 0), _centred(y)
    with np.errstate(divide="ignore", invalid="ignore"):  # too few known numbers
        return {
            "spearman": _correlation(_centred(_ranks(x)), _centred(_ranks(y))),
            "pearson": _correlation(_centred(x), spread),
            "rmse": np.sqrt((errors**2).sum(axis=0) / counts),
            "mae": np.abs(errors).sum(axis=0) / counts,
            "r2": np.where(counts > 1, _r2((errors**2).sum(axis=0), (spread**2).sum(axis=0)), np.nan),
        }


def _ranks(values: np.ndarray) -> np.ndarray:
    """Return the rank of each known value in its column, and NaN for unknown ones."""
    from scipy.stats import rankdata

    known = ~np.isnan(values)
    # scipy ranks columns with NaN one by one; infinity is above every known value, whose ranks it does not change.
    return np.where(known, rankdata(np.where(known, values, np.inf), axis=0), np.nan) if len(values) else values


def _centred(values: np.ndarray) -> np.ndarray:
    """Return columns minus the mean of their known values; unknown values and constant columns become exactly 0."""
    known = ~np.isnan(values)
    mean = np.where(known, values, 0).sum(axis=0) / np.maximum(known.sum(axis=0), 1)
    low = np.min(values, axis=0, where=known, initial=np.inf)
    high = np.max(values, axis=0, where=known, initial=-np.inf)
    return np.where(known & (high > low), values - mean, 0)


def _correlation(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the correlation of centred columns; NaN if one is constant."""
    x, y = (v / np.abs(v).max(axis=0, initial=0) for v in (x, y))  # so that no square is too large or too small
    return np.clip((x * y).sum(axis=0) / np.sqrt((x**2).sum(axis=0) * (y**2).sum(axis=0)), -1, 1)


def _r2(squares: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """Return the coefficient of determination; of a constant, 1 if it is predicted exactly and else 0."""
    return np.where(spread > 0, 1 - squares / spread, squares == 0)
