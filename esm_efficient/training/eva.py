"""EVA: first values of LoRA that come from the training data (Paischer et al. 2024, arXiv:2410.07170)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader

from esm_efficient.errors import ConfigurationError
from esm_efficient.training.arguments import half_dtype
from esm_efficient.trunk.states import STATES_COLUMN

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import TrainingArguments


_COLUMNS = ("input_ids", "attention_mask", STATES_COLUMN)


def initialize_from_data(
    model: PeftModel, dataset: Any, collator: Callable[[Sequence[Any]], Any], *, args: TrainingArguments
) -> None:
    """Set the matrices A of a model with EVA to the main directions of what their layers get, padding left out.

    peft reads batches until the directions no longer change, and gives more ranks to the layers that gain most by them.

    Args:
        model: a model whose LoRA has ``init_lora_weights="eva"``; it is changed in place. The sum of its ranks stays.
        dataset: the training examples.
        collator: makes a batch of examples, with ``attention_mask``.
        args: arguments of the Trainer: precision, sequences per batch, and the seed of their order.

    Raises:
        ConfigurationError: the data are a stream.
    """
    from peft import initialize_lora_eva_weights

    if not hasattr(dataset, "__len__"):
        raise ConfigurationError("init_lora_weights='eva' reads training data more than once, and these are a stream")

    def collate(examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return dict(collator([{name: row[name] for name in _COLUMNS if name in row} for row in examples]))

    def places_of(batch: Mapping[str, torch.Tensor], _: Any) -> torch.Tensor:
        return batch["attention_mask"].bool().nonzero()

    batches = DataLoader(
        dataset,
        batch_size=args.per_device_train_batch_size,
        shuffle=True,
        generator=torch.Generator().manual_seed(args.seed),
        collate_fn=collate,
    )
    half = half_dtype(args)
    with torch.autocast(args.device.type, half, enabled=half is not None):
        initialize_lora_eva_weights(
            model,
            batches,
            prepare_model_inputs_fn=places_of,
            gather_distributed_inputs=False,  # every rank reads the same batches
            show_progress_bar=False,
        )
