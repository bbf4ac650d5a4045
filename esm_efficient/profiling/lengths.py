"""The lengths of sequences, and of the batches that they are put into."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np

from esm_efficient.errors import ConfigurationError
from esm_efficient.profiling.throughput import SPECIAL_TOKENS


def token_lengths(length: Any) -> int | list[int]:
    """The tokens of one sequence or of many, from what `estimate` takes as a length.

    Raises:
        ConfigurationError: there is no sequence, or a data set has neither of the columns.

    Example:
        >>> token_lengths(512), token_lengths([100, 200])
        (512, [100, 200])
    """
    if isinstance(length, numbers.Integral):
        return int(length)
    data = length["train"] if isinstance(length, dict) and "train" in length else length
    columns = getattr(data, "column_names", None)
    if columns is None:
        lengths = [int(n) for n in data]
    elif "length" in columns:
        lengths = [int(n) for n in data["length"]]
    elif "sequence" in columns:
        lengths = [len(sequence) + SPECIAL_TOKENS for sequence in data["sequence"]]
    else:
        raise ConfigurationError(f"the data set has the columns {columns}: expected 'length' or 'sequence'")
    if not lengths:
        raise ConfigurationError("a data set without any sequence has no lengths to estimate from")
    return lengths


def batch_lengths(lengths: Sequence[int], micro_batch: int, padding: str) -> tuple[int, int, float]:
    """Tokens a sequence takes in the largest and in the average micro-batch, and the mean residues of a sequence.

    The largest micro-batch is that of the longest sequences. In random micro-batches the average sequence is padded to
    the mean of the batches' longest.
    """
    ordered = np.sort(np.asarray(lengths))[::-1]
    residues = float(np.mean(np.maximum(ordered - 2, 0)))
    if padding == "free":
        return math.ceil(ordered[:micro_batch].mean()), round(ordered.mean()), residues
    drawn = np.random.default_rng(0).choice(ordered, size=(1000, micro_batch))
    return int(ordered[0]), round(drawn.max(axis=1).mean()), residues
