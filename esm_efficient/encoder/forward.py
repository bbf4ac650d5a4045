"""The forward passes of a model, its encoder and its layers while the lean encoder is applied."""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn

from esm_efficient import _torch, compat
from esm_efficient._torch import undecorated
from esm_efficient.encoder.layer import Recompute, run_layer
from esm_efficient.encoder.origins import is_known_embedding, reads_first_token
from esm_efficient.encoder.packing import Packing, attached_packing, make_packing
from esm_efficient.encoder.reading import CONVERSION_ADVICE, frozen_conversion, trainable_tensors
from esm_efficient.encoder.structure import (
    Structure,
    check_structure,
    esm_layers,
    has_foreign_hooks,
    is_harmless,
    path_of,
)
from esm_efficient.errors import ConfigurationError

logger = logging.getLogger(__name__)

SUPPORTED_ARGUMENTS = frozenset(
    ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "return_dict", "use_cache")
)
"""Forward arguments that the lean encoder supports or may ignore; any other makes the call run as in transformers."""
LEAN_ATTRIBUTES = ("_lean_state", "forward", "__getstate__", compat.ATTENTION_MASKS_METHOD)
"""The attributes that the lean encoder sets on modules."""


@dataclass
class LeanState:
    """The options of a model's lean encoder.

    Attributes:
        recompute: one of `RECOMPUTES`.
        attention: one of `BACKENDS`.
        fused: whether torch.compile fuses the elementwise functions.
        structure: what was found about the model's parts; None before the first call.
        logged: messages that were logged.
    """

    recompute: Recompute
    attention: str
    fused: bool = False
    structure: Structure | None = None
    logged: set[str] = field(default_factory=set)

    def log_once(self, message: str, *args: Any, level: int = logging.INFO) -> None:
        """Log a message, but only once per model."""
        text = message % args
        if text not in self.logged:
            self.logged.add(text)
            logger.log(level, text)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what was found about the parts, because a copy has other parts."""
        return vars(self) | {"structure": None}


class _CopiedState(dict[str, Any]):
    """The attributes of a module for copies and pickles of it.

    A shallow copy is a plain module, because the lean encoder's functions would compute with the original. Deep copies
    and pickles keep the lean encoder.
    """

    def __init__(self, module: nn.Module) -> None:
        self.attributes = dict(vars(module))
        super().__init__({name: value for name, value in self.attributes.items() if name not in LEAN_ATTRIBUTES})

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        return copy.deepcopy(self.attributes, memo)

    def __reduce__(self) -> Any:
        return dict, (), None, None, iter({name: _picklable(value) for name, value in self.attributes.items()}.items())


class _PicklableMethod:
    """A method that is pickled by its function and not, as usual, by its name in the object."""

    def __init__(self, function: Callable[..., Any], module: nn.Module) -> None:
        self.arguments = function, module

    def __reduce__(self) -> Any:
        return _method, self.arguments


def _method(function: Callable[..., Any], module: nn.Module) -> MethodType:
    return MethodType(function, module)


def _picklable(value: Any) -> Any:
    """Make a function of this file picklable as a method; decorators that accelerate sets for autocast are dropped."""
    functions = (model_forward, skip_attention_masks, encoder_forward, layer_forward)
    own = [function for function in functions if undecorated(value) is undecorated(function)]
    return _PicklableMethod(own[0], cast(Any, value.__self__)) if own and isinstance(value, MethodType) else value


def bind(module: nn.Module, function: Callable[..., Any], name: str = "forward") -> None:
    """Set a function of this file as a module's method, unless the module has it or another one of its own."""
    own = vars(module).get(name)
    if own is not None and (getattr(own, "__func__", None) is not function or own.__self__ is module):
        return
    setattr(module, name, MethodType(function, module))
    # On the instance, so that copy and pickle, which look it up there, know that the method is bound to this module.
    module.__getstate__ = partial(_CopiedState, module)  # type: ignore[method-assign]


def is_bound(module: Any) -> bool:
    """Whether a module's forward is one of this file, bound to the module."""
    own = vars(module).get("forward")
    return getattr(own, "__func__", None) in (model_forward, encoder_forward, layer_forward) and own.__self__ is module


@dataclass
class _LeanCall:
    """A forward pass that uses the lean encoder.

    Attributes:
        esm: the ``EsmModel``.
        layers: its layers.
        packing: where the batch has tokens.
        position_ids: its position ids.
        detach: whether no gradient is needed below the encoder.
        first_only: whether only the first token of each sequence is read afterwards.
    """

    esm: Any
    layers: list[Any]
    packing: Packing
    position_ids: Tensor | None
    detach: bool
    first_only: bool


class _ThreadState(threading.local):
    """The forward pass that a thread is running, and the ``EsmModel`` whose classifier reads only first tokens."""

    call: _LeanCall | None = None
    first_only_esm: Any = None


_thread = _ThreadState()


def esm_models(model: nn.Module) -> Iterator[Any]:
    """Yield the ``EsmModel`` modules of a model."""
    from transformers import EsmModel

    return (module for module in model.modules() if isinstance(module, EsmModel))


@_torch.uncompiled
def before_classifier(model: Any, inputs: Any) -> None:
    """Note that only first tokens are needed, if the head reads only these and no hook sees the others."""
    model = _torch.child_of(model, "model") or model  # the model in a tuner of peft
    observed = (model.esm, model.esm.encoder, *model.classifier.modules())
    if reads_first_token(model) and not any(map(_is_observed, observed)):
        _thread.first_only_esm = model.esm


@_torch.uncompiled
def after_classifier(model: Any, inputs: Any, output: Any) -> None:
    """Remove the note of `before_classifier`, also after a forward pass that failed."""
    _thread.first_only_esm = None


@contextmanager
def first_tokens_alone(esm: Any) -> Iterator[None]:
    """Let the next forward pass of an ``EsmModel`` compute the last layer for the first token of each sequence alone.

    All other tokens of its result are zero if it has the lean encoder.
    """
    _thread.first_only_esm = esm
    try:
        yield
    finally:
        _thread.first_only_esm = None


@_torch.uncompiled
def model_forward(
    esm: Any,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """Run EsmModel.forward with the lean encoder if it supports the call, otherwise as in transformers."""
    first_only = _thread.first_only_esm is esm
    _thread.first_only_esm = None  # so that a call that is interrupted does not affect the next one
    _refuse_export()
    _refuse_data_parallel(esm, input_ids if inputs_embeds is None else inputs_embeds)
    arguments = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "position_ids": position_ids,
        "inputs_embeds": inputs_embeds,
        "encoder_hidden_states": encoder_hidden_states,
        "encoder_attention_mask": encoder_attention_mask,
        **kwargs,
    }
    layers = esm_layers(esm)
    applied = "_lean_state" in vars(esm)  # a wrapper of this function may remain when the lean encoder is removed
    call = _lean_call(esm, layers, arguments, first_only) if applied else None
    if call is None:
        compat.restore_checkpointing(layers)
        return type(esm).forward(esm, **arguments)
    _thread.call = call
    try:
        return type(esm).forward(esm, **arguments)
    finally:
        _thread.call = None


def skip_attention_masks(
    esm: Any, attention_mask: Tensor | None = None, **kwargs: Any
) -> tuple[Tensor | None, Tensor | None]:
    """Make no attention masks while the lean encoder runs, which does not use them."""
    if _thread.call is None:
        return getattr(type(esm), compat.ATTENTION_MASKS_METHOD)(esm, attention_mask=attention_mask, **kwargs)
    return None, None


def encoder_forward(encoder: Any, hidden_states: Tensor, **kwargs: Any) -> Any:
    """Run EsmEncoder.forward on packed tokens."""
    from transformers.modeling_outputs import BaseModelOutputWithCrossAttentions

    call = _thread.call
    if call is None or call.esm.encoder is not encoder:
        return type(encoder).forward(encoder, hidden_states, **kwargs)
    if call.detach and hidden_states.requires_grad:
        hidden_states = hidden_states.detach()
    exact = torch.float64 if hidden_states.dtype == torch.float64 else torch.float32
    table = compat.rotary_table(call.esm, call.position_ids, hidden_states, exact)
    packing = call.packing.with_rotation(table, exact)
    states = packing.pack(hidden_states)
    del hidden_states
    dtype = frozen_conversion(call.layers[0]) if call.esm.training and call.layers else None
    if dtype is not None:
        call.esm._lean_state.log_once(CONVERSION_ADVICE, dtype, dtype)
    last = len(encoder.layer) - 1
    compat.bypass_checkpointing(call.layers)
    for number, layer in enumerate(encoder.layer):
        first_only = call.first_only and number == last
        states = layer(states, packing=packing, first_only=first_only, state=call.esm._lean_state)
    if encoder.emb_layer_norm_after:
        states = encoder.emb_layer_norm_after(states)
    padded = packing.unpack(states, first_only=call.first_only)
    return BaseModelOutputWithCrossAttentions(last_hidden_state=padded)


@_torch.uncompiled
def layer_forward(layer: Any, hidden_states: Tensor, packing: Packing | None = None, **kwargs: Any) -> Tensor:
    """Run EsmLayer.forward on packed tokens, or as in transformers if `packing` is None."""
    if packing is None:
        return type(layer).forward(layer, hidden_states, **kwargs)
    state = kwargs["state"]
    checkpointed = layer.training and getattr(layer, "gradient_checkpointing", False)
    states, reasons = run_layer(
        layer,
        hidden_states,
        packing,
        recompute="layer" if checkpointed else state.recompute,
        backend=state.attention,
        first_only=kwargs["first_only"],
        fused=state.fused,
    )
    for reason in reasons:
        state.log_once("runs through its own forward, without padding: %s", reason)
    return states


def _refuse_export() -> None:
    exporter = _torch.exporter()
    if exporter:
        raise ConfigurationError(
            f"{exporter} would record the lengths of the example batch in the lean encoder, and compute other batches "
            "wrongly: call remove_lean_encoder(model) before it"
        )


def _refuse_data_parallel(esm: Any, tokens: Tensor | None) -> None:
    device = getattr(next(esm.parameters(), None), "device", None)
    if tokens is None or device is None or not tokens.is_cuda or device.type != "cuda" or tokens.device == device:
        return
    raise ConfigurationError(
        f"tokens are on {tokens.device}, but the model is on {device}: torch.nn.DataParallel cannot copy a lean "
        "encoder; start one process per GPU (torchrun), or call remove_lean_encoder(model) first"
    )


def _lean_call(esm: Any, layers: list[Any], arguments: dict[str, Any], first_only: bool) -> _LeanCall | None:
    """Return what a call needs to use the lean encoder, or None if it must run as in transformers; the log says why."""
    bind(esm.encoder, encoder_forward)  # a part may be new since the last call
    for layer in layers:
        bind(layer, layer_forward)
    state, transform = esm._lean_state, _torch.transform()
    reason, level = f"it runs under {transform}" if transform else _reason_in_arguments(esm, arguments), logging.INFO
    if not reason:
        tree, changed = _torch.tree_of(esm.encoder)
        reason = _reason_in_hooks(esm.encoder, changed)
    if not reason:
        state.structure = check_structure(esm, layers, tree, state.structure)
        reason, level = state.structure.reason, logging.WARNING
    if not reason:
        tokens = arguments["input_ids"] if arguments["inputs_embeds"] is None else arguments["inputs_embeds"]
        mask, shape = arguments["attention_mask"], tuple(tokens.shape[:2])
        packing = attached_packing(mask, shape) or make_packing(mask, shape)
        if (first_only or esm.pooler is not None) and not packing.begins:
            reason = "a sequence does not begin at the first column"
        elif not any(packing.lengths):
            reason = "the batch has no tokens"
        else:
            detach = arguments["inputs_embeds"] is None and not _embeddings_need_gradient(esm.embeddings)
            return _LeanCall(esm, layers, packing, arguments["position_ids"], detach, first_only)
        level = logging.INFO
    state.log_once("the lean encoder is not used in this call: %s", reason, level=level)
    return None


def _reason_in_arguments(esm: Any, arguments: dict[str, Any]) -> str:
    for name in ("output_hidden_states", "output_attentions"):
        wanted = arguments.get(name)
        if getattr(esm.config, name, False) if wanted is None else wanted is not False:
            return f"{name} was requested"
    for name, value in arguments.items():
        if value is not None and value is not False and name not in SUPPORTED_ARGUMENTS:
            return f"the argument {name} is not supported"
    if (arguments["input_ids"] is None) == (arguments["inputs_embeds"] is None):
        return "expected either input_ids or inputs_embeds"
    ids, mask = arguments["input_ids"], arguments["attention_mask"]
    shape = tuple(arguments["inputs_embeds"].shape[:-1] if ids is None else ids.shape)
    if len(shape) != 2:
        return f"the batch has the shape {shape} instead of (sequences, tokens)"
    if mask is None:
        return ""
    if mask.shape not in (shape, (1, shape[1])):
        return f"the attention mask has the shape {tuple(mask.shape)} instead of {shape}"
    return ""


def _reason_in_hooks(encoder: Any, changed: list[Any]) -> str:
    """Name a module that has hooks or a replaced forward, if there is one in or among the layers."""
    if not is_bound(encoder):
        return "the encoder has a replaced forward"
    if not all(map(is_harmless, _torch.global_hooks())):
        return "there are hooks for all modules"
    for module in changed:
        if _is_observed(module):
            path = path_of(encoder, module).removeprefix("layer.")
            name = "the last layer norm" if path == "emb_layer_norm_after" else f"layer {path}"
            return f"{name} has hooks" if has_foreign_hooks(module) else f"{name} has a replaced forward"
    return ""


def _is_observed(module: Any) -> bool:
    """Whether a module has a forward of its own, or hooks that do not work on packed tokens."""
    return has_foreign_hooks(module) or ("forward" in vars(module) and not is_bound(module))


def _embeddings_need_gradient(embeddings: Any) -> bool:
    """Whether a parameter may train below the encoder, or a hook of the embeddings may read the gradient.

    transformers adds the hook make_inputs_require_grads for reentrant checkpointing. The lean encoder does not need it.
    """
    if not is_known_embedding(embeddings) or trainable_tensors(embeddings):
        return True
    return any(
        getattr(hook, "__name__", "") != "make_inputs_require_grads"
        for module in embeddings.modules()
        for hook in _torch.hooks_of(module)
    )
