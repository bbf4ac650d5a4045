"""sweep_layers(): score the states of every layer with a linear probe, to choose how many layers to keep."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer, EvalPrediction, PreTrainedModel

from esm_efficient.adapters.registry import check_encoder_weights
from esm_efficient.data.tokenizing import tokenize_dataset
from esm_efficient.errors import ConfigurationError, DataError
from esm_efficient.inference.loading import find_folder
from esm_efficient.published import hub_name, refuse_adapter
from esm_efficient.reporting import count_of, finite_values, format_number, format_table
from esm_efficient.saving import load_pretrained
from esm_efficient.tasks import Task
from esm_efficient.training.baselines import majority_metrics
from esm_efficient.training.given import splits_from, task_of_splits
from esm_efficient.training.intervals import without_warnings
from esm_efficient.training.layer_probes import METRICS, Examples, fit_probes, read_examples
from esm_efficient.training.metrics import compute_metrics_for
from esm_efficient.trunk.layer_states import LayerReader, Reading

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from transformers import PreTrainedTokenizerBase

_RESAMPLES = 100
_NAMES = {"first": "first token", "mean": "mean", "residues": "residues"}


@dataclass(frozen=True)
class LayerScore:
    """The metrics of one probe.

    Attributes:
        layer: number of layers below the states; 0 for the embeddings.
        reading: what the probe reads: ``"first"`` token, ``"mean"`` over residues, or ``"residues"`` one by one.
        metrics: all metrics of `compute_metrics_for`.
    """

    layer: int
    reading: str
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class LayerSweep:
    """The scores of all layers, and the number of layers that is enough for a probe.

    Attributes:
        task: the task.
        scores: one entry per layer and reading.
        metric: the metric that decides.
        evaluated_on: the split of the scores: ``"validation"``, or ``"test"`` if there is no validation split.
        examples: proteins or residues that the probes are fitted on, and that they are scored on.
        reading: the reading of the probe with the best score.
        best: the layer with the best score.
        layer: the layer that is enough for a probe: the lowest one, from 1, whose score in this reading is at most one
            standard error below the best.
        standard_error: standard error of the best score, by bootstrap over proteins.
        seconds: time to compute the states, and time to fit and score the probes.
        majority: metrics of the best constant prediction, such as the most frequent class; empty if they are unknown.
    """

    task: Task
    scores: tuple[LayerScore, ...]
    metric: str
    evaluated_on: str
    examples: tuple[int, int]
    reading: str
    best: int
    layer: int
    standard_error: float
    seconds: tuple[float, float]
    majority: Mapping[str, float] = field(default_factory=dict)

    @property
    def beats_chance(self) -> bool:
        """Whether the best score is more than one standard error above that of the best constant prediction."""
        return self._is_above(self.majority.get(self.metric, 0.0))

    @property
    def needs_layers(self) -> bool:
        """Whether the best score is also more than one standard error above that of the embeddings.

        Without this, the probes read no more from the layers than from the amino acids, and do not say how many layers
        a fine-tuned model needs.
        """
        return self.beats_chance and self._is_above(self.score(0))

    def _is_above(self, other: float) -> bool:
        other, error = np.nan_to_num([other, self.standard_error])
        return bool(self.score(self.best) - error > other)

    def score(self, layer: int, reading: str | None = None, metric: str | None = None) -> float:
        """Return a metric of a layer, by default the one that decides, in the reading of the best score."""
        wanted = (layer, self.reading if reading is None else reading)
        metrics = next(score.metrics for score in self.scores if (score.layer, score.reading) == wanted)
        return metrics[self.metric if metric is None else metric]

    @property
    def layers(self) -> int:
        """Layers of the encoder."""
        return max(score.layer for score in self.scores)

    @property
    def readings(self) -> tuple[str, ...]:
        """What the probes read."""
        return tuple(dict.fromkeys(score.reading for score in self.scores))

    def to_dict(self) -> dict[str, Any]:
        """Return everything, ready for JSON; an undefined metric (NaN) becomes None."""
        scores = [
            {"layer": score.layer, "reading": score.reading} | finite_values(score.metrics) for score in self.scores
        ]
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        fields |= {"majority": finite_values(self.majority)}
        fields |= {"beats_chance": self.beats_chance, "needs_layers": self.needs_layers}
        lists = {"examples": list(self.examples), "seconds": list(self.seconds), "scores": scores}
        return fields | lists | {"task": {"kind": self.task.kind, "names": list(self.task.names)}}

    def to_svg(self) -> str:
        """Return a plot of the scores by layer, as SVG.

        Raises:
            ConfigurationError: matplotlib is not installed.
        """
        from esm_efficient.reporting.plots import layers_plot

        lines = {
            _NAMES[reading]: [self.score(layer, reading) for layer in range(self.layers + 1)]
            for reading in self.readings
        }
        best = self.score(self.best)
        return layers_plot(
            lines,
            metric=f"{self.metric} of a linear probe on {self.evaluated_on}",
            enough=self.layer if self.needs_layers else None,
            band=(best - self.standard_error, best),
        )

    def __str__(self) -> str:
        shown = METRICS[self.task.kind]
        header = ["layer", *(f"{metric}, {reading}" for reading in self.readings for metric in shown), ""]
        rows = []
        for layer in range(self.layers + 1):
            note = {0: "embeddings", self.layers: "after the last norm"}.get(layer, "")
            marks = (*([note] if note else []), *(["enough"] if layer == self.layer and self.needs_layers else []))
            numbers = [self.score(layer, reading, metric) for reading in self.readings for metric in shown]
            rows.append([layer, *(format_number(number, "{:.3f}") for number in numbers), ", ".join(marks)])
        if self.majority:
            constant = [self.majority.get(metric, math.nan) for _ in self.readings for metric in shown]
            rows.append(["-", *(format_number(number, "{:.3f}") for number in constant), "best constant"])
        unit = "residues" if self.task.kind == "token_classification" else "proteins"
        return (
            f"Linear probes on the states of each layer, fitted on {self.examples[0]:,} {unit} of train, scored on "
            f"{self.examples[1]:,} of {self.evaluated_on}; {self.task.describe()}{self._readings_in_words()}\n\n"
            f"{format_table(rows, header)}\n\n{self.advice(unit)}"
        )

    def _readings_in_words(self) -> str:
        words = {"first": "first: a probe on the first token", "mean": "mean: on the mean over residues"}
        named = [words[reading] for reading in self.readings if reading in words]
        return f". {'; '.join(named)}" if named else ""

    def advice(self, unit: str) -> str:
        """Return how many layers to keep, in words; `unit` is what the examples are."""
        where = f" with the {_NAMES[self.reading]}" if len(self.readings) > 1 else ""
        scored = f"Layer {self.best} has the best {self.metric} ({self.score(self.best):.3f}{where}, standard error "
        scored += f"{self.standard_error:.3f})"
        if not self.beats_chance:
            return f"No layer is better than chance on these {self.examples[1]:,} {unit}: no advice. {scored}."
        if not self.needs_layers:
            return (
                f"No layer is better than the embeddings (layer 0: {self.score(0):.3f}) by more than one standard "
                f"error: no advice on the number of layers. {scored}. Fine-tuning changes the layers and may gain."
            )
        if self.layer == self.layers:
            return (
                f"Keep all {count_of(self.layers, 'layer')}. {scored}, and no other is within one standard error of it."
            )
        return (
            f"{scored}; layer {self.layer} is the lowest, from 1, within one standard error of it. To end the model "
            f"there (--keep-layers {self.layer}, or keep_layers={self.layer} in Python) saves memory and time, and may "
            f"cost accuracy: fine-tuning may rank layers in another order. By default, finetune keeps all layers."
        )


def sweep_layers(
    model: str | Path | PreTrainedModel,
    dataset: Any,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    task: Task | None = None,
    data_options: Mapping[str, Any] | None = None,
    readings: Sequence[Reading] = ("first", "mean"),
    max_tokens: int = 1024,
    token_budget: int = 8192,
    max_labelled_residues: int = 20_000,
    seed: int = 0,
    device: str | torch.device | None = None,
) -> LayerSweep:
    """Score the states of each layer with a linear probe, in one pass over the data.

    For many tasks a middle layer has better features than the last one (Li et al. 2024, "Feature reuse and scaling:
    understanding transfer learning with protein language models"). The probe is fitted on ``train`` and scored on
    ``validation``. Its features are standardised. It is a logistic regression with balanced weights for classes, one
    per label for several labels, and a ridge regression for numbers (`esm_efficient.training.probes`).

    The states are those that transformers names ``hidden_states``: layer 0 is the embeddings, and the states of the
    last layer are taken after the last layer norm. They stay in memory: 4 bytes x (layers + 1) x width per protein and
    reading, which is 0.17 MB for ESM-2 650M.

    The lowest layer, from 1, whose score is at most one standard error below the best is enough for a probe (the
    one-standard-error rule of Breiman et al. 1984, "Classification and regression trees"). It is the result of a probe:
    fine-tuning may rank the layers in another order.

    Args:
        model: a folder, a Hub name or a size (``"650M"``) of an ESM-2 model, or a loaded model with any head and
            without adapters. It is not changed.
        dataset: splits ``train`` and ``validation`` (or ``test``), or other data, as for `finetune`.
        tokenizer: required with a loaded model, unless the splits are tokenised.
        task: as `finetune`.
        data_options: as `finetune`.
        readings: what probes read of a sequence, of ``"first"`` for the first token and ``"mean"`` for the mean over
            residues, without special tokens.
        max_tokens: maximal number of tokens of a sequence, special tokens included.
        token_budget: the most tokens per batch.
        max_labelled_residues: with labels of residues, the number of labelled residues per split that are drawn at
            random.
        seed: seed of the draws of residues and of the bootstrap.
        device: the device of a model that is loaded here; None for the accelerator if there is one.

    Returns:
        The scores, and the layer that is enough for a probe.

    Raises:
        DataError: a split is missing, empty or streamed, the labels are not those of a task, or they tell no layer from
            another.
        ConfigurationError: the model has adapters or an encoder that cannot be split, or an option is unknown.

    Example:
        >>> from esm_efficient import load_deeploc, sweep_layers, truncate
        >>> sweep = sweep_layers("8M", load_deeploc())  # doctest: +SKIP
        >>> smaller = truncate(model, sweep.layer)  # doctest: +SKIP
    """
    if not readings or isinstance(readings, str) or set(readings) - set(get_args(Reading)):
        raise ConfigurationError(f"readings={list(readings)}: expected a list of {' and '.join(get_args(Reading))}")
    dataset = splits_from(dataset, **(data_options or {}))
    evaluated_on = _evaluation_split(dataset)
    task = task or task_of_splits(dataset["train"].features, (data_options or {}).get("label"))
    loaded, tokenizer = _load(model, tokenizer, device)
    reader = LayerReader(loaded)
    splits = _tokenised({name: dataset[name] for name in ("train", evaluated_on)}, tokenizer, max_tokens)
    started = time.perf_counter()
    by_residue = task.kind == "token_classification"
    names: tuple[str, ...] = ("residues",) if by_residue else tuple(dict.fromkeys(readings))
    train, other = (
        read_examples(
            reader,
            split,
            task,
            name=name,
            readings=tuple(dict.fromkeys(readings)),
            token_budget=token_budget,
            most=max_labelled_residues if by_residue else None,
            seed=seed,
        )
        for name, split in splits.items()
    )
    embedded = time.perf_counter()
    logits = fit_probes(task, train, other, names)
    metrics = compute_metrics_for(task)
    scores = tuple(
        LayerScore(layer, reading, metrics(EvalPrediction(predictions=predictions, label_ids=other.labels)))
        for (layer, reading), predictions in logits.items()
    )
    metric = METRICS[task.kind][0]
    _refuse_equal_scores([score.metrics[metric] for score in scores], metric, evaluated_on)
    best = max(scores, key=lambda score: np.nan_to_num(score.metrics[metric], nan=-np.inf))
    error = _standard_error(task, metric, logits[best.layer, best.reading], other, seed)
    least = best.metrics[metric] - error
    candidates = [score.layer for score in scores if score.reading == best.reading and score.layer >= 1]
    by_layer = {score.layer: score.metrics[metric] for score in scores if score.reading == best.reading}
    return LayerSweep(
        task=task,
        scores=scores,
        metric=metric,
        evaluated_on=evaluated_on,
        examples=(len(train.labels), len(other.labels)),
        reading=best.reading,
        best=best.layer,
        layer=min(layer for layer in candidates if layer == max(1, best.layer) or by_layer[layer] >= least),
        standard_error=error,
        majority=next(iter(majority_metrics(task, other.labels).values()), {}),
        seconds=(embedded - started, time.perf_counter() - embedded),
    )


def _evaluation_split(dataset: DatasetDict) -> str:
    names = list(dataset)
    found = next((name for name in ("validation", "test") if name in names), None)
    if "train" not in names or found is None:
        raise DataError(
            f"the dataset has the splits {', '.join(map(str, names)) or 'none'}: expected train, and validation or test"
        )
    for name in ("train", found):
        if not hasattr(dataset[name], "__len__") or not len(dataset[name]):
            raise DataError(f"split {name!r} is a stream or has no row: expected a dataset with rows")
    return found


def _load(
    model: str | Path | PreTrainedModel, tokenizer: Any, device: str | torch.device | None
) -> tuple[PreTrainedModel, Any]:
    """Return a model and its tokenizer, which may be None for tokenised splits."""
    if isinstance(model, torch.nn.Module):
        return model, tokenizer
    refuse_adapter(str(model))
    folder = find_folder(hub_name(str(model)), None, None)
    refuse_adapter(str(folder))  # that of a name on the Hub
    loaded, missing, mismatched = load_pretrained(AutoModel, folder, dtype=torch.float32)
    check_encoder_weights(loaded, (*missing, *mismatched), str(model))
    if device is None:
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        device = accelerator or "cpu"
    return loaded.to(device), tokenizer or AutoTokenizer.from_pretrained(folder)


def _tokenised(splits: Mapping[str, Dataset], tokenizer: Any, max_tokens: int) -> Mapping[str, Dataset]:
    from datasets import DatasetDict

    if all("input_ids" in split.column_names for split in splits.values()):
        tokenised = splits
    elif tokenizer is None:
        raise ConfigurationError("model is a loaded model, which has no tokenizer: give tokenizer too")
    else:
        tokenised = tokenize_dataset(DatasetDict(splits), tokenizer, max_tokens=max_tokens)[0]
    if missing := [name for name, split in tokenised.items() if "labels" not in split.column_names]:
        raise DataError(f"the split(s) {', '.join(missing)} have no labels: expected a column label")
    return tokenised


def _refuse_equal_scores(scores: Sequence[float], metric: str, split: str) -> None:
    """Refuse scores that say nothing about the layers: none is defined, or all are the same and not the best one, 1.

    Raises:
        DataError: as above.
    """
    finite = [score for score in scores if np.isfinite(score)]
    if not finite or (len(set(finite)) == 1 and finite[0] < 1):
        problem = f"is {finite[0]:.3f}" if finite else "is undefined"
        raise DataError(
            f"the {metric} on {split} {problem} for every layer, so that no layer can be chosen. Expected labels that "
            f"differ, in train and in {split}: two classes, two numbers, or sequences with and without each label"
        )


def _standard_error(task: Task, metric: str, logits: np.ndarray, other: Examples, seed: int) -> float:
    """Return the standard deviation of a metric over bootstrap samples of the proteins."""
    compute, rng = compute_metrics_for(task), np.random.default_rng(seed)
    _, starts, counts = np.unique(other.proteins, return_index=True, return_counts=True)
    values = []
    with without_warnings():
        for _ in range(_RESAMPLES):
            drawn = rng.integers(0, len(starts), len(starts))
            rows = np.concatenate([np.arange(starts[protein], starts[protein] + counts[protein]) for protein in drawn])
            values.append(compute(EvalPrediction(predictions=logits[rows], label_ids=other.labels[rows]))[metric])
    return float(np.nanstd(values)) if np.isfinite(values).any() else float("nan")
