"""Find out whether a model computes what the lean encoder would compute in its place.

The lean encoder stands in for modules of transformers, torch and peft. It knows them by the functions of their classes.
A part that is known to compute each token by itself may have a forward of its own, and gets packed tokens. With any
other part, the whole call runs as in transformers.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

from esm_efficient import _torch, compat
from esm_efficient._torch import source_of, undecorated
from esm_efficient.encoder.origins import (
    attention_function,
    is_known_attention,
    is_own,
    is_per_token,
    replaced_functions,
)

HARMLESS_HOOKS = (
    *("torch.distributed.", "torch.utils.module_tracker", "transformers.utils.output_capturing"),
    "esm_efficient.",
)
"""Prefixes of modules that define hooks which work on packed tokens."""
PARTS = {
    (): "EsmLayer",
    ("attention",): "EsmAttention",
    ("attention", "self"): "EsmSelfAttention",
    ("attention", "output"): "EsmSelfOutput",
    ("intermediate",): "EsmIntermediate",
    ("output",): "EsmOutput",
}
"""The modules of a layer that the lean encoder replaces, and their classes in transformers."""
LEAVES = (
    ("attention", "LayerNorm"),
    ("attention", "self", "query"),
    ("attention", "self", "key"),
    ("attention", "self", "value"),
    ("attention", "output", "dense"),
    ("attention", "output", "dropout"),
    ("LayerNorm",),
    ("intermediate", "dense"),
    ("output", "dense"),
    ("output", "dropout"),
)
"""The modules of a layer that may have a forward of their own if it computes each token by itself."""
SETTINGS = (
    "scaling",
    "attention_head_size",
    "num_attention_heads",
    "all_head_size",
    "is_causal",
    "position_embedding_type",
)
"""The attributes of a self-attention that decide what it computes."""


class Structure(NamedTuple):
    """What was checked of an ``EsmModel``, and the result.

    Attributes:
        key: everything that the result depends on and that can change.
        sources: the owners and names of the functions in `key`.
        reason: why calls must run as in transformers; empty if the lean encoder knows all parts.
    """

    key: tuple[Any, ...]
    sources: tuple[tuple[Any, str], ...]
    reason: str


def esm_layers(esm: Any) -> list[Any]:
    """Return the layers of an ``EsmModel``, also if they are wrapped."""
    from transformers.models.esm.modeling_esm import EsmLayer

    layers: list[Any] = []
    for child in esm.encoder.layer.children():
        modules = (child,) if isinstance(child, EsmLayer) else child.modules()
        layers += [module for module in modules if isinstance(module, EsmLayer)]
    return layers


def check_structure(esm: Any, layers: list[Any], tree: list[Any], known: Structure | None) -> Structure:
    """Check the parts of a model, or return the earlier result if nothing has changed since.

    Args:
        esm: the ``EsmModel``.
        layers: its layers.
        tree: the names and classes in its encoder.
        known: the earlier result.
    """
    facts = _facts(esm, layers)
    if known is not None and known.key == (tree, facts, _functions(known.sources)):
        return known
    classes = {entry for entry in (*tree, *facts) if isinstance(entry, type)}
    methods = ((cls, name) for cls in classes for name in compat.REPLACED_METHODS if hasattr(cls, name))
    sources = (*methods, *replaced_functions())
    return Structure((tree, facts, _functions(sources)), sources, _reason(esm, layers))


def has_foreign_hooks(module: Any) -> bool:
    """Whether a module has hooks that do not work on packed tokens."""
    return not all(map(is_harmless, _torch.hooks_of(module)))


def is_harmless(hook: Any) -> bool:
    """Whether a hook works on packed tokens, by the module that defines it."""
    return (getattr(_function_of(hook), "__module__", "") or "").startswith(HARMLESS_HOOKS)


def _function_of(hook: Any) -> Any:
    """Return the function of a hook that `functools.partial` made."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    return hook


def path_of(root: nn.Module, module: Any) -> str:
    """Return the path of a module below another."""
    return next(path for path, found in root.named_modules() if found is module)


def _functions(sources: Iterable[tuple[Any, str]]) -> tuple[Any, ...]:
    return tuple([getattr(owner, name, None) for owner, name in sources])


def _facts(esm: Any, layers: list[Any]) -> tuple[Any, ...]:
    """What the result of a check depends on, apart from the encoder's modules and the functions of their classes."""
    config = esm.config
    facts = [
        type(esm),
        type(esm.encoder),
        type(_torch.child_of(esm, "pooler")),
        getattr(esm, "position_embedding_type", None),
        config.is_decoder,
        attention_function(config),
    ]
    attentions = [_torch.child_of(layer, "attention", "self") for layer in layers]
    for attention in attentions:
        facts += [_simple(getattr(attention, name, None)) for name in SETTINGS]
        if getattr(attention, "config", config) is not config:
            facts.append(attention_function(attention.config))
    first = None
    for module, _ in compat.rotary_modules(esm, attentions):
        frequencies = getattr(module, "inv_freq", None)
        if isinstance(frequencies, torch.Tensor):
            version = _torch.version_of(frequencies)
            first = version if first is None else first
            # Only differences count: DistributedDataParallel writes to all of them in every forward pass.
            facts += [type(module), id(frequencies), version - first, frequencies.requires_grad]
    return tuple(facts)


def _simple(value: Any) -> Any:
    """Return a number or a name as it is, and the class of anything else, which may have no equality."""
    return value if value is None or type(value) in (bool, int, float, str) else type(value)


def _reason(esm: Any, layers: list[Any]) -> str:
    """Return why the lean encoder cannot stand in for the modules of a model; empty if it can."""
    from transformers.models.esm import modeling_esm as known

    for owner, name in replaced_functions():
        if source_of(undecorated(getattr(owner, name))) != owner.__name__:
            return f"transformers' function {name} is replaced"
    if esm.config.is_decoder:
        return "the model is a decoder"
    attentions = [_torch.child_of(layer, "attention", "self") for layer in layers]
    rotary = compat.rotary_modules(esm, attentions)
    parts = [(esm, known.EsmModel), (esm.encoder, known.EsmEncoder), *rotary]
    parts += [] if esm.pooler is None else [(esm.pooler, known.EsmPooler)]
    parts += [(_torch.child_of(layer, *path), getattr(known, cls)) for layer in layers for path, cls in PARTS.items()]
    for module, cls in parts:
        if not is_own(module, cls):
            return f"{_described(esm, module)} does not compute what transformers' {cls.__name__} does"
    if type(esm.encoder.layer) is not nn.ModuleList:
        return f"the layers are in a {type(esm.encoder.layer).__name__}"
    norm = _torch.child_of(esm.encoder, "emb_layer_norm_after")
    leaves = [_torch.child_of(layer, *path) for layer in layers for path in LEAVES] + ([] if norm is None else [norm])
    unknown: list[Any] = [m for child in esm.encoder.layer for m in _wrappers(child) if not _is_known_wrapper(m)]
    for leaf in leaves:
        unknown += [part for part in ([None] if leaf is None else leaf.modules()) if not is_per_token(part)]
    if unknown:
        return f"{_described(esm, unknown[0])} is not known to compute each token by itself"
    settings = (_reason_in_settings(esm, attention, rotates=bool(rotary)) for attention in attentions)
    in_settings = next(filter(None, settings), "")
    return in_settings or _reason_in_rotation([module.inv_freq for module, _ in rotary])


def _described(esm: Any, module: Any) -> str:
    return "a missing module" if module is None else f"{path_of(esm, module) or 'the model'} ({type(module).__name__})"


def _wrappers(module: nn.Module) -> Iterable[nn.Module]:
    """Yield the modules around a layer, or all modules of what has no layer."""
    from transformers.models.esm.modeling_esm import EsmLayer

    while not isinstance(module, EsmLayer):
        yield module
        children = list(module.children())
        if len(children) != 1:
            return
        (module,) = children


def _is_known_wrapper(module: nn.Module) -> bool:
    """Whether a module around or in the place of a layer works on packed tokens."""
    if getattr(type(module), "takes_packed_tokens", False):
        return True
    return type(module).__module__.startswith("torch.distributed.") and len(list(module.children())) == 1


def _reason_in_settings(esm: Any, inner: Any, *, rotates: bool) -> str:
    function = attention_function(inner.config)
    if not is_known_attention(function):
        return f"{getattr(function, '__name__', function)} computes attention, which is not a function of transformers"
    values = {name: getattr(inner, name) for name in SETTINGS}
    known = (
        type(inner.scaling) in (int, float)
        and not inner.is_causal
        and inner.num_attention_heads * inner.attention_head_size == inner.all_head_size
        and (inner.position_embedding_type == "rotary") == rotates
        and inner.position_embedding_type == getattr(esm, "position_embedding_type", inner.position_embedding_type)
    )
    return "" if known else f"{_described(esm, inner)} has other settings than its model: {values}"


def _reason_in_rotation(frequencies: list[torch.Tensor]) -> str:
    if any(tensor.requires_grad for tensor in frequencies):
        return "rotary frequencies train"
    if len(frequencies) < 2 or _torch.is_fake(frequencies[0]):
        return ""
    equal = bool((torch.stack(frequencies) == frequencies[0]).all())
    return "" if equal else "rotary frequencies differ between the layers"
