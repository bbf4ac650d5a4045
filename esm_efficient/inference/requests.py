"""Sequences from the body of an HTTP request: JSON, CSV or FASTA, checked before a model sees them."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from esm_efficient.data.readers import read_fasta, read_table
from esm_efficient.data.schema import USUAL_NAMES, find_column, non_letters
from esm_efficient.data.sequences import SPECIAL_PATTERN, NucleotideCount, clean, count_residues
from esm_efficient.errors import DataError, RequestError, listing
from esm_efficient.inference.inputs import problem_of

TYPES = ("application/json", "text/csv", "text/x-fasta")
"""Accepted content types; other usual names of FASTA are accepted too."""

_FASTA = ("text/x-fasta", "application/x-fasta", "text/fasta", "chemical/seq-aa-fasta")
_HEADERS = frozenset(name for names in USUAL_NAMES.values() for name in names) | frozenset(
    (
        *("aa", "antibody", "antigen", "chain", "fasta", "heavy", "input", "light", "membrane", "peptide", "query"),
        *("queries", "target", "text", "vh", "vl"),
    )
)
"""Words that head a column and whose letters are also residues: in capitals they look like a sequence. So do their
plurals."""
_MAX_SHOWN = 40
"""Characters of a name or content type that an error repeats."""


class Query(NamedTuple):
    """A sequence to predict from.

    Attributes:
        name: its name in the request, or its number, counted from 1.
        sequence: cleaned by `esm_efficient.data.sequences.clean`.
    """

    name: str
    sequence: str


@dataclass(frozen=True)
class RequestLimits:
    """The largest request that is accepted.

    Attributes:
        bytes: most bytes of the body.
        sequences: most sequences per request.
        residues: most residues per sequence.
        total_residues: most residues per request.
    """

    bytes: int = 6 * 1024**2
    sequences: int = 1000
    residues: int = 1022
    total_residues: int = 200_000


def read_request(body: bytes | str, content_type: str | None, limits: RequestLimits = RequestLimits()) -> list[Query]:
    r"""Return the sequences of a request.

    JSON is ``{"inputs": "MKT..."}`` or ``{"inputs": ["MKT...", ...]}``; an item may also be
    ``{"name": "P12345", "sequence": "MKT..."}``, in which ``name`` is optional. CSV has a header with a column of
    sequences and optionally one of names, both found by their usual names; or it has no header and a single column of
    sequences in capitals.
    FASTA records are named by the first word of their header.

    Args:
        body: of the request, in UTF-8.
        content_type: of the body; parameters after a semicolon are ignored. None for JSON.
        limits: the largest request that is accepted.

    Returns:
        At least one sequence, in the order of the request.

    Raises:
        RequestError: with status 413 for a request over a limit, 415 for an unknown content type, 400 for any other
            fault.

    Example:
        >>> read_request(b'{"inputs": ["mk-t", "MAL*"]}', "application/json")
        [Query(name='1', sequence='MKT'), Query(name='2', sequence='MAL')]
    """
    if len(body) > limits.bytes:
        raise RequestError(f"the body has {len(body):,} bytes; at most {limits.bytes:,} are accepted", status=413)
    kind = (content_type or TYPES[0]).partition(";")[0].strip().lower()
    reader = {TYPES[0]: _json, TYPES[1]: _csv, **dict.fromkeys(_FASTA, _fasta)}.get(kind)
    if reader is None:
        raise RequestError(f"content type {kind[:_MAX_SHOWN]!r}: expected one of {', '.join(TYPES)}", status=415)
    queries: list[Query] = []
    total = 0
    try:
        text = body.decode("utf-8-sig") if isinstance(body, bytes | bytearray) else body
        for number, (name, raw) in enumerate(reader(text), 1):
            if number > limits.sequences:
                raise RequestError(f"more than {limits.sequences:,} sequences", status=413)
            query = Query((name or str(number))[:200], _checked_sequence(raw, number, limits))
            total += len(query.sequence)
            if total > limits.total_residues:
                raise RequestError(f"more than {limits.total_residues:,} residues in one request", status=413)
            queries.append(query)
        nucleotides = NucleotideCount()
        nucleotides.add([query.sequence for query in queries], [query.name[:_MAX_SHOWN] for query in queries])
        nucleotides.warning("the request")
    except UnicodeDecodeError as error:
        raise RequestError(f"the body is not UTF-8: {error.reason} at byte {error.start}") from error
    except DataError as error:
        raise RequestError(str(error)) from error
    if not queries:
        raise RequestError("the request contains no sequence")
    return queries


def _checked_sequence(raw: Any, number: int, limits: RequestLimits) -> str:
    """The cleaned sequence, which consists of letters and is not too long."""
    if not isinstance(raw, str):
        raise RequestError(f"sequence {number} is {type(raw).__name__}: expected text")
    sequence = clean(raw)
    if not sequence:
        raise RequestError(f"sequence {number} is empty")
    if (residues := count_residues(sequence)) > limits.residues:
        message = f"sequence {number} has {residues:,} residues; at most {limits.residues:,} are accepted"
        raise RequestError(message, status=413)
    if unknown := non_letters(sequence):
        raise RequestError(
            f"sequence {number} contains characters that are not residues: {listing([repr(c) for c in unknown])}"
        )
    if problem := problem_of(raw):
        raise RequestError(f"sequence {number} {problem}")
    return sequence


def _json(text: str) -> Iterator[tuple[str, Any]]:
    """The name, empty if there is none, and the sequence of each input."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is not valid JSON: {str(error)[:200]}") from error
    if not isinstance(record, dict) or "inputs" not in record:
        raise RequestError('expected {"inputs": ...} with one sequence or a list of sequences')
    if unknown := sorted(set(record) - {"inputs"}):
        shown = listing([repr(name[:_MAX_SHOWN]) for name in unknown])
        raise RequestError(f'unknown field(s) {shown}; expected only "inputs"')
    inputs = record["inputs"]
    for number, item in enumerate(inputs if isinstance(inputs, list) else [inputs], 1):
        if not isinstance(item, dict):
            yield "", item
            continue
        if "sequence" not in item or not set(item) <= {"sequence", "name"}:
            raise RequestError(f'input {number} must have "sequence"; "name" is optional; other fields are refused')
        if not isinstance(item.get("name", ""), str):
            raise RequestError(f"the name of input {number} is {type(item['name']).__name__}: expected text")
        yield item.get("name", ""), item["sequence"]


def _csv(text: str) -> Iterator[tuple[str, str]]:
    """The name, empty if there is none, and the sequence of each row."""
    if "\0" in text:
        raise RequestError("the CSV contains a null character")
    if not text.strip():
        return
    names, rows = read_table(io.StringIO(text, newline=""), "the CSV", delimiter=",")
    sequence = None if len(names) == 1 and not _is_usual(names[0]) else find_column("sequence", names, None, "the CSV")
    accession = None if sequence is None else find_column("accession", names, None, "the CSV")
    if sequence is None:
        if len(names) > 1:
            shown = listing([name[:_MAX_SHOWN] for name in names])
            raise RequestError(f"the CSV has no column called sequence; it has {shown}")
        sequence = names[0]
        _check_first_line(sequence)
        yield "", sequence
    for _, row in rows:
        cells = dict(zip(names, row, strict=True))
        yield cells.get(accession or "", "").strip(), cells[sequence]


def _is_usual(name: str) -> bool:
    """Whether the only column of a CSV has a header; otherwise its name is the first sequence."""
    return name.strip().lower() in USUAL_NAMES["sequence"]


def _check_first_line(line: str) -> None:
    """Refuse the first line of a CSV with one column if it may be a header: without one, it is a sequence too."""
    letters = SPECIAL_PATTERN.sub("", line)
    word = letters.strip().lower()
    if letters != letters.upper() or not _HEADERS.isdisjoint((word, word.removesuffix("s"))):
        raise RequestError(
            f"the first line of the CSV is {line[:_MAX_SHOWN]!r}: expected the header sequence, or no header and "
            "sequences in capitals"
        )


def _fasta(text: str) -> Iterator[tuple[str, str]]:
    """The accession, empty if there is none, and the sequence of each record."""
    for _, (accession, _, sequence) in read_fasta(io.StringIO(text.lstrip(), newline=""), "the FASTA"):
        yield accession, sequence
