"""The elementwise functions of a layer: layer norms, rotary positions, and the gradients of layer norms and GELU.

They are pure functions of tensors, and each stands for several small kernels. `EAGER` runs them as they are, one
operation after the other. `esm_efficient.encoder.fusion` compiles the same functions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Elementwise(NamedTuple):
    """The functions of this file, as they run in a layer."""

    norm: Callable[..., tuple[Tensor, Tensor, Tensor]]
    norm_backward: Callable[..., list[Tensor]]
    gelu_backward: Callable[..., Tensor]
    rotate: Callable[..., list[Tensor]]


def norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute a layer norm over the last axis.

    Args:
        x: shape (tokens, width).
        weight: shape (width,).
        bias: shape (width,).
        eps: what is added to the variance.
        dtype: dtype of the result.

    Returns:
        The result, and the mean and the reciprocal deviation of each token, which the gradient needs.
    """
    x, weight, bias = _one_dtype(x, weight, bias)
    normed, mean, deviation = torch.native_layer_norm(x, x.shape[-1:], weight, bias, eps)
    return normed.to(dtype), mean, deviation


def norm_backward(
    gradient: Tensor,
    x: Tensor,
    mean: Tensor,
    deviation: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    out: Tensor | None,
    needs_weight: bool,
    needs_bias: bool,
) -> list[Tensor]:
    """Compute the gradients of a layer norm, and add the gradient that reaches its input around it.

    Args:
        gradient: gradient of the result.
        x: the input.
        mean: what `norm` returned.
        deviation: what `norm` returned.
        weight: shape (width,).
        bias: shape (width,).
        residual: the gradient to add to that of the input.
        out: where to write the sum, in the shape of `x`; None if the input needs no gradient.
        needs_weight: whether the weight needs a gradient.
        needs_bias: whether the bias needs a gradient.

    Returns:
        The gradients of weight and bias that are needed.
    """
    wide, w, b = _one_dtype(x, weight, bias)
    mask = [out is not None, needs_weight, needs_bias]
    dx, dw, db = torch.ops.aten.native_layer_norm_backward(
        gradient.to(wide.dtype), wide, wide.shape[-1:], mean, deviation, w, b, mask
    )
    if out is not None and residual is not None:
        torch.add(residual, dx, out=out)
    elif out is not None:
        out.copy_(dx)
    return [
        grad.to(parameter.dtype)
        for grad, parameter, needed in ((dw, weight, needs_weight), (db, bias, needs_bias))
        if needed and parameter is not None
    ]


def gelu_backward(gradient: Tensor, inner: Tensor) -> Tensor:
    """Turn the gradient of GELU's result, in place, into that of its input, and return GELU's result."""
    active = F.gelu(inner)
    torch.ops.aten.gelu_backward.grad_input(gradient, inner, grad_input=gradient)
    return active


def rotate(states: list[Tensor], rotation: Tensor, back: bool) -> list[Tensor]:
    """Rotate in place the numbers i and i + width / 2 of each head.

    Args:
        states: queries, keys or their gradients, each (..., tokens, heads, head width) and contiguous.
        rotation: (tokens, head width / 2, 2): the real and the imaginary part of each factor.
        back: whether to rotate in the other direction.

    Returns:
        `states`.
    """
    factor = torch.view_as_complex(rotation).unsqueeze(1)
    factor = factor.conj().resolve_conj() if back else factor  # once, because each product would do it
    for tensor in states:
        pairs = tensor.unflatten(-1, (2, -1)).transpose(-1, -2)
        dtype = torch.promote_types(tensor.dtype, torch.float32)
        exact = pairs.to(dtype, memory_format=torch.contiguous_format, copy=True)
        torch.view_as_complex(exact).mul_(factor)
        pairs.copy_(exact)
    return states


def rotate_real(states: list[Tensor], rotation: Tensor, back: bool) -> list[Tensor]:
    """Do what `rotate` does without complex numbers, for which inductor makes no code; the results are new tensors."""
    cosine, sine = rotation.unsqueeze(1).unbind(-1)
    sine = -sine if back else sine
    turned = []
    for tensor in states:
        first, second = tensor.to(torch.promote_types(tensor.dtype, torch.float32)).chunk(2, -1)
        pair = first * cosine - second * sine, second * cosine + first * sine
        turned.append(torch.cat(pair, -1).to(tensor.dtype))
    return turned


def rotate_neighbours(states: Tensor, rotation: Tensor | None, rotated: int) -> Tensor:
    """Rotate the outputs of the first `rotated` layers in place; in float32 this is one kernel.

    Args:
        states: (tokens, layers, heads, head width); the numbers that rotate together are neighbours.
        rotation: complex of shape (tokens, 1, head width / 2); None if nothing rotates.
        rotated: number of layers.
    """
    if rotation is None or not rotated:
        return states
    part = states[:, :rotated]
    exact = part if part.dtype in (torch.float32, torch.float64) else part.float()
    pairs = torch.view_as_complex(exact.unflatten(-1, (-1, 2)))
    pairs.mul_(rotation.unsqueeze(1).to(pairs.dtype))
    if exact is not part:
        part.copy_(exact)
    return states


def _one_dtype(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Convert all to the wider dtype, for a float32 norm of states in half precision."""
    dtype = x.dtype
    for parameter in (weight, bias):
        dtype = dtype if parameter is None else torch.promote_types(dtype, parameter.dtype)
    return x.to(dtype), None if weight is None else weight.to(dtype), None if bias is None else bias.to(dtype)


EAGER = Elementwise(norm, norm_backward, gelu_backward, rotate)
"""The functions as they are."""
