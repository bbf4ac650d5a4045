"""Sections of an HTML page that show how well a model predicts: tables with intervals, plots, the worst mistakes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from esm_efficient.errors import ConfigurationError, listing
from esm_efficient.reporting import count_of, finite_values, format_number, format_table
from esm_efficient.reporting.html import Part, Plot, Section, Table
from esm_efficient.reporting.score_plots import (
    MOST_CURVES,
    MOST_NUMBERED,
    confusion_plot,
    ranking_plot,
    reliability,
    reliability_plot,
    scatter_plot,
)
from esm_efficient.tasks import IGNORE, Task
from esm_efficient.training.intervals import MOST_SCORES
from esm_efficient.training.residue_page import residue_strips

MISTAKES = 12
"""The most mistakes that are listed."""

CONFUSION = "True classes by predicted ones. The colour is the share of the true class: a row adds up to 1."

_SHOWN_RESIDUES = 60


@dataclass(frozen=True)
class Evaluation:
    """What a model predicted for a split, and what is true.

    Attributes:
        task: the task.
        scores: logits, or numbers for regression, of shape (examples, labels) or (examples, tokens, labels).
        labels: true labels of the examples, as a Trainer's ``label_ids``.
        metrics: the metrics.
        intervals: 95 % interval of metrics (`esm_efficient.training.intervals`).
        names: accession of each example, or its number.
        sequences: the letters that the model read of each example (`esm_efficient.training.residue_page.read_letters`);
            empty if they are not known.
        thresholds: probability from which each label is positive; None for 0.5.
        baselines: metrics of other predictions of the same examples, by name (`esm_efficient.training.baselines`).
        baseline_intervals: 95 % interval of metrics of those of the baselines that have one, by name.
        gains: 95 % interval of metrics minus those of the last baseline, from the same draws of examples.
    """

    task: Task
    scores: np.ndarray
    labels: np.ndarray
    metrics: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]
    names: Sequence[str] = ()
    sequences: Sequence[str] = ()
    thresholds: np.ndarray | None = None
    baselines: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    baseline_intervals: Mapping[str, Mapping[str, tuple[float, float]]] = field(default_factory=dict)
    gains: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def metric_rows(self) -> list[tuple[str, ...]]:
        """Return the name, the value and the interval of each metric, its values by the baselines, and its gain."""
        return [
            (
                name,
                format_number(value, "{:.3f}"),
                "{:.3f} to {:.3f}".format(*self.intervals[name]) if name in self.intervals else "-",
                *(
                    _with_interval(metrics.get(name), self.baseline_intervals.get(baseline, {}).get(name))
                    for baseline, metrics in self.baselines.items()
                ),
                *([self._gain(name)] if self.gains else []),
            )
            for name, value in self._shown().items()
        ]

    def _shown(self) -> dict[str, float]:
        """Return the metrics of all classes together, without that of a baseline."""
        return {
            name: value
            for name, value in self.metrics.items()
            if not name.startswith(("f1_", "mcc_")) or name in ("f1_micro", "f1_macro")
            if name != "majority_accuracy"
        }

    def interval_note(self) -> str:
        """Return why metrics have no interval; empty if all but the loss, which has none, have one."""
        missing = [name for name in self._shown() if name not in self.intervals and name != "loss"]
        if not missing:
            return ""
        if not self.intervals:
            return f"No metric has an interval: it needs two examples or more, and at most {MOST_SCORES:,} scores."
        return (
            f"No interval: {listing(missing)}, which cannot be computed for this test set, or for some of the samples "
            "drawn from it."
        )

    def header(self, first: str = "metric") -> tuple[str, ...]:
        """Return the names of the columns of `metric_rows`."""
        gain = [f"minus {list(self.baselines)[-1]}"] if self.gains else []
        return (first, "value", "95 % interval", *self.baselines, *gain)

    def _gain(self, name: str) -> str:
        """Return by how much a metric is above that of the last baseline, with its interval."""
        if name not in self.gains:
            return "-"
        value = self.metrics[name] - list(self.baselines.values())[-1][name]
        return "{:+.3f} ({:+.3f} to {:+.3f})".format(value, *self.gains[name])

    def to_dict(self) -> dict[str, Any]:
        """Return the metrics with their intervals, ready for JSON; an undefined metric becomes None."""
        return {
            "task": {"kind": self.task.kind, "names": list(self.task.names)},
            "examples": len(self.labels),
            "metrics": finite_values(self.metrics),
            "intervals": {name: list(ends) for name, ends in self.intervals.items()},
            "baselines": {name: finite_values(metrics) for name, metrics in self.baselines.items()},
        }

    def __str__(self) -> str:
        """Return a table of the metrics with their intervals."""
        table = format_table(self.metric_rows(), self.header())
        return "\n\n".join(part for part in (table, self.interval_note(), verdict(self)) if part)

    def class_table(self) -> Table:
        """Return a table with the examples of each class or label, and its F1 and MCC with their intervals.

        A class without examples has no score.
        """
        shown = [metric for metric in ("f1", "mcc") if f"{metric}_{self.task.names[0]}" in self.metrics]
        rows = []
        for index, name in enumerate(self.task.names):
            support = self._support(index)
            cells = [name, f"{support:,}"]
            for metric in (f"{metric}_{name}" for metric in shown):
                cells.append(_with_interval(self.metrics.get(metric), self.intervals.get(metric)) if support else "-")
            rows.append(tuple(cells))
        return Table(("class", "examples", *(f"{metric.upper()} (95 % interval)" for metric in shown)), rows)

    def _support(self, index: int) -> int:
        if self.task.kind == "multi_label_classification":
            return int((self.labels[:, index] == 1).sum())
        return int((self.labels == index).sum())


def _with_interval(value: float | None, interval: tuple[float, float] | None) -> str:
    text = format_number(value, "{:.3f}")
    return text if interval is None else text + " ({:.3f} to {:.3f})".format(*interval)


def evaluation_sections(evaluation: Evaluation, *, notes: Sequence[Part] = ()) -> list[Section]:
    """Return the sections of a page; without matplotlib they have no plots, and say so.

    Args:
        evaluation: the evaluation.
        notes: what is above the table of the metrics.
    """
    warning = verdict(evaluation)
    table = Table(evaluation.header(), evaluation.metric_rows())
    parts: list[Part] = [*([warning] if warning else []), *notes, table]
    parts += [note] if (note := evaluation.interval_note()) else []
    sections = [Section("Result", parts)]
    if evaluation.task.kind != "regression":
        sections.append(Section("By class", [evaluation.class_table()]))
    kind = evaluation.task.kind
    if not (np.isfinite(evaluation.labels) & (evaluation.labels != IGNORE)).any():
        return [*sections, Section("Plots", ["No label is known, so there is nothing to plot."])]
    if kind == "regression":
        return [*sections, *_regression_sections(evaluation)]
    if kind == "multi_label_classification":
        return [*sections, *_several_sections(evaluation)]
    return [*sections, *_class_sections(evaluation)]


def verdict(evaluation: Evaluation) -> str:
    """Return a warning if the model does not beat the best constant prediction; else an empty text."""
    advice = "Train longer, with another learning rate, or check the labels."
    constant = next(iter(evaluation.baselines.values()), {})
    if (r2 := evaluation.metrics.get("r2")) is not None and r2 <= 0:
        if constant.get("r2") == 1:
            return "All numbers are the same, so they do not show whether the model is better than their mean."
        return (
            f"The model is not better than always predicting the mean of the labels: its r2 is {r2:.3f}, and that of "
            f"the mean is 0. If only the order matters, compare Spearman's correlation. {advice}"
        )
    if evaluation.task.kind == "multi_label_classification":
        names = ("subset_accuracy", "jaccard")
        if not all(evaluation.metrics.get(name, math.nan) <= constant.get(name, math.nan) for name in names):
            return ""
        found, other = (" and ".join(f"{m[name]:.3f}" for name in names) for m in (evaluation.metrics, constant))
        return (
            "The model is not better than always predicting the more frequent value of each label: its subset accuracy "
            f"and its Jaccard index are {found}, and that prediction has {other}. With rare labels, compare MCC and "
            f"AUROC. {advice}"
        )
    accuracy, majority = (evaluation.metrics.get(name) for name in ("accuracy", "majority_accuracy"))
    if accuracy is None or majority is None or not accuracy <= majority:
        return ""
    if majority == 1:
        return (
            "All examples have the same class, so they do not show whether the model is better than always predicting "
            f"the most frequent class. Its accuracy is {accuracy:.3f}."
        )
    return (
        f"The model is not better than always predicting the most frequent class: its accuracy is {accuracy:.3f}, and "
        f"always predicting that class has {majority:.3f}. With rare classes, compare MCC and AUROC. {advice}"
    )


def _class_sections(evaluation: Evaluation) -> list[Section]:
    from scipy.special import softmax

    names = evaluation.task.names
    known = evaluation.labels != IGNORE
    true, chances = evaluation.labels[known].astype(int), softmax(evaluation.scores[known], axis=-1)
    predicted, best = chances.argmax(axis=1), chances.max(axis=1)
    counts = np.zeros((len(names), len(names)), dtype=int)
    np.add.at(counts, (true, predicted), 1)
    shown = range(1, 2) if len(names) == 2 else range(len(names))
    ranked = {names[index]: (true == index, chances[:, index]) for index in shown}
    bins, error = reliability(best, predicted == true)
    confusion: list[Part] = [draw(confusion_plot, counts, names, caption=CONFUSION)]
    if len(names) > MOST_NUMBERED:
        confusion += _confusions(counts, names)
    sections = [
        Section("Confusion", confusion),
        _ranking(ranked),
        Section("Reliability", [draw(reliability_plot, bins, caption=_calibration(error))]),
    ]
    if evaluation.task.kind == "single_label_classification":
        rows = np.flatnonzero(known)
        wrong = [
            (float(best[i]), rows[i], names[true[i]], names[predicted[i]]) for i in np.flatnonzero(predicted != true)
        ]
        sections.append(_mistakes(evaluation, wrong))
    elif evaluation.sequences:
        sections.append(Section("Worst mistakes", residue_strips(evaluation, MISTAKES)))
    return sections


def _several_sections(evaluation: Evaluation) -> list[Section]:
    from scipy.special import expit

    names, chances, true = evaluation.task.names, expit(evaluation.scores), evaluation.labels
    limits = np.full(len(names), 0.5) if evaluation.thresholds is None else evaluation.thresholds
    predicted, known = chances >= limits, np.isin(true, (0, 1))
    ranked = {
        name: (true[known[:, index], index] == 1, chances[known[:, index], index]) for index, name in enumerate(names)
    }
    right = np.where(predicted, true == 1, true == 0)[known]
    sure = np.where(predicted, chances, 1 - chances)[known]
    bins, error = reliability(sure, right)
    is_wrong = known & (predicted != (true == 1))
    wrong, surest = [], {}
    for row in np.flatnonzero(is_wrong.any(axis=1)):
        chance = np.where(is_wrong[row], np.where(predicted[row], chances[row], 1 - chances[row]), -1)
        label = int(chance.argmax())
        truth = _joined(names, true[row] == 1) + _unknown(names, ~known[row])
        wrong.append((float(chance[label]), row, truth, _joined(names, predicted[row])))
        surest[row] = f"{'' if predicted[row, label] else 'not '}{names[label]}: {chance[label]:.3g}"
    reliable = Section("Reliability", [draw(reliability_plot, bins, caption=_calibration(error))])
    mistakes = _mistakes(evaluation, wrong, score="surest mistake, probability", shown=surest)
    return [_ranking(ranked), reliable, mistakes]


def _confusions(counts: np.ndarray, names: Sequence[str]) -> list[Part]:
    """Return the most frequent confusions of classes, where the plot has no numbers."""
    wrong = counts * (1 - np.eye(len(names), dtype=int))
    order = np.argsort(-wrong, axis=None, kind="stable")[:MISTAKES]
    pairs = [divmod(int(place), len(names)) for place in order if wrong.flat[place]]
    rows = [
        (f"{t + 1} {names[t]}", f"{p + 1} {names[p]}", f"{counts[t, p]:,} of {counts[t].sum():,}") for t, p in pairs
    ]
    return ["The most frequent confusions:", Table(("true", "predicted", "of the true class"), rows)] if rows else []


def _joined(names: Sequence[str], chosen: np.ndarray) -> str:
    return " | ".join(name for name, is_chosen in zip(names, chosen, strict=True) if is_chosen) or "none"


def _unknown(names: Sequence[str], chosen: np.ndarray) -> str:
    return f"; unknown: {_joined(names, chosen)}" if chosen.any() else ""


def _regression_sections(evaluation: Evaluation) -> list[Section]:
    names = evaluation.task.names
    true = evaluation.labels.reshape(len(evaluation.labels), -1).astype(float)
    predicted = evaluation.scores.reshape(true.shape).astype(float)
    plots: list[Any] = []
    for index, name in enumerate(names):
        known = np.isfinite(true[:, index])
        if not known.any():
            plots.append(f"{name}: no number is known in this split.")
            continue
        caption = f"{name}: predicted against true; the line is a perfect prediction."
        plots.append(draw(scatter_plot, true[known, index], predicted[known, index], name, caption=caption))
    errors, of = np.abs(predicted - true), ""
    if len(names) > 1:  # their units may differ
        known_columns = (column[np.isfinite(column)] for column in true.T)
        errors /= np.array([(known.std() if known.size else 0.0) or 1.0 for known in known_columns])
        of = ", each divided by the standard deviation of its number"
    largest = np.nan_to_num(errors).max(axis=1)
    rows = np.argsort(-largest)[:MISTAKES]
    wrong = [(float(largest[row]), row, _numbers(true[row]), _numbers(predicted[row])) for row in rows]
    text = f"Largest errors{of}, {len(rows)} of {count_of(len(largest), 'sequence')}:"
    return [Section("Predicted and true", plots), _mistakes(evaluation, wrong, score="error", text=text)]


def _numbers(values: np.ndarray) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


def _ranking(classes: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Section:
    caption = "Left: ROC. Right: precision against recall. Dashed: what chance gives."
    if (count := sum(0 < true.sum() < len(true) for true, _ in classes.values())) > MOST_CURVES:
        caption += f" The first {MOST_CURVES} of {count} are drawn."
    return Section("Ranking", [draw(ranking_plot, classes, caption=caption)])


def _calibration(error: float) -> str:
    return f"How often a prediction with a probability comes true. Expected calibration error: {error:.3f}."


def _mistakes(
    evaluation: Evaluation,
    wrong: list[tuple[float, Any, str, str]],
    *,
    score: str = "probability",
    text: str = "",
    shown: Mapping[Any, str] | None = None,
) -> Section:
    """Return the table of the mistakes of which the model was surest; `shown` has the cell of the score by row."""
    worst = sorted(wrong, key=lambda mistake: -mistake[0])[:MISTAKES]
    cells = {row: f"{value:.3g}" for value, row, *_ in worst} if shown is None else shown
    rows = [(evaluation.names[row], t, p, cells[row], _start(evaluation, row)) for _, row, t, p in worst]
    table = Table(("accession", "true", "predicted", score, "sequence"), rows)
    if not wrong:
        return Section("Worst mistakes", ["There is none."])
    return Section(
        "Worst mistakes", [text or f"{len(wrong):,} in all; the {len(rows)} of which the model was surest:", table]
    )


def _start(evaluation: Evaluation, row: int) -> str:
    if not evaluation.sequences:
        return "-"
    sequence = evaluation.sequences[row]
    return sequence[:_SHOWN_RESIDUES] + ("…" if len(sequence) > _SHOWN_RESIDUES else "")


def draw(plot: Callable[..., str], *args: Any, caption: str) -> str | Plot:
    """Return a plot with its caption; without matplotlib, a text that says why there is none."""
    try:
        return Plot(plot(*args), caption)
    except ConfigurationError as error:  # matplotlib is not installed
        return f"{caption} No plot: {error}"
