"""Class weights: balanced ones from the labels, and those that a user gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esm_efficient.errors import ConfigurationError, DataError
from esm_efficient.training.weights import balanced_class_weights, balanced_label_weights, check_class_weights

NAMES = ["a", "b", "c"]


@given(st.lists(st.integers(0, 2), min_size=1, max_size=60))
@settings(deadline=None)  # the first example imports scikit-learn
def test_balanced_weights_give_every_class_the_same_total(labels):
    labels = [*labels, 0, 1, 2]
    weights = balanced_class_weights(labels, NAMES)
    totals = weights * np.bincount(labels, minlength=3)
    assert totals == pytest.approx([len(labels) / 3] * 3)


def test_ignored_labels_do_not_count():
    assert balanced_class_weights([[0, -100], [1, 2]], NAMES).tolist() == [1.0, 1.0, 1.0]


def test_absent_classes_and_labels_that_are_not_class_ids_are_named():
    with pytest.raises(DataError, match="label b, c"):
        balanced_class_weights([0, 0], NAMES)
    with pytest.raises(DataError, match=r"\[7\] are not class ids"):
        balanced_class_weights([0, 7], NAMES)


@pytest.mark.parametrize(
    "given_",
    [
        [1, 2, 3],
        (1.0, 2.0, 3.0),
        np.array([1, 2, 3]),
        torch.tensor([1.0, 2.0, 3.0]),
        {"c": 3, "a": 1, "b": 2},
        {2: 3, 0: 1, 1: 2},
        {np.int64(2): 3, np.int64(0): 1, np.int64(1): 2},
    ],
    ids=["list", "tuple", "array", "tensor", "mapping", "by id", "by id of numpy"],
)
def test_every_form_of_weights_gives_the_same_array(given_):
    assert check_class_weights(given_, NAMES).tolist() == [1.0, 2.0, 3.0]


def test_a_mapping_must_name_every_label_once():
    with pytest.raises(ConfigurationError, match="wrong or missing: c"):
        check_class_weights({"a": 1, "b": 1}, NAMES)
    with pytest.raises(ConfigurationError, match="wrong or missing: d"):
        check_class_weights({"a": 1, "b": 1, "c": 1, "d": 1}, NAMES)


def test_a_mapping_by_class_id_must_have_every_id_once():
    with pytest.raises(ConfigurationError, match="wrong or missing: 2"):
        check_class_weights({0: 1, 1: 1}, NAMES)
    with pytest.raises(ConfigurationError, match="0 to 2; wrong or missing: 3"):
        check_class_weights({0: 1, 1: 1, 2: 1, 3: 1}, NAMES)
    with pytest.raises(ConfigurationError, match="wrong or missing"):
        check_class_weights({0: 1, "b": 1, "c": 1}, NAMES)


def test_names_that_are_numbers_are_names():
    assert check_class_weights({"1": 5.0, "0": 2.0}, ["1", "0"]).tolist() == [5.0, 2.0]
    assert check_class_weights({1: 5.0, 0: 2.0}, ["1", "0"]).tolist() == [2.0, 5.0]


def test_balanced_weights_give_positives_and_negatives_of_a_label_the_same_total():
    labels = np.array([[1, 0, 1], [0, 0, 1], [0, 1, 1], [0, np.nan, 1], [0, -100, 1]])
    weights = balanced_label_weights(labels, NAMES)
    assert weights.tolist() == [4.0, 2.0, 0.2]
    with pytest.raises(DataError, match="no training example has the label b"):
        balanced_label_weights(np.array([[1, 0, 1], [0, np.nan, 1]]), NAMES)
    with pytest.raises(DataError, match=r"expected \(examples, 3\)"):
        balanced_label_weights(np.zeros((4, 2)), NAMES)
