"""What follows training: save, calibrate, tune thresholds, evaluate, and write the result."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import extract_model_from_parallel

from esm_efficient.adapters.quantization import count_parameters
from esm_efficient.published import BASE_CONFIG
from esm_efficient.reporting.files import whole_file
from esm_efficient.saving import save_base_config
from esm_efficient.tasks import Task
from esm_efficient.training.cached import CachedTraining
from esm_efficient.training.calibration import calibrate
from esm_efficient.training.card import CARD
from esm_efficient.training.checkpoints import explain_full_disk
from esm_efficient.training.export import write_card
from esm_efficient.training.job import Job
from esm_efficient.training.metrics import compute_metrics_for, logits_of, tune_thresholds
from esm_efficient.training.outcome import evaluate_split
from esm_efficient.training.records import PREDICTIONS, RESULT, save_evaluation
from esm_efficient.training.result import PAGE, FinetuneResult
from esm_efficient.training.saved_tokenizer import save_tokenizer
from esm_efficient.training.step_memory import step_memory
from esm_efficient.training.trainer import WeightedTrainer

if TYPE_CHECKING:
    from datasets import DatasetDict
    from transformers import PreTrainedTokenizerBase
    from transformers.trainer_utils import PredictionOutput, TrainOutput

logger = logging.getLogger(__name__)


def finish_job(
    job: Job, trainer: WeightedTrainer, dataset: DatasetDict, figures: dict[str, Any], *, report: bool
) -> FinetuneResult:
    """Save a trained model, evaluate it, and write the result.

    Args:
        job: the run.
        trainer: the trainer, after training; its collator is that of tokens.
        dataset: the tokenised splits.
        figures: what `run_figures` returned, and the model, its trained layers and its probe, by the names of
            `FinetuneResult`.
        report: whether to write the report and the model card.
    """
    tokenizer: Any = trainer.processing_class
    # The model is saved before anything else can fail.
    folder = job.output_dir / ("adapter" if job.recipe.trains == "adapters" else "model")
    if trainer.is_world_process_zero():
        for former in (*(job.output_dir / name for name in (RESULT, PREDICTIONS, PAGE)), folder / CARD):
            former.unlink(missing_ok=True)  # of the model of a former run, which is replaced
    _save_model(trainer, folder, tokenizer)
    with job.warned:
        temperature, predicted = calibrate(trainer, dataset, job.task, tokenizer)
        if temperature is not None:
            _save_model(trainer, folder, tokenizer)
        thresholds = _tune_thresholds(trainer, dataset, predicted, job.task, folder)
        evaluation = evaluate_split(
            trainer,
            dataset[job.evaluated_on],
            job.task,
            raw=None if job.data is None else job.raw[job.evaluated_on],
            thresholds=thresholds,
            probe=figures["probe"],
        )
    # The model computes as the one that was saved: accelerate put it under autocast if it trained in half precision.
    extract_model_from_parallel(figures["model"].eval(), keep_fp32_wrapper=False)
    result = FinetuneResult(
        recipe=job.recipe.name,
        recipe_description=job.recipe.description,
        seed=job.seed,
        task=job.task,
        metrics=evaluation.metrics,
        evaluated_on=job.evaluated_on,
        **figures,
        step_memory=step_memory(None if job.plan is None else job.plan.estimate, figures["profile"]),
        model_dir=folder,
        result_path=job.output_dir / RESULT,
        base_model=job.base_model,
        dataset=job.data_name,
        probe_words=job.probe_words,
        thresholds=thresholds,
        temperature=temperature,
        evaluation=evaluation,
        history=tuple(trainer.state.log_history),
        data=job.data,
        warnings=tuple(job.warned.messages),
    )
    _save_result(result, trainer, report=report)
    return result


def run_figures(
    trainer: WeightedTrainer, model: Any, trained: TrainOutput, peak: Any, report: Any, states: CachedTraining | None
) -> dict[str, Any]:
    """Return sizes, progress and memory of a training loop, by the names of `FinetuneResult`.

    Args:
        trainer: the trainer, after training.
        model: the model that was given to it.
        trained: what its ``train`` returned.
        peak: what `peak_memory` measured.
        report: the report of the profiler; None without one.
        states: the cached states; None without a cache.
    """
    return {**_sizes(model), **_progress(trainer, trained, states), **_memory(peak, report)}


def _sizes(model: Any) -> dict[str, Any]:
    """Return the numbers of parameters and of layers."""
    return {
        "trainable_parameters": count_parameters(p for p in model.parameters() if p.requires_grad),
        "total_parameters": count_parameters(model.parameters()),
        "layers": model.config.num_hidden_layers,
    }


def _memory(peak: Any, report: Any) -> dict[str, Any]:
    """Return the peak of memory; on CUDA, the profiler resets the allocator's peak in every phase."""
    is_reset = report is not None and torch.cuda.is_available()
    return {
        "peak_memory_bytes": max(peak.bytes, report.peak.total) if is_reset else peak.bytes,
        "peak_memory_kind": peak.kind,
        "profile": report,
        "memory": None if report is None else report.peak.to_dict(),
    }


def _progress(trainer: WeightedTrainer, trained: TrainOutput, states: CachedTraining | None) -> dict[str, Any]:
    """Return what the training loop did, and in what time."""
    residues, seconds = trainer.residues_trained - trainer.residues_resumed, trained.metrics["train_runtime"]
    if states is not None and states.pooling != "tokens":  # no mask of all tokens to count in
        residues = states.residues_trained(trainer)
    return {
        "train_loss": trainer.mean_loss,
        "steps": trained.global_step,
        "steps_resumed": trainer.steps_resumed,
        "best_step": _best_step(trainer),
        "residues_per_second": residues / seconds,
        "seconds": seconds,
        "states_seconds": 0.0 if states is None else states.seconds,
    }


def _best_step(trainer: WeightedTrainer) -> int | None:
    """Return the step of the checkpoint that was loaded at the end; None if the model is that of the end."""
    best = trainer.state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    return None if best is None else int(Path(best).name.removeprefix("checkpoint-"))


def _tune_thresholds(
    trainer: WeightedTrainer, dataset: DatasetDict, predicted: PredictionOutput | None, task: Task, folder: Path
) -> dict[str, float] | None:
    """Tune the threshold of each label on validation; write them into the model's config and the trainer's metrics.

    Args:
        trainer: the trainer, after training.
        dataset: the tokenised splits.
        predicted: what the model predicts for validation; None if that is not known yet.
        task: the task.
        folder: the folder of the model.

    Returns:
        label name -> threshold; None without several labels, or without both a validation and a test split.
    """
    if task.kind != "multi_label_classification" or not {"validation", "test"} <= dataset.keys():
        return None
    prediction: Any = predicted or trainer.predict(dataset["validation"], metric_key_prefix="validation")
    tuned = tune_thresholds(np.asarray(prediction.label_ids), logits_of(prediction.predictions), task.names)
    thresholds = dict(zip(task.names, tuned.tolist(), strict=True))
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    model.config.label_thresholds = thresholds
    if trainer.is_world_process_zero():
        with explain_full_disk(folder.parent):
            if hasattr(model, "get_base_model"):
                save_base_config(model, folder / BASE_CONFIG)
            else:
                model.config.save_pretrained(folder)
    trainer.compute_metrics = compute_metrics_for(task, thresholds=tuned)
    logger.info("thresholds: %s", ", ".join(f"{name} {value:.2f}" for name, value in thresholds.items()))
    return thresholds


def _save_model(trainer: WeightedTrainer, folder: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
    """Write the model or the adapter, and the tokenizer; return the folder."""
    with explain_full_disk(folder.parent):
        trainer.save_model(str(folder))
        if trainer.is_world_process_zero():
            save_tokenizer(tokenizer, folder)
    logger.info("the trained model is in %s", folder)
    return folder


def _save_result(result: FinetuneResult, trainer: WeightedTrainer, *, report: bool) -> None:
    """Write the metrics and costs of the run, its predictions, and, if asked for, its report and its model card."""
    if not trainer.is_world_process_zero():
        return
    with explain_full_disk(result.result_path.parent):
        if result.evaluation is not None:
            save_evaluation(result.evaluation, result.result_path.with_name(PREDICTIONS))
        with whole_file(result.result_path) as partial:  # the last: a run with this file is finished
            partial.write_text(json.dumps(result.to_dict(), indent=2) + "\n", encoding="utf-8")
        if report:
            result.save_page()
            write_card(result)
