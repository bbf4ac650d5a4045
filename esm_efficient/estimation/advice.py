"""What to say when a device runs out of memory: what was held, and the nearest setting that would fit."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from esm_efficient.adapters.registry import PRESETS, find_architecture
from esm_efficient.costs.devices import Device
from esm_efficient.costs.memory import CATEGORIES, Memory, OutOfMemoryError
from esm_efficient.encoder import has_lean_encoder
from esm_efficient.errors import EsmEfficientError
from esm_efficient.estimation.estimate import MARGIN, Estimate, estimate
from esm_efficient.estimation.recommend import describe_setting
from esm_efficient.recipes import RECIPES, Encoder, Precision, Recipe, Trains
from esm_efficient.reporting import format_bytes
from esm_efficient.tasks import head_of

logger = logging.getLogger(__name__)


def nearest_fit(
    model: Any,
    *,
    memory: int,
    micro_batch: int,
    accumulation: int,
    tokens: int,
    optimizer: torch.optim.Optimizer | None = None,
    dtype: torch.dtype | None = None,
    margin: float = MARGIN,
) -> Estimate | None:
    """The setting nearest to that of a model in training that would fit a CUDA device's memory.

    First the micro-batch is halved and the accumulation doubled, then checkpointing is switched on, then adapters take
    the place of full fine-tuning.

    Args:
        model: as it is trained, with or without adapters.
        memory: bytes of the device.
        micro_batch: sequences in a forward pass.
        accumulation: micro-batches an optimizer step.
        tokens: of the longest sequence.
        optimizer: the one that trains it; only its kind is asked for.
        dtype: that most of its matrix products are in, if that is known.
        margin: share of the memory that must stay free.

    Returns:
        The first setting that fits, or None.
    """
    try:
        recipe, adapter_options = _recipe_of(model)
    except EsmEfficientError as error:
        logger.info("no advice: %s", error)
        return None
    recipe = recipe.replace(micro_batch=micro_batch, accumulation=accumulation)
    base = getattr(model, "get_base_model", lambda: model)()
    head = head_of(model)
    if head is None:
        return None  # a class of the user's own: what it would hold is not known
    half: dict[torch.dtype | None, Precision] = {torch.bfloat16: "bf16", torch.float16: "fp16"}
    precision: Precision = half.get(dtype, "float32")
    if {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}:
        precision = "pure-bf16"
    for changed in _nearer_to_farther(recipe):
        try:
            found = estimate(
                base.config,
                recipe=changed,
                device=Device("this GPU", "cuda", memory),
                tokens=tokens,
                precision=precision,
                # Which of torch's is in use is not told here: foreach needs the most.
                optimizer="adamw_8bit" if "8bit" in type(optimizer).__name__ else "adamw_foreach",
                attention=getattr(base.config, "_attn_implementation", None) or "sdpa",
                head=head,
                num_labels=base.config.num_labels,
                adapter_options=adapter_options if changed.preset == recipe.preset else None,
            )
        except EsmEfficientError as error:
            logger.info("no advice for %s: %s", describe_setting(changed), error)
            continue
        if found.fits(margin=margin):
            return found
    return None


def explain_out_of_memory(
    error: BaseException,
    *,
    phase: str,
    held: Memory,
    model: nn.Module,
    batch: tuple[int, int] | None,
    memory: int,
    accumulation: int = 1,
    optimizer: torch.optim.Optimizer | None = None,
    dtype: torch.dtype | None = None,
) -> OutOfMemoryError:
    """The error to raise in place of torch's: what was held, and what would fit.

    Args:
        error: torch's own.
        phase: of training.
        held: bytes by category when it happened.
        model: as it is trained.
        batch: sequences and tokens of the micro-batch, if they are known.
        memory: bytes of the CUDA device; 0 for another device, which gets no advice.
        accumulation: micro-batches an optimizer step.
        optimizer: the one that trains the model.
        dtype: as `nearest_fit`.
    """
    parts = ", ".join(f"{name} {format_bytes(getattr(held, name))}" for name in CATEGORIES)
    message = f"out of memory in the phase {phase!r}: held were {parts}"
    if phase == "evaluation":
        message += ". Take a smaller per_device_eval_batch_size"
        batch = None
    if batch is not None:
        message += f", with a micro-batch of {batch[0]} x {batch[1]:,} tokens"
    if batch is not None and memory:
        fit = nearest_fit(
            model,
            memory=memory,
            micro_batch=batch[0],
            accumulation=accumulation,
            tokens=batch[1],
            optimizer=optimizer,
            dtype=dtype,
        )
        message += (
            ". By the estimator nothing that was tried would fit (smaller micro-batches, checkpointing, adapters): "
            "take a smaller model or shorter sequences"
            if fit is None
            else f". By the estimator this would fit {format_bytes(memory)}, at a peak of "
            f"{format_bytes(fit.peak.total)}: {describe_setting(fit.recipe)}"
        )
    return OutOfMemoryError(f"{message}. torch said: {error}", phase=phase, held=held.to_dict())


def _nearer_to_farther(recipe: Recipe) -> Iterator[Recipe]:
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


def _recipe_of(model: Any) -> tuple[Recipe, dict[str, Any] | None]:
    """The recipe that a model in training follows, as far as it can be seen, and the options of its adapters."""
    configs: Mapping[str, Any] = getattr(model, "peft_config", {})
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    checkpointing = bool(getattr(base, "is_gradient_checkpointing", False))
    encoder: Encoder = "lean" if has_lean_encoder(base) else "plain"
    if configs:
        config = next(iter(configs.values()))
        targets = config.target_modules
        options: dict[str, Any] = {"lora_dropout": getattr(config, "lora_dropout", 0.0)}
        words = "all-linear"
        if not isinstance(targets, str):
            roles = find_architecture(base).roles
            presets = {frozenset(roles[role] for role in members): name for name, members in PRESETS.items()}
            words = presets.get(frozenset(targets), ", ".join(sorted(targets)))
            options["target_modules"] = sorted(targets)
        r = getattr(config, "r", 8)
        settings: dict[str, Any] = {
            "gradient_checkpointing": checkpointing,
            "preset": words,
            "r": r,
            "encoder": encoder,
        }
        return Recipe("this run", "adapters", 1e-3, **settings), options
    trains: Trains = "full" if all(p.requires_grad for n, p in base.named_parameters() if ".layer.0." in n) else "head"
    return Recipe("this run", trains, 1e-4, gradient_checkpointing=checkpointing, encoder=encoder), None
