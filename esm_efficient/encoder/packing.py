"""Remove the padding of a batch, and put results back into the padded shape."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from esm_efficient import _torch


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
        bounds: int32 of shape (sequences + 1,): the index of each sequence's first token among the packed tokens, and
            the number of tokens; None if `cu_seqlens` has to make it.
        begins: whether each sequence begins at the first column.
        rotation: complex of shape (tokens, 1, head width / 2): the factor by which the position of a token rotates
            queries and keys; None without rotary positions.
        cache: values that one layer computes from the packing and that the other layers reuse.
    """

    shape: tuple[int, int]
    lengths: tuple[int, ...]
    index: Tensor | None = None
    bounds: Tensor | None = None
    begins: bool = True
    rotation: Tensor | None = None
    cache: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    def cu_seqlens(self, device: torch.device) -> Tensor:
        """Return `bounds` on a device; the first call makes them, and no call waits for the device."""
        key = "bounds", device
        if key not in self.cache:
            self.cache[key] = self._make_bounds(device)
        return cast(Tensor, self.cache[key])

    def _make_bounds(self, device: torch.device) -> Tensor:
        rows, columns = self.shape
        if self.bounds is not None:
            return self.bounds.to(device)
        if self.lengths == (columns,) * rows and columns:
            return torch.arange(0, (rows + 1) * columns, columns, dtype=torch.int32, device=device)
        return sent(bounds_of(self.lengths), device)

    def first_tokens(self, device: torch.device) -> Tensor:
        """Return the index of each sequence's first token among the packed tokens."""
        return self.cu_seqlens(device)[:-1]

    def to(self, device: torch.device) -> Packing:
        """Return the packing with its tensors on a device, without waiting for the device."""
        index, bounds = (None if part is None else sent(part, device) for part in (self.index, self.bounds))
        return replace(self, index=index, bounds=bounds, cache={})

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
        index = self.index
        if first_only:
            first = self.first_tokens(states.device)
            index = first.long() if index is None else index.index_select(0, first)
        assert index is not None
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
    """Find the tokens of a padded batch; a mask on a device is read once, for which the host waits.

    Args:
        mask: shape (rows, columns), nonzero for tokens and zero for padding, which may be anywhere in a row; None if
            there is no padding. One row stands for all.
        shape: rows and columns.
    """
    rows, columns = shape
    if mask is None:
        return Packing(shape, (columns,) * rows)
    device, mask = mask.device, mask.cpu().bool().expand(rows, columns)
    begins = not columns or bool(mask[:, 0].all())
    counts = mask.sum(1).tolist()
    if counts == [columns] * rows:
        return Packing(shape, tuple(counts), begins=begins)
    order = sorted(range(rows), key=lambda row: counts[row])
    lengths = tuple(counts[row] for row in order)
    by_length = torch.tensor(order, device="cpu")
    row, column = mask[by_length].nonzero(as_tuple=True)
    return Packing(shape, lengths, by_length[row] * columns + column, bounds_of(lengths), begins).to(device)


def bounds_of(lengths: Sequence[int]) -> Tensor:
    """Return the `Packing.bounds` of sequences of some lengths.

    Example:
        >>> bounds_of([3, 5])
        tensor([0, 3, 8], dtype=torch.int32)
    """
    return torch.tensor(list(itertools.accumulate(lengths, initial=0)), dtype=torch.int32, device="cpu")


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Send a tensor of the host to a device; from pinned memory the host need not wait for the copy.

    Apple's GPUs may copy later, when the memory has other content.
    """
    if device.type == "cuda" and not tensor.is_cuda and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=device.type != "mps")


def describe_batch(mask: Tensor) -> dict[str, Any]:
    """Return the packing of a collated batch as a dict, which data loaders pin and move with the batch.

    Args:
        mask: the attention mask, on the CPU.
    """
    packing = make_packing(mask, cast(Any, tuple(mask.shape)))
    return {name: getattr(packing, name) for name in ("shape", "lengths", "index", "bounds", "begins")}


def attach_packing(mask: Tensor, described: dict[str, Any]) -> None:
    """Note on an attention mask what `describe_batch` said of it, so that the encoder need not read it again."""
    cast(Any, mask)._packing = _torch.version_of(mask), described


def attached_packing(mask: Tensor | None, shape: tuple[int, int]) -> Packing | None:
    """Return the packing of a mask that has one and has not changed since."""
    version, described = cast(Any, getattr(mask, "_packing", (None, {})))
    # torch 2.6 turns the tuples of a batch into lists when it pins its memory.
    tuples: dict[str, Any] = {name: tuple(described.get(name, ())) for name in ("shape", "lengths")}
    if mask is None or version != _torch.version_of(mask) or tuples["shape"] != shape:
        return None
    return Packing(**(described | tuples)).to(mask.device)
