"""Train a regressor on standardised numbers, while its saved weights predict in the user's unit.

AdamW moves every weight by about the learning rate. A head that must reach 50, or whose errors count a hundredfold, is
therefore not learnt in a usual run. During training the labels have mean 0 and standard deviation 1. The head's last
layer is linear: multiplied by the standard deviation and shifted by the mean, it predicts in the user's unit.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from esm_efficient.adapters.registry import find_architecture, is_in_head
from esm_efficient.errors import ConfigurationError, DataError
from esm_efficient.tasks import SPECIAL_TOKENS, Task
from esm_efficient.training.losses import LARGEST_NUMBER
from esm_efficient.training.weights import dataset_labels
from esm_efficient.trunk.split import SkippedEmbeddings

if TYPE_CHECKING:
    from transformers import EvalPrediction

logger = logging.getLogger(__name__)

CONFIG_NAME = "label_scale"
"""The entry of a regressor's config with the mean and the standard deviation of the labels that it was trained on."""

_STREAM_ROWS = 10_000
_ROUNDED = 50
"""The standard deviation in steps of float32 below which a warning says that labels are rounded."""

_MOST_SPREAD = 100
"""The standard deviation in interquartile ranges from which a warning says that few labels are far from the others."""


@dataclass(frozen=True)
class LabelScale:
    """Mean and standard deviation of the numbers to regress.

    Attributes:
        mean: float64 of shape (numbers,).
        std: float64 of shape (numbers,), above 0.
    """

    mean: np.ndarray
    std: np.ndarray

    def standardize(self, labels: Tensor) -> Tensor:
        """Return standardised labels, float32 of the same shape: (batch,) for one number, else (batch, numbers)."""
        mean, std = torch.from_numpy(self.mean), torch.from_numpy(self.std)
        values = labels.double().reshape(len(labels), -1)
        return ((values - mean) / std).reshape(labels.shape).float()

    def restore(self, values: np.ndarray) -> np.ndarray:
        """Return standardised values, float of shape (examples, numbers) or (examples,), in the user's unit."""
        table = np.asarray(values, dtype=np.float64)
        return (table.reshape(len(table), -1) * self.std + self.mean).reshape(table.shape)


def measure_scale(dataset: Any, names: Sequence[str]) -> LabelScale:
    """Return the scale of a training set's numbers; of a stream, that of its first 10,000 rows.

    Args:
        dataset: a tokenised split with a column ``labels``.
        names: names of the numbers in their order.

    Raises:
        DataError: a number is infinite or above `LARGEST_NUMBER`, none is known, or one is so large that the others
            cannot be told apart.
    """
    if hasattr(dataset, "__len__"):
        labels = dataset_labels(dataset)
    else:
        labels = np.array([row["labels"] for row in itertools.islice(dataset, _STREAM_ROWS)])
    columns = np.asarray(labels, dtype=np.float64).reshape(-1, len(names)).T
    scales = [_scale_of(column, name) for column, name in zip(columns, names, strict=True)]
    return LabelScale(*(np.array(part) for part in zip(*scales, strict=True)))


def _scale_of(column: np.ndarray, name: str) -> tuple[float, float]:
    if infinite := np.flatnonzero(np.isinf(column)).tolist():
        raise DataError(f"{name}: {len(infinite)} labels are infinite, the first in row {infinite[0]}")
    known = column[~np.isnan(column)]
    if not len(known):
        raise DataError(f"{name}: no label of the training set is known: there is nothing to learn")
    mean, std = float(known.mean()), float(known.std()) or 1.0
    far = int(np.nanargmax(np.abs(column - np.median(known))))
    standardized = ((known - mean) / std).astype(np.float32)
    if len(np.unique(standardized)) < len(np.unique(known)) / 2:
        raise DataError(
            f"{name}: the label {column[far]:g} in row {far} is so far from the others that they cannot be told "
            "apart beside it: correct or remove it, or regress the logarithm"
        )
    if (largest := float(np.abs(known).max())) > LARGEST_NUMBER:
        raise DataError(f"{name}: a label is {largest:g}: expected at most {LARGEST_NUMBER:g}. Give a larger unit")
    if (step := float(np.spacing(np.float32(abs(mean))))) > std / _ROUNDED:
        logger.warning(
            "%s: the labels are float32, which around %g has steps of %g, and their standard deviation is %g. Subtract "
            "a constant from them",
            *(name, mean, step, std),
        )
    spread = float(np.subtract(*np.percentile(known, (75, 25))))
    if 0 < spread < std / _MOST_SPREAD:
        logger.warning(
            "%s: the label %g in row %d is far from the others (standard deviation %g, interquartile range %g): few "
            "labels decide the loss. Correct it, or regress the logarithm",
            *(name, column[far], far, std, spread),
        )
    return mean, std


@dataclass(frozen=True)
class StandardizingCollator:
    """A data collator that standardises the labels of another one's batches."""

    collator: Callable[[list[dict[str, Any]]], Mapping[str, Any]]
    scale: LabelScale

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Return a batch with standardised labels."""
        batch = dict(self.collator(rows))
        return batch | {"labels": self.scale.standardize(batch["labels"])}


@dataclass(frozen=True)
class RestoringMetrics:
    """A ``compute_metrics`` function that computes another one's metrics in the user's unit."""

    compute: Callable[[EvalPrediction], dict[str, float]]
    scale: LabelScale

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        """Return the metrics of standardised predictions and labels."""
        outputs = prediction.predictions
        logits = outputs[0] if isinstance(outputs, tuple) else outputs
        restored = self.scale.restore(logits), self.scale.restore(np.asarray(prediction.label_ids))
        return self.compute(type(prediction)(predictions=restored[0], label_ids=restored[1]))


def find_output_layer(model: Any, tokenizer: Any) -> nn.Linear | None:
    """Return the linear layer with a bias whose output is a model's logits; None if there is none.

    Args:
        model: a model of sequences, which is called once.
        tokenizer: its tokenizer.
    """
    outputs: list[tuple[nn.Linear, Tensor]] = []

    def note(module: nn.Module, _: Any, output: Tensor) -> None:
        if isinstance(module, nn.Linear):
            outputs.append((module, output))

    architecture = find_architecture(model)  # the lean encoder does not run while there are hooks in the encoder
    heads = [module for name, module in model.named_modules() if is_in_head(architecture, name)]
    layers = [module for module in heads if isinstance(module, nn.Linear) and module.bias is not None]
    hooks = [layer.register_forward_hook(note) for layer in layers]
    device, was_training = next(model.parameters()).device, model.training
    # Frozen weights may be in half precision beside a head in float32, as they train under autocast.
    half = next((p.dtype for p in model.parameters() if p.dtype in (torch.bfloat16, torch.float16)), None)
    inputs: dict[str, Tensor] = dict(tokenizer("MKTV", return_tensors="pt"))
    if any(isinstance(module, SkippedEmbeddings) for module in model.modules()):  # it takes cached states
        width = model.config.hidden_size
        states = torch.linspace(-1, 1, SPECIAL_TOKENS * width + width).view(1, -1, width)
        inputs = {"inputs_embeds": states if half is None else states.to(half)}
    try:
        with torch.no_grad(), torch.autocast(device.type, half, enabled=half is not None):
            logits = model.eval()(**{name: value.to(device) for name, value in inputs.items()}).logits
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    same = [layer for layer, output in outputs if torch.equal(output.reshape(-1), logits.reshape(-1))]
    return same[-1] if same else None


def standardize_layer(layer: nn.Linear, scale: LabelScale) -> None:
    """Change a layer that predicts in the user's unit into one that predicts standardised numbers."""
    _write(layer, *_standardized(layer.weight, layer.bias, scale))


@contextmanager
def standardized_training(model: Any, layer: nn.Linear, scale: LabelScale) -> Iterator[None]:
    """Train a layer on standardised numbers within a ``with`` block; its state dict is always in the user's unit.

    Checkpoints therefore predict in the user's unit too. The layer's weights are float64 in them, so that a run that
    resumes has the same float32 weights as before. At the end, the layer itself predicts in the user's unit, and the
    scale is in the model's config.

    Args:
        model: the model, whose config gets the scale.
        layer: its output layer.
        scale: the scale of the labels.
    """

    def save(module: Any, state: dict[str, Any], prefix: str, _: Any) -> None:
        pair = (state[prefix + "weight"], state[prefix + "bias"])
        state[prefix + "weight"], state[prefix + "bias"] = _restored(*pair, scale)

    def load(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
        names = prefix + "weight", prefix + "bias"
        if set(names) <= state.keys():
            pair = _standardized(state[names[0]], state[names[1]], scale)
            state.update((name, value.to(module.weight.dtype)) for name, value in zip(names, pair, strict=True))

    hooks = [layer.register_state_dict_post_hook(save), layer.register_load_state_dict_pre_hook(load)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        _write(layer, *_restored(layer.weight, layer.bias, scale))
        setattr(model.config, CONFIG_NAME, {"mean": scale.mean.tolist(), "std": scale.std.tolist()})


def start_scale(model: Any, tokenizer: Any, train: Any, task: Task, *, has_unit: bool) -> LabelScale | None:
    """Return the scale of the numbers to regress, and change a head that predicts in their unit to it.

    Args:
        model: the model, before adapters are added.
        tokenizer: its tokenizer.
        train: the tokenised training split.
        task: the task.
        has_unit: whether the head predicts in the unit of numbers that it was trained on.

    Returns:
        None for another task, or with a warning if the head cannot be scaled.

    Raises:
        DataError: as `measure_scale`.
    """
    if task.kind != "regression":
        return None
    layer = find_output_layer(model, tokenizer)
    if layer is None:
        logger.warning(
            "the head of %s does not end in a linear layer with a bias: the labels are not standardised. Give labels "
            "with a mean of about 0 and a standard deviation of about 1",
            type(model).__name__,
        )
        return None
    scale = measure_scale(train, task.names)
    if has_unit:
        standardize_layer(layer, scale)
    return scale


@contextmanager
def standardized(trainer: Any, scale: LabelScale | None) -> Iterator[None]:
    """Train on standardised labels, with metrics in the user's unit, within a ``with`` block.

    Args:
        trainer: the Trainer, with a tokenizer as its ``processing_class``.
        scale: the scale of the labels; None to change nothing.

    Raises:
        ConfigurationError: the last layer of the head does not train as a whole.
    """
    if scale is None:
        yield
        return
    collator, metrics = trainer.data_collator, trainer.compute_metrics
    model = trainer.model
    layer = find_output_layer(model, trainer.processing_class)
    if layer is None or not layer.weight.requires_grad:
        raise ConfigurationError(
            "the last layer of the head is adapted or frozen: expected it to train as a whole, so that it can predict "
            "in the unit of the labels. Leave it out of the adapters' targets"
        )
    trainer.data_collator = StandardizingCollator(collator, scale)
    trainer.compute_metrics = RestoringMetrics(metrics, scale)
    try:
        with standardized_training(model, layer, scale):
            yield
    finally:
        trainer.data_collator, trainer.compute_metrics = collator, metrics


def _restored(weight: Tensor, bias: Tensor, scale: LabelScale) -> tuple[Tensor, Tensor]:
    weight, bias, mean, std = _in_float64(weight, bias, scale)
    return weight * std[:, None], bias * std + mean


def _standardized(weight: Tensor, bias: Tensor, scale: LabelScale) -> tuple[Tensor, Tensor]:
    weight, bias, mean, std = _in_float64(weight, bias, scale)
    return weight / std[:, None], (bias - mean) / std


def _in_float64(weight: Tensor, bias: Tensor, scale: LabelScale) -> tuple[Tensor, ...]:
    if hasattr(weight, "device_mesh"):
        raise ConfigurationError(
            "a regressor's head is divided among the ranks (FSDP): its labels cannot be standardised. Train on one "
            "device or with DDP, or use WeightedTrainer with labels of mean 0 and standard deviation 1"
        )
    parts = weight.detach(), bias.detach(), torch.from_numpy(scale.mean), torch.from_numpy(scale.std)
    # An Apple GPU has no float64.
    device = "cpu" if weight.device.type == "mps" else weight.device
    return tuple(part.to(device).double() for part in parts)


@torch.no_grad()
def _write(layer: nn.Linear, weight: Tensor, bias: Tensor) -> None:
    layer.weight.copy_(weight)
    layer.bias.copy_(bias)
