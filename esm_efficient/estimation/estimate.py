"""estimate(): peak memory and step time of training, with no GPU and no weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from esm_efficient.adapters.quantization import quantization_of
from esm_efficient.costs.devices import DEFAULT_DEVICE, Device, get_device
from esm_efficient.costs.memory import CATEGORIES, Memory
from esm_efficient.errors import ConfigurationError
from esm_efficient.estimation.caching import CacheCost, cache_cost
from esm_efficient.estimation.extrapolate import simulate_model
from esm_efficient.estimation.inputs import batch_lengths, data_lengths, resolve_config, resolve_head
from esm_efficient.estimation.segments import Simulation, memory_of, seconds_of
from esm_efficient.estimation.step import Attention, Padding, Step, frozen
from esm_efficient.recipes import Precision, Recipe, get_recipe, with_possible_pooling
from esm_efficient.reporting import format_bytes, format_seconds, format_table
from esm_efficient.tasks import Head
from esm_efficient.trunk.split import encoder_dropout

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

MARGIN = 0.1
"""Share of a device's memory to leave free: for the CUDA context, kernels' workspaces and fragmentation."""


@dataclass(frozen=True)
class PhaseCost:
    """Memory, work and time of one phase of an optimizer step.

    Attributes:
        peak: bytes in use at the highest moment of the phase.
        flops: floating-point operations of all micro-batches, recomputation included.
        bytes_moved: bytes that the operations of all micro-batches read and write.
        kernels: kernels that all micro-batches launch, counted as operations.
        seconds: time by the roofline; NaN if the device's rates are unknown.
    """

    peak: Memory
    flops: float
    bytes_moved: float
    kernels: float
    seconds: float


@dataclass(frozen=True)
class TimelinePoint:
    """Bytes in use at one moment of a step: at a segment's beginning, at its peak, and at the end of the step."""

    phase: str
    part: str
    seconds: float
    memory: Memory


@dataclass(frozen=True)
class Estimate:
    """The predicted costs of one optimizer step, and of a cache of the trunk's states.

    Attributes:
        model: name of the model.
        recipe: the training method with the estimated sizes.
        device: the device that decides kernels, memory and rates.
        precision: number format of the step.
        optimizer: name of the optimizer.
        attention: attention implementation.
        padding: layout of the batches.
        tokens: tokens per sequence of the largest micro-batch, which decides the memory: those of the longest
            sequence, or without padding the mean of the longest sequences.
        peak: bytes in use at the highest moment, by category.
        peak_phase: phase of that moment; ``"caching"`` if the pass that computes the cache needs more than a step.
        phases: costs by phase of a step.
        timeline: memory over one micro-batch and the optimizer's step.
        seconds: time of one optimizer step by the roofline; NaN if the device's rates are unknown.
        is_host_bound: whether the host, which launches kernels, limits a step, and not the device.
        residues: residues per optimizer step, without padding and special tokens.
        sequences: training sequences of an epoch.
        trainable_parameters: parameters that the optimizer updates.
        total_parameters: parameters of the whole model with its adapters.
        cache: costs of the cache of the trunk's states; None without a cache.
    """

    model: str
    recipe: Recipe
    device: Device
    precision: str
    optimizer: str
    attention: str
    padding: str
    tokens: int
    peak: Memory
    peak_phase: str
    phases: Mapping[str, PhaseCost]
    timeline: tuple[TimelinePoint, ...]
    seconds: float
    is_host_bound: bool
    residues: float
    sequences: int
    trainable_parameters: int
    total_parameters: int
    cache: CacheCost | None = None

    @property
    def kernels(self) -> float:
        """Kernels of an optimizer step, counted as operations."""
        return sum(cost.kernels for cost in self.phases.values())

    def run_seconds(self, steps: int) -> float:
        """Return the time of some optimizer steps and of caching; NaN if the device's rates are unknown."""
        return self.seconds * steps + (0.0 if self.cache is None else self.cache.seconds)

    @property
    def residues_per_second(self) -> float:
        """Trained residues per second; NaN if the device's rates are unknown."""
        return self.residues / self.seconds if self.seconds else math.nan

    def fits(self, *, margin: float = MARGIN) -> bool:
        """Return whether the peak leaves enough of the device's memory free.

        Args:
            margin: share of the memory to leave free.

        Raises:
            ConfigurationError: the device's memory is unknown.
        """
        if not self.device.memory:
            raise ConfigurationError(f"the memory of device {self.device.name!r} is unknown: name a GPU")
        return self.peak.total <= (1 - margin) * self.device.memory

    def to_dict(self) -> dict[str, Any]:
        """Return every figure except the timeline, ready for JSON; an unknown time is None."""
        return {
            "model": self.model,
            "recipe": self.recipe.name,
            "micro_batch": self.recipe.micro_batch,
            "accumulation": self.recipe.accumulation,
            "gradient_checkpointing": self.recipe.gradient_checkpointing,
            "preset": self.recipe.preset,
            "layers": self.recipe.layers,
            "pooling": self.recipe.pooling,
            "quantization": self.recipe.quantization,
            "tokens": self.tokens,
            "device": self.device.name,
            "device_memory_bytes": self.device.memory or None,
            "fits": self.fits() if self.device.memory else None,
            "precision": self.precision,
            "optimizer": self.optimizer,
            "attention": self.attention,
            "padding": self.padding,
            "peak_bytes": self.peak.total,
            "peak": self.peak.to_dict(),
            "peak_phase": self.peak_phase,
            "phases": {
                name: {
                    "peak": cost.peak.to_dict(),
                    "flops": cost.flops,
                    "bytes_moved": cost.bytes_moved,
                    "kernels": cost.kernels,
                    "seconds": _none_if_nan(cost.seconds),
                }
                for name, cost in self.phases.items()
            },
            "seconds": _none_if_nan(self.seconds),
            "host_bound": self.is_host_bound,
            "residues_per_second": _none_if_nan(self.residues_per_second),
            "cache": None if self.cache is None else self.cache.to_dict(),
            "trainable_parameters": self.trainable_parameters,
            "total_parameters": self.total_parameters,
        }

    def __str__(self) -> str:
        recipe, device = self.recipe, self.device
        rows = [
            (name, *map(format_bytes, cost.peak.to_dict().values()), format_seconds(cost.seconds))
            for name, cost in self.phases.items()
        ]
        if self.cache is not None:
            caching = map(format_bytes, self.cache.peak.to_dict().values())
            rows.insert(0, ("caching", *caching, format_seconds(self.cache.seconds)))
        verdict = speed = ""
        if device.memory:
            verdict = (
                f" ({'fits' if self.fits() else 'does not fit'} {device.name} with {format_bytes(device.memory)}, "
                f"{MARGIN:.0%} of it kept free)"
            )
        if not math.isnan(self.seconds):
            limit = f"launching {self.kernels:,.0f} kernels limits it" if self.is_host_bound else "the device limits it"
            speed = (
                f"\noptimizer step: {format_seconds(self.seconds)} or more, {self.residues_per_second:,.0f} residues/s "
                f"or less (roofline of {device.name}; {limit})"
            )
        if self.cache is not None:
            speed += f"\n{self.cache}"
        return (
            f"{self.model}, recipe {recipe.name}: micro-batch {recipe.micro_batch} x {recipe.accumulation}, "
            f"{self.tokens:,} tokens, {self.precision}, {self.optimizer}, {self.attention} attention, padding: "
            f"{self.padding}{f', the lowest {recipe.keep_layers} layers alone' if recipe.keep_layers else ''}"
            f"{f', base in {quantization[0]} bits' if (quantization := recipe.quantization) else ''}\n"
            f"{self.trainable_parameters:,} of {self.total_parameters:,} parameters train\n\n"
            f"{format_table(rows, ('peak of phase', *CATEGORIES, 'total', 'time at least'))}\n\n"
            f"peak: {format_bytes(self.peak.total)} in {self.peak_phase}{verdict}{speed}"
        )


def estimate(
    model: str | Path | PreTrainedConfig | PreTrainedModel,
    *,
    recipe: str | Recipe = "top",
    device: str | Device = DEFAULT_DEVICE,
    micro_batch: int | None = None,
    accumulation: int | None = None,
    tokens: Any = 512,
    preset: str | None = None,
    precision: Precision = "auto",
    optimizer: str = "adamw_fused",
    attention: str = "sdpa",
    padding: Padding | None = None,
    head: Head | None = None,
    num_labels: int | None = None,
    adapter_options: Mapping[str, Any] | None = None,
    sequences: int | None = None,
    fused: bool = False,
    extrapolate: bool = True,
) -> Estimate:
    """Predict peak memory and time of one optimizer step, without a GPU and without weights.

    The real model class takes a real step under fake tensors, and every allocation is counted. The encoder's layers are
    extrapolated from models of two and three layers. Time is a roofline of the same operations. The device is busy, for
    each operation, for the larger of its FLOPs at the device's rate and its bytes at the device's bandwidth. The host
    needs `Device.launch_seconds` per kernel meanwhile. A step takes as long as the slower of the two. A real step takes
    longer.

    For a recipe with ``cache=True`` the step is one on cached states, and `Estimate.cache` says what the cache costs.
    The peak is then that of the step or of the pass that computes the states. A model with dropout is estimated without
    the cache, as it is trained.

    Not counted: memory outside torch's allocator (the CUDA context, several hundred MB), workspaces of kernels, and
    fragmentation.

    Args:
        model: an ESM-2 size (``"8M"``, ``"35M"``, ``"150M"``, ``"650M"``, ``"3B"``, ``"15B"``), a model id of one of
            these (``"facebook/esm2_t33_650M_UR50D"``), a folder with a ``config.json``, the folder of an adapter, a
            config, or a model. If its config is that of a quantised model, the recipe's quantization is that too.
        recipe: a name or a `Recipe`.
        device: as in `get_device`; ``"cpu"``, or a memory such as ``"12GB"``, gives memory and no time.
        micro_batch: sequences in one forward pass; None for the recipe's.
        accumulation: micro-batches per optimizer step; None for the recipe's.
        tokens: tokens of every sequence, special tokens included; or the tokens of many sequences, as numbers or as a
            dataset that `token_lengths` reads, up to 1,024 per sequence as `finetune` does. The longest sequences then
            decide the memory, and the average batch decides the time.
        preset: layers with adapters; None for the recipe's.
        precision: number format; ``"auto"`` does what `finetune` does: bf16 on a CUDA device that multiplies it
            in hardware, fp16 on an older one.
        optimizer: ``"adamw_fused"`` (Trainer's default), ``"adamw_foreach"``, ``"adamw"``, ``"adamw_8bit"``.
        attention: ``"sdpa"`` or ``"eager"``.
        padding: ``"padded"``, or ``"equal-length"`` for batches of one length, with transformers' own encoder;
            ``"padding-free"`` with the lean encoder. None for the layout of the recipe's encoder, or ``"padded"`` if
            the lean encoder does not support the model.
        head: ``"sequence-classification"``, ``"token-classification"`` or ``"masked-lm"``; None for the head of a model
            object, and the first of these for anything else.
        num_labels: labels of a classification head; None for those of a model object, or 2.
        adapter_options: options of `lora_config` that override the recipe's.
        sequences: training sequences of an epoch; by default those of `tokens`, or 15,876 if `tokens` is one number. If
            `tokens` is a dataset with a split ``validation``, the cache has that split too.
        fused: whether torch.compile fuses the lean encoder's small kernels, as `apply_lean_encoder`.
        extrapolate: False runs every layer, which gives the same figures and takes longer.

    Returns:
        Memory by category and phase, and the time.

    Raises:
        ConfigurationError: a name is unknown, or options contradict each other.
        TargetModuleError: the adapters do not fit the model.

    Example:
        >>> result = estimate("650M", recipe="all", device="A10G", tokens=512)
        >>> result.fits()
        True
    """
    name, config = resolve_config(model, keep_layers=get_recipe(recipe).keep_layers)
    head, num_labels, own = resolve_head(model, head, num_labels)
    changes = {"micro_batch": micro_batch, "accumulation": accumulation, "preset": preset}
    recipe = get_recipe(recipe).replace(**{key: value for key, value in changes.items() if value is not None})
    recipe = with_possible_pooling(recipe, head, config.model_type, own)
    if recipe.quantization is None and (held := quantization_of(config)):
        recipe = recipe.replace(quantization=held)
    device = get_device(device)
    precision = device.precision if precision == "auto" else precision
    if padding is None:
        is_lean = recipe.encoder == "lean" and attention == "sdpa" and config.model_type == "esm"
        padding = "padding-free" if is_lean else "padded"
    lengths = data_lengths(tokens, sequences)
    train = [lengths.train] if isinstance(lengths.train, int) else lengths.train
    batch = batch_lengths(train, recipe.micro_batch, padding)
    # What EVA reads changes the first values alone.
    options = {name: value for name, value in (adapter_options or {}).items() if name != "eva_config"}
    if encoder_dropout(config):
        recipe = recipe.replace(cache=False)
    # Simulations are cached. A step depends on these fields of recipe and device only, so that others share its entry.
    step = Step(
        recipe=dataclasses.replace(recipe, name="", learning_rate=0.0, description=""),
        tokens=batch.longest,
        device=Device("", device.backend, flops_per_second=device.flops_per_second, bandwidth=device.bandwidth),
        precision=precision,
        optimizer=optimizer,
        attention=cast(Attention, attention),  # checked by the simulation
        padding=padding,
        head=head,
        num_labels=num_labels,
        adapter_options=frozen(options),
        fused=fused,
    )
    typical = dataclasses.replace(step, tokens=batch.average)
    largest, average = (simulate_model(config, sized, extrapolate=extrapolate) for sized in (step, typical))
    phases, is_host_bound = _phase_costs(largest, average, device)
    seconds = sum(cost.seconds for cost in phases.values())
    cache = cache_cost(config, typical, lengths, device, seconds=seconds, extrapolate=extrapolate)
    peaks = {phase: cost.peak for phase, cost in phases.items()} | ({} if cache is None else {"caching": cache.peak})
    peak_phase = max(peaks, key=lambda phase: peaks[phase].total)
    return Estimate(
        model=name,
        recipe=recipe,
        device=device,
        precision=precision,
        optimizer=optimizer,
        attention=attention,
        padding=padding,
        tokens=batch.longest,
        peak=peaks[peak_phase],
        peak_phase=peak_phase,
        phases=phases,
        timeline=_timeline(largest, device, recipe.accumulation),
        seconds=seconds,
        is_host_bound=is_host_bound,
        residues=batch.residues * recipe.batch_size,
        sequences=lengths.sequences,
        trainable_parameters=largest.trainable_parameters,
        total_parameters=largest.total_parameters,
        cache=cache,
    )


def _phase_costs(largest: Simulation, average: Simulation, device: Device) -> tuple[dict[str, PhaseCost], bool]:
    """Return the costs of each phase, and whether the host limits the step.

    Memory is that of the largest micro-batch, work and time are those of the average one.
    """
    names = ("forward", "backward", "optimizer")
    totals = np.array([sum(s.cost for s in average.segments if s.phase == name) for name in names])
    costs = {}
    for name, (flops, moved, _, kernels), seconds in zip(names, totals, seconds_of(totals, device), strict=True):
        peaks = [memory_of(segment.peak) for segment in largest.segments if segment.phase == name]
        costs[name] = PhaseCost(max(peaks, key=lambda peak: peak.total), flops, moved, kernels, float(seconds))
    busy, kernels = totals[:, 2:].sum(axis=0)
    return costs, bool(device.flops_per_second and device.bandwidth and kernels * device.launch_seconds > busy)


def _timeline(simulation: Simulation, device: Device, accumulation: int) -> tuple[TimelinePoint, ...]:
    points, seconds = [], 0.0
    durations = np.nan_to_num(seconds_of(simulation.costs, device))
    for segment, total in zip(simulation.segments, durations.tolist(), strict=True):
        duration = total / (accumulation if segment.phase != "optimizer" else 1)
        points.append(TimelinePoint(segment.phase, segment.part, seconds, memory_of(segment.start)))
        points.append(TimelinePoint(segment.phase, segment.part, seconds + duration / 2, memory_of(segment.peak)))
        seconds += duration
    points.append(TimelinePoint(segment.phase, segment.part, seconds, memory_of(segment.end)))
    return tuple(points)


def _none_if_nan(value: float) -> float | None:
    return None if math.isnan(value) else value
