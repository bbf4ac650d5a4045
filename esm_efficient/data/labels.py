"""What a data set's labels are, from the features of its column ``label``, and how they stand beside the tokens.

| feature of ``label`` | task |
|---|---|
| ``ClassLabel`` | one class a sequence |
| a struct of numbers, ``{"nucleus": Value("float32"), ...}`` | several labels a sequence: 0, 1, or null where unknown |
| ``List(ClassLabel)`` | one class a residue; null where unknown |
| ``Value("float32")``, or a list of them with a fixed length | numbers to regress; null where unknown |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from esm_efficient.errors import DataError, listing

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Features

Kind = Literal["single_label_classification", "multi_label_classification", "token_classification", "regression"]

IGNORE = -100
"""The class of what has none; transformers and torch leave it out of a loss."""


@dataclass(frozen=True)
class Task:
    """What is to be learnt.

    Attributes:
        kind: in the words of transformers' ``problem_type``, and ``"token_classification"``.
        names: of the classes, of the labels, or of the numbers to regress.
    """

    kind: Kind
    names: tuple[str, ...]

    @property
    def problem_type(self) -> str | None:
        """What a model's config says of the task; nothing for a token classifier."""
        return None if self.kind == "token_classification" else self.kind

    def describe(self) -> str:
        """One line for a person."""
        words = {
            "single_label_classification": "one class a sequence",
            "multi_label_classification": "several labels a sequence",
            "token_classification": "one class a residue",
            "regression": "numbers",
        }
        return f"{words[self.kind]}: {', '.join(self.names)}"


def task_of(features: Features, column: str = "label") -> Task:
    """The task that the features of a label column stand for, as the table above has it.

    Raises:
        DataError: there is no such column, or its feature stands for none.

    Example:
        >>> from datasets import ClassLabel, Features, List
        >>> task_of(Features({"label": List(ClassLabel(names=["free", "binding"]))})).kind
        'token_classification'
    """
    from datasets import ClassLabel, List, Value

    feature = features.get(column)
    if isinstance(feature, ClassLabel):
        return Task("single_label_classification", tuple(feature.names))
    if isinstance(feature, Mapping) and feature and all(_is_number(inner) for inner in feature.values()):
        return Task("multi_label_classification", tuple(feature))
    inner = getattr(feature, "feature", None)
    if isinstance(inner, ClassLabel):
        return Task("token_classification", tuple(inner.names))
    if isinstance(feature, Value) and feature.dtype.startswith("float"):
        return Task("regression", (column,))
    several = isinstance(feature, List) and feature.length > 0
    if several and isinstance(inner, Value) and inner.dtype.startswith("float"):
        return Task("regression", tuple(f"{column}_{index}" for index in range(feature.length)))
    raise DataError(
        f"the column {column!r} must be a ClassLabel, which names the classes "
        f"(dataset.class_encode_column({column!r})); a List of ClassLabel for one class a residue; a struct of numbers "
        f"for several labels a sequence; or float numbers to regress. Found {feature}"
    )


def label_feature(task: Task, feature: Any) -> Any:
    """The feature of the labels that a model trains on."""
    from datasets import List, Value

    if task.kind == "multi_label_classification":
        return List(Value("float32"), length=len(task.names))
    if task.kind == "regression":
        return Value("float32") if len(task.names) == 1 else List(Value("float32"), length=len(task.names))
    # Beside the tokens stand two more labels than residues: a list of a fixed length would have another one.
    return List(feature.feature) if task.kind == "token_classification" else feature


def encode_labels(
    labels: pa.Array, task: Task, residues: np.ndarray, kept: np.ndarray, offsets: np.ndarray, rows: list[str]
) -> pa.Array:
    """Labels as a model trains on them.

    Args:
        labels: the column of a batch of sequences.
        task: what they are.
        residues: of each sequence, before it is cut.
        kept: bool, which residues of all sequences stay.
        offsets: where each sequence's tokens begin, special ones included, and the end of the last.
        rows: what to call each row in a message.

    Raises:
        DataError: a label is missing, or is none of the task's.
    """
    import pyarrow as pa

    if task.kind == "single_label_classification":
        values = _classes(labels, task, rows)
        if bad := np.flatnonzero(values == IGNORE).tolist():
            raise DataError(f"the label is missing in {len(bad)} row(s): {listing([rows[i] for i in bad])}")
        return pa.array(values)
    if task.kind == "multi_label_classification":
        parts = [_numbers(labels.field(index)) for index in range(labels.type.num_fields)]
        table = np.stack(parts, axis=1)
        table[labels.is_null().to_numpy(zero_copy_only=False)] = np.nan
        if bad := np.flatnonzero(~(np.isnan(table) | ((table >= 0) & (table <= 1))).all(1)).tolist():
            raise DataError(f"a label is not between 0 and 1 in {len(bad)} row(s): {listing([rows[i] for i in bad])}")
        return pa.FixedSizeListArray.from_arrays(pa.array(table.ravel()), len(task.names))
    if task.kind == "regression":
        flat = _numbers(labels.flatten() if len(task.names) > 1 else labels)
        if len(flat) != len(rows) * len(task.names):
            raise DataError(f"a row has not {len(task.names)} numbers: {listing(rows)}")
        if bad := np.flatnonzero(np.isinf(flat.reshape(len(rows), -1)).any(1)).tolist():
            raise DataError(f"a number is infinite in {len(bad)} row(s): {listing([rows[i] for i in bad])}")
        return pa.array(flat) if len(task.names) == 1 else pa.FixedSizeListArray.from_arrays(flat, len(task.names))
    return _token_labels(labels, task, residues, kept, offsets, rows)


def _token_labels(
    labels: pa.Array, task: Task, residues: np.ndarray, kept: np.ndarray, offsets: np.ndarray, rows: list[str]
) -> pa.Array:
    """Labels of residues, with `IGNORE` beside special tokens."""
    import pyarrow as pa
    import pyarrow.compute as pc

    found = pc.fill_null(pc.list_value_length(labels).cast(pa.int64()), -1).to_numpy(zero_copy_only=False)
    if bad := np.flatnonzero(found != residues).tolist():
        shown = [f"{rows[i]} ({residues[i]} residues, {max(found[i], 0)} labels)" for i in bad]
        raise DataError(
            f"{len(bad)} row(s) have not one label for each residue: {listing(shown)}. For several labels of a whole "
            "sequence, make the column a struct of numbers"
        )
    values = _classes(labels.flatten(), task, np.repeat(rows, residues).tolist() if len(rows) else [])
    beside = np.full(offsets[-1], IGNORE, dtype=np.int64)
    inner = np.ones(len(beside), dtype=bool)
    inner[offsets[:-1]] = inner[offsets[1:] - 1] = False
    beside[inner] = values[kept]
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(beside))


def _classes(labels: pa.Array, task: Task, rows: list[str]) -> np.ndarray:
    """Class ids, int64, with `IGNORE` for null."""
    import pyarrow.compute as pc

    values = pc.fill_null(labels, IGNORE).to_numpy(zero_copy_only=False).astype(np.int64)
    strange = (values != IGNORE) & ((values < 0) | (values >= len(task.names)))
    if strange.any():
        shown = [f"{values[i]} in {rows[i]}" for i in np.flatnonzero(strange)[:6].tolist()]
        raise DataError(f"a label is no class of the {len(task.names)} ({', '.join(task.names)}): {listing(shown)}")
    return values


def _numbers(values: pa.Array) -> np.ndarray:
    """float32, NaN for null."""
    import pyarrow as pa

    return values.cast(pa.float32()).to_numpy(zero_copy_only=False).astype(np.float32)


def _is_number(feature: Any) -> bool:
    return getattr(feature, "dtype", "").startswith(("float", "int", "uint", "bool"))
