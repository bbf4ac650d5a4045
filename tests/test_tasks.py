"""Which task a data set's features stand for, and what its labels become beside the tokens."""

from __future__ import annotations

import math

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from transformers import AutoTokenizer

from esm_efficient import demo_model_path, tokenize_dataset
from esm_efficient.errors import DataError
from esm_efficient.tasks import task_of

TOKENIZER = AutoTokenizer.from_pretrained(demo_model_path())
CLASSES = ClassLabel(names=["no", "yes"])
SEVERAL = {"nucleus": Value("float32"), "golgi": Value("int8")}


def tokenized(feature, labels, sequences=None, *, weights=None, **options):
    rows = {"sequence": sequences or ["MKTV"] * len(labels), "label": labels}
    features = {"sequence": Value("string"), "label": feature}
    if weights is not None:
        rows["sample_weight"], features["sample_weight"] = weights, Value("float64")
    data = DatasetDict(test=Dataset.from_dict(rows, features=Features(features)))
    return tokenize_dataset(data, TOKENIZER, **options)[0]["test"]


@pytest.mark.parametrize(
    ("feature", "kind", "names"),
    [
        (CLASSES, "single_label_classification", ("no", "yes")),
        (SEVERAL, "multi_label_classification", ("nucleus", "golgi")),
        ({"only": Value("bool")}, "multi_label_classification", ("only",)),
        (List(CLASSES), "token_classification", ("no", "yes")),
        (Value("float32"), "regression", ("label",)),
        (Value("float64"), "regression", ("label",)),
        (List(Value("float32"), length=2), "regression", ("label_0", "label_1")),
    ],
    ids=str,
)
def test_the_feature_says_the_task(feature, kind, names):
    task = task_of(Features({"label": feature}))
    assert (task.kind, task.names) == (kind, names)
    assert task.problem_type == (None if kind == "token_classification" else kind)
    assert all(name in task.describe() for name in names)


@pytest.mark.parametrize(
    "feature",
    [
        *(Value("string"), Value("int64"), Value("bool"), List(Value("float32")), List(Value("int8"), length=2)),
        *({"a": Value("string")}, {}),
    ],
    ids=str,
)
def test_a_feature_that_stands_for_no_task_is_refused_with_what_would(feature):
    with pytest.raises(DataError, match="class_encode_column"):
        task_of(Features({"label": feature}))


def test_no_column_at_all_is_refused():
    with pytest.raises(DataError, match="has the feature None"):
        task_of(Features({"sequence": Value("string")}))


def test_several_labels_become_numbers_and_null_becomes_nan():
    rows = tokenized(SEVERAL, [{"nucleus": 1.0, "golgi": 0}, {"nucleus": None, "golgi": 1}, {"nucleus": 0.5}])
    assert rows.features["labels"] == List(Value("float32"), length=2)
    assert rows["labels"][0] == [1.0, 0.0]
    assert math.isnan(rows["labels"][1][0])
    assert rows["labels"][1][1] == 1.0
    assert rows["labels"][2][0] == 0.5
    assert math.isnan(rows["labels"][2][1])


def test_numbers_become_float32_and_null_becomes_nan():
    assert tokenized(Value("float64"), [0.5, -2.0])["labels"][:] == [0.5, -2.0]
    assert math.isnan(tokenized(Value("float64"), [0.5, None])["labels"][1])
    assert tokenized(List(Value("float64"), length=2), [[0.5, 1.0], [2.0, 3.0]])["labels"][:] == [
        [0.5, 1.0],
        [2.0, 3.0],
    ]


@pytest.mark.parametrize(
    ("keep", "expected"),
    [("start", [0, 1, 0]), ("end", [-100, 1, 1]), ("both", [0, 1, 1])],
)
def test_labels_of_residues_are_cut_with_them_and_special_tokens_have_none(keep, expected):
    rows = tokenized(List(CLASSES), [[0, 1, 0, None, 1, 1], [1, 0]], ["mk-tvay*", "MK"], max_tokens=5, keep=keep)
    assert rows.features["labels"] == List(CLASSES)
    assert rows["labels"][:] == [[-100, *expected, -100], [-100, 1, 0, -100]]
    assert [len(ids) for ids in rows["input_ids"]] == [5, 4]


@pytest.mark.parametrize(
    ("feature", "labels", "message"),
    [
        (CLASSES, [0, None], "missing in 1 row.*row 1 of test"),
        (CLASSES, [0, -1], "-1 in row 1 of test"),
        (SEVERAL, [{"nucleus": 2.0, "golgi": 0}], "between 0 and 1 in 1 row.*row 0"),
        (Value("float32"), [1.0, math.inf], "infinite in 1 row.*row 1"),
        (List(Value("float32"), length=2), [[1.0, 2.0], None], "2 numbers"),
        (List(CLASSES), [[0, 1, 0, 1], [0, 1]], r"row 1 of test \(4 residues, 2 labels\)"),
        (List(CLASSES), [None], r"row 0 of test \(4 residues, 0 labels\)"),
        (List(CLASSES), [[0, 1, -1, 0]], "-1 in row 0"),
    ],
)
def test_labels_that_do_not_fit_name_the_row(feature, labels, message):
    with pytest.raises(DataError, match=message):
        tokenized(feature, labels)


def test_splits_must_have_the_same_labels_in_the_same_order():
    def split(names):
        features = Features({"sequence": Value("string"), "label": ClassLabel(names=names)})
        return Dataset.from_dict({"sequence": ["MK"], "label": [0]}, features=features)

    with pytest.raises(DataError, match=r"train one class per sequence: no, yes; test one class per sequence: yes, no"):
        tokenize_dataset(DatasetDict(train=split(["no", "yes"]), test=split(["yes", "no"])), TOKENIZER)
    unlabelled = split(["no", "yes"]).remove_columns("label")
    assert (
        "labels"
        not in tokenize_dataset(DatasetDict(train=split(["no"]), test=unlabelled), TOKENIZER)[0]["test"].features
    )
    with pytest.raises(DataError, match="'test' has no row"):
        tokenize_dataset(DatasetDict(test=unlabelled.select([])), TOKENIZER)


def test_labels_of_residues_may_come_in_lists_of_a_fixed_length():
    rows = tokenized(List(CLASSES, length=4), [[0, 1, 0, 1]])
    assert rows["labels"][0] == [-100, 0, 1, 0, 1, -100]


def test_weights_of_sequences_are_kept_and_checked():
    assert tokenized(CLASSES, [0, 1], weights=[0.5, 2])["sample_weight"][:] == [0.5, 2.0]
    for wrong in (None, -1.0, math.nan, math.inf):
        with pytest.raises(DataError, match=r"sample_weight.*row 1 of test"):
            tokenized(CLASSES, [0, 1], weights=[1.0, wrong])
