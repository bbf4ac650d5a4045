"""What a run of `finetune` shows at its end: the evaluation with intervals, a table, and an HTML page."""

from __future__ import annotations

import importlib.metadata
import logging
import math
import shlex
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from esm_efficient.errors import listing
from esm_efficient.reporting import format_number, format_table
from esm_efficient.reporting.html import Command, Part, Section, Table, html_page, repeated_by
from esm_efficient.reporting.score_plots import curves_plot
from esm_efficient.tasks import SPECIAL_TOKENS
from esm_efficient.training.baselines import PROBE, FrozenProbe, majority_metrics
from esm_efficient.training.evaluation_page import Evaluation, draw, evaluation_sections, verdict
from esm_efficient.training.intervals import Draws, differences_of, draws_of, ends_of
from esm_efficient.training.layer_probes import METRICS
from esm_efficient.training.metrics import logits_of
from esm_efficient.training.residue_page import read_letters
from esm_efficient.training.step_memory import memory_section

if TYPE_CHECKING:
    from transformers import Trainer

    from esm_efficient.tasks import Task
    from esm_efficient.training.result import FinetuneResult

_LIBRARY = Path(__file__).parents[1]

NO_METRICS = ("_runtime", "_per_second", "_preparation_time")
"""Ends of the names of what a Trainer puts among the metrics."""


def evaluate_split(
    trainer: Trainer,
    split: Any,
    task: Task,
    *,
    raw: Any = None,
    thresholds: Mapping[str, float] | None = None,
    probe: FrozenProbe | None = None,
) -> Evaluation:
    """Predict a tokenised split with a trainer, and return metrics, their intervals and the predictions.

    Args:
        trainer: the trainer.
        split: the tokenised split.
        task: the task.
        raw: the split with its sequences, in the same order, if they are known.
        thresholds: label name -> probability from which the label is positive, if they were tuned.
        probe: a linear probe that was measured on the same split.
    """
    from transformers import EvalPrediction

    output = trainer.predict(split, metric_key_prefix="test")
    metrics = {
        name.removeprefix("test_"): value
        for name, value in (output.metrics or {}).items()
        if not name.endswith(NO_METRICS)
    }
    scores, labels = logits_of(output.predictions), np.asarray(output.label_ids)
    draws: Draws = {}
    if trainer.compute_metrics is not None:
        draws = draws_of(EvalPrediction(scores, labels), trainer.compute_metrics)
    columns = [] if raw is None else raw.column_names
    numbered = [str(number) for number in range(1, len(labels) + 1)]
    return Evaluation(
        task=task,
        scores=scores,
        labels=labels,
        metrics=metrics,
        intervals=ends_of(draws),
        names=list(map(str, raw["accession"])) if "accession" in columns else numbered,
        sequences=_as_read(raw["sequence"], split["input_ids"]) if "sequence" in columns else (),
        thresholds=None if thresholds is None else np.array([thresholds[name] for name in task.names]),
        baselines=majority_metrics(task, labels) | ({} if probe is None else {PROBE: probe.metrics}),
        baseline_intervals={} if probe is None else {PROBE: probe.intervals},
        gains={} if probe is None else differences_of(draws, probe.draws),
    )


def _as_read(sequences: Sequence[str], ids: Sequence[Sequence[int]]) -> list[str]:
    """Return the letters that a model read of sequences, of which a long one was cut behind its start."""
    return [read_letters(text)[: len(row) - SPECIAL_TOKENS] for text, row in zip(sequences, ids, strict=True)]


def cost_rows(result: FinetuneResult) -> list[tuple[str, str]]:
    """Return name and value of what a run cost, as text."""
    share = 100 * result.trainable_parameters / result.total_parameters
    ran = result.steps > result.steps_resumed
    return [
        ("optimizer steps", result.steps_in_words),
        ("trained", f"{result.trainable_parameters:,} of {result.total_parameters:,} parameters ({share:.2f} %)"),
        *([("layers that trained", result.layers_in_words)] if ran else []),
        (
            f"time of the {result.loop_in_words}",
            f"{result.seconds:,.0f} s ({result.residues_per_second:,.0f} residues/s)",
        ),
        *([("time of the cached states", f"{result.states_seconds:,.0f} s")] if result.states_seconds else []),
        *([] if result.probe is None else [("time of the linear probe", f"{result.probe.seconds:.0f} s")]),
        ("peak memory", result.peak_memory_in_words),
        ("model", str(result.model_dir)),
        ("report", str(result.page)),
    ]


def result_table(result: FinetuneResult) -> str:
    """Return the tables that a person wants to see at the end of a run."""
    parts = [format_table(cost_rows(result))]
    if (evaluation := result.evaluation) is not None:
        metrics = format_table(evaluation.metric_rows(), evaluation.header(f"on {result.evaluated_on}"))
        parts = [metrics, evaluation.interval_note(), *parts, verdict(evaluation)]
    return "\n\n".join(part for part in [*parts, probe_verdict(result)] if part)


def probe_verdict(result: FinetuneResult) -> str:
    """Return a sentence if the gain of the model over a linear probe may be chance; else nothing."""
    return " ".join(_probe_verdict(result))


def _probe_verdict(result: FinetuneResult) -> tuple[str, ...]:
    """Return the sentence, and, if the probe is better, what shows the probes of all layers."""
    if result.probe is None:
        return ()
    metric = METRICS[result.task.kind][0]
    tuned, probed = (metrics.get(metric, math.nan) for metrics in (result.metrics, result.probe.metrics))
    if math.isnan(probed):
        return ()
    low, high = ({} if result.evaluation is None else result.evaluation.gains).get(metric, (math.nan, math.nan))
    unsure = (
        f"It is not certain that the fine-tuned model is better than the {PROBE}: the 95 % interval of the difference "
        f"in {metric}, {low:+.3f} to {high:+.3f}, contains 0."
    )
    if tuned > probed:
        return (unsure,) if low <= 0 else ()
    if low <= 0 <= high and not math.isnan(tuned):
        sentence = f"{unsure} The {PROBE} needs no training:"
    else:
        sentence = (
            f"A {PROBE} on the frozen encoder has a better score than the fine-tuned model ({metric} {probed:.3f} "
            f"against {format_number(tuned, '{:.3f}')}), and needs no training:"
        )
    words = result.probe_words
    in_python = "sweep_layers(model, dataset)  # and the tokenizer, task and data_options that finetune was given"
    return sentence, shlex.join(["esm-efficient", "probe", *words]) if words else in_python


def run_page(result: FinetuneResult, *, command: str | None = None) -> str:
    """Return one HTML page of a run, with the result first.

    Args:
        result: the run.
        command: the line that repeats the run, if it was started by a command.
    """
    sections = []
    if result.evaluation is not None:
        advice = _probe_verdict(result)
        notes: list[Part] = [*advice[:1], *map(Command, advice[1:])]
        notes += [] if result.probe is None else [result.probe.describe()]
        sections += evaluation_sections(result.evaluation, notes=notes)
    sections[1:1] = [*warned_of(result.warnings), _what_ran(result, command)]  # after the table of the metrics
    if curves := curves_of(result.history):
        plot = draw(curves_plot, curves, caption="Values over the optimizer steps.")
        sections.append(Section("Training", [*_about_losses(result, curves), plot]))
    if result.data is not None:
        sections.append(Section("Data", [Table(("", *result.data.splits), result.data.rows())]))
    if result.step_memory is not None:
        sections.append(memory_section(result.step_memory))
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "peft"))
    name = Path(result.base_model).name or "a model"
    data = f" on {result.dataset}" if result.dataset else ""
    return html_page(f"{name}{data}, recipe {result.recipe}", sections, note=f"Trained with {versions}.")


def _about_losses(result: FinetuneResult, curves: Mapping[str, Any]) -> list[str]:
    """Return why the losses of the curves are not that of the result, if they differ by their kind."""
    if not any(name.endswith("loss") for name in curves):
        return []
    if result.task.kind == "regression":
        return [
            "The losses of the curves are in standard deviations of the training labels. The loss of the result is in "
            "the unit of the labels."
        ]
    if result.temperature is not None:
        return [
            "The losses of the curves are those before calibration, which divides the logits by "
            f"{result.temperature:.3g}. The loss of the result is that after it."
        ]
    return []


def _what_ran(result: FinetuneResult, command: str | None) -> Section:
    about = f" ({result.recipe_description})" if result.recipe_description else ""
    what = f"Recipe {result.recipe}{about}, seed {result.seed}. "
    what += f"The task: {result.task.describe()}. " + (f"The data: {result.dataset}." if result.dataset else "")
    parts: list[Part] = [what, Table(("", ""), cost_rows(result))]
    return Section("What ran", parts if command is None else [*parts, "Repeat it:", Command(command)])


def warned_of(warnings: Sequence[str]) -> list[Section]:
    """Return the section with warnings, each once; none without a warning."""
    return [Section("Warnings", list(dict.fromkeys(warnings)))] if warnings else []


def evaluation_page(
    evaluation: Evaluation,
    *,
    models: Sequence[str],
    dataset: str,
    command: str | None = None,
    warnings: Sequence[str] = (),
) -> str:
    """Return one HTML page of the evaluation of a trained model, or of an ensemble, on a table.

    Args:
        evaluation: the evaluation.
        models: name of the model, or of each member of the ensemble.
        dataset: name of the table.
        command: the line that repeats it, if there is one.
        warnings: what was warned of, such as rows that were left out.
    """
    what = f"{len(evaluation.labels):,} sequences of {dataset}. The task: {evaluation.task.describe()}."
    names = listing(list(map(_name_of_model, models)))
    sections = [*evaluation_sections(evaluation), *warned_of(warnings), *repeated_by(command)]
    return html_page(f"{names} on {Path(dataset).name}", sections, note=what)


def _name_of_model(model: str) -> str:
    path = Path(model)  # finetune writes into RUN/adapter or RUN/model
    return f"{path.parent.name}/{path.name}" if path.name in ("adapter", "model") and path.parent.name else path.name


def curves_of(history: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """Return (step, value) of the loss and of the metrics on validation, from the log of a Trainer.

    Of a run of one epoch, the metrics on validation are single values, which are no curve and are left out.
    """
    wanted = ("loss", "eval_loss", "eval_mcc", "eval_f1_macro", "eval_spearman")
    curves: dict[str, list[tuple[float, float]]] = {}
    for entry in history:
        for name in wanted:
            if isinstance(entry.get(name), float) and np.isfinite(entry[name]):
                curves.setdefault(name, []).append((entry["step"], entry[name]))
    return {name.replace("eval_", "validation: "): curves[name] for name in wanted if len(curves.get(name, ())) > 1}


def _is_handled(name: str) -> bool:
    """Return whether a message to a logger reaches a handler that shows it."""
    current: logging.Logger | None = logging.getLogger(name)
    while current is not None:
        if any(not isinstance(handler, WarningList) for handler in current.handlers):
            return True
        current = current.parent if current.propagate else None
    return False


class WarningList(logging.Handler):
    """Collects the warnings of the library, logged or warned, while it is attached, as a context manager.

    Attributes:
        messages: the warnings, in their order.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []
        self._show: Any = None

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a message; and show it, as Python does if nobody has configured logging."""
        self.messages.append(record.getMessage())
        if logging.lastResort is not None and not _is_handled(record.name):
            logging.lastResort.handle(record)

    def _warn(self, message: Any, category: Any, filename: str, *place: Any, **options: Any) -> None:
        # A warning of this library names the line that called it, which is in no other library.
        if _LIBRARY in Path(filename).parents or "site-packages" not in filename:
            self.messages.append(str(message))
        self._show(message, category, filename, *place, **options)

    def __enter__(self) -> WarningList:
        logging.getLogger("esm_efficient").addHandler(self)
        self._show, warnings.showwarning = warnings.showwarning, self._warn
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("esm_efficient").removeHandler(self)
        warnings.showwarning = self._show
