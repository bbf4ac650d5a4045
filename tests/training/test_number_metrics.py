"""Metrics of many columns of numbers are those that scipy and scikit-learn give for each column."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error

from esm_efficient.training.number_metrics import number_metrics


def expected(true, predicted):
    """The metrics of one column of known numbers."""
    varies = len(true) > 1 and np.ptp(true) > 0 and np.ptp(predicted) > 0
    return {
        "spearman": stats.spearmanr(predicted, true).statistic if varies else np.nan,
        "pearson": stats.pearsonr(predicted, true).statistic if varies else np.nan,
        "rmse": root_mean_squared_error(true, predicted) if len(true) else np.nan,
        "mae": mean_absolute_error(true, predicted) if len(true) else np.nan,
        "r2": r2_score(true, predicted) if len(true) > 1 else np.nan,
    }


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(0, 40),
    columns=st.integers(1, 4),
    scale=st.sampled_from([1e-6, 1.0, 1e4]),
    decimals=st.sampled_from([0, 9]),
    unknown=st.sampled_from([0.0, 0.3, 0.9]),
)
def test_each_column_has_the_metrics_of_scipy_and_scikit_learn(seed, rows, columns, scale, decimals, unknown):
    rng = np.random.default_rng(seed)
    true = np.round(rng.normal(size=(rows, columns)), decimals) * scale
    predicted = true + np.round(rng.normal(size=(rows, columns)), decimals) * scale
    true[rng.random(true.shape) < unknown] = np.nan
    if seed % 3 == 0:
        predicted[:, 0] = 0.1  # a constant, whose mean is rounded
    found = number_metrics(true, predicted)
    for index in range(columns):
        known = ~np.isnan(true[:, index])
        wanted = expected(true[known, index], predicted[known, index])
        got = {name: values[index] for name, values in found.items()}
        assert got == pytest.approx(wanted, rel=1e-7, abs=1e-9, nan_ok=True)


def test_numbers_whose_squares_are_too_large_or_too_small_still_correlate():
    numbers = np.array([[1.0, 1.0], [2.0, 2.0], [4.0, 4.0]]) * [1e200, 1e-200]
    assert number_metrics(numbers, numbers)["pearson"].tolist() == pytest.approx([1, 1])
