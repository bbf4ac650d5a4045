"""A collator that tells the lean encoder where the tokens of a batch are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch

from esm_efficient.encoder import has_lean_encoder
from esm_efficient.encoder.packing import attach_packing, describe_batch

if TYPE_CHECKING:
    from transformers import Trainer

PACKING = "packing"
"""The key in a batch of what `PackingCollator` adds."""


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
