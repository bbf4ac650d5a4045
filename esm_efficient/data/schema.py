"""Which column of a table is what, and what kind of label its cells hold; a bad cell is an error that names its row."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from esm_efficient.data.sequences import clean
from esm_efficient.errors import ConfigurationError, DataError, listing

if TYPE_CHECKING:
    import pyarrow as pa

WEIGHT_COLUMN = "sample_weight"
"""How much a sequence counts in the loss: a number >= 0, 1 for all if there is no such column."""

NAMES = {
    "sequence": ("sequence", "seq", "protein_sequence", "aa_sequence", "protein", "primary"),
    "label": ("label", "labels", "target", "class", "y"),
    "accession": ("accession", "acc", "id", "entry", "protein_id", "uniprot", "uniprot_id", "name"),
    "partition": ("partition", "fold"),
    "split": ("split",),
    WEIGHT_COLUMN: (WEIGHT_COLUMN,),
}
"""What a column may be called, in any case, to be found without being named."""


def compile_pattern(header: str | None) -> re.Pattern[str] | None:
    """A pattern for headers of FASTA records; None for None.

    Raises:
        ConfigurationError: it is no regular expression, or names no group.
    """
    if header is None:
        return None
    try:
        pattern = re.compile(header)
    except re.error as error:
        raise ConfigurationError(f"header={header!r} is no regular expression ({error})") from error
    if not pattern.groupindex:
        raise ConfigurationError(f"header={header!r} has no named group, such as (?P<label>...)")
    return pattern


def match_headers(
    pattern: re.Pattern[str], columns: Mapping[str, list[Any]], path: str | Path, places: list[str]
) -> dict[str, list[str]]:
    """What a pattern finds in the headers of FASTA records: a column for each of its named groups.

    Raises:
        ConfigurationError: the file is no FASTA file.
        DataError: a header does not match.
    """
    if "header" not in columns:
        raise ConfigurationError(f"{path} is no FASTA file: header= is for the headers of one")
    matches = [pattern.search(header) for header in columns["header"]]
    if bad := [place for place, match in zip(places, matches, strict=True) if match is None]:
        raise DataError(f"the header does not match {pattern.pattern!r} in {len(bad)} record(s): {listing(bad)}")
    return {name: [match[name] or "" for match in matches if match] for name in pattern.groupindex}


def find_column(what: str, names: Sequence[str], given: str | None, path: str | Path) -> str | None:
    """The column that was named, or the only one that is called like what is wanted; None if there is none.

    Raises:
        DataError: the column that was named is not there, or it could be any of several.
    """
    if given is not None:
        if given not in names:
            raise DataError(f"{path} has no column {given!r}; it has {', '.join(names)}")
        return given
    found = [name for name in names if name.lower() in NAMES[what]]
    if len(found) > 1:
        raise DataError(f"{path}: {what} could be any of {', '.join(map(repr, found))}: name one with {what}=")
    return found[0] if found else None


def column_of(columns: Mapping[str, list[Any]], name: str, path: str | Path) -> list[Any]:
    """The cells of a column that was named.

    Raises:
        DataError: it is not there.
    """
    find_column("", list(columns), name, path)
    return columns[name]


LabelKind = Literal["class", "residues", "number"]

_MOST_CLASSES = 1000
_ONES = {"1": 1.0, "1.0": 1.0, "true": 1.0, "0": 0.0, "0.0": 0.0, "false": 0.0}
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}


def complain(cells: Sequence[Any], places: Sequence[str], bad: Sequence[bool], what: str) -> None:
    """Raise for the cells that are bad, with their rows.

    Raises:
        DataError: there is one.
    """
    if shown := [f"{place}: {str(c)!r:.40}" for c, place, b in zip(cells, places, bad, strict=True) if b]:
        raise DataError(f"{what} in {len(shown)} row(s): {listing(shown)}")


def texts_of(cells: Sequence[Any]) -> list[str]:
    """Cells as text; empty for a missing one."""
    return ["" if cell is None or cell != cell else str(cell).strip() for cell in cells]


def sequences_of(cells: Sequence[Any], places: Sequence[str]) -> list[str]:
    """Cells as clean sequences, as `esm_efficient.data.sequences.clean` makes them.

    Raises:
        DataError: one is no text, is empty, or holds what is no letter.
    """
    complain(cells, places, [not isinstance(cell, str) for cell in cells], "the sequence is no text")
    cleaned = [clean(cell) for cell in cells]
    complain(cells, places, [not sequence for sequence in cleaned], "the sequence is empty")
    wrong = [not (sequence.isascii() and sequence.isalpha()) for sequence in cleaned]
    complain(cells, places, wrong, "the sequence holds what is no letter")
    return cleaned


def zeros_and_ones(cells: Sequence[Any], column: str, places: Sequence[str]) -> np.ndarray:
    """Cells as float32, NaN where one is empty.

    Raises:
        DataError: one is neither 0 nor 1 nor empty.
    """
    texts = [text.lower() for text in texts_of(cells)]
    complain(cells, places, [bool(t) and t not in _ONES for t in texts], f"{column} is neither 0 nor 1 nor empty")
    return np.array([_ONES.get(text, np.nan) for text in texts], dtype=np.float32)


def whole_numbers(cells: Sequence[Any], column: str, places: Sequence[str]) -> np.ndarray:
    """Cells as int32.

    Raises:
        DataError: one is no whole number.
    """
    values = [number_of(text) for text in texts_of(cells)]
    wrong = [v is None or v % 1 != 0 or abs(v) >= 2**31 for v in values]
    complain(cells, places, wrong, f"{column} is no whole number")
    return np.array(values, dtype=np.int32)


def weights_of(cells: Sequence[Any], column: str, places: Sequence[str]) -> np.ndarray:
    """Cells as float32.

    Raises:
        DataError: one is no finite number >= 0.
    """
    values = [number_of(text) for text in texts_of(cells)]
    complain(cells, places, [v is None or v < 0 for v in values], f"{column} is no number >= 0")
    return np.array(values, dtype=np.float32)


def split_names(cells: Sequence[Any], places: Sequence[str]) -> list[str]:
    """Cells as ``train``, ``validation`` or ``test``, from the usual words for them.

    Raises:
        DataError: one is none of them.
    """
    names = [_SPLITS.get(text.lower(), "") for text in texts_of(cells)]
    complain(cells, places, [not name for name in names], "the split is none of train, validation and test")
    return names


def number_of(text: str) -> float | None:
    """A finite number, as people write one."""
    try:
        value = float(text) if text.isascii() and "_" not in text else math.nan
    except ValueError:
        return None
    return value if abs(value) <= np.finfo(np.float32).max else None


def _items(cell: Any) -> list[str | None]:
    """The items of a list as text; None where one is missing."""
    return (
        [None if item is None or item != item else str(item).strip() for item in cell] if isinstance(cell, list) else []
    )


class LabelScan:
    """Looks at every label of a column, to tell what they are: classes, classes of residues, or numbers.

    Args:
        kind: what they are, if the user says it.
    """

    def __init__(self, kind: LabelKind | None = None) -> None:
        if kind not in (None, "class", "residues", "number"):
            raise ConfigurationError(f'label_kind={kind!r}: expected "class", "residues" or "number"')
        self.kind = kind
        self.values: dict[str, str] = {}
        self.letters: set[str] = set()
        self.lists: bool | None = None
        self.rows = self.fitting = 0
        self.unfit: str | None = None
        self.number: str | None = None
        self.text: str | None = None
        self.fraction: str | None = None
        self.names: list[str] = []

    def update(self, cells: Sequence[Any], residues: np.ndarray, places: Sequence[str]) -> list[Any]:
        """Look at some labels, and return them as text or lists of text.

        Raises:
            DataError: a label is missing, or is a list where another is none.
        """
        lists = [isinstance(cell, list) for cell in cells]
        self.lists = lists[0] if self.lists is None else self.lists
        complain(
            cells, places, [one != self.lists for one in lists], "the label is a list in some rows and not in others"
        )
        found: list[Any] = [_items(cell) for cell in cells] if self.lists else texts_of(cells)
        complain(cells, places, [len(label) == 0 for label in found], "the label is missing")
        for label, length, place in zip(found, residues.tolist(), places, strict=True):
            if len(label) != length:
                if self.kind == "residues" or self.lists:
                    raise DataError(f"{place}: {len(label)} labels for {length} residues")
                self.unfit = self.unfit or f"{place}: {len(label)} letters for {length} residues"
            elif length > 1:
                self.fitting += 1
            self.rows += 1
            if len(self.letters) <= _MOST_CLASSES:
                self.letters.update(letter for letter in label if letter is not None)
            if self.lists:
                continue
            if len(self.values) <= _MOST_CLASSES:
                self.values.setdefault(label, place)
            value = number_of(label)
            if value is None:
                self.text = self.text or f"{place}: {label!r:.40}"
            else:
                self.number = self.number or f"{place}: {label!r:.40}"
                if value % 1:
                    self.fraction = self.fraction or place
        return found

    def feature(self) -> Any:
        """The feature of the column.

        Raises:
            DataError: the labels could be two things, or are of too many kinds to be classes.
        """
        from datasets import ClassLabel, List, Value

        kind = self._decide()
        if kind == "number":
            if self.text is not None:
                raise DataError(f"the label is no finite number in {self.text}")
            return Value("float32")
        if kind == "residues":
            self.names = sorted(self.letters)
            if len(self.names) > _MOST_CLASSES or any((number_of(name) or 0) % 1 for name in self.names):
                raise DataError(
                    f"labels of residues are classes, and here they have values such as {listing(self.names)}: numbers "
                    "for each residue cannot be learnt"
                )
            return List(ClassLabel(names=self.names))
        numeric = self.text is None and self.fraction is None
        self.names = sorted({str(int(float(v))) for v in self.values}, key=int) if numeric else sorted(self.values)
        if len(self.names) > _MOST_CLASSES:
            raise DataError(
                f"the label has more than {_MOST_CLASSES} values, such as {listing(self.names)}: no classes"
            )
        return ClassLabel(names=self.names)

    def _decide(self) -> LabelKind:
        if self.kind is None:
            if self.lists or (self.fitting and self.unfit is None):
                self.kind = "residues"
            elif 2 * self.fitting > self.rows:
                raise DataError(
                    f"most labels have one letter for each residue, and one has not: {self.unfit}. Mend it, or say "
                    "label_kind="
                )
            elif self.number is None:
                self.kind = "class"
            elif self.text is not None:
                raise DataError(
                    f"the label is a number in {self.number}, and none in {self.text}: mend it, or say "
                    'label_kind="class"'
                )
            elif self.fraction is not None:
                self.kind = "number"
            elif {str(number_of(value)) for value in self.values} <= {"0.0", "1.0"}:
                self.kind = "class"
            else:
                raise DataError(
                    f"the label is a whole number in every row, such as {listing(list(self.values))}: say "
                    'label_kind="class" or label_kind="number"'
                )
        return self.kind

    def encode(self, labels: pa.Array) -> pa.Array:
        """Labels that were looked at, in their final form."""
        import pyarrow as pa
        import pyarrow.compute as pc

        if self.kind == "number":
            return pa.array([float(label) for label in labels.to_pylist()], pa.float64())
        if self.kind == "class":
            whole = self.text is None and self.fraction is None
            texts = pa.array([str(int(float(v))) for v in labels.to_pylist()]) if whole else labels
            return pc.index_in(texts, pa.array(self.names))
        rows = labels.to_pylist()
        # A null among the labels of residues is none of the names, and stays null.
        ids = pc.index_in(pa.array([letter for row in rows for letter in row], pa.string()), pa.array(self.names))
        lengths = np.fromiter(map(len, rows), dtype=np.int32, count=len(rows))
        return pa.ListArray.from_arrays(pa.array(np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)), ids)
