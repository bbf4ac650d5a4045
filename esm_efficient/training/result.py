"""FinetuneResult: what a run of `finetune` gave and cost."""

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
    """What a run of `finetune` gave and cost.

    Attributes:
        recipe: name of the recipe.
        seed: of the run.
        task: what was learnt (`esm_efficient.tasks.task_of`).
        metrics: on the test split, or on the validation split if there is no other (`compute_metrics_for`, and
            ``loss``).
        evaluated_on: name of that split.
        train_loss: mean loss of the optimizer steps.
        steps: optimizer steps.
        trainable_parameters: numbers that train.
        total_parameters: numbers in the model, with adapters.
        trained_layers: indices of the encoder layers in which a parameter trained and moved.
        layers: encoder layers of the model.
        residues_per_second: residues (no padding, no special tokens) trained on, per second of the training loop.
        peak_memory_bytes: peak while training.
        peak_memory_kind: what that peak counts.
        seconds: of the training loop.
        model_dir: folder of the model, or of the adapter, with the tokenizer. A model's config is in it, that of the
            model under an adapter in ``base_config/``.
        result_path: this record as JSON.
        model: the trained model, in evaluation mode.
        profile: what the run has cost by phase; None unless it was profiled.
        thresholds: with several labels a sequence, the probability from which each is said to hold, tuned on the
            validation split and saved as ``label_thresholds`` in the model's config; None if they were not tuned.
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
    thresholds: Mapping[str, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Every figure, ready for JSON; a metric that is undefined (NaN) is None, which JSON can hold."""
        record = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "model"}
        record["metrics"] = {key: value if np.isfinite(value) else None for key, value in self.metrics.items()}
        return record | {
            "task": {"kind": self.task.kind, "names": list(self.task.names)},
            "trained_layers": list(self.trained_layers),
            "model_dir": str(self.model_dir),
            "result_path": str(self.result_path),
            "profile": None if self.profile is None else self.profile.to_dict(),
        }
