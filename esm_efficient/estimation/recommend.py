"""recommend(): the recipe and the sizes that fit a device and finish soonest."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esm_efficient.costs.devices import DEFAULT_DEVICE, Device, get_device
from esm_efficient.errors import ConfigurationError
from esm_efficient.estimation.estimate import MARGIN, Estimate, estimate
from esm_efficient.estimation.inputs import token_lengths
from esm_efficient.recipes import Precision, Recipe, get_recipe
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
            "gradient_checkpointing": self.recipe.gradient_checkpointing,
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
    device: str | Device = DEFAULT_DEVICE,
    tokens: Any = 512,
    *,
    batch_size: int = 8,
    recipes: Sequence[str | Recipe] = ("base", "gc", "lora", "all"),
    presets: Sequence[str] = ("all-linear",),
    precision: Precision = "auto",
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
        tokens: as `estimate`.
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
    if not target.memory or not target.flops_per_second:
        raise ConfigurationError(f"memory and rates of device {target.name!r} are not known: name a GPU")
    if batch_size < 1 or not 0 <= margin < 1:
        raise ConfigurationError(
            f"batch_size={batch_size}, margin={margin}: expected at least 1, and from 0 to below 1"
        )
    lengths = token_lengths(tokens)
    candidates = list(_candidates(recipes, presets, batch_size))
    estimates = [
        estimate(model, recipe=recipe, device=target, tokens=lengths, precision=precision, **options)
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


def describe_setting(recipe: Recipe) -> str:
    """A recipe's sizes in words.

    Example:
        >>> describe_setting(RECIPES["all"])
        'LoRA on all-linear, micro-batch 2 x accumulation 4, gradient checkpointing'
    """
    what = {"full": "all parameters", "head": "the head alone", "adapters": f"LoRA on {recipe.preset}"}[recipe.trains]
    words = f"{what}, micro-batch {recipe.micro_batch} x accumulation {recipe.accumulation}"
    return words + (", gradient checkpointing" if recipe.gradient_checkpointing else "")


def _candidates(recipes: Sequence[str | Recipe], presets: Sequence[str], batch_size: int) -> Iterator[Recipe]:
    seen = set()
    for recipe in map(get_recipe, recipes):
        for preset in presets if recipe.preset is not None else (None,):
            for micro_batch in (n for n in range(batch_size, 0, -1) if batch_size % n == 0):
                changed = recipe.replace(micro_batch=micro_batch, accumulation=batch_size // micro_batch, preset=preset)
                key = (changed.trains, changed.micro_batch, changed.gradient_checkpointing, changed.preset, changed.r)
                if key not in seen:
                    seen.add(key)
                    yield changed


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
