"""Linear layers of the lean encoder: base weights and LoRA of several layers that read the same input.

A group is one linear layer, or several layers that read the same input; their outputs are concatenated. Its gradient is
written out, without autograd, so that the caller decides which tensors of the forward pass to keep.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from esm_efficient import _torch
from esm_efficient.encoder.low_rank import Adapter, AdapterStack, convert, head_pairs, slices_of
from esm_efficient.encoder.weights import Linear


class PreparedWeights(NamedTuple):
    """The weights of a group in the dtype of its products.

    Attributes:
        matrices: one matrix of shape (outputs, inputs) per product, or a function that restores it, so that only one
            restored matrix exists at a time.
        biases: the bias of each product.
        merged: whether adapters are added to the matrices.
    """

    matrices: Sequence[Tensor | Callable[[], Tensor]]
    biases: Sequence[Tensor | None]
    merged: bool


class Group:
    """Linear layers that read the same input, for one forward pass and its backward pass.

    Args:
        linears: the layers, in the order of their outputs.
        heads: number of attention heads, if `rotated` is not 0.
        rotated: number of layers, from the first, that compute queries or keys, which rotary positions rotate. Unless
            `apart`, their outputs are interleaved: numbers i and i + width / 2 of a head, which rotate together, become
            neighbours. The products of queries and keys do not depend on this order.
        apart: whether each layer has a product of its own, so that no weight is copied. All must have as many outputs.
        autocast: dtype of matrix products under torch.autocast; None without autocast.
    """

    def __init__(
        self,
        linears: Sequence[Linear],
        *,
        heads: int = 0,
        rotated: int = 0,
        apart: bool = False,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.linears = tuple(linears)
        self.heads = heads
        self.rotated = rotated
        self.apart = apart
        self.autocast = autocast
        self._stacks: list[AdapterStack] | None = None
        self._keeps_stacks = False

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the products and of the outputs."""
        return self.autocast or self.linears[0].dtype

    @property
    def tensors(self) -> list[Tensor]:
        """All parameters, in the order of the gradients of `backward`."""
        tensors: list[Tensor] = []
        for linear in self.linears:
            tensors += [linear.weight] if linear.bias is None else [linear.weight, linear.bias]
            tensors += [tensor for adapter in linear.adapters for tensor in (adapter.a, adapter.b)]
        return tensors

    @property
    def stacks(self) -> list[AdapterStack]:
        """The adapters, converted to the dtype of their products."""
        if self._stacks is None:
            convert_adapters([self])
            self._keeps_stacks = False
        assert self._stacks is not None
        return self._stacks

    def end_forward(self) -> None:
        """Let go of converted adapters that the backward pass converts again, unless `convert_adapters` made them."""
        if not self._keeps_stacks:
            self._stacks = None

    def with_tensors(self, tensors: Sequence[Tensor]) -> Group:
        """Return the same group with other parameters, in the order of `tensors`, and the same converted adapters."""
        source = iter(tensors)
        linears = []
        for linear in self.linears:
            weight = next(source)
            bias = None if linear.bias is None else next(source)
            adapters = tuple(adapter._replace(a=next(source), b=next(source)) for adapter in linear.adapters)
            linears.append(Linear(weight, bias, adapters, linear.packed))
        group = self.with_linears(linears, rotated=self.rotated)
        group._stacks = self._stacks
        return group

    def with_linears(self, linears: Sequence[Linear], *, rotated: int) -> Group:
        """Return a group of other layers with the same options."""
        return Group(linears, heads=self.heads, rotated=rotated, apart=self.apart, autocast=self.autocast)

    def prepare(self, tokens: int) -> PreparedWeights:
        """Convert the weights for a batch of some tokens; see `prepare_all`."""
        return prepare_all([self], tokens)[0]

    def forward(
        self,
        inputs: Tensor,
        *,
        weights: PreparedWeights | None = None,
        out: Tensor | Sequence[Tensor] | None = None,
        start: int = 0,
    ) -> Tensor:
        """Return the outputs of all layers.

        Args:
            inputs: shape (tokens, inputs).
            weights: the prepared weights, if the caller has them.
            out: where to write the outputs; of layers that are apart, one tensor each.
            start: number of the first token in its batch; every chunk of a batch has its own dropout.

        Returns:
            The concatenated outputs, (tokens, outputs); of layers that are apart (layers, tokens, outputs).
        """
        dtype = self.dtype
        inputs = inputs.to(dtype)
        weights = weights or self.prepare(inputs.shape[0])
        if self.apart and out is None:
            out = inputs.new_empty(len(self.linears), inputs.shape[0], self.linears[0].shape[0])
        targets: list[Any] = list(out) if out is not None and self.apart else [out]
        products = [
            torch.mm(inputs, _dense(matrix).t(), out=target)
            if bias is None
            else torch.addmm(bias, inputs, _dense(matrix).t(), out=target)
            for matrix, bias, target in zip(weights.matrices, weights.biases, targets, strict=True)
        ]
        result = products[0] if out is None else out
        parts = self._parts(products)
        for stack in () if weights.merged else self.stacks:
            low = stack.project_down(inputs, start)
            for place in stack.places:
                part, rows, scale = parts[place.layer], low[:, place.ranks], place.adapter.scale
                if stack.dtype == dtype:
                    part.addmm_(rows, place.b.t(), alpha=scale)
                else:
                    part.copy_(part.to(stack.dtype).addmm_(rows, place.b.t(), alpha=scale))
        return cast(Tensor, result)

    def backward(
        self,
        gradients: Sequence[Tensor],
        inputs: Tensor | Callable[[Tensor], Tensor] | None,
        needs: Sequence[bool],
        grads: list[Tensor | None],
        *,
        to_inputs: bool = True,
        weights: PreparedWeights | None = None,
        start: int = 0,
    ) -> Tensor | None:
        """Add the gradients of the parameters to `grads`, and return the gradient of the inputs.

        Args:
            gradients: gradient of the concatenated outputs, (tokens, outputs); of layers that are apart, one each.
            inputs: inputs of the forward pass; may be None if no parameter needs a gradient. Or a function that
                computes them from the gradient of the inputs, which it may overwrite with what this method returns.
            needs: whether each of `tensors` needs a gradient.
            grads: gradients of `tensors`, changed in place; None for those that have no gradient yet.
            to_inputs: whether to return the gradient of the inputs.
            weights: the prepared weights, if the caller has them.
            start: as in `forward`.
        """
        gradients = [gradient.to(self.dtype) for gradient in gradients]
        result = merged = None
        if to_inputs:
            weights = weights or self.prepare(gradients[0].shape[0])
            result, merged = gradients[0] @ _dense(weights.matrices[0]), weights.merged
            for gradient, matrix in zip(gradients[1:], weights.matrices[1:], strict=True):
                result.addmm_(gradient, _dense(matrix))
        parts = self._parts(gradients)
        lows = [self._project_back(stack, parts, needs, result, merged, start) for stack in self.stacks]
        if callable(inputs):
            inputs = inputs(_required(result))
        if inputs is not None:
            inputs = inputs.to(self.dtype)
        index = 0
        for layer, (part, linear) in enumerate(zip(parts, self.linears, strict=True)):
            if needs[index]:
                self._accumulate_rows(grads, index, part.t() @ _required(inputs), layer)
            index += 1
            if linear.bias is not None:
                if needs[index]:
                    self._accumulate_rows(grads, index, part.sum(0, dtype=linear.bias.dtype), layer)
                index += 1
            index += 2 * len(linear.adapters)
        for stack, d_low in zip(self.stacks, lows, strict=True):
            self._adapter_backward(stack, d_low, parts, inputs, needs, grads, start)
        return result

    def _project_back(
        self,
        stack: AdapterStack,
        gradients: Sequence[Tensor],
        needs: Sequence[bool],
        d_inputs: Tensor | None,
        merged: bool | None,
        start: int,
    ) -> Tensor | None:
        """Return the gradient of stacked adapters' inner states, and add their part to the gradient of the inputs.

        None if it is needed neither for the matrices ``a`` nor for the inputs, whose gradient has merged adapters.
        """
        adds = d_inputs is not None and not merged
        if not adds and not any(needs[place.a_index] for place in stack.places):
            return None
        d_low = gradients[0].new_empty(len(gradients[0]), len(stack.a), dtype=stack.dtype)
        for place in stack.places:
            # With beta=0 the product is written and nothing is read.
            part = gradients[place.layer].to(stack.dtype)
            d_low[:, place.ranks].addmm_(part, place.b, beta=0, alpha=place.adapter.scale)
        if adds and d_inputs is not None:
            stack.add_input_gradient(d_low, d_inputs, start)
        return d_low

    def _adapter_backward(
        self,
        stack: AdapterStack,
        d_low: Tensor | None,
        gradients: Sequence[Tensor],
        inputs: Tensor | None,
        needs: Sequence[bool],
        grads: list[Tensor | None],
        start: int,
    ) -> None:
        """Add the gradients of stacked adapters to `grads`; `d_low` is what `_project_back` returned."""
        if any(needs[place.a_index] for place in stack.places):
            product = _required(d_low).t() @ stack.drop_out(_required(inputs), start)
            for place in stack.places:
                accumulate(grads, place.a_index, product[place.ranks])
        del d_low
        if any(needs[place.b_index] for place in stack.places):
            low = stack.project_down(_required(inputs), start)
            for place in stack.places:
                part = gradients[place.layer].to(stack.dtype)
                # Transposed, because a product with few rows is twice as fast as one with few columns.
                product = low.new_empty(place.b.shape[1], place.b.shape[0])
                product.addmm_(low[:, place.ranks].t(), part, beta=0, alpha=place.adapter.scale)
                self._accumulate_rows(grads, place.b_index, product.t(), place.layer)

    def _accumulate_rows(self, grads: list[Tensor | None], index: int, gradient: Tensor, layer: int) -> None:
        """Add to a gradient that has one row per output of a layer."""
        if self._interleaves(layer):
            shape = self.heads, -1, 2, *gradient.shape[1:]
            gradient = gradient.reshape(shape).transpose(1, 2).reshape(gradient.shape)
        accumulate(grads, index, gradient)

    def _parts(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Divide what has all layers' outputs into one tensor per layer."""
        return tensors if len(tensors) == len(self.linears) else [tensors[0][:, part] for part in self._columns()]

    def _columns(self) -> list[slice]:
        """The columns of each layer's outputs."""
        return slices_of(linear.shape[0] for linear in self.linears)

    def _make_stacks(self) -> list[AdapterStack]:
        """Stack the adapters that read the same inputs in the same dtype."""
        members: dict[Any, list[tuple[Adapter, int, int]]] = {}
        index = 0
        for layer, linear in enumerate(self.linears):
            index += 1 if linear.bias is None else 2
            for adapter in linear.adapters:
                dtype = self.autocast or adapter.a.dtype
                key = (dtype, index if adapter.dropout else None)
                members.setdefault(key, []).append((adapter, layer, index))
                index += 2
        interleaved = 0 if self.apart else self.rotated
        return [
            AdapterStack(found, dtype, heads=self.heads, interleaved=interleaved)
            for (dtype, _), found in members.items()
        ]

    def _weight(self, merged: bool) -> Tensor:
        """Concatenate the weights."""
        first = self.linears[0]
        outputs = sum(linear.shape[0] for linear in self.linears)
        weight = torch.empty(outputs, first.shape[1], dtype=self.dtype, device=first.weight.device)
        for layer, (columns, linear) in enumerate(zip(self._columns(), self.linears, strict=True)):
            part = weight[columns]
            if self._interleaves(layer):
                part.view(self.heads, -1, 2, *part.shape[1:]).copy_(head_pairs(linear.matrix(self.dtype), self.heads))
            else:
                part.copy_(linear.matrix(self.dtype))
            for adapter in linear.adapters if merged else ():
                part.addmm_(self._reorder(adapter.b, layer), adapter.a, alpha=adapter.scale)
        return weight

    def _bias(self) -> Tensor | None:
        if all(linear.bias is None for linear in self.linears):
            return None
        parts = [
            torch.zeros(linear.shape[0], dtype=self.dtype, device=linear.weight.device)
            if linear.bias is None
            else self._reorder(linear.bias.to(self.dtype), layer)
            for layer, linear in enumerate(self.linears)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @property
    def _joins(self) -> bool:
        """Whether the layers' weights are copied into one matrix."""
        return (len(self.linears) > 1 or self.rotated > 0) and not self.apart

    def _merges(self, tokens: int) -> bool:
        inputs = self.linears[0].shape[1]
        outputs = sum(linear.shape[0] for linear in self.linears)
        adapters = [adapter for linear in self.linears for adapter in linear.adapters]
        return (
            self.dtype in (torch.float32, torch.float64)
            and all(linear.packed is None for linear in self.linears)
            and tokens * (inputs + outputs) > inputs * outputs
            and all(a.a.dtype == a.b.dtype == self.dtype and not a.dropout for a in adapters)
        )

    def _interleaves(self, layer: int) -> bool:
        return layer < self.rotated and not self.apart

    def _reorder(self, tensor: Tensor, layer: int) -> Tensor:
        """Put the rows of a layer's tensor into the order of the group's outputs."""
        return head_pairs(tensor, self.heads).reshape(tensor.shape) if self._interleaves(layer) else tensor


def prepare_all(groups: Sequence[Group], tokens: int) -> list[PreparedWeights]:
    """Convert the weights of some groups, for a batch of some tokens that is computed at once or in chunks.

    Adapters are added to the weights instead of to the outputs if the weights have fewer elements than inputs and
    outputs together. They are not added to weights in half precision, which would lose small updates, nor under
    dropout, where the results differ.
    """
    linears = [(group.dtype, linear) for group in groups if not group._joins for linear in group.linears]
    tensors = [t for _, linear in linears for t in (None if linear.packed else linear.weight, linear.bias)]
    converted = iter(convert(tensors, [dtype for dtype, _ in linears for _ in range(2)]))
    prepared = []
    for group in groups:
        merged = group._merges(tokens)
        if group._joins:
            prepared.append(PreparedWeights([group._weight(merged)], [group._bias()], merged))
            continue
        matrices: list[Tensor | Callable[[], Tensor]] = []
        biases = []
        for linear in group.linears:
            matrix = next(converted)
            for adapter in linear.adapters if merged else ():
                matrix = torch.addmm(cast(Tensor, matrix), adapter.b, adapter.a, alpha=adapter.scale)
            matrices.append(partial(linear.matrix, group.dtype) if matrix is None else matrix)
            biases.append(next(converted))
        prepared.append(PreparedWeights(matrices, biases, merged))
    return prepared


def convert_adapters(groups: Iterable[Group]) -> None:
    """Convert the adapters of some groups to the dtypes of their products, all by one kernel.

    Their backward passes use the converted tensors too. The next forward pass converts anew, because some optimizers
    change parameters in ways that torch's version counters do not show.
    """
    copies = []
    for group in groups:
        group._stacks, group._keeps_stacks = group._make_stacks(), True
        copies += [pair for stack in group._stacks for pair in stack.copies]
        for stack in group._stacks:
            stack.copies = []
    _torch.copy_all([target for target, _ in copies], [source for _, source in copies])


def accumulate(grads: list[Tensor | None], index: int, gradient: Tensor) -> None:
    """Add to the gradient at an index, in place if there is one already."""
    existing = grads[index]
    grads[index] = gradient if existing is None else existing.add_(gradient)


def _dense(matrix: Tensor | Callable[[], Tensor]) -> Tensor:
    return matrix if isinstance(matrix, Tensor) else matrix()


def _required(inputs: Tensor | None) -> Tensor:
    assert inputs is not None, "the gradient of a parameter needs the inputs of its layer"
    return inputs
