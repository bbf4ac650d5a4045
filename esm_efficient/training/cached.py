"""Train on the cached states of the frozen layers, for `finetune`."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from esm_efficient.adapters.registry import encoder_layers
from esm_efficient.encoder.origins import reads_first_token
from esm_efficient.heads import PooledClassificationHead, PooledEsmForSequenceClassification, pooling_of_model
from esm_efficient.recipes import Recipe
from esm_efficient.tasks import SPECIAL_TOKENS
from esm_efficient.training.arguments import half_dtype
from esm_efficient.trunk.cache import cache_states, measure_ids
from esm_efficient.trunk.split import Trunk, join_model, split_model
from esm_efficient.trunk.states import Pooling, StateDtype, StatesCollator

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, Trainer, TrainingArguments

    from esm_efficient.training.trainer import WeightedTrainer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CachedTraining:
    """What a Trainer needs to train on cached states, and what makes an ordinary model of the result.

    Attributes:
        rest: the model without its lowest layers; it takes states.
        splits: the tokenised splits with the states.
        collator: makes batches of states.
        pooling: as in `cache_states`.
        trunk: the lowest layers, on the CPU.
        residues_per_epoch: residues of the training split.
        seconds: time to compute the states, or to check those that existed.
    """

    rest: PreTrainedModel
    splits: Mapping[str, Dataset]
    collator: StatesCollator
    pooling: Pooling
    trunk: Trunk
    residues_per_epoch: int
    seconds: float

    def restore(self, trainer: Trainer) -> None:
        """Put the lowest layers back into a Trainer's model, which then takes sequences as every model does."""
        join_model(trainer.accelerator.unwrap_model(trainer.model), self.trunk)

    def residues_trained(self, trainer: WeightedTrainer) -> int:
        """Return the residues of the steps that a trainer ran, without those before the checkpoint that it resumed."""
        steps = trainer.state.global_step
        ran = (steps - trainer.steps_resumed) / max(steps, 1)
        return round(self.residues_per_epoch * (trainer.state.epoch or 0) * ran)


def cache_for_training(
    model: PreTrainedModel,
    splits: Mapping[str, Dataset],
    recipe: Recipe,
    folder: Path,
    *,
    args: TrainingArguments,
    collator: Any,
) -> CachedTraining:
    """Split a model below the lowest layer that a recipe trains, and compute the states that enter this layer.

    Args:
        model: the model with its head, without adapters.
        splits: the tokenised splits.
        recipe: the recipe.
        folder: folder for the states.
        args: arguments of the Trainer: device and precision.
        collator: the collator for batches of tokens.

    Raises:
        ConfigurationError: the model cannot be split.
        DataError: as `cache_states`.
    """
    from datasets import DatasetDict

    count = len(encoder_layers(model))
    trained = recipe.trained_layers(count)
    top = count - min(trained) if trained else 0
    pooling: Pooling = "tokens" if top else _pooling_of_head(model)
    half = half_dtype(args)
    dtype: StateDtype = "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"
    trunk, rest = split_model(model, top)
    if half is not None:
        for parameter in trunk.parameters():  # not the rotary frequencies, which are buffers
            parameter.data = parameter.data.to(half)
    started = time.perf_counter()
    trunk.to(args.device)
    with torch.autocast(args.device.type, half, enabled=half is not None):
        cached = cache_states(DatasetDict(splits), trunk, folder, dtype=dtype, pooling=pooling)
    trunk.to("cpu")
    seconds = time.perf_counter() - started
    logger.info("the states below the top %d layers are in %s (%.1f s)", top, folder, seconds)
    tokens, _ = measure_ids(splits["train"])
    return CachedTraining(
        rest=rest,
        splits=cached,
        collator=StatesCollator(collator, trunk),
        pooling=pooling,
        trunk=trunk,
        residues_per_epoch=int(tokens.sum() - SPECIAL_TOKENS * len(tokens)),
        seconds=seconds,
    )


def _pooling_of_head(model: PreTrainedModel) -> Pooling:
    """Return the states that the head of a model reads."""
    if reads_first_token(model):
        return "first"
    is_own = type(model) is PooledEsmForSequenceClassification and type(model.classifier) is PooledClassificationHead
    return "mean" if is_own and pooling_of_model(model) == "mean" else "tokens"
