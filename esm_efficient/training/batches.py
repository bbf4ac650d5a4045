"""Training batches of a `WeightedTrainer`: those of a token budget, and examples that fill the last batch."""

from __future__ import annotations

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


def mask_repeated_examples(batch: dict[str, Any], dataloader: Any, accelerator: Accelerator) -> bool:
    """Remove the labels of examples that accelerate repeats to give every rank a full last batch.

    Args:
        batch: this rank's newest batch; its ``labels`` are changed in place.
        dataloader: the data loader that made the batch.
        accelerator: the accelerator that divides the batches among the ranks.

    Returns:
        False if the batch may have repeated examples and it is unknown which.
    """
    world = accelerator.num_processes
    if world == 1 or not accelerator.even_batches or not accelerator.gradient_state.end_of_dataloader:
        return True
    shards = getattr(dataloader, "batch_sampler", None)
    batches = getattr(shards, "batch_sampler", None)
    sampler, size = getattr(batches, "sampler", None), getattr(batches, "batch_size", None)
    if not (isinstance(shards, BatchSamplerShard) and isinstance(sampler, Sized) and size) or shards.split_batches:
        return False
    remainder = len(sampler) % (size * world)
    if remainder:
        # The ranks' last batches in order of rank are the rest of the dataset, followed by repeated examples.
        real = min(max(remainder - size * accelerator.process_index, 0), size)
        batch["labels"][real:] = float("nan") if batch["labels"].is_floating_point() else IGNORE
    return True
