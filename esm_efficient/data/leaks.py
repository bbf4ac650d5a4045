"""Find sequences that are in two splits: a model would be tested on its training data."""

from __future__ import annotations

import logging
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from esm_efficient.data.splits import sequence_hashes
from esm_efficient.errors import DataError, listing

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)


def check_leaks(splits: dict[str, Dataset]) -> None:
    """Refuse a sequence that is in two splits, and log how many sequences are repeated within a split.

    Args:
        splits: rows with ``sequence`` and ``accession``, by the name of the split.

    Raises:
        DataError: a sequence is in two splits.
    """
    hashes = {name: sequence_hashes(split) for name, split in splits.items()}
    for first, second in combinations(splits, 2):
        common = np.intersect1d(hashes[first], hashes[second])
        if not len(common):
            continue
        rows = {name: splits[name].select(np.flatnonzero(np.isin(hashes[name], common))) for name in (first, second)}
        # Two sequences may have the same hash: the sequences themselves decide.
        accessions = {row["sequence"]: row["accession"] for row in rows[first]}
        shared = [
            f"{accessions[row['sequence']]} = {row['accession']} ({first} and {second})"
            for row in rows[second]
            if row["sequence"] in accessions
        ]
        if shared:
            raise DataError(
                f"{len(shared)} sequence(s) are in two splits, so the test would be on training data: "
                f"{listing(shared)}. Remove the duplicates, or put them into one partition"
            )
    if repeated := sum(len(found) - len(np.unique(found)) for found in hashes.values()):
        differ = [pair for name, split in splits.items() for pair in _differing_labels(split, hashes[name])]
        advice = (
            f", {len(differ)} of them with another label: {listing(differ)}. Keep one row of each" if differ else ""
        )
        logger.warning("%d sequence(s) occur more than once within their split%s", repeated, advice)


def _differing_labels(split: Dataset, hashes: np.ndarray) -> list[str]:
    """The rows of a split whose sequence has another label in an earlier row, with the accessions of both."""
    if "label" not in split.column_names:
        return []
    _, group, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    first: dict[str, tuple[object, str]] = {}
    found = []
    for row in split.select(np.flatnonzero(counts[group] > 1)):
        label, accession = first.setdefault(row["sequence"], (row["label"], row["accession"]))
        if row["label"] != label:
            found.append(f"{accession} and {row['accession']}")
    return found
