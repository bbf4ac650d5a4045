"""Labels of a training set, and class weights from them; scikit-learn does the arithmetic."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np

from esm_efficient.data.schema import WEIGHT_COLUMN
from esm_efficient.errors import ConfigurationError, DataError, listing
from esm_efficient.tasks import IGNORE, Task, head_of
from esm_efficient.training.losses import LARGEST_NUMBER


def dataset_labels(dataset: Any) -> np.ndarray:
    """Return all labels of a dataset.

    Args:
        dataset: a `datasets.Dataset`, or any sequence of mappings, with a column ``labels`` or ``label``.

    Returns:
        int32 of shape (labels,), those of all residues in a row; or float of shape (examples, labels), for several
        labels per sequence.

    Raises:
        ConfigurationError: there is no dataset, or it is a stream.
        DataError: it has no such column.
    """
    import datasets

    if dataset is None:
        raise ConfigurationError('class_weights="balanced" needs a train_dataset to count labels in')
    if not hasattr(dataset, "__len__"):
        raise ConfigurationError('class_weights="balanced" cannot count the labels of a stream: give an array')
    if not len(dataset):
        raise DataError("train_dataset has no rows: expected at least one")
    names = getattr(dataset, "column_names", None) or list(dataset[0])
    column = label_column(names)
    if column is None:
        raise DataError(f"the training data have the columns {', '.join(names)}: expected a column 'labels'")
    if isinstance(dataset, datasets.Dataset):
        blocks = (block[column] for block in dataset.select_columns(column).with_format("numpy").iter(10_000))
    else:
        blocks = ([np.asarray(dataset[index][column])] for index in range(len(dataset)))
    # Labels per residue differ in length and are concatenated; int32 keeps them small.
    flat = [np.stack(list(b)) if len({np.shape(row) for row in b}) == 1 else np.concatenate(list(b)) for b in blocks]
    multi_label = flat[0].dtype.kind == "f" and flat[0].ndim == 2
    parts = [part if multi_label else part.ravel() for part in flat]
    return np.concatenate([part if part.dtype.kind == "f" else part.astype(np.int32) for part in parts])


def label_column(names: Collection[str]) -> str | None:
    """Return the column of the labels of a tokenised data set; None if there is none.

    Raises:
        DataError: there are two, of which transformers' collators read one or the other.
    """
    found = [name for name in ("labels", "label") if name in names]
    if len(found) > 1:
        raise DataError("the data have both the columns label and labels: remove the one that does not train")
    return found[0] if found else None


def refuse_constant_labels(train: Any, task: Task, name: str | None = None) -> None:
    """Refuse training labels that are all the same, from which nothing can be learned.

    Of a stream, the labels are not read: its feature alone tells whether there is one class. With several labels or
    numbers per sequence, one that differs is enough.

    Args:
        train: the training split, raw or tokenised.
        task: the task.
        name: the name of the label column in the user's table; None for ``label``.

    Raises:
        DataError: as above; or every sequence has the weight 0.
    """
    known, where = _known_labels(train, task)
    has_ids = task.kind in ("single_label_classification", "token_classification")
    if any(len(values) and values.min() < values.max() for values in known) or not (
        any(map(len, known)) or (has_ids and len(task.names) == 1)
    ):
        return
    if len(known) > 1:
        problem = f"each of {listing(list(task.names))} has the same value in {where}: one at least must differ"
    else:
        value = known[0][0] if known else 0
        shown = repr(task.names[int(value)]) if has_ids and 0 <= value < len(task.names) else f"{value:g}"
        kind = "a class" if has_ids else "a number" if task.kind == "regression" else "a label"
        problem = f"{name or 'the label'} is {shown} in {where}: {kind} needs at least two values"
    raise DataError(f"{problem}. Give other labels, or another column of them")


def refuse_unlabelled(validation: Any, task: Task) -> None:
    """Refuse a validation split without a known label, by which early stopping could tell no epoch from another.

    Args:
        validation: the split, raw or tokenised; the labels of a stream are not read.
        task: the task.

    Raises:
        DataError: as above.
    """
    known = evaluated_labels(validation, task)
    if known and not any(map(len, known)):
        raise DataError(
            "validation has no known label, so that early stopping cannot tell which epoch is best: label some of its "
            "rows, leave the split out, or train without early stopping"
        )


def evaluated_labels(split: Any, task: Task) -> list[np.ndarray]:
    """Return the known labels of a split for evaluation, whatever its weights, one array per label or number.

    There are none of a stream, or of labels that are not numbers.
    """
    weighted = WEIGHT_COLUMN in (getattr(split, "features", None) or {})
    return _known_labels(split.remove_columns(WEIGHT_COLUMN) if weighted else split, task)[0]


def _known_labels(train: Any, task: Task) -> tuple[list[np.ndarray], str]:
    """Return the known labels of a split, one array per label or number, and where they are in words.

    There are none of a stream, of a column that the split lacks, and of labels that are not numbers.

    Raises:
        DataError: every sequence has the weight 0.
    """
    import pyarrow as pa

    features = getattr(train, "features", None) or {}
    column = label_column(features)
    if column is None or not hasattr(train, "__len__") or not len(train):
        return [], "all training rows"
    read = [column, *([WEIGHT_COLUMN] if WEIGHT_COLUMN in features else [])]
    table = train.select_columns(read).with_format("arrow")[:]
    rows = np.ones(len(table), dtype=bool)
    if len(read) > 1:
        rows = table[WEIGHT_COLUMN].to_numpy() != 0
        if not rows.any():
            raise DataError(f"the {WEIGHT_COLUMN} of all {len(rows):,} training rows is 0: nothing can be learned")
    labels = table[column].filter(pa.array(rows)).combine_chunks()
    parts = labels.flatten() if pa.types.is_struct(labels.type) else [labels]
    while any(hasattr(part.type, "value_type") for part in parts):  # lists
        parts = [part.flatten() for part in parts]
    is_number = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean)
    if not all(any(check(part.type) for check in is_number) for part in parts):
        return [], "all training rows"
    values = [part.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False) for part in parts]
    if len(values) == 1 and len(task.names) > 1 and task.kind in ("multi_label_classification", "regression"):
        values = list(values[0].reshape(-1, len(task.names)).T)
    # A number may be -100.
    known = [v[~np.isnan(v) & ((v != IGNORE) | (task.kind == "regression"))] for v in values]
    unit = "labelled residues of the training rows" if task.kind == "token_classification" else "training rows"
    return known, f"all {len(known[0]):,} {unit}"


def check_labels(
    dataset: Any, collator: Any, model: Any, problem_type: str | None, *, name: str = "training set"
) -> None:
    """Check all labels of a data set before the first step, if their column reaches the loss unchanged.

    This is so for a `datasets.Dataset` without a transform and a collator of transformers that makes no labels. The
    loss checks the labels of every other set batch by batch.

    Args:
        dataset: the data set.
        collator: the data collator.
        model: the model, whose config tells the number of classes.
        problem_type: as in the model's config; None if the labels decide it.
        name: what the data set is called in a message; only the training set must have a known label.

    Raises:
        DataError: no label is known, or a label is wrong; the message names the first row.
    """
    import datasets

    is_plain = isinstance(dataset, datasets.Dataset) and dataset.format["type"] != "custom"
    column = label_column(dataset.column_names) if is_plain else None
    if column is None or not _keeps_labels(collator):
        return
    feature = dataset.features[column]
    while hasattr(feature, "feature"):  # of lists
        feature = feature.feature
    is_whole = "int" in str(getattr(feature, "dtype", ""))
    has_ids = problem_type == "single_label_classification" or (problem_type is None and is_whole)
    start, is_any_known = 0, False
    for block in dataset.select_columns(column).with_format("numpy").iter(10_000):
        rows = [np.asarray(row) for row in block[column]]
        values = np.concatenate([row.ravel() for row in rows]) if rows else np.empty(0)
        if values.dtype.kind not in "iuf":
            return
        known, wrong, expected = _judge(values, model, problem_type, has_ids=has_ids)
        if wrong.any():
            row = start + int(np.repeat(np.arange(len(rows)), [row.size for row in rows])[wrong][0])
            label = "null" if np.isnan(values[wrong][0]) else f"{values[wrong][0]:g}"
            raise DataError(f"row {row} of the {name} has the label {label}: expected {expected}")
        is_any_known = is_any_known or bool(known.any())
        start += len(rows)
    if not is_any_known and name == "training set":
        raise DataError(f"no label of the training set is known: all {start} row(s) have -100 or NaN in {column!r}")


def _keeps_labels(collator: Any) -> bool:
    kind = type(collator) if not callable(getattr(collator, "__code__", None)) else collator
    name = getattr(collator, "__name__", type(collator).__name__)
    module = getattr(collator, "__module__", kind.__module__)
    return module.startswith("transformers.") and "Language" not in name and "WholeWord" not in name


def _judge(
    values: np.ndarray, model: Any, problem_type: str | None, *, has_ids: bool
) -> tuple[np.ndarray, np.ndarray, str]:
    """Return masks of the labels that are known and that are wrong, and what is expected.

    Class ids are floats here if some are null, as numpy has no other place for a null.
    """
    is_float = values.dtype.kind == "f"
    if problem_type == "regression":
        known = ~np.isnan(values) if is_float else np.ones(len(values), dtype=bool)
        return (
            known,
            np.abs(values) > LARGEST_NUMBER,
            f"a number of at most {LARGEST_NUMBER:g}; standardise the numbers",
        )
    known = (values != IGNORE) & ~np.isnan(values) if is_float else values != IGNORE
    if is_float and not has_ids:
        return known, known & ((values < 0) | (values > 1)), "a number from 0 to 1, or NaN or -100 if it is unknown"
    head, config = head_of(model), model.config
    classes = config.vocab_size if head == "masked-lm" else config.num_labels
    wrong = np.isnan(values) | (known & ((values < 0) | (values >= classes)))
    return (
        known,
        wrong,
        f"a class id from 0 to {classes - 1} (config.num_labels is {classes}), or -100 if it is unknown",
    )


def balanced_class_weights(labels: Sequence[int] | np.ndarray, label_names: Sequence[str]) -> np.ndarray:
    """Return class weights inversely proportional to the class frequencies, with a mean of one over the examples.

    Args:
        labels: class ids; -100 means no label and is left out.
        label_names: names of the classes in the order of their ids; their number is the number of classes.

    Returns:
        float64 of shape (classes,): examples / (classes x examples of the class), as
        `sklearn.utils.class_weight.compute_class_weight` defines "balanced".

    Raises:
        DataError: a class has no example, or a label is not a class id.

    Example:
        >>> balanced_class_weights([0, 0, 0, 1], ["no", "yes"]).round(3).tolist()
        [0.667, 2.0]
    """
    from sklearn.utils.class_weight import compute_class_weight

    flat = np.asarray(labels).ravel()
    flat = flat[flat != IGNORE]
    classes = np.arange(len(label_names))
    if unknown := sorted(set(flat.tolist()) - set(classes.tolist())):
        raise DataError(
            f"labels {unknown} are not class ids: expected 0 to {len(classes) - 1} ({', '.join(label_names)})"
        )
    check_all_present([index in flat for index in classes], label_names)
    return np.asarray(compute_class_weight("balanced", classes=classes, y=flat), dtype=np.float64)


def balanced_label_weights(labels: np.ndarray, label_names: Sequence[str]) -> np.ndarray:
    """Return per-label positive weights, negatives / positives (the `pos_weight` of `torch.nn.BCEWithLogitsLoss`).

    Args:
        labels: float of shape (examples, labels), 0 to 1; NaN or -100 if unknown.
        label_names: names of the labels in their order.

    Returns:
        float64 of shape (labels,).

    Raises:
        DataError: a label has no positive example, or the shape does not fit.

    Example:
        >>> balanced_label_weights(np.array([[1.0, 0.0], [0.0, 1.0], [0.0, np.nan]]), ["a", "b"]).tolist()
        [2.0, 1.0]
    """
    table = np.asarray(labels, dtype=np.float64)
    if table.ndim != 2 or table.shape[1] != len(label_names):
        raise DataError(f"labels have shape {table.shape}: expected (examples, {len(label_names)})")
    known = ~np.isnan(table) & (table != IGNORE)
    positives = np.where(known, table, 0).sum(0)
    check_all_present(positives.tolist(), label_names)
    # A label without negatives keeps a small weight, so that its loss does not vanish.
    return np.maximum(known.sum(0) - positives, 1) / positives


def resolve_class_weights(
    weights: str | Mapping[Any, float] | Sequence[float] | Any,
    dataset: Any,
    label_names: Sequence[str],
    *,
    problem_type: str | None,
) -> np.ndarray:
    """Return class weights as an array.

    Args:
        weights: ``"balanced"``, or weights as in `check_class_weights`.
        dataset: the training set; only ``"balanced"`` counts its labels.
        label_names: names of the classes in the order of their ids.
        problem_type: as in a model's config; None if the labels decide between one class and several labels.

    Returns:
        float64 of shape (classes,).

    Raises:
        ConfigurationError: as `check_class_weights` and `dataset_labels`, or the task is regression.
        DataError: as `balanced_class_weights` and `balanced_label_weights`.
    """
    if problem_type == "regression":
        raise ConfigurationError("class_weights with regression: expected None, because numbers have no classes")
    if not (isinstance(weights, str) and weights == "balanced"):
        return check_class_weights(weights, label_names)
    labels = dataset_labels(dataset)
    has_several = problem_type == "multi_label_classification" or (problem_type is None and labels.dtype.kind == "f")
    return (balanced_label_weights if has_several else balanced_class_weights)(labels, label_names)


def check_class_weights(weights: Mapping[Any, float] | Sequence[float] | Any, label_names: Sequence[str]) -> np.ndarray:
    """Check weights that a user gave and return them as an array.

    Args:
        weights: one number per class, as a sequence, an array or a tensor in the order of the class ids; or a mapping
            that gives a number for each label name or for each class id.
        label_names: names of the classes in the order of their ids.

    Returns:
        float64 of shape (classes,).

    Raises:
        ConfigurationError: there are too few or too many names or numbers, or numbers are negative, not finite, or all
            zero.

    Example:
        >>> check_class_weights({"yes": 2, "no": 1}, ["no", "yes"]).tolist()
        [1.0, 2.0]
    """
    names = ", ".join(label_names)
    if isinstance(weights, Mapping):
        ids: Sequence[Any] = range(len(label_names))
        # Names may look like ids, but are never integers.
        keys = ids if all(isinstance(key, Integral) for key in weights) else label_names
        if wrong := set(weights) ^ set(keys):
            raise ConfigurationError(
                f"class_weights must name every label once ({names}), or every class id from 0 to {len(ids) - 1}; "
                f"wrong or missing: {', '.join(sorted(map(str, wrong)))}"
            )
        weights = [weights[key] for key in keys]
    elif isinstance(weights, str):
        raise ConfigurationError(f'class_weights={weights!r}: expected "balanced", an array, a mapping, or None')
    elif hasattr(weights, "detach"):
        weights = weights.detach().cpu()
    array = np.asarray(weights, dtype=np.float64)
    if array.shape != (len(label_names),):
        raise ConfigurationError(f"class_weights has shape {array.shape}: expected one number for each of {names}")
    if not np.isfinite(array).all() or (array < 0).any() or not array.any():
        raise ConfigurationError(f"class_weights={array.tolist()}: expected finite numbers >= 0, not all of them 0")
    return array


def check_all_present(present: Sequence[Any], label_names: Sequence[str]) -> None:
    """Refuse labels of which no training example is present.

    Args:
        present: per label, whether there is an example.
        label_names: the names of the labels.

    Raises:
        DataError: a label has none.
    """
    if absent := [name for name, is_present in zip(label_names, present, strict=True) if not is_present]:
        raise DataError(
            f"no training example has the label {', '.join(absent)}, so it has no balanced weight. Add "
            "examples, split the data in another way, or pass class_weights=None"
        )
