"""recommend(): choose the recipe and the sizes that fit a device and give the shortest run."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esm_efficient.adapters.quantization import quantization_of
from esm_efficient.adapters.registry import PRESETS
from esm_efficient.costs.devices import DEFAULT_DEVICE, Device, get_device
from esm_efficient.errors import ConfigurationError
from esm_efficient.estimation.estimate import MARGIN, Estimate, estimate
from esm_efficient.estimation.inputs import data_lengths, resolve_config
from esm_efficient.recipes import Precision, Recipe, get_recipe
from esm_efficient.reporting import count_of, format_bytes, format_seconds, format_table
from esm_efficient.trunk.split import encoder_dropout

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)


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
        epochs: passes over the training sequences of a run.
        disk: bytes for a cache; None if unknown.
        is_assumed: whether nobody gave the number of training sequences.
    """

    chosen: Estimate
    attempts: tuple[Attempt, ...]
    margin: float
    epochs: float
    disk: int | None = None
    is_assumed: bool = False

    @property
    def recipe(self) -> Recipe:
        """The recommended recipe, with micro-batch, accumulation and preset."""
        return self.chosen.recipe

    def to_dict(self) -> dict[str, Any]:
        """Return everything, ready for JSON."""
        chosen = self.chosen.to_dict()
        setting = ("recipe", "micro_batch", "accumulation", "gradient_checkpointing", "preset", "layers", "pooling")
        return {
            **{name: chosen[name] for name in setting},
            "cached": self.chosen.cache is not None,
            "learning_rate": self.recipe.learning_rate,
            "margin": self.margin,
            "epochs": self.epochs,
            "disk_bytes": self.disk,
            "run_seconds": run_seconds(self.chosen, self.epochs),
            "chosen": chosen,
            "attempts": [
                {"refused": a.refused, "run_seconds": run_seconds(a.estimate, self.epochs), **a.estimate.to_dict()}
                for a in self.attempts
            ],
        }

    def __str__(self) -> str:
        device = self.chosen.device
        return (
            f"{self.chosen.model} on {device.name} ({format_bytes(device.memory)}, {self.margin:.0%} kept free): "
            f"recipe {self.recipe.name}, {describe_setting(self.recipe)}\n"
            f"peak {format_bytes(self.chosen.peak.total)}, {format_seconds(self.chosen.seconds)} or more per optimizer "
            f"step of {self.recipe.batch_size} sequences, {format_seconds(run_seconds(self.chosen, self.epochs))} or "
            f"more for {count_of(self.epochs, 'epoch')} of {self.chosen.sequences:,} sequences"
            f"{' (for your table give sequences=N)' if self.is_assumed else ''}{self._describe_cache()}\n\n"
            f"{_table(self.attempts, self.epochs)}"
        )

    def _describe_cache(self) -> str:
        if self.chosen.cache is None:
            return ""
        fits = "" if self.disk is None else f" and fits the disk with {format_bytes(self.disk)}"
        return f", caching included\nthe cache takes {format_bytes(self.chosen.cache.bytes)} on disk{fits}"


def recommend(
    model: str | Path | PreTrainedConfig | PreTrainedModel,
    device: str | Device = DEFAULT_DEVICE,
    tokens: Any = 512,
    *,
    batch_size: int = 8,
    recipes: Sequence[str | Recipe] = ("base", "gc", "lora", "all", "top"),
    presets: Sequence[str] = ("all-linear",),
    precision: Precision = "auto",
    margin: float = MARGIN,
    epochs: float = 3.0,
    sequences: int | None = None,
    cache: bool | None = None,
    disk: int | None = None,
    progress: bool = True,
    **options: Any,
) -> Recommendation:
    """Recommend the recipe, micro-batch, accumulation and preset that fit a device and give the shortest run.

    Every recipe is tried with every micro-batch that divides the batch size. If it leaves the lowest layers unchanged,
    it is tried with and without a cache of their states. A setting that does not fit by its own estimate is never
    taken. Among the others, the settings within one percent of the shortest run by the roofline, the time of caching
    included, are compared, and the one with the lowest peak is taken.

    Args:
        model: as in `estimate`.
        device: as in `get_device`, with known memory. Without rates, as of ``"12GB"``, settings are ranked by the
            rates of `DEFAULT_DEVICE`, and the result says so.
        tokens: as in `estimate`.
        batch_size: sequences per optimizer step; the micro-batch and the accumulation divide it.
        recipes: the methods to try. Head-only training must be named: its steps are the fastest, and it learns less.
            With a quantised checkpoint, those without adapters are left out, with a warning.
        presets: adapters to try, with the recipes that have adapters.
        precision: as in `estimate`.
        margin: share of the device's memory to leave free.
        epochs: passes over the training sequences; the more there are, the sooner a cache pays.
        sequences: as in `estimate`.
        cache: True or False to try every recipe only with, or only without, a cache; None for both. With True, recipes
            that train all parameters are left out.
        disk: bytes for a cache; a setting whose cache is larger is refused. None refuses none.
        progress: show a progress bar.
        **options: further options of `estimate`.

    Returns:
        The setting, and all settings that were tried.

    Raises:
        ConfigurationError: no setting fits (the message says what was tried), or the options contradict each other.

    Example:
        >>> print(recommend("650M", "T4", 512, batch_size=8).recipe.name)  # doctest: +SKIP
        top
    """
    from tqdm import tqdm

    target = get_device(device)
    if target.memory and not target.flops_per_second and not target.bandwidth:
        name = f"{target.name} with the rates of {DEFAULT_DEVICE}"
        target = dataclasses.replace(get_device(DEFAULT_DEVICE), name=name, memory=target.memory, instances={})
    if not target.memory or not target.flops_per_second or not target.bandwidth:
        raise ConfigurationError(f"memory and rates of device {target.name!r} are unknown: name a GPU")
    if batch_size < 1 or not 0 <= margin < 1 or not 0 < epochs < math.inf or not 0 <= (disk or 0) < math.inf:
        raise ConfigurationError(
            f"batch_size={batch_size}, margin={margin}, epochs={epochs}, disk={disk}: expected a batch of at least "
            "1, a margin from 0 to below 1, more than 0 epochs, and at least 0 bytes or None, all of them finite"
        )
    if unknown := [preset for preset in presets if preset not in PRESETS]:
        raise ConfigurationError(f"presets={unknown[0]!r}: expected some of {', '.join(PRESETS)}")
    lengths = data_lengths(tokens, sequences)
    if encoder_dropout(resolve_config(model)[1]):
        if cache:
            raise ConfigurationError("cache=True, but the model has dropout, so that its states differ in every epoch")
        cache = False
    candidates = list(_candidates(_for_model(model, recipes), presets, batch_size, cache))
    if not candidates:
        raise ConfigurationError("nothing to try: expected a recipe, and a preset for recipes with adapters")
    estimates = [
        estimate(model, recipe=recipe, device=target, tokens=lengths, precision=precision, **options)
        for recipe in tqdm(candidates, desc="settings", disable=None if progress else True)
    ]
    too_large = [_too_large(e, margin, disk) for e in estimates]
    fitting = [e for e, reason in zip(estimates, too_large, strict=True) if not reason]
    if not fitting:
        attempts = tuple(Attempt(e, reason) for e, reason in zip(estimates, too_large, strict=True))
        smallest = min(estimates, key=lambda e: e.peak.total)
        raise ConfigurationError(
            f"no setting that was tried fits {target.name} with {margin:.0%} of its {format_bytes(target.memory)} kept "
            f"free; the smallest, {describe_setting(smallest.recipe)}, needs {format_bytes(smallest.peak.total)}. Use "
            f"a larger device, a smaller model or shorter sequences\n\n{_table(attempts, epochs)}"
        )
    times = [run_seconds(e, epochs) for e in estimates]
    limit = 1.01 * min(time for time, reason in zip(times, too_large, strict=True) if not reason)
    chosen = min((e for e in fitting if run_seconds(e, epochs) <= limit), key=lambda e: e.peak.total)

    def refusal(e: Estimate, time: float, reason: str) -> str:
        if e is chosen or reason:
            return reason
        return "as fast, more memory" if time <= limit else f"{time / run_seconds(chosen, epochs):.2f} times the time"

    attempts = tuple(
        Attempt(e, refusal(e, time, reason)) for e, time, reason in zip(estimates, times, too_large, strict=True)
    )
    return Recommendation(chosen, attempts, margin, epochs, disk, lengths.is_assumed)


def run_seconds(e: Estimate, epochs: float) -> float:
    """Return the time of a run by the roofline, the time of caching included."""
    return e.run_seconds(math.ceil(epochs * e.sequences / e.recipe.batch_size))


def describe_setting(recipe: Recipe) -> str:
    """Describe a recipe's trainable part and sizes.

    Example:
        >>> describe_setting(get_recipe("all"))
        'LoRA on all-linear, micro-batch 2 x accumulation 4, gradient checkpointing'
    """
    part = {"full": "all parameters", "head": "the head alone", "adapters": f"LoRA on {recipe.preset}"}[recipe.trains]
    if recipe.layers != "all" and recipe.trains != "head":
        layers = recipe.layers if isinstance(recipe.layers, str) else ", ".join(map(str, recipe.layers))
        part += f" of layers {layers}"
    checkpointing = ", gradient checkpointing" if recipe.gradient_checkpointing else ""
    cached = ", cached states" if recipe.cache else ""
    kept = f", {count_of(recipe.keep_layers, 'layer')} kept" if recipe.keep_layers else ""
    base = f", base in {recipe.quantization[0]} bits" if recipe.quantization else ""
    sizes = f"micro-batch {recipe.micro_batch} x accumulation {recipe.accumulation}"
    return f"{part}, {sizes}{checkpointing}{cached}{kept}{base}"


def _for_model(model: Any, recipes: Sequence[str | Recipe]) -> list[Recipe]:
    """Return the recipes that can train a model: on a quantised checkpoint, those with adapters."""
    chosen, held = [get_recipe(recipe) for recipe in recipes], quantization_of(resolve_config(model)[1])
    if held is None:
        return chosen
    if others := [recipe.name for recipe in chosen if recipe.trains != "adapters"]:
        logger.warning("not tried, since only adapters train on a base in %s: %s", held, ", ".join(others))
    adapted = [recipe for recipe in chosen if recipe.trains == "adapters"]
    if not adapted:
        raise ConfigurationError(f"only adapters train on a base in {held}: expected a recipe such as 'lora'")
    return [recipe if recipe.quantization else recipe.replace(quantization=held) for recipe in adapted]


def _candidates(
    recipes: Sequence[Recipe], presets: Sequence[str], batch_size: int, cache: bool | None
) -> Iterator[Recipe]:
    """Yield every setting to try, once."""
    seen = set()
    for recipe in recipes:
        if cache and recipe.trains == "full" and recipe.layers == "all":
            continue
        is_partial = recipe.trains == "head" or recipe.layers != "all"
        caches = [cache] if cache is not None else [False, True] if is_partial else [recipe.cache]
        if recipe.quantization and not cache:
            caches = [False]
        for preset in presets if recipe.preset is not None else (None,):
            for micro_batch in (n for n in range(batch_size, 0, -1) if batch_size % n == 0):
                for cached in caches:
                    sizes = {"micro_batch": micro_batch, "accumulation": batch_size // micro_batch}
                    changed = recipe.replace(**sizes, preset=preset, cache=cached)
                    key = dataclasses.replace(changed, name="", learning_rate=0.0, description="")
                    if key not in seen:
                        seen.add(key)
                        yield changed


def _too_large(e: Estimate, margin: float, disk: int | None) -> str:
    """Return why a setting does not fit; empty if it does."""
    excess = e.peak.total - (1 - margin) * e.device.memory
    if excess > 0:
        return f"does not fit: {format_bytes(math.ceil(excess))} too much"
    if disk is not None and e.cache is not None and e.cache.bytes > disk:
        return f"the cache does not fit the disk: {format_bytes(e.cache.bytes - disk)} too much"
    return ""


def _table(attempts: Sequence[Attempt], epochs: float) -> str:
    has_cache = any(a.estimate.cache is not None for a in attempts)
    rows: list[list[object]] = []
    for attempt in attempts:
        e = attempt.estimate
        cache = ["-", "-"] if e.cache is None else [format_bytes(e.cache.bytes), format_seconds(e.cache.seconds)]
        rows.append(
            [
                describe_setting(e.recipe),
                format_bytes(e.peak.total),
                format_seconds(e.seconds),
                *(cache if has_cache else ()),
                format_seconds(run_seconds(e, epochs)),
                attempt.refused or "taken",
            ]
        )
    header = ["tried", "peak", "step at least", *(["cache", "caching"] if has_cache else ()), "run at least", "verdict"]
    return format_table(rows, header)
