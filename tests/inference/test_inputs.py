"""Predictor takes sequences from what people have, and refuses texts that are not proteins."""

from __future__ import annotations

import re
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset, DatasetDict

from esm_efficient.errors import DataError
from esm_efficient.inference.inputs import problem_of, sequences_from

PROTEINS = ["MKTAYIAKQR", "MALWMRLLPL"]
SPLIT = Dataset.from_dict({"accession": ["a", "b"], "sequence": PROTEINS})


@pytest.mark.parametrize(
    "given",
    [
        PROTEINS,
        tuple(PROTEINS),
        iter(PROTEINS),
        np.array(PROTEINS),
        np.array(PROTEINS, dtype=object),
        pd.Series(PROTEINS, index=[7, 3]),
        pd.DataFrame({"n": [1, 2], "sequence": PROTEINS})["sequence"],
        pd.DataFrame({"n": [1, 2], "sequence": PROTEINS}),
        pd.DataFrame({0: [1, 2], "Protein": PROTEINS}),
        SPLIT,
        SPLIT.rename_column("sequence", "seq"),
        SPLIT["sequence"],
        dict.fromkeys(PROTEINS).keys(),
    ],
    ids=lambda given: type(given).__name__,
)
def test_sequences_are_taken_from_usual_containers(given):
    assert sequences_from(given) == PROTEINS


@pytest.mark.parametrize("given", [[], np.array([]), pd.Series([], dtype=str), SPLIT.select([])], ids=range(4))
def test_an_empty_container_has_no_sequences(given):
    assert sequences_from(given) == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("MKT", "single text: put it into a list"),
        (b"MKT", "single text"),
        (DatasetDict(train=SPLIT, test=SPLIT), "DatasetDict with 'train', 'test': give one of its values"),
        (OrderedDict(a="MKT"), "OrderedDict with 'a'"),
        ("proteins.fasta", "got the path proteins.fasta: predict_file and embed_file read files"),
        (Path("proteins"), "got the path proteins: predict_file"),
        (SPLIT.rename_column("sequence", "text"), "columns 'accession', 'text': expected one column with a usual name"),
        (pd.DataFrame({"protein": PROTEINS, "seq": PROTEINS}), "DataFrame has the columns 'protein', 'seq': expected"),
        (np.array([["MKT", "MAL"]]), r"the ndarray has the shape \(1, 2\): expected one text per sequence"),
        (7, "got int"),
        (["MKT", None, 3.0], r"2 sequence\(s\) are not texts: sequence 2, sequence 3"),
        (pd.Series(["MKT", float("nan")]), "are not texts: sequence 2"),
        (
            ["MKT", "proteins.fasta"],
            r"sequence 2 is the name of a file \(proteins.fasta\): read it with load_sequences",
        ),
        (["ATGGCCCTGTGGATGCGCCTCCTG"], "1 of 1 sequences consist of the letters A, C, G, T, U and N: sequence 1"),
    ],
)
def test_other_values_are_refused_with_advice(given, message):
    with pytest.raises(DataError, match=message):
        sequences_from(given)


@pytest.mark.parametrize(
    "text",
    [
        "MKTAYIAKQR",
        "mktayiakqr",
        "MKT\nAYIAK\nQ*",
        "MKTAYIAKQR QISFVKSHFS RQL",
        "M K T A Y",
        " MKT ",
        "MK-TA..YI*",
        "MUXBZOJ",
        "MNVSSEKREP YFMIMWGAFAGAAMWLIGGGLLVLMGL",
    ],
)
def test_what_may_be_a_protein_is_taken(text):
    assert problem_of(text) == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        (" -*\n", "is empty"),
        ("hello world", "looks like words"),
        ("This is not a protein", "looks like words"),
        ("THIS IS NOT A PROTEIN", "looks like words"),
        ("validation", "looks like words"),
        ("not a protein!", "not residues \\('!'\\)"),
        ("MKT1", "not residues \\('1'\\)"),
        (">sp|P12345\nMKT", "not residues"),
        ("data/proteins", "not residues \\('/'\\)"),
        ("/data/proteins.faa.gz", "name of a file"),
        ("table.CSV", "name of a file"),
        ("MKT\x00", "not residues"),
        ("MKÄ", "not residues"),
        ("ACDE*FGH", "has a stop .* inside: cut it there, or write X"),
        ("that is a hen", "looks like words"),
        ("<script>", "not residues"),
    ],
)
def test_other_texts_are_refused_with_the_reason(text, message):
    assert re.search(message, problem_of(text))


@pytest.mark.parametrize(
    ("sequences", "warned"),
    [
        (["ACGT"], ""),
        (["GAGAGAGAGAGAGAGAGAGAGAGA"], ""),
        (["ACGTACGTACGT"], "sequence 1"),
        ([*PROTEINS, "ACGT" * 9], "3"),
    ],
)
def test_peptides_of_the_letters_of_nucleotides_are_taken(sequences, warned, caplog):
    assert sequences_from(sequences) == sequences
    assert (warned in caplog.text) if warned else not caplog.text
