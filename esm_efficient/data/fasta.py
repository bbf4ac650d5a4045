"""Records of a FASTA file, also of one with a line of labels below each sequence."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from esm_efficient.data.opening import MAX_ROW_CHARACTERS
from esm_efficient.data.sequences import STANDARD_RESIDUES, STOP
from esm_efficient.errors import DataError

FASTA_COLUMNS = ("accession", "header", "sequence")
"""Columns of a FASTA file."""

LABELS_COLUMN = "labels"
"""The column of the labels of residues, if a line below each sequence has them."""

HEADER_KEYS = ("set", "split", "subset", "stage", "validation", "target", "partition", "fold")
"""Keys of ``KEY=value`` in headers that are read as columns, in upper or lower case, such as FLIP's ``SET=train``."""

LeaveOut = Callable[[str, str], None]
"""Takes the place of a row that is left out, and what is wrong with it."""

_PEEK_RECORDS = 100
_KEY_AND_VALUE = re.compile(r"(?:^|\s)(\w+)=(.*?)(?=\s+\w+=|\s*$)")
"""A key and its value, which may have spaces: it ends before the next key."""


class Record(NamedTuple):
    """A FASTA record: its place, accession, header without ``>``, and other lines without white space."""

    place: str
    accession: str
    header: str
    lines: list[str]


def accession_of(name: str) -> str:
    """Return the accession in a UniProt name; any other name unchanged.

    Example:
        >>> accession_of("sp|P12345|NAME_HUMAN"), accession_of("P12345")
        ('P12345', 'P12345')
    """
    parts = name.split("|")
    return parts[1] if len(parts) == 3 and parts[0] in ("sp", "tr") and parts[1] else name


def read_fasta(handle: Iterable[str], source: str | Path) -> Iterator[tuple[str, tuple[str, str, str]]]:
    r"""Read the records of a FASTA text; lines that begin with ``;`` are comments.

    Args:
        handle: the lines of the text.
        source: the name of the text in errors.

    Yields:
        The place of a record, such as ``record 1 (P12345)``, and its accession, header and sequence.

    Raises:
        DataError: the text does not begin with a header, a record is too long, or labels are below the sequences.

    Example:
        >>> list(read_fasta([">sp|P12345|NAME A protein\n", "MK\n", "TV\n"], "example"))
        [('record 1 (P12345)', ('P12345', 'sp|P12345|NAME A protein', 'MKTV'))]
    """
    first, others = _peek(_records(handle, source))
    if have_labels(first):
        raise DataError(f"{source} has labels below the sequences (3-line FASTA). Remove the lines of labels")
    for record in itertools.chain(first, others):
        yield record.place, (record.accession, record.header, "".join(record.lines))


def read_fasta_table(
    handle: Iterable[str], source: str | Path, *, keys: bool = True, leave_out: LeaveOut | None = None
) -> tuple[list[str], Iterator[tuple[str, Sequence[str]]]]:
    """Read the records of a FASTA text as the rows of a table.

    Args:
        handle: the lines of the text.
        source: the name of the text in errors.
        keys: whether the `HEADER_KEYS` of the first headers become columns.
        leave_out: takes records that cannot be parsed; None to raise an error.

    Returns:
        The column names: `FASTA_COLUMNS`, `LABELS_COLUMN` if there is a line of labels below each sequence, and the
        keys of the headers. And an iterator over the place and the cells of each record.

    Raises:
        DataError: as `read_fasta`, or labels are below some sequences only.
    """
    first, others = _peek(_records(handle, source))
    labelled = have_labels(first)
    names = [*FASTA_COLUMNS, *([LABELS_COLUMN] if labelled else [])]
    found = (key for record in first if keys for key, _ in _KEY_AND_VALUE.findall(record.header))
    columns = [key for key in dict.fromkeys(found) if key.lower() in HEADER_KEYS]

    def rows() -> Iterator[tuple[str, Sequence[str]]]:
        for record in itertools.chain(first, others):
            cells = [record.accession, record.header]
            if not labelled:
                cells.append("".join(record.lines))
            elif len(record.lines) == 2:
                cells += record.lines
            else:
                problem = "expected a line of residues and a line of labels, as in the records before it"
                if leave_out is None:
                    raise DataError(
                        f"{source}, {record.place}: {len(record.lines)} line(s) below the header; {problem}"
                    )
                leave_out(f"{source}, {record.place}", problem)
                continue
            if keys:
                pairs = [pair for pair in _KEY_AND_VALUE.findall(record.header) if pair[0].lower() in HEADER_KEYS]
                if problem := _wrong_keys([key for key, _ in pairs], columns):
                    if leave_out is None:
                        raise DataError(f"{source}, {record.place}: {problem}")
                    leave_out(f"{source}, {record.place}", problem)
                    continue
                values = dict(pairs)
                cells += [values.get(column, "") for column in columns]
            yield record.place, cells

    return names + columns, rows()


def _wrong_keys(keys: Sequence[str], columns: Sequence[str]) -> str:
    """Return what is wrong with the keys of a header; empty if nothing is."""
    if twice := sorted({key for key in keys if keys.count(key) > 1}):
        return f"the header has {twice[0]}= twice"
    if late := [key for key in keys if key not in columns]:
        return (
            f"the header has {late[0]}=, which none of the first {_PEEK_RECORDS} headers has. Write it into one of "
            "them too, so that it becomes a column"
        )
    return ""


def have_labels(records: Sequence[Record]) -> bool:
    """Return whether most records have a line of labels below the sequence, as those of SignalP and DeepTMHMM.

    Raises:
        DataError: some records only have labels, or the sequences and their labels are in more than two lines.
    """
    marks = [_labels_begin(record.lines) for record in records]
    if len(records) < 2 and not any(_has_other_letters(record.lines) for record in records):
        return False  # a single sequence whose second line is a repeat looks the same
    marked = [record for record, mark in zip(records, marks, strict=True) if mark]
    if 10 * len(marked) < max(len(records), 1):
        return False
    if 2 * len(marked) <= len(records):
        raise DataError(
            f"{len(marked)} of {len(records)} records seem to have labels below the sequence, such as "
            f"{marked[0].place}. Write labels below each sequence, or into a FASTA file of their own (labels=)"
        )
    if wrapped := [record for record in marked if len(record.lines) > 2]:
        raise DataError(
            f"{wrapped[0].place} seems to have labels below its sequence, in {len(wrapped[0].lines)} lines. Write a "
            "sequence in one line and its labels in one line, or the labels into a FASTA file of their own (labels=)"
        )
    return True


def _labels_begin(lines: Sequence[str]) -> bool:
    """Whether the second half of the lines seems to have the labels of the residues in the first half."""
    half, odd = divmod(len(lines), 2)
    if odd or not half or list(map(len, lines[:half])) != list(map(len, lines[half:])):
        return False
    return _are_labels("".join(lines[half:])) and not _are_labels("".join(lines[:half]))


def _has_other_letters(lines: Sequence[str]) -> bool:
    """Whether the second half of the lines has a letter that proteins hardly have, and that the first half has not."""
    first, second = ("".join(half).upper() for half in (lines[: len(lines) // 2], lines[len(lines) // 2 :]))
    return bool(set(second) - set(first) - set(STANDARD_RESIDUES + "X" + STOP))


def _are_labels(text: str) -> bool:
    """Whether a text has few different letters, and the same letter often twice in succession. No protein has both."""
    repeats = sum(a == b for a, b in itertools.pairwise(text))
    return len(set(text)) <= 12 and repeats >= 0.3 * (len(text) - 1)


def _peek(records: Iterator[Record]) -> tuple[list[Record], Iterator[Record]]:
    """The first records, and an iterator over the others."""
    first: list[Record] = []
    characters = 0
    for record in records:
        first.append(record)
        characters += sum(map(len, record.lines))
        if len(first) == _PEEK_RECORDS or characters > MAX_ROW_CHARACTERS:
            break
    return first, records


def _records(handle: Iterable[str], source: str | Path) -> Iterator[Record]:
    lines = iter(handle)
    first = next((line for line in lines if line.strip() and not line.startswith(";")), "")
    if not first.startswith(">"):
        raise DataError(f"{source} does not begin with a FASTA header, '>'")
    number, header, body, size = 1, first[1:].rstrip(), list[str](), 0
    for line in itertools.chain(lines, [">"]):
        mark = line[:1]
        if mark == ";":
            continue
        if mark != ">":
            size += len(line)
            if size > MAX_ROW_CHARACTERS:
                raise DataError(f"{source}, record {number}: more than {MAX_ROW_CHARACTERS:,} characters")
            if text := line.strip():
                body.append(text.replace(" ", ""))
            continue
        words = header.split(None, 1)
        accession = accession_of(words[0]) if words else ""
        yield Record(f"record {number} ({accession})", accession, header, body)
        number, header, body, size = number + 1, line[1:].rstrip(), [], 0
