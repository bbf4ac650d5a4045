"""read_request: valid bodies give sequences, all others an error with an HTTP status."""

from __future__ import annotations

import json
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esm_efficient.errors import RequestError
from esm_efficient.inference import RequestLimits, read_request

JSON, CSV, FASTA = "application/json", "text/csv", "text/x-fasta"
LIMITS = RequestLimits(bytes=500, sequences=3, residues=10, total_residues=20)


@pytest.mark.parametrize(
    ("content_type", "body", "expected"),
    [
        (JSON, '{"inputs": "MKT"}', [("1", "MKT")]),
        (None, '{"inputs": ["MKT", "ma l*"]}', [("1", "MKT"), ("2", "MAL")]),
        (
            "application/json; charset=utf-8",
            '{"inputs": [{"name": "P1", "sequence": "MKT"}, {"sequence": "A"}]}',
            [("P1", "MKT"), ("2", "A")],
        ),
        (CSV, "MKT\nMAL\n", [("1", "MKT"), ("2", "MAL")]),
        (CSV, "MKT", [("1", "MKT")]),
        (CSV, " MK-T* \nmal\n", [("1", "MKT"), ("2", "MAL")]),
        (CSV, "M<mask>T\nMAL\n", [("1", "M<mask>T"), ("2", "MAL")]),
        (CSV, "\ufeffid,Sequence\r\nP1,MKT\r\n\r\nP2,mal\r\n", [("P1", "MKT"), ("P2", "MAL")]),
        ("TEXT/CSV", 'seq,note\n"MKT","a, b"\n', [("1", "MKT")]),
        (FASTA, ">sp|P12345|X_HUMAN some protein\nMKT\nAYI*\n>b\nMAL", [("P12345", "MKTAYI"), ("b", "MAL")]),
        (FASTA, "\n>\nMK\n", [("1", "MK")]),
    ],
)
def test_sequences_are_read_with_their_names(content_type, body, expected):
    assert read_request(body.encode(), content_type) == expected


@pytest.mark.parametrize(
    ("content_type", "body", "status", "message"),
    [
        (JSON, b"", 400, "not valid JSON"),
        (JSON, b"{", 400, "not valid JSON"),
        (JSON, b"[" * 400, 400, "not valid JSON|expected"),
        (JSON, b"\xff\xfe", 400, "not UTF-8"),
        (JSON, b'"MKT"', 400, "expected .*inputs"),
        (JSON, b'{"inputs": []}', 400, "contains no sequence"),
        (
            JSON,
            b'{"inputs": ["ACGTACGTAC", "ACGTACGTAC"]}',
            400,
            "the request: 2 of 2 sequences consist of the letters",
        ),
        (JSON, b'{"inputs": [1]}', 400, "sequence 1 is int"),
        (JSON, b'{"inputs": null}', 400, "sequence 1 is NoneType"),
        (JSON, b'{"inputs": ["MK", " "]}', 400, "sequence 2 is empty"),
        (JSON, b'{"inputs": "MK1"}', 400, "not residues: '1'"),
        (JSON, b'{"inputs": "M*K"}', 400, r"not residues: '\*'"),
        (JSON, b'{"inputs": "\\ud800"}', 400, "not residues"),
        (JSON, b'{"inputs": "no protein"}', 400, "sequence 1 looks like words"),
        (JSON, b'{"inputs": ["MK", "p.fasta"]}', 400, "sequence 2 is the name of a file"),
        (JSON, b'{"inputs": "MK", "parameters": {}}', 400, r"unknown field\(s\) 'parameters'"),
        (JSON, b'{"inputs": [{"name": 1, "sequence": "MK"}]}', 400, "name of input 1 is int"),
        (JSON, b'{"inputs": [{"id": "a"}]}', 400, 'input 1 must have "sequence"; "name" is optional'),
        (JSON, b'{"inputs": "' + b"M" * 11 + b'"}', 413, "11 residues; at most 10"),
        (JSON, b'{"inputs": ["M", "M", "M", "M"]}', 413, "more than 3 sequences"),
        (JSON, json.dumps({"inputs": ["M" * 10, "M" * 10, "M"]}).encode(), 413, "more than 20 residues"),
        (JSON, b" " * 501, 413, "501 bytes"),
        (CSV, b"", 400, "contains no sequence"),
        (CSV, b"id,label\na,b\n", 400, "no column called sequence; it has id, label"),
        (CSV, b"seq,sequence\na,b\n", 400, "could be any of"),
        *(
            (CSV, f"{header}\nMKTAYI\n".encode(), 400, f"the first line of the CSV is '{header}': expected the header")
            for header in (
                *("Peptide", "Entry", "AA", "HEAVY", "fasta", "text", "id", "ID", "MEMBRANE", "Antigen chain"),
                *("SEQUENCES", "PROTEINS", "QUERY", "QUERIES"),
            )
        ),
        (CSV, b'sequence\nMKT\n""\nMAL\n', 400, "sequence 2 is empty"),
        (CSV, b"sequence,note\nMKT,a\n,b\nMAL,c\n", 400, "sequence 2 is empty"),
        (CSV, b"id,sequence\na\n", 400, "the CSV, line 2: 1 cells for 2"),
        (CSV, b'id,sequence\na,"MK\n', 400, "the CSV, line 2: unexpected end"),
        (CSV, b"sequence\nM\0K\n", 400, "null character"),
        (FASTA, b"MKT\n", 400, "does not begin"),
        (FASTA, b">a\n>b\nMK\n", 400, "sequence 1 is empty"),
        ("text/plain", b"MKT", 415, "expected one of application/json"),
        ("application/x-npy", b"\x93NUMPY", 415, "expected one of"),
    ],
)
def test_a_wrong_body_is_an_error_with_a_status_and_a_reason(content_type, body, status, message):
    with pytest.raises(RequestError, match=message) as caught:
        read_request(body, content_type, LIMITS)
    assert caught.value.status == status
    assert len(str(caught.value)) < 500


NAMES = st.text(string.ascii_letters + string.digits, min_size=1, max_size=8)
SEQUENCES = st.lists(st.tuples(NAMES, st.text("ACDEFGHIKLMNPQRSTVWYXBZUO", min_size=1, max_size=30)), min_size=1)


@given(SEQUENCES)
def test_json_csv_and_fasta_give_the_same_queries(queries):
    named = [{"name": name, "sequence": sequence} for name, sequence in queries]
    forms = {
        JSON: json.dumps({"inputs": named}),
        CSV: "name,sequence\n" + "".join(f"{n},{s}\n" for n, s in queries),
        FASTA: "".join(f">{n} and more words\n{s[:10]}\n{s[10:]}\n" for n, s in queries),
    }
    for content_type, body in forms.items():
        assert read_request(body.encode(), content_type) == queries


@settings(max_examples=300)
@given(
    st.sampled_from([JSON, CSV, FASTA, None, "x/y"]),
    st.one_of(
        st.binary(max_size=300),
        st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")),
        st.text('{}[]":, \n>\\u0MKinputsequence', max_size=120).map(str.encode),
        st.recursive(st.none() | st.booleans() | st.floats() | st.text(max_size=5), st.lists, max_leaves=5).map(
            lambda value: json.dumps({"inputs": value}).encode()
        ),
    ),
)
def test_any_body_gives_sequences_or_a_status(content_type, body):
    status, queries = None, []
    try:
        queries = read_request(body, content_type, LIMITS)
    except RequestError as error:
        status = error.status
        str(error).encode()
    assert queries if status is None else 400 <= status < 500
    assert all(q.sequence.isascii() and q.sequence.isalpha() and len(q.sequence) <= 10 for q in queries)


def test_a_csv_of_proteins_alone_has_no_header():
    first, second = "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEV", "MALWMRLLPLLALLALWGPDPAAA"
    assert read_request(f"{first}\n{second}\n".encode(), CSV) == [("1", first), ("2", second)]
