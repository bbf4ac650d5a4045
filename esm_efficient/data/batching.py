"""From token ids to batches of tensors."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from esm_efficient.data.deeploc import load_deeploc
from esm_efficient.data.encoding import tokenize_dataset
from esm_efficient.data.sequences import Keep

if TYPE_CHECKING:
    from torch.utils.data import DataLoader
    from transformers import PreTrainedTokenizerBase


class DeepLocLoaders(NamedTuple):
    """The three DataLoaders of `deeploc_dataloaders`; ``validation`` is None when the split has none."""

    train: DataLoader
    validation: DataLoader | None
    test: DataLoader


def deeploc_dataloaders(
    tokenizer: PreTrainedTokenizerBase,
    source: str | Path | None = None,
    *,
    batch_size: int = 8,
    max_length: int = 1024,
    keep: Keep = "start",
    seed: int = 0,
    num_workers: int = 0,
    **load_options: Any,
) -> DeepLocLoaders:
    """Plain torch DataLoaders over DeepLoc-2.0, for people with a training loop of their own.

    Args:
        tokenizer: of an ESM model.
        source: as in `load_deeploc`.
        batch_size: sequences a batch.
        max_length: the most tokens of a sequence.
        keep: what stays of a longer sequence, as in `tokenize_dataset`.
        seed: of the split and of the order of the training batches; each epoch has another order.
        num_workers: processes that prepare batches.
        **load_options: everything else that `load_deeploc` takes.

    Returns:
        Loaders for training (shuffled), validation and test. A batch is a dict of int64 tensors: ``input_ids`` and
        ``attention_mask`` of shape (batch, tokens of the longest), ``labels`` of shape (batch,).

    Raises:
        DownloadError, DataError, ConfigurationError: as `load_deeploc` and `tokenize_dataset`.

    Example:
        >>> from transformers import AutoTokenizer
        >>> from esm_efficient.demo import demo_model_path, write_demo_table
        >>> tokenizer = AutoTokenizer.from_pretrained(demo_model_path())  # doctest: +SKIP
        >>> loaders = deeploc_dataloaders(tokenizer, write_demo_table("demo.csv"))  # doctest: +SKIP
        >>> sorted(next(iter(loaders.train)))  # doctest: +SKIP
        ['attention_mask', 'input_ids', 'labels']
    """
    import torch
    from torch.utils.data import DataLoader
    from transformers import DataCollatorWithPadding

    data, _ = tokenize_dataset(
        load_deeploc(source, seed=seed, **load_options), tokenizer, max_length=max_length, keep=keep
    )
    data = data.remove_columns("length")
    collate = DataCollatorWithPadding(tokenizer)

    def loader(name: str) -> DataLoader:
        shuffle = name == "train"
        return DataLoader(
            data[name],
            batch_size=batch_size,
            shuffle=shuffle,
            generator=torch.Generator().manual_seed(seed) if shuffle else None,
            collate_fn=collate,
            num_workers=num_workers,
        )

    return DeepLocLoaders(loader("train"), loader("validation") if "validation" in data else None, loader("test"))
