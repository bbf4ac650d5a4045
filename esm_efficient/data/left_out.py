"""Rows that were left out on purpose, counted by what was wrong with them, rows that were read, and other notes."""

from __future__ import annotations

import csv
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from esm_efficient.data.in_memory import as_given
from esm_efficient.data.sequences import NucleotideCount
from esm_efficient.errors import DataError, listing

_SHOWN = 5


class LeftOut:
    """Counts the rows that were left out because something was wrong with them.

    Attributes:
        rows: the place of each row, and what is wrong with it.
    """

    def __init__(self) -> None:
        self.rows: list[tuple[str, str]] = []

    def add(self, place: str, problem: str) -> None:
        """Count a row."""
        self.rows.append((place, problem))

    def notes(self, path: Path | None = None) -> list[str]:
        """Return a sentence per problem.

        Args:
            path: the file with all rows (`save`), which is named if a sentence does not have them all.
        """
        places: dict[str, list[str]] = {}
        for place, problem in self.rows:
            places.setdefault(problem, []).append(place)
        notes = [f"left out {len(rows)} row(s), {problem}: {listing(rows, _SHOWN)}" for problem, rows in places.items()]
        has_more = path is not None and any(len(found) > _SHOWN for found in places.values())
        return [*notes, f"all {len(self.rows)} rows that were left out are in {path}"] if has_more else notes

    def save(self, path: Path) -> None:
        """Write a CSV file with the place of each row and what is wrong with it."""
        with path.open("w", encoding="utf-8", newline="") as handle:
            rows = ((as_given(place), problem) for place, problem in self.rows)
            csv.writer(handle, lineterminator="\n").writerows([("place", "problem"), *rows])


class Notes:
    """What a user should know about a table; they are kept with it and logged whenever it is loaded."""

    def __init__(self, messages: Sequence[tuple[int, str]] = ()) -> None:
        self.messages = list(messages)

    def add(self, level: int, message: str) -> None:
        """Add a message of a level of `logging`."""
        self.messages.append((level, message))

    def log(self, logger: logging.Logger) -> None:
        """Log the messages."""
        for level, message in self.messages:
            logger.log(level, "%s", message)

    def to_json(self) -> bytes:
        """Return the messages as JSON."""
        return json.dumps(self.messages).encode()

    @classmethod
    def from_json(cls, text: bytes) -> Notes:
        """Return the notes that `to_json` wrote."""
        return cls([(level, message) for level, message in json.loads(text)])


class RowCounts:
    """How many rows were read.

    Attributes:
        kept: rows within the bounds of length.
        left_out: rows outside the bounds.
        nucleotides: kept rows whose sequence consists of the letters of DNA and RNA.
        by_split: split to kept rows; 0 for a split without kept rows.
    """

    def __init__(self) -> None:
        self.kept = self.left_out = 0
        self.nucleotides = NucleotideCount()
        self.by_split: Counter[str] = Counter()

    def add(self, columns: Mapping[str, Any], keep: np.ndarray) -> None:
        """Count the rows of a block; `keep`, bool of shape (rows,), marks the kept ones."""
        self.kept += int(keep.sum())
        self.left_out += int((~keep).sum())
        rows = np.flatnonzero(keep).tolist()
        self.nucleotides.add(*([columns[name][row] for row in rows] for name in ("sequence", "accession")))
        for split, kept in zip(columns.get("split", ()), keep, strict=False):
            self.by_split[split] += int(kept)

    def check(self, files: Mapping[str, str | Path], notes: Notes, left_out: Sequence[str]) -> None:
        """Refuse an empty table or split and nucleotides, and take note of rows that were left out.

        `left_out` says why other rows were left out.
        """
        paths = listing([str(path) for path in files.values()])
        if not self.kept:
            raise DataError("; ".join([f"{paths}: no sequence is left", *left_out]))
        if empty := sorted(split for split, kept in self.by_split.items() if not kept):
            raise DataError(f"no sequence of {', '.join(empty)} is within the bounds of length")
        if warning := self.nucleotides.warning(paths):
            notes.add(logging.WARNING, warning)
        if self.left_out:
            notes.add(logging.INFO, f"{self.left_out} sequence(s) outside the bounds of length were left out")
