"""Predict what a cache of the trunk's states costs: bytes on disk, time, memory, and the time that it saves."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from esm_efficient.costs.devices import Device
from esm_efficient.costs.memory import Memory
from esm_efficient.estimation.extrapolate import simulate_caching, simulate_model
from esm_efficient.estimation.inputs import DataLengths
from esm_efficient.estimation.segments import Simulation, memory_of, seconds_of
from esm_efficient.estimation.step import NO_PAIRS, Step
from esm_efficient.recipes import Recipe
from esm_efficient.reporting import format_bytes, format_seconds
from esm_efficient.trunk.shards import WORKING_TOKENS
from esm_efficient.trunk.states import StateDtype, StateFormat

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class CacheCost:
    """The predicted costs of a cache of the trunk's states (`esm_efficient.trunk`).

    Attributes:
        layers: layers of the trunk.
        sequences: sequences that are cached, of the training and the validation split.
        stored: number format and pooling of the states.
        bytes: bytes of the states on disk.
        seconds: time of one forward pass of the trunk over all sequences by the roofline, without writing; NaN if the
            device's rates are unknown.
        peak: bytes in use on the device at the highest moment of that pass.
        epoch_seconds: time of an epoch of training with the cache.
        epoch_seconds_without: time of an epoch of training without it.
        is_assumed: whether nobody gave the number of sequences.
    """

    layers: int
    sequences: int
    stored: StateFormat
    bytes: int
    seconds: float
    peak: Memory
    epoch_seconds: float
    epoch_seconds_without: float
    is_assumed: bool = False

    @property
    def pays_after(self) -> float:
        """Epochs after which the time that the cache saved equals the time of caching; infinite if it saves none."""
        saved = self.epoch_seconds_without - self.epoch_seconds
        return self.seconds / saved if math.isnan(saved) or saved > 0 else math.inf

    def to_dict(self) -> dict[str, Any]:
        """Return every figure, ready for JSON; an unknown or infinite one is None."""
        record = dataclasses.asdict(self) | {"pays_after_epochs": self.pays_after, "peak": self.peak.to_dict()}
        return {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in record.items()}

    def __str__(self) -> str:
        states = {"first": "states of the first token", "mean": "mean states"}.get(self.stored.pooling, "states")
        text = (
            f"cache: {format_bytes(self.bytes)} on disk ({self.stored.dtype} {states} of {self.sequences:,} sequences, "
            f"after {self.layers} layers{'; for your table give sequences=N' if self.is_assumed else ''})"
        )
        if math.isnan(self.seconds):
            return text
        pays = "it never pays"
        if math.isfinite(self.pays_after):
            epochs = f"{self.pays_after:.2g}"
            pays = f"the cache pays after {epochs} epoch{'s' if epochs != '1' else ''}"
        return (
            f"{text}\ncaching: {format_seconds(self.seconds)} or more, once; an epoch takes "
            f"{format_seconds(self.epoch_seconds)} or more instead of "
            f"{format_seconds(self.epoch_seconds_without)}: {pays}"
        )


def cache_cost(
    config: PreTrainedConfig,
    step: Step,
    lengths: DataLengths,
    device: Device,
    *,
    seconds: float,
    extrapolate: bool,
) -> CacheCost | None:
    """Return what the cache of a recipe costs; None for a recipe without a cache.

    Without the device's rates no time is known, and what only times need is not simulated.

    Args:
        config: the model's config.
        step: the training step.
        lengths: the sequences.
        device: the device.
        seconds: time of a step on cached states; NaN if the device's rates are unknown.
        extrapolate: as in `estimate`.
    """
    if not step.recipe.cache:
        return None
    count: int = config.num_hidden_layers
    layers = min(step.recipe.trained_layers(count), default=count)
    dtype = cast(StateDtype, str(step.frozen_dtype).removeprefix("torch."))
    stored = StateFormat(dtype, step.cached_states(config))
    cached = round(lengths.total(np.ones_like))
    mean = max(1, round(lengths.total(np.asarray) / cached))
    longest = max(np.max(lengths.train), *lengths.validation, 1)

    def simulate(tokens: int) -> tuple[Simulation, int]:
        """Simulate a batch of sequences of some tokens; return it with the number of its sequences."""
        rows = min(cached, max(1, WORKING_TOKENS // tokens))
        batch = dataclasses.replace(
            step,
            recipe=Recipe("", "head", 0.0, micro_batch=rows),
            tokens=tokens,
            attention="sdpa",
            padding="padding-free" if config.model_type == "esm" else "padded",
            adapter_options=NO_PAIRS,
        )
        return simulate_caching(config, batch, layers=layers, extrapolate=extrapolate), rows

    largest, _ = simulate(int(longest))
    caching_seconds = seconds_without = math.nan
    if not math.isnan(seconds):
        average, rows = simulate(mean)
        caching_seconds = float(seconds_of(average.costs, device).sum()) * cached / rows
        uncached = dataclasses.replace(step, recipe=step.recipe.replace(cache=False))
        costs = simulate_model(config, uncached, extrapolate=extrapolate).costs
        seconds_without = float(seconds_of(costs, device).sum())
    steps = math.ceil(lengths.sequences / step.recipe.batch_size)
    return CacheCost(
        layers=layers,
        sequences=cached,
        stored=stored,
        bytes=round(lengths.total(lambda tokens: stored.bytes_for(tokens, config.hidden_size))),
        seconds=caching_seconds,
        peak=max((memory_of(segment.peak) for segment in largest.segments), key=lambda peak: peak.total),
        epoch_seconds=steps * seconds,
        epoch_seconds_without=steps * seconds_without,
        is_assumed=lengths.is_assumed,
    )
