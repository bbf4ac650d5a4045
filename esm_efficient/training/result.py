"""FinetuneResult: the metrics, costs and paths of a run of `finetune`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esm_efficient.reporting import finite_values, format_bytes
from esm_efficient.reporting.description import DataDescription
from esm_efficient.tasks import Task
from esm_efficient.training.baselines import FrozenProbe
from esm_efficient.training.evaluation_page import Evaluation
from esm_efficient.training.outcome import result_table, run_page
from esm_efficient.training.step_memory import StepMemory

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from esm_efficient.profiling.report import ProfileReport

PAGE = "report.html"
"""The file of the report of a run, beside its record."""

_PEAKS = {
    "CUDA tensors": "tensors on the GPU",
    "process": "the whole process, with Python and libraries",
    "process since it started": "the whole process since it started, with Python and libraries",
}
"""What the kinds of `esm_efficient.costs.memory.peak_memory` count, in words."""


@dataclass(frozen=True)
class FinetuneResult:
    """Metrics, costs and paths of a run of `finetune`.

    Attributes:
        recipe: name of the recipe.
        recipe_description: its description; empty if the run changed a setting that it names.
        seed: seed of the run.
        task: the task that was learnt (`esm_efficient.tasks.task_of`).
        metrics: metrics of `compute_metrics_for` and ``loss`` on the split `evaluated_on`.
        evaluated_on: ``"test"``, or ``"validation"`` if there is no test split.
        train_loss: mean loss of the optimizer steps, also of those before the checkpoint that was resumed.
        steps: number of optimizer steps.
        steps_resumed: those before the checkpoint from which the run was resumed; ``seconds`` and
            ``residues_per_second`` are of the steps after it.
        best_step: the optimizer step of the best checkpoint, whose weights the model has; None for those of the end.
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
        model: the trained model, in evaluation mode; None if the result was read from a folder (`load_result`).
        base_model: the Hub name or folder of the model that the run began with.
        dataset: the name of the data; empty if they had none.
        probe_words: what ``esm-efficient probe`` needs to read the same data and model; empty if it cannot.
        profile: costs per phase; None without profiling.
        memory: bytes at the highest moment by category; None without profiling.
        step_memory: memory of a step, as predicted before the run if it was announced or profiled, and as measured.
        thresholds: label name -> probability from which the label is positive, for several labels per sequence. They
            are tuned on the validation split and saved as ``label_thresholds`` in the model's config. None if they
            were not tuned.
        temperature: what the logits were divided by, so that probabilities come true on validation; None if they were
            not calibrated.
        probe: a linear probe on the encoder that the run began with, on the same split; None if it was not measured.
        evaluation: predictions and labels of the split `evaluated_on`, with the intervals of the metrics.
        history: what the Trainer logged.
        data: description of the splits; None if their sequences are not known, or a split is a stream.
        warnings: what the library warned of while the data were read, during training and in the evaluation.
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
    model: PreTrainedModel | PeftModel | None = field(repr=False, compare=False)
    recipe_description: str = ""
    base_model: str = ""
    dataset: str = ""
    probe_words: tuple[str, ...] = ()
    profile: ProfileReport | None = None
    memory: Mapping[str, int] | None = None
    step_memory: StepMemory | None = None
    states_seconds: float = 0.0
    steps_resumed: int = 0
    best_step: int | None = None
    thresholds: Mapping[str, float] | None = None
    temperature: float | None = None
    probe: FrozenProbe | None = None
    evaluation: Evaluation | None = field(default=None, repr=False, compare=False)
    history: tuple[Mapping[str, Any], ...] = field(default=(), repr=False, compare=False)
    data: DataDescription | None = field(default=None, repr=False, compare=False)
    warnings: tuple[str, ...] = ()

    @property
    def loop_in_words(self) -> str:
        """Say what ``seconds`` are of: the training loop, or its steps after a checkpoint that was resumed."""
        return f"training loop{f' after step {self.steps_resumed:,}' if self.steps_resumed else ''}"

    @property
    def steps_in_words(self) -> str:
        """Say how many optimizer steps there were, and after which of them the model was best."""
        kept = "" if self.best_step is None else f" (the model is that of step {self.best_step:,}, the best)"
        return f"{self.steps:,}{kept}"

    @property
    def peak_memory_in_words(self) -> str:
        """Say what the peak of memory was, and of what."""
        return f"{format_bytes(self.peak_memory_bytes)} of {_PEAKS[self.peak_memory_kind]}"

    @property
    def layers_in_words(self) -> str:
        """Say which encoder layers trained, such as ``"the top 11 of 33"`` or ``"3 of 33: 0 to 2"``."""
        found = self.trained_layers
        if 0 < len(found) < self.layers and found == tuple(range(self.layers - len(found), self.layers)):
            return f"the top {len(found)} of {self.layers}"
        counts = f"{len(found)} of {self.layers}"
        if len(found) in (0, self.layers):
            return counts
        is_range = len(found) > 2 and found == tuple(range(found[0], found[-1] + 1))
        return f"{counts}: {f'{found[0]} to {found[-1]}' if is_range else ', '.join(map(str, found))}"

    def __str__(self) -> str:
        """Return a table of the metrics with their intervals, and of the costs."""
        return result_table(self)

    def to_html(self, *, command: str | None = None) -> str:
        """Return the report of the run as one HTML page that loads nothing.

        Args:
            command: the line that repeats the run, to be shown.
        """
        return run_page(self, command=command)

    def save_page(self, *, command: str | None = None) -> Path:
        """Write the report to ``report.html`` beside `result_path`, and return its path.

        Args:
            command: as `to_html`.
        """
        self.page.write_text(self.to_html(command=command), encoding="utf-8")
        return self.page

    @property
    def page(self) -> Path:
        """Path of the report."""
        return self.result_path.with_name(PAGE)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields but the model and its predictions, ready for JSON; an undefined number becomes None."""
        without = ("model", "evaluation", "profile")
        record = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in without}
        intervals = {} if self.evaluation is None else self.evaluation.intervals
        baselines = {} if self.evaluation is None else self.evaluation.baselines
        gains = {} if self.evaluation is None else self.evaluation.gains
        return record | {
            "metrics": finite_values(self.metrics),
            "baselines": {name: finite_values(metrics) for name, metrics in baselines.items()},
            "step_memory": None if self.step_memory is None else self.step_memory.to_dict(),
            "probe": None if self.probe is None else self.probe.to_dict(),
            "intervals": {name: list(ends) for name, ends in intervals.items()},
            "gains": {name: list(ends) for name, ends in gains.items()},
            "history": [finite_values(entry) for entry in self.history],
            "data": None if self.data is None else self.data.to_dict(),
            "warnings": list(self.warnings),
            "probe_words": list(self.probe_words),
            "task": {"kind": self.task.kind, "names": list(self.task.names)},
            "trained_layers": list(self.trained_layers),
            "model_dir": str(self.model_dir),
            "result_path": str(self.result_path),
            "profile": None if self.profile is None else self.profile.to_dict(),
        }
