"""Adapters, gradient checkpointing, dtypes and frozen parts, in the one order that works."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from esm_efficient import compat
from esm_efficient.adapters.registry import Architecture, ends_with, find_architecture, is_unread
from esm_efficient.errors import ConfigurationError

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import nn
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


def prepare_model(
    model: PreTrainedModel,
    *,
    adapters: PeftConfig | None = None,
    head_only: bool = False,
    gradient_checkpointing: bool = False,
    use_reentrant: bool = False,
    dtype: torch.dtype | None = None,
    label_names: Sequence[str] | None = None,
) -> PreTrainedModel | PeftModel:
    """Make a model ready to train; what is asked for is done in the one order that works.

    The label names go into the config. The contact head is frozen, because no loss reads it (under distributed
    training with checkpointing an unread parameter is an error). Adapters are added. Gradient checkpointing is
    switched on together with gradients of the embeddings' output, without which reentrant checkpointing cuts every
    adapter off from its gradient. Last, what trains is put into float32 and what is frozen into `dtype`: updates
    smaller than a bfloat16 can show are lost in weights held in bfloat16.

    Args:
        model: a transformers ESM-2 model with any head. It is changed in place.
        adapters: a peft config, such as `lora_config` returns; None to train without adapters.
        head_only: freeze the encoder and train the head alone.
        gradient_checkpointing: recompute activations in the backward pass.
        use_reentrant: torch's older kind of checkpointing.
        dtype: of the frozen parameters, such as ``torch.bfloat16``; None to leave them.
        label_names: names of the classes, in the order of their ids.

    Returns:
        The model, wrapped by peft if there are adapters.

    Raises:
        ConfigurationError: the options contradict each other, or the number of label names is not the head's.
        TargetModuleError: the architecture is not in the registry.

    Example:
        >>> from transformers import AutoModelForSequenceClassification
        >>> from esm_efficient.adapters import lora_config
        >>> from esm_efficient.demo import demo_model_path
        >>> model = AutoModelForSequenceClassification.from_pretrained(demo_model_path())
        >>> model = prepare_model(model, adapters=lora_config(model), gradient_checkpointing=True)
        >>> type(model).__name__
        'PeftModelForSequenceClassification'
    """
    from peft import PeftModel, get_peft_model

    if isinstance(model, PeftModel):
        raise ConfigurationError("the model has adapters already: give prepare_model the model without them")
    if adapters is not None and head_only:
        raise ConfigurationError("adapters and head_only exclude each other: adapters train the head too")
    architecture = find_architecture(model)
    if label_names is not None:
        _name_labels(model, label_names)
    for name, parameter in model.named_parameters():
        if is_unread(architecture, name) or (head_only and not _in_head(architecture, name)):
            parameter.requires_grad_(False)
    if head_only and not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigurationError(f"{type(model).__name__} has no head to train ({', '.join(architecture.heads)})")

    prepared: PreTrainedModel | PeftModel = model if adapters is None else get_peft_model(model, adapters)
    if gradient_checkpointing:
        compat.enable_checkpointing(model, use_reentrant=use_reentrant)
        if getattr(model, "_require_grads_hook", None) is None:
            model.enable_input_require_grads()
    for parameter in prepared.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)
        elif dtype is not None and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    _align_head_inputs(prepared, architecture)

    trainable = sum(parameter.numel() for parameter in prepared.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in prepared.parameters())
    logger.info("%s of %s parameters train (%.2f %%)", f"{trainable:,}", f"{total:,}", 100 * trainable / total)
    return prepared


def _name_labels(model: PreTrainedModel, label_names: Sequence[str]) -> None:
    names = list(label_names)
    if len(set(names)) != len(names):
        raise ConfigurationError(f"label names repeat: {', '.join(names)}")
    if len(names) != model.config.num_labels:
        raise ConfigurationError(
            f"{len(names)} label names ({', '.join(names)}) for a head of {model.config.num_labels} labels: load the "
            f"model with num_labels={len(names)}"
        )
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: index for index, name in enumerate(names)}


def _in_head(architecture: Architecture, path: str) -> bool:
    return any(path.startswith(head + ".") for head in architecture.heads)


def _align_head_inputs(model: nn.Module, architecture: Architecture) -> None:
    """Let a float32 head read a bfloat16 encoder outside autocast too."""

    def to_float32(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(value.float() if value.is_floating_point() else value for value in inputs)

    if all(parameter.dtype == torch.float32 for parameter in model.parameters() if parameter.is_floating_point()):
        return
    for path, module in model.named_modules():
        if any(ends_with(path, head) for head in architecture.heads):
            # peft trains a copy of the head inside a wrapper, and keeps the copy when adapters are merged.
            copies = getattr(module, "modules_to_save", None)
            for head in [module] if copies is None else copies.values():
                if all(parameter.requires_grad for parameter in head.parameters()):
                    head.register_forward_pre_hook(to_float32)
