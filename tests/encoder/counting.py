"""Count the kernels that a GPU would run, and the bytes that its elementwise kernels would move.

Operations run under fake tensors: their shapes and dtypes are those of the real computation, and nothing is computed.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from esm_efficient._torch import is_kernel

aten = torch.ops.aten
NO_KERNEL = {
    torch.ops.prim.device.default,
    aten.promote_types.default,
    aten.detach.default,
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.empty_strided.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
}
"""Operations that neither read nor write memory, apart from views."""
PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm", "_flash_attention_forward", "_flash_attention_backward")
"""Matrix products and attention, whose traffic is not elementwise."""
OVERWRITING = ("copy_", "fill_", "zero_", "_foreach_copy_")
"""Operations that write to their first argument without reading it."""


class KernelCounter(TorchDispatchMode):
    """Counts kernels and the bytes that elementwise kernels read and write.

    Attributes:
        kernels: number of kernels by operation.
        moved: bytes that elementwise kernels read and write.
    """

    def __init__(self):
        super().__init__()
        self.kernels = Counter()
        self.moved = 0

    @property
    def total(self):
        return sum(self.kernels.values())

    @property
    def elementwise(self):
        return self.total - sum(self.kernels[name] for name in PRODUCTS)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not is_kernel(func) or func in NO_KERNEL:
            return result
        name = func._overloadpacket.__name__
        self.kernels[name] += 1
        if name not in PRODUCTS:
            self.moved += bytes_of(read_by(func, args, kwargs)) + bytes_of(written_by(func, args, kwargs, result))
        return result


def read_by(func, args, kwargs):
    """Return the arguments that an operation reads."""
    if func._overloadpacket.__name__ in OVERWRITING:
        args = args[1:]
    values = list(zip([argument.name for argument in func._schema.arguments], args, strict=False))
    return [value for name, value in [*values, *kwargs.items()] if name not in ("out", "grad_input")]


def written_by(func, args, kwargs, result):
    """Return what an operation writes: its results, and the arguments that it overwrites and does not return."""
    if func._overloadpacket.__name__ == "_foreach_copy_":
        return args[0]
    arguments = func._schema.arguments
    values = dict(zip([argument.name for argument in arguments], args, strict=False)) | kwargs
    changed = [values.get(a.name) for a in arguments if a.alias_info is not None and a.alias_info.is_write]
    return [result, *(value for value in changed if func.namespace == "esm_efficient")]


def bytes_of(value):
    """Return the bytes of the tensors in a value; an element that is repeated by a stride of 0 counts once."""
    if isinstance(value, Tensor):
        sizes = [size for size, stride in zip(value.shape, value.stride(), strict=True) if stride]
        return torch.Size(sizes).numel() * value.element_size()
    if isinstance(value, dict):
        value = value.values()
    return sum(map(bytes_of, value)) if not isinstance(value, (str, bytes)) and hasattr(value, "__iter__") else 0
