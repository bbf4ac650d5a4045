"""The encoder's autograd Functions: what a layer computes, keeping only what cannot be recomputed cheaply.

Each saves its input and its parameters, and recomputes layer norms and GELU outputs in the backward pass. Per token and
layer, the input, query, key, value, attention output, the sum after attention, and the pre-activation of the MLP are
kept: ten times the width. None of them can be differentiated twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from esm_efficient.encoder.linear import Group, Ready
from esm_efficient.errors import ConfigurationError

_ROWS, PIECES = 512, 8
"""The MLP runs in at most so many pieces of the batch, each of at least so many tokens."""


class Norm(NamedTuple):
    """What a ``torch.nn.LayerNorm`` over the last axis computes with."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float

    @classmethod
    def of(cls, module: Any) -> Norm:
        """The tensors of a module."""
        return cls(module.weight, module.bias, module.eps)


def norm_linears(x: Tensor, norm: Norm, group: Group, *, rotation: Tensor | None = None) -> Tensor:
    """Layer norm, linear layers in one product, rotary positions.

    Args:
        x: shape (tokens, width).
        norm: the layer norm.
        group: the linear layers; `Group.rotated` of them are rotated.
        rotation: complex of shape (tokens, 1, head width / 2).

    Returns:
        Shape (tokens, layers, heads, head width).
    """
    return NormLinears.apply(x, norm.weight, norm.bias, norm.eps, rotation, True, group, *group.tensors)


def linear_residual(inputs: Tensor, residual: Tensor, group: Group) -> Tensor:
    """``residual + linear(inputs)``, both of shape (tokens, width)."""
    return LinearResidual.apply(inputs, residual, group, *group.tensors)


def mlp_residual(
    x: Tensor, norm: Norm, up: Group, down: Group, *, keep: bool = True, without_output: bool = False
) -> Tensor:
    """``x + down(gelu(up(norm(x))))`` of shape (tokens, width).

    Args:
        x: shape (tokens, width).
        norm: the layer norm.
        up: the layer that widens.
        down: the layer that narrows.
        keep: keep the pre-activation for the backward pass, or compute it again there.
        without_output: return numbers without meaning: the caller wants the gradients alone.
    """
    tensors = up.tensors + down.tensors
    needed = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, norm.weight, norm.bias, *tensors)
    )
    mode = ("kept" if keep else "recomputed") if needed else "unneeded"
    return NormMLP.apply(x, norm.weight, norm.bias, norm.eps, mode, without_output, up, down, *tensors)


class NormLinears(Function):
    """Layer norm and linear layers in one product, with rotary positions."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        rotation: Tensor | None,
        owned: bool,
        group: Group,
        *tensors: Tensor,
    ) -> Tensor:
        """`owned` says that nobody else reads the gradient of the output, which may then be overwritten."""
        ctx.save_for_backward(x, weight, bias, rotation, *tensors)
        ctx.eps, ctx.owned, ctx.group = eps, owned, group
        with _without_autocast(x):
            states = group.forward(_norm(x, weight, bias, eps)[0])
            states = states.view(x.shape[0], len(group.linears), group.heads, -1)
            return _rotate(states, rotation, group.rotated)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        """Of a layer norm recomputed."""
        refuse_double_backward()
        x, weight, bias, rotation, *tensors = ctx.saved_tensors
        group = ctx.group.with_tensors(tensors)
        needs = ctx.needs_input_grad
        if rotation is not None and not (ctx.owned and gradient.is_contiguous()):
            gradient = gradient.clone(memory_format=torch.contiguous_format)
        gradient = _rotate(gradient, None if rotation is None else rotation.conj(), group.rotated)
        normed, mean, deviation = _norm(x, weight, bias, ctx.eps)
        grads: list[Tensor | None] = [None] * len(tensors)
        to_norm = any(needs[:3])
        inner = group.backward(gradient.reshape(x.shape[0], -1), normed, needs[7:], grads, to_inputs=to_norm)
        del normed
        outer: tuple[Tensor | None, ...] = (None, None, None)
        if inner is not None:
            outer = _norm_backward(inner, x, mean, deviation, weight, bias, needs[:3])
        return *outer, None, None, None, None, *_like(grads, tensors)


class LinearResidual(Function):
    """A linear layer added to a residual."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, residual: Tensor, group: Group, *tensors: Tensor) -> Tensor:
        """Keeps the inputs if a parameter needs them."""
        ctx.save_for_backward(inputs if any(ctx.needs_input_grad[3:]) else None, *tensors)
        ctx.group = group
        ctx.dtypes = inputs.dtype, residual.dtype
        with _without_autocast(inputs):
            return _add(group.forward(inputs), residual)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        """The residual's gradient is the output's."""
        refuse_double_backward()
        inputs, *tensors = ctx.saved_tensors
        needs = ctx.needs_input_grad
        grads: list[Tensor | None] = [None] * len(tensors)
        inner = ctx.group.with_tensors(tensors).backward(gradient, inputs, needs[3:], grads, to_inputs=needs[0])
        return (
            None if inner is None else inner.to(ctx.dtypes[0]),
            gradient.to(ctx.dtypes[1]) if needs[1] else None,
            None,
            *_like(grads, tensors),
        )


class NormMLP(Function):
    """Layer norm, linear layer, GELU, linear layer, added to the input; in pieces of the batch."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        mode: str,
        without_output: bool,
        up: Group,
        down: Group,
        *tensors: Tensor,
    ) -> Tensor:
        """`mode` says what becomes of the pre-activation: kept, recomputed, or not needed at all."""
        ctx.eps, ctx.up, ctx.down = eps, up, down
        kept: list[Tensor] = []
        result = x.new_empty(()).expand_as(x) if without_output else torch.empty_like(x, dtype=_sum_dtype(x, down))
        with _without_autocast(x):
            computes = not without_output or mode == "kept"
            ready_up, ready_down = (group.ready(x.shape[0]) if computes else None for group in (up, down))
            for rows in _chunks(x) if computes else ():
                inner = up.at(rows.start).forward(_norm(x[rows], weight, bias, eps)[0], ready=ready_up)
                if mode == "kept":
                    kept.append(inner)
                if not without_output:
                    inner = F.gelu(inner) if mode == "kept" else torch.ops.aten.gelu_(inner)
                    _add_into(result[rows], down.at(rows.start), ready_down, inner.to(down.dtype), x[rows])
                del inner
        ctx.kept = len(kept)
        ctx.save_for_backward(x, weight, bias, *tensors, *kept)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        """Of a layer norm and GELU recomputed."""
        refuse_double_backward()
        x, weight, bias, *rest = ctx.saved_tensors
        tensors, kept = rest[: len(rest) - ctx.kept], rest[len(rest) - ctx.kept :]
        ups = len(ctx.up.tensors)
        up, down = ctx.up.with_tensors(tensors[:ups]), ctx.down.with_tensors(tensors[ups:])
        needs = ctx.needs_input_grad
        needs_up, needs_down = needs[8 : 8 + ups], needs[8 + ups :]
        grads_up: list[Tensor | None] = [None] * ups
        grads_down: list[Tensor | None] = [None] * (len(tensors) - ups)
        to_norm = any(needs[:3])
        to_up = to_norm or any(needs_up)
        total = torch.empty_like(x) if needs[0] else None
        grads_norm: list[Tensor | None] = [None, None]
        ready_up = up.ready(x.shape[0]) if to_norm or not kept else None
        ready_down = down.ready(x.shape[0]) if to_up else None
        for number, rows in enumerate(_chunks(x)):
            normed = mean = deviation = None
            if to_norm or any(needs_up) or not kept:
                normed, mean, deviation = _norm(x[rows], weight, bias, ctx.eps)
            of_up, of_down = up.at(rows.start), down.at(rows.start)
            inner = kept[number] if kept else of_up.forward(normed, ready=ready_up)
            outer = gradient[rows].to(down.dtype)
            active = F.gelu(inner) if any(needs_down) else None
            d_inner = of_down.backward(outer, active, needs_down, grads_down, to_inputs=to_up, ready=ready_down)
            del active
            if d_inner is None:
                continue
            d_inner = d_inner.to(inner.dtype)
            torch.ops.aten.gelu_backward.grad_input(d_inner, inner, grad_input=d_inner)
            del inner
            d_normed = of_up.backward(d_inner, normed, needs_up, grads_up, to_inputs=to_norm, ready=ready_up)
            del d_inner, normed
            if d_normed is None:
                continue
            dx, dw, db = _norm_backward(d_normed, x[rows], mean, deviation, weight, bias, needs[:3])
            for place, grad in enumerate((dw, db)):
                held = grads_norm[place]
                grads_norm[place] = grad if held is None or grad is None else held.add_(grad)
            if total is not None and dx is not None:
                torch.add(gradient[rows], dx, out=total[rows])
        grads = _like(grads_up + grads_down, tensors)
        return total, *grads_norm, None, None, None, None, None, *grads


def refuse_double_backward() -> None:
    """Raise where a gradient is to be differentiated."""
    if torch.is_grad_enabled():
        raise ConfigurationError(
            "the lean encoder cannot be differentiated twice (create_graph=True): call remove_lean_encoder(model) first"
        )


def _without_autocast(tensor: Tensor) -> Any:
    return torch.autocast(tensor.device.type, enabled=False)


def _norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Layer norm over the last axis, with the mean and the reciprocal deviation that its gradient needs."""
    x, weight, bias = _one_dtype(x, weight, bias)
    return torch.native_layer_norm(x, x.shape[-1:], weight, bias, eps)


def _norm_backward(
    gradient: Tensor,
    x: Tensor,
    mean: Tensor | None,
    deviation: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    wide, w, b = _one_dtype(x, weight, bias)
    mask = [bool(needs[0]), bool(needs[1]), bool(needs[2])]
    dx, dw, db = torch.ops.aten.native_layer_norm_backward(
        gradient.to(wide.dtype), wide, wide.shape[-1:], mean, deviation, w, b, mask
    )
    return (
        dx.to(x.dtype) if mask[0] else None,
        dw.to(weight.dtype) if mask[1] and weight is not None else None,
        db.to(bias.dtype) if mask[2] and bias is not None else None,
    )


def _one_dtype(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """All in the wider of their types, for a norm kept in float32 beside states in half precision."""
    if weight is None or weight.dtype == x.dtype:
        return x, weight, bias
    dtype = torch.promote_types(x.dtype, weight.dtype)
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _rotate(states: Tensor, rotation: Tensor | None, rotated: int) -> Tensor:
    """Rotate the first of the layers' outputs in place: (tokens, layers, heads, head width)."""
    if rotation is None or not rotated:
        return states
    part = states[:, :rotated]
    exact = part if part.dtype in (torch.float32, torch.float64) else part.float()
    pairs = torch.view_as_complex(exact.unflatten(-1, (-1, 2)))
    pairs.mul_(rotation.unsqueeze(1).to(pairs.dtype))
    if exact is not part:
        part.copy_(exact)
    return states


def _chunks(x: Tensor) -> list[slice]:
    """Pieces of a batch, so that the MLP's inner states of all tokens are never there at once beyond what is kept."""
    size = max(_ROWS, -(-x.shape[0] // PIECES))
    return [slice(start, start + size) for start in range(0, x.shape[0], size)]


def _sum_dtype(residual: Tensor, group: Group) -> torch.dtype:
    return torch.promote_types(residual.dtype, group.dtype)


def _add(states: Tensor, residual: Tensor) -> Tensor:
    if torch.promote_types(states.dtype, residual.dtype) == states.dtype:
        return states.add_(residual)
    return states + residual


def _add_into(result: Tensor, group: Group, ready: Ready | None, inputs: Tensor, residual: Tensor) -> None:
    """Put ``residual + group(inputs)`` where it belongs, without memory in between where the types allow."""
    if result.dtype == group.dtype:
        group.forward(inputs, ready=ready, out=result).add_(residual)
    else:
        torch.add(group.forward(inputs, ready=ready), residual, out=result)


def _like(grads: Sequence[Tensor | None], tensors: Sequence[Tensor]) -> list[Tensor | None]:
    return [None if g is None else g.to(t.dtype) for g, t in zip(grads, tensors, strict=True)]
