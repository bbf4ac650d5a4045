"""Autograd Functions of the encoder's layers; they save only tensors that are expensive to recompute.

Each Function saves its input and its parameters, and recomputes layer norms and GELU outputs in the backward pass.
A layer keeps ten times the width per token: its input, query, key, value, attention output, the sum after attention,
and the pre-activation of the MLP. The Functions cannot be differentiated twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial, wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from esm_efficient.encoder.elementwise import EAGER, Elementwise, rotate_neighbours
from esm_efficient.encoder.linear import Group, PreparedWeights, accumulate, prepare_all
from esm_efficient.encoder.low_rank import convert
from esm_efficient.encoder.plan import autocast_as, plan_for
from esm_efficient.errors import ConfigurationError

_NORM_ARGUMENTS = 3
"""`NormLinears.forward` and `NormMLP.forward` begin with the states, and the layer norm's weight and bias."""


class Norm(NamedTuple):
    """The tensors of a ``torch.nn.LayerNorm`` over the last axis."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float

    @classmethod
    def of(cls, module: Any) -> Norm:
        """Read them from a module."""
        return cls(module.weight, module.bias, module.eps)


def norm_linears(
    x: Tensor, norm: Norm, group: Group, *, rotation: Tensor | None = None, elementwise: Elementwise = EAGER
) -> tuple[Tensor, Tensor | tuple[Tensor, ...]]:
    """Compute a layer norm, several linear layers, and rotary positions.

    Args:
        x: shape (tokens, width).
        norm: the layer norm.
        group: the linear layers; the outputs of the first `Group.rotated` are rotated.
        rotation: complex of shape (tokens, 1, head width / 2).
        elementwise: the elementwise functions, fused or not.

    Returns:
        `x`, for the sum after attention: its gradient is then added where that of the layer norm is computed. And the
        outputs, (tokens, layers, heads, head width); of layers that are apart, each (tokens, heads, head width).
    """
    options = norm.eps, rotation, True, elementwise, group
    same, *outputs = NormLinears.apply(x, norm.weight, norm.bias, *options, *group.tensors)
    return same, tuple(outputs) if group.apart else outputs[0]


def linear_residual(inputs: Tensor, residual: Tensor, group: Group) -> Tensor:
    """Return ``residual + linear(inputs)``; both inputs have shape (tokens, width)."""
    return LinearResidual.apply(inputs, residual, group, *group.tensors)


def mlp_residual(
    x: Tensor,
    norm: Norm,
    up: Group,
    down: Group,
    *,
    keep: bool = True,
    without_output: bool = False,
    elementwise: Elementwise = EAGER,
) -> Tensor:
    """Return ``x + down(gelu(up(norm(x))))`` of shape (tokens, width).

    Args:
        x: shape (tokens, width).
        norm: the layer norm.
        up: the first linear layer, which widens.
        down: the second linear layer, which narrows.
        keep: whether to save the pre-activation for the backward pass instead of recomputing it there.
        without_output: return meaningless values, for a caller that needs only the gradients.
        elementwise: the elementwise functions, fused or not.
    """
    tensors = up.tensors + down.tensors
    needs_gradient = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, norm.weight, norm.bias, *tensors)
    )
    mode = ("kept" if keep else "recomputed") if needs_gradient else "unneeded"
    options = norm.eps, mode, without_output, elementwise, up, down
    return NormMLP.apply(x, norm.weight, norm.bias, *options, *tensors)


def _outside_autocast(backward: Any) -> Any:
    """Run a backward pass without autocast, also if the user calls it inside."""

    @wraps(backward)
    def run(ctx: Any, *gradients: Tensor | None) -> Any:
        known = next((gradient for gradient in gradients if gradient is not None), None)
        with nullcontext() if known is None else _without_autocast(known):
            return backward(ctx, *gradients)

    return run


class NormLinears(Function):
    """The Function of `norm_linears`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        rotation: Tensor | None,
        owns_gradient: bool,
        elementwise: Elementwise,
        group: Group,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        """Return `x` and the outputs; with `owns_gradient` the backward pass may overwrite their gradient."""
        ctx.save_for_backward(x, weight, bias, rotation, *tensors)
        ctx.eps, ctx.owns_gradient, ctx.elementwise, ctx.group = eps, owns_gradient, elementwise, group
        ctx.chunks = plan_for(x.device.type).chunks(x.shape[0], x.shape[1] * x.dtype.itemsize)
        ctx.set_materialize_grads(False)  # if nothing reads `x` itself, its gradient is None and not zeros
        if not ctx.needs_input_grad[0]:
            ctx.mark_non_differentiable(x)
        with _without_autocast(x):
            normed = elementwise.norm(x, weight, bias, eps, group.dtype)[0]
            if group.apart:
                # Two tensors, because the rotated one may be replaced by another.
                counts = group.rotated, len(group.linears) - group.rotated
                parts = [normed.new_empty(n, x.shape[0], group.linears[0].shape[0]) for n in counts]
                group.forward(normed, out=[out for part in parts for out in part])
                group.end_forward()
                turned, rest = (part.unflatten(-1, (group.heads, -1)) for part in parts)
                if rotation is not None and group.rotated:
                    (turned,) = elementwise.rotate([turned], _real(rotation), False)
                ctx.shape = turned.shape[1:]
                return x, *turned.unbind(), *rest.unbind()
            states = group.forward(normed)
            group.end_forward()
            states = states.view(x.shape[0], len(group.linears), group.heads, -1)
            ctx.shape = states.shape
            return x, rotate_neighbours(states, rotation, group.rotated)

    @staticmethod
    @_outside_autocast
    def backward(ctx: Any, d_same: Tensor | None, *gradients: Tensor | None) -> tuple[Any, ...]:
        """Recompute the layer norm and return the gradients; `d_same` reached `x` around the layer norm."""
        refuse_double_backward()
        x, weight, bias, rotation, *tensors = ctx.saved_tensors
        group, elementwise = ctx.group.with_tensors(tensors), ctx.elementwise
        needs_norm, needs_tensors = _split_needs(ctx, tensors)
        turned = [x.new_zeros(ctx.shape, dtype=group.dtype) if g is None else g for g in gradients]
        if rotation is not None:
            rotated = slice(group.rotated if group.apart else 1)
            own = [_own(gradient, ctx.owns_gradient) for gradient in turned[rotated]]
            if not group.apart:
                rotate_neighbours(own[0], rotation.conj().resolve_conj(), group.rotated)
            turned[rotated] = elementwise.rotate(own, _real(rotation), True) if group.apart else own
        normed, mean, deviation = elementwise.norm(x, weight, bias, ctx.eps, group.dtype)
        grads: list[Tensor | None] = [None] * len(tensors)
        flat = [gradient.reshape(x.shape[0], -1) for gradient in turned]
        d_normed = group.backward(flat, normed, needs_tensors, grads, to_inputs=any(needs_norm))
        del normed, turned, flat
        dx = torch.empty_like(x) if needs_norm[0] else None
        grads_norm: list[Tensor | None] = [None, None]
        for rows in ctx.chunks if d_normed is not None else ():
            same, out = (None if whole is None else whole[rows] for whole in (d_same, dx))
            arguments = d_normed[rows], x[rows], mean[rows], deviation[rows], weight, bias, same, out
            _accumulate_norm(grads_norm, elementwise, *arguments, *needs_norm[1:])
        return _all_gradients(ctx, (dx, *grads_norm), grads, tensors)


class LinearResidual(Function):
    """The Function of `linear_residual`."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, residual: Tensor, group: Group, *tensors: Tensor) -> Tensor:
        """Return the sum; save the inputs only if the gradient of a parameter needs them."""
        _, needs_tensors = _split_needs(ctx, tensors)
        ctx.save_for_backward(inputs if any(needs_tensors) else None, *tensors)
        ctx.group = group
        ctx.dtypes = inputs.dtype, residual.dtype
        with _without_autocast(inputs):
            result = _add(group.forward(inputs), residual)
            group.end_forward()
            return result

    @staticmethod
    @_outside_autocast
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        """Return the gradients; that of the residual is the output's."""
        refuse_double_backward()
        inputs, *tensors = ctx.saved_tensors
        needs_inputs, needs_residual, *_ = ctx.needs_input_grad
        _, needs_tensors = _split_needs(ctx, tensors)
        grads: list[Tensor | None] = [None] * len(tensors)
        group = ctx.group.with_tensors(tensors)
        d_inputs = group.backward([gradient], inputs, needs_tensors, grads, to_inputs=needs_inputs)
        d_inputs = None if d_inputs is None else d_inputs.to(ctx.dtypes[0])
        d_residual = gradient.to(ctx.dtypes[1]) if needs_residual else None
        return _all_gradients(ctx, (d_inputs, d_residual), grads, tensors)


class NormMLP(Function):
    """The Function of `mlp_residual`, computed in chunks of the batch."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        mode: str,
        without_output: bool,
        elementwise: Elementwise,
        up: Group,
        down: Group,
        *tensors: Tensor,
    ) -> Tensor:
        """Return the sum; `mode` says whether the pre-activation is kept, recomputed or unneeded."""
        ctx.eps, ctx.elementwise, ctx.up, ctx.down = eps, elementwise, up, down
        token_bytes = up.linears[0].shape[0] * up.dtype.itemsize
        ctx.chunks = plan_for(x.device.type).chunks(x.shape[0], token_bytes)
        kept: list[Tensor] = []
        result = x.new_empty(()).expand_as(x) if without_output else torch.empty_like(x, dtype=_sum_dtype(x, down))
        with _without_autocast(x):
            computes = not without_output or mode == "kept"
            weights_up, weights_down = prepare_all([up, down], x.shape[0]) if computes else (None, None)
            for rows in ctx.chunks if computes else ():
                normed = elementwise.norm(x[rows], weight, bias, eps, up.dtype)[0]
                inner = up.forward(normed, weights=weights_up, start=rows.start)
                del normed
                if mode == "kept":
                    kept.append(inner)
                if not without_output:
                    inner = F.gelu(inner) if mode == "kept" else torch.ops.aten.gelu_(inner)
                    _add_into(result, rows, down, weights_down, inner.to(down.dtype), x)
                del inner
        up.end_forward()
        down.end_forward()
        ctx.kept = len(kept)
        ctx.save_for_backward(x, weight, bias, *tensors, *kept)
        return result

    @staticmethod
    @_outside_autocast
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        """Recompute the layer norm and GELU, and return the gradients."""
        refuse_double_backward()
        x, weight, bias, *rest = ctx.saved_tensors
        tensors, kept = rest[: len(rest) - ctx.kept], rest[len(rest) - ctx.kept :]
        tensors_up, tensors_down = _split_at(tensors, len(ctx.up.tensors))
        up, down = ctx.up.with_tensors(tensors_up), ctx.down.with_tensors(tensors_down)
        elementwise, (needs_norm, needs_tensors) = ctx.elementwise, _split_needs(ctx, tensors)
        needs_up, needs_down = _split_at(needs_tensors, len(tensors_up))
        grads_up: list[Tensor | None] = [None] * len(tensors_up)
        grads_down: list[Tensor | None] = [None] * len(tensors_down)
        grads_norm: list[Tensor | None] = [None, None]
        to_norm = any(needs_norm)
        to_up = to_norm or any(needs_up)
        dx = torch.empty_like(x) if needs_norm[0] else None
        weights_up = weights_down = None
        if to_norm or to_up or not kept:
            weights_up, weights_down = prepare_all([up, down], x.shape[0])
        for number, rows in enumerate(ctx.chunks):
            normed, statistics = None, []
            if to_norm or any(needs_up) or not kept:
                normed, *statistics = elementwise.norm(x[rows], weight, bias, ctx.eps, up.dtype)
            first = rows.start
            inner = kept[number] if kept else up.forward(normed, weights=weights_up, start=first)
            outer = [gradient[rows].to(down.dtype)]
            # GELU's result and its gradient read the same tensor, so that one kernel can compute both.
            joint = any(needs_down) and to_up and down.dtype == inner.dtype
            active: Any = F.gelu(inner) if any(needs_down) and not joint else None
            if joint:
                active = partial(elementwise.gelu_backward, inner=inner)
            options = {"weights": weights_down, "start": first}
            d_inner = down.backward(outer, active, needs_down, grads_down, to_inputs=to_up, **options)
            del active, outer
            if d_inner is None:
                continue
            if not joint:
                d_inner = d_inner.to(inner.dtype)
                torch.ops.aten.gelu_backward.grad_input(d_inner, inner, grad_input=d_inner)
            del inner
            options = {"weights": weights_up, "start": first}
            d_normed = up.backward([d_inner], normed, needs_up, grads_up, to_inputs=to_norm, **options)
            del d_inner, normed
            if d_normed is None:
                continue
            out = None if dx is None else dx[rows]
            arguments = d_normed, x[rows], *statistics, weight, bias, gradient[rows], out
            _accumulate_norm(grads_norm, elementwise, *arguments, *needs_norm[1:])
        return _all_gradients(ctx, (dx, *grads_norm), grads_up + grads_down, tensors)


def refuse_double_backward() -> None:
    """Raise an error in a backward pass that is to be differentiated again."""
    if torch.is_grad_enabled():
        raise ConfigurationError(
            "the lean encoder cannot be differentiated twice (create_graph=True): call remove_lean_encoder(model) first"
        )


def _split_needs(ctx: Any, tensors: Sequence[Tensor]) -> tuple[Sequence[bool], Sequence[bool]]:
    """Which of the first `_NORM_ARGUMENTS` need a gradient, and which parameters, the last arguments, do."""
    needs = ctx.needs_input_grad
    return needs[:_NORM_ARGUMENTS], needs[len(needs) - len(tensors) :]


def _split_at(values: Sequence[Any], count: int) -> tuple[Sequence[Any], Sequence[Any]]:
    return values[:count], values[count:]


def _all_gradients(
    ctx: Any, first: Sequence[Tensor | None], grads: Sequence[Tensor | None], tensors: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """Gradients of all arguments: of the first ones, None for the options, of the parameters in their dtypes."""
    options = (None,) * (len(ctx.needs_input_grad) - len(first) - len(tensors))
    return *first, *options, *convert(grads, [tensor.dtype for tensor in tensors])


def _without_autocast(tensor: Tensor) -> Any:
    return autocast_as(tensor.device.type, None)


def _real(rotation: Tensor) -> Tensor:
    """View (tokens, 1, half) complex numbers as (tokens, half, 2)."""
    return torch.view_as_real(rotation.squeeze(1))


def _own(gradient: Tensor, is_owned: bool) -> Tensor:
    """Return a contiguous gradient that may be overwritten."""
    return gradient if is_owned and gradient.is_contiguous() else gradient.clone(memory_format=torch.contiguous_format)


def _accumulate_norm(grads: list[Tensor | None], elementwise: Elementwise, *arguments: Any) -> None:
    """Run `norm_backward` for a chunk of the batch, and add its gradients of weight and bias to `grads`."""
    *_, needs_weight, needs_bias = arguments
    found = iter(elementwise.norm_backward(*arguments))
    for index, needed in enumerate((needs_weight, needs_bias)):
        if needed and (grad := next(found, None)) is not None:
            accumulate(grads, index, grad)


def _sum_dtype(residual: Tensor, group: Group) -> torch.dtype:
    return torch.promote_types(residual.dtype, group.dtype)


def _add(states: Tensor, residual: Tensor) -> Tensor:
    if torch.promote_types(states.dtype, residual.dtype) == states.dtype:
        return states.add_(residual)
    return states + residual


def _add_into(
    result: Tensor, rows: slice, group: Group, weights: PreparedWeights | None, inputs: Tensor, residual: Tensor
) -> None:
    """Write ``residual + group(inputs)`` to some rows of `result`, without a copy if the dtypes are equal."""
    target, residual = result[rows], residual[rows]
    if result.dtype == group.dtype:
        group.forward(inputs, weights=weights, out=target, start=rows.start).add_(residual)
    else:
        torch.add(group.forward(inputs, weights=weights, start=rows.start), residual, out=target)
