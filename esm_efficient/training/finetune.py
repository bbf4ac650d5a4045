"""finetune(): the whole job in one call, and the pieces of it that a recipe decides."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import (
    AutoTokenizer,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from esm_efficient import compat
from esm_efficient.adapters.prepare import prepare_model
from esm_efficient.adapters.resolve import recipe_adapters
from esm_efficient.costs.memory import peak_memory
from esm_efficient.data.tokenizing import LENGTH_COLUMN, tokenize_dataset
from esm_efficient.encoder import apply_lean_encoder
from esm_efficient.errors import ConfigurationError, DataError
from esm_efficient.profiling.callback import ProfilerCallback
from esm_efficient.recipes import Precision, Recipe, get_recipe
from esm_efficient.tasks import Task, auto_class, head_of, task_of
from esm_efficient.training.audit import AuditCallback
from esm_efficient.training.metrics import compute_metrics_for, tune_thresholds
from esm_efficient.training.result import FinetuneResult
from esm_efficient.training.trainer import WeightedTrainer

if TYPE_CHECKING:
    from datasets import DatasetDict, Features
    from transformers import PreTrainedTokenizerBase


logger = logging.getLogger(__name__)


def recipe_arguments(
    recipe: str | Recipe, output_dir: str | Path, *, precision: Precision = "auto", **overrides: Any
) -> TrainingArguments:
    """The `TrainingArguments` of a recipe.

    Args:
        recipe: a name or a `Recipe`.
        output_dir: for checkpoints.
        precision: ``"bf16"`` trains under bfloat16 autocast, ``"float32"`` does not, ``"auto"`` does on a CUDA device
            that can.
        **overrides: any option of `TrainingArguments`, which wins over the recipe's.

    Raises:
        ConfigurationError: no recipe has that name, or `precision` is none of the three.

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
        # transformers 5.3 refuses bfloat16 on a CPU that it was not told to use.
        "use_cpu": not torch.accelerator.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        # The contact head is frozen, so every parameter that trains is used in every step.
        "ddp_find_unused_parameters": False,
        **compat.checkpointing_arguments(chosen.gradient_checkpointing),
        **compat.installed_names(overrides),
    }
    return TrainingArguments(output_dir=str(output_dir), **options)


def finetune(
    model: str | Path | PreTrainedModel,
    dataset: DatasetDict,
    *,
    recipe: str | Recipe = "all",
    output_dir: str | Path = "output",
    tokenizer: PreTrainedTokenizerBase | None = None,
    class_weights: str | Mapping[str, float] | Sequence[float] | None = "balanced",
    focal_gamma: float = 0.0,
    token_budget: int | None = None,
    max_tokens: int = 1024,
    seed: int = 0,
    precision: Precision = "auto",
    adapter_options: Mapping[str, Any] | None = None,
    resume_from_checkpoint: str | Path | bool | None = None,
    profile: bool = False,
    task: Task | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    **training_options: Any,
) -> FinetuneResult:
    """Fine-tune ESM-2: tokenise, prepare, train, audit, evaluate, save.

    What is learnt follows from the feature of the column ``label`` (`esm_efficient.tasks.task_of`): one class or
    several labels a sequence, one class a residue, or numbers. With several labels, validation and test, the threshold
    of each is tuned on validation and used on test.

    Args:
        model: a folder or a Hub name of an ESM-2 model, or a loaded model with the head that the task needs.
        dataset: splits ``train`` and ``test`` (or ``validation``), such as `load_deeploc` returns: ``sequence`` (str),
            ``label`` and, if sequences count unequally, ``sample_weight``. Or splits that `tokenize_dataset` has made.
        recipe: ``"base"``, ``"ga"``, ``"gc"``, ``"lora"``, ``"all"``, ``"frozen"``, or a `Recipe` of your own.
        output_dir: gets ``adapter/`` or ``model/``, and ``result.json``.
        tokenizer: needed only with a loaded model.
        class_weights: as `WeightedTrainer`; numbers to regress have no classes, so that ``"balanced"`` is none there.
        focal_gamma: as `WeightedTrainer`.
        token_budget: as `WeightedTrainer`.
        max_tokens: the most tokens of a sequence.
        seed: of the head, the adapters and the order of the batches.
        precision: ``"auto"``, ``"float32"`` or ``"bf16"``; with bf16 the frozen parameters are held in it.
        adapter_options: options of `lora_config` that win over the recipe's.
        resume_from_checkpoint: as `transformers.Trainer.train`; checkpoints are written with ``save_strategy="steps"``.
        profile: measure memory and time by phase (`ProfilerCallback`).
        task: what the labels stand for, where their feature does not say it: several labels that were tokenised
            before have lost their names.
        callbacks: further callbacks of the Trainer.
        **training_options: options of `TrainingArguments` that win over the recipe's, such as ``num_train_epochs``.

    Returns:
        Metrics, costs and paths.

    Raises:
        DataError: the dataset lacks a split, or its labels stand for no task.
        ConfigurationError: the options contradict each other or the model.
        TargetModuleError: the adapters do not fit the model.
        AuditError: a parameter that should train did not.

    Example:
        >>> from esm_efficient import finetune, load_deeploc
        >>> result = finetune("facebook/esm2_t6_8M_UR50D", load_deeploc())  # doctest: +SKIP
        >>> print(result.metrics["mcc"], result.model_dir)  # doctest: +SKIP
    """
    chosen, output_dir = get_recipe(recipe), Path(output_dir)
    features = next(iter(dataset.values())).features
    tokenized_before = "input_ids" in features
    task = task or _task_of(features, tokenized_before)
    evaluated_on = next((name for name in ("test", "validation") if name in dataset), None)
    if "train" not in dataset or evaluated_on is None:
        raise DataError(f"the dataset has the splits {', '.join(dataset)}: expected train, and test or validation")
    args = recipe_arguments(chosen, output_dir, precision=precision, seed=seed, **training_options)
    set_seed(seed)
    if isinstance(model, PreTrainedModel):
        loaded = model
        if tokenizer is None:
            raise ConfigurationError("a loaded model says nothing of its tokenizer: give tokenizer too")
        _tell(loaded, task)
    else:
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(model)
        loaded = auto_class(task.head).from_pretrained(
            model, num_labels=len(task.names), problem_type=task.problem_type, dtype=torch.float32
        )
    tokenized = dataset if tokenized_before else tokenize_dataset(dataset, tokenizer, max_tokens=max_tokens)[0]

    prepared = prepare_model(
        loaded,
        adapters=recipe_adapters(chosen, loaded, **(adapter_options or {})),
        head_only=chosen.trains == "head",
        gradient_checkpointing=compat.asks_for_checkpointing(args),
        dtype=torch.bfloat16 if args.bf16 else None,
        label_names=task.names,
    )
    if chosen.encoder == "lean":
        apply_lean_encoder(prepared)
    audit = AuditCallback()
    of_tokens = task.head == "token-classification"
    trainer = WeightedTrainer(
        prepared,
        args,
        train_dataset=tokenized["train"],
        eval_dataset=tokenized.get("validation"),
        data_collator=(DataCollatorForTokenClassification if of_tokens else DataCollatorWithPadding)(tokenizer),
        processing_class=tokenizer,
        compute_metrics=compute_metrics_for(task),
        callbacks=[audit, *callbacks],
        class_weights=None if task.kind == "regression" and class_weights == "balanced" else class_weights,
        focal_gamma=focal_gamma,
        token_budget=token_budget,
    )
    profiler = ProfilerCallback() if profile else None
    if profiler is not None:
        trainer.add_callback(profiler)
    trainable = sum(p.numel() for p in prepared.parameters() if p.requires_grad)
    total = sum(p.numel() for p in prepared.parameters())
    with peak_memory() as peak:
        output = trainer.train(
            resume_from_checkpoint=str(resume_from_checkpoint)
            if isinstance(resume_from_checkpoint, Path)
            else resume_from_checkpoint
        )
    report_of_run = None if profiler is None else profiler.report
    if report_of_run is not None and torch.cuda.is_available():
        # The profiler starts the allocator's peak anew at every phase.
        peak.bytes = max(peak.bytes, report_of_run.peak.total)
    thresholds = None
    if task.kind == "multi_label_classification" and {"validation", "test"} <= tokenized.keys():
        thresholds = _tune(trainer, tokenized["validation"], task)
        trainer.compute_metrics = compute_metrics_for(task, thresholds=np.array(list(thresholds.values())))
    metrics = trainer.predict(tokenized[evaluated_on], metric_key_prefix="test").metrics or {}

    model_dir = output_dir / ("adapter" if chosen.trains == "adapters" else "model")
    trainer.save_model(str(model_dir))
    layers = {int(match[1]) for name in audit.report.moved if (match := re.search(r"\.layer\.(\d+)\.", name))}
    result = FinetuneResult(
        recipe=chosen.name,
        seed=seed,
        task=task,
        metrics={
            key.removeprefix("test_"): value
            for key, value in metrics.items()
            if not key.endswith(("_runtime", "_per_second", "_preparation_time"))
        },
        evaluated_on=evaluated_on,
        train_loss=output.training_loss,
        steps=output.global_step,
        trainable_parameters=trainable,
        total_parameters=total,
        trained_layers=tuple(sorted(layers)),
        layers=prepared.config.num_hidden_layers,
        residues_per_second=trainer.residues_trained / output.metrics["train_runtime"],
        peak_memory_bytes=peak.bytes,
        peak_memory_kind=peak.kind,
        seconds=output.metrics["train_runtime"],
        model_dir=model_dir,
        result_path=output_dir / "result.json",
        model=prepared.eval(),
        profile=report_of_run,
        thresholds=thresholds,
    )
    if trainer.is_world_process_zero():
        tokenizer.save_pretrained(model_dir)
        result.result_path.write_text(json.dumps(result.to_dict(), indent=2) + "\n")
    return result


def _task_of(features: Features, tokenized: bool) -> Task:
    """The task that the labels say."""
    if not tokenized:
        return task_of(features)
    labels = features.get("labels")
    if getattr(labels, "length", -1) > 0:
        raise ConfigurationError(
            f"the labels of tokenised splits are lists of {labels.length} numbers, which may be several labels or "
            "numbers to regress, and have no names: give task=task_of(features) of the splits before"
        )
    return task_of(features, "labels")


def _uses_bf16(precision: Precision) -> bool:
    if precision not in ("auto", "float32", "bf16"):
        raise ConfigurationError(f'precision={precision!r}: expected "auto", "float32" or "bf16"')
    if precision == "auto":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return precision == "bf16"


def _tell(model: PreTrainedModel, task: Task) -> None:
    """Tell a loaded model its task."""
    if (head_of(model) == "token-classification") != (task.head == "token-classification"):
        raise ConfigurationError(f"{type(model).__name__} has no head for {task.describe()}")
    config: Any = model.config
    if config.problem_type not in (None, task.problem_type):
        raise ConfigurationError(f"the model is for {config.problem_type}, and the labels are {task.describe()}")
    config.problem_type = task.problem_type


def _tune(trainer: WeightedTrainer, validation: Any, task: Task) -> dict[str, float]:
    """The threshold of each label, also written into the model's config."""
    prediction = trainer.predict(validation, metric_key_prefix="validation")
    found = tune_thresholds(np.asarray(prediction.label_ids), np.asarray(prediction.predictions), task.names)
    thresholds = dict(zip(task.names, found.tolist(), strict=True))
    trainer.accelerator.unwrap_model(trainer.model).config.label_thresholds = thresholds
    logger.info("thresholds: %s", ", ".join(f"{name} {value:.2f}" for name, value in thresholds.items()))
    return thresholds
