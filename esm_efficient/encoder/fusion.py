"""The elementwise functions of a layer, each of them compiled into one kernel by torch.compile.

Each function is an operation of torch, of the namespace ``esm_efficient``. Whatever looks at operations, such as the
estimate and the profiler, sees one operation, and not those of which the function is made.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from esm_efficient import _torch
from esm_efficient.encoder.elementwise import Elementwise, gelu_backward, norm, norm_backward, rotate_real

logger = logging.getLogger(__name__)


class Compiled:
    """A function that torch.compile compiles when it is first called, for any number of tokens.

    If it cannot be compiled, for example without a C++ compiler or without triton, it runs as it is.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.name = function.__name__
        self.can_compile = True
        self.seen: set[Any] = set()

    @cached_property
    def compiled(self) -> Callable[..., Any]:
        """The compiled function; the compiler is imported and runs when it is called."""
        return torch.compile(self.function, fullgraph=True)

    def __call__(self, *args: Any) -> Any:
        """Call the function; a number of tokens that was not seen before compiles nothing, except for one token."""
        values, tensors = _detached(args)
        if not self.can_compile or any(tensor.shape[_token_axis(tensor)] == 1 for tensor in tensors):
            return self.function(*values)
        signature = tuple((tensor.dtype, tensor.dim()) for tensor in tensors)
        if signature not in self.seen:
            self.seen.add(signature)
            for tensor in tensors:
                _torch.mark_dynamic(tensor, _token_axis(tensor))
        try:
            return self.compiled(*values)
        except _torch.compile_errors() as error:
            self.can_compile = False
            reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            logger.warning("%s runs without fusion, because it cannot be compiled: %s", self.name, reason)
            return self.function(*values)


COMPILED: list[Compiled] = []
"""The functions that ``fused=True`` compiles. One that cannot be compiled runs as it is."""


def _detached(args: Any) -> tuple[list[Any], list[Tensor]]:
    """Return arguments without their gradients, which the compiler would tell apart, and the tensors with tokens."""
    detached, tensors = [], []
    for value in args:
        if isinstance(value, list):
            part, found = _detached(value)
            detached.append(part)
            tensors += found
            continue
        if isinstance(value, Tensor):
            value = value.detach()
            if value.dim() > 1:
                tensors.append(value)
        detached.append(value)
    return detached, tensors


def _token_axis(tensor: Tensor) -> int:
    """The axis of the tokens in (tokens, width) or (..., tokens, heads, head width)."""
    return max(tensor.dim() - 3, 0)


def _operation(function: Callable[..., Any], name: str, signature: str) -> Any:
    """Register a compiled function as an operation; under fake tensors the function itself gives the shapes."""
    path = f"esm_efficient::{name}"
    torch.library.define(path, signature)
    COMPILED.append(Compiled(function))
    torch.library.impl(path, "CompositeExplicitAutograd", COMPILED[-1])
    torch.library.register_fake(path, function)
    return getattr(torch.ops.esm_efficient, name).default


FUSED = Elementwise(
    norm=_operation(
        norm,
        "norm",
        "(Tensor x, Tensor? weight, Tensor? bias, float eps, ScalarType dtype) -> (Tensor, Tensor, Tensor)",
    ),
    norm_backward=_operation(
        norm_backward,
        "norm_backward",
        "(Tensor gradient, Tensor x, Tensor mean, Tensor deviation, Tensor? weight, Tensor? bias, Tensor? residual, "
        "Tensor(a!)? out, bool needs_weight, bool needs_bias) -> Tensor[]",
    ),
    gelu_backward=_operation(gelu_backward, "gelu_backward", "(Tensor(a!) gradient, Tensor inner) -> Tensor"),
    rotate=_operation(rotate_real, "rotate", "(Tensor[] states, Tensor rotation, bool back) -> Tensor[]"),
)
"""The functions of `EAGER` as compiled operations; `rotate` returns new tensors."""
