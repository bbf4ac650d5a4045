"""apply_lean_encoder() and remove_lean_encoder(): put the lean encoder on a model, and take it off."""

from __future__ import annotations

from functools import partial
from typing import Any, TypeVar, cast

from torch import nn

from esm_efficient.encoder.attention import BACKENDS
from esm_efficient.encoder.forward import (
    LeanState,
    encoder_forward,
    encoders_of,
    head_begins,
    head_ends,
    layer_forward,
    layers_of,
    model_forward,
    no_masks,
    restore_checkpointing,
)
from esm_efficient.encoder.layer import RECOMPUTES, Recompute
from esm_efficient.errors import ConfigurationError

Model = TypeVar("Model", bound=nn.Module)


def apply_lean_encoder(model: Model, *, recompute: Recompute = "none", attention: str = "auto") -> Model:
    """Make an ESM-2 model compute without padding and keep less for the backward pass; loss and gradient stay the same.

    Padding is dropped behind the embeddings and comes back, as zeros, behind the last layer norm. In between, layer
    norm, query, key, value, rotary positions and LoRA are one autograd Function, the layer behind attention is a second
    and the MLP a third; they keep about ten times the width per token and layer and recompute the rest. Nothing is
    computed that nobody reads: no gradient goes below the lowest layer that trains, and where the classification head
    reads only the first token, the last layer computes only that.

    Parameters, state dict and `save_pretrained` stay as they are, and so do peft's adapters: they can be added, merged
    and removed before and after. Gradient checkpointing, asked for in any way, becomes ``recompute="layer"``. Adapters
    other than LoRA's original kind, and quantised layers, run through their own forward on the packed tokens; the log
    says so. A call that asks for hidden states or attentions, or a model with hooks inside its layers, computes as if
    nothing had been applied.

    Args:
        model: a transformers ESM-2 model with any head, with or without peft adapters. It is changed in place, and may
            be changed again to other options.
        recompute: ``"none"`` keeps the MLP's pre-activation, ``"mlp"`` recomputes it (6 times the width stay),
            ``"layer"`` keeps only each layer's input.
        attention: what computes attention within the sequences, one of `BACKENDS`.

    Returns:
        The model.

    Raises:
        ConfigurationError: the model holds no ``EsmModel``, is a decoder, its forward has been replaced, or an option
            is unknown. From a call: torch.nn.DataParallel has copied the model, or a gradient is differentiated.

    Example:
        >>> from transformers import AutoModelForSequenceClassification
        >>> from esm_efficient import apply_lean_encoder, demo_model_path
        >>> model = AutoModelForSequenceClassification.from_pretrained(demo_model_path())
        >>> model = apply_lean_encoder(model, recompute="mlp")
        >>> type(model).__name__
        'EsmForSequenceClassification'
    """
    from transformers import EsmForSequenceClassification

    if recompute not in RECOMPUTES:
        raise ConfigurationError(f"recompute={recompute!r}: expected one of {', '.join(RECOMPUTES)}")
    if attention not in BACKENDS:
        raise ConfigurationError(f"attention={attention!r}: expected one of {', '.join(BACKENDS)}")
    found = list(encoders_of(model))
    if not found:
        raise ConfigurationError(f"{type(model).__name__} holds no EsmModel of transformers")
    for esm in found:
        if esm.config.is_decoder or esm.config.add_cross_attention:
            raise ConfigurationError("a decoder or a model with cross-attention has no padding-free encoder")
    remove_lean_encoder(model)
    for esm in found:
        for module in (esm, esm.encoder, *layers_of(esm)):
            if "forward" in module.__dict__:
                raise ConfigurationError(
                    f"the forward of {type(module).__name__} has been replaced already, by accelerate's hooks or by "
                    "another library, and would be lost"
                )
    for esm in found:
        state = LeanState(recompute, attention)
        for module in (esm, esm.encoder, *layers_of(esm)):
            module._lean = state
        esm.forward = partial(model_forward, esm)
        esm._create_attention_masks = partial(no_masks, esm)
        esm.encoder.forward = partial(encoder_forward, esm.encoder)
        for layer in layers_of(esm):
            layer.forward = partial(layer_forward, layer)
    for module in model.modules():
        if isinstance(module, EsmForSequenceClassification):
            of_head: LeanState = cast(Any, module).esm._lean
            of_head.handles = [
                module.register_forward_pre_hook(head_begins),
                module.register_forward_hook(head_ends, always_call=True),
            ]
    return model


def remove_lean_encoder(model: Model) -> Model:
    """Undo `apply_lean_encoder`; a model that it was not applied to stays as it is.

    Returns:
        The model, changed in place.
    """
    for esm in encoders_of(model):
        state = esm.__dict__.get("_lean")
        if state is None:
            continue
        for handle in state.handles:
            handle.remove()
        restore_checkpointing(esm)
        for module in (esm, esm.encoder, *layers_of(esm)):
            for name in ("_lean", "forward", "_create_attention_masks"):
                module.__dict__.pop(name, None)
    return model


def has_lean_encoder(model: nn.Module) -> bool:
    """Whether `apply_lean_encoder` is in effect."""
    return any("_lean" in esm.__dict__ for esm in encoders_of(model))
