"""What a run of `finetune` will do and cost, before it starts."""

from __future__ import annotations

import dataclasses
import logging
import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from esm_efficient import compat
from esm_efficient.costs.devices import DEVICES, GIB, Device, devices_called
from esm_efficient.errors import ConfigurationError, EsmEfficientError
from esm_efficient.estimation.estimate import Estimate, estimate
from esm_efficient.estimation.inputs import data_lengths
from esm_efficient.recipes import Recipe
from esm_efficient.reporting import count_of, format_bytes, one_line
from esm_efficient.reporting.tables import format_duration
from esm_efficient.tasks import Task
from esm_efficient.training.arguments import reason_against_cache

if TYPE_CHECKING:
    from datasets import DatasetDict
    from transformers import TrainingArguments

    from esm_efficient.reporting.description import DataDescription

logger = logging.getLogger(__name__)

_OPTIMIZERS = {
    "adamw_torch_fused": "adamw_fused",
    "adamw_torch": "adamw_foreach",
    "adamw_8bit": "adamw_8bit",
    "adamw_bnb_8bit": "adamw_8bit",
}
"""What `estimate` calls the optimizers of `TrainingArguments`."""

FEW_STEPS = 100
"""Optimizer steps below which a run is warned of.

38 steps left a model far below a linear probe, 75 near it, and 114 above it (``docs/pages/results.md``).
"""


@dataclass(frozen=True)
class RunPlan:
    """What a run will do and cost.

    Attributes:
        model: Hub name or folder of the model.
        dataset: the name of the data.
        data: the description of the splits.
        recipe: the training method.
        task: the task.
        epochs: passes over the training sequences.
        steps: optimizer steps.
        batch_size: sequences per optimizer step, over all ranks.
        estimate: the costs of an optimizer step on this machine; None if they cannot be estimated.
        reason: why there is no estimate.
        probe: whether a linear probe is measured too.
    """

    model: str
    dataset: str
    data: DataDescription
    recipe: Recipe
    task: Task
    epochs: float
    steps: int
    batch_size: int
    estimate: Estimate | None
    reason: str = ""
    probe: bool = False

    def __str__(self) -> str:
        splits = self.data.splits
        total = sum(split.sequences for split in splits.values())
        shortest = min(split.residues[0] for split in splits.values())
        longest = max(split.residues[2] for split in splits.values())
        read = f"{self.dataset or 'data'}: {total:,} sequences of {shortest:,} to {longest:,} residues; "
        read += one_line(self.task.describe())
        shares = {name: split.relatives for name, split in splits.items() if split.relatives is not None}
        related = " and ".join(f"{100 * share:.1f} % of {name}" for name, share in shares.items())
        parts = ", ".join(f"{split.sequences:,} {name}" for name, split in splits.items())
        parts += f"; {related} have a close relative in train" if related else ""
        trains = f"{self.model}, recipe {self.recipe.name}"
        if self.estimate is not None:
            trains += f", {self.estimate.trainable_parameters:,} of {self.estimate.total_parameters:,} parameters"
        trains += f", {count_of(self.steps, 'step')} of {count_of(self.batch_size, 'sequence')}"
        trains += f" ({count_of(self.epochs, 'epoch')})"
        lines = {"read": read, "split": parts, "train": trains, "cost": self._cost()}
        if self.probe:
            lines["probe"] = f"a linear probe to compare with: one forward pass over {', '.join(splits)}"
        return "\n".join(f"{name:<7}{line}" for name, line in lines.items())

    def _cost(self) -> str:
        found = self.estimate
        if found is None:
            return f"not estimated: {self.reason}"
        text = f"about {format_bytes(found.peak.total)} of tensors at the peak"
        if found.device.memory:
            verdict = "fits" if found.fits() else "DOES NOT FIT"
            text += f": {verdict} into {format_bytes(found.device.memory)} of {found.device.name}"
        if found.device.backend == "cpu":
            text += ", beside Python and libraries"
        seconds = found.run_seconds(self.steps)
        text = text if math.isnan(seconds) else f"{text}; {format_duration(seconds)} or more"
        if found.cache is not None:
            text += f"; {format_bytes(found.cache.bytes)} or more on disk for the cached states"
        return f"{text}. {self._cure(found)}" if found.device.memory and not found.fits() else text

    def _cure(self, found: Estimate) -> str:
        """Return what to try if the run does not fit into the memory."""
        fewer = "--micro-batch 1 (micro_batch=1 in Python), or " if found.recipe.micro_batch > 1 else ""
        if found.device.backend == "cpu":  # whose rates are unknown
            return f"Try {fewer}a smaller model"
        words = ["esm-efficient", "recommend", "--model", self.model]
        known = DEVICES.get(found.device.name)
        is_as_known = known is not None and abs(known.memory - found.device.memory) <= 0.05 * known.memory
        words += ["--device", found.device.name if is_as_known else f"{found.device.memory / GIB:.3g}GB"]
        words += ["--tokens", str(found.tokens)]
        return f"Try {fewer}a smaller model; this looks for a recipe that fits: {shlex.join(words)}"


def plan_run(
    model: str,
    dataset: str,
    data: DataDescription,
    splits: DatasetDict,
    *,
    recipe: Recipe,
    task: Task,
    args: TrainingArguments,
    max_tokens: int = 1024,
    fused: bool = False,
    probe: bool = False,
    adapter_options: Mapping[str, Any] | None = None,
    token_budget: int | None = None,
) -> RunPlan:
    """Return what a run will do and cost.

    Args:
        model: Hub name or folder of the model.
        dataset: the name of the data.
        data: the description of the splits.
        splits: the splits, with the column ``sequence``.
        recipe: the training method.
        task: the task.
        args: the options of training.
        max_tokens: maximal number of tokens of a sequence.
        fused: whether the lean encoder's small kernels are fused.
        probe: whether a linear probe is measured too.
        adapter_options: options of the adapters.
        token_budget: the most tokens per micro-batch, if that was given.
    """
    micro, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    batch_size, train = batch_size_of(args), splits["train"]
    steps = planned_steps(len(train), args)
    found, reason = None, ""
    if reason_against_cache(train, args):
        recipe = recipe.replace(cache=False)
    recipe = recipe.replace(gradient_checkpointing=compat.asks_for_checkpointing(args))
    optimizer = _OPTIMIZERS.get(str(getattr(args.optim, "value", args.optim)))
    try:
        if token_budget is not None:
            raise ConfigurationError("with a token budget, batches have different numbers of sequences")
        if optimizer is None:
            raise ConfigurationError(f"the memory of the optimizer {args.optim} is not known")
        found = estimate(
            model,
            recipe=recipe,
            device=device_here(args.device),
            micro_batch=micro,
            accumulation=accumulation,
            tokens=data_lengths(splits, max_tokens=max_tokens),
            precision="bf16" if args.bf16 else "fp16" if args.fp16 else "float32",
            head=task.head,
            num_labels=len(task.names),
            fused=fused,
            optimizer=optimizer,
            adapter_options=adapter_options or None,
        )
    except EsmEfficientError as error:  # a model or a recipe that cannot be estimated can be trained all the same
        reason = str(error)
    epochs = args.num_train_epochs if args.max_steps <= 0 else round(steps / _steps_of(1, len(train), args), 2)
    return RunPlan(model, dataset, data, recipe, task, epochs, steps, batch_size, found, reason, probe)


def planned_steps(sequences: int, args: TrainingArguments) -> int:
    """Return the optimizer steps of a run on so many sequences, in batches of a fixed number of sequences."""
    if args.max_steps > 0:
        return args.max_steps
    return _steps_of(args.num_train_epochs, sequences, args)


def warn_of_few_steps(sequences: int, args: TrainingArguments) -> None:
    """Warn if a run has fewer than `FEW_STEPS` optimizer steps, unless their number was given.

    Args:
        sequences: number of training sequences.
        args: the options of training.
    """
    steps, batch_size = planned_steps(sequences, args), batch_size_of(args)
    if args.max_steps > 0 or not 0 < steps < FEW_STEPS:  # an empty split is an error elsewhere
        return
    if sequences < batch_size and (smaller := min(8, sequences // 4) // args.world_size):
        logger.warning(
            "the batch size %d is more than the %d training sequences, so that an epoch is one optimizer step and the "
            "run has %d: batch_size=%d makes %d",
            batch_size,
            sequences,
            steps,
            smaller,
            math.ceil(args.num_train_epochs * math.ceil(sequences / (smaller * args.world_size))),
        )
    else:
        epochs = math.ceil(args.num_train_epochs * FEW_STEPS / steps)
        logger.warning(
            "%s may be too few: with less than %d the result may be below that of a linear probe. epochs=%d makes %d",
            count_of(steps, "optimizer step"),
            FEW_STEPS,
            epochs,
            _steps_of(epochs, sequences, args),
        )


def _steps_of(epochs: float, sequences: int, args: TrainingArguments) -> int:
    """Return the optimizer steps of so many epochs, the last one of each on what is left of the data."""
    return math.ceil(epochs * math.ceil(sequences / batch_size_of(args)))


def batch_size_of(args: TrainingArguments) -> int:
    """Return the sequences per optimizer step, over all ranks."""
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size


def device_here(trains: torch.device) -> Device:
    """Return the device of this machine that trains, with the rates of the GPU of this name, if they are known.

    Args:
        trains: the device of the run, which is the CPU if the options say so (``use_cpu=True``).
    """
    if trains.type != "cuda":
        import psutil

        return dataclasses.replace(DEVICES["cpu"], memory=psutil.virtual_memory().available)
    name, memory = torch.cuda.get_device_name(trains), torch.cuda.get_device_properties(trains).total_memory
    return gpu_named(name, memory)


def gpu_named(name: str, memory: int) -> Device:
    """Return a GPU with the rates of the device in the table that has its name; without rates if none has.

    Args:
        name: what torch calls it.
        memory: its bytes.

    Example:
        >>> gpu_named("NVIDIA A100-SXM4-80GB", 85 * 10**9).bandwidth, gpu_named("Other 1", 2**34).bandwidth
        (2039000000000.0, 0.0)
    """
    found = devices_called(name)
    if not found:
        return Device(name, "cuda", memory)
    return dataclasses.replace(min(found, key=lambda device: abs(device.memory - memory)), memory=memory)
