"""Linear layers as the lean encoder computes them: base weights and LoRA of several layers in one matrix product.

A group is one linear layer, or several that read the same input and whose outputs lie side by side. Its gradient is
written out, without autograd, so that a caller decides what is kept from the forward pass.
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
        scale: ``alpha / rank``, or over its root in rsLoRA.
        dropout: probability with which an input is dropped; 0 in evaluation.
        seed: what the dropped inputs are drawn from, again in the backward pass.
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


class Ready(NamedTuple):
    """The weights of a group as one matrix of shape (outputs, inputs), its bias, and whether adapters are in it."""

    weight: Tensor
    bias: Tensor | None
    merged: bool


class Group:
    """Linear layers that read the same input.

    Args:
        linears: the layers, in the order of their outputs.
        heads: attention heads, if `rotated` is not 0.
        rotated: how many of the layers, from the first, give queries or keys that positions rotate. The outputs of
            these are put in another order: numbers i and i + width / 2 of a head, which rotate together, lie side by
            side. Products of queries and keys are the same in either order.
        autocast: what torch.autocast computes matrix products in, None outside of it.
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
        """What the layers compute and return."""
        return self.autocast or self.linears[0].weight.dtype

    @property
    def tensors(self) -> list[Tensor]:
        """Every parameter, in the order in which `backward` returns gradients."""
        tensors: list[Tensor] = []
        for linear in self.linears:
            tensors += [linear.weight] if linear.bias is None else [linear.weight, linear.bias]
            tensors += [tensor for adapter in linear.adapters for tensor in (adapter.a, adapter.b)]
        return tensors

    def with_tensors(self, tensors: Sequence[Tensor]) -> Group:
        """The same group with other tensors in the place of its own."""
        source = iter(tensors)
        linears = []
        for linear in self.linears:
            weight = next(source)
            bias = None if linear.bias is None else next(source)
            adapters = tuple(adapter._replace(a=next(source), b=next(source)) for adapter in linear.adapters)
            linears.append(Linear(weight, bias, adapters))
        return Group(linears, heads=self.heads, rotated=self.rotated, autocast=self.autocast)

    def at(self, start: int) -> Group:
        """The group for a piece of a batch that begins at some token: its dropout draws other numbers there."""
        if not start or not any(adapter.dropout for linear in self.linears for adapter in linear.adapters):
            return self
        shifted = [
            linear._replace(adapters=tuple(a._replace(seed=a.seed + start) for a in linear.adapters))
            for linear in self.linears
        ]
        return self.take(shifted, rotated=self.rotated)

    def take(self, linears: Sequence[Linear], *, rotated: int) -> Group:
        """A group of some of the layers."""
        return Group(linears, heads=self.heads, rotated=rotated, autocast=self.autocast)

    def ready(self, tokens: int) -> Ready:
        """The weights as one matrix, for a batch of some tokens that may then be computed in pieces.

        Adapters are added to the weights instead of to the outputs where the weights are fewer numbers than the inputs
        and outputs. Weights in half precision would lose what an adapter adds, and with dropout the two differ.
        """
        inputs = self.linears[0].weight.shape[1]
        outputs = sum(linear.weight.shape[0] for linear in self.linears)
        adapters = [adapter for linear in self.linears for adapter in linear.adapters]
        merged = (
            self.dtype in (torch.float32, torch.float64)
            and tokens * (inputs + outputs) > inputs * outputs
            and all(a.a.dtype == a.b.dtype == self.dtype and not a.dropout for a in adapters)
        )
        return Ready(self._weight(merged), self._bias(), merged)

    def forward(self, inputs: Tensor, *, ready: Ready | None = None, out: Tensor | None = None) -> Tensor:
        """(tokens, inputs) to (tokens, outputs of all layers side by side)."""
        dtype = self.dtype
        inputs = inputs.to(dtype)
        ready = ready or self.ready(inputs.shape[0])
        if ready.bias is None:
            result = torch.mm(inputs, ready.weight.t(), out=out)
        else:
            result = torch.addmm(ready.bias, inputs, ready.weight.t(), out=out)
        if not ready.merged:
            for block in self._blocks():
                low = block.low(inputs)
                for place, columns in zip(block.places, block.columns, strict=True):
                    part, b = result[:, place.span], self._rows(place.adapter.b.to(block.dtype), place.number)
                    scale = place.adapter.scale
                    if block.dtype == dtype:
                        part.addmm_(low[:, columns], b.t(), alpha=scale)
                    else:
                        part.copy_(part.to(block.dtype).addmm_(low[:, columns], b.t(), alpha=scale))
        return result

    def backward(
        self,
        gradient: Tensor,
        inputs: Tensor | None,
        needs: Sequence[bool],
        grads: list[Tensor | None],
        *,
        to_inputs: bool = True,
        ready: Ready | None = None,
    ) -> Tensor | None:
        """Gradients of the parameters, added to `grads`, and of the inputs.

        Args:
            gradient: of the outputs, (tokens, outputs).
            inputs: of the forward pass; not needed if no parameter needs a gradient.
            needs: which of `tensors` need a gradient.
            grads: of `tensors`; None where there is none yet. What is there is added to, in place.
            to_inputs: whether to return the gradient of the inputs.
            ready: the weights, if the caller has them.
        """
        dtype = self.dtype
        gradient = gradient.to(dtype)
        result = merged = None
        if to_inputs:
            ready = ready or self.ready(gradient.shape[0])
            result, merged = gradient @ ready.weight, ready.merged
        if inputs is not None:
            inputs = inputs.to(dtype)
        index = 0
        for number, (span, linear) in enumerate(zip(self._spans(), self.linears, strict=True)):
            part = gradient[:, span]
            if needs[index]:
                self._add_rows(grads, index, part.t() @ _given(inputs), number)
            index += 1
            if linear.bias is not None:
                if needs[index]:
                    self._add_rows(grads, index, part.sum(0), number)
                index += 1
            index += 2 * len(linear.adapters)
        for block in self._blocks():
            needs_a, needs_b = (any(needs[place.first + offset] for place in block.places) for offset in (0, 1))
            through = result is not None and not merged
            if needs_a or through:
                parts = []
                for place in block.places:
                    b = self._rows(place.adapter.b.to(block.dtype), place.number)
                    parts.append((gradient[:, place.span].to(block.dtype) @ b).mul_(place.adapter.scale))
                low = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
                if needs_a:
                    product = low.t() @ block.dropped(_given(inputs))
                    for place, rows in zip(block.places, block.columns, strict=True):
                        _accumulate(grads, place.first, product[rows])
                if through and result is not None:
                    block.add_through(low, result)
            if needs_b:
                low = block.low(_given(inputs))
                for place, columns in zip(block.places, block.columns, strict=True):
                    # Transposed, because a product with few rows is twice as fast as one with few columns.
                    product = low[:, columns].t() @ gradient[:, place.span].to(block.dtype)
                    self._add_rows(grads, place.first + 1, product.t().mul_(place.adapter.scale), place.number)
        return result

    def _add_rows(self, grads: list[Tensor | None], index: int, gradient: Tensor, number: int) -> None:
        """Add to a gradient whose rows are in the order of the outputs."""
        _accumulate(grads, index, self._rows(gradient, number, back=True))

    def _spans(self) -> list[slice]:
        spans, start = [], 0
        for linear in self.linears:
            spans.append(slice(start, start + linear.weight.shape[0]))
            start += linear.weight.shape[0]
        return spans

    def _blocks(self) -> list[_Block]:
        """The adapters, those together that see the same inputs in the same type."""
        together: dict[Any, list[_Place]] = {}
        index = 0
        for number, (span, linear) in enumerate(zip(self._spans(), self.linears, strict=True)):
            index += 1 if linear.bias is None else 2
            for adapter in linear.adapters:
                dtype = self.autocast or adapter.a.dtype
                key = (dtype, index if adapter.dropout else None)
                together.setdefault(key, []).append(_Place(span, number, index, adapter))
                index += 2
        return [_Block(places, dtype) for (dtype, _), places in together.items()]

    def _weight(self, merged: bool) -> Tensor:
        first = self.linears[0]
        if len(self.linears) == 1 and not self.rotated:
            weight = first.weight.to(self.dtype)
            for adapter in first.adapters if merged else ():
                weight = torch.addmm(weight, adapter.b, adapter.a, alpha=adapter.scale)
            return weight
        outputs = sum(linear.weight.shape[0] for linear in self.linears)
        weight = first.weight.new_empty(outputs, first.weight.shape[1], dtype=self.dtype)
        for number, (span, linear) in enumerate(zip(self._spans(), self.linears, strict=True)):
            part = weight[span]
            if number < self.rotated:
                _interleaved_view(part, self.heads).copy_(_halves(linear.weight, self.heads))
            else:
                part.copy_(linear.weight)
            for adapter in linear.adapters if merged else ():
                part.addmm_(self._rows(adapter.b, number), adapter.a, alpha=adapter.scale)
        return weight

    def _bias(self) -> Tensor | None:
        if all(linear.bias is None for linear in self.linears):
            return None
        parts = [
            linear.weight.new_zeros(linear.weight.shape[0], dtype=self.dtype)
            if linear.bias is None
            else self._rows(linear.bias.to(self.dtype), number)
            for number, linear in enumerate(self.linears)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _rows(self, tensor: Tensor, number: int, *, back: bool = False) -> Tensor:
        """The rows of a layer's tensor in the order of its outputs, or back."""
        if number >= self.rotated:
            return tensor
        return _deinterleaved(tensor, self.heads) if back else _interleaved(tensor, self.heads)


def _given(inputs: Tensor | None) -> Tensor:
    assert inputs is not None, "the gradient of a parameter needs the inputs of its layer"
    return inputs


def _halves(tensor: Tensor, heads: int) -> Tensor:
    """(outputs, ...) as (heads, half, 2, ...): the two numbers of a head that rotate together, side by side."""
    return tensor.view(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2)


def _interleaved_view(tensor: Tensor, heads: int) -> Tensor:
    return tensor.view(heads, -1, 2, *tensor.shape[1:])


def _interleaved(tensor: Tensor, heads: int) -> Tensor:
    return _halves(tensor, heads).reshape(tensor.shape)


def _deinterleaved(tensor: Tensor, heads: int) -> Tensor:
    return tensor.reshape(heads, -1, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


class _Place(NamedTuple):
    """Where an adapter stands: columns of the outputs, number of its layer, index of its first tensor."""

    span: slice
    number: int
    first: int
    adapter: Adapter


class _Block:
    """Adapters whose small matrices are stacked, so that one product serves all of them."""

    def __init__(self, places: list[_Place], dtype: torch.dtype) -> None:
        self.places = places
        self.dtype = dtype
        stacked = [place.adapter.a.to(dtype) for place in places]
        self.a = stacked[0] if len(stacked) == 1 else torch.cat(stacked)
        ends = [0]
        for part in stacked:
            ends.append(ends[-1] + part.shape[0])
        self.columns = [slice(*pair) for pair in itertools.pairwise(ends)]
        self._drops = places[0].adapter if places[0].adapter.dropout else None

    def dropped(self, inputs: Tensor) -> Tensor:
        """What the adapters see of the inputs."""
        inputs = inputs.to(self.dtype)
        if self._drops is None:
            return inputs
        return inputs * dropout_mask(inputs.shape, self._drops, inputs.device, inputs.dtype)

    def low(self, inputs: Tensor) -> Tensor:
        """(tokens, inputs) to (tokens, ranks side by side)."""
        return self.dropped(inputs) @ self.a.t()

    def add_through(self, low: Tensor, result: Tensor) -> None:
        """Add the gradient that reaches the inputs by way of the adapters. Dropout is linear, so it drops the same."""
        if self._drops is None and self.dtype == result.dtype:
            result.addmm_(low, self.a)
        else:
            result += self.dropped(low @ self.a).to(result.dtype)


def _accumulate(grads: list[Tensor | None], index: int, gradient: Tensor) -> None:
    held = grads[index]
    grads[index] = gradient if held is None else held.add_(gradient)


def dropout_mask(shape: Sequence[int], adapter: Adapter, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """What an adapter multiplies its inputs with: zero where they are dropped, ``1 / (1 - p)`` elsewhere."""
    generator = torch.Generator(device=device).manual_seed(adapter.seed)
    keep = 1.0 - adapter.dropout
    mask = torch.empty(tuple(shape), device=device, dtype=dtype).bernoulli_(keep, generator=generator)
    return mask.div_(keep) if keep else mask
