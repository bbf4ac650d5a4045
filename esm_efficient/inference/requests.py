"""The body of an HTTP request to sequences: JSON, CSV or FASTA, checked before any of it reaches a model."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from esm_efficient.data.readers import accession_of
from esm_efficient.data.schema import find_column
from esm_efficient.data.sequences import clean
from esm_efficient.errors import DataError, RequestError, listing

TYPES = ("application/json", "text/csv", "text/x-fasta")
"""Content types that are understood; a few other names for FASTA are too."""

_FASTA = ("text/x-fasta", "application/x-fasta", "text/fasta", "chemical/seq-aa-fasta")
_SHOWN = 40


class Query(NamedTuple):
    """A sequence to predict from.

    Attributes:
        name: what the request calls it, or its number, from 1.
        sequence: cleaned, as by `esm_efficient.data.sequences.clean`.
    """

    name: str
    sequence: str


@dataclass(frozen=True)
class RequestLimits:
    """What a request may hold.

    Attributes:
        bytes: of the body.
        sequences: in one request.
        residues: of one sequence.
        total_residues: of all sequences of one request.
    """

    bytes: int = 6 * 1024**2
    sequences: int = 1000
    residues: int = 1022
    total_residues: int = 200_000


def read_request(body: bytes | str, content_type: str | None, limits: RequestLimits = RequestLimits()) -> list[Query]:
    r"""The sequences of a request.

    JSON is ``{"inputs": "MKT..."}`` or ``{"inputs": ["MKT...", ...]}``, where an item may also be
    ``{"name": "P12345", "sequence": "MKT..."}``. CSV has a header with a column of sequences and, if it likes, one of
    names, both found by their usual names, or no header and a single column. FASTA goes by the first word of each
    header.

    Args:
        body: of the request, in UTF-8.
        content_type: of the body; parameters after a semicolon do not count. None for JSON.
        limits: what it may hold.

    Returns:
        At least one sequence, in the order of the request.

    Raises:
        RequestError: with status 413 for too much, 415 for another content type, 400 for anything else that is wrong.

    Example:
        >>> read_request(b'{"inputs": ["mk-t", "MAL*"]}', "application/json")
        [Query(name='1', sequence='MKT'), Query(name='2', sequence='MAL')]
    """
    if len(body) > limits.bytes:
        raise RequestError(f"the body has {len(body):,} bytes, and {limits.bytes:,} are the most", status=413)
    kind = (content_type or TYPES[0]).partition(";")[0].strip().lower()
    reader = {TYPES[0]: _json, TYPES[1]: _csv, **dict.fromkeys(_FASTA, _fasta)}.get(kind)
    if reader is None:
        raise RequestError(f"content type {kind[:_SHOWN]!r}: expected one of {', '.join(TYPES)}", status=415)
    try:
        text = body.decode("utf-8-sig") if isinstance(body, bytes | bytearray) else body
    except UnicodeDecodeError as error:
        raise RequestError(f"the body is not UTF-8: {error.reason} at byte {error.start}") from error
    queries: list[Query] = []
    total = 0
    for name, raw in reader(text):
        if len(queries) == limits.sequences:
            raise RequestError(f"more than {limits.sequences:,} sequences", status=413)
        query = Query((name or str(len(queries) + 1))[:200], _checked(raw, len(queries) + 1, limits))
        total += len(query.sequence)
        if total > limits.total_residues:
            raise RequestError(f"more than {limits.total_residues:,} residues in one request", status=413)
        queries.append(query)
    if not queries:
        raise RequestError("the request holds no sequence")
    return queries


def _checked(raw: Any, number: int, limits: RequestLimits) -> str:
    """A clean sequence of letters, not too long."""
    if not isinstance(raw, str):
        raise RequestError(f"sequence {number} is {type(raw).__name__}: expected text")
    sequence = clean(raw)
    if not sequence:
        raise RequestError(f"sequence {number} holds no residue")
    if len(sequence) > limits.residues:
        raise RequestError(
            f"sequence {number} has {len(sequence):,} residues, and {limits.residues:,} are the most", status=413
        )
    if not (sequence.isascii() and sequence.isalpha()):
        strange = sorted({character for character in sequence if not (character.isascii() and character.isalpha())})
        raise RequestError(f"sequence {number} holds what is no residue: {listing([repr(c) for c in strange])}")
    return sequence


def _json(text: str) -> Iterator[tuple[str, Any]]:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is no JSON: {str(error)[:200]}") from error
    if not isinstance(record, dict) or "inputs" not in record:
        raise RequestError('expected {"inputs": ...} with one sequence or a list of them')
    if unknown := sorted(set(record) - {"inputs"}):
        raise RequestError(f"unknown: {listing([repr(name[:_SHOWN]) for name in unknown])}; expected inputs alone")
    inputs = record["inputs"]
    for number, item in enumerate(inputs if isinstance(inputs, list) else [inputs], 1):
        if not isinstance(item, dict):
            yield "", item
            continue
        if "sequence" not in item or not set(item) <= {"sequence", "name"}:
            raise RequestError(f"input {number} has not the fields sequence and, if it likes, name")
        if not isinstance(item.get("name", ""), str):
            raise RequestError(f"the name of input {number} is {type(item['name']).__name__}: expected text")
        yield item.get("name", ""), item["sequence"]


def _csv(text: str) -> Iterator[tuple[str, str]]:
    if "\0" in text:
        raise RequestError("the CSV holds a null character")
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        filled = ((rows.line_num, row) for row in rows if any(cell.strip() for cell in row))
        line, header = next(filled, (0, []))
        if not header:
            return
        names = [name.strip() for name in header]
        sequence = find_column("sequence", names, None, "the CSV")
        if sequence is None:
            if len(header) > 1:
                raise RequestError(f"the CSV has no column called sequence; it has {listing(names)}")
            yield "", header[0]
        name = None if sequence is None else find_column("accession", names, None, "the CSV")
        for line, row in filled:
            if len(row) != len(header):
                raise RequestError(f"line {line} of the CSV has {len(row)} cells, and the first has {len(header)}")
            cells = dict(zip(names, row, strict=True))
            yield cells.get(name or "", "").strip(), cells[sequence] if sequence is not None else row[0]
    except csv.Error as error:
        raise RequestError(f"the CSV cannot be read: line {rows.line_num}: {error}") from error
    except DataError as error:
        raise RequestError(str(error)) from error


def _fasta(text: str) -> Iterator[tuple[str, str]]:
    from Bio.SeqIO.FastaIO import SimpleFastaParser

    if not text.lstrip().startswith(">"):
        raise RequestError("the FASTA does not begin with a header, '>'")
    for header, sequence in SimpleFastaParser(io.StringIO(text.lstrip())):
        words = header.split(None, 1)
        yield accession_of(words[0]) if words else "", sequence
