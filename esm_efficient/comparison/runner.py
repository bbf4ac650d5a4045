"""compare(): estimate or train every recipe at both budgets."""

from __future__ import annotations

import dataclasses
import gc
import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from esm_efficient.comparison.figures import BUDGETS, MethodFigures, estimated_figures, measured_figures
from esm_efficient.comparison.record import Comparison
from esm_efficient.costs.devices import DEFAULT_DEVICE, Device
from esm_efficient.errors import ConfigurationError, nearest
from esm_efficient.estimation.estimate import estimate
from esm_efficient.estimation.inputs import data_lengths, resolve_config
from esm_efficient.recipes import RECIPES, Recipe, get_recipe
from esm_efficient.reporting import file_name
from esm_efficient.tasks import MAX_TOKENS, Task, task_of

if TYPE_CHECKING:
    from datasets import DatasetDict
    from transformers import PreTrainedConfig, PreTrainedModel

    from esm_efficient.training.result import FinetuneResult

_SIZES = ("batch_size", "micro_batch", "quantization")
_SIZED = "give steps and epochs, and batch_size and micro_batch, instead"
_INSTEAD = {
    **dict.fromkeys(
        ("max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps"), _SIZED
    ),
    "recipe": "give recipes instead",
    "seed": "give seeds instead",
    "profile": "every run is profiled, so leave it out",
}
"""Options of `finetune` that a comparison sets, and what to do."""
_OF_COMPARE = ("model", "recipe", "device", "tokens")
"""Options of `estimate` that a comparison sets."""


def compare(
    model: str | Path | PreTrainedConfig | PreTrainedModel,
    dataset: Any = None,
    *,
    recipes: Sequence[str | Recipe] = tuple(RECIPES),
    steps: int = 100,
    epochs: float = 1.0,
    seeds: Sequence[int] = (0,),
    metric: str | None = None,
    device: str | Device | None = None,
    tokens: Any = 512,
    sequences: int | None = None,
    output_dir: str | Path | None = None,
    each: Callable[[Comparison], object] | None = None,
    estimate_options: Mapping[str, Any] | None = None,
    **finetune_options: Any,
) -> Comparison:
    """Compare recipes by time, memory and result: at equal numbers of optimizer steps, and at equal epochs.

    With a dataset, `finetune` trains every recipe with every seed at both budgets. If both budgets give the same number
    of steps, one run counts for both. Without a dataset, costs are estimated for a device, and there is no metric.

    Args:
        model: as in `estimate`; to train, a folder or a Hub name with weights.
        dataset: as in `finetune`, not tokenised; None to estimate.
        recipes: names or `Recipe` objects.
        steps: optimizer steps of the first budget.
        epochs: passes over the training sequences of the second budget.
        seeds: seeds of the runs.
        metric: one of the metrics of `finetune`; None for the one that early stopping reads for this task.
        device: the device that is estimated; runs take place on the machine that starts them. None for
            ``DEFAULT_DEVICE`` without a dataset, and for this machine with one.
        tokens: as in `estimate`; ignored with a dataset.
        sequences: training sequences of an estimated epoch, as in `estimate`; ignored with a dataset.
        output_dir: folder that gets one folder per run; None keeps no files.
        each: called after each recipe and budget with what is measured until then, such as to save it: hours of runs
            are not lost by one that fails.
        estimate_options: further options of `estimate`.
        **finetune_options: further options of `finetune`.

    Returns:
        Figures, tables and plots.

    Raises:
        ConfigurationError: the options contradict each other, the metric is unknown, or recipes are to be trained on
            several ranks.

    Example:
        >>> comparison = compare("650M", device="A10G", recipes=["base", "all"])
        >>> [f.recipe.name for f in comparison.figures if f.budget == "steps"]
        ['base', 'all']
    """
    chosen = _check_recipes(recipes)
    if own := [name for name in _INSTEAD if name in finetune_options]:
        raise ConfigurationError(f"{own[0]}: {_INSTEAD[own[0]]}")
    _check_estimate_options(estimate_options or {})
    if steps < 1 or not 0 < epochs < math.inf or (dataset is not None and not seeds) or len(set(seeds)) < len(seeds):
        raise ConfigurationError(
            f"steps={steps}, epochs={epochs}, seeds={list(seeds)}: expected at least 1 step, more than 0 epochs and a "
            "finite number of them, and at least one seed, each of them once"
        )
    if dataset is not None and int(os.environ.get("WORLD_SIZE", "1")) > 1:  # a step would have more sequences
        raise ConfigurationError("a comparison trains in one process: start it without torchrun or accelerate launch")
    if dataset is None and finetune_options:
        raise ConfigurationError(f"{', '.join(finetune_options)}: options of training, which needs a dataset")
    sizes = {name: finetune_options.pop(name) for name in _SIZES if name in finetune_options}
    if sizes:
        from esm_efficient.training.options import resolve_options

        chosen = [resolve_options(recipe, sizes)[0] for recipe in chosen]
    best, of_task = "mcc", dict[str, Any]()
    if dataset is None:
        device = device or DEFAULT_DEVICE
        lengths = data_lengths(tokens, sequences)
    else:
        from esm_efficient.inference.loading import default_device
        from esm_efficient.training.given import evaluated_split, splits_from
        from esm_efficient.training.run_plan import device_here
        from esm_efficient.training.stopping import BEST

        dataset = splits_from(dataset, **(finetune_options.pop("data_options", None) or {}))
        evaluated_split(dataset)
        task = task_of(dataset["train"].features)
        best = BEST[task.kind][0]
        _check_metric(metric, task)
        device = device or device_here(default_device())
        of_task = {"head": task.head, "num_labels": len(task.names)}
        lengths = data_lengths(dataset, max_tokens=finetune_options.get("max_tokens", MAX_TOKENS))
    estimates = {
        recipe.name: estimate(
            model, recipe=recipe, device=device, tokens=lengths, **of_task, **(estimate_options or {})
        )
        for recipe in chosen
    }
    settings = [
        (recipe, budget, steps if budget == "steps" else math.ceil(epochs * lengths.sequences / recipe.batch_size))
        for budget in BUDGETS
        for recipe in chosen
    ]
    name, figures = resolve_config(model)[0], list[MethodFigures]()
    if dataset is None:
        figures = [estimated_figures(estimates[recipe.name], budget, n) for recipe, budget, n in settings]
        first = next(iter(estimates.values()))
        note = (
            f"Estimated for {first.device.name}, {first.precision}, sequences of "
            f"{'' if isinstance(lengths.train, int) else 'up to '}{np.max(lengths.train):,} tokens: peaks of tensors, "
            f"counted operation by operation; times by a roofline, so real ones are longer. An epoch has "
            f"{lengths.sequences:,} sequences. These are costs alone: which method is best is measured with a table."
        )
        return Comparison(name, tuple(figures), metric or best, (), estimates, note)
    runs = _Runs(model, dataset, output_dir, finetune_options)
    for recipe, budget, n in settings:
        results = [runs.run(recipe, n, seed) for seed in seeds]
        cache = estimates[recipe.name].cache
        size = 0 if cache is None else cache.bytes
        figures.append(measured_figures(recipe, budget, results, metric or best, lengths.sequences, cache_bytes=size))
        note = (
            f"Measured on {runs.device}: {lengths.sequences:,} sequences to train on, {len(seeds)} seed"
            f"{'s' if len(seeds) > 1 else ''}; peaks of tensors, highest over the seeds; times and rates are means."
        )
        found = Comparison(name, tuple(figures), metric or best, tuple(seeds), estimates, note)
        if each is not None:
            each(found)
    return found


def _check_recipes(recipes: Sequence[str | Recipe]) -> list[Recipe]:
    chosen = [get_recipe(recipe) for recipe in recipes]
    names = [recipe.name for recipe in chosen]
    if not names:
        raise ConfigurationError("recipes=[]: expected at least one")
    if len({file_name(name) for name in names}) < len(names):
        raise ConfigurationError(
            f"recipes share a name, or the name of a folder ({', '.join(names)}): name them apart with "
            "recipe.replace(name=...)"
        )
    return chosen


def _check_estimate_options(options: Mapping[str, Any]) -> None:
    """Refuse options that `estimate` does not have, or that a comparison sets."""
    known = signature(estimate).parameters.keys() - set(_OF_COMPARE)
    if unknown := [name for name in options if name not in known]:
        advice = nearest(unknown[0], known, "an option of estimate that compare does not have")
        raise ConfigurationError(f"estimate_options has {unknown[0]!r}{advice}")


def _check_metric(metric: str | None, task: Task) -> None:
    """Refuse a metric that the runs will not have, before any of them."""
    from transformers import EvalPrediction

    from esm_efficient.training.intervals import without_warnings
    from esm_efficient.training.metrics import compute_metrics_for

    scores = np.eye(max(2, len(task.names)))[:, : len(task.names)]
    is_class = task.kind in ("single_label_classification", "token_classification")
    labels = np.arange(len(scores)) % len(task.names) if is_class else scores
    with without_warnings():
        known = compute_metrics_for(task)(EvalPrediction(scores, labels)).keys() | {"loss"}
    if metric is not None and metric not in known:
        raise ConfigurationError(f"metric={metric!r}: expected one of {', '.join(sorted(known))}")


class _Runs:
    """Runs of `finetune`; each setting is trained once.

    Attributes:
        device: name of the device of the last run.
    """

    def __init__(self, model: Any, dataset: DatasetDict, folder: str | Path | None, options: Mapping[str, Any]) -> None:
        if not isinstance(model, (str, Path)):
            raise ConfigurationError(
                f"model: got a {type(model).__name__}; expected a folder or a Hub name, because every run needs fresh "
                "weights"
            )
        self.device = ""
        self._model, self._dataset, self._folder, self._options = model, dataset, folder, options
        self._results: dict[tuple[str, int, int], FinetuneResult] = {}

    def run(self, recipe: Recipe, steps: int, seed: int) -> FinetuneResult:
        """Return the result of a run without its model."""
        key = (recipe.name, steps, seed)
        if key not in self._results:
            with tempfile.TemporaryDirectory() as scratch:
                folder = (
                    Path(scratch if self._folder is None else self._folder) / f"{file_name(recipe.name)}-{steps}-{seed}"
                )
                self._results[key] = self._train(recipe, steps, seed, folder)
            gc.collect()  # the model must leave the device before the next run
        return self._results[key]

    def _train(self, recipe: Recipe, steps: int, seed: int, folder: Path) -> FinetuneResult:
        from esm_efficient.training.finetune import finetune

        result = finetune(
            self._model,
            self._dataset,
            recipe=recipe,
            seed=seed,
            output_dir=folder,
            profile=True,
            max_steps=steps,
            **{"probe": False, "report": self._folder is not None, "early_stopping": None, **self._options},
        )
        if result.profile is not None:
            self.device = result.profile.device
        # A comparison keeps many results, and their models would fill the device. No user sees this copy.
        return dataclasses.replace(result, model=None)
