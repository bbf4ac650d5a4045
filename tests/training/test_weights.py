"""Class weights: balanced ones from the labels, and those that a user gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from hypothesis import given, settings
from hypothesis import strategies as st

from esm_efficient.errors import ConfigurationError, DataError
from esm_efficient.tasks import task_of
from esm_efficient.training.weights import (
    balanced_class_weights,
    balanced_label_weights,
    check_class_weights,
    refuse_constant_labels,
    resolve_class_weights,
)

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


ONE, TWO, NUMBER = ClassLabel(names=["0"]), ClassLabel(names=["no", "yes"]), Value("float32")
SEVERAL = {"a": NUMBER, "b": NUMBER}


def split_of(labels, feature, **columns):
    features = Features({"label": feature, **dict.fromkeys(columns, NUMBER)})
    return Dataset.from_dict({"label": labels, **columns}, features=features)


@pytest.mark.parametrize(
    ("labels", "feature", "message"),
    [
        ([0, 0, 0], ONE, "Membrane is '0' in all 3 training rows: a class needs at least two values"),
        ([1, 1, None], TWO, "Membrane is 'yes' in all 2 training rows"),
        ([[1, 1], [1, None]], List(TWO), "Membrane is 'yes' in all 3 labelled residues of the training rows: a class"),
        ([3.5, 3.5, None], NUMBER, "Membrane is 3.5 in all 2 training rows: a number needs at least two values"),
        ([-100.0, -100.0], NUMBER, "Membrane is -100 in all 2 training rows"),
        ([[1.0, 2.0], [1.0, 2.0]], List(NUMBER, length=2), "each of label_0, label_1 has the same value in all 2 tr"),
        ([{"a": 1, "b": 0}, {"a": 1, "b": None}], SEVERAL, "each of a, b has the same value in all 2 training rows"),
    ],
)
def test_training_labels_that_are_all_the_same_are_refused(labels, feature, message):
    split = split_of(labels, feature)
    with pytest.raises(DataError, match=message) as error:
        refuse_constant_labels(split, task_of(split.features), "Membrane")
    assert str(error.value).endswith(". Give other labels, or another column of them")


def test_of_a_stream_one_class_is_refused():
    split = split_of([0, 0], ONE).to_iterable_dataset()
    with pytest.raises(DataError, match="the label is '0' in all training rows"):
        refuse_constant_labels(split, task_of(split.features))


@pytest.mark.parametrize(
    ("labels", "feature"),
    [
        ([0, 1], TWO),
        ([[0], [0, 1]], List(TWO)),
        ([1.0, 1.5], NUMBER),
        ([-100.0, 1.0], NUMBER),
        ([[1.0, 2.0], [1.0, 3.0]], List(NUMBER, length=2)),
        ([{"a": 1, "b": 0}, {"a": 1, "b": 1}], SEVERAL),
    ],
)
def test_training_labels_that_differ_pass(labels, feature):
    split = split_of(labels, feature)
    refuse_constant_labels(split, task_of(split.features))
    stream = split.to_iterable_dataset()
    refuse_constant_labels(stream, task_of(stream.features))


def test_sequences_of_weight_zero_do_not_count_as_labels_that_differ():
    split = split_of([0, 1], TWO, sample_weight=[1, 0])
    with pytest.raises(DataError, match="the label is 'no' in all 1 training rows"):
        refuse_constant_labels(split, task_of(split.features))
    split = split_of([0, 1], TWO, sample_weight=[0, 0])
    with pytest.raises(DataError, match="the sample_weight of all 2 training rows is 0"):
        refuse_constant_labels(split, task_of(split.features))


@pytest.mark.parametrize("rows", [[], Dataset.from_dict({"input_ids": [], "labels": []})])
def test_an_empty_set_has_no_balanced_weights(rows):
    with pytest.raises(DataError, match="train_dataset has no rows"):
        resolve_class_weights("balanced", rows, ("a", "b"), problem_type="single_label_classification")


def test_two_columns_of_labels_are_refused():
    """Collators of transformers read one of them or the other."""
    rows = Dataset.from_dict({"input_ids": [[0, 2]] * 4, "labels": [0, 0, 0, 1], "label": [1, 1, 1, 0]})
    with pytest.raises(DataError, match="both the columns label and labels"):
        resolve_class_weights("balanced", rows, ("a", "b"), problem_type="single_label_classification")
