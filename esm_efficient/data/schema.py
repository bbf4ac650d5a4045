"""Which column of a table is what, and how its cells are parsed; an error in a cell names its row.

To add a kind of column, add its usual names to `USUAL_NAMES` and its parser to `OPTIONAL_COLUMNS`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from esm_efficient.data.sequences import SPECIAL_PATTERN, clean, looks_like_words
from esm_efficient.errors import DataError, listing, nearest

if TYPE_CHECKING:
    import pyarrow as pa

WEIGHT_COLUMN = "sample_weight"
"""The weight of a sequence in the loss: a number >= 0; without the column every weight is 1."""

USUAL_NAMES = {
    "sequence": ("sequence", "seq", "protein_sequence", "aa_sequence", "protein", "primary"),
    "label": ("label", "labels", "target", "class", "y"),
    "accession": ("accession", "acc", "id", "entry", "protein_id", "uniprot", "uniprot_id", "name"),
    "partition": ("partition", "fold", "cv_fold"),
    "split": ("split", "set", "stage", "subset", "data_split", "split_name", "dataset_split"),
    "train": ("train", "is_train", "is_training", "in_train"),
    "validation": ("validation", "is_validation", "is_valid", "is_val", "is_dev", "in_validation"),
    "test": ("test", "is_test", "is_testing", "in_test"),
    WEIGHT_COLUMN: (WEIGHT_COLUMN,),
}
"""Names by which a column is found, in upper or lower case, when the user does not name it."""

ONE_NUMBER = (
    "A run reads one column of numbers from a table, so name one of them. In Python, the column label of a data set "
    "may have a list of numbers of a fixed length in each row, which are trained together"
)
"""What to do with several columns of numbers."""

Column = str | Literal[False] | None
"""The column that plays a role: its name, False for no column, or None to find it by a usual name."""

_MUTATIONS = re.compile(
    r"(p\.)?[A-Z][a-z]{0,2}\d+([A-Z][a-z]{0,2}|\*|=)([\s,:;/_+-]+[A-Z][a-z]{0,2}\d+[A-Z*][a-z]{0,2})*"
)

_PROTEIN = re.compile("[ACDEFGHIKLMNPQRSTVWY]{20,}")
"""A text that is a protein and no word: 20 or more letters of the usual residues."""

_LOOKED_AT = 1000
"""The most cells that are looked at for mutations."""

_FLOAT32_MAX = float(np.finfo(np.float32).max)


def find_column(
    role: str, names: Collection[str], given: Column, source: str | Path, taken: Collection[Column] = ()
) -> str | None:
    """Return the column that the user named, or else the only one with a usual name; None if there is none.

    Args:
        role: a key of `USUAL_NAMES`.
        names: the columns of the table.
        given: what the user named.
        source: the name of the table in errors.
        taken: columns that the user named for other roles.

    Raises:
        DataError: the named column is missing, several columns have a usual name, or a sequence stands where the names
            of columns belong.
    """
    if given is False:
        return None
    if given is not None:
        if role == "sequence":
            _refuse_missing_header([given], source)
        return _existing(given, names, source)
    candidates = [name for name in names if name.lower() in USUAL_NAMES[role] and name not in taken]
    if len(candidates) > 1:
        raise DataError(
            f"{source}: {role} could be any of {listing([repr(name) for name in candidates])}. Keep one of them, or "
            f"name one with {role}="
        )
    if role == "sequence" and not candidates:
        _refuse_missing_header(names, source)
    return candidates[0] if candidates else None


def _refuse_missing_header(names: Collection[str], source: str | Path) -> None:
    """Refuse a table without a header line, whose first protein would be lost as the names of the columns."""
    if found := next((name for name in names if _PROTEIN.fullmatch(name.strip())), None):
        raise DataError(
            f"{source}: the first line has a sequence ({found.strip()[:20]}...) where the names of the columns belong. "
            "Write a line with names above it, such as sequence; in a FASTA file each record begins with >"
        )


def no_column(role: str, names: Collection[str], source: str | Path, advice: str = "") -> str:
    """Return what to say of a table without a column for a role; `advice` replaces the usual one."""
    if role == "label" and {*names} == {"accession", "header", "sequence"}:  # no entry of the headers is a label
        return f"{source} is a FASTA file, which has no labels. Give a table of accessions and labels with labels="
    return (
        f"{source} has no column with a usual name of {role}s ({', '.join(USUAL_NAMES[role])}); it has "
        f"{listing([name[:40] for name in names], 20)}. {advice or f'Name the column with {role}='}"
    )


def refuse_roles(
    roles: Mapping[str, str | None], names: Collection[str], source: str | Path, taken: Collection[Column]
) -> None:
    """Refuse a table without sequences; `taken` are the columns that the user named.

    Raises:
        DataError: no column is one of sequences, or the user named it for something else.
    """
    if roles["sequence"] is not None:
        return
    if used := [name for name in names if name.lower() in USUAL_NAMES["sequence"] and name in taken]:
        others = [name[:40] for name in names if name not in taken]
        raise DataError(
            f"{source}: {used[0]!r} is named for something else, so no column is left for the sequences. Name another "
            f"one: it has {listing(others, 20)}"
        )
    raise DataError(no_column("sequence", names, source))


def refuse_column(columns: Mapping[str, Sequence[Any]], column: str, places: Sequence[str], source: str | Path) -> None:
    """Refuse a column that has no sequence at all, or mutations: then the column is wrong, and not the rows.

    Raises:
        DataError: there are two or more cells and none is a sequence, or most are mutations such as ``W68H``.
    """
    cells = columns[column]
    mutations = sum(isinstance(cell, str) and bool(_MUTATIONS.fullmatch(cell.strip())) for cell in cells[:_LOOKED_AT])
    if 2 * mutations > len(cells[:_LOOKED_AT]):
        shown = _first_cells(cells, places)
        raise DataError(
            f"{source}: {mutations} of {len(cells[:_LOOKED_AT])} cells of {column!r} are mutations, such as {shown}: "
            "write the whole sequence of each variant"
        )
    if len(cells) < 2 or any(_is_sequence(cell) for cell in cells):
        return
    others = listing([name[:40] for name in columns if name != column], 20)
    raise DataError(
        f"{source}: none of the {len(cells)} cells of {column!r} is a sequence, such as {_first_cells(cells, places)}. "
        + (f"Is it the right column? The table also has {others}: name one with sequence=" if others else "")
    )


def _first_cells(cells: Sequence[Any], places: Sequence[str]) -> str:
    shown = [f"{place}: {str(cell)!r:.40}" for cell, place in zip(cells[:2], places, strict=False)]
    return listing([*shown, *[""] * (len(cells) - 2)], 2)


def _is_sequence(cell: Any) -> bool:
    if not isinstance(cell, str) or not (sequence := clean(cell)):
        return False
    return not non_letters(sequence) and not looks_like_words(cell)


def _existing(name: str, names: Collection[str], source: str | Path) -> str:
    if name not in names:
        raise DataError(f"{source} has no column {name!r}; it has {', '.join(names)}{nearest(name, names)}")
    return name


class CellError(DataError):
    """Some cells of a column are wrong.

    Attributes:
        problem: what is wrong.
        rows: the rows of the wrong cells, counted from 0.
        shown: the place of each of these rows, with the cell.
        advice: what to do about it.
    """

    def __init__(self, problem: str, rows: list[int], shown: list[str], advice: str = "") -> None:
        super().__init__(f"{problem} in {len(shown)} row(s): {listing(shown)}{advice and f'. {advice}'}")
        self.problem, self.rows, self.shown, self.advice = problem, rows, shown, advice


def refuse_cells(
    cells: Sequence[Any], places: Sequence[str], wrong: Sequence[bool], problem: str, advice: str = ""
) -> None:
    """Raise a CellError that names the rows of the wrong cells and shows these cells, if there are any."""
    if rows := [index for index, bad in enumerate(wrong) if bad]:
        raise CellError(problem, rows, [f"{places[index]}: {str(cells[index])!r:.40}" for index in rows], advice)


def texts_of(cells: Sequence[Any]) -> list[str]:
    """Return cells as text without outer white space; a missing cell (None or NaN) becomes an empty text."""
    return ["" if cell is None or cell != cell else str(cell).strip() for cell in cells]


def number_of(text: str) -> float | None:
    """Return the finite float32 number that a text writes in plain digits; None for any other text."""
    try:
        value = float(text) if text.isascii() and "_" not in text else math.nan
    except ValueError:
        return None
    return value if abs(value) <= _FLOAT32_MAX else None


def non_letters(sequence: str) -> list[str]:
    """Return the characters of a clean sequence that are not ASCII letters, sorted and without repeats.

    Special tokens such as ``<mask>`` count as letters.
    """
    if "<" in sequence:
        sequence = SPECIAL_PATTERN.sub("", sequence)
    if sequence.isascii() and sequence.isalpha():
        return []
    return sorted({character for character in sequence if not (character.isascii() and character.isalpha())})


def sequences_of(cells: Sequence[Any], places: Sequence[str]) -> list[str]:
    """Parse cells as sequences, cleaned by `esm_efficient.data.sequences.clean`; other cells are a CellError."""
    refuse_cells(cells, places, [not isinstance(cell, str) for cell in cells], "the sequence is not text")
    sequences = [clean(cell) for cell in cells]
    refuse_cells(cells, places, [not sequence for sequence in sequences], "the sequence is empty")
    wrong = [bool(non_letters(sequence)) for sequence in sequences]
    refuse_cells(cells, places, wrong, "the sequence contains characters that are not letters")
    refuse_cells(cells, places, [looks_like_words(cell) for cell in cells], "the sequence looks like words")
    return sequences


def zeros_and_ones(cells: Sequence[Any], column: str, places: Sequence[str], *, required: bool = False) -> np.ndarray:
    """Parse cells of 0 and 1, or false and true, as float32; other cells are a DataError.

    An empty cell becomes NaN, or is a DataError if `required`.
    """
    texts = [text.lower() for text in texts_of(cells)]
    if required:
        refuse_cells(cells, places, [not text for text in texts], f"the {column} label is missing")
    values = [{"true": 1.0, "false": 0.0}.get(text, number_of(text)) for text in texts]
    wrong = [bool(text) and value not in (0, 1) for text, value in zip(texts, values, strict=True)]
    numbers = sum(bad and value is not None for bad, value in zip(wrong, values, strict=True))
    advice = ONE_NUMBER if 2 * numbers > sum(map(bool, texts)) else ""
    refuse_cells(cells, places, wrong, f"the {column} label is neither 0 nor 1", advice)
    return np.array(values, dtype=np.float32)


def binary_labels(
    columns: Mapping[str, list[Any]], label_columns: Mapping[str, str], source: str | Path, places: Sequence[str]
) -> pa.StructArray:
    """Parse several columns of 0, 1 and empty cells as one struct of float32, null where a cell is empty.

    `label_columns` maps label names to columns. A missing column or another cell is a DataError.
    """
    import pyarrow as pa

    values = [
        zeros_and_ones(columns[_existing(name, columns, source)], name, places) for name in label_columns.values()
    ]
    return pa.StructArray.from_arrays([pa.array(value, from_pandas=True) for value in values], list(label_columns))


def whole_numbers(cells: Sequence[Any], column: str, places: Sequence[str], advice: str = "") -> np.ndarray:
    """Parse cells as int32; a cell that is not a whole number is a DataError, with advice in place of the usual one."""
    values = [number_of(text) for text in texts_of(cells)]
    wrong = [value is None or value % 1 != 0 or abs(value) >= 2**31 for value in values]
    refuse_cells(cells, places, wrong, f"{column} is not a whole number", advice)
    return np.array(values, dtype=np.int32)


def partitions_of(cells: Sequence[Any], column: str, places: Sequence[str]) -> np.ndarray:
    """Parse cells of a column that has a usual name of partitions, as int32."""
    advice = 'Correct them, leave such rows out with on_error="skip", or pass partition=False if they are none'
    return whole_numbers(cells, column, places, advice)


def weights_of(cells: Sequence[Any], column: str, places: Sequence[str]) -> np.ndarray:
    """Parse cells as float32 weights; a cell that is not a finite number >= 0 is a DataError."""
    values = [number_of(text) for text in texts_of(cells)]
    refuse_cells(cells, places, [value is None or value < 0 for value in values], f"{column} is not a number >= 0")
    return np.array(values, dtype=np.float32)


OPTIONAL_COLUMNS = {
    "partition": (partitions_of, "int32"),
    WEIGHT_COLUMN: (weights_of, "float32"),
}
"""Columns that a table may have, beside the label: the parser of the cells and the dtype."""
