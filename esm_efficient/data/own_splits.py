"""The splits that a table names itself: a column of ``train``, ``validation`` and ``test``, and columns of flags."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from esm_efficient.data.schema import CellError, refuse_cells, texts_of, zeros_and_ones

FLAGS = ("train", "validation", "test")
"""Roles of columns that say, true or false, whether a row is in a split."""

_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_IGNORE = "If it says something else, pass {role}=False"


def split_names(cells: Sequence[Any], column: str, places: Sequence[str]) -> list[str]:
    """Parse usual words for ``train``, ``validation`` and ``test``; another word is a CellError."""
    names = [_WORDS.get(text.lower(), "") for text in texts_of(cells)]
    wrong = [not name for name in names]
    refuse_cells(cells, places, wrong, f"{column} is not train, validation or test", _IGNORE.format(role="split"))
    return names


def named_splits(cells: Sequence[Any]) -> set[str]:
    """Return the splits that cells name by usual words; none if a cell is anything else."""
    names = set()
    for cell in cells:
        if not isinstance(cell, str) or (name := _WORDS.get(cell.strip().lower())) is None:
            return set()
        names.add(name)
    return names


def are_split_names(blocks: Iterable[Sequence[Any]]) -> bool:
    """Return whether all cells of a column are usual words for two or three splits, one of which is ``train``.

    Args:
        blocks: the cells of the column, block by block. The rows may be sorted by their split, so that the first
            block names one split only; the others are then asked for.
    """
    names: set[str] = set()
    for cells in blocks:
        found = named_splits(cells)
        if not found:
            return False
        names |= found
        if len(names) > 1 and "train" in names:
            return True
    return False


def same_splits(files: list[str], words: list[str], column: str, places: Sequence[str]) -> list[str]:
    """Return the splits that the files name, which a column must not contradict.

    Rows of ``train`` may be in the file of ``validation``: some tables have both under one word.

    Args:
        files: the split of each row by its file.
        words: the split of each row by the column.
        column: the name of the column.
        places: where each row is.

    Raises:
        CellError: the column says something else.
    """
    wrong = [a != b and (a, b) != ("validation", "train") for a, b in zip(files, words, strict=True)]
    problem = f"the file is that of another split than {column} says"
    refuse_cells(words, places, wrong, problem, "Correct the rows, or pass split=False")
    return files


def splits_of(
    words: Sequence[str] | None, flags: Mapping[str, tuple[str, Sequence[Any]]], places: Sequence[str]
) -> list[str]:
    """Return the split of each row, from all columns that tell it.

    A row of ``train`` with a validation flag is in ``validation``. Without words, a row with no flag is in ``train``;
    or, if there is a flag for ``train``, in ``test``.

    Args:
        words: the split of each row, from a column or a file; None without one.
        flags: role to the name and the cells of a column of true and false; an empty cell is false.
        places: where each row is.

    Raises:
        CellError: a cell is neither true nor false, or the columns contradict each other.
    """
    marks = {role: _flags(role, column, cells, places) for role, (column, cells) in flags.items()}
    splits, wrong = [], []
    for row in range(len(places)):
        found = {role for role, values in marks.items() if values[row]}
        name = _split_of_flags(found, set(marks)) if words is None else words[row]
        name = "validation" if name == "train" and "validation" in found else name
        splits.append(name)
        denied = name in marks and name not in found
        wrong.append(not name or denied or (("test" in found) if name != "test" else bool(found - {"test"})))
    columns = " and ".join(column for column, _ in flags.values())
    refuse_cells(splits, places, wrong, f"the split contradicts {columns}", "Correct the rows, or pass split=False")
    return splits


def _flags(role: str, column: str, cells: Sequence[Any], places: Sequence[str]) -> list[bool]:
    try:
        return [bool(value == 1) for value in zeros_and_ones(cells, column, places)]
    except CellError as error:
        problem = f"{column} is neither true nor false"
        role = "validation" if role == "validation" else "split"
        raise CellError(problem, error.rows, error.shown, _IGNORE.format(role=role)) from None


def _split_of_flags(found: set[str], known: set[str]) -> str:
    """The split of a row with some of the known flags; empty if it is in none."""
    if "test" in found:
        return "test"
    if "train" in found or "train" not in known:
        return "train"
    if "validation" in found:
        return "validation"
    return "" if "test" in known else "test"
