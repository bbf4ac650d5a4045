"""A collator that tells the lean encoder where the tokens of a batch are, and a check that a collator can pad."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import DefaultDataCollator, default_data_collator

from esm_efficient.encoder import has_lean_encoder
from esm_efficient.encoder.packing import attach_packing, describe_batch
from esm_efficient.errors import ConfigurationError

if TYPE_CHECKING:
    from transformers import Trainer

PACKING = "packing"
"""The key in a batch of what `PackingCollator` adds."""

_ROWS_READ = 64
"""Rows whose lengths are compared before a run: enough to find that they differ, and read in no time."""


class PackingCollator:
    """Adds to a batch where its tokens are, while it is on the CPU, so that the lean encoder waits for no GPU.

    A data loader moves what is added to the device with the rest of the batch. `attach_packing_of` takes it out again.

    Args:
        collate: the collator of a trainer.
    """

    def __init__(self, collate: Any) -> None:
        self.collate = collate

    def __call__(self, rows: Any) -> Any:
        """Return the batch with a packing, if it has an attention mask of (sequences, tokens)."""
        batch = self.collate(rows)
        mask = batch.get("attention_mask") if isinstance(batch, MutableMapping) else None
        if isinstance(mask, torch.Tensor) and mask.device.type == "cpu" and mask.dim() == 2:
            batch[PACKING] = describe_batch(mask)
        return batch


@contextmanager
def packing_collator(trainer: Trainer) -> Iterator[None]:
    """Make the data loaders that a Trainer creates in a ``with`` block add packings, if its model reads them.

    A loader that dispatches the batches of the first rank cuts every tensor of a batch into rows, which a packing does
    not have.
    """
    collate = trainer.data_collator
    if has_lean_encoder(cast(Any, trainer.model)) and not trainer.accelerator.dispatch_batches:
        trainer.data_collator = cast(Any, PackingCollator(collate))
    try:
        yield
    finally:
        trainer.data_collator = collate


def attach_packing_of(batch: Any) -> Any:
    """Return a batch without its packing, which the lean encoder then finds at the attention mask."""
    if not isinstance(batch, Mapping) or PACKING not in batch:
        return batch
    attach_packing(batch["attention_mask"], batch[PACKING])
    return {name: value for name, value in batch.items() if name != PACKING}


def refuse_rows_without_padding(trainer: Trainer) -> None:
    """Refuse sequences of unequal lengths if a Trainer without a tokenizer has the collator that does not pad.

    The first rows of a `datasets.Dataset` are read; other data are left to the collator, and so are batches of one.

    Raises:
        ConfigurationError: as above.
    """
    from datasets import Dataset

    rows: Any = trainer.train_dataset
    collate: Any = trainer.data_collator
    if collate is not default_data_collator and not isinstance(collate, DefaultDataCollator):
        return
    is_single = trainer.args.train_batch_size == 1 and getattr(trainer, "token_budget", None) is None
    if is_single or not isinstance(rows, Dataset) or "input_ids" not in rows.column_names:
        return
    lengths = [len(ids) for ids in rows[:_ROWS_READ].get("input_ids", ())]
    if len(set(lengths)) > 1:
        raise ConfigurationError(
            f"the training sequences have {min(lengths)} to {max(lengths)} tokens, and the trainer has neither a "
            "tokenizer nor a data collator that pads them. Give processing_class=tokenizer, or data_collator="
        )
