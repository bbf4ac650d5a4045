"""Sequences that stand in two splits, which would test a model on its training data."""

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
    """Refuse a sequence that stands in two splits; say how many stand more than once in one.

    Raises:
        DataError: a sequence stands in two splits.
    """
    warn_of_repeats(count_repeats(splits))


def warn_of_repeats(repeated: int) -> None:
    """Say how many sequences stand more than once within their split."""
    if repeated:
        logger.warning("%d sequence(s) stand more than once within their split", repeated)


def count_repeats(splits: dict[str, Dataset]) -> int:
    """How many sequences stand more than once within their split.

    Raises:
        DataError: a sequence stands in two splits.
    """
    hashes = {name: sequence_hashes(split) for name, split in splits.items()}
    ordered = {name: np.sort(found) for name, found in hashes.items()}
    repeated = sum(int(np.count_nonzero(found[1:] == found[:-1])) for found in ordered.values())
    for first, second in combinations(splits, 2):
        common = ordered[second][_is_among(ordered[second], ordered[first])]
        if not len(common):
            continue
        rows = {name: splits[name].select(np.flatnonzero(np.isin(hashes[name], common))) for name in (first, second)}
        owner = {row["sequence"]: row["accession"] for row in rows[first]}
        shared = [
            f"{owner[row['sequence']]} = {row['accession']} ({first} and {second})"
            for row in rows[second]
            if row["sequence"] in owner
        ]
        if shared:
            raise DataError(
                f"{len(shared)} sequence(s) stand in two splits, so the test would be on training data: "
                f"{listing(shared)}. Remove the duplicates, or put them into one partition"
            )
    return repeated


def _is_among(values: np.ndarray, ordered: np.ndarray) -> np.ndarray:
    """Which values are in an array that is in order."""
    places = np.searchsorted(ordered, values)
    return (places < len(ordered)) & (ordered[np.minimum(places, len(ordered) - 1)] == values)
