"""FinetuneResult: the metrics, costs and paths of a run of `finetune`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from esm_efficient.tasks import Task

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from esm_efficient.profiling.report import ProfileReport


@dataclass(frozen=True)
class FinetuneResult:
    """Metrics, costs and paths of a run of `finetune`.

    Attributes:
        recipe: name of the recipe.
        seed: seed of the run.
        task: the task that was learnt (`esm_efficient.tasks.task_of`).
        metrics: metrics of `compute_metrics_for` and ``loss`` on the split `evaluated_on`.
        evaluated_on: ``"test"``, or ``"validation"`` if there is no test split.
        train_loss: mean loss of the optimizer steps.
        steps: number of optimizer steps.
        trainable_parameters: number of trainable parameters.
        total_parameters: number of parameters, adapters included.
        trained_layers: indices of the encoder layers in which a parameter moved.
        layers: number of encoder layers.
        residues_per_second: residues per second of the training loop, without padding and special tokens.
        peak_memory_bytes: peak memory during training.
        peak_memory_kind: kind of memory that the peak counts.
        seconds: duration of the training loop.
        states_seconds: time to compute the cached states of a recipe with ``cache=True``, before the training loop.
        model_dir: folder of the model or the adapter, with the tokenizer. It contains the model's config; the config
            of an adapter's base model is in its folder ``base_config/``.
        result_path: path of this record as JSON.
        model: the trained model, in evaluation mode.
        profile: costs per phase; None without profiling.
        thresholds: label name -> probability from which the label is positive, for several labels per sequence. They
            are tuned on the validation split and saved as ``label_thresholds`` in the model's config. None if they
            were not tuned.
    """

    recipe: str
    seed: int
    task: Task
    metrics: Mapping[str, float]
    evaluated_on: str
    train_loss: float
    steps: int
    trainable_parameters: int
    total_parameters: int
    trained_layers: tuple[int, ...]
    layers: int
    residues_per_second: float
    peak_memory_bytes: int
    peak_memory_kind: str
    seconds: float
    model_dir: Path
    result_path: Path
    model: PreTrainedModel | PeftModel = field(repr=False, compare=False)
    profile: ProfileReport | None = None
    states_seconds: float = 0.0
    thresholds: Mapping[str, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return all fields but the model, ready for JSON; an undefined metric (NaN) becomes None."""
        record = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "model"}
        record["metrics"] = {key: value if np.isfinite(value) else None for key, value in self.metrics.items()}
        return record | {
            "task": {"kind": self.task.kind, "names": list(self.task.names)},
            "trained_layers": list(self.trained_layers),
            "model_dir": str(self.model_dir),
            "result_path": str(self.result_path),
            "profile": None if self.profile is None else self.profile.to_dict(),
        }
