"""recipe_arguments(): the `TrainingArguments` of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from esm_efficient import compat
from esm_efficient.costs.devices import native_precision
from esm_efficient.data.tokenizing import LENGTH_COLUMN
from esm_efficient.errors import ConfigurationError
from esm_efficient.recipes import Precision, Recipe, get_recipe

EPOCHS = 3.0
"""Passes over the training sequences. One is too few for a small table, as docs/pages/results.md shows."""


def recipe_arguments(
    recipe: str | Recipe, output_dir: str | Path, *, precision: Precision = "auto", **overrides: Any
) -> TrainingArguments:
    """Return the `TrainingArguments` of a recipe.

    Args:
        recipe: a name or a `Recipe`.
        output_dir: folder for checkpoints.
        precision: ``"auto"``, ``"float32"``, ``"bf16"`` or ``"fp16"`` (`esm_efficient.recipes.Precision`);
            ``"pure-bf16"`` is for estimates.
        **overrides: options of `TrainingArguments` that override those of the recipe.

    Raises:
        ConfigurationError: the recipe is unknown, or the precision is not one of these, or needs a GPU.

    Example:
        >>> recipe_arguments("all", "output").gradient_accumulation_steps
        4
    """
    chosen = get_recipe(recipe)
    half = _half_precision(precision, use_cpu=bool(overrides.get("use_cpu")))
    options: dict[str, Any] = {
        "per_device_train_batch_size": chosen.micro_batch,
        "gradient_accumulation_steps": chosen.accumulation,
        "per_device_eval_batch_size": 16,
        "learning_rate": chosen.learning_rate,
        "length_column_name": LENGTH_COLUMN,
        "num_train_epochs": EPOCHS,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "logging_steps": 20,
        "disable_tqdm": False,  # transformers would decide by the level of its logs, which the command line lowers
        "save_strategy": "no",
        "report_to": "none",
        "bf16": half == "bf16",
        "fp16": half == "fp16",
        # transformers 5.3 refuses bfloat16 on a CPU without use_cpu.
        "use_cpu": not torch.accelerator.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        # Every trainable parameter is used in every step, because the contact head is frozen.
        "ddp_find_unused_parameters": False,
        **compat.checkpointing_arguments(chosen.gradient_checkpointing),
        **compat.installed_names(overrides),
    }
    return TrainingArguments(output_dir=str(output_dir), **options)


def refuse_data_parallel(args: TrainingArguments) -> None:
    """Refuse several GPUs in one process, for which Trainer would use torch.nn.DataParallel.

    Raises:
        ConfigurationError: the process has several GPUs.
    """
    if args.n_gpu > 1:
        raise ConfigurationError(
            f"this process has {args.n_gpu} GPUs, for which Trainer uses torch.nn.DataParallel, and the lean encoder "
            f"does not run under it. Start one process per GPU, with torchrun --nproc-per-node={args.n_gpu} or "
            "accelerate launch; or set CUDA_VISIBLE_DEVICES=0 before Python starts, to use one GPU"
        )


def refuse_unsaved_weights(args: TrainingArguments) -> None:
    """Refuse options under which a trained model would not be saved.

    Raises:
        ConfigurationError: DeepSpeed's stage 3 does not gather the weights, and Trainer would save none.
    """
    config: Any = getattr(args, "hf_deepspeed_config", None)
    option = "stage3_gather_16bit_weights_on_model_save"
    if config is not None and config.is_zero3() and not config.get_value(f"zero_optimization.{option}"):
        raise ConfigurationError(
            "DeepSpeed's stage 3 divides the weights, and this configuration does not gather them when the model is "
            f'saved, so that the folder would have no weights. Add "{option}": true to "zero_optimization"'
        )


def refuse_missing_trackers(args: TrainingArguments) -> None:
    """Refuse a tracker that is unknown or not installed: Trainer would say so after the model is loaded.

    Raises:
        ConfigurationError: as above.
    """
    from transformers.integrations import get_available_reporting_integrations

    installed = get_available_reporting_integrations()
    named = [args.report_to] if isinstance(args.report_to, str) else args.report_to or []
    if missing := [name for name in named if name not in {*installed, "all", "none"}]:
        raise ConfigurationError(
            f"report_to={missing[0]!r}: transformers knows no such tracker, or its package is not installed here; "
            f"installed: {', '.join(sorted(installed)) or 'none'}"
        )


def refuse_no_predictions(args: TrainingArguments) -> None:
    """Refuse options under which a Trainer gives no whole predictions to be evaluated, or changes the model by it.

    Raises:
        ConfigurationError: as above.
    """
    if rounding := [name for name in ("bf16_full_eval", "fp16_full_eval") if getattr(args, name)]:
        raise ConfigurationError(
            f"{rounding[0]}=True rounds the weights of the model at its evaluation, and a run saves it after that. "
            'Leave it out: precision="bf16" computes in half precision and keeps the weights'
        )
    whole = {"prediction_loss_only": False, "eval_do_concat_batches": True, "batch_eval_metrics": False}
    if changed := [f"{name}={not value}" for name, value in whole.items() if bool(getattr(args, name)) != value]:
        raise ConfigurationError(
            f"{', '.join(changed)}: a run is evaluated by its predictions for a whole split. Leave "
            f"{'it' if len(changed) == 1 else 'them'} out"
        )


def reason_against_cache(train: Any, args: TrainingArguments) -> str:
    """Return why a run cannot train on cached states; empty if nothing speaks against it.

    Args:
        train: the training split.
        args: the options of training.
    """
    if args.neftune_noise_alpha:
        return "neftune_noise_alpha adds noise to the embeddings, so that states differ in every step"
    if args.fsdp or args.deepspeed:
        return "the model is sharded over the ranks"
    return "" if hasattr(train, "__len__") else "the training data are a stream"


def check_token_budget(token_budget: int | None, args: TrainingArguments) -> None:
    """Refuse a token budget whose last batch would be dropped.

    Raises:
        ConfigurationError: as above.
    """
    if token_budget is not None and args.dataloader_drop_last:
        raise ConfigurationError("token_budget keeps all batches: leave dataloader_drop_last out")


def half_dtype(args: TrainingArguments) -> torch.dtype | None:
    """Return the half precision in which a run computes, and holds frozen parameters; None for float32."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None


def _half_precision(precision: Precision, *, use_cpu: bool) -> Precision:
    """Return the precision of a run on this machine."""
    if precision == "pure-bf16":
        raise ConfigurationError(
            'precision="pure-bf16" is for estimates of memory only, because it loses small updates. Expected "auto", '
            '"float32", "bf16" or "fp16" for training'
        )
    if precision not in ("auto", "float32", "bf16", "fp16"):
        raise ConfigurationError(f'precision={precision!r}: expected "auto", "float32", "bf16" or "fp16"')
    if precision == "fp16" and (use_cpu or not torch.accelerator.is_available()):
        raise ConfigurationError('precision="fp16" needs a GPU: expected "float32" or "bf16" on a CPU')
    return native_precision(torch.device("cpu" if use_cpu else "cuda")) if precision == "auto" else precision
