"""Class weights from labels; scikit-learn does the arithmetic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from esm_efficient.errors import ConfigurationError, DataError


def dataset_labels(dataset: Any) -> np.ndarray:
    """Every label of a data set.

    Args:
        dataset: of `datasets`, or any sequence of mappings, with a column ``labels`` or ``label``.

    Returns:
        int32 of shape (labels,), those of all residues in a row; or float of shape (examples, labels), for several a
        sequence.

    Raises:
        ConfigurationError: there is no data set, or it is a stream.
        DataError: it has no such column.
    """
    import datasets

    if dataset is None:
        raise ConfigurationError('class_weights="balanced" needs a train_dataset to count labels in')
    if not hasattr(dataset, "__len__"):
        raise ConfigurationError('class_weights="balanced" cannot count the labels of a stream: give an array')
    names = getattr(dataset, "column_names", None) or list(dataset[0])
    column = next((name for name in ("labels", "label") if name in names), None)
    if column is None:
        raise DataError(f"the training data have no column 'labels', only {', '.join(names)}")
    if isinstance(dataset, datasets.Dataset):
        blocks = (block[column] for block in dataset.select_columns(column).with_format("numpy").iter(10_000))
    else:
        blocks = ([np.asarray(dataset[index][column])] for index in range(len(dataset)))
    # Rows of residues differ in length and are put one after another; classes take the smallest of types.
    flat = [np.stack(list(b)) if len({np.shape(row) for row in b}) == 1 else np.concatenate(list(b)) for b in blocks]
    several = flat[0].dtype.kind == "f" and flat[0].ndim == 2
    parts = [part if several else part.ravel() for part in flat]
    return np.concatenate([part if part.dtype.kind == "f" else part.astype(np.int32) for part in parts])


def balanced_class_weights(labels: Sequence[int] | np.ndarray, label_names: Sequence[str]) -> np.ndarray:
    """Weights inversely proportional to how often each class occurs, with a mean of one over the examples.

    Args:
        labels: class ids; -100 stands for no label and is left out.
        label_names: names of the classes in the order of their ids; their number is the number of classes.

    Returns:
        float64 of shape (classes,): examples / (classes x examples of the class), as
        `sklearn.utils.class_weight.compute_class_weight` defines "balanced".

    Raises:
        DataError: a class has no example, or a label is no class.

    Example:
        >>> balanced_class_weights([0, 0, 0, 1], ["no", "yes"]).round(3).tolist()
        [0.667, 2.0]
    """
    from sklearn.utils.class_weight import compute_class_weight

    flat = np.asarray(labels).ravel()
    flat = flat[flat != -100]
    classes = np.arange(len(label_names))
    if strange := sorted(set(flat.tolist()) - set(classes.tolist())):
        raise DataError(f"labels {strange} are no class: there are {len(classes)} ({', '.join(label_names)})")
    if absent := [name for index, name in enumerate(label_names) if index not in flat]:
        raise DataError(
            f"no example has the label {', '.join(absent)}, so it has no balanced weight. Add examples, or give the "
            "weights as an array"
        )
    return np.asarray(compute_class_weight("balanced", classes=classes, y=flat), dtype=np.float64)


def balanced_label_weights(labels: np.ndarray, label_names: Sequence[str]) -> np.ndarray:
    """Weights of several labels an example, each as often missing as it holds, times: negatives / positives.

    Args:
        labels: float of shape (examples, labels), 0 to 1; NaN or -100 where unknown.
        label_names: names of the labels in their order.

    Returns:
        float64 of shape (labels,), the ``pos_weight`` that `torch.nn.BCEWithLogitsLoss` names as an example.

    Raises:
        DataError: a label holds nowhere, or the shape does not fit.

    Example:
        >>> balanced_label_weights(np.array([[1.0, 0.0], [0.0, 1.0], [0.0, np.nan]]), ["a", "b"]).tolist()
        [2.0, 1.0]
    """
    table = np.asarray(labels, dtype=np.float64)
    if table.ndim != 2 or table.shape[1] != len(label_names):
        raise DataError(f"labels have shape {table.shape}: expected (examples, {len(label_names)})")
    known = ~np.isnan(table) & (table != -100)
    positive = np.where(known, table, 0).sum(0)
    if absent := [name for name, count in zip(label_names, positive, strict=True) if not count]:
        raise DataError(
            f"no example has the label {', '.join(absent)}, so it has no balanced weight. Add examples, or give the "
            "weights as an array"
        )
    # A label that always holds has no negatives: it keeps a weight, so that its loss does not vanish.
    return np.maximum(known.sum(0) - positive, 1) / positive


def check_class_weights(weights: Mapping[str, float] | Sequence[float] | Any, label_names: Sequence[str]) -> np.ndarray:
    """Bring weights that a user gave into an array.

    Args:
        weights: one number a class, as a sequence, an array or a tensor in the order of the class ids; or a mapping
            by label name that names every class.
        label_names: names of the classes in the order of their ids.

    Returns:
        float64 of shape (classes,).

    Raises:
        ConfigurationError: names or numbers are missing, too many, negative, not finite, or all zero.

    Example:
        >>> check_class_weights({"yes": 2, "no": 1}, ["no", "yes"]).tolist()
        [1.0, 2.0]
    """
    names = ", ".join(label_names)
    if isinstance(weights, Mapping):
        if wrong := set(weights) ^ set(label_names):
            raise ConfigurationError(
                f"class_weights must name every label once ({names}); wrong or missing: {', '.join(map(str, wrong))}"
            )
        weights = [weights[name] for name in label_names]
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
