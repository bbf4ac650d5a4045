"""recommend(): choose the recipe and the sizes that fit a device and give the shortest step."""

from __future__ import annotations

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


@dataclass(frozen=True)
class Attempt:
    """One setting that was tried.

    Attributes:
        estimate: the costs of the setting.
        refused: the reason why it was not taken; empty for the one that was.
    """

    estimate: Estimate
    refused: str


@dataclass(frozen=True)
class Recommendation:
    """The recommended setting, and all settings that were tried.

    Attributes:
        chosen: the costs of the recommended setting; `Estimate.recipe` is the recipe with its sizes.
        attempts: every setting tried, the chosen one included.
        margin: share of the device's memory to leave free.
    """

    chosen: Estimate
    attempts: tuple[Attempt, ...]
    margin: float

    @property
    def recipe(self) -> Recipe:
        """The recommended recipe, with micro-batch, accumulation and preset."""
        return self.chosen.recipe

    def to_dict(self) -> dict[str, Any]:
        """Return everything, ready for JSON."""
        chosen = self.chosen.to_dict()
        setting = ("recipe", "micro_batch", "accumulation", "gradient_checkpointing", "preset")
        return {
            **{name: chosen[name] for name in setting},
            "learning_rate": self.recipe.learning_rate,
            "margin": self.margin,
            "chosen": chosen,
            "attempts": [{"refused": a.refused, **a.estimate.to_dict()} for a in self.attempts],
        }

    def __str__(self) -> str:
        device = self.chosen.device
        return (
            f"{self.chosen.model} on {device.name} ({format_bytes(device.memory)}, {self.margin:.0%} kept free): "
            f"recipe {self.recipe.name}, {describe_setting(self.recipe)}\n"
            f"peak {format_bytes(self.chosen.peak.total)}, {self.chosen.seconds:.3g} s or more per optimizer step of "
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
    """Recommend the recipe, micro-batch, accumulation and preset that fit a device and give the shortest step.

    Every recipe is tried with every micro-batch that divides the batch size. A setting that does not fit by its own
    estimate is never taken. Among the others, the settings within one percent of the shortest optimizer step by the
    roofline are compared, and the one with the lowest peak is taken.

    Args:
        model: as in `estimate`.
        device: a name in `DEVICES`, an instance type, or a `Device`, with known memory and rates.
        tokens: as in `estimate`.
        batch_size: sequences per optimizer step; the micro-batch and the accumulation divide it.
        recipes: the methods to try. Head-only training must be named: it is the cheapest method, and it learns less.
        presets: adapters to try, with the recipes that have adapters.
        precision: as in `estimate`.
        margin: share of the device's memory to leave free.
        progress: show a progress bar.
        **options: further options of `estimate`.

    Returns:
        The setting, and all settings that were tried.

    Raises:
        ConfigurationError: no setting fits (the message says what was tried), or the options contradict each other.

    Example:
        >>> print(recommend("650M", "T4", 512, batch_size=8).recipe.name)  # doctest: +SKIP
        all
    """
    from tqdm import tqdm

    target = get_device(device)
    if not target.memory or not target.flops_per_second:
        raise ConfigurationError(f"memory and rates of device {target.name!r} are unknown: name a GPU")
    if batch_size < 1 or not 0 <= margin < 1:
        raise ConfigurationError(
            f"batch_size={batch_size}, margin={margin}: expected a batch size of at least 1 and a margin from 0 to "
            "below 1"
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
            f"no setting that was tried fits {target.name} with {margin:.0%} of its {format_bytes(target.memory)} kept "
            f"free; the smallest needs {format_bytes(min(e.peak.total for e in estimates))}. Use a larger device, a "
            f"smaller model or shorter sequences.\n{_table(attempts)}"
        )
    limit = 1.01 * min(e.seconds for e in fitting)
    chosen = min((e for e in fitting if e.seconds <= limit), key=lambda e: e.peak.total)

    def refusal(e: Estimate) -> str:
        if e is chosen:
            return ""
        if e not in fitting:
            return _too_large(e, margin)
        if e.seconds <= limit:
            return "as fast, more memory"
        return f"{e.seconds / chosen.seconds:.2f} times the time"

    return Recommendation(chosen, tuple(Attempt(e, refusal(e)) for e in estimates), margin)


def describe_setting(recipe: Recipe) -> str:
    """Describe a recipe's trainable part and sizes.

    Example:
        >>> describe_setting(get_recipe("all"))
        'LoRA on all-linear, micro-batch 2 x accumulation 4, gradient checkpointing'
    """
    part = {"full": "all parameters", "head": "the head alone", "adapters": f"LoRA on {recipe.preset}"}[recipe.trains]
    checkpointing = ", gradient checkpointing" if recipe.gradient_checkpointing else ""
    return f"{part}, micro-batch {recipe.micro_batch} x accumulation {recipe.accumulation}{checkpointing}"


def _candidates(recipes: Sequence[str | Recipe], presets: Sequence[str], batch_size: int) -> Iterator[Recipe]:
    """Yield every setting to try, once."""
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
