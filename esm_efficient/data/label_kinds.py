"""What kind of label a column holds: classes, one class per residue, or numbers.

`LabelObservations` gathers what the cells look like, `decide_encoding` tells the kind from it, and `LabelEncoding`
stores the labels. Cells that fit two kinds are an error that says how to choose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from esm_efficient.data.schema import number_of, refuse_cells, texts_of
from esm_efficient.errors import DataError, listing

if TYPE_CHECKING:
    import pyarrow as pa

LabelKind = Literal["class", "residues", "number"]
LABEL_KINDS = get_args(LabelKind)

_MAX_CLASSES = 1000


@dataclass
class LabelObservations:
    """What the cells of a label column look like, gathered block by block.

    Attributes:
        rows: labels seen.
        are_lists: whether the cells are lists; None before the first cell.
        texts: different cells, at most one more than a label may have classes.
        items: different letters of the cells, or items of the lists, likewise.
        residue_rows: rows of two or more residues that have one letter or item per residue.
        mismatches: rows in which the number of letters or items differs from the number of residues.
        first_mismatch: the first of these rows; None without one, as for the attributes below.
        first_number: the first cell that is a number, with its place.
        first_word: the first cell that is not a number, with its place.
        first_fraction: the first number that is not whole, with its place.
    """

    rows: int = 0
    are_lists: bool | None = None
    texts: set[str] = field(default_factory=set)
    items: set[str] = field(default_factory=set)
    residue_rows: int = 0
    mismatches: int = 0
    first_mismatch: str | None = None
    first_number: str | None = None
    first_word: str | None = None
    first_fraction: str | None = None

    def observe(self, cells: Sequence[Any], residues: np.ndarray, places: Sequence[str]) -> pa.Array:
        """Take note of some cells and return them as an Arrow array of text or of lists of text.

        Args:
            cells: of the label column.
            residues: int of shape (cells,): the length of each sequence.
            places: where each row is.

        Raises:
            DataError: a label is missing, or some labels are lists and others are not.
        """
        import pyarrow as pa

        are_lists = [isinstance(cell, list) for cell in cells]
        self.are_lists = are_lists[0] if self.are_lists is None else self.are_lists
        mixed = [is_list != self.are_lists for is_list in are_lists]
        refuse_cells(cells, places, mixed, "the label is a list in some rows and not in others")
        labels: list[Any] = [_items_of(cell) for cell in cells] if self.are_lists else texts_of(cells)
        refuse_cells(cells, places, [not label for label in labels], "the label is missing")
        for label, length, place in zip(labels, residues.tolist(), places, strict=True):
            self._observe_length(label, length, place)
            if len(self.items) <= _MAX_CLASSES:
                self.items.update(item for item in label if item is not None)
            if not self.are_lists and label not in self.texts:
                self._observe_text(label, place)
        self.rows += len(labels)
        return pa.array(labels, pa.list_(pa.string()) if self.are_lists else pa.string())

    def _observe_length(self, label: Sequence[str | None], residues: int, place: str) -> None:
        if len(label) != residues:
            self.mismatches += 1
            self.first_mismatch = self.first_mismatch or f"{place}: {len(label)} labels for {residues} residues"
        elif residues > 1:
            self.residue_rows += 1

    def _observe_text(self, text: str, place: str) -> None:
        if len(self.texts) <= _MAX_CLASSES:
            self.texts.add(text)
        value = number_of(text)
        if value is None:
            self.first_word = self.first_word or f"{place}: {text!r:.40}"
            return
        self.first_number = self.first_number or f"{place}: {text!r:.40}"
        if value % 1:
            self.first_fraction = self.first_fraction or f"{place}: {text!r:.40}"


@dataclass(frozen=True)
class LabelEncoding:
    """How a label column is stored.

    Attributes:
        kind: what the labels are.
        names: of the classes, sorted; empty for numbers.
        whole_numbers: whether the classes are whole numbers, so that ``1`` and ``1.0`` are the same class.
    """

    kind: LabelKind
    names: tuple[str, ...] = ()
    whole_numbers: bool = False

    def feature(self) -> Any:
        """Return the `datasets` feature of the column."""
        from datasets import ClassLabel, List, Value

        if self.kind == "number":
            return Value("float32")
        classes = ClassLabel(names=list(self.names))
        return List(classes) if self.kind == "residues" else classes

    def encode(self, labels: pa.Array) -> pa.Array:
        """Return labels as `LabelObservations.observe` made them as class ids or numbers; a null stays null."""
        import pyarrow as pa
        import pyarrow.compute as pc

        if self.kind == "number":
            return pa.array([float(label) for label in labels.to_pylist()], pa.float64())
        names = pa.array(self.names, pa.string())
        if self.kind == "residues":
            rows = labels.to_pylist()
            ids = pc.index_in(pa.array([item for row in rows for item in row], pa.string()), names)
            ends = np.cumsum([0, *map(len, rows)]).astype(np.int32)
            return pa.ListArray.from_arrays(pa.array(ends), ids)
        if self.whole_numbers:
            labels = pa.array([_whole(label) for label in labels.to_pylist()], pa.string())
        return pc.index_in(labels, names)


def decide_encoding(observed: LabelObservations, kind: LabelKind | None = None) -> LabelEncoding:
    """Decide how to store labels.

    Args:
        observed: all labels of the column.
        kind: what the labels are, if the user says so.

    Raises:
        DataError: the labels could be of two kinds, do not fit the kind, or have too many values for classes.
    """
    kind = kind or _kind_of(observed)
    if observed.are_lists and kind != "residues":
        raise DataError(f'the label is a list in every row: label_kind="{kind}" needs one value per row')
    if kind == "number":
        if observed.first_word is not None:
            raise DataError(f"the label is not a finite number in {observed.first_word}")
        return LabelEncoding(kind)
    if kind == "residues":
        if observed.mismatches:
            raise DataError(
                f"{observed.mismatches} row(s): label count differs from residue count, first in "
                f"{observed.first_mismatch}"
            )
        names = sorted(observed.items)
        if len(names) > _MAX_CLASSES or any((number_of(name) or 0) % 1 for name in names):
            raise DataError(
                f"labels per residue must be classes, but have values such as {listing(names)}: numbers per residue "
                "are not supported"
            )
        return LabelEncoding(kind, tuple(names))
    whole = observed.first_word is None and observed.first_fraction is None
    names = sorted({_whole(text) for text in observed.texts}, key=int) if whole else sorted(observed.texts)
    if len(names) > _MAX_CLASSES:
        raise DataError(
            f"the label has more than {_MAX_CLASSES} values, such as {listing(names)}: too many for classes"
        )
    return LabelEncoding(kind, tuple(names), whole)


def _kind_of(observed: LabelObservations) -> LabelKind:
    """The kind of label that the cells show."""
    if observed.are_lists or (observed.residue_rows and not observed.mismatches):
        return "residues"
    if 2 * observed.residue_rows > observed.rows:
        raise DataError(
            f"most labels have one letter per residue, but not {observed.first_mismatch}. Correct the row, or say "
            "what the labels are with label_kind="
        )
    if observed.first_number is None:
        return "class"
    if observed.first_word is not None:
        raise DataError(
            f"the label is a number in {observed.first_number}, but not in {observed.first_word}. Correct the row, or "
            'pass label_kind="class"'
        )
    if observed.first_fraction is not None:
        return "number"
    if {number_of(text) for text in observed.texts} <= {0.0, 1.0}:
        return "class"
    raise DataError(
        f"the label is a whole number in every row, such as {listing(sorted(observed.texts))}: pass "
        'label_kind="class" or label_kind="number"'
    )


def _whole(text: str) -> str:
    """The whole number that a text such as ``1.0`` writes."""
    return str(int(float(text)))


def _items_of(cell: list[Any]) -> list[str | None]:
    """The items of a list as text; None where one is missing."""
    return [None if item is None or item != item else str(item).strip() for item in cell]
