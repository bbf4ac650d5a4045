"""compare(): the table of methods, many runs or many estimates side by side."""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esm_efficient.costs.devices import DEFAULT_DEVICE, Device
from esm_efficient.costs.memory import CATEGORIES, Memory
from esm_efficient.errors import ConfigurationError
from esm_efficient.estimation.estimate import Estimate, estimate
from esm_efficient.estimation.inputs import resolve_config, token_lengths
from esm_efficient.recipes import RECIPES, Recipe, get_recipe
from esm_efficient.reporting import format_bytes, format_csv, format_markdown, format_table
from esm_efficient.reporting.html import Plot, Section, Table, html_page
from esm_efficient.reporting.plots import Method, memory_plot, pareto_plot, timeline_plot

if TYPE_CHECKING:
    from datasets import DatasetDict
    from transformers import PreTrainedConfig, PreTrainedModel

    from esm_efficient.training.result import FinetuneResult

_BUDGETS = {"steps": "equal numbers of optimizer steps", "epochs": "equal epochs"}


@dataclass(frozen=True)
class MethodFigures:
    """What one recipe costs and gives at one budget.

    Attributes:
        recipe: with its sizes.
        budget: ``"steps"`` or ``"epochs"``: what was made equal.
        steps: optimizer steps taken.
        epochs: passes over the training sequences.
        seconds: of the training loop; the mean over seeds, or the roofline's bound.
        residues_per_second: likewise.
        peak: bytes at the highest moment of any seed, by category.
        trainable_parameters: parameters that an optimizer updates.
        total_parameters: of the whole model.
        scores: the metric of each seed; empty for estimates.
        interval: the metric's 95 % confidence interval (Student's t over the seeds); None with fewer than two.
    """

    recipe: Recipe
    budget: str
    steps: int
    epochs: float
    seconds: float
    residues_per_second: float
    peak: Memory
    trainable_parameters: int
    total_parameters: int
    scores: tuple[float, ...] = ()
    interval: tuple[float, float] | None = None

    @property
    def score(self) -> float | None:
        """Mean of the metric over the seeds; None for estimates."""
        return statistics.fmean(self.scores) if self.scores else None


@dataclass(frozen=True)
class Comparison:
    """The figures of every recipe at both budgets, and how to show them.

    Attributes:
        model: what was compared.
        figures: one entry a recipe and budget.
        metric: name of the metric.
        seeds: of the runs; empty for estimates.
        timelines: recipe to the estimate that its memory over one step is drawn from.
        note: how the figures came about.
    """

    model: str
    figures: tuple[MethodFigures, ...]
    metric: str
    seeds: tuple[int, ...]
    timelines: Mapping[str, Estimate]
    note: str

    def rows(self, budget: str) -> tuple[list[str], list[list[object]]]:
        """Header and rows of the table at one budget, as text for people.

        Raises:
            ConfigurationError: `budget` is neither ``"steps"`` nor ``"epochs"``.
        """
        header = ["recipe", "micro-batch", "steps", "epochs", "time, s", "residues/s", "peak", *CATEGORIES]
        header.append("trained parameters")
        if self.seeds:
            header += [self.metric, "95 % interval"]
        rows: list[list[object]] = []
        for f in self._at(budget):
            row: list[object] = [
                f.recipe.name,
                f"{f.recipe.micro_batch} x {f.recipe.accumulation}",
                f"{f.steps:,}",
                f"{f.epochs:.3g}",
                _number(f.seconds, "{:,.1f}"),
                _number(f.residues_per_second, "{:,.0f}"),
                format_bytes(f.peak.total),
                *(format_bytes(getattr(f.peak, category)) for category in CATEGORIES),
                f"{f.trainable_parameters:,}",
            ]
            if self.seeds:
                row.append(_number(math.nan if f.score is None else f.score, "{:.3f}"))
                row.append("-" if f.interval is None else f"{f.interval[0]:.3f} to {f.interval[1]:.3f}")
            rows.append(row)
        return header, rows

    def to_markdown(self) -> str:
        """Both tables in Markdown."""
        parts = []
        for budget, name in _BUDGETS.items():
            header, rows = self.rows(budget)
            parts.append(f"### At {name}\n\n{format_markdown(rows, header)}\n")
        return "\n".join(parts)

    def to_csv(self) -> str:
        """One line a recipe and budget, with plain numbers; bytes and seconds."""
        records = [self._record(f) for f in self.figures]
        return format_csv([list(record.values()) for record in records], list(records[0]))

    def to_dict(self) -> dict[str, Any]:
        """Every figure, ready for JSON."""
        return {
            "model": self.model,
            "metric": self.metric,
            "seeds": list(self.seeds),
            "note": self.note,
            "rows": [
                self._record(f) | {"scores": [None if math.isnan(score) else score for score in f.scores]}
                for f in self.figures
            ],
        }

    def to_html(self) -> str:
        """One page with tables and plots that opens offline.

        Raises:
            ConfigurationError: matplotlib is not installed.
        """
        sections = []
        for budget, name in _BUDGETS.items():
            at = self._at(budget)
            methods = [
                Method(f.recipe.name, f.seconds, f.peak.total, f.score, *(f.interval or (None, None))) for f in at
            ]
            parts: list[str | Table | Plot] = [Table(*self.rows(budget))]
            if not any(math.isnan(f.seconds) for f in at):
                caption = "Time against peak memory. The line joins the methods that no other beats in both."
                if self.seeds:
                    caption += f" Right: {self.metric} against peak memory, with the interval over the seeds."
                parts.append(Plot(pareto_plot(methods, metric=self.metric), caption))
            sections.append(Section(f"At {name}", parts))
        stacks = {f.recipe.name: f.peak.to_dict() for f in self._at("steps")}
        first = next(iter(self.timelines.values()))
        capacity = 0 if self.seeds else first.device.memory
        memory = Plot(memory_plot(stacks, capacity=capacity), "Memory at the highest moment, by what it is held for.")
        timed = not any(math.isnan(e.seconds) for e in self.timelines.values())
        points = {
            name: [(p.phase, p.seconds if timed else float(i), p.memory.total) for i, p in enumerate(e.timeline)]
            for name, e in self.timelines.items()
        }
        timeline = Plot(
            timeline_plot(points, unit="seconds of the roofline" if timed else "moments, in order"),
            f"Memory over one micro-batch and the optimizer's step, estimated for {first.device.name} and "
            f"{first.precision}.",
        )
        sections.append(Section("Memory by category", [memory]))
        sections.append(Section("Memory over one step", [timeline]))
        return html_page(f"Fine-tuning methods for {self.model}", sections, note=self.note)

    def save(self, folder: str | Path) -> list[Path]:
        """Write ``comparison.txt``, ``.md``, ``.csv``, ``.json`` and ``.html`` into a folder.

        Returns:
            The files.

        Raises:
            ConfigurationError: matplotlib is not installed.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        contents = {
            "txt": f"{self}\n",
            "md": self.to_markdown(),
            "csv": self.to_csv(),
            "json": json.dumps(self.to_dict(), indent=2) + "\n",
            "html": self.to_html(),
        }
        for suffix, content in contents.items():
            (folder / f"comparison.{suffix}").write_text(content, encoding="utf-8")
        return [folder / f"comparison.{suffix}" for suffix in contents]

    def __str__(self) -> str:
        parts = [f"{self.model}. {self.note}"]
        for budget, name in _BUDGETS.items():
            header, rows = self.rows(budget)
            parts.append(f"At {name}:\n\n{format_table(rows, header)}")
        return "\n\n".join(parts)

    def _at(self, budget: str) -> list[MethodFigures]:
        if budget not in _BUDGETS:
            raise ConfigurationError(f"budget={budget!r}: expected one of {', '.join(_BUDGETS)}")
        return [f for f in self.figures if f.budget == budget]

    def _record(self, f: MethodFigures) -> dict[str, Any]:
        low, high = f.interval or (None, None)
        return {
            "recipe": f.recipe.name,
            "budget": f.budget,
            "micro_batch": f.recipe.micro_batch,
            "accumulation": f.recipe.accumulation,
            "steps": f.steps,
            "epochs": f.epochs,
            "seconds": None if math.isnan(f.seconds) else f.seconds,
            "residues_per_second": None if math.isnan(f.residues_per_second) else f.residues_per_second,
            "peak_bytes": f.peak.total,
            **{f"{category}_bytes": getattr(f.peak, category) for category in CATEGORIES},
            "trainable_parameters": f.trainable_parameters,
            "total_parameters": f.total_parameters,
            self.metric: None if f.score is None or math.isnan(f.score) else f.score,
            f"{self.metric}_low": low,
            f"{self.metric}_high": high,
        }


def compare(
    model: str | Path | PreTrainedConfig | PreTrainedModel,
    dataset: DatasetDict | None = None,
    *,
    recipes: Sequence[str | Recipe] = tuple(RECIPES),
    steps: int = 100,
    epochs: float = 1.0,
    seeds: Sequence[int] = (0,),
    metric: str = "mcc",
    device: str | Device = DEFAULT_DEVICE,
    tokens: Any = 512,
    sequences: int = 15_876,
    output_dir: str | Path | None = None,
    estimate_options: Mapping[str, Any] | None = None,
    **finetune_options: Any,
) -> Comparison:
    """Compare recipes by time, memory and result: at equal numbers of optimizer steps, and at equal epochs.

    With a data set every recipe is trained with every seed at both budgets, through `finetune`; where both come to
    the same number of steps, the run counts for both. Without one, costs are estimated for a device and there is no
    metric.

    Args:
        model: as `estimate`; for runs as `finetune`, that is with weights.
        dataset: as `finetune`; None to estimate.
        recipes: names or `Recipe` objects.
        steps: optimizer steps of the first budget.
        epochs: passes over the training sequences of the second.
        seeds: of the runs.
        metric: one of `finetune`'s.
        device: that estimates are for; runs take place where they are started.
        tokens: tokens of the sequences that estimates are for: one number, or a data set's lengths.
        sequences: training sequences that estimated epochs are for, unless `length` gives their lengths; the number
            in DeepLoc-2.0 by default.
        output_dir: gets a folder a run; None keeps nothing.
        estimate_options: further options of `estimate`.
        **finetune_options: further options of `finetune`.

    Returns:
        Figures, tables and plots.

    Raises:
        ConfigurationError: the options contradict each other, or no such metric is known.

    Example:
        >>> comparison = compare("650M", device="A10G", recipes=["base", "all"])
        >>> [f.recipe.name for f in comparison.figures if f.budget == "steps"]
        ['base', 'all']
    """
    chosen = [get_recipe(recipe) for recipe in recipes]
    if not chosen or steps < 1 or epochs <= 0 or (dataset is not None and not seeds):
        raise ConfigurationError(
            f"recipes={[r.name for r in chosen]}, steps={steps}, epochs={epochs}, seeds={list(seeds)}: expected at "
            "least one of each"
        )
    names = [recipe.name for recipe in chosen]
    if len(set(names)) < len(names):
        raise ConfigurationError(
            f"recipes share a name ({', '.join(names)}): give each its own with recipe.replace(name=...)"
        )
    if dataset is None and finetune_options:
        raise ConfigurationError(f"without a dataset nothing is trained: {', '.join(finetune_options)} go with one")
    lengths = token_lengths(tokens)
    if dataset is not None:
        lengths = [min(len(s) + 2, finetune_options.get("max_tokens", 1024)) for s in dataset["train"]["sequence"]]
    options = dict(estimate_options or {})
    estimates = {
        recipe.name: estimate(model, recipe=recipe, device=device, tokens=lengths, **options) for recipe in chosen
    }
    if dataset is None:
        number = sequences if isinstance(lengths, int) else len(lengths)
        figures = [
            _estimated(estimates[recipe.name], budget, count, count * recipe.batch_size / number)
            for budget in _BUDGETS
            for recipe in chosen
            for count in [steps if budget == "steps" else math.ceil(epochs * number / recipe.batch_size)]
        ]
        first = next(iter(estimates.values()))
        note = (
            f"Estimated for {first.device.name}, {first.precision}, sequences of "
            f"{'' if isinstance(lengths, int) else 'up to '}{first.tokens:,} tokens: peaks of tensors, counted "
            "operation by operation; times by a roofline, so real ones are longer."
        )
        return Comparison(resolve_config(model)[0], tuple(figures), metric, (), estimates, note)
    figures, where = [], ""
    runs = _Runs(model, dataset, output_dir, finetune_options)
    for budget in _BUDGETS:
        for recipe in chosen:
            count = steps if budget == "steps" else math.ceil(epochs * len(dataset["train"]) / recipe.batch_size)
            results = [runs.run(recipe, count, seed) for seed in seeds]
            figures.append(_measured(recipe, budget, results, metric, len(dataset["train"])))
            where = results[0].profile.device if results[0].profile is not None else ""
    note = (
        f"Measured on {where}: {len(dataset['train']):,} sequences to train on, {len(seeds)} seed"
        f"{'s' if len(seeds) > 1 else ''}; peaks of tensors, highest over the seeds; times and rates are means."
    )
    return Comparison(resolve_config(model)[0], tuple(figures), metric, tuple(seeds), estimates, note)


class _Runs:
    """Runs of `finetune`, none of them twice."""

    def __init__(self, model: Any, dataset: DatasetDict, folder: str | Path | None, options: Mapping[str, Any]) -> None:
        if not isinstance(model, (str, Path)):
            raise ConfigurationError("several runs need fresh weights each: give a folder or a Hub name, not a model")
        self._model, self._dataset, self._folder, self._options = model, dataset, folder, options
        self._done: dict[tuple[str, int, int], FinetuneResult] = {}

    def run(self, recipe: Recipe, steps: int, seed: int) -> FinetuneResult:
        from esm_efficient.training.finetune import finetune

        key = (recipe.name, steps, seed)
        if key not in self._done:
            with tempfile.TemporaryDirectory() as scratch:
                folder = Path(scratch if self._folder is None else self._folder) / f"{recipe.name}-{steps}-{seed}"
                result = finetune(
                    self._model,
                    self._dataset,
                    recipe=recipe,
                    seed=seed,
                    output_dir=folder,
                    profile=True,
                    max_steps=steps,
                    **self._options,
                )
            # The figures stay; the model goes before the next one takes its place on the device.
            self._done[key] = dataclasses.replace(result, model=None)  # type: ignore[arg-type]
            del result
            gc.collect()
        return self._done[key]


def _estimated(e: Estimate, budget: str, steps: int, epochs: float) -> MethodFigures:
    return MethodFigures(
        recipe=e.recipe,
        budget=budget,
        steps=steps,
        epochs=epochs,
        seconds=e.seconds * steps,
        residues_per_second=e.residues_per_second,
        peak=e.peak,
        trainable_parameters=e.trainable_parameters,
        total_parameters=e.total_parameters,
    )


def _measured(
    recipe: Recipe, budget: str, results: Sequence[FinetuneResult], metric: str, sequences: int
) -> MethodFigures:
    from esm_efficient.training.metrics import confidence_interval

    first = results[0]
    if metric not in first.metrics:
        raise ConfigurationError(f"metric={metric!r}: expected one of {', '.join(first.metrics)}")
    scores = tuple(float(result.metrics[metric]) for result in results)
    peaks = [result.profile.peak for result in results if result.profile is not None]
    return MethodFigures(
        recipe=recipe,
        budget=budget,
        steps=first.steps,
        epochs=first.steps * recipe.batch_size / sequences,
        seconds=statistics.fmean(result.seconds for result in results),
        residues_per_second=statistics.fmean(result.residues_per_second for result in results),
        peak=max(peaks, key=lambda peak: peak.total),
        trainable_parameters=first.trainable_parameters,
        total_parameters=first.total_parameters,
        scores=scores,
        interval=confidence_interval(scores),
    )


def _number(value: float, form: str) -> str:
    return "-" if math.isnan(value) else form.format(value)
