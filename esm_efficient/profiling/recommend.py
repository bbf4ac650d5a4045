"""recommend(): the recipe and the sizes that fit a device and finish soonest."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from esm_efficient.adapters.registry import PRESETS, find_architecture
from esm_efficient.encoder import has_lean_encoder
from esm_efficient.errors import ConfigurationError, EsmEfficientError, OutOfMemoryError
from esm_efficient.profiling.devices import Device, get_device
from esm_efficient.profiling.estimate import MARGIN, Estimate, estimate
from esm_efficient.profiling.lengths import token_lengths
from esm_efficient.profiling.memory import CATEGORIES, Memory
from esm_efficient.profiling.simulate import Head, Precision
from esm_efficient.recipes import RECIPES, Encoder, Recipe, Trains, get_recipe
from esm_efficient.reporting import format_bytes, format_table

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Attempt:
    """One setting that was tried.

    Attributes:
        estimate: what it would cost.
        refused: why it was not taken; empty for the one that was.
    """

    estimate: Estimate
    refused: str


@dataclass(frozen=True)
class Recommendation:
    """The setting to take, and those that were tried.

    Attributes:
        chosen: what the setting to take costs; `Estimate.recipe` is the recipe with its sizes.
        attempts: every setting tried, the chosen one among them.
        margin: share of the device's memory that stays free.
    """

    chosen: Estimate
    attempts: tuple[Attempt, ...]
    margin: float

    @property
    def recipe(self) -> Recipe:
        """The recipe to take, with micro-batch, accumulation and preset."""
        return self.chosen.recipe

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {
            "recipe": self.recipe.name,
            "micro_batch": self.recipe.micro_batch,
            "accumulation": self.recipe.accumulation,
            "checkpointing": self.recipe.checkpointing,
            "preset": self.recipe.preset,
            "learning_rate": self.recipe.learning_rate,
            "margin": self.margin,
            "chosen": self.chosen.to_dict(),
            "attempts": [{"refused": a.refused, **a.estimate.to_dict()} for a in self.attempts],
        }

    def __str__(self) -> str:
        device = self.chosen.device
        return (
            f"{self.chosen.model} on {device.name} ({format_bytes(device.memory)}, {self.margin:.0%} kept free): "
            f"recipe {self.recipe.name}, {describe_setting(self.recipe)}\n"
            f"peak {format_bytes(self.chosen.peak.total)}, {self.chosen.seconds:.3g} s or more an optimizer step of "
            f"{self.recipe.batch_size} sequences\n\n{_table(self.attempts)}"
        )


def recommend(
    model: str | Path | PreTrainedConfig | PreTrainedModel,
    device: str | Device,
    length: Any = 512,
    *,
    batch_size: int = 8,
    recipes: Sequence[str | Recipe] = ("base", "gc", "lora", "all"),
    presets: Sequence[str] = ("all-linear",),
    precision: Precision | None = None,
    margin: float = MARGIN,
    progress: bool = True,
    **options: Any,
) -> Recommendation:
    """The recipe, micro-batch, accumulation and preset that fit a device and finish soonest.

    Every recipe is tried with every micro-batch that divides the accumulated batch, and none is taken whose own
    estimate does not fit. Of those that fit, the one with the shortest optimizer step by the roofline is taken, and
    of settings within one percent of it the one that needs the least memory.

    Args:
        model: as `estimate`.
        device: a name in `DEVICES`, an instance type, or a `Device`, with known memory and rates.
        length: as `estimate`.
        batch_size: sequences an optimizer step, whatever it is cut into.
        recipes: the methods to try. Head-only training is not among them unless it is named: it is the cheapest, and
            it learns less.
        presets: adapters to try with the recipes that have any.
        precision: as `estimate`.
        margin: share of the device's memory that must stay free.
        progress: show a progress bar.
        **options: further options of `estimate`.

    Returns:
        The setting, and what was tried.

    Raises:
        ConfigurationError: nothing fits (the message says what was tried), or the options contradict each other.

    Example:
        >>> print(recommend("650M", "T4", 512, batch_size=8).recipe.name)  # doctest: +SKIP
        all
    """
    from tqdm import tqdm

    target = get_device(device)
    if not target.memory or not target.flops:
        raise ConfigurationError(f"memory and rates of device {target.name!r} are not known: name a GPU")
    if batch_size < 1 or not 0 <= margin < 1:
        raise ConfigurationError(
            f"batch_size={batch_size}, margin={margin}: expected at least 1, and from 0 to below 1"
        )
    lengths = token_lengths(length)
    candidates = list(_candidates(recipes, presets, batch_size))
    estimates = [
        estimate(model, recipe=recipe, device=target, length=lengths, precision=precision, **options)
        for recipe in tqdm(candidates, desc="settings", disable=None if progress else True)
    ]
    fitting = [e for e in estimates if e.fits(margin=margin)]
    if not fitting:
        attempts = tuple(Attempt(e, _too_large(e, margin)) for e in estimates)
        raise ConfigurationError(
            f"nothing that was tried fits {target.name} with {margin:.0%} of its {format_bytes(target.memory)} kept "
            f"free; the smallest needs {format_bytes(min(e.peak.total for e in estimates))}. Take a larger device, a "
            f"smaller model or shorter sequences.\n{_table(attempts)}"
        )
    soonest = min(e.seconds for e in fitting)
    chosen = min((e for e in fitting if e.seconds <= 1.01 * soonest), key=lambda e: e.peak.total)

    def refusal(e: Estimate) -> str:
        if e is chosen:
            return ""
        if e not in fitting:
            return _too_large(e, margin)
        if e.seconds <= 1.01 * soonest:
            return "as fast, more memory"
        return f"{e.seconds / chosen.seconds:.2f} times the time"

    return Recommendation(chosen, tuple(Attempt(e, refusal(e)) for e in estimates), margin)


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
    heads: dict[str, Head] = {
        "ForSequenceClassification": "sequence-classification",
        "ForTokenClassification": "token-classification",
        "ForMaskedLM": "masked-lm",
    }
    parents = [parent.__name__ for parent in type(base).__mro__]
    known = [head for suffix, head in heads.items() if any(name.endswith(suffix) for name in parents)]
    if not known:
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
                length=tokens,
                precision=precision,
                # Which of torch's is in use is not told here: foreach needs the most.
                optimizer="adamw_8bit" if "8bit" in type(optimizer).__name__ else "adamw_foreach",
                attention=getattr(base.config, "_attn_implementation", None) or "sdpa",
                head=known[0],
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


def describe_setting(recipe: Recipe) -> str:
    """A recipe's sizes in words.

    Example:
        >>> describe_setting(RECIPES["all"])
        'LoRA on all-linear, micro-batch 2 x accumulation 4, gradient checkpointing'
    """
    what = {"all": "all parameters", "head": "the head alone", "adapters": f"LoRA on {recipe.preset}"}[recipe.trains]
    words = f"{what}, micro-batch {recipe.micro_batch} x accumulation {recipe.accumulation}"
    return words + (", gradient checkpointing" if recipe.checkpointing else "")


def _candidates(recipes: Sequence[str | Recipe], presets: Sequence[str], batch_size: int) -> Iterator[Recipe]:
    seen = set()
    for recipe in map(get_recipe, recipes):
        for preset in presets if recipe.preset is not None else (None,):
            for micro_batch in (n for n in range(batch_size, 0, -1) if batch_size % n == 0):
                changed = recipe.replace(micro_batch=micro_batch, accumulation=batch_size // micro_batch, preset=preset)
                key = (changed.trains, changed.micro_batch, changed.checkpointing, changed.preset, changed.r)
                if key not in seen:
                    seen.add(key)
                    yield changed


def _nearer_to_farther(recipe: Recipe) -> Iterator[Recipe]:
    methods: list[Recipe] = [recipe]
    if not recipe.checkpointing:
        methods.append(recipe.replace(checkpointing=True))
    if recipe.trains == "all":
        lora = {"trains": "adapters", "preset": "all-linear", "r": 8, "learning_rate": RECIPES["all"].learning_rate}
        methods.append(recipe.replace(checkpointing=True, **lora))
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
        settings: dict[str, Any] = {"checkpointing": checkpointing, "preset": words, "r": r, "encoder": encoder}
        return Recipe("this run", "adapters", 1e-3, **settings), options
    trains: Trains = "all" if all(p.requires_grad for n, p in base.named_parameters() if ".layer.0." in n) else "head"
    return Recipe("this run", trains, 1e-4, checkpointing=checkpointing, encoder=encoder), None


def _too_large(e: Estimate, margin: float) -> str:
    excess = e.peak.total - (1 - margin) * e.device.memory
    return f"does not fit: {format_bytes(round(excess))} too much"


def _table(attempts: Sequence[Attempt]) -> str:
    rows = [
        (
            describe_setting(a.estimate.recipe),
            format_bytes(a.estimate.peak.total),
            f"{a.estimate.seconds:.3g} s",
            a.refused or "taken",
        )
        for a in attempts
    ]
    return format_table(rows, ("tried", "peak", "step at least", "verdict"))
