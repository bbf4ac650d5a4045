"""One layer of the encoder on packed tokens: lean where its parts are known, by their own forward where not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.autograd import Function

from esm_efficient.encoder.attention import attend
from esm_efficient.encoder.functions import Norm, linear_residual, mlp_residual, norm_linears, refuse_double_backward
from esm_efficient.encoder.linear import Group
from esm_efficient.encoder.packing import Packing
from esm_efficient.encoder.reading import autocast_dtype, is_norm, read_group, trainable_tensors

Recompute = Literal["none", "mlp", "layer"]
RECOMPUTES: tuple[Recompute, ...] = ("none", "mlp", "layer")


@dataclass(frozen=True)
class Parts:
    """What a layer computes with, read once for its forward and its backward pass; None for what is not known.

    Attributes:
        layer: the module.
        qkv: queries, keys and values.
        attention_output: the layer after attention.
        up: the MLP's first layer.
        down: its second.
        norms: the layer norms before attention and before the MLP.
        trainable: the tensors that train.
        draws: whether something draws random numbers that no seed was noted for.
    """

    layer: Any
    qkv: Group | None
    attention_output: Group | None
    up: Group | None
    down: Group | None
    norms: tuple[Norm | None, Norm | None]
    trainable: tuple[Tensor, ...]
    draws: bool


def read_parts(layer: Any) -> tuple[Parts, list[str]]:
    """The parts of a transformers ``EsmLayer``, and why some of them are not known."""
    attention = layer.attention
    inner = attention.self
    reasons: list[str] = []

    def known(modules: list[nn.Module], norm: nn.Module | None, dropout: nn.Module | None, **options: Any) -> Any:
        if norm is not None and not is_norm(norm):
            reasons.append(type(norm).__name__)
            return None
        if dropout is not None and dropout.training and cast(Any, dropout).p:
            reasons.append("dropout of hidden states")
            return None
        group = read_group(modules, **options)
        if isinstance(group, str):
            reasons.append(group)
            return None
        return group

    heads = inner.num_attention_heads
    qkv = known([inner.query, inner.key, inner.value], attention.LayerNorm, None, heads=heads, rotated=2)
    after = known([attention.output.dense], None, attention.output.dropout)
    up = known([layer.intermediate.dense], layer.LayerNorm, None)
    down = known([layer.output.dense], None, layer.output.dropout)
    if up is None or down is None:
        up = down = None
    norms = tuple(Norm.of(norm) if is_norm(norm) else None for norm in (attention.LayerNorm, layer.LayerNorm))
    draws = layer.training and (bool(inner.dropout) or None in (qkv, after, up))

    # What is computed with and nothing besides: FSDP hides a flat parameter in the layer, of which these are views.
    tensors = [tensor for norm in norms if norm is not None for tensor in (norm.weight, norm.bias)]
    own = {attention: qkv, attention.output: after, layer.intermediate: up, layer.output: down, layer.LayerNorm: up}
    for module, group in own.items():
        tensors += trainable_tensors(module) if group is None else group.tensors
    trainable = {id(tensor): tensor for tensor in tensors if tensor is not None and tensor.requires_grad}
    return Parts(layer, qkv, after, up, down, cast(Any, norms), tuple(trainable.values()), draws), reasons


def run_layer(
    layer: Any, x: Tensor, packing: Packing, *, recompute: Recompute, backend: str, first_only: bool
) -> tuple[Tensor, list[str]]:
    """(tokens, width) to the same, or to (sequences, width) if only the first token of each sequence is wanted.

    Returns:
        The new states, and what ran through its own forward.
    """
    parts, reasons = read_parts(layer)

    def run(states: Tensor, keep: bool, without_output: bool) -> Tensor:
        return _run(parts, states, packing, backend, first_only, keep=keep, without_output=without_output)

    if recompute != "layer" or not torch.is_grad_enabled():
        return run(x, recompute == "none", False), reasons
    return RecomputedLayer.apply(x, run, parts.draws, *parts.trainable), reasons


class RecomputedLayer(Function):
    """A layer of which only the input is kept; the backward pass computes what it needs again.

    Unlike torch.utils.checkpoint it does not compute the layer's output again: nothing in the backward pass reads it.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, run: Callable[[Tensor, bool, bool], Tensor], draws: bool, *trainable: Tensor
    ) -> Tensor:
        """`draws` says that the layer draws random numbers, which must be the same again."""
        ctx.save_for_backward(x)
        ctx.run, ctx.trainable = run, trainable
        device = x.device.type
        ctx.autocast = autocast_dtype(device)
        ctx.random = _random_state(x.device) if draws else None
        return run(x, False, False)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        """The layer again, with autograd, up to what the gradient needs."""
        refuse_double_backward()
        (x,) = ctx.saved_tensors
        device = x.device.type
        devices = [] if device in ("cpu", "meta") else [x.device]
        with torch.enable_grad(), torch.random.fork_rng(devices, enabled=ctx.random is not None):
            if ctx.random is not None:
                _set_random_state(ctx.random, x.device)
            inputs = x.detach().requires_grad_(ctx.needs_input_grad[0])
            with torch.autocast(device, ctx.autocast, enabled=ctx.autocast is not None):
                states = ctx.run(inputs, False, True)
        if not states.requires_grad:  # what trains in this layer is in no use
            return (None,) * (3 + len(ctx.trainable))
        wanted = [tensor for tensor in (inputs, *ctx.trainable) if tensor.requires_grad]
        found = iter(torch.autograd.grad(states, wanted, gradient, allow_unused=True))
        grads = [next(found) if tensor.requires_grad else None for tensor in (inputs, *ctx.trainable)]
        return grads[0], None, None, *grads[1:]


def _run(
    parts: Parts,
    x: Tensor,
    packing: Packing,
    backend: str,
    first_only: bool,
    *,
    keep: bool,
    without_output: bool,
) -> Tensor:
    layer = parts.layer
    attention = layer.attention
    dropout = attention.self.dropout if layer.training else 0.0
    first = torch.tensor(packing.first, device=x.device) if first_only else None
    residual = x if first is None else x.index_select(0, first)
    query = None
    norm, norm_mlp = parts.norms
    if parts.qkv is None or norm is None:
        states = _own_queries(attention, x, packing)
    elif first is None:
        states = norm_linears(x, norm, parts.qkv, rotation=packing.rotation)
    else:
        q, *rest = parts.qkv.linears
        rotation = None if packing.rotation is None else packing.rotation.index_select(0, first)
        states = norm_linears(x, norm, parts.qkv.take(rest, rotated=1), rotation=packing.rotation)
        query = norm_linears(residual, norm, parts.qkv.take([q], rotated=1), rotation=rotation)
    if first is not None and query is None:
        query, states = states[:, :1].index_select(0, first), states[:, 1:]
    mixed = attend(states, query, packing, backend=backend, dropout=dropout)
    del states, query
    if parts.attention_output is None:
        after = attention.output(mixed[None], residual[None])[0]
    else:
        after = linear_residual(mixed, residual, parts.attention_output)
    del mixed, residual
    if parts.up is None or parts.down is None or norm_mlp is None:
        return layer.output(layer.intermediate(layer.LayerNorm(after[None])), after[None])[0]
    return mlp_residual(after, norm_mlp, parts.up, parts.down, keep=keep, without_output=without_output)


def _own_queries(attention: Any, x: Tensor, packing: Packing) -> Tensor:
    """Queries, keys and values by their modules' own forward: (tokens, 3, heads, head width)."""
    inner = attention.self
    normed = attention.LayerNorm(x[None])
    parts = []
    for number, module in enumerate((inner.query, inner.key, inner.value)):
        part = module(normed)[0].unflatten(-1, (inner.num_attention_heads, -1))
        if number < 2:
            # Numbers i and i + width / 2 of a head side by side, as `Group` has them.
            pairs = part.unflatten(-1, (2, -1)).transpose(-1, -2)
            if packing.rotation is not None:
                exact = pairs if pairs.dtype in (torch.float32, torch.float64) else pairs.float()
                turned = torch.view_as_complex(exact.contiguous()) * packing.rotation
                pairs = torch.view_as_real(turned).to(part.dtype)
            part = pairs.flatten(-2)
        parts.append(part)
    return torch.stack(parts, 1)


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    other = None if device.type in ("cpu", "meta") else torch.get_device_module(device).get_rng_state(device)
    return torch.get_rng_state(), other


def _set_random_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.get_device_module(device).set_rng_state(state[1], device)
