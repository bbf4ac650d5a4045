"""A base model whose frozen linear layers are held in 4 or 8 bits, by bitsandbytes through transformers."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from esm_efficient.adapters.registry import ARCHITECTURES
from esm_efficient.errors import ConfigurationError
from esm_efficient.recipes import Quantization

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn
    from transformers import BitsAndBytesConfig


def quantization_config(quantization: Quantization, *, dtype: torch.dtype | None = None) -> BitsAndBytesConfig:
    """Return the ``quantization_config`` for ``from_pretrained``: heads and what no loss reads are not quantised.

    Args:
        quantization: ``"4bit"`` or ``"8bit"`` (`esm_efficient.recipes.Quantization`).
        dtype: the dtype of products in 4 bits; None for float32.

    Raises:
        ConfigurationError: bitsandbytes is not installed.

    Example:
        >>> config = quantization_config("4bit", dtype=torch.bfloat16)  # doctest: +SKIP
        >>> AutoModelForSequenceClassification.from_pretrained(name, quantization_config=config)  # doctest: +SKIP
    """
    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigurationError(
            f"quantization={quantization!r} needs the package bitsandbytes, which is not installed: "
            "pip install esm-efficient-finetuning[quantized]"
        )
    # transformers matches these from the beginning of a path, as patterns; heads are outside the encoder.
    whole = [name for entry in ARCHITECTURES for name in (*entry.heads, *(f".*{unread}" for unread in entry.unread))]
    options: dict[str, Any] = {"llm_int8_skip_modules": list(dict.fromkeys(whole))}
    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, **options)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype or torch.float32,
        **options,
    )


def quantization_of(config: Any) -> Quantization | None:
    """Return how the weights of a model are held, by its config; None if they are not quantised.

    Raises:
        ConfigurationError: they are quantised in another way than by bitsandbytes in 4 or 8 bits.

    Example:
        >>> from transformers import EsmConfig
        >>> quantization_of(EsmConfig(quantization_config={"load_in_4bit": True, "quant_method": "bitsandbytes"}))
        '4bit'
    """
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    options = found if isinstance(found, Mapping) else found.to_dict()
    if options.get("load_in_4bit"):
        return "4bit"
    if options.get("load_in_8bit"):
        return "8bit"
    raise ConfigurationError(
        f"the model is quantised with {options.get('quant_method', 'an unknown method')}: expected bitsandbytes, in 4 "
        "or 8 bits"
    )


def count_parameters(parameters: Iterable[nn.Parameter]) -> int:
    """Count parameters; two of 4 bits are stored in one byte, and count as two.

    Example:
        >>> count_parameters(torch.nn.Linear(3, 2).parameters())
        8
    """
    states = ((parameter, getattr(parameter, "quant_state", None)) for parameter in parameters)
    return sum(p.numel() if state is None else torch.Size(state.shape).numel() for p, state in states)


def is_quantized(module: Any) -> bool:
    """Return whether a module is a linear layer of bitsandbytes."""
    return type(module).__module__.split(".")[0] == "bitsandbytes"


def usual_layout(linear: Any) -> Any:
    """Keep a quantised linear layer in the layout that can be restored; return the layer.

    On some CPUs bitsandbytes repacks a weight of 4 bits when the layer predicts, with rounded scales. The layer then
    cannot train any more, and restoring its weight gives other numbers without an error. Its ``state_dict`` undoes
    that, but for the rounding.
    """
    if getattr(linear, "support_avx512bf16_for_cpu", False):
        linear.support_avx512bf16_for_cpu = False
    if getattr(getattr(linear.weight, "quant_state", None), "packing_format_for_cpu", False):
        linear.state_dict()
    return linear


def merge_quantized(model: PeftModel) -> PeftModel:
    """Replace each quantised linear layer, with the LoRA around it, by one of torch in float32 that computes the same.

    The sum of weight and adapter is not quantised again. peft's own merging does that, and loses small adapters.

    Args:
        model: a model with adapters, changed in place. Without quantised layers it stays as it is.

    Returns:
        The model, whose other adapters can be merged as usual.
    """
    from peft.tuners.lora.layer import LoraLayer
    from peft.utils.integrations import dequantize_bnb_weight

    base: Any = model.get_base_model()
    for path, module in list(model.named_modules()):
        layer: Any = module
        linear: Any = layer.get_base_layer() if isinstance(module, LoraLayer) else module
        if not is_quantized(linear) or path.endswith(".base_layer"):
            continue
        usual_layout(linear)
        weight = dequantize_bnb_weight(linear.weight, state=getattr(linear, "state", None)).float()
        if linear is not layer:
            for name in layer.active_adapters:
                weight += layer.get_delta_weight(name).float()
        merged = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=linear.bias is not None, device=weight.device)
        merged.weight.data = weight
        if linear.bias is not None:
            merged.bias.data = linear.bias.data.float()
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, merged)
    if getattr(base, "is_quantized", False):
        base.hf_quantizer.remove_quantization_config(base)
    return model
