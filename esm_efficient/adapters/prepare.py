"""Prepare a model for training: adapters, gradient checkpointing, dtypes and frozen parts, in the right order."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from esm_efficient import compat
from esm_efficient.adapters.quantization import count_parameters, is_quantized, usual_layout
from esm_efficient.adapters.registry import (
    Architecture,
    encoder_layers,
    ends_with,
    find_architecture,
    is_in_head,
    is_inside,
    is_unread,
)
from esm_efficient.errors import ConfigurationError
from esm_efficient.recipes import select_layers
from esm_efficient.saving import without_deprecation

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import nn
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

EXPECTATION = "_expected_to_train"
"""The attribute of a prepared model with the names of its trainable parameters, all of which must train."""

_POOLER = "pooler"


def prepare_model(
    model: PreTrainedModel,
    *,
    adapters: PeftConfig | None = None,
    head_only: bool = False,
    layers: str | Sequence[int] = "all",
    gradient_checkpointing: bool = False,
    use_reentrant: bool = False,
    dtype: torch.dtype | None = None,
    label_names: Sequence[str] | None = None,
) -> PreTrainedModel | PeftModel:
    """Prepare a model for training, with all steps in the order that works.

    1. The label names are written into the config.
    2. The contact head is frozen, because no loss uses it. In distributed training with checkpointing, a trainable
       parameter without a gradient is an error.
    3. Adapters are added.
    4. Gradient checkpointing is switched on, and the embeddings' output requires a gradient. Otherwise reentrant
       checkpointing computes no gradient for any adapter.
    5. Trainable parameters become float32 and frozen ones `dtype`. A bfloat16 weight loses small updates.

    Args:
        model: a transformers ESM-2 model with any head, also with linear layers that bitsandbytes has quantised. It is
            changed in place.
        adapters: a peft config, such as `lora_config` returns; None to train without adapters. Those of EVA
            (``init_lora_weights="eva"``) have no values until ``peft.initialize_lora_eva_weights`` gives them some.
        head_only: freeze the encoder and train only the head.
        layers: without adapters, the encoder layers that train, as `esm_efficient.recipes.select_layers` reads them;
            the embeddings train only with all. Ignored with `head_only` and with adapters, which have their own layers
            (`lora_config`).
        gradient_checkpointing: recompute activations in the backward pass.
        use_reentrant: use torch's older kind of checkpointing.
        dtype: type of the frozen parameters, such as ``torch.bfloat16``; None leaves them unchanged.
        label_names: names of the classes, in the order of their ids.

    Returns:
        The model, wrapped by peft if there are adapters.

    Raises:
        ConfigurationError: the model has adapters already, `adapters` and `head_only` are given together, the model has
            no head to train alone or no such layers, or the number of label names does not fit the head.
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
        raise ConfigurationError("the model has adapters already: pass the model without them")
    if adapters is not None and head_only:
        raise ConfigurationError("adapters and head_only exclude each other: adapters train the head too")
    architecture = find_architecture(model)
    if label_names is not None:
        _name_labels(model, label_names)
    for module in filter(is_quantized, model.modules()):
        usual_layout(module)
    freeze(model, head_only=head_only, layers="all" if adapters is not None else layers)
    prepared: PreTrainedModel | PeftModel = model
    if adapters is not None:
        with _weights_as_float32(model, architecture, adapters), without_deprecation():
            # Matrices that wait for data have no values until then: nothing trains by mistake without them.
            prepared = get_peft_model(model, adapters, low_cpu_mem_usage=needs_data(adapters))
        for name, parameter in prepared.named_parameters():
            if is_unread(architecture, name):  # peft unfreezes the biases of all modules for bias="all"
                parameter.requires_grad_(False)
    if gradient_checkpointing:
        compat.enable_checkpointing(model, use_reentrant=use_reentrant)
        compat.require_input_gradients(model)
    # torch normalises with a weight and a bias of one dtype.
    beside = {id(m.weight) for m in prepared.modules() if isinstance(m, torch.nn.LayerNorm) and _trains(m.bias)}
    for parameter in prepared.parameters():
        if parameter.requires_grad or id(parameter) in beside:
            parameter.data = parameter.data.to(torch.float32)
        elif dtype is not None and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    _align_head_inputs(prepared, architecture)

    # A head may read the pooler or not.
    names = [name for name, parameter in prepared.named_parameters() if parameter.requires_grad]
    setattr(prepared, EXPECTATION, frozenset(name for name in names if _POOLER not in name.split(".")))
    trainable = count_parameters(parameter for parameter in prepared.parameters() if parameter.requires_grad)
    total = count_parameters(prepared.parameters())
    logger.info("%s of %s parameters train (%.2f %%)", f"{trainable:,}", f"{total:,}", 100 * trainable / max(total, 1))
    return prepared


def _trains(parameter: nn.Parameter | None) -> bool:
    return parameter is not None and parameter.requires_grad


def freeze(model: nn.Module, *, head_only: bool = False, layers: str | Sequence[int] = "all") -> None:
    """Freeze the parameters that do not train without adapters.

    Args:
        model: the model, changed in place.
        head_only: whether the head trains alone.
        layers: the encoder layers that train, as `prepare_model` takes them.

    Raises:
        ConfigurationError: the head is to train alone, and the model has none.
        TargetModuleError: the architecture is not in the registry.
    """
    architecture = find_architecture(model)
    if not head_only and layers != "all":
        _freeze_below(model, architecture, layers)
    for name, parameter in model.named_parameters():
        if is_unread(architecture, name) or (head_only and not is_in_head(architecture, name)):
            parameter.requires_grad_(False)
    if head_only and not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigurationError(
            f"{type(model).__name__} has no head to train: expected {', '.join(architecture.heads)}"
        )


@contextmanager
def _weights_as_float32(model: nn.Module, architecture: Architecture, adapters: Any) -> Iterator[None]:
    """Show peft float32 weights in place of those in half precision, in a ``with`` block.

    peft converts new adapters to the dtype of their weights, and later to float32, so that their first values would be
    rounded. The shown weights have no values. Where peft reads or copies weights, they stay as they are.
    """
    copied = (*architecture.heads, *(getattr(adapters, "modules_to_save", None) or ()))
    hidden = [
        (parameter, parameter.data)
        for name, parameter in model.named_parameters()
        if parameter.dtype in (torch.bfloat16, torch.float16) and not is_inside(name, copied)
    ]
    if not is_independent(adapters):
        hidden = []
    for parameter, data in hidden:
        parameter.data = torch.zeros((), device=data.device).expand(data.shape)
    try:
        yield
    finally:
        for parameter, data in hidden:
            parameter.data = data


def is_independent(adapters: Any) -> bool:
    """Return whether the first values of adapters do not depend on the model's weights, as in LoRA's original form."""
    from peft import LoraConfig

    return (
        type(adapters) is LoraConfig
        and not adapters.use_dora
        and adapters.init_lora_weights in (True, False, "gaussian")
    )


def needs_data(adapters: Any) -> bool:
    """Return whether the first values of adapters come from data (EVA), which peft leaves to its caller."""
    return getattr(adapters, "init_lora_weights", None) == "eva"


def _freeze_below(model: nn.Module, architecture: Architecture, layers: str | Sequence[int]) -> None:
    """Freeze the embeddings and the layers that were not chosen; what comes after the last layer trains."""
    blocks = encoder_layers(model)
    chosen = select_layers(layers, len(blocks))
    for number, block in enumerate(blocks):
        if number not in chosen:
            block.requires_grad_(False)
    for name, parameter in model.named_parameters():  # in the order of computation: the embeddings come first
        if f".{architecture.layers}." in f".{name}":
            break
        parameter.requires_grad_(False)


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


def _align_head_inputs(model: nn.Module, architecture: Architecture) -> None:
    """Convert the inputs of a float32 head, so that it works behind a bfloat16 encoder outside autocast too.

    FSDP2 with mixed precision computes with a bfloat16 copy of the head, so the hook asks for the type in each call.
    """

    def to_own_type(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        dtype = next(module.parameters()).dtype
        return tuple(value.to(dtype) if value.is_floating_point() else value for value in inputs)

    if all(parameter.dtype == torch.float32 for parameter in model.parameters() if parameter.is_floating_point()):
        return
    for path, module in model.named_modules():
        if any(ends_with(path, head) for head in architecture.heads):
            # peft trains a copy of the head inside a wrapper. After merging, the copy is the head.
            copies = getattr(module, "modules_to_save", None)
            for head in [module] if copies is None else copies.values():
                if all(parameter.requires_grad for parameter in head.parameters()):
                    head.register_forward_pre_hook(to_own_type)
