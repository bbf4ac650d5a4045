"""Fit linear probes on the states of layers: what `sweep_layers` and the baselines of `finetune` share."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets.utils import tqdm

from esm_efficient.data.schema import WEIGHT_COLUMN
from esm_efficient.errors import DataError
from esm_efficient.tasks import IGNORE, Task
from esm_efficient.training.probes import probe
from esm_efficient.trunk.layer_states import LayerReader, Reading

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

METRICS: Mapping[str, tuple[str, ...]] = {
    "single_label_classification": ("mcc", "accuracy", "auroc"),
    "multi_label_classification": ("auroc", "f1_macro", "f1_micro"),
    "token_classification": ("mcc", "accuracy", "auroc"),
    "regression": ("spearman", "rmse", "r2"),
}
"""The metrics of the table by kind of task; the first one decides the recommendation."""


@dataclass(frozen=True)
class Examples:
    """What probes are fitted on, or scored on.

    Attributes:
        states: float32 of shape (layers, readings, examples, width).
        labels: labels of the examples.
        proteins: the protein of each example.
        weights: weight of each example; None for 1.
    """

    states: np.ndarray
    labels: np.ndarray
    proteins: np.ndarray
    weights: np.ndarray | None


def read_examples(
    reader: LayerReader,
    split: Dataset,
    task: Task,
    *,
    name: str,
    readings: Sequence[Reading] = ("mean",),
    token_budget: int = 8192,
    most: int | None = None,
    seed: int = 0,
    layers: Sequence[int] | None = None,
) -> Examples:
    """Return the proteins of a split; with labels of residues, the residues with a known label.

    Args:
        reader: reads the states.
        split: the tokenised split, with labels.
        task: the task.
        name: name of the split.
        readings: what to read of a protein; with labels of residues, each residue is read.
        token_budget: the most tokens per batch.
        most: the most examples, which are drawn at random; None for all.
        seed: seed of the draw.
        layers: as `LayerReader.pool`.

    Raises:
        DataError: no residue of the split has a known label.
    """
    options: dict[str, Any] = {"token_budget": token_budget, "name": name, "layers": layers}
    if task.kind == "token_classification":
        return _residues(reader, split, most, seed, **options)
    split = split.select(_draw(np.arange(len(split)), most, seed, f"{name}: %d of %d proteins are drawn"))
    columns = split.select_columns(["labels", *([WEIGHT_COLUMN] if WEIGHT_COLUMN in split.column_names else [])])
    values = columns.with_format("numpy")[:]
    states = reader.pool(split, readings, **options)
    return Examples(states, np.asarray(values["labels"]), np.arange(len(split)), values.get(WEIGHT_COLUMN))


def _residues(
    reader: LayerReader, split: Dataset, most: int | None, seed: int, *, name: str, **options: Any
) -> Examples:
    """Return residues with a known label."""
    labels = [np.asarray(row) for row in split["labels"]]
    proteins = np.repeat(np.arange(len(labels)), [len(row) for row in labels])
    columns = np.concatenate([np.arange(len(row)) for row in labels])
    flat = np.concatenate(labels)
    known = np.flatnonzero(flat != IGNORE)
    if not len(known):
        raise DataError(f"no residue of split {name!r} has a known label")
    drawn = _draw(known, most, seed, f"{name}: %d of %d labelled residues are drawn")
    states = reader.select(split, proteins[drawn], columns[drawn], name=name, **options)
    weights = np.asarray(split[WEIGHT_COLUMN])[proteins[drawn]] if WEIGHT_COLUMN in split.column_names else None
    return Examples(states, flat[drawn], proteins[drawn], weights)


def _draw(numbers: np.ndarray, most: int | None, seed: int, note: str) -> np.ndarray:
    """Return at most so many of some numbers, in ascending order."""
    if most is None or len(numbers) <= most:
        return numbers
    logger.info(note, most, len(numbers))
    return np.sort(np.random.default_rng(seed).choice(numbers, most, replace=False))


def fit_probes(
    task: Task, train: Examples, other: Examples, readings: Sequence[str]
) -> dict[tuple[int, str], np.ndarray]:
    """Fit a probe per layer and reading, and return what each computes for the other examples."""
    places = [(layer, place) for layer in range(len(train.states)) for place in range(len(readings))]
    return {
        (layer, readings[place]): probe(
            task, train.states[layer, place], train.labels, other.states[layer, place], weights=train.weights
        )
        for layer, place in tqdm(places, desc="probes", unit="probe")
    }
