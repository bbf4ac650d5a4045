"""The forward passes of a model, its encoder and its layers while the lean encoder is applied."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from esm_efficient import _torch, compat
from esm_efficient.encoder.layer import Recompute, run_layer
from esm_efficient.encoder.packing import Packing, make_packing
from esm_efficient.encoder.reading import trainable_tensors
from esm_efficient.errors import ConfigurationError

logger = logging.getLogger(__name__)

SUPPORTED_ARGUMENTS = frozenset(
    ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "return_dict", "use_cache")
)
"""Forward arguments that the lean encoder supports or may ignore; any other makes the call run as in transformers."""
HARMLESS_HOOKS = ("torch.distributed.", "transformers.utils.output_capturing", "esm_efficient.")
"""Prefixes of modules that define hooks which work on packed tokens."""


@dataclass
class LeanState:
    """The options of a model's lean encoder, shared by the model's modules.

    Attributes:
        recompute: one of `RECOMPUTES`.
        attention: one of `BACKENDS`.
        hook_handles: handles of the hooks on the classifier around the model.
        logged: messages that were logged.
    """

    recompute: Recompute
    attention: str
    hook_handles: list[Any] = field(default_factory=list)
    logged: set[str] = field(default_factory=set)

    def log_once(self, message: str, *args: Any) -> None:
        """Log a message, but only once per model."""
        text = message % args
        if text not in self.logged:
            self.logged.add(text)
            logger.info(text)


@dataclass
class _LeanCall:
    """A forward pass that uses the lean encoder.

    Attributes:
        esm: the ``EsmModel``.
        mask: its attention mask.
        position_ids: its position ids.
        detach: whether no gradient is needed below the encoder.
        first_only: whether only the first token of each sequence is read afterwards.
    """

    esm: Any
    mask: Tensor | None
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


def esm_layers(esm: Any) -> list[Any]:
    """Return the layers of an ``EsmModel``, also if they are wrapped."""
    from transformers.models.esm.modeling_esm import EsmLayer

    return [module for module in esm.encoder.layer.modules() if isinstance(module, EsmLayer)]


@torch.compiler.disable
def before_classifier(model: Any, inputs: Any) -> None:
    """Note that only first tokens are needed, if the head reads only these and no hook sees the others."""
    observed = (model.esm, model.esm.encoder, *model.classifier.modules())
    if compat.reads_first_token(model) and not any(map(_is_observed, observed)):
        _thread.first_only_esm = model.esm


@torch.compiler.disable
def after_classifier(model: Any, inputs: Any, output: Any) -> None:
    """Remove the note of `before_classifier`, also after a forward pass that failed."""
    _thread.first_only_esm = None


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
    """Run EsmModel.forward with the lean encoder if it supports the call, otherwise as in transformers."""
    state = esm._lean_state
    first_only = _thread.first_only_esm is esm
    _thread.first_only_esm = None  # so that a call that is interrupted does not affect the next one
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
    reason = _reason_for_plain_forward(esm, arguments, first_only)
    if reason:
        state.log_once("the lean encoder is not used in this call: %s", reason)
        compat.restore_checkpointing(esm_layers(esm))
        return type(esm).forward(esm, **arguments)
    detach = inputs_embeds is None and not _embeddings_need_gradient(esm.embeddings)
    _thread.call = _LeanCall(esm, attention_mask, position_ids, detach, first_only)
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
    rows, columns, _ = hidden_states.shape
    exact = torch.float64 if hidden_states.dtype == torch.float64 else torch.float32
    table = compat.rotary_table(call.esm, call.position_ids, hidden_states, exact)
    packing = make_packing(call.mask, (rows, columns), table, exact)
    states = packing.pack(hidden_states)
    del hidden_states
    last = len(encoder.layer) - 1
    compat.bypass_checkpointing(esm_layers(call.esm))
    for number, layer in enumerate(encoder.layer):
        states = layer(states, packing=packing, first_only=call.first_only and number == last)
    if encoder.emb_layer_norm_after:
        states = encoder.emb_layer_norm_after(states)
    padded = packing.unpack(states, first_only=call.first_only)
    return BaseModelOutputWithCrossAttentions(last_hidden_state=padded)


def layer_forward(layer: Any, hidden_states: Tensor, packing: Packing | None = None, **kwargs: Any) -> Tensor:
    """Run EsmLayer.forward on packed tokens, or as in transformers if `packing` is None."""
    state = layer._lean_state
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
        state.log_once("runs through its own forward, without padding: %s", reason)
    return states


def _refuse_data_parallel(esm: Any, tokens: Tensor | None) -> None:
    device = getattr(next(esm.parameters(), None), "device", None)
    if tokens is None or device is None or not tokens.is_cuda or device.type != "cuda" or tokens.device == device:
        return
    raise ConfigurationError(
        f"tokens are on {tokens.device}, but the model is on {device}: torch.nn.DataParallel cannot copy a lean "
        "encoder; start one process per GPU (torchrun), or call remove_lean_encoder(model) first"
    )


def _reason_for_plain_forward(esm: Any, arguments: dict[str, Any], first_only: bool) -> str:
    """Return why a call must run as in transformers; empty if the lean encoder supports it."""
    for name in ("output_hidden_states", "output_attentions"):
        wanted = arguments.get(name)
        if getattr(esm.config, name, False) if wanted is None else wanted is not False:
            return f"{name} was requested"
    for name, value in arguments.items():
        if value is not None and value is not False and name not in SUPPORTED_ARGUMENTS:
            return f"the argument {name} is not supported"
    mask = arguments["attention_mask"]
    if mask is not None and mask.dim() != 2:
        return f"the attention mask has {mask.dim()} dimensions instead of 2"
    if (first_only or esm.pooler is not None) and mask is not None and not bool(mask[:, 0].all()):
        return "a sequence does not begin at the first column"
    if any(map(_is_observed, _torch.descendants(esm.encoder.layer))):
        path = next(path for path, module in esm.encoder.layer.named_modules() if _is_observed(module))
        return f"layer {path} has hooks"
    return "the last layer norm has hooks" if _is_observed(esm.encoder.emb_layer_norm_after) else ""


def _is_observed(module: Any) -> bool:
    """Whether a module's forward is replaced, or has hooks that do not work on packed tokens."""
    members = module.__dict__
    if "forward" in members and "_lean_state" not in members:
        return True
    return any(not getattr(hook, "__module__", "").startswith(HARMLESS_HOOKS) for hook in _torch.hooks_of(module))


def _embeddings_need_gradient(embeddings: Any) -> bool:
    """Whether an embedding trains or has a hook that may read the gradient.

    transformers adds the hook make_inputs_require_grads for reentrant checkpointing. The lean encoder does not need it.
    """
    if trainable_tensors(embeddings):
        return True
    return any(
        getattr(hook, "__name__", "") != "make_inputs_require_grads"
        for module in embeddings.modules()
        for hook in _torch.hooks_of(module)
    )
