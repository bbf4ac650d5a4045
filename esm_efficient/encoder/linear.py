"""Linear layers of the lean encoder: base weights and LoRA of several layers in one matrix product.

A group is one linear layer, or several layers that read the same input; their outputs are concatenated. Its gradient is
written out, without autograd, so that the caller decides which tensors of the forward pass to keep.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Adapter(NamedTuple):
    """One LoRA adapter of a layer (Hu et al. 2021): it adds ``scale * dropout(input) @ a.T @ b.T``.

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


class Linear(NamedTuple):
    """A linear layer: weight of shape (outputs, inputs), bias of shape (outputs,), adapters."""

    weight: Tensor
    bias: Tensor | None = None
    adapters: tuple[Adapter, ...] = ()


class PreparedWeights(NamedTuple):
    """The weights of a group as one matrix of shape (outputs, inputs), its bias, and whether adapters are merged."""

    weight: Tensor
    bias: Tensor | None
    merged: bool


class Group:
    """Linear layers that read the same input.

    Args:
        linears: the layers, in the order of their outputs.
        heads: number of attention heads, if `rotated` is not 0.
        rotated: number of layers, from the first, that compute queries or keys, which rotary positions rotate. Their
            outputs are interleaved: numbers i and i + width / 2 of a head, which rotate together, become neighbours.
            The products of queries and keys do not depend on this order.
        autocast: dtype of matrix products under torch.autocast; None without autocast.
    """

    def __init__(
        self, linears: Sequence[Linear], *, heads: int = 0, rotated: int = 0, autocast: torch.dtype | None = None
    ) -> None:
        self.linears = tuple(linears)
        self.heads = heads
        self.rotated = rotated
        self.autocast = autocast

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the products and of the outputs."""
        return self.autocast or self.linears[0].weight.dtype

    @property
    def tensors(self) -> list[Tensor]:
        """All parameters, in the order of the gradients of `backward`."""
        tensors: list[Tensor] = []
        for linear in self.linears:
            tensors += [linear.weight] if linear.bias is None else [linear.weight, linear.bias]
            tensors += [tensor for adapter in linear.adapters for tensor in (adapter.a, adapter.b)]
        return tensors

    def with_tensors(self, tensors: Sequence[Tensor]) -> Group:
        """Return the same group with other parameters, in the order of `tensors`."""
        source = iter(tensors)
        linears = []
        for linear in self.linears:
            weight = next(source)
            bias = None if linear.bias is None else next(source)
            adapters = tuple(adapter._replace(a=next(source), b=next(source)) for adapter in linear.adapters)
            linears.append(Linear(weight, bias, adapters))
        return self.with_linears(linears, rotated=self.rotated)

    def for_chunk(self, start: int) -> Group:
        """Return the group for the chunk that begins at token `start`; every chunk has its own dropout seeds."""
        if not start or not any(adapter.dropout for linear in self.linears for adapter in linear.adapters):
            return self
        shifted = [
            linear._replace(adapters=tuple(a._replace(seed=a.seed + start) for a in linear.adapters))
            for linear in self.linears
        ]
        return self.with_linears(shifted, rotated=self.rotated)

    def with_linears(self, linears: Sequence[Linear], *, rotated: int) -> Group:
        """Return a group of other layers with the same options."""
        return Group(linears, heads=self.heads, rotated=rotated, autocast=self.autocast)

    def prepare(self, tokens: int) -> PreparedWeights:
        """Make the weights one matrix, for a batch of some tokens that is computed at once or in chunks.

        Adapters are added to the weights instead of to the outputs if the weights have fewer elements than inputs and
        outputs together. They are not added to weights in half precision, which would lose small updates, nor under
        dropout, where the results differ.
        """
        inputs = self.linears[0].weight.shape[1]
        outputs = sum(linear.weight.shape[0] for linear in self.linears)
        adapters = [adapter for linear in self.linears for adapter in linear.adapters]
        merged = (
            self.dtype in (torch.float32, torch.float64)
            and tokens * (inputs + outputs) > inputs * outputs
            and all(a.a.dtype == a.b.dtype == self.dtype and not a.dropout for a in adapters)
        )
        return PreparedWeights(self._weight(merged), self._bias(), merged)

    def forward(self, inputs: Tensor, *, weights: PreparedWeights | None = None, out: Tensor | None = None) -> Tensor:
        """Return the concatenated outputs of all layers, (tokens, outputs), for inputs of (tokens, inputs)."""
        dtype = self.dtype
        inputs = inputs.to(dtype)
        weights = weights or self.prepare(inputs.shape[0])
        if weights.bias is None:
            result = torch.mm(inputs, weights.weight.t(), out=out)
        else:
            result = torch.addmm(weights.bias, inputs, weights.weight.t(), out=out)
        if not weights.merged:
            for stack in self._adapter_stacks():
                low = stack.project_down(inputs)
                for place, ranks in zip(stack.places, stack.ranks, strict=True):
                    part, b = result[:, place.columns], self._reorder(place.adapter.b.to(stack.dtype), place.layer)
                    scale = place.adapter.scale
                    if stack.dtype == dtype:
                        part.addmm_(low[:, ranks], b.t(), alpha=scale)
                    else:
                        part.copy_(part.to(stack.dtype).addmm_(low[:, ranks], b.t(), alpha=scale))
        return result

    def backward(
        self,
        gradient: Tensor,
        inputs: Tensor | None,
        needs: Sequence[bool],
        grads: list[Tensor | None],
        *,
        to_inputs: bool = True,
        weights: PreparedWeights | None = None,
    ) -> Tensor | None:
        """Add the gradients of the parameters to `grads`, and return the gradient of the inputs.

        Args:
            gradient: gradient of the outputs, (tokens, outputs).
            inputs: inputs of the forward pass; may be None if no parameter needs a gradient.
            needs: whether each of `tensors` needs a gradient.
            grads: gradients of `tensors`, changed in place; None for those that have no gradient yet.
            to_inputs: whether to return the gradient of the inputs.
            weights: the prepared weights, if the caller has them.
        """
        gradient = gradient.to(self.dtype)
        result = merged = None
        if to_inputs:
            weights = weights or self.prepare(gradient.shape[0])
            result, merged = gradient @ weights.weight, weights.merged
        if inputs is not None:
            inputs = inputs.to(self.dtype)
        index = 0
        for layer, (columns, linear) in enumerate(zip(self._columns(), self.linears, strict=True)):
            part = gradient[:, columns]
            if needs[index]:
                self._accumulate_rows(grads, index, part.t() @ _required(inputs), layer)
            index += 1
            if linear.bias is not None:
                if needs[index]:
                    self._accumulate_rows(grads, index, part.sum(0), layer)
                index += 1
            index += 2 * len(linear.adapters)
        for stack in self._adapter_stacks():
            self._adapter_backward(stack, gradient, inputs, needs, grads, None if merged else result)
        return result

    def _adapter_backward(
        self,
        stack: _AdapterStack,
        gradient: Tensor,
        inputs: Tensor | None,
        needs: Sequence[bool],
        grads: list[Tensor | None],
        d_inputs: Tensor | None,
    ) -> None:
        """Add the gradients of stacked adapters to `grads`, and that of their inputs to `d_inputs` if it is given."""
        needs_a, needs_b = any(needs[p.a] for p in stack.places), any(needs[p.b] for p in stack.places)
        if needs_a or d_inputs is not None:
            parts = []
            for place in stack.places:
                b = self._reorder(place.adapter.b.to(stack.dtype), place.layer)
                parts.append((gradient[:, place.columns].to(stack.dtype) @ b).mul_(place.adapter.scale))
            d_low = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
            if needs_a:
                product = d_low.t() @ stack.drop_out(_required(inputs))
                for place, ranks in zip(stack.places, stack.ranks, strict=True):
                    accumulate(grads, place.a, product[ranks])
            if d_inputs is not None:
                stack.add_input_gradient(d_low, d_inputs)
            del parts, d_low
        if needs_b:
            low = stack.project_down(_required(inputs))
            for place, ranks in zip(stack.places, stack.ranks, strict=True):
                # Transposed, because a product with few rows is twice as fast as one with few columns.
                product = low[:, ranks].t() @ gradient[:, place.columns].to(stack.dtype)
                self._accumulate_rows(grads, place.b, product.t().mul_(place.adapter.scale), place.layer)

    def _accumulate_rows(self, grads: list[Tensor | None], index: int, gradient: Tensor, layer: int) -> None:
        """Add to a gradient that has one row per output of a layer."""
        accumulate(grads, index, self._reorder(gradient, layer, back=True))

    def _columns(self) -> list[slice]:
        """The columns of each layer's outputs."""
        columns, start = [], 0
        for linear in self.linears:
            columns.append(slice(start, start + linear.weight.shape[0]))
            start += linear.weight.shape[0]
        return columns

    def _adapter_stacks(self) -> list[_AdapterStack]:
        """The adapters, stacked if they read the same inputs in the same dtype."""
        places: dict[Any, list[_AdapterPlace]] = {}
        index = 0
        for layer, (columns, linear) in enumerate(zip(self._columns(), self.linears, strict=True)):
            index += 1 if linear.bias is None else 2
            for adapter in linear.adapters:
                dtype = self.autocast or adapter.a.dtype
                key = (dtype, index if adapter.dropout else None)
                places.setdefault(key, []).append(_AdapterPlace(adapter, layer, columns, a=index, b=index + 1))
                index += 2
        return [_AdapterStack(members, dtype) for (dtype, _), members in places.items()]

    def _weight(self, merged: bool) -> Tensor:
        first = self.linears[0]
        if len(self.linears) == 1 and not self.rotated:
            weight = first.weight.to(self.dtype)
            for adapter in first.adapters if merged else ():
                weight = torch.addmm(weight, adapter.b, adapter.a, alpha=adapter.scale)
            return weight
        outputs = sum(linear.weight.shape[0] for linear in self.linears)
        weight = first.weight.new_empty(outputs, first.weight.shape[1], dtype=self.dtype)
        for layer, (columns, linear) in enumerate(zip(self._columns(), self.linears, strict=True)):
            part = weight[columns]
            if layer < self.rotated:
                part.view(self.heads, -1, 2, *part.shape[1:]).copy_(_pairs(linear.weight, self.heads))
            else:
                part.copy_(linear.weight)
            for adapter in linear.adapters if merged else ():
                part.addmm_(self._reorder(adapter.b, layer), adapter.a, alpha=adapter.scale)
        return weight

    def _bias(self) -> Tensor | None:
        if all(linear.bias is None for linear in self.linears):
            return None
        parts = [
            linear.weight.new_zeros(linear.weight.shape[0], dtype=self.dtype)
            if linear.bias is None
            else self._reorder(linear.bias.to(self.dtype), layer)
            for layer, linear in enumerate(self.linears)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _reorder(self, tensor: Tensor, layer: int, *, back: bool = False) -> Tensor:
        """Put the rows of a layer's tensor into the order of the group's outputs, or back."""
        if layer >= self.rotated:
            return tensor
        if back:
            return tensor.reshape(self.heads, -1, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
        return _pairs(tensor, self.heads).reshape(tensor.shape)


class _AdapterPlace(NamedTuple):
    """An adapter in a group.

    Attributes:
        adapter: the adapter.
        layer: index of its layer.
        columns: columns of its layer's outputs.
        a: index of ``adapter.a`` in `Group.tensors`.
        b: index of ``adapter.b`` in `Group.tensors`.
    """

    adapter: Adapter
    layer: int
    columns: slice
    a: int
    b: int


class _AdapterStack:
    """Adapters that share one matrix product: their matrices ``a`` are stacked.

    Args:
        places: the adapters, all with the same dropout mask.
        dtype: dtype of their products.

    Attributes:
        ranks: the rows of `a` of each adapter.
    """

    def __init__(self, places: list[_AdapterPlace], dtype: torch.dtype) -> None:
        self.places = places
        self.dtype = dtype
        matrices = [place.adapter.a.to(dtype) for place in places]
        self.a = matrices[0] if len(matrices) == 1 else torch.cat(matrices)
        bounds = [0, *itertools.accumulate(matrix.shape[0] for matrix in matrices)]
        self.ranks = [slice(*pair) for pair in itertools.pairwise(bounds)]
        self._dropout = places[0].adapter if places[0].adapter.dropout else None

    def drop_out(self, inputs: Tensor) -> Tensor:
        """Return the inputs as the adapters read them: in their dtype and after dropout."""
        inputs = inputs.to(self.dtype)
        if self._dropout is None:
            return inputs
        return inputs * dropout_mask(inputs.shape, self._dropout, inputs.device, inputs.dtype)

    def project_down(self, inputs: Tensor) -> Tensor:
        """Return (tokens, sum of the ranks) for inputs of (tokens, inputs)."""
        return self.drop_out(inputs) @ self.a.t()

    def add_input_gradient(self, d_low: Tensor, result: Tensor) -> None:
        """Add the gradient of the inputs to `result`. Dropout is linear, so the same mask applies to it."""
        if self._dropout is None and self.dtype == result.dtype:
            result.addmm_(d_low, self.a)
        else:
            result += self.drop_out(d_low @ self.a).to(result.dtype)


def accumulate(grads: list[Tensor | None], index: int, gradient: Tensor) -> None:
    """Add to the gradient at an index, in place if there is one already."""
    existing = grads[index]
    grads[index] = gradient if existing is None else existing.add_(gradient)


def dropout_mask(shape: Sequence[int], adapter: Adapter, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """Return an adapter's dropout mask: zero for dropped inputs, ``1 / (1 - p)`` for the others."""
    generator = torch.Generator(device=device).manual_seed(adapter.seed)
    keep = 1.0 - adapter.dropout
    mask = torch.empty(tuple(shape), device=device, dtype=dtype).bernoulli_(keep, generator=generator)
    return mask.div_(keep) if keep else mask


def _required(inputs: Tensor | None) -> Tensor:
    assert inputs is not None, "the gradient of a parameter needs the inputs of its layer"
    return inputs


def _pairs(tensor: Tensor, heads: int) -> Tensor:
    """View (outputs, ...) as (heads, half, 2, ...), so that the two numbers that rotate together are neighbours."""
    return tensor.view(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2)
