"""finetune(): the whole job in one call."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from transformers import (
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from esm_efficient import compat
from esm_efficient.adapters.prepare import needs_data, prepare_model
from esm_efficient.adapters.resolve import recipe_adapters
from esm_efficient.costs.memory import peak_memory
from esm_efficient.data.tokenizing import tokenize_dataset
from esm_efficient.encoder import apply_lean_encoder_if_supported
from esm_efficient.profiling.callback import ProfilerCallback
from esm_efficient.recipes import RECIPES, Precision, Recipe, get_recipe
from esm_efficient.tasks import Task
from esm_efficient.training.arguments import (
    half_dtype,
    reason_against_cache,
)
from esm_efficient.training.audit import AuditCallback
from esm_efficient.training.baselines import probe_frozen
from esm_efficient.training.cached import cache_for_training
from esm_efficient.training.checkpoints import CheckpointCallback
from esm_efficient.training.eva import initialize_from_data
from esm_efficient.training.finishing import finish_job, run_figures
from esm_efficient.training.job import Job, begin_job
from esm_efficient.training.metrics import compute_metrics_for
from esm_efficient.training.options import resolve_options, with_adapter_options
from esm_efficient.training.progress import show_progress
from esm_efficient.training.records import RESULT
from esm_efficient.training.result import FinetuneResult
from esm_efficient.training.resuming import refuse_finished
from esm_efficient.training.run_plan import RunPlan
from esm_efficient.training.standardizing import standardized, start_scale
from esm_efficient.training.start import starting_model
from esm_efficient.training.trainer import WeightedTrainer
from esm_efficient.training.weights import check_labels
from esm_efficient.trunk.cache import measure_ids
from esm_efficient.trunk.split import encoder_dropout

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def finetune(
    model: str | Path | PreTrainedModel,
    dataset: Any,
    *,
    recipe: str | Recipe = "top",
    output_dir: str | Path = "output",
    tokenizer: PreTrainedTokenizerBase | None = None,
    class_weights: str | Mapping[str, float] | Sequence[float] | None = "balanced",
    focal_gamma: float = 0.0,
    token_budget: int | None = None,
    max_tokens: int = 1024,
    seed: int = 0,
    precision: Precision = "auto",
    attention: str = "auto",
    fused: bool = False,
    adapter_options: Mapping[str, Any] | None = None,
    resume_from_checkpoint: str | Path | bool | None = None,
    profile: bool = False,
    task: Task | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    states_dir: str | Path | None = None,
    data_options: Mapping[str, Any] | None = None,
    early_stopping: int | Literal["auto"] | None = "auto",
    probe: bool = True,
    report: bool = True,
    announce: Callable[[RunPlan], object] | None = None,
    **training_options: Any,
) -> FinetuneResult:
    """Fine-tune ESM-2: tokenise, prepare, train, audit, evaluate, save.

    The feature of the column ``label`` determines the task (`esm_efficient.tasks.task_of`): one class or several labels
    per sequence, one class per residue, or numbers. With several labels, and with a validation and a test split, the
    threshold of each label is tuned on validation and applied to test. With both splits, and 100 known labels in
    validation, probabilities are calibrated (`esm_efficient.training.calibration`): no predicted class changes. Numbers
    are standardised for training: the losses during training are those of standardised numbers, while every metric, and
    every saved model and checkpoint, is in the unit of the labels.

    Args:
        model: a folder, a Hub name or a size (``"650M"``) of an ESM-2 model, or a loaded model with the head that the
            task needs, which is changed in place. The global random numbers are seeded.
        dataset: splits ``train`` and ``test`` (or ``validation``), such as `load_deeploc` returns, with the columns
            ``sequence`` (str), ``label`` and optionally ``sample_weight``; splits made by `tokenize_dataset`; the path
            of a file, or one path per split; a pandas DataFrame; a `datasets.Dataset`; a tuple ``(sequences, labels)``;
            or ``"demo"`` or ``"deeploc"``. What has no splits is split as `load_sequences` does.
        recipe: ``"top"``, ``"base"``, ``"ga"``, ``"gc"``, ``"lora"``, ``"all"``, ``"frozen"``, or a custom `Recipe`.
        output_dir: folder for ``adapter/`` or ``model/``, ``result.json``, ``predictions.parquet``, ``report.html``,
            ``states/`` and checkpoints. The results of a former run there are replaced. On several ranks the first
            writes them, and every rank returns the metrics.
        tokenizer: required with a loaded model only.
        class_weights: as `WeightedTrainer`. The default is ``"balanced"``, because this function does the whole job on
            data that are usually imbalanced, such as DeepLoc's membrane proteins (30 %); `WeightedTrainer` has None,
            so that without options its loss is that of Trainer. With numbers, ``"balanced"`` means None.
        focal_gamma: as `WeightedTrainer`.
        token_budget: as `WeightedTrainer`.
        max_tokens: maximal number of tokens of a sequence, special tokens included. It is saved with the model, so that
            `Predictor` reads as much.
        seed: seed of the head, the adapters and the order of the batches.
        precision: ``"auto"``, ``"float32"``, ``"bf16"`` or ``"fp16"`` (`esm_efficient.recipes.Precision`).
        attention: how the lean encoder computes attention, as `apply_lean_encoder`.
        fused: whether torch.compile fuses the lean encoder's small kernels, as `apply_lean_encoder`.
        adapter_options: options of `lora_config` that override those of the recipe. ``{"init_lora_weights": "eva"}``
            takes the first values of the adapters from the training data (EVA, arXiv:2410.07170).
        resume_from_checkpoint: the checkpoint of a run with the same data and options; True for the newest whole one in
            `output_dir`. A damaged checkpoint is replaced by the whole one before it, with a warning.
            ``save_strategy="steps"`` writes checkpoints.
        profile: measure memory and time per phase (`ProfilerCallback`).
        task: the task, if the labels' feature does not tell it: several labels lose their names in tokenised splits.
        callbacks: further callbacks of the Trainer.
        states_dir: folder for the states of a recipe with ``cache=True`` (`esm_efficient.trunk.cache.cache_states`);
            None for ``states/`` in `output_dir`. Runs that share a folder compute them once.
        data_options: options of `load_sequences`, such as ``{"label": "binds"}``, for data without splits.
        early_stopping: stop after this number of evaluations on ``validation`` without a better result, and keep the
            best checkpoint (transformers' ``EarlyStoppingCallback``); ``"auto"`` for 3 if there is a validation split,
            training is no stream, and ``eval_strategy`` and ``save_strategy``, if given, say ``"epoch"`` or ``"best"``;
            None trains to the end and keeps the last state. The metric is MCC, macro-F1 or RMSE; the loss, if all of
            validation is of one class. While the metric stays the same, a lower loss counts as better. The model is
            evaluated and saved after each epoch, unless both strategies say ``"steps"``; the best checkpoint and the
            newest stay in `output_dir`. With ``"auto"``, an ``EarlyStoppingCallback`` of `callbacks` decides instead.
        probe: measure a linear probe on the frozen encoder too, for comparison: one forward pass over the splits before
            training. It needs a test split in memory and one rank (`esm_efficient.training.baselines`).
        report: write ``report.html`` and a model card beside the model. `FinetuneResult.save_page` writes the report
            later too; a search over many runs needs none. Without it and without `announce`, memory is not estimated.
        announce: called with what the run will do and cost, before the model is loaded. The estimate takes seconds.
        **training_options: ``epochs`` (3 if not given), ``batch_size`` (sequences per optimizer step on one device),
            ``micro_batch`` (sequences in one forward pass); ``layers``, ``cache``, ``pooling``, ``keep_layers`` and
            ``quantization`` of `Recipe`; and options of `TrainingArguments`. They override those of the recipe.

    Returns:
        Metrics, costs and paths.

    Raises:
        DataError: a split is missing, or the labels' feature is not that of a task.
        ConfigurationError: the options contradict each other or the model, or the run to resume is finished.
        TargetModuleError: the adapters do not fit the model.
        DownloadError: the DeepLoc table cannot be fetched.
        AuditError: a trainable parameter got no gradient or did not move.
        DivergenceError: a loss, a gradient or a parameter is NaN or infinite, or the loss has exploded.
        OutOfMemoryError: the device has too little memory; the message says what would fit.
        CheckpointError: a file could not be written, or no checkpoint is whole.
        TrainingInterrupted: a signal ended the run, if `callbacks` has a `CheckpointCallback` with signals.

    Example:
        >>> from esm_efficient import finetune, load_deeploc
        >>> result = finetune("facebook/esm2_t6_8M_UR50D", load_deeploc())  # doctest: +SKIP
        >>> print(result.metrics["mcc"], result.model_dir)  # doctest: +SKIP
    """
    chosen, training_options = resolve_options(get_recipe(recipe), training_options, signature(finetune).parameters)
    chosen, adapter_options = with_adapter_options(chosen, adapter_options or {})
    job = begin_job(
        model,
        dataset,
        chosen,
        Path(output_dir).expanduser(),  # as TrainingArguments does
        seed=seed,
        task=task,
        precision=precision,
        data_options=data_options or {},
        training_options=training_options,
        early_stopping=early_stopping,
        max_tokens=max_tokens,
    )
    trainer_options: dict[str, Any] = {
        "class_weights": class_weights,
        "focal_gamma": focal_gamma,
        "token_budget": token_budget,
    }
    _check_resuming(job, resume_from_checkpoint)
    job.check(attention=attention, adapter_options=adapter_options, **trainer_options)
    if announce is not None or (profile and report):
        options = {"adapter_options": adapter_options, "token_budget": token_budget}
        job = job.with_plan(max_tokens=max_tokens, probe=probe, fused=fused, **options)
    if announce is not None and job.plan is not None:
        announce(job.plan)
    set_seed(job.seed)
    task, args = job.task, job.args
    half = None if args.deepspeed else half_dtype(args)  # deepspeed divides weights while they are made
    with job.warned:
        loaded, tokenizer, has_unit = starting_model(
            model, tokenizer, task, chosen, half=half, adapter_options=adapter_options, device=args.device
        )
        if job.is_tokenized:
            tokenized, most = job.raw, max(max_tokens, _longest(job.raw["train"]))
        else:
            tokenized, most = tokenize_dataset(job.raw, tokenizer, max_tokens=max_tokens)[0], max_tokens
        tokenizer = copy.copy(tokenizer)  # it may be the caller's
        tokenizer.model_max_length = most  # saved with the model: predictions read as much
    scale = start_scale(loaded, tokenizer, tokenized["train"], task, has_unit=has_unit)
    collator = _make_collator(task, tokenizer)
    _check_splits(tokenized, collator, loaded, task)
    splits: Mapping[str, Any] = {name: tokenized[name] for name in ("train", "validation") if name in tokenized}
    states, folder = None, Path(states_dir or job.output_dir / "states").expanduser()
    if _can_cache(chosen, loaded.config, splits["train"], args):
        states = cache_for_training(loaded, splits, chosen, folder, args=args, collator=collator)
        loaded, splits = states.rest, states.splits
    frozen = None
    if probe:
        frozen = probe_frozen(loaded, tokenized, task, recipe=chosen, args=args, seed=job.seed, states=states)
    with job.warned:
        adapters = recipe_adapters(chosen, loaded, **adapter_options)
        read = splits["train"], collator if states is None else states.collator
        prepared = _prepare(loaded, task, chosen, args, adapters, read, attention=attention, fused=fused)
    audit = AuditCallback(usual_rate=RECIPES.get(chosen.name, chosen).learning_rate)
    profiler = ProfilerCallback() if profile else None
    all_callbacks = [audit, *([] if profiler is None else [profiler]), *callbacks]
    trainer = _make_trainer(job, prepared, splits, read[1], tokenizer, all_callbacks, **trainer_options)
    show_progress(trainer)
    with job.warned, peak_memory() as peak, standardized(trainer, scale):
        trained = trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    if states is not None:
        states.restore(trainer)
    trainer.data_collator = collator
    figures = {"model": prepared, "trained_layers": audit.report.layers, "probe": frozen}
    figures |= run_figures(trainer, prepared, trained, peak, profiler and profiler.report, states)
    return finish_job(job, trainer, tokenized, figures, report=report)


def _make_trainer(
    job: Job,
    model: Any,
    splits: Mapping[str, Any],
    collator: Any,
    tokenizer: PreTrainedTokenizerBase,
    callbacks: Sequence[TrainerCallback],
    *,
    class_weights: Any,
    **options: Any,
) -> WeightedTrainer:
    """Return the trainer of a run."""
    is_default = isinstance(class_weights, str) and class_weights == "balanced"
    for adapters in getattr(model, "peft_config", {}).values():  # a path that also holds in another folder
        adapters.base_model_name_or_path = job.base_model or adapters.base_model_name_or_path
    return WeightedTrainer(
        model,
        job.args,
        train_dataset=splits["train"],
        eval_dataset=splits.get("validation"),
        data_collator=collator,
        processing_class=tokenizer,
        compute_metrics=compute_metrics_for(job.task),
        callbacks=[*callbacks, *job.stopping.callbacks(callbacks), *_checkpoints(job.args, callbacks)],
        class_weights=None if job.task.kind == "regression" and is_default else class_weights,
        **options,
    )


def _longest(split: Any) -> int:
    """Return the tokens of the longest sequence of a tokenised split; 0 for a stream, of which it is not known."""
    return int(measure_ids(split)[0].max(initial=0)) if hasattr(split, "__len__") else 0


def _can_cache(recipe: Recipe, config: Any, train: Any, args: TrainingArguments) -> bool:
    """Whether a recipe asks for cached states and this run can have them."""
    if not recipe.cache:
        return False
    reason = reason_against_cache(train, args)
    if encoder_dropout(config):
        reason = "the model has dropout, so that states differ in every epoch"
    if reason:
        logger.warning("%s: the layers that do not train are computed in every epoch", reason)
    return not reason


def _make_collator(task: Task, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Return the collator of tokens and labels."""
    kind = DataCollatorForTokenClassification if task.head == "token-classification" else DataCollatorWithPadding
    return kind(tokenizer)


def _check_resuming(job: Job, resume: Any) -> None:
    """Refuse to resume a run that is finished: it has its result, and the checkpoint of its last step."""
    if resume is True and (job.output_dir / RESULT).is_file():
        refuse_finished(job.output_dir, job.args, job.stopping)


def _check_splits(splits: Mapping[str, Any], collator: Any, model: Any, task: Task) -> None:
    """Refuse wrong labels in any split: an error in a probe or an evaluation would come late, or be hard to read."""
    for name, split in splits.items():
        named = "training set" if name == "train" else f"{name} split"
        check_labels(split, collator, model, task.problem_type or "single_label_classification", name=named)


def _prepare(
    model: PreTrainedModel,
    task: Task,
    recipe: Recipe,
    args: TrainingArguments,
    adapters: LoraConfig | None,
    read: tuple[Any, Any],
    **encoder_options: Any,
) -> PreTrainedModel | PeftModel:
    """Return a model that trains what the recipe trains, with the recipe's encoder if the model can have it.

    Adapters whose first values come from data read the training split by its collator.
    """
    movable: Any = model
    prepared: Any = prepare_model(
        movable.to(args.device) if needs_data(adapters) else model,
        adapters=adapters,
        head_only=recipe.trains == "head",
        layers=recipe.layers,
        gradient_checkpointing=compat.asks_for_checkpointing(args),
        dtype=half_dtype(args),
        label_names=task.names,
    )
    if needs_data(adapters):
        initialize_from_data(prepared, *read, args=args)
    return apply_lean_encoder_if_supported(prepared, **encoder_options) if recipe.encoder == "lean" else prepared


def _checkpoints(args: TrainingArguments, callbacks: Sequence[TrainerCallback]) -> list[TrainerCallback]:
    """Return the callback that lists checkpoints, if there are any and the user gave none."""
    has_one = any(isinstance(callback, CheckpointCallback) for callback in callbacks)
    return [] if has_one or args.save_strategy == "no" else [CheckpointCallback(signals=())]
