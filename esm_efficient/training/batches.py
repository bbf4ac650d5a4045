"""Training batches of a `WeightedTrainer`: those of a token budget, and examples that fill the last batch."""

from __future__ import annotations

import sys
from collections.abc import Sized
from typing import TYPE_CHECKING, Any

from accelerate.data_loader import BatchSamplerShard, DataLoaderShard
from transformers import TrainerCallback

from esm_efficient import compat
from esm_efficient.data.batching import TokenBudgetBatchSampler, lengths_of
from esm_efficient.errors import ConfigurationError
from esm_efficient.tasks import IGNORE

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor
    from torch.utils.data import DataLoader
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments


class EpochCallback(TrainerCallback):
    """Set the epoch of a `TokenBudgetBatchSampler`.

    accelerate sets it too, but not when a run resumes: transformers 5.3 first wraps the loader to skip batches, and
    the epoch does not reach the sampler inside.
    """

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the epoch."""
        sampler = getattr(kwargs.get("train_dataloader"), "batch_sampler", None)
        if isinstance(sampler, TokenBudgetBatchSampler):
            sampler.set_epoch(int(state.epoch + 1e-6))


def budget_dataloader(trainer: Trainer, token_budget: int) -> DataLoader:
    """Return a Trainer's data loader with batches of at most `token_budget` tokens, padding included.

    Raises:
        ConfigurationError: the training set is missing or is a stream.
    """
    args, accelerator = trainer.args, trainer.accelerator
    dataset: Any = trainer.train_dataset
    if dataset is None or not hasattr(dataset, "__len__"):
        raise ConfigurationError("token_budget needs a train_dataset with a length, to sort sequences by their tokens")
    sampler = TokenBudgetBatchSampler(
        lengths_of(dataset, args.length_column_name),
        token_budget,
        seed=args.seed if args.data_seed is None else args.data_seed,
        ranks=accelerator.num_processes,
        rank=accelerator.process_index,
    )
    dataset, collate = compat.without_unused_columns(trainer, dataset, trainer.data_collator)
    workers = args.dataloader_num_workers
    # The sampler already divides the batches among the ranks: accelerate only moves them to the device.
    return DataLoaderShard(
        dataset,
        device=accelerator.device,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=args.dataloader_pin_memory,
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor if workers else None,
    )


def count_real_examples(dataloader: Any, accelerator: Accelerator) -> int | None:
    """Count the examples of this rank's newest batch that accelerate does not repeat to give every rank a full batch.

    Args:
        dataloader: the data loader that made the batch.
        accelerator: the accelerator that divides the batches among the ranks.

    Returns:
        The number of examples at the start of the batch that are not repeated, `sys.maxsize` if all are real; None if
        it is unknown.
    """
    world = accelerator.num_processes
    if world == 1 or not accelerator.even_batches or not accelerator.gradient_state.end_of_dataloader:
        return sys.maxsize
    shards = getattr(dataloader, "batch_sampler", None)
    batches = getattr(shards, "batch_sampler", None)
    sampler, size = getattr(batches, "sampler", None), getattr(batches, "batch_size", None)
    if not (isinstance(shards, BatchSamplerShard) and isinstance(sampler, Sized) and size) or shards.split_batches:
        return None
    remainder = len(sampler) % (size * world)
    # The ranks' last batches in order of rank are the rest of the dataset, followed by repeated examples.
    return min(max(remainder - size * accelerator.process_index, 0), size) if remainder else sys.maxsize


def forget_labels(labels: Tensor, start: int) -> Tensor:
    """Return labels that are unknown, and so have no weight, from an example on."""
    if start >= len(labels):
        return labels
    labels = labels.clone()
    labels[start:] = float("nan") if labels.is_floating_point() else IGNORE
    return labels
