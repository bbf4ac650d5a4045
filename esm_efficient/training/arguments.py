"""recipe_arguments(): the `TrainingArguments` of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from esm_efficient import compat
from esm_efficient.data.tokenizing import LENGTH_COLUMN
from esm_efficient.errors import ConfigurationError
from esm_efficient.recipes import Precision, Recipe, get_recipe


def recipe_arguments(
    recipe: str | Recipe, output_dir: str | Path, *, precision: Precision = "auto", **overrides: Any
) -> TrainingArguments:
    """Return the `TrainingArguments` of a recipe.

    Args:
        recipe: a name or a `Recipe`.
        output_dir: folder for checkpoints.
        precision: ``"auto"``, ``"float32"`` or ``"bf16"``. The other values of `esm_efficient.recipes.Precision` are
            for estimates.
        **overrides: options of `TrainingArguments` that override those of the recipe.

    Raises:
        ConfigurationError: the recipe is unknown, or the precision is not one of the three.

    Example:
        >>> recipe_arguments("all", "output").gradient_accumulation_steps
        4
    """
    chosen = get_recipe(recipe)
    options: dict[str, Any] = {
        "per_device_train_batch_size": chosen.micro_batch,
        "gradient_accumulation_steps": chosen.accumulation,
        "per_device_eval_batch_size": 16,
        "learning_rate": chosen.learning_rate,
        "length_column_name": LENGTH_COLUMN,
        "num_train_epochs": 1,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "logging_steps": 20,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": _uses_bf16(precision),
        # transformers 5.3 refuses bfloat16 on a CPU without use_cpu.
        "use_cpu": not torch.accelerator.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        # Every trainable parameter is used in every step, because the contact head is frozen.
        "ddp_find_unused_parameters": False,
        **compat.checkpointing_arguments(chosen.gradient_checkpointing),
        **compat.installed_names(overrides),
    }
    return TrainingArguments(output_dir=str(output_dir), **options)


def _uses_bf16(precision: Precision) -> bool:
    if precision in ("fp16", "pure-bf16"):
        raise ConfigurationError(
            f"precision={precision!r} is for estimates of memory only: fp16 needs a loss scale, and pure-bf16 loses "
            'small updates. Expected "auto", "float32" or "bf16" for training'
        )
    if precision not in ("auto", "float32", "bf16"):
        raise ConfigurationError(f'precision={precision!r}: expected "auto", "float32" or "bf16"')
    if precision == "auto":
        # A T4 supports bfloat16 only by emulation, which is slower than float32.
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return precision == "bf16"
