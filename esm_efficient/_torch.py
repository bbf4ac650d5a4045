"""Private names of torch, in one place.

Each docstring says what breaks without the function, and a test fails when a release drops what it uses.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch

# The base class of the modes that see every operation; without it neither memory on a CPU nor FLOPs could be counted.
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode

if TYPE_CHECKING:
    from torch import Tensor, nn

# --- encoder ---

HOOK_DICTIONARIES = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""The dictionaries of a module's hooks. Without them a hook inside a layer would see packed tokens unnoticed."""


def hooks_of(module: nn.Module) -> Sequence[Any]:
    """Return the hooks that are registered on a module."""
    members = module.__dict__
    if not any(map(members.get, HOOK_DICTIONARIES)):
        return ()
    return [hook for name in HOOK_DICTIONARIES for hook in (members.get(name) or {}).values()]


@contextmanager
def without_hooks(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Take the hooks of tensors' gradients away in a ``with`` block; without it they would be called twice."""
    hooks = [(tensor._backward_hooks, dict(tensor._backward_hooks)) for tensor in tensors if tensor._backward_hooks]
    for current, _ in hooks:
        current.clear()
    try:
        yield
    finally:
        for current, kept in hooks:
            current.update(kept)


def source_of(function: Any) -> str:
    """Return the name of the module that defines a function, which decorators and assignments do not change."""
    return getattr(function, "__globals__", {}).get("__name__") or type(function).__module__


def undecorated(function: Any) -> Any:
    """Return a function without the decorators of transformers, accelerate and torch, which keep what it computes.

    accelerate, for example, decorates a model's forward under autocast.
    """
    function = getattr(function, "__func__", function)
    while source_of(function).startswith(("transformers.", "accelerate.", "torch.")):
        wrapped = getattr(function, "__wrapped__", None)
        if wrapped is None:
            break
        function = getattr(wrapped, "__func__", wrapped)
    return function


def tree_of(module: nn.Module) -> tuple[list[Any], list[nn.Module]]:
    """Return the names and classes of the modules below a module, and those that have hooks or a forward of their own.

    Two modules with equal names and classes have the same structure. Without it every forward pass would use
    ``named_modules()``, which builds paths and is several times slower.
    """
    tree, changed = list[Any](), list[torch.nn.Module]()
    waiting = [module]
    while waiting:
        children = waiting.pop()._modules
        tree += children
        for child in children.values():
            tree.append(child.__class__)
            if child is not None:
                members = child.__dict__
                if "forward" in members or any(map(members.get, HOOK_DICTIONARIES)):
                    changed.append(child)
                waiting.append(child)
    return tree, changed


def child_of(module: nn.Module | None, *path: str) -> Any:
    """Return a module below another, or None if there is none at the path.

    Without it every forward pass would use ``get_submodule``, which is slower and fails at a missing module.
    """
    for name in path:
        module = None if module is None else module._modules.get(name)
    return module


def version_of(tensor: Tensor) -> int:
    """Return how often a tensor was changed in place; 0 for a tensor that does not count it.

    Without it, a changed rotary frequency would be noticed only by comparing values, for which a GPU has to wait.
    """
    return 0 if tensor.is_inference() else tensor._version


def uncompiled(function: Callable[..., Any]) -> Any:
    """Keep torch.compile from tracing a function of the lean encoder, and say why where it cannot go on without it.

    torch before 2.7 takes no reason. Without it, torch.export would fail with the name of a function only.
    """
    reason = (
        "the lean encoder runs uncompiled and cannot be exported: call remove_lean_encoder(model) before torch.export "
        "or fullgraph=True"
    )
    takes_reason = "reason" in inspect.signature(torch.compiler.disable).parameters
    options: dict[str, Any] = {"reason": reason} if takes_reason else {}
    return torch.compiler.disable(function, **options)


def exporter() -> str:
    """Return the name of the tool that is tracing the current call for export; empty if none is.

    torch 2.6 cannot tell torch.export from torch.compile. Without it, ``torch.jit.trace`` would record the lengths of
    its example batch, and answer wrongly for any other.
    """
    if torch.jit.is_tracing():
        return "torch.jit.trace"
    is_exporting = getattr(torch.compiler, "is_exporting", None)
    return "torch.export" if is_exporting is not None and is_exporting() else ""


def global_hooks() -> list[Any]:
    """Return the hooks that torch runs for every module.

    torch has functions that add such hooks, and none that lists them. Without it, these hooks would see packed tokens,
    or modules that the lean encoder does not run.
    """
    from torch.nn.modules import module

    kinds = ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks")
    return [hook for name in (*kinds, "_global_backward_pre_hooks") for hook in getattr(module, name, {}).values()]


def transform() -> str:
    """Return the name of the transformation of torch.func or of forward-mode autograd that runs; empty if none does.

    Without it, the lean encoder's autograd Functions would fail with the name of a method that they lack.
    """
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "torch.func"
    return "forward-mode autograd" if torch.autograd.forward_ad._current_level >= 0 else ""


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor is a fake tensor, which has no values; without it a training step could not be simulated."""
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(tensor, FakeTensor)


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy tensors into others, converting dtypes.

    Without the private function, a GPU would launch one kernel per tensor instead of one for all.
    """
    if len(targets) == 1:
        targets[0].copy_(sources[0])
    elif targets:
        torch._foreach_copy_(list(targets), list(sources))


def cpu_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Call torch's fused CPU attention.

    Without it attention on a CPU would go through autograd, which copies queries, keys and values.

    Args:
        query: shape (sequences, heads, queries, head width).
        key: shape (sequences, heads, tokens, head width).
        value: the same shape.
        scale: factor of the scores.

    Returns:
        The result in the shape of `query`, and the logsumexp of the scores, which the backward pass needs.
    """
    forward, _ = cpu_attention_operations()
    return forward(query, key, value, 0.0, False, scale=scale)


def cpu_attention_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, result: Tensor, logsumexp: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value of `cpu_attention`, which has no backward pass without it."""
    _, backward = cpu_attention_operations()
    return backward(gradient, query, key, value, result, logsumexp, 0.0, False, scale=scale)


def has_flex_attention() -> bool:
    """Whether torch's flex attention can be trained under torch.compile; that of torch 2.6 cannot."""
    major, minor = torch.__version__.split(".")[:2]
    return (int(major), int(minor)) >= (2, 7)


def varlen_efficient_attention(query: Tensor, key: Tensor, value: Tensor, *boundaries: Any, scale: float) -> Tensor:
    """Attention by CUDA's memory-efficient kernel for packed sequences, with a gradient.

    It runs on GPUs of any age and in float32, where the public function for packed sequences does not: without it,
    attention there would take one call per distinct length.

    Args:
        query: of shape (queries, heads, head width).
        key: of shape (keys, heads, head width).
        value: like `key`.
        *boundaries: cu_seqlens of the queries and of the keys, and the longest of each.
        scale: factor of the scores.
    """
    needs_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
    batched, options = (query[None], key[None], value[None], None), (0.0, 0, needs_gradient)
    return torch.ops.aten._efficient_attention_forward(*batched, *boundaries, *options, scale=scale)[0][0]


def create_block_mask(mask: Callable[..., Tensor], queries: int, keys: int, device: torch.device) -> Any:
    """Make a block mask of flex attention, for all sequences and heads.

    The private option compiles it on CUDA; without it the mask would need a matrix of queries and keys in memory.
    """
    from torch.nn.attention import flex_attention

    compiled = device.type == "cuda"
    return flex_attention.create_block_mask(mask, None, None, queries, keys, device=str(device), _compile=compiled)


def mark_dynamic(tensor: Tensor, axis: int) -> None:
    """Tell torch.compile that an axis has another length in every call.

    Without it, the first two lengths would be compiled one by one.
    """
    torch._dynamo.maybe_mark_dynamic(tensor, axis)


def compile_errors() -> tuple[type[Exception], ...]:
    """Return the errors of torch.compile itself; without them, errors of the compiled function would be caught too."""
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    return TorchDynamoException, FailOnRecompileLimitHit


# --- costs ---


def storage_key(storage: torch.UntypedStorage) -> int:
    """Return the address of the C++ storage, which all tensors that share memory have in common.

    Without it, views would be counted as memory of their own.
    """
    return storage._cdata


def operation_of(overload: Any) -> Any:
    """Return the operation that an overload belongs to.

    torch's table of FLOP formulas has operations as keys; without it every formula would be needed per overload.
    A higher-order operator, such as flex attention, has no overloads.
    """
    return getattr(overload, "_overloadpacket", overload)


def with_flex_attention(mode: type[TorchDispatchMode]) -> type[TorchDispatchMode]:
    """Let a dispatch mode see flex attention as an operation.

    Without it, flex attention raises under the mode, and torch.compile leaves it uncompiled while the mode is active.
    """
    from torch._higher_order_ops.flex_attention import flex_attention, flex_attention_backward

    operations: Any = (flex_attention, flex_attention_backward)
    for operation in operations:
        operation.py_impl(mode)(lambda mode, *args, op=operation, **kw: mode.__torch_dispatch__(op, (), args, kw))
    # mypy knows a bound method of the class, and a classmethod becomes one when it is read.
    mode.ignore_compile_internals = classmethod(lambda cls: True)  # type: ignore[assignment]
    return mode


def cpu_attention_operations() -> tuple[Any, Any]:
    """Return the CPU's attention kernel and its backward pass.

    torch's FLOP counter has no formulas for the two; without them, FLOPs on a CPU would leave attention out.
    """
    aten = torch.ops.aten
    return aten._scaled_dot_product_flash_attention_for_cpu, aten._scaled_dot_product_flash_attention_for_cpu_backward


# --- estimation ---


def fake_tensor_mode() -> AbstractContextManager[Any]:
    """Return a mode in which tensors have shapes and dtypes and no numbers.

    Without it, a step could be simulated on meta tensors only, and these do not follow a device's dtype rules.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode()


def real_tensors() -> AbstractContextManager[Any]:
    """Leave fake tensor mode for a ``with`` block, which gets the mode or None.

    Without it, tables that an optimizer computes once, such as quantisation maps, could not be computed under the mode.
    """
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    return unset_fake_temporarily()


def run_backward(loss: Tensor) -> None:
    """Do what ``loss.backward()`` does, and keep function modes active while layers are recomputed.

    ``Tensor.backward`` disables function modes for its whole call, so that the attention kernels of recomputed layers
    would be those of the CPU.
    """
    torch.autograd.Variable._execution_engine.run_backward(
        (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


_NO_KERNELS = frozenset(
    ("_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_")
)
"""Operations of aten without a kernel that are no views by torch's schema: one view, and allocations."""


def is_kernel(operation: Any) -> bool:
    """Return whether an operation runs a kernel on a device; views, questions and allocations do not.

    Without the namespace and the names of operations, ``tensor.device`` would be charged for a launch, and every matrix
    product for a copy of its result.
    """
    return (
        operation.namespace != "prim"
        and not operation.is_view
        and not (operation.namespace == "aten" and operation_of(operation).__name__ in _NO_KERNELS)
    )


def math_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, scale: float | None
) -> Tensor:
    """Scaled dot-product attention composed of matrix products, as Apple's GPUs run it.

    Without this name and those of the next three functions, a step could not be simulated for another device: the
    public function chooses the kernel of the CPU.
    """
    return torch.ops.aten._scaled_dot_product_attention_math(query, key, value, mask, dropout, scale=scale)[0]


def flash_attention(query: Tensor, key: Tensor, value: Tensor, dropout: float, scale: float | None) -> Tensor:
    """Scaled dot-product attention by CUDA's flash kernel; see `math_attention`."""
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, dropout, scale=scale)[0]


def efficient_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, dropout: float, scale: float | None
) -> Tensor:
    """Scaled dot-product attention by CUDA's memory-efficient kernel; see `math_attention`."""
    needs_gradient = any(tensor.requires_grad for tensor in (query, key, value))
    attention = torch.ops.aten._scaled_dot_product_efficient_attention
    return attention(query, key, value, bias, needs_gradient, dropout, scale=scale)[0]


def varlen_flash_attention(query: Tensor, key: Tensor, value: Tensor, *options: Any, scale: float) -> Tensor:
    """Attention by CUDA's flash kernel for packed sequences; see `math_attention`.

    Args:
        query: of shape (queries, heads, head width).
        key: of shape (keys, heads, head width).
        value: like `key`.
        *options: cu_seqlens of the queries and of the keys, the longest of each, dropout, whether the attention is
            causal, and whether to return the mask of the dropout.
        scale: factor of the scores.
    """
    return torch.ops.aten._flash_attention_forward(query, key, value, *options, scale=scale)[0]


# --- profiling ---


def call_after_backward(callback: Callable[[], None]) -> None:
    """Call a function when the backward pass that runs now has ended; only its hooks may ask for that.

    Without it, the end of the backward pass would be found at the optimizer's step, and clipping counted as backward.
    """
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def is_innermost(mode: TorchDispatchMode) -> bool:
    """Return whether a mode was entered last of those that are active, so that leaving it leaves this one.

    Without it, a mode of the user's that overlaps with one of the profiler's would make its figures wrong unnoticed.
    """
    return torch.utils._python_dispatch._get_current_dispatch_mode() is mode
