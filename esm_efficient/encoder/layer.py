"""One encoder layer on packed tokens: known parts run as lean Functions, other parts through their own forward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.autograd import Function

from esm_efficient import _torch
from esm_efficient.encoder.attention import attend, attention_override, use_attention
from esm_efficient.encoder.elementwise import Elementwise
from esm_efficient.encoder.functions import Norm, linear_residual, mlp_residual, norm_linears, refuse_double_backward
from esm_efficient.encoder.linear import Group, convert_adapters
from esm_efficient.encoder.packing import Packing
from esm_efficient.encoder.plan import Plan, autocast_as, autocast_dtype, plan_for
from esm_efficient.encoder.reading import is_norm, read_group, trainable_tensors

Recompute = Literal["none", "mlp", "layer"]
RECOMPUTES: tuple[Recompute, ...] = ("none", "mlp", "layer")


@dataclass(frozen=True)
class Parts:
    """The tensors of a layer, read once per forward pass. A part is None if it must run through its own forward.

    Attributes:
        layer: the module.
        qkv: the linear layers of queries, keys and values.
        attention_output: the linear layer after attention.
        up: the first linear layer of the MLP.
        down: the second linear layer of the MLP.
        norms: the layer norms before attention and before the MLP.
        trainable: the tensors that train.
        draws: whether the layer draws random numbers from torch's generator during the computation, as modules with
            dropout do; an adapter's dropout has a seed instead.
    """

    layer: Any
    qkv: Group | None
    attention_output: Group | None
    up: Group | None
    down: Group | None
    norms: tuple[Norm | None, Norm | None]
    trainable: tuple[Tensor, ...]
    draws: bool


def read_parts(layer: Any, rotates: bool, plan: Plan) -> tuple[Parts, list[str]]:
    """Return the parts of a transformers ``EsmLayer``, and why some must run through their own forward.

    Args:
        layer: the layer.
        rotates: whether rotary positions rotate queries and keys.
        plan: how the device computes.
    """
    attention = layer.attention
    inner = attention.self
    reasons: list[str] = []

    def read(modules: list[nn.Module], norm: nn.Module | None, dropout: nn.Module | None, **options: Any) -> Any:
        if norm is not None and not is_norm(norm):
            reasons.append(type(norm).__name__)
            return None
        if (
            dropout is not None
            and type(dropout) is not nn.Identity
            and dropout.training
            and getattr(dropout, "p", True)
        ):
            reasons.append("dropout of hidden states")
            return None
        group = read_group(modules, **options)
        if isinstance(group, str):
            reasons.append(group)
            return None
        return group

    heads, rotated = inner.num_attention_heads, 2 if rotates else 0
    projections = {"heads": heads, "rotated": rotated, "apart": plan.apart}
    qkv = read([inner.query, inner.key, inner.value], attention.LayerNorm, None, **projections)
    attention_output = read([attention.output.dense], None, attention.output.dropout)
    up = read([layer.intermediate.dense], layer.LayerNorm, None)
    down = read([layer.output.dense], None, layer.output.dropout)
    if up is None or down is None:
        up = down = None
    norms = tuple(Norm.of(norm) if is_norm(norm) else None for norm in (attention.LayerNorm, layer.LayerNorm))
    # Only the tensors that are used: FSDP keeps a flat parameter in the layer, and the used tensors are its views.
    tensors = [tensor for norm in norms if norm is not None for tensor in (norm.weight, norm.bias)]
    groups = {
        attention: qkv,
        attention.output: attention_output,
        layer.intermediate: up,
        layer.output: down,
        layer.LayerNorm: up,
    }
    # In evaluation too, single modules may be in training mode, as in Monte Carlo dropout.
    draws = bool(inner.training and inner.dropout)
    for module, group in groups.items():
        tensors += trainable_tensors(module) if group is None else group.tensors
        draws = draws or (group is None and any(part.training for part in module.modules()))
    trainable = {id(tensor): tensor for tensor in tensors if tensor is not None and tensor.requires_grad}
    parts = Parts(layer, qkv, attention_output, up, down, cast(Any, norms), tuple(trainable.values()), draws)
    return parts, reasons


def run_layer(
    layer: Any,
    x: Tensor,
    packing: Packing,
    *,
    recompute: Recompute,
    backend: str,
    first_only: bool,
    fused: bool = False,
) -> tuple[Tensor, list[str]]:
    """Compute a layer for states of (tokens, width).

    Returns:
        The new states, (tokens, width), or (sequences, width) if only the first token of each sequence is needed; and
        the names of what ran through its own forward.
    """
    plan = plan_for(x.device.type, fused=fused)
    parts, reasons = read_parts(layer, packing.rotation is not None, plan)
    if plan.apart:
        groups = parts.qkv, parts.attention_output, parts.up, parts.down
        convert_adapters(group for group in groups if group is not None)

    def compute(states: Tensor, keep: bool, without_output: bool) -> Tensor:
        options = plan.elementwise, backend, first_only
        return _compute_layer(parts, states, packing, *options, keep=keep, without_output=without_output)

    if recompute != "layer" or not torch.is_grad_enabled():
        return compute(x, recompute == "none", False), reasons
    return RecomputedLayer.apply(x, compute, parts.draws, *parts.trainable), reasons


class RecomputedLayer(Function):
    """A layer that saves only its input and computes everything else again in the backward pass.

    Unlike torch.utils.checkpoint, it does not compute the layer's output again, which the backward pass does not need.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, compute: Callable[[Tensor, bool, bool], Tensor], draws: bool, *trainable: Tensor
    ) -> Tensor:
        """Return the new states; with `draws` the random state is saved, to draw the same numbers again."""
        ctx.save_for_backward(x)
        ctx.compute, ctx.trainable = compute, trainable
        ctx.autocast = autocast_dtype(x.device.type)
        ctx.attention = attention_override.kernel
        ctx.random_state = _random_state(x.device) if draws else None
        return compute(x, False, False)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        """Compute the layer again with autograd, as in the forward pass, and return the gradients."""
        refuse_double_backward()
        (x,) = ctx.saved_tensors
        needs_input = ctx.needs_input_grad[0]
        device = x.device.type
        devices = [] if device in ("cpu", "meta") else [x.device]
        with torch.enable_grad(), torch.random.fork_rng(devices, enabled=ctx.random_state is not None):
            if ctx.random_state is not None:
                _set_random_state(ctx.random_state, x.device)
            inputs = x.detach().requires_grad_(needs_input)
            with autocast_as(device, ctx.autocast), use_attention(ctx.attention):
                states = ctx.compute(inputs, False, True)
        if not states.requires_grad:  # the trainable tensors are not used, for example merged adapters
            return (None,) * len(ctx.needs_input_grad)
        wanted = [tensor for tensor in (inputs, *ctx.trainable) if tensor.requires_grad]
        with _torch.without_hooks(ctx.trainable):  # autograd calls them with the gradients that this returns
            grads = iter(torch.autograd.grad(states, wanted, gradient, allow_unused=True))
        d_inputs, *d_trainable = (next(grads) if t.requires_grad else None for t in (inputs, *ctx.trainable))
        options = (None,) * (len(ctx.needs_input_grad) - 1 - len(d_trainable))
        return d_inputs, *options, *d_trainable


def _compute_layer(
    parts: Parts,
    x: Tensor,
    packing: Packing,
    elementwise: Elementwise,
    backend: str,
    first_only: bool,
    *,
    keep: bool,
    without_output: bool,
) -> Tensor:
    layer = parts.layer
    attention, inner = layer.attention, layer.attention.self
    dropout = inner.dropout if inner.training else 0.0
    scale = inner.attention_head_size**-0.5 * inner.scaling
    first = packing.first_tokens(x.device) if first_only else None
    residual = x
    states: Tensor | tuple[Tensor, ...]
    query: Tensor | None = None
    norm, norm_mlp = parts.norms
    compute_linears = partial(norm_linears, elementwise=elementwise)
    if parts.qkv is None or norm is None:
        states = _qkv_by_modules(attention, x, packing)
    elif first is None:
        residual, states = compute_linears(x, norm, parts.qkv, rotation=packing.rotation)
    else:
        query_linear, *key_value = parts.qkv.linears
        rotation = None if packing.rotation is None else packing.rotation.index_select(0, first)
        rotated = min(parts.qkv.rotated, 1)
        pair = parts.qkv.with_linears(key_value, rotated=rotated)
        residual = x.index_select(0, first)  # first, so that its gradient, as large as x, is made last
        _, states = compute_linears(x, norm, pair, rotation=packing.rotation)
        single = parts.qkv.with_linears([query_linear], rotated=rotated)
        residual, only = compute_linears(residual, norm, single, rotation=rotation)
        query = only if isinstance(only, Tensor) else only[0].unsqueeze(1)
    if first is not None and query is None and isinstance(states, Tensor):
        query, states = states[:, :1].index_select(0, first), states[:, 1:]
        residual = x.index_select(0, first)
    attended = attend(states, query, packing, backend=backend, dropout=dropout, scale=scale)
    del states, query
    if parts.attention_output is None:
        after = attention.output(attended[None], residual[None])[0]
    else:
        after = linear_residual(attended, residual, parts.attention_output)
    del attended, residual
    if parts.up is None or parts.down is None or norm_mlp is None:
        return layer.output(layer.intermediate(layer.LayerNorm(after[None])), after[None])[0]
    options = {"keep": keep, "without_output": without_output}
    return mlp_residual(after, norm_mlp, parts.up, parts.down, elementwise=elementwise, **options)


def _qkv_by_modules(attention: Any, x: Tensor, packing: Packing) -> Tensor:
    """Compute queries, keys and values by their modules' own forward: (tokens, 3, heads, head width)."""
    inner = attention.self
    normed = attention.LayerNorm(x[None])
    parts = []
    for module, rotated in ((inner.query, True), (inner.key, True), (inner.value, False)):
        part = module(normed)[0].unflatten(-1, (inner.num_attention_heads, -1))
        if rotated and packing.rotation is not None:
            # Interleaved as in `Group`: numbers i and i + width / 2 of a head are neighbours.
            pairs = part.unflatten(-1, (2, -1)).transpose(-1, -2)
            exact = pairs if pairs.dtype in (torch.float32, torch.float64) else pairs.float()
            turned = torch.view_as_complex(exact.contiguous()) * packing.rotation
            part = torch.view_as_real(turned).to(part.dtype).flatten(-2)
        parts.append(part)
    return torch.stack(parts, 1)


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """The state of the CPU's generator, and of the device's generator if it has its own."""
    other = None if device.type in ("cpu", "meta") else torch.get_device_module(device).get_rng_state(device)
    return torch.get_rng_state(), other


def _set_random_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.get_device_module(device).set_rng_state(state[1], device)
