"""The task follows from a dataset's features or from a model, and has names in transformers and peft."""

from __future__ import annotations

import pytest
import torch
from conftest import make_model, tiny_config
from datasets import ClassLabel, Features, List, Value
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    EsmForMaskedLM,
    EsmForSequenceClassification,
    EsmForTokenClassification,
    EsmModel,
)

from esm_efficient.errors import ConfigurationError, DataError
from esm_efficient.tasks import (
    IGNORE,
    auto_class,
    has_known_loss,
    head_of,
    head_of_config,
    label_names_of,
    peft_task_type,
    problem_type_of,
    set_problem_type,
    task_of,
    task_of_model,
)

CLASSES = ClassLabel(names=["no", "yes"])
SEVERAL = {"nucleus": Value("float32"), "golgi": Value("int8")}


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
def test_the_feature_of_the_labels_gives_the_task(feature, kind, names):
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
def test_a_feature_without_a_task_is_refused_with_what_to_do(feature):
    with pytest.raises(DataError, match="class_encode_column"):
        task_of(Features({"label": feature}))


def test_a_missing_label_column_is_refused():
    with pytest.raises(DataError, match="no column 'label': the data have the columns 'sequence', 'labels'"):
        task_of(Features({"sequence": Value("string"), "labels": Value("float32")}))


class Subclass(EsmForTokenClassification):
    """A user's class. Its name does not end as transformers' classes do."""


def with_adapters(model):
    return get_peft_model(model, LoraConfig(target_modules=["query"], r=2))


HEADS = [
    (EsmForSequenceClassification, "sequence-classification", "SEQ_CLS", AutoModelForSequenceClassification),
    (EsmForTokenClassification, "token-classification", "TOKEN_CLS", AutoModelForTokenClassification),
    (Subclass, "token-classification", "TOKEN_CLS", AutoModelForTokenClassification),
    (EsmForMaskedLM, "masked-lm", None, AutoModelForMaskedLM),
    (EsmModel, None, None, None),
]


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize(("model_class", "head", "task_type", "auto"), HEADS)
def test_the_class_of_a_model_gives_its_head_with_and_without_adapters(model_class, head, task_type, auto, adapted):
    model = make_model(model_class)
    model = with_adapters(model) if adapted else model
    assert head_of(model) == head
    assert peft_task_type(model) == task_type
    if head is not None:
        assert auto_class(head) is auto


@pytest.mark.parametrize(
    ("architectures", "head"),
    [
        (["EsmForSequenceClassification"], "sequence-classification"),
        (["EsmForTokenClassification"], "token-classification"),
        (["EsmForMaskedLM"], "masked-lm"),
        (["EsmModel"], None),
        ([], None),
        (None, None),
    ],
)
def test_the_architectures_of_a_config_give_its_head(architectures, head):
    assert head_of_config(tiny_config(architectures=architectures)) == head


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize(
    ("model_class", "labels", "problem_type", "kind"),
    [
        (EsmForSequenceClassification, 1, None, "regression"),
        (EsmForSequenceClassification, 2, None, "single_label_classification"),
        (EsmForSequenceClassification, 2, "regression", "regression"),
        (EsmForSequenceClassification, 2, "multi_label_classification", "multi_label_classification"),
        (EsmForSequenceClassification, 1, "multi_label_classification", "multi_label_classification"),
        (EsmForTokenClassification, 2, None, "token_classification"),
        (Subclass, 2, None, "token_classification"),
    ],
)
def test_the_head_and_the_config_of_a_model_give_its_task(model_class, labels, problem_type, kind, adapted):
    names = ("no", "yes")[:labels]
    options = {"id2label": dict(enumerate(names)), "problem_type": problem_type}
    model = make_model(model_class, num_labels=labels, **options)
    task = task_of_model(with_adapters(model) if adapted else model)
    assert (task.kind, task.names) == (kind, names)
    assert task.head == head_of(model)


@pytest.mark.parametrize("model_class", [EsmForMaskedLM, EsmModel])
def test_a_model_without_a_classification_head_has_no_task(model_class):
    with pytest.raises(ConfigurationError, match=f"{model_class.__name__} has no classification head"):
        task_of_model(make_model(model_class))


def test_the_class_id_of_unlabelled_tokens_is_the_one_that_torch_ignores():
    assert torch.nn.CrossEntropyLoss().ignore_index == IGNORE


@pytest.mark.parametrize(
    ("head", "options", "expected"),
    [
        (EsmForSequenceClassification, {"num_labels": 3}, None),
        (EsmForSequenceClassification, {"num_labels": 1}, "regression"),
        (EsmForSequenceClassification, {"num_labels": 3, "problem_type": "regression"}, "regression"),
        (EsmForTokenClassification, {"num_labels": 1}, "single_label_classification"),
        (EsmForMaskedLM, {"num_labels": 1, "problem_type": "regression"}, "single_label_classification"),
    ],
    ids=str,
)
def test_the_head_and_the_config_tell_the_loss_or_leave_it_to_the_labels(head, options, expected):
    assert problem_type_of(make_model(head, **options)) == expected


def test_a_model_without_a_config_has_no_problem_type_and_no_label_names():
    model = torch.nn.Linear(1, 2)
    assert problem_type_of(model) is None
    set_problem_type(model, "regression")
    assert not hasattr(model, "config")
    with pytest.raises(ConfigurationError, match="num_labels"):
        label_names_of(model)


def test_only_a_sequence_classifiers_config_gets_the_problem_type():
    classifier, tokens = make_model(), make_model(EsmForTokenClassification)
    for model in (classifier, tokens):
        set_problem_type(model, "multi_label_classification")
    assert classifier.config.problem_type == "multi_label_classification"
    assert tokens.config.problem_type is None


def test_models_with_a_loss_of_their_own_are_not_known():
    class Own(EsmForSequenceClassification):
        def forward(self, input_ids=None, labels=None):
            return super().forward(input_ids, labels=labels)

    changed, patched = make_model(), make_model()
    changed.loss_function = torch.nn.functional.cross_entropy
    patched.forward = lambda **inputs: None
    models = [make_model(), get_peft_model(make_model(), LoraConfig(target_modules=["query"]))]
    assert all(has_known_loss(model) for model in models)
    assert not any(has_known_loss(model) for model in (make_model(Own), make_model(EsmModel), changed, patched))
