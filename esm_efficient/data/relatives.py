"""How many sequences of one split have a close relative in another, from the short words that they share.

A random split puts relatives on both sides, and a score then measures memory too. This count needs no alignment
program. It finds close relatives only: two sequences with identity p share about p**5 of their words of five residues,
so a share of a tenth is an identity of about 60 %. MMseqs2 finds homologues with 30 % identity, and
`esm_efficient.data.loading.load_sequences` takes its clusters.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

WORD = 5
"""Residues per word; two unrelated proteins of 300 residues share 0.03 words of five residues."""

CLOSE = 0.1
"""The share of words from which two sequences are close relatives."""

_BLOCK = 512


def words_of(sequences: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the words that each sequence has, as numbers one sequence after the other, and how many each has."""
    found = [np.empty(0, dtype=np.int64)]
    for sequence in sequences:
        letters = np.frombuffer(sequence.encode("ascii", "replace"), dtype=np.uint8).astype(np.int64) & 31
        count = max(len(letters) - WORD + 1, 0)
        found.append(np.unique(sum(letters[shift : shift + count] << (5 * shift) for shift in range(WORD))))
    return np.concatenate(found), np.array([len(words) for words in found[1:]], dtype=np.int64)


def shared_words(queries: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """Return the largest share of each query's words that one reference has, float64 of shape (queries,).

    Args:
        queries: sequences, such as those of a test split. One that is shorter than a word shares nothing.
        references: sequences, such as those of the training split.

    Example:
        >>> shared_words(["MKTAYIAKQR", "GGGGGGGGGG"], ["MKTAYIAKQL"]).round(2).tolist()
        [0.83, 0.0]
    """
    from scipy.sparse import csr_matrix

    words, totals = words_of(queries)
    # Only the words of the queries matter. They are the columns, numbered anew: a matrix of all words is slow to index.
    kept, columns = np.unique(words, return_inverse=True)
    others, counts = words_of(references)
    places = np.searchsorted(kept, others)
    common = np.append(kept, -1)[places] == others  # no word is -1
    shares = np.zeros(len(totals))
    if not common.any():
        return shares

    def matrix(columns: np.ndarray, rows: np.ndarray, height: int) -> Any:
        return csr_matrix((np.ones(len(rows), dtype=np.int32), (rows, columns)), shape=(height, len(kept)))

    found = matrix(columns, np.repeat(np.arange(len(totals)), totals), len(totals))
    rows = np.repeat(np.arange(len(counts)), counts)[common]
    known = matrix(places[common], rows, len(counts)).T.tocsr()
    for start in range(0, len(totals), _BLOCK):
        most = (found[start : start + _BLOCK] @ known).max(axis=1).toarray().ravel()
        shares[start : start + _BLOCK] = most / np.maximum(totals[start : start + _BLOCK], 1)
    return shares


def close_relatives(queries: Sequence[str], references: Sequence[str]) -> float:
    """Return the share of queries with a close relative among the references, from 0 to 1; NaN without queries.

    Two sequences are close relatives if they share a tenth of the query's words of five residues, which is an identity
    of about 60 %. Relatives with less identity are not counted.

    Args:
        queries: sequences, such as those of the test split.
        references: sequences, such as those of the training split.
    """
    return float((shared_words(queries, references) >= CLOSE).mean()) if len(queries) else float("nan")
