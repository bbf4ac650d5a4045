"""Remove the padding of a batch, and put results back into the padded shape."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Run(NamedTuple):
    """Consecutive sequences of equal length.

    Attributes:
        start: index of the first token.
        sequences: number of sequences.
        length: tokens per sequence.
    """

    start: int
    sequences: int
    length: int


@dataclass(frozen=True)
class Packing:
    """The positions of a batch's tokens after its padding is removed.

    Sequences are sorted by length, so that sequences of equal length are neighbours and can be computed together.

    Attributes:
        shape: rows and columns of the padded batch.
        lengths: tokens per sequence, in packed order.
        index: int64 of shape (tokens,): the position of each token in the flattened padded batch; None if the batch
            has no padding.
        rotation: complex of shape (tokens, 1, head width / 2): the factor by which the position of a token rotates
            queries and keys; None without rotary positions.
        cache: values that one layer computes from the packing and that the other layers reuse.
    """

    shape: tuple[int, int]
    lengths: tuple[int, ...]
    index: Tensor | None = None
    rotation: Tensor | None = None
    cache: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def first_tokens(self) -> list[int]:
        """The index of each sequence's first token among the packed tokens."""
        starts, start = [], 0
        for length in self.lengths:
            starts.append(start)
            start += length
        return starts

    def with_rotation(self, table: tuple[Tensor, Tensor] | None, dtype: torch.dtype) -> Packing:
        """Return the packing with the rotation of each token.

        Args:
            table: cosine and sine of the rotary angles, of shape (1 or rows, columns, head width); None without rotary
                positions.
            dtype: dtype of the rotation's real and imaginary parts.
        """
        if table is None:
            return self
        rows, columns = self.shape
        half = table[0].shape[-1] // 2
        angles = torch.complex(*(part[..., :half].to(dtype) for part in table))
        rotation = angles.expand(rows, columns, half).reshape(-1, 1, half)
        return replace(self, rotation=rotation if self.index is None else rotation.index_select(0, self.index))

    def pack(self, states: Tensor) -> Tensor:
        """Return the tokens of (rows, columns, width) as (tokens, width)."""
        flat = states.reshape(-1, states.shape[-1])
        return flat if self.index is None else flat.index_select(0, self.index)

    def unpack(self, states: Tensor, *, first_only: bool = False) -> Tensor:
        """Return packed tokens as (rows, columns, width), with zeros for padding.

        Args:
            states: shape (tokens, width).
            first_only: `states` has only the first token of each sequence, and all other tokens become zero.
        """
        rows, columns = self.shape
        if self.index is None and not first_only:
            return states.view(rows, columns, -1)
        index = torch.arange(rows * columns, device=states.device) if self.index is None else self.index
        if first_only:
            index = index[self.first_tokens]
        padded = states.new_zeros(rows * columns, states.shape[-1])
        return padded.index_copy_(0, index, states).view(rows, columns, -1)


def runs_of(lengths: Sequence[int], *, max_tokens: float = math.inf) -> list[Run]:
    """Group consecutive sequences of equal length; empty sequences are left out.

    Args:
        lengths: tokens per sequence.
        max_tokens: largest number of tokens of a run with more than one sequence.

    Example:
        >>> runs_of([3, 3, 5])
        [Run(start=0, sequences=2, length=3), Run(start=6, sequences=1, length=5)]
    """
    runs: list[Run] = []
    start = 0
    for length in lengths:
        if length and runs and runs[-1].length == length and (runs[-1].sequences + 1) * length <= max_tokens:
            runs[-1] = runs[-1]._replace(sequences=runs[-1].sequences + 1)
        elif length:
            runs.append(Run(start, 1, length))
        start += length
    return runs


def make_packing(mask: Tensor | None, shape: tuple[int, int]) -> Packing:
    """Find the tokens of a padded batch.

    Args:
        mask: shape (rows, columns), nonzero for tokens and zero for padding, which may be anywhere in a row; None if
            there is no padding. One row stands for all.
        shape: rows and columns.
    """
    rows, columns = shape
    lengths = [columns] * rows
    index = None
    if mask is not None:
        mask = mask.bool().expand(rows, columns)
        counts = mask.sum(1).tolist()
        if counts != lengths:
            order = sorted(range(rows), key=lambda row: counts[row])
            lengths = [counts[row] for row in order]
            by_length = torch.tensor(order, device=mask.device)
            row, column = mask[by_length].nonzero(as_tuple=True)
            index = by_length[row] * columns + column
    return Packing(shape, tuple(lengths), index)
