"""What a fine-tuned model is compared with: the majority class, and a linear probe on the frozen encoder."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import nn
from transformers import EvalPrediction

from esm_efficient.errors import EsmEfficientError
from esm_efficient.recipes import Recipe
from esm_efficient.tasks import IGNORE, Task
from esm_efficient.training.arguments import half_dtype
from esm_efficient.training.intervals import Draws, draws_of, ends_of, without_warnings
from esm_efficient.training.layer_probes import METRICS, Examples, fit_probes, read_examples
from esm_efficient.training.metrics import compute_metrics_for, tune_thresholds
from esm_efficient.training.probes import Fitted, fit_probe
from esm_efficient.trunk.layer_states import LayerReader

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import TrainingArguments

    from esm_efficient.training.cached import CachedTraining

logger = logging.getLogger(__name__)

Value = TypeVar("Value")

PROBE = "linear probe"
"""The name of the probe in tables."""

_MAJORITY = {
    "single_label_classification": "majority class",
    "multi_label_classification": "majority of each label",
    "token_classification": "majority class",
    "regression": "mean of the labels",
}
_STATES_BYTES = 2 * 1024**3
"""The most bytes of states of a split that are in memory at a time. With more examples, some are drawn at random."""

_MOST_RESIDUES = 20_000
_TOKEN_BUDGET = 8192


@dataclass(frozen=True)
class FrozenProbe:
    """A linear probe on the frozen encoder that a run of `finetune` began with.

    Attributes:
        layer: the layer whose states it reads; 0 for the embeddings.
        layers: number of layers of the encoder.
        reading: what it reads: ``"mean"`` over residues, or ``"residues"`` one by one.
        picked: whether the layer is the best one on validation; otherwise it is the one nearest to the middle.
        examples: training proteins, or residues, that it was fitted on.
        metrics: its metrics on the test split.
        seconds: time to compute the states and to fit.
        intervals: 95 % interval of the metrics, from the draws of sequences that give those of the model.
        draws: the metrics in each draw; empty if the result was read from a folder.
    """

    layer: int
    layers: int
    reading: str
    picked: bool
    examples: int
    metrics: Mapping[str, float]
    seconds: float
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    draws: Draws = field(default_factory=dict, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the metrics and their draws, ready for JSON."""
        record = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in ("metrics", "draws")}
        return record | {"intervals": {name: list(ends) for name, ends in self.intervals.items()}}

    def describe(self) -> str:
        """Return what the probe is, in one sentence."""
        read = "each residue" if self.reading == "residues" else "the mean over residues"
        why = "the best on validation" if self.picked else "the nearest to the middle"
        where = f"layer {self.layer} of {self.layers}" if self.layer else "the embeddings (layer 0)"
        return f"The {PROBE} reads {read} of {where} of the frozen encoder, {why}."


def majority_metrics(task: Task, labels: np.ndarray) -> dict[str, dict[str, float]]:
    """Return the metrics of the best constant prediction, by its name; empty if no label is known.

    Args:
        task: the task.
        labels: labels as a Trainer gives them: class ids, of shape (examples,) or (examples, tokens), -100 if unknown;
            or floats of shape (examples, labels), NaN if unknown; -100 is a number, but an unknown label.

    Returns:
        With classes, the metrics of always predicting the most frequent one; with several labels, the more frequent
        value of each; with numbers, their mean.

    Example:
        >>> found = majority_metrics(Task("single_label_classification", ("no", "yes")), np.array([0, 0, 0, 1]))
        >>> found["majority class"]["accuracy"], found["majority class"]["auroc"]
        (0.75, 0.5)
    """
    if task.kind in ("single_label_classification", "token_classification"):
        known = labels != IGNORE
        if not known.any():
            return {}
        counts = np.bincount(labels[known].astype(int), minlength=len(task.names))
        scores = np.broadcast_to(np.eye(len(counts))[counts.argmax()], (int(known.sum()), len(counts)))
        labels = labels[known]
    else:
        table = labels.reshape(len(labels), -1).astype(np.float64)
        known = ~np.isnan(table)
        if task.kind == "multi_label_classification":  # a number may be -100
            known &= table != IGNORE
        means = np.where(known, table, 0).sum(axis=0) / np.maximum(known.sum(axis=0), 1)
        if not known.any():
            return {}
        constant = means if task.kind == "regression" else np.where(means >= 0.5, 1.0, -1.0)
        scores = np.broadcast_to(constant, table.shape)
    metrics = compute_metrics_for(task)(EvalPrediction(predictions=scores, label_ids=labels))
    return {_MAJORITY[task.kind]: {name: value for name, value in metrics.items() if name != "majority_accuracy"}}


def reason_against_probe(dataset: Mapping[str, Any], task: Task, recipe: Recipe, args: TrainingArguments) -> str:
    """Return why a run has no linear probe beside its model; empty if nothing speaks against it.

    Args:
        dataset: the splits.
        task: the task.
        recipe: the training method.
        args: the options of training.
    """
    if task.kind not in METRICS:
        return f"there is no probe for {task.describe()}"
    if "test" not in dataset:
        return "there is no test split"
    if streams := [name for name, split in dataset.items() if not hasattr(split, "__len__")]:
        return f"the splits {', '.join(streams)} are streams"
    if args.world_size > 1:
        return f"{args.world_size} ranks train"
    if recipe.trains == "head" and (task.kind == "token_classification" or recipe.pooling == "mean"):
        return "the recipe trains only a head, on the frozen states that the probe reads"
    return ""


def probe_frozen(
    model: nn.Module,
    dataset: Mapping[str, Dataset],
    task: Task,
    *,
    recipe: Recipe,
    args: TrainingArguments,
    seed: int = 0,
    states: CachedTraining | None = None,
) -> FrozenProbe | None:
    """Fit a linear probe on the frozen encoder, and measure it on the test split of a run of `finetune`.

    With a validation split, it reads the layer that is best there, and otherwise the one nearest to the middle. With
    cached states of all tokens, it reads the cached layer or one above it, so that no state is computed twice. Nothing
    here draws from the random numbers of torch, and the model stays as it is.

    Args:
        model: the model before it gets adapters; with `states`, the rest.
        dataset: the tokenised splits.
        task: the task.
        recipe: the training method.
        args: device and precision of the run.
        seed: seed of the draw of examples, if there are too many.
        states: the cached states of the recipe.

    Returns:
        The probe; None, with one line of log that says why, if it makes no sense in this run or cannot be fitted.
    """
    reason = reason_against_probe(dataset, task, recipe, args)
    half = None if args.deepspeed else half_dtype(args)
    found = None
    if not reason:
        parts = [model] if states is None else [model, states.trunk]
        try:
            with (
                _on_device(parts, args.device),
                torch.autocast(args.device.type, half, enabled=half is not None),
            ):
                found = _fit(_reader(model, states), dataset, task, seed, states)
        except (EsmEfficientError, torch.OutOfMemoryError) as error:  # the run itself can do without the probe
            reason = str(error)
    if found is None:
        logger.info("no linear probe beside the model: %s", reason)
    return found


def _reader(model: nn.Module, states: CachedTraining | None) -> LayerReader:
    """Return what reads the states of the frozen layers."""
    if states is None:
        return LayerReader(model)
    if states.pooling != "tokens":  # the trunk has all layers, and its states are pooled
        return LayerReader(states.trunk.esm)
    return LayerReader(model, trunk=states.trunk, collator=states.collator)


def _fit(
    reader: LayerReader, dataset: Mapping[str, Dataset], task: Task, seed: int, states: CachedTraining | None
) -> FrozenProbe:
    started = time.perf_counter()
    middle = min(reader.numbers, key=lambda number: abs(number - reader.layers / 2))
    picked = "validation" in dataset
    kept = reader.numbers if picked else (middle,)
    most = _STATES_BYTES // (4 * len(kept) * reader.encoder.config.hidden_size)
    fitted_on = dict(dataset) if states is None else {**dataset, **states.splits}

    def read(name: str) -> Examples:
        of_residues = task.kind == "token_classification"
        return read_examples(
            reader,
            fitted_on[name],
            task,
            name=name,
            token_budget=_TOKEN_BUDGET,
            most=min(most, _MOST_RESIDUES) if of_residues else most,
            seed=seed,
            layers=kept,
        )

    train, thresholds, place = read("train"), None, 0
    if picked:
        best, thresholds = _pick(task, train, read("validation"), default=kept.index(middle))
        place, picked = (kept.index(middle), False) if best is None else (best, True)
    predict = fit_probe(task, train.states[place, 0], train.labels, weights=train.weights)
    prediction = _predict(reader, dataset["test"], task, kept[place], predict)
    compute = compute_metrics_for(task, thresholds=thresholds)
    draws = _of_the_probe(draws_of(prediction, compute))
    return FrozenProbe(
        layer=kept[place],
        layers=reader.layers,
        reading="residues" if task.kind == "token_classification" else "mean",
        picked=picked,
        examples=len(train.labels),
        metrics=_of_the_probe(compute(prediction)),
        seconds=time.perf_counter() - started,
        intervals=ends_of(draws),
        draws=draws,
    )


def _of_the_probe(values: Mapping[str, Value]) -> dict[str, Value]:
    """Return values by metric without the metric of another baseline."""
    return {name: value for name, value in values.items() if name != "majority_accuracy"}


def _pick(task: Task, train: Examples, validation: Examples, *, default: int) -> tuple[int | None, np.ndarray | None]:
    """Return the place of the best layer on validation, and the thresholds of several labels there.

    The place is None if validation tells no layer from another, as with examples of one class; the thresholds are then
    those at the place `default`.
    """
    compute, metric = compute_metrics_for(task), METRICS[task.kind][0]
    logits = [found for found in fit_probes(task, train, validation, ("",)).values()]
    scores = [compute(EvalPrediction(predictions=z, label_ids=validation.labels))[metric] for z in logits]
    finite = np.asarray(scores)[np.isfinite(scores)]
    is_flat = len(scores) > 1 and (not len(finite) or np.ptp(finite) == 0)
    best = None if is_flat or not len(finite) else int(np.nanargmax(scores))
    if task.kind != "multi_label_classification":
        return best, None
    chosen = default if best is None else best
    with without_warnings():  # those of the model say the same of the labels
        return best, tune_thresholds(validation.labels, logits[chosen], task.names)


def _predict(reader: LayerReader, test: Dataset, task: Task, layer: int, predict: Fitted) -> EvalPrediction:
    """Return what a probe computes for the test split, and the labels, in the shapes that a Trainer gives."""
    if task.kind != "token_classification":
        examples = read_examples(reader, test, task, name="test", token_budget=_TOKEN_BUDGET, layers=(layer,))
        return EvalPrediction(predictions=predict(examples.states[0, 0]), label_ids=examples.labels)
    cells = [np.asarray(row) for row in test["labels"]]
    labels = np.full((len(cells), max(map(len, cells))), IGNORE)
    logits = np.zeros((*labels.shape, len(task.names)), dtype=np.float32)
    for row, cell in enumerate(cells):
        labels[row, : len(cell)] = cell
    for rows, states in reader.tokens(test, layer, token_budget=_TOKEN_BUDGET, name="test"):
        lengths = [len(cells[row]) for row in rows]
        for row, found in zip(rows, np.split(states, np.cumsum(lengths)[:-1]), strict=True):
            known = np.flatnonzero(cells[row] != IGNORE)
            if len(known):
                logits[row, known] = predict(found[known])
    return EvalPrediction(predictions=logits, label_ids=labels)


@contextmanager
def _on_device(modules: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Have modules on a device, and then where they were: adapters are made, and drawn, where a model is."""
    before = {module: next(module.parameters()).device for module in modules}
    moved = {module: place for module, place in before.items() if place != device}
    for module in moved:
        module.to(device)
    try:
        yield
    finally:
        for module, place in moved.items():
            module.to(place)
