"""Efficient and exact fine-tuning components for the ESM-2 protein language model.

The public names are imported when they are first used (PEP 562), so that ``import esm_efficient`` loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from esm_efficient.adapters import (
        Architecture,
        lora_config,
        prepare_model,
        quantization_config,
        recipe_adapters,
        register_architecture,
        resolve_targets,
    )
    from esm_efficient.comparison import Comparison, compare, estimate_page
    from esm_efficient.costs.devices import DEVICES, Device, get_device
    from esm_efficient.costs.memory import peak_memory
    from esm_efficient.costs.throughput import measure_device
    from esm_efficient.data import (
        ResidueEncoder,
        TokenBudgetBatchSampler,
        deeploc_dataloaders,
        load_deeploc,
        load_sequences,
        stratified_sample,
        tokenize_dataset,
    )
    from esm_efficient.demo import demo_model_path, write_demo_table
    from esm_efficient.encoder import apply_lean_encoder, has_lean_encoder, remove_lean_encoder
    from esm_efficient.errors import (
        AuditError,
        CheckpointError,
        ConfigurationError,
        DataError,
        DivergenceError,
        DownloadError,
        EsmEfficientError,
        RequestError,
        TargetModuleError,
        TrainingInterrupted,
    )
    from esm_efficient.estimation.caching import CacheCost
    from esm_efficient.estimation.estimate import Estimate, estimate
    from esm_efficient.estimation.recommend import Recommendation, recommend
    from esm_efficient.heads import PooledEsmForSequenceClassification
    from esm_efficient.inference import (
        Embedder,
        FileResult,
        Prediction,
        Predictor,
        Query,
        RequestLimits,
        Windows,
        embed_file,
        predict_file,
        read_request,
    )
    from esm_efficient.out_of_memory import OutOfMemoryError
    from esm_efficient.profiling.callback import ProfilerCallback
    from esm_efficient.profiling.profiler import Profiler
    from esm_efficient.profiling.report import ProfileReport
    from esm_efficient.recipes import RECIPES, Recipe
    from esm_efficient.reporting import format_table
    from esm_efficient.tasks import Task, task_of
    from esm_efficient.training import (
        AuditCallback,
        WeightedTrainer,
        apply_thresholds,
        classification_metrics,
        compute_metrics_for,
        multi_label_metrics,
        regression_metrics,
        tune_thresholds,
    )
    from esm_efficient.training.arguments import recipe_arguments
    from esm_efficient.training.checkpoints import CheckpointCallback, last_checkpoint
    from esm_efficient.training.estimators import EsmClassifier, EsmRegressor
    from esm_efficient.training.evaluation import evaluate, evaluate_in_full
    from esm_efficient.training.export import export_model
    from esm_efficient.training.finetune import finetune
    from esm_efficient.training.publishing import push_to_hub
    from esm_efficient.training.records import load_result
    from esm_efficient.training.result import FinetuneResult
    from esm_efficient.training.sweep import LayerSweep, sweep_layers
    from esm_efficient.trunk import (
        StatesCollator,
        cache_states,
        delete_states,
        join_model,
        list_states,
        split_model,
        truncate,
    )

__version__ = "0.1.0"

_HOME = {
    "adapters": (
        "Architecture",
        "lora_config",
        "prepare_model",
        "quantization_config",
        "recipe_adapters",
        "register_architecture",
        "resolve_targets",
    ),
    "comparison": ("Comparison", "compare", "estimate_page"),
    "costs.devices": ("DEVICES", "Device", "get_device"),
    "costs.memory": ("peak_memory",),
    "out_of_memory": ("OutOfMemoryError",),
    "costs.throughput": ("measure_device",),
    "data": (
        "ResidueEncoder",
        "TokenBudgetBatchSampler",
        "deeploc_dataloaders",
        "load_deeploc",
        "load_sequences",
        "stratified_sample",
        "tokenize_dataset",
    ),
    "demo": ("demo_model_path", "write_demo_table"),
    "encoder": ("apply_lean_encoder", "has_lean_encoder", "remove_lean_encoder"),
    "errors": (
        "AuditError",
        "CheckpointError",
        "ConfigurationError",
        "DataError",
        "DivergenceError",
        "DownloadError",
        "EsmEfficientError",
        "RequestError",
        "TargetModuleError",
        "TrainingInterrupted",
    ),
    "estimation.caching": ("CacheCost",),
    "estimation.estimate": ("Estimate", "estimate"),
    "estimation.recommend": ("Recommendation", "recommend"),
    "heads": ("PooledEsmForSequenceClassification",),
    "inference": (
        "Embedder",
        "FileResult",
        "Prediction",
        "Predictor",
        "Query",
        "RequestLimits",
        "Windows",
        "embed_file",
        "predict_file",
        "read_request",
    ),
    "profiling.callback": ("ProfilerCallback",),
    "profiling.profiler": ("Profiler",),
    "profiling.report": ("ProfileReport",),
    "recipes": ("RECIPES", "Recipe"),
    "reporting": ("format_table",),
    "tasks": ("Task", "task_of"),
    "training": (
        "AuditCallback",
        "WeightedTrainer",
        "apply_thresholds",
        "classification_metrics",
        "compute_metrics_for",
        "multi_label_metrics",
        "regression_metrics",
        "tune_thresholds",
    ),
    "training.arguments": ("recipe_arguments",),
    "training.checkpoints": ("CheckpointCallback", "last_checkpoint"),
    "training.estimators": ("EsmClassifier", "EsmRegressor"),
    "training.evaluation": ("evaluate", "evaluate_in_full"),
    "training.export": ("export_model",),
    "training.publishing": ("push_to_hub",),
    "training.finetune": ("finetune",),
    "training.records": ("load_result",),
    "training.result": ("FinetuneResult",),
    "training.sweep": ("LayerSweep", "sweep_layers"),
    "trunk": (
        "StatesCollator",
        "cache_states",
        "delete_states",
        "join_model",
        "list_states",
        "split_model",
        "truncate",
    ),
}
_MODULES = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "DEVICES",
    "RECIPES",
    "Architecture",
    "AuditCallback",
    "AuditError",
    "CacheCost",
    "CheckpointCallback",
    "CheckpointError",
    "Comparison",
    "ConfigurationError",
    "DataError",
    "Device",
    "DivergenceError",
    "DownloadError",
    "Embedder",
    "EsmClassifier",
    "EsmEfficientError",
    "EsmRegressor",
    "Estimate",
    "FileResult",
    "FinetuneResult",
    "LayerSweep",
    "OutOfMemoryError",
    "PooledEsmForSequenceClassification",
    "Prediction",
    "Predictor",
    "ProfileReport",
    "Profiler",
    "ProfilerCallback",
    "Query",
    "Recipe",
    "Recommendation",
    "RequestError",
    "RequestLimits",
    "ResidueEncoder",
    "StatesCollator",
    "TargetModuleError",
    "Task",
    "TokenBudgetBatchSampler",
    "TrainingInterrupted",
    "WeightedTrainer",
    "Windows",
    "apply_lean_encoder",
    "apply_thresholds",
    "cache_states",
    "classification_metrics",
    "compare",
    "compute_metrics_for",
    "deeploc_dataloaders",
    "delete_states",
    "demo_model_path",
    "embed_file",
    "estimate",
    "estimate_page",
    "evaluate",
    "evaluate_in_full",
    "export_model",
    "finetune",
    "format_table",
    "get_device",
    "has_lean_encoder",
    "join_model",
    "last_checkpoint",
    "list_states",
    "load_deeploc",
    "load_result",
    "load_sequences",
    "lora_config",
    "measure_device",
    "multi_label_metrics",
    "peak_memory",
    "predict_file",
    "prepare_model",
    "push_to_hub",
    "quantization_config",
    "read_request",
    "recipe_adapters",
    "recipe_arguments",
    "recommend",
    "register_architecture",
    "regression_metrics",
    "remove_lean_encoder",
    "resolve_targets",
    "split_model",
    "stratified_sample",
    "sweep_layers",
    "task_of",
    "tokenize_dataset",
    "truncate",
    "tune_thresholds",
    "write_demo_table",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value  # the next look-up does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
