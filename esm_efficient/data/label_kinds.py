"""What kind of label a column holds: classes, one class per residue, several labels per sequence, or numbers.

`LabelObservations` gathers what the cells look like, `decide_encoding` tells the kind from it, and `LabelEncoding`
stores the labels. Cells that fit two kinds, or are unlikely to be classes, are an error that says how to choose.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from esm_efficient.data.label_cells import (
    MAX_CLASSES,
    MAX_NAME,
    MISSING,
    NUMBERS,
    SEPARATORS,
    LabelObservations,
    Reading,
    holds_list,
    items_of,
    letters_of,
    parts_of,
    says_missing,
)
from esm_efficient.data.label_names import (
    compounds,
    named,
    rare_classes,
    refuse_bars,
    refuse_long,
    refuse_many,
    refuse_separators,
    respelled,
    two_spellings,
    usual_spellings,
)
from esm_efficient.data.schema import number_of
from esm_efficient.errors import ConfigurationError, DataError, listing

if TYPE_CHECKING:
    import pyarrow as pa

LabelKind = Literal["class", "residues", "number", "several", "positions"]
LABEL_KINDS = get_args(LabelKind)

_AS_CLASS = 'pass label_kind="class" if each is a class of its own'
_UNLABELLED = frozenset("-?._*~ ")
"""Letters that usually mark a residue without a label."""

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
            present = [{self.ids[part] for part in self._parts(label)} for label in rows]
            columns = [np.array([index in ids for ids in present], np.float32) for index in range(len(self.names))]
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
        missing = (
            0 < label.count(None) == len(label) if isinstance(label, list) else says_missing(label) for label in rows
        )
        return ~np.fromiter(missing, dtype=bool, count=len(rows))

    def _parts(self, label: str | list[str | None] | None) -> list[str]:
        """The labels of a sequence."""
        if isinstance(label, list):
            return [item for item in label if item is not None]
        return parts_of(label or "", self.separator)

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
    found, reading = (kind, _best_reading(observed)) if kind else _kind_of(observed, skip, unlabelled is not None)
    if unlabelled is not None and found != "residues":
        raise ConfigurationError(f"unlabelled={unlabelled!r} is for labels per residue, but the labels are {found!r}")
    if observed.are_lists and found not in ("residues", "several"):
        raise DataError(f'the label is a list in every row: label_kind="{found}" needs one value per row')
    if found == "number":
        if observed.first_word is not None and not skip:
            raise DataError(
                f"the label is not a finite number in {observed.first_word}. Correct the row, or leave such rows out "
                'with on_error="skip"'
            )
        return LabelEncoding(found)
    if found == "residues":
        return _residue_encoding(observed, reading, unlabelled, skip)
    if found == "several":
        return _several_encoding(observed, skip)
    return _class_encoding(observed, asked=kind is not None, skip=skip)


def _kind_of(observed: LabelObservations, skip: bool, of_residues: bool) -> tuple[LabelKind, Reading]:
    """The kind of label that the cells show, and how a cell holds the labels of residues.

    `of_residues` says that the user gave an option of labels of residues.
    """
    reading = _best_reading(observed)
    labels = observed.readings[reading]
    most = 2 * labels.rows > observed.rows
    if most and reading == "letters" and not of_residues and (doubt := _one_length_doubt(observed)):
        raise DataError(doubt)
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
            f"the label is a number in {observed.first_number}, but not in {observed.first_word}. Correct the row"
            + ("" if skip else ', leave such rows out with on_error="skip"')
            + f", or {_AS_CLASS}"
        )
    if observed.first_fraction is not None:
        if twice := two_spellings(sorted(observed.counts)):
            raise DataError(
                f"the label is a number in every row, but {twice} are one number in two spellings, as codes have them: "
                'pass label_kind="class" if each is a class of its own, or label_kind="number"'
            )
        return "number", reading
    numbers = sorted(text for text in observed.counts if number_of(text) is not None)
    if {number_of(text) for text in numbers} <= {0.0, 1.0}:
        return "class", reading
    raise DataError(
        f"the label is a whole number in every row, such as {listing(numbers)}: pass "
        'label_kind="class" or label_kind="number"'
    )


def _one_length_doubt(observed: LabelObservations) -> str | None:
    """What to ask if labels may have as many letters as all sequences have residues by chance: peptides of one length.

    Letters of residues differ from sequence to sequence, while classes are few; a number may have any digits.
    """
    labels, texts = observed.readings["letters"], sorted(observed.counts)
    are_numbers = observed.first_word is None
    are_few = len(texts) < observed.rows and len(texts) <= _most_classes(observed)
    if len(labels.lengths) != 1 or observed.long_text is not None or not (are_numbers or are_few):
        return None
    length, kind = min(labels.lengths), "number" if are_numbers else "class"
    return (
        f"the sequences have {length} residues and the labels {length} characters, such as "
        f'{_shown(observed, texts)}: pass label_kind="{kind}" if each is the label of a sequence, or '
        'label_kind="residues" if each character is that of a residue'
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
    if shown := [f"{observed.places[text]}: {text!r:.40}" for text in words if NUMBERS.fullmatch(text)]:
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
    others = respelled(usual_spellings(spellings, Counter()))
    notes = (f"classes of residues may be one class in several spellings: {others}",) if others else ()
    return LabelEncoding("residues", *named(spellings), reading, notes=notes)


def _several_encoding(observed: LabelObservations, skip: bool) -> LabelEncoding:
    if observed.missing and not skip:
        places = [f"{place}: {text!r}" for text, place in observed.missing.items()]
        raise DataError(
            f"the label may be missing in {listing(places)}. Correct the row, leave such rows out with "
            'on_error="skip", or give the label another name if it is one'
        )
    is_list = _all_lists(observed)
    separators = [] if is_list else [s for s in SEPARATORS if any(s in t for t in observed.counts if not holds_list(t))]
    separator = separators[0] if separators else "" if is_list else SEPARATORS[0]
    counts = Counter(observed.parts[separator])
    for text, rows in observed.counts.items():
        if not says_missing(text):
            counts.update(dict.fromkeys(parts_of(text, separator), rows))
    spellings = sorted(counts)
    refuse_many(spellings)
    refuse_long(spellings, observed.part_places)
    refuse_bars(spellings)
    refuse_separators(spellings, separator, observed.part_places)
    if all(number_of(name) in (0, 1) for name in spellings):
        raise DataError(
            f"the labels of a sequence are {listing(spellings)}, which name nothing: write lists of 0 and 1 as one "
            "column per label, and pass label=[...]"
        )
    usual = usual_spellings(spellings, counts)
    others = respelled(usual)
    notes = [f"several spellings are read as one label: {others}"] if others else []
    if missing := [f"{name!r} ({observed.part_places[name]})" for name in spellings if name in MISSING]:
        notes.append(f"{listing(missing)} is read as a label, but may say that one is missing")
    names, numbers = named(sorted(set(usual.values())))
    ids = {text: numbers[name] for text, name in usual.items()}
    return LabelEncoding("several", names, ids, separator=separator, notes=tuple(notes))


def _class_encoding(observed: LabelObservations, *, asked: bool, skip: bool) -> LabelEncoding:
    spellings = sorted(observed.counts)
    if skip and not asked and observed.first_number is not None:
        spellings = [text for text in spellings if number_of(text) is not None]
    if skip:
        spellings = [text for text in spellings if text not in MISSING]
    if observed.long_text is not None and not skip:
        long = f"the label has more than {MAX_NAME} characters in {observed.long_text}: too long for a class"
        raise DataError(f"{long}, and as labels of residues: {observed.readings['letters'].describe_mismatch()}")
    refuse_many(spellings)
    usual = usual_spellings(spellings, observed.counts)
    notes = []
    if others := respelled(usual):
        if asked:
            usual = {text: text for text in spellings}
            notes.append(f"classes may be one class in several spellings: {others}")
        else:
            notes.append(f"several spellings are read as one class: {others}. To keep them apart, {_AS_CLASS}")
    counts: dict[str, int] = {}
    for text, name in usual.items():
        counts[name] = counts.get(name, 0) + observed.counts[text]
    doubts = list(_class_doubts(observed, sorted(counts), asked))
    if doubts and not asked:
        raise DataError(f"{'. '.join(doubts[0])}, or {_AS_CLASS}")
    names, ids = named(sorted(counts))
    notes += [*(problem for problem, _ in doubts), *rare_classes(counts, observed.places)]
    return LabelEncoding("class", names, {text: ids[name] for text, name in usual.items()}, notes=tuple(notes))


def _class_doubts(observed: LabelObservations, texts: Sequence[str], asked: bool) -> Iterator[tuple[str, str]]:
    """Why cells may not be the classes that they seem to be, and what to do; `asked` if the user says that they are."""
    if missing := [text for text in texts if text in MISSING]:
        cure = 'Correct the row, leave such rows out with on_error="skip"'
        yield f"the label may be missing in {_shown(observed, missing)}", cure
    if asked:
        return
    if compound := compounds(texts):
        is_read = any(mark in text or holds_list(text) for text in compound for mark in SEPARATORS)
        cure = f'{"Pass" if is_read else "Write | between them and pass"} label_kind="several" to read each of them'
        yield f"a cell may hold several labels: {_shown(observed, compound)}", cure
    if len(texts) > _most_classes(observed):
        problem = f"the label has {len(texts)} different values in {observed.rows} rows, which is many for classes: "
        cure = "Name another column with label=, or say with label_kind= what it holds"
        yield problem + _shown(observed, texts) + observed.readings["letters"].describe_near_miss(), cure


def _shown(observed: LabelObservations, texts: Sequence[str]) -> str:
    return listing([f"{observed.places[text]}: {text!r:.40}" for text in texts], 3)


def _most_classes(observed: LabelObservations) -> int:
    """The most different cells that are taken for classes without a question."""
    return max(observed.rows // 10, min(10, observed.rows // 2), 2)
