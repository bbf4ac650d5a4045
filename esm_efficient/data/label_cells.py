"""What the cells of a label column look like, gathered block by block.

A cell may be the label of a sequence, or hold one label per residue: as one letter each (``HHEC``), or as items of a
list or of a text such as ``H H E C`` or ``[0, 1, 0]``. Only all cells together tell which.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from esm_efficient.data.schema import number_of, refuse_cells, texts_of
from esm_efficient.data.sequences import GAPS, STOP

if TYPE_CHECKING:
    import pyarrow as pa

MAX_CLASSES = 1000
"""The most classes of a label, and the most different cells that are remembered."""

MAX_NAME = 200
"""The most characters of the name of a class."""

SEPARATORS = "|;,"
"""Characters between several labels of a sequence, in the order in which a column is searched for them."""

MISSING = frozenset(("NA", "N/A", "n/a", "NaN", "nan", "None", "NULL", "null", "<NA>", "#N/A", "-", "?", "."))
"""How other programs write a missing cell."""

NUMBERS = re.compile(r"[\[(]?\s*[-+]?\d+(\s*[,;\s]\s*[-+]?\d+)+\s*[\])]?")
"""Matches a text of several whole numbers."""

_SITES = (
    'If the others are positions of sites, pass label_kind="positions" and write [] for no site. Else correct them, or '
    'leave such rows out with on_error="skip"'
)

_NONE_OF_SEVERAL = (
    "If a sequence may have none of the labels, write [] for it. Else correct them, or leave such rows out with "
    'on_error="skip"'
)

Reading = Literal["letters", "items"]

_NO_LABEL = frozenset(("", "None", "nan", "NaN", "NA", "<NA>", "null", "-100"))
"""How a list shows an item without a label; -100 is what transformers ignores."""

_GAP_LABELS = frozenset(GAPS + STOP)

_NAMED_POSITION = re.compile(r"\b[A-Z]\d+\b")
_POSITIONS = re.compile(r"[^\s,;|\[\]()]+")

_QUOTES = "'\""

_ITEM = re.compile(r"""\s*(?:'((?:[^'\\]|\\.)*)'|"((?:[^"\\]|\\.)*)"|([^\s,;|'"]+))(?=[\s,;|]|$)\s*[,;|]?""")
"""An item of a list, in quotes or without; quotes hold separators and white space."""

_BRACKETS = {"[": "]", "(": ")", "{": "}"}
_EMPTY_SETS = ("set()", "frozenset()")


@dataclass
class ResidueLabels:
    """The cells of a column, read in one of the two ways as labels of residues.

    Attributes:
        rows: rows of two or more residues with one label per residue.
        mismatches: rows in which the number of labels differs from the number of residues.
        first_mismatch: the first of these rows; None without one.
        near: rows of these in which the numbers differ by one or two.
        gapped: rows of these in which the labels without those of gaps and stops are as many as the residues.
        names: the different labels of the other rows, with the first row of each; at most `MAX_CLASSES` + 1.
        lengths: residues of the other rows, at most two different numbers.
    """

    rows: int = 0
    mismatches: int = 0
    first_mismatch: str | None = None
    near: int = 0
    gapped: int = 0
    names: dict[str, str] = field(default_factory=dict)
    lengths: set[int] = field(default_factory=set)

    def observe(self, labels: Sequence[str | None], residues: int, place: str) -> None:
        """Take note of the labels of one row."""
        if len(labels) != residues:
            self.mismatches += 1
            self.near += abs(len(labels) - residues) <= 2
            self.gapped += sum(label not in _GAP_LABELS for label in labels) == residues
            self.first_mismatch = self.first_mismatch or f"{place}: {len(labels)} labels for {residues} residues"
            return
        self.rows += residues > 1
        if residues > 1 and len(self.lengths) < 2:
            self.lengths.add(residues)
        if len(self.names) <= MAX_CLASSES and (new := set(labels) - self.names.keys()):
            self.names |= {name: place for name in new if name is not None}

    def describe_mismatch(self) -> str:
        """Return the first row whose number of labels is wrong, with the cure if the labels have gaps."""
        if not self.gapped:
            return f"{self.first_mismatch}"
        return (
            f"{self.first_mismatch}. The gaps (- and .) and the final stop (*) of a sequence are dropped: remove the "
            f"labels at these columns too, which makes the numbers equal in {self.gapped} row(s)"
        )

    def describe_near_miss(self) -> str:
        """Return what a message adds if most rows have nearly one label per residue; empty if they have not."""
        if self.near <= (self.rows + self.mismatches) / 2:
            return ""
        return f". As labels of residues, their number is wrong: {self.describe_mismatch()}"


@dataclass
class LabelObservations:
    """What the cells of a label column look like.

    Attributes:
        rows: labels seen.
        are_lists: whether the cells are lists; None before the first cell.
        readings: the cells as labels of residues; lists are read as items only.
        counts: rows per different cell, at most `MAX_CLASSES` + 1 cells of at most `MAX_NAME` characters.
        places: the first row of each of these cells.
        long_text: the first row with a longer text; None without one, as below.
        parts: the different labels if a cell holds several, by separator, with the different cells, or the rows of
            lists, that have each; ``""`` for lists.
        part_places: the first row of each of these labels.
        missing: cells that seem to say that the label is missing, with the first row of each.
        list_rows: rows with a text that writes a list.
        word_rows: rows with a text that is not a number.
        first_number: the first cell that is a number, with its place.
        first_word: the first cell that is not a number, with its place.
        first_fraction: the first number that is not whole, with its place.
    """

    rows: int = 0
    are_lists: bool | None = None
    readings: dict[Reading, ResidueLabels] = field(
        default_factory=lambda: {"letters": ResidueLabels(), "items": ResidueLabels()}
    )
    counts: dict[str, int] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    long_text: str | None = None
    parts: dict[str, Counter[str]] = field(
        default_factory=lambda: {separator: Counter() for separator in ("", *SEPARATORS)}
    )
    part_places: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    list_rows: int = 0
    word_rows: int = 0
    first_number: str | None = None
    first_word: str | None = None
    first_fraction: str | None = None
    _read: dict[str, tuple[tuple[str | None, ...], bool, bool]] = field(default_factory=dict)

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

        empty = [cell is None or (not isinstance(cell, list) and cell != cell) for cell in cells]
        _refuse_missing(cells, empty, residues, places)
        are_lists = [isinstance(cell, list) for cell in cells]
        expected = are_lists[0] if self.are_lists is None else self.are_lists
        mixed = [is_list != expected for is_list in are_lists]
        refuse_cells(cells, places, mixed, "the label is a list in some rows and not in others")
        labels: list[Any] = [items_of_list(cell) for cell in cells] if expected else texts_of(cells)
        if not expected:
            _refuse_missing(cells, [not label for label in labels], residues, places)
        self.are_lists = expected
        self.rows += len(labels)
        for label, length, place in zip(labels, residues.tolist(), places, strict=True):
            if expected:
                self.readings["items"].observe(label, length, place)
                self._observe_parts("", [item for item in label if item is not None], place)
                if label and all(item is None for item in label):
                    self.missing.setdefault(str(label), place)
                continue
            self.readings["letters"].observe(letters_of(label, length), length, place)
            items, is_list, is_word = self._read.get(label) or _reading_of(label)
            self.readings["items"].observe(items, length, place)
            self.list_rows += is_list
            self.word_rows += is_word
            if label in self.counts:
                self.counts[label] += 1
            else:
                self._observe_text(label, place)
        return pa.array(labels, pa.list_(pa.string()) if expected else pa.string())

    def _observe_text(self, text: str, place: str) -> None:
        shown = f"{place}: {text!r:.40}"
        if len(text) > MAX_NAME:
            self.long_text = self.long_text or shown
        elif len(self.counts) <= MAX_CLASSES:
            self.counts[text], self.places[text], self._read[text] = 1, place, _reading_of(text)
        if says_missing(text):
            self.missing.setdefault(text, place)
        else:
            for separator in SEPARATORS:
                self._observe_parts(separator, parts_of(text, separator), place)
        if is_bracketed(text):
            self._observe_parts("", [item for item in items_of(text) if item is not None], place)
        value = number_of(text)
        if value is None:
            self.first_word = self.first_word or shown
            return
        self.first_number = self.first_number or shown
        if value % 1:
            self.first_fraction = self.first_fraction or shown

    def _observe_parts(self, separator: str, parts: Sequence[str], place: str) -> None:
        if len(self.parts[separator]) <= MAX_CLASSES:
            names = {part[: MAX_NAME + 1] for part in parts}
            self.parts[separator].update(names)
            for name in names:
                self.part_places.setdefault(name, place)


def _refuse_missing(cells: Sequence[Any], missing: Sequence[bool], residues: np.ndarray, places: Sequence[str]) -> None:
    """Refuse missing labels. If the others seem to be positions or several labels, those without one may be meant."""
    if any(missing):
        sites = any(_may_be_positions(cell, length) for cell, length in zip(cells, residues.tolist(), strict=True))
        several = any(
            isinstance(cell, list) or max(len(parts_of(str(cell), bar)) for bar in "|;") > 1 for cell in cells
        )
        advice = _SITES if sites else _NONE_OF_SEVERAL if several else ""
        refuse_cells(cells, places, missing, "the label is missing", advice)


def _may_be_positions(cell: Any, residues: int) -> bool:
    """Whether a cell has whole numbers, but not one per residue."""
    if isinstance(cell, list):
        numbers = [number_of(str(item)) for item in cell]
        return 0 < len(cell) != residues and all(number is not None and number % 1 == 0 for number in numbers)
    return isinstance(cell, str) and bool(NUMBERS.fullmatch(cell.strip())) and len(items_of(cell)) != residues


def _reading_of(text: str) -> tuple[tuple[str | None, ...], bool, bool]:
    """Return the items of a text, whether it writes a list, and whether it is not a number."""
    return items_of(text), is_bracketed(text), number_of(text) is None


def letters_of(text: str, residues: int) -> str:
    """Return a text of one letter per residue; white space between the letters is dropped if it is not counted.

    Example:
        >>> letters_of("HH EC", 4), letters_of("HH EC", 5)
        ('HHEC', 'HH EC')
    """
    return text if len(text) == residues else "".join(text.split())


def items_of(text: str) -> tuple[str | None, ...]:
    """Return the items of a text with commas, semicolons, bars or white space between them; None for a missing item.

    Example:
        >>> items_of("[0, 1, None]"), items_of("H H E"), items_of("['DNA binding', 'RNA, short']")
        (('0', '1', None), ('H', 'H', 'E'), ('DNA binding', 'RNA, short'))
    """
    inner = _inside(text) if is_bracketed(text) else text
    if any(quote in inner for quote in _QUOTES) and not _ITEM.sub("", inner):
        found = (match[1] or match[2] or match[3] or "" for match in _ITEM.finditer(inner))
        items = [re.sub(r"\\(.)", r"\1", item).strip() for item in found]
    else:
        separator = next((character for character in ",;|" if character in inner), None)
        items = [item.strip().strip(_QUOTES) for item in inner.split(separator)]
    return tuple(None if item in _NO_LABEL else item for item in items)


def labels_at_positions(cells: Sequence[Any], residues: np.ndarray, places: Sequence[str]) -> list[list[str]]:
    """Return the label of each residue: ``1`` at the positions in a cell, ``0`` elsewhere.

    Args:
        cells: a text such as ``12,40`` or a list, of whole numbers from 1 on; ``[]`` for a sequence without a site.
        residues: int of shape (cells,): the length of each sequence.
        places: where each row is.

    Raises:
        DataError: a cell is empty; a position is not a whole number, is outside of the sequence, or is there twice.
    """
    texts = [str(cell) if isinstance(cell, list) else text for cell, text in zip(cells, texts_of(cells), strict=True)]
    refuse_cells(cells, places, [not text for text in texts], "the positions are missing", "Write [] for no site")
    numbers = [[number_of(item) for item in _POSITIONS.findall(text)] for text in texts]
    wrong = [any(number is None or number % 1 for number in row) for row in numbers]
    named = next((found[0] for text in texts if (found := _NAMED_POSITION.search(text))), None)
    advice = f"Write the number alone: {named[1:]} for {named}" if named else ""
    refuse_cells(cells, places, wrong, "a position is not a whole number", advice)
    rows = [[int(number or 0) for number in row] for row in numbers]
    lengths = residues.tolist()
    outside = [any(not 1 <= n <= length for n in row) for row, length in zip(rows, lengths, strict=True)]
    refuse_cells(cells, places, outside, "a position is outside of the sequence", "The first residue is position 1")
    refuse_cells(cells, places, [len(set(row)) < len(row) for row in rows], "a position is given twice")
    labels = [["0"] * length for length in lengths]
    for label, row in zip(labels, rows, strict=True):
        for number in row:
            label[number - 1] = "1"
    return labels


def items_of_list(cell: Sequence[Any]) -> list[str | None]:
    """Return the items of a list as text; None where one is missing."""
    items = (None if item is None or item != item else str(item).strip() for item in cell)
    return [None if item in _NO_LABEL else item for item in items]


def is_bracketed(text: str) -> bool:
    """Return whether a text is a list or a set as Python, pandas or numpy writes it: its first bracket ends it.

    Example:
        >>> [is_bracketed(text) for text in ("[a, b]", "{'a'}", "set()", "[2Fe-2S]|[4Fe-4S]", "a")]
        [True, True, True, False, False]
    """
    closing = _BRACKETS.get(text[:1])
    if closing is None or text[-1:] != closing:
        return text in _EMPTY_SETS
    depths = itertools.accumulate((letter == text[0]) - (letter == closing) for letter in text[:-1])
    return all(depth > 0 for depth in depths)


def _inside(text: str) -> str:
    return "" if text in _EMPTY_SETS else text[1:-1].strip()


def holds_list(text: str) -> bool:
    """Return whether a text is a list also beside texts without brackets: it is empty, quoted, or has several items."""
    return is_bracketed(text) and (not (inner := _inside(text)) or inner[0] in _QUOTES or "," in inner)


def parts_of(text: str, separator: str) -> list[str]:
    """Return the labels in a cell of several labels; an empty separator reads a list, and ``[]`` has none."""
    if not separator or holds_list(text):
        return [item for item in items_of(text) if item is not None]
    return [part for part in map(str.strip, text.split(separator)) if part]


def says_missing(text: str) -> bool:
    """Return whether a text is what other programs write for a missing cell, or has nothing but separators.

    Example:
        >>> [says_missing(text) for text in ("NA", " | ", "[None]", "nucleus|NA", "[]")]
        [True, True, True, False, False]
    """
    if is_bracketed(text):
        return {*items_of(text)} == {None}
    return text in MISSING or not text.strip(SEPARATORS + " ")


def spelling(name: str) -> str:
    """Return what is the same for two names that differ in case, white space, hyphens or underscores only."""
    return " ".join(re.split(r"[\s_-]+", name.strip())).casefold()
