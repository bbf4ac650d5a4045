"""estimate(): peak memory and step time of training, with no GPU and no weights."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from esm_efficient.costs.devices import DEFAULT_DEVICE, Device, get_device
from esm_efficient.costs.memory import CATEGORIES, Memory
from esm_efficient.errors import ConfigurationError
from esm_efficient.estimation.inputs import batch_lengths, resolve_config, token_lengths
from esm_efficient.estimation.simulate import Padding, Segment, Simulation, Step, simulate
from esm_efficient.recipes import Precision, Recipe, get_recipe
from esm_efficient.reporting import format_bytes, format_table
from esm_efficient.tasks import Head

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

MARGIN = 0.1
"""Share of a device's memory that stays free: for the CUDA context, kernels' workspaces and fragmentation."""

_DEPTHS = (2, 3)
"""Layers of the two models that all others are extrapolated from: a first and a last layer, and one between them."""


@dataclass(frozen=True)
class PhaseCost:
    """What a phase of an optimizer step costs.

    Attributes:
        peak: bytes at the highest moment of the phase.
        flops: floating-point operations, recomputation included, over the whole accumulated batch.
        bytes_moved: bytes that operations read and write, likewise.
        seconds: of the roofline; NaN without a device's figures.
    """

    peak: Memory
    flops: float
    bytes_moved: float
    seconds: float


@dataclass(frozen=True)
class TimelinePoint:
    """Bytes held at one moment of a step: when a segment begins, at its peak, and when the step ends."""

    phase: str
    part: str
    seconds: float
    memory: Memory


@dataclass(frozen=True)
class Estimate:
    """What one optimizer step would cost.

    Attributes:
        model: what was asked about.
        recipe: with the sizes that were estimated.
        device: whose kernels, memory and rates.
        precision: of the step.
        optimizer: of the step.
        attention: implementation.
        padding: of the batches.
        tokens: of the longest sequence, which decides the memory.
        peak: bytes at the highest moment, by category.
        peak_phase: when that is.
        phases: the same by phase, with times.
        timeline: memory over one micro-batch and the optimizer's step.
        seconds: of one optimizer step by the roofline; NaN without a device's figures.
        residues: residues an optimizer step trains on, without padding and special tokens.
        trainable_parameters: parameters that an optimizer updates.
        total_parameters: of the whole model with its adapters.
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
    residues: float
    trainable_parameters: int
    total_parameters: int

    @property
    def residues_per_second(self) -> float:
        """Residues trained on per second; NaN without a device's figures."""
        return self.residues / self.seconds if self.seconds else math.nan

    def fits(self, *, margin: float = MARGIN) -> bool:
        """Whether the peak leaves a share of the device's memory free.

        Args:
            margin: share that must stay free.

        Raises:
            ConfigurationError: the device's memory is not known.
        """
        if not self.device.memory:
            raise ConfigurationError(f"the memory of device {self.device.name!r} is not known: name a GPU")
        return self.peak.total <= (1 - margin) * self.device.memory

    def to_dict(self) -> dict[str, Any]:
        """Every figure but the timeline, ready for JSON; a time that is not known is None."""
        return {
            "model": self.model,
            "recipe": self.recipe.name,
            "micro_batch": self.recipe.micro_batch,
            "accumulation": self.recipe.accumulation,
            "gradient_checkpointing": self.recipe.gradient_checkpointing,
            "preset": self.recipe.preset,
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
                    "seconds": _known(cost.seconds),
                }
                for name, cost in self.phases.items()
            },
            "seconds": _known(self.seconds),
            "residues_per_second": _known(self.residues_per_second),
            "trainable_parameters": self.trainable_parameters,
            "total_parameters": self.total_parameters,
        }

    def __str__(self) -> str:
        recipe = self.recipe
        rows = [
            (
                name,
                *(format_bytes(getattr(cost.peak, category)) for category in CATEGORIES),
                format_bytes(cost.peak.total),
                "-" if math.isnan(cost.seconds) else f"{cost.seconds:.3g} s",
            )
            for name, cost in self.phases.items()
        ]
        table = format_table(rows, ("peak of phase", *CATEGORIES, "total", "time at least"))
        verdict = ""
        if self.device.memory:
            verdict = "fits" if self.fits() else "does not fit"
            verdict = (
                f" ({verdict} {self.device.name} with {format_bytes(self.device.memory)}, {MARGIN:.0%} of it kept free)"
            )
        speed = ""
        if not math.isnan(self.seconds):
            speed = (
                f"\noptimizer step: {self.seconds:.3g} s or more, {self.residues_per_second:,.0f} residues/s or less "
                f"(roofline of {self.device.name})"
            )
        return (
            f"{self.model}, recipe {recipe.name}: micro-batch {recipe.micro_batch} x {recipe.accumulation}, "
            f"{self.tokens:,} tokens, {self.precision}, {self.optimizer}, {self.attention} attention, padding: "
            f"{self.padding}\n"
            f"{self.trainable_parameters:,} of {self.total_parameters:,} parameters train\n\n{table}\n\n"
            f"peak: {format_bytes(self.peak.total)} in {self.peak_phase}{verdict}{speed}"
        )


def estimate(
    model: str | Path | PreTrainedConfig | PreTrainedModel,
    *,
    recipe: str | Recipe = "all",
    device: str | Device = DEFAULT_DEVICE,
    micro_batch: int | None = None,
    accumulation: int | None = None,
    tokens: Any = 512,
    preset: str | None = None,
    precision: Precision = "auto",
    optimizer: str = "adamw_fused",
    attention: str = "sdpa",
    padding: Padding | None = None,
    head: Head = "sequence-classification",
    num_labels: int = 2,
    adapter_options: Mapping[str, Any] | None = None,
    extrapolate: bool = True,
) -> Estimate:
    """Predict peak memory and time of one optimizer step, without a GPU and without weights.

    The real model class takes a real step under fake tensors, every allocation is counted, and the encoder's layers
    are extrapolated from models of two and three layers. Time is a roofline of the same operations: for each, the
    larger of its FLOPs at the device's rate and its bytes at the device's bandwidth. A real step takes longer.

    Not counted: what lies outside torch's allocator (the CUDA context, several hundred MB), memory that a kernel takes
    for itself, and fragmentation.

    Args:
        model: an ESM-2 size (``"8M"``, ``"35M"``, ``"150M"``, ``"650M"``, ``"3B"``, ``"15B"``), a model id of one of
            these (``"facebook/esm2_t33_650M_UR50D"``), a folder with a ``config.json``, a config, or a model.
        recipe: a name or a `Recipe`.
        device: a name in `DEVICES` or an instance type; ``"cpu"`` gives memory and no time.
        micro_batch: sequences in one forward pass; the recipe's if None.
        accumulation: micro-batches an optimizer step; the recipe's if None.
        tokens: tokens of every sequence, special tokens included; or those of many, as numbers or as a data set with
            a column ``length`` (of tokens) or ``sequence`` (of residues; of a DatasetDict the split ``train``). The
            longest then decide the memory and the average batch the time.
        preset: adapters; the recipe's if None.
        precision: ``"float32"``, ``"bf16"``, ``"fp16"`` (autocast, frozen weights in that type), ``"pure-bf16"``
            (everything held in bfloat16). ``"auto"`` does what `finetune` does: bf16 on a CUDA device that has it.
        optimizer: ``"adamw_fused"`` (Trainer's default), ``"adamw_foreach"``, ``"adamw"``, ``"adamw_8bit"``.
        attention: ``"sdpa"`` or ``"eager"``.
        padding: ``"padded"``, or ``"equal-length"`` for batches of one length, with transformers' own encoder;
            ``"padding-free"`` with the lean encoder. If None, what the recipe's encoder does.
        head: ``"sequence-classification"``, ``"token-classification"`` or ``"masked-lm"``.
        num_labels: of a classification head.
        adapter_options: options of `lora_config` that win over the recipe's.
        extrapolate: False runs every layer, which gives the same figures and takes longer.

    Returns:
        Memory by category and phase, and the time.

    Raises:
        ConfigurationError: nothing is known by a name, or the options contradict each other.
        TargetModuleError: the adapters do not fit the model.

    Example:
        >>> result = estimate("650M", recipe="all", device="A10G", tokens=512)
        >>> result.fits()
        True
    """
    name, config = resolve_config(model)
    kind: Any = type(config)
    changes = {"micro_batch": micro_batch, "accumulation": accumulation, "preset": preset}
    chosen = get_recipe(recipe).replace(**{key: value for key, value in changes.items() if value is not None})
    target = get_device(device)
    if precision == "auto":
        precision = "bf16" if target.backend == "cuda" and target.has_bf16 else "float32"
    if padding is None:
        padding = "padding-free" if chosen.encoder == "lean" and attention == "sdpa" else "padded"
    given = token_lengths(tokens)
    lengths = [given] if isinstance(given, int) else given
    longest, typical, residues = batch_lengths(lengths, chosen.micro_batch, padding)

    options = {k: tuple(sorted(v)) if isinstance(v, (list, set)) else v for k, v in (adapter_options or {}).items()}

    # What a step does hangs on the device's kernels and rates alone, and devices of any memory share it.
    rates = Device("", target.backend, flops_per_second=target.flops_per_second, bandwidth=target.bandwidth)

    def run(tokens: int) -> _Run:
        step = Step(
            recipe=dataclasses.replace(chosen, name="", learning_rate=0.0, description=""),
            tokens=tokens,
            device=rates,
            precision=precision,
            optimizer=optimizer,
            attention=attention,
            padding=padding,
            head=head,
            num_labels=num_labels,
            adapter_options=tuple(sorted(options.items())),
        )
        return _run(config.to_json_string(use_diff=False), kind, step, extrapolate)

    memory = run(longest)
    time = memory if typical == longest else run(typical)
    known = bool(target.flops_per_second)
    phases = {}
    for phase in ("forward", "backward", "optimizer"):
        of_phase = [segment for segment in memory.segments if segment.phase == phase]
        costs = sum((segment.cost for segment in time.segments if segment.phase == phase), np.zeros(3))
        peak = max((_memory(segment.peak) for segment in of_phase), key=lambda m: m.total)
        phases[phase] = PhaseCost(peak, costs[0], costs[1], costs[2] if known else math.nan)
    peak_phase = max(phases, key=lambda phase: phases[phase].peak.total)
    return Estimate(
        model=name,
        recipe=chosen,
        device=target,
        precision=precision,
        optimizer=optimizer,
        attention=attention,
        padding=padding,
        tokens=longest,
        peak=phases[peak_phase].peak,
        peak_phase=peak_phase,
        phases=phases,
        timeline=_timeline(memory.segments, chosen.accumulation),
        seconds=sum(cost.seconds for cost in phases.values()),
        residues=residues * chosen.batch_size,
        trainable_parameters=memory.trainable_parameters,
        total_parameters=memory.total_parameters,
    )


@dataclass(frozen=True)
class _Run:
    """The segments of a step at the model's own depth."""

    segments: tuple[Segment, ...]
    trainable_parameters: int
    total_parameters: int


@lru_cache(maxsize=256)
def _run(config_json: str, kind: Any, step: Step, extrapolate: bool) -> _Run:
    config = kind.from_dict(json.loads(config_json))
    layers = config.num_hidden_layers
    if not extrapolate or layers <= max(_DEPTHS):
        whole = simulate(config, step, layers=layers)
        return _Run(whole.segments, whole.trainable_parameters, whole.total_parameters)
    short, long = (simulate(config, step, layers=depth) for depth in _DEPTHS)

    def at_depth(a: float, b: float) -> int:
        return int(b + (b - a) * (layers - _DEPTHS[1]))

    return _Run(
        _extend(short, long, layers),
        at_depth(short.trainable_parameters, long.trainable_parameters),
        at_depth(short.total_parameters, long.total_parameters),
    )


def _extend(short: Simulation, long: Simulation, layers: int) -> tuple[Segment, ...]:
    """The segments of a model of many layers, from those of a two-layer and a three-layer model.

    Every layer between the first and the last does the same, so the middle segments of the longer model are repeated.
    What lies around the layers is the same at every depth or, like the optimizer's step, grows by the same amount with
    each layer. Segments are put one after another by what they add to what was held before them.
    """
    last_short, last_long = (f"layer {depth - 1}" for depth in _DEPTHS)
    by_part = {(s.phase, s.part if s.part != last_short else last_long): s for s in short.segments}
    extra = layers - _DEPTHS[1]
    held = long.segments[0].start + extra * (long.segments[0].start - short.segments[0].start)
    extended: list[Segment] = []

    def add(part: str, peak: np.ndarray, change: np.ndarray, phase: str, cost: np.ndarray) -> None:
        nonlocal held
        extended.append(Segment(phase, part, held, held + peak, held + change, cost))
        held = held + change

    for segment in long.segments:
        peak, change = segment.peak - segment.start, segment.end - segment.start
        if segment.part == "layer 1":
            numbers = range(1, layers - 1)
            for number in numbers if segment.phase == "forward" else reversed(numbers):
                add(f"layer {number}", peak, change, segment.phase, segment.cost)
            continue
        other = by_part[segment.phase, segment.part]
        peak = peak + extra * (peak - (other.peak - other.start))
        change = change + extra * (change - (other.end - other.start))
        cost = segment.cost + extra * (segment.cost - other.cost)
        part = f"layer {layers - 1}" if segment.part == last_long else segment.part
        add(part, peak, change, segment.phase, cost)
    return tuple(extended)


def _timeline(segments: Sequence[Segment], accumulation: int) -> tuple[TimelinePoint, ...]:
    points, seconds = [], 0.0
    for segment in segments:
        took = segment.cost[2] / (accumulation if segment.phase != "optimizer" else 1)
        points.append(TimelinePoint(segment.phase, segment.part, seconds, _memory(segment.start)))
        points.append(TimelinePoint(segment.phase, segment.part, seconds + took / 2, _memory(segment.peak)))
        seconds += took
    last = segments[-1]
    points.append(TimelinePoint(last.phase, last.part, seconds, _memory(last.end)))
    return tuple(points)


def _memory(vector: np.ndarray) -> Memory:
    return Memory(**dict(zip(CATEGORIES, map(int, vector), strict=True)))


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
