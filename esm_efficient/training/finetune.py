"""finetune(): the whole job in one call."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import (
    AutoConfig,
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
from esm_efficient.adapters.registry import find_architecture, is_in_head, is_unread
from esm_efficient.adapters.resolve import recipe_adapters
from esm_efficient.costs.memory import peak_memory
from esm_efficient.data.tokenizing import tokenize_dataset
from esm_efficient.encoder import apply_lean_encoder
from esm_efficient.errors import ConfigurationError, DataError, listing
from esm_efficient.profiling.callback import ProfilerCallback
from esm_efficient.recipes import Precision, Recipe, get_recipe
from esm_efficient.saving import load_pretrained
from esm_efficient.tasks import Task, auto_class, head_of, task_of
from esm_efficient.training.arguments import recipe_arguments
from esm_efficient.training.audit import AuditCallback
from esm_efficient.training.cached import CachedTraining, cache_for_training
from esm_efficient.training.checkpoints import CheckpointCallback, explain_full_disk
from esm_efficient.training.metrics import compute_metrics_for, tune_thresholds
from esm_efficient.training.result import FinetuneResult
from esm_efficient.training.runs import BASE_CONFIG
from esm_efficient.training.standardizing import CONFIG_NAME as LABEL_SCALE
from esm_efficient.training.standardizing import standardized, start_scale
from esm_efficient.training.trainer import WeightedTrainer

if TYPE_CHECKING:
    from datasets import DatasetDict, Features
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase
    from transformers.trainer_utils import TrainOutput

logger = logging.getLogger(__name__)


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
    states_dir: str | Path | None = None,
    **training_options: Any,
) -> FinetuneResult:
    """Fine-tune ESM-2: tokenise, prepare, train, audit, evaluate, save.

    The feature of the column ``label`` determines the task (`esm_efficient.tasks.task_of`): one class or several labels
    per sequence, one class per residue, or numbers. With several labels, and with a validation and a test split, the
    threshold of each label is tuned on validation and applied to test. Numbers are standardised for training: the
    losses during training are those of standardised numbers, while every metric, and every saved model and checkpoint,
    is in the unit of the labels.

    Args:
        model: a folder or a Hub name of an ESM-2 model, or a loaded model with the head that the task needs.
        dataset: splits ``train`` and ``test`` (or ``validation``), such as `load_deeploc` returns, with the columns
            ``sequence`` (str), ``label`` and optionally ``sample_weight``; or splits made by `tokenize_dataset`.
        recipe: ``"base"``, ``"ga"``, ``"gc"``, ``"lora"``, ``"all"``, ``"frozen"``, or a custom `Recipe`.
        output_dir: folder for ``adapter/`` or ``model/``, and for ``result.json``.
        tokenizer: required with a loaded model only.
        class_weights: as `WeightedTrainer`. The default is ``"balanced"``, because this function does the whole job on
            data that are usually imbalanced, such as DeepLoc's membrane proteins (30 %); `WeightedTrainer` has None,
            so that without options its loss is that of Trainer. With numbers, ``"balanced"`` means None.
        focal_gamma: as `WeightedTrainer`.
        token_budget: as `WeightedTrainer`.
        max_tokens: maximal number of tokens of a sequence, special tokens included.
        seed: seed of the head, the adapters and the order of the batches.
        precision: ``"auto"``, ``"float32"`` or ``"bf16"`` (`esm_efficient.recipes.Precision`).
        adapter_options: options of `lora_config` that override those of the recipe.
        resume_from_checkpoint: the checkpoint of a run with the same data and options; True for the newest whole one in
            `output_dir`. A damaged checkpoint is replaced by the whole one before it, with a warning.
            ``save_strategy="steps"`` writes checkpoints.
        profile: measure memory and time per phase (`ProfilerCallback`).
        task: the task, if the labels' feature does not tell it: several labels lose their names in tokenised splits.
        callbacks: further callbacks of the Trainer.
        states_dir: folder for the states of a recipe with ``cache=True`` (`esm_efficient.trunk.cache.cache_states`);
            None for ``states/`` in `output_dir`. Runs that share a folder compute them once.
        **training_options: options of `TrainingArguments`, such as ``num_train_epochs``, that override those of the
            recipe.

    Returns:
        Metrics, costs and paths.

    Raises:
        DataError: a split is missing, or the labels' feature is not that of a task.
        ConfigurationError: the options contradict each other or the model.
        TargetModuleError: the adapters do not fit the model.
        AuditError: a trainable parameter did not move.
        CheckpointError: a file could not be written, or no checkpoint is whole.

    Example:
        >>> from esm_efficient import finetune, load_deeploc
        >>> result = finetune("facebook/esm2_t6_8M_UR50D", load_deeploc())  # doctest: +SKIP
        >>> print(result.metrics["mcc"], result.model_dir)  # doctest: +SKIP
    """
    chosen, output_dir = get_recipe(recipe), Path(output_dir)
    features = next(iter(dataset.values())).features
    task = task or _task_of_splits(features)
    evaluated_on = _evaluation_split(dataset)
    args = recipe_arguments(chosen, output_dir, precision=precision, seed=seed, **training_options)
    set_seed(seed)
    loaded, tokenizer, has_unit = _load(model, tokenizer, task)
    dataset = dataset if "input_ids" in features else tokenize_dataset(dataset, tokenizer, max_tokens=max_tokens)[0]
    scale = start_scale(loaded, tokenizer, dataset["train"], task, has_unit=has_unit)
    collator = _make_collator(task, tokenizer)
    splits: Mapping[str, Any] = {name: dataset[name] for name in ("train", "validation") if name in dataset}
    states, folder = None, Path(states_dir or output_dir / "states")
    if _can_cache(chosen, loaded.config, splits["train"], args):
        states = cache_for_training(loaded, splits, chosen, folder, args=args, collator=collator)
        loaded, splits = states.rest, states.splits
    prepared = _prepare(loaded, task, chosen, args, adapter_options or {})
    audit, profiler = AuditCallback(), ProfilerCallback() if profile else None
    trainer = WeightedTrainer(
        prepared,
        args,
        train_dataset=splits["train"],
        eval_dataset=splits.get("validation"),
        data_collator=collator if states is None else states.collator,
        processing_class=tokenizer,
        compute_metrics=compute_metrics_for(task),
        callbacks=[audit, *([] if profiler is None else [profiler]), *callbacks, *_checkpoints(args, callbacks)],
        class_weights=None if task.kind == "regression" and class_weights == "balanced" else class_weights,
        focal_gamma=focal_gamma,
        token_budget=token_budget,
    )
    with peak_memory() as peak, standardized(trainer, scale):
        trained = trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    if states is not None:
        states.restore(trainer)
    trainer.data_collator = collator
    # The model is saved before anything else can fail.
    model_dir = _save_model(trainer, output_dir / ("adapter" if chosen.trains == "adapters" else "model"), tokenizer)
    report = None if profiler is None else profiler.report
    thresholds = _tune_thresholds(trainer, dataset, task, model_dir)
    result = FinetuneResult(
        recipe=chosen.name,
        seed=seed,
        task=task,
        metrics=_evaluate(trainer, dataset[evaluated_on]),
        evaluated_on=evaluated_on,
        **_sizes(prepared),
        **_progress(trainer, trained, states),
        trained_layers=audit.report.layers,
        peak_memory_bytes=_largest(peak, report),
        peak_memory_kind=peak.kind,
        model_dir=model_dir,
        result_path=output_dir / "result.json",
        model=prepared.eval(),
        profile=report,
        thresholds=thresholds,
    )
    _save_result(result, trainer)
    return result


def _evaluation_split(dataset: DatasetDict) -> str:
    """Return the name of the split that the metrics are for."""
    name = next((name for name in ("test", "validation") if name in dataset), None)
    if "train" not in dataset or name is None:
        raise DataError(f"the dataset has the splits {', '.join(dataset)}: expected train, and test or validation")
    return name


def _task_of_splits(features: Features) -> Task:
    """Return the task of raw or of tokenised splits."""
    if "input_ids" not in features:
        return task_of(features)
    labels = features.get("labels")
    if getattr(labels, "length", -1) > 0:
        raise ConfigurationError(
            f"the labels of the tokenised splits are lists of {labels.length} numbers: their names are lost, and they "
            "may be several labels or numbers to regress. Give task=task_of(features) of the splits before tokenising"
        )
    return task_of(features, "labels")


def _load(
    model: str | Path | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, task: Task
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, bool]:
    """Return a model with the head of a task, its tokenizer, and whether the head predicts numbers in their unit."""
    if not isinstance(model, PreTrainedModel):
        return _load_pretrained(model, tokenizer, task)
    if tokenizer is None:
        raise ConfigurationError("model is a loaded model, which has no tokenizer: give tokenizer too")
    if (head_of(model) == "token-classification") != (task.head == "token-classification"):
        raise ConfigurationError(f"{type(model).__name__} has no head for {task.describe()}")
    config: Any = model.config
    if config.problem_type not in (None, task.problem_type):
        raise ConfigurationError(f"the model is for {config.problem_type}, but the labels are {task.describe()}")
    config.problem_type = task.problem_type
    return model, tokenizer, _forget_labels(config)


def _load_pretrained(
    name: str | Path, tokenizer: PreTrainedTokenizerBase | None, task: Task
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, bool]:
    """Load a model with the head of a task, which is new unless the checkpoint has one of this size."""
    config = AutoConfig.from_pretrained(name)
    was_regressor = config.problem_type == "regression" or (config.problem_type is None and config.num_labels == 1)
    _forget_labels(config)
    # In this order: one label of a single-label problem is refused.
    config.problem_type = task.problem_type
    config.num_labels = len(task.names)
    loaded, missing, mismatched = load_pretrained(
        auto_class(task.head), name, config=config, dtype=torch.float32, ignore_mismatched_sizes=True
    )
    architecture = find_architecture(loaded)
    new = (*missing, *mismatched)
    if lost := [key for key in new if not (is_in_head(architecture, key) or is_unread(architecture, key))]:
        raise ConfigurationError(
            f"{name} lacks {len(lost)} weights of the encoder, or has them in other shapes than its config says: "
            f"{listing(lost)}. Expected a whole model"
        )
    has_head = not any(is_in_head(architecture, key) for key in new)
    return loaded, tokenizer or AutoTokenizer.from_pretrained(name), was_regressor and has_head


def _forget_labels(config: Any) -> bool:
    """Remove what a former training has written about its labels; return whether it was the scale of numbers."""
    scale = vars(config).pop(LABEL_SCALE, None)
    vars(config).pop("label_thresholds", None)
    return scale is not None


def _can_cache(recipe: Recipe, config: Any, train: Any, args: TrainingArguments) -> bool:
    """Whether a recipe asks for cached states and this run can have them."""
    if not recipe.cache:
        return False
    reason = "the training data are a stream" if not hasattr(train, "__len__") else ""
    if args.fsdp or args.deepspeed:
        reason = "the model is sharded over the ranks"
    if getattr(config, "hidden_dropout_prob", 0) or getattr(config, "attention_probs_dropout_prob", 0):
        reason = "the model has dropout, so that states differ in every epoch"
    if reason:
        logger.warning("%s: the layers that do not train are computed in every epoch", reason)
    return not reason


def _make_collator(task: Task, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Return the collator of tokens and labels."""
    kind = DataCollatorForTokenClassification if task.head == "token-classification" else DataCollatorWithPadding
    return kind(tokenizer)


def _prepare(
    model: PreTrainedModel, task: Task, recipe: Recipe, args: TrainingArguments, adapter_options: Mapping[str, Any]
) -> PreTrainedModel | PeftModel:
    """Return a model that trains what the recipe trains, with the recipe's encoder."""
    prepared = prepare_model(
        model,
        adapters=recipe_adapters(recipe, model, **adapter_options),
        head_only=recipe.trains == "head",
        layers=recipe.layers,
        gradient_checkpointing=compat.asks_for_checkpointing(args),
        dtype=torch.bfloat16 if args.bf16 else None,
        label_names=task.names,
    )
    return apply_lean_encoder(prepared) if recipe.encoder == "lean" else prepared


def _checkpoints(args: TrainingArguments, callbacks: Sequence[TrainerCallback]) -> list[TrainerCallback]:
    """Return the callback that lists checkpoints, if there are any and the user gave none."""
    has_one = any(isinstance(callback, CheckpointCallback) for callback in callbacks)
    return [] if has_one or args.save_strategy == "no" else [CheckpointCallback(signals=())]


def _sizes(model: Any) -> dict[str, int]:
    """Return the numbers of parameters and of layers."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return {
        "trainable_parameters": sum(number for number, trains in sizes if trains),
        "total_parameters": sum(number for number, _ in sizes),
        "layers": model.config.num_hidden_layers,
    }


def _largest(peak: Any, report: Any) -> int:
    """Return the peak of memory; on CUDA, the profiler resets the allocator's peak in every phase."""
    return max(peak.bytes, report.peak.total) if report is not None and torch.cuda.is_available() else peak.bytes


def _progress(trainer: WeightedTrainer, trained: TrainOutput, states: CachedTraining | None) -> dict[str, Any]:
    """Return what the training loop did, and in what time."""
    residues, seconds = trainer.residues_trained - trainer.residues_resumed, trained.metrics["train_runtime"]
    if states is not None and states.collator.stored.pooling == "first":  # batches have no masks to count in
        residues = states.residues_trained(trainer)
    return {
        "train_loss": trained.training_loss,
        "steps": trained.global_step,
        "residues_per_second": residues / seconds,
        "seconds": seconds,
        "states_seconds": 0.0 if states is None else states.seconds,
    }


def _tune_thresholds(
    trainer: WeightedTrainer, dataset: DatasetDict, task: Task, folder: Path
) -> dict[str, float] | None:
    """Tune the threshold of each label on validation; write them into the model's config and the trainer's metrics.

    Returns:
        label name -> threshold; None without several labels, or without both a validation and a test split.
    """
    if task.kind != "multi_label_classification" or not {"validation", "test"} <= dataset.keys():
        return None
    prediction = trainer.predict(dataset["validation"], metric_key_prefix="validation")
    tuned = tune_thresholds(np.asarray(prediction.label_ids), np.asarray(prediction.predictions), task.names)
    thresholds = dict(zip(task.names, tuned.tolist(), strict=True))
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    model.config.label_thresholds = thresholds
    if trainer.is_world_process_zero():
        with explain_full_disk(folder.parent):
            model.config.save_pretrained(folder / BASE_CONFIG if hasattr(model, "peft_config") else folder)
    trainer.compute_metrics = compute_metrics_for(task, thresholds=tuned)
    logger.info("thresholds: %s", ", ".join(f"{name} {value:.2f}" for name, value in thresholds.items()))
    return thresholds


def _evaluate(trainer: WeightedTrainer, split: Any) -> dict[str, float]:
    """Return the metrics and the loss of a split, without the time that the evaluation took."""
    metrics = trainer.predict(split, metric_key_prefix="test").metrics or {}
    return {
        key.removeprefix("test_"): value
        for key, value in metrics.items()
        if not key.endswith(("_runtime", "_per_second", "_preparation_time"))
    }


def _save_model(trainer: WeightedTrainer, folder: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
    """Write the model or the adapter, and the tokenizer; return the folder."""
    with explain_full_disk(folder.parent):
        trainer.save_model(str(folder))
        if trainer.is_world_process_zero():
            tokenizer.save_pretrained(folder)
    logger.info("the trained model is in %s", folder)
    return folder


def _save_result(result: FinetuneResult, trainer: WeightedTrainer) -> None:
    """Write the metrics and costs of the run."""
    if trainer.is_world_process_zero():
        with explain_full_disk(result.result_path.parent):
            result.result_path.write_text(json.dumps(result.to_dict(), indent=2) + "\n")
