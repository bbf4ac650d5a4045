"""The tensors of a linear layer, whose weight may be quantised."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from esm_efficient.encoder.low_rank import Adapter


class Packed(NamedTuple):
    """What a quantised weight stands for.

    Attributes:
        shape: outputs and inputs of the layer.
        dtype: the dtype in which the layer computes without autocast.
        restore: returns the weight of this shape, from the tensor that holds it.
    """

    shape: torch.Size
    dtype: torch.dtype
    restore: Callable[[Tensor], Tensor]


class Linear(NamedTuple):
    """A linear layer: weight of shape (outputs, inputs), bias of shape (outputs,), adapters.

    A quantised weight has another shape, and `packed` says what it stands for. It is frozen.
    """

    weight: Tensor
    bias: Tensor | None = None
    adapters: tuple[Adapter, ...] = ()
    packed: Packed | None = None

    @property
    def shape(self) -> torch.Size:
        """Outputs and inputs."""
        return self.weight.shape if self.packed is None else self.packed.shape

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the layer computes without autocast."""
        return self.weight.dtype if self.packed is None else self.packed.dtype

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """Return the weight; a quantised one is restored in a dtype."""
        return self.weight if self.packed is None else self.packed.restore(self.weight).to(dtype)
