"""Advice when a device runs out of memory: the memory in use, and the nearest setting that would fit."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from esm_efficient import compat
from esm_efficient.adapters.quantization import quantization_of
from esm_efficient.adapters.registry import (
    PRESETS,
    encoder_layers,
    find_architecture,
    is_in_head,
    is_unread,
    linear_layers,
)
from esm_efficient.costs.devices import Device
from esm_efficient.costs.memory import CATEGORIES, Memory
from esm_efficient.encoder import has_lean_encoder
from esm_efficient.errors import ConfigurationError, EsmEfficientError
from esm_efficient.estimation.estimate import Estimate, estimate
from esm_efficient.estimation.recommend import describe_setting
from esm_efficient.heads import pooling_of_model
from esm_efficient.out_of_memory import OutOfMemoryError
from esm_efficient.recipes import RECIPES, Encoder, Precision, Recipe, Trains
from esm_efficient.reporting import format_bytes
from esm_efficient.tasks import head_of
from esm_efficient.trunk.split import SkippedModule

logger = logging.getLogger(__name__)


def nearest_fit(
    model: Any,
    *,
    memory: int,
    micro_batch: int,
    tokens: int,
    accumulation: int = 1,
    optimizer: torch.optim.Optimizer | None = None,
    dtype: torch.dtype | None = None,
) -> Estimate | None:
    """Return the setting nearest to that of a model in training that would fit a CUDA device's memory.

    First the micro-batch is halved and the accumulation doubled, then gradient checkpointing is switched on, then
    adapters replace full fine-tuning.

    Args:
        model: the model in training, with or without adapters.
        memory: bytes of the device.
        micro_batch: sequences in one forward pass.
        tokens: tokens of the longest sequence.
        accumulation: micro-batches per optimizer step.
        optimizer: the optimizer in use; only its kind matters.
        dtype: dtype of most matrix products; None if unknown.

    Returns:
        The costs of the first setting that fits, or None.

    Raises:
        ConfigurationError: the head or the adapters of the model are of an unknown kind.
        EsmEfficientError: no setting could be estimated.
    """
    base = getattr(model, "get_base_model", lambda: model)()
    head = head_of(model)
    if head is None:
        raise ConfigurationError(f"{type(base).__name__} has an unknown head, so its memory cannot be estimated")
    recipe, adapter_options = _recipe_of(model, base)
    recipe = recipe.replace(micro_batch=micro_batch, accumulation=accumulation)
    half: dict[torch.dtype | None, Precision] = {torch.bfloat16: "bf16", torch.float16: "fp16"}
    precision: Precision = half.get(dtype, "float32")
    if {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}:
        precision = "pure-bf16"
    tried, refusals = list(_nearer_to_farther(recipe)), []
    for changed in tried:
        try:
            result = estimate(
                base.config,
                recipe=changed,
                device=Device("this GPU", "cuda", memory),
                tokens=tokens,
                precision=precision,
                # Of torch's implementations, which cannot be told apart here, foreach needs the most memory.
                optimizer="adamw_8bit" if "8bit" in type(optimizer).__name__ else "adamw_foreach",
                attention=compat.attention_implementation(base.config),
                head=head,
                num_labels=base.config.num_labels,
                adapter_options=adapter_options if changed.preset == recipe.preset else None,
            )
        except EsmEfficientError as error:
            logger.info("no advice for %s: %s", describe_setting(changed), error)
            refusals.append(error)
            continue
        if result.fits():
            return result
    if refusals and len(refusals) == len(tried):
        raise refusals[0]
    return None


def explain_out_of_memory(
    error: BaseException,
    *,
    phase: str,
    held: Memory | None,
    model: nn.Module,
    batch: tuple[int, int] | None,
    memory: int,
    **run: Any,
) -> OutOfMemoryError:
    """Return the error to raise instead of torch's: it says what memory was in use and what would fit.

    Args:
        error: torch's error.
        phase: the phase of training in which it was raised.
        held: bytes in use by category; None if they were not counted.
        model: the model in training.
        batch: sequences and tokens of the micro-batch; None if unknown.
        memory: bytes of the CUDA device; 0 for another device, for which there is no advice.
        **run: accumulation, optimizer and dtype, as in `nearest_fit`.
    """
    message = f"out of memory in the phase {phase!r}"
    if held is not None:
        message += ". In use were " + ", ".join(f"{name} {format_bytes(getattr(held, name))}" for name in CATEGORIES)
    if phase == "evaluation":
        message += ". Use a smaller per_device_eval_batch_size, or fewer tokens per sequence (max_tokens)"
        batch = None
    if batch is not None:
        message += f", with a micro-batch of {batch[0]} x {batch[1]:,} tokens"
    if batch is not None and memory:
        message += _advice(model, memory, batch, run)
    counted = None if held is None else held.to_dict()
    return OutOfMemoryError(f"{message}. torch said: {error}", phase=phase, held=counted)


def _advice(model: nn.Module, memory: int, batch: tuple[int, int], run: Mapping[str, Any]) -> str:
    """Return a sentence with what would fit; empty if nothing is known."""
    try:
        fit = nearest_fit(model, memory=memory, micro_batch=batch[0], tokens=batch[1], **run)
    except Exception as error:  # the error that is explained must reach the user, whatever is wrong here
        logger.warning("no advice: %s", error, exc_info=not isinstance(error, EsmEfficientError))
        return ""
    if fit is None:
        return (
            ". By the estimator no setting would fit (smaller micro-batches, gradient checkpointing and adapters were "
            "tried): use a smaller model or shorter sequences"
        )
    return (
        f". By the estimator this setting would fit {format_bytes(memory)}, with a peak of "
        f"{format_bytes(fit.peak.total)}: {describe_setting(fit.recipe)}"
    )


def _nearer_to_farther(recipe: Recipe) -> Iterator[Recipe]:
    """Yield leaner settings, those that change least first."""
    methods: list[Recipe] = [recipe]
    if not recipe.gradient_checkpointing:
        methods.append(recipe.replace(gradient_checkpointing=True))
    if recipe.trains == "full":
        lora = {"trains": "adapters", "preset": "all-linear", "r": 8, "learning_rate": RECIPES["all"].learning_rate}
        methods.append(recipe.replace(gradient_checkpointing=True, **lora))
    for index, method in enumerate(methods):
        micro_batch = method.micro_batch
        while micro_batch >= 1:
            if index or micro_batch != recipe.micro_batch:
                yield method.replace(micro_batch=micro_batch, accumulation=math.ceil(recipe.batch_size / micro_batch))
            micro_batch //= 2


def _recipe_of(model: Any, base: Any) -> tuple[Recipe, dict[str, Any] | None]:
    """Return the recipe of a model in training, as far as the model shows it, and the options of its adapters."""
    configs: Mapping[str, Any] = getattr(model, "peft_config", {})
    encoder: Encoder = "lean" if has_lean_encoder(base) else "plain"
    layers = encoder_layers(base)
    trained = tuple(n for n, layer in enumerate(layers) if any(p.requires_grad for p in layer.parameters()))
    settings: dict[str, Any] = {"gradient_checkpointing": compat.is_checkpointing(base), "encoder": encoder}
    if 0 < len(trained) < len(layers):
        settings["layers"] = trained
    settings["pooling"] = pooling_of_model(base)
    settings["cache"] = any(isinstance(module, SkippedModule) for module in base.modules())
    if configs:
        config = next(iter(configs.values()))
        kinds = _adapted_layers(base, config)
        suffixes = find_architecture(base).suffixes
        presets = {frozenset(suffixes(*roles)): name for name, roles in PRESETS.items()}
        preset = presets.get(frozenset(kinds), ", ".join(kinds))
        options: dict[str, Any] = {"lora_dropout": config.lora_dropout}
        if preset not in PRESETS:
            options["target_modules"] = kinds
        settings |= {"r": config.r, "quantization": quantization_of(base.config)}
        return Recipe("this run", "adapters", 1e-3, preset=preset, **settings), options
    trains: Trains = "full" if trained else "head"
    return Recipe("this run", trains, 1e-4, **settings), None


def _adapted_layers(base: Any, config: Any) -> list[str]:
    """Return the kinds of the encoder's linear layers that have LoRA, as path suffixes.

    They are read from the model, since targets may be a pattern, and peft's own "all-linear" also names the contact
    head, which no loss uses, and layers of a head, which are small.

    Raises:
        ConfigurationError: the adapters are not LoRA, or no linear layer of the encoder has one.
    """
    architecture = find_architecture(base)
    paths = [path.removesuffix(".base_layer") for path, _ in linear_layers(base) if path.endswith(".base_layer")]
    read = [path for path in paths if not is_unread(architecture, path) and not is_in_head(architecture, path)]
    if config.peft_type != "LORA" or not read:
        raise ConfigurationError(
            f"the adapters are those of {type(config).__name__}, in {len(read)} linear layers of the encoder: expected "
            "LoRA in at least one"
        )
    return sorted({re.sub(r"^.*\.\d+\.", "", path) for path in read})
