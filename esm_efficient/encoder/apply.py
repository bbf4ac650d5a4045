"""apply_lean_encoder() puts the lean encoder on a model, and remove_lean_encoder() takes it off."""

from __future__ import annotations

import logging
from typing import Any, TypeVar

from torch import nn

from esm_efficient import compat
from esm_efficient.encoder.attention import BACKENDS
from esm_efficient.encoder.forward import (
    LEAN_ATTRIBUTES,
    LeanState,
    after_classifier,
    before_classifier,
    bind,
    encoder_forward,
    esm_models,
    is_bound,
    layer_forward,
    model_forward,
    skip_attention_masks,
)
from esm_efficient.encoder.layer import RECOMPUTES, Recompute
from esm_efficient.encoder.structure import esm_layers
from esm_efficient.errors import ConfigurationError
from esm_efficient.tasks import base_model_of

logger = logging.getLogger(__name__)
Model = TypeVar("Model", bound=nn.Module)


def apply_lean_encoder(
    model: Model, *, recompute: Recompute = "none", attention: str = "auto", fused: bool = False
) -> Model:
    """Make an ESM-2 model compute without padding and keep fewer activations, with the same loss and gradient.

    Padding is removed after the embeddings, and added again, as zeros, after the last layer norm. In between, three
    autograd Functions compute a layer: the first computes layer norm, query, key, value, rotary positions and LoRA, the
    second the linear layer after attention, and the third the MLP. They keep about ten times the width per token and
    layer, and recompute the rest. Unused values are not computed: no gradient goes below the lowest layer that trains,
    and if the classification head reads only the first token, the last layer computes only that token.

    Parameters, state dict and `save_pretrained` do not change, and neither do peft's adapters: they can be added,
    merged and removed before and after. Gradient checkpointing, however it is enabled, becomes ``recompute="layer"``.
    Adapters other than LoRA's original form, and layers in 8 bits, run through their own forward on packed tokens, and
    the log names them. Layers that bitsandbytes holds in 4 bits are restored one at a time. A call that requests hidden
    states or attentions, and a model with hooks inside its layers, run as in transformers. So does a model that
    computes something else than transformers' ESM-2, for example by a subclass of a layer or a registered attention
    function. Every call checks that, also for changes after this function.

    Args:
        model: a transformers ESM-2 model with any head, with or without peft adapters. It is changed in place, and may
            be changed again to other options.
        recompute: ``"none"`` keeps the MLP's pre-activation; ``"mlp"`` recomputes it and keeps 6 times the width;
            ``"layer"`` keeps only each layer's input.
        attention: the attention backend, one of `BACKENDS`.
        fused: whether torch.compile makes one kernel of each layer norm with its conversions, of each sum of gradients
            with the layer norm's, of GELU with its gradient, and on CUDA of the rotary positions. The kernels are
            compiled in the first step. Where they cannot be, the log says so, and the layers run without fusion.

    Returns:
        The model.

    Raises:
        ConfigurationError: the model has no ``EsmModel``, is a decoder, has a replaced forward itself, or an option is
            unknown. Also raised by the first forward pass if the attention backend is not available on the device, by
            one under torch.nn.DataParallel, ``torch.jit.trace`` or ``torch.export``, and by a backward pass with
            ``create_graph=True``.

    Example:
        >>> from transformers import AutoModelForSequenceClassification
        >>> from esm_efficient import apply_lean_encoder, demo_model_path
        >>> model = AutoModelForSequenceClassification.from_pretrained(demo_model_path())
        >>> model = apply_lean_encoder(model, recompute="mlp")
        >>> type(model).__name__
        'EsmForSequenceClassification'
    """
    if recompute not in RECOMPUTES:
        raise ConfigurationError(f"recompute={recompute!r}: expected one of {', '.join(RECOMPUTES)}")
    if attention not in BACKENDS:
        raise ConfigurationError(f"attention={attention!r}: expected one of {', '.join(BACKENDS)}")
    models = list(esm_models(model))
    if not models:
        raise ConfigurationError(
            f"{_unsupported(model)}. Without apply_lean_encoder the model runs as it is; a recipe with encoder='lean' "
            "does this by itself"
        )
    for esm in models:
        if esm.config.is_decoder or esm.config.add_cross_attention:
            raise ConfigurationError("the lean encoder does not support a decoder or a model with cross-attention")
    remove_lean_encoder(model)
    for esm in models:
        _refuse_replaced_forward(esm)
    for esm in models:
        _replace_forward(esm, LeanState(recompute, attention, fused))
    _register_classifier_hooks(model)
    return model


def apply_lean_encoder_if_supported(model: Model, *, attention: str = "auto", fused: bool = False) -> Model:
    """Apply the lean encoder, or leave a model that it does not support as it is and say so in the log.

    Args:
        model: a model with any encoder. It is changed in place.
        attention: as `apply_lean_encoder`.
        fused: as `apply_lean_encoder`.

    Returns:
        The model.

    Raises:
        ConfigurationError: as `apply_lean_encoder`, for a model with an ``EsmModel``.
    """
    if any(True for _ in esm_models(model)):
        return apply_lean_encoder(model, attention=attention, fused=fused)
    logger.info("%s. The model runs with its own encoder", _unsupported(model))
    return model


def _unsupported(model: nn.Module) -> str:
    return (
        f"{type(base_model_of(model)).__name__} has no EsmModel of transformers: the lean encoder supports ESM-1b, "
        "ESM-1v and ESM-2 of transformers alone"
    )


def remove_lean_encoder(model: Model) -> Model:
    """Undo `apply_lean_encoder`; a model without the lean encoder stays as it is.

    Returns:
        The model, changed in place.

    Example:
        >>> from transformers import AutoModelForSequenceClassification
        >>> from esm_efficient import apply_lean_encoder, demo_model_path, has_lean_encoder, remove_lean_encoder
        >>> model = AutoModelForSequenceClassification.from_pretrained(demo_model_path())
        >>> has_lean_encoder(remove_lean_encoder(apply_lean_encoder(model)))
        False
    """
    for module in model.modules():
        for handle in vars(module).pop("_lean_hooks", ()):
            handle.remove()
    for esm in esm_models(model):
        if "_lean_state" in vars(esm):
            compat.restore_checkpointing(esm_layers(esm))
            for module in _changed_modules(esm):
                foreign = "forward" in vars(module) and not is_bound(module)
                for name in LEAN_ATTRIBUTES:
                    if not (foreign and name == "forward"):
                        vars(module).pop(name, None)
    return model


def has_lean_encoder(model: nn.Module) -> bool:
    """Whether `apply_lean_encoder` is in effect.

    Example:
        >>> from transformers import AutoModelForSequenceClassification
        >>> from esm_efficient import apply_lean_encoder, demo_model_path, has_lean_encoder
        >>> model = AutoModelForSequenceClassification.from_pretrained(demo_model_path())
        >>> has_lean_encoder(model), has_lean_encoder(apply_lean_encoder(model))
        (False, True)
    """
    return any("_lean_state" in esm.__dict__ for esm in esm_models(model))


def _changed_modules(esm: Any) -> list[Any]:
    """The modules that get another forward."""
    return [esm, esm.encoder, *esm_layers(esm)]


def _refuse_replaced_forward(esm: Any) -> None:
    if "forward" in vars(esm) and not is_bound(esm):
        raise ConfigurationError(
            f"the forward of {type(esm).__name__} has been replaced already, for example by accelerate's hooks, and "
            "the lean encoder would overwrite it: restore it first"
        )


def _replace_forward(esm: Any, state: LeanState) -> None:
    esm._lean_state = state
    bind(esm, model_forward)
    bind(esm, skip_attention_masks, compat.ATTENTION_MASKS_METHOD)
    bind(esm.encoder, encoder_forward)
    for layer in esm_layers(esm):
        bind(layer, layer_forward)


def _register_classifier_hooks(model: nn.Module) -> None:
    from peft.tuners.tuners_utils import BaseTuner
    from transformers import EsmForSequenceClassification

    for module in model.modules():
        # peft 0.18 calls the forward of the model in a tuner, which runs no hook of the model.
        inner = module.model if isinstance(module, BaseTuner) else module
        if isinstance(inner, EsmForSequenceClassification):
            classifier: Any = module
            classifier._lean_hooks = [
                module.register_forward_pre_hook(before_classifier),
                module.register_forward_hook(after_classifier, always_call=True),
            ]
