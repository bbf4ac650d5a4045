"""LoRA adapters of a group of linear layers, in the dtype of their products."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from esm_efficient import _torch


class Adapter(NamedTuple):
    """One LoRA adapter of a layer (Hu et al. 2022): it adds ``scale * dropout(input) @ a.T @ b.T``.

    Attributes:
        a: shape (rank, inputs).
        b: shape (outputs, rank).
        scale: ``alpha / rank``, or ``alpha / sqrt(rank)`` in rsLoRA.
        dropout: probability of dropping an input; 0 in evaluation.
        seed: seed of the dropout mask, which the backward pass draws again.
    """

    a: Tensor
    b: Tensor
    scale: float
    dropout: float = 0.0
    seed: int = 0


class AdapterPlace(NamedTuple):
    """An adapter in a group.

    Attributes:
        adapter: the adapter.
        layer: index of its layer.
        ranks: its rows in the stacked matrices ``a``.
        b: its matrix ``b`` in the dtype of the products and in the order of the group's outputs.
        a_index: index of ``adapter.a`` in `Group.tensors`.
        b_index: index of ``adapter.b`` in `Group.tensors`.
    """

    adapter: Adapter
    layer: int
    ranks: slice
    b: Tensor
    a_index: int
    b_index: int


class AdapterStack:
    """Adapters that share one matrix product: their matrices ``a`` are stacked.

    Args:
        members: adapters with the same dropout mask, with their layers and their indices in `Group.tensors`.
        dtype: dtype of their products.
        heads: number of attention heads.
        interleaved: number of layers, from the first, whose outputs the group interleaves.

    Attributes:
        places: the adapters in the group.
        a: their matrices ``a``, one below the other.
        copies: tensors that must be written before use, and what to write.
    """

    def __init__(
        self, members: Sequence[tuple[Adapter, int, int]], dtype: torch.dtype, *, heads: int, interleaved: int
    ) -> None:
        self.dtype = dtype
        self.copies: list[tuple[Tensor, Tensor]] = []
        ranks = slices_of(adapter.a.shape[0] for adapter, _, _ in members)
        matrices = [adapter.a.detach() for adapter, _, _ in members]
        self.a = matrices[0]
        if len(matrices) > 1 or self.a.dtype != dtype:
            self.a = self.a.new_empty(ranks[-1].stop, self.a.shape[1], dtype=dtype)
            self.copies += [(self.a[rows], matrix) for rows, matrix in zip(ranks, matrices, strict=True)]
        self.places = []
        for (adapter, layer, index), rows in zip(members, ranks, strict=True):
            b = source = adapter.b.detach()
            interleaves = layer < interleaved
            if interleaves or b.dtype != dtype:
                b = torch.empty_like(b, dtype=dtype, memory_format=torch.contiguous_format)
                target = b
                if interleaves:
                    target, source = b.view(heads, -1, 2, b.shape[1]), head_pairs(source, heads)
                self.copies.append((target, source))
            self.places.append(AdapterPlace(adapter, layer, rows, b, index, index + 1))
        self._dropout = members[0][0] if members[0][0].dropout else None

    def drop_out(self, inputs: Tensor, start: int) -> Tensor:
        """Return the inputs as the adapters read them: in their dtype and after dropout."""
        inputs = inputs.to(self.dtype)
        if self._dropout is None:
            return inputs
        adapter = self._dropout._replace(seed=self._dropout.seed + start)
        return inputs * dropout_mask(inputs.shape, adapter, inputs.device, inputs.dtype)

    def project_down(self, inputs: Tensor, start: int) -> Tensor:
        """Return (tokens, sum of the ranks) for inputs of (tokens, inputs)."""
        return self.drop_out(inputs, start) @ self.a.t()

    def add_input_gradient(self, d_low: Tensor, result: Tensor, start: int) -> None:
        """Add the gradient of the inputs to `result`. Dropout is linear, so the same mask applies to it."""
        if self._dropout is None and self.dtype == result.dtype:
            result.addmm_(d_low, self.a)
        else:
            result += self.drop_out(d_low @ self.a, start).to(result.dtype)


def convert(tensors: Sequence[Tensor | None], dtypes: Sequence[torch.dtype]) -> list[Tensor | None]:
    """Convert tensors to dtypes, all by one kernel; a tensor that has its dtype is not copied."""
    result = list(tensors)
    pairs = zip(tensors, dtypes, strict=True)
    changed = [index for index, (tensor, dtype) in enumerate(pairs) if tensor is not None and tensor.dtype != dtype]
    sources = [cast(Tensor, tensors[index]).detach() for index in changed]
    targets = [
        torch.empty(source.shape, dtype=dtypes[index], device=source.device)
        for index, source in zip(changed, sources, strict=True)
    ]
    _torch.copy_all(targets, sources)
    for index, target in zip(changed, targets, strict=True):
        result[index] = target
    return result


def slices_of(sizes: Iterable[int]) -> list[slice]:
    """Return the slices of consecutive parts of some sizes."""
    return [slice(*pair) for pair in itertools.pairwise(itertools.accumulate(sizes, initial=0))]


def dropout_mask(shape: Sequence[int], adapter: Adapter, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """Return an adapter's dropout mask: zero for dropped inputs, ``1 / (1 - p)`` for the others."""
    generator = torch.Generator(device=device).manual_seed(adapter.seed)
    keep = 1.0 - adapter.dropout
    mask = torch.empty(tuple(shape), device=device, dtype=dtype).bernoulli_(keep, generator=generator)
    return mask.div_(keep) if keep else mask


def head_pairs(tensor: Tensor, heads: int) -> Tensor:
    """View (outputs, ...) as (heads, half, 2, ...), so that the two numbers that rotate together are neighbours."""
    return tensor.view(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2)
