"""The task of a dataset's features and of a model, and the names that transformers and peft have for it.

| feature of ``label`` | task |
|---|---|
| ``ClassLabel`` | one class per sequence |
| a struct of numbers, ``{"nucleus": Value("float32"), ...}`` | several labels per sequence: 0, 1, or null if unknown |
| ``List(ClassLabel)`` | one class per residue; null if unknown |
| ``Value("float32")``, or a list of them with a fixed length | numbers to regress; null if unknown |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from esm_efficient import compat
from esm_efficient.errors import ConfigurationError, DataError, listing

if TYPE_CHECKING:
    from datasets import Features

Kind = Literal["single_label_classification", "multi_label_classification", "token_classification", "regression"]
Head = Literal["sequence-classification", "token-classification", "masked-lm"]

Pooling = Literal["first", "mean", "attention"]
"""What the head of a sequence-level task reads: the first token, the mean over the residues, or a mean whose weights
are learned (`esm_efficient.heads`)."""

IGNORE = -100
"""The class id of a token without a label; transformers and torch leave it out of the loss."""

SPECIAL_TOKENS = 2
"""Tokens added to a sequence: ``<cls>`` before it and ``<eos>`` after it."""

MAX_TOKENS = 1024
"""The most tokens of a sequence that are read unless another number is given: ESM-2 was trained on no more."""

LARGEST_SEED = 2**32 - 1
"""The largest seed that numpy takes."""

_SUFFIXES: Mapping[str, Head] = {
    "ForSequenceClassification": "sequence-classification",
    "ForTokenClassification": "token-classification",
    "ForMaskedLM": "masked-lm",
}
_OWN_LOSSES = ("transformers.", "esm_efficient.heads")
"""Prefixes of modules whose models have transformers' losses."""
_SHOWN_NAMES = 12
_PEFT_TASKS = {"sequence-classification": "SEQ_CLS", "token-classification": "TOKEN_CLS"}


@dataclass(frozen=True)
class Task:
    """A prediction task.

    Attributes:
        kind: a ``problem_type`` of transformers, or ``"token_classification"``.
        names: the names of the classes, of the labels, or of the numbers to regress.
    """

    kind: Kind
    names: tuple[str, ...]

    @property
    def problem_type(self) -> str | None:
        """The ``problem_type`` of a model's config; None for a token classifier."""
        return None if self.kind == "token_classification" else self.kind

    @property
    def head(self) -> Head:
        """The head that the task needs."""
        return "token-classification" if self.kind == "token_classification" else "sequence-classification"

    def describe(self) -> str:
        """Return the task in one line of plain words, with the first names of many."""
        words = {
            "single_label_classification": "one class per sequence",
            "multi_label_classification": "several labels per sequence",
            "token_classification": "one class per residue",
            "regression": "numbers",
        }
        return f"{words[self.kind]}: {listing(self.names, _SHOWN_NAMES)}"


def task_of(features: Features, column: str = "label") -> Task:
    """Return the task for the feature of a label column.

    A ``ClassLabel`` is one class per sequence; a struct of numbers, several labels per sequence; a list of
    ``ClassLabel``, one class per residue; a float, or a list of floats with a fixed length, numbers to regress.

    Args:
        features: the features of a dataset.
        column: the label column.

    Raises:
        DataError: the column is missing, or no task has its feature.

    Example:
        >>> from datasets import ClassLabel, Features, List
        >>> task_of(Features({"label": List(ClassLabel(names=["free", "binding"]))})).kind
        'token_classification'
    """
    from datasets import ClassLabel, List, Value

    if column not in features:
        raise DataError(f"there is no column {column!r}: the data have the columns {', '.join(map(repr, features))}")
    feature = features[column]
    if isinstance(feature, ClassLabel):
        return Task("single_label_classification", tuple(feature.names))
    if isinstance(feature, Mapping) and feature and all(_is_number(inner) for inner in feature.values()):
        return Task("multi_label_classification", tuple(feature))
    inner = getattr(feature, "feature", None)
    if isinstance(inner, ClassLabel):
        return Task("token_classification", tuple(inner.names))
    if isinstance(feature, Value) and feature.dtype.startswith("float"):
        return Task("regression", (column,))
    is_vector = isinstance(feature, List) and feature.length > 0
    if is_vector and isinstance(inner, Value) and inner.dtype.startswith("float"):
        return Task("regression", tuple(f"{column}_{index}" for index in range(feature.length)))
    raise DataError(
        f"the column {column!r} has the feature {feature}. Expected a ClassLabel for one class per sequence "
        f"(dataset.class_encode_column({column!r}) makes one), a List of ClassLabel for one class per residue, a "
        "struct of numbers for several labels per sequence, or floats to regress"
    )


def task_of_model(model: Any) -> Task:
    """Return the task of a classifier or regressor, with the label names of its config.

    Args:
        model: a transformers model with a sequence or token classification head, with or without peft adapters.

    Raises:
        ConfigurationError: the model has no such head.
    """
    head = head_of(model)
    if head not in ("sequence-classification", "token-classification"):
        raise ConfigurationError(
            f"{type(model).__name__} has no classification head: expected a ...ForSequenceClassification or a "
            "...ForTokenClassification"
        )
    config = model.config
    names = tuple(str(config.id2label[index]) for index in range(config.num_labels))
    if head == "token-classification":
        return Task("token_classification", names)
    default: Kind = "regression" if len(names) == 1 else "single_label_classification"
    return Task(config.problem_type or default, names)


def base_model_of(model: Any) -> Any:
    """Return the model inside a model with peft adapters; any other model itself."""
    if type(model).__name__ == "PeftMixedModel":  # of peft, which has no such method there
        return model.base_model.model
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def head_of(model: Any) -> Head | None:
    """Return the kind of head of a model, by its class name and those of its parents; None for an unknown one.

    Args:
        model: a transformers model, with or without peft adapters.
    """
    return _head_of_names([parent.__name__ for parent in type(base_model_of(model)).__mro__])


def problem_type_of(model: Any) -> str | None:
    """Return the ``problem_type`` by which a model computes its loss; None if its labels decide it.

    Token classifiers and masked language models have cross-entropy, whatever their config says. One output is a number
    to regress, unless the config says something else.
    """
    if head_of(model) in ("token-classification", "masked-lm"):
        return "single_label_classification"
    config = getattr(model, "config", None)
    declared = getattr(config, "problem_type", None)
    if declared is None and getattr(config, "num_labels", None) == 1:
        return "regression"
    return declared


def set_problem_type(model: Any, problem_type: str) -> None:
    """Set ``problem_type`` in the config of a sequence classifier.

    transformers infers it from the labels in forward, but a trainer that computes the loss itself passes no labels.
    """
    if head_of(model) == "sequence-classification" and hasattr(model, "config"):
        model.config.problem_type = problem_type


def label_names_of(model: Any) -> tuple[str, ...]:
    """Return the names of a model's labels in their order: those of its config, or else their numbers.

    The labels of a masked language model are its token ids.

    Raises:
        ConfigurationError: the model has no config with ``num_labels``.
    """
    config: Any = getattr(model, "config", None)
    if head_of(model) == "masked-lm":
        return tuple(map(str, range(config.vocab_size)))
    count = getattr(config, "num_labels", None)
    if count is None:
        raise ConfigurationError(
            f"{type(model).__name__} has no config.num_labels: expected it, because the number of classes is unknown"
        )
    names = getattr(config, "id2label", None) or {}
    return tuple(str(names.get(index, index)) for index in range(count))


def has_known_loss(model: Any) -> bool:
    """Return whether a model's own loss is plain cross-entropy, binary cross-entropy or squared error.

    This is so for the heads of transformers and of this library, unless the user gave the model a ``loss_function``.
    """
    from esm_efficient._torch import undecorated  # commands read this file, and their help does not wait for torch

    base = base_model_of(model)
    own = type(base).forward
    # accelerate decorates the forward of a model that trains in half precision.
    is_own = undecorated(vars(base).get("forward", own)) is undecorated(own)
    is_known = own.__module__.startswith(_OWN_LOSSES) and is_own
    return is_known and head_of(base) is not None and not compat.has_own_loss_function(base)


def pooling_of(config: Any) -> Pooling:
    """Return what the head of a config's model reads: its ``classifier_pooling``, or ``"first"`` without one.

    Raises:
        ConfigurationError: the config has another value.
    """
    value: Any = getattr(config, "classifier_pooling", "first")
    if value not in get_args(Pooling):
        raise ConfigurationError(
            f"the config has classifier_pooling={value!r:.80}: expected one of {', '.join(get_args(Pooling))}"
        )
    return cast(Pooling, value)


def set_pooling(config: Any, pooling: Pooling) -> None:
    """Write into a config what the head of its model reads; nothing for the first token, as transformers has it."""
    vars(config).pop("classifier_pooling", None)
    if pooling != "first":
        config.classifier_pooling = pooling


def head_of_config(config: Any) -> Head | None:
    """Return the kind of head that a saved config was written for, by its ``architectures``; None if unknown."""
    return _head_of_names(config.architectures or ())


def auto_class(head: Head) -> Any:
    """Return transformers' auto class for a kind of head."""
    import transformers

    return {
        "sequence-classification": transformers.AutoModelForSequenceClassification,
        "token-classification": transformers.AutoModelForTokenClassification,
        "masked-lm": transformers.AutoModelForMaskedLM,
    }[head]


def peft_task_type(model: Any) -> str | None:
    """Return peft's ``task_type`` for a model; with it peft trains and saves the whole head. None without one."""
    head = head_of(model)
    return None if head is None else _PEFT_TASKS.get(head)


def _head_of_names(names: Any) -> Head | None:
    return next((head for name in names for suffix, head in _SUFFIXES.items() if name.endswith(suffix)), None)


def _is_number(feature: Any) -> bool:
    return getattr(feature, "dtype", "").startswith(("float", "int", "uint", "bool"))
