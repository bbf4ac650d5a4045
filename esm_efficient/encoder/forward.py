"""What a model, its encoder and its layers run once the lean encoder is applied to them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from esm_efficient import compat
from esm_efficient.encoder.layer import Recompute, run_layer
from esm_efficient.encoder.packing import Packing, make_packing
from esm_efficient.encoder.reading import trainable_tensors
from esm_efficient.errors import ConfigurationError

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)

_READ = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "return_dict", "use_cache")
"""What a call may be given and the lean encoder reads, or nobody does."""
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_PASSIVE = ("torch.distributed.", "transformers.utils.output_capturing", "esm_efficient.")
"""Whose hooks may see packed tokens, or nothing at all."""


@dataclass
class _Call:
    """One forward pass through the encoder."""

    esm: Any
    mask: Tensor | None
    position_ids: Tensor | None
    detach: bool
    first_only: bool


class _UnderWay(threading.local):
    """The forward pass that is under way in a thread, and the encoder of which only first tokens will be read."""

    call: _Call | None = None
    first_only_of: Any = None


_under_way = _UnderWay()


@dataclass
class LeanState:
    """What has been applied to a model."""

    recompute: Recompute
    attention: str
    said: set[str] = field(default_factory=set)
    handles: list[Any] = field(default_factory=list)

    def say(self, message: str, *args: Any) -> None:
        """Log something once a model."""
        text = message % args
        if text not in self.said:
            self.said.add(text)
            logger.info(text)


def encoders_of(model: nn.Module) -> Iterator[Any]:
    """The ``EsmModel`` modules in a model."""
    from transformers import EsmModel

    return (module for module in model.modules() if isinstance(module, EsmModel))


def layers_of(esm: Any) -> list[Any]:
    """The layers, also where each is wrapped."""
    from transformers.models.esm.modeling_esm import EsmLayer

    return [module for module in esm.encoder.layer.modules() if isinstance(module, EsmLayer)]


@torch.compiler.disable
def head_begins(model: Any, inputs: Any) -> None:
    """Say that the head behind the encoder reads first tokens alone, if that is so and nobody else looks on."""
    watched = (model.esm, model.esm.encoder, *model.classifier.modules())
    if compat.reads_first_token(model) and not any(map(_is_hooked, watched)):
        _under_way.first_only_of = model.esm


@torch.compiler.disable
def head_ends(model: Any, inputs: Any, output: Any) -> None:
    """Forget what `head_begins` noted, however the forward pass ended."""
    _under_way.first_only_of = None


@torch.compiler.disable
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
    """EsmModel.forward, with what its encoder needs to know laid out for it."""
    state = esm._lean
    first_only = _under_way.first_only_of is esm
    _under_way.first_only_of = None  # so that no call after one that was interrupted finds it
    tokens = input_ids if inputs_embeds is None else inputs_embeds
    home = getattr(next(esm.parameters(), None), "device", None)
    if tokens is not None and home is not None and tokens.is_cuda and home.type == "cuda" and tokens.device != home:
        raise ConfigurationError(
            f"tokens on {tokens.device} for a model on {home}: torch.nn.DataParallel cannot copy a lean encoder; start "
            "one process for each GPU (torchrun), or call remove_lean_encoder(model) first"
        )
    given = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "position_ids": position_ids,
        "inputs_embeds": inputs_embeds,
        "encoder_hidden_states": encoder_hidden_states,
        "encoder_attention_mask": encoder_attention_mask,
        **kwargs,
    }
    reason = _why_plain(esm, given, first_only)
    if reason:
        state.say("the encoder computes with padding and keeps everything: %s", reason)
        restore_checkpointing(esm)
        return type(esm).forward(esm, **given)
    reads_gradient = inputs_embeds is not None or _reads_gradient(esm.embeddings)
    _under_way.call = _Call(esm, attention_mask, position_ids, not reads_gradient, first_only)
    try:
        return type(esm).forward(esm, **given)
    finally:
        _under_way.call = None


def _why_plain(esm: Any, given: dict[str, Any], first_only: bool) -> str:
    """Why a call must compute as if nothing had been applied; empty if it need not."""
    for name in ("output_hidden_states", "output_attentions"):
        wanted = given.get(name)
        if getattr(esm.config, name, False) if wanted is None else wanted is not False:
            return f"{name} was asked for"
    for name, value in given.items():
        if value is not None and value is not False and name not in _READ:
            return f"{name} was given"
    mask = given["attention_mask"]
    if mask is not None and mask.dim() != 2:
        return f"the attention mask has {mask.dim()} dimensions"
    if (first_only or esm.pooler is not None) and mask is not None and not bool(mask[:, 0].all()):
        return "a sequence does not begin at the first column"
    if any(map(_is_hooked, _descendants(esm.encoder.layer))):
        path = next(path for path, module in esm.encoder.layer.named_modules() if _is_hooked(module))
        return f"layer {path} has hooks"
    return "the last layer norm has hooks" if _is_hooked(esm.encoder.emb_layer_norm_after) else ""


def _descendants(module: Any) -> Iterator[Any]:
    """The modules below one; quicker than ``modules()``, for what is done in every call."""
    waiting = [module]
    while waiting:
        for child in waiting.pop()._modules.values():
            if child is not None:
                waiting.append(child)
                yield child


def _is_hooked(module: Any) -> bool:
    """Whether something hangs on a module that would not see what it expects."""
    members = module.__dict__
    if "forward" in members and "_lean" not in members:
        return True
    if not any(map(members.get, _HOOKS)):
        return False
    return any(
        not getattr(hook, "__module__", "").startswith(_PASSIVE)
        for kind in _HOOKS
        for hook in (members.get(kind) or {}).values()
    )


def _reads_gradient(embeddings: Any) -> bool:
    """Whether a gradient that goes as far as the embeddings is read by anyone.

    Reentrant checkpointing needs embeddings whose output requires a gradient, and transformers puts a hook on them for
    that; the lean encoder does not need it.
    """
    if trainable_tensors(embeddings):
        return True
    return any(
        getattr(hook, "__name__", "") != "make_inputs_require_grads"
        for module in embeddings.modules()
        for kind in _HOOKS
        for hook in (module.__dict__.get(kind) or {}).values()
    )


def no_masks(esm: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> tuple[Tensor | None, Tensor | None]:
    """Keep transformers from making a quadratic mask that nobody reads."""
    if _under_way.call is None:
        return type(esm)._create_attention_masks(esm, attention_mask=attention_mask, **kwargs)
    return None, None


def encoder_forward(encoder: Any, hidden_states: Tensor, **kwargs: Any) -> Any:
    """EsmEncoder.forward on packed tokens."""
    from transformers.modeling_outputs import BaseModelOutputWithCrossAttentions

    call = _under_way.call
    if call is None or call.esm.encoder is not encoder:
        return type(encoder).forward(encoder, hidden_states, **kwargs)
    if call.detach and hidden_states.requires_grad:
        hidden_states = hidden_states.detach()
    rows, columns, _ = hidden_states.shape
    exact = torch.float64 if hidden_states.dtype == torch.float64 else torch.float32
    table = compat.rotary_table(call.esm, call.position_ids, hidden_states, exact)
    packing = make_packing(call.mask, (rows, columns), table, exact)
    states = packing.pack(hidden_states)
    del hidden_states
    last = len(encoder.layer) - 1
    _route_checkpointing(call.esm)
    for number, layer in enumerate(encoder.layer):
        states = layer(states, packing=packing, first_only=call.first_only and number == last)
    if encoder.emb_layer_norm_after:
        states = encoder.emb_layer_norm_after(states)
    padded = packing.unpack(states, first_only=call.first_only)
    return BaseModelOutputWithCrossAttentions(last_hidden_state=padded)


def layer_forward(layer: Any, hidden_states: Tensor, packing: Packing | None = None, **kwargs: Any) -> Tensor:
    """EsmLayer.forward on packed tokens; as transformers has it when none are given."""
    state = layer._lean
    if packing is None:
        return type(layer).forward(layer, hidden_states, **kwargs)
    checkpointed = layer.training and getattr(layer, "gradient_checkpointing", False)
    states, reasons = run_layer(
        layer,
        hidden_states,
        packing,
        recompute="layer" if checkpointed else state.recompute,
        backend=state.attention,
        first_only=kwargs["first_only"],
    )
    for reason in reasons:
        state.say("runs through its own forward, without padding: %s", reason)
    return states


def _route_checkpointing(esm: Any) -> None:
    """Keep transformers' own checkpointing from wrapping layers that recompute by themselves."""
    for layer in layers_of(esm):
        function = getattr(layer, "_gradient_checkpointing_func", None)
        if function is not None and function is not _call:
            layer._lean_checkpoint = function
            layer._gradient_checkpointing_func = _call


def restore_checkpointing(esm: Any) -> None:
    """Undo that."""
    for layer in layers_of(esm):
        if layer.__dict__.get("_lean_checkpoint") is not None:
            layer._gradient_checkpointing_func = layer._lean_checkpoint
            del layer._lean_checkpoint


def _call(function: Any, *args: Any) -> Any:
    return function(*args)
