"""What kind of label a column holds: classes, one class per residue, several labels per sequence, or numbers.

`LabelObservations` gathers what the cells look like, `decide_encoding` tells the kind from it, and `LabelEncoding`
stores the labels. Cells that fit two kinds, and cells that are unlikely to be classes, are an error that says how to
choose.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from esm_efficient.data.label_cells import (
    MAX_CLASSES,
    MAX_NAME,
    SEPARATORS,
    LabelObservations,
    Reading,
    items_of,
    letters_of,
    parts_of,
    spelling,
)
from esm_efficient.data.schema import number_of
from esm_efficient.errors import ConfigurationError, DataError, listing

if TYPE_CHECKING:
    import pyarrow as pa

LabelKind = Literal["class", "residues", "number", "several", "positions"]
LABEL_KINDS = get_args(LabelKind)

_AS_CLASS = 'pass label_kind="class" if each is a class of its own'
_MISSING = frozenset(("NA", "N/A", "n/a", "NaN", "nan", "None", "NULL", "null", "<NA>", "#N/A", "-", "?", "."))
"""How other programs write a missing cell."""

_UNLABELLED = frozenset("-?._*~ ")
"""Letters that usually mark a residue without a label."""

_COMPOUND = re.compile(r"\s*[,/&+]\s*")
_NUMBERS = re.compile(r"[\[(]?\s*[-+]?\d+(\s*[,;\s]\s*[-+]?\d+)+\s*[\])]?")
_DECIMAL_COMMA = re.compile(r"[-+]?\d+,\d+")


@dataclass(frozen=True)
class LabelEncoding:
    """How a label column is stored.

    Attributes:
        kind: what the labels are.
        names: of the classes or of the labels, sorted; empty for numbers.
        ids: the number of the class of each spelling: ``1`` and ``1.0`` are the same class.
        reading: how a cell holds the labels of residues.
        separator: what is between several labels of a sequence.
        notes: what the user should know about the labels.
    """

    kind: LabelKind
    names: tuple[str, ...] = ()
    ids: Mapping[str, int] = field(default_factory=dict)
    reading: Reading = "letters"
    separator: str = ""
    notes: tuple[str, ...] = ()

    def feature(self) -> Any:
        """Return the `datasets` feature of the column."""
        from datasets import ClassLabel, List, Value

        if self.kind == "number":
            return Value("float32")
        if self.kind == "several":
            return {name: Value("float32") for name in self.names}
        classes = ClassLabel(names=list(self.names))
        return List(classes) if self.kind == "residues" else classes

    def encode(self, labels: pa.Array, residues: np.ndarray) -> pa.Array:
        """Return labels as `LabelObservations.observe` made them as class ids, numbers or structs; a null stays null.

        Args:
            labels: some rows of the column.
            residues: int of shape (rows,): the length of each sequence.
        """
        import pyarrow as pa

        rows = labels.to_pylist()
        if self.kind == "number":
            return pa.array([float(label) for label in rows], pa.float64())
        if self.kind == "several":
            present = [set(label if isinstance(label, list) else parts_of(label, self.separator)) for label in rows]
            columns = [np.array([name in labels for labels in present], np.float32) for name in self.names]
            return pa.StructArray.from_arrays([pa.array(column) for column in columns], list(self.names))
        if self.kind == "class":
            return self._ids(labels)
        if not isinstance(labels, pa.ListArray):
            rows = self._of_residues(rows, residues)
        ends = np.cumsum([0, *map(len, rows)]).astype(np.int32)
        return pa.ListArray.from_arrays(
            pa.array(ends), self._ids(pa.array([item for row in rows for item in row], pa.string()))
        )

    def fits(self, labels: pa.Array, residues: np.ndarray) -> np.ndarray:
        """Return which rows can be encoded, bool of shape (rows,)."""
        rows = labels.to_pylist()
        if self.kind == "number":
            return np.array([number_of(label) is not None for label in rows], dtype=bool)
        if self.kind == "class":
            return np.array([label in self.ids for label in rows], dtype=bool)
        if self.kind == "residues":
            rows = rows if rows and isinstance(rows[0], list) else self._of_residues(rows, residues)
            return np.fromiter(map(len, rows), dtype=np.int64, count=len(rows)) == residues
        return np.ones(len(rows), dtype=bool)

    def _of_residues(self, texts: Sequence[str], residues: np.ndarray) -> list[Sequence[str | None]]:
        if self.reading == "items":
            return [items_of(text) for text in texts]
        return [letters_of(text, length) for text, length in zip(texts, residues.tolist(), strict=True)]

    def _ids(self, labels: pa.Array) -> pa.Array:
        import pyarrow as pa
        import pyarrow.compute as pc

        spellings = pc.index_in(labels, pa.array(list(self.ids), pa.string()))
        return pa.array(list(self.ids.values()), pa.int64()).take(spellings)


def decide_encoding(
    observed: LabelObservations, kind: LabelKind | None = None, *, unlabelled: str | None = None, skip: bool = False
) -> LabelEncoding:
    """Decide how to store labels.

    Args:
        observed: all labels of the column.
        kind: what the labels are, if the user says so; positions were made labels of residues before.
        unlabelled: the letter or item of a residue without a label; an empty text for none; None to ask if there may
            be one.
        skip: whether rows that do not fit the kind of most rows are left out; otherwise they are an error.

    Raises:
        DataError: the labels could be of two kinds, do not fit the kind, or are unlikely to be classes.
        ConfigurationError: `unlabelled` is given for labels that are not those of residues.
    """
    kind = "residues" if kind == "positions" else kind
    found, reading = _kind_of(observed, skip) if kind is None else (kind, _best_reading(observed))
    if unlabelled is not None and found != "residues":
        raise ConfigurationError(f"unlabelled={unlabelled!r} is for labels per residue, but the labels are {found!r}")
    if observed.are_lists and found not in ("residues", "several"):
        raise DataError(f'the label is a list in every row: label_kind="{found}" needs one value per row')
    if found == "number":
        if observed.first_word is not None and not skip:
            raise DataError(f"the label is not a finite number in {observed.first_word}")
        return LabelEncoding(found)
    if found == "residues":
        return _residue_encoding(observed, reading, unlabelled, skip)
    if found == "several":
        return _several_encoding(observed)
    return _class_encoding(observed, asked=kind is not None, skip=skip)


def _kind_of(observed: LabelObservations, skip: bool) -> tuple[LabelKind, Reading]:
    """The kind of label that the cells show, and how a cell holds the labels of residues."""
    reading = _best_reading(observed)
    labels = observed.readings[reading]
    most = 2 * labels.rows > observed.rows
    if (labels.rows and not labels.mismatches) or (most and skip):
        return "residues", reading
    if most:
        raise DataError(
            f"most labels have one {reading[:-1]} per residue, but not {labels.describe_mismatch()}. Correct the row, "
            'leave such rows out with on_error="skip", or say what the labels are with label_kind='
        )
    if _all_lists(observed):
        raise DataError(
            f"the label is a list in every row, but label count differs from residue count in {labels.mismatches} "
            f"row(s), first in {labels.describe_mismatch()}. "
            'Pass label_kind="several" if each list names the labels of a sequence; '
            "write lists of 0 and 1 as one column per label"
        )
    if 2 * labels.gapped > observed.rows:
        raise DataError(f"label count differs from residue count, first in {labels.describe_mismatch()}")
    if doubt := _numbers_doubt(observed):
        raise DataError(doubt)
    if observed.first_number is None:
        return "class", reading
    if observed.first_word is not None and not (skip and 2 * observed.word_rows < observed.rows):
        raise DataError(
            f"the label is a number in {observed.first_number}, but not in {observed.first_word}. Correct the row, or "
            'pass label_kind="class"'
        )
    if observed.first_fraction is not None:
        return "number", reading
    numbers = sorted(text for text in observed.counts if number_of(text) is not None)
    if {number_of(text) for text in numbers} <= {0.0, 1.0}:
        return "class", reading
    raise DataError(
        f"the label is a whole number in every row, such as {listing(numbers)}: pass "
        'label_kind="class" or label_kind="number"'
    )


def _all_lists(observed: LabelObservations) -> bool:
    return bool(observed.are_lists) or observed.list_rows == observed.rows


def _best_reading(observed: LabelObservations) -> Reading:
    """The reading in which the most cells have one label per residue."""
    letters, items = observed.readings["letters"], observed.readings["items"]
    return "items" if _all_lists(observed) or items.mismatches < letters.mismatches else "letters"


def _numbers_doubt(observed: LabelObservations) -> str | None:
    """What to ask if cells hold several numbers."""
    words = [text for text in observed.counts if number_of(text) is None]
    if shown := [f"{observed.places[text]}: {text!r:.40}" for text in words if _NUMBERS.fullmatch(text)]:
        if all(_DECIMAL_COMMA.fullmatch(text) for text in words):
            return (
                f"the label has two numbers with a comma between them in {listing(shown)}. Write a decimal comma as a "
                f'point; pass label_kind="positions" if they are positions of sites; or {_AS_CLASS}'
            )
        return (
            f'the label has several numbers in {listing(shown)}. Pass label_kind="positions" if they are positions of '
            f'sites, or label_kind="several" if each number is a label of the sequence; or {_AS_CLASS}'
        )
    return None


def _residue_encoding(
    observed: LabelObservations, reading: Reading, unlabelled: str | None, skip: bool
) -> LabelEncoding:
    labels = observed.readings[reading]
    if labels.mismatches and not skip:
        raise DataError(
            f"{labels.mismatches} row(s): label count differs from residue count, first in {labels.describe_mismatch()}"
        )
    spellings = sorted(labels.names)
    marks = [name for name in spellings if name in _UNLABELLED]
    if marks and unlabelled is None:
        raise DataError(
            f"a label of a residue is {marks[0]!r}, first in {labels.names[marks[0]]}. Pass "
            f'unlabelled="{marks[0]}" if such residues have no label, or unlabelled="" if it is a class'
        )
    if unlabelled:
        if unlabelled not in spellings:
            raise DataError(f"unlabelled={unlabelled!r}, but no residue has this label: they have {listing(spellings)}")
        spellings.remove(unlabelled)
    if len(spellings) > MAX_CLASSES or any((number_of(name) or 0) % 1 for name in spellings):
        raise DataError(
            f"labels per residue must be classes, but have values such as {listing(spellings)}: numbers per residue "
            "are not supported"
        )
    names, ids = _named(spellings)
    return LabelEncoding("residues", names, ids, reading)


def _several_encoding(observed: LabelObservations) -> LabelEncoding:
    is_list = _all_lists(observed)
    separators = [] if is_list else [s for s in SEPARATORS if any(s in text for text in observed.counts)]
    separator = separators[0] if separators else "" if is_list else SEPARATORS[0]
    names = sorted(observed.parts[separator])
    _refuse_names(names)
    refuse_bars(names)
    if all(number_of(name) in (0, 1) for name in names):
        raise DataError(
            f"the labels of a sequence are {listing(names)}, which name nothing: write lists of 0 and 1 as one column "
            "per label, and pass label=[...]"
        )
    return LabelEncoding("several", tuple(names), separator=separator)


def _class_encoding(observed: LabelObservations, *, asked: bool, skip: bool) -> LabelEncoding:
    spellings = sorted(observed.counts)
    if skip and not asked and observed.first_number is not None:
        spellings = [text for text in spellings if number_of(text) is not None]
    if skip:
        spellings = [text for text in spellings if text not in _MISSING]
    if observed.long_text is not None and not skip:
        raise DataError(f"the label has more than {MAX_NAME} characters in {observed.long_text}: too long for a class")
    _refuse_names(spellings)
    usual = _usual_spellings(spellings, observed.counts)
    notes = []
    if others := [f"{text!r:.40} as {name!r:.40}" for text, name in usual.items() if text != name]:
        if asked:
            usual = {text: text for text in spellings}
            notes.append(f"classes may be one class in several spellings: {listing(others)}")
        else:
            notes.append(f"several spellings are read as one class: {listing(others)}. To keep them apart, {_AS_CLASS}")
    counts: dict[str, int] = {}
    for text, name in usual.items():
        counts[name] = counts.get(name, 0) + observed.counts[text]
    doubts = list(_class_doubts(observed, sorted(counts), asked))
    if doubts and not asked:
        raise DataError(f"{'. '.join(doubts[0])}, or {_AS_CLASS}")
    names, ids = _named(sorted(counts))
    notes += [*(problem for problem, _ in doubts), *_rare_classes(observed, counts)]
    return LabelEncoding("class", names, {text: ids[name] for text, name in usual.items()}, notes=tuple(notes))


def _usual_spellings(texts: Sequence[str], counts: Mapping[str, int]) -> dict[str, str]:
    """Return the most frequent spelling of each text; spellings differ in case, white space, hyphens or underscores."""
    groups: dict[str, list[str]] = {}
    for text in texts:
        groups.setdefault(spelling(text), []).append(text)
    return {text: max(groups[spelling(text)], key=lambda each: counts[each]) for text in texts}


def refuse_bars(names: Sequence[str]) -> None:
    """Refuse names of several labels with a bar, which separates the labels of a sequence in a table.

    Raises:
        DataError: a name has one.
    """
    if wrong := [repr(name) for name in names if "|" in name]:
        raise DataError(f"the label name {listing(wrong)} has a |, which separates several labels: rename it")


def _refuse_names(names: Sequence[str]) -> None:
    if len(names) > MAX_CLASSES:
        raise DataError(
            f"the label has more than {MAX_CLASSES} values, such as {listing(list(names))}: too many for classes"
        )


def _class_doubts(observed: LabelObservations, texts: Sequence[str], asked: bool) -> Iterator[tuple[str, str]]:
    """Why cells may not be the classes that they seem to be, and what to do; `asked` if the user says that they are."""

    def shown(names: Sequence[str]) -> str:
        return listing([f"{observed.places[name]}: {name!r:.40}" for name in names])

    if missing := [text for text in texts if text in _MISSING]:
        cure = 'Correct the row, leave such rows out with on_error="skip"'
        yield f"the label may be missing in {shown(missing)}", cure
    if asked:
        return
    if compound := _compounds(texts):
        cure = 'Pass label_kind="several" to read each of them'
        yield f"a cell may hold several labels: {shown(compound)}", cure
    limit = max(observed.rows // 10, min(10, observed.rows // 2), 2)
    if len(texts) > limit:
        problem = f"the label has {len(texts)} different values in {observed.rows} rows, which is many for classes: "
        yield problem + shown(texts), "Name another column with label=, or say with label_kind= what it holds"


def _compounds(texts: Sequence[str]) -> list[str]:
    """Texts that may hold several labels: with a bar or a semicolon, or with a part that other texts have too."""
    if certain := [text for text in texts if "|" in text or ";" in text]:
        return certain
    parts = {text: {part.strip() for part in _COMPOUND.split(text) if part.strip()} for text in texts}
    texts_with: dict[str, int] = {}
    for part in (part for found in parts.values() for part in found):
        texts_with[part] = texts_with.get(part, 0) + 1
    return [text for text, found in parts.items() if len(found) > 1 and any(texts_with[part] > 1 for part in found)]


def _rare_classes(observed: LabelObservations, counts: Mapping[str, int]) -> Iterator[str]:
    """Notes on classes with one row, where another class has ten or more, and on a single class."""
    if len(counts) == 1:
        yield f"the label is {next(iter(counts))!r:.40} in every row"
    rare = [f"{text!r:.40} ({observed.places[text]})" for text in sorted(counts) if counts[text] == 1]
    if rare and max(counts.values()) >= 10:
        yield f"{len(rare)} class(es) have a single row, which may be a slip: {listing(rare)}"


def _named(spellings: Sequence[str]) -> tuple[tuple[str, ...], dict[str, int]]:
    """The names of the classes and the class of each spelling; if all are whole numbers, ``1.0`` is the class ``1``."""
    numbers = [number_of(text) for text in spellings]
    if all(number is not None and number % 1 == 0 for number in numbers):
        exact = {text: int(Decimal(text)) for text in spellings}  # a float has 16 digits
        names = [str(number) for number in sorted(set(exact.values()))]
        return tuple(names), {text: names.index(str(number)) for text, number in exact.items()}
    return tuple(spellings), {text: index for index, text in enumerate(spellings)}
